"""Adversarial losses on logits, and the table from which a configuration chooses.

Real and fake logits have the same shape: (N,), or (N, H, W) where every place is judged. Every loss is a mean over all
of them, so the means of equal parts of a batch average to that of the whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from core.cli.errors import UserError


def non_saturating_discriminator(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """-log D(x) - log(1 - D(G(z))), means over the batch (Goodfellow et al. 2014, equation 1), with D = sigmoid(logit).

    softplus(-l) = -log sigmoid(l): the same value as sigmoid and binary cross-entropy without their overflow.
    """
    return softplus(-real_logits).mean() + softplus(fake_logits).mean()


def non_saturating_generator(fake_logits: Tensor) -> Tensor:
    """-log D(G(z)), mean over the batch: the non-saturating form (Goodfellow et al. 2014, section 3)."""
    return softplus(-fake_logits).mean()


@dataclass(frozen=True)
class GanLoss:
    """The two sides of a game."""

    discriminator: Callable[[Tensor, Tensor], Tensor]  # (real logits, fake logits) -> scalar
    of_generator: Callable[..., Tensor]  # (fake logits) -> scalar, or (fake logits, real logits) when `paired`
    boundary: float | None = 0.0  # logit at which D is undecided; None when only differences of logits mean anything
    paired: bool = False  # G's loss compares with real logits, which its step must then compute as well
    probabilistic: bool = False  # sigmoid(logit) is the probability of "real" that D is trained to give

    def generator(self, fake_logits: Tensor, real_logits: Tensor | None = None) -> Tensor:
        """G's loss; only a `paired` loss needs (and reads) `real_logits`, of the reals at the same indices."""
        if not self.paired:
            return self.of_generator(fake_logits)
        if real_logits is None:
            raise ValueError("this loss compares with real logits, but none were given")
        return self.of_generator(fake_logits, real_logits)

    @property
    def overfitting_target(self) -> float:
        """The mean decision on reals to hold with adaptive augmentation: 0.6 (Karras et al. 2020, section 3.1).

        Decisions on pairs are more certain. With normal logits of equal spread s, those of reals and fakes 2m apart,
        the mean decision is erf(m / (s sqrt 2)) on single logits and erf(m / s) on pairs: 0.77 for the D that has 0.6.
        """
        return 0.6 if self.boundary is not None else 0.77

    def answers(self, logits: Tensor) -> Tensor:
        """D's answer to each image: probabilities of "real" where the loss has them, else the logits themselves."""
        return logits.sigmoid() if self.probabilistic else logits

    @torch.no_grad()
    def decisions(self, real_logits: Tensor, fake_logits: Tensor) -> tuple[Tensor, Tensor]:
        """D's decisions on the reals and on the fakes: 1 real, -1 fake, 0 undecided; shapes as given.

        Without a boundary each logit is compared with its partner. The mean over reals is r_t, the measure of
        overfitting that `gen.augment.AdaptiveProbability` holds at a target.
        """
        if self.boundary is None:
            return (real_logits - fake_logits).sign(), (fake_logits - real_logits).sign()
        return (real_logits - self.boundary).sign(), (fake_logits - self.boundary).sign()


LOSSES: dict[str, GanLoss] = {
    "non_saturating": GanLoss(non_saturating_discriminator, non_saturating_generator, probabilistic=True),
    # max(0, 1 - D(x)) + max(0, 1 + D(G(z))) against -D(G(z)) (Lim & Ye 2017; Miyato et al. 2018, equations 16 and 17)
    "hinge": GanLoss(lambda real, fake: (1 - real).relu().mean() + (1 + fake).relu().mean(), lambda fake: -fake.mean()),
    # (D(x) - 1)^2 / 2 + D(G(z))^2 / 2 against (D(G(z)) - 1)^2 / 2 (Mao et al. 2017, equation 9: labels 0 and 1)
    "least_squares": GanLoss(
        lambda real, fake: (real - 1).square().mean() / 2 + fake.square().mean() / 2,
        lambda fake: (fake - 1).square().mean() / 2,
        boundary=0.5,
    ),
    # D(G(z)) - D(x) (Arjovsky et al. 2017, equation 2): a distance only while D is 1-Lipschitz, see `gen.penalties`
    "wasserstein": GanLoss(lambda real, fake: fake.mean() - real.mean(), lambda fake: -fake.mean(), boundary=None),
    # softplus(-(D(x) - D(G(z)))): how much more real a real is than the fake at the same index; G lowers the same
    # differences (RpGAN: Jolicoeur-Martineau 2019; Huang et al. 2024, section 2). The logits may drift together.
    "relativistic": GanLoss(
        lambda real, fake: softplus(fake - real).mean(),
        lambda fake, real: softplus(real - fake).mean(),
        boundary=None,
        paired=True,
    ),
}


Logits = tuple[Tensor, ...]  # of all kinds that D gives, see `image_logits`


def image_logits(logits: Logits) -> Tensor:
    """One logit for each image (N,), for statistics and penalties on D's gradient.

    The first kind where that is one for each image already; else the mean over kinds of the means over their places.
    """
    if logits[0].ndim == 1:
        return logits[0]
    return torch.stack([kind.reshape(len(kind), -1).mean(1) for kind in logits]).mean(0)


def gan_loss(name: str) -> GanLoss:
    """The loss that a configuration names. Raises UserError for an unknown name."""
    if name not in LOSSES:
        raise UserError(f"loss={name!r} is unknown: use one of {', '.join(LOSSES)}")
    return LOSSES[name]
