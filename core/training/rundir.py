"""The folder of a run: its configuration, written once, and its statistics, one JSON line per interval."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

from core.cli.errors import UserError
from core.cli.files import atomic_path


class RunFolder:
    """runs/<name>/: config.yaml, stats.jsonl, samples/, state/, model.safetensors."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config, self.stats = self.path / "config.yaml", self.path / "stats.jsonl"
        self.samples, self.state = self.path / "samples", self.path / "state"

    def check_config(self, config: dict[str, Any], changeable: Collection[str]) -> None:
        """Refuse to continue a run with other settings, but for `changeable` keys; the UserError names each change."""
        if not self.config.exists():
            return
        try:
            stored = flatten(yaml.safe_load(self.config.read_text(encoding="utf-8")))
        except Exception as error:  # damaged YAML can end in any
            raise UserError(f"cannot read {self.config}: {' '.join(str(error).split())}") from error
        wanted = flatten(config)
        differing = [
            f"{key} ({stored.get(key)!r} -> {wanted.get(key)!r})"
            for key in sorted(stored.keys() | wanted.keys())
            if stored.get(key) != wanted.get(key) and key not in changeable
        ]
        if differing:
            raise UserError(
                f"{self.path} was started with other settings: {', '.join(differing)}. "
                "Use another name=..., or the old settings to continue"
            )

    def write_config(self, config: dict[str, Any]) -> None:
        """Store the resolved configuration."""
        with atomic_path(self.config) as temporary:
            # Not by OmegaConf, which would expand a `${` in a name.
            temporary.write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), encoding="utf-8")

    def rewind_stats(self, images_seen: int) -> None:
        """Drop rows after `images_seen`, and a torn last line: a killed run may have gone past its checkpoint."""
        if not self.stats.exists():
            return
        kept = []
        for line in self.stats.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                if json.loads(line)["images"] <= images_seen:
                    kept.append(line + "\n")
        with atomic_path(self.stats) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")

    def append_stats(self, row: dict[str, Any]) -> None:
        """Append a row; its `images` says when. Raises UserError where that fails."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with self.stats.open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(row) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self.stats}: {error.strerror or error}") from error

    def read_stats(self) -> list[dict[str, Any]]:
        """All rows of stats.jsonl."""
        if not self.stats.exists():
            return []
        return [json.loads(line) for line in self.stats.read_text(encoding="utf-8").splitlines()]


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
