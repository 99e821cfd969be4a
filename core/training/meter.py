"""Means of training statistics and speed over an interval, and when an interval ends."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor

from core.training.checkpoint import Stateful


class NonFiniteError(Exception):
    """The statistic `name` became NaN or infinite; `step` counts from the first pending one."""

    def __init__(self, step: int, name: str, value: float) -> None:
        super().__init__(f"{name} is {value}")
        self.step, self.name = step, name


class MeanMeter(Stateful):
    """Running means of named scalars over steps and ranks, without synchronising with the device in every step.

    Scalars stay on the device until `fold`. They are added step by step in float64, so the result depends neither on
    when `fold` is called nor on an interruption in between. Call it before `state_dict`.
    """

    STATE = ("sums", "steps")

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self.pending: list[Tensor] = []
        self.reset()

    def add(self, scalars: dict[str, Tensor]) -> None:
        """Add the scalars of one step."""
        self.pending.append(torch.stack([scalars[name].float() for name in self.names]))

    def fold(self, accelerator: Accelerator) -> None:
        """Bring pending steps to the CPU, averaged over ranks, which must all call this at the same step."""
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


class Speed:
    """Images per second since the last reading, not counting the time inside `paused`."""

    def __init__(self, images_seen: int) -> None:
        self.images, self.since = images_seen, time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time that the block takes."""
        started = time.perf_counter()
        yield
        self.since += time.perf_counter() - started

    def read(self, images_seen: int) -> float:
        """The speed of the interval that ends here; the next one begins."""
        now = time.perf_counter()
        speed = (images_seen - self.images) / (now - self.since)
        self.images, self.since = images_seen, now
        return speed


def is_due(before: int, after: int, every: int) -> bool:
    """Whether a multiple of `every` lies in (before, after]; `every` = 0 means never."""
    return every > 0 and before // every != after // every
