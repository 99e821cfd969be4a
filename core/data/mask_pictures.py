"""Masks to look at: tinted over their pictures, outlined and numbered, with a legend. Without torch, as `grids`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from core.cli.text import shown
from core.data.grids import make_grid
from core.data.mask_classes import IGNORE, IGNORE_NAME

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
Palette = Sequence[Sequence[int]]

TINT, BACKGROUND_TINT = 0.6, 0.25  # opacity of class colours; class 0 hides little of the picture
SMALLEST, LARGEST = 256, 512  # sides in pixels between which pictures on a page keep their size
PAGE = 1100  # width and height in pixels that a page of several pictures has at most, if two rows fit into it
GAP, LETTERS = 4, 14  # pixels between pictures, and of letters
WRONG = (255, 230, 0)  # yellow on dark grey: three times as bright, so colour vision does not matter
BAND = 256  # rows that are tinted at once
NEAR = 256  # side in pixels of the reduced mask in which places for numbers are sought
LONGEST_NAME = 28


def overlay(pixels: np.ndarray, mask: np.ndarray, palette: Palette) -> np.ndarray:
    """A picture in grey, tinted with the colours of its classes, which are outlined and numbered.

    A black line runs beside a white one between two classes, so that one of them shows on any picture. Class 0 is
    tinted but lightly, and pixels to be ignored become nearly white.

    Args:
        pixels: uint8 RGB (H, W, 3).
        mask: class indices and `IGNORE`, uint8 (H, W).
        palette: RGB colours (0..255) of the classes.

    Returns:
        uint8 (k * H, k * W, 3): small pictures are enlarged, so that the longer side has at least `SMALLEST` pixels.
    """
    grey, mask = _grey(pixels), _enlarged(mask)
    share = np.full(256, round(TINT * 256), np.uint16)
    share[0] = round(BACKGROUND_TINT * 256)
    tint = (_colours(palette) * share[:, None] >> 8).astype(np.uint8)
    kept = (np.arange(256, dtype=np.uint16) * (256 - share)[:, None] >> 8).astype(np.uint8)  # by class and grey level
    page = np.empty((*mask.shape, 3), np.uint8)
    for top in range(0, len(mask), BAND):  # the indices take 16 bytes a pixel
        band = slice(top, top + BAND)
        page[band] = tint[mask[band]] + kept[mask[band], grey[band]][..., None]
    _outline(page, mask)
    return _numbered(page, mask)


def _outline(page: np.ndarray, mask: np.ndarray) -> None:
    """Black lines above and left of where the class changes, and white ones below and right of there, in place.

    Where a class is so thin that lines on both sides would take half of it, it has none, so that its colour shows.
    """
    thick = -(-max(mask.shape) // PAGE)
    wide = _wide(mask, 4 * thick + 1)
    for black in (True, False):  # white over black, where a class is as narrow as a line
        for step in range(1, thick + 1):
            down, across = mask[step:] != mask[:-step], mask[:, step:] != mask[:, :-step]
            rows, columns = (page[:-step], page[:, :-step]) if black else (page[step:], page[:, step:])
            lined = (wide[:-step], wide[:, :-step]) if black else (wide[step:], wide[:, step:])
            np.copyto(rows, 0 if black else 255, where=(down & lined[0])[..., None])
            np.copyto(columns, 0 if black else 255, where=(across & lined[1])[..., None])


def _wide(mask: np.ndarray, side: int) -> np.ndarray:
    """Which pixels lie in a square of `side` pixels that is all of their class, bool (H, W): the opening of each."""
    from scipy.ndimage import maximum_filter, minimum_filter

    same = minimum_filter(mask, side, mode="nearest") == maximum_filter(mask, side, mode="nearest")
    return np.asarray(maximum_filter(same, side, mode="constant", cval=False))


def errors(pixels: np.ndarray, true: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """A picture in dark grey with its wrong pixels in yellow, and their share; enlarged as `overlay`, uint8.

    Where the true mask is `IGNORE`, nothing is wrong.
    """
    wrong, known = (true != predicted) & (true != IGNORE), int(np.count_nonzero(true != IGNORE))
    dark = (_grey(pixels) * 0.4 + 24).astype(np.uint8)
    page = np.repeat(dark[..., None], 3, axis=2)
    page[_enlarged(wrong)] = WRONG
    picture = Image.fromarray(page)
    text, place = f"{wrong.sum() / max(1, known):.1%} wrong", (4, page.shape[0] - 4)
    draw = ImageDraw.Draw(picture)
    left, top, right, bottom = draw.textbbox(place, text, _font(LETTERS), "ls")
    draw.rectangle((left - 4, top - 3, right + 3, bottom + 3), fill="black")  # white on yellow cannot be read
    _write(picture, text, place, "ls", LETTERS)
    return np.asarray(picture)


def legend(indices: Sequence[int], classes: Sequence[str], palette: Palette, width: int, size: int) -> np.ndarray:
    """Colour, number and name of these classes, in as many lines as they need; uint8 (H, width, 3).

    Args:
        indices: of the classes, or `IGNORE`.
        width: in pixels; longer names are cut off at it.
        size: of the letters, in pixels.
    """
    colours, font, line = _colours(palette), _font(size), round(1.6 * size)
    entries, x, y = [], size // 3, 0
    for index in indices:
        text = IGNORE_NAME if index == IGNORE else f"{index}  {shown(classes[index], LONGEST_NAME)}"
        wide = round(line + font.getlength(text) + size)
        if x + wide > width and x > size // 3:
            x, y = size // 3, y + line
        entries.append((x, y, text, tuple(map(int, colours[index]))))
        x += wide
    page = Image.new("RGB", (width, y + line + size // 3), "white")
    draw = ImageDraw.Draw(page)
    for x, y, text, colour in entries:
        draw.rectangle((x, y + size // 3, x + size, y + size // 3 + size), fill=colour, outline="black")
        draw.text((x + 1.4 * size, y + size / 3), text, fill="black", font=font)
    return np.asarray(page)


def overlay_with_legend(pixels: np.ndarray, mask: np.ndarray, classes: Sequence[str], palette: Palette) -> np.ndarray:
    """`overlay` above the `legend` of the classes that occur; uint8 (k * H + legend, at least k * W, 3)."""
    page = overlay(pixels, mask, palette)
    size = _letters(page)
    below = legend(_present(mask), classes, palette, max(page.shape[1], 12 * size), size)
    right = below.shape[1] - page.shape[1]
    return np.vstack([np.pad(page, ((0, 0), (0, right), (0, 0)), constant_values=255), below])


def room(side: int, columns: int) -> int:
    """How many examples of square pictures of `side` pixels, each as `columns` of them, fit on a page."""
    tile = side * _times(side) // _step(side) + GAP
    return max(1, PAGE // (columns * tile)) * max(2, PAGE // tile)


def comparison_page(
    pictures: np.ndarray, masks: Mapping[str, np.ndarray], classes: Sequence[str], palette: Palette
) -> np.ndarray:
    """A page of examples under headings: each picture, its masks over it, and the errors of the second mask, if any.

    Args:
        pictures: uint8 (N, H, W, 3).
        masks: heading -> uint8 (N, H, W), the true ones first.
        classes, palette: names and RGB colours (0..255) of the classes; below the page are those that occur.

    Returns:
        uint8 (height, width, 3). Small pictures are enlarged, and large ones thinned out, by a whole number.
    """
    step = _step(max(pictures.shape[1:3]))
    pictures = pictures[:, ::step, ::step]
    masks = {name: some[:, ::step, ::step] for name, some in masks.items()}
    tiles = []
    for number, picture in enumerate(pictures):
        here = [some[number] for some in masks.values()]
        tiles += [_enlarged(picture, smooth=True), *(overlay(picture, mask, palette) for mask in here)]
        tiles += [errors(picture, *here)] if len(here) == 2 else []
    headings = ["picture", *masks, *["errors"] * (len(masks) == 2)]
    tile = tiles[0].shape[1] + GAP
    groups = min(len(pictures), max(1, PAGE // (tile * len(headings))))
    grid = make_grid(np.stack(tiles), groups * len(headings), GAP)
    top = Image.new("RGB", (grid.shape[1], LETTERS + 2 * GAP), "white")
    draw = ImageDraw.Draw(top)
    for column, heading in enumerate(groups * headings):
        draw.text((GAP + tile * (column + 0.5), GAP), heading, fill="black", font=_font(LETTERS), anchor="ma")
    present = sorted({index for some in masks.values() for index in _present(some)})
    return np.vstack([np.asarray(top), grid, legend(present, classes, palette, grid.shape[1], LETTERS)])


def _times(side: int) -> int:
    return -(-SMALLEST // side)


def _step(side: int) -> int:
    return -(-side // LARGEST)


def _enlarged(pixels: np.ndarray, smooth: bool = False) -> np.ndarray:
    """A picture, mask or bool array, so that its longer side has at least `SMALLEST` pixels."""
    times = _times(max(pixels.shape[:2]))
    if smooth and times > 1:
        size = pixels.shape[1] * times, pixels.shape[0] * times
        return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))
    return pixels.repeat(times, axis=0).repeat(times, axis=1) if times > 1 else pixels


def _grey(pixels: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(_enlarged(pixels, smooth=True)).convert("L"))


def _colours(palette: Palette) -> np.ndarray:
    """uint16 (256, 3), white for `IGNORE`."""
    colours = np.full((256, 3), 255, np.uint16)
    colours[: len(palette)] = palette
    return colours


def _present(masks: np.ndarray) -> list[int]:
    return np.flatnonzero(np.bincount(masks.reshape(-1), minlength=256)).tolist()


def _letters(page: np.ndarray) -> int:
    """Size of letters on a picture, which a screen may show reduced."""
    return max(LETTERS, max(page.shape[:2]) // 50)


def _numbered(page: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Write the number of each class where most room around it is of that class, if the number fits there."""
    from scipy.ndimage import distance_transform_edt  # takes a fifth of a second

    size = _letters(page)
    step = -(-max(mask.shape) // NEAR)
    small = np.pad(mask[::step, ::step], 1, constant_values=IGNORE)
    picture = Image.fromarray(page)
    for index in _present(mask):
        if index == IGNORE:
            continue
        room = distance_transform_edt(small == index)
        y, x = np.unravel_index(int(room.argmax()), room.shape)
        if room[y, x] * step > 0.5 * size + 3:
            _write(picture, str(index), (int(x - 1) * step, int(y - 1) * step), "mm", size)
    return np.asarray(picture)


def _write(picture: Image.Image, text: str, place: tuple[int, int], anchor: str, size: int) -> None:
    """White letters in a black outline, which show on anything."""
    draw = ImageDraw.Draw(picture)
    draw.text(place, text, "white", _font(size), anchor, stroke_width=max(1, size // 8), stroke_fill="black")


@cache
def _font(size: int) -> Font:
    return ImageFont.load_default(size)
