"""Clothes, hats, glasses and the background of a drawn face."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageFilter

from core.drawn.canvas import (
    HEIGHT,
    WIDTH,
    Array,
    Canvas,
    Patch,
    ellipse,
    mirrored,
    points,
    ribbon,
    smooth_noise,
    spline,
)
from core.drawn.parts import BACKGROUND, EYE_X, GLASSES, SIDES, Head
from core.drawn.person import Person, Random

FABRICS = (
    (36, 40, 52), (28, 28, 30), (232, 230, 226), (120, 30, 38), (52, 84, 130), (70, 96, 70), (196, 160, 90),
    (150, 90, 110), (90, 60, 110), (200, 110, 80), (110, 112, 118), (60, 120, 130), (222, 190, 196),
)  # fmt: skip


def _fabric(rng: Random) -> Array:
    """A random colour of cloth, (3,)."""
    return np.clip(np.array(FABRICS[rng.integers(len(FABRICS))], float) + rng.normal(0, 10, 3), 12, 245)


def draw_background(canvas: Canvas, rng: Random) -> None:
    """Draw a plain wall, a gradient, two tones, blurred lights, texture or rough shapes, each slightly uneven."""
    kind = rng.integers(6)
    # Hues of walls, wood and leaves, far more often than violet.
    hue = rng.normal(0.1, 0.12) if rng.random() < 0.6 else rng.normal(0.57, 0.1)
    level = rng.uniform(45, 225)
    first = _tint(hue, 0.45 * rng.random() ** 1.5, level)
    second = _tint(hue + rng.normal(0, 0.12), 0.5 * rng.random(), np.clip(level + rng.normal(0, 60), 20, 240))
    y, x = np.mgrid[0:28, 0:23].astype(np.float32) / 25
    if kind == 0:
        mix = 0.25 * np.hypot(x - 0.5, y - 0.5)
    elif kind == 1:
        angle = rng.uniform(0, 2 * np.pi)
        mix = np.clip(0.5 + (x - 0.5) * np.cos(angle) + (y - 0.5) * np.sin(angle), 0, 1)
    elif kind == 2:
        angle = rng.normal(0, 0.25) + (np.pi / 2 if rng.random() < 0.3 else 0)
        mix = np.clip((x - rng.uniform(0.2, 0.8) + (y - 0.5) * np.sin(angle)) * 9 + 0.5, 0, 1)
    elif kind == 3:
        mix = np.zeros_like(x)
        for _ in range(9):
            mix = np.maximum(mix, rng.uniform(0.3, 1) * _disc(x, y, rng))
    elif kind == 4:
        mix = 0.5 + 0.25 * smooth_noise(rng, 6, 5, (23, 28))
    else:
        mix = np.zeros_like(x)
        for _ in range(7):
            left, top, wide, high = (
                rng.uniform(*limits) for limits in ((-0.1, 0.8), (-0.1, 0.8), (0.1, 0.4), (0.1, 0.9))
            )
            mix = np.where((abs(x - left) < wide / 2) & (abs(y - top) < high / 2), rng.uniform(0, 1), mix)
    mix = mix + 0.05 * smooth_noise(rng, 5, 4, (23, 28))
    small = np.clip(first + (second - first) * mix[..., None], 0, 255).astype(np.uint8)
    blurred = Image.fromarray(small).filter(ImageFilter.GaussianBlur(0.7))
    canvas.pixels[:] = np.asarray(blurred.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))


def _disc(x: Array, y: Array, rng: Random) -> Array:
    """One out-of-focus light on the coarse background grid."""
    far = np.hypot(x - rng.uniform(-0.1, 1), y - rng.uniform(-0.1, 1.2)) / rng.uniform(0.06, 0.2)
    return np.clip((1.2 - far) * 4, 0, 1)


def _tint(hue: float, saturation: float, level: float) -> Array:
    """A colour (3,) of the given hue (turns), saturation and brightest channel."""
    ramp = np.clip(np.abs(((hue + np.array((0, 2 / 3, 1 / 3))) % 1) * 6 - 3) - 1, 0, 1)
    return level * (1 - saturation * (1 - ramp))


def draw_clothes(canvas: Canvas, person: Person, rng: Random) -> None:
    """Draw the shoulders in a crew neck, V neck, turtleneck, shirt or jacket."""
    kind = rng.integers(5)
    colour = _fabric(rng).astype(np.float32)
    neck = person.width * (0.62 if person.feminine else 0.76)
    wide = 78 if person.feminine else 90
    shoulders = points([0, neck, neck * 1.5, wide, wide + 16], [84, 86, 93, 104, 130])
    necklines = {0: ellipse(0, 84, neck * 1.02, 12), 1: spline([(-neck, 78), (0, 112), (neck, 78)], steps=2)}
    hole = necklines.get(int(kind), ellipse(0, 70, neck, 13))
    x = -2 * person.yaw
    body = canvas.cover(spline(mirrored(shoulders)) + (x, 0), holes=[hole + (x, 0)])
    folds = 1 + np.float32(0.1) * smooth_noise(rng, 3, 9, body.alpha.shape[::-1])
    folds += 0.2 * person.light[0] * np.clip(canvas.u[body.box] / 80, -1, 1)
    canvas.paint(body, colour * folds[..., None], label=BACKGROUND)
    if kind == 2:
        collar = points([0, neck * 0.98, neck * 1.06, 0], [78, 76, 92, 98])
        roll = canvas.cover(spline(mirrored(collar), closed=True) + (x, 0))
        canvas.paint(roll, colour * (0.92 - 0.2 * (canvas.u[roll.box] / neck) ** 2)[..., None], label=BACKGROUND)
    elif kind >= 3:
        shirt = colour * 0.85 + 30 if kind == 3 else np.array((228, 228, 226))
        for side in SIDES:
            flap = points(side * np.array([neck * 1.02, 3, 12, neck * 1.3]), [76, 96, 109, 92])
            canvas.paint(canvas.cover(flap + (x, 0)), np.clip(shirt, 0, 245) * (1 + 0.06 * side), label=BACKGROUND)
        if kind == 4:
            tie = canvas.cover(points([-5, 5, 8, -8], [95, 95, 125, 125]) + (x, 0))
            canvas.paint(tie, _fabric(rng), label=BACKGROUND)


def draw_hat(canvas: Canvas, person: Person, head: Head, rng: Random) -> None:
    """Draw the beanie, cap, brimmed hat, headband or headscarf; all are labelled background."""
    if person.hat == "none":
        return
    colour = _fabric(rng)
    if person.hat == "headband":
        arc = mirrored(points(person.width * np.array([0, 0.6, 1.06]), [-56, -50, -30]))
        band = canvas.cover(ribbon(spline(arc), (6, 8, 6)))
        canvas.paint(band, colour * (1 - 0.3 * (canvas.u[band.box] / 48) ** 2)[..., None], label=BACKGROUND)
        return
    if person.hat == "scarf":
        _draw_scarf(canvas, person, head, colour, rng)
        return
    w, tall = person.width, person.top - rng.uniform(8, 16)
    edge = -33.0 if person.hat == "beanie" else -38.0
    dome = spline(mirrored(points(w * np.array([0, 0.6, 1, 1.1]), [tall, tall + 5, tall + 24, edge + 6])))
    sag = spline(mirrored(points(w * np.array([0, 0.55, 1.1]), [edge - 3, edge - 1, edge + 6]))[::-1])
    ring = np.concatenate([dome, sag])
    canvas.shade(canvas.cover(ring + (-3 * person.light[0], 6), soft=3.5, within=head.face), (0.66, 0.6, 0.58))
    body = canvas.cover(ring)
    u, v = canvas.u[body.box], canvas.v[body.box]
    light = 1.02 - 0.42 * (u / (w * 1.15)) ** 2 + 0.4 * person.light[0] * u / w - 0.003 * (v + 60)
    if person.hat == "beanie":
        light = light + 0.07 * np.sin(u * 1.7)
    canvas.paint(body, colour * light[..., None], label=BACKGROUND)
    if person.hat == "beanie":
        fold = ribbon(sag + (0, -7), (15, 16, 15))
        canvas.paint(canvas.cover(fold, within=body), np.minimum(colour * 1.12 + 8, 250), opacity=0.75)
        canvas.shade(canvas.cover(ribbon(sag + (0, -15), (1.5, 1.5)), soft=0.8, within=body), (0.6, 0.6, 0.6))
    else:
        _draw_brim(canvas, person, head, colour, edge)


def _draw_brim(canvas: Canvas, person: Person, head: Head, colour: Array, edge: float) -> None:
    """The peak of a cap or the brim of a hat."""
    w = person.width
    tip, top, bottom, droop, low = (0.92, 0.5, 0.5, 4, 9) if person.hat == "cap" else (1.9, 1, 0.9, 2, 8)
    x = w * np.array([-tip, -top, top, tip, bottom, -bottom])
    ring = spline(points(x, [edge + droop, edge - 5, edge - 5, edge + droop, edge + low, edge + low]), closed=True)
    canvas.shade(canvas.cover(ring + (0, 9), soft=4, within=head.face), (0.6, 0.54, 0.52))
    brim = canvas.cover(ring)
    shade = 0.92 - 0.012 * (canvas.v[brim.box] - edge)
    canvas.paint(brim, colour * shade[..., None], label=BACKGROUND)
    if person.hat == "brimmed":
        band = spline([(-w * 1.06, edge - 4), (0, edge - 11), (w * 1.06, edge - 4)])
        canvas.shade(canvas.cover(ribbon(band, (7, 7))), (0.5, 0.5, 0.5))


def _draw_scarf(canvas: Canvas, person: Person, head: Head, colour: Array, rng: Random) -> None:
    """A headscarf that frames the face and falls over the shoulders."""
    w, top, chin = person.width, person.top, person.chin
    outside = points(w * np.array([0, 0.75, 1.18, 1.26, 1.3, 2, 2.4]), [top - 9, top + 2, -26, 20, 60, 96, 130])
    inside = points(w * np.array([0, 0.55, 0.88, 0.86, 0.62, 0.3, 0]), [-46, -42, -20, 12, 45, chin - 5, chin - 1])
    outer = spline(mirrored(outside))
    window = spline(mirrored(inside)[:-1], closed=True) - (1.5 * person.yaw, 0)
    shadow = canvas.cover(outer, holes=[window + (-3 * person.light[0], 4)], soft=3, within=head.face)
    canvas.shade(shadow, (0.7, 0.62, 0.6))
    body = canvas.cover(outer, holes=[window])
    u, v = canvas.u[body.box], canvas.v[body.box]
    wrap = np.sqrt((u / w) ** 2 + ((v + 10) / 62) ** 2)
    folds = 0.96 + 0.1 * np.sin(wrap * 19 + 2.0 * smooth_noise(rng, 5, 4)[body.box])
    folds += 0.3 * person.light[0] * np.clip(u / 60, -1, 1)
    canvas.paint(body, colour * folds[..., None], label=BACKGROUND)
    canvas.shade(canvas.cover(window, soft=3, within=body), (0.62, 0.6, 0.6))


def draw_glasses(canvas: Canvas, person: Person, rng: Random) -> None:
    """Draw glasses, clear or tinted; the eyes behind keep their label."""
    if person.glasses == "none":
        return
    rx, ry, power, thick = {
        "round": (14.5, 13.5, 2.0, 1.9),
        "square": (16.5, 11.0, 4.0, 2.6),
        "cat": (16.5, 11.5, 2.8, 2.6),
        "aviator": (16.8, 14.0, 2.6, 1.5),
        "rimless": (15.5, 10.5, 3.0, 1.1),
    }[person.glasses]
    frames = np.array(((26, 24, 26), (70, 44, 30), (120, 118, 122), (150, 36, 44), (168, 132, 70)), float)
    frame = frames[2] if person.glasses == "rimless" else frames[rng.integers(5)]
    sun = rng.random() < (0.5 if person.glasses == "aviator" else 0.15)
    tint, density = (np.array((44, 38, 36)), rng.uniform(0.62, 0.82)) if sun else (np.array((225, 235, 240)), 0.07)
    for side in SIDES:
        lens = ellipse(0, 0, rx, ry, power)
        if person.glasses == "cat":
            lens = lens - np.stack([0 * lens[:, 0], np.clip(lens[:, 0] * side, 0, None) * 0.26], 1)
        if person.glasses == "aviator":
            lens = lens + np.stack([side * np.clip(lens[:, 1], 0, None) * 0.22, 0 * lens[:, 1] + 2], 1)
        squeeze = 1 - 0.06 * max(person.yaw * side, 0)
        centre = (side * EYE_X * 1.02 + person.yaw * 0.8, 2.0)
        outer, inner = lens * (squeeze, 1) + centre, lens * (squeeze * (1 - thick / rx), 1 - thick / ry) + centre
        canvas.shade(canvas.cover(outer + (0, 2.5), holes=[inner + (0, 2.5)], soft=1.2), (0.84, 0.8, 0.8))
        glass = canvas.cover(inner)
        fade = density * np.clip(1.15 - 0.02 * (canvas.v[glass.box] + 10), 0.5, 1.15)
        canvas.paint(Patch(glass.box, glass.alpha * fade), tint)
        glare = np.array([(-9, -12), (-2, -12), (-9, 12), (-16, 12)]) + centre
        canvas.paint(canvas.cover(glare, soft=1.2, within=glass), np.array((255, 255, 255)), opacity=0.10)
        canvas.paint(canvas.cover(outer, holes=[inner]), frame, label=GLASSES)
        arm = np.array([(side * (EYE_X + rx - 1), -3.0), (side * (person.width + 2) - 1.5 * person.yaw, -5.0)])
        canvas.paint(canvas.cover(ribbon(arm, (thick * 0.9, thick * 0.8))), frame * 0.85, label=GLASSES)
    bridge = spline([(-6.5, 0), (0, -2.2), (6.5, 0)]) + (person.yaw * 0.9, 0)
    canvas.paint(canvas.cover(ribbon(bridge, (thick, thick))), frame, label=GLASSES)
