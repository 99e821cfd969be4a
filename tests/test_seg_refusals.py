"""Segmenter training and evaluation refuse what cannot work, each with one line and with nothing lost."""

import json
import sys

import numpy as np
import pytest
from mask_data import SMALL, describe_again, run, words, write_discs

from core.cli.config import compose, typed
from core.cli.errors import UserError
from core.cli.files import read_json, write_json
from core.data.dataset import PreparedData
from seg import evaluate
from seg.settings import TrainConfig
from seg.train import run_training


@pytest.mark.parametrize(
    "choice, line",
    [
        ("crop=33", r"crop=33 must be from 1 to .* 32"),
        ("border.classes=[nose]", "no class 'nose' but ground, l_disc"),
        ("class_weights=[1,2]", "list of 4 numbers"),
        ("class_weights=balanced", "median_frequency"),
        ("schedule=linear", "cosine, poly, constant"),
        ("valid_split=test", "no picture in split 'test'"),
        ("split=nowhere", "unknown split"),
        ("model=dcgan", "model=dcgan belongs to facet train"),
        ("loss.cross_entropy=-1", "loss.cross_entropy"),
        ("augment.rotate=200", "augment.rotate"),
        ("model.network.up=cubic", "up='cubic'"),
        ("model.network.depth=3", "depth"),
        ("valid_every=0", "valid_every=0 must be at least 1"),
        ("batch_size=1", r"at least 2 \(batch norm"),
        ("model.network.channels=1", "pictures are RGB"),
        ("class_weights=[0,0,0,0]", "not all 0"),
        ("loss.dice=nan", "loss.dice=nan"),
        ("clip_gradient=nan", "clip_gradient=nan"),
        ("warmup=50_000", "warmup=50000 must not exceed total_images=40000: .* give warmup=10000 or so"),
        ("seed=99999999999999999999", "seed"),
        ("optim.learning_rate=1", "unknown key|Could not override"),
    ],
)
def test_settings_that_cannot_work_are_named_before_anything_is_written(discs, tmp_path, choice, line):
    overridden = [word for word in SMALL if word.split("=")[0] != choice.split("=")[0]]
    overridden = [word for word in overridden if "network" not in word] if choice == "model=dcgan" else overridden
    with pytest.raises(UserError, match=line):
        run_training(typed(compose("seg", words(discs, tmp_path / "runs", *overridden, choice)), TrainConfig))
    assert not (tmp_path / "runs").exists()


def test_a_loss_without_parts_is_refused(discs, tmp_path):
    with pytest.raises(UserError, match="cross_entropy, dice, focal"):
        run(discs, tmp_path, "loss.cross_entropy=0", "loss.dice=0")


def test_data_that_does_not_fit_is_refused(discs, prepared, tmp_path, monkeypatch, capsys):
    with pytest.raises(UserError, match="has no masks"):
        run(prepared, tmp_path)
    folder = run(discs, tmp_path, "total_images=4")
    other = write_discs(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match=r"started with other settings: data_sha256.images.npy .*data_sha256.masks.npy"):
        run(other, tmp_path, "total_images=4")
    with pytest.raises(UserError, match=r"images \(4 -> 8\)"):
        run(discs, tmp_path, "total_images=8")  # would change the learning rate of the steps already made
    describe_again(other, classes=["ground", "a", "b", "c"])
    monkeypatch.setattr(sys, "argv", ["seg.evaluate", str(folder.path), "--data", str(other)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        evaluate.main()
    error = capsys.readouterr().err
    assert stop.value.code == 1 and "knows the classes ground, l_disc" in error and error.count("\n") == 1


def test_masks_without_a_known_pixel_are_told(tmp_path, monkeypatch, capsys):
    folder = write_discs(tmp_path / "blank")
    masks = np.load(folder / "masks.npy")
    masks[PreparedData.open(folder).indices("valid")] = 255
    np.save(folder / "masks.npy", masks)
    describe_again(folder)
    with pytest.raises(UserError, match="every pixel of split 'valid' is ignored"):
        run(folder, tmp_path, "total_images=4")
    trained = run(write_discs(tmp_path / "discs"), tmp_path, "total_images=4", name="other")
    monkeypatch.setattr(sys, "argv", ["seg.evaluate", str(trained.path), "--data", str(folder)])
    with pytest.raises(SystemExit):
        evaluate.main()
    assert "every pixel of split 'valid' is ignored" in capsys.readouterr().err
    assert not (trained.path / "model-valid.json").exists()


def test_another_scale_than_in_training_is_told(discs, tmp_path, monkeypatch, capsys):
    folder = run(discs, tmp_path, "total_images=4")
    larger = write_discs(tmp_path / "larger", size=48)
    monkeypatch.setattr(sys, "argv", ["seg.evaluate", str(folder.path), "--data", str(larger)])
    evaluate.main()
    assert "trained on pictures of 32 pixels" in capsys.readouterr().err
    assert json.loads((folder.path / "model-valid.json").read_text())["trained_size"] == 32


@pytest.mark.parametrize("key", ["count", "sha256", "classes", "palette"])
def test_a_description_that_lacks_something_is_named(tmp_path, key):
    folder = write_discs(tmp_path / "damaged")
    meta = read_json(folder / "meta.json")
    write_json(folder / "meta.json", {name: value for name, value in meta.items() if name != key})
    with pytest.raises(UserError, match=f"meta.json lacks {key}"):
        PreparedData.open(folder)


def test_a_mask_value_without_a_class_is_named(tmp_path):
    folder = write_discs(tmp_path / "damaged")
    masks = np.load(folder / "masks.npy")
    masks[3, 4, 5] = 9
    np.save(folder / "masks.npy", masks)
    describe_again(folder)
    with pytest.raises(UserError, match="mask 3 holds the value 9, but there are 4 classes"):
        run(folder, tmp_path, "total_images=4")


def test_a_training_batch_of_ignored_pixels_changes_nothing_but_the_count(tmp_path):
    folder = write_discs(tmp_path / "blank")
    masks = np.load(folder / "masks.npy")
    masks[PreparedData.open(folder).indices("train")] = 255
    np.save(folder / "masks.npy", masks)
    describe_again(folder)
    result = run(folder, tmp_path, "total_images=8", "optim=sgd", "model.network.norm=none")
    assert result.read_stats()[0]["loss"] == 0 and result.read_stats()[0]["gradient_norm"] == 0


def test_overflow_is_told_and_never_saved(discs, tmp_path):
    with pytest.raises(UserError, match=r"training diverged: .* no checkpoint was saved yet"):
        run(
            discs,
            tmp_path,
            "total_images=64",
            "optim=sgd",
            "optim.lr=1e30",
            "clip_gradient=0",
            "model.network.norm=none",
        )
    assert not list((tmp_path / "t" / "state").glob("*.pt"))
