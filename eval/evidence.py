"""What a report judges by: features and pixels of the samples and of the real images, and which rows are what."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from core.console import say
from core.data import SPLITS, PreparedData
from core.errors import UserError
from core.weights import load_model
from eval.collect import ROWS, kept_features, sums_of
from eval.features import Features
from eval.frechet import RunningSums, Statistics, frechet_distance
from eval.reference import Reference, open_reference, reference_key
from eval.sources import ImageSet, Source, is_run, open_source

UNKNOWN = (
    "It is not known which images the generator was trained on, so copies are looked for among all real images, and "
    "there is nothing to compare the distances with: give the run folder of a run with split=train."
)
FOREIGN = (
    "The generator was trained on other data than these, so copies of its own training images cannot be seen here: "
    "give its data."
)


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
    """Samples and real images, and, after `extract`, their features.

    Attributes:
        trained_on: rows of the real images among which copies are looked for.
        held_out: rows that the generator has certainly not seen.
        doubt: what is not known about its training, in a sentence; empty when all is known.

    Raises:
        UserError: source or data cannot be used.
    """

    def __init__(self, source: Path, data: Path, n: int, sets: int, seed: int) -> None:
        self.seed = seed
        self.source: Source = open_source(source, n, sets, seed)
        self.reference: Reference = open_reference(data)
        self.data = PreparedData.open(data) if (data / "meta.json").is_file() else None
        self.n = self.source.count
        every = np.arange(len(self.reference.images))
        self.trained_on, self.held_out, self.doubt = every, every[:0], UNKNOWN
        self._look_up_training(source)

    def _look_up_training(self, source: Path) -> None:
        """What a run says of its training: on which data, and on which split of them."""
        if self.source.facts["kind"] != "model" or self.data is None:
            return
        trained = load_model(source)[1].get("data", {}).get("sha256")
        if trained not in (None, self.data.fingerprint):
            self.doubt = FOREIGN
            return
        config = (source if is_run(source) and source.is_dir() else source.parent) / "config.yaml"
        if not config.is_file():
            return
        try:
            split = OmegaConf.select(OmegaConf.load(config), "split")
        except Exception as error:  # OmegaConf passes on the YAML parser's own exceptions
            raise UserError(f"cannot read {config}: {' '.join(str(error).split())}") from error
        if split == "all" or (split in SPLITS and self.data.split is not None):
            self.trained_on = self.data.indices(split)
            self.held_out = np.setdiff1d(np.arange(len(self.data)), self.trained_on)
            self.doubt = ""

    def extract(self, features: Features, folder: Path, batch_size: int) -> None:
        """Get all features, from where they are kept or by the network.

        Args:
            folder: where those of samples are kept; those of the real images are kept in the folder of the data.
        """
        self.features, self.folder, self.batch_size = features, folder, batch_size
        place = self.reference.cache
        if not writable(place):
            say(f"note: {place} cannot be written to, features of the real images are kept in {folder}")
            place = folder
        # The real images first: they take longest, and are kept should anything fail afterwards.
        key = reference_key(self.reference, features)
        self.real = kept_features(lambda: self.reference.images, key, place, features, batch_size, "real images")
        self.sets = [self.sample_features(self.source, index) for index in range(self.source.sets)]
        self.images: ImageSet = self.source.open_set(0)
        self.pixels = self.images.read(0, len(self.images))

    def sample_features(self, source: Source, index: int) -> np.ndarray:
        """Features of sample set `index` of `source`, float32 (N, D)."""
        label = f"samples {index + 1}/{source.sets}"
        return kept_features(
            lambda: source.open_set(index), set_key(source, index), self.folder, self.features, self.batch_size, label
        )

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
        drawn = [Statistics.of(np.asarray(features)) for features in self.sets]
        real = sums.statistics()
        values = [frechet_distance(one, real) for one in drawn]
        # The floor's reals may have had to come out of the reference. The excess compares like with like: samples and
        # reals against the same others.
        floors, excesses = [], []
        for subset, others in self._floor(way, sums, floor_sets):
            rest = others.statistics()
            floors.append(frechet_distance(Statistics.of(subset), rest))
            against = values if others is sums else [frechet_distance(one, rest) for one in drawn]
            excesses.append(float(np.mean(against)) - floors[-1])
            count = others.count
        floor = {"mean": float(np.mean(floors)), "sd": spread(floors), "values": floors} if floors else None
        return {
            "against": way.name,
            "count": len(way.rows),
            "n": self.n,
            "mean": float(np.mean(values)),
            "sd": spread(values),
            "values": values,
            "floor": None if floor is None else floor | {"count": self.n, "against": count},
            "excess": float(np.mean(excesses)) if excesses else None,
        }

    def _floor(self, way: Comparison, sums: RunningSums, sets: int) -> Iterator[tuple[np.ndarray, RunningSums]]:
        """Features of disjoint subsets of real images, each with the sums over those it is compared with.

        They come from outside of `way` where that suffices, else from inside, and are taken out of it then.
        """
        outside = np.setdiff1d(np.arange(len(self.real)), way.rows)
        inside = len(outside) < self.n
        pool = way.rows if inside else outside
        if inside and len(pool) < 2 * self.n:
            return
        # Two halves of one set give the same number twice, so fewer than three subsets' worth inside give one.
        possible = 1 if inside and len(pool) < 3 * self.n else len(pool) // self.n
        order = np.random.default_rng(self.seed + 1).permutation(pool)
        for index in range(min(sets, possible)):
            subset = self.real[np.sort(order[index * self.n : (index + 1) * self.n])]
            yield subset, sums.without(subset) if inside else sums

    def statistics(self) -> Statistics:
        """Mean and covariance of all real images, read a few at a time."""
        return sums_of(self.real, np.arange(len(self.real))).statistics()

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


def set_key(source: Source, index: int) -> dict[str, Any]:
    """What names the content of one sample set, wherever it lies and however many others there are."""
    names = ("kind", "sha256", "model_sha256", "count")
    key = {name: source.facts[name] for name in names if name in source.facts}
    return key | ({"first_seed": source.facts["first_seeds"][index]} if "first_seeds" in source.facts else {})


def writable(folder: Path) -> bool:
    """Whether files can be made in `folder`, or in a folder that would be made for it."""
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    return existing.is_dir() and os.access(existing, os.W_OK)


def spread(values: list[float]) -> float | None:
    """Standard deviation of independent values (n - 1); None for a single one."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None
