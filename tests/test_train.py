"""Training: every shipped model steps, runs resume bit by bit, two ranks follow one, trouble is told."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import core.training.curves
from core.cli.config import compose, typed
from core.cli.errors import UserError
from core.nn.model_file import load_model
from core.training.checkpoint import Checkpoints
from core.training.rundir import RunFolder
from gen import train, trainer
from gen.train import TrainConfig, run_training

ROOT = Path(__file__).resolve().parent.parent
MODELS = sorted(path.stem for path in (ROOT / "conf" / "model").glob("*.yaml") if "generator:" in path.read_text())
OPTIMISERS = sorted(path.stem for path in (ROOT / "conf" / "optim").glob("*.yaml"))
EXPERIMENTS = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml") if "unet" not in path.stem)
SMALL = ["model.image_size=32", "model.width=4", "batch_size=8", "log_every=24", "save_every=0", "grid_every=0"]
SMALL.append("mixed_precision=fp32")  # on any machine


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    """Draw no curves, which would take longer than these trainings; tests/test_curves.py has runs that do."""
    monkeypatch.setattr(core.training.curves, "make_figure", lambda rows, panels: None)


def overrides(prepared, runs, **settings):
    return [
        f"data={prepared}",
        "name=t",
        f"runs={runs}",
        *SMALL,
        *(f"{key}={value}" for key, value in settings.items()),
    ]


def run(prepared, runs, **settings) -> RunFolder:
    return run_training(typed(compose("gen", overrides(prepared, runs, **settings)), TrainConfig))


def outcome(folder: RunFolder):
    """All that a finished run keeps, timing aside."""
    rows = [{key: value for key, value in row.items() if key != "images_per_s"} for row in folder.read_stats()]
    return Checkpoints(folder.state).load_newest(), rows


def assert_equal(a, b):
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    else:
        assert a == b


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_shipped_model_steps_and_samples(prepared, tmp_path, model, precision):
    folder = run(prepared, tmp_path, model=model, mixed_precision=precision, total_images=24)
    assert [row["images"] for row in folder.read_stats()] == [24]
    generator, info = load_model(folder.path)
    assert info["images_seen"] == 24 and info["data"]["count"] == 24
    assert generator(torch.zeros(1, generator.latent_dim)).shape == (1, 3, 32, 32)


def test_bf16_reaches_both_networks_and_leaves_the_weights_alone(prepared, tmp_path, monkeypatch):
    seen = []

    def build(recipe):
        network = original(recipe)
        network.layers[0][0].register_forward_hook(
            lambda layer, _, output: seen.append((type(layer).__name__, output.dtype))
        )
        return network

    original = trainer.build_model
    monkeypatch.setattr(trainer, "build_model", build)
    folder = run(prepared, tmp_path, mixed_precision="bf16", total_images=8)
    # Both are tried before training. Then G once; D on real, on fake and in G's step. G draws a grid before and after.
    trial, grid = [("ConvTranspose2d", torch.float32), ("Conv2d", torch.float32)], [("ConvTranspose2d", torch.float32)]
    step = [("ConvTranspose2d", torch.bfloat16)] + 3 * [("Conv2d", torch.bfloat16)]
    assert seen == trial + grid + step + grid
    state = Checkpoints(folder.state).load_newest()
    values = [value for part in ("generator", "discriminator", "ema") for value in state[part].values()]
    assert {value.dtype for value in values if value.is_floating_point()} == {torch.float32}


@pytest.mark.parametrize(
    "group", [*(f"optim={name}" for name in OPTIMISERS), *(f"experiment={e}" for e in EXPERIMENTS)]
)
def test_every_shipped_choice_steps(prepared, tmp_path, group):
    config = typed(
        compose("gen", [group, *overrides(prepared, tmp_path, total_images=8, **{"eval.every": 0})]), TrainConfig
    )
    assert run_training(config).path.joinpath("model.safetensors").exists()


@pytest.fixture(scope="module")
def straight(prepared, tmp_path_factory):
    """A run of 88 images without interruption."""
    return outcome(run(prepared, tmp_path_factory.mktemp("straight"), total_images=88, grid_every=16))


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(stops=st.lists(st.integers(1, 80), min_size=1, max_size=2).map(sorted))
def test_interrupted_runs_end_bit_identical(prepared, straight, tmp_path_factory, stops):
    runs = tmp_path_factory.mktemp("stopped")
    for images in [*stops, 88]:
        folder = run(prepared, runs, total_images=images, grid_every=16)
    assert_equal(outcome(folder), straight)
    state = straight[0]
    assert {"ema", "g_optimizer", "d_optimizer"} <= state.keys()
    assert state["g_optimizer"]["state"][0]["exp_avg"].abs().sum() > 0
    ends = {-(-images // 8) * 8 for images in [*stops, 88]}  # whole batches of 8
    assert {int(path.stem) for path in folder.samples.iterdir()} == {0, 16, 32, 48, 64, 80} | ends


def test_a_killed_run_continues_from_its_checkpoint(prepared, straight, tmp_path):
    """After kill -9 the statistics are ahead of the checkpoint and a torn temporary file may lie about."""
    folder = run(prepared, tmp_path, total_images=40, grid_every=16)
    for path in folder.state.glob("*.pt"):
        path.rename(folder.state / "late")
    run(prepared, tmp_path / "other", total_images=32, grid_every=16)
    (tmp_path / "other" / "t" / "state" / "000000000032.pt").rename(folder.state / "000000000032.pt")
    leftovers = [folder.state / ".000000000048.pt.1234.part", folder.path / ".model.safetensors.1.part"]
    leftovers.append(folder.samples / f".000000000048.png.{os.getpid()}.part")
    for leftover in leftovers:
        leftover.write_bytes(b"torn")
    with folder.stats.open("a") as handle:
        handle.write('{"images": 4')
    assert_equal(outcome(run(prepared, tmp_path, total_images=88, grid_every=16)), straight)
    assert not list(folder.path.rglob(".*"))


@pytest.mark.slow
def test_interrupt_and_kill_of_the_real_command(prepared, tmp_path):
    command = [sys.executable, "-m", "gen.train", *overrides(prepared, tmp_path, total_images=10**7, save_every=64)]
    for sent, code in ((signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)):
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        before = Checkpoints(tmp_path / "t" / "state").files()
        while Checkpoints(tmp_path / "t" / "state").files() == before:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        process.send_signal(sent)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == code, errors
    assert "Traceback" not in errors
    state = Checkpoints(tmp_path / "t" / "state").load_newest()
    seen = state["images_seen"]
    folder = run(prepared, tmp_path, total_images=seen + 8, save_every=64)
    expected = outcome(run(prepared, tmp_path / "straight", total_images=seen + 8, save_every=64))
    assert_equal(outcome(folder), expected)


def launch(ranks, prepared, runs, **settings):
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    several = ["--multi_gpu", "--num_processes", str(ranks)] if ranks > 1 else []
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", *several, "-m", "gen.train"]
    return subprocess.run(
        [*launcher, *overrides(prepared, runs, **settings)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_two_ranks_follow_one(prepared, tmp_path):
    """Without batch norm two half batches give the gradient of the whole one."""
    done = launch(2, prepared, tmp_path / "two", total_images=48, grid_every=24, **{"model.norm": "none"})
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("2 x cpu") == 1 and done.stdout.count("trained:") == 1
    two, two_rows = outcome(RunFolder(tmp_path / "two" / "t"))
    folder = run(prepared, tmp_path / "one", total_images=48, grid_every=24, **{"model.norm": "none"})
    one, one_rows = outcome(folder)
    assert [row["images"] for row in two_rows] == [row["images"] for row in one_rows] == [24, 48]
    for a, b in zip(one_rows, two_rows, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)
    for part in ("generator", "discriminator", "ema"):
        for name, value in one[part].items():
            # Adam divides tiny gradients by their own size, which lets rounding through at the scale of its step
            assert torch.allclose(value, two[part][name], atol=2e-5), (part, name)
    grids = [Image.open(folder.samples / "000000000048.png"), Image.open(tmp_path / "two/t/samples/000000000048.png")]
    assert np.abs(np.subtract(*[np.asarray(grid).astype(int) for grid in grids])).max() <= 1


@pytest.mark.slow
def test_two_ranks_stop_together_and_save(prepared, tmp_path):
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--multi_gpu", "--num_processes", "2"]
    command = [*launcher, "-m", "gen.train", *overrides(prepared, tmp_path, total_images=10**7)]
    stats = tmp_path / "t" / "stats.jsonl"
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    while not stats.exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert errors.count("interrupted: saved at") == errors.count("; newest picture: ") == 1, errors
    state = Checkpoints(tmp_path / "t" / "state").load_newest()
    assert state["images_seen"] >= json.loads(stats.read_text().splitlines()[-1])["images"]


@pytest.mark.slow
def test_an_error_on_two_ranks_is_told_once(prepared, tmp_path):
    done = launch(2, prepared, tmp_path, total_images=48, batch_size=9)
    assert done.returncode == 1
    assert done.stderr.count("error: batch_size=9") == 1


def test_diverged_training_stops_with_step_checkpoint_and_advice(prepared, tmp_path):
    run(prepared, tmp_path, total_images=16)
    state = Checkpoints(tmp_path / "t" / "state").load_newest()
    state["generator"]["layers.0.0.weight"][:] = float("nan")
    Checkpoints(tmp_path / "t" / "state").save(16, state)
    with pytest.raises(UserError, match=r"g_loss is nan|d_loss is nan") as caught:
        run(prepared, tmp_path, total_images=80)
    message = str(caught.value)
    assert "24 images" in message and "000000000016.pt" in message and "optim.lr" in message
    assert [path.name for path in Checkpoints(tmp_path / "t" / "state").files()] == ["000000000016.pt"]


def test_overflowed_weights_are_never_saved(prepared, tmp_path, monkeypatch):
    """The loss of the last step is taken before its update: only the weights tell."""
    real_step = trainer.generator_step

    def poisoned(generator, discriminator, optimizer, *rest):
        result = real_step(generator, discriminator, optimizer, *rest)
        optimizer.param_groups[0]["params"][0].data[0] = float("inf")
        return result

    run(prepared, tmp_path, total_images=16)
    monkeypatch.setattr(trainer, "generator_step", poisoned)
    with pytest.raises(UserError, match="weights of the generator are not finite") as caught:
        run(prepared, tmp_path, total_images=24)
    assert "000000000016.pt" in str(caught.value)
    assert len(Checkpoints(tmp_path / "t" / "state").files()) == 1
    generator, _ = load_model(tmp_path / "t")
    assert all(value.isfinite().all() for value in generator.state_dict().values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"total_images": 0}, "total_images=0"),
        ({"name": "../up"}, "plain folder name"),
        ({"name": ""}, "plain folder name"),
        ({"seed": -1}, "seed=-1"),
        ({"batch_size": 1}, "batch_size=1"),
        ({"model.image_size": 64}, "prepare with --size 64"),
        ({"model.norm": "bach"}, "norm='bach'"),
        ({"split": "valid"}, "no train/valid/test split"),
        ({"mixed_precision": "half"}, "use fp32 or bf16"),
        ({"tracker": "nothing"}, "tracker='nothing' is unknown: use tensorboard"),
        ({"optim.lr": -1}, "optim: Invalid learning rate"),
        ({"optim.lr": "abc"}, "optim.lr=abc must be a number"),
        ({"optim._target_": "torch.optim.Adom"}, "optim: .*Adom"),
        ({"model.width": 0}, "width=0 must be a whole number"),
        ({"model.generator.latent_dim": 0}, "latent_dim=0"),
        ({"model.generator": "null"}, "model.generator is missing"),
        ({"data": "nowhere"}, "no prepared data set at nowhere"),
    ],
)
def test_bad_settings_leave_nothing_behind(prepared, tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        run(prepared, tmp_path, **({"total_images": 8} | settings))
    assert not list(tmp_path.iterdir())


def test_a_changed_setting_is_refused_and_more_images_are_not(prepared, tmp_path):
    run(prepared, tmp_path, total_images=16)
    with pytest.raises(UserError, match=r"seed \(0 -> 1\)"):
        run(prepared, tmp_path, total_images=16, seed=1)
    assert run(prepared, tmp_path, total_images=24).config.read_text().count("total_images: 24") == 1


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["nam=x"], "error: unknown key 'nam': did you mean 'name'?"),
        (["data=x"], "error: missing name: give name=... (see --help)"),
        (
            ["data=x", "name=y", "total_images=many"],
            "error: total_images: Value 'many' of type 'str' could not be converted to Integer",
        ),
        (["data=x", "name=y", "first"], "error: cannot read 'first': data is given as 'x'"),
    ],
)
def test_mistyped_words_get_one_line(monkeypatch, capsys, words, line):
    monkeypatch.setattr(sys, "argv", ["gen.train", *words])
    with pytest.raises(SystemExit) as stop:
        train.main()
    (told,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 1 and told.startswith(line)


def test_help_shows_examples(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gen.train", "--help-all"])
    train.main()
    text = capsys.readouterr().out
    assert "accelerate launch --quiet -m gen.train data=data/celeba" in text and "batch_size" in text


def test_the_command_trains(prepared, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gen.train", *overrides(prepared, tmp_path, total_images=8)])
    train.main()
    assert f"trained: {tmp_path / 't' / 'model.safetensors'}" in capsys.readouterr().out


def test_tensorboard_curves(prepared, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = run(prepared, tmp_path, total_images=48, tracker="tensorboard")
    (events,) = {path.parent for path in folder.path.rglob("events.out*")}
    reader = EventAccumulator(str(events)).Reload()
    rows = folder.read_stats()
    assert [event.step for event in reader.Scalars("d_loss")] == [24, 48]
    assert [event.value for event in reader.Scalars("d_loss")] == pytest.approx([row["d_loss"] for row in rows])


def test_statistics_are_valid_json_lines(prepared, tmp_path):
    folder = run(prepared, tmp_path, total_images=24)
    row = json.loads(folder.stats.read_text())
    assert 0 <= row["d_real"] <= 1 and 0 <= row["d_fake"] <= 1 and 0 <= row["d_accuracy"] <= 1
    assert row["images_per_s"] > 0
