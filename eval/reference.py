"""The real images that samples are compared with: statistics, their cache, and the real-versus-real floor."""

from __future__ import annotations

import hashlib
import json
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from core.console import say
from core.data import PreparedData
from core.errors import UserError
from core.files import atomic_path, read_json, write_json
from eval.features import Features, feature_batches
from eval.frechet import RunningSums, Statistics, frechet_distance
from eval.sources import ArrayImages, ImageSet, list_images

CACHE_FORMAT = 1  # raised whenever older cached numbers would no longer be what this code computes


@dataclass(frozen=True)
class Reference:
    """A set of real images.

    Attributes:
        images: the reference itself.
        outside: the images of the same split that a random subset left out; empty without one.
        cache: folder for statistics.
        facts: what names the content exactly, for results and cache keys.
    """

    images: ImageSet
    outside: ImageSet
    cache: Path
    facts: dict[str, Any]


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
        facts: dict[str, Any] = {"kind": "folder", "path": str(path), "sha256": files.sha256()}
        cache = path / ".facet-fid"
    else:
        data = PreparedData.open(path)
        every, positions = ArrayImages(data.images), data.indices(split)
        facts = {"kind": "prepared", "path": str(path), "sha256": data.fingerprint}
        facts["transform"] = data.meta.get("transform")
        cache = path / "fid"
    chosen, left = _subset(positions, count, seed)
    facts |= {
        "split": split,
        "count": len(chosen),
        "subset_seed": None if count is None else seed,
        "selection_sha256": hashlib.sha256(chosen.astype("<i8").tobytes()).hexdigest(),
        "size": list(every.size),
    }
    return Reference(every.take(chosen), every.take(left) if len(left) else ArrayImages(_NOTHING), cache, facts)


_NOTHING = np.zeros((0, 1, 1, 3), np.uint8)


def _subset(positions: np.ndarray, count: int | None, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """`count` random positions (all when None) and the remaining ones, both ascending."""
    if count is None:
        count = len(positions)
    if not 2 <= count <= len(positions):
        raise UserError(f"the reference has {len(positions)} images: {count} of them cannot be used (at least 2)")
    mixed = np.random.default_rng(seed).permutation(positions) if count < len(positions) else positions
    return np.sort(mixed[:count]), np.sort(mixed[count:])


def reference_sums(reference: Reference, features: Features, batch_size: int) -> RunningSums:
    """Sums over the features of the reference, from the cache when it holds exactly these, else computed and cached."""
    key = reference_key(reference, features)
    path = reference.cache / f"{features.name}-{features.dims}-{digest_of(key)}.npz"
    cached = _load_sums(path, key)
    if cached is not None:
        return cached
    sums = RunningSums(features.dims)
    for batch in feature_batches(features, reference.images, batch_size, "reference"):
        sums.add(batch)
    try:
        _save_sums(path, key, sums)
    except UserError as error:
        _note(f"reference statistics are not kept for the next time: {error}")
    return sums


def reference_key(reference: Reference, features: Features) -> dict[str, Any]:
    """Everything the statistics depend on. Where the data lie is not part of it: a moved data set keeps its cache."""
    content = {name: value for name, value in reference.facts.items() if name != "path"}
    return {
        "format": CACHE_FORMAT,
        "features": features.name,
        "dims": features.dims,
        "weights_sha256": features.weights_sha256,
        "transform": features.transform,
        "reference": content,
    }


def digest_of(key: dict[str, Any]) -> str:
    """Short name of a key for file names; the whole key inside the file decides."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def _save_sums(path: Path, key: dict[str, Any], sums: RunningSums) -> None:
    assert sums.shift is not None
    text = json.dumps(key, sort_keys=True)
    with atomic_path(path) as temporary, temporary.open("wb") as handle:
        np.savez(handle, key=text, count=sums.count, shift=sums.shift, total=sums.total, outer=sums.outer)


def _load_sums(path: Path, key: dict[str, Any]) -> RunningSums | None:
    """Cached sums, or None where there are none for this key; a file that is damaged or of another key is announced."""
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as stored:
            if json.loads(str(stored["key"])) != key:
                _note(f"{path} belongs to other data or features and is refused: computing again")
                return None
            sums = RunningSums(key["dims"])
            sums.count = int(stored["count"])
            sums.shift, sums.total, sums.outer = stored["shift"], stored["total"], stored["outer"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        _note(f"{path} is damaged ({' '.join(str(error).split())}): computing again")
        return None
    return sums


@dataclass(frozen=True)
class Floor:
    """Distances that real images of the same number have from the reference: what a perfect generator would score.

    Attributes:
        values: one per subset.
        count: images per subset.
        against: images they are compared with, none of which is in the subset.
    """

    values: list[float]
    count: int
    against: int


def floor_refusal(reference: Reference, count: int) -> str | None:
    """Why a floor at this number of images cannot be had, in one line; None when it can."""
    inside, outside = len(reference.images), len(reference.outside)
    if outside >= count or inside >= 2 * count:
        return None
    return f"no floor at {count:,} images: it needs {2 * count:,} real images, the reference has {inside:,}"


def real_floor(
    reference: Reference, sums: RunningSums, features: Features, count: int, sets: int, seed: int, batch_size: int
) -> Floor:
    """Compare disjoint random subsets of `count` reals, drawn without replacement, with reals outside of each.

    They come from what a random reference left out where that suffices, and are then compared with the reference as
    it is; else from the reference, and each is compared with all the rest of it. There may be fewer than `sets`
    when the images do not last. `floor_refusal` must be None.
    """
    key = reference_key(reference, features) | {"floor": {"count": count, "sets": sets, "seed": seed}}
    path = reference.cache / f"floor-{features.name}-{features.dims}-{digest_of(key)}.json"
    cached = _load_floor(path, key)
    if cached is not None:
        return cached
    from_outside = len(reference.outside) >= count
    pool = reference.outside if from_outside else reference.images
    order = np.random.default_rng(seed).permutation(len(pool))
    # Two halves of one set give the same number twice, so fewer than three subsets' worth inside give one.
    possible = len(pool) // count if from_outside or len(pool) >= 3 * count else 1
    values = []
    for index in range(min(sets, possible)):
        images = pool.take(np.sort(order[index * count : (index + 1) * count]))
        label = f"floor {index + 1}/{min(sets, possible)}"
        subset = np.concatenate(list(feature_batches(features, images, batch_size, label)))
        others = sums if from_outside else sums.without(subset)
        values.append(frechet_distance(Statistics.of(subset), others.statistics()))
    floor = Floor(values, count, others.count)
    try:
        write_json(path, {"key": key, "values": floor.values, "against": floor.against})
    except UserError as error:
        _note(f"the floor is not kept for the next time: {error}")
    return floor


def _load_floor(path: Path, key: dict[str, Any]) -> Floor | None:
    """A cached floor of exactly this key, or None."""
    if not path.is_file():
        return None
    try:
        stored = read_json(path)
        if stored["key"] == key:
            return Floor([float(value) for value in stored["values"]], key["floor"]["count"], int(stored["against"]))
    except (UserError, KeyError, TypeError, ValueError):
        pass
    _note(f"{path} is damaged or belongs to other data and is refused: computing again")
    return None


def _note(message: str) -> None:
    say(f"note: {message}")
