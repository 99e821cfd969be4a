"""Adversarial losses on logits, one function an equation."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import softplus


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """-log D(x) - log(1 - D(G(z))), means over the batch (Goodfellow et al. 2014, equation 1), with D = sigmoid(logit).

    softplus(-l) = -log sigmoid(l): the same value as sigmoid and binary cross-entropy without their overflow.
    """
    return softplus(-real_logits).mean() + softplus(fake_logits).mean()


def generator_loss(fake_logits: Tensor) -> Tensor:
    """-log D(G(z)), mean over the batch: the non-saturating form (Goodfellow et al. 2014, section 3)."""
    return softplus(-fake_logits).mean()
