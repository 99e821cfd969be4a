"""Runs that continue elsewhere: in another folder, on another device or number of processes; never twice at once."""

import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from test_train import assert_equal, launch, no_plots, outcome, run  # noqa: F401 (a fixture)

import core.cli.lock
import core.training.meter
from core.cli.errors import UserError
from core.cli.lock import sole_owner
from core.training.checkpoint import Checkpoints
from core.training.rundir import RunFolder
from gen import trainer


@pytest.fixture(scope="module")
def straight(prepared, tmp_path_factory):
    """A run of 48 images without interruption."""
    return outcome(run(prepared, tmp_path_factory.mktemp("straight"), total_images=48))


def test_a_run_that_was_moved_continues_where_it_is_now(prepared, straight, tmp_path):
    run(prepared, tmp_path / "here", total_images=24)
    (tmp_path / "there").mkdir()
    (tmp_path / "here" / "t").rename(tmp_path / "there" / "renamed")
    shutil.copytree(prepared, tmp_path / "copy")
    moved = run(tmp_path / "copy", tmp_path / "there", name="renamed", total_images=48)
    assert_equal(outcome(moved), straight)


def test_another_device_is_told_and_takes_its_own_kernels(prepared, straight, tmp_path, capsys):
    """A checkpoint as a GPU would have written it."""
    folder = run(prepared, tmp_path, total_images=24)
    checkpoints = Checkpoints(folder.state)
    state = checkpoints.load_newest()
    state["machine"]["device"] = "cuda"
    for optimizer in ("g_optimizer", "d_optimizer"):
        state[optimizer]["param_groups"][0]["fused"] = True
    checkpoints.save(24, state)
    capsys.readouterr()
    assert_equal(outcome(run(prepared, tmp_path, total_images=48)), straight)
    note = "note: 1 x cuda trained it so far, now 1 x cpu does: the batches are the same, but not rounding\n"
    assert note in capsys.readouterr().err


@pytest.mark.parametrize("change", ["g_optimizer", "meter"])
def test_a_checkpoint_of_another_version_is_told_in_a_line(prepared, tmp_path, change):
    folder = run(prepared, tmp_path, total_images=8)
    state = Checkpoints(folder.state).load_newest()
    if change == "meter":
        del state["meter"]
    else:
        state[change]["param_groups"] *= 2
    Checkpoints(folder.state).save(8, state)
    with pytest.raises(UserError, match="cannot be continued by this version"):
        run(prepared, tmp_path, total_images=16)


def test_two_trainings_do_not_share_a_folder(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(core.cli.lock, "PATIENCE", 0.0)
    folder = tmp_path / "t"
    with sole_owner(folder / ".lock", "is here"):
        with pytest.raises(
            UserError, match=rf"process {os.getpid()} on .* is training {folder}: let it finish or stop"
        ):
            run(prepared, tmp_path, total_images=8)
        assert [path.name for path in folder.iterdir()] == [".lock"]
    run(prepared, tmp_path, total_images=8)


def test_images_per_second_are_those_of_the_interval(prepared, tmp_path, monkeypatch):
    """Steps of 8 images, three an interval, of 1 second and then of 2; grids take as long again."""
    clock, step, grid = [0.0], trainer.Trainer.step, trainer.SampleGrid.after_step

    def timed_step(loop):
        step(loop)
        clock[0] += 1 if loop.images_seen <= 24 else 2

    def timed_grid(*args, **more):
        grid(*args, **more)
        clock[0] += 5

    monkeypatch.setattr(core.training.meter, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(trainer.Trainer, "step", timed_step)
    monkeypatch.setattr(trainer.SampleGrid, "after_step", timed_grid)
    rows = run(prepared, tmp_path, total_images=48).read_stats()
    assert [row["images_per_s"] for row in rows] == [8.0, 4.0]


@pytest.mark.slow
def test_two_processes_continue_what_one_began(prepared, tmp_path):
    """Without batch norm they end like one that did it all: every batch is the one that was due."""
    settings = {"model.norm": "none", "log_every": 8}
    run(prepared, tmp_path, total_images=24, **settings)
    done = launch(2, prepared, tmp_path, total_images=48, **settings)
    assert done.returncode == 0, done.stderr
    note = "note: 1 x cpu trained it so far, now 2 x cpu does: the batches are the same, but not rounding, batch"
    assert done.stderr.count(note) == 1
    state, rows = outcome(RunFolder(tmp_path / "t"))
    expected, expected_rows = outcome(run(prepared, tmp_path / "one", total_images=48, **settings))
    for a, b in zip(expected_rows, rows, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)
    for part in ("generator", "discriminator", "ema"):
        for name, value in expected[part].items():
            assert torch.allclose(value, state[part][name], atol=2e-5), (part, name)
