"""Damage to pictures, drawn: strokes as of a brush, and blocks."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from core.drawn.canvas import Array, spline

STROKES, BLOCKS = 5, 3
STROKE, BLOCK = (0.03, 0.06), (0.08, 0.16)  # least and largest width, of the picture's shorter side
FINE = 4  # drawn so many times larger, for strokes whose width is not a whole number of pixels


def draw_damage(width: int, height: int, seed: int) -> Array:
    """Pixels that are missing, bool (height, width): about a third of them, a pure function of the arguments."""
    rng = np.random.default_rng(seed)
    page = Image.new("L", (width * FINE, height * FINE))
    draw, side = ImageDraw.Draw(page), FINE * min(width, height)
    for _ in range(STROKES):
        line = spline(rng.uniform(0, 1, (4, 2)) * page.size, steps=16)
        thickness = max(FINE, round(side * rng.uniform(*STROKE)))
        draw.line(line.ravel().tolist(), fill=255, width=thickness, joint="curve")
    for _ in range(BLOCKS):
        half, centre = side * rng.uniform(*BLOCK, 2) / 2, rng.uniform(0.1, 0.9, 2) * page.size
        draw.rectangle([*(centre - half), *(centre + half)], fill=255)
    return np.asarray(page.reduce(FINE)) >= 128
