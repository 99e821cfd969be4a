"""What is asked of accelerate's launcher holds, or one line says that it does not."""

import os
from types import SimpleNamespace

import psutil
import pytest
import torch

from core.training import machine
from core.training.machine import Launcher, choose_precision, set_up_cpu

CPU = torch.device("cpu")


@pytest.fixture
def launched(monkeypatch):
    """Set what a launcher gives this process, and what it was given itself: its words and its OMP_NUM_THREADS."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)

    def launch(words="", users=None, **environment):
        words = ["python", "accelerate", "launch", *words.split()]
        before = {} if users is None else {"OMP_NUM_THREADS": users}
        parent = SimpleNamespace(cmdline=lambda: words, environ=lambda: before)
        monkeypatch.setattr(psutil, "Process", lambda number: {os.getppid(): parent}[number])
        for name, value in {"ACCELERATE_MIXED_PRECISION": "no", "OMP_NUM_THREADS": "1", **environment}.items():
            monkeypatch.setenv(name, value)

    return launch


@pytest.mark.parametrize(
    ("words", "users", "threads"),
    [
        ("--num_processes 1", None, 6),  # accelerate's own OMP_NUM_THREADS=1
        ("--num_processes 1", "1", 3),  # the user's, which torch has followed
        ("--num_cpu_threads_per_process=1", None, 3),
        ("--num-cpu-threads-per-process 1", None, 3),
    ],
)
def test_omp_num_threads_holds_where_the_user_has_set_it(monkeypatch, launched, words, users, threads):
    launched(words, users)
    assert threads_after_set_up(monkeypatch) == threads


@pytest.mark.parametrize(("given", "threads"), [(None, 6), ("3", 3)])
def test_omp_num_threads_holds_without_a_launcher(monkeypatch, launched, given, threads):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert threads_after_set_up(monkeypatch) == threads


def test_a_launcher_that_cannot_be_seen_is_taken_to_have_set_a_single_thread(monkeypatch, launched):
    launched()

    def refuse(number):
        raise psutil.AccessDenied

    monkeypatch.setattr(psutil, "Process", refuse)
    assert Launcher.find() == Launcher((), True)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert Launcher.find() == Launcher((), False)


def threads_after_set_up(monkeypatch):
    """The threads of a process that starts with 3 on a machine of 6 cores."""
    monkeypatch.setattr(machine, "cpu_cores", lambda: 6)
    threads = [3]
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    set_up_cpu()
    return threads[-1]


@pytest.mark.parametrize(
    ("words", "environment", "computes", "told"),
    [
        ("", {}, "fp32", ""),
        ("", {"ACCELERATE_MIXED_PRECISION": "bf16"}, "bf16", ""),
        (
            "--mixed_precision bf16",
            {"ACCELERATE_MIXED_PRECISION": "bf16"},
            "fp32",
            "note: accelerate's mixed_precision bf16 has no effect: this computes in fp32\n",
        ),
        (
            "--mixed_precision fp16",
            {"ACCELERATE_MIXED_PRECISION": "fp16"},
            "bf16",
            "note: accelerate's mixed_precision fp16 has no effect: this computes in bf16\n",
        ),
        (
            "--gradient_accumulation_steps 4",
            {},
            "fp32",
            "note: accelerate's --gradient_accumulation_steps has no effect: facet train has the key accumulate\n",
        ),
        (
            "--multi_gpu --num_processes 4",
            {"WORLD_SIZE": "4"},
            "fp32",
            "note: no GPU can be used here: 4 processes share the CPU\n",
        ),
        ("--multi_gpu --num_processes 4", {"WORLD_SIZE": "4", "ACCELERATE_USE_CPU": "true"}, "fp32", ""),
        ("--gradient_accumulation_steps 4", {"WORLD_SIZE": "4", "RANK": "1"}, "fp32", ""),
    ],
)
def test_what_has_no_effect_is_told_once(monkeypatch, capsys, launched, words, environment, computes, told):
    launched(words, **environment)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    set_up_cpu(computes)
    assert capsys.readouterr().err == told


def test_auto_follows_the_launcher(monkeypatch, launched):
    monkeypatch.setattr(machine, "native_bf16", lambda device: False)
    for given, wanted in {"no": "fp32", "fp16": "fp32", "bf16": "bf16"}.items():
        launched(ACCELERATE_MIXED_PRECISION=given)
        assert choose_precision("auto", CPU) == wanted and choose_precision("fp32", CPU) == "fp32"
