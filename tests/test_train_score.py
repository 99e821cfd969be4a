"""Scores during training: they change nothing, are what samples score on any number of processes, choose the best."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_train import assert_equal, launch, overrides, run

import core.training.curves
import eval.fid
import eval.online
from core.cli.errors import Interrupted, UserError
from core.cli.files import read_json, sha256_of, write_json
from core.nn.backbone import INSTALL, PooledBackbone
from core.nn.model_file import load_model
from core.training.best import best_so_far
from core.training.checkpoint import Checkpoints
from core.training.loop import TrainingLoop
from core.training.machine import pick_device
from core.training.rundir import RunFolder
from eval.features import extractors
from eval.features.extractors import BackboneFeatures, InceptionFeatures, RandomFeatures
from eval.metrics.frechet import Statistics, frechet_distance
from eval.online import share
from gen import train
from gen.sample import generate

N = 50
EVERY = {"eval.every": 24, "eval.n": N, "eval.batch_size": 16, "split": "train"}
WHOLE = {"total_images": 88, "save_every": 40}


class Quarters:
    """Mean colours of the four quarters of a picture: 12 features, at once."""

    name, metric, dims, transform = "random", "quarters", 12, "none"
    weights_sha256, device, trustworthy = "0" * 64, torch.device("cpu"), True

    def __call__(self, pixels):
        count, side = pixels.shape[:2]
        parts = pixels.astype(np.float32).reshape(count, 2, side // 2, 2, side // 2, 3)
        return parts.mean(axis=(2, 4)).reshape(count, 12)


@pytest.fixture
def quick(monkeypatch):
    """Few samples, features that take no time, and no plots, which take longer than these trainings."""
    monkeypatch.setattr("gen.settings.LEAST_SAMPLES", 2)
    monkeypatch.setattr(core.training.curves, "make_figure", lambda rows, panels: None)
    monkeypatch.setattr(eval.online, "make_features", lambda name, inception, device: Quarters())


@pytest.fixture(scope="module")
def data(prepared, tmp_path_factory):
    """The blobs, two thirds of them to train on."""
    folder = tmp_path_factory.mktemp("split") / "blobs"
    folder.mkdir()
    images = np.load(prepared / "images.npy")
    np.save(folder / "images.npy", images)
    np.save(folder / "split.npy", np.repeat(np.array([0, 1], np.uint8), [16, 8]))
    hashes = {name: sha256_of(folder / name) for name in ("images.npy", "split.npy")}
    write_json(folder / "meta.json", read_json(prepared / "meta.json") | {"sha256": hashes})
    return folder


def scores(folder: RunFolder) -> dict[int, float]:
    return {row["images"]: row["score"] for row in folder.read_stats() if "score" in row}


def kept(folder: RunFolder):
    """All that a run keeps besides scores, timing aside."""
    rows = [row for row in folder.read_stats() if "score" not in row]
    state = Checkpoints(folder.state).load_newest()
    return state, [{k: v for k, v in row.items() if k != "images_per_s"} for row in rows]


def best_of(folder: RunFolder):
    model, info = load_model(folder.path / "best.safetensors")
    return model.state_dict(), info, read_json(folder.path / "best.json")


def distance(a, b):
    """The textbook formula with a general matrix root."""
    roots = scipy.linalg.sqrtm(np.cov(a, rowvar=False) @ np.cov(b, rowvar=False)).real
    traces = np.trace(np.cov(a, rowvar=False) + np.cov(b, rowvar=False) - 2 * roots)
    return np.square(a.mean(0) - b.mean(0)).sum() + traces


def by_hand(file, data, features, n):
    """Score of a model file against the training split."""
    real = np.load(data / "images.npy")[:16]
    return distance(*(features(pixels).astype(np.float64) for pixels in (generate(file, range(n)), real)))


def stop_after(monkeypatch, steps, error=None):
    """Ctrl-C arrives in step number `steps`, or the process ends with `error` there."""
    seen = []

    def agreed(loop, stop):
        seen.append(1)
        if error is not None and len(seen) == steps:
            raise error
        return len(seen) == steps

    monkeypatch.setattr(TrainingLoop, "stop_agreed", agreed)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_run_is_bit_identical_with_and_without(quick, data, tmp_path, monkeypatch, precision):
    settings = WHOLE | {"split": "train", "mixed_precision": precision}
    without = kept(run(data, tmp_path / "without", **settings))
    assert_equal(kept(run(data, tmp_path / "with", **settings | EVERY)), without)
    stop_after(monkeypatch, 5)
    with pytest.raises(Interrupted):
        run(data, tmp_path / "stopped", **settings | EVERY)
    stop_after(monkeypatch, 0)
    folder = run(data, tmp_path / "stopped", **settings | EVERY)
    assert_equal(kept(folder), without)
    assert list(scores(folder)) == [24, 48, 72, 88]


def global_state():
    """What a score could disturb."""
    flags = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    matmul, threads = torch.get_float32_matmul_precision(), torch.get_num_threads()
    modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
    return {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(np.random.get_state()[1].astype(np.int64)),  # noqa: NPY002 (what others may use)
        "python": random.getstate(),
        "settings": (*flags, *modes, matmul, threads),
    }


def test_scoring_leaves_random_states_modes_and_networks_alone(data, tmp_path, monkeypatch):
    """With the shipped features."""
    real_score, seen = eval.online.OnlineScore.score, []

    def watched(callback, trainer):
        def state():
            nets = (trainer.generator, trainer.discriminator, trainer.ema.model)
            weights = [{k: v.clone() for k, v in net.state_dict().items()} for net in nets]
            return global_state() | {"weights": weights, "training": [net.training for net in nets]}

        before = state()
        real_score(callback, trainer)
        assert_equal(state(), before)
        seen.append(before["training"])

    monkeypatch.setattr("gen.settings.LEAST_SAMPLES", 2)
    monkeypatch.setattr(eval.online.OnlineScore, "score", watched)
    after = []
    for settings in ({"split": "train"}, EVERY):
        torch.manual_seed(0)
        run(data, tmp_path / f"{len(after)}", total_images=24, **settings)
        after.append(global_state())
    assert_equal(*after)
    assert seen == [[True, True, False]]
    assert all((tmp_path / f"{index}" / "t" / "curves.png").exists() for index in (0, 1))


def test_a_score_is_that_of_the_samples_against_the_training_split(quick, data, tmp_path):
    folder = run(data, tmp_path, **WHOLE | EVERY)
    assert scores(folder)[88] == pytest.approx(by_hand(folder.path, data, Quarters(), N), rel=1e-9)
    row = next(row for row in folder.read_stats() if "score" in row)
    assert row["metric"] == "quarters" and row["n"] == N


def test_the_best_is_that_of_the_lowest_score(quick, data, tmp_path):
    folder = run(data, tmp_path, **WHOLE | EVERY)
    found = scores(folder)
    at = min(found, key=found.get)
    _, info, facts = best_of(folder)
    assert info["images_seen"] == facts["images_seen"] == at
    assert info["score"]["value"] == facts["score"] == found[at]
    assert by_hand(folder.path / "best.safetensors", data, Quarters(), N) == pytest.approx(found[at], rel=1e-9)
    reference = {"sha256": sha256_of(data / "images.npy"), "split": "train", "count": 16}
    assert (facts["metric"], facts["n"], facts["reference"]) == ("quarters", N, reference)
    assert facts["features"]["name"] == "random"


@pytest.mark.parametrize("worse", [24, 88])
def test_worse_weights_do_not_replace_the_best(quick, data, tmp_path, monkeypatch, worse):
    """At the end, and, after a resume, against the best of before."""
    order = iter([1.0, 2.0, 3.0, 4.0] if worse == 88 else [4.0, 3.0, 2.0, 1.0])
    monkeypatch.setattr(eval.online.Scorer, "__call__", lambda scorer, model: next(order))
    run(data, tmp_path, **WHOLE | EVERY | {"total_images": 48})
    folder = run(data, tmp_path, **WHOLE | EVERY)
    assert list(scores(folder)) == [24, 48, 72, 88]
    assert best_of(folder)[2]["images_seen"] == (24 if worse == 88 else 88)


def test_features_that_misrank_models_are_recorded_and_choose_nothing(quick, data, tmp_path, monkeypatch, capsys):
    assert not RandomFeatures.trustworthy
    assert InceptionFeatures.trustworthy and BackboneFeatures.trustworthy
    monkeypatch.setattr(Quarters, "trustworthy", False)
    folder = run(data, tmp_path, **WHOLE | EVERY)
    assert list(scores(folder)) == [24, 48, 72, 88] and not list(folder.path.glob("best*"))
    assert capsys.readouterr().err.count("eval.features=efficientnet or inception does") == 1


def test_the_best_is_chosen_without_a_download_or_setting(data, tmp_path, monkeypatch):
    """By the features that are the default."""
    monkeypatch.setattr("gen.settings.LEAST_SAMPLES", 2)
    monkeypatch.setattr(extractors, "EFFICIENTNET_SIDE", 32)  # faster
    folder = run(data, tmp_path, **EVERY | {"total_images": 48})
    found = scores(folder)
    _, info, facts = best_of(folder)
    assert facts["metric"] == "fd_efficientnet" and facts["score"] == min(found.values())
    assert facts["features"]["weights_sha256"] == PooledBackbone().weights_sha256
    features = BackboneFeatures("efficientnet", pick_device("cpu"))
    pixels = generate(folder.path / "best.safetensors", range(N)), np.load(data / "images.npy")[:16]
    expected = frechet_distance(*(Statistics.of(features(images)) for images in pixels))
    assert found[info["images_seen"]] == pytest.approx(expected, rel=1e-3)


def test_without_the_extra_a_run_says_that_it_scores_coarsely(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("gen.settings.LEAST_SAMPLES", 2)
    monkeypatch.setattr(extractors, "is_installed", lambda: False)
    folder = run(data, tmp_path, **EVERY | {"total_images": 24})
    assert next(row["metric"] for row in folder.read_stats() if "score" in row) == "fd_random"
    lines = capsys.readouterr().err
    assert lines.count(f"scores are fd_random, which ranks models coarsely; for fd_efficientnet {INSTALL}") == 1
    assert not list(folder.path.glob("best*"))


class Killed(BaseException):
    """Ends a run as abruptly as a test can."""


@pytest.mark.parametrize("place", [3, 9, 10, 12])
def test_a_kill_between_any_two_files_leaves_the_best_of_the_steps_that_count(
    quick, data, tmp_path, monkeypatch, place
):
    """What was killed scored 2, then 1; what is repeated scores 3, as after another rounding."""
    replace, calls = Path.replace, []

    def counted(path, target):
        calls.append(target)
        if len(calls) == place:
            raise Killed
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", counted)
    before = iter([2.0, 1.0])
    monkeypatch.setattr(eval.online.Scorer, "__call__", lambda scorer, model: next(before))
    settings = EVERY | {"save_every": 24, "total_images": 48}
    with pytest.raises(Killed):
        run(data, tmp_path, **settings)
    saved = Checkpoints(tmp_path / "t" / "state").load_newest()
    monkeypatch.setattr(eval.online.Scorer, "__call__", lambda scorer, model: 3.0)
    folder = run(data, tmp_path, **settings)
    counts = saved["images_seen"] if saved else 0
    _, info, facts = best_of(folder)
    assert (info["images_seen"], facts["score"]) == {0: (24, 3.0), 24: (24, 2.0), 48: (48, 1.0)}[counts]
    assert info["score"]["value"] == facts["score"] and info["images_seen"] == facts["images_seen"]
    assert not list(folder.path.glob("best-*")) and not list(folder.state.glob("*.new"))


@pytest.mark.parametrize("steps", [4, 7])
def test_a_killed_run_ends_with_the_same_best_and_leaves_none_from_lost_steps(
    quick, data, tmp_path, monkeypatch, capsys, steps
):
    straight = run(data, tmp_path / "straight", **WHOLE | EVERY)
    stop_after(monkeypatch, steps, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        run(data, tmp_path / "killed", **WHOLE | EVERY)
    left = RunFolder(tmp_path / "killed" / "t")
    saved = Checkpoints(left.state).load_newest()
    best = left.path / "best.safetensors"
    assert best.exists() == (saved is not None)
    assert saved is None or load_model(best)[1]["images_seen"] <= saved["images_seen"]
    stop_after(monkeypatch, 0)
    folder = run(data, tmp_path / "killed", **WHOLE | EVERY)
    assert_equal((best_of(folder), scores(folder)), (best_of(straight), scores(straight)))
    assert "set aside" not in capsys.readouterr().err and not list(folder.path.glob("best-*"))


def test_a_run_set_back_by_hand_finds_its_best_again(quick, data, tmp_path, capsys):
    folder = run(data, tmp_path, **WHOLE | EVERY)
    first = best_of(folder)
    for path in folder.state.iterdir():
        path.unlink()
    assert_equal(best_of(run(data, tmp_path, **WHOLE | EVERY)), first)
    name = f"best-{first[1]['images_seen']:012d}"
    assert f"set aside as {name}.safetensors: training continues before it, at 0" in capsys.readouterr().err
    assert_equal(load_model(folder.path / f"{name}.safetensors")[0].state_dict(), first[0])
    assert read_json(folder.path / f"{name}.json") == first[2]


def test_settings_may_change_and_scores_on_other_terms_are_not_compared(quick, data, tmp_path, capsys):
    folder = run(data, tmp_path, total_images=48, split="train")
    assert not list(folder.path.glob("best*"))
    run(data, tmp_path, **EVERY | {"total_images": 72})
    first = best_of(folder)
    run(data, tmp_path, **EVERY | {"total_images": 80, "eval.every": 8, "eval.batch_size": 7})
    assert "set aside" not in capsys.readouterr().err
    second = best_of(folder)
    assert second[2]["score"] == min(scores(folder).values()) <= first[2]["score"]
    run(data, tmp_path, **EVERY | {"total_images": 88, "eval.n": 40})
    assert "scores no longer compare (other n)" in capsys.readouterr().err
    assert best_of(folder)[2]["images_seen"] == 88 and best_of(folder)[2]["n"] == 40
    (aside,) = folder.path.glob("best-*.safetensors")
    assert load_model(aside)[1] == second[1]
    run(data, tmp_path, total_images=96, split="train")
    assert list(scores(folder)) == [72, 80, 88]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eval.n": 1999}, r"eval\.n=1999 must be at least 2,000: with fewer samples, bias and noise"),
        ({"eval.every": -1}, r"eval\.every=-1 must not be negative"),
        ({"eval.batch_size": 0}, r"eval\.batch_size=0 must be at least 1"),
        ({"eval.features": "vgg"}, r"eval: features=vgg"),
        (
            {"eval.features": "inception", "eval.fid.weights": "nowhere.pth"},
            r"eval: fid\.weights=nowhere\.pth",
        ),
        ({"eval.fid.dims": "many"}, r"eval\.fid\.dims"),
    ],
)
def test_bad_settings_leave_nothing_behind(data, tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        run(data, tmp_path, **({"total_images": 8, "eval.every": 8} | settings))
    assert not list(tmp_path.iterdir())


def test_the_command_says_what_a_score_costs_and_where_the_best_is(quick, data, tmp_path, monkeypatch, capsys):
    words = overrides(data, tmp_path, **WHOLE | EVERY)
    monkeypatch.setattr(sys, "argv", ["gen.train", *words])
    train.main()
    out, err = capsys.readouterr()
    found = scores(RunFolder(tmp_path / "t"))
    at = min(found, key=found.get)
    assert (
        f"best: {tmp_path / 't' / 'best.safetensors'}, quarters {found[at]:.4g} of 50 samples at {at:,} images" in out
    )
    assert f"last: {found[88]:.4g} at 88" in out
    assert err.count("scoring 50 samples (eval.n) took") == 1 and "every 24 images" in err


def test_a_damaged_record_of_the_best_is_told_in_a_line(quick, data, tmp_path, capsys):
    folder = run(data, tmp_path, **WHOLE | EVERY)
    facts = folder.path / "best.json"
    facts.write_text(facts.read_text().replace('"images_seen": ', '"images_seen": 9'))
    assert best_so_far(folder) is None and "best.json is damaged" in capsys.readouterr().err


@given(st.integers(1, 300), st.integers(1, 80), st.integers(1, 9))
def test_shares_are_whole_batches_that_make_up_all_samples(n, batch_size, ranks):
    shares = [share(n, batch_size, rank, ranks) for rank in range(ranks)]
    assert [seed for part in shares for seed in part] == list(range(n))
    assert all(part.start % batch_size == 0 for part in shares if len(part))
    sizes = [-(-len(part) // batch_size) for part in shares]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.slow
def test_two_processes_find_the_score_of_the_weights_they_save(data, tmp_path):
    """Unequal shares; with batch norm the processes differ in their running statistics, and those of 0 are saved."""
    settings = {
        "total_images": 24,
        "split": "train",
        "eval.features": "random",
        "eval.every": 24,
        "eval.n": 2000,
        "eval.batch_size": 90,
    }
    done = launch(2, data, tmp_path, **settings)
    assert done.returncode == 0, done.stderr
    folder = RunFolder(tmp_path / "t")
    expected = by_hand(folder.path, data, RandomFeatures(pick_device("cpu")), 2000)
    assert scores(folder) == {24: pytest.approx(expected, rel=1e-6)}
    assert done.stdout.count("best: ") == 0 and done.stderr.count("scoring 2,000 samples") == 1
    broken = launch(2, data, tmp_path / "broken", **settings | {"eval.features": "vgg"})
    assert broken.returncode == 1 and broken.stderr.count("error: eval: features=vgg") == 1, broken.stderr
    assert (
        "score.py" not in broken.stderr and not (tmp_path / "broken").exists()
    )  # the launcher has a traceback of its own
