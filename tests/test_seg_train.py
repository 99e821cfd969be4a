"""Segmenter training: every shipped choice steps, it learns, resumes bit by bit, and two ranks follow one."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from mask_data import CLASSES, PALETTE, SMALL, run, words, write_discs
from PIL import Image
from test_train import assert_equal

import core.training.curves
from core.cli.config import compose, typed
from core.cli.errors import Interrupted, UserError
from core.data.dataset import PreparedData
from core.nn.model_file import load_model
from core.training import callbacks
from core.training.checkpoint import Checkpoints
from core.training.loop import TrainingLoop
from seg import evaluate, scoring, train, trainer
from seg.loading import load_unet
from seg.metrics import SegmentationMetrics
from seg.settings import TrainConfig, learning_rate_factor, training_window
from seg.train import run_training
from seg.unet import UNet

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    """Draw no curves, which would take longer than these trainings; tests/test_curves.py has runs that do."""
    monkeypatch.setattr(core.training.curves, "make_figure", lambda rows, panels: None)


def shipped(group, word=""):
    return sorted(path.stem for path in (ROOT / "conf" / group).glob("*.yaml") if word in path.read_text())


def outcome(folder):
    """All that a finished run keeps, timing aside."""
    rows = [{key: value for key, value in row.items() if key != "images_per_s"} for row in folder.read_stats()]
    best, info = load_model(folder.path)
    return Checkpoints(folder.state).load_newest(), rows, best.state_dict(), info


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model", shipped("model", "network:"))
def test_every_shipped_model_steps_and_predicts(discs, tmp_path, model, precision):
    """At its own widths; the paper's 31 million parameters on its smallest window."""
    small = ["model.network.widths=[8,8,8,8,8]"] if (model, precision) == ("unet", "bf16") else []
    choices = [
        f"model={model}",
        f"mixed_precision={precision}",
        "batch_size=2",
        "total_images=2",
        "warmup=0",
        *small,
    ]
    data = write_discs(tmp_path / "few", count=3, valid=1)
    folder = run_training(typed(compose("seg", words(data, tmp_path, *choices)), TrainConfig))
    network, info = load_model(folder.path)
    assert info["value_range"] == 4095
    assert info["classes"] == CLASSES and info["palette"] == PALETTE and info["images_seen"] == 2
    side = network.input_size(20)
    assert network(torch.zeros(1, 3, side, side)).shape[1] == 4


DEFAULTS = {"optim=adamw", "augment=faces", "schedule=cosine", "workers=1", "tracker=tensorboard"}


@pytest.fixture(scope="module")
def usual(discs, tmp_path_factory):
    """Weights after two steps with the usual settings."""
    folder = run(discs, tmp_path_factory.mktemp("usual"), "total_images=8")
    return load_model(folder.path / "last.safetensors")[0].state_dict()


@pytest.mark.parametrize(
    "choice",
    [
        *(f"optim={name}" for name in shipped("optim")),
        *(f"augment={name}" for name in shipped("augment")),
        *(f"schedule={name}" for name in ("cosine", "poly", "constant")),
        "loss.focal=1",
        "loss.dice=0",
        "class_weights=median_frequency",
        "class_weights=[1,2,2,0.5]",
        "border.classes=[l_disc,r_disc]",
        "crop=16",
        "model.network.padding=valid",
        "clip_gradient=0.01",
        "ema_half_life=0",
        "warmup=8",
        "seed=1",
        "workers=1",
        "tracker=tensorboard",
    ],
)
def test_every_choice_acts(discs, tmp_path, usual, choice):
    """Each changes what two steps do, but for the defaults and what must not matter."""
    folder = run(discs, tmp_path, "total_images=8", choice)
    rows = folder.read_stats()
    assert rows[-1]["images"] == 8 and 0 <= rows[-1]["valid_miou"] <= 1
    weights = load_model(folder.path / "last.safetensors")[0].state_dict()
    same = all(torch.equal(value, weights[name]) for name, value in usual.items())
    assert same == (choice in DEFAULTS)
    assert (folder.path / "curves").exists() == choice.startswith("tracker")


@pytest.mark.parametrize("name", shipped("experiment", "unet"))
def test_every_shipped_experiment_steps(discs, tmp_path, name):
    wanted = compose("seg", [*words(discs, tmp_path), f"experiment={name}"])
    folder = run_training(
        typed(
            compose(
                "seg",
                [
                    *words(discs, tmp_path),
                    f"experiment={name}",
                    "model.network.widths=[4,8]",
                    "total_images=8",
                    "warmup=0",
                ],
            ),
            TrainConfig,
        )
    )
    assert f"batch_size: {wanted.batch_size}\n" in folder.config.read_text()
    assert load_model(folder.path / "last.safetensors")[1]["images_seen"] == 8


@pytest.mark.parametrize("command", ["seg", "gen"])
def test_a_mistyped_experiment_is_refused(command):
    with pytest.raises(UserError, match=r"experiment/dmeo|'dmeo'|dmeo"):
        compose(command, ["data=x", "name=x", "experiment=dmeo"])


def test_it_learns_to_tell_left_from_right(discs, tmp_path):
    """Both discs look alike, so only their side tells them apart: flips without a swap of the classes destroy it."""
    more = [
        "model.network.widths=[8,16,16]",
        "total_images=800",
        "optim.lr=1e-2",
        "valid_every=400",
        "ema_half_life=50",
    ]
    scores = {}
    for swap in (True, False):
        folder = run(discs, tmp_path, *more, f"augment.swap_sides={swap}", name=f"swap{swap}")
        result = json.loads((folder.path / "valid.json").read_text())
        scores[swap] = [result["dataset"]["per_class"][name]["iou"] for name in ("l_disc", "r_disc")]
    assert min(scores[True]) > 0.85
    assert max(scores[False]) < min(scores[True]) - 0.2


def stop_after(monkeypatch, steps):
    """Ctrl-C arrives in step number `steps`."""
    seen = []

    def agreed(loop, stop):
        seen.append(1)
        return len(seen) == steps

    monkeypatch.setattr(TrainingLoop, "stop_agreed", agreed)


HARD = [
    "augment=cells",
    "model.network.dropout=0.3",
    "crop=24",
    "loss.focal=1",
    "border.classes=[l_disc]",
    "total_images=40",
]


@pytest.mark.parametrize("stops", [[3], [4, 1], [1, 7]])
def test_interrupted_runs_end_bit_identical(discs, tmp_path, monkeypatch, stops):
    straight = outcome(run(discs, tmp_path / "straight", *HARD))
    for steps in stops:
        stop_after(monkeypatch, steps)
        with pytest.raises(Interrupted, match="the same command continues"):
            run(discs, tmp_path / "stopped", *HARD)
    stop_after(monkeypatch, 0)
    torch.manual_seed(int.from_bytes(os.urandom(4), "little"))
    assert_equal(outcome(run(discs, tmp_path / "stopped", *HARD)), straight)
    scores = {row["images"]: row["valid_miou"] for row in straight[1] if "valid_miou" in row}
    assert list(scores) == [16, 32, 40] and scores[straight[3]["images_seen"]] == max(scores.values())


def launch(ranks, discs, runs, *more):
    several = ["--multi_gpu", "--num_processes", str(ranks)] if ranks > 1 else []
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", *several, "-m", "seg.train"]
    command = [*launcher, *words(discs, runs, *SMALL, *more)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_two_ranks_follow_one(discs, tmp_path):
    """Without batch statistics one and two ranks compute the same; every validation picture counts once."""
    more = ["model.network.norm=group", "loss.focal=1", "border.classes=[l_disc]", "total_images=32", "augment=none"]
    more += ["class_weights=[1,2,2,0.5]", "optim=sgd", "optim.lr=0.05"]  # Adam's first steps magnify rounding
    one = run(discs, tmp_path / "one", *more)
    result = launch(2, discs, tmp_path / "two", *more)
    assert result.returncode == 0, result.stderr
    assert "2 x cpu" in result.stderr and result.stdout.count("trained:") == 1
    two = type(one)(tmp_path / "two" / "t")
    for a, b in zip(one.read_stats(), two.read_stats(), strict=True):
        keys = a.keys() - {"images_per_s", "accuracy"}
        assert {key: b[key] for key in keys} == pytest.approx({key: a[key] for key in keys}, rel=2e-3, abs=2e-3)
    counts = [json.loads((folder.path / "valid.json").read_text()) for folder in (one, two)]
    for count in counts:
        assert count["images"] == 7 and count["pixels"] == 7 * 31 * 32 and count["ignored_pixels"] == 7 * 32
    states = [Checkpoints(folder.state).load_newest()["model"] for folder in (one, two)]
    for name, value in states[0].items():
        assert torch.allclose(value, states[1][name], rtol=1e-3, atol=1e-4), name


@pytest.mark.slow
def test_two_ranks_score_the_model_that_is_saved(discs, tmp_path):
    """With batch norm every rank has statistics of its own; the score must be that of the saved ones."""
    result = launch(2, discs, tmp_path, "total_images=16", "optim.lr=0.05", "ema_half_life=0")
    assert result.returncode == 0, result.stderr
    data = PreparedData.open(discs)
    model, _ = load_unet(tmp_path / "t", torch.device("cpu"))
    metrics = SegmentationMetrics(data.classes)
    for predicted, true in scoring.predictions(model, data, data.indices("valid")):
        metrics.update(predicted, true)
    assert json.loads((tmp_path / "t" / "valid.json").read_text())["dataset"] == metrics.results()["dataset"]


@pytest.mark.slow
def test_interrupt_and_kill_of_the_real_command(discs, tmp_path):
    steady = ["schedule=constant", "save_every=8", "workers=1"]
    command = [sys.executable, "-m", "seg.train", *words(discs, tmp_path, *SMALL, "total_images=10_000_000", *steady)]
    checkpoints = Checkpoints(tmp_path / "t" / "state")
    for sent, code in ((signal.SIGTERM, 130), (signal.SIGKILL, -signal.SIGKILL)):
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
        before = checkpoints.files()
        while checkpoints.files() == before:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        os.killpg(process.pid, sent)  # as a scheduler does: the workers get it as well
        _, errors = process.communicate(timeout=60)
        assert process.returncode == code, errors
        assert "Traceback" not in errors
    images = checkpoints.load_newest()["images_seen"] + 4
    expected = outcome(run(discs, tmp_path / "straight", f"total_images={images}", *steady))
    assert_equal(outcome(run(discs, tmp_path, f"total_images={images}", *steady)), expected)


def test_the_best_weights_are_those_of_the_best_evaluation(discs, tmp_path, monkeypatch, capsys):
    folder = run(discs, tmp_path, "total_images=64", "optim.lr=0.02")
    scores = {row["images"]: row["valid_miou"] for row in folder.read_stats() if "valid_miou" in row}
    assert list(scores) == [16, 32, 48, 64]
    best = max(scores, key=lambda images: scores[images])
    assert load_model(folder.path)[1]["images_seen"] == best
    assert load_model(folder.path / "last.safetensors")[1]["images_seen"] == 64
    assert [int(path.stem) for path in sorted(folder.samples.iterdir())] == [0, 16, 32, 48, 64]
    monkeypatch.setattr(
        sys, "argv", ["seg.evaluate", str(folder.path), "--data", str(discs), "--out", str(tmp_path / "e.json")]
    )
    evaluate.main()
    again, stored = (json.loads(path.read_text()) for path in (tmp_path / "e.json", folder.path / "valid.json"))
    assert again["dataset"] == stored["dataset"] and again["dataset"]["miou"] == scores[best]
    assert "pixel accuracy" in capsys.readouterr().out
    for suffix in (".png", ".examples.png"):
        assert Image.open(tmp_path / f"e{suffix}").size[0] > 100


def test_the_last_line_gives_the_best_score_that_the_files_hold(discs, tmp_path, monkeypatch, capsys):
    """Also where the last evaluation is the best one, after the last row of statistics."""
    more = [*SMALL, "total_images=48", "optim.lr=0.02"]
    monkeypatch.setattr(sys, "argv", ["seg.train", *words(discs, tmp_path, *more)])
    train.main()
    out, err = capsys.readouterr()
    stored = json.loads((tmp_path / "t" / "valid.json").read_text())
    miou, images = stored["dataset"]["miou"], stored["images_seen"]
    assert f"(best, valid mIoU {miou:.3f} at {images:,} images)" in out
    assert re.findall(r"best valid mIoU (\d\.\d+)", err)[-1] == f"{miou:.3f}"
    assert load_model(tmp_path / "t")[1]["images_seen"] == images == 48


@pytest.mark.parametrize("place", [3, 10, 13])
def test_a_kill_between_any_two_files_leaves_the_best_of_the_steps_that_count(discs, tmp_path, monkeypatch, place):
    """What is repeated scores worse, as it may after another rounding."""
    replace, calls, real, worse = Path.replace, [], trainer.scored, []

    def counted(path, target):
        calls.append(target)
        if len(calls) == place:
            raise KeyboardInterrupt
        return replace(path, target)

    def scores(metrics, data, split):
        results = real(metrics, data, split)
        results["dataset"]["miou"] = 0.1 if worse else 0.5 + 0.1 * len(found)
        found.append(0)
        return results

    found = []
    monkeypatch.setattr(Path, "replace", counted)
    monkeypatch.setattr(trainer, "scored", scores)
    monkeypatch.setattr(callbacks, "write_png", lambda path, pixels: None)
    monkeypatch.setattr(scoring, "plot_confusion", lambda matrix, names, path, title: path.write_text(title))
    more = ["total_images=32", "save_every=16", "schedule=constant"]
    with pytest.raises(KeyboardInterrupt):
        run(discs, tmp_path, *more)
    saved = Checkpoints(tmp_path / "t" / "state").load_newest()
    worse.append(True)
    folder = run(discs, tmp_path, *more)
    images, miou = {0: (16, 0.1), 16: (16, 0.5), 32: (32, 0.6)}[saved["images_seen"] if saved else 0]
    stored = json.loads((folder.path / "valid.json").read_text())
    assert (stored["images_seen"], stored["dataset"]["miou"]) == (images, pytest.approx(miou))
    assert load_model(folder.path)[1]["images_seen"] == images
    assert f"mIoU {miou:.3f}" in (folder.path / "valid.png").read_text()
    assert not list(folder.state.glob("*.new")) and not list(folder.path.glob("model-*"))


def test_best_weights_of_steps_after_the_checkpoint_are_set_aside(discs, tmp_path, capsys):
    folder = run(discs, tmp_path, "total_images=32", "save_every=16", "schedule=constant", "optim.lr=0.02")
    first = load_model(folder.path)[1]["images_seen"]
    assert first == 32
    Checkpoints(folder.state).path(32).write_bytes(b"torn")
    folder = run(discs, tmp_path, "total_images=32", "save_every=16", "schedule=constant", "optim.lr=0.02")
    assert "model.safetensors of 32 images is set aside as model-000000000032.safetensors" in capsys.readouterr().err
    names = {path.name for path in folder.path.glob("*-000000000032.*")}
    assert names == {"model-000000000032.safetensors", "valid-000000000032.json", "valid-000000000032.png"}
    assert load_model(folder.path)[1]["images_seen"] == 32


def test_early_stop_counts_evaluations_without_improvement(discs, tmp_path):
    frozen = ["optim.lr=1e-30", "ema_half_life=0", "model.network.norm=none"]
    for _ in range(2):  # a finished run that is started again stays as it is
        folder = run(discs, tmp_path, "total_images=400", "patience=2", *frozen)
        assert [row["images"] for row in folder.read_stats() if "valid_miou" in row] == [16, 32, 48]


def test_schedules_have_their_closed_forms():
    def factor(images_seen, **changes):
        settings = {"total_images": 1000, "warmup": 0, "batch_size": 10, "schedule": "cosine"} | changes
        return learning_rate_factor(
            typed(compose("seg", ["data=x", "name=x", *(f"{k}={v}" for k, v in settings.items())]), TrainConfig),
            images_seen,
        )

    assert [factor(at) for at in (0, 250, 500, 1000)] == pytest.approx([1, 0.5 + 0.5**1.5, 0.5, 0])
    assert factor(500, schedule="poly") == pytest.approx(0.5**0.9) and factor(999, schedule="constant") == 1
    assert [factor(at, schedule="constant", warmup=100) for at in (0, 40, 90, 200)] == pytest.approx([0.1, 0.5, 1, 1])


def test_windows_of_a_valid_network_are_its_outputs():
    model = UNet(3, 2, (4, 4, 4), padding="valid")
    side, margin = training_window(model, None, 64)
    assert margin == 20 and side <= 64 and model.output_size(side + 2 * margin) == side and side + 4 > 64
    assert training_window(model, 20, 64) == (20, 20)
    with pytest.raises(UserError, match="crop=22 is no output of this network: use 20 or 24"):
        training_window(model, 22, 64)
    assert training_window(UNet(3, 2, (4, 4)), None, 64) == (64, 0)


def test_the_command_trains_and_helps(discs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["seg.train", *words(discs, tmp_path, *SMALL, "total_images=4")])
    train.main()
    assert "facet predict" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["seg.train", "--help"])
    train.main()
    assert "accelerate launch" in capsys.readouterr().out
