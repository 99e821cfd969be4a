"""The kernel distance (KID): an unbiased estimate, where the Fréchet distance of few samples is biased upward.

    MMD² = mean of k(x, x') + mean of k(y, y') - 2 mean of k(x, y),   k(a, b) = (a·b / D + 1)³

with the means of the first two terms over pairs of different samples: Bińkowski et al., "Demystifying MMD GANs",
ICLR 2018, section 3. Its expectation is 0 when both sets come from one distribution, so single values may be negative.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from core.cli.console import progress_bar

TILE = 1024  # samples on a side of the part of the kernel matrix that is in memory at once


@dataclass(frozen=True)
class Kernel:
    """KID over random subsets.

    Attributes:
        mean: of the values of all subsets.
        sd: standard deviation from one subset to the next (n - 1); None for a single subset. Subsets share samples,
            and a set no larger than `size` is in all of them whole: this says how far one draw can be off, and is
            not the uncertainty of the mean.
        subsets: how many were drawn.
        size: samples of each side in a subset.
    """

    mean: float
    sd: float | None
    subsets: int
    size: int


def kernel_distance(real: np.ndarray, generated: np.ndarray) -> float:
    """KID over all pairs of features (N, D) and (M, D), any real type; computed in float64, in memory for one tile.

    Raises:
        ValueError: fewer than two samples in a set, different dimensions, or a value that is not finite.
    """
    real, generated = checked_pair(real, generated, least=2)
    return _own_mean(real) + _own_mean(generated) - 2 * _cross_mean(real, generated)


def kernel_distance_subsets(
    real: np.ndarray, generated: np.ndarray, subsets: int = 100, size: int = 1000, seed: int = 0
) -> Kernel:
    """KID as it is usually reported: over random subsets of features (N, D) and (M, D), under a progress bar.

    Samples are drawn without replacement within a subset. `size` is cut to the smaller set, as the result states.

    Raises:
        ValueError: as `kernel_distance`; no subsets, or subsets of fewer than two.
    """
    real, generated = checked_pair(real, generated, least=2)
    if subsets < 1 or size < 2:
        raise ValueError(f"{subsets} subsets of {size} samples: at least one subset of two is needed")
    size = min(size, len(real), len(generated))
    generator = np.random.default_rng(seed)
    # A subset that is the whole set has the same inner term every time: of 1,000 generated samples, for one.
    whole_real = _own_mean(real) if len(real) == size else None
    whole_generated = _own_mean(generated) if len(generated) == size else None
    values = []
    with progress_bar("subsets") as bar:
        for _ in bar.track(range(subsets), description="KID"):
            a = real[generator.choice(len(real), size, replace=False)]
            b = generated[generator.choice(len(generated), size, replace=False)]
            inner_a = _own_mean(a) if whole_real is None else whole_real
            inner_b = _own_mean(b) if whole_generated is None else whole_generated
            values.append(inner_a + inner_b - 2 * _cross_mean(a, b))
    sd = float(np.std(values, ddof=1)) if subsets > 1 else None
    return Kernel(float(np.mean(values)), sd, subsets, size)


def checked_pair(real: np.ndarray, generated: np.ndarray, least: int) -> tuple[np.ndarray, np.ndarray]:
    """Two feature matrices (N, D) and (M, D) of finite values with at least `least` samples each, else ValueError."""
    real, generated = np.asarray(real), np.asarray(generated)
    for name, features in (("real", real), ("generated", generated)):
        if features.ndim != 2:
            raise ValueError(f"{name} features must be (samples, dimensions), got shape {features.shape}")
        if len(features) < least:
            raise ValueError(f"{len(features)} {name} samples are too few: at least {least} are needed")
        if not np.isfinite(features).all():
            raise ValueError(f"{name} features hold values that are not finite")
    if real.shape[1] != generated.shape[1]:
        raise ValueError(f"features of {real.shape[1]} and of {generated.shape[1]} dimensions cannot be compared")
    return real, generated


def _own_mean(samples: np.ndarray) -> float:
    """Mean kernel of all pairs of different samples of one set."""
    total, tiles = 0.0, list(_tiles(samples))
    for index, rows in enumerate(tiles):
        diagonal = _kernel(rows, rows)
        total += diagonal.sum() - np.trace(diagonal)
        # The matrix is symmetric: what is right of the diagonal counts twice.
        total += 2 * sum(_kernel(rows, columns).sum() for columns in tiles[index + 1 :])
    return float(total / (len(samples) * (len(samples) - 1)))


def _cross_mean(a: np.ndarray, b: np.ndarray) -> float:
    """Mean kernel of all pairs with one sample of each set."""
    total = sum(_kernel(rows, columns).sum() for rows in _tiles(a) for columns in _tiles(b))
    return float(total / (len(a) * len(b)))


def _kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Kernel matrix in float64."""
    base = a.astype(np.float64) @ b.astype(np.float64).T / a.shape[1] + 1
    # Two products are many times faster than a power.
    return np.asarray(base * base * base)


def _tiles(samples: np.ndarray) -> Iterator[np.ndarray]:
    """Views of at most TILE samples."""
    return (samples[start : start + TILE] for start in range(0, len(samples), TILE))
