"""Decoding an image file to RGB, the same way for prepared data and for prediction."""

from __future__ import annotations

from typing import IO

import numpy as np
from PIL import Image, UnidentifiedImageError

from core.data.bounds import too_large


def decode(handle: IO[bytes]) -> Image.Image:
    """Decode one file to 8-bit RGB as torchvision's loaders do: no EXIF rotation, alpha dropped, first frame only.

    Only 16-bit grey differs: it is scaled to 8 bits, where Pillow's own conversion would clip everything above 255.

    Raises:
        ValueError: pixels whose range is unknown. For a damaged picture, whatever the decoder raises.
    """
    with Image.open(handle) as picture:
        picture.load()
        if picture.mode == "F":
            raise ValueError("floating-point pixels, whose range is unknown: save it with 8 or 16 bits")
        if not picture.mode.startswith("I"):
            return picture if picture.mode == "RGB" else picture.convert("RGB")
        values = np.asarray(picture)
    if values.min() < 0 or values.max() > 65_535:
        raise ValueError("pixel values beyond 16 bits: save it with 8 or 16 bits")
    return Image.fromarray(np.round(values / 257.0).astype(np.uint8)).convert("RGB")


def reason_of(error: Exception) -> str:
    """Why an image could not be read: one line, without the memory addresses that Pillow's messages may contain."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image of a known format"
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return too_large()
    return " ".join(str(error).split())[:200] or type(error).__name__
