"""KID against a double loop, torchmetrics and its expectation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.image.kid import poly_mmd

from eval.metrics import kid as kid_module
from eval.metrics.kid import kid, kid_of_subsets


def samples(seed: int, count: int, dims: int = 12, shift: float = 0) -> np.ndarray:
    """Positive and skewed, as pooled features are."""
    return np.random.default_rng(seed).exponential(0.5, (count, dims)).astype(np.float32) + np.float32(shift)


def by_loops(x: np.ndarray, y: np.ndarray) -> float:
    """The definition, one pair at a time."""

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return (sum(float(p) * float(q) for p, q in zip(a, b, strict=True)) / len(a) + 1) ** 3

    inner = [np.mean([k(s[i], s[j]) for i in range(len(s)) for j in range(len(s)) if i != j]) for s in (x, y)]
    return float(inner[0] + inner[1] - 2 * np.mean([k(a, b) for a in x for b in y]))


def by_torchmetrics(x: np.ndarray, y: np.ndarray) -> float:
    return float(poly_mmd(torch.from_numpy(x).double(), torch.from_numpy(y).double()))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 7), st.integers(2, 7), st.integers(1, 4), st.integers(1, 8))
def test_agrees_with_a_double_loop_whatever_the_tiles(seed, n, m, dims, tile):
    x, y = samples(seed, n, dims), samples(seed + 1, m, dims, shift=0.3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kid_module, "TILE", tile)
        assert kid(x, y) == pytest.approx(by_loops(x, y), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("shift", [0, 0.05, 1])
def test_agrees_with_torchmetrics(shift, monkeypatch):
    monkeypatch.setattr(kid_module, "TILE", 37)
    x, y = samples(0, 150, 96), samples(1, 150, 96, shift)
    assert kid(x, y) == pytest.approx(by_torchmetrics(x, y), rel=1e-6, abs=1e-12)


def test_two_points_against_two_by_hand():
    # k = (1 + 1)^3 within {1, 1}, (4 + 1)^3 within {2, 2}, (2 + 1)^3 across.
    assert kid(np.array([[1.0], [1.0]]), np.array([[2.0], [2.0]])) == 8 + 125 - 2 * 27


def test_is_zero_on_average_for_equal_distributions_at_any_size():
    for count in (4, 16):
        values = [kid(samples(2 * i, count), samples(2 * i + 1, count)) for i in range(400)]
        error = np.std(values, ddof=1) / 20
        assert abs(np.mean(values)) < 3 * error
        assert min(values) < 0 < max(values)


def test_its_average_does_not_depend_on_the_number_of_samples():
    few = [kid(samples(2 * i, 5), samples(2 * i + 1, 9, shift=0.5)) for i in range(400)]
    many = kid(samples(0, 2000), samples(1, 2000, shift=0.5))
    assert abs(np.mean(few) - many) < 3 * np.std(few, ddof=1) / 20
    assert np.mean(few) > 10 * np.std(few, ddof=1) / 20


def test_a_subset_as_large_as_both_sets_is_the_whole_every_time():
    x, y = samples(0, 40), samples(1, 40, shift=0.2)
    result = kid_of_subsets(x, y, subsets=5, size=40)
    assert result.mean == pytest.approx(kid(x, y), rel=1e-9)
    # Drawn with replacement, the five would differ.
    assert result.sd == pytest.approx(0, abs=1e-12)


def test_subsets_vary_around_the_value_of_all_pairs():
    x, y = samples(0, 300), samples(1, 200, shift=0.3)
    whole, result = kid(x, y), kid_of_subsets(x, y, subsets=200, size=50)
    assert (result.subsets, result.size) == (200, 50)
    assert abs(result.mean - whole) < 3 * result.sd / np.sqrt(200)
    assert 0 < result.sd < whole


def test_a_set_that_is_whole_in_every_subset_gives_what_its_samples_give(monkeypatch):
    x, y = samples(0, 60), samples(1, 20, shift=0.3)
    seen = []
    monkeypatch.setattr(kid_module, "_cross_mean", lambda a, b: seen.append((a, b)) or 0.0)
    inner = kid_of_subsets(x, y, subsets=8, size=20).mean
    # What is left without the cross term is the inner terms, here from torchmetrics with the other set at zero.
    nothing = np.zeros_like(y)
    expected = [by_torchmetrics(a, nothing) + by_torchmetrics(b, nothing) + 2 for a, b in seen]
    assert inner == pytest.approx(np.mean(expected), rel=1e-6)
    assert all(len(np.unique(a, axis=0)) == 20 == len(np.unique(b, axis=0)) for a, b in seen)
    assert len({a.tobytes() for a, _ in seen}) == 8


def test_the_size_is_cut_to_the_smaller_set_and_said():
    assert kid_of_subsets(samples(0, 30), samples(1, 21), subsets=2).size == 21
    assert kid_of_subsets(samples(0, 19), samples(1, 21), subsets=2).size == 19


def test_the_seed_decides_and_one_subset_has_no_spread():
    x, y = samples(0, 60), samples(1, 60)
    first, again, other = (kid_of_subsets(x, y, 3, 20, seed) for seed in (1, 1, 2))
    assert first == again
    assert first.mean != other.mean
    assert kid_of_subsets(x, y, subsets=1, size=20).sd is None


@pytest.mark.parametrize(
    ("x", "y", "says"),
    [
        (np.zeros((3, 4)), np.zeros((3, 5)), "4 and of 5 dimensions"),
        (np.zeros((3, 4)), np.zeros((1, 4)), "1 generated samples"),
        (np.zeros((1, 4)), np.zeros((3, 4)), "1 real samples"),
        (np.zeros(4), np.zeros((3, 4)), "shape"),
        (np.full((3, 4), np.nan), np.zeros((3, 4)), "not finite"),
    ],
)
def test_features_without_a_distance_are_refused(x, y, says):
    for distance in (kid, kid_of_subsets):
        with pytest.raises(ValueError, match=says):
            distance(x, y)


@pytest.mark.parametrize(("subsets", "size"), [(0, 10), (5, 1)])
def test_no_subsets_or_of_single_samples_are_refused(subsets, size):
    with pytest.raises(ValueError, match="at least one subset"):
        kid_of_subsets(samples(0, 9), samples(1, 9), subsets, size)
