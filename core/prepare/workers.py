"""The part of preparation that worker processes share: decode, resize and store the images of one chunk after another.

Chunks go into memory-mapped arrays of `<out>.part`, each with a checksum over its bytes.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import warnings
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
from numpy.lib import format as npy
from PIL import Image

from core.cli.errors import UserError
from core.data.dataset import FORMAT
from core.data.decode import reason_of
from core.prepare.geometry import squared
from core.prepare.image_source import ImageSource


@dataclass(frozen=True)
class Plan:
    """One preparation.

    Attributes:
        source, count: what is prepared, and how many of its images.
        size, fit: side in pixels, and how pictures are made square (`core.prepare.geometry.squared`).
        folder: where unfinished work lies.
    """

    source: ImageSource
    count: int
    size: int
    fit: str
    folder: Path

    @property
    def key(self) -> str:
        """Names source content and settings: two plans of equal keys want the same data set."""
        settings = [FORMAT, self.source.identity, self.count, self.size]
        if self.fit != "crop":  # cropped data sets keep the names they had before there was a choice
            settings.append(self.fit)
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Arrays to write and their shapes before unreadable images are dropped."""
        flat = (self.count, self.size, self.size)
        return {"images.npy": (*flat, 3)} | ({"masks.npy": flat} if self.source.classes else {})

    def rows(self, chunk: int) -> range:
        """Positions of the images of one chunk."""
        return range(self.count)[chunk * self.source.chunk : (chunk + 1) * self.source.chunk]

    def images_in(self, chunks: dict[int, Done]) -> int:
        """Number of images in some chunks, unreadable ones included."""
        return sum(len(self.rows(chunk)) for chunk in chunks)


@dataclass(frozen=True)
class Done:
    """A finished chunk: its checksum over all arrays, and (position, reason) of each unreadable image."""

    chunk: int
    crc: int
    bad: list[tuple[int, str]]


def create_array(path: Path, shape: tuple[int, ...]) -> None:
    """A .npy file of zeros with its space reserved: a disk that fills up later would kill whoever writes to a map."""
    array = npy.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
    total = array.offset + array.nbytes
    del array
    try:
        if hasattr(os, "posix_fallocate"):
            with path.open("r+b") as handle:
                os.posix_fallocate(handle.fileno(), 0, total)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # these: the file system cannot reserve
            shutil.rmtree(path.parent)
            raise UserError(f"cannot write {path}: {error.strerror} ({total / 1e9:.1f} GB needed)") from error


def open_arrays(plan: Plan) -> list[np.memmap]:
    """The arrays in `<out>.part`, writable; OSError or ValueError when missing or not of the planned shape."""
    arrays = [npy.open_memmap(plan.folder / name, mode="r+") for name in plan.shapes]
    if [array.shape for array in arrays] != list(plan.shapes.values()):
        raise ValueError("arrays of another shape")
    return arrays


def checksum(arrays: list[np.memmap], rows: range) -> int:
    """CRC-32 over some rows of all arrays."""
    crc = 0
    for array in arrays:
        crc = zlib.crc32(np.ascontiguousarray(array[rows.start : rows.stop]).data, crc)
    return crc


class _Worker:
    """Fills chunks; one per process, so that archive and arrays are opened once."""

    current: _Worker

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.arrays = open_arrays(plan)

    def fill(self, chunk: int) -> Done:
        """Decode, resize and store the images of one chunk."""
        rows = self.plan.rows(chunk)
        bad: list[tuple[int, str]] = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on odd palettes and EXIF blocks
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            for row in rows:
                try:
                    for array, picture in zip(self.arrays, self._pictures(row), strict=True):
                        array[row] = picture
                except Exception as error:  # decoders answer damaged files with nearly any exception
                    bad.append((row, reason_of(error)))
        return Done(chunk, checksum(self.arrays, rows), bad)

    def _pictures(self, row: int) -> list[Image.Image]:
        picture, mask = self.plan.source.load(row)
        return squared(picture, mask, self.plan.size, self.plan.fit)


def _start_worker(plan: Plan) -> None:
    """Set up a worker process: Ctrl-C is the parent's business, and a parent that was killed ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()
    _Worker.current = _Worker(plan)


def _leave_with(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)


def _fill(chunk: int) -> Done:
    return _Worker.current.fill(chunk)


@contextlib.contextmanager
def running(plan: Plan, todo: list[int], workers: int) -> Iterator[Iterator[Done]]:
    """Chunks as they get finished, by worker processes when there is more than one chunk and `workers` > 1."""
    workers = min(workers, len(todo))
    if workers <= 1:
        yield map(_Worker(plan).fill, todo)
        return
    method = "fork" if sys.platform == "linux" else "spawn"  # fork starts at once but is unsafe on macOS
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context(method), _start_worker, (plan,))
    try:
        futures = [pool.submit(_fill, chunk) for chunk in todo]
        yield (future.result() for future in as_completed(futures))
    except BrokenProcessPool as error:
        raise UserError("a worker process was ended (out of memory or disk?): run again to continue") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
