"""Penalties on the gradient of D with respect to its input, outside autocast and with exact second-order gradients.

bfloat16 has 8 bits of mantissa, few for the derivative of a derivative; keeping out of it is a precaution whose worth
was not measured. (GPUs that have TF32 multiply float32 in it.) The penalties themselves are computed outside autocast
here, but the logits come from the caller: D must be called outside autocast as well, which `float32_logits` does.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

MIXING_STREAM = 6  # second entry of the seed, see gen.latents


def float32_logits(discriminator: Callable[[Tensor], Tensor], images: Tensor) -> tuple[Tensor, Tensor]:
    """Images as a leaf that collects gradients, and their logits (N,), computed outside autocast.

    A network whose own `forward` enters autocast, as one prepared by an accelerator with mixed precision does, leaves
    float32 all the same: give one that does not.
    """
    leaf = images.detach().to(torch.promote_types(images.dtype, torch.float32)).requires_grad_()
    with torch.autocast(leaf.device.type, enabled=False):
        return leaf, discriminator(leaf)


def squared_gradients(images: Tensor, logits: Tensor) -> Tensor:
    """||grad_x D(x)||^2 of every image (N,), summed over channels and pixels, itself differentiable.

    Args:
        images: (N, C, H, W), requiring gradients, from which `logits` (N,) were computed outside autocast.
    """
    with torch.autocast(images.device.type, enabled=False):
        # One logit depends on one image alone (D without batch norm), so the sum's gradient holds each one's own.
        (gradients,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
        return gradients.square().flatten(1).sum(1)


def r1(real: Tensor, logits: Tensor) -> Tensor:
    """E ||grad_x D(x)||^2 over real images (Mescheder et al. 2018, equation 9), without the factor gamma / 2.

    Arguments as for `squared_gradients`.
    """
    return squared_gradients(real, logits).mean()


def r2(fake: Tensor, logits: Tensor) -> Tensor:
    """E ||grad_x D(x)||^2 over generated images (Mescheder et al. 2018, equation 10), without the factor gamma / 2.

    Arguments as for `squared_gradients`; the caller has cut the images from G's graph.
    """
    return squared_gradients(fake, logits).mean()


def gradient_penalty(discriminator: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, weights: Tensor) -> Tensor:
    """E (||grad_x D(x)|| - 1)^2 at x = w real + (1 - w) fake (Gulrajani et al. 2017, equation 3), without lambda.

    Args:
        discriminator: see `float32_logits`.
        real, fake: (N, C, H, W).
        weights: w, (N,) in [0, 1]; see `mixing_weights`.
    """
    w = weights.to(real.device)[:, None, None, None]
    mixed, logits = float32_logits(discriminator, w * real + (1 - w) * fake)
    # The root has no derivative at 0; the least float keeps 0/0 out of the backward pass and changes nothing else.
    norms = squared_gradients(mixed, logits).clamp_min(torch.finfo(torch.float32).tiny).sqrt()
    return (norms - 1).square().mean()


def mixing_weights(seed: int, images_seen: int, count: int) -> Tensor:
    """Uniform weights (count,) in [0, 1) for the global batch that begins at `images_seen`, drawn on the CPU."""
    rng = np.random.default_rng([seed, MIXING_STREAM, images_seen])
    return torch.from_numpy(rng.random(count, dtype=np.float32))
