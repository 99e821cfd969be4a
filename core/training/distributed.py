"""Processes that work together: how they start, how they wait for one another, and what they tell one another."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list, gather_object

from core.cli.errors import UserError
from core.training.machine import PRECISIONS, on_cpu, process_count, set_up_cpu

# With what accelerate calls the project: a folder in that of the run, and the project on the server of W&B.
TRACKERS = {"tensorboard": "curves", "wandb": "facet"}

Value = TypeVar("Value")


def start_accelerator(mixed_precision: str, tracker: str | None, run_folder: Path) -> Accelerator:
    """The Accelerator of a training command; UserError for a precision or tracker that cannot be used here."""
    if mixed_precision not in PRECISIONS:
        raise UserError(f"mixed_precision={mixed_precision!r} is unknown: use {' or '.join(PRECISIONS)}")
    if tracker is not None and tracker not in TRACKERS:
        raise UserError(f"tracker={tracker!r} is unknown: use {' or '.join(TRACKERS)}, or null for none")
    set_up_cpu(mixed_precision)
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs that have it: about 3 times faster, enough for training
    torch.backends.cudnn.allow_tf32 = True
    # Else the second forward through D would overwrite BatchNorm buffers that the first one's backward pass needs.
    handlers = [DistributedDataParallelKwargs(broadcast_buffers=False)]
    # Newer torch has renamed the option, which accelerate does not know yet.
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
    try:
        accelerator = Accelerator(
            cpu=on_cpu(),
            mixed_precision=PRECISIONS[mixed_precision],
            log_with=tracker,
            project_dir=str(run_folder),
            kwargs_handlers=handlers,
        )
    except (ValueError, ImportError) as error:
        raise UserError(f"cannot start with mixed_precision={mixed_precision}: {error}") from error
    if tracker is not None and not accelerator.log_with:  # accelerate silently drops a tracker that is not installed
        raise UserError(f"tracker={tracker} is not installed: pip install {tracker}, or tracker=null")
    return accelerator


def wait_for_all() -> None:
    """Wait until every process that accelerate has set up has come here.

    accelerate's own barrier would start work on the machine's GPU, even for processes on the CPU.
    """
    state = PartialState()
    if state.num_processes > 1 and state.device.type == "cpu":
        torch.distributed.barrier()
    else:
        state.wait_for_everyone()


@dataclass(frozen=True)
class Ranks:
    """The processes that work on one command together."""

    index: int = 0  # of this one
    count: int = 1

    @classmethod
    def join(cls) -> Ranks:
        """The processes that `accelerate launch` started, or this one alone; each gets a GPU of its own if any."""
        if process_count() == 1:
            return cls()
        # One may have an hour of work left while the others wait; the default timeout of minutes would end them.
        state = PartialState(cpu=on_cpu(), timeout=timedelta(days=1))
        return cls(state.process_index, state.num_processes)

    @property
    def first(self) -> bool:
        """Whether this is the process that reports."""
        return self.index == 0

    def wait(self) -> None:
        """Wait until all processes have come here."""
        if self.count > 1:
            wait_for_all()

    def of_first(self, value: Value) -> Value:
        """The value of the first process, on all of them; the values of the others are ignored."""
        return broadcast_object_list([value])[0] if self.count > 1 else value

    def share_failure(self, failure: UserError | None) -> None:
        """Raise a process's failure on all: the others would wait forever."""
        messages = [str(failure)] if failure else []
        for message in gather_object(messages) if self.count > 1 else messages:
            raise UserError(message)

    def together(self, work: Callable[[], Value]) -> Value:
        """The result of `work` on every process; a UserError of any of them is raised on all."""
        failure = None
        try:
            result = work()
        except UserError as error:
            failure = error
        self.share_failure(failure)
        return result
