"""Precision, recall, density and coverage (PRDC): fidelity and variety from nearest neighbours among features.

Each sample of a set has a ball that reaches its k-th nearest neighbour in the set. The union of the balls stands for
the region that the set covers.
Precision and recall: Kynkäänniemi et al., "Improved precision and recall metric for assessing generative models",
NeurIPS 2019, section 2. Density and coverage: Naeem et al., "Reliable fidelity and diversity metrics for generative
models", ICML 2020, section 3. The balls are closed, as in the former.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from eval.metrics.kid import checked_pair

ROWS = 512  # samples whose distances from all others are in memory at once
TILE = 2048  # references in float64 at once
# Relative to a squared norm: 100 times the rounding of a float64 product, far below the resolution of float32.
ROUNDING = 1e-12


@dataclass(frozen=True)
class Prdc:
    """Fidelity and variety of generated samples. All depend on both counts: compare at equal counts only.

    Attributes:
        precision: share of generated samples within a ball of any real one, 0..1.
        recall: share of real samples within a ball of any generated one, 0..1.
        density: mean number of real balls around a generated sample, divided by k. Its expectation for real samples is
            1; samples that crowd where reals are dense have more.
        coverage: share of real samples whose ball holds a generated one, 0..1.
        k: the neighbour that sets the radius of a ball.
        real, generated: numbers of samples.
    """

    precision: float
    recall: float
    density: float
    coverage: float
    k: int
    real: int
    generated: int


def prdc(real: np.ndarray, generated: np.ndarray, k: int = 5) -> Prdc:
    """Precision, recall, density and coverage of features (N, D) against real ones (M, D), of any real type.

    Distances are computed in float64 for a few rows at a time: 10,000 against 10,000 in 2048 dimensions take about
    0.45 GB in addition to the features.

    Raises:
        ValueError: a set has no k-th neighbour, different dimensions, or a value that is not finite.
    """
    if k < 1:
        raise ValueError(f"k={k}: must be at least 1")
    real, generated = checked_pair(real, generated, least=k + 1)
    # Centring keeps distances, and smaller norms lose fewer digits in their difference.
    centre = real.mean(axis=0, dtype=np.float64)
    real, generated = real - centre, generated - centre
    real_radii, generated_radii = _squared_radii(real, k), _squared_radii(generated, k)
    slack = ROUNDING * max(_squared_norms(real).max(), _squared_norms(generated).max())
    near_real, balls, near_generated, covered = np.zeros(len(generated), bool), 0, 0, 0
    for start in range(0, len(real), ROWS):
        squared = _squared_distances(real[start : start + ROWS], generated)
        in_real_ball = squared <= real_radii[start : start + ROWS, None] + slack
        near_real |= in_real_ball.any(axis=0)
        balls += int(in_real_ball.sum())
        covered += int(in_real_ball.any(axis=1).sum())
        near_generated += int((squared <= generated_radii + slack).any(axis=1).sum())
    precision, recall = float(near_real.mean()), near_generated / len(real)
    return Prdc(precision, recall, balls / (k * len(generated)), covered / len(real), k, len(real), len(generated))


def nearest(queries: np.ndarray, references: np.ndarray | Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The nearest reference of every query, in one pass over the references.

    Args:
        queries: (N, D), any real type.
        references: (M, D), or its blocks (any number, D) in order, which need not be in memory together.

    Returns:
        Euclidean distances, float64 (N,), computed from differences, so that a copy is at exactly 0; and positions
        among all references, int64 (N,). Ties within the rounding of float64 norms are broken arbitrarily.

    Raises:
        ValueError: no references, different dimensions, or a value that is not finite.
    """
    queries = np.asarray(queries)
    best, index = np.full(len(queries), np.inf), np.full(len(queries), -1, np.int64)
    offset = 0
    for block in [references] if isinstance(references, np.ndarray) else references:
        for first in range(0, len(block), TILE):
            samples, tile = checked_pair(queries, block[first : first + TILE], least=1)
            for start in range(0, len(samples), ROWS):
                rows = slice(start, start + ROWS)
                _improve(samples[rows], tile, best[rows], index[rows], offset)
            offset += len(tile)
    if (index < 0).any():
        raise ValueError("there is no reference to be nearest")
    return np.sqrt(best), index


def _improve(rows: np.ndarray, tile: np.ndarray, best: np.ndarray, index: np.ndarray, offset: int) -> None:
    """Update `best` (squared) and `index` where this tile, which starts at reference `offset`, has a nearer one."""
    rows, tile = rows.astype(np.float64), tile.astype(np.float64)
    found = _squared_distances(rows, tile).argmin(axis=1)
    difference = rows - tile[found]
    exact = np.einsum("nd,nd->n", difference, difference)
    nearer = exact < best
    best[nearer], index[nearer] = exact[nearer], found[nearer] + offset


def _squared_radii(samples: np.ndarray, k: int) -> np.ndarray:
    """Squared distance of each sample (N, D) from its k-th nearest other sample."""
    radii = np.empty(len(samples))
    for start in range(0, len(samples), ROWS):
        squared = _squared_distances(samples[start : start + ROWS], samples)
        numbers = np.arange(len(squared))
        squared[numbers, start + numbers] = np.inf
        radii[start : start + ROWS] = np.partition(squared, k - 1, axis=1)[:, k - 1]
    return radii


def _squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Squared Euclidean distances (len(a), len(b)) of float64 samples by one matrix product."""
    squared = a @ b.T
    squared *= -2
    squared += _squared_norms(a)[:, None]
    squared += _squared_norms(b)
    # Rounding gives values down to -1e-13 where two samples are equal
    return np.asarray(squared.clip(min=0, out=squared))


def _squared_norms(samples: np.ndarray) -> np.ndarray:
    return np.asarray(np.einsum("nd,nd->n", samples, samples))
