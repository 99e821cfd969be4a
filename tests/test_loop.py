"""What all trainings share and no other test looks at."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mask_data import run
from test_train import run as run_gan

from core.cli.console import StatusProgress
from core.cli.errors import Interrupted, UserError
from core.data.loader import read_rows
from core.training import distributed, machine
from gen import trainer as gan_trainer
from seg import trainer


def test_the_precision_that_auto_stands_for_belongs_to_the_run(discs, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "native_bf16", lambda device: True)
    folder = run(discs, tmp_path, "mixed_precision=auto", "total_images=8")
    assert "mixed_precision: bf16" in folder.config.read_text()


@pytest.mark.parametrize(("flags", "precision"), [("fma avx512_bf16 sse", "bf16"), ("fma avx2", "fp32"), ("", "fp32")])
def test_precision_follows_the_processor(monkeypatch, flags, precision):
    monkeypatch.setattr(machine, "cpuinfo", lambda key: flags)
    cpu = torch.device("cpu")
    assert machine.choose_precision("auto", cpu) == precision and machine.choose_precision("fp32", cpu) == "fp32"


@pytest.mark.parametrize(
    ("train", "way"), [(run, "batch_size or a"), (run_gan, "batch_size, accumulate=2, cuda_graph=false or a")]
)
def test_a_full_gpu_is_one_line(discs, prepared, tmp_path, monkeypatch, train, way):
    def step(self):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    for kind in (trainer.Trainer, gan_trainer.Trainer):
        monkeypatch.setattr(kind, "step", step)
    with pytest.raises(UserError, match=f"memory is full: use a smaller {way} narrower model"):
        train(discs if train is run else prepared, tmp_path)


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


@pytest.mark.parametrize("kind", ["seg", "gan"])
def test_the_last_line_shows_the_last_row(discs, prepared, tmp_path, capsys, kind):
    if kind == "seg":
        folder = run(discs, tmp_path, "log_every=16", "total_images=24")
    else:
        folder = run_gan(prepared, tmp_path, log_every=16, total_images=24)
    (*_, whole, last) = [row for row in folder.read_stats() if "images_per_s" in row]
    names, pattern = (
        (["loss"], r"loss ([\d.]+)") if kind == "seg" else (["d_loss", "g_loss"], r"loss of D (.*), of G (.*);")
    )
    shown = re.search(pattern, capsys.readouterr().err.splitlines()[-1]).groups()
    assert last["partial"] and (whole["images"], last["images"]) == (16, 24)
    assert [float(text) for text in shown] == pytest.approx([last[name] for name in names], abs=6e-3)
    assert [float(text) for text in shown] != pytest.approx([whole[name] for name in names], abs=6e-3)


def test_the_bar_says_that_the_first_step_runs_until_it_is_done(discs, tmp_path, monkeypatch):
    bars, seen, step = [], [], trainer.Trainer.step
    monkeypatch.setattr(StatusProgress, "start", lambda bar: bars.append(bar))
    monkeypatch.setattr(trainer.Trainer, "step", lambda self: (seen.append(bars[0].status), step(self)))
    run(discs, tmp_path, "log_every=16", "total_images=16")
    assert seen[:2] == ["first step running", ""]


@pytest.mark.parametrize(("size", "warns"), [(20, True), (16, False)])
def test_a_batch_of_more_than_all_images_is_told(discs, tmp_path, capsys, size, warns):
    """There are 17 to train on."""
    run(discs, tmp_path, f"batch_size={size}", "total_images=16")
    warning = f"warning: batch_size={size} exceeds the 17 images of split=train: every batch has some of them more than"
    assert (warning in capsys.readouterr().err) is warns


# --- stopping ---------------------------------------------------------------------------------------------------------

LONG_STEP = """
import hashlib
from core.training.stopping import StopRequest
with StopRequest().listening() as stop:
    print("begun", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", {rounds})  # in C, as one operation of torch
    print("received" if stop.received else "nothing", flush=True)
"""


def stopped(signals, rank="0", rounds=10**9):
    """Exit code and output of a program that gets signals, each after a line of answer, within one long operation."""
    environment = {"PYTHONPATH": str(Path(__file__).parents[1]), "RANK": rank}
    command = [sys.executable, "-c", LONG_STEP.format(rounds=rounds)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout.readline() == "begun\n"
        told = []
        for number, sent in enumerate(signals):
            if number:
                time.sleep(1.1)  # longer than one Ctrl-C takes to arrive twice
            process.send_signal(sent)
            told += [process.stderr.readline()] if rank == "0" else []
        out, rest = process.stdout.read(), process.stderr.read()
    return process.returncode, out, told, rest


FINISHING = "finishing this step, then saving; Ctrl-C again stops at once\n"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no signals between processes")
def test_ctrl_c_is_answered_within_an_operation_and_a_second_one_ends_it():
    answers = [FINISHING, "interrupted: stopped at once; what was saved before is kept\n"]
    assert stopped([signal.SIGINT, signal.SIGINT]) == (130, "", answers, "")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no signals between processes")
def test_one_request_lets_the_work_end_and_only_the_first_process_speaks():
    assert stopped([signal.SIGTERM], rounds=10**6) == (0, "received\n", [FINISHING], "")
    assert stopped([signal.SIGINT, signal.SIGINT], rank="1") == (130, "", [], "")


def test_an_interrupted_run_shows_and_saves_its_last_step(discs, tmp_path, monkeypatch, capsys):
    step = trainer.Trainer.step
    monkeypatch.setattr(trainer.Trainer, "step", lambda self: (step(self), signal.raise_signal(signal.SIGINT)))
    with pytest.raises(Interrupted, match="saved at 4 images"):
        run(discs, tmp_path, "batch_size=4")
    told = capsys.readouterr().err
    assert told.count(FINISHING) == 1 and re.search(r"t: 4 of .* images, .*loss \d", told)


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
