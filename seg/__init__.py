"""Segmentation with a U-Net.

from seg import load, predict
mask = predict(load("runs/unet"), "photo.jpg")
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from core.cli.errors import explain_early_interrupts

if TYPE_CHECKING:
    from seg.predict import Segmenter

explain_early_interrupts()


def load(run_or_file: str | Path, device: str = "auto", size: int | str | None = None) -> Segmenter:
    """The segmenter of a run folder or model file; see `seg.predict.load_segmenter`.

    `predict`, which takes it, is the module `seg.predict`: called, it does what `seg.masks.masks_of` says.
    """
    from seg.predict import load_segmenter  # here, so that `import seg` does not load torch

    return load_segmenter(run_or_file, device, size)
