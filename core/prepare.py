"""Decode, resize and crop a source into the prepared format of `core.data`.

The work happens in `<out>.part`, which is renamed to `<out>` at the end: a prepared data set is complete or absent.
Worker processes fill chunks of memory-mapped arrays; a journal lists the finished chunks with a checksum, so an
interrupted run continues, and a chunk whose bytes never reached the disk is noticed and done again.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
import warnings
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from numpy.lib import format as npy
from PIL import Image

from core.console import progress_bar
from core.data import FORMAT, PreparedData
from core.errors import Interrupted, UserError
from core.files import read_json, sha256_of, write_json
from core.sources import Source, reason_of, resize_crop, transform_name

BAD_LIMIT = 0.01  # more unreadable images than this share mean a broken download rather than a few broken files
LOCK_WAIT = 5.0  # seconds; workers of a killed run need a moment to notice and let go
JOURNAL = "journal.jsonl"


@dataclass(frozen=True)
class Prepared:
    """The open data set, how many images an interrupted run had left, and seconds taken (0: nothing was to be done)."""

    data: PreparedData
    resumed: int
    seconds: float


@dataclass(frozen=True)
class _Plan:
    """One preparation: the source, how many of its images, their side in pixels, and the folder of unfinished work."""

    source: Source
    count: int
    size: int
    folder: Path

    @property
    def key(self) -> str:
        """Names source content and settings: two plans of equal keys want the same data set."""
        settings = [FORMAT, self.source.identity, self.count, self.size]
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Arrays to write and their shapes before unreadable images are dropped."""
        flat = (self.count, self.size, self.size)
        return {"images.npy": (*flat, 3)} | ({"masks.npy": flat} if self.source.classes else {})

    def rows(self, chunk: int) -> range:
        """Positions of the images of one chunk."""
        return range(self.count)[chunk * self.source.chunk : (chunk + 1) * self.source.chunk]

    def images_in(self, chunks: dict[int, _Done]) -> int:
        """Number of images in some chunks, unreadable ones included."""
        return sum(len(self.rows(chunk)) for chunk in chunks)


@dataclass(frozen=True)
class _Done:
    """A finished chunk: its checksum over all arrays, and (position, reason) of each unreadable image."""

    chunk: int
    crc: int
    bad: list[tuple[int, str]]


def prepare(
    source: Source,
    out: str | Path,
    *,
    size: int = 64,
    limit: int | None = None,
    workers: int = 1,
    force: bool = False,
    quiet: bool = False,
) -> Prepared:
    """Write the prepared data set `out` from the first `limit` images (default all) of `source`.

    An image whose shorter side is below half of `size` would be enlarged more than twofold: it is skipped as tiny, like
    a corrupt one. An interrupted call continues when repeated; `out` of the same source and settings is left as it is.

    Args:
        size: side in pixels.
        workers: processes; 1 works in this process.
        force: replace a prepared data set of another source or other settings.

    Raises:
        UserError: `out` is something else, disk full, more than 1% unreadable images, or another process is at it.
        Interrupted: Ctrl-C; finished chunks are kept.
    """
    started = time.monotonic()
    out = Path(out)
    target = out.resolve()  # a link to a folder on a larger disk keeps pointing there
    plan = _Plan(source, min(limit or len(source.names), len(source.names)), size, Path(f"{target}.part"))
    done: dict[int, _Done] = {}
    try:
        if _is_prepared(out, plan, force):
            return Prepared(PreparedData.open(out), 0, 0.0)
        with _sole_writer(plan.folder):
            done.update(_resume(plan))
            resumed = plan.images_in(done)
            _work(plan, done, workers, quiet)
            _finish(plan, sorted(bad for entry in done.values() for bad in entry.bad))
            _put_in_place(plan.folder, target)
    except KeyboardInterrupt:
        kept = f"{plan.images_in(done):,} of {plan.count:,} images are done"
        raise Interrupted(f"{kept}; the same command continues") from None
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from error
    return Prepared(PreparedData.open(out), resumed, time.monotonic() - started)


def _is_prepared(out: Path, plan: _Plan, force: bool) -> bool:
    """Whether `out` is the data set asked for; False when the way is free.

    Raises:
        UserError: something else is there, and `force` does not cover it.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not (out / "meta.json").is_file():
        raise UserError(f"{out} is a file or holds other files: choose another --out")
    if force:
        return False
    meta = read_json(out / "meta.json")
    if not isinstance(meta, dict) or meta.get("key") != plan.key:
        raise UserError(f"{out} was prepared from another source or with other settings: add --force to replace it")
    try:
        PreparedData.open(out)
    except UserError as error:
        raise UserError(f"{error} (with --force)") from error
    return True


@contextlib.contextmanager
def _sole_writer(folder: Path) -> Iterator[None]:
    """Create `folder` and hold a lock on it, which the system drops when this process and its workers are gone."""
    folder.mkdir(parents=True, exist_ok=True)
    if sys.platform == "win32":  # has no flock: there it is up to the user not to start twice
        yield
        return
    import fcntl

    deadline = time.monotonic() + LOCK_WAIT
    handle = os.open(folder, os.O_RDONLY)
    try:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UserError(f"another process is writing {folder}: let it finish, then run again") from None
                time.sleep(0.1)
            except OSError:
                break  # a file system without locks, such as some network drives
        # Whoever held the lock may have finished and renamed the folder since we opened it.
        if not (folder.is_dir() and os.path.samestat(os.fstat(handle), folder.stat())):
            raise UserError(f"another process has just finished {folder}: run again")
        yield
    finally:
        os.close(handle)


def _resume(plan: _Plan) -> dict[int, _Done]:
    """Finished chunks of an interrupted run under the same heading; else none, and fresh arrays on disk."""
    journal = plan.folder / JOURNAL
    heading = {"key": plan.key, "chunk": plan.source.chunk, "pillow": PIL.__version__}
    lines: list[dict[str, Any]] = []
    # A missing file, arrays of another shape or a line cut short by a kill end the reading; what was read counts.
    with contextlib.suppress(OSError, ValueError):
        lines.extend(json.loads(line) for line in journal.read_text("utf-8").splitlines())
    if lines and lines[0] == heading:
        with contextlib.suppress(OSError, ValueError):
            arrays = _open_arrays(plan)
            entries = [_Done(line["chunk"], line["crc"], [tuple(item) for item in line["bad"]]) for line in lines[1:]]
            done = {entry.chunk: entry for entry in entries if entry.crc == _checksum(arrays, plan.rows(entry.chunk))}
            journal.write_text("".join(json.dumps(line) + "\n" for line in (heading, *map(vars, done.values()))))
            return done
    for leftover in plan.folder.iterdir():
        leftover.unlink()
    for name, shape in plan.shapes.items():
        _create_array(plan.folder / name, shape)
    journal.write_text(json.dumps(heading) + "\n")
    return {}


def _create_array(path: Path, shape: tuple[int, ...]) -> None:
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


def _open_arrays(plan: _Plan) -> list[np.memmap]:
    """The arrays in `<out>.part`, writable; OSError or ValueError when missing or not of the planned shape."""
    arrays = [npy.open_memmap(plan.folder / name, mode="r+") for name in plan.shapes]
    if [array.shape for array in arrays] != list(plan.shapes.values()):
        raise ValueError("arrays of another shape")
    return arrays


def _checksum(arrays: list[np.memmap], rows: range) -> int:
    crc = 0
    for array in arrays:
        crc = zlib.crc32(np.ascontiguousarray(array[rows.start : rows.stop]).data, crc)
    return crc


class _Worker:
    """Fills chunks; one per process, so that archive and arrays are opened once."""

    current: _Worker

    def __init__(self, plan: _Plan) -> None:
        self.plan = plan
        self.arrays = _open_arrays(plan)

    def fill(self, chunk: int) -> _Done:
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
        return _Done(chunk, _checksum(self.arrays, rows), bad)

    def _pictures(self, row: int) -> list[Image.Image]:
        size = self.plan.size
        picture, mask = self.plan.source.load(row)
        if 2 * min(picture.size) < size:
            raise ValueError(f"tiny: {picture.width}x{picture.height}")
        cut = [resize_crop(picture, size)]
        return cut if mask is None else [*cut, resize_crop(mask, size, Image.Resampling.NEAREST)]


def _start_worker(plan: _Plan) -> None:
    """Set up a worker process: Ctrl-C is the parent's business, and a parent that was killed ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()
    _Worker.current = _Worker(plan)


def _leave_with(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)


def _fill(chunk: int) -> _Done:
    return _Worker.current.fill(chunk)


@contextlib.contextmanager
def _running(plan: _Plan, todo: list[int], workers: int) -> Iterator[Iterator[_Done]]:
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


def _work(plan: _Plan, done: dict[int, _Done], workers: int, quiet: bool) -> None:
    """Fill the chunks that are not in `done`, journal each and add it there.

    Raises:
        UserError: more than 1% of the images are unreadable; `<out>.part` is removed.
    """
    todo = [chunk for chunk in range(math.ceil(plan.count / plan.source.chunk)) if chunk not in done]
    skipped = sum(len(entry.bad) for entry in done.values())
    bar = progress_bar(quiet=quiet)
    task = bar.add_task("prepare", total=plan.count, completed=plan.images_in(done))
    # The workers start first: forking beside the bar's thread could copy a lock it holds.
    with (plan.folder / JOURNAL).open("a", encoding="utf-8") as journal, _running(plan, todo, workers) as finished, bar:
        for entry in finished:
            journal.write(json.dumps(vars(entry)) + "\n")
            journal.flush()
            done[entry.chunk] = entry
            skipped += len(entry.bad)
            bar.update(task, advance=len(plan.rows(entry.chunk)))
            bar.status = f"{skipped} skipped" if skipped else ""
            if skipped > BAD_LIMIT * plan.count:
                break
    if skipped > BAD_LIMIT * plan.count:
        shutil.rmtree(plan.folder)
        bad = sorted(item for entry in done.values() for item in entry.bad)[:3]
        names = "; ".join(f"{plan.source.names[row]}: {reason}" for row, reason in bad)
        seen = f"{skipped:,} of {plan.images_in(done):,} images read so far are corrupt or tiny"
        raise UserError(f"{seen}, more than 1% of all {plan.count:,} ({names})")


def _finish(plan: _Plan, bad: list[tuple[int, str]]) -> None:
    """Close the gaps of unreadable images, write the small files and meta.json, and flush everything to disk."""
    folder, source = plan.folder, plan.source
    keep = np.ones(plan.count, dtype=bool)
    keep[[row for row, _ in bad]] = False
    for name in plan.shapes if bad else ():
        _compact(folder / name, keep)
    files = [*plan.shapes, "names.txt"]
    if source.split is not None:
        np.save(folder / "split.npy", source.split[: plan.count][keep])
        files.append("split.npy")
    names = [source.names[row] + "\n" for row in np.flatnonzero(keep)]
    (folder / "names.txt").write_text("".join(names), encoding="utf-8", newline="\n")
    meta = {
        "format": FORMAT,
        "source": source.label,
        "count": len(names),
        "image_size": plan.size,
        "transform": transform_name(plan.size),
        "classes": source.classes,
        "palette": source.palette,
        "skipped": [{"name": source.names[row], "reason": reason} for row, reason in bad],
        "pillow": PIL.__version__,
        "key": plan.key,
        "sha256": {name: sha256_of(folder / name) for name in files},
    }
    for name in files:
        with (folder / name).open("rb") as handle:
            os.fsync(handle.fileno())
    write_json(folder / "meta.json", meta)


def _compact(path: Path, keep: np.ndarray) -> None:
    """Move the kept rows of a .npy file together, in place and in pieces, and cut the file to length."""
    array = npy.open_memmap(path, mode="r+")
    filled, step = 0, 1024
    for start in range(0, len(array), step):
        piece = array[start : start + step][keep[start : start + step]]
        array[filled : filled + len(piece)] = piece
        filled += len(piece)
    shape, offset, row_bytes = (filled, *array.shape[1:]), array.offset, array[0].nbytes
    del array
    with path.open("r+b") as handle:
        npy.write_array_header_1_0(handle, {"descr": "|u1", "fortran_order": False, "shape": shape})
        assert handle.tell() == offset  # numpy leaves room in the header for any length of the first axis
        handle.truncate(offset + filled * row_bytes)


def _put_in_place(folder: Path, target: Path) -> None:
    """Rename the finished folder to `target`; a data set there is replaced only now."""
    (folder / JOURNAL).unlink()
    old = target.with_name(f"{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    folder.rename(target)
    shutil.rmtree(old, ignore_errors=True)
