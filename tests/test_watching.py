"""What a GAN run shows while it trains: pictures, the status line, and warnings of a collapse."""

import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from test_train import no_plots, overrides, run  # noqa: F401 (a fixture for all tests)

from core.cli.help import choices
from core.data.grids import CAPTION
from core.training import callbacks
from core.training.callbacks import Forecast, milestone
from gen import train, trainer
from gen.monitor import PATIENCE, RECIPES, CollapseMonitor, identical_samples


def watch(accuracy, loss, count, monitor=None):
    monitor = monitor or CollapseMonitor()
    return [monitor.check(step * 2_000, {"d_accuracy": accuracy, "d_loss": loss}) for step in range(count)], monitor


def test_lasting_signs_are_reported_once():
    warnings, monitor = watch(1.0, 0.01, 30)
    due = PATIENCE // 2_000
    assert [len(found) for found in warnings] == [0] * due + [1] + [0] * (29 - due)
    assert "D is right" in warnings[due][0]
    healthy, _ = watch(0.8, 1.0, 1, monitor)
    again, _ = watch(1.0, 0.01, due + 1, monitor)
    assert not healthy[0] and len(again[-1]) == 1


def test_chance_and_health_are_told_apart():
    warnings, _ = watch(0.5, 1.386, 30)
    assert sum(map(len, warnings)) == 1 and "guessing" in str(warnings)
    assert not any(watch(0.75, 1.0, 30)[0]) and not any(watch(0.5, 2.5, 30)[0])


def test_pictures_come_at_1_2_5_10_thousand_images():
    due = [images for images in range(1, 100_001) if milestone(images) != milestone(images - 1)]
    assert due == [1_000, 2_000, 5_000, 10_000, 20_000, 50_000, 100_000]


@pytest.mark.parametrize(
    ("total", "device", "told"),
    [
        (40_000, "cpu", ["about 63 min for the rest, at 10 images/s"]),
        (1_000_000, "cpu", ["about 27.7 h for the rest, at 10 images/s", "note: take another"]),
        (1_000_000, "cuda", ["about 27.7 h for the rest, at 10 images/s"]),
        (3_000, "cpu", []),
    ],
)
def test_the_time_of_the_rest_is_told_once_the_speed_is_known(monkeypatch, total, device, told):
    """The first step takes a minute, the others 2 s for 20 images each."""
    lines, now = [], [0.0]
    monkeypatch.setattr(callbacks, "say", lines.append)
    monkeypatch.setattr(callbacks.time, "perf_counter", lambda: now[0])
    accelerator = SimpleNamespace(is_main_process=True, device=SimpleNamespace(type=device))
    loop = SimpleNamespace(settings=SimpleNamespace(total_images=total), accelerator=accelerator, images_seen=2_000)
    forecast = Forecast("take another")
    for step in range(30):
        now[0] += 60 if step == 0 else 2
        loop.images_seen += 20
        forecast.after_step(loop, loop.images_seen - 20, last=False)
        assert bool(lines) == (bool(told) and step >= 8)
    assert lines == told


def test_the_shortest_run_has_pictures_a_row_and_curves(prepared, tmp_path, monkeypatch, capsys):
    """With images seen under them; the row that was cut short gives way to the whole one when the run goes on."""
    drawn = []
    monkeypatch.setattr(callbacks, "draw_curves", lambda rows, panels, path: drawn.append(rows))
    folder = run(prepared, tmp_path, total_images=8)
    grids = [np.asarray(Image.open(folder.samples / f"{images:012d}.png")) for images in (0, 8)]
    assert folder.last_picture() == folder.samples / "000000000008.png"
    # 64 samples of 32 pixels in 8 columns, with gaps of 2, above a caption
    assert grids[0].shape == (8 * 34 + 2 + CAPTION, 8 * 34 + 2, 3)
    strips = [grid[-CAPTION:] for grid in grids]
    assert all(strip.min() < 64 < strip.mean() < 255 for strip in strips) and (strips[0] != strips[1]).any()
    assert (grids[0][:-CAPTION] != grids[1][:-CAPTION]).any()
    assert [(row["images"], row["partial"]) for row in folder.read_stats()] == [(8, True)] and len(drawn[-1]) == 1
    monkeypatch.setattr(sys, "argv", ["gen.train", *overrides(prepared, tmp_path, total_images=24)])
    train.main()
    assert [(row["images"], "partial" in row) for row in folder.read_stats()] == [(24, False)]
    assert capsys.readouterr().out.splitlines()[-1] == f"samples: {folder.samples / '000000000024.png'}"


@pytest.mark.parametrize("loss", ["hinge", "non_saturating"])
def test_progress_shows_probabilities_or_decisions_but_no_logits(loss):
    means = {"d_loss": 1.0, "g_loss": 2.0, "d_real": 0.75, "d_fake": 0.25, "d_accuracy": 0.875}
    loop = SimpleNamespace(config=SimpleNamespace(loss=loss))
    told = trainer.Trainer.status(loop, means)
    assert ("D(real) 0.75" in told) == (loss == "non_saturating") and ("88%" in told) == (loss == "hinge")


def test_warnings_propose_recipes_that_exist():
    named = re.findall(r"experiment=(\w+)", RECIPES)
    assert len(named) > 1 and set(named) <= set(choices("gen", "experiment"))
    assert RECIPES in identical_samples(np.zeros((2, 4, 4, 3), np.uint8))


def test_identical_samples_are_noticed(prepared):
    faces = np.load(prepared / "images.npy")
    assert identical_samples(faces) is None
    jitter = np.random.default_rng(0).integers(0, 3, faces.shape)
    assert "collapsed" in identical_samples((faces[:1] // 2 + jitter).astype(np.uint8))
