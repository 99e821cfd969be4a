"""What a report judges by: features and pixels of the samples and of the real images, and which rows are what."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from core.data import SPLITS, PreparedData
from eval.collect import ROWS, kept_features, sums_of
from eval.features import Features
from eval.frechet import Statistics, frechet_distance
from eval.reference import Reference, open_reference, reference_key
from eval.sources import ImageSet, Source, open_source


@dataclass(frozen=True)
class Comparison:
    """One way to choose the real images that samples are compared with.

    Attributes:
        name: in words.
        rows: positions in the real images, ascending.
    """

    name: str
    rows: np.ndarray


class Evidence:
    """Samples and real images with their features, extracted when first asked for.

    Args:
        folder: where features of samples are kept; those of the real images are kept beside the data.
        sets: independent sample sets of a model.
    """

    def __init__(
        self, source: Path, data: Path, features: Features, folder: Path, n: int, sets: int, seed: int, batch_size: int
    ) -> None:
        self.features, self.folder, self.batch_size, self.seed = features, folder, batch_size, seed
        self.source: Source = open_source(source, n, sets, seed)
        self.reference: Reference = open_reference(data)
        self.data = PreparedData.open(data) if (data / "meta.json").is_file() else None
        self.n = self.source.count
        # The real images first: they take longest, and are kept should anything fail afterwards.
        self.real = kept_features(
            lambda: self.reference.images,
            reference_key(self.reference, features),
            self.reference.cache,
            features,
            batch_size,
            "real images",
        )
        self.sets = [self.sample_features(index) for index in range(self.source.sets)]
        self.images: ImageSet = self.source.open_set(0)
        self.pixels = self.images.read(0, len(self.images))
        self.trained_on, self.held_out = self._rows_of_training(source)

    def sample_features(self, index: int) -> np.ndarray:
        """Features of sample set `index`, float32 (N, D)."""
        key = {name: value for name, value in self.source.facts.items() if name not in ("path", "model")}
        label = f"samples {index + 1}/{self.source.sets}"
        return kept_features(
            lambda: self.source.open_set(index),
            key | {"set": index},
            self.folder,
            self.features,
            self.batch_size,
            label,
        )

    def _rows_of_training(self, source: Path) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the real images that the generator was trained on, and rows it has not seen.

        A run says on which split it was trained. Anything else is taken to be trained on the training split.
        """
        every = np.arange(len(self.reference.images))
        if self.data is None or self.data.split is None:
            return every, every[:0]
        split = "train"
        if (source / "config.yaml").is_file():
            split = str(OmegaConf.select(OmegaConf.load(source / "config.yaml"), "split", default=split))
        trained = self.data.indices(split)
        return trained, np.setdiff1d(every, trained)

    def comparisons(self, random: int) -> list[Comparison]:
        """All real images, the training split where there is one, and `random` real images."""
        every = np.arange(len(self.reference.images))
        ways = [Comparison("all of the data", every)]
        if self.data is not None and self.data.split is not None:
            training = np.flatnonzero(self.data.split == SPLITS.index("train"))
            if len(training) > 1:
                ways.append(Comparison("training split", training))
        if random < len(every):
            chosen = np.random.default_rng(self.seed).permutation(every)[:random]
            ways.append(Comparison(f"{random:,} random", np.sort(chosen)))
        return ways

    def scores(self, way: Comparison, floor_sets: int) -> dict[str, Any]:
        """Distances of every sample set from the real images of `way`, and the floor at the same number."""
        sums = sums_of(self.real, way.rows)
        real = sums.statistics()
        values = [frechet_distance(Statistics.of(np.asarray(drawn)), real) for drawn in self.sets]
        floor = self._floor(way, floor_sets)
        mean = float(np.mean(values))
        return {
            "against": way.name,
            "count": len(way.rows),
            "n": self.n,
            "mean": mean,
            "sd": spread(values),
            "values": values,
            "floor": floor,
            "excess": None if floor is None else mean - floor["mean"],
        }

    def _floor(self, way: Comparison, sets: int) -> dict[str, Any] | None:
        """What real images score at the same number: disjoint subsets, none of which is in what it is compared with.

        They come from outside of `way` where that suffices, else from inside, and are taken out of it then.
        """
        outside = np.setdiff1d(np.arange(len(self.real)), way.rows)
        inside = len(outside) < self.n
        pool = way.rows if inside else outside
        if inside and len(pool) < 2 * self.n:
            return None
        # Two halves of one set give the same number twice, so fewer than three subsets' worth inside give one.
        possible = 1 if inside and len(pool) < 3 * self.n else len(pool) // self.n
        order = np.random.default_rng(self.seed + 1).permutation(pool)
        sums = sums_of(self.real, way.rows)
        values = []
        for index in range(min(sets, possible)):
            subset = self.real[np.sort(order[index * self.n : (index + 1) * self.n])]
            others = sums.without(subset) if inside else sums
            values.append(frechet_distance(Statistics.of(subset), others.statistics()))
        return {
            "mean": float(np.mean(values)),
            "sd": spread(values),
            "values": values,
            "count": self.n,
            "against": others.count,
        }

    def statistics(self, features: np.ndarray | None = None) -> Statistics:
        """Mean and covariance of `features`, by default of all real images, read a few at a time."""
        chosen = self.real if features is None else features
        return sums_of(chosen, np.arange(len(chosen))).statistics()

    def real_rows(self, count: int, part: int = 0) -> np.ndarray:
        """Up to `count` random rows of the real images; different parts do not overlap."""
        order = np.random.default_rng(self.seed + 2).permutation(len(self.real))
        return np.sort(order[part * count : (part + 1) * count])

    def real_pixels(self, rows: np.ndarray) -> np.ndarray:
        """uint8 (len(rows), H, W, 3) of some real images."""
        images = self.reference.images.take(rows)
        return images.read(0, len(images))

    def blocks(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        """Features of some real images, a few at a time, in the order of `rows`."""
        for start in range(0, len(rows), ROWS):
            yield self.real[rows[start : start + ROWS]]


def spread(values: list[float]) -> float | None:
    """Standard deviation of independent values (n - 1); None for a single one."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None
