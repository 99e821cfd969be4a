"""Curves: what is drawn are the numbers of the rows, readable whatever their range and count."""

from __future__ import annotations

import numpy as np
import pytest
from mask_data import run
from PIL import Image

from core.cli.errors import UserError
from core.training.best import comparable, score_panel
from core.training.curves import CROWDED, Panel, draw_curves, make_figure, running_mean, series

LOSS = Panel("loss", {"loss": "sum", "dice": "Dice"}, wide=True)
SCORE = Panel("score", {"score": "score"}, best="lowest")


def rows_of(values, key="loss"):
    return [{"images": 1000 * (index + 1), key: value} for index, value in enumerate(values)]


def test_lines_are_the_numbers_of_the_rows():
    warning = {"images": 1500, "warning": "D is right about practically every image"}
    rows = [*rows_of([3, 2.5]), warning, {"images": 2500, "dice": 0.5}, {"images": 3000, "loss": None}]
    (axes,) = make_figure(rows, [LOSS, SCORE]).axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}
    assert lines["sum"] == [[1000, 3], [2000, 2.5]] and lines["Dice"] == [[2500, 0.5]]
    assert axes.get_title(loc="left") == "loss"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["sum", "Dice"]


@pytest.mark.parametrize(
    ("values", "scale"), [([1, 9], "linear"), ([1, 11], "log"), ([0, 11], "linear"), ([-1, 20], "linear")]
)
def test_more_than_a_decade_is_logarithmic(values, scale):
    assert make_figure(rows_of(values), [LOSS]).axes[0].get_yscale() == scale
    assert make_figure(rows_of(values), [Panel("loss", {"loss": ""})]).axes[0].get_yscale() == "linear"


@pytest.mark.parametrize(("best", "at", "text"), [("lowest", 2, "0.25 at 3,000"), ("highest", 4, "9 at 5,000")])
def test_the_best_is_ringed(best, at, text):
    values = [4, 5, 0.25, 0.25, 9, 8]
    (axes,) = make_figure(rows_of(values, "score"), [Panel("score", {"score": ""}, best=best)]).axes
    assert axes.get_lines()[-1].get_xydata().tolist() == [[1000 * (at + 1), values[at]]]
    assert [label.get_text() for label in axes.get_legend().get_texts()] == [f"best {text}"]


def test_images_are_counted_in_thousands_and_millions():
    for images, end in ((20_000, "20k"), (4_000_000, "4M")):
        figure = make_figure([{"images": 1, "loss": 1}, {"images": images, "loss": 2}], [LOSS, SCORE])
        figure.canvas.draw()
        assert end in [label.get_text() for label in figure.axes[-1].get_xticklabels()]
        assert figure.axes[-1].get_xlim()[0] == 0


@pytest.mark.parametrize(("count", "width"), [(1, 1), (7, 3), (40, 9)])
def test_running_mean(count, width):
    values = np.random.default_rng(0).normal(size=count)
    half = width // 2
    expected = [values[max(0, at - half) : at + half + 1].mean() for at in range(count)]
    assert running_mean(values, width) == pytest.approx(expected)


def test_many_points_are_smoothed_and_stay_visible():
    values = np.random.default_rng(0).normal(2, 1, CROWDED + 700)
    raw, smooth = make_figure(rows_of(values), [LOSS]).axes[0].get_lines()
    assert np.array_equal(raw.get_ydata(), values) and raw.get_alpha() < 1
    assert smooth.get_ydata().std() < 0.5 and smooth.get_ydata() == pytest.approx(running_mean(values, 11))


def test_files_are_written_whole_or_not_at_all(tmp_path):
    assert not draw_curves([{"images": 1, "warning": "x"}], [LOSS], tmp_path / "none.png")
    assert not list(tmp_path.iterdir())
    rows = rows_of([1, 2]) + rows_of([3, 4], "score")
    assert draw_curves(rows, [LOSS], tmp_path / "one.png") and draw_curves(rows, [LOSS, SCORE], tmp_path / "two.png")
    one, two = (Image.open(tmp_path / name).size for name in ("one.png", "two.png"))
    assert one[0] == two[0] and one[1] < two[1]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        draw_curves(rows, [LOSS], tmp_path / "file" / "curves.png")


def test_only_scores_on_the_last_terms_are_plotted():
    old = [{"images": 10, "score": 9.0, "metric": "FID", "n": 2000, "terms": "a"}, {"images": 10, "d_loss": 1.0}]
    new = {"images": 20, "score": 0.5, "metric": "fd_random", "n": 5000, "terms": "b"}
    kept = comparable([*old, new])
    assert series(kept, "score")[1].tolist() == [0.5] and series(kept, "d_loss")[1].tolist() == [1.0]
    assert [panel.title for panel in score_panel(kept)] == ["fd_random of 5,000 samples"]
    assert score_panel(old[1:]) == []


def test_a_segmenter_draws_its_own(discs, tmp_path):
    folder = run(discs, tmp_path, "total_images=16")
    picture = Image.open(folder.path / "curves.png")
    assert picture.format == "PNG" and picture.size[1] > 600  # loss, validation, pixel accuracy
