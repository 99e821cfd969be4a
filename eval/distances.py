"""Fréchet distances of sample sets from real images, and what puts them into scale: spread, floor and excess."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from eval.features.cache import features_key, remembered
from eval.features.reference import RealFeatures
from eval.metrics.frechet import RunningSums, Statistics, frechet_distance


@dataclass(frozen=True)
class FloorPlan:
    """Which real images stand in for samples, to measure the floor.

    Attributes:
        subsets: ascending positions of each set; disjoint, none when there are too few real images.
        inside: the sets belong to the reference, so each is compared with the rest of it.
    """

    subsets: list[np.ndarray]
    inside: bool


def plan_floor(total: int, rows: np.ndarray, count: int, sets: int, seed: int) -> FloorPlan:
    """Choose up to `sets` disjoint random sets of `count` of the `total` real images, without replacement.

    They come from outside the reference `rows` if there are enough images, else from inside. There are fewer sets if
    the images run out.
    """
    outside = np.setdiff1d(np.arange(total), rows, assume_unique=True)
    inside = len(outside) < count
    pool = rows if inside else outside
    possible = len(pool) // count
    # Two halves of one set give the same distance twice, so inside, fewer than three sets' worth of images give one.
    if inside and possible < 3:
        possible = min(1, possible // 2)
    # A different random stream than the one that chooses a random reference
    order = np.random.default_rng(seed + 1).permutation(pool)
    subsets = [np.sort(order[index * count : (index + 1) * count]) for index in range(min(sets, possible))]
    return FloorPlan(subsets, inside)


@dataclass(frozen=True)
class Score:
    """The score of sample sets against one choice of real images.

    Attributes:
        values: one distance per set.
        floor: distances of sets of real images in place of samples; empty when there are too few images.
        against: number of real images that the floor's sets are compared with.
        excess: the samples' mean distance minus the floor's, both from the same real images, averaged over the floor's
            sets; None without a floor.
    """

    values: list[float]
    floor: list[float]
    against: int
    excess: float | None

    @property
    def mean(self) -> float:
        """The mean of the values."""
        return float(np.mean(self.values))

    def floor_facts(self, count: int, seed: int) -> dict[str, Any] | None:
        """The floor as results state it, at `count` images per set."""
        if not self.floor:
            return None
        facts = {"mean": float(np.mean(self.floor)), "sd": spread(self.floor), "values": self.floor}
        return facts | {"count": count, "against": self.against, "seed": seed}


def score_against(
    real: RealFeatures, rows: np.ndarray, drawn: list[Statistics], count: int, floor_sets: int, seed: int
) -> Score:
    """Score sample sets of `count` images against the real images `rows`.

    Args:
        floor_sets: sets of real images for the floor; 0: no floor.
    """
    sums = real.sums(rows)
    statistics = sums.statistics()
    values = [frechet_distance(one, statistics) for one in drawn]
    plan = plan_floor(len(real), rows, count, floor_sets, seed)
    if not plan.subsets:
        return Score(values, [], 0, None)
    against = len(rows) - count if plan.inside else len(rows)
    floor = _kept_floor(real, rows, sums, plan)
    excesses = [
        float(np.mean([frechet_distance(one, rest) for one in drawn] if plan.inside else values)) - low
        # If the floor's reals were taken out of the reference, the samples are compared with the same rest of it.
        for low, (_, rest) in zip(floor, _rests(real, sums, plan), strict=True)
    ]
    return Score(values, floor, against, float(np.mean(excesses)))


def _kept_floor(real: RealFeatures, rows: np.ndarray, sums: RunningSums, plan: FloorPlan) -> list[float]:
    """The distance of each set of the floor from the real images it is compared with; kept on disk."""
    key = features_key(real.extractor.features) | {
        "images": real.key(rows),
        "sets": [real.key(subset)["rows"] for subset in plan.subsets],
    }

    def compute() -> dict[str, Any]:
        return {"values": [frechet_distance(subset, rest) for subset, rest in _rests(real, sums, plan)]}

    return [float(value) for value in remembered(real.cache, "floor", key, compute)["values"]]


def _rests(real: RealFeatures, sums: RunningSums, plan: FloorPlan) -> Iterator[tuple[Statistics, Statistics]]:
    """Each set of the floor and the real images it is compared with."""
    for subset in plan.subsets:
        features, rest = real.of(subset), sums
        if plan.inside:
            for block in features.blocks():
                rest = rest.without(block)
        yield features.statistics(), rest.statistics()


def spread(values: list[float]) -> float | None:
    """Standard deviation of independent values (n - 1); None for a single value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None
