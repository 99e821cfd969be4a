"""The check of samples alone, without reals or a network: grey squares, noise, and one face over and over."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from core.data.images import make_grid
from eval.checks.pixels import SOFT_DOUBT
from eval.checks.verdicts import Check, Figures, Finding, conclude

SHOWN = 64
# Every limit is far from both sides. Measured on 1,000 pictures of 64x64: three parts of CelebA; drawn faces; samples
# of eleven checkpoints of five GANs after 10,000 to 102,000 faces, of which none has collapsed; and what has.
# Standard deviation of all pixels in grey levels: CelebA 74, drawn faces 56, GANs 47 to 84; grey squares 11.
LEAST_DEVIATION = 25.0
# Correlation of neighbouring pixels within pictures: both kinds of faces 0.96, GANs 0.94 to 0.99; grey squares with
# the pattern of the upsampling 0.35, noise 0.0.
LEAST_CORRELATION = 0.75
# Standard deviation of a pixel from picture to picture, as a share of that of all pixels: both kinds of faces 0.91,
# GANs 0.78 to 0.92; mixtures of two faces 0.22, one face at any brightness 0.24, one face with noise 0.12.
LEAST_SPREAD = 0.5


def collapse(pixels: np.ndarray) -> Check:
    """Whether uint8 pictures (N, H, W, 3), N in the tens at least, have the contrast, detail and spread of faces.

    It tells a generator that has collapsed from one that draws badly, which is left to scores.
    """
    values = pixels.astype(np.float32)
    deviation = float(values.std())
    spread = float(values.std(axis=0).mean()) / max(deviation, 1e-9)
    values -= values.mean(axis=(1, 2), keepdims=True)
    beside = [np.mean(values[:, :, 1:] * values[:, :, :-1]), np.mean(values[:, 1:] * values[:, :-1])]
    correlation = float(np.mean(beside) / max(np.mean(values**2), 1e-9))
    figures: Figures = {"samples": len(pixels), "deviation": deviation, "correlation": correlation, "spread": spread}
    fine = (
        "The samples have the contrast, the detail and the spread of pictures.",
        f"Standard deviation {deviation:.0f} (faces: 74), correlation of neighbouring pixels {correlation:.2f} (faces: "
        f"0.96), a pixel's spread over the pictures {spread:.2f} of it (faces: 0.91).",
    )
    findings = _findings(deviation, correlation, spread)
    return conclude("collapse", findings, fine, figures, make_grid(pixels[:SHOWN]))


def _findings(deviation: float, correlation: float, spread: float) -> Iterator[Finding]:
    if deviation < LEAST_DEVIATION:
        yield Finding(
            "bad",
            f"The samples are nearly one colour: their standard deviation is {deviation:.0f} grey levels (faces: 74).",
            "The generator has hardly been trained, or has collapsed: train longer, or with another recipe.",
            "undertrained",
        )
    elif correlation < LEAST_CORRELATION:
        yield Finding(
            "bad",
            f"The samples are noise: neighbouring pixels correlate by {correlation:.2f} (faces: 0.96).",
            "The generator has not been trained, or has diverged: use an earlier checkpoint, or another recipe.",
            "noise",
        )
    elif spread < LEAST_SPREAD:
        yield Finding(
            "bad",
            f"The samples are one picture over and over: from one to another, a pixel spreads by {spread:.2f} of what "
            "all pixels do (faces: 0.91).",
            "The generator has collapsed: use an earlier checkpoint, or another recipe.",
            "collapsed",
        )


def unlearned(pixels: np.ndarray, compared: Check) -> str:
    """What tells samples that are not learned yet from collapsed ones, in a sentence; empty where nothing does.

    Args:
        pixels: uint8 (N, H, W, 3) of samples.
        compared: what `pixel_statistics` found.
    """
    alone, figures = collapse(pixels), compared.figures
    if alone.fault:
        return "" if alone.fault == "collapsed" else alone.headline
    ratio = figures["gradient"] / max(figures["real_gradient"], 1e-9) if figures else 1.0
    return (
        f"The samples are soft: neighbouring pixels differ {ratio:.2f} times as much as in reals."
        if ratio < SOFT_DOUBT
        else ""
    )
