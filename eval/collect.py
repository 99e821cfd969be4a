"""Work that is done once and kept on disk: features of image sets, and figures that take long."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

from core.console import say
from core.errors import UserError
from core.files import atomic_path, read_json, write_json
from eval.features import Features, feature_batches
from eval.frechet import RunningSums
from eval.reference import digest_of
from eval.sources import ImageSet

FORMAT = 1  # raised whenever what is kept would no longer be what this code computes
ROWS = 4096  # features in memory at once, where a whole data set may not fit


def features_key(features: Features) -> dict[str, Any]:
    """What names an extractor in the keys of kept results."""
    names = ("name", "dims", "weights_sha256", "transform")
    return {"format": FORMAT} | {name: getattr(features, name) for name in names}


def kept_features(
    open_images: Callable[[], ImageSet],
    key: dict[str, Any],
    folder: Path,
    features: Features,
    batch_size: int,
    label: str,
) -> np.ndarray:
    """Features of images, float32 (N, D), memory-mapped from `folder`; extracted only when they are not there.

    Args:
        open_images: gives the images; called only when they are needed.
        key: names their content exactly.

    Raises:
        UserError: they cannot be kept there.
    """
    whole = features_key(features) | {"images": key}
    path = folder / f"{features.name}-{features.dims}-{digest_of(whole)}.npy"
    if path.is_file() and path.with_suffix(".json").is_file():
        try:
            kept = np.load(path, mmap_mode="r", allow_pickle=False)
            if read_json(path.with_suffix(".json")) == whole and kept.ndim == 2 and kept.shape[1] == features.dims:
                return kept
        except (OSError, ValueError, EOFError, UserError):
            pass
        say(f"note: {path} is damaged or belongs to other images: computing again")
    images = open_images()
    # Written as a stream: a full disk is an error there, and would end the process in a memory map.
    header = {"descr": "<f4", "fortran_order": False, "shape": (len(images), features.dims)}
    with atomic_path(path) as temporary, temporary.open("wb") as handle:
        npy.write_array_header_1_0(handle, header)
        for batch in feature_batches(features, images, batch_size, label):
            handle.write(batch.astype("<f4").tobytes())
    write_json(path.with_suffix(".json"), whole)
    return np.load(path, mmap_mode="r", allow_pickle=False)


def sums_of(features: np.ndarray, rows: np.ndarray) -> RunningSums:
    """Sums over some rows of features, read a few at a time."""
    sums = RunningSums(features.shape[1])
    for start in range(0, len(rows), ROWS):
        sums.add(features[rows[start : start + ROWS]])
    return sums


def remembered(folder: Path, name: str, key: dict[str, Any], compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A JSON result, from `folder` when it was computed there under the same key before."""
    path = folder / f"{name}-{digest_of(key)}.json"
    # Through JSON and back, so that a fresh result and a kept one are the same (tuples, NumPy numbers).
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
