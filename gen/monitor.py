"""Signs that a GAN has stopped learning, reported while there is still time to act."""

from __future__ import annotations

import math

import numpy as np

from core.training.checkpoint import Stateful

PATIENCE = 20_000  # images for which a sign must last: early in a run D is often perfect for a while
CHANCE_LOSS = 2 * math.log(2)  # loss of a discriminator that answers 0.5 to everything

# Recipes that keep D and G in balance; docs/recipes.md says what was measured of them.
RECIPES = "experiment=cpu, or experiment=small_data on a GPU, under another name="
ADVICE = {
    "d_wins": f"D is right about nearly every image, which leaves G little to learn from: try {RECIPES}",
    "d_chance": f"D does no better than guessing: if the samples are poor, neither learns any more, try {RECIPES}",
}


class CollapseMonitor(Stateful):
    """Watches interval statistics; each sign is reported once when it has lasted `PATIENCE` images.

    Only the non-saturating loss has a known value at chance. A Wasserstein critic may tell all images apart: its
    gradient does not vanish.
    """

    STATE = ("since", "reported")

    def __init__(self, loss: str = "non_saturating") -> None:
        self.loss = loss
        self.since: dict[str, int] = {}
        self.reported: list[str] = []

    def check(self, images_seen: int, means: dict[str, float]) -> list[str]:
        """Warnings that are due after an interval with these mean statistics."""
        at_chance = abs(means["d_accuracy"] - 0.5) < 0.02 and abs(means["d_loss"] - CHANCE_LOSS) < 0.02
        signs = {
            "d_wins": means["d_accuracy"] > 0.995 and self.loss != "wasserstein",
            "d_chance": at_chance and self.loss == "non_saturating",
        }
        warnings = []
        for sign, present in signs.items():
            if not present:
                self.since.pop(sign, None)
                self.reported = [name for name in self.reported if name != sign]
                continue
            lasted = images_seen - self.since.setdefault(sign, images_seen)
            if lasted >= PATIENCE and sign not in self.reported:
                self.reported.append(sign)
                warnings.append(f"for {lasted:,} images {ADVICE[sign]}")
        return warnings


def identical_samples(pixels: np.ndarray) -> str | None:
    """A warning when the samples of N latents, uint8 (N, H, W, C), are all the same picture, else None."""
    # Mean over pixels of the standard deviation across samples: about 60 grey levels for faces, 0 after a collapse.
    spread = float(pixels.astype(np.float32).std(axis=0).mean())
    if spread >= 2.0:
        return None
    alike = f"all samples look the same (they differ by {spread:.1f} grey levels)"
    return f"{alike}: G has collapsed to one picture, try {RECIPES}"
