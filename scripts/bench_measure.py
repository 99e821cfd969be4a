"""How the benchmark measures: contestants take turns in one process, and neighbouring turns are compared.

A machine's speed drifts (heat, other work), and two measurements made one after the other differ by that drift. Turns
A B A B ... share it, so the ratio of neighbours hardly contains it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast

from core.training.allocator import ordinary_allocation
from core.training.distributed import wait_for_all

TURNS = 5  # wanted of each contestant; the time that a part is given is divided by it
LEAST_TURNS = 2  # give three neighbouring pairs, hence quartiles

Outcome = TypeVar("Outcome")


@dataclass(frozen=True)
class Side:
    """One contestant.

    Attributes:
        name: what its rates are kept under.
        work: does its work so many times and returns how much that was (images, say).
        least: fewest times in a turn.
        warm: runs it for the first time, untimed; None: `work(least)`.
        plain: has nothing of what our commands arrange for the whole process, so that freed memory is given back.
    """

    name: str
    work: Callable[[int], float]
    least: int = 1
    warm: Callable[[], object] | None = None
    plain: bool = False

    def run(self, count: int) -> float:
        """`work`, in the surroundings it belongs in."""
        with ordinary_allocation() if self.plain else nullcontext():
            return self.work(count)

    def start(self) -> object:
        """The first time."""
        return self.run(self.least) if self.warm is None else self.warm()


@dataclass(frozen=True)
class Clock:
    """Time on a device that works asynchronously, the same on all processes of a launch."""

    accelerator: Accelerator

    def __call__(self, work: Callable[[], Outcome]) -> tuple[Outcome, float]:
        """What `work` returns, and the seconds it takes, with everything it has started on the device."""
        wait_for_all()
        synchronise(self.accelerator.device)
        started = time.perf_counter()
        done = work()
        synchronise(self.accelerator.device)
        return done, time.perf_counter() - started

    def agree(self, value: float) -> float:
        """The value of process 0: all have to take the same number of steps, or they would wait for ever."""
        if self.accelerator.num_processes == 1:
            return value
        told = torch.tensor([value], dtype=torch.float32, device=self.accelerator.device)
        return float(broadcast(told, from_process=0).item())


def synchronise(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def interleave(sides: Sequence[Side], seconds: float, clock: Clock) -> dict[str, np.ndarray]:
    """Let the sides take turns for about `seconds` and for at least `LEAST_TURNS` turns of each.

    How much is done in a turn follows from an untimed first run and a timed second one.

    Returns:
        Name of each side to its rates, amount per second, float64 (turns,).
    """
    turn = seconds / (TURNS * len(sides))
    counts = [_repetitions(side, turn, clock) for side in sides]
    rates: dict[str, list[float]] = {side.name: [] for side in sides}
    started = time.perf_counter()
    turns = 0
    while turns < LEAST_TURNS or clock.agree(time.perf_counter() - started) < seconds:
        for side, count in zip(sides, counts, strict=True):
            amount, taken = clock(partial(side.run, count))
            rates[side.name].append(amount / taken)
        turns += 1
    return {name: np.array(values) for name, values in rates.items()}


def _repetitions(side: Side, turn: float, clock: Clock) -> int:
    """How often a side does its work in a turn of `turn` seconds, after warming it up."""
    _, taken = clock(side.start)
    if side.warm is not None or clock.agree(taken) > turn:  # too slow to measure once more for nothing
        return side.least
    count = side.least
    while True:
        taken = clock.agree(clock(partial(side.run, count))[1])
        if taken > turn / 4:
            return max(side.least, round(count * turn / taken))
        # Short timings are rough, so that it is approached in steps of no more than 16.
        count = max(count + 1, int(count * min(16.0, turn / (2 * max(taken, 1e-9)))))


def neighbour_ratios(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Ratios first / second of turns next to each other in first, second, first, second, ...; (2 * turns - 1,)."""
    return np.concatenate([first / second, first[1:] / second[:-1]])


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of measured values."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: np.ndarray) -> Spread:
        """Of any number of values."""
        low, median, high = np.percentile(values, (25, 50, 75))
        return cls(float(median), float(low), float(high))


@dataclass(frozen=True)
class Result:
    """One line of the table.

    Attributes:
        part: its name.
        unit: of `ours` and `reference`.
        ours, reference: what was measured; `reference` is what the part is compared with.
        ratio: of neighbouring turns: ours / reference of rates, so that more than 1 is faster.
        share: `ratio` is a share of something, to be shown in percent.
        note: what a reader needs to know to understand the numbers.
        facts: further numbers for the JSON file.
    """

    part: str
    unit: str
    ours: Spread
    reference: Spread
    ratio: Spread
    share: bool = False
    note: str = ""
    facts: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of_rates(cls, part: str, unit: str, rates: dict[str, np.ndarray], **more: Any) -> Result:
        """From the rates of the sides `ours` and `reference`."""
        ours, reference = rates["ours"], rates["reference"]
        spreads = (Spread.of(ours), Spread.of(reference), Spread.of(neighbour_ratios(ours, reference)))
        facts = {"turns": len(ours), **more.pop("facts", {})}
        return cls(part, unit, *spreads, facts=facts, **more)
