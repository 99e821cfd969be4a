"""What all trainings share and no other test looks at."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mask_data import run

from core.cli.errors import UserError
from core.data.loader import read_rows
from core.training import distributed, machine


def test_the_precision_that_auto_stands_for_belongs_to_the_run(discs, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "native_bf16", lambda device: True)
    folder = run(discs, tmp_path, "mixed_precision=auto", "total_images=8")
    assert "mixed_precision: bf16" in folder.config.read_text()


@pytest.mark.parametrize(("flags", "precision"), [("fma avx512_bf16 sse", "bf16"), ("fma avx2", "fp32"), ("", "fp32")])
def test_precision_follows_the_processor(monkeypatch, flags, precision):
    monkeypatch.setattr(machine, "cpuinfo", lambda key: flags)
    cpu = torch.device("cpu")
    assert machine.choose_precision("auto", cpu) == precision and machine.choose_precision("fp32", cpu) == "fp32"


def test_a_gpu_is_left_alone_when_accelerate_is_told_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    assert machine.pick_device().type == "cuda"
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert machine.pick_device().type == "cpu"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_processes_on_the_cpu_wait_without_a_gpu(monkeypatch, device):
    called = []
    state = SimpleNamespace(
        num_processes=2, device=torch.device(device), wait_for_everyone=lambda: called.append("cuda")
    )
    monkeypatch.setattr(distributed, "PartialState", lambda: state)
    monkeypatch.setattr(torch.distributed, "barrier", lambda: called.append("cpu"))
    distributed.wait_for_all()
    assert called == [device]


def test_what_one_process_cannot_do_ends_all(monkeypatch):
    monkeypatch.setattr(distributed, "gather_object", lambda messages: [*messages, "no such file on process 1"])
    with pytest.raises(UserError, match="process 1"):
        distributed.Ranks(0, 2).together(lambda: "done")
    monkeypatch.setattr(distributed, "gather_object", lambda messages: messages)
    assert distributed.Ranks(0, 2).together(lambda: "done") == "done"


def test_rows_of_a_memory_map_are_those_of_the_array(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (40, 4, 5, 3), np.uint8)
    np.save(tmp_path / "images.npy", images)
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    rows = np.array([39, 0, 7, 7, 20])
    np.testing.assert_array_equal(read_rows(mapped, rows), images[rows])
    for part in (slice(10, 30), slice(None, None, -1), slice(0, 40, 2)):
        few = np.array([3, 0, 19])
        np.testing.assert_array_equal(read_rows(mapped[part], few), images[part][few])
    with (tmp_path / "images.npy").open("r+b") as handle:
        handle.truncate(1000)
    with pytest.raises(UserError, match=r"images\.npy was cut off"):
        read_rows(mapped, rows)
