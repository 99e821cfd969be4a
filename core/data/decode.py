"""Decoding an image file to RGB, the same way for prepared data and for prediction."""

from __future__ import annotations

from typing import IO

import numpy as np
from PIL import Image, UnidentifiedImageError

from core.data.bounds import open_picture, too_large

DEEP = 65_535  # the largest value of 16 bits
LARGEST = "largest"  # the key of a decoded picture's `info` for the largest of its values before they became 8 bits


def decode(handle: IO[bytes], value_range: int | None = None) -> Image.Image:
    """Decode one file to 8-bit RGB as torchvision's loaders do: no EXIF rotation, alpha dropped, first frame only.

    Only 16-bit grey differs: it is scaled to 8 bits, where Pillow's own conversion would clip everything above 255.
    The `info` of pictures of 16 bits has `LARGEST`.

    Args:
        value_range: the 16-bit value that becomes 255 (4,095 for 12-bit data); None for 65,535.

    Raises:
        ValueError: pixels whose range is unknown, or beyond `value_range`. For a damaged picture, whatever the decoder
            raises.
    """
    with open_picture(handle) as picture:
        deep_colour = picture.mode.startswith("RGB") and any(";16" in str(tile[3]) for tile in picture.tile)
        picture.load()
        if picture.mode == "F":
            raise ValueError("floating-point pixels, whose range is unknown: save it with 8 or 16 bits")
        if not picture.mode.startswith("I"):
            result = picture if picture.mode == "RGB" else picture.convert("RGB")
            result.info.pop(LARGEST, None)  # a file may have any text
            if deep_colour:
                if value_range is not None:
                    raise ValueError("16 bits in each colour, of which only the upper 8 are read: save it with 8 bits")
                result.info[LARGEST] = 256 * int(np.asarray(result).max()) + 255  # at most
            return result
        values = np.asarray(picture)
    largest, allowed = int(values.max()), value_range or DEEP
    if values.min() < 0 or largest > allowed:
        raise ValueError(
            f"pixel values beyond the range 0 to {allowed:,}"
            + (": save it with 8 or 16 bits" if value_range is None else f", the largest is {largest:,}")
        )
    bright = values * 255.0
    bright /= allowed  # in place, since large scans nearly fill the memory
    result = Image.fromarray(np.round(bright, out=bright).astype(np.uint8)).convert("RGB")
    result.info[LARGEST] = largest
    return result


def reason_of(error: Exception) -> str:
    """Why an image could not be read: one line, without the memory addresses that Pillow's messages may contain."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image of a known format"
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return too_large()
    return " ".join(str(error).split())[:200] or type(error).__name__
