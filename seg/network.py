"""What all segmentation networks have, for training, tiling and prediction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.cli.errors import UserError
from core.nn.backbone import DEFAULT, Backbone
from core.nn.init import init_he


@dataclass
class EncoderConfig:
    """The pretrained part of a network, see `core.nn.backbone.Backbone`.

    Attributes:
        name, weights: as there.
        freeze: whether the encoder keeps its weights and statistics.
        lr_factor: its learning rate in units of that of the other weights.
    """

    name: str = DEFAULT
    weights: str = "package"
    freeze: bool = False
    lr_factor: float = 1.0

    def build(self, channels: int, strides: Sequence[int]) -> Backbone:
        """The encoder; a UserError if it cannot be had."""
        if not self.lr_factor > 0:
            raise UserError(f"encoder.lr_factor={self.lr_factor} must be above 0; freeze=true keeps the weights")
        encoder = Backbone(self.name, self.weights, self.freeze, channels, strides)
        if any(module._non_persistent_buffers_set for module in encoder.modules()):
            raise UserError(f"encoder.name={self.name}: it has constants that a model file does not hold; take another")
        encoder.lr_factor = self.lr_factor
        return encoder


class SegmentationNetwork(nn.Module):
    """Images (N, channels, H, W) in [-1, 1] -> logits (N, classes, H', W').

    Attributes:
        padding: `same` keeps H and W, whatever they are; `valid` loses `margin` pixels on each side.
        margin: pixels on each side of an output block of `multiple` aligned pixels that can change it.
        multiple: side in pixels of the network's coarsest grid.
        dropout: probability of the dropout in training.
    """

    channels: int
    classes: int
    margin: int
    multiple: int
    padding: str = "same"
    dropout: nn.Dropout

    def initialise(self, seed: int) -> None:
        """Draw the initial weights, from `seed` alone."""
        init_he(self, seed)

    def output_size(self, size: int) -> int:
        """Pixels of the output for `size` pixels of height or width; a UserError if the network cannot take it."""
        return size

    def input_size(self, output: int) -> int:
        """The smallest side the network takes that gives at least `output` pixels."""
        return output


def padded(x: Tensor, multiple: int) -> Tensor:
    """`x` (N, C, H, W) with its right and bottom borders repeated to multiples of `multiple`.

    There are at least two coarse pixels afterwards, since instance normalisation cannot take a single one.
    """
    height, width = x.shape[2:]
    rows, columns = (height + multiple - 1) // multiple, (width + multiple - 1) // multiple
    # 1 where there would be a single pixel, else 0; without `if` and without a constant before //, so that an export
    # by tracing holds for all sizes
    single = rows // (rows * rows * columns)
    right = -width % multiple + multiple * single
    return F.pad(x, (0, right, 0, -height % multiple), mode="replicate")


def encoder_maps(encoder: Backbone, images: Tensor) -> dict[int, Tensor]:
    """The maps of an encoder by stride, each with all of the stride's pixels, of images `padded` to its coarsest grid.

    Networks that convolve without padding have somewhat smaller maps, which are stretched.
    """
    images, maps = padded(images, encoder.strides[-1]), {}
    for stride, found in zip(encoder.strides, encoder(images), strict=True):
        size = [side // stride for side in images.shape[2:]]
        fits = list(found.shape[2:]) == size
        maps[stride] = found if fits else F.interpolate(found, size, mode="bilinear", align_corners=False)
    return maps


def bilinear_kernel(factor: int) -> Tensor:
    """The kernel (2 factor, 2 factor) of a transposed convolution of stride `factor` that interpolates bilinearly."""
    position = torch.arange(2 * factor, dtype=torch.float32)
    line = 1 - (position - (factor - 0.5)).abs() / factor
    return line[:, None] * line[None, :]
