"""Files of arrays: verified before use, once for each state of a file, and mapped into memory."""

from __future__ import annotations

import contextlib
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

from core.cli.console import say
from core.cli.errors import UserError
from core.cli.files import read_json, sha256_of, write_json

VERIFIED = ".verified.json"  # beside the files: the states in which they were verified
RECENT = 2.0  # seconds for which a change may leave the time of a file as it was: the coarsest clocks of file systems
LARGE = 1 << 29  # bytes that take about a second to verify, which a line then explains

_verified: dict[str, dict[str, Any]] = {}  # the same for this process, by path, for folders that cannot be written to


def require_sha256(path: Path, expected: str, remedy: str) -> None:
    """Refuse a file that has another SHA-256 than expected.

    A file is read once: its size, times and inode are then kept in `.verified.json`, and while they stay, it is
    trusted. One that was changed in the last two seconds is read again next time, because another change in the same
    tick of the clock would leave them as they are.

    Raises:
        UserError: the file cannot be read or is damaged; the line ends in `remedy`.
    """
    known, place = path.parent / VERIFIED, str(path.absolute())
    state = _state(path, expected)
    if _verified.get(place) == state:
        return
    entries: dict[str, Any] = {}
    if known.is_file():
        try:
            entries = read_json(known)
        except UserError:
            _tell(f"note: {known} is damaged: verifying the files of {path.parent} again")
    if entries.get(path.name) != state:
        if state["size"] >= LARGE:
            _tell(f"verifying {path} ({state['size'] / 1e9:.1f} GB), once until it changes")
        started = time.time()
        if sha256_of(path) != expected:
            raise UserError(f"{path} is damaged (its SHA-256 is not the one that was written down): {remedy}")
        if max(state["mtime_ns"], state["ctime_ns"]) > (started - RECENT) * 1e9 or _state(path, expected) != state:
            return
        entries = {name: entry for name, entry in entries.items() if (path.parent / name).exists()}
        with contextlib.suppress(UserError):
            write_json(known, entries | {path.name: state})
    _verified[place] = state


def map_array(path: Path, dtype: str, dimensions: int, remedy: str) -> np.ndarray:
    """Memory-map a .npy file, after a comparison of its header with what is expected and with the size of the file.

    Raises:
        UserError: the file cannot be read, is damaged or holds something else; the line ends in `remedy`.
    """
    try:
        with path.open("rb") as handle:
            version = npy.read_magic(handle)
            shape, by_columns, found = npy.read_array_header_1_0(handle)
            offset, size = handle.tell(), os.fstat(handle.fileno()).st_size
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror or error}): {remedy}") from error
    # NumPy evaluates the header as Python and passes on what that raises: TokenError, MemoryError and others.
    except Exception as error:
        raise UserError(f"cannot read {path} (not an array, or a damaged one): {remedy}") from error
    expected = version == (1, 0) and not by_columns and found == np.dtype(dtype) and len(shape) == dimensions
    if not expected or min(shape) < 1 or offset + math.prod(shape) * found.itemsize != size:
        raise UserError(f"{path} holds {found} {shape} in {size:,} bytes, which is not what was written: {remedy}")
    return np.memmap(path, found, "r", offset, shape)


def _state(path: Path, sha256: str) -> dict[str, Any]:
    """What changes whenever the content of a file may have, and the hash that it is to have."""
    try:
        stat = path.stat()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    times = {"mtime_ns": stat.st_mtime_ns, "ctime_ns": stat.st_ctime_ns}
    return {"size": stat.st_size, **times, "inode": stat.st_ino, "sha256": sha256}


def _tell(text: str) -> None:
    """Print a message, from one of several processes."""
    if os.environ.get("RANK", "0") == "0":
        say(text)
