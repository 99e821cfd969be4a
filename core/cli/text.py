"""Names and shares as messages show them."""

from __future__ import annotations

import os
import re

SHOWN_NAMES = 5


def listed(names: list[str]) -> str:
    """The first five names and the number of the others: `a, b, c, d, e and 7 more`."""
    more = f" and {len(names) - SHOWN_NAMES:,} more" if len(names) > SHOWN_NAMES else ""
    return ", ".join(names[:SHOWN_NAMES]) + more


def shown(name: str, most: int = 100) -> str:
    """A file name fit for a terminal: control characters escaped, cut to `most` characters."""
    text = name if name.isprintable() else ascii(name)
    return text if len(text) <= most else text[: most - 3] + "..."


def percent(share: float) -> str:
    """A share as text with two significant digits, "<0.01%" below that, and 100% only for all."""
    if 0 < share < 1e-4:
        return "<0.01%"
    if share >= 0.995 and share < 1:
        return f"{min(99.99, float(f'{100 * share:.4g}')):g}%"
    return f"{100 * share:.0f}%" if abs(share) >= 0.0995 or share == 0 else f"{100 * share:.2g}%"


def from_here(text: str) -> str:
    """`text` with the paths in it that lie in the current folder written from there."""
    try:
        here = os.getcwd() + os.sep  # noqa: PTH109 (Path would normalise it)
    except FileNotFoundError:  # the folder was deleted
        return text
    return re.sub(rf"(?<![^\s'\"`(=]){re.escape(here)}(?=\S)", "", text) if len(here) > 1 else text
