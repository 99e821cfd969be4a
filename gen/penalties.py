"""Penalties that D's loss can have, one object each, and the table from which a configuration chooses.

Penalties on D's gradient need second derivatives. They are computed outside autocast, and so must be the logits that
they start from: bfloat16 has few bits for the derivative of a derivative (a precaution, not measured).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gen.losses import Logits, image_logits
from gen.unetgan import consistency, cutmix, cutmix_masks

MIXING_STREAM = 6  # second entry of the seed, see gen.latents


@dataclass(frozen=True)
class DiscriminatorPass:
    """What D's step has computed when the penalties are added."""

    discriminator: Callable[[Tensor], Logits]
    real: Tensor  # images (N, 3, H, W) before augmentation
    fake: Tensor
    seen_real: Tensor  # the images as D saw them
    seen_fake: Tensor
    real_logits: Logits  # what `discriminator` said of them
    fake_logits: Logits
    draws: Mapping[str, Tensor]  # random numbers (N, ...) of the penalties that have a `draw`, by name


@dataclass(frozen=True)
class Penalty:
    """A term that D's loss can have."""

    title: str  # its name in plots
    compute: Callable[[DiscriminatorPass], Tensor]  # a scalar, before the factor
    gradient_of: str = ""  # images that must record gradients in the forward pass: "real", "fake" or neither
    second_order: bool = True  # needs D's gradient at single images: no batch norm, no autocast, no torch.compile
    needs_pixels: bool = False  # needs a D that judges pixels
    halved: bool = False  # the factor is gamma / 2 and follows `regularize.schedule`
    # (seed, images seen, batch size, image size) -> random numbers (N, ...) of a global batch, on the CPU
    draw: Callable[[int, int, int, int], Tensor] | None = None


def float32_logits(discriminator: Callable[[Tensor], Tensor], images: Tensor) -> tuple[Tensor, Tensor]:
    """Images as a leaf that collects gradients, and their logits (N,), computed outside autocast.

    The network's own `forward` must not enter autocast either.
    """
    leaf = images.detach().to(torch.promote_types(images.dtype, torch.float32)).requires_grad_()
    with torch.autocast(leaf.device.type, enabled=False):
        return leaf, discriminator(leaf)


def squared_gradients(images: Tensor, logits: Tensor) -> Tensor:
    """||grad_x D(x)||^2 of every image (N,), summed over channels and pixels, itself differentiable.

    The images (N, C, H, W) require gradients; `logits` (N,) were computed from them outside autocast.
    """
    with torch.autocast(images.device.type, enabled=False):
        # One logit depends on one image alone (D without batch norm), so the sum's gradient holds each one's own.
        (gradients,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
        return gradients.square().flatten(1).sum(1)


def zero_centred(images: Tensor, logits: Tensor) -> Tensor:
    """E ||grad_x D(x)||^2, without the factor gamma / 2; arguments as for `squared_gradients`.

    R1 over real images, R2 over generated ones, cut from G's graph (Mescheder et al. 2018, equations 9 and 10).
    """
    return squared_gradients(images, logits).mean()


def gradient_penalty(discriminator: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, weights: Tensor) -> Tensor:
    """E (||grad_x D(x)|| - 1)^2 at x = w real + (1 - w) fake (Gulrajani et al. 2017, equation 3), without lambda.

    The images are (N, C, H, W), the weights w are (N,) in [0, 1]; for the discriminator see `float32_logits`.
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


def _gradient_penalty(step: DiscriminatorPass) -> Tensor:
    real, fake = step.seen_real.detach(), step.seen_fake.detach()
    return gradient_penalty(
        lambda images: image_logits(step.discriminator(images)), real, fake, step.draws["gradient_penalty"]
    )


def _cutmix(step: DiscriminatorPass) -> Tensor:
    masks = step.draws["cutmix"]
    _, mixed = step.discriminator(cutmix(step.seen_real.detach(), step.seen_fake.detach(), masks))
    return consistency(mixed, step.real_logits[1], step.fake_logits[1], masks)


PENALTIES: dict[str, Penalty] = {
    "r1": Penalty(
        "R1", lambda step: zero_centred(step.real, image_logits(step.real_logits)), gradient_of="real", halved=True
    ),
    "r2": Penalty(
        "R2", lambda step: zero_centred(step.fake, image_logits(step.fake_logits)), gradient_of="fake", halved=True
    ),
    "gradient_penalty": Penalty(
        "gradient penalty", _gradient_penalty, draw=lambda seed, start, count, _: mixing_weights(seed, start, count)
    ),
    "cutmix": Penalty("CutMix consistency", _cutmix, second_order=False, needs_pixels=True, draw=cutmix_masks),
}
