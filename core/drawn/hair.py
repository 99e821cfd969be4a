"""Hair and beards of a drawn face, painted behind and in front of the head."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from core.drawn.canvas import Array, Canvas, Patch, ellipse, mirrored, ribbon, smooth_noise, spline
from core.drawn.parts import HAIR, Head, turned
from core.drawn.person import Person, Random


@dataclass(frozen=True)
class Style:
    """Shape of a hair style: how far it stands off the skull at `top` and `side`, and down to which y it reaches.

    `flow` is the run of the strands: `drape` falls from a parting, `radial` grows from the crown, `curl` has none.
    `rough` is the jitter of the outline and `wave` the sway of the strands, both in pixels.
    """

    top: float
    side: float
    low: float
    flare: float
    line: str
    flow: str
    rough: float = 0.5
    wave: float = 0.0


STYLES = {
    "crop": Style(5, 1.5, -3, 0, "round", "radial", 0.5),
    "side": Style(9, 3, -1, 0, "sweep", "drape", 0.6, 0.6),
    "quiff": Style(14, 1, -6, 0, "high", "radial", 0.7, 1.0),
    "buzz": Style(1.2, 0.4, -6, 0, "round", "fuzz", 0.2),
    "curls": Style(13, 6, -2, 0, "round", "curl", 2.6),
    "receding": Style(2, 2, 1, 0, "receding", "radial", 0.4),
    "afro": Style(24, 22, 12, 0, "round", "curl", 2.2),
    "swept": Style(11, 4, 4, 0, "sweep", "drape", 1.2, 2.2),
    "fringe": Style(8, 3, 4, 0, "fringe", "radial", 0.5),
    "long": Style(7, 5, 130, 12, "curtain", "drape", 0.4, 0.5),
    "wavy": Style(9, 7, 130, 20, "sweep", "drape", 1.2, 3.0),
    "bob": Style(8, 6, 60, 9, "curtain", "drape", 0.5, 0.6),
    "bun": Style(3, 1.5, 2, 0, "high", "radial", 0.4),
    "ponytail": Style(3, 1.5, 2, 0, "high", "radial", 0.4),
    "curtain": Style(6, 4, 130, 8, "low curtain", "drape", 0.5, 1.2),
    "bangs": Style(8, 5, 130, 11, "fringe", "radial", 0.5, 0.5),
    "pixie": Style(8, 3, 8, 0, "sweep", "drape", 1.4, 1.4),
    "ringlets": Style(14, 13, 96, 20, "round", "curl", 3.0),
}


@dataclass(frozen=True)
class Hair:
    """Hair ready to paint: closed outlines, the rectangle around all of it, and its colour there (h, w, 3)."""

    outer: Array
    window: Array
    tied: Array | None
    frame: Patch
    colour: Array
    style: Style


def make_hair(canvas: Canvas, person: Person, rng: Random) -> Hair | None:
    """Outline, opening for the face and colours of the person's hair; None when there is nothing to see."""
    if person.hair_style == "bald" or person.hat == "scarf":
        return None
    style = STYLES[person.hair_style]
    style = replace(style, top=style.top * (0.75 + 0.7 * person.volume), side=style.side * (0.8 + 0.5 * person.volume))
    if person.hat in ("beanie", "cap", "brimmed"):
        style = replace(style, top=1, side=min(style.side, 5))
    outer = _outer(person, style)
    window = _window(person, style)
    outer, window = _roughen(outer, style.rough, rng), _roughen(window, 0.7 * style.rough, rng)
    if style.flow == "curl":
        outer = spline(outer, steps=3)
    outer, window = turned(outer, person), turned(window, person)
    tied = (
        _tied(person, rng) if person.hair_style in ("bun", "ponytail") and person.hat in ("none", "headband") else None
    )
    frame = canvas.frame(outer) if tied is None else canvas.frame(outer, tied)
    return Hair(outer, window, tied, frame, _hair_colour(canvas, person, style, frame.box, rng), style)


def _outer(person: Person, style: Style) -> Array:
    """Outer contour from the left bottom over the top to the right bottom; the straight closing line lies below."""
    w, top, side = person.width, person.top - style.top, style.side
    right = [
        (0, top),
        (w * 0.5, top + 4 + 0.1 * style.top),
        (w * 0.86 + side * 0.6, top + 20 + 0.2 * style.top),
        (w + side, -26),
        (w + side * 1.1, min(-8, style.low - 4)),
    ]
    if style.low > 20:
        end = min(style.low, 112)
        reach = [0.45, 0.8, 1.0] if style.low > 90 else [0.7, 1.0, 0.75]
        right += [(w + side + style.flare * r, y) for r, y in zip(reach, (18, end * 0.62, end), strict=True)]
    # Curls close round below the ears; straight hair ends in an edge.
    right.append(
        (w + side * (0.3 if style.flow == "curl" else 0.9) + style.flare * (1.2 if style.low > 90 else 0.3), style.low)
    )
    ring = spline(mirrored(right), steps=7)
    return ring + np.stack([0.25 * person.part * np.clip(-(ring[:, 1] + 40) / 40, 0, 1), 0 * ring[:, 1]], 1)


def _window(person: Person, style: Style) -> Array:
    """Opening for the face, from the left bottom over the hairline to the right bottom."""
    w = person.width
    if style.low > 20:
        cut = 0.98 - 0.12 * person.volume
        side = [(w * 1.02, 140.0), (w * (cut + 0.02), 70.0), (w * cut * 0.97, 38.0), (w * cut, 10.0)]
    else:
        side = [(w * 1.05, 140.0), (w * 1.03, style.low + 6), (w * 0.97, style.low - 3)]
    return spline([(-x, y) for x, y in side] + _hairline(person, style.line) + side[::-1], steps=6)


def _hairline(person: Person, line: str) -> list[tuple[float, float]]:
    """Points from the left temple over the forehead to the right one."""
    w, s = person.width, float(np.sign(person.part))
    hy = -44.0 - 2.5 * person.volume
    if line == "sweep":
        swept = [
            (0.93, -14.0),
            (0.78, -32.0),
            (0.5, -46.0),
            (0.05, -41.0),
            (-0.42, -33.0),
            (-0.78, -22.0),
            (-0.94, -8.0),
        ]
        top = [(s * w * x, y) for x, y in swept]
        return top if s < 0 else top[::-1]
    half: list[tuple[float, float]] = {
        "round": [(w * 0.9, -20.0), (w * 0.78, -33.0), (w * 0.5, hy + 1), (0.0, hy)],
        "high": [(w * 0.92, -22.0), (w * 0.8, -36.0), (w * 0.46, hy - 3), (0.0, hy - 4)],
        "receding": [(w * 0.95, -24.0), (w * 0.88, -42.0), (w * 0.6, -57.0), (0.0, -61.0)],
        "curtain": [(w * 0.93, -10.0), (w * 0.78, -28.0), (w * 0.42, -43.0), (s * 3, -51.0)],
        "low curtain": [(w * 0.86, -4.0), (w * 0.66, -22.0), (w * 0.34, -38.0), (s * 2, -52.0)],
        "fringe": [(w * 0.93, -6.0), (w * 0.86, -17.0), (w * 0.45, -19.5), (0.0, -20.5)],
    }[line]
    return [(-x, y) for x, y in half[:-1]] + half[::-1]


def _roughen(ring: Array, amount: float, rng: Random) -> Array:
    """The outline moved in and out by `amount` pixels, in tufts of a few points."""
    push = rng.normal(0, amount, (len(ring), 2))
    return ring + (push + np.roll(push, 1, 0)) * 0.7


def _hair_colour(canvas: Canvas, person: Person, style: Style, box: tuple[slice, slice], rng: Random) -> Array:
    """Hair colour within `box`, (h, w, 3): strands, a band of shine, light from the side, darker ends."""
    u, v = canvas.u[box], canvas.v[box]
    w = person.width + style.side
    height = 40.0 + style.top
    arch = np.sqrt((u / w) ** 2 + (np.minimum(v + 24, 0) / height) ** 2)
    if style.flow in ("curl", "fuzz"):
        fine = _curls(rng, u.shape) if style.flow == "curl" else np.float32(0)
        grain = rng.standard_normal(u.shape, np.float32) * (0.07 if style.flow == "curl" else 0.11)
        strands, shine = fine + grain, np.full_like(u, 0.1)
    else:
        # Pale hair shows its strands less: light passes from one to the next.
        strands = _strands(person, style, rng, u, v, arch) * np.float32(1.2 - 0.0035 * float(person.hair.mean()))
        band = np.exp(-(((-v - 48 - 0.5 * style.top - 10 * np.cos(u * 0.03)) / 9) ** 2))
        band += np.float32(0.45) * np.exp(-(((v - 26) / 22) ** 2))
        shine = band * (0.16 + strands * 0.5)
    side = np.clip(u / 60, -1, 1) * person.light[0] * 0.45
    depth = 0.9 - 0.0016 * v - 0.16 * np.clip(arch - 0.75, 0, 0.5)
    light = np.clip(depth + side + strands, 0.3, 1.9)
    base = np.asarray(person.hair, np.float32)
    return base * light[..., None] + (shine * np.float32(70))[..., None] * (base / 255 * 0.6 + 0.35)


def _strands(person: Person, style: Style, rng: Random, u: Array, v: Array, arch: Array) -> Array:
    """Brightness of strands about 0, (h, w): a table of random strands looked up along the hair's flow."""
    fine = rng.standard_normal((8, 512), np.float32)
    coarse = np.repeat(rng.standard_normal((8, 64), np.float32), 8, 1)
    table = 0.075 * (fine + np.roll(fine, 1, 1)) + 0.05 * (coarse + np.roll(coarse, 3, 1) + np.roll(coarse, 5, 1))
    if style.flow == "drape":
        across = np.where(u > person.part, arch * 190 + 20, 230 + arch * 190)
        along = np.where(v < -24, abs(u) / 60, 1 + (v + 24) / 50)
    else:
        crown = person.top - 26
        across = np.where(v < -14, np.arctan2(u - 0.4 * person.part, v - crown) * 150 + 256, 256 + u * 3.2)
        along = np.hypot(u, v - crown) / 40
    if style.wave:
        across = across + style.wave * 4 * np.sin(v * 0.16 + u * 0.03 + person.part)
    place = np.clip(along, 0, 6.99)
    row = place.astype(np.int32)
    index = row * 512 + (across.astype(np.int32) & 511)
    flat = table.ravel()
    share = place - row
    return np.take(flat, index) * (1 - share) + np.take(flat, index + 512) * share


def _curls(rng: Random, shape: tuple[int, ...]) -> Array:
    """Brightness of curls about 0, (h, w): noise of the size of a curl and of half of it."""
    height, width = shape
    coarse = smooth_noise(rng, height // 7 + 1, width // 7 + 1, (width, height))
    return coarse * np.float32(0.13) + smooth_noise(rng, height // 4 + 1, width // 4 + 1, (width, height)) * np.float32(
        0.16
    )


def draw_back_hair(canvas: Canvas, hair: Hair) -> None:
    """Hair behind head and neck, in shade; bun and tail as well."""
    if hair.tied is not None:
        canvas.paint(canvas.cover(hair.tied, within=hair.frame), hair.colour * np.float32(0.85), label=HAIR)
    shade = np.float32(0.55 if hair.style.flow != "curl" else 0.8)
    canvas.paint(canvas.cover(hair.outer, within=hair.frame), hair.colour * shade, label=HAIR)


def _tied(person: Person, rng: Random) -> Array:
    """Outline of a bun on top of the head, or of a tail that falls behind one shoulder."""
    if person.hair_style == "bun":
        return _roughen(ellipse(person.part * 0.3, person.top - 9, 17, 14), 0.7, rng)
    x = person.width * float(np.sign(person.part))
    tail = [(0, person.top), (x, -34), (x * 1.4, -12), (x * 1.55, 40), (x * 1.4, 92), (x * 1.05, 60), (x * 0.9, 0)]
    return _roughen(spline(tail, closed=True), 0.8, rng)


def draw_front_hair(canvas: Canvas, person: Person, hair: Hair, head: Head) -> None:
    """Hair over forehead and temples, with its shadow on the skin."""
    light = person.light[0]
    shadow = canvas.cover(
        hair.outer + (-4 * light, 5), holes=[hair.window + (-4 * light, 5)], soft=3.5, within=head.face
    )
    canvas.shade(shadow, (0.72, 0.64, 0.62))
    soft = {"fuzz": 1.6, "curl": 0.9}.get(hair.style.flow, 0.45)
    front = canvas.cover(hair.outer, holes=[hair.window], soft=soft, within=hair.frame)
    if hair.style.flow == "fuzz":
        front = Patch(front.box, front.alpha * np.float32(0.85))
    canvas.paint(front, hair.colour, label=HAIR)
    if hair.style.low > 20:
        # Next to the cheeks long hair lies in the shadow of its own volume.
        inner = canvas.cover(hair.window, soft=5, within=front)
        canvas.shade(inner, (0.62, 0.6, 0.6))


def draw_scalp(canvas: Canvas, person: Person, head: Head) -> None:
    """The shaved rest of hair on a bald head: a darker cap without label."""
    window = turned(_window(person, STYLES["receding"]), person)
    cap = canvas.cover(head.outline, holes=[window], soft=3, within=head.face)
    canvas.paint(cap, person.skin * 0.72 + person.hair * 0.1, opacity=0.35)


def draw_beard(canvas: Canvas, person: Person, head: Head, rng: Random) -> None:
    """Stubble (skin), full beard, goatee or moustache (hair), below the mouth that is drawn later."""
    if person.beard == "none":
        return
    grown = person.beard != "stubble"
    chin, w, x = person.chin, person.width, person.yaw * 2.6
    lip = 36.0 - person.gape * 0.25
    patches = []
    if person.beard in ("full", "stubble"):
        scale = (1.035, 1.05) if grown else (0.99, 0.985)
        upper = [(-w * 1.1, -2), (-w * 0.84, 6), (-w * 0.72, 24), (-21, lip - 4), (x, lip - 5), (21, lip - 4)]
        upper += [(w * 0.72, 24), (w * 0.84, 6), (w * 1.1, -2), (w * 1.3, -90), (-w * 1.3, -90)]
        patches.append(
            canvas.cover(
                _roughen(head.outline * scale, 0.5, rng), holes=[spline(upper, True)], soft=1.4 if grown else 3.2
            )
        )
    if person.beard == "goatee":
        ring = [
            (x - 20, lip + 2),
            (x - 19, 52),
            (-13, chin - 6),
            (0, chin + 3),
            (13, chin - 6),
            (x + 19, 52),
            (x + 20, lip + 2),
            (x, lip - 3),
        ]
        patches.append(canvas.cover(spline(ring, True), soft=1.3))
    if person.beard in ("moustache", "goatee", "full"):
        curve = spline([(x - 21, lip + 6), (x - 11, lip + 0.4), (x, lip - 1.2), (x + 11, lip + 0.4), (x + 21, lip + 6)])
        patches.append(canvas.cover(ribbon(curve, (1.5, 5.5, 5, 5.5, 1.5)), soft=0.8))
    for patch in patches:
        grain = rng.standard_normal(patch.alpha.shape, np.float32) * 0.16
        grain[1:] += grain[:-1] * 0.7
        colour = (person.brow * 0.55 + person.hair * 0.4) * (0.95 + grain[..., None])
        if grown:
            canvas.paint(patch, colour, opacity=0.9, label=HAIR)
        else:
            canvas.paint(patch, person.skin * 0.35 + colour * 0.45, opacity=0.3 + 0.2 * person.volume)
