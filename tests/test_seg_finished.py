"""A finished segmentation run, started again: what its last line says, and whether it may go on."""

import json
import sys

import pytest
import torch
from mask_data import CLASSES, SMALL, run, words
from test_seg_train import no_plots, outcome  # noqa: F401 (a fixture for this file, too)
from test_train import assert_equal

from core.cli.errors import UserError
from core.data.dataset import PreparedData
from core.nn.model_file import load_model
from core.training.checkpoint import Checkpoints
from seg import scoring, train
from seg.loading import load_unet
from seg.metrics import SegmentationMetrics


@pytest.mark.parametrize("lost", ["best", "both"])
def test_the_last_line_is_true_of_a_finished_run_that_lost_its_best_weights(discs, tmp_path, monkeypatch, capsys, lost):
    """Those of the checkpoint are scored again, or the line would name a file that is not there."""
    more = [*SMALL, "total_images=32", "optim.lr=0.02", "schedule=constant", "save_every=16"]
    monkeypatch.setattr(sys, "argv", ["seg.train", *words(discs, tmp_path, *more)])
    train.main()
    (tmp_path / "t" / "model.safetensors").unlink()
    if lost == "both":
        Checkpoints(tmp_path / "t" / "state").path(32).write_bytes(b"torn")
        monkeypatch.setattr(sys, "argv", [*sys.argv, "total_images=16"])
    capsys.readouterr()
    train.main()
    stored = json.loads((tmp_path / "t" / "valid.json").read_text())
    miou, images = stored["dataset"]["miou"], stored["images_seen"]
    assert f"(best, valid mIoU {miou:.3f} at {images:,} images)" in capsys.readouterr().out
    assert load_model(tmp_path / "t")[1]["images_seen"] == images == (16 if lost == "both" else 32)
    model, _ = load_unet(tmp_path / "t", torch.device("cpu"))
    data, metrics = PreparedData.open(discs), SegmentationMetrics(CLASSES)
    for predicted, true in scoring.predictions(model, data, data.indices("valid")):
        metrics.update(predicted, true)
    assert metrics.results()["dataset"]["miou"] == pytest.approx(miou, abs=1e-9)


def test_a_finished_run_goes_on_where_the_schedule_allows_it(discs, tmp_path):
    """Bit by bit as one that was longer from the start; but for its evaluation at the first end."""
    more = ["schedule=constant", "warmup=8", "optim.lr=0.02", "valid_every=16"]
    straight = outcome(run(discs, tmp_path / "straight", *more, "total_images=48"))
    for images in (16, 48):
        raised = run(discs, tmp_path / "raised", *more, f"total_images={images}")
    assert_equal(outcome(raised), straight)


def test_where_the_schedule_forbids_it_the_refusal_names_the_key_and_the_way_out(discs, tmp_path):
    folder = run(discs, tmp_path, "total_images=8")
    before = outcome(folder)
    expected = (
        r"total_images \(8 -> 16\)\. With schedule=cosine total_images sets the learning rate of every step; a run "
        r"that may be made longer needs schedule=constant from its start\. Use another name=\.\.\., or the old settings"
    )
    with pytest.raises(UserError, match=expected):
        run(discs, tmp_path, "total_images=16")
    with pytest.raises(UserError, match=r"settings: optim\.lr \(.*\)\. Use another name"):
        run(discs, tmp_path, "total_images=8", "optim.lr=0.5")
    assert_equal(outcome(run(discs, tmp_path, "total_images=8")), before)
