"""The geometry of a run's curves on the run page; run_parts.html draws them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from core.training.curves import DECADE, Panel, series
from eval.page.plots import nice_ticks
from eval.page.text import number

HEIGHT = 170  # pixels
WIDTH = 1000  # units across a line, which the page stretches to the width that there is
LEAST_SPAN = 0.2  # of a linear scale, in its largest magnitude: a change of 1% then is a twentieth of the height
LEAST = 1e-200  # that a scale spans: nothing but zeros is drawn at the bottom
MARKED = 30  # points up to which each one is marked
MOST_POINTS = 300  # of a line; of more rows, means are drawn, and the range that they are of


@dataclass(frozen=True)
class Axis:
    """The vertical axis of a panel, which all runs on the page share."""

    low: float
    high: float
    log: bool

    def down(self, value: float) -> float:
        """The place of a value in pixels from the top."""
        low, high, at = (math.log(each) if self.log else each for each in (self.low, self.high, value))
        return HEIGHT * (high - at) / (high - low)

    def ticks(self) -> list[tuple[float, str]]:
        """Round numbers on it, as text, too: on a logarithmic one 1, 2 and 5 times powers of ten, or these alone."""
        if not self.log:
            return labelled(nice_ticks(self.low, self.high, 6))
        powers = [
            10.0**power for power in range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        ]
        found = [factor * power for power in powers for factor in (1, 2, 5) if self.low <= factor * power <= self.high]
        if len(found) > 6:
            found = [power for power in powers if self.low <= power <= self.high]
        return [(value, short(value)) for value in found[:: math.ceil(len(found) / 6)]]


@dataclass(frozen=True)
class Line:
    """One line: its name, its place among the colours, its points, and around these the range of the rows, if any."""

    name: str
    colour: int
    images: list[float]
    values: list[float]
    path: str
    band: str

    @property
    def data(self) -> dict[str, list[float]]:
        """The points, for the page's script."""
        return {"images": self.images, "values": [float(f"{value:.5g}") for value in self.values]}

    @property
    def dotted(self) -> bool:
        """Whether there are so few points that each is marked."""
        return len(self.values) <= MARKED


@dataclass(frozen=True)
class Chart:
    """A panel of one run; `best` is images seen and value where the panel marks one."""

    title: str
    axis: Axis
    right: float  # images seen at the right end
    lines: list[Line]
    best: tuple[float, float] | None
    rows: int  # that a point is the mean of

    def across(self, images: float) -> str:
        """The place of a number of images from the left."""
        return f"{100 * images / self.right:.2f}%"

    @property
    def counts(self) -> list[tuple[float, str]]:
        """Round numbers of images on the horizontal axis, as text, too."""
        return labelled(nice_ticks(0, self.right, 6))


Found = dict[str, tuple[np.ndarray, np.ndarray]]


def charts_of(runs: Sequence[tuple[list[dict[str, Any]], Sequence[Panel]]]) -> list[list[Chart]]:
    """The charts of each run, given as its rows and panels, those without a number left out.

    Runs are compared side by side: panels of one title have the same vertical axis in all of them, and runs that have
    panels in common the same horizontal one.
    """
    every = [[(panel, _lines_of(rows, panel)) for panel in panels] for rows, panels in runs]
    titles = [{panel.title for panel, found in run if found} for run in every]
    ends = [max((float(x.max()) for _, found in run for x, _ in found.values()), default=0.0) for run in every]
    rights = [max(end for end, others in zip(ends, titles, strict=True) if own & others or end == 0) for own in titles]
    values: dict[str, list[np.ndarray]] = {}
    for panel, found in (pair for run in every for pair in run):
        values.setdefault(panel.title, []).extend(y for _, y in found.values())
    axes = {
        panel.title: make_axis(np.concatenate(values[panel.title]), panel)
        for run in every
        for panel, found in run
        if found
    }
    return [
        [_chart(panel, found, axes[panel.title], right or 1.0) for panel, found in run if found]
        for run, right in zip(every, rights, strict=True)
    ]


def _lines_of(rows: list[dict[str, Any]], panel: Panel) -> Found:
    found = {}
    for key in panel.keys:
        images, values = series(rows, key)
        known = np.isfinite(values)
        if known.any():
            found[key] = images[known], values[known]
    return found


def make_axis(values: np.ndarray, panel: Panel) -> Axis:
    """The vertical axis for all values (N,) of a panel.

    A linear one spans at least `LEAST_SPAN`, and leaves the side of 0 that the values are on only where they do.
    """
    low, high = float(values.min()), float(values.max())
    if panel.limits is not None:
        return Axis(*panel.limits, log=False)
    if panel.wide and low > 0 and high > DECADE * low:
        return Axis(low / 1.15, high * 1.15, log=True)
    positive, negative = low >= 0, high <= 0
    missing = LEAST_SPAN * max(abs(low), abs(high)) - (high - low)
    margin = max(missing, 0.0) / 2 + 0.05 * (high - low)
    low, high = (
        max(low - margin, 0.0) if positive else low - margin,
        min(high + margin, 0.0) if negative else high + margin,
    )
    return Axis(low, high if high - low > LEAST else low + 1.0, log=False)


def _chart(panel: Panel, found: Found, axis: Axis, right: float) -> Chart:
    lines, rows = [], 1
    for colour, key in enumerate(panel.keys):
        if key in found:
            images, *ranges, group = _summary(*found[key])
            mean, low, high = ([axis.down(value) for value in _inside(axis, part)] for part in ranges)
            across = [WIDTH * x / right for x in images]
            band = _path([*zip(across, high, strict=True), *reversed([*zip(across, low, strict=True)])]) + "Z"
            path = _path(zip(across, mean, strict=True))
            lines.append(Line(panel.keys[key], colour, images, ranges[0], path, band if group > 1 else ""))
            rows = max(rows, group)
    best = None
    if panel.best is not None and (first := next(iter(panel.keys))) in found:
        images_of, values = found[first]
        at = int(values.argmin() if panel.best == "lowest" else values.argmax())
        best = float(images_of[at]), float(values[at])
    return Chart(panel.title, axis, right, lines, best, rows)


def _summary(images: np.ndarray, values: np.ndarray) -> tuple[list[float], list[float], list[float], list[float], int]:
    """Images seen, means, lowest and highest values of equal groups of rows, and the rows in each."""
    group = math.ceil(len(values) / MOST_POINTS)
    parts = [values[start : start + group] for start in range(0, len(values), group)]
    last = [float(images[min((place + 1) * group, len(images)) - 1]) for place in range(len(parts))]
    means, lows, highs = ([float(reduce(part)) for part in parts] for reduce in (np.mean, np.min, np.max))
    return last, means, lows, highs, group


def _inside(axis: Axis, values: list[float]) -> Iterator[float]:
    return (min(max(value, axis.low), axis.high) for value in values)


def _path(points: Any) -> str:
    return "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in points)


def labelled(values: list[float]) -> list[tuple[float, str]]:
    """Evenly spaced round numbers with their texts, which have the same number of decimals."""
    texts = [short(value) for value in values]
    decimals = max((len(text.partition(".")[2]) for text in texts if text[-1:].isdigit()), default=0)
    plain = all(text[-1:].isdigit() for text in texts)
    return [
        (value, f"{value:.{decimals}f}".replace("-", "−") if plain and value else text)
        for value, text in zip(values, texts, strict=True)
    ]


def short(value: float) -> str:
    """A round number for an axis: 0.64, 250, 20k, 1.5M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.6g}{unit}".replace("-", "−")
    return number(value) if 0 < abs(value) < 1e-4 else f"{value:.6g}".replace("-", "−")
