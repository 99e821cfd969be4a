"""A generator for CPUs, which spend most of their time on the largest maps: there it has few channels.

They are made at half the size, four pixels at each place (sub-pixel convolution: Shi et al. 2016,
https://arxiv.org/abs/1609.05158), so that the coarser maps may have twice the channels of those of `gen.resnet`.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal, get_args

from torch import Tensor, nn

from core.cli.errors import UserError
from core.nn.blocks import ConvBlock, Projection, UpBlock, doublings, require_positive
from core.nn.init import init_he
from gen.resnet import UpResBlock, level_widths

Block = Literal["plain", "residual"]
REACH = 3  # doublings over which excitation skips; four in the paper, which has larger images
FINE_SHARE = 4  # channels at half the size of the image for each at its own size


class SkipExcitation(nn.Module):
    """Lets a coarse map switch channels of a fine one (Liu et al. 2021, section 3.1, https://arxiv.org/abs/2101.04775).

    (N, coarse, h, w) and (N, fine, H, W) -> (N, fine, H, W): times a factor between 0 and 1 for each channel.
    """

    def __init__(self, coarse: int, fine: int) -> None:
        super().__init__()
        self.factors = nn.Sequential(
            nn.AdaptiveAvgPool2d(4),
            ConvBlock(coarse, fine, kernel=4, norm=None, activation=lambda: nn.LeakyReLU(0.1)),
            ConvBlock(fine, fine, kernel=1, norm=None, activation=nn.Sigmoid),
        )

    def forward(self, coarse: Tensor, fine: Tensor) -> Tensor:
        """The fine map with its channels scaled."""
        scaled: Tensor = fine * self.factors(coarse)
        return scaled


class Generator(nn.Module):
    """Latents (N, latent_dim) from N(0, 1) -> images (N, 3, image_size, image_size) in [-1, 1].

    Args:
        image_size: power of two from 32 up.
        width: channels at half the size of the image; see `gen.resnet.level_widths` for coarser maps.
        block: `plain`, transposed convolutions as in `gen.dcgan`; or `residual` as in `gen.resnet`, at twice the cost.
        excitation: maps 8 times as large as another one are scaled by what `SkipExcitation` makes of that.

    Raises UserError for an argument out of range.
    """

    initialise = init_he

    def __init__(
        self,
        image_size: int = 64,
        latent_dim: int = 128,
        width: int = 32,
        block: Block = "plain",
        excitation: bool = False,
    ) -> None:
        super().__init__()
        require_positive(latent_dim=latent_dim, width=width)
        if block not in get_args(Block):
            raise UserError(f"block={block!r} is unknown: use one of {', '.join(get_args(Block))}")
        self.image_size, self.latent_dim = image_size, latent_dim
        widths = level_widths(width, doublings(image_size))[::-1]
        residual = block == "residual"
        bare: dict[str, Any] = {"norm": None, "activation": None}  # residual blocks begin with both
        self.start = Projection(latent_dim, widths[0], **(bare if residual else {}))
        self.stages = nn.ModuleList((UpResBlock if residual else UpBlock)(*pair) for pair in pairwise(widths))
        skips = zip(widths, widths[REACH:], strict=False) if excitation else ()
        self.skips = nn.ModuleList(SkipExcitation(coarse, fine) for coarse, fine in skips)
        fine = max(1, width // FINE_SHARE)
        self.end = nn.Sequential(
            *([nn.BatchNorm2d(width), nn.ReLU()] if residual else []),
            ConvBlock(width, 4 * fine, padding=1, norm=None, activation=None),
            nn.PixelShuffle(2),
            nn.BatchNorm2d(fine),
            nn.ReLU(),
            ConvBlock(fine, 3, padding=1, norm=None, activation=nn.Tanh),  # without it, checkerboards remain
        )

    def forward(self, z: Tensor) -> Tensor:
        """Images of the latents."""
        maps = [self.start(z[:, :, None, None])]
        for place, stage in enumerate(self.stages, 1):
            y = stage(maps[-1])
            if self.skips and place >= REACH:
                y = self.skips[place - REACH](maps[place - REACH], y)
            maps.append(y)
        images: Tensor = self.end(maps[-1])
        return images
