"""The drawings of the report page, as inline SVG.

Horizontal positions are percentages and everything else is in pixels, so that a drawing takes the width it is given
while its text keeps its size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from eval.page.text import escaped, number, on_one_line

ROW = 52  # pixels per bar with its label
CURVE = 200  # height of the plot against 1/N
NAMED_COUNTS = (5_000, 7_000, 10_000, 20_000, 50_000, 100_000, 200_000)


def score_bars(scores: list[dict[str, Any]], target: float | None) -> str:
    """One bar from zero per score: the floor's share, the excess, the spread over sets; a line at `target`."""
    ends = [max(score["mean"] + (score.get("sd") or 0), (score.get("floor") or {}).get("mean", 0)) for score in scores]
    top = max([*ends, target or 0]) * 1.05
    if not (math.isfinite(top) and top > 0):
        top = 1.0

    def at(value: float) -> str:
        return f"{100 * min(max(value, 0), top) / top:.2f}%"

    head = 20 if target is not None else 0
    foot = head + ROW * len(scores) + 8
    parts = []
    for value in nice_ticks(0, top, 5):
        parts.append(f'<line class="grid" x1="{at(value)}" x2="{at(value)}" y1="{head}" y2="{foot}"/>')
        parts.append(f'<text class="soft" x="{at(value)}" y="{foot + 16}" text-anchor="middle">{number(value)}</text>')
    for index, score in enumerate(scores):
        parts.append(_bar(score, head + ROW * index, at))
    if target is not None:
        anchor = "end" if target > 0.7 * top else "start" if target < 0.3 * top else "middle"
        parts.append(f'<line class="target" x1="{at(target)}" x2="{at(target)}" y1="{head - 4}" y2="{foot}"/>')
        parts.append(
            f'<text class="target-text strong" x="{at(target)}" y="12" text-anchor="{anchor}">'
            f"course target {number(target)}</text>"
        )
    # After the target's line, which they cover
    parts += [_bar_label(score, head + ROW * index + 17) for index, score in enumerate(scores)]
    label = "; ".join(_described(score) for score in scores)
    label += f"; course target {number(target)}" if target is not None else ""
    return f'<svg role="img" aria-label="{escaped(label)}" height="{foot + 24}">{"".join(parts)}</svg>'


def _bar(score: dict[str, Any], top: int, at: Callable[[float], str]) -> str:
    mean, sd, floor = score["mean"], score.get("sd") or 0, score.get("floor")
    y, high = top + 24, 16
    parts = [f'<rect class="excess-bar" x="0" y="{y}" width="{at(mean)}" height="{high}"/>']
    if floor:
        parts.append(f'<rect class="floor-bar" x="0" y="{y}" width="{at(min(mean, floor["mean"]))}" height="{high}"/>')
        mark = at(floor["mean"])
        parts.append(f'<line class="floor-mark" x1="{mark}" x2="{mark}" y1="{y - 3}" y2="{y + high + 3}"/>')
    if sd:
        low, end, middle = at(mean - sd), at(mean + sd), y + high / 2
        parts.append(f'<line class="whisker" x1="{low}" x2="{end}" y1="{middle}" y2="{middle}"/>')
        for side in (low, end):
            parts.append(f'<line class="whisker" x1="{side}" x2="{side}" y1="{middle - 5}" y2="{middle + 5}"/>')
    return "".join(parts)


def _bar_label(score: dict[str, Any], y: int) -> str:
    shown = on_one_line(score["mean"], score.get("sd"))
    return (
        f'<text class="over" x="0" y="{y}">{escaped(score["against"])}</text>'
        f'<text class="over strong" x="100%" y="{y}" text-anchor="end">{shown}</text>'
    )


def _described(score: dict[str, Any]) -> str:
    floor = f", floor {number(score['floor']['mean'])}" if score.get("floor") else ""
    return f"against {score['against']}: {on_one_line(score['mean'], score.get('sd'))}{floor}"


def infinity_curve(infinity: dict[str, Any], metric: str) -> str:
    """The points of an extrapolation against 1/N, the fitted line, and its end at N = infinity."""
    points = [(1 / count, value) for count, value in infinity["points"]]
    end = infinity["value"]
    right = max(x for x, _ in points) * 1.04
    # A least-squares line passes through the centre of its points; with the intercept that fixes it.
    slope = (_mean([y for _, y in points]) - end) / _mean([x for x, _ in points])
    values = [end, end + slope * right, *(y for _, y in points)]
    # Not below a hundredth of the value: the scatter of a flat line should not fill the plot.
    margin = max(0.12 * (max(values) - min(values)), 0.01 * abs(end)) or 1.0
    low, high = min(values) - margin, max(values) + margin

    def across(x: float) -> str:
        return f"{100 * x / right:.2f}%"

    def down(y: float) -> str:
        return f"{CURVE * (high - y) / (high - low):.1f}"

    parts = [
        f'<line class="grid" x1="0" x2="100%" y1="{down(value)}" y2="{down(value)}"/>'
        f'<text class="soft" x="-8" y="{down(value)}" dy="4" text-anchor="end">{number(value)}</text>'
        for value in nice_ticks(low, high, 5)
    ]
    parts.append(f'<line class="axis" x1="0" x2="100%" y1="{CURVE}" y2="{CURVE}"/>')
    parts += [
        f'<line class="axis" x1="{across(x)}" x2="{across(x)}" y1="{CURVE}" y2="{CURVE + 5}"/>'
        f'<text class="soft" x="{across(x)}" y="{CURVE + 19}" text-anchor="middle">{text}</text>'
        for x, text in [(0.0, "∞"), *_count_ticks(points, right)]
    ]
    parts.append(f'<text class="soft" x="50%" y="{CURVE + 38}" text-anchor="middle">samples N, spaced by 1/N</text>')
    parts.append(f'<line class="fit" x1="0" x2="100%" y1="{down(end)}" y2="{down(end + slope * right)}"/>')
    parts += [f'<circle class="dot" cx="{across(x)}" cy="{down(y)}" r="4"/>' for x, y in points]
    parts.append(f'<circle class="ring" cx="0" cy="{down(end)}" r="5.5"/>')
    label = f"{metric} against 1/N: {len(points)} points, extrapolated to {number(end)} at infinite N"
    return f'<svg role="img" aria-label="{escaped(label)}" height="{CURVE + 46}">{"".join(parts)}</svg>'


def _count_ticks(points: list[tuple[float, float]], right: float) -> list[tuple[float, str]]:
    """Round numbers of samples in the range of the points, a sixth of the width apart: narrow screens need it."""
    ticks: list[tuple[float, str]] = []
    for count in NAMED_COUNTS:
        x = 1 / count
        inside = min(p for p, _ in points) * 0.99 <= x <= right
        if inside and x > 0.17 * right and all(abs(x - other) > 0.17 * right for other, _ in ticks):
            ticks.append((x, f"{count:,}"))
    return ticks


def nice_ticks(low: float, high: float, most: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten in [low, high], at most `most` of them plus one."""
    step = 10 ** math.floor(math.log10((high - low) / most))
    step = next(step * factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= most)
    return [round(index * step, 12) for index in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
