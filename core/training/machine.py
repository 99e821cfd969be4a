"""The machine: cores and memory for this process, devices, and the precision they compute in."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate.utils import parse_flag_from_env

from core.cli.errors import UserError
from core.training.allocator import keep_freed_memory


def cpu_cores() -> int:
    """Cores this process may run on (a container or taskset may allow fewer than the machine has)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def share_cores() -> int:
    """Give this process its share of the cores as torch threads, and return it.

    `accelerate launch` sets OMP_NUM_THREADS=1 for CPU runs, which would leave the other cores idle.
    """
    threads = max(1, cpu_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    torch.set_num_threads(threads)
    return threads


def set_up_cpu() -> None:
    """What every command that computes does first: use its cores, and keep memory for reuse."""
    share_cores()
    keep_freed_memory()


def cpu_wanted() -> bool:
    """Whether accelerate's environment variable says to leave GPUs alone."""
    return bool(parse_flag_from_env("ACCELERATE_USE_CPU"))


def pick_device(name: str = "auto") -> torch.device:
    """The device of this name. `auto`: a GPU if there is one and ACCELERATE_USE_CPU is not set, else the CPU.

    Raises:
        UserError: it cannot be used on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() and not cpu_wanted() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("use auto, cpu, cuda or mps")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device={name} is not usable here: {str(error).splitlines()[0]}") from error
    return device


class _Precise:
    """Switches TF32 off as long as any thread needs it off; the switches belong to the whole process."""

    def __init__(self) -> None:
        self.lock, self.users, self.before = threading.Lock(), 0, (False, False)

    def enter(self) -> None:
        with self.lock:
            if self.users == 0:
                self.before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
                torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
            self.users += 1

    def leave(self) -> None:
        with self.lock:
            self.users -= 1
            if self.users == 0:
                torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = self.before


_precise = _Precise()


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Plain float32 arithmetic inside the block: TF32 and autocast off, whatever the surrounding program set.

    Several threads may be inside at once.
    """
    _precise.enter()
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        _precise.leave()


def choose_precision(wanted: str, device: torch.device) -> str:
    """fp32 or bf16. `auto`: bf16 if the device supports it natively."""
    return wanted if wanted != "auto" else "bf16" if native_bf16(device) else "fp32"


def native_bf16(device: torch.device) -> bool:
    """Whether the device has bf16 multiplication, so that bf16 is faster than fp32; False where this is unknown."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return False
    flags = set(cpuinfo("flags|Features").split())
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})


def cpuinfo(key: str) -> str:
    """The first value of a key in Linux's /proc/cpuinfo; empty where there is none."""
    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.exists() else ""
    found = re.search(rf"^(?:{key})\s*: (.*)$", text, re.MULTILINE)
    return found[1] if found else ""
