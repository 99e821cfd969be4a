"""The attributes of the person on a drawn face, sampled so that they go together."""

from __future__ import annotations

import numpy as np

from core.drawn.canvas import Array

Colour = tuple[float, float, float]
Random = np.random.Generator

# From very fair to very dark; a person's skin lies anywhere between two neighbours.
SKIN_TONES = (
    (230, 188, 166), (224, 178, 150), (210, 160, 128), (194, 143, 110), (158, 110, 80), (118, 80, 60), (86, 60, 48),
)  # fmt: skip
HAIR_COLOURS: dict[str, Colour] = {
    "black": (34, 28, 28),
    "dark brown": (62, 42, 32),
    "brown": (96, 64, 42),
    "auburn": (124, 60, 36),
    "ginger": (182, 96, 46),
    "dark blond": (158, 122, 78),
    "blond": (214, 178, 118),
    "grey": (150, 147, 144),
    "white": (222, 219, 214),
    "dyed": (150, 70, 120),
}
FAIR_HAIR = (14, 15, 18, 9, 6, 13, 20, 2, 1, 1)
DARK_HAIR = (62, 22, 8, 3, 0, 0, 2, 2, 1, 2)
DYES = ((196, 90, 140), (70, 96, 170), (120, 70, 150), (150, 30, 44), (50, 130, 120))
IRISES = ((74, 46, 30), (104, 68, 38), (92, 104, 62), (84, 120, 150), (112, 126, 136))
SHORT = ("crop", "side", "quiff", "buzz", "curls", "receding", "bald", "afro", "swept", "fringe")
LONG = ("long", "wavy", "bob", "bun", "ponytail", "curtain", "bangs", "afro", "pixie", "ringlets")


class Person:
    """Random attributes of one face that fit together.

    Lengths are in face coordinates (pixels), colours (3,) in 0..255 and other numbers in 0..1 unless noted.
    """

    def __init__(self, rng: Random) -> None:
        self.feminine = feminine = bool(rng.random() < 0.55)
        self.age = float(rng.beta(1.3, 2.6))
        tone = float(rng.beta(1.1, 1.7))
        self.skin, self.hair, self.brow, self.lip, self.iris = _colours(rng, tone, self.age, feminine)
        laughs = rng.random() < 0.52
        smile = float(rng.uniform(0.45, 1.0) if laughs else rng.uniform(-0.05, 0.6))
        gape = float(rng.uniform(3.5, 8.0)) if laughs and rng.random() < 0.85 else 0.0
        if not laughs and rng.random() < 0.15:
            gape = float(rng.uniform(2.5, 9.0))
        self.smile = smile  # -0.05 is slightly sad
        self.gape = gape  # how far the mouth is open
        self.width = float(rng.normal(42.0 if feminine else 44.0, 2.0))  # half width at the cheekbones
        # Half the width of the jaw as a share of `width`.
        self.jaw = float(np.clip(rng.normal(0.74 if feminine else 0.82, 0.05), 0.62, 0.94))
        self.chin = float(rng.normal(69 if feminine else 72, 2.4) + gape * 0.3)  # y of its lowest point
        self.chin_width = float(rng.uniform(9, 13) if feminine else rng.uniform(12, 17))
        self.top = float(rng.normal(-66, 2.5))  # y of the top of the skull
        self.yaw = float(np.clip(rng.normal(0, 0.45), -1, 1))  # -1 faces left, 1 faces right
        self.brow_lift = float(rng.normal(0, 1.2) + (2.5 if gape > 0 and not laughs else 0))
        self.brow_weight = float(np.clip(rng.normal(2.6 if feminine else 4.0, 0.7), 1.4, 5.6))
        # How far the eyes are open; 1 is wide.
        self.lids = float(np.clip(rng.normal(0.95, 0.16) - 0.2 * max(smile - 0.4, 0), 0.5, 1.25))
        self.eye_width = float(rng.normal(11.5 if feminine else 10.8, 0.5))
        self.eye_tilt = float(rng.normal(0.6, 0.8))
        self.nose_width = float(np.clip(rng.normal(8.6 + 2.2 * tone + (0 if feminine else 1), 0.9), 7.5, 14))
        self.nose_length = float(rng.normal(27.5, 1.5))
        self.lips = float(np.clip(rng.normal((1.1 if feminine else 0.85) + 0.35 * tone, 0.15), 0.55, 1.6))
        self.mouth_width = float(rng.normal(16.3, 1.2) + 3.4 * max(smile, 0))
        self.makeup = float(rng.uniform(0.2, 1) if feminine and rng.random() < 0.65 else 0)
        self.part = float(rng.choice([-1, 1]) * rng.uniform(6, 20))  # x of the parting
        self.volume = float(rng.uniform(0, 1))  # of the hair
        # x and y of the unit vector towards the light.
        self.light = (float(rng.normal(0, 0.34)), float(-rng.uniform(0.1, 0.55)))
        self.contrast = float(rng.uniform(0.28, 0.56))
        self.hair_style, self.beard, self.hat, self.glasses = _styles(rng, feminine, self.age, tone)


def _pick(rng: Random, options: tuple[str, ...], weights: tuple[float, ...]) -> str:
    """One of `options`, with a probability proportional to its weight."""
    share = np.cumsum(weights)
    return options[int(np.searchsorted(share, rng.random() * share[-1], side="right"))]


def _colours(rng: Random, tone: float, age: float, feminine: bool) -> tuple[Array, ...]:
    """Colours (3,) of skin, hair, brow, lip and iris that suit a skin `tone` from 0 (fair) to 1 (dark)."""
    steps = np.arange(len(SKIN_TONES)) / (len(SKIN_TONES) - 1)
    skin = np.array([np.interp(tone, steps, channel) for channel in np.array(SKIN_TONES, float).T])
    # Lighter or darker, warmer or cooler, but never grey.
    skin *= rng.normal(1, 0.025) * (1 + rng.normal(0, 0.02) * np.array((0.3, -0.2, -1)))
    name = _pick(rng, tuple(HAIR_COLOURS), FAIR_HAIR if rng.random() > tone * 2.4 else DARK_HAIR)
    if age > 0.62 and rng.random() < 0.7:
        name = "grey" if rng.random() < 0.6 else "white"
    base = np.array(DYES[rng.integers(len(DYES))] if name == "dyed" else HAIR_COLOURS[name], float)
    hair = np.clip(base * rng.uniform(0.82, 1.15) * rng.normal(1, 0.03, 3), 12, 240)
    # Brows have the natural hair colour, but are darker than pale hair and lighter than black hair.
    natural = np.array((70.0, 50, 38)) if name in ("dyed", "white") else hair
    brow = np.clip(natural * 0.62 + 8, 20, 150)
    lip = skin * (0.84, 0.62, 0.62) + (14, 6, 10)
    if feminine and rng.random() < 0.35:
        stick = np.array(((176, 38, 52), (196, 84, 96), (140, 40, 62), (206, 104, 92))[rng.integers(4)], float)
        lip = lip * 0.3 + stick * 0.7 * (0.6 + 0.4 * skin[0] / 240)
    eyes = IRISES[rng.integers(len(IRISES))] if rng.random() > tone * 2 else IRISES[0]
    iris = np.clip(np.array(eyes, float) + rng.normal(0, 8, 3), 20, 200)
    return np.clip(skin, 30, 252), hair, brow, np.clip(lip, 20, 235), iris


def _styles(rng: Random, feminine: bool, age: float, tone: float) -> tuple[str, str, str, str]:
    """Names of the hair style, beard, hat and glasses."""
    curly = 1 + 5 * max(tone - 0.45, 0)
    if feminine:
        hair = _pick(rng, LONG, (22, 18, 13, 8, 8, 8, 10, 3 * curly, 5, 5 * curly))
    else:
        thin = 1 + 4 * max(age - 0.45, 0)
        hair = _pick(rng, SHORT, (15, 16, 12, 8 * curly, 8 * curly, 5 * thin, 4 * thin, 3 * curly, 8, 9))
    beard = "none"
    if not feminine:
        beard = _pick(rng, ("none", "stubble", "full", "goatee", "moustache"), (46, 24, 15, 8, 7))
    hats = ("none", "beanie", "cap", "brimmed", "headband", "scarf")
    hat = _pick(rng, hats, (86, 2, 1, 3, 4, 4) if feminine else (86, 5, 6, 3, 0, 0))
    frames = ("none", "round", "square", "cat", "aviator", "rimless")
    glasses = _pick(rng, frames, (79, 6, 7, 4 if feminine else 0, 4, 2))
    return hair, beard, hat, glasses
