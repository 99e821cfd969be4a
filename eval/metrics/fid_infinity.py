"""FID at infinitely many samples, by extrapolation.

The bias of the Fréchet distance of N generated samples falls nearly as 1/N, so a line through its values over 1/N
meets the axis near the value for unlimited samples: Chong & Forsyth, "Effectively unbiased FID and inception score and
where to find them", CVPR 2020, section 4. What stays in it: the bias that a finite reference adds, and the terms in
1/N², at most about 4% of the bias at the smallest N (measured on equal Gaussians of white covariance, the worst case
tried, from 2.4 to 4.9 times the dimensions as 5,000 to 10,000 are of 2048; 1% when it goes up to 24 times).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from core.cli.console import progress_bar
from core.cli.errors import UserError
from eval.features.cache import KeptFeatures
from eval.metrics.frechet import RunningSums, Statistics, frechet_distance

POINTS = 15  # as in the paper
# Of 2048 dimensions: below a few times as many samples, the terms beyond 1/N are no longer small.
LEAST_START = 5_000
LEAST_COUNT = 10_000
BATCH = 2048  # samples in float64 at once


@dataclass(frozen=True)
class Infinity:
    """The extrapolated distance and what it rests on.

    Attributes:
        value: the line at 1/N = 0. Not a distance itself: it can be slightly negative for a perfect generator.
        points: (N, distance of N samples), N ascending.
        start: smallest N.
        stop: largest N, all samples.
        residual: standard deviation of the points around the line (n - 2): more than a small share of the range of
            values says that the line does not hold. Points share samples, so this is not the error of `value`.
    """

    value: float
    points: list[tuple[int, float]]
    start: int
    stop: int
    residual: float


def extrapolate(
    reference: Statistics, features: np.ndarray | KeptFeatures, start: int = LEAST_START, seed: int = 0
) -> Infinity:
    """Extrapolate the distance of generated features (N, D) from a reference to unlimited samples.

    Takes random subsets, without replacement, of 15 sizes evenly spaced from `start` to N.

    Raises:
        UserError: fewer than 10,000 samples, or a `start` below 5,000 or beyond the half of N.
        ValueError: different dimensions, or a value that is not finite.
    """
    count = len(features)
    _check(count, start)
    sizes = np.linspace(start, count, POINTS).round().astype(int).tolist()
    generator = np.random.default_rng(seed)
    points = []
    with progress_bar("subsets") as bar:
        for size in bar.track(sizes, description="FID at infinity"):
            chosen = generator.choice(count, size, replace=False)
            points.append((size, frechet_distance(reference, _statistics(features, chosen))))
    value, residual = fit(points)
    return Infinity(value, points, start, count, residual)


def fit(points: list[tuple[int, float]]) -> tuple[float, float]:
    """Least-squares line through values over 1/N: its value at 1/N = 0, and the standard deviation around it."""
    inverse = np.array([1 / size for size, _ in points])
    values = np.array([value for _, value in points])
    design = np.stack([np.ones_like(inverse), inverse], axis=1)
    line, *_ = np.linalg.lstsq(design, values, rcond=None)
    off = values - design @ line
    return float(line[0]), float(np.sqrt(off @ off / (len(points) - 2)))


def _check(count: int, start: int) -> None:
    """Refuse numbers for which the result would not be what its name says."""
    why = "with fewer samples the score is not linear in 1/N, and the line would miss"
    if count < LEAST_COUNT:
        raise UserError(
            f"FID at infinity needs at least {LEAST_COUNT:,} generated images, there are {count:,}: draw more ({why})"
        )
    if start < LEAST_START:
        raise UserError(f"FID at infinity from {start:,} images: start from at least {LEAST_START:,} ({why})")
    if 2 * start > count:
        raise UserError(f"FID at infinity from {start:,} to {count:,} images: start from at most {count // 2:,}")


def _statistics(features: np.ndarray | KeptFeatures, chosen: np.ndarray) -> Statistics:
    """Statistics of some of the features by streaming sums: 50,000 of them in float64 would not be small."""
    sums = RunningSums(features.shape[1])
    for first in range(0, len(chosen), BATCH):
        sums.add(features[chosen[first : first + BATCH]])
    return sums.statistics()
