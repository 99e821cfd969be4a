"""The statistics of a run as curves: one PNG with a panel per topic, against the images seen."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from core.cli.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FILE_NAME = "curves.png"
# Okabe & Ito's colours (2008), which colour-blind people can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DECADE = 10.0  # ratio of largest to smallest value from which a `wide` panel has a logarithmic scale
CROWDED = 300  # points above which a running mean is drawn over them
DOTTED = 60  # points up to which each one is marked


@dataclass(frozen=True)
class Panel:
    """One plot of the page."""

    title: str  # what is plotted, with its unit if it has one
    keys: dict[str, str]  # keys of the rows, with the names of their lines; keys without any number are left out
    limits: tuple[float, float] | None = None  # ends of the vertical axis; None fits it to the numbers
    best: Literal["lowest", "highest"] | None = None  # which value of the first key is marked
    wide: bool = False  # a logarithmic scale where the numbers span more than a decade and are all positive


def draw_curves(rows: Sequence[dict[str, Any]], panels: Iterable[Panel], path: str | Path) -> bool:
    """Write the panels that have numbers as one PNG, complete or absent; see `make_figure`.

    Returns whether there was anything to draw; if not, no file is written. Raises UserError where that fails.
    """
    figure = make_figure(rows, panels)
    if figure is not None:
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="png")
    return figure is not None


def make_figure(rows: Sequence[dict[str, Any]], panels: Iterable[Panel]) -> Figure | None:
    """The panels that have numbers, one axes each from top to bottom; None where none has.

    Rows are as in stats.jsonl: `images` and any of the keys; those of other kinds, such as warnings, are passed over.
    """
    every = [(panel, {key: series(rows, key) for key in panel.keys}) for panel in panels]
    every = [(panel, {key: line for key, line in found.items() if len(line[0])}) for panel, found in every]
    lines = [(panel, found) for panel, found in every if found]
    if not lines:
        return None
    from matplotlib.figure import Figure  # takes half a second, which other commands need not wait for
    from matplotlib.ticker import EngFormatter

    # Margins in inches: having matplotlib work them out would double the time, which training waits for.
    width, height = 8.0, 0.9 + 2.3 * len(lines)
    figure = Figure(figsize=(width, height), dpi=120)
    figure.subplots_adjust(0.75 / width, 0.5 / height, 1 - 0.25 / width, 1 - 0.35 / height, hspace=0.22)
    for axes, (panel, found) in zip(figure.subplots(len(lines), sharex=True, squeeze=False)[:, 0], lines, strict=True):
        _draw_panel(axes, panel, found)
    axes.set_xlabel("images seen")  # of the last one, which all share
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 20k, 1.5M
    axes.set_xlim(left=0)
    return figure


def series(rows: Iterable[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Images seen and values, float64 (N,) each, of the rows that have a number under `key`."""
    points = [(row["images"], row[key]) for row in rows if isinstance(row.get(key), (int, float))]
    table = np.array(points, dtype=np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Mean (N,) over the `width` (odd) values around each; the fewer that there are at the ends."""
    kernel = np.ones(width)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def _draw_panel(axes: Axes, panel: Panel, found: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """The lines of one panel, its title above it on the left, their names (if several) and the best on the right."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    for (key, (images, values)), colour in zip(found.items(), COLOURS, strict=False):
        crowded = len(values) > CROWDED
        style: dict[str, Any] = {"marker": "o", "markersize": 3} if len(values) <= DOTTED else {}
        label = panel.keys[key] if len(found) > 1 else None
        width, alpha = (0.8, 0.35) if crowded else (1.5, 1)
        axes.plot(images, values, color=colour, linewidth=width, alpha=alpha, **style)
        smooth = running_mean(values, len(values) // 100 | 1) if crowded else values
        axes.plot(images, smooth, color=colour, linewidth=1.5, label=label)
    axes.set_title(panel.title, loc="left", fontsize=11)
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    every = np.concatenate([values for _, values in found.values()])
    if panel.limits is not None:
        axes.set_ylim(panel.limits)
    elif panel.wide and every.min() > 0 and every.max() > DECADE * every.min():
        axes.set_yscale("log")  # with plain numbers, also between the powers of ten
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=20))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    if panel.best is not None and (first := next(iter(panel.keys))) in found:
        images, values = found[first]
        at = int(values.argmin() if panel.best == "lowest" else values.argmax())  # the first of equals
        name = f"best {panel.keys[first]}" if len(found) > 1 else "best"
        label = f"{name} {values[at]:.3g} at {images[at]:,.0f}"
        ring: dict[str, Any] = {"markersize": 10, "markerfacecolor": "none", "markeredgecolor": "black"}
        axes.plot(images[at], values[at], "o", label=label, clip_on=False, zorder=3, **ring)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=len(found) + 1, frameon=False, borderaxespad=0.2)
