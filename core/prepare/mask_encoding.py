"""How the masks of a data set encode classes: black and white, class indices, or the colours of a class table."""

from __future__ import annotations

from collections.abc import Iterable

from core.cli.console import warn
from core.cli.errors import UserError
from core.data.mask_classes import IGNORE, MAX_CLASSES, ClassTable, default_palette
from core.prepare.masks import PALETTE_MODES, SAVE_AS, MaskCoding, MaskFacts, colours_of, with_more

Meanings = dict[tuple[int, ...], int]
PLAUSIBLE = 32  # largest indices below this are accepted without a class table
GREY_LEVEL = 192  # and those from here on are not: no data set has as many classes without a list of their names
BINARY = ["background", "foreground"]
GIVE_VALUES = "--classes TABLE.csv with lines name,value"
GIVE_COLOURS = "--classes TABLE.csv with lines name,r,g,b"
GIVE_THRESHOLD = "--threshold 128 (for two classes, divided at that grey level)"


def coding_of(
    facts: list[MaskFacts], table: ClassTable | None, threshold: int | None = None
) -> tuple[MaskCoding, ClassTable]:
    """How all masks of a data set are decoded, and the names and colours of the classes.

    A threshold makes any masks binary. A class table with values explains those. Else masks with one bit per pixel, or
    with no value but 0 and 255 in any file, are binary; all zeros fit any table. Colour masks, grey ones that have only
    greys of the table's colours, and palette files that have the table's colours in another order, are decoded by
    colour. Without a table, classes are called background and foreground, or class_0, class_1, ..., and have the
    colours of the first palette file, if there is one. Masks that hold one class in all are worth a warning.

    Raises:
        UserError: a value or colour that is not in the class table, a table that does not fit, palettes that differ,
            or values without a table that are unlikely to be class indices.
    """
    if threshold is not None:
        coding, table = _threshold_coding(table, threshold)
    elif table and table.by_value:
        coding, table = _value_coding(facts, table)
    elif _by_colour(facts, table):
        coding, table = _colour_coding(facts, table)
    else:
        coding, table = _index_coding(facts, table)
    meant = _meant(coding)
    present = {found for entry in facts for found in _classes_in(entry, coding, meant)} - {IGNORE}
    if len(present) < 2:
        only = f"the class {table.names[present.pop()]!r} alone" if present else "no class, but ignored pixels alone"
        warn(f"all masks hold {only}, so there is nothing to learn: see that they are the right files")
    return coding, table


def _classes_in(entry: MaskFacts, coding: MaskCoding, meant: Meanings) -> Iterable[int]:
    """The classes in a mask, and `IGNORE` if that occurs."""
    values = entry.values or ()
    if coding.kind == "colour" and (entry.coloured or entry.palette):
        return entry.found if entry.coloured else (meant[entry.palette[value]] for value in values)
    if meant:
        return (meant[grey, grey, grey] for grey in entry.greys)
    return values if coding.kind == "index" else (int(value >= coding.threshold) for value in values)


def _threshold_coding(table: ClassTable | None, threshold: int) -> tuple[MaskCoding, ClassTable]:
    if table and len(table.names) > 2:
        raise UserError(f"--threshold makes two classes, but --classes names {len(table.names)}")
    names, colours = (table.names, table.palette) if table else (BINARY, None)
    return MaskCoding("threshold", 2, threshold=threshold), ClassTable(names, colours or default_palette(2))


def _index_coding(facts: list[MaskFacts], table: ClassTable | None) -> tuple[MaskCoding, ClassTable]:
    """Of masks with one channel, or three equal ones, whose values no table explains."""
    distinct = {value for entry in facts for value in entry.values or ()}
    binary = all(entry.mode == "1" or set(entry.values or ()) <= {0, 255} for entry in facts)
    if table and len(table.names) > 2 and binary:
        if any(entry.mode == "1" for entry in facts) or distinct != {0}:
            raise UserError(
                f"the masks are black and white, which makes two classes, but --classes names {len(table.names)}"
            )
        binary = False
    count = 2
    if not binary:
        count = len(table.names) if table else _largest(facts, distinct) + 1
        for entry in facts:
            wrong = next((value for value in entry.values or () if value != IGNORE and not 0 <= value < count), None)
            if wrong is not None:
                _refuse_impossible(wrong, entry)
                raise UserError(
                    f"{entry.place} holds the value {wrong}, but there are {count} classes (0 to {count - 1}; 255 is "
                    f"ignored): correct the mask, give {GIVE_THRESHOLD}, or list all values, {GIVE_VALUES}"
                )
        white = [entry.place for entry in facts if entry.values == (0, IGNORE)]
        if white:
            warn(
                f"{with_more(white)} holds 0 and 255 alone, but other masks hold class indices, so 255 is ignored: "
                f"if it is a class, list the values, {GIVE_VALUES}"
            )
    names = table.names if table else BINARY if binary else [f"class_{i}" for i in range(count)]
    colours = table.colours if table and table.colours else _palette(facts, count)
    return MaskCoding("binary" if binary else "index", count), ClassTable(names, colours)


def _value_coding(facts: list[MaskFacts], table: ClassTable) -> tuple[MaskCoding, ClassTable]:
    """Of masks with one channel, or three equal ones, by the values in a table; 255 is ignored unless it is a class."""
    white = (IGNORE,) * 3
    ignored = table.ignored if white in _meant(table) else (*table.ignored, white)
    coding = MaskCoding("value", len(table.names), colours_of(table), ignored)
    known = _meant(coding)
    for entry in facts:
        if entry.values is None:
            raise UserError(f"{entry.place} is a colour mask: name its colours, {GIVE_COLOURS}")
        strange = next((value for value in entry.greys if (value,) * 3 not in known), None)
        if strange is not None:
            _refuse_impossible(strange, entry)
            raise UserError(
                f"{entry.place} holds the value {strange}, which is not in the class table: add it to --classes, as "
                f"ignore,{strange} if it is no class, or correct the mask{_blurred(entry)}"
            )
    return coding, ClassTable(table.names, default_palette(len(table.names)))


def _by_colour(facts: list[MaskFacts], table: ClassTable | None) -> bool:
    """Whether the class of a pixel depends on its colour rather than its value; a UserError if nothing tells."""
    if any(entry.values is None for entry in facts):
        return True
    has_colours = table is not None and table.colours is not None
    # Greys: colours if the table has all of them, else indices, perhaps stored three times.
    meant = _meant(table) if table else {}
    if has_colours and all(_has_greys_of(entry, meant) for entry in facts):
        return True
    first: dict[int, tuple[tuple[int, ...], MaskFacts]] = {}
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
                    f"{entry.place}: name the colours, {GIVE_COLOURS}, or give {GIVE_THRESHOLD}"
                )
    return False


def _has_greys_of(entry: MaskFacts, meant: Meanings) -> bool:
    """Whether a mask is grey, without palette, and has no greys but those of a class table."""
    return entry.values is not None and entry.mode not in PALETTE_MODES and all((v, v, v) in meant for v in entry.greys)


def _colour_coding(facts: list[MaskFacts], table: ClassTable | None) -> tuple[MaskCoding, ClassTable]:
    first = next((entry for entry in facts if entry.values is None), facts[0])
    if table is None or table.colours is None:
        raise UserError(f"{first.place} is a colour mask: name its colours, {GIVE_COLOURS}, or give {GIVE_THRESHOLD}")
    meant = _meant(table)
    other = next(
        (entry for entry in facts if not (entry.coloured or entry.palette or _has_greys_of(entry, meant))), None
    )
    if other:
        first = next(entry for entry in facts if entry.coloured or entry.palette)
        raise UserError(f"{first.place} is a colour mask and {other.place} is none: make all masks of one kind")
    for entry in facts:
        trouble = ""
        if entry.coloured and entry.unknown:
            colour, (x, y) = entry.unknown
            trouble = f"{_written(colour)} at x={x}, y={y}"
        elif entry.palette:
            strange = [value for value in entry.values or () if entry.palette[value] not in meant]
            trouble = f"{_written(entry.palette[strange[0]])} (value {strange[0]})" if strange else ""
        if trouble:
            raise UserError(
                f"{entry.place} has the colour {trouble}, which is not in the class table: add it to --classes, as "
                f"ignore,r,g,b if it is no class, or correct the mask{_blurred(entry)}"
            )
    return MaskCoding("colour", len(table.names), colours_of(table), table.ignored), table


def _meant(table: ClassTable | MaskCoding) -> Meanings:
    """The mask value of each colour."""
    colours = (tuple(colour) for colour in table.colours or ())
    return {colour: index for index, colour in enumerate(colours)} | dict.fromkeys(table.ignored, IGNORE)


def _blurred(entry: MaskFacts) -> str:
    """The way out for a mask with blurred values."""
    return f" (JPEG blurs masks: save them as PNG, or give {GIVE_THRESHOLD})" if entry.lossy else ""


def _refuse_impossible(value: int, entry: MaskFacts) -> None:
    if not 0 <= value < MAX_CLASSES:
        raise UserError(
            f"{entry.place} holds the value {value}: class indices go from 0 to {MAX_CLASSES - 1}, {SAVE_AS}, or give "
            f"{GIVE_THRESHOLD}"
        )


def _largest(facts: list[MaskFacts], distinct: set[int]) -> int:
    """The largest class index of masks without a class table."""
    lossy = next((entry for entry in facts if entry.lossy), None)
    if lossy:
        raise UserError(
            f"{lossy.place} is a JPEG, which blurs class indices: save the masks as PNG, or give {GIVE_THRESHOLD}"
        )
    values = [(value, entry) for entry in facts for value in entry.values or () if value != IGNORE]
    largest, holder = max(values, key=lambda found: found[0])
    _refuse_impossible(largest, holder)
    if largest >= PLAUSIBLE and (largest > 2 * len(distinct) or largest >= GREY_LEVEL):
        raise UserError(
            f"{holder.place} holds the value {largest}, and all masks together {len(distinct)} different ones: grey "
            "levels rather than class indices, as in black-and-white masks that were scaled. Give "
            f"{GIVE_THRESHOLD}, or list the values, {GIVE_VALUES}"
        )
    return largest


def _palette(facts: list[MaskFacts], count: int) -> list[list[int]]:
    first = next((entry.palette for entry in facts if entry.palette), ())[:count]
    return [list(colour) for colour in first] if len(set(first)) == count else default_palette(count)


def _written(colour: Iterable[int]) -> str:
    return ",".join(map(str, colour))
