"""A U-Net as discriminator: one logit for the image and one for every pixel (Schoenfeld, Schiele & Khoreva 2020,
https://arxiv.org/abs/2002.12655), and the CutMix images on which its pixel decisions are kept consistent. Unlike in the
paper, D is not trained to call mixed images fake or to tell their parts apart. Its generator is `gen.resnet`'s.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from core.nn.blocks import ConvBlock, ResBlock, doubling_block, doublings, require_positive
from core.nn.init import apply_spectral_norm, init_he
from gen.resnet import level_widths

CUTMIX_STREAM = 5  # second entry of the seed, see gen.latents


class Discriminator(nn.Module):
    """Images (N, 3, H, W) in [-1, 1] -> logits (N,), positive for "real"; `forward_all` gives those of the pixels too.

    Residual blocks with average pooling lead down to 4x4, where a linear layer reads the sum over the pixels: the image
    logit. A decoder leads up again with skip connections: the pixel logits (section 3.1 of the paper). Each image is
    judged by itself.

    Args:
        image_size: H = W, power of two from 32 up.
        width: channels of the finest level; see `gen.resnet.level_widths` for the others.

    Raises UserError for an argument out of range.
    """

    judges_pixels = True
    initialise = init_he

    def __init__(self, image_size: int = 64, width: int = 64) -> None:
        super().__init__()
        require_positive(width=width)
        widths = level_widths(width, doublings(image_size) + 1)
        coarse_first = list(pairwise(reversed(widths)))
        self.down = nn.ModuleList(ResBlock(a, b) for a, b in pairwise((3, *widths)))
        self.up = nn.ModuleList(doubling_block("nearest", wide, narrow) for wide, narrow in coarse_first)
        self.merge = nn.ModuleList(ResBlock(2 * narrow, narrow) for _, narrow in coarse_first)
        self.pool = nn.AvgPool2d(2)
        self.image_head = ConvBlock(widths[-1], 1, kernel=1, norm=None, activation=None)
        self.pixel_head = ConvBlock(width, 1, kernel=1, norm=None, activation=None)
        apply_spectral_norm(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the images (N,)."""
        return self._image_logits(self._encode(x)[-1])

    def forward_all(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the images (N,) and of their pixels (N, H, W)."""
        levels = self._encode(x)
        y = levels.pop()
        image_logits = self._image_logits(y)
        for up, merge in zip(self.up, self.merge, strict=True):
            y = merge(torch.cat([levels.pop(), up(y)], dim=1))
        return image_logits, self.pixel_head(y).squeeze(1)

    def _encode(self, x: Tensor) -> list[Tensor]:
        levels: list[Tensor] = []  # finest first
        for block in self.down:
            levels.append(block(self.pool(levels[-1]) if levels else x))
        return levels

    def _image_logits(self, coarsest: Tensor) -> Tensor:
        return self.image_head(coarsest.sum((2, 3), keepdim=True)).flatten()


def cutmix_masks(seed: int, images_seen: int, count: int, size: int) -> Tensor:
    """Masks (count, 1, size, size) of 1 (real) and 0 (generated) for the batch that begins at `images_seen`.

    A box around a uniform centre, with a uniform share of the area and cut off at the border (Yun et al. 2019, section
    3.1), holds one kind and the rest the other; a coin decides which. Drawn on the CPU.
    """
    rng = np.random.default_rng([seed, CUTMIX_STREAM, images_seen])
    half = size * np.sqrt(rng.random((count, 1, 1))) / 2
    down, right = size * rng.random((2, count, 1, 1))
    place = np.arange(size) + 0.5  # the middles of the pixels
    box = (np.abs(place[:, None] - down) < half) & (np.abs(place - right) < half)
    mask = box ^ (rng.random((count, 1, 1)) < 0.5)
    return torch.from_numpy(mask[:, None].astype(np.float32))


def cutmix(real: Tensor, fake: Tensor, masks: Tensor) -> Tensor:
    """`real` where the mask (N, 1, H, W) is 1, `fake` where it is 0; all (N, C, H, W) (section 3.2 of the paper)."""
    return masks * real + (1 - masks) * fake


def consistency(mixed: Tensor, real: Tensor, fake: Tensor, masks: Tensor) -> Tensor:
    """Mean squared difference between pixel logits (N, H, W) of mixed images and the mixed logits (section 3.2)."""
    return (mixed - cutmix(real[:, None], fake[:, None], masks)[:, 0]).square().mean()
