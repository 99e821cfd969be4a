"""Arithmetic of a training step, counted from the layers' shapes, and what the machine reaches in a matrix product.

A multiply-add counts as two operations, and nothing but convolutions and linear layers counts. A layer whose forward
pass takes F operations takes F for the gradients of its weights and F for those of its input, where they are needed:

- D step: forward, weights and input on real images and on generated ones, but no input gradient in D's first layer.
- G step: forward and weights in G, input but in G's first layer; D on the generated images forward and input (G needs
  the gradient of all its pixels), while D is frozen: no weights.

That is 8 D + 3 G less the first layers' parts: for the DCGAN at 64 pixels and width 64, where D takes 0.208 and G 0.209
GFLOP an image, 2.27 GFLOP an image and step. Multiplications by the zeros of a padded border count as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from core.nn.model_file import build_model
from scripts.bench_measure import Side


def count_flops(run: Callable[[], object], *networks: nn.Module) -> int:
    """Operations of the forward passes in `run` and of the backward passes through them that will be needed.

    Whether a gradient is needed is read off each layer's weight and input in its forward pass.
    """
    total = 0

    def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        weight = layer.weight
        assert isinstance(weight, Tensor)
        total += layer_flops(layer, inputs[0], output) * (1 + weight.requires_grad + inputs[0].requires_grad)

    layers = [layer for network in networks for layer in network.modules() if isinstance(layer, COUNTED)]
    handles = [layer.register_forward_hook(count) for layer in layers]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return total


COUNTED = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)


def layer_flops(layer: nn.Module, given: Tensor, output: Tensor) -> int:
    """Operations of one forward pass: every weight meets every output position, in transposed convolutions every input
    position, once."""
    assert isinstance(layer.weight, Tensor)
    if isinstance(layer, nn.Linear):
        positions = given.numel() // layer.in_features
    else:
        maps = given if isinstance(layer, nn.ConvTranspose2d) else output
        positions = len(maps) * math.prod(maps.shape[2:])
    return 2 * layer.weight.numel() * positions


def gan_step_flops(model: dict[str, Any]) -> float:
    """Operations an image of one step of D and one of G.

    Args:
        model: recipes of both networks, as in conf/model.
    """
    with torch.device("meta"):  # shapes without numbers: no memory, no time
        generator, discriminator = build_model(model["generator"]), build_model(model["discriminator"])
        z = torch.empty(2, int(generator.latent_dim))  # type: ignore[arg-type]

    def step() -> None:
        fake = generator(z)
        discriminator(torch.empty_like(fake))
        discriminator(fake.detach())
        discriminator.requires_grad_(False)
        discriminator(fake)

    return count_flops(step, generator, discriminator) / len(z)


def unet_step_flops(recipe: dict[str, Any], size: int) -> float:
    """Operations an image of `size` pixels of one step of a U-Net."""
    with torch.device("meta"):
        network = build_model(recipe)
        images = torch.empty(2, 3, size, size)
    return count_flops(lambda: network(images), network) / len(images)


def matrix_side(device: torch.device, precision: str, width: int) -> Side:
    """A contestant that multiplies two `width` x `width` matrices; its rate is in operations a second.

    With fp32 on a GPU it may use TF32, as training does.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))

    def multiply(count: int) -> float:
        for _ in range(count):
            a @ b
        return count * 2.0 * width**3

    return Side("matrix", multiply)
