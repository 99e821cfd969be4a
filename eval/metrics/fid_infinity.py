"""FID at infinitely many samples, by extrapolation.

The bias of the Fréchet distance of N generated samples falls nearly as 1/N, so a line fitted over 1/N meets the axis
near the value for unlimited samples: Chong & Forsyth, "Effectively unbiased FID and inception score and where to find
them", CVPR 2020, section 4. Two errors remain: the bias of a finite reference, and the terms in 1/N². The latter are
at most about 4% of the bias at the smallest N for N from 2.4 to 4.9 times the dimensions (5,000 to 10,000 for 2048),
and 1% for N up to 24 times (measured on equal Gaussians of white covariance, the worst case tried).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from eval.metrics.frechet import RunningSums, Statistics, frechet_distance

POINTS = 15  # as in the paper
# For 2048 dimensions: with fewer than a few times as many samples, the terms beyond 1/N are no longer small.
LEAST_START = 5_000
LEAST_COUNT = 10_000
BATCH = 2048  # samples in float64 at once


class FeatureRows(Protocol):
    """Features (N, D) that may be on disk: rows are read by an array of positions."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, D)."""

    def __getitem__(self, rows: np.ndarray, /) -> np.ndarray: ...


@dataclass(frozen=True)
class Infinity:
    """The extrapolated distance and the points behind it.

    Attributes:
        value: the line at 1/N = 0; not a distance, so it can be slightly negative for a perfect generator.
        points: (N, distance of N samples), N ascending.
        start, stop: smallest N, and largest: all samples.
        residual: standard deviation of the points around the line (n - 2). If it is more than a small share of the
            range of values, the line does not fit. Points share samples, so it is not the error of `value`.
    """

    value: float
    points: list[tuple[int, float]]
    start: int
    stop: int
    residual: float


def extrapolate(
    reference: Statistics,
    features: FeatureRows,
    start: int = LEAST_START,
    seed: int = 0,
    track: Callable[[Sequence[int]], Iterable[int]] = iter,
) -> Infinity:
    """Extrapolate the distance of generated features (N, D) from a reference to unlimited samples.

    Args:
        start: size of the smallest of 15 random subsets, evenly spaced up to N and drawn without replacement.
        track: wraps the loop over subset sizes, for a progress bar.

    Raises:
        ValueError: fewer than 10,000 samples; a `start` below 5,000 or above half of N; different dimensions; a value
            that is not finite.
    """
    count = features.shape[0]
    why = "with fewer samples the score is not linear in 1/N, and the line would miss"
    if count < LEAST_COUNT:
        raise ValueError(
            f"FID at infinity needs at least {LEAST_COUNT:,} generated images, there are {count:,}: draw more ({why})"
        )
    if start < LEAST_START:
        raise ValueError(f"FID at infinity from {start:,} images: start from at least {LEAST_START:,} ({why})")
    if 2 * start > count:
        raise ValueError(f"FID at infinity from {start:,} to {count:,} images: start from at most {count // 2:,}")
    sizes = np.linspace(start, count, POINTS).round().astype(int).tolist()
    generator = np.random.default_rng(seed)
    points = []
    for size in track(sizes):
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


def _statistics(features: FeatureRows, chosen: np.ndarray) -> Statistics:
    """Statistics by running sums, because 50,000 features in float64 take much memory."""
    sums = RunningSums(features.shape[1])
    for first in range(0, len(chosen), BATCH):
        sums.add(features[chosen[first : first + BATCH]])
    return sums.statistics()
