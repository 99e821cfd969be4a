"""The folder of a run: its configuration, written once, and its statistics, one JSON line per interval."""

from __future__ import annotations

import contextlib
import hashlib
import json
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from core.cli.console import warn
from core.cli.errors import UserError
from core.cli.files import atomic_path
from core.cli.text import listed, shown

SEAL = "\n# sha256 of the lines above: "  # what the last line of config.yaml begins with


class RunFolder:
    """runs/<name>/: config.yaml, stats.jsonl, samples/, state/, model.safetensors."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config, self.stats = self.path / "config.yaml", self.path / "stats.jsonl"
        self.samples, self.state = self.path / "samples", self.path / "state"

    def check_config(
        self, config: dict[str, Any], changeable: Collection[str], reasons: Mapping[str, str] | None = None
    ) -> None:
        """Refuse to continue a run with other settings, but for `changeable` keys.

        The UserError names each change, and says of the keys in `reasons` why they may not change.
        """
        if not self.config.exists():
            return
        command = trained_by(self.read_config())
        if command != trained_by(config):
            raise UserError(f"{self.path} is a run of {command}: use another name=...")
        stored = flatten(self.read_config())
        wanted = flatten(config)
        keys = [
            key
            for key in sorted(stored.keys() | wanted.keys())
            if stored.get(key) != wanted.get(key) and key not in changeable
        ]
        if keys:
            differing = [
                f"{shown(key, 40)} ({shown(repr(stored.get(key)), 40)} -> {shown(repr(wanted.get(key)), 40)})"
                for key in keys
            ]
            why = "".join(f"{reason}. " for key, reason in (reasons or {}).items() if key in keys)
            few = differing[:3] + [f"and {len(differing) - 3} more"] * (len(differing) > 3)
            raise UserError(
                f"{self.path} was started with other settings: {', '.join(few)}. "
                f"{why}Use another name=..., or the old settings to continue"
            )

    def read_config(self) -> dict[str, Any]:
        """The stored configuration. Raises UserError where it is not there, not as it was written, or not YAML."""
        try:
            text = self.config.read_bytes().decode()
            body, _, digest = text.partition(SEAL)
            if digest and digest.strip() != _digest(body):
                raise UserError(
                    f"{self.config} was damaged or edited: put it right, and delete its last line, which holds the "
                    "checksum of what was there"
                )
            stored = yaml.safe_load(text)
            if not isinstance(stored, dict):
                raise ValueError("it holds no settings")
        except UserError:
            raise
        except Exception as error:  # damaged YAML can end in any
            raise UserError(f"cannot read {self.config}: {' '.join(str(error).split())}") from error
        return {str(key): value for key, value in stored.items()}

    def write_config(self, config: dict[str, Any]) -> None:
        """Store the resolved configuration, with a checksum in the last line."""
        # Not by OmegaConf, which would expand a `${` in a name.
        text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True).rstrip("\n")
        with atomic_path(self.config) as temporary:
            temporary.write_bytes(f"{text}{SEAL}{_digest(text)}\n".encode())

    def pictures(self) -> list[tuple[int, Path]]:
        """Images seen and path of each picture in samples/, in order; not of links that lead out of the run."""
        home = self.path.resolve()
        named = ((int(path.stem), path) for path in self.samples.glob("*.png") if path.stem.isdecimal())
        return sorted((images, path) for images, path in named if path.resolve().is_relative_to(home))

    def last_picture(self) -> Path | None:
        """The newest of the pictures in samples/, if there is one."""
        return max(self.samples.glob("*.png"), default=None)

    def remove_leftovers(self) -> None:
        """Delete temporary files of killed trainings; others may not be at work on this run, which a lock ensures."""
        for folder in (self.path, self.samples, self.state):
            for leftover in folder.glob(".*.part"):
                with contextlib.suppress(OSError):
                    leftover.unlink()

    def rewind_stats(self, images_seen: int, goes_on: bool = True) -> None:
        """Drop rows after `images_seen`, and what is damaged: a killed run may have gone past its checkpoint.

        If training `goes_on`, rows of intervals that were cut short are dropped, too: it writes one of the whole.
        """
        if not self.stats.exists():
            return
        rows = [row for row in self.read_stats() if row["images"] <= images_seen]
        kept = [row for row in rows if not (goes_on and row.get("partial"))]
        with atomic_path(self.stats) as temporary:
            temporary.write_text("".join(map(_line, kept)), encoding="utf-8")

    def append_stats(self, row: dict[str, Any]) -> None:
        """Append a row; its `images` says when. Raises UserError where that fails."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with self.stats.open("a", encoding="utf-8") as handle:
                handle.write(_line(row))
        except OSError as error:
            raise UserError(f"cannot write {self.stats}: {error.strerror or error}") from error

    def read_stats(self) -> list[dict[str, Any]]:
        """All rows of stats.jsonl but damaged ones, which are named in a warning; a torn last line goes unnamed."""
        rows, complaint = self.scan_stats()
        if complaint:
            warn(complaint)
        return rows

    def scan_stats(self) -> tuple[list[dict[str, Any]], str]:
        """The same rows, and what is to be said of the damaged ones, if anything. UserError for an unreadable file."""
        if not self.stats.exists():
            return [], ""
        try:
            *lines, _torn = self.stats.read_bytes().split(b"\n")
        except OSError as error:
            raise UserError(f"cannot read {self.stats}: {error.strerror or error}") from error
        rows, bad = [], []
        for number, line in enumerate(lines, 1):
            row = unsealed(line)
            if row is not None and isinstance(row.get("images"), int):
                rows.append(row)
            else:
                bad.append(str(number))
        return rows, f"{self.stats}: line {listed(bad)} is damaged and left out" if bad else ""


def trained_by(config: dict[str, Any]) -> str:
    """The command whose runs have such settings."""
    return "facet seg-train" if "valid_split" in config else "facet train"


def no_run(path: Path) -> UserError:
    """The error for a path that is no run's; it proposes the runs in that folder."""
    inside = [str(file.parent) for file in sorted(path.glob("*/config.yaml"))]
    return UserError(f"there is no run at {path}: give the folder of one, such as {listed(inside) or 'runs/first'}")


def sealed(row: dict[str, Any]) -> dict[str, Any]:
    """`row` with the CRC-32 of its JSON at the end."""
    return row | {"crc32": f"{zlib.crc32(json.dumps(row).encode()):08x}"}


def unsealed(text: bytes) -> dict[str, Any] | None:
    """The object that `sealed` made and JSON holds; None where it was damaged. Earlier versions wrote no checksum."""
    try:
        row = json.loads(text)
    except ValueError:
        return None
    if not isinstance(row, dict):
        return None
    crc = row.pop("crc32", None)
    return row if crc is None or sealed(row)["crc32"] == crc else None


def _line(row: dict[str, Any]) -> str:
    return json.dumps(sealed(row)) + "\n"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
