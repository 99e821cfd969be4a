"""The classes of a mask: names, colours, and left-right pairs."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from core.cli.errors import UserError
from core.cli.text import shown

IGNORE = 255  # the mask value of pixels that are used neither in training nor in evaluation
MAX_CLASSES = 255  # as many as a uint8 mask can hold besides IGNORE
IGNORE_NAME = "ignore"  # marks a colour in a class table that is no class
TABLE_LIMIT = 1 << 20  # bytes; a table of 255 classes has a few thousand
LINES = "`name`, `name,value` or `name,r,g,b`"  # of a class table

OPPOSITE = {"l": "r", "r": "l", "left": "right", "right": "left"}

# Found by a search over all colours that are neither pale nor dim. The smallest difference (CIEDE2000) between two of
# them, or one and white, is 20 among the first eight and 9 among all, for normal vision as for protanopia and
# deuteranopia as Machado et al. (2009) simulate them; for normal vision it is 17 among all. tests/test_palette.py
# computes these numbers.
DISTINCT = (
    (24, 26, 32),
    (240, 105, 0),
    (0, 120, 210),
    (0, 195, 150),
    (90, 75, 0),
    (255, 240, 15),
    (165, 60, 105),
    (240, 180, 255),
    (15, 180, 195),
    (105, 0, 255),
    (180, 255, 180),
    (150, 150, 255),
    (60, 75, 135),
    (45, 120, 75),
    (240, 180, 45),
    (240, 90, 165),
    (195, 195, 120),
    (195, 0, 45),
    (105, 165, 75),
)

# In the official order. "l_" is the person's left; "ear_r" is an earring, "neck_l" a necklace, "l_lip" the lower lip.
# The largest parts have the most distinct colours.
CELEBAMASK_HQ: dict[str, tuple[int, int, int]] = {
    "background": DISTINCT[0],
    "skin": DISTINCT[1],
    "nose": DISTINCT[5],
    "eye_g": DISTINCT[8],
    "l_eye": DISTINCT[7],
    "r_eye": DISTINCT[10],
    "l_brow": DISTINCT[4],
    "r_brow": DISTINCT[9],
    "l_ear": DISTINCT[16],
    "r_ear": DISTINCT[18],
    "mouth": DISTINCT[17],
    "u_lip": DISTINCT[15],
    "l_lip": DISTINCT[12],
    "hair": DISTINCT[2],
    "hat": DISTINCT[13],
    "ear_r": DISTINCT[14],
    "neck_l": DISTINCT[11],
    "neck": DISTINCT[6],
    "cloth": DISTINCT[3],
}


@dataclass(frozen=True)
class ClassTable:
    """Class names in the order of their indices, and what stands for them in masks.

    Attributes:
        names: of the classes.
        colours: the RGB colour of each class, if given; with `by_value`, each is a grey of that value.
        ignored: the colours that become `IGNORE`.
        by_value: whether the table gives mask values instead of colours.
    """

    names: list[str]
    colours: list[list[int]] | None = None
    ignored: tuple[tuple[int, ...], ...] = ()
    by_value: bool = False

    @property
    def palette(self) -> list[list[int]] | None:
        """Colours to show the classes in, if the table gives any."""
        return None if self.by_value else self.colours


def mirrored_classes(classes: Sequence[str]) -> list[int]:
    """For each class index, its index after the picture is flipped horizontally.

    Swaps `l_x` and `r_x`, `left_x` and `right_x`, `left-x` and `right-x` if both exist. Suffixes do not count: in
    CelebAMask-HQ, "ear_r" is an earring.
    """
    index = {name: number for number, name in enumerate(classes)}
    return [index.get(_mirrored(name), number) for number, name in enumerate(classes)]


def _mirrored(name: str) -> str:
    for separator in ("_", "-"):
        side, found, part = name.partition(separator)
        if found and side in OPPOSITE:
            return f"{OPPOSITE[side]}{separator}{part}"
    return name


@cache
def _spread_colours() -> np.ndarray:
    """int64 (255, 3): `DISTINCT`, then always the one farthest from all before."""
    levels = np.linspace(0, 255, 9).round()
    grid = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(-1, 3)
    weights = np.array((2.0, 4.0, 1.0))  # human eyes distinguish greens best and blues worst
    chosen = [np.array(colour, dtype=float) for colour in DISTINCT]
    nearest = np.min([((grid - colour) ** 2) @ weights for colour in chosen], axis=0)
    while len(chosen) < MAX_CLASSES:
        chosen.append(grid[int(np.argmax(nearest))])
        nearest = np.minimum(nearest, ((grid - chosen[-1]) ** 2) @ weights)
    return np.stack(chosen).astype(np.int64)


def default_palette(count: int) -> list[list[int]]:
    """The first `count` (1 to 255) of a fixed sequence of distinct RGB colours, 0..255, that begins with near-black."""
    if not 1 <= count <= MAX_CLASSES:
        raise ValueError(f"a palette of {count} colours: 1 to {MAX_CLASSES} are possible")
    return [list(map(int, colour)) for colour in _spread_colours()[:count]]


def are_classes(names: Any, palette: Any) -> bool:
    """Whether these are lists of names and of RGB colours (0..255), which a stranger's file need not hold."""
    return (
        isinstance(names, list)
        and all(isinstance(name, str) for name in names)
        and isinstance(palette, list)
        and all(isinstance(colour, list) and len(colour) == 3 for colour in palette)
        and all(isinstance(value, int) and 0 <= value < 256 for colour in palette for value in colour)
    )


def read_classes(text: str) -> ClassTable:
    """The class table that `--classes` gives: a file, `celebamask-hq`, or names separated by commas.

    A file has one class per line, in the order of the indices: `name`, `name,value` or `name,r,g,b` with 0..255; blank
    lines and comments after `#` are skipped. Pixels with the value or colour of a line `ignore,...` become `IGNORE`.

    Raises:
        UserError: there is no such file, or it is not a class table.
    """
    if text.lower() == "celebamask-hq":
        return ClassTable(list(CELEBAMASK_HQ), [list(colour) for colour in CELEBAMASK_HQ.values()])
    path = Path(text)
    with contextlib.suppress(OSError):  # names too long for a file name
        if path.is_file():
            return _from_file(path)
    if path.suffix.lower() in (".txt", ".csv") or "/" in text or "," not in text:
        raise UserError(
            f"no class table at {shown(text)}: give a text file, names as in --classes membrane,cell, or a preset"
        )
    return _checked(ClassTable([name.strip() for name in text.split(",")]), "--classes")


def _from_file(path: Path) -> ClassTable:
    try:
        if path.stat().st_size > TABLE_LIMIT:
            raise UserError(f"{path} is too large for a class table: one line a class, {LINES}")
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the class table {path}: {error}") from error
    names: list[str] = []
    colours: list[list[int]] = []
    ignored: list[tuple[int, ...]] = []
    lengths = set()
    for number, line in enumerate(lines, start=1):
        words = [word.strip() for word in line.partition("#")[0].split(",")]
        if words in ([""], ["name", "value"], ["name", "r", "g", "b"]):
            continue
        if len(words) not in (1, 2, 4) or not all(word.isdecimal() and int(word) < 256 for word in words[1:]):
            raise UserError(f"{path} line {number}: expected {LINES} of 0..255, found {line[:60]!r}")
        colour = [int(word) for word in words[1:]] * (3 if len(words) == 2 else 1)
        lengths.add(len(words))
        if colour and words[0] == IGNORE_NAME:
            ignored.append(tuple(colour))
            continue
        names.append(words[0])
        if colour:
            colours.append(colour)
    if (colours or ignored) and len(colours) != len(names):
        what = "values" if 2 in lengths else "colours"
        raise UserError(f"{path} gives {what} to {len(colours)} of its {len(names)} classes: give all of them or none")
    if {2, 4} <= lengths:
        raise UserError(f"{path} has lines with values and lines with colours: write all in one way, {LINES}")
    return _checked(ClassTable(names, colours or None, tuple(ignored), by_value=2 in lengths), str(path))


def _checked(table: ClassTable, place: str) -> ClassTable:
    names = table.names
    if not 2 <= len(names) <= MAX_CLASSES:
        raise UserError(f"{place} names {len(names)} classes: 2 to {MAX_CLASSES} are possible")
    odd = next((name for name in names if not name or not name.isprintable()), None)
    if odd is not None:
        raise UserError(f"{place} has a class without a printable name ({shown(odd)!r}): name every class")
    for entries in (names, [*map(tuple, table.colours or ()), *table.ignored]):
        twice = next((entry for number, entry in enumerate(entries) if entry in entries[:number]), None)
        if twice is not None:
            raise UserError(
                f"{place} has {shown(str(twice))} twice: every class needs a name and a value or colour of its own"
            )
    return table
