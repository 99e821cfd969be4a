"""What the report page says in numbers and words."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from page_facts import check, score

from eval.page.text import number, verdict, with_spread


def spoken(metric="FID", checks=(), *scores) -> tuple[str, str]:
    return verdict({"metric": metric, "checks": list(checks), "scores": list(scores)})


def test_the_target_is_judged_against_the_reference_of_the_course() -> None:
    tone, words = spoken("FID", [], score("all of the data", 18.9), score("1,000 random", 24.6))
    assert "Above the course's target of 20, by 4.60 against 1,000 random" in words and tone == "plain"
    tone, words = spoken("FID", [], score("all of the data", 18.9), score("course's real/", 17, 0.2, 16))
    assert "Below the course's target" in words and "course's real/" in words and tone == "ok"
    own = score("the course's real/", 25, 0.2, 16) | {"course": True, "count": 2000}
    tone, words = spoken("FID", [], score("all of the data", 13.9), score("1,000 random", 18), own)
    assert "Above the course's target of 20, by 5 against the course's real/." in words and tone != "ok"


@pytest.mark.parametrize(("mean", "tone"), [(13.5, "ok"), (14.5, "doubt"), (19.5, "doubt"), (22, "plain")])
def test_a_target_met_against_more_reals_than_the_course_has_may_be_missed_there(mean: float, tone: str) -> None:
    everything = score("all of the data", mean, None, None)
    found, words = spoken("FID", [], everything)
    assert found == tone and "against 1,000 reals, as in the course, it would be" in words and "points higher" in words
    assert ("Not known to be below" in words) == (tone == "doubt")
    assert "Not known" not in spoken("FID", [], everything, score("1,000 random", mean + 6))[1]


@pytest.mark.parametrize(("metric", "n"), [("FID", 5000), ("FID", 1000), ("FID-768", 1000), ("fd_random", 1000)])
def test_a_score_far_above_its_floor_is_not_called_good(metric: str, n: int) -> None:
    tone, words = spoken(metric, [], score("all of the data", 300, 0.2, 14, n))
    assert tone == "plain" and "286 (95%) is the generator's" in words


def test_a_difference_within_noise_is_no_difference() -> None:
    assert "Too close" in spoken("FID", [], score(mean=19.5, sd=0.3))[1]
    assert "one sample set alone" in spoken("FID", [], score(mean=19.5, sd=None))[1]
    assert "cannot tell the samples from reals" in spoken("FID", [], score(mean=19.7, floor=19.4))[1]
    tone, words = spoken("FID", [], score(mean=15.0, floor=19.4))
    assert "Closer to 1,000 random than other real images" in words and tone == "doubt"


@pytest.mark.parametrize(("metric", "n"), [("FID-768", 1000), ("fd_random", 1000), ("FID", 5000)])
def test_other_scales_and_numbers_have_no_target(metric: str, n: int) -> None:
    assert "target" not in spoken(metric, [], score(n=n))[1]


def test_failed_checks_outweigh_a_good_score() -> None:
    good = score("course's real/", 17, 0.2, 16)
    assert spoken("FID", [check()], good)[0] == "ok"
    assert spoken("FID", [check("doubt")], good)[0] == "doubt"
    tone, words = spoken("FID", [check("doubt", "pixels"), check("bad", "duplicates")], good)
    assert tone == "bad" and words.startswith("Failed checks (duplicates)")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1000, "1,000"), (18.9372, "18.94"), (142.34, "142.3"), (1234.5, "1,234"), (0.012345, "0.0123")]
    + [(-14.2, "−14.20"), (1.2e-9, "1.2 × 10⁻⁹"), (None, "–"), (float("nan"), "–"), (float("inf"), "–"), (-0.0, "0")],
)
def test_numbers_have_sensible_digits(value: float | None, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("value", "spread", "text"),
    [(18.9372, 0.2143, ("18.94", "0.21")), (1.58811, 0.00612, ("1.588", "0.006")), (13.57, 0.098, ("13.57", "0.10"))]
    + [(0.00731, 0.00061, ("0.00731", "0.00061")), (142.34, 12.3, ("142", "12")), (5.0, None, ("5", ""))]
    + [(18.937, 0.0, ("18.94", "")), (0.0, 0.0123, ("0.000", "0.012"))],
)
def test_a_spread_decides_the_digits_of_its_value(value: float, spread: float | None, text: tuple[str, str]) -> None:
    assert with_spread(value, spread) == text


@settings(deadline=None)
@given(st.floats(1e-4, 1e9), st.booleans())
def test_a_number_is_rounded_by_less_than_half_a_percent(value: float, negative: bool) -> None:
    value = -value if negative else value
    assert float(number(value).replace(",", "").replace("−", "-")) == pytest.approx(value, rel=5.1e-3)
