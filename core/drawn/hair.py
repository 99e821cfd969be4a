"""Hair and beards of a drawn face, painted behind and in front of the head."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from core.drawn.canvas import Array, Canvas, Patch, ellipse, mirrored, points, ribbon, smooth_noise, spline
from core.drawn.parts import HAIR, Head, turned
from core.drawn.person import Person, Random


@dataclass(frozen=True)
class Style:
    """The shape of a hair style; lengths are in pixels."""

    top: float  # distance from the skull at the top
    side: float  # and at the sides
    low: float  # y down to which it reaches
    flare: float  # how much wider it gets on the way
    line: str  # the hairline, see `_hairline`
    flow: str  # of the strands: "drape" from the parting, "radial" from the crown, "curl" or "fuzz" in no direction
    rough: float = 0.5  # jitter of the outline
    wave: float = 0.0  # sway of the strands


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
    """Hair ready to paint."""

    outer: Array  # closed outline (N, 2)
    window: Array  # outline of the opening for the face
    tied: Array | None  # outline of a bun or ponytail
    frame: Patch  # the rectangle around all of it
    colour: Array  # (h, w, 3) in that rectangle
    style: Style


def make_hair(canvas: Canvas, person: Person, rng: Random) -> Hair | None:
    """The outlines and colours of the person's hair; None when none is visible."""
    if person.hair_style == "bald" or person.hat == "scarf":
        return None
    style = STYLES[person.hair_style]
    style = replace(style, top=style.top * (0.75 + 0.7 * person.volume), side=style.side * (0.8 + 0.5 * person.volume))
    if person.hat in ("beanie", "cap", "brimmed"):
        style = replace(style, top=1, side=min(style.side, 5))
    outer = _roughen(_outer(person, style), style.rough, rng)
    window = turned(_roughen(_window(person, style), 0.7 * style.rough, rng), person)
    outer = turned(spline(outer, steps=3) if style.flow == "curl" else outer, person)
    has_tail = person.hair_style in ("bun", "ponytail") and person.hat in ("none", "headband")
    tied = _tied(person, rng) if has_tail else None
    frame = canvas.frame(outer) if tied is None else canvas.frame(outer, tied)
    return Hair(outer, window, tied, frame, _hair_colour(canvas, person, style, frame.box, rng), style)


def _outer(person: Person, style: Style) -> Array:
    """Outer contour from the bottom left over the top to the bottom right, where a straight line closes it."""
    w, top, side, low, flare = person.width, person.top - style.top, style.side, style.low, style.flare
    long = low > 90
    x = [0, w * 0.5, w * 0.86 + side * 0.6, w + side, w + side * 1.1]
    y = [top, top + 4 + 0.1 * style.top, top + 20 + 0.2 * style.top, -26, min(-8, low - 4)]
    if low > 20:
        end = min(low, 112)
        x += [w + side + flare * reach for reach in ((0.45, 0.8, 1.0) if long else (0.7, 1.0, 0.75))]
        y += [18, end * 0.62, end]
    # Curls close round below the ears; straight hair ends in an edge.
    x.append(w + side * (0.3 if style.flow == "curl" else 0.9) + flare * (1.2 if long else 0.3))
    ring = spline(mirrored(points(x, [*y, low])), steps=7)
    lean = 0.25 * person.part * np.clip(-(ring[:, 1] + 40) / 40, 0, 1)
    return ring + points(lean, 0 * lean)


def _window(person: Person, style: Style) -> Array:
    """Opening for the face, from the bottom left over the hairline to the bottom right."""
    w = person.width
    if style.low > 20:
        cut = 0.98 - 0.12 * person.volume
        side = points([w * 1.02, w * (cut + 0.02), w * cut * 0.97, w * cut], [140, 70, 38, 10])
    else:
        side = points([w * 1.05, w * 1.03, w * 0.97], [140, style.low + 6, style.low - 3])
    return spline(np.concatenate([side * (-1, 1), _hairline(person, style.line), side[::-1]]), steps=6)


def _hairline(person: Person, line: str) -> Array:
    """Points (N, 2) from the left temple over the forehead to the right one."""
    s = float(np.sign(person.part))
    if line == "sweep":
        x = s * person.width * np.array([0.93, 0.78, 0.5, 0.05, -0.42, -0.78, -0.94])
        return points(x, [-14, -32, -46, -41, -33, -22, -8])[:: -int(s)]
    # The left half: x as a share of the width, y, and x at the centre in pixels.
    y = -44.0 - 2.5 * person.volume
    shares, heights, centre = {
        "round": ((0.9, 0.78, 0.5), (-20, -33, y + 1, y), 0.0),
        "high": ((0.92, 0.8, 0.46), (-22, -36, y - 3, y - 4), 0.0),
        "receding": ((0.95, 0.88, 0.6), (-24, -42, -57, -61), 0.0),
        "curtain": ((0.93, 0.78, 0.42), (-10, -28, -43, -51), s * 3),
        "low curtain": ((0.86, 0.66, 0.34), (-4, -22, -38, -52), s * 2),
        "fringe": ((0.93, 0.86, 0.45), (-6, -17, -19.5, -20.5), 0.0),
    }[line]
    right = points([*(person.width * np.array(shares)), centre], heights)
    return np.concatenate([right[:-1] * (-1, 1), right[::-1]])


def _roughen(ring: Array, amount: float, rng: Random) -> Array:
    """The outline with tufts: its points moved by random offsets of about `amount` pixels."""
    push = rng.normal(0, amount, (len(ring), 2))
    return ring + (push + np.roll(push, 1, 0)) * 0.7


def _hair_colour(canvas: Canvas, person: Person, style: Style, box: tuple[slice, slice], rng: Random) -> Array:
    """Hair colour within `box`, (h, w, 3): strands, a band of shine, light from one side, darker ends."""
    u, v = canvas.u[box], canvas.v[box]
    w = person.width + style.side
    height = 40.0 + style.top
    arch = np.sqrt((u / w) ** 2 + (np.minimum(v + 24, 0) / height) ** 2)
    if style.flow in ("curl", "fuzz"):
        fine = _curls(rng, u.shape) if style.flow == "curl" else np.float32(0)
        grain = rng.standard_normal(u.shape, np.float32) * (0.07 if style.flow == "curl" else 0.11)
        strands, shine = fine + grain, np.full_like(u, 0.1)
    else:
        # The strands of pale hair show less, since light passes from one to the next.
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
    """Brightness of strands around 0, (h, w): a table of random strands, looked up along the flow of the hair."""
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
    """Brightness of curls around 0, (h, w): noise of 7 and of 4 pixels."""
    height, width = shape
    coarse, fine = (smooth_noise(rng, height // cell + 1, width // cell + 1, (width, height)) for cell in (7, 4))
    return coarse * np.float32(0.13) + fine * np.float32(0.16)


def draw_back_hair(canvas: Canvas, hair: Hair) -> None:
    """Draw the shaded hair behind head and neck, with bun or ponytail."""
    if hair.tied is not None:
        canvas.paint(canvas.cover(hair.tied, within=hair.frame), hair.colour * np.float32(0.85), label=HAIR)
    shade = np.float32(0.55 if hair.style.flow != "curl" else 0.8)
    canvas.paint(canvas.cover(hair.outer, within=hair.frame), hair.colour * shade, label=HAIR)


def _tied(person: Person, rng: Random) -> Array:
    """Outline of a bun on top of the head, or of a ponytail behind one shoulder."""
    if person.hair_style == "bun":
        return _roughen(ellipse(person.part * 0.3, person.top - 9, 17, 14), 0.7, rng)
    x = person.width * float(np.sign(person.part)) * np.array([0, 1, 1.4, 1.55, 1.4, 1.05, 0.9])
    return _roughen(spline(points(x, [person.top, -34, -12, 40, 92, 60, 0]), closed=True), 0.8, rng)


def draw_front_hair(canvas: Canvas, person: Person, hair: Hair, head: Head) -> None:
    """Draw the hair over forehead and temples, with its shadow on the skin."""
    offset = (-4 * person.light[0], 5)
    shadow = canvas.cover(hair.outer + offset, holes=[hair.window + offset], soft=3.5, within=head.face)
    canvas.shade(shadow, (0.72, 0.64, 0.62))
    soft = {"fuzz": 1.6, "curl": 0.9}.get(hair.style.flow, 0.45)
    front = canvas.cover(hair.outer, holes=[hair.window], soft=soft, within=hair.frame)
    if hair.style.flow == "fuzz":
        front = Patch(front.box, front.alpha * np.float32(0.85))
    canvas.paint(front, hair.colour, label=HAIR)
    if hair.style.low > 20:
        # Beside the cheeks, long hair lies in its own shadow.
        canvas.shade(canvas.cover(hair.window, soft=5, within=front), (0.62, 0.6, 0.6))


def draw_scalp(canvas: Canvas, person: Person, head: Head) -> None:
    """Draw the stubble on a bald head, which is labelled skin."""
    window = turned(_window(person, STYLES["receding"]), person)
    cap = canvas.cover(head.outline, holes=[window], soft=3, within=head.face)
    canvas.paint(cap, person.skin * 0.72 + person.hair * 0.1, opacity=0.35)


def draw_beard(canvas: Canvas, person: Person, head: Head, rng: Random) -> None:
    """Draw stubble (labelled skin), a full beard, goatee or moustache (hair); the mouth is drawn over it later."""
    if person.beard == "none":
        return
    grown = person.beard != "stubble"
    chin, w, x = person.chin, person.width, person.yaw * 2.6
    lip = 36.0 - person.gape * 0.25
    patches = []
    if person.beard in ("full", "stubble"):
        scale = (1.035, 1.05) if grown else (0.99, 0.985)
        cheek = points([*(w * np.array([1.3, 1.1, 0.84, 0.72])), 21], [-90, -2, 6, 24, lip - 4])
        shaved = np.concatenate([cheek[1:] * (-1, 1), [(x, lip - 5)], cheek[::-1], cheek[:1] * (-1, 1)])
        ring = _roughen(head.outline * scale, 0.5, rng)
        patches.append(canvas.cover(ring, holes=[spline(shaved, closed=True)], soft=1.4 if grown else 3.2))
    if person.beard == "goatee":
        columns = [x - 20, x - 19, -13, 0, 13, x + 19, x + 20, x]
        ring = points(columns, [lip + 2, 52, chin - 6, chin + 3, chin - 6, 52, lip + 2, lip - 3])
        patches.append(canvas.cover(spline(ring, closed=True), soft=1.3))
    if person.beard in ("moustache", "goatee", "full"):
        drop = np.array([6, 0.4, -1.2, 0.4, 6])
        curve = spline(points(x + np.array([-21, -11, 0, 11, 21]), lip + drop))
        patches.append(canvas.cover(ribbon(curve, (1.5, 5.5, 5, 5.5, 1.5)), soft=0.8))
    for patch in patches:
        grain = rng.standard_normal(patch.alpha.shape, np.float32) * 0.16
        grain[1:] += grain[:-1] * 0.7
        colour = (person.brow * 0.55 + person.hair * 0.4) * (0.95 + grain[..., None])
        if grown:
            canvas.paint(patch, colour, opacity=0.9, label=HAIR)
        else:
            canvas.paint(patch, person.skin * 0.35 + colour * 0.45, opacity=0.3 + 0.2 * person.volume)
