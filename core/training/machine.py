"""The machine: cores and memory for this process, devices, and the precision they compute in."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from accelerate.utils import parse_flag_from_env

from core.cli.console import say
from core.cli.errors import UserError
from core.training.allocator import keep_freed_memory

PRECISIONS = {"fp32": "no", "bf16": "bf16"}  # our names -> accelerate's


def cpu_cores() -> int:
    """Cores this process may run on (a container or taskset may allow fewer than the machine has)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def set_up_cpu(precision: str = "fp32") -> None:
    """What every command that computes does first: use its share of the cores, keep memory for reuse, let cuDNN choose.

    OMP_NUM_THREADS holds where the user has set it. Process 0 says which wishes given to a launcher have no effect on a
    command that computes in `precision`.
    """
    launcher = Launcher.find()
    if launcher.chose_threads or "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, cpu_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    keep_freed_memory()
    # Where shapes repeat, cuDNN tries its kernels once and keeps the fastest: 1.4 times faster U-Nets and ResNets on an
    # H100.
    torch.backends.cudnn.benchmark = True
    if os.environ.get("RANK", "0") == "0":
        for note in launcher.notes(precision):
            say(f"note: {note}")


@dataclass(frozen=True)
class Launcher:
    """The process of `accelerate launch` or torchrun that started this one.

    Attributes:
        arguments: its command line; empty where there is none, or it cannot be seen.
        chose_threads: whether OMP_NUM_THREADS is not the user's but its own, which is 1 and would leave cores idle.
    """

    arguments: tuple[str, ...] = ()
    chose_threads: bool = False

    @classmethod
    def find(cls) -> Launcher:
        """The launcher: it sets these variables in what it starts."""
        if not {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & os.environ.keys():
            return cls()
        try:
            parent = psutil.Process(os.getppid())
            arguments, users = tuple(parent.cmdline()), parent.environ()
        except psutil.Error:
            return cls((), os.environ.get("OMP_NUM_THREADS") == "1")
        asked = "OMP_NUM_THREADS" in users or _has_flag(arguments, "num_cpu_threads_per_process")
        return cls(arguments, not asked)

    def notes(self, precision: str) -> list[str]:
        """What the user has asked of it in vain, a sentence each."""
        found = []
        wanted = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if wanted not in ("no", PRECISIONS[precision]):
            found.append(f"accelerate's mixed_precision {wanted} has no effect: this computes in {precision}")
        if _has_flag(self.arguments, "gradient_accumulation_steps"):
            found.append("accelerate's --gradient_accumulation_steps has no effect: facet train has the key accumulate")
        if process_count() > 1 and on_cpu() and not cpu_wanted():
            found.append(f"no GPU can be used here: {process_count()} processes share the CPU")
        return found


def _has_flag(arguments: tuple[str, ...], name: str) -> bool:
    return any(word.replace("-", "_").split("=")[0] == f"__{name}" for word in arguments)


def process_count() -> int:
    """Processes that `accelerate launch` started, known before any of them is set up."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def on_cpu() -> bool:
    """Whether to compute on the CPU. accelerate must be told: it would take an Apple GPU, and of several processes that
    share a CPU each would work alone."""
    return pick_device().type == "cpu"


def cpu_wanted() -> bool:
    """Whether accelerate's environment variable says to leave GPUs alone."""
    return bool(parse_flag_from_env("ACCELERATE_USE_CPU"))


def pick_device(name: str = "auto") -> torch.device:
    """The device of this name. `auto`: a CUDA GPU if there is one and ACCELERATE_USE_CPU is not set, else the CPU.

    An Apple GPU (mps) is only taken by name, and never for training: PyTorch computes wrong gradients of batch norm
    there in the memory format of our networks, without an error (pytorch/pytorch#175189).

    Raises UserError where it cannot be used.
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


class _TF32:
    """The switches of TF32, which belong to the whole process, and the threads that need them off."""

    lock, users, before = threading.Lock(), 0, (False, False)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Plain float32 arithmetic inside the block: TF32 and autocast off, whatever the surrounding program set.

    Several threads may be inside at once.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    with _TF32.lock:
        if _TF32.users == 0:
            _TF32.before = matmul.allow_tf32, cudnn.allow_tf32
            matmul.allow_tf32 = cudnn.allow_tf32 = False
        _TF32.users += 1
    try:
        # Older torch has no autocast for Apple's GPUs, not even to turn it off.
        known = torch.amp.is_autocast_available(device.type)
        with torch.autocast(device.type, enabled=False) if known else nullcontext():
            yield
    finally:
        with _TF32.lock:
            _TF32.users -= 1
            if _TF32.users == 0:
                matmul.allow_tf32, cudnn.allow_tf32 = _TF32.before


def choose_precision(wanted: str, device: torch.device) -> str:
    """fp32 or bf16. `auto`: bf16 if `accelerate launch` was told so or the device supports it natively."""
    if wanted != "auto":
        return wanted
    return "bf16" if os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16" or native_bf16(device) else "fp32"


@contextmanager
def explained_compiler() -> Iterator[None]:
    """Turn an error of torch.compile, or an assertion in the code that it generates, into one line."""
    from torch._dynamo.exc import TorchDynamoException  # takes seconds to import

    try:
        yield
    except (TorchDynamoException, AssertionError) as error:
        reason = " ".join(str(error).split("\n\n")[0].split()) or type(error).__name__
        raise UserError(f"compile=true failed ({reason}): install a C++ compiler, or use compile=false") from error


@contextmanager
def explained_memory(accumulate: int | None) -> Iterator[None]:
    """Turn the error of a GPU whose memory is full into one line; `accumulate` is that key's value, if there is one."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        ways = "" if accumulate is None else f", accumulate={2 * accumulate}, cuda_graph=false"
        raise UserError(f"the GPU's memory is full: use a smaller batch_size{ways} or a narrower model") from error


def gpu_memory(device: torch.device) -> dict[str, float]:
    """The most memory that tensors of this process have taken on its GPU so far, in MiB; empty without one."""
    return {"gpu_peak_mib": round(torch.cuda.max_memory_allocated(device) / 2**20, 1)} if device.type == "cuda" else {}


def native_bf16(device: torch.device) -> bool:
    """Whether the device has bf16 multiplication, so that bf16 is faster than fp32; False where this is unknown."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    flags = cpuinfo("flags|Features").split() if device.type == "cpu" else []
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags)


def cpuinfo(key: str) -> str:
    """The first value of a key in Linux's /proc/cpuinfo; empty where there is none."""
    path = Path("/proc/cpuinfo")
    text = path.read_text("utf-8") if path.exists() else ""
    found = re.search(rf"^(?:{key})\s*: (.*)$", text, re.MULTILINE)
    return found[1] if found else ""
