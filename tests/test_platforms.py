"""Windows, macOS and odd versions, by stand-ins: what their system calls refuse, and what they pickle for workers."""

from __future__ import annotations

import atexit
import dataclasses
import errno
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from image_files import faces, write_folder
from mask_data import write_discs

from core.cli import files
from core.cli.errors import UserError
from core.cli.files import atomic_path, read_json, write_json
from core.data.dataset import PreparedData
from core.data.loader import MappedFile, is_file_map
from core.prepare import workers
from core.prepare.pipeline import prepare
from core.prepare.sources import open_image_source
from seg.augment import Augmentation
from seg.data import Examples, training_batches

ROOT = Path(__file__).resolve().parent.parent
WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text(encoding="utf-8"))
MATRIX = WORKFLOW["jobs"]["test"]["strategy"]["matrix"]
STEPS = WORKFLOW["jobs"]["test"]["steps"]


# --- files ------------------------------------------------------------------------------------------------------------


def test_files_are_flushed_through_handles_that_may_write(tmp_path, monkeypatch):
    """Windows raises EBADF for others, which would fail every atomic write and every preparation."""
    fcntl = pytest.importorskip("fcntl")
    flushed = []

    def fsync(handle: int) -> None:
        if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        flushed.append(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    write_json(tmp_path / "a.json", {"a": 1})
    assert read_json(tmp_path / "a.json") == {"a": 1} and len(flushed) == 1
    prepare(open_image_source(write_folder(tmp_path / "in", faces(3))), tmp_path / "out", quiet=True)
    assert len(PreparedData.open(tmp_path / "out")) == 3
    assert len(flushed) >= 4  # images.npy, names.txt and meta.json besides


def test_a_file_that_another_program_has_open_is_replaced_a_little_later(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("old", "utf-8")
    tries, pauses = [], []

    def replace(source: Path, target: Path) -> None:
        tries.append(target)
        if len(tries) <= refusals:
            raise PermissionError(errno.EACCES, "Permission denied")
        os.rename(source, target)  # noqa: PTH104

    monkeypatch.setattr(Path, "replace", replace)
    monkeypatch.setattr(time, "sleep", pauses.append)
    for platform, refusals, known in (("win32", 2, True), ("win32", 99, False), ("linux", 1, False)):
        monkeypatch.setattr(files, "sys", SimpleNamespace(platform=platform))
        tries.clear()
        pauses.clear()
        try:
            with atomic_path(tmp_path / "a") as temporary:
                temporary.write_text(f"new {platform}", "utf-8")
            assert known
        except UserError as error:
            assert not known and str(error) == f"cannot write {tmp_path / 'a'}: Permission denied"
        assert (tmp_path / "a").read_text("utf-8") == "new win32" and len(list(tmp_path.iterdir())) == 1
        assert sum(pauses) == pytest.approx({2: 0.2, 99: 3, 1: 0}[refusals])


def test_a_full_disk_is_noticed_where_space_cannot_be_reserved(tmp_path, monkeypatch):
    """macOS has no posix_fallocate, and a memory map on a full disk would end the process."""
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    monkeypatch.setattr(workers, "sys", SimpleNamespace(platform="darwin"))
    source = open_image_source(write_folder(tmp_path / "in", faces(2)))
    needed = 2 * 64 * 64 * 3 + 128  # and the header of the array file
    for free, fits in ((needed - 1, False), (needed, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        if fits:
            prepare(source, tmp_path / "out", quiet=True)
        else:
            with pytest.raises(UserError, match="No space left"):
                prepare(source, tmp_path / "out", quiet=True)
            assert [path.name for path in tmp_path.iterdir()] == ["in"]


# --- worker processes -------------------------------------------------------------------------------------------------

PLAIN = Augmentation(**{field.name: 0 for field in dataclasses.fields(Augmentation)} | {"flip": True})


def test_workers_that_are_spawned_map_the_arrays_themselves(tmp_path):
    data = PreparedData.open(write_discs(tmp_path / "discs", count=200, size=48))
    examples = Examples(data, "train", 3, PLAIN, 48, 0, None)
    packed = pickle.dumps(examples)
    assert data.images.nbytes + data.masks.nbytes > 1_800_000 > 100 * len(packed)
    again = pickle.loads(packed)
    for array, kept in ((again.images, data.images), (again.masks, data.masks)):
        assert isinstance(array, np.memmap) and np.array_equal(array, kept) and not array.flags.writeable
    for position in range(5):
        assert all(torch.equal(a, b) for a, b in zip(again[position], examples[position], strict=True))


def test_only_the_whole_map_stands_for_its_file(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(24, dtype=np.uint8).reshape(4, 6))
    np.save(tmp_path / "f.npy", np.asfortranarray(np.arange(24, dtype=np.uint8).reshape(4, 6)))
    whole, turned = (np.load(tmp_path / name, mmap_mode="r") for name in ("a.npy", "f.npy"))
    assert is_file_map(whole) and np.array_equal(pickle.loads(pickle.dumps(MappedFile(whole))), whole)
    assert not any(map(is_file_map, (whole[1:], whole[::2], turned, np.zeros(3), None)))


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signals between processes")
def test_workers_end_with_the_training_process_and_not_before(discs, monkeypatch):
    """A scheduler's SIGTERM and a closing terminal's SIGHUP reach them too, and training must go on until it saved."""
    at_exit = []
    monkeypatch.setattr(atexit, "register", lambda *call: at_exit.append(call))
    examples = Examples(PreparedData.open(discs), "train", 3, PLAIN, 32, 0, None)
    place = 0, 1, torch.device("cpu")
    expected = training_batches(examples, 0, 4, *place, workers=0)
    next(expected)
    at_exit.clear()
    stream = training_batches(examples, 4, 4, *place, workers=1)
    before = set(multiprocessing.active_children())
    assert torch.equal(next(stream).images, next(expected).images)
    (worker,) = set(multiprocessing.active_children()) - before
    for sent in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGTERM):
        os.kill(worker.pid, sent)
        for _ in range(4):  # more than were made ahead of time
            assert torch.equal(next(stream).images, next(expected).images)
    ((call, *words),) = at_exit
    call(*words)
    worker.terminate()  # as Python does when it ends, and it then waits
    worker.join(10)
    assert worker.exitcode == 0


# --- the workflow -----------------------------------------------------------------------------------------------------


def test_the_workflow_runs_the_commands_of_ci_on_every_system_and_python():
    commands = [step["run"] for step in STEPS if step.get("run", "").startswith("make")]
    assert commands == [line for line in (ROOT / ".ci" / "run").read_text("utf-8").splitlines() if "make " in line]
    assert MATRIX["os"] == ["ubuntu", "macos", "windows"]
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    named = re.findall(r"Python :: (3\.\d+)", project)
    assert MATRIX["python"] == [named[0], named[-1]] and f'requires-python = ">={named[0]}"' in project


def test_the_lowest_lane_constrains_every_dependency_to_its_lower_bound(tmp_path):
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    (step,) = (step for step in STEPS if step.get("id") == "lowest")
    environment = os.environ | {"RUNNER_TEMP": str(tmp_path), "GITHUB_ENV": str(tmp_path / "env")}
    subprocess.run(["bash", "-c", step["run"]], cwd=ROOT, env=environment, check=True)
    constraints = tmp_path / "lowest.txt"
    assert (tmp_path / "env").read_text("utf-8") == f"PIP_CONSTRAINT={constraints}\n"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    listed = sum(project["optional-dependencies"].values(), project["dependencies"])
    others = [each for each in listed if not each.startswith("facet-faces[")]
    expected = {re.match(r"[\w-]+>=[\d.]+", each)[0].replace(">=", "==") for each in others}
    assert set(constraints.read_text("utf-8").split()) == expected


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
@pytest.mark.parametrize(("system", "folder"), [("Windows_NT", "Scripts"), ("", "bin")])
def test_make_finds_the_environment_of_the_system(system, folder):
    done = subprocess.run(
        ["make", "-n", "lint", f"OS={system}"], cwd=ROOT, capture_output=True, encoding="utf-8", check=True
    )
    assert f".venv/{folder}/ruff check ." in done.stdout.splitlines()
