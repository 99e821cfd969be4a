"""Residual networks without normalisation, in the spirit of R3GAN (Huang et al. 2024, https://arxiv.org/abs/2501.05441).

G and D mirror each other: inverted bottlenecks with grouped convolutions at every size; resampling and a 1x1
convolution between sizes. Every branch ends in a convolution that starts at zero (Fixup: Zhang et al. 2019,
https://arxiv.org/abs/1901.09321), so G and D start as well-scaled linear maps and need no normalisation.

Unlike the paper's, G ends in tanh and projects latents to 4x4 by one dense layer; every resampling has a 1x1
convolution, also between equal widths; D halves by the mean of 2x2 pixels; and the networks are much narrower.
"""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from core.nn.blocks import ConvBlock, Projection, doublings, require_positive
from gen.resnet import level_widths

SLOPE = 0.2
EXPANSION = 2  # channels inside a block for each channel of its input
GROUP = 16  # channels that a 3x3 convolution reads together
LeakyReLU = partial(nn.LeakyReLU, SLOPE, inplace=True)


class Bottleneck(nn.Module):
    """x + branch(x), (N, C, H, W) -> (N, C, H, W): to 2C channels, a grouped 3x3 convolution, back to C."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = EXPANSION * channels
        self.branch = nn.Sequential(
            ConvBlock(channels, inner, kernel=1, norm=None, activation=LeakyReLU),
            ConvBlock(inner, inner, padding=1, groups=inner // math.gcd(inner, GROUP), norm=None, activation=LeakyReLU),
            ConvBlock(inner, channels, kernel=1, bias=False, norm=None, activation=None),
        )

    def forward(self, x: Tensor) -> Tensor:
        """The sum of branch and shortcut."""
        return x + self.branch(x)


def _linear(in_channels: int, out_channels: int, kernel: int = 1, groups: int = 1) -> ConvBlock:
    return ConvBlock(in_channels, out_channels, kernel, groups=groups, bias=False, norm=None, activation=None)


@torch.no_grad()
def init_residual(network: nn.Module, seed: int) -> None:
    """Fixup-like initialisation (Zhang et al. 2019, section 3), drawn from a generator of its own.

    With L blocks whose branches have m = 3 convolutions, the last of a branch is 0 and the others are He's (for the
    slope of the leaky ReLU) times L^(-1/(2m - 2)). Layers outside the branches are linear and preserve the second
    moment of their input: N(0, 1/inputs). Biases are 0.
    """
    generator = torch.Generator().manual_seed(seed)
    blocks = [block for block in network.modules() if isinstance(block, Bottleneck)]
    in_branch = {layer: block for block in blocks for layer in block.modules()}
    shrink = len(blocks) ** -0.25
    for layer in network.modules():
        if not isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            continue
        # The transposed convolution spreads one pixel: each of its outputs reads every latent once.
        pixels = math.prod(layer.kernel_size) if isinstance(layer, nn.Conv2d) else 1
        spread = math.sqrt(layer.groups / (layer.in_channels * pixels))
        if layer in in_branch:
            spread *= shrink * math.sqrt(2 / (1 + SLOPE**2))
        layer.weight.normal_(0.0, spread, generator=generator)
        if layer.bias is not None:
            layer.bias.zero_()
    for block in blocks:
        block.branch[-1][0].weight.zero_()  # type: ignore[index]


class Generator(nn.Module):
    """Latents (N, latent_dim) from N(0, 1) -> images (N, 3, image_size, image_size) in [-1, 1].

    Args:
        image_size: power of two from 32 up.
        width: channels of the finest map; see `gen.resnet.level_widths` for the others.
        blocks: bottlenecks at every size.

    Raises UserError for an argument out of range.
    """

    initialise = init_residual

    def __init__(self, image_size: int = 64, latent_dim: int = 64, width: int = 64, blocks: int = 2) -> None:
        super().__init__()
        require_positive(latent_dim=latent_dim, width=width, blocks=blocks)
        self.image_size, self.latent_dim = image_size, latent_dim
        widths = level_widths(width, doublings(image_size) + 1)[::-1]
        layers: list[nn.Module] = [Projection(latent_dim, widths[0], bias=False, norm=None, activation=None)]
        layers += [Bottleneck(widths[0]) for _ in range(blocks)]
        for wide, narrow in pairwise(widths):
            # Interpolation and a 1x1 convolution commute: convolving first costs a quarter.
            layers += [_linear(wide, narrow), nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)]
            layers += [Bottleneck(narrow) for _ in range(blocks)]
        self.layers = nn.Sequential(*layers, _linear(width, 3), nn.Tanh())

    def forward(self, z: Tensor) -> Tensor:
        """Images of the latents."""
        return self.layers(z[:, :, None, None])


class Discriminator(nn.Module):
    """Images (N, 3, image_size, image_size) in [-1, 1] -> logits (N,), positive for "real".

    The mirror image of G. At 4x4 a depthwise convolution reduces every channel to one number, for a linear layer.
    Nothing is normalised, so each image is judged by itself. Arguments and errors as for `Generator`.
    """

    judges_pixels = False
    initialise = init_residual

    def __init__(self, image_size: int = 64, width: int = 64, blocks: int = 2) -> None:
        super().__init__()
        require_positive(width=width, blocks=blocks)
        widths = level_widths(width, doublings(image_size) + 1)
        layers: list[nn.Module] = [_linear(3, width)]
        for narrow, wide in pairwise(widths):
            layers += [Bottleneck(narrow) for _ in range(blocks)]
            layers += [nn.AvgPool2d(2), _linear(narrow, wide)]
        layers += [Bottleneck(widths[-1]) for _ in range(blocks)]
        self.layers = nn.Sequential(
            *layers, _linear(widths[-1], widths[-1], kernel=4, groups=widths[-1]), _linear(widths[-1], 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the images."""
        return self.layers(x).flatten()
