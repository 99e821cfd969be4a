"""The colours of masks: told apart by any colour vision, in numbers that are computed here from the definitions."""

from itertools import combinations

import numpy as np
import pytest

from core.data.mask_classes import CELEBAMASK_HQ, DISTINCT, default_palette
from core.data.mask_pictures import WRONG, errors
from core.drawn.face import PALETTE

# Machado, Oliveira & Fernandes, "A physiologically-based model for simulation of color vision deficiency", 2009, at
# severity 1; they apply to linear RGB.
VISIONS = {
    "normal": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
}
XYZ = np.array([[0.412456, 0.357576, 0.180438], [0.212673, 0.715152, 0.072175], [0.019334, 0.119192, 0.950304]])
D65 = np.array([0.95047, 1.0, 1.08883])


def linear(colour):
    """sRGB 0..255 to linear RGB, IEC 61966-2-1."""
    value = np.asarray(colour, float) / 255
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    """Linear RGB to CIE L*a*b* under D65."""
    ratio = XYZ @ np.clip(rgb, 0, 1) / D65
    x, y, z = np.where(ratio > (6 / 29) ** 3, np.cbrt(ratio), ratio / (3 * (6 / 29) ** 2) + 4 / 29)
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


def ciede2000(first, second):
    """The difference of two L*a*b* colours, in the notation of Sharma, Wu & Dalal (2005)."""
    (l1, a1, b1), (l2, a2, b2) = first, second
    mean = (np.hypot(a1, b1) + np.hypot(a2, b2)) / 2
    stretch = 1.5 - 0.5 * np.sqrt(mean**7 / (mean**7 + 25**7))
    c1, c2 = np.hypot(stretch * a1, b1), np.hypot(stretch * a2, b2)
    h1, h2 = (np.degrees(np.arctan2(b, stretch * a)) % 360 for a, b in ((a1, b1), (a2, b2)))
    turn = (h2 - h1 + 180) % 360 - 180 if c1 * c2 else 0.0
    hue = h1 + turn / 2 if c1 * c2 else h1 + h2
    light, chroma = (l1 + l2) / 2, (c1 + c2) / 2
    waves = ((-0.17, 1, -30), (0.24, 2, 0), (0.32, 3, 6), (-0.20, 4, -63))
    t = 1 + sum(height * np.cos(np.radians(times * hue + shift)) for height, times, shift in waves)
    s_l = 1 + 0.015 * (light - 50) ** 2 / np.sqrt(20 + (light - 50) ** 2)
    s_c, s_h = 1 + 0.045 * chroma, 1 + 0.015 * chroma * t
    turned = 2 * np.sqrt(chroma**7 / (chroma**7 + 25**7))
    turned *= -np.sin(np.radians(60 * np.exp(-((((hue - 275 + 180) % 360 - 180) / 25) ** 2))))
    d_l, d_c = (l2 - l1) / s_l, (c2 - c1) / s_c
    d_h = 2 * np.sqrt(c1 * c2) * np.sin(np.radians(turn / 2)) / s_h
    return float(np.sqrt(d_l**2 + d_c**2 + d_h**2 + turned * d_c * d_h))


# From the test data of Sharma et al.: the rotation of blues, opposite hues, greys, and a large difference.
@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ((50, 2.6772, -79.7751), (50, 0, -82.7485), 2.0425),
        ((50, 2.49, -0.001), (50, -2.49, 0.0009), 7.1792),
        ((50, 0, 0), (50, -1, 2), 2.3669),
        ((50, 2.5, 0), (73, 25, -18), 27.1492),
        ((6.7747, -0.2908, -2.4247), (5.8714, -0.0985, -2.2286), 0.6377),
    ],
)
def test_the_difference_of_colours_is_the_published_one(first, second, expected):
    assert ciede2000(first, second) == pytest.approx(expected, abs=1e-4)


def smallest(colours, vision):
    """The smallest difference between any two of them."""
    seen = [lab(VISIONS[vision] @ linear(colour)) for colour in colours]
    return min(ciede2000(a, b) for a, b in combinations(seen, 2))


@pytest.mark.parametrize("vision", VISIONS)
def test_classes_differ_for_any_colour_vision(vision):
    """Also from white, which stands for pixels to be ignored. Differences of 2 are seen by looking closely."""
    white = (255, 255, 255)
    assert len(DISTINCT) == len(CELEBAMASK_HQ) == 19
    assert smallest([*DISTINCT[:8], white], vision) > 20
    assert smallest([*DISTINCT, white], vision) > (17 if vision == "normal" else 9)
    # The first colours differ the more, the fewer there are.
    assert smallest(DISTINCT[:3], vision) > 28


def test_all_class_tables_have_these_colours():
    assert sorted(CELEBAMASK_HQ.values()) == sorted(DISTINCT)
    assert DISTINCT[:8] == PALETTE
    assert [tuple(colour) for colour in default_palette(19)] == list(DISTINCT)


def luminance(colour):
    return float(linear(colour) @ XYZ[1])


def test_outlines_and_errors_show_on_any_picture():
    """Contrast (L1 + 0.05) / (L2 + 0.05) as of WCAG 2, which asks 3 of graphics; greys have all luminances."""
    greys = np.arange(256, dtype=np.uint8)
    for under in (luminance([grey] * 3) + 0.05 for grey in greys):
        assert max(1.05 / under, under / 0.05) > 4.5  # of the white and of the black line
    unmarked = np.zeros((256, 256), np.uint8)
    row = errors(np.repeat(np.tile(greys, (256, 1))[..., None], 3, axis=2), unmarked, unmarked)[0]
    assert min((luminance(WRONG) + 0.05) / (luminance(colour) + 0.05) for colour in row) > 3
