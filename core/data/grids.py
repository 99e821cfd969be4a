"""Grids of pictures and PNG files, without torch, whose import takes seconds."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from core.cli.files import atomic_path

CAPTION = 20  # height in pixels of the strip with a line of text


def make_grid(pixels: np.ndarray, columns: int | None = None, gap: int = 2, transparent: bool = False) -> np.ndarray:
    """Arrange uint8 pictures (N, H, W, C) row by row on white; by default in about as many columns as rows.

    Args:
        transparent: leave the gaps and what the last row lacks transparent, for pages that may be dark; C is 3.

    Returns:
        uint8 array (rows * (H + gap) + gap, columns * (W + gap) + gap, C), or 4 channels where transparent.
    """
    if transparent:
        pixels = np.concatenate([pixels, np.full((*pixels.shape[:3], 1), 255, np.uint8)], axis=3)
    count, height, width, channels = pixels.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    grid = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, channels), 255, np.uint8)
    grid[..., 3:] = 0
    for index, picture in enumerate(pixels):
        top = gap + (index // columns) * (height + gap)
        left = gap + (index % columns) * (width + gap)
        grid[top : top + height, left : left + width] = picture
    return grid


def captioned(pixels: np.ndarray, text: str) -> np.ndarray:
    """A uint8 picture (H, W, 3) above a line of text, black on white: (H + CAPTION, W, 3)."""
    height, width, _ = pixels.shape
    page = Image.new("RGB", (width, height + CAPTION), "white")
    page.paste(Image.fromarray(pixels), (0, 0))
    ImageDraw.Draw(page).text((4, height), text, fill="black", font=ImageFont.load_default(14))
    return np.asarray(page)


def write_png(path: str | Path, pixels: np.ndarray) -> None:
    """Write one uint8 picture (H, W, 3), (H, W, 4) or (H, W) as PNG, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(png_bytes(pixels))


def png_bytes(pixels: np.ndarray) -> bytes:
    """One uint8 picture (H, W, 3), (H, W, 4) or (H, W) as the content of a PNG file."""
    buffer = io.BytesIO()
    # Level 1 takes a third of the default's time and a tenth more bytes.
    Image.fromarray(pixels).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()
