"""The curves of the run page: honest scales, the numbers of the rows, axes that runs share."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_page import DARK, LIGHT, contrast

from core.training.curves import Panel
from eval.page.curves import HEIGHT, MOST_POINTS, WIDTH, charts_of, labelled, make_axis
from eval.page.page import HERE

LOSS = Panel("loss", {"loss": "sum", "dice": "Dice"}, wide=True)
SCORE = Panel("score", {"score": "score"}, best="lowest")


def rows_of(values, key="loss", every=1000):
    return [{"images": every * (index + 1), key: value} for index, value in enumerate(values)]


def points(path):
    return np.array(re.findall(r"[ML](-?[\d.]+),(-?[\d.]+)", path), float)


@pytest.mark.parametrize("values", [(1, 0.99), (0.64, 0.6464), (-5, -5.05), (1000, 990), (1e-6, 0.99e-6)])
def test_a_change_of_one_percent_is_no_plunge(values):
    axis = make_axis(np.array(values), SCORE)
    assert 0.02 * HEIGHT < abs(axis.down(values[0]) - axis.down(values[1])) < 0.06 * HEIGHT


@pytest.mark.parametrize("values", [(0.0, 1.0), (-2.0, 3.0), (5.0, 9.0)])
def test_a_large_change_fills_the_height(values):
    axis = make_axis(np.array(values), SCORE)
    assert axis.down(values[0]) - axis.down(values[1]) > 0.85 * HEIGHT


def test_a_scale_does_not_go_below_zero_where_the_values_do_not():
    assert make_axis(np.array([0.0, 0.01]), SCORE).low == 0 and make_axis(np.array([-0.01, 0.0]), SCORE).high == 0
    assert make_axis(np.array([-1.0, 1.0]), SCORE).low < -1


@pytest.mark.parametrize(("values", "log"), [((1, 9), False), ((1, 11), True), ((0, 11), False), ((-1, 20), False)])
def test_more_than_a_decade_is_logarithmic_as_in_curves_png(values, log):
    assert make_axis(np.array(values), LOSS).log == log and not make_axis(np.array(values), SCORE).log


def test_on_a_logarithmic_scale_equal_ratios_are_equal_ways():
    axis = make_axis(np.array([0.2, 12.0]), LOSS)
    places = [axis.down(value) for value in (0.25, 0.5, 1, 2, 4, 8)]
    assert np.diff(places) == pytest.approx(places[1] - places[0])
    assert [text for _, text in axis.ticks()] == ["0.2", "0.5", "1", "2", "5", "10"]
    assert [text for _, text in make_axis(np.array([1e-3, 3e4]), LOSS).ticks()] == ["0.001", "0.1", "10", "1k"]


@settings(deadline=None)
@given(st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=5), st.booleans())
def test_every_value_is_on_the_axis_and_ticks_are_few_and_increase(values, wide):
    axis = make_axis(np.array(values), Panel("x", {"x": ""}, wide=wide))
    assert all(-1e-6 <= axis.down(value) <= HEIGHT + 1e-6 for value in values)
    ticks = [value for value, _ in axis.ticks()]
    assert 1 <= len(ticks) <= 7 and ticks == sorted(set(ticks)) and all(map(math.isfinite, ticks))


def test_round_numbers_have_the_same_decimals():
    assert [text for _, text in labelled([0.6, 0.65, 0.7])] == ["0.60", "0.65", "0.70"]
    assert [text for _, text in labelled([-1.0, 0.0, 1.0])] == ["−1", "0", "1"]
    assert [text for _, text in labelled([0.0, 20_000.0, 1_500_000.0])] == ["0", "20k", "1.5M"]


def test_lines_go_through_the_numbers_of_the_rows():
    values = [3.0, 2.0, 2.5, float("nan"), 1.0]
    rows = [*rows_of(values), {"images": 1500, "warning": "x"}, {"images": 6000, "dice": 0.5}]
    ((chart,),) = charts_of([(rows, [LOSS, SCORE])])
    found = points(chart.lines[0].path)
    images = found[:, 0] / WIDTH * chart.right
    drawn = chart.axis.high - found[:, 1] / HEIGHT * (chart.axis.high - chart.axis.low)
    assert not chart.axis.log and images == pytest.approx([1000, 2000, 3000, 5000], rel=1e-3)
    assert drawn == pytest.approx([3, 2, 2.5, 1], abs=0.01) and [line.name for line in chart.lines] == ["sum", "Dice"]


def test_many_rows_become_means_within_the_range_of_their_rows():
    values = np.random.default_rng(0).normal(5, 1, 8 * MOST_POINTS)
    ((chart,),) = charts_of([(rows_of(values), [Panel("loss", {"loss": "loss"})])])
    (line,) = chart.lines
    assert (
        chart.rows == 8
        and len(line.values) == MOST_POINTS
        and line.values == pytest.approx(values.reshape(-1, 8).mean(1))
    )
    upper, lower = points(line.band)[:MOST_POINTS, 1], points(line.band)[MOST_POINTS:, 1][::-1]
    assert upper == pytest.approx([chart.axis.down(high) for high in values.reshape(-1, 8).max(1)], abs=0.06)
    assert lower == pytest.approx([chart.axis.down(low) for low in values.reshape(-1, 8).min(1)], abs=0.06)


def test_the_best_is_marked_where_it_was():
    ((chart,),) = charts_of([(rows_of([4, 0.25, 0.25, 8], "score"), [SCORE])])
    assert chart.best == (2000, 0.25)


def test_runs_of_a_kind_share_their_axes():
    one, two = rows_of([1, 2]), rows_of([5, 7, 9])
    other = rows_of([0.1] * 9, "score")
    (first,), (second,), (third,) = charts_of([(one, [LOSS]), (two, [LOSS]), (other, [SCORE])])
    assert first.axis == second.axis and first.axis.low <= 1 and first.axis.high >= 9
    assert (first.right, second.right, third.right) == (3000, 3000, 9000)


def test_a_run_without_rows_has_no_charts():
    assert charts_of([([], [LOSS]), ([{"images": 5, "warning": "x"}], [SCORE])]) == [[], []]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_lines_stand_out_in_both_schemes(scheme):
    style = (HERE / "run_page.css").read_text(encoding="utf-8")
    blocks = [dict(re.findall(r"--(line-\d): (#\w{6});", block)) for block in re.findall(r":root {(.*?)}", style)]
    colours, card = blocks[scheme == "dark"], (LIGHT, DARK)[scheme == "dark"]["card"]
    assert len(colours) == 6 and len(set(colours.values())) == 6
    for colour in colours.values():
        assert contrast(colour, card) >= 3
