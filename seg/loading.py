"""Trained segmenters from their files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from core.cli.errors import UserError
from core.data.images import MEMORY_FORMAT
from core.data.mask_classes import are_classes
from core.nn.fuse import fold_batch_norm
from core.nn.model_file import load_model
from seg.network import SegmentationNetwork

# What a segmenter's file says besides its weights: class names and RGB colours in index order, the side of the training
# pictures in pixels, whether they were scaled to it, which side was fitted, and the images seen.
INFO_KEYS = ("classes", "palette", "image_size", "resized", "fit", "images_seen")


def load_unet(run_or_file: str | Path, device: torch.device) -> tuple[SegmentationNetwork, dict[str, Any]]:
    """A trained U-Net on `device` in eval mode, batch norm folded, and the `info` it was saved with (`INFO_KEYS`).

    Raises:
        UserError: no model there, a damaged one, or one that is not a trained segmenter of RGB pictures.
    """
    model, info = load_model(run_or_file)
    if not isinstance(model, SegmentationNetwork) or any(key not in info for key in INFO_KEYS):
        way_out = ": use facet sample" if hasattr(model, "latent_dim") else ""
        name = type(model).__name__
        raise UserError(f"{run_or_file} holds a {name} without classes, not a trained segmenter{way_out}")
    side = info["image_size"]
    if not are_classes(info["classes"], info["palette"]) or not isinstance(side, int) or side < 1:
        raise UserError(f"{run_or_file} is damaged: what it says of its classes or pictures makes no sense")
    if not len(info["classes"]) == len(info["palette"]) == model.classes:
        raise UserError(f"{run_or_file} names {len(info['classes'])} classes, its network has {model.classes}")
    if model.channels != 3:
        raise UserError(f"{run_or_file} takes {model.channels} channels; pictures are read as RGB, so it must take 3")
    return fold_batch_norm(model).to(device).to(memory_format=MEMORY_FORMAT), info
