"""Reading and writing files; what is written is either complete or absent."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from core.cli.errors import UserError

CHECKSUM = "checksum"  # last key of every JSON file
IMAGE_CACHE = ".facet-fid"  # where a folder of images has been scored against: the features of these images


def flush(path: Path) -> None:
    """Wait until a file is on the disk. It is opened for writing, because Windows refuses to flush other handles."""
    with path.open("r+b") as handle:
        os.fsync(handle.fileno())


def _replace(temporary: Path, path: Path) -> None:
    """Rename. Windows refuses while another program, such as a virus scanner, has the old file open: try for 3 s."""
    for _ in range(30 if sys.platform == "win32" else 0):
        with suppress(PermissionError):
            temporary.replace(path)
            return
        time.sleep(0.1)
    temporary.replace(path)


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files that killed processes have left in a folder; those of living ones stay."""
    for path in folder.glob(".*.part"):
        owner = path.name.split(".")[-2]
        if owner.isdecimal() and not psutil.pid_exists(int(owner)):
            path.unlink(missing_ok=True)


_tidied: set[Path] = set()  # folders in which this process has looked for leftovers: once, as some hold many files


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`: on success it is flushed to disk and renamed, on failure removed.

    The first call for a folder removes what killed processes have left there.

    A folder that cannot be created or written to is a `UserError`.
    """
    path = Path(path)
    # The process id keeps two processes from writing to the same temporary file.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.parent not in _tidied:
            _tidied.add(path.parent)
            remove_leftovers(path.parent)
        try:
            yield temporary
            flush(temporary)
            _replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def write_json(path: str | Path, value: dict[str, Any]) -> None:
    """Write `value` as indented JSON, atomically, and last in it a checksum of the rest, which `read_json` verifies.

    Raises ValueError for NaN and infinity, which JSON lacks.
    """
    # The checksum is that of what a reader gets: lists for tuples, and text for keys that are numbers.
    content = json.loads(json.dumps(value, allow_nan=False))
    content.pop(CHECKSUM, None)
    content[CHECKSUM] = digest_of(content)
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_json(path: str | Path, remedy: str = "make it again") -> dict[str, Any]:
    """What `write_json` wrote.

    Raises:
        UserError: the file is missing, unreadable or not as it was written; the line ends in `remedy`.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        intact = isinstance(content, dict) and content.pop(CHECKSUM, None) == digest_of(content)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        advice = "it is damaged or was not written by this program"
        raise UserError(f"{path} is not valid JSON ({error}), {advice}: {remedy}") from error
    if not intact:
        raise UserError(f"{path} is damaged, was edited or comes from an earlier version (wrong checksum): {remedy}")
    return dict(content)


def digest_of(key: Any) -> str:
    """16 hexadecimal digits of a JSON-ready key, for a file name; keys may collide, so store the key in the file."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def writable(folder: Path) -> bool:
    """Whether files can be created in `folder`, or `folder` in the nearest parent that exists."""
    parents = (folder.absolute(), *folder.absolute().parents)
    existing = next(parent for parent in parents if os.path.exists(parent))  # noqa: PTH110 (Path.exists may raise)
    return existing.is_dir() and os.access(existing, os.W_OK)


def sha256_of(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file, read in pieces; a `UserError` if it cannot be read."""
    digest = hashlib.sha256()
    try:
        with Path(path).open("rb") as handle:
            while piece := handle.read(1 << 20):
                digest.update(piece)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    return digest.hexdigest()
