"""The canvas for drawn faces: outlines in face coordinates, coverage maps, smooth noise.

Face coordinates are pixels from the point between the eyes, x to the right and y down, before the pose rotates, scales
and shifts them. Each layer is a supersampled coverage map, which gives both soft edges in the picture and hard edges in
the mask.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

Array = np.ndarray
WIDTH, HEIGHT = 178, 218
EYES = (89.0, 112.0)  # origin of the face coordinates in pixels; the eyes as drawn centre at about (88.5, 111)


@dataclass(frozen=True)
class Patch:
    """A coverage map: `alpha` (h, w) float32 in 0..1 over the rows and columns `box`."""

    box: tuple[slice, slice]
    alpha: Array


def points(x: Sequence[float] | Array, y: Sequence[float] | Array) -> Array:
    """Points (N, 2) from their coordinates."""
    return np.column_stack([x, y]).astype(np.float64, copy=False)


def spline(knots: Sequence[tuple[float, float]] | Array, closed: bool = False, steps: int = 6) -> Array:
    """Catmull-Rom curve (M, 2) through `knots` (N, 2), `steps` points per span."""
    p = np.asarray(knots, np.float64)
    ends = (p[-1:], p[:2]) if closed else (2 * p[:1] - p[1:2], 2 * p[-1:] - p[-2:-1])
    line = np.concatenate([ends[0], p, ends[1]])
    a, b, c, d = line[:-3], line[1:-2], line[2:-1], line[3:]
    t = (np.arange(steps) / steps)[:, None, None]
    curve = b + 0.5 * t * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * b - a - 3 * c + d)))
    curve = curve.transpose(1, 0, 2).reshape(-1, 2)
    return curve if closed else np.concatenate([curve, p[-1:]])


def mirrored(half: Sequence[tuple[float, float]] | Array) -> Array:
    """Points (N, 2) of the right half, top to bottom, preceded by their mirror image from bottom to top."""
    right = np.asarray(half, np.float64)
    left = right[::-1] * (-1, 1)
    return np.concatenate([left[:-1] if right[0, 0] == 0 else left, right])


def ellipse(x: float, y: float, rx: float, ry: float, power: float = 2.0, count: int = 36) -> Array:
    """Outline (count, 2) of a superellipse: `power` 2 is an ellipse, larger ones approach a rectangle."""
    t = np.arange(count) * (2 * math.pi / count)
    c, s = np.cos(t), np.sin(t)
    return np.stack([x + rx * np.sign(c) * abs(c) ** (2 / power), y + ry * np.sign(s) * abs(s) ** (2 / power)], 1)


def ribbon(line: Array, widths: Sequence[float]) -> Array:
    """Outline of a stroke along `line` (N, 2) whose width in pixels runs through `widths` from end to end."""
    direction = np.empty_like(line)
    direction[1:-1] = line[2:] - line[:-2]
    direction[0], direction[-1] = line[1] - line[0], line[-1] - line[-2]
    direction /= np.hypot(direction[:, 0], direction[:, 1])[:, None] + 1e-6
    along = np.linspace(0, len(widths) - 1, len(line))
    offset = direction[:, ::-1] * (-0.5, 0.5) * np.interp(along, range(len(widths)), widths)[:, None]
    return np.concatenate([line + offset, (line - offset)[::-1]])


def smooth_noise(rng: np.random.Generator, rows: int, columns: int, size: tuple[int, int] = (WIDTH, HEIGHT)) -> Array:
    """Normal noise of `rows` x `columns` cells, upsampled to float32 (height, width) for `size` (w, h)."""
    cells = rng.standard_normal((rows, columns), np.float32)
    return np.asarray(Image.fromarray(cells).resize(size, Image.Resampling.BICUBIC))


class Canvas:
    """Float `pixels` (218, 178, 3) in 0..255, `labels` (218, 178), and each pixel's face coordinates `u`, `v`.

    Args:
        angle: rotation of the face in radians.
        scale: magnification of the face.
        shift: of the origin, in pixels.
    """

    def __init__(self, angle: float, scale: float, shift: tuple[float, float]) -> None:
        self.pixels = np.zeros((HEIGHT, WIDTH, 3), np.float32)
        self.labels = np.zeros((HEIGHT, WIDTH), np.uint8)
        cos, sin = math.cos(angle), math.sin(angle)
        self.turn = np.array([[cos, sin], [-sin, cos]]) * scale
        self.origin = np.array(EYES) + shift
        x = np.arange(WIDTH, dtype=np.float32)[None] + np.float32(0.5 - self.origin[0])
        y = np.arange(HEIGHT, dtype=np.float32)[:, None] + np.float32(0.5 - self.origin[1])
        back = np.linalg.inv(self.turn).astype(np.float32)
        self.u = x * back[0, 0] + y * back[1, 0]
        self.v = x * back[0, 1] + y * back[1, 1]

    def cover(
        self, *rings: Array, holes: Sequence[Array] = (), soft: float = 0.0, within: Patch | None = None
    ) -> Patch:
        """Coverage of closed outlines (N, 2) in face coordinates, minus `holes`, blurred by `soft` pixels.

        With `within`, the result is multiplied by that patch and has its box.
        """
        outlines = [ring @ self.turn + self.origin for ring in rings]
        box = within.box if within else _box(outlines, 2 + 2.5 * soft)
        height, width = box[0].stop - box[0].start, box[1].stop - box[1].start
        # Small features need finer sampling, and large ones take the time. Blurred ones need no supersampling.
        factor = 1 if soft > 2 else 4 if height * width < 3000 else 2
        image = Image.new("L", (width * factor, height * factor))
        draw = ImageDraw.Draw(image)
        corner = np.array([box[1].start + 0.5 / factor, box[0].start + 0.5 / factor])
        for outline in outlines:
            draw.polygon(((outline - corner) * factor).ravel().tolist(), fill=255)
        for hole in holes:
            draw.polygon(((hole @ self.turn + (self.origin - corner)) * factor).ravel().tolist(), fill=0)
        image = image.reduce(factor) if factor > 1 else image
        if soft:
            image = image.filter(ImageFilter.GaussianBlur(soft))
        # Several times faster than np.asarray(image), which matters because most patches are tiny.
        alpha = np.frombuffer(image.tobytes(), np.uint8).reshape(height, width) * np.float32(1 / 255)
        return Patch(box, alpha * within.alpha if within else alpha)

    def blob(self, *centres: tuple[float, float], rx: float, ry: float, within: Patch | None = None) -> Patch:
        """Soft spots: Gaussians of standard deviations `rx`, `ry` at `centres`, in face coordinates."""
        reach = 2.6 * max(rx, ry)
        middles = np.array(centres) @ self.turn + self.origin
        box = within.box if within else _box([middles - reach, middles + reach], 0)
        u, v = self.u[box], self.v[box]
        alpha = np.float32(0) * u
        for x, y in centres:
            du, dv = (u - np.float32(x)) * np.float32(1 / rx), (v - np.float32(y)) * np.float32(1 / ry)
            alpha = np.maximum(np.exp((du * du + dv * dv) * np.float32(-0.5)), alpha)
        return Patch(box, alpha * within.alpha if within else alpha)

    def paint(self, patch: Patch, colour: Array, opacity: float = 1.0, label: int | None = None) -> None:
        """Blend `colour`, (3,) or (h, w, 3), over the patch; `label` pixels that are at least half covered."""
        region = self.pixels[patch.box]
        alpha = patch.alpha if opacity == 1 else patch.alpha * np.float32(opacity)
        region += alpha[..., None] * (np.asarray(colour, np.float32) - region)
        if label is not None:
            self.mark(patch, label)

    def shade(self, patch: Patch, factor: Sequence[float] | Array) -> None:
        """Multiply the picture under the patch by `factor` (3,): below 1 darkens, above 1 brightens."""
        self.pixels[patch.box] *= 1 + patch.alpha[..., None] * (np.asarray(factor, np.float32) - 1)

    def mark(self, patch: Patch, label: int) -> None:
        """Label pixels that are at least half covered, without painting."""
        self.labels[patch.box][patch.alpha >= 0.5] = label

    def frame(self, *rings: Array) -> Patch:
        """A rectangle of full coverage around outlines (N, 2) in face coordinates."""
        box = _box([ring @ self.turn + self.origin for ring in rings], 2)
        return Patch(box, np.ones_like(self.u[box]))


def _box(outlines: Sequence[Array], margin: float) -> tuple[slice, slice]:
    """Rows and columns around pixel positions (N, 2), clipped to the canvas; at least one of each."""
    box = []
    for axis, size in ((1, HEIGHT), (0, WIDTH)):
        # Python's own min and max: for so few numbers, NumPy's call overhead would dominate.
        values = [value for outline in outlines for value in outline[:, axis].tolist()]
        start = max(min(math.floor(min(values) - margin), size - 1), 0)
        box.append(slice(start, max(min(math.ceil(max(values) + margin), size), start + 1)))
    return box[0], box[1]
