"""Set-up that every training command shares: processes, threads, numerics, stopping on request, running means."""

from __future__ import annotations

import os
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    broadcast_object_list,
    gather_object,
    parse_flag_from_env,
)
from torch import Tensor

from core.cli.errors import UserError
from core.training.allocator import keep_freed_memory

PRECISIONS = {"fp32": "no", "bf16": "bf16"}  # our names -> accelerate's
TRACKERS = ("tensorboard",)

Value = TypeVar("Value")


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
    """What every command that computes does first: threads for its cores, and memory that is kept once it has it."""
    share_cores()
    keep_freed_memory()


def process_count() -> int:
    """Processes that `accelerate launch` started, known before any of them is set up."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def cpu_wanted() -> bool:
    """Whether accelerate is told to leave GPUs alone, by its environment variable."""
    return bool(parse_flag_from_env("ACCELERATE_USE_CPU"))


def several_on_cpu() -> bool:
    """Whether several processes share this machine's CPU: accelerate must be told, else each would work alone."""
    return process_count() > 1 and (cpu_wanted() or not torch.cuda.is_available())


def start_accelerator(mixed_precision: str, tracker: str | None, run_folder: Path) -> Accelerator:
    """The Accelerator of a training command, on all the processes that `accelerate launch` started.

    Args:
        mixed_precision: `fp32` or `bf16`.
        tracker: None or one of `TRACKERS`.

    Raises:
        UserError: unknown precision, or a tracker that is not installed.
    """
    if mixed_precision not in PRECISIONS:
        raise UserError(f"mixed_precision={mixed_precision!r} is unknown: use {' or '.join(PRECISIONS)}")
    if tracker is not None and tracker not in TRACKERS:
        raise UserError(f"tracker={tracker!r} is unknown: use {' or '.join(TRACKERS)}, or null for none")
    set_up_cpu()
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs that have it: about 3 times faster, enough for training
    torch.backends.cudnn.allow_tf32 = True
    # Every step has the same shapes, so cuDNN tries its kernels once and keeps the fastest: 1.4 times faster U-Nets and
    # ResNets on an H100.
    torch.backends.cudnn.benchmark = True
    # Without broadcast_buffers=False the second forward through D would overwrite the BatchNorm buffers that the
    # first one needs in the backward pass.
    handlers = [DistributedDataParallelKwargs(broadcast_buffers=False)]
    # Newer torch wants another name for it, which accelerate does not know yet.
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
    try:
        accelerator = Accelerator(
            cpu=several_on_cpu(),
            mixed_precision=PRECISIONS[mixed_precision],
            log_with=tracker,
            project_dir=str(run_folder),
            kwargs_handlers=handlers,
        )
    except (ValueError, ImportError) as error:
        raise UserError(f"cannot start with mixed_precision={mixed_precision}: {error}") from error
    if tracker is not None and not accelerator.log_with:  # accelerate leaves out what is not installed, silently
        raise UserError(f"tracker={tracker} is not installed: pip install {tracker}, or tracker=null")
    return accelerator


def wait_for_all() -> None:
    """Go on when all processes that accelerate has set up have come here.

    accelerate's own way names a device of the machine's kind, and with processes on the CPU of a machine that has a GPU
    would start work there.
    """
    state = PartialState()
    if state.num_processes > 1 and state.device.type == "cpu":
        torch.distributed.barrier()
    else:
        state.wait_for_everyone()


@dataclass(frozen=True)
class Ranks:
    """The processes that work on one command together.

    Attributes:
        index: number of this one, from 0.
        count: how many there are.
    """

    index: int = 0
    count: int = 1

    @classmethod
    def join(cls) -> Ranks:
        """Those that `accelerate launch` started, or this process alone; after it each has a GPU of its own if any."""
        if process_count() == 1:
            return cls()
        # They wait for one another where one may have an hour's work left: the default of minutes would end them.
        state = PartialState(cpu=several_on_cpu(), timeout=timedelta(days=1))
        return cls(state.process_index, state.num_processes)

    @property
    def first(self) -> bool:
        """Whether this is the process that reports."""
        return self.index == 0

    def wait(self) -> None:
        """Go on when all processes have come here."""
        if self.count > 1:
            wait_for_all()

    def of_first(self, value: Value) -> Value:
        """What the first process gives here, on all of them; what the others give is not looked at."""
        return broadcast_object_list([value])[0] if self.count > 1 else value

    def share_failure(self, failure: UserError | None) -> None:
        """Fail on all processes where one does: only the first prints, and the others would wait for the one.

        Raises:
            UserError: of the first process that has one.
        """
        messages = [None if failure is None else str(failure)]
        for message in gather_object(messages) if self.count > 1 else messages:
            if message is not None:
                raise UserError(message)


def pick_device(name: str = "auto") -> torch.device:
    """The device of this name; `auto` is a GPU if there is one and ACCELERATE_USE_CPU is not set, else the CPU.

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
    """Switches TF32 off while any thread needs it off: the switches are those of the whole process."""

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
    """Plain float32 arithmetic while active, TF32 and autocast off, whatever the surrounding program set.

    Several threads may be inside at once.
    """
    _precise.enter()
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        _precise.leave()


class StopRequest:
    """True once SIGINT or SIGTERM has come; another one, seconds later, ends the process at once."""

    ECHO = 2.0  # seconds: one Ctrl-C can come twice, from the terminal and from the launcher

    def __init__(self) -> None:
        self.received = False
        self._since = 0.0

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received and time.monotonic() - self._since > self.ECHO:
            raise KeyboardInterrupt
        if not self.received:
            self.received, self._since = True, time.monotonic()

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Catch the signals inside the block; outside they act as before."""
        before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class NonFiniteError(Exception):
    """A statistic became NaN or infinite; `step` counts from the first one still pending, `name` says which."""

    def __init__(self, step: int, name: str, value: float) -> None:
        super().__init__(f"{name} is {value}")
        self.step, self.name, self.value = step, name, value


class MeanMeter:
    """Running means of named scalars over steps and ranks, without a device synchronisation in every step.

    Scalars stay on the device until `fold`. They are added one step after another in float64, so that the result does
    not depend on when `fold` was called, nor on an interruption in between.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self.pending: list[Tensor] = []
        self.sums = [0.0] * len(names)
        self.steps = 0

    def add(self, scalars: dict[str, Tensor]) -> None:
        """Note the scalars of one step."""
        self.pending.append(torch.stack([scalars[name].float() for name in self.names]))

    def fold(self, accelerator: Accelerator) -> None:
        """Bring pending steps to the CPU, averaged over ranks; every rank must call it at the same step.

        Raises:
            NonFiniteError: a value is not finite (on every rank alike).
        """
        if not self.pending:
            return
        table = accelerator.reduce(torch.stack(self.pending), reduction="mean")
        self.pending = []
        for step, row in enumerate(table.cpu().double().tolist()):
            for column, value in enumerate(row):
                if value - value != 0.0:  # NaN or infinite
                    raise NonFiniteError(step, self.names[column], value)
                self.sums[column] += value
            self.steps += 1

    def means(self) -> dict[str, float]:
        """Means of all folded steps since the last reset; empty before the first."""
        return {name: total / self.steps for name, total in zip(self.names, self.sums, strict=True) if self.steps}

    def reset(self) -> None:
        """Start a new interval."""
        self.sums, self.steps = [0.0] * len(self.names), 0

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs (call `fold` before)."""
        return {"sums": list(self.sums), "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self.sums, self.steps = list(state["sums"]), int(state["steps"])


def is_due(before: int, after: int, every: int) -> bool:
    """Whether a multiple of `every` lies in (before, after]; `every` = 0 means never."""
    return every > 0 and before // every != after // every
