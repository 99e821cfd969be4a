"""Write a source in the prepared format of `core.data.dataset`.

The work happens in `<out>.part`, which is renamed to `<out>` at the end, so a prepared data set is complete or absent.
A journal lists the finished chunks with their checksums: an interrupted run continues where it stopped, and a chunk
whose bytes never reached the disk is done again.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from numpy.lib import format as npy

from core.cli.console import progress_bar
from core.cli.errors import Interrupted, UserError
from core.cli.files import flush, read_json, sha256_of, write_json
from core.cli.lock import sole_owner
from core.data.dataset import AGAIN, FORMAT, PREVIEW, PreparedData
from core.data.grids import captioned, make_grid, write_png
from core.data.mask_pictures import comparison_page, room
from core.prepare.geometry import transform_name
from core.prepare.image_source import ImageSource
from core.prepare.workers import Done, Plan, checksum, create_array, open_arrays, running

BAD_LIMIT = 0.01  # a larger share of unreadable images means a broken download rather than a few broken files
JOURNAL = "journal.jsonl"
# The preview: pictures in it, its width without gaps, and the largest side of a picture, in pixels.
PREVIEWED, PREVIEW_WIDTH, PREVIEW_TILE = 64, 1024, 256


@dataclass(frozen=True)
class Prepared:
    """The result of a preparation."""

    data: PreparedData
    resumed: int  # images that an interrupted run had finished
    seconds: float  # 0 if there was nothing to do


def prepare(
    source: ImageSource,
    out: str | Path,
    *,
    size: int = 64,
    fit: str = "crop",
    limit: int | None = None,
    workers: int = 1,
    force: bool = False,
    quiet: bool = False,
) -> Prepared:
    """Write the prepared data set `out` from the first `limit` images (default all) of `source`.

    Corrupt images and tiny ones, which would be enlarged more than twofold, are skipped. An interrupted call continues
    when repeated; an existing `out` with the same source and settings is kept.

    Args:
        size: side in pixels.
        fit: "crop" or "pad", see `core.prepare.geometry.squared`.
        workers: processes; 1 means this process.
        force: replace an existing prepared data set.

    Raises:
        UserError: `out` is something else, the disk is full, more than 1% of the images are unreadable, or another
            process is writing `out`.
        Interrupted: on Ctrl-C; finished chunks are kept.
    """
    started = time.monotonic()
    out = Path(out)
    target = out.resolve()  # keeps a link to a folder on a larger disk
    plan = Plan(source, min(limit or len(source.names), len(source.names)), size, fit, Path(f"{target}.part"))
    done: dict[int, Done] = {}
    try:
        if _is_prepared(out, plan, force):
            return Prepared(PreparedData.open(out), 0, 0.0)
        # Its workers hold the lock as well: what a killed call leaves is still written to until they have ended.
        lock = plan.folder.with_name(f".{plan.folder.name}.lock")
        lock.parent.mkdir(parents=True, exist_ok=True)
        with sole_owner(lock, f"is writing {plan.folder}", "let it finish, then run again"):
            if _is_prepared(out, plan, force):  # by another process that has just finished
                return Prepared(PreparedData.open(out), 0, 0.0)
            plan.folder.mkdir(parents=True, exist_ok=True)
            done.update(_resume(plan))
            resumed = plan.images_in(done)
            _work(plan, done, workers, quiet)
            _finish(plan, done)
            _put_in_place(plan.folder, target)
    except KeyboardInterrupt:
        kept = f"{plan.images_in(done):,} of {plan.count:,} images are done"
        raise Interrupted(f"{kept}; the same command continues") from None
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from error
    return Prepared(PreparedData.open(out), resumed, time.monotonic() - started)


def _is_prepared(out: Path, plan: Plan, force: bool) -> bool:
    """Whether `out` already is the planned data set. False if it may be written, else a UserError."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not (out / "meta.json").is_file():
        raise UserError(f"{out} is a file or holds other files: choose another --out")
    if force:
        return False
    try:
        meta = read_json(out / "meta.json", AGAIN)
        if meta.get("key") == plan.key:
            PreparedData.open(out)
            return True
    except UserError as error:
        raise UserError(f"{error} (with --force)") from error
    how = _differences(meta, plan) or "from another source or with other settings"
    raise UserError(f"{out} was prepared {how}: add --force to replace it")


def _differences(meta: dict[str, Any], plan: Plan) -> str:
    """The options with which a data set was prepared other than planned, as far as meta.json tells them."""
    planned = {"image_size": plan.size, "fit": plan.fit, "value_range": plan.source.value_range}
    planned["valid"] = plan.source.valid
    options = {"image_size": "size", "value_range": "range"}

    def said(key: str, value: object) -> str:
        return (
            f"{'without' if value is None else 'with'} --{options.get(key, key)}{'' if value is None else f' {value}'}"
        )

    different = [(key, meta.get(key), new) for key, new in planned.items() if meta.get(key) != new]
    return " and ".join(f"{said(key, old)}, not {said(key, new)}" for key, old, new in different)


def _resume(plan: Plan) -> dict[int, Done]:
    """The finished chunks of an interrupted run with the same plan; if there is none, creates empty arrays."""
    journal = plan.folder / JOURNAL
    heading = {"key": plan.key, "chunk": plan.source.chunk, "pillow": PIL.__version__}
    lines: list[dict[str, Any]] = []
    # Reading ends at a missing file or a line cut short by a kill; the lines before it count.
    with contextlib.suppress(OSError, ValueError):
        lines.extend(json.loads(line) for line in journal.read_text("utf-8").splitlines())
    if lines and lines[0] == heading:
        with contextlib.suppress(OSError, ValueError, TypeError):
            arrays = open_arrays(plan)
            entries = [Done(**line | {"bad": [tuple(item) for item in line["bad"]]}) for line in lines[1:]]
            done = {entry.chunk: entry for entry in entries if entry.crc == checksum(arrays, plan.rows(entry.chunk))}
            kept = (heading, *map(vars, done.values()))
            journal.write_text("".join(json.dumps(line) + "\n" for line in kept), "utf-8")
            return done
    for leftover in plan.folder.iterdir():
        leftover.unlink()
    for name, shape in plan.shapes.items():
        create_array(plan.folder / name, shape)
    journal.write_text(json.dumps(heading) + "\n", "utf-8")
    return {}


def _work(plan: Plan, done: dict[int, Done], workers: int, quiet: bool) -> None:
    """Fill the remaining chunks and add each to the journal and to `done`; fail at `BAD_LIMIT`."""
    todo = [chunk for chunk in range(math.ceil(plan.count / plan.source.chunk)) if chunk not in done]
    skipped = sum(len(entry.bad) for entry in done.values())
    bar = progress_bar(quiet=quiet)
    task = bar.add_task("prepare", total=plan.count, completed=plan.images_in(done))
    # The workers start before the bar's thread: a fork could copy a lock that the thread holds.
    with (plan.folder / JOURNAL).open("a", encoding="utf-8") as journal, running(plan, todo, workers) as finished, bar:
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
        del finished  # closes the arrays: Windows does not remove files that are open
        shutil.rmtree(plan.folder)
        bad = sorted(item for entry in done.values() for item in entry.bad)[:3]
        names = "; ".join(f"{plan.source.names[row]}: {reason}" for row, reason in bad)
        seen = f"{skipped:,} of {plan.images_in(done):,} images read so far are corrupt or tiny"
        raise UserError(f"{seen}, more than 1% of all {plan.count:,} ({names})")


def _finish(plan: Plan, done: dict[int, Done]) -> None:
    """Drop unreadable images, write the small files and meta.json, and flush everything to disk."""
    folder, source = plan.folder, plan.source
    bad = sorted(bad for entry in done.values() for bad in entry.bad)
    largest = [entry.largest for entry in done.values() if entry.largest is not None]
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
        "transform": transform_name(plan.size, plan.fit),
        "fit": plan.fit,
        "resized": source.native_side != plan.size,
        "value_range": source.value_range,
        "valid": source.valid,
        "largest_value": max(largest, default=None),
        "classes": source.classes,
        "palette": source.palette,
        "skipped": [{"name": source.names[row], "reason": reason} for row, reason in bad],
        "pillow": PIL.__version__,
        "key": plan.key,
        "sha256": {name: sha256_of(folder / name) for name in files},
    }
    for name in files:
        flush(folder / name)
    _write_preview(folder, meta)
    write_json(folder / "meta.json", meta)


def _write_preview(folder: Path, meta: dict[str, Any]) -> None:
    """Write a grid of pictures spread over the data set, each with its mask on its right if there are masks."""
    count, size = meta["count"], meta["image_size"]
    step = math.ceil(size / PREVIEW_TILE)
    columns = PREVIEW_WIDTH // len(range(0, size, step))
    shown = min(count, PREVIEWED, columns * columns if meta["classes"] is None else room(size, 2))
    rows = np.linspace(0, count - 1, shown).astype(int)
    images = np.load(folder / "images.npy", mmap_mode="r")
    if meta["classes"] is None:
        page = make_grid(images[rows, ::step, ::step], min(columns, shown))
    else:
        masks = {"mask": np.load(folder / "masks.npy", mmap_mode="r")[rows]}
        page = comparison_page(images[rows], masks, meta["classes"], meta["palette"])
    write_png(folder / PREVIEW, captioned(page, f"{shown} of {count:,} images of {size}x{size} pixels"))


def _compact(path: Path, keep: np.ndarray) -> None:
    """Reduce a .npy file to the rows `keep` marks, in place and piece by piece."""
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
        assert handle.tell() == offset  # NumPy's header has room for any length of the first axis
        handle.truncate(offset + filled * row_bytes)


def _put_in_place(folder: Path, target: Path) -> None:
    """Rename the finished folder to `target`, replacing a data set there."""
    (folder / JOURNAL).unlink()
    old = target.with_name(f"{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    folder.rename(target)
    shutil.rmtree(old, ignore_errors=True)
