"""Residual networks with spectral normalisation (SNGAN: Miyato et al. 2018, appendix B.4, https://arxiv.org/abs/1802.05957),
and optionally the self-attention of SAGAN (Zhang et al. 2019, https://arxiv.org/abs/1805.08318).

As in the 64-pixel networks of Gulrajani et al. 2017, no map is wider than 8 times the finest one. Weights start with
He's initialisation instead of Glorot's.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from core.cli.errors import UserError
from core.nn.blocks import ConvBlock, Projection, doublings, require_positive
from core.nn.init import apply_spectral_norm, init_he

WIDEST = 8  # channels of the coarsest maps, in finest widths
KEY_SHARE = 8  # channels of a map for each channel of its attention (SAGAN, section 3: k = 8)


def level_widths(width: int, levels: int) -> list[int]:
    """Channels from the finest map to the coarsest: doubled from level to level, at most 8 times the first."""
    return [width * min(2**level, WIDEST) for level in range(levels)]


class SelfAttention(nn.Module):
    """Every pixel attends to all others: (N, C, H, W) -> (N, C, H, W) (SAGAN, section 3, equations 1 to 3).

    The result is added with a learnt factor that starts at 0, so the network starts as if the layer were not there.
    The softmax is written out because fused attention kernels have no second derivative, which R1 needs.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = max(1, channels // KEY_SHARE)
        self.key, self.query, self.value = (nn.Conv2d(channels, inner, 1, bias=False) for _ in range(3))
        self.out = nn.Conv2d(inner, channels, 1, bias=False)
        self.strength = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """The map plus what its pixels attended to."""
        scores = self.query(x).flatten(2).transpose(1, 2) @ self.key(x).flatten(2)  # (N, readers HW, read HW)
        read = self.value(x).flatten(2) @ scores.softmax(-1).transpose(1, 2)  # (N, C', HW)
        return x + self.strength * self.out(read.unflatten(2, x.shape[2:]))


class _Residual(nn.Module):
    body: nn.Module
    shortcut: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + self.shortcut(x)


class UpResBlock(_Residual):
    """Residual block with upsampling, (N, in, H, W) -> (N, out, 2H, 2W); norm and ReLU come before convolutions."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.BatchNorm2d(in_channels),
            nn.ReLU(),
            nn.Upsample(scale_factor=2),
            ConvBlock(in_channels, out_channels, padding=1),
            ConvBlock(out_channels, out_channels, padding=1, norm=None, activation=None),
        )
        # Nearest-neighbour upsampling and a 1x1 convolution commute: convolving first costs a quarter.
        self.shortcut = nn.Sequential(
            ConvBlock(in_channels, out_channels, kernel=1, norm=None, activation=None), nn.Upsample(scale_factor=2)
        )


class DownResBlock(_Residual):
    """Residual block without normalisation: (N, in, H, W) -> (N, out, H/2, W/2), or the same size without `halve`.

    ReLU precedes each convolution except the first one of the network (`first`), which sees the image.
    """

    def __init__(self, in_channels: int, out_channels: int, halve: bool = True, first: bool = False) -> None:
        super().__init__()
        pool: nn.Module = nn.AvgPool2d(2) if halve else nn.Identity()
        self.body = nn.Sequential(
            nn.Identity() if first else nn.ReLU(),
            ConvBlock(in_channels, out_channels, padding=1, norm=None),
            ConvBlock(out_channels, out_channels, padding=1, norm=None, activation=None),
            pool,
        )
        # Average pooling and a 1x1 convolution commute: pooling first costs a quarter.
        self.shortcut = nn.Sequential(pool, ConvBlock(in_channels, out_channels, kernel=1, norm=None, activation=None))


def _check_attention(attention: int | None, sizes: list[int]) -> None:
    if attention is not None and attention not in sizes:
        raise UserError(
            f"attention={attention} is not the side of a map between two blocks: use one of {sizes}, or null for none"
        )


class Generator(nn.Module):
    """Latents (N, latent_dim) from N(0, 1) -> images (N, 3, image_size, image_size) in [-1, 1].

    A projection to 4x4, residual blocks with nearest-neighbour upsampling, batch norm, ReLU and a last convolution.

    Args:
        image_size: power of two from 32 up.
        width: channels of the finest map; see `level_widths` for the others.
        attention: side of the map, 8 to image_size, to which self-attention is applied; None for none.

    Raises UserError for an argument out of range.
    """

    initialise = init_he

    def __init__(
        self, image_size: int = 64, latent_dim: int = 128, width: int = 64, attention: int | None = None
    ) -> None:
        super().__init__()
        require_positive(latent_dim=latent_dim, width=width)
        self.image_size, self.latent_dim = image_size, latent_dim
        widths = level_widths(width, doublings(image_size) + 1)[::-1]
        sizes = [8 << step for step in range(doublings(image_size))]
        _check_attention(attention, sizes)
        layers: list[nn.Module] = [Projection(latent_dim, widths[0], norm=None, activation=None)]
        for size, (wide, narrow) in zip(sizes, pairwise(widths), strict=True):
            layers.append(UpResBlock(wide, narrow))
            if size == attention:
                layers.append(SelfAttention(narrow))
        output = ConvBlock(width, 3, padding=1, norm=None, activation=nn.Tanh)
        self.layers = nn.Sequential(*layers, nn.BatchNorm2d(width), nn.ReLU(), output)

    def forward(self, z: Tensor) -> Tensor:
        """Images of the latents."""
        return self.layers(z[:, :, None, None])


class Discriminator(nn.Module):
    """Images (N, 3, image_size, image_size) in [-1, 1] -> logits (N,), positive for "real".

    Residual blocks with average pooling down to 4x4, one without, ReLU, the sum over the pixels and a linear layer.
    Every weight has spectral norm 1. Nothing else is normalised, so each image is judged by itself.

    Arguments and errors as for `Generator`, but `attention` from 4 to image_size / 2.
    """

    judges_pixels = False
    initialise = init_he

    def __init__(self, image_size: int = 64, width: int = 64, attention: int | None = None) -> None:
        super().__init__()
        require_positive(width=width)
        widths = level_widths(width, doublings(image_size))
        sizes = [image_size >> step for step in range(1, doublings(image_size) + 1)]
        _check_attention(attention, sizes)
        layers: list[nn.Module] = []
        for size, (narrow, wide) in zip(sizes, pairwise([3, *widths]), strict=True):
            layers.append(DownResBlock(narrow, wide, first=not layers))
            if size == attention:
                layers.append(SelfAttention(wide))
        self.layers = nn.Sequential(*layers, DownResBlock(widths[-1], widths[-1], halve=False), nn.ReLU())
        self.head = ConvBlock(widths[-1], 1, kernel=1, norm=None, activation=None)
        apply_spectral_norm(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the images."""
        return self.head(self.layers(x).sum((2, 3), keepdim=True)).flatten()
