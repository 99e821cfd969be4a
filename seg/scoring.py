"""Score a U-Net on a split of a prepared data set: predictions, example pictures, results as files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.cli.errors import UserError
from core.cli.files import write_json
from core.data.dataset import PreparedData
from core.data.images import to_float
from core.data.mask_pictures import comparison_page, room
from core.training.machine import full_precision
from seg.metrics import SegmentationMetrics, plot_confusion
from seg.network import SegmentationNetwork
from seg.tiling import mirror

PIXELS_AT_ONCE = 1 << 19  # 32 pictures of 128x128 in a forward pass, 2 of 512x512
GPU_PIXELS_AT_ONCE = 1 << 21  # which does not fill up small GPUs beside a training run


def whole_logits(model: SegmentationNetwork, images: Tensor) -> Tensor:
    """Logits (N, classes, H, W) at the size of `images` (N, C, H, W); a `valid` network sees their borders mirrored."""
    if model.padding == "same":
        return model(images)
    height, width = images.shape[2:]
    rows, columns = (
        mirror(np.arange(-model.margin, model.input_size(side) - model.margin), side) for side in (height, width)
    )
    return model(images[:, :, rows][:, :, :, columns])[:, :, :height, :width]


@torch.inference_mode()
def predictions(model: SegmentationNetwork, data: PreparedData, rows: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
    """Predicted and true masks, int64 (N, H, W), of the given rows of `data` in batches."""
    assert data.masks is not None
    device = next(model.parameters()).device
    pixels = GPU_PIXELS_AT_ONCE if device.type == "cuda" else PIXELS_AT_ONCE
    batch_size = max(1, pixels // data.image_size**2)
    for start in range(0, len(rows), batch_size):
        chosen = rows[start : start + batch_size]
        images = to_float(torch.from_numpy(data.images[chosen]).to(device))
        with full_precision(device):
            predicted = whole_logits(model, images).argmax(1)
        yield predicted, torch.from_numpy(data.masks[chosen]).to(device).long()


def comparison(model: SegmentationNetwork, data: PreparedData, rows: np.ndarray) -> np.ndarray:
    """The first of these rows, as many as fit: picture, true mask, predicted mask and errors, uint8 (H, W, 3)."""
    assert data.masks is not None
    rows = rows[: room(data.image_size, 4)]
    found = torch.cat([predicted for predicted, _ in predictions(model, data, rows)]).cpu().numpy().astype(np.uint8)
    masks = {"truth": data.masks[rows], "prediction": found}
    return comparison_page(np.asarray(data.images[rows]), masks, data.classes, data.palette)


def data_identity(data: PreparedData) -> dict[str, Any]:
    """What identifies a data set in results and model files."""
    hashes = {"images_sha256": data.fingerprint, "masks_sha256": data.meta["sha256"].get("masks.npy")}
    return {"data": {"source": data.meta.get("source"), "count": len(data), "image_size": data.image_size, **hashes}}


def scored(metrics: SegmentationMetrics, data: PreparedData, split: str) -> dict[str, Any]:
    """The results of `metrics`.

    Raises:
        UserError: every pixel of the split is ignored.
    """
    results = metrics.results()
    if results["dataset"]["miou"] is None:
        raise UserError(f"{data.path}: every pixel of split {split!r} is ignored (255)")
    return results


def write_scores(results: dict[str, Any], metrics: SegmentationMetrics, out: Path, identity: dict[str, Any]) -> None:
    """Write scores as JSON and their confusion matrix as PNG beside it."""
    write_json(out, {**identity, **results})
    title = f"mIoU {results['dataset']['miou']:.3f}, {results['images']:,} images"
    plot_confusion(metrics.confusion, metrics.classes, out.with_suffix(".png"), title)
