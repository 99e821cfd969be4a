"""The numbers behind the honesty checks against closed forms, other implementations and simulation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import cdist
from scipy.stats import mannwhitneyu, norm

from core.cli.text import percent
from eval.checks import verdicts as checks
from eval.checks.copies import _close_share, duplicates, memorisation, pairs_grid, pixel_distance, rank_sum
from eval.checks.pixels import on_grid_detail
from eval.checks.verdicts import (
    Finding,
    Manifold,
    as_many,
    conclude,
    mode_collapse,
    nearest_among,
    sample_size,
    thumbnails,
)

BIG = (64, 64)


@pytest.mark.parametrize("offset", [0, 1e4])
def test_nearest_neighbours_equal_scipys_across_blocks(monkeypatch, offset):
    monkeypatch.setattr(checks, "BLOCK", 7)
    features = np.random.default_rng(0).normal(size=(50, 5)) + offset
    full = cdist(features, features)
    np.fill_diagonal(full, np.inf)
    distance, index = nearest_among(features)
    np.testing.assert_allclose(distance, full.min(axis=1), rtol=1e-6)
    np.testing.assert_array_equal(index, full.argmin(axis=1))


def test_a_vector_that_occurs_twice_is_its_own_copys_neighbour():
    features = np.array([[3.0, 1.0], [0.0, 0.0], [3.0, 1.0]])
    distance, index = nearest_among(features)
    assert distance[[0, 2]] == pytest.approx(0, abs=1e-7) and index.tolist()[0] == 2 and index.tolist()[2] == 0


def test_as_many_draws_without_replacement():
    drawn = as_many(np.arange(100)[:, None], 40)
    assert len(np.unique(drawn)) == 40 and len(as_many(np.arange(5)[:, None], 9)) == 5


@given(st.integers(2, 40), st.integers(2, 40), st.floats(-2, 2), st.integers(0, 2**32 - 1))
def test_the_rank_sum_is_mann_whitneys(n, m, shift, seed):
    generator = np.random.default_rng(seed)
    first, second = generator.normal(shift, 1, n), generator.normal(0, 1, m)
    z, nearer = rank_sum(first, second)
    oracle = mannwhitneyu(first, second, alternative="less", method="asymptotic", use_continuity=False)
    assert norm.cdf(z) == pytest.approx(oracle.pvalue, rel=1e-9)
    assert nearer == pytest.approx((first[:, None] < second[None]).mean())


def test_the_probability_of_close_samples_holds_under_the_null():
    generator = np.random.default_rng(1)
    chances = np.array([_close_share(generator.gamma(5, 1, 200), generator.gamma(5, 1, 150))[1] for _ in range(2000)])
    for level in (0.01, 0.1, 0.3):
        # Valid for every level: not more often below than it says (3 standard deviations of 2,000 trials allowed).
        assert (chances <= level).mean() <= level + 3 * np.sqrt(level / 2000)
    assert (chances <= 0.3).mean() > 0.1, "and it is not vacuous"


def distances(seed, count, factor=1.0):
    return factor * np.random.default_rng(seed).gamma(60, 1, count), np.zeros(count, np.int64)


def verdict_of(samples, held_out):
    pixels = np.random.default_rng(0).integers(0, 256, (len(samples[0]), 4, 4, 3), np.uint8)
    return memorisation(pixels, samples, held_out, lambda index: np.zeros((len(index), 4, 4, 3), np.uint8))


@pytest.mark.parametrize("seed", range(5))
def test_equal_distributions_of_distances_raise_no_doubt(seed):
    assert verdict_of(distances(seed, 1000), distances(seed + 100, 700)).verdict == "ok"


def test_distances_that_all_shrink_are_told_apart_from_copies():
    check = verdict_of(distances(0, 1000, 0.85), distances(1, 1000))
    assert check.verdict == "doubt" and "no single pair stands out" in check.headline
    assert "blurred" in check.details


def test_a_group_of_close_samples_is_no_general_shrinking():
    distance, index = distances(0, 1000)
    distance[:150] *= 0.3
    check = verdict_of((distance, index), distances(1, 1000))
    assert check.verdict == "bad" and check.headline.startswith(("15%", "16%"))


def test_samples_off_the_data_are_not_copies():
    check = verdict_of(distances(0, 1000, 1.5), distances(1, 1000))
    assert check.verdict == "ok" and "farther from" in check.details and check.figures["z"] > 10


def test_pixel_distance_of_a_constant_difference_is_that_difference():
    dark, bright = np.zeros((2, 5, 4, 3), np.uint8), np.full((2, 5, 4, 3), 255, np.uint8)
    bright[1] = 7
    np.testing.assert_allclose(pixel_distance(dark, bright), [255, 7])
    np.testing.assert_allclose(pixel_distance(bright, dark), [255, 7])


def test_a_pair_grid_has_at_most_twelve_pairs():
    many = np.zeros((30, 8, 8, 3), np.uint8)
    assert pairs_grid(many, many).shape == (3 * 12 + 4, 4 * 20 + 4, 4)
    assert pairs_grid(many[:1], many[:1]).shape == (12 + 4, 20 + 4, 4)


def test_a_lone_sample_is_no_duplicate():
    assert duplicates(np.zeros((1, 4, 4, 3), np.uint8), np.zeros((1, 2))).verdict == "skipped"


@pytest.mark.parametrize("value", [0, 128, 255])
def test_flat_and_tiny_pictures_have_no_grid(value):
    assert on_grid_detail(np.full((3, 32, 32, 3), value, np.uint8)) == 1
    assert on_grid_detail(np.full((3, 12, 32, 3), value, np.uint8)) == 1


def test_noise_has_no_grid():
    pictures = np.random.default_rng(0).integers(0, 256, (20, 40, 48, 3), np.uint8)
    assert on_grid_detail(pictures) == pytest.approx(1, abs=0.01)


def noise(seed, count):
    return np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), np.uint8)


@pytest.mark.parametrize(("modes", "verdict"), [(4, "bad"), (40, "doubt")])
def test_separate_modes_are_counted_exactly(modes, verdict):
    generator = np.random.default_rng(0)
    mode = np.arange(200) % modes
    samples = generator.normal(0, 1e5, (modes, 8))[mode] + generator.normal(0, 1e-3, (200, 8))
    check = mode_collapse(samples, generator.normal(0, 100, (200, 8)), noise(1, modes)[mode], noise(2, 200))
    assert check.figures["effective_number"] == pytest.approx(modes)
    assert check.figures["densest_share"] == pytest.approx(1 / modes)
    assert check.verdict == verdict and check.pictures.shape == (42, 42, 4)
    assert check.fault == ("collapsed" if verdict == "bad" else "repetitive")


def test_samples_that_agree_in_features_alone_are_no_mode():
    reals = np.random.default_rng(0).normal(size=(200, 8))
    check = mode_collapse(reals * 1e-6, reals, noise(1, 200), noise(2, 200))
    assert check.verdict == "ok" and check.figures["densest_share"] < 0.1


@pytest.mark.parametrize(("coverage", "verdict"), [(0.90, "ok"), (0.5, "doubt"), (0.1, "bad")])
def test_coverage_is_judged_by_that_of_held_out_reals(coverage, verdict):
    generator = np.random.default_rng(0)
    samples, reals = generator.normal(size=(150, 6)), generator.normal(size=(300, 6))
    # Precise samples leave kinds out; those of which few lie where reals do are not learned yet.
    for precision, fault in ((0.6, "few kinds"), (0.2, "undertrained")):
        manifold = Manifold((precision, 0.7), (coverage, 0.95), "EfficientNet-Lite0")
        check = mode_collapse(samples, reals, noise(1, 150), noise(2, 300), manifold)
        assert check.verdict == verdict and check.fault == (fault if verdict != "ok" else "")
        assert "EfficientNet-Lite0" in check.headline + check.details
    assert check.figures["samples"] == 150
    assert "near only 10% of the real images" in check.headline or coverage > 0.1
    nothing = mode_collapse(samples, reals, noise(1, 150), noise(2, 300), Manifold((0, 0.7), (0, 0.97), "Inception"))
    assert nothing.headline.startswith("The samples lie near none of the real images, as Inception sees them; as many")
    assert nothing.headline.endswith("other real images lie near 97%.") and nothing.name == "variety"


def test_thumbnails_are_averages_at_any_size():
    pixels = np.arange(16 * 24 * 3, dtype=np.uint8).reshape(1, 16, 24, 3)
    expected = pixels.reshape(8, 2, 8, 3, 3).mean(axis=(1, 3)).transpose(2, 0, 1).reshape(1, -1)
    np.testing.assert_allclose(thumbnails(pixels), expected, rtol=1e-6)
    assert thumbnails(np.zeros((2, 13, 9, 3), np.uint8)).shape == (2, 192)


@pytest.mark.parametrize(
    ("count", "dims", "judgement"),
    [
        *((64, 2048, "doubt: few samples"), (999, 2048, "doubt: few samples"), (1000, 2048, "ok")),
        *((1000, 768, "ok"), (200, 192, "ok")),
    ],
)
def test_sample_size_explains_the_bias_and_doubts_fewer_samples_than_are_usual(count, dims, judgement):
    check = sample_size(count, 10_000, dims, (BIG, BIG))
    assert check.judgement == judgement and "bias the distance upward" in check.details
    assert (f"than the {dims:,} dimensions this bias is large" in check.details) == (count <= dims)


@pytest.mark.parametrize(
    ("change", "verdict", "words"),
    [
        ({"reference_count": 2048}, "doubt", "singular"),
        ({"sizes": ((32, 48), BIG)}, "bad", "48x32 pixels, the reals 64x64"),
        ({"lossy": (3, 0)}, "bad", "3 of the scored files"),
        ({"lossy": (0, 1200)}, "doubt", "1,200 of the real files"),
    ],
)
def test_terms_that_change_the_meaning_of_a_score_are_named(change, verdict, words):
    terms = {"count": 1000, "reference_count": 9000, "dims": 2048, "sizes": (BIG, BIG)} | change
    check = sample_size(**terms)
    assert check.verdict == verdict and words in check.headline + check.details


def test_the_gravest_finding_is_the_headline_and_all_are_told():
    findings = [
        Finding(verdict, f"{letter}.", f"Do {letter.lower()}.", letter)
        for verdict, letter in (("doubt", "A"), ("bad", "B"), ("doubt", "C"))
    ]
    check = conclude("name", findings, ("fine", "fine"), {})
    assert (check.judgement, check.headline, check.details) == ("bad: B", "B.", "Do b. A. Do a. C. Do c.")
    assert conclude("name", [], ("fine", "all"), {}).verdict == "ok"


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0, "0%"),
        (8.1e-8, "<0.01%"),
        (0.0001, "0.01%"),
        (0.0004, "0.04%"),
        (0.002, "0.2%"),
        (0.015, "1.5%"),
        (0.1, "10%"),
        (0.994, "99%"),
        (0.9968, "99.68%"),
    ]
    + [(0.999999, "99.99%"), (1, "100%")],
)
def test_percentages_keep_what_matters(share, text):
    assert percent(share) == text


@pytest.mark.parametrize(("pairs", "verdict"), [(0, "ok"), (2, "ok"), (4, "doubt"), (5, "bad")])
def test_few_pictures_that_look_alike_may_be_in_the_data(pairs, verdict):
    """CelebA holds some photographs twice: 1 pair among 500 of its faces."""
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 250, (1000, 16, 16, 3), np.uint8)
    pixels[:pairs] = pixels[1000 - pairs :][:pairs] + 3
    check = duplicates(pixels, generator.normal(size=(1000, 8)))
    assert check.verdict == verdict and check.figures["with_a_twin"] == 2 * pairs
    assert (check.pictures is not None) == bool(pairs)
