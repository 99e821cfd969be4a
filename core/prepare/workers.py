"""Worker processes, which decode, resize and store images chunk by chunk in memory-mapped arrays."""

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
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

from core.cli.errors import UserError
from core.data.bounds import bounded_pictures
from core.data.dataset import FORMAT
from core.data.decode import LARGEST, reason_of
from core.prepare.geometry import squared
from core.prepare.image_source import ImageSource


@dataclass(frozen=True)
class Plan:
    """What to prepare."""

    source: ImageSource
    count: int  # of its images
    size: int  # side in pixels
    fit: str  # how pictures are made square, see `core.prepare.geometry.squared`
    folder: Path  # for unfinished work

    @property
    def key(self) -> str:
        """A hash of source content and settings: plans with equal keys give equal data sets."""
        settings = [FORMAT, self.source.identity, self.count, self.size, *([self.fit] if self.fit != "crop" else [])]
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the arrays by file name, before unreadable images are dropped."""
        flat = (self.count, self.size, self.size)
        return {"images.npy": (*flat, 3)} | ({"masks.npy": flat} if self.source.classes else {})

    def rows(self, chunk: int) -> range:
        """Indices of the images in a chunk."""
        return range(self.count)[chunk * self.source.chunk : (chunk + 1) * self.source.chunk]

    def images_in(self, chunks: dict[int, Done]) -> int:
        """Number of images in some chunks, including unreadable ones."""
        return sum(len(self.rows(chunk)) for chunk in chunks)


@dataclass(frozen=True)
class Done:
    """A finished chunk."""

    chunk: int
    crc: int  # over its rows of all arrays
    bad: list[tuple[int, str]]  # index of each unreadable image, and the reason
    largest: int | None  # value in the pictures of 16 bits; None if there were none


def create_array(path: Path, shape: tuple[int, ...]) -> None:
    """Write a .npy file of zeros and reserve its space: writing to a memory map on a full disk kills the process."""
    array = npy.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
    total = array.offset + array.nbytes
    del array
    try:
        if hasattr(os, "posix_fallocate"):
            with path.open("r+b") as handle:
                os.posix_fallocate(handle.fileno(), 0, total)
        elif sys.platform == "darwin" and shutil.disk_usage(path.parent).free < total:  # space cannot be reserved
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # a file system that cannot reserve space
            shutil.rmtree(path.parent)
            raise UserError(f"cannot write {path}: {error.strerror} ({total / 1e9:.1f} GB needed)") from error


def open_arrays(plan: Plan) -> list[np.memmap]:
    """The arrays in the plan's folder, writable; an OSError or ValueError if missing or of another shape."""
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


def _fill(plan: Plan, arrays: list[np.memmap], chunk: int) -> Done:
    """Decode, resize and store the images of one chunk."""
    bad: list[tuple[int, str]] = []
    largest: list[int] = []
    with bounded_pictures():
        for row in plan.rows(chunk):
            try:
                picture, mask = plan.source.load(row)
                pictures = squared(picture, mask, plan.size, plan.fit)
                if LARGEST in picture.info:
                    largest.append(picture.info[LARGEST])
                for array, square in zip(arrays, pictures, strict=True):
                    array[row] = square
            except Exception as error:  # decoders raise nearly any exception for damaged files
                bad.append((row, reason_of(error)))
    return Done(chunk, checksum(arrays, plan.rows(chunk)), bad, max(largest, default=None))


_assigned: tuple[Plan, list[np.memmap]]  # of this worker process, which opens the arrays only once


def _start_worker(plan: Plan) -> None:
    """Set up a worker process, which leaves Ctrl-C to its parent and ends if the parent is killed."""
    global _assigned
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_exit_after, args=(parent,), daemon=True).start()
    _assigned = plan, open_arrays(plan)


def _exit_after(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)


def _fill_assigned(chunk: int) -> Done:
    return _fill(*_assigned, chunk)


@contextlib.contextmanager
def running(plan: Plan, todo: list[int], workers: int) -> Iterator[Iterator[Done]]:
    """Yield the chunks `todo` as they are finished, by worker processes unless one chunk or worker is all there is."""
    workers = min(workers, len(todo))
    if workers <= 1:
        yield map(partial(_fill, plan, open_arrays(plan)), todo)
        return
    method = "fork" if sys.platform == "linux" else "spawn"  # fork is faster but unsafe on macOS
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context(method), _start_worker, (plan,))
    try:
        futures = [pool.submit(_fill_assigned, chunk) for chunk in todo]
        yield (future.result() for future in as_completed(futures))
    except BrokenProcessPool as error:
        raise UserError("a worker process was ended (out of memory or disk?): run again to continue") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
