"""The built-in data set: drawn faces, aligned and sized like CelebA's, with exact masks.

Face `index` of collection `seed` is a pure function of the two numbers, so every command and test can run without a
data set. All random choices are the same on every machine, but another processor or another version of Pillow or NumPy
may round single pixels differently.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from core.drawn.canvas import HEIGHT, WIDTH, Array, Canvas, smooth_noise
from core.drawn.hair import draw_back_hair, draw_beard, draw_front_hair, draw_scalp, make_hair
from core.drawn.parts import draw_brows, draw_eyes, draw_head, draw_mouth, draw_nose
from core.drawn.person import Person, Random
from core.drawn.wear import draw_background, draw_clothes, draw_glasses, draw_hat

# Classes by mask value. Skin includes neck, ears and bald scalps; hair includes beards and moustaches but not stubble;
# hats, scarves and clothes are background. Glasses are the frames only: what is seen through a lens keeps its class.
_COLOURS = {  # the first of core.data.mask_classes.DISTINCT
    "background": (24, 26, 32),
    "skin": (240, 105, 0),
    "hair": (0, 120, 210),
    "brows": (0, 195, 150),
    "eyes": (90, 75, 0),
    "nose": (255, 240, 15),
    "mouth": (165, 60, 105),
    "glasses": (240, 180, 255),
}
CLASSES, PALETTE = tuple(_COLOURS), tuple(_COLOURS.values())
SIZE = (WIDTH, HEIGHT)


def draw_face(seed: int, index: int) -> tuple[Image.Image, Image.Image]:
    """Draw face `index` of collection `seed`, both non-negative.

    Returns:
        The picture, RGB of 178 x 218 pixels, and its mask, mode "L" of the same size with indices into `CLASSES`.
    """
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, index])))
    person = Person(rng)
    shift = (float(rng.normal(0, 0.9)), float(rng.normal(0, 0.8)))
    canvas = Canvas(float(rng.normal(0, 0.035)), float(np.clip(rng.normal(1, 0.025), 0.93, 1.07)), shift)
    draw_background(canvas, rng)
    hair = make_hair(canvas, person, rng)
    if hair:
        draw_back_hair(canvas, hair)
    head = draw_head(canvas, person, rng, ears=hair is None or hair.style.low <= 20)
    draw_clothes(canvas, person, rng)
    draw_eyes(canvas, person, rng)
    draw_brows(canvas, person, rng)
    draw_nose(canvas, person)
    draw_beard(canvas, person, head, rng)
    draw_mouth(canvas, person)
    if hair:
        draw_front_hair(canvas, person, hair, head)
    elif person.hat != "scarf":
        draw_scalp(canvas, person, head)
    draw_hat(canvas, person, head, rng)
    draw_glasses(canvas, person, rng)
    return Image.fromarray(_develop(canvas.pixels, rng)), Image.fromarray(canvas.labels)


def _develop(pixels: Array, rng: Random) -> Array:
    """Exposure, white balance, contrast, uneven light and grain, as of a camera: uint8 (218, 178, 3).

    Overwrites `pixels`.
    """
    warmth = rng.normal(0, 0.03)
    contrast = rng.uniform(0.92, 1.12)
    gain = rng.uniform(0.9, 1.1) * contrast * np.array((1 + warmth, 1, 1 - warmth))
    noise = smooth_noise(rng, 4, 3) * np.float32(3.0)
    noise += rng.standard_normal((HEIGHT, WIDTH), np.float32) * np.float32(rng.uniform(0.8, 3.0))
    noise += np.float32(118 * (1 - contrast))
    pixels *= gain.astype(np.float32)
    pixels += noise[..., None]
    # A soft shoulder, as in film: bright skin keeps its colour instead of clipping to white.
    np.minimum(pixels, pixels * np.float32(0.6) + np.float32(0.4 * 210), out=pixels)
    np.clip(pixels, 0, 255, out=pixels)
    return pixels.astype(np.uint8)
