"""Results kept on disk: features of image sets, and figures that are slow to compute.

Features are extracted in blocks of 256 images. Each block is a file until all are done, so an interrupted extraction
resumes where it stopped. Several processes deal the blocks out in turn; batches never cross a block, so each image has
the same neighbours in its batch, and the same rounding, on any number of processes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

from core.cli.console import progress_bar, say
from core.cli.errors import Interrupted, UserError
from core.cli.files import atomic_path, digest_of, read_json, sha256_of, write_json
from core.cli.lock import sole_owner
from core.data.arrays import map_array, require_sha256
from core.data.loader import read_rows
from core.training.distributed import Ranks
from eval.features.extractors import Features
from eval.features.image_sets import ImageSet, Samples
from eval.metrics.frechet import RunningSums, Statistics

FORMAT = 2  # raise it when the code computes other values than those kept on disk
PARTS, KEY = ".parts", "key.json"  # folder of blocks beside the future features file, and the key of the images
BLOCK_SUFFIX = ".block"
BLOCK = 256  # images in a block
LONG = 20_000  # from this many features on, a pass over them takes seconds and shows a progress bar
ROWS = 4096  # features in memory at once


class ExtractionInterrupted(Interrupted):
    """The user stopped the extraction of features, of which `folder` keeps what is done."""

    def __init__(self, message: str, folder: Path) -> None:
        super().__init__(message)
        self.folder = folder


class KeptFeatures:
    """Some rows of a features file, in any order. Reading copies the rows, so memory use stays small.

    Attributes:
        file: array file of float32 features (N, D).
        rows: positions in the file; None for all of them.
        shape: (rows, D).
    """

    def __init__(self, file: Path, rows: np.ndarray | None = None) -> None:
        self.file, self.rows = file, rows
        self._mapped = map_array(file, "<f4", 2, "run the command again")
        self.shape = (len(self._mapped) if rows is None else len(rows), self._mapped.shape[1])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, chosen: slice | np.ndarray) -> np.ndarray:
        """float32 features (n, D) at a slice or an array of positions."""
        every = np.arange(len(self)) if self.rows is None else self.rows
        return read_rows(self._mapped, every[chosen])

    def take(self, rows: np.ndarray) -> KeptFeatures:
        """The features at these positions, in this order; nothing is read."""
        return KeptFeatures(self.file, rows if self.rows is None else self.rows[rows])

    def blocks(self) -> Iterator[np.ndarray]:
        """All rows in order, up to 4,096 at a time, with a progress bar if there are many."""
        with progress_bar(quiet=len(self) < LONG) as bar:
            task = bar.add_task("features", total=len(self))
            for start in range(0, len(self), ROWS):
                block = self[slice(start, start + ROWS)]
                yield block
                bar.advance(task, len(block))

    def statistics(self) -> Statistics:
        """Mean and covariance: in the fast form for fewer rows than dimensions, else in constant memory."""
        return Statistics.of(self[:]) if len(self) < self.shape[1] else self.sums().statistics()

    def sums(self) -> RunningSums:
        """Sums over all rows."""
        sums = RunningSums(self.shape[1])
        for block in self.blocks():
            sums.add(block)
        return sums


def features_key(features: Features) -> dict[str, Any]:
    """What identifies an extractor in the keys of kept results."""
    names = ("name", "dims", "weights_sha256", "transform")
    return {"format": FORMAT} | {name: getattr(features, name) for name in names}


@dataclass(frozen=True)
class Extractor:
    """A feature network with its batch size and the processes that share the work.

    Every process must request the same features in the same order. Without a `batch_size` it is what suits the device.
    """

    features: Features
    batch_size: int | None
    ranks: Ranks

    def extract(
        self, open_images: Callable[[], ImageSet], key: dict[str, Any], folder: Path, label: str
    ) -> KeptFeatures:
        """Features of images: read from `folder` if kept there under this key, else extracted and kept there.

        Waits for any other command that works in the same folder.

        Args:
            open_images: opens the images; called only if they are needed.
            key: identifies their content exactly.
            label: of the progress bar.

        Raises:
            UserError: the folder cannot be written to, or an image cannot be read; raised on all processes.
            ExtractionInterrupted: on Ctrl-C.
        """
        whole, path = self._place(key, folder)
        # Two commands would write the same blocks, and one would remove them while the other reads.
        lock = sole_owner(folder / ".lock", f"works in {folder}")
        with ExitStack() as stack:
            self.ranks.together(lambda: stack.enter_context(lock) if self.ranks.first else None)
            if not self.is_kept(key, folder):
                images = open_images()
                parts = path.with_suffix(PARTS)
                failure = None
                try:
                    self._extract_blocks(images, parts, whole, label)
                except UserError as error:
                    failure = error
                except KeyboardInterrupt:
                    size = 4 * self.features.dims
                    done = sum(block.stat().st_size // size for block in parts.glob(f"*{BLOCK_SUFFIX}"))
                    kept = f"features of {done:,} of {len(images):,} images ({label}) are kept in {folder}"
                    raise ExtractionInterrupted(f"{kept}; the same command continues", folder) from None
                self.ranks.share_failure(failure)
                if self.ranks.first:
                    _join(parts, path, (len(images), self.features.dims))
                    write_json(path.with_suffix(".json"), whole | {"sha256": sha256_of(path)})
                    shutil.rmtree(parts, ignore_errors=True)
                    _remove_others(folder, key)
            self.ranks.wait()
        return KeptFeatures(path)

    def samples(self, samples: Samples, index: int, folder: Path) -> KeptFeatures:
        """Features of sample set `index`, kept in `folder`."""
        label = f"samples {index + 1}/{samples.sets}" if samples.sets > 1 else "samples"
        return self.extract(lambda: samples.open_set(index), set_key(samples, index), folder, label)

    def _place(self, key: dict[str, Any], folder: Path) -> tuple[dict[str, Any], Path]:
        """The key with the network's part, and the features file for it."""
        whole = features_key(self.features) | {"images": key}
        return whole, folder / f"{self.features.name}-{self.features.dims}-{digest_of(whole)}.npy"

    def is_kept(self, key: dict[str, Any], folder: Path) -> bool:
        """Whether `extract` would find features there; prints a note about a damaged or foreign file.

        Only the first process looks, because a file that it sees may not be visible to the others yet.
        """
        return self.ranks.of_first(self.ranks.first and self._look(key, folder))

    def _look(self, key: dict[str, Any], folder: Path) -> bool:
        whole, path = self._place(key, folder)
        described = path.with_suffix(".json")
        if not (path.is_file() and described.is_file()):
            return False
        try:
            stored = read_json(described)
            sha256 = stored.pop("sha256", None)
            if stored == json.loads(json.dumps(whole)):
                require_sha256(path, str(sha256), "")
                return KeptFeatures(path).shape[1] == self.features.dims
        except UserError:
            pass
        say(f"note: {path} is damaged or belongs to other images: computing again")
        return False

    def _extract_blocks(self, images: ImageSet, parts: Path, whole: dict[str, Any], label: str) -> None:
        """Write those of this process's blocks that are missing, and before the first one the key `whole`."""
        at_once = self.batch_size or self.features.batch_size
        starts = range(0, len(images), BLOCK)[self.ranks.index :: self.ranks.count]
        spans = [(start, min(start + BLOCK, len(images))) for start in starts]
        missing = [span for span in spans if not self._is_block(_block(parts, span[0]), span[1] - span[0])]
        batches = [
            (first, min(first + at_once, stop)) for start, stop in missing for first in range(start, stop, at_once)
        ]
        if self.ranks.count > 1:
            label += f" (process 1 of {self.ranks.count})"
        total = sum(stop - start for start, stop in spans)
        left = sum(stop - start for start, stop in missing)
        with progress_bar(quiet=not self.ranks.first) as bar:
            task = bar.add_task(label, total=total, completed=total - left)
            pixels = _ahead(lambda span: images.read(*span), batches)
            for start, stop in missing:
                found = []
                for _ in range(start, stop, at_once):
                    batch = next(pixels)
                    found.append(self.features(batch))
                    bar.advance(task, len(batch))
                features = np.concatenate(found).astype("<f4")
                if not np.isfinite(features).all():
                    raise UserError(f"features of images {start:,} to {stop - 1:,} are not finite: damaged weights?")
                values = features.tobytes()
                if not (parts / KEY).is_file():
                    write_json(parts / KEY, whole)
                with atomic_path(_block(parts, start)) as temporary:
                    temporary.write_bytes(hashlib.sha256(values).digest() + values)

    def _is_block(self, path: Path, count: int) -> bool:
        """Whether a block exists and is intact; prints a note about a damaged one."""
        if not path.is_file():
            return False
        values = _read_block(path)
        if values is None or len(values) != count * self.features.dims * 4:
            say(f"note: {path} is damaged: computing again")
            return False
        return True


def _block(parts: Path, start: int) -> Path:
    """The file of a block: a SHA-256 and the float32 features that have it."""
    return parts / f"{start:09d}{BLOCK_SUFFIX}"


def _read_block(path: Path) -> bytes | None:
    """The features of a block; None if it cannot be read or is damaged."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    return content[32:] if hashlib.sha256(content[32:]).digest() == content[:32] else None


def _ahead(read: Callable[[tuple[int, int]], np.ndarray], spans: list[tuple[int, int]]) -> Iterator[np.ndarray]:
    """Read each span in turn, one ahead of the consumer, so that decoding and the network overlap."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(read, spans[0]) if spans else None
        for following in [*spans[1:], None]:
            assert coming is not None
            pixels = coming.result()
            if following is not None:
                coming = pool.submit(read, following)
            yield pixels


def _join(parts: Path, path: Path, shape: tuple[int, int]) -> None:
    """Join all blocks into one array file."""
    for torn in path.parent.glob(f".{path.name}.*.part"):  # left by a killed command
        torn.unlink(missing_ok=True)
    # A stream, because a full disk raises an error there, whereas in a memory map it kills the process.
    with atomic_path(path) as temporary, temporary.open("wb") as handle:
        npy.write_array_header_1_0(handle, {"descr": "<f4", "fortran_order": False, "shape": shape})
        for start in range(0, shape[0], BLOCK):
            values = _read_block(_block(parts, start))
            if values is None:
                raise UserError(f"{_block(parts, start)} was damaged while the others were computed: run again")
            handle.write(values)


def _remove_others(folder: Path, key: dict[str, Any]) -> None:
    """Remove features of images that these have replaced: those of an older model, or of older data."""
    names = [name for name in ("kind", "sha256", "model_sha256") if name in key]
    for described in [*folder.glob("*.json"), *folder.glob(f"*{PARTS}/{KEY}")]:
        try:
            other = read_json(described).get("images", {})
        except (UserError, AttributeError):
            continue
        if other.get("kind") != key["kind"] or all(other.get(name) == key[name] for name in names):
            continue
        if described.name == KEY:
            shutil.rmtree(described.parent, ignore_errors=True)
        else:
            described.unlink(missing_ok=True)
            described.with_suffix(".npy").unlink(missing_ok=True)


def set_key(samples: Samples, index: int) -> dict[str, Any]:
    """What identifies the content of a sample set, wherever it lies and however many other sets there are."""
    facts = samples.facts
    key = {name: facts[name] for name in ("kind", "sha256", "model_sha256", "count") if name in facts}
    return key | ({"first_seed": facts["first_seeds"][index]} if "first_seeds" in facts else {})


def remembered(folder: Path, name: str, key: dict[str, Any], compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A JSON result: read from `folder` if it was kept there under this key, else computed and kept."""
    path = folder / f"{name}-{digest_of(key)}.json"
    # Converted to JSON and back, so that a new result equals a kept one (tuples become lists).
    key = json.loads(json.dumps(key))
    if path.is_file():
        try:
            stored = read_json(path)
            if stored["key"] == key:
                return dict(stored["value"])
        except (UserError, KeyError, TypeError, ValueError):
            pass
        say(f"note: {path} is damaged or belongs to other data: computing again")
    value: dict[str, Any] = json.loads(json.dumps(compute()))
    write_json(path, {"key": key, "value": value})
    return value
