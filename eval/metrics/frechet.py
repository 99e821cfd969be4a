"""The Fréchet distance between two Gaussians, and the statistics it needs.

    d² = |m1 - m2|² + Tr S1 + Tr S2 - 2 Tr (S1 S2)^½

Dowson & Landau, "The Fréchet distance between multivariate normal distributions", J. Multivariate Anal. 12 (1982);
used on Inception features as FID by Heusel et al., "GANs trained by a two time-scale update rule", NeurIPS 2017.

The trace of the root is the sum of the square roots of the eigenvalues of S1 S2. For any factor S1 = F F', the
symmetric matrix F' S2 F has the same eigenvalues, and its eigenvalue problem is fast and has no imaginary parts. F is
Xc' / sqrt(n - 1) with fewer samples than dimensions (an n x n problem), else the root by `eigh`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Statistics:
    """Mean and covariance of a set of feature vectors, all float64.

    Attributes:
        mean: (D,).
        covariance: (D, D), unbiased (divided by count - 1).
        count: number of samples n.
        centred: (n, D) samples minus their mean if n < D, which allows the fast form; else None.
    """

    mean: np.ndarray
    covariance: np.ndarray
    count: int
    centred: np.ndarray | None = None

    @classmethod
    def of(cls, features: np.ndarray) -> Statistics:
        """Statistics of finite features (n, D) of any real type, n at least 2; ValueError for all others."""
        samples = _checked(features)
        count, dims = samples.shape
        if count < 2:
            raise ValueError("a covariance needs at least two samples")
        mean = samples.mean(axis=0)
        centred = samples - mean
        return cls(mean, centred.T @ centred / (count - 1), count, centred if count < dims else None)


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """Squared Fréchet distance of the Gaussians with these moments; symmetric, never negative.

    Raises:
        ValueError: the two sets have different dimensions.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features of {len(a.mean)} and of {len(b.mean)} dimensions cannot be compared")
    difference = a.mean - b.mean
    traces = np.trace(a.covariance) + np.trace(b.covariance)
    # Rounding can give -1e-9 for equal sets
    return max(0.0, float(difference @ difference + traces - 2 * _root_trace(a, b)))


def _root_trace(a: Statistics, b: Statistics) -> float:
    """Tr (Sa Sb)^½ by the cheapest factor: fewer samples make a smaller eigenvalue problem."""
    first, second = sorted((a, b), key=lambda s: len(s.mean) if s.centred is None else s.count)
    if first.centred is not None:
        product = first.centred @ second.covariance @ first.centred.T / (first.count - 1)
    else:
        values, vectors = np.linalg.eigh(first.covariance)
        # Eigenvalues below rounding carry no information, but their roots would add up to a visible error.
        kept = values > values[-1] * len(values) * np.finfo(np.float64).eps
        factor = np.asarray(vectors[:, kept] * np.sqrt(values[kept]))
        product = factor.T @ second.covariance @ factor
    # `eigvalsh` needs exact symmetry. Tiny negative eigenvalues are zeros of rank-deficient sets after rounding.
    return float(np.sqrt(np.linalg.eigvalsh((product + product.T) / 2).clip(min=0)).sum())


class RunningSums:
    """Count, sum and sum of outer products of a stream of features, in float64 and constant memory.

    All samples are shifted by the mean of the first batch. Otherwise the covariance would be the difference of two
    large numbers, and lose digits, where the mean is large compared with the spread.

    Attributes:
        count: samples so far.
        shift: (D,) the constant subtracted from every sample; None before the first batch.
        total: (D,) sum of shifted samples.
        outer: (D, D) sum of the outer products of shifted samples.
    """

    def __init__(self, dims: int) -> None:
        self.count = 0
        self.shift: np.ndarray | None = None
        self.total, self.outer = np.zeros(dims), np.zeros((dims, dims))

    def add(self, features: np.ndarray) -> None:
        """Add a batch (n, D); ValueError for other dimensions or a value that is not finite."""
        samples = _checked(features)
        if samples.shape[1] != len(self.total):
            raise ValueError(f"{samples.shape[1]} dimensions were added to sums of {len(self.total)}")
        if self.shift is None:
            self.shift = samples.mean(axis=0)
        shifted = samples - self.shift
        self.count += len(samples)
        self.total += shifted.sum(axis=0)
        self.outer += shifted.T @ shifted

    def without(self, features: np.ndarray) -> RunningSums:
        """New sums without these samples (n, D), which must have been added before; ValueError if there are more."""
        if self.shift is None or len(features) > self.count:
            raise ValueError("more samples are taken out than were added")
        shifted = _checked(features) - self.shift
        rest = copy.copy(self)
        rest.count = self.count - len(shifted)
        rest.total, rest.outer = self.total - shifted.sum(axis=0), self.outer - shifted.T @ shifted
        return rest

    def statistics(self) -> Statistics:
        """Mean and covariance of all samples; ValueError if there are fewer than two."""
        if self.shift is None or self.count < 2:
            raise ValueError("a covariance needs at least two samples")
        offset = self.total / self.count
        covariance = (self.outer - self.count * np.outer(offset, offset)) / (self.count - 1)
        return Statistics(self.shift + offset, covariance, self.count)


def _checked(features: np.ndarray) -> np.ndarray:
    """Features as a float64 matrix of finite values."""
    samples = np.asarray(features, dtype=np.float64)
    if samples.ndim != 2:
        raise ValueError(f"features must be (samples, dimensions), got shape {samples.shape}")
    if not np.isfinite(samples).all():
        raise ValueError("features hold values that are not finite")
    return samples
