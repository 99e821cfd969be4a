"""Segmentation of pictures of any size: the overlap-tile strategy of the U-Net paper, and averaging over symmetries."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from core.data.images import to_float
from core.training.machine import full_precision
from seg.network import SegmentationNetwork

GPU_PIXELS_AT_ONCE = 1 << 20  # of the outputs of tiles in a forward pass: 4 tiles of 512x512; a larger tile goes alone


@torch.inference_mode()
def segment(
    model: SegmentationNetwork, pixels: np.ndarray, tile: int, average: bool, mirrored: Sequence[int]
) -> Tensor:
    """Class probabilities of one picture, from a model in eval mode on any device.

    A padded network sees a picture that fits into one tile as a whole, as in training, with what its convolutions pad.
    Larger pictures, and all pictures for an unpadded network, are mirrored beyond their borders and processed tile by
    tile (overlap-tile strategy, Ronneberger et al. 2015, figure 2): each output pixel comes from one tile, which shows
    the network everything that can change it. Tiles lie on the grid of the network's pooling, so their size does not
    change the result, except with instance, group and layer normalisation and squeeze-and-excitation, where a pixel
    depends on its whole input.

    Args:
        pixels: uint8 (H, W, 3), both sides at least 1.
        tile: side of a tile's output, at least 1; rounded up to a multiple of `model.multiple`.
        average: mean over the 8 flips and quarter turns of the picture, each turned back.
        mirrored: for each class its mirror image (see `core.data.mask_classes.mirrored_classes`).

    Returns:
        float32 (classes, H, W) on the CPU; the classes sum to 1.
    """
    if not average:
        return _probabilities(model, pixels, tile)
    total = torch.zeros(model.classes, *pixels.shape[:2])
    for turns in range(4):
        for flip in (False, True):
            variant = np.rot90(pixels[:, ::-1] if flip else pixels, turns)
            back = torch.rot90(_probabilities(model, variant, tile), -turns, (1, 2))
            # A mirror swaps the left and the right eye; a turn does not.
            total += back.flip(2)[list(mirrored)] if flip else back
    return total / 8


def _probabilities(model: SegmentationNetwork, pixels: np.ndarray, tile: int) -> Tensor:
    """Probabilities (classes, H, W) of the picture as it stands."""
    height, width = pixels.shape[:2]
    side = _round_up(tile, model.multiple)
    if model.padding == "same" and max(height, width) <= side:
        return _forward(model, pixels[None])[0]
    result = torch.empty(model.classes, height, width)
    # A padded network also gives an output for the surroundings, which other tiles predict better.
    skip = 0 if model.padding == "valid" else _round_up(model.margin, model.multiple)
    tiles = list(itertools.product(_windows(model, height, side), _windows(model, width, side)))
    at_once = tiles_at_once(next(model.parameters()).device, side)
    for start in range(0, len(tiles), at_once):
        part = tiles[start : start + at_once]
        shown = np.stack([pixels[np.ix_(rows, columns)] for (_, rows), (_, columns) in part])
        for ((top, _), (left, _)), output in zip(part, _forward(model, shown), strict=True):
            place = result[:, top : top + side, left : left + side]
            place.copy_(output[:, skip : skip + place.shape[1], skip : skip + place.shape[2]])
    return result


def tiles_at_once(device: torch.device, side: int) -> int:
    """Tiles of this side in a forward pass."""
    return max(1, GPU_PIXELS_AT_ONCE // side**2) if device.type == "cuda" else 1


def _windows(model: SegmentationNetwork, length: int, side: int) -> list[tuple[int, np.ndarray]]:
    """Along one axis: where the output of each tile begins, and the pixels that it shows the network.

    Outputs begin at multiples of `model.multiple` and windows a constant number of pixels earlier, so that pooling
    falls on the same grid in all of them. All windows are equally long.
    """
    side = min(side, _round_up(length, model.multiple))
    if model.padding == "valid":
        before, shown = model.margin, model.input_size(side)
    else:
        before = _round_up(model.margin, model.multiple)
        shown = side + 2 * before
    return [
        (start, mirror(np.arange(start - before, start - before + shown), length)) for start in range(0, length, side)
    ]


def mirror(positions: np.ndarray, length: int) -> np.ndarray:
    """The pixels (0..length-1) at `positions` of a line that is mirrored at its first and last pixel without end.

    Like numpy's `reflect` padding; a single pixel is repeated.
    """
    if length == 1:
        return np.zeros_like(positions)
    folded = positions % (2 * (length - 1))
    return np.minimum(folded, 2 * (length - 1) - folded)


def _forward(model: SegmentationNetwork, pixels: np.ndarray) -> Tensor:
    """Probabilities (N, classes, H', W') on the CPU of uint8 pixels (N, H, W, 3)."""
    device = next(model.parameters()).device
    # Full float32 even where a GPU would use TF32, so that a picture gives the same mask on every machine.
    with full_precision(device):
        batch = to_float(torch.from_numpy(np.array(pixels, order="C")).to(device))
        return model(batch).softmax(dim=1).cpu()


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
