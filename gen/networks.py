"""What a generator and a discriminator must have. A new model is one file that fits and one YAML in conf/model."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class Generator(Protocol):
    """Latents (N, latent_dim) from N(0, 1) -> images (N, 3, H, W) in [-1, 1]. A `torch.nn.Module`."""

    latent_dim: int

    def initialise(self, seed: int) -> None:
        """Draw the weights, as a function of `seed` alone."""

    def __call__(self, z: Tensor) -> Tensor:
        """Images of the latents."""


@runtime_checkable
class Discriminator(Protocol):
    """Images (N, 3, H, W) in [-1, 1] -> logits (N,), positive for "real". A `torch.nn.Module`.

    One that judges in several ways also has `forward_all`: images -> a tuple with the logits of each kind, (N,) or
    (N, H', W'), over which losses are summed (`gen.losses.image_logits` says which stand for the images).
    """

    judges_pixels: bool  # whether `forward_all` gives the logits of the images (N,) and those of their pixels (N, H, W)

    def initialise(self, seed: int) -> None:
        """Draw the weights, as a function of `seed` alone."""

    def __call__(self, images: Tensor) -> Tensor:
        """Logits of the images."""
