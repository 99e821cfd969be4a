"""The U-Net (Ronneberger, Fischer & Brox 2015) from the shared blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from core.cli.errors import UserError
from core.nn.blocks import (
    ConvBlock,
    Norm,
    Upsampling,
    center_crop,
    doubling_block,
    norm_layer,
    require_positive,
)
from core.nn.sizes import conv_output_size, transposed_output_size
from seg.levels import Block, level_of
from seg.network import SegmentationNetwork, padded

# Coarse pixels that an interpolation reads beyond the one with the last output pixel.
_COARSE_REACH = {"bilinear": 1, "bicubic": 2}


class UNet(SegmentationNetwork):
    """Images (N, channels, H, W) in [-1, 1] -> logits (N, classes, H', W').

    Each level has two 3x3 convolutions (or another block); 2x2 max-pooling leads down, a doubling leads up, where the
    map of the same level is concatenated (section 2 of the paper). The defaults are the paper's network, padded.

    Args:
        widths: channels of each level; one doubling fewer than levels.
        padding: `same` keeps H and W, whatever they are; `valid`, as in the paper, loses `margin` pixels on each side
            and takes the sizes that `output_size` accepts.
        up: how the decoder doubles; `valid` needs `transposed`, since interpolation reads beyond the borders.
        norm: after each convolution of a level; the paper has none.
        block: what the levels are made of, a name in `seg.levels.LEVELS`.
        dropout: probability at the end of the contracting path, in its two coarsest levels (section 3.1).

    Attributes:
        margin: pixels on each side of an output block of `multiple` aligned pixels that can change it.
        multiple: side of the coarsest pooling grid in pixels, 2 to the number of doublings.
        reach: pixels that a level without padding loses on each side.

    Raises:
        UserError: an argument out of range, or an input of impossible size in `forward`.
    """

    def __init__(
        self,
        channels: int = 3,
        classes: int = 2,
        widths: Sequence[int] = (64, 128, 256, 512, 1024),
        padding: Literal["same", "valid"] = "same",
        up: Upsampling = "transposed",
        norm: Norm = "none",
        block: Block = "plain",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        require_positive(channels=channels, classes=classes)
        _check(widths, padding, up, dropout)
        self.channels, self.classes, self.padding = channels, classes, padding
        self.depth = len(widths) - 1
        self.multiple = 2**self.depth
        make, layer = level_of(block), norm_layer(norm)
        self.reach = make.reach
        self.margin = _margin(self.depth, padding, up, self.reach)
        pixels = 1 if padding == "same" else 0
        self.down = nn.ModuleList(make(a, b, pixels, layer) for a, b in pairwise((channels, *widths)))
        coarse_first = list(pairwise(reversed(widths)))
        self.up = nn.ModuleList(doubling_block(up, wide, narrow) for wide, narrow in coarse_first)
        self.merge = nn.ModuleList(make(2 * narrow, narrow, pixels, layer) for _, narrow in coarse_first)
        self.pool = nn.MaxPool2d(2)
        self.dropout = nn.Dropout(dropout)
        self.head = ConvBlock(widths[0], classes, kernel=1, norm=None, activation=None)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the images."""
        height, width = x.shape[2:]
        if self.padding == "valid":
            self.output_size(height), self.output_size(width)
        else:
            x = padded(x, self.multiple)
        skips: list[Tensor] = []
        for level, block in enumerate(self.down):
            x = block(self.pool(x) if level else x)
            if level >= self.depth - 1:
                x = self.dropout(x)
            skips.append(x)
        skips.pop()
        for up, merge in zip(self.up, self.merge, strict=True):
            x = up(x)
            x = merge(torch.cat([center_crop(skips.pop(), x.shape[2], x.shape[3]), x], dim=1))
        logits = self.head(x)
        return logits if self.padding == "valid" else logits[:, :, :height, :width]

    def output_size(self, size: int) -> int:
        """Pixels of the output for `size` pixels of height or width: 572 -> 388 for the paper's network.

        Raises:
            UserError: `valid` cannot take this size; names the nearest ones it can.
        """
        if self.padding == "same":
            return size
        bottom = size
        for level in range(self.depth + 1):
            if level:
                odd, bottom = bottom % 2, bottom // 2
                if odd:
                    break
            if bottom <= 2 * self.reach:  # the level would leave nothing
                break
            bottom = conv_output_size(bottom, 2 * self.reach + 1)
        else:
            outgoing = self._outgoing(bottom)
            if outgoing > 0:
                return outgoing
        nearest = sorted({self.input_size(max(1, size - 2 * self.margin - back)) for back in (0, self.multiple)})
        raise UserError(
            f"a picture side of {size} pixels does not fit this network (padding=valid, {self.depth} poolings): use "
            f"{' or '.join(map(str, nearest))}, or padding=same, which takes any size"
        )

    def _outgoing(self, bottom: int) -> int:
        """Size of the output when `bottom` pixels come out of the coarsest level."""
        for _ in range(self.depth):
            if bottom < 1:
                return 0
            bottom = transposed_output_size(bottom, 2, 2) - 2 * self.reach
        return bottom

    def input_size(self, output: int) -> int:
        """The smallest side the network takes that gives at least `output` pixels."""
        if self.padding == "same":
            return output
        bottom = 1
        while self._outgoing(bottom) < output:
            bottom += 1
        return self._outgoing(bottom) + 2 * self.margin


def _check(widths: Sequence[int], padding: str, up: str, dropout: float) -> None:
    if len(widths) < 2:
        raise UserError(f"widths={list(widths)} must hold at least two numbers, one for each level")
    for width in widths:
        require_positive(widths=width)
    if padding not in ("same", "valid"):
        raise UserError(f"padding={padding!r} is unknown: use same or valid")
    if padding == "valid" and up in get_args(Upsampling) and up != "transposed":
        raise UserError(f"up={up} reads beyond the borders of a map: padding=valid needs up=transposed")
    if not 0 <= dropout < 1:
        raise UserError(f"dropout={dropout} must be at least 0 and below 1")


def _margin(depth: int, padding: str, up: str, level: int) -> int:
    """The reach of the network: that of its level on the way down and up, `level` pixels each, plus interpolation.

    It is followed backwards from an aligned output block through the decoder and the encoder to the input. Where a map
    is halved on this way, a reach that ends within a coarse pixel takes in all of it. Without padding the maps are
    cropped alike on all sides, and the exact figure is half of what the input exceeds the output.
    """
    if padding == "valid":
        return level * (3 * 2**depth - 2)
    reach = 0
    for _ in range(depth):
        reach += level + (up != "transposed")  # a convolution follows an interpolation
        reach = reach // 2 + _COARSE_REACH[up] if up in _COARSE_REACH else math.ceil(reach / 2)
    reach += level
    for _ in range(depth):
        reach = 2 * reach + level
    return reach
