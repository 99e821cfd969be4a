"""The kernel distance (KID): unbiased, whereas the Fréchet distance of few samples is biased upward.

    MMD² = mean of k(x, x') + mean of k(y, y') - 2 mean of k(x, y),   k(a, b) = (a·b / D + 1)³

where the first two means are over pairs of different samples: Bińkowski et al., "Demystifying MMD GANs", ICLR 2018,
section 3. The expectation is 0 when both sets come from one distribution, so single values may be negative.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

TILE = 1024  # rows and columns of the kernel matrix in memory at once


@dataclass(frozen=True)
class SubsetKid:
    """KID over random subsets.

    Attributes:
        mean: of the values of all subsets.
        sd: standard deviation between subsets (n - 1); None for a single subset. Subsets share samples, and a set no
            larger than `size` is in every one of them, so this is the error of one draw, not of the mean.
        subsets: their number.
        size: samples of each side in a subset.
    """

    mean: float
    sd: float | None
    subsets: int
    size: int


def kid(real: np.ndarray, generated: np.ndarray) -> float:
    """KID over all pairs of features (N, D) and (M, D) of any real type, computed in float64 tile by tile.

    Raises:
        ValueError: fewer than two samples in a set, different dimensions, or a value that is not finite.
    """
    real, generated = checked_pair(real, generated, least=2)
    return _own_mean(real) + _own_mean(generated) - 2 * _cross_mean(real, generated)


def kid_of_subsets(
    real: np.ndarray,
    generated: np.ndarray,
    subsets: int = 100,
    size: int = 1000,
    seed: int = 0,
    track: Callable[[Sequence[int]], Iterable[int]] = iter,
) -> SubsetKid:
    """KID as it is usually reported: over random subsets of features (N, D) and (M, D).

    Args:
        size: samples of each side in a subset, drawn without replacement; cut to the size of the smaller set.
        track: wraps the loop over subsets, for a progress bar.

    Raises:
        ValueError: as `kid`; no subsets, or subsets of fewer than two samples.
    """
    real, generated = checked_pair(real, generated, least=2)
    if subsets < 1 or size < 2:
        raise ValueError(f"{subsets} subsets of {size} samples: at least one subset of two is needed")
    size = min(size, len(real), len(generated))
    generator = np.random.default_rng(seed)
    # A subset that is the whole set, such as 1,000 generated samples, always has the same inner term.
    whole = [_own_mean(samples) if len(samples) == size else None for samples in (real, generated)]
    values = []
    for _ in track(range(subsets)):
        drawn = [samples[generator.choice(len(samples), size, replace=False)] for samples in (real, generated)]
        inner = [_own_mean(one) if known is None else known for one, known in zip(drawn, whole, strict=True)]
        values.append(sum(inner) - 2 * _cross_mean(*drawn))
    sd = float(np.std(values, ddof=1)) if subsets > 1 else None
    return SubsetKid(float(np.mean(values)), sd, subsets, size)


def checked_pair(real: np.ndarray, generated: np.ndarray, least: int) -> tuple[np.ndarray, np.ndarray]:
    """Features (N, D) and (M, D); ValueError if N or M is below `least`, D differs or a value is not finite."""
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
    """Mean kernel over all pairs of different samples of one set."""
    total, tiles = 0.0, list(_tiles(samples))
    for index, rows in enumerate(tiles):
        diagonal = _kernel(rows, rows)
        total += diagonal.sum() - np.trace(diagonal)
        # The matrix is symmetric, so the part right of the diagonal counts twice.
        total += 2 * sum(_kernel(rows, columns).sum() for columns in tiles[index + 1 :])
    return float(total / (len(samples) * (len(samples) - 1)))


def _cross_mean(a: np.ndarray, b: np.ndarray) -> float:
    """Mean kernel over all pairs with one sample of each set."""
    total = sum(_kernel(rows, columns).sum() for rows in _tiles(a) for columns in _tiles(b))
    return float(total / (len(a) * len(b)))


def _kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    base = a.astype(np.float64) @ b.astype(np.float64).T / a.shape[1] + 1
    # Two products are many times faster than a power
    return np.asarray(base * base * base)


def _tiles(samples: np.ndarray) -> Iterator[np.ndarray]:
    """Views of at most TILE samples."""
    return (samples[start : start + TILE] for start in range(0, len(samples), TILE))
