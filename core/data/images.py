"""Conversion between floats in [-1, 1] and uint8 pixels (the only one in this project), grids and PNG files."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from core.cli.files import atomic_path

# Of weights and pictures: 5% to 20% faster than contiguous channels on CPUs (docs/performance.md), and the layout that
# tensor cores use.
MEMORY_FORMAT = torch.channels_last


def to_uint8(images: Tensor) -> Tensor:
    """Floats (N, C, H, W) in [-1, 1] -> uint8 pixels (N, H, W, C): round((x + 1) * 127.5), clamped to 0..255."""
    pixels = images.detach().float().add(1).mul(127.5).round().clamp(0, 255)
    return pixels.to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def to_float(pixels: Tensor) -> Tensor:
    """uint8 pixels (N, H, W, C) -> floats (N, C, H, W) in [-1, 1]: x / 127.5 - 1, in `MEMORY_FORMAT`."""
    return pixels.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def make_grid(pixels: np.ndarray, columns: int | None = None, gap: int = 2) -> np.ndarray:
    """Arrange uint8 pictures (N, H, W, C) row by row on white; by default in about as many columns as rows.

    Returns:
        uint8 array (rows * (H + gap) + gap, columns * (W + gap) + gap, C).
    """
    count, height, width, channels = pixels.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    grid = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, channels), 255, np.uint8)
    for index, picture in enumerate(pixels):
        top = gap + (index // columns) * (height + gap)
        left = gap + (index % columns) * (width + gap)
        grid[top : top + height, left : left + width] = picture
    return grid


def write_png(path: str | Path, pixels: np.ndarray) -> None:
    """Write one uint8 picture (H, W, 3) or (H, W) as PNG, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(png_bytes(pixels))


def png_bytes(pixels: np.ndarray) -> bytes:
    """One uint8 picture (H, W, 3) or (H, W) as the content of a PNG file."""
    buffer = io.BytesIO()
    # Level 1 takes a third of the default's time and a tenth more bytes.
    Image.fromarray(pixels).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()
