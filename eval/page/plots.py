"""The geometry of the plots on the report page; plots.html draws them."""

from __future__ import annotations

import math
from typing import Any

ROW = 52  # pixels per bar with its label
CURVE = 200  # height in pixels of the plot against 1/N
NAMED_COUNTS = (5_000, 7_000, 10_000, 20_000, 50_000, 100_000, 200_000)


def bar_chart(scores: list[dict[str, Any]], target: float | None) -> dict[str, Any]:
    """Geometry of one bar from zero per score, with a line at `target`; `at` maps a value to its position."""
    ends = [max(score["mean"] + (score["sd"] or 0), (score["floor"] or {}).get("mean", 0)) for score in scores]
    top = max([*ends, target or 0]) * 1.05
    if not (math.isfinite(top) and top > 0):
        top = 1.0
    head = 20 if target is not None else 0
    share = (target or 0) / top
    return {
        "at": lambda value: f"{100 * min(max(value, 0), top) / top:.2f}%",
        "ticks": nice_ticks(0, top, 5),
        "target": target,
        "anchor": "end" if share > 0.7 else "start" if share < 0.3 else "middle",
        "head": head,
        "foot": head + ROW * len(scores) + 8,
        "row": ROW,
    }


def curve_chart(infinity: dict[str, Any]) -> dict[str, Any]:
    """Geometry of the points of an extrapolation against 1/N; `across` and `down` map x and y to positions."""
    points = [(1 / count, value) for count, value in infinity["points"]]
    end = infinity["value"]
    right = max(x for x, _ in points) * 1.04
    # A least-squares line passes through the mean of its points; together with the intercept, that fixes it.
    slope = sum(y - end for _, y in points) / sum(x for x, _ in points)
    values = [end, end + slope * right, *(y for _, y in points)]
    # At least a hundredth of the value, so that the scatter of a flat line does not fill the plot
    margin = max(0.12 * (max(values) - min(values)), 0.01 * abs(end)) or 1.0
    low, high = min(values) - margin, max(values) + margin
    # Round numbers of samples within the points, a sixth of the width apart so that they fit on narrow screens
    ticks = [(0.0, "∞")]
    for x, count in ((1 / count, count) for count in NAMED_COUNTS):
        inside = min(x for x, _ in points) * 0.99 <= x <= right
        if inside and all(abs(x - other) > 0.17 * right for other, _ in ticks):
            ticks.append((x, f"{count:,}"))
    return {
        "points": points,
        "right_value": end + slope * right,
        "across": lambda x: f"{100 * x / right:.2f}%",
        "down": lambda y: f"{CURVE * (high - y) / (high - low):.1f}",
        "ticks": nice_ticks(low, high, 5),
        "counts": ticks,
        "height": CURVE,
    }


def nice_ticks(low: float, high: float, most: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten in [low, high], at most `most` + 1 of them."""
    step = 10 ** math.floor(math.log10((high - low) / most))
    step = next(step * factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= most)
    return [float(f"{index * step:.12g}") for index in range(math.ceil(low / step), math.floor(high / step) + 1)]
