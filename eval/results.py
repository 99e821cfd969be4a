"""Results of `eval.fid`: where they are, what they say, and whether two of them were made alike."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from core.cli.console import say
from core.cli.errors import UserError
from core.cli.files import read_json

# What must agree before two scores may be compared: name for a reader -> place in a result of eval.fid.
ALIKE = {
    "metric": ("metric",),
    "features": ("features", "name"),
    "fid.dims": ("features", "dims"),
    "transform": ("features", "transform"),
    "weights sha256": ("weights", "sha256"),
    "images in a set": ("source", "count"),
    "reference sha256": ("reference", "sha256"),
    "split": ("reference", "split"),
    "reference images": ("reference", "count"),
    "reference selection": ("reference", "selection_sha256"),
    "distance": ("distance",),
}
PACKAGES = ("torch", "torchvision", "pytorch-fid", "numpy", "pillow")  # whose versions may move a score a little
NAMES = ("fid-", "fd_random")  # how the names of result files begin
SHORT = 24  # characters shown of a long value


@dataclass(frozen=True)
class Entry:
    """A source and its result.

    Attributes:
        label: the source as it was given.
        file: where its result is, or will be.
        result: content of that file; before it is scored, only what it will say of how it was made.
    """

    label: str
    file: Path
    result: dict[str, Any]

    @property
    def scored(self) -> bool:
        """Whether there is a score yet."""
        return "values" in self.result

    @property
    def content(self) -> str:
        """SHA-256 of the model or images that the result is of."""
        return content_of(self.result["source"])


def content_of(facts: dict[str, Any]) -> str:
    """What names the content of a source among its facts: the SHA-256 of the model or of the images."""
    return str(facts["model_sha256"] if facts["kind"] == "model" else facts["sha256"])


def read_result(path: Path) -> dict[str, Any]:
    """A result of `eval.fid`.

    Raises:
        UserError: the file cannot be read, is none, or contradicts itself.
    """
    result = read_json(path)
    try:
        source, values = result["source"], result["values"]
        figures = [*values, result["mean"]] + [value for value in (result["excess"],) if value is not None]
        sound = (
            isinstance(values, list)
            and len(values) == source["sets"] > 0
            and all(math.isfinite(figure) for figure in figures)
            and math.isclose(result["mean"], float(np.mean(values)), rel_tol=1e-9)
            and all(pick(result, place) is not None for place in [*ALIKE.values(), ("reference", "path")])
            and isinstance(result["floor"], dict | None)
            and len(content_of(source)) > 0
        )
    except (KeyError, TypeError, ValueError, ArithmeticError):
        sound = False
    if not sound:
        raise UserError(f"{path} is not a result of eval.fid, or is damaged: give another, or score its source again")
    return dict(result)


def pick(result: dict[str, Any], place: Iterable[str]) -> Any:
    """The value at a place of nested dictionaries; None where there is none."""
    value: Any = result
    for key in place:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def find_results(label: str) -> dict[str, Entry]:
    """The results of a source by metric, the newest of each; a file that is one stands for itself.

    Raises:
        UserError: there is no such source, or a result is damaged.
    """
    path = Path(label)
    if not path.exists():
        raise UserError(f"{label}: there is no such file or folder")
    found: dict[str, Entry] = {}
    try:
        files = sorted(_result_files(path), key=lambda file: file.stat().st_mtime)
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from error
    for file in files:
        entry = Entry(label, file, read_result(file))
        older = found.get(entry.result["metric"])
        if older is not None and os.environ.get("RANK", "0") == "0":  # several processes may look, one tells
            say(f"note: {file} is taken, it is newer than {older.file}")
        found[entry.result["metric"]] = entry
    return found


def _result_files(path: Path) -> list[Path]:
    """Where `eval.fid` puts results: inside a run, beside anything else."""
    if path.suffix == ".json":
        return [path]
    places = {path.absolute().parent: f"{path.absolute().name}."} | ({path: ""} if path.is_dir() else {})
    return [
        file
        for folder, prefix in places.items()
        for file in folder.iterdir()
        if file.name.startswith(tuple(prefix + name for name in NAMES)) and file.suffix == ".json"
    ]


# May they be compared?


def require_distinct(entries: list[Entry], out: str | None) -> None:
    """Refuse a result that is given twice, or that the file `out` would overwrite."""
    files: dict[Path, str] = {}
    for entry in entries:
        file = entry.file.resolve()
        if file in files:
            raise UserError(f"{files[file]} and {entry.label} stand for one result, {entry.file}: give it once")
        files[file] = entry.label
    if out is not None and Path(out).resolve() in files:
        raise UserError(f"out={out} is one of the results that are compared: give another file")


def require_comparable(entries: list[Entry]) -> None:
    """Refuse results that were not made alike.

    Raises:
        UserError: one line that names every difference with the values of all sides and their files.
    """
    different = []
    for name, place in ALIKE.items():
        sides = _sides(entries, place)
        if len(sides) > 1:
            shown = zip(_shortened(list(sides)), sides.values(), strict=True)
            different.append(f"{name} {' or '.join(f'{value} ({files})' for value, files in shown)}")
    if different:
        raise UserError(f"these results cannot be compared: {'; '.join(different)}")


def doubts(entries: list[Entry]) -> list[str]:
    """What makes a ranking less certain, one line each: warnings of the results, and where these differ a little."""
    said: dict[str, list[str]] = {}
    for entry in entries:
        for warning in entry.result.get("warnings", []):
            said.setdefault(str(warning), []).append(entry.label)
    lines = [text if len(of) == len(entries) else f"{', '.join(of)}: {text}" for text, of in said.items()]
    for place in [("device",), *(("versions", package) for package in PACKAGES)]:
        sides = _sides(entries, place)
        if len(sides) > 1:
            shown = " or ".join(f"{value} ({files})" for value, files in sides.items())
            lines.append(f"{place[-1]} differs, which may move scores a little: {shown}")
    if len(_sides(entries, ("floor", "values"))) > 1:
        lines.append("floors are not of the same sets of real images, or missing: compare scores, not their excess")
    groups: dict[str, list[str]] = {}
    for entry, identity in zip(entries, identities(entries), strict=True):
        groups.setdefault(identity, []).append(entry.label)
    same = [" and ".join(labels) for labels in groups.values() if len(labels) > 1]
    return lines + [f"{labels} are the same model or images: nothing but chance is between them" for labels in same]


def identities(entries: list[Entry]) -> list[str]:
    """What names each source's content; an archive and its folder are told to be the same by equal values."""
    first: dict[tuple[float, ...], str] = {}
    return [first.setdefault(tuple(entry.result["values"]), entry.content) for entry in entries]


def _sides(entries: list[Entry], place: Iterable[str]) -> dict[str, str]:
    """The different values that results have at a place, as text, with the files of each (or sources, before)."""
    sides: dict[str, list[str]] = {}
    for entry in entries:
        sides.setdefault(str(pick(entry.result, place)), []).append(str(entry.file) if entry.scored else entry.label)
    return {value: ", ".join(files) for value, files in sides.items()}


def _shortened(texts: list[str]) -> list[str]:
    """The part of long texts in which they differ."""
    shared = len(list(itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*texts, strict=False))))
    start = shared - 8 if shared > 12 and max(map(len, texts)) > SHORT else 0
    stop = start + SHORT
    return [f"{'…' if start else ''}{text[start:stop]}{'…' if len(text) > stop else ''}" for text in texts]
