"""What the levels of a U-Net can be made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import nn

from core.cli.errors import UserError
from core.nn.blocks import (
    Bottleneck,
    DenseLevel,
    DepthwiseSeparable,
    DoubleConv,
    Inception,
    InvertedResidual,
    NormLayer,
    ResBlock,
    SEResBlock,
    StandardisedConv,
)

Block = Literal["plain", "residual", "bottleneck", "inverted", "depthwise", "se", "dense", "inception", "standardised"]


@dataclass(frozen=True)
class Level:
    """One level: called with the channels before and after it, padding (0 or 1) and norm, it makes the module.

    Attributes:
        block: makes one block from the same arguments.
        reach: pixels beyond its own that an output pixel reads on each side, and that a level without padding loses.
        repeats: blocks in a row; the first one changes the channels.
    """

    block: Callable[[int, int, int, NormLayer | None], nn.Module]
    reach: int
    repeats: int = 1

    def __call__(self, in_channels: int, out_channels: int, padding: int, norm: NormLayer | None) -> nn.Module:
        """The module."""
        first = self.block(in_channels, out_channels, padding, norm)
        more = [self.block(out_channels, out_channels, padding, norm) for _ in range(self.repeats - 1)]
        return nn.Sequential(first, *more) if more else first


LEVELS: dict[str, Level] = {
    "plain": Level(DoubleConv, 2),
    "residual": Level(ResBlock, 2),
    "bottleneck": Level(Bottleneck, 1),
    "inverted": Level(InvertedResidual, 2, repeats=2),
    "depthwise": Level(DepthwiseSeparable, 2, repeats=2),
    "se": Level(SEResBlock, 2),  # and all pixels through the gate of each channel
    "dense": Level(DenseLevel, 4),
    "inception": Level(Inception, 2),
    "standardised": Level(StandardisedConv, 2),
}


def level_of(block: Block) -> Level:
    """The level that a configuration names.

    Raises:
        UserError: unknown name.
    """
    if block not in LEVELS:
        raise UserError(f"block={block!r} is unknown: use one of {', '.join(LEVELS)}")
    return LEVELS[block]
