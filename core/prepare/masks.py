"""Reading mask files: what each one holds, and how it is decoded to class indices."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from core.cli.console import progress_bar, warn
from core.cli.errors import UserError
from core.data.bounds import bounded_pictures, open_picture
from core.data.decode import reason_of
from core.data.mask_classes import IGNORE, ClassTable
from core.prepare.store import Store, one_line

Colours = tuple[tuple[int, ...], ...]
Unknown = tuple[tuple[int, ...], tuple[int, int]]  # a colour that is not in the class table, and its (x, y)
ROWS = 64  # rows of a colour mask looked up at a time, which bounds the memory
ORIENTATION = 0x0112  # the EXIF tag; 0 and 1 mean upright
PALETTE_MODES = ("P", "PA")
SAVE_AS = "save the masks as 8-bit PNG of class indices, 255 where a pixel is to be ignored"


@dataclass(frozen=True)
class MaskCoding:
    """How mask files are decoded to class indices.

    Attributes:
        kind: "binary" (anything but 0 is class 1), "threshold", "index" (values are classes, 255 is ignored), "value"
            (a class table lists the values) or "colour".
        classes: number of classes.
        colours, ignored: for the kinds "colour" and "value", the RGB colour, or the grey of the value, of each class,
            and those that become `IGNORE`.
        threshold: for kind "threshold", the least grey level of class 1.
    """

    kind: str
    classes: int
    colours: Colours = ()
    ignored: Colours = ()
    threshold: int = 1

    def decode(self, content: bytes) -> Image.Image:
        """The class indices in a mask file, mode L.

        Raises:
            ValueError: a value or colour that is no class. For a damaged file, whatever the decoder raises.
        """
        with open_picture(io.BytesIO(content)) as picture:
            picture.load()
        if self.kind == "threshold":
            return Image.fromarray((_grey_levels(picture) >= self.threshold).astype(np.uint8))
        if self.kind == "colour":
            return self._looked_up(picture)
        values = _channel(picture)
        if values is None:
            raise ValueError("a colour mask among masks of class indices")
        if self.kind == "value":
            if values.min() < 0 or values.max() > 255:
                raise ValueError("the mask holds values that are not in the class table")
            return self._looked_up(picture if picture.mode == "1" else Image.fromarray(values.astype(np.uint8)))
        if self.kind == "binary":
            return Image.fromarray((values != 0).astype(np.uint8))
        if (((values < 0) | (values >= self.classes)) & (values != IGNORE)).any():
            raise ValueError(f"the mask holds other values than the {self.classes} classes")
        return Image.fromarray(values.astype(np.uint8))

    def _looked_up(self, picture: Image.Image) -> Image.Image:
        indices, unknown = _look_up(picture, self.colours, self.ignored)
        if unknown:
            raise ValueError(f"colour {unknown[0]} is not in the class table")
        return Image.fromarray(indices)


@dataclass(frozen=True)
class MaskFacts:
    """What one pair of files holds."""

    place: str  # of the mask, for messages
    side: int  # of a square picture, else 0
    turned: str  # the place of a picture with an EXIF rotation (which is never applied), else empty
    mode: str  # Pillow's
    values: tuple[int, ...] | None  # of a mask with one channel or grey throughout, ascending; None for colours
    lossy: bool  # a JPEG
    unknown: Unknown | None  # in a mask with three channels
    found: tuple[int, ...]  # classes and `IGNORE` by the table's colours, in a mask with three channels
    palette: Colours  # of a palette file whose values have different colours; shared between equal palettes
    hidden: bool  # one colour throughout, under an alpha channel that varies

    @property
    def coloured(self) -> bool:
        """Three channels."""
        return self.mode not in ("1", "L", "LA", *PALETTE_MODES) and not self.mode.startswith("I")

    @property
    def greys(self) -> tuple[int, ...]:
        """The values that occur, where one bit per pixel means black and white; none for colours."""
        values = self.values or ()
        return tuple(255 * value for value in values) if self.mode == "1" else values

    def shades(self) -> dict[int, tuple[int, ...]]:
        """The palette's colour of each value that occurs, except `IGNORE`."""
        shown = [value for value in self.values or () if value != IGNORE] if self.palette else []
        return {value: self.palette[value] for value in shown}


def examine(
    store: Store,
    pairs: list[tuple[str, str]],
    table: ClassTable | None,
    threshold: int | None = None,
    *,
    workers: int = 1,
    quiet: bool = False,
) -> list[MaskFacts]:
    """Read the mask and the picture's header of each (image, mask) pair, in `workers` threads.

    Pairs that cannot be read are left out; the preparation will report them. With a threshold, the values are grey
    levels, whatever the mode of a mask.

    Raises:
        UserError: different sizes within a pair, several pictures in a file, floating-point masks, or no readable pair.
    """
    palettes: dict[Colours, Colours] = {}
    found: list[MaskFacts] = []
    reason = ""

    def read(pair: tuple[str, str]) -> MaskFacts | Exception:
        try:
            return _facts(store, pair, table, threshold, palettes)
        except UserError:
            raise
        except Exception as error:  # decoders raise nearly any exception for damaged files
            return error

    pool = ThreadPoolExecutor(workers)
    try:
        with bounded_pictures(), progress_bar("masks", quiet=quiet) as bar:
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
    if turned := [entry.turned for entry in found if entry.turned]:
        warn(
            f"{with_more(turned)} has an EXIF rotation, which is not applied: see that its mask fits the stored pixels"
        )
    if hidden := [entry.place for entry in found if entry.hidden]:
        warn(
            f"{with_more(hidden)} has one colour throughout and a shape in its alpha channel, which is not read: if "
            "that is the mask, save the alpha channel as a grey PNG in its place"
        )
    return found


def with_more(places: list[str]) -> str:
    """The first of some places, and how many others there are."""
    return places[0] + (f" (and {len(places) - 1:,} more)" if len(places) > 1 else "")


def _facts(
    store: Store,
    pair: tuple[str, str],
    table: ClassTable | None,
    threshold: int | None,
    palettes: dict[Colours, Colours],
) -> MaskFacts:
    image, mask = pair
    with store.open(image) as handle, Image.open(handle) as picture:
        size = picture.size
        turned = _is_turned(picture)
        _refuse_several(picture, store.place(image))
    with store.open(mask) as handle, open_picture(handle) as opened:
        _refuse_several(opened, store.place(mask))
        opened.load()
    if opened.size != size:
        raise UserError(
            f"{store.place(image)} is {size[0]}x{size[1]} but its mask {one_line(mask)} is "
            f"{opened.width}x{opened.height}: make them the same size"
            + (" (an EXIF rotation of the picture is not applied)" if turned else "")
        )
    if opened.mode == "F":
        raise UserError(f"{store.place(mask)} holds floating-point numbers: {SAVE_AS}")
    channel = _channel(opened) if threshold is None else _grey_levels(opened)
    values = None if channel is None else _distinct(channel)
    palette = _palette_of(opened, values or ())
    facts = MaskFacts(
        place=store.place(mask),
        side=size[0] if size[0] == size[1] else 0,
        turned=store.place(image) if turned else "",
        mode=opened.mode,
        values=values,
        lossy=opened.format in ("JPEG", "MPO"),
        unknown=None,
        found=(),
        palette=palettes.setdefault(palette, palette),
        hidden=_is_hidden(opened),
    )
    if threshold is not None or not (facts.coloured and table and table.colours):
        return facts
    indices, unknown = _look_up(opened, colours_of(table), table.ignored)
    return replace(facts, unknown=unknown, found=() if unknown else _distinct(indices))


def _is_hidden(mask: Image.Image) -> bool:
    if mask.mode not in ("LA", "PA", "RGBA"):
        return False
    pixels = np.asarray(mask)
    varies = (pixels != pixels[0, 0]).any((0, 1))
    return bool(varies[-1] and not varies[:-1].any())


def _is_turned(picture: Image.Image) -> bool:
    # "exif" is checked first because getexif() decodes a whole PNG. Pillow itself rotates TIFF.
    return "exif" in picture.info and picture.getexif().get(ORIENTATION, 1) not in (0, 1)


def _refuse_several(picture: Image.Image, place: str) -> None:
    count = getattr(picture, "n_frames", 1)
    if count > 1 and picture.format != "MPO":  # where cameras append previews
        raise UserError(f"{place} holds {count} pictures: save each in a file of its own")


def _palette_of(picture: Image.Image, values: tuple[int, ...]) -> Colours:
    """The 256 colours of a palette file; none if two values that occur have the same, as in an empty palette."""
    if picture.mode not in PALETTE_MODES:
        return ()
    flat = picture.getpalette() or []
    flat += [0] * (3 * 256 - len(flat))
    colours = tuple(zip(flat[::3], flat[1::3], flat[2::3], strict=True))
    shown = [colours[value] for value in values if value != IGNORE]
    return colours if len(set(shown)) == len(shown) else ()


def colours_of(table: ClassTable | None) -> Colours:
    """The colours of a class table as tuples; empty without table or colours."""
    return tuple(tuple(colour) for colour in table.colours or ()) if table else ()


def _channel(picture: Image.Image) -> np.ndarray | None:
    """The values of a mask with one channel or three equal ones, (H, W) of any integer type; None for colours."""
    values = np.asarray(picture)
    if picture.mode in ("LA", "PA"):
        values = values[..., 0]
    if picture.mode in ("RGB", "RGBA") and not (values[..., :2] != values[..., 1:3]).any():
        values = values[..., 0]
    if values.ndim != 2:
        return None
    if values.dtype.kind == "f":
        raise ValueError("a mask of fractions holds no class indices")
    return values.astype(np.uint8) if values.dtype == bool else values


def _grey_levels(picture: Image.Image) -> np.ndarray:
    """The grey levels of any mask, (H, W) of an integer type: colours and palettes count as bright as they look."""
    return np.asarray(picture if picture.mode.startswith("I") else picture.convert("L"))


def _distinct(values: np.ndarray) -> tuple[int, ...]:
    """As np.unique, which would sort: counting is many times faster."""
    small = values.dtype in (np.uint8, np.uint16)
    return tuple((np.flatnonzero(np.bincount(values.ravel())) if small else np.unique(values)).tolist())


def _look_up(picture: Image.Image, colours: Colours, ignored: Colours) -> tuple[np.ndarray, Unknown | None]:
    """Class indices uint8 (H, W), and the first colour that is not in the table, where the lookup stops."""
    pixels = np.asarray(picture.convert("RGB"))
    codes = _codes(np.array((*colours, *ignored), np.uint8))
    labels = np.array([*range(len(colours)), *[IGNORE] * len(ignored)], np.uint8)
    order = np.argsort(codes)
    codes, labels = codes[order], labels[order]
    indices = np.empty(pixels.shape[:2], np.uint8)
    for top in range(0, len(pixels), ROWS):
        wanted = _codes(pixels[top : top + ROWS])
        found = np.minimum(np.searchsorted(codes, wanted), len(codes) - 1)
        indices[top : top + ROWS] = labels[found]
        wrong = np.argwhere(codes[found] != wanted)
        if len(wrong):
            y, x = top + int(wrong[0, 0]), int(wrong[0, 1])
            return indices, (tuple(int(value) for value in pixels[y, x]), (x, y))
    return indices, None


def _codes(colours: np.ndarray) -> np.ndarray:
    """RGB colours (..., 3) as single numbers (...), uint32."""
    red, green, blue = (colours[..., channel].astype(np.uint32) for channel in range(3))
    return red << 16 | green << 8 | blue
