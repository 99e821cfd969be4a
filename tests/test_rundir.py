"""What a run keeps to continue from: checkpoints, its configuration and its statistics, intact or damaged."""

import contextlib
import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import core.training.rundir
from core.cli.errors import UserError
from core.cli.files import write_json
from core.training.checkpoint import Checkpoints
from core.training.rundir import RunFolder, no_run


def test_newest_intact_checkpoint_wins(tmp_path, capsys):
    checkpoints = Checkpoints(tmp_path / "state")
    assert checkpoints.load_newest() is None
    for step in (100, 200, 1_000):
        checkpoints.save(step, {"images_seen": step, "w": torch.full((1000,), float(step))})
    assert [path.name for path in checkpoints.files()] == ["000000000200.pt", "000000001000.pt"]
    assert checkpoints.load_newest()["images_seen"] == 1_000
    newest = checkpoints.files()[-1]
    aside = newest.with_name("000000001000.pt.damaged")
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1  # one flipped bit in the weights
    newest.write_bytes(content)
    assert checkpoints.load_newest()["images_seen"] == 200
    told = capsys.readouterr().err
    assert "000000001000.pt is damaged" in told and "set aside as 000000001000.pt.damaged" in told
    assert aside.read_bytes() == content and not newest.exists()
    rng = np.random.default_rng(0)
    for place in rng.integers(0, len(content), 60):  # anywhere, the zip directory included
        flipped = bytearray(content)
        flipped[place] ^= 1 << int(rng.integers(8))
        newest.write_bytes(flipped)
        assert checkpoints.load_newest()["images_seen"] in (200, 1_000)
    for path in checkpoints.files():
        path.write_bytes(path.read_bytes()[:100])
    left = checkpoints.files()
    with pytest.raises(UserError, match="no checkpoint"):
        checkpoints.load_newest()
    assert checkpoints.files() == left  # else the next start would begin anew


def test_a_damaged_checkpoint_does_not_outlive_later_ones(tmp_path, capsys):
    checkpoints = Checkpoints(tmp_path)
    for step in (50, 100):
        checkpoints.save(step, {"images_seen": step})
    checkpoints.path(100).write_bytes(b"torn")
    assert checkpoints.load_newest()["images_seen"] == 50
    for step in (60, 70):
        checkpoints.save(step, {"images_seen": step})
    assert [path.name for path in checkpoints.files()] == ["000000000060.pt", "000000000070.pt"]
    capsys.readouterr()
    assert checkpoints.load_newest()["images_seen"] == 70 and not capsys.readouterr().err


@pytest.mark.parametrize("where", ["open", "read"])
def test_a_passing_read_error_is_no_damage(tmp_path, monkeypatch, where):
    checkpoints = Checkpoints(tmp_path)
    for step in (50, 100):
        checkpoints.save(step, {"images_seen": step})

    def fail(*_, **__):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(*((Path, "open") if where == "open" else (torch, "load")), fail)
    with pytest.raises(UserError, match=r"000000000100\.pt: Input/output error; nothing was changed"):
        checkpoints.load_newest()
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["000000000050.pt", "000000000100.pt"]


def test_a_checkpoint_that_only_this_process_lacks_is_named(tmp_path):
    with pytest.raises(UserError, match=r"000000000100\.pt: No such file"):
        Checkpoints(tmp_path).load(100)
    Checkpoints(tmp_path).path(100).write_bytes(b"stale")
    with pytest.raises(UserError, match=r"000000000100\.pt is damaged only here"):
        Checkpoints(tmp_path).load(100)


def test_a_full_disk_costs_nothing_that_was_saved(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path / "state")
    checkpoints.save(100, {"images_seen": 100})

    def full(state, path):
        path.write_bytes(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc] PytorchStreamWriter failed writing file")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="is the disk full"):
        checkpoints.save(200, {"images_seen": 200})
    assert [path.name for path in checkpoints.folder.iterdir()] == ["000000000100.pt"]


def test_changed_settings_are_named(tmp_path):
    run = RunFolder(tmp_path / "r")
    run.check_config({"a": 1}, ())
    run.write_config({"a": 1, "b": {"c": 2.5}, "images": 10})
    run.check_config({"a": 1, "b": {"c": 2.5}, "images": 20}, ("images",))
    with pytest.raises(UserError, match=r"a \(1 -> 2\), b\.c \(2\.5 -> None\)"):
        run.check_config({"a": 2, "b": {}, "images": 10}, ("images",))
    with pytest.raises(UserError, match="r is a run of facet train: use another name="):
        run.check_config({"a": 1, "valid_split": "valid"}, ())
    run.write_config({"valid_split": "valid"})
    with pytest.raises(UserError, match="r is a run of facet seg-train: use another name="):
        run.check_config({"a": 1}, ())
    run.config.write_text("a: [1")
    with pytest.raises(UserError, match=r"cannot read .*config\.yaml"):
        run.check_config({"a": 1}, ())


def test_a_folder_of_runs_proposes_them(tmp_path):
    assert str(no_run(tmp_path)).endswith(": give the folder of one, such as runs/first")
    for name in ("unet", "gan"):
        (tmp_path / name).mkdir()
        RunFolder(tmp_path / name).write_config({})
    assert str(no_run(tmp_path)) == (
        f"there is no run at {tmp_path}: give the folder of one, such as {tmp_path / 'gan'}, {tmp_path / 'unet'}"
    )


def test_statistics_are_rewound_to_the_checkpoint(tmp_path):
    run = RunFolder(tmp_path / "r")
    run.rewind_stats(5)  # no file yet
    for images in (10, 20, 30):
        run.append_stats({"images": images})
    with run.stats.open("a") as handle:
        handle.write('{"images": 4')  # torn by a kill
    run.rewind_stats(20)
    assert [row["images"] for row in run.read_stats()] == [10, 20]


def test_no_flipped_bit_changes_what_statistics_say(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(core.training.rundir, "warn", told.append)
    run = RunFolder(tmp_path / "r")
    rows = [{"images": 10, "d_loss": 0.1234567890123}, {"images": 20, "warning": "g\u00fcnstig"}]
    for row in rows:
        run.append_stats(row)
    content = run.stats.read_bytes()
    assert run.read_stats() == rows
    for bit in range(0, 8 * len(content), 3):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        run.stats.write_bytes(flipped)
        for row in run.read_stats():
            # A row whose last key is no longer "crc32" counts as one of an earlier version; what it says is right.
            assert any(row.items() >= good.items() for good in rows)
    run.stats.write_bytes(content.replace(b"0.123", b"0.723"))
    assert run.read_stats() == rows[1:] and told[-1] == f"{run.stats}: line 1 is damaged and left out"


def test_a_damaged_configuration_is_told_with_the_way_out(tmp_path):
    run = RunFolder(tmp_path / "r")
    run.write_config({"seed": 0, "name": "a"})
    text = run.config.read_text()
    run.config.write_text(text.replace("seed: 0", "seed: 1"))
    with pytest.raises(UserError, match=r"config\.yaml was damaged or edited: .* delete its last line"):
        run.check_config({"seed": 0, "name": "a"}, ())
    run.config.write_text(text.replace("seed: 0", "seed: 1").rpartition("\n#")[0])  # that way out
    run.check_config({"seed": 1, "name": "a"}, ())
    for bit in range(0, 8 * len(text), 5):
        flipped = bytearray(text.encode())
        flipped[bit // 8] ^= 1 << bit % 8
        run.config.write_bytes(flipped)
        with contextlib.suppress(UserError):
            assert run.read_config().items() >= {"seed": 0, "name": "a"}.items()  # more than that is refused


def test_the_first_write_into_a_folder_removes_what_killed_processes_left_and_nothing_else(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    names = [f".a.json.{ended.pid}.part", f".b.tar.gz.{ended.pid}.part", f".a.json.{os.getppid()}.part", ".notes.part"]
    for name in names:
        (tmp_path / name).touch()
    write_json(tmp_path / "c.json", {})
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names[2:], "c.json"])
