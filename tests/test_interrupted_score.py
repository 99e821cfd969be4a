"""Ctrl-C while features are computed says what is kept, and that is what the next run does not compute again."""

import numpy as np
import pytest
from test_report import RECIPE, write_samples

from core.cli.errors import Interrupted
from core.nn.init import init_normal
from core.nn.model_file import build_model, save_model
from eval import report
from eval.features import cache
from eval.features.extractors import RandomFeatures
from eval.score import FidConfig, score_source

BLOCK = 8


@pytest.fixture
def reals(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "BLOCK", BLOCK)
    pictures = np.random.default_rng(0).integers(0, 256, (30, 32, 32, 3), np.uint8)
    return write_samples(tmp_path / "reals", pictures)


def stop_after(monkeypatch, batches):
    """Ctrl-C in place of the batch after so many; returns the sizes of those that were computed."""
    looked, look = [], RandomFeatures.__call__

    def interrupted(self, pixels):
        if len(looked) == batches:
            raise KeyboardInterrupt
        looked.append(len(pixels))
        return look(self, pixels)

    monkeypatch.setattr(RandomFeatures, "__call__", interrupted)
    return looked


def settings(source, data):
    return FidConfig(str(source), str(data), features="random", n=20, sets=1, batch_size=4)


def test_blocks_of_real_images_are_kept_and_counted(reals, monkeypatch):
    samples = write_samples(reals.parent / "samples", np.zeros((9, 32, 32, 3), np.uint8))
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(Interrupted, match=r"features of 16 of 30 images \(real images\) are kept in .*continues"):
            score_source(settings(samples, reals))
    looked = stop_after(monkeypatch, 10**6)
    assert score_source(settings(samples, reals)) is not None
    assert sum(looked) == 30 - 16 + 9


def test_features_of_a_folder_are_not_said_to_be_kept(reals, monkeypatch):
    samples = write_samples(reals.parent / "samples", np.zeros((20, 32, 32, 3), np.uint8))
    stop_after(monkeypatch, 10)
    with pytest.raises(Interrupted, match="these features are not kept, those of real images extracted before are"):
        score_source(settings(samples, reals))
    assert not [path for path in reals.parent.iterdir() if path.name.startswith(".samples")]


def test_those_of_a_run_are(reals, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    network = build_model(RECIPE)
    init_normal(network, std=0.2, seed=1)
    save_model(run / "model.safetensors", network, RECIPE, {"images_seen": 0})
    with monkeypatch.context() as patch:
        stop_after(patch, 10)
        with pytest.raises(Interrupted, match=r"features of 8 of 20 images \(samples\) are kept in .*run"):
            score_source(settings(run, reals))
    monkeypatch.setattr(report, "build", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    monkeypatch.setattr("sys.argv", ["report", str(run), f"data={reals}", "features=random"])
    with pytest.raises(SystemExit) as stop:
        report.main()
    assert stop.value.code == 130
    assert "interrupted: features and figures computed so far are kept" in capsys.readouterr().err
