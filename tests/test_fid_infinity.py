"""FID at infinity and the spread of FID, on Gaussians whose distance is known."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from eval.metrics import fid_infinity
from eval.metrics.fid_infinity import extrapolate, fit
from eval.metrics.frechet import Statistics, frechet_distance

DIMS = 8
SCALES = np.linspace(0.9, 1.1, DIMS)
SHIFT = 0.05
# Commuting covariances: squared difference of the means and of the standard deviations.
TRUTH = DIMS * SHIFT**2 + ((1 - SCALES) ** 2).sum()
EXACT = Statistics(np.zeros(DIMS), np.eye(DIMS), 1_000_000)


def generated(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, DIMS)) * SCALES + SHIFT


@functools.cache
def independent_values(sets: int, count: int) -> np.ndarray:
    """The score of each of many independent sample sets."""
    return np.array([frechet_distance(EXACT, Statistics.of(generated(seed, count))) for seed in range(sets)])


def error_of_mean(values: np.ndarray | list[float]) -> float:
    return float(np.std(values, ddof=1) / np.sqrt(len(values)))


@pytest.fixture
def small(monkeypatch):
    """In 8 dimensions the line holds from far fewer samples than in 2048."""
    monkeypatch.setattr(fid_infinity, "LEAST_START", 200)
    monkeypatch.setattr(fid_infinity, "LEAST_COUNT", 400)


def test_the_raw_score_is_biased_upward_and_the_extrapolated_one_is_not(small):
    results = [extrapolate(EXACT, generated(seed, 2000), start=200, seed=seed) for seed in range(20)]
    raw, value = [r.points[-1][1] for r in results], [r.value for r in results]
    assert np.mean(raw) - TRUTH > 5 * error_of_mean(raw)
    assert abs(np.mean(value) - TRUTH) < 3 * error_of_mean(value)
    # A single one is where its own spread says, too.
    assert all(abs(v - TRUTH) < 4 * np.std(value, ddof=1) for v in value)


def test_the_line_holds_from_a_few_times_the_dimensions_and_misses_below():
    # Equal Gaussians: the truth is 0, each value is all bias, and averaging takes out the noise.
    dims = 24
    exact = Statistics(np.zeros(dims), np.eye(dims), 1_000_000)

    def miss_and_bias(first: int) -> tuple[float, float]:
        draw, points = np.random.default_rng(first).standard_normal, []
        for size in np.linspace(first, 4 * first, 6).astype(int).tolist():
            values = [frechet_distance(exact, Statistics.of(draw((size, dims)))) for _ in range(100)]
            points.append((size, float(np.mean(values))))
        return abs(fit(points)[0]), points[0][1]

    # 5,000 of 2048 dimensions are 2.4 times as many; 1,000 are half as many.
    miss_above, bias = miss_and_bias(int(2.4 * dims))
    miss_below, _ = miss_and_bias(dims // 2)
    assert miss_above < 0.05 * bias
    assert miss_below > 0.3 * bias


def test_a_score_that_falls_as_one_over_n_gives_its_limit_exactly(small, monkeypatch):
    monkeypatch.setattr(fid_infinity, "frechet_distance", lambda reference, statistics: 7 + 300 / statistics.count)
    result = extrapolate(EXACT, generated(0, 3000), start=200)
    assert result.value == pytest.approx(7, rel=1e-12)
    assert result.residual == pytest.approx(0, abs=1e-12)
    sizes = [size for size, _ in result.points]
    assert (len(sizes), sizes[0], sizes[-1]) == (15, 200, 3000) == (15, result.start, result.stop)
    assert sizes == list(range(200, 3001, 200))
    assert [value for _, value in result.points] == pytest.approx([7 + 300 / size for size in sizes])


def test_subsets_hold_no_sample_twice_and_the_last_is_everything(small, monkeypatch):
    features, chosen = np.arange(500.0)[:, None], []
    statistics = fid_infinity._statistics
    monkeypatch.setattr(fid_infinity, "_statistics", lambda f, which: chosen.append(which) or statistics(f, which))
    extrapolate(Statistics(np.zeros(1), np.eye(1), 9), features, start=200)
    assert all(len(np.unique(which)) == len(which) for which in chosen)
    assert [len(which) for which in chosen] == sorted(len(which) for which in chosen)
    assert sorted(chosen[-1]) == list(range(500))
    # Not the same first samples every time.
    assert set(chosen[0]) - set(chosen[1])


def test_points_are_the_plain_distances_whatever_the_batches(small, monkeypatch):
    monkeypatch.setattr(fid_infinity, "BATCH", 64)
    features = generated(0, 500)
    result = extrapolate(EXACT, features.astype(np.float32), start=200)
    assert result.points[-1][1] == pytest.approx(frechet_distance(EXACT, Statistics.of(features)), rel=1e-5)


def test_the_seed_decides(small):
    first, again, other = (extrapolate(EXACT, generated(0, 500), start=200, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first.value != other.value


def test_the_line_and_its_residual_agree_with_numpy():
    points = [(n, 3 + 50 / n + noise) for n, noise in zip((10, 20, 40, 80), (0.3, -0.2, 0.1, 0.05), strict=True)]
    x, y = np.array([1 / n for n, _ in points]), np.array([v for _, v in points])
    slope, intercept = np.polyfit(x, y, 1)
    value, residual = fit(points)
    assert value == pytest.approx(intercept, rel=1e-9)
    assert residual**2 == pytest.approx(((y - intercept - slope * x) ** 2).sum() / 2, rel=1e-9)


@pytest.mark.parametrize(
    ("count", "start", "says"),
    [
        (9_999, 5_000, r"at least 10,000 generated images, there are 9,999.*not linear in 1/N"),
        (1_000, 500, r"at least 10,000"),
        (20_000, 4_999, r"from 4,999 images: start from at least 5,000.*not linear in 1/N"),
        (20_000, 10_001, r"from 10,001 to 20,000 images: start from at most 10,000"),
    ],
)
def test_too_few_samples_are_refused_with_the_reason(count, start, says):
    with pytest.raises(ValueError, match=says):
        extrapolate(EXACT, np.zeros((count, DIMS), np.float32), start=start)


def test_the_spread_over_five_independent_sets_is_the_true_spread():
    values = independent_values(600, 60)
    variances = values.reshape(120, 5).var(axis=1, ddof=1)
    assert abs(variances.mean() - values.var(ddof=1)) < 3 * error_of_mean(variances)
    # And their means are spread as the mean of five is, which is what makes `mean ± sd` of five readable.
    means = values.reshape(120, 5).mean(axis=1)
    assert means.std(ddof=1) == pytest.approx(values.std(ddof=1) / np.sqrt(5), rel=0.2)


def test_a_bootstrap_would_shift_the_score_where_independent_sets_do_not():
    count, many = 60, independent_values(600, 60)
    shifts = []
    for seed in range(40):
        samples, draw = generated(seed, count), np.random.default_rng(1000 + seed)
        again = [samples[draw.integers(0, count, count)] for _ in range(20)]
        shifts.append(np.mean([frechet_distance(EXACT, Statistics.of(one)) for one in again]) - many[seed])
    bias = many.mean() - TRUTH
    # Drawing with replacement pays the bias of few samples a second time.
    assert np.mean(shifts) > 20 * error_of_mean(shifts)
    assert np.mean(shifts) == pytest.approx(bias, rel=0.2)
    first, second = many[:300], many[300:]
    assert abs(first.mean() - second.mean()) < 3 * np.hypot(error_of_mean(first), error_of_mean(second))
