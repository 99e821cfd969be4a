"""What the mask files of a data set hold: black and white, class indices, or colours of a class table."""

from __future__ import annotations

import io
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from PIL import Image

from core.classes import IGNORE, MAX_CLASSES, ClassTable, default_palette
from core.console import progress_bar
from core.errors import UserError
from core.pictures import reason_of
from core.store import Store

Colours = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class MaskCoding:
    """How mask files become class indices.

    Attributes:
        kind: "binary" (anything but 0 is class 1), "index" (values are classes, 255 is ignored) or "colour".
        classes: number of classes.
        colours: the RGB colour of each class, for kind "colour".
    """

    kind: str
    classes: int
    colours: Colours = ()

    def decode(self, content: bytes) -> Image.Image:
        """The class indices in a mask file, mode L.

        Raises:
            ValueError: a value or colour that is no class; besides whatever the decoder raises for a damaged file.
        """
        picture = _open(content)
        if self.kind == "colour":
            indices, unknown = _look_up(picture, self.colours)
            if unknown:
                raise ValueError(f"colour {unknown[0]} is not in the class table")
            return Image.fromarray(indices)
        values = _channel(picture)
        if values is None:
            raise ValueError("a colour mask among masks of class indices")
        if self.kind == "binary":
            return Image.fromarray((values != 0).astype(np.uint8))
        if ((values >= self.classes) & (values != IGNORE)).any():
            raise ValueError(f"the mask holds other values than the {self.classes} classes")
        return Image.fromarray(values.astype(np.uint8))


@dataclass(frozen=True)
class MaskFacts:
    """What one pair of files holds.

    Attributes:
        place: where the mask is, for messages.
        side: of the picture when it is square, else 0.
        values: the different values of a mask with one channel, ascending; None for colours.
        bits: whether the mask has one bit a pixel.
        unknown: the first colour that is not in the class table, and its (x, y).
        palette: the colours r, g, b, r, ... of a palette file.
    """

    place: str
    side: int
    values: tuple[int, ...] | None
    bits: bool
    unknown: tuple[tuple[int, ...], tuple[int, int]] | None
    palette: list[int] | None


def examine(store: Store, pairs: list[tuple[str, str]], table: ClassTable | None, *, quiet: bool) -> list[MaskFacts]:
    """Read the mask and the size of the picture of every (image, mask) pair of files.

    A pair that cannot be read is left out here: the preparation meets it again and lists it.

    Raises:
        UserError: sizes that differ within a pair, or not one mask can be read.
    """
    colours = _colours(table)
    found: list[MaskFacts] = []
    reason = ""

    def read(pair: tuple[str, str]) -> MaskFacts | Exception:
        try:
            return _facts(store, pair, colours)
        except UserError:
            raise
        except Exception as error:  # decoders answer damaged files with nearly any exception
            return error

    pool = ThreadPoolExecutor()
    try:
        with warnings.catch_warnings(), progress_bar("masks", quiet=quiet) as bar:
            warnings.simplefilter("ignore")  # remarks on odd palettes and EXIF blocks; bombs come up in preparation
            task = bar.add_task("examine", total=len(pairs))
            for (_, mask), facts in zip(pairs, pool.map(read, pairs), strict=True):
                bar.advance(task)
                if isinstance(facts, MaskFacts):
                    found.append(facts)
                else:
                    reason = reason or f"{store.place(mask)}: {reason_of(facts)}"
    finally:
        pool.shutdown(cancel_futures=True)
    if not found:
        raise UserError(f"not one pair can be read ({reason}): fetch the data again")
    return found


def _facts(store: Store, pair: tuple[str, str], colours: Colours) -> MaskFacts:
    image, mask = pair
    with Image.open(io.BytesIO(store.read(image))) as picture:
        size = picture.size
    opened = _open(store.read(mask))
    if opened.size != size:
        raise UserError(
            f"{store.place(image)} is {size[0]}x{size[1]} but its mask {mask} is {opened.width}x{opened.height}: "
            "make them the same size"
        )
    values = _channel(opened)
    return MaskFacts(
        place=store.place(mask),
        side=size[0] if size[0] == size[1] else 0,
        values=None if values is None else tuple(_different(values)),
        bits=opened.mode == "1",
        unknown=_look_up(opened, colours)[1] if values is None and colours else None,
        palette=opened.getpalette() if opened.mode == "P" else None,
    )


def coding_of(facts: list[MaskFacts], table: ClassTable | None) -> tuple[MaskCoding, ClassTable]:
    """What all masks of a data set together mean, and the names and colours of the classes.

    Masks of one bit a pixel, or of 0 and 255 and nothing else in all files, are binary. Names that no table gives are
    background and foreground, or class_0, class_1, ...; colours come from the first palette file if no table has them.

    Raises:
        UserError: a value or colour that is in no class table, or a table that does not fit.
    """
    if any(entry.values is None for entry in facts):
        return _colour_coding(facts, table)
    binary = all(entry.bits or set(entry.values or ()) <= {0, 255} for entry in facts)
    if binary:
        if table and len(table.names) != 2:
            raise UserError(
                f"the masks are black and white, which makes two classes, but --classes names {len(table.names)}"
            )
        count = 2
    else:
        count = len(table.names) if table else _largest(facts) + 1
        for entry in facts:
            wrong = next((value for value in entry.values or () if value != IGNORE and not 0 <= value < count), None)
            if wrong is not None:
                raise UserError(
                    f"{entry.place} holds the value {wrong}, but there are {count} classes (0 to {count - 1}; 255 is "
                    "ignored): correct the mask or give all classes in --classes"
                )
    names = table.names if table else ["background", "foreground"] if binary else [f"class_{i}" for i in range(count)]
    colours = table.colours if table and table.colours else _palette(facts, count)
    return MaskCoding("binary" if binary else "index", count), ClassTable(names, colours)


def _colour_coding(facts: list[MaskFacts], table: ClassTable | None) -> tuple[MaskCoding, ClassTable]:
    first = next(entry for entry in facts if entry.values is None)
    if table is None or table.colours is None:
        raise UserError(f"{first.place} is a colour mask: name its colours, --classes TABLE.csv with lines name,r,g,b")
    other = next((entry for entry in facts if entry.values is not None), None)
    if other:
        raise UserError(f"{first.place} is a colour mask and {other.place} is none: make all masks of one kind")
    for entry in facts:
        if entry.unknown:
            colour, (x, y) = entry.unknown
            raise UserError(
                f"{entry.place} has the colour {','.join(map(str, colour))} at x={x}, y={y}, which is not in the class "
                "table: add it to --classes or correct the mask"
            )
    return MaskCoding("colour", len(table.names), _colours(table)), table


def _largest(facts: list[MaskFacts]) -> int:
    """The largest class index of masks without a class table."""
    values = [(value, entry) for entry in facts for value in entry.values or () if value != IGNORE]
    largest, holder = max(values, key=lambda found: found[0])
    if largest >= MAX_CLASSES:
        raise UserError(f"{holder.place} holds the value {largest}: class indices go from 0 to {MAX_CLASSES - 1}")
    return largest


def _palette(facts: list[MaskFacts], count: int) -> list[list[int]]:
    flat = next((entry.palette for entry in facts if entry.palette), [])
    palette = [flat[start : start + 3] for start in range(0, 3 * count, 3)]
    told_apart = len(set(map(tuple, palette))) == count and all(len(colour) == 3 for colour in palette)
    return palette if told_apart else default_palette(count)


def _colours(table: ClassTable | None) -> Colours:
    return tuple(tuple(colour) for colour in table.colours or ()) if table else ()


def _open(content: bytes) -> Image.Image:
    with Image.open(io.BytesIO(content)) as picture:
        picture.load()
        return picture


def _channel(picture: Image.Image) -> np.ndarray | None:
    """The values of a mask with one channel, (H, W) of any integer type, its alpha dropped; None for colours."""
    values = np.asarray(picture)
    if picture.mode in ("LA", "PA"):
        values = values[..., 0]
    if values.ndim != 2:
        return None
    if values.dtype.kind == "f":
        raise ValueError("a mask of fractions holds no class indices")
    return values.astype(np.uint8) if values.dtype == bool else values


def _different(values: np.ndarray) -> list[int]:
    # Counting is many times faster than sorting, which is what np.unique does.
    small = values.dtype in (np.uint8, np.uint16)
    return [int(value) for value in (np.flatnonzero(np.bincount(values.ravel())) if small else np.unique(values))]


def _look_up(
    picture: Image.Image, colours: Colours
) -> tuple[np.ndarray, tuple[tuple[int, ...], tuple[int, int]] | None]:
    """Class indices uint8 (H, W), and the first colour that is not in the table with its (x, y)."""
    weights = np.array((1 << 16, 1 << 8, 1))
    pixels = np.asarray(picture.convert("RGB")) @ weights
    codes = np.array(colours) @ weights
    order = np.argsort(codes)
    indices = order[np.minimum(np.searchsorted(codes, pixels, sorter=order), len(codes) - 1)]
    wrong = np.argwhere(codes[indices] != pixels)
    if not len(wrong):
        return indices.astype(np.uint8), None
    y, x = (int(value) for value in wrong[0])
    red, green, blue = picture.convert("RGB").getpixel((x, y))  # type: ignore[misc]
    return indices.astype(np.uint8), ((red, green, blue), (x, y))
