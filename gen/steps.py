"""The two halves of a GAN training step."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gen.losses import discriminator_loss, generator_loss

# What a step reports, in this order: mean losses, mean D probabilities of real and fake, share D gets right.
STATISTICS = ("d_loss", "g_loss", "d_real", "d_fake", "d_accuracy")


def discriminator_step(
    discriminator: nn.Module, optimizer: torch.optim.Optimizer, real: Tensor, fake: Tensor
) -> dict[str, Tensor]:
    """One step of D on images (N, C, H, W) in [-1, 1].

    Real and fake go through D apart, so that each is normalised by its own batch statistics (as in the paper's code
    and the tutorial).

    Returns:
        Detached scalars on the device: d_loss, d_real, d_fake, d_accuracy.
    """
    real_logits = discriminator(real)
    fake_logits = discriminator(fake.detach())
    loss = discriminator_loss(real_logits, fake_logits)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        correct = (real_logits > 0).float().mean() + (fake_logits < 0).float().mean()
        return {
            "d_loss": loss.detach(),
            "d_real": real_logits.sigmoid().mean(),
            "d_fake": fake_logits.sigmoid().mean(),
            "d_accuracy": correct / 2,
        }


def generator_step(discriminator: nn.Module, optimizer: torch.optim.Optimizer, fake: Tensor) -> dict[str, Tensor]:
    """One step of G, given images it has just made, with their graph.

    D is frozen meanwhile: it must hand gradients through, but computing those of its weights would be wasted. Give the
    bare D, not one wrapped for several processes, which would wait for exactly these gradients.

    Returns:
        Detached scalar on the device: g_loss.
    """
    discriminator.requires_grad_(False)
    loss = generator_loss(discriminator(fake))
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    discriminator.requires_grad_(True)
    return {"g_loss": loss.detach()}
