"""Result files of `eval.fid`: finding and reading them, and whether two were made alike."""

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

# What must agree before two scores may be compared: name in messages -> place in a result of eval.fid.
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
PACKAGES = ("torch", "torchvision", "pytorch-fid", "numpy", "pillow")  # their versions may move a score a little
NAMES = ("fid-", "fd_")  # prefixes of result files
SHORT = 24  # characters shown of a long value


@dataclass(frozen=True)
class Entry:
    """A source and its result.

    Attributes:
        label: the source as the user gave it.
        file: where its result is or will be.
        result: content of that file; before scoring, only the part that says how it is made.
    """

    label: str
    file: Path
    result: dict[str, Any]

    @property
    def scored(self) -> bool:
        """Whether the result has a score yet."""
        return "values" in self.result

    @property
    def content(self) -> str:
        """SHA-256 of the scored model or images."""
        return content_of(self.result["source"])


def content_of(facts: dict[str, Any]) -> str:
    """The SHA-256 of the model or images among the facts of a source."""
    return str(facts["model_sha256"] if facts["kind"] == "model" else facts["sha256"])


def read_result(path: Path) -> dict[str, Any]:
    """A result of `eval.fid`.

    Raises:
        UserError: the file cannot be read, is not a result, or contradicts itself.
    """
    result = read_json(path, "give another result, or score its source again")
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
    return result


def pick(result: dict[str, Any], place: Iterable[str]) -> Any:
    """The value at a place in nested dictionaries; None if it does not exist."""
    value: Any = result
    for key in place:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def real_images(reference: dict[str, Any]) -> str:
    """Number and part of the real images of a reference, in words."""
    if reference.get("kind") == "statistics":
        return "statistics alone"
    return f"{reference['count']:,} images" + ("" if reference["split"] == "all" else f", split {reference['split']}")


def find_results(label: str) -> dict[str, Entry]:
    """The newest result of a source for each metric. A result file counts as a source with that result.

    Raises:
        UserError: the source does not exist, or a result is damaged.
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
        if older is not None and os.environ.get("RANK", "0") == "0":  # one of several processes tells
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


# --- comparability ------------------------------------------------------------------------------------------------


def require_distinct(entries: list[Entry], out: str | None) -> None:
    """Refuse a result that was given twice or that writing `out` would replace."""
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
        UserError: one line that names every difference, with the values and the files that have them.
    """
    different = []
    for name, place in ALIKE.items():
        sides = _sides(entries, place)
        if len(sides) > 1:
            shown = zip(_shortened(list(sides)), sides.values(), strict=True)
            different.append(f"{name} {' or '.join(f'{value} ({files})' for value, files in shown)}")
    if different:
        raise UserError(f"these results cannot be compared: {'; '.join(different)}")


def ranking_warnings(entries: list[Entry]) -> list[str]:
    """What makes a ranking less certain, one line each: warnings of the results, and small differences between them."""
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
    """The identity of each source's content. Equal values identify an archive with the folder it was packed from."""
    first: dict[tuple[float, ...], str] = {}
    return [first.setdefault(tuple(entry.result["values"]), entry.content) for entry in entries]


def _sides(entries: list[Entry], place: Iterable[str]) -> dict[str, str]:
    """The different values at a place in the results, as text, with the files (or unscored sources) that have each."""
    sides: dict[str, list[str]] = {}
    for entry in entries:
        sides.setdefault(str(pick(entry.result, place)), []).append(str(entry.file) if entry.scored else entry.label)
    return {value: ", ".join(files) for value, files in sides.items()}


def _shortened(texts: list[str]) -> list[str]:
    """Long texts cut to the part in which they differ."""
    shared = len(list(itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*texts, strict=False))))
    start = shared - 8 if shared > 12 and max(map(len, texts)) > SHORT else 0
    stop = start + SHORT
    return [f"{'…' if start else ''}{text[start:stop]}{'…' if len(text) > stop else ''}" for text in texts]


def differences_from_terms(existing: dict[str, Any], terms: dict[str, Any], floor_seed: int | None) -> list[str]:
    """In what an existing result differs from the terms; it may have more sets than they ask for."""
    different = [name for name, place in ALIKE.items() if pick(existing, place) != pick(terms, place)]
    if content_of(existing["source"]) != content_of(terms["source"]):
        different.append("content")
    seeds = terms["source"].get("first_seeds", [])
    if existing["source"].get("first_seeds", [])[: len(seeds)] != seeds:
        different.append("sets or seed")
    if floor_seed is not None and (existing["floor"] or {}).get("seed") != floor_seed:
        different.append("floor")
    return different
