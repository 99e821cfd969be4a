"""Whether the files of a folder are whole, and whether two folders hold the same."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from core.cli.files import read_json
from core.data.arrays import VERIFIED
from core.submission.archive import Problems, read_members

# Measured times, in statistics and results, and the checksums of what has them; curves.png shows them.
TIMES = frozenset(("images_per_s", "seconds", "date", "crc32"))
SHOWS_TIMES = "curves.png"
UNFINISHED = (".part", ".parts", ".old", ".new")


def unfinished(path: Path) -> bool:
    """Whether a name below the working folder is that of a file or folder that is still being made."""
    return any(part.endswith(UNFINISHED) for part in path.parts)


def files_below(folder: Path) -> list[Path]:
    """The files below a folder, relative to it, without those that hold the times of others."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != VERIFIED)
    return sorted(path.relative_to(folder) for path in files)


def damaged(folder: Path) -> list[str]:
    """The files under their final name that cannot be read to the end, with the reason."""
    found = []
    for name in files_below(folder):
        if not unfinished(name):
            try:
                content(folder / name)
            except Exception as error:  # of any reader
                found.append(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:100]}")
    return found


def differences(torn: Path, calm: Path) -> list[str]:
    """What differs between the folder of interrupted commands and that of undisturbed ones."""
    names, wanted = set(files_below(torn)), set(files_below(calm))
    found = [f"{name} is left over" for name in sorted(names - wanted)]
    found += [f"{name} is missing" for name in sorted(wanted - names)]
    for name in sorted(names & wanted):
        if name.name != SHOWS_TIMES and not equal(content(torn / name), content(calm / name)):
            found.append(f"{name} differs")
    return found


def content(path: Path) -> Any:
    """What a file holds, without measured times; raises whatever the reader raises for a damaged file."""
    return READERS.get(path.suffix, Path.read_bytes)(path)


def _of_json(path: Path) -> Any:
    return _timeless(read_json(path))


def _of_jsonl(path: Path) -> Any:
    """Rows of statistics; a last line that was cut short belongs to no checkpoint and is dropped by the next start."""
    lines = path.read_text("utf-8").splitlines(keepends=True)
    return [_timeless(json.loads(line)) for line in lines if line.endswith("\n")]


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(entry) for key, entry in value.items() if key not in TIMES}
    return [_timeless(entry) for entry in value] if isinstance(value, list) else value


def _of_model(path: Path) -> Any:
    from safetensors import safe_open

    with safe_open(path, framework="np") as archive:
        return archive.metadata(), {name: archive.get_tensor(name) for name in archive.keys()}  # noqa: SIM118


def _of_checkpoint(path: Path) -> Any:
    import torch

    with zipfile.ZipFile(path) as archive:
        if member := archive.testzip():
            raise ValueError(f"checksum of {member}")
    return torch.load(path, map_location="cpu", weights_only=True)


def _of_array(path: Path) -> Any:
    return np.load(path, allow_pickle=False)


def _of_picture(path: Path) -> Any:
    if not path.read_bytes().endswith(b"IEND\xaeB`\x82"):
        raise ValueError("cut short")  # which Pillow accepts behind the last pixel
    with Image.open(path) as picture:
        return np.asarray(picture)


def _of_archive(path: Path) -> Any:
    problems = Problems()
    members = list(read_members(path, problems))
    if lines := problems.lines():
        raise ValueError(lines[0])
    return [path.read_bytes(), *members]


READERS: dict[str, Callable[[Path], Any]] = {
    ".json": _of_json,
    ".jsonl": _of_jsonl,
    ".safetensors": _of_model,
    ".pt": _of_checkpoint,
    ".npy": _of_array,
    ".png": _of_picture,
    ".gz": _of_archive,
}


def equal(one: Any, other: Any) -> bool:
    """Whether two values of nested containers are the same bit by bit, arrays and tensors included."""
    if isinstance(one, dict):
        return (
            isinstance(other, dict) and one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
        )
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(equal, one, other))
    if hasattr(one, "dtype") and hasattr(other, "dtype"):
        same = one.dtype == other.dtype and one.shape == other.shape
        return bool(same and np.asarray(one).tobytes() == np.asarray(other).tobytes())
    return bool(one == other)
