"""The real images that samples are compared with, and their features and sums, which are kept on disk."""

from __future__ import annotations

import hashlib
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from core.cli.console import say
from core.cli.errors import UserError
from core.cli.files import IMAGE_CACHE, atomic_path, digest_of, sha256_of, writable
from core.data.array_file import open_images
from core.data.dataset import PreparedData
from core.training.distributed import Ranks
from eval.features.cache import Extractor, KeptFeatures, features_key
from eval.features.extractors import Features
from eval.features.image_sets import ArrayImages, ImageSet, described, list_images
from eval.features.statistics_file import SUFFIX
from eval.metrics.frechet import RunningSums


@dataclass(frozen=True)
class Reference:
    """A set of real images: all images of a data set or folder, or some of them.

    Attributes:
        every: all images of the data set or folder.
        rows: positions of the reference among them, ascending.
        cache: folder for features and sums.
        content: identifies all the images exactly.
        facts: content, path, split and selection, for results.
        warnings: what is worth knowing about the images, one line each.
    """

    every: ImageSet
    rows: np.ndarray
    cache: Path
    content: dict[str, Any]
    facts: dict[str, Any]
    warnings: list[str]

    @property
    def images(self) -> ImageSet:
        """The reference itself."""
        return self.every.take(self.rows)


def open_reference(path: Path, split: str = "all", count: int | None = None, seed: int = 0) -> Reference:
    """Open a prepared data set, one of its splits, a folder or .npy file of images, or `count` random images of it.

    Raises:
        UserError: there is no such data or split, it has too few images, or it is a file of statistics.
    """
    warnings: list[str] = []
    every: ImageSet
    if path.exists() and not (path / "meta.json").is_file():
        if split != "all":
            raise UserError(f"{path} has no splits: use split=all or a prepared data set")
        if path.is_dir():
            every = files = list_images(path)
            content: dict[str, Any] = {"kind": "folder", "sha256": files.sha256()}
            cache, warnings = path / IMAGE_CACHE, files.warnings
        elif path.suffix.lower() == ".npy":
            every, content = ArrayImages(open_images(path)), {"kind": "array", "sha256": sha256_of(path)}
            cache = path.with_name(f".{path.name}{IMAGE_CACHE}")
        elif path.suffix.lower() == SUFFIX:
            raise UserError(f"{path} holds statistics, but this needs the images themselves: give a prepared data set")
        else:
            way = "give a prepared data set (facet prepare), a folder or .npy file of images, or .npz statistics"
            raise UserError(f"data={path} {described(path)}: {way}")
        positions = np.arange(len(every))
    else:
        data = PreparedData.open(path)
        every, positions = ArrayImages(data.images), data.indices(split)
        content = {"kind": "prepared", "sha256": data.fingerprint, "transform": data.meta.get("transform")}
        cache = path / "fid"
    content["size"] = list(every.size)
    rows = random_rows(positions, count, seed)
    facts = content | {
        "path": str(path),
        "split": split,
        "count": len(rows),
        "subset_seed": None if count is None else seed,
        "selection_sha256": selection_of(rows)["sha256"],
    }
    return Reference(every, rows, cache, content, facts, warnings)


def random_rows(positions: np.ndarray, count: int | None, seed: int) -> np.ndarray:
    """`count` random positions (None: all), ascending.

    Raises:
        UserError: there are fewer than `count`, or `count` is less than two.
    """
    if count is None:
        count = len(positions)
    if not 2 <= count <= len(positions):
        raise UserError(f"the reference has {len(positions)} images: {count} of them cannot be used (at least 2)")
    mixed = np.random.default_rng(seed).permutation(positions) if count < len(positions) else positions
    return np.sort(mixed[:count])


def selection_of(rows: np.ndarray) -> dict[str, Any]:
    """What identifies a selection of images."""
    return {"count": len(rows), "sha256": hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest()}


class RealFeatures:
    """Features of real images and the sums over parts of them; each image is extracted at most once.

    Args:
        spare: folder to keep them in if the folder of the images cannot be written to.
    """

    def __init__(self, reference: Reference, extractor: Extractor, spare: Path) -> None:
        self.reference, self.extractor = reference, extractor
        self.cache = reference.cache
        if not writable(self.cache):
            self.cache = spare / f"real-{digest_of(reference.content)}"
            if extractor.ranks.first:
                say(f"note: {reference.cache} cannot be written to, features of real images go to {self.cache}")
        self._extracted: list[tuple[np.ndarray, KeptFeatures]] = []  # positions and their features

    def __len__(self) -> int:
        return len(self.reference.every)

    def key(self, rows: np.ndarray) -> dict[str, Any]:
        """What identifies these images, without their path, so that a moved data set keeps its cache."""
        return self.reference.content | {"rows": selection_of(rows)}

    def of(self, rows: np.ndarray, label: str = "real images") -> KeptFeatures:
        """Features of the images at these ascending positions; every process must request the same."""
        every = np.arange(len(self))
        if not self._extracted and len(rows) < len(every) and self.extractor.is_kept(self.key(every), self.cache):
            self.of(every)
        for positions, features in self._extracted:
            at = np.searchsorted(positions, rows).clip(max=len(positions) - 1)
            if np.array_equal(positions[at], rows):
                return features.take(at)
        features = self.extractor.extract(lambda: self.reference.every.take(rows), self.key(rows), self.cache, label)
        self._extracted.append((rows, features))
        return features

    def sums(self, rows: np.ndarray) -> RunningSums:
        """Sums over the features of the images at these positions; kept on disk."""
        key = features_key(self.extractor.features) | {"images": self.key(rows)}
        name = f"sums-{self.extractor.features.name}-{self.extractor.features.dims}-{digest_of(key)}.npz"
        kept = _load_sums(self.cache / name, key)
        if kept is not None:
            return kept
        sums = self.of(rows).sums()
        _save_sums(self.cache / name, key, sums)
        return sums


def reference_sums(reference: Reference, features: Features, batch_size: int, spare: Path) -> RunningSums:
    """Sums over the features of a reference, kept beside its images or else in `spare`; for a single process.

    Raises:
        UserError: neither folder can be written to.
    """
    return RealFeatures(reference, Extractor(features, batch_size, Ranks()), spare).sums(reference.rows)


def _save_sums(path: Path, key: dict[str, Any], sums: RunningSums) -> None:
    assert sums.shift is not None
    text = json.dumps(key, sort_keys=True)
    with atomic_path(path) as temporary, temporary.open("wb") as handle:
        np.savez(handle, key=text, count=sums.count, shift=sums.shift, total=sums.total, outer=sums.outer)


def _load_sums(path: Path, key: dict[str, Any]) -> RunningSums | None:
    """Kept sums, or None if there are none for this key; prints a note about a damaged or foreign file."""
    if not path.is_file():
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            # An array is not checked when its header says that it ends before the member does.
            if archive.testzip() is not None:
                raise zipfile.BadZipFile("wrong checksum")
        with np.load(path, allow_pickle=False) as stored:
            if json.loads(str(stored["key"])) != key:
                say(f"note: {path} belongs to other data or features and is refused: computing again")
                return None
            sums = RunningSums(key["dims"])
            sums.count = int(stored["count"])
            sums.shift, sums.total, sums.outer = stored["shift"], stored["total"], stored["outer"]
    # Neither zipfile nor NumPy documents what damage raises: RuntimeError, NotImplementedError and others.
    except Exception as error:
        say(f"note: {path} is damaged ({' '.join(str(error).split())}): computing again")
        return None
    return sums
