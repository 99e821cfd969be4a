"""How the masks of a data set encode classes: black and white, class indices, or the colours of a class table."""

from __future__ import annotations

from collections.abc import Iterable

from core.cli.errors import UserError
from core.data.mask_classes import IGNORE, MAX_CLASSES, ClassTable, default_palette
from core.prepare.masks import SAVE_AS, MaskCoding, MaskFacts, colours_of

PLAUSIBLE = 32  # largest indices below this are accepted without a class table


def coding_of(facts: list[MaskFacts], table: ClassTable | None) -> tuple[MaskCoding, ClassTable]:
    """How all masks of a data set are decoded, and the names and colours of the classes.

    Masks with one bit per pixel, or with no value but 0 and 255 in any file, are binary; all zeros fit any table.
    Colour masks, and palette files that have the table's colours in another order, are decoded by colour. Without a
    table, classes are called background and foreground, or class_0, class_1, ..., and have the colours of the first
    palette file, if there is one.

    Raises:
        UserError: a value or colour that is not in the class table, a table that does not fit, palettes that differ,
            or values without a table that are unlikely to be class indices.
    """
    if _by_colour(facts, table):
        return _colour_coding(facts, table)
    distinct = {value for entry in facts for value in entry.values or ()}
    binary = all(entry.bits or set(entry.values or ()) <= {0, 255} for entry in facts)
    if table and len(table.names) > 2 and binary:
        if any(entry.bits for entry in facts) or distinct != {0}:
            raise UserError(
                f"the masks are black and white, which makes two classes, but --classes names {len(table.names)}"
            )
        binary = False
    lossy = next((entry for entry in facts if entry.lossy), None)
    if lossy and table is None:
        raise UserError(f"{lossy.place} is a JPEG, which blurs class indices: save the masks as PNG or give --classes")
    count = 2
    if not binary:
        count = len(table.names) if table else _largest(facts, distinct) + 1
        for entry in facts:
            wrong = next((value for value in entry.values or () if value != IGNORE and not 0 <= value < count), None)
            if wrong is not None:
                _refuse_extreme(wrong, entry)
                raise UserError(
                    f"{entry.place} holds the value {wrong}, but there are {count} classes (0 to {count - 1}; 255 is "
                    "ignored): correct the mask or give all classes in --classes"
                )
    names = table.names if table else ["background", "foreground"] if binary else [f"class_{i}" for i in range(count)]
    colours = table.colours if table and table.colours else _palette(facts, count)
    return MaskCoding("binary" if binary else "index", count), ClassTable(names, colours)


def _by_colour(facts: list[MaskFacts], table: ClassTable | None) -> bool:
    """Whether the class of a pixel depends on its colour rather than its value; a UserError if nothing tells."""
    if any(entry.values is None for entry in facts):
        return True
    has_colours = table is not None and table.colours is not None
    # Grey in three channels: colours if the table has all of these greys, else one channel stored three times.
    if has_colours and all(entry.coloured and not entry.unknown for entry in facts):
        return True
    first: dict[int, tuple[tuple[int, ...], MaskFacts]] = {}
    meant = _meant(table) if table else {}
    for entry in facts:
        for value, colour in entry.shades().items():
            if meant.get(colour, value) != value:
                return True
            expected, holder = first.setdefault(value, (colour, entry))
            if colour != expected:
                if has_colours:
                    return True
                raise UserError(
                    f"value {value} has the colour {_written(expected)} in {holder.place} but {_written(colour)} in "
                    f"{entry.place}: name the colours, --classes TABLE.csv with lines name,r,g,b"
                )
    return False


def _colour_coding(facts: list[MaskFacts], table: ClassTable | None) -> tuple[MaskCoding, ClassTable]:
    first = next((entry for entry in facts if entry.values is None), facts[0])
    if table is None or table.colours is None:
        raise UserError(f"{first.place} is a colour mask: name its colours, --classes TABLE.csv with lines name,r,g,b")
    other = next((entry for entry in facts if not (entry.coloured or entry.palette)), None)
    if other:
        first = next(entry for entry in facts if entry.coloured or entry.palette)
        raise UserError(f"{first.place} is a colour mask and {other.place} is none: make all masks of one kind")
    meant = _meant(table)
    for entry in facts:
        trouble = ""
        if entry.coloured and entry.unknown:
            colour, (x, y) = entry.unknown
            trouble = f"{_written(colour)} at x={x}, y={y}"
        elif not entry.coloured:
            strange = [value for value in entry.values or () if entry.palette[value] not in meant]
            trouble = f"{_written(entry.palette[strange[0]])} (value {strange[0]})" if strange else ""
        if trouble:
            raise UserError(
                f"{entry.place} has the colour {trouble}, which is not in the class table: add it to --classes, as "
                "ignore,r,g,b if it is no class, or correct the mask"
            )
    return MaskCoding("colour", len(table.names), colours_of(table), table.ignored), table


def _meant(table: ClassTable) -> dict[tuple[int, ...], int]:
    """The mask value of each colour in a table."""
    return {colour: index for index, colour in enumerate(colours_of(table))} | dict.fromkeys(table.ignored, IGNORE)


def _refuse_extreme(value: int, entry: MaskFacts) -> None:
    if not 0 <= value < MAX_CLASSES:
        raise UserError(
            f"{entry.place} holds the value {value}: class indices go from 0 to {MAX_CLASSES - 1}, {SAVE_AS}"
        )


def _largest(facts: list[MaskFacts], distinct: set[int]) -> int:
    """The largest class index of masks without a class table."""
    values = [(value, entry) for entry in facts for value in entry.values or () if value != IGNORE]
    largest, holder = max(values, key=lambda found: found[0])
    _refuse_extreme(largest, holder)
    if largest >= PLAUSIBLE and largest > 2 * len(distinct):
        raise UserError(
            f"{holder.place} holds the value {largest}, but all masks together only {len(distinct)} different ones, "
            "so they are hardly class indices: save the masks as PNG of class indices or give --classes"
        )
    return largest


def _palette(facts: list[MaskFacts], count: int) -> list[list[int]]:
    first = next((entry.palette for entry in facts if entry.palette), ())[:count]
    return [list(colour) for colour in first] if len(set(first)) == count else default_palette(count)


def _written(colour: Iterable[int]) -> str:
    return ",".join(map(str, colour))
