"""The real images that samples are compared with: which they are, their features and the sums over them, kept."""

from __future__ import annotations

import hashlib
import json
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from core.cli.console import say
from core.cli.errors import UserError
from core.cli.files import atomic_path, digest_of, writable
from core.data.dataset import PreparedData
from core.training.distributed import Ranks
from eval.features.cache import Extractor, KeptFeatures, features_key
from eval.features.extractors import Features
from eval.features.image_sets import ArrayImages, ImageSet, list_images
from eval.metrics.frechet import RunningSums


@dataclass(frozen=True)
class Reference:
    """A set of real images: all at one place, or some of them.

    Attributes:
        every: all images at the place.
        rows: positions of the reference among them, ascending.
        cache: folder for features and sums.
        content: what names all images at the place exactly.
        facts: the same and where and which part it is, for results.
    """

    every: ImageSet
    rows: np.ndarray
    cache: Path
    content: dict[str, Any]
    facts: dict[str, Any]

    @property
    def images(self) -> ImageSet:
        """The reference itself."""
        return self.every.take(self.rows)


def open_reference(path: Path, split: str = "all", count: int | None = None, seed: int = 0) -> Reference:
    """Open a prepared data set (or one split of it) or a folder of images, or `count` random images of either.

    Raises:
        UserError: there is neither, the split does not exist, or there are too few images.
    """
    if not (path / "meta.json").is_file() and path.is_dir():
        if split != "all":
            raise UserError(f"{path} is a folder of images and has no splits: use split=all or a prepared data set")
        files = list_images(path)
        every: ImageSet = files
        positions = np.arange(len(files))
        content: dict[str, Any] = {"kind": "folder", "sha256": files.sha256()}
        cache = path / ".facet-fid"
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
    return Reference(every, rows, cache, content, facts)


def random_rows(positions: np.ndarray, count: int | None, seed: int) -> np.ndarray:
    """`count` random positions (all when None), ascending.

    Raises:
        UserError: there are not so many, or fewer than two are wanted.
    """
    if count is None:
        count = len(positions)
    if not 2 <= count <= len(positions):
        raise UserError(f"the reference has {len(positions)} images: {count} of them cannot be used (at least 2)")
    mixed = np.random.default_rng(seed).permutation(positions) if count < len(positions) else positions
    return np.sort(mixed[:count])


def selection_of(rows: np.ndarray) -> dict[str, Any]:
    """What names a choice of images at one place."""
    return {"count": len(rows), "sha256": hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest()}


class RealFeatures:
    """Features of the real images at one place, each extracted at most once, and the sums over parts of them.

    A part of what is kept is read from there; a part that is needed alone is extracted alone.

    Args:
        spare: folder to keep them in, under their own name, when the images' own cannot be written to.
    """

    def __init__(self, reference: Reference, extractor: Extractor, spare: Path) -> None:
        self.reference, self.extractor = reference, extractor
        self.cache = reference.cache
        if not writable(self.cache):
            self.cache = spare / f"real-{digest_of(reference.content)}"
            if extractor.ranks.first:
                say(f"note: {reference.cache} cannot be written to, features of real images go to {self.cache}")
        self._had: list[tuple[np.ndarray, KeptFeatures]] = []  # positions and their features

    def __len__(self) -> int:
        return len(self.reference.every)

    def key(self, rows: np.ndarray) -> dict[str, Any]:
        """What names these images; where they lie is not part of it, so that a moved data set keeps its cache."""
        return self.reference.content | {"rows": selection_of(rows)}

    def of(self, rows: np.ndarray, label: str = "real images") -> KeptFeatures:
        """Features of the images at these positions, ascending; every process must ask for the same."""
        every = np.arange(len(self))
        if not self._had and len(rows) < len(every) and self.extractor.is_kept(self.key(every), self.cache):
            self.of(every)
        for positions, features in self._had:
            at = np.searchsorted(positions, rows).clip(max=len(positions) - 1)
            if np.array_equal(positions[at], rows):
                return features.take(at)
        features = self.extractor.extract(lambda: self.reference.every.take(rows), self.key(rows), self.cache, label)
        self._had.append((rows, features))
        return features

    def sums(self, rows: np.ndarray) -> RunningSums:
        """Sums over the features of the images at these positions, kept."""
        key = features_key(self.extractor.features) | {"images": self.key(rows)}
        name = f"sums-{self.extractor.features.name}-{self.extractor.features.dims}-{digest_of(key)}.npz"
        kept = _load_sums(self.cache / name, key)
        if kept is not None:
            return kept
        sums = self.of(rows).sums()
        _save_sums(self.cache / name, key, sums)
        return sums


def reference_sums(reference: Reference, features: Features, batch_size: int, spare: Path) -> RunningSums:
    """Sums over the features of a reference, kept beside its images or in `spare`; for a single process.

    Raises:
        UserError: they cannot be kept there.
    """
    return RealFeatures(reference, Extractor(features, batch_size, Ranks()), spare).sums(reference.rows)


def _save_sums(path: Path, key: dict[str, Any], sums: RunningSums) -> None:
    assert sums.shift is not None
    text = json.dumps(key, sort_keys=True)
    with atomic_path(path) as temporary, temporary.open("wb") as handle:
        np.savez(handle, key=text, count=sums.count, shift=sums.shift, total=sums.total, outer=sums.outer)


def _load_sums(path: Path, key: dict[str, Any]) -> RunningSums | None:
    """Kept sums, or None where there are none for this key; a file that is damaged or of another key is announced."""
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as stored:
            if json.loads(str(stored["key"])) != key:
                say(f"note: {path} belongs to other data or features and is refused: computing again")
                return None
            sums = RunningSums(key["dims"])
            sums.count = int(stored["count"])
            sums.shift, sums.total, sums.outer = stored["shift"], stored["total"], stored["outer"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        say(f"note: {path} is damaged ({' '.join(str(error).split())}): computing again")
        return None
    return sums
