"""The Fréchet distance against closed forms, scipy's matrix root and the properties of a distance."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import linalg

from eval.metrics.frechet import RunningSums, Statistics, frechet_distance


def normal(seed: int, count: int, dims: int) -> np.ndarray:
    """Correlated samples with a spectrum that falls by four orders of magnitude, as features have."""
    generator = np.random.default_rng(seed)
    mixing = generator.standard_normal((dims, dims)) * np.logspace(0, -2, dims)
    return generator.standard_normal((count, dims)) @ mixing.T + generator.standard_normal(dims) * 0.1


def by_scipy(a: Statistics, b: Statistics) -> float:
    """The textbook formula with scipy's matrix root in float64."""
    root = linalg.sqrtm(a.covariance @ b.covariance)
    difference = a.mean - b.mean
    return float(difference @ difference + np.trace(a.covariance + b.covariance - 2 * np.real(root)))


def test_a_shift_of_one_in_512_dimensions_is_512_exactly() -> None:
    """By the eigenvalues of whole covariances, which takes most of a minute at 2,048; the next test has these."""
    identity = np.eye(512)
    here, there = Statistics(np.zeros(512), identity, 10_000), Statistics(np.ones(512), identity, 10_000)
    assert frechet_distance(here, there) == pytest.approx(512, abs=1e-8)


def test_the_same_samples_shifted_by_one_in_2048_dimensions() -> None:
    features = np.random.default_rng(0).standard_normal((100, 2048))
    assert frechet_distance(Statistics.of(features), Statistics.of(features + 1)) == pytest.approx(2048, rel=1e-6)


def test_commuting_covariances_give_the_distance_of_their_roots() -> None:
    generator = np.random.default_rng(0)
    basis, _ = np.linalg.qr(generator.standard_normal((50, 50)))
    first, second = generator.uniform(0.1, 3, 50), generator.uniform(0.1, 3, 50)
    a = Statistics(np.zeros(50), basis * first @ basis.T, 1000)
    b = Statistics(np.zeros(50), basis * second @ basis.T, 1000)
    assert frechet_distance(a, b) == pytest.approx(((np.sqrt(first) - np.sqrt(second)) ** 2).sum(), rel=1e-10)


@pytest.mark.parametrize(("n", "m"), [(400, 500), (40, 500), (400, 50), (30, 40)])
def test_agrees_with_scipy_for_few_and_many_samples(n: int, m: int) -> None:
    a, b = Statistics.of(normal(1, n, 64)), Statistics.of(normal(2, m, 64))
    assert (a.centred is not None) == (n < 64)
    assert frechet_distance(a, b) == pytest.approx(by_scipy(a, b), rel=1e-5)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)


def test_both_forms_give_the_same_number() -> None:
    few, many = Statistics.of(normal(1, 40, 64)), Statistics.of(normal(2, 900, 64))
    without_samples = Statistics(few.mean, few.covariance, few.count)
    assert frechet_distance(without_samples, many) == pytest.approx(frechet_distance(few, many), rel=1e-7)


@pytest.mark.parametrize("count", [10, 300])
def test_a_set_has_no_distance_from_itself(count: int) -> None:
    a = Statistics.of(normal(3, count, 64))
    assert 0 <= frechet_distance(a, a) < 1e-6 * np.trace(a.covariance)


def test_rank_deficient_sets() -> None:
    generator = np.random.default_rng(0)
    plane = generator.standard_normal((3, 64))
    a = Statistics.of(generator.standard_normal((200, 3)) @ plane)
    b = Statistics.of(generator.standard_normal((200, 3)) @ plane + 1)
    reduced = [linalg.orth(plane.T).T @ s.covariance @ linalg.orth(plane.T) for s in (a, b)]
    expected = np.trace(reduced[0] + reduced[1] - 2 * np.real(linalg.sqrtm(reduced[0] @ reduced[1])))
    expected += ((a.mean - b.mean) ** 2).sum()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_constant_features_leave_the_distance_of_the_means() -> None:
    a, b = Statistics.of(np.zeros((100, 8))), Statistics.of(np.full((100, 8), 2.0))
    assert frechet_distance(a, b) == pytest.approx(32)


def test_different_dimensions_are_refused() -> None:
    with pytest.raises(ValueError, match="8 and of 9 dimensions"):
        frechet_distance(Statistics.of(np.zeros((3, 8))), Statistics.of(np.zeros((3, 9))))


@pytest.mark.parametrize("bad", [np.zeros((1, 4)), np.zeros(4), np.full((3, 4), np.nan), np.full((3, 4), np.inf)])
def test_features_without_statistics_are_refused(bad: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"at least two|must be|not finite"):
        Statistics.of(bad)


def summed(features: np.ndarray, batch: int) -> RunningSums:
    sums = RunningSums(features.shape[1])
    for start in range(0, len(features), batch):
        sums.add(features[start : start + batch])
    return sums


@pytest.mark.parametrize("offset", [0, 1e6])
def test_running_sums_equal_the_whole_even_far_from_zero(offset: float) -> None:
    features = normal(4, 333, 20) + offset
    whole, streamed = Statistics.of(features), summed(features, 50).statistics()
    assert streamed.count == 333
    np.testing.assert_allclose(streamed.mean, whole.mean, rtol=1e-14, atol=1e-14)
    np.testing.assert_allclose(streamed.covariance, whole.covariance, rtol=0, atol=1e-9)


def test_taking_samples_out_leaves_the_statistics_of_the_rest() -> None:
    features = normal(5, 300, 20) + 100
    sums = summed(features, 64)
    rest, expected = (
        sums.without(features[100:250]).statistics(),
        Statistics.of(np.delete(features, slice(100, 250), 0)),
    )
    assert rest.count == 150
    np.testing.assert_allclose(rest.mean, expected.mean, rtol=1e-13)
    np.testing.assert_allclose(rest.covariance, expected.covariance, rtol=0, atol=1e-10)
    assert sums.count == 300, "the sums themselves stay as they were"


def test_running_sums_refuse_what_does_not_fit() -> None:
    sums = RunningSums(3)
    with pytest.raises(ValueError, match="at least two"):
        sums.statistics()
    with pytest.raises(ValueError, match="4 dimensions"):
        sums.add(np.zeros((2, 4)))
    sums.add(np.zeros((2, 3)))
    with pytest.raises(ValueError, match="more samples"):
        sums.without(np.zeros((3, 3)))
