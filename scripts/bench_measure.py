"""How the benchmark measures: A B A B ... in one process: neighbouring turns share the machine's drift."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from core.training.allocator import ordinary_allocation
from core.training.distributed import wait_for_all

TURNS = 5  # planned for each side
LEAST_TURNS = 2  # give three neighbouring pairs, hence quartiles

Rates = dict[str, np.ndarray]
Work = Callable[..., object]


@dataclass(frozen=True)
class Side:
    """One of the things to compare, which does its work in units."""

    name: str
    work: Work  # does one unit, or with `counted` as many as its argument says
    amount: float = 1.0  # what a unit counts for, in images, say
    plain: bool = False  # without our commands' allocator settings: freed memory goes back to the system
    counted: bool = False
    least: int = 1  # fewest units in a turn


def seconds_of(side: Side, count: int) -> float:
    """Seconds of process 0, on all processes, until `count` units of work are done, which they start together.

    Processes that took different numbers of steps would wait for each other for ever.
    """
    synchronise = getattr(torch, PartialState().device.type).synchronize
    with ordinary_allocation() if side.plain else nullcontext():
        wait_for_all()
        synchronise()
        started = time.perf_counter()
        for arguments in [(count,)] if side.counted else [()] * count:
            side.work(*arguments)
        synchronise()
        taken = time.perf_counter() - started
    return float(broadcast_object_list([taken])[0])


def interleave(seconds: float, *sides: Side) -> Rates:
    """Rates of each side by name, amount per second, float64 (turns,), from turns for about `seconds`."""
    counts = [_units_per_turn(side, seconds / (TURNS * len(sides))) for side in sides]
    times: list[list[float]] = []
    while len(times) < LEAST_TURNS or np.sum(times) < seconds:
        times.append([seconds_of(side, count) for side, count in zip(sides, counts, strict=True)])
    done = [side.amount * count for side, count in zip(sides, counts, strict=True)]
    return {side.name: rates for side, rates in zip(sides, (done / np.array(times)).T, strict=True)}


def _units_per_turn(side: Side, turn: float) -> int:
    taken = seconds_of(side, side.least)
    if taken < turn:  # the first run may have compiled or loaded something
        taken = seconds_of(side, side.least)
    return max(side.least, round(side.least * turn / max(taken, 1e-9)))


def neighbour_ratios(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Ratios first / second of adjacent turns in the order first, second, first, ...; float64 (2 * turns - 1,)."""
    return np.concatenate([first / second, first[1:] / second[:-1]])


def spread(values: np.ndarray) -> dict[str, float]:
    """Median and quartiles."""
    return dict(zip(("low", "median", "high"), np.percentile(values, (25, 50, 75)).tolist(), strict=True))


@dataclass(frozen=True)
class Result:
    """One line of the table; `ours`, `reference` and `ratio` have a median and quartiles."""

    part: str
    unit: str  # of `ours` and `reference`: a rate, or a time that starts with `ms`
    ours: dict[str, float]
    reference: dict[str, float]
    ratio: dict[str, float]  # of neighbouring turns; above 1 ours is faster
    share: bool  # the ratio is the share of ours in the reference
    note: str
    facts: dict[str, Any]  # further numbers for the JSON file

    @classmethod
    def of(cls, part: str, unit: str, rates: Rates, note: str, share: bool = False, **facts: Any) -> Result:
        """The result for the rates of the sides `ours` and `reference`."""
        ours, reference = rates["ours"], rates["reference"]
        shown = (1e3 / ours, 1e3 / reference) if unit.startswith("ms") else (ours, reference)
        ratio = neighbour_ratios(*shown) if share else neighbour_ratios(ours, reference)
        spreads = spread(shown[0]), spread(shown[1]), spread(ratio)
        return cls(part, unit, *spreads, share, note, {"turns": len(ours), **facts})
