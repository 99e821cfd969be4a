"""DCGAN (Radford, Metz & Chintala 2015, https://arxiv.org/abs/1511.06434) for square power-of-two images.

Where the paper leaves a choice open this follows the PyTorch DCGAN tutorial: 64 base feature maps and no biases
outside the normalisation layers, 3,576,704 parameters in G and 2,765,568 in D at 64 pixels.
"""

from __future__ import annotations

from functools import partial, partialmethod
from itertools import pairwise
from typing import Any, Literal

from torch import Tensor, nn

from core.nn.blocks import ConvBlock, Norm, Projection, UpBlock, doublings, norm_layer, require_positive
from core.nn.init import apply_spectral_norm, init_normal

LeakyReLU = partial(nn.LeakyReLU, 0.2, inplace=True)
ReLU = partial(nn.ReLU, inplace=True)


class Generator(nn.Module):
    """Latents (N, latent_dim) from N(0, 1) -> images (N, channels, image_size, image_size) in [-1, 1].

    A projection to 4x4, then doublings by transposed convolution; batch norm everywhere but at the output
    (section 3). At 64 pixels and width 64 the widths are 512, 256, 128, 64.

    Args:
        image_size: power of two from 32 up.
        width: feature maps before the last layer; each coarser level has twice as many.
        norm: `batch` as in the paper, or `none`.

    Raises UserError for an argument out of range or an unknown norm.
    """

    initialise = partialmethod(init_normal, 0.02)

    def __init__(
        self, image_size: int = 64, latent_dim: int = 100, width: int = 64, channels: int = 3, norm: Norm = "batch"
    ) -> None:
        super().__init__()
        require_positive(latent_dim=latent_dim, width=width, channels=channels)
        self.image_size, self.latent_dim = image_size, latent_dim
        widths = [width << level for level in reversed(range(doublings(image_size)))]
        hidden: dict[str, Any] = {"norm": norm_layer(norm), "activation": ReLU}
        self.layers = nn.Sequential(
            Projection(latent_dim, widths[0], **hidden),
            *(UpBlock(wide, narrow, **hidden) for wide, narrow in pairwise(widths)),
            UpBlock(widths[-1], channels, bias=False, norm=None, activation=nn.Tanh),
        )

    def forward(self, z: Tensor) -> Tensor:
        """Images of the latents."""
        return self.layers(z[:, :, None, None])


class Discriminator(nn.Module):
    """Images (N, channels, image_size, image_size) in [-1, 1] -> logits (N,), positive for "real".

    Strided convolutions halve the image down to 4x4; no batch norm at the input (section 3), LeakyReLU 0.2.

    `norm` may also be `spectral`: spectral normalisation of all weights instead (Miyato et al. 2018), under which each
    image is judged by itself. Other arguments and errors as for `Generator`.
    """

    judges_pixels = False
    initialise = partialmethod(init_normal, 0.02)

    def __init__(
        self, image_size: int = 64, width: int = 64, channels: int = 3, norm: Norm | Literal["spectral"] = "batch"
    ) -> None:
        super().__init__()
        require_positive(width=width, channels=channels)
        widths = [width << level for level in range(doublings(image_size))]
        layer = None if norm == "spectral" else norm_layer(norm)
        block = partial(ConvBlock, kernel=4, stride=2, padding=1, activation=LeakyReLU)
        self.layers = nn.Sequential(
            block(channels, width, bias=False, norm=None),
            *(block(narrow, wide, norm=layer) for narrow, wide in pairwise(widths)),
            ConvBlock(widths[-1], 1, kernel=4, bias=False, norm=None, activation=None),
        )
        if norm == "spectral":
            apply_spectral_norm(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the images."""
        return self.layers(x).flatten()
