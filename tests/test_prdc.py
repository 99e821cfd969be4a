"""Precision, recall, density, coverage and nearest neighbours against plain loops and closed forms."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.metrics import prdc as prdc_module
from eval.metrics.prdc import nearest, prdc


def normal(seed: int, count: int, dims: int = 8, shift: float = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((count, dims)) + shift).astype(np.float32)


def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """All distances by differences."""
    return np.linalg.norm(a[:, None].astype(np.float64) - b[None].astype(np.float64), axis=2)


def by_definition(real: np.ndarray, generated: np.ndarray, k: int) -> tuple[float, float, float, float]:
    """The sums of both papers, written out."""

    def radii(samples: np.ndarray) -> list[float]:
        own = distances(samples, samples)
        return [sorted(np.delete(own[i], i))[k - 1] for i in range(len(samples))]

    across, real_radii, generated_radii = distances(real, generated), radii(real), radii(generated)
    n, m = across.shape
    in_real = [[across[i, j] <= real_radii[i] for j in range(m)] for i in range(n)]
    in_generated = [[across[i, j] <= generated_radii[j] for j in range(m)] for i in range(n)]
    precision = sum(any(in_real[i][j] for i in range(n)) for j in range(m)) / m
    recall = sum(any(row) for row in in_generated) / n
    density = sum(sum(row) for row in in_real) / (k * m)
    coverage = sum(any(row) for row in in_real) / n
    return precision, recall, density, coverage


def four(result: prdc_module.Prdc) -> tuple[float, float, float, float]:
    return result.precision, result.recall, result.density, result.coverage


@pytest.mark.parametrize(("n", "m", "k"), [(60, 60, 5), (41, 70, 3), (70, 30, 1), (7, 6, 5)])
@pytest.mark.parametrize(("shift", "offset"), [(0, 0), (0.8, 0), (0.8, 1000)])
def test_agrees_with_the_definitions(n, m, k, shift, offset, monkeypatch):
    monkeypatch.setattr(prdc_module, "ROWS", 16)
    real, generated = normal(1, n) + np.float32(offset), normal(2, m, shift=shift) * 0.8 + np.float32(offset)
    result = prdc(real, generated, k)
    assert four(result) == pytest.approx(by_definition(real, generated, k), rel=1e-12)
    assert (result.k, result.real, result.generated) == (k, n, m)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(3, 12), st.integers(3, 12), st.integers(1, 2))
def test_agrees_with_the_definitions_where_distances_tie(seed, n, m, k):
    generator = np.random.default_rng(seed)
    real, generated = generator.integers(0, 4, (n, 2)), generator.integers(1, 5, (m, 2))
    # Points of a grid have many equal distances; roots of equal integers are equal.
    assert four(prdc(real, generated, k)) == pytest.approx(by_definition(real, generated, k), rel=1e-12)


def test_equal_sets_are_wholly_inside_each_other():
    samples = normal(0, 300, 64) + 50
    # Every ball holds its centre and its k neighbours, the k-th on its surface.
    assert four(prdc(samples, samples, 5)) == (1, 1, 6 / 5, 1)


def test_other_samples_of_the_same_distribution_have_a_density_of_one():
    values = [prdc(normal(2 * i, 80), normal(2 * i + 1, 80), 5).density for i in range(60)]
    assert abs(np.mean(values) - 1) < 3 * np.std(values, ddof=1) / np.sqrt(60)


def test_far_sets_share_nothing():
    assert four(prdc(normal(0, 40), normal(1, 40, shift=100))) == (0, 0, 0, 0)


def test_one_repeated_mode_has_precision_but_neither_recall_nor_coverage():
    real = normal(0, 400)
    mode = real[np.linalg.norm(real, axis=1).argmin()] + np.float32(0.01)
    result = prdc(real, np.repeat(mode[None], 100, axis=0))
    assert result.precision == 1
    assert result.recall == 0
    # Only the balls around that one point hold it.
    assert result.coverage == (distances(real, mode[None])[:, 0] <= np.sort(distances(real, real))[:, 5]).mean() < 0.2
    assert result.density == pytest.approx(result.coverage * 400 / 5)


def test_half_of_the_modes_missing_halves_recall_and_coverage():
    real = np.concatenate([normal(0, 100), normal(1, 100, shift=50)])
    result = prdc(real, normal(2, 200))
    assert result.precision > 0.9
    assert 0.4 < result.recall <= 0.5
    assert 0.4 < result.coverage <= 0.5


def test_memory_is_that_of_a_few_rows(monkeypatch):
    monkeypatch.setattr(prdc_module, "ROWS", 20)
    real, generated = normal(0, 2000, 4), normal(1, 2000, 4)
    tracemalloc.start()
    prdc(real, generated)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2000 * 2000 * 8 / 10


@pytest.mark.parametrize(("n", "m", "k", "says"), [(5, 9, 5, "5 real"), (9, 5, 5, "5 generated"), (9, 9, 0, "k=0")])
def test_sets_without_a_kth_neighbour_are_refused(n, m, k, says):
    with pytest.raises(ValueError, match=says):
        prdc(normal(0, n), normal(1, m), k)


def in_blocks(samples: np.ndarray, sizes: list[int]):
    for stop, size in zip(np.cumsum(sizes), sizes, strict=True):
        yield samples[stop - size : stop]


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 10_000), st.lists(st.integers(0, 9), min_size=1, max_size=5), st.integers(1, 9), st.integers(1, 4)
)
def test_nearest_is_the_same_for_all_blocks_and_tiles(seed, sizes, queries, tile):
    generator = np.random.default_rng(seed)
    sizes = [*sizes, 1]
    references = generator.integers(0, 256, (sum(sizes), 3), np.uint8)
    asked = generator.integers(0, 256, (queries, 3), np.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prdc_module, "TILE", tile)
        patch.setattr(prdc_module, "ROWS", 2)
        found, index = nearest(asked, in_blocks(references, sizes))
    expected = distances(asked, references)
    np.testing.assert_allclose(found, expected.min(axis=1), rtol=1e-14)
    np.testing.assert_array_equal(index, expected.argmin(axis=1))
    assert (found.dtype, index.dtype) == (np.float64, np.int64)


@pytest.mark.parametrize("offset", [0, 1000])
def test_copies_are_found_at_exactly_zero_and_noise_at_its_size(offset):
    references = normal(0, 500, 256) + np.float32(offset)
    exact, noisy = (
        nearest(references[[7, 450]], references),
        nearest(references[[7, 450]] + np.float32(1e-3), references),
    )
    assert exact[0].tolist() == [0, 0]
    assert exact[1].tolist() == noisy[1].tolist() == [7, 450]
    np.testing.assert_allclose(noisy[0], 1e-3 * 16, rtol=0.1)


def test_searches_that_cannot_find_are_refused():
    samples = normal(0, 4)
    with pytest.raises(ValueError, match="no reference"):
        nearest(samples, [])
    with pytest.raises(ValueError, match="8 and of 9 dimensions"):
        nearest(samples, normal(1, 9, dims=9))
    with pytest.raises(ValueError, match="not finite"):
        nearest(samples, [np.full((2, 8), np.inf)])
