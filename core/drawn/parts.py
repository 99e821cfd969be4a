"""The head of a drawn face: skin with relief and light, ears, neck, eyes, brows, nose, mouth."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from core.drawn.canvas import Array, Canvas, Patch, ellipse, mirrored, points, ribbon, smooth_noise, spline
from core.drawn.person import Person, Random

BACKGROUND, SKIN, HAIR, BROWS, EYES, NOSE, MOUTH, GLASSES = range(8)
EYE_X = 20.0  # distance of each eye's centre from the axis of the face, pixels
SIDES = (-1, 1)
ACROSS = np.linspace(-1, 1, 13)  # along an eye, from the inner corner to the outer
CREASE = points(0 * ACROSS[1:], 0.6 * (1 - ACROSS[1:] ** 2))
EYE_WHITE = np.array((226.0, 220, 216))
EYE_SHADOWS = np.array(((120.0, 80, 70), (90, 90, 120), (110, 70, 100), (70, 60, 60)))


@dataclass(frozen=True)
class Head:
    """Outline (N, 2) and coverage of a face, from the chin to the top of the skull."""

    outline: Array
    face: Patch


def _face_outline(person: Person) -> Array:
    """Closed outline (N, 2) of the face, chin and skull; the side turned away is narrower."""
    top, chin, chin_width, jaw = person.top, person.chin, person.chin_width, person.width * person.jaw
    skull = person.width * np.array([0, 0.55, 0.9, 1, 0.99, 0.45 + 0.52 * person.jaw])
    x = [*skull, jaw, (jaw + chin_width) * 0.53, chin_width * 0.72, 0]
    jaw_y = chin * 0.62
    y = [top, top + 6, top + 26, -16, 6, jaw_y * 0.62, jaw_y, chin * 0.87, chin - 1.5, chin]
    return turned(spline(mirrored(points(x, y))[:-1], closed=True, steps=5), person)


def turned(outline: Array, person: Person) -> Array:
    """An outline (N, 2) on a turned head: it slides against the eyes, and its far side is foreshortened."""
    x, y = outline.T
    far = np.where(x * person.yaw > 0, 1 - 0.07 * abs(person.yaw), 1 + 0.04 * abs(person.yaw))
    return points(x * far - 1.5 * person.yaw, y)


def _relief(canvas: Canvas, person: Person, box: tuple[slice, slice]) -> tuple[Array, Array]:
    """Diffuse light and gloss of the face within `box`, each (h, w) float32, from a height map at half resolution."""
    u, v = canvas.u[box][::2, ::2], canvas.v[box][::2, ::2]
    nose, w, smile = person.yaw * 4.0, person.width, max(person.smile, 0)
    middle = (person.top + person.chin) / 2
    across, down = (u + np.float32(person.yaw * 3)) / (w * 1.12), (v - middle) / ((person.chin - middle) * 1.12)
    height = 48 * np.sqrt(np.maximum(1 - across**2 - down**2, 0.05))
    # Axis x and distance from it (on both sides unless 0), y, radii in x and y, height.
    for axis, apart, y, rx, ry, amount in (
        (nose * 0.5, 0, 10, 4.2, 13, 6.5),  # bridge of the nose
        (nose, 0, person.nose_length - 4, 6.0, 5.5, 8.5),  # its tip
        (nose, person.nose_width * 0.75, person.nose_length - 3, 3.4, 4, 3.0),  # nostrils
        (0, 18, -13, 12, 4.5, 2.4),  # brow ridges
        (0, EYE_X - 1, 0, 12, 6.5, -4.2),  # eye sockets
        (0, w * 0.6, 20 - 2 * smile, 11, 10, 3.5 + 2.5 * smile),  # cheeks
        (nose * 0.6, 0, 43, 15, 8, 3.2),  # mouth
        (nose * 0.4, 0, person.chin - 9, 10, 6, 3.8),  # chin
    ):
        for x in (axis - apart, axis + apart) if apart else (axis,):
            du, dv = (u - np.float32(x)) / rx, (v - np.float32(y)) / ry
            height += np.float32(amount) * np.exp(-(du**2) - dv**2)
    down, right = np.gradient(height, 2.0)
    norm = 1 / np.sqrt(1 + right * right + down * down)
    lx, ly = person.light
    lz = math.sqrt(max(1 - lx * lx - ly * ly, 0.3))
    facing = np.maximum((lz - right * lx - down * ly) * norm, 0)
    # Bounded above, so that skin that faces the light is not overexposed.
    light = np.minimum(1 - person.contrast + person.contrast * facing / lz, 1.12)
    # Blinn's half-way vector between light and viewer: a mild shine on nose, forehead and cheeks.
    hx, hy, hz = np.array([lx, ly, lz + 1]) / math.sqrt(lx * lx + ly * ly + (lz + 1) ** 2)
    gloss = np.maximum((hz - right * hx - down * hy) * norm, 0) ** 64
    size = box[1].stop - box[1].start, box[0].stop - box[0].start
    fields = (Image.fromarray(np.ascontiguousarray(field, np.float32)) for field in (light, gloss))
    full_light, full_gloss = (np.asarray(field.resize(size, Image.Resampling.BILINEAR)) for field in fields)
    return full_light, full_gloss


def _lit_skin(canvas: Canvas, person: Person, box: tuple[slice, slice], rng: Random) -> Array:
    """Colour of the face within `box`, (h, w, 3) in 0..255, with light and shine."""
    light, gloss = _relief(canvas, person, box)
    base = np.asarray(person.skin, np.float32)
    # Skin scatters red light furthest, so shadows lose green and blue first.
    fall = np.array((0.92, 1.02, 1.07), np.float32)
    mottle = np.float32(0.016) * smooth_noise(rng, 22, 16, light.shape[::-1])
    lit = base * (1 + (light + mottle - 1)[..., None] * fall)
    shine = np.float32(rng.uniform(8, 26) + 8 * (1 - person.skin[0] / 255))
    return lit + (gloss * shine)[..., None]


def _draw_neck(canvas: Canvas, person: Person, outline: Array) -> None:
    """The neck, shaded as a cylinder, with the shadow of the chin."""
    half = person.width * (0.56 if person.feminine else 0.7)
    x = -2.0 * person.yaw
    side = points(half * np.array([0.96, 0.94, 1.05, 1.35, 1.5]), [40, 78, 90, 100, 118])
    patch = canvas.cover(spline(mirrored(side)) + (x, 0))
    across = np.clip((canvas.u[patch.box] - x) / (half * 1.15), -1.1, 1.1)
    light = 0.93 - 0.26 * across**2 + 0.28 * person.light[0] * across
    fall = np.array((0.9, 1.03, 1.08), np.float32)
    canvas.paint(patch, np.asarray(person.skin, np.float32) * (1 + (light - 1)[..., None] * fall), label=SKIN)
    shadow = canvas.cover(outline + (-6 * person.light[0], 11), soft=4.5, within=patch)
    canvas.shade(shadow, (0.66, 0.58, 0.55))


def _draw_ears(canvas: Canvas, person: Person) -> None:
    """Both ears; the one on the far side shows less."""
    shape = points([-1, 3.5, 6.2, 5.6, 3.4, 1.2, -1.5], [-9, -11, -6, 3, 10, 15, 14])
    rings, hollows = [], []
    for side in SIDES:
        hidden = max(person.yaw * side, 0)
        x = side * (person.width * (0.99 - 0.07 * hidden) + 1.2 - 2.5 * hidden) - 1.5 * person.yaw
        rings.append(spline(shape * (side, 1.0) + (x, 4), closed=True))
        hollows.append((x + side * 2.2, 4.0))
    patch = canvas.cover(*rings)
    canvas.paint(patch, person.skin * (0.9, 0.84, 0.82), label=SKIN)
    canvas.shade(canvas.blob(*hollows, rx=1.8, ry=6, within=patch), (0.74, 0.64, 0.62))


def draw_head(canvas: Canvas, person: Person, rng: Random, ears: bool) -> Head:
    """Draw the neck, the `ears` unless hair hides them, and the face without features: skin, blush, lines, freckles."""
    outline = _face_outline(person)
    _draw_neck(canvas, person, outline)
    if ears:
        _draw_ears(canvas, person)
    face = canvas.cover(outline)
    canvas.paint(face, _lit_skin(canvas, person, face.box, rng), label=SKIN)
    blush = rng.uniform(0.02, 0.12) + 0.12 * person.makeup
    cheeks = [(side * person.width * 0.58 + person.yaw, 23.0) for side in SIDES]
    canvas.paint(canvas.blob(*cheeks, rx=10, ry=8), person.skin * (0.98, 0.66, 0.64), opacity=blush * 1.6)
    if person.age > 0.4 or person.smile > 0.5:
        _draw_lines(canvas, person)
    if person.skin[0] > 200 and rng.random() < 0.08:
        _draw_freckles(canvas, person, rng)
    return Head(outline, face)


def _draw_lines(canvas: Canvas, person: Person) -> None:
    """Folds from nose to mouth that deepen with age and smile, and the lines of an old forehead."""
    depth = 0.02 + 0.4 * max(person.age - 0.4, 0) + 0.1 * max(person.smile, 0)
    nose, mouth = person.yaw * 3, person.mouth_width + 4
    for side in SIDES:
        fold = spline(points(nose + side * np.array([person.nose_width + 1.5, mouth, mouth + 1]), [23, 33, 42]))
        factor = (1 - depth, 1 - 1.25 * depth, 1 - 1.3 * depth)
        canvas.shade(canvas.cover(ribbon(fold, (1.0, 2.6, 0.6)), soft=1.3), factor)
        if person.age > 0.45:
            bag = spline([(side * 12 + nose * 0.2, 7.5), (side * 20, 10), (side * 28, 6.5)])
            canvas.shade(canvas.cover(ribbon(bag, (0.5, 1.6, 0.5)), soft=0.9), (0.86, 0.8, 0.79))
    if person.age > 0.55:
        for y in (-30, -36, -42):
            line = spline(points([-22, -8, 8, 22], [y + 1.5, y - 0.5, y, y + 1.5]))
            canvas.shade(canvas.cover(ribbon(line, (0.3, 1.3, 0.3)), soft=1.0), (0.88, 0.83, 0.82))


def _draw_freckles(canvas: Canvas, person: Person, rng: Random) -> None:
    """Small brown spots over cheeks and nose."""
    places = rng.normal(0, 1, (46, 2)) * (17, 6) + (0, 17)
    dots = [ellipse(x, y, r, r, count=6) for (x, y), r in zip(places, rng.uniform(0.35, 0.9, 46), strict=True)]
    canvas.shade(canvas.cover(*dots, soft=0.5), (0.86, 0.78, 0.72))


def draw_eyes(canvas: Canvas, person: Person, rng: Random) -> None:
    """Draw both eyes with a common gaze: sockets, whites, irises, lids and lashes."""
    gaze = float(np.clip(rng.normal(person.yaw * 0.8, 0.8), -2.2, 2.2)), float(rng.normal(0, 0.25))
    shadow = EYE_SHADOWS[rng.integers(len(EYE_SHADOWS))]
    lids = [_lids(person, side) for side in SIDES]
    tops, lows = [top for top, _ in lids], [low for _, low in lids]
    half = person.eye_width
    canvas.shade(canvas.blob((-18.5, -4.5), (18.5, -4.5), rx=half * 0.85, ry=4.2), (0.88, 0.83, 0.82))
    if person.makeup > 0:
        canvas.paint(canvas.blob((-22, -4.5), (22, -4.5), rx=half * 0.6, ry=2.8), shadow, opacity=0.45 * person.makeup)
    white = canvas.cover(*(np.concatenate([top, low[::-1]]) for top, low in lids))
    canvas.paint(white, EYE_WHITE * (0.72 + 0.28 * person.skin[0] / 250), label=EYES)
    corners = canvas.blob((half - EYE_X, 1), (EYE_X - half, 1), rx=2.4, ry=2.2, within=white)
    canvas.shade(corners, (0.9, 0.7, 0.66))
    _draw_irises(canvas, person, gaze, white)
    shade = canvas.cover(*(ribbon(top + (0, 0.8), (2, 3.4, 2)) for top in tops), soft=0.8, within=white)
    canvas.shade(shade, (0.5, 0.46, 0.45))
    weight = 1.5 + 1.1 * person.makeup + (0.35 if person.feminine else 0)
    lashes = []
    for side, top in zip(SIDES, tops, strict=True):
        flick = np.array([[side * (EYE_X + half + 1.2 + person.makeup), top[-1, 1] - 0.6 - person.makeup]])
        lashes.append(ribbon(np.concatenate([top, flick]), (0.8, weight, weight, 0.4)))
    canvas.paint(canvas.cover(*lashes), np.clip(person.brow * 0.55, 14, 70), opacity=0.9)
    rims = canvas.cover(*(ribbon(low, (0.4, 0.9, 0.7)) for low in lows))
    canvas.paint(rims, person.skin * (0.5, 0.38, 0.36), opacity=0.55)
    creases = [ribbon(top[1:] - (0, 2.7) - CREASE, (0.4, 1.4, 0.9)) for top in tops]
    canvas.shade(canvas.cover(*creases, soft=0.5), (0.68, 0.58, 0.56))


def _lids(person: Person, side: int) -> tuple[Array, Array]:
    """Edges of the upper and the lower lid, (13, 2) each, from the inner corner to the outer."""
    half = person.eye_width * (1 - 0.06 * max(person.yaw * side, 0))
    lift, drop = 5.6 * person.lids, 3.0 * (0.75 + 0.25 * person.lids) - 0.6 * max(person.smile, 0)
    x, slant = side * (EYE_X + half * ACROSS), 0.6 - person.eye_tilt * ACROSS
    # The upper lid is highest towards the nose, the lower lid lowest towards the temple.
    top = points(x, slant - lift * (1 - abs(ACROSS) ** 2.3) * (1 - 0.16 * ACROSS))
    return top, points(x, slant + drop * (1 - abs(ACROSS) ** 2.2) * (1 + 0.2 * ACROSS))


def _draw_irises(canvas: Canvas, person: Person, gaze: tuple[float, float], white: Patch) -> None:
    """Irises with dark rims, pupils and the reflection of the light."""
    y = gaze[1] - 0.9
    middles = [(side * EYE_X + gaze[0], y) for side in SIDES]
    canvas.paint(canvas.cover(*(ellipse(*place, 4.9, 4.9) for place in middles), within=white), person.iris * 0.42)
    inner = canvas.cover(*(ellipse(*place, 4.0, 4.0) for place in middles), within=white)
    glow = np.clip(1.0 + 0.09 * (canvas.v[inner.box] - y), 0.6, 1.5)[..., None]
    canvas.paint(inner, person.iris * glow)
    pupils = canvas.cover(*(ellipse(*place, 2.1, 2.1, count=16) for place in middles), within=white)
    canvas.paint(pupils, np.array((12, 9, 9)))
    side = 1.6 if person.light[0] >= 0 else -1.6
    sparks = canvas.cover(*(ellipse(x + side, y - 1.5, 1.1, 1.1, count=12) for x, _ in middles), within=white)
    canvas.paint(sparks, np.array((250, 250, 248)), opacity=0.92)


def draw_brows(canvas: Canvas, person: Person, rng: Random) -> None:
    """Draw both brows, which taper outwards and show single hairs."""
    arch = rng.uniform(0.6, 3.0) if person.feminine else rng.uniform(0, 1.8)
    frown = rng.normal(-0.5, 0.8)
    for side in SIDES:
        y = -11.5 - person.brow_lift
        right = points([7.5, 14, 22, 29, 33.5], [y + 0.5 + frown, y - 0.6, y - 1.2 - arch, y + 0.2 - arch * 0.4, y + 4])
        line = spline(right * (side, 1) + (person.yaw * 0.8, 0), steps=4)
        weight = person.brow_weight
        patch = canvas.cover(ribbon(line, (weight * 0.75, weight * 1.15, weight, weight * 0.7, 0.5)), soft=0.55)
        comb = np.sin((canvas.u[patch.box] * side - canvas.v[patch.box] * 0.6) * 3.1) * 0.14
        noise = rng.normal(0, 0.1, patch.alpha.shape)
        canvas.paint(patch, person.brow * (1 + (comb + noise)[..., None]), opacity=0.88, label=BROWS)


def draw_nose(canvas: Canvas, person: Person) -> None:
    """Draw the nostrils, wings and shadow of the nose; its ridge is part of the skin's relief."""
    x, y, w = person.yaw * 4.0, person.nose_length, person.nose_width
    canvas.shade(canvas.blob((x - 5 * person.light[0], y + 3.5), rx=w * 0.62, ry=2.3), (0.8, 0.72, 0.7))
    wings, holes = [], []
    for side in SIDES:
        near = side * (1 - 0.22 * person.yaw * side)
        wing = spline(points([x + w * 0.8 * near, x + w * near, x + w * 0.86 * near], [y - 7, y - 3, y + 1]))
        wings.append(ribbon(wing, (0.3, 1.5, 1.1)))
        holes.append(ellipse(x + w * 0.46 * near, y + 0.7, w * 0.24 * abs(near), 1.25, count=14))
    # Only the side away from the light is in shadow.
    canvas.shade(canvas.blob((x * 0.4 - math.copysign(6.5, person.light[0]), 4), rx=2.2, ry=7), (0.89, 0.83, 0.82))
    canvas.shade(canvas.cover(*wings, soft=0.7), (0.72, 0.58, 0.56))
    canvas.paint(canvas.cover(*holes, soft=0.6), person.skin * (0.3, 0.2, 0.19), opacity=0.85)
    axis = np.array([person.yaw, person.yaw, x, x, x, x])
    right = points(axis + [3.2, 4.2, w * 0.8, w, w * 0.7, 0], [-1, 9, y - 7, y - 3, y + 1.8, y + 2.8])
    left = points(2 * axis - right[:, 0], right[:, 1])[::-1]
    canvas.mark(canvas.cover(spline(np.concatenate([right, left[1:]]), closed=True)), NOSE)


def draw_mouth(canvas: Canvas, person: Person) -> None:
    """Draw lips in two tones and, in an open mouth, the teeth between them."""
    x, half, gape, full = person.yaw * 2.6, person.mouth_width, person.gape, person.lips
    y = 43.5 - gape * 0.25
    rise = 4.0 * person.smile + 0.9
    t = np.linspace(-1, 1, 17)
    arc = 1 - t * t
    bow = -(3.4 * full) * (1 - abs(t) ** 1.3) + 1.1 * full * np.exp(-((t / 0.14) ** 2))
    seam_top = y - rise * (t * t) + rise * 0.28 - 0.1 * gape * arc
    seam_low = seam_top + gape * arc**0.8
    column = x + half * t * (1 - 0.08 * person.yaw * t)
    rows = (seam_top + bow * arc**0.35, seam_top, seam_low, seam_low + 5.2 * full * arc**0.75)
    upper, inner, gap, lower = (points(column, row) for row in rows)
    canvas.shade(canvas.blob((x, lower[8, 1] + 2.6), rx=half * 0.45, ry=1.7), (0.8, 0.73, 0.72))
    whole = canvas.cover(np.concatenate([upper, lower[::-1]]), soft=0.4)
    canvas.paint(whole, person.lip * 0.8, label=MOUTH, opacity=0.9)
    low_lip = canvas.cover(np.concatenate([gap, lower[::-1]]), soft=0.5, within=whole)
    canvas.paint(low_lip, person.lip * 1.04)
    shine = canvas.blob((x + 3 * person.light[0], gap[8, 1] + 2.1 * full), rx=half * 0.3, ry=0.9 * full, within=low_lip)
    canvas.paint(shine, np.minimum(person.lip * 1.2 + 46, 255), opacity=0.35 + 0.35 * person.makeup)
    if gape > 0:
        _draw_teeth(canvas, person, inner, gap, (x, half))
    line = ribbon(inner if gape == 0 else gap, (0.5, 1.3, 1.0, 1.3, 0.5))
    canvas.shade(canvas.cover(line, soft=0.4), (0.45, 0.34, 0.34) if gape == 0 else (0.8, 0.72, 0.72))
    canvas.shade(canvas.blob(inner[0], inner[-1], rx=1.8, ry=1.5), (0.74, 0.65, 0.63))


def _draw_teeth(canvas: Canvas, person: Person, inner: Array, gap: Array, place: tuple[float, float]) -> None:
    """The inside of the mouth, between the edges `inner` and `gap` (17, 2) of the lips, and the upper teeth."""
    x, half = place
    inside = canvas.cover(np.concatenate([inner, gap[::-1]]))
    canvas.paint(inside, np.array((74, 26, 28)), opacity=0.95)
    reach = 0.86 if person.smile > 0.4 else 0.42
    edge = inner + (gap - inner) * (0, reach)
    teeth = canvas.cover(np.concatenate([inner, edge[::-1]])[1:-1], within=inside)
    across = (canvas.u[teeth.box] - x) / half
    shade = 1 - 0.45 * across**4 - 0.06 * (np.cos(across * half * 2 * math.pi / 4.4) > 0.9)
    canvas.paint(teeth, np.array((240, 234, 224)) * shade[..., None] * (0.8 + 0.2 * person.skin[0] / 250), opacity=0.97)
    canvas.shade(canvas.cover(ribbon(inner, (1.2, 2.0, 1.2)), soft=0.7, within=inside), (0.66, 0.58, 0.57))
