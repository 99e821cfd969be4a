"""The two halves of a GAN training step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from gen.augment import FAKE_STREAM, GENERATOR_STREAM, REAL_STREAM, augment
from gen.losses import LOSSES, GanLoss
from gen.regularizers import gradient_penalty, r1, r2
from gen.unetgan import consistency, cutmix

# What a step reports, in this order: mean losses, mean answers to real and fake, share D gets right.
STATISTICS = ("d_loss", "g_loss", "d_real", "d_fake", "d_accuracy")
PENALTIES = ("r1", "r2", "gradient_penalty", "cutmix")  # what D's loss may have besides, reported where it has


@dataclass(frozen=True)
class Terms:
    """What a step does besides the plain loss on the images as they are.

    Attributes:
        loss: the game.
        weights: factors of the `PENALTIES` in use, gamma / 2 for R1 and R2.
        mixing: (N,) weights for the gradient penalty, see `gen.regularizers.mixing_weights`.
        masks: (N, 1, H, W) for CutMix, see `gen.unetgan.cutmix_masks`.
        p: probability of each augmentation.
        draws: rows of `gen.augment.augmentation_draws` for the batches of its three streams.
        parts: batches whose gradients are averaged into one step.
        last: whether this one completes the step.
    """

    loss: GanLoss = LOSSES["non_saturating"]
    weights: Mapping[str, float] = field(default_factory=dict)
    mixing: Tensor | None = None
    masks: Tensor | None = None
    p: float = 0.0
    draws: Mapping[int, Tensor] = field(default_factory=dict)
    parts: int = 1
    last: bool = True

    def augmented(self, images: Tensor, stream: int) -> Tensor:
        """The images as D sees them."""
        return augment(images, self.p, self.draws[stream]) if self.p else images

    def update(self, optimizer: torch.optim.Optimizer) -> None:
        """Step once all parts have left their gradients."""
        if self.last:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


PLAIN = Terms()


class DiscriminatorWrapper(nn.Module):
    """D as the steps call it: images -> float32 logits (N,), and those of the pixels (N, H, W) if D has them.

    To be wrapped for several processes, which watch only what goes through `forward`.

    Args:
        network: D; its `forward_all` is called if it has one.
        bf16: compute in bfloat16 where autocast allows it. Without, D computes in float32 even where the caller is
            within autocast, which penalties on its gradient need.
    """

    def __init__(self, network: nn.Module, bf16: bool) -> None:
        super().__init__()
        self.network, self.bf16 = network, bf16

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """All logits of the images."""
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            logits = _as_tuple(getattr(self.network, "forward_all", self.network)(images))
        return tuple(values.float() for values in logits)


def _as_tuple(logits: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return logits if isinstance(logits, tuple) else (logits,)


def discriminator_step(
    discriminator: nn.Module, optimizer: torch.optim.Optimizer, real: Tensor, fake: Tensor, terms: Terms = PLAIN
) -> dict[str, Tensor]:
    """One step of D on images (N, C, H, W) in [-1, 1].

    Real and fake go through D apart, so that each is normalised by its own batch statistics (as in DCGAN's code and
    PyTorch's tutorial). The loss is summed over the kinds of logits that D gives (see `DiscriminatorWrapper`);
    statistics, R1, R2 and gradient penalty are those of the image logits.

    Returns:
        Detached scalars on the device: d_loss (without penalties), d_real and d_fake (mean probabilities where the loss
        has them, else mean logits), d_accuracy, d_sign (mean decision on the reals, -1 to 1), and the penalties in use,
        without their factors.
    """
    # R1 and R2 are of the gradients with respect to the images before any augmentation, through it.
    real = real.detach().requires_grad_("r1" in terms.weights)
    fake = fake.detach().requires_grad_("r2" in terms.weights)
    seen_real, seen_fake = terms.augmented(real, REAL_STREAM), terms.augmented(fake, FAKE_STREAM)
    real_logits, fake_logits = _as_tuple(discriminator(seen_real)), _as_tuple(discriminator(seen_fake))
    loss = torch.stack(list(map(terms.loss.discriminator, real_logits, fake_logits))).sum()
    penalties: dict[str, Tensor] = {}
    if "r1" in terms.weights:
        penalties["r1"] = r1(real, real_logits[0])
    if "r2" in terms.weights:
        penalties["r2"] = r2(fake, fake_logits[0])
    if terms.mixing is not None:
        penalties["gradient_penalty"] = gradient_penalty(
            lambda images: _as_tuple(discriminator(images))[0], seen_real.detach(), seen_fake.detach(), terms.mixing
        )
    if terms.masks is not None:
        _, mixed = discriminator(cutmix(seen_real.detach(), seen_fake.detach(), terms.masks))
        penalties["cutmix"] = consistency(mixed, real_logits[1], fake_logits[1], terms.masks)
    total = loss + sum(terms.weights[name] * value for name, value in penalties.items())
    (total / terms.parts).backward()
    terms.update(optimizer)
    return {
        "d_loss": loss.detach(),
        **_answers(terms.loss, real_logits[0].detach(), fake_logits[0].detach()),
        **{name: value.detach() for name, value in penalties.items()},
    }


def _answers(loss: GanLoss, real_logits: Tensor, fake_logits: Tensor) -> dict[str, Tensor]:
    of_real, of_fake = loss.decisions(real_logits, fake_logits)
    correct = (of_real > 0).float().mean() + (of_fake < 0).float().mean()
    return {
        "d_real": loss.answers(real_logits).mean(),
        "d_fake": loss.answers(fake_logits).mean(),
        "d_accuracy": correct / 2,
        "d_sign": of_real.mean(),
    }


def generator_step(
    discriminator: nn.Module,
    optimizer: torch.optim.Optimizer,
    fake: Tensor,
    terms: Terms = PLAIN,
    real: Tensor | None = None,
) -> dict[str, Tensor]:
    """One step of G, given images it has just made, with their graph.

    D is frozen meanwhile: it must hand gradients through, but computing those of its weights would be wasted. Give the
    bare D, not one wrapped for several processes, which would wait for exactly these gradients.

    Args:
        real: images in the same places, which a paired loss compares with. Training gives those that D has just
            learnt from, which saves a batch; R3GAN draws others.

    Returns:
        Detached scalar on the device: g_loss.
    """
    discriminator.requires_grad_(False)
    logits = _as_tuple(discriminator(terms.augmented(fake, GENERATOR_STREAM)))
    if terms.loss.paired:
        assert real is not None
        with torch.no_grad():
            partners = _as_tuple(discriminator(terms.augmented(real, REAL_STREAM)))
        losses = list(map(terms.loss.generator, logits, partners))
    else:
        losses = list(map(terms.loss.generator, logits))
    loss = torch.stack(losses).sum()
    (loss / terms.parts).backward()
    terms.update(optimizer)
    discriminator.requires_grad_(True)
    return {"g_loss": loss.detach()}
