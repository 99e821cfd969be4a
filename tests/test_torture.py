"""Killing commands: a short run loses nothing, and what the harness looks for is found where it is planted."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from submission_files import FOUR, NUMBER, files
from torch import nn

from core.cli.errors import UserError
from core.cli.files import write_json
from core.data.images import write_png
from core.nn.model_file import save_model
from core.submission.archive import write_members
from core.training.checkpoint import Checkpoints
from scripts import torture
from scripts.torture import MARK, Moment, Task, make_inputs
from scripts.torture_files import damaged, differences, equal, unfinished

pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").is_file(), reason="processes are found in /proc")


def scripted(monkeypatch, folder, text, **settings):
    """A task that runs `text` as a Python program."""
    (folder / "planted.py").write_text(text)
    monkeypatch.setattr(torture, "ROOT", folder)
    return Task(("planted",), 1, **{"moments": ()} | settings)


# -- the commands


class Second(random.Random):
    """Chooses the second of several: the given moment, no pause, the first occurrence, the parent alone."""

    def choice(self, of):
        return of[min(1, len(of) - 1)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "more", "moment"),
    [
        ("prepare", ["--count", "48"], "made.part/.meta.json.*.part"),
        ("package", [], ".*.part"),
        ("train", ["eval.every=0", "total_images=200"], "runs/t/state/.*.part"),
    ],
)
def test_a_command_killed_while_it_writes_continues_and_ends_like_an_undisturbed_one(tmp_path, name, more, moment):
    task = torture.TASKS[name]
    task = replace(task, words=(*task.words, *more), moments=(moment,))
    make_inputs(tmp_path / "inputs", {*task.inputs} - {torture.FACES})
    if torture.FACES in task.inputs:  # drawing them takes long
        (tmp_path / "inputs" / torture.FACES).mkdir(parents=True)
        for file, data in files(1000):
            (tmp_path / "inputs" / torture.FACES / file).write_bytes(data)
    tally = torture.torture(task, tmp_path / "inputs", tmp_path / name, 1, Second(0), lambda: None)
    assert not tally.faults and tally.kills == 1


# -- what is planted is found

SLOW_WRITER = """
import pathlib, time
pathlib.Path("result.txt.part").write_text("half")
time.sleep(1)
pathlib.Path("result.txt.part").replace("result.txt")
"""


def test_a_command_is_killed_while_it_writes_and_its_leftovers_are_found(monkeypatch, tmp_path):
    task = scripted(monkeypatch, tmp_path, SLOW_WRITER, moments=("*.part",))
    tally = torture.torture(task, tmp_path, tmp_path / "work", 1, Second(0), lambda: None)
    assert tally.moments == {"*.part, all killed": 1} and tally.faults == []  # the second one replaced the first's file


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("import os; open(f'{os.getpid()}.txt', 'w'); import time; time.sleep(0.3)", "left over"),
        ("import os; open('pid.txt', 'w').write(str(os.getpid())); import time; time.sleep(0.3)", "pid.txt differs"),
        (
            r"import time; open('a.jsonl', 'w').write('{\n'); time.sleep(0.3); open('a.jsonl', 'w').write('{}\n')",
            "half-written",
        ),
        ("import os; assert not os.path.exists('a'); open('a', 'w'); import time; time.sleep(0.3)", "exit code 1"),
    ],
)
def test_faults_of_a_command_are_found(monkeypatch, tmp_path, text, fault):
    task = scripted(monkeypatch, tmp_path, text)
    monkeypatch.setattr(random.Random, "uniform", lambda self, low, high: 0.6)
    tally = torture.torture(task, tmp_path, tmp_path / "work", 1, random.Random(0), lambda: None)
    assert any(fault in entry for entry in tally.faults), tally


def test_processes_that_outlive_the_kill_are_found_and_ended(monkeypatch, tmp_path):
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    task = scripted(monkeypatch, tmp_path, child)
    monkeypatch.setattr(torture, "GRACE", 0.3)
    (tmp_path / "here").mkdir()
    running = torture.start(task, tmp_path / "here")
    deadline = time.monotonic() + 20
    while len(torture.processes(tmp_path / "here")) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    torture.send([running.pid])
    running.wait()
    assert len(torture.orphans(tmp_path / "here")) == 1
    monkeypatch.setattr(torture, "GRACE", 20.0)
    assert torture.orphans(tmp_path / "here") == []


def test_a_rank_is_found_by_its_number(tmp_path):
    environment = os.environ | {MARK: str(tmp_path), "RANK": "1"}
    waiting = [sys.executable, "-c", "import time; print(flush=True); time.sleep(60)"]
    process = subprocess.Popen(waiting, env=environment, stdout=subprocess.PIPE)
    try:
        process.stdout.readline()
        assert torture.processes(tmp_path) == {process.pid: "1"} and torture.processes(tmp_path / "other") == {}
    finally:
        torture.send([process.pid])
    assert process.wait() == -signal.SIGKILL


def test_moments_count_appearances_and_changes_but_a_file_being_written_once(tmp_path):
    (tmp_path / "old.part").write_text("")
    part, whole = Moment(tmp_path, "*.part", 2), Moment(tmp_path, "*.txt", 2)
    assert not part.reached() and not whole.reached()
    (tmp_path / "new.part").write_text("a")
    (tmp_path / "a.txt").write_text("a")
    assert not part.reached() and not whole.reached()
    (tmp_path / "new.part").write_text("ab")
    os.utime(tmp_path / "a.txt", ns=(1, 1))
    assert not part.reached() and whole.reached()
    (tmp_path / "new.part").unlink()
    assert not part.reached()
    (tmp_path / "new.part").write_text("a")
    assert part.reached()


# -- files


def write_everything(folder):
    """A file of each kind."""
    folder.mkdir()
    write_json(folder / "a.json", {"mean": 1.5, "seconds": 3})
    (folder / "stats.jsonl").write_text('{"images": 8, "images_per_s": 3.1}\n')
    save_model(folder / "m.safetensors", nn.Linear(2, 2), {}, {})
    Checkpoints(folder).save(8, {"net": {"w": torch.ones(3)}, "images_seen": 8})
    np.save(folder / "a.npy", np.arange(9))
    write_png(folder / "a.png", np.zeros((4, 4, 3), np.uint8))
    with (folder / f"{NUMBER}.tar.gz").open("wb") as stream:
        write_members(stream, NUMBER, FOUR)


def test_cut_files_are_found_whatever_they_are_and_unfinished_ones_may_be_cut(tmp_path):
    write_everything(tmp_path / "a")
    assert damaged(tmp_path / "a") == []
    whole = [path for path in (tmp_path / "a").iterdir() if path.suffix != ".jsonl"]
    for path in whole:
        path.write_bytes(path.read_bytes()[:-9])
    assert [line.split(":")[0] for line in damaged(tmp_path / "a")] == sorted(path.name for path in whole)
    for path in whole:
        path.rename(path.with_name(f".{path.name}.12.part"))
    assert damaged(tmp_path / "a") == [] and unfinished(Path("data.part/images.npy"))


def test_folders_are_compared_by_names_and_content_without_measured_times(tmp_path):
    torch.manual_seed(0)
    write_everything(tmp_path / "a")
    torch.manual_seed(0)
    write_everything(tmp_path / "b")
    (tmp_path / "b" / "stats.jsonl").write_text('{"images": 8, "images_per_s": 9.9}\n{"ima')
    write_json(tmp_path / "b" / "a.json", {"mean": 1.5, "seconds": 4})
    assert differences(tmp_path / "b", tmp_path / "a") == []
    (tmp_path / "b" / "stats.jsonl").write_text('{"images": 16}\n')
    Checkpoints(tmp_path / "b").save(8, {"net": {"w": torch.full((3,), 1 + 2.0**-23)}, "images_seen": 8})
    (tmp_path / "b" / "a.npy").unlink()
    (tmp_path / "b" / ".a.npy.1.part").touch()
    found = differences(tmp_path / "b", tmp_path / "a")
    names = [".a.npy.1.part is left over", "a.npy is missing", "000000000008.pt differs", "stats.jsonl differs"]
    assert found == names


def test_equality_is_that_of_bits():
    assert equal({"a": [np.array([np.nan])]}, {"a": [np.array([np.nan])]})
    assert not equal(np.array([0.0]), np.array([-0.0])) and not equal(np.zeros(2), np.zeros(2, np.float32))
    assert not equal([1], [1, 2]) and not equal({"a": 1}, {"b": 1}) and not equal([1], (1,))


# -- the command line


def test_the_command_counts_and_its_exit_code_tells(monkeypatch, capsys, tmp_path):
    text = "import os, time; open('done.txt', 'w'); time.sleep(0.5)"
    task = scripted(monkeypatch, tmp_path, text, moments=("done.txt",))
    monkeypatch.setattr(torture, "TASKS", {"planted": task})
    words = ["--kills", "2", "--out", str(tmp_path / "out"), "--json", str(tmp_path / "counts.json")]
    monkeypatch.setattr(sys, "argv", ["torture", *words])
    with pytest.raises(SystemExit) as stop:
        torture.main()
    counts = json.loads((tmp_path / "counts.json").read_text())
    assert not stop.value.code and counts["kills"] == 2 and counts["commands"]["planted"]["ends"] >= 1
    assert "2 kills" in capsys.readouterr().out
    with pytest.raises(UserError, match="new folder"):
        torture.parse(words)


def test_kills_are_shared_out():
    counts = torture.shares(list(torture.TASKS), 52)
    assert sum(counts.values()) >= 50 and min(counts.values()) >= 4
