"""One training step of a GAN: from a batch to the losses of D and G to the update of their weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from gen.augment import augment, is_off
from gen.losses import LOSSES, GanLoss, Logits, image_logits
from gen.penalties import PENALTIES, DiscriminatorPass

# What every step reports, in this order: mean losses, mean answers to real and fake, share that D gets right.
STATISTICS = ("d_loss", "g_loss", "d_real", "d_fake", "d_accuracy")


@dataclass(frozen=True)
class Batch:
    """What one process trains on at once."""

    real: Tensor  # images (N, 3, H, W) in [-1, 1]
    z: Tensor  # latents (N, latent_dim)
    # Rows of `augmentation_draws` for each of `gen.augment.STREAMS`; needed when images are augmented.
    augment: Mapping[str, Tensor] = field(default_factory=dict)
    draws: Mapping[str, Tensor] = field(default_factory=dict)  # random numbers of the penalties that need some, by name


@dataclass(frozen=True)
class Objective:
    """What a step minimises."""

    loss: GanLoss = LOSSES["non_saturating"]
    # Factor of each of `gen.penalties.PENALTIES` in use.
    penalties: Mapping[str, float | Tensor] = field(default_factory=dict)
    augment_p: float | Tensor = 0.0  # probability of each augmentation of what D sees

    def on(self, device: torch.device) -> Objective:
        """The same with the factors, which may change from step to step, as tensors on a device."""
        factors = {name: torch.ones((), device=device) * value for name, value in self.penalties.items()}
        return replace(self, penalties=factors)

    def shown(self, images: Tensor, batch: Batch, name: str) -> Tensor:
        """The images as D sees them."""
        return images if is_off(self.augment_p) else augment(images, self.augment_p, batch.augment[name])


PLAIN = Objective()


class DiscriminatorWrapper(nn.Module):
    """D as the steps call it: images (N, 3, H, W) -> `Logits` in float32.

    Wrap this for several processes: DDP watches only what goes through `forward`.
    With `bf16` it computes in bfloat16 where autocast allows it, else in float32 even inside the caller's autocast,
    which second derivatives need.
    """

    def __init__(self, network: nn.Module, bf16: bool) -> None:
        super().__init__()
        self.network, self.bf16 = network, bf16

    def forward(self, images: Tensor) -> Logits:
        """All logits of the images."""
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            several = getattr(self.network, "forward_all", None)
            logits = several(images) if several else (self.network(images),)
        return tuple(values.float() for values in logits)


def discriminator_step(
    discriminator: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    fakes: Sequence[Tensor],
    objective: Objective = PLAIN,
    accelerator: Accelerator | None = None,
) -> dict[str, Tensor]:
    """One step of D on batches of equal size and the images that G made of their latents, which get no gradients.

    `discriminator` is a `DiscriminatorWrapper`, possibly wrapped by `accelerator`. Returns detached scalars, means over
    the batches: d_loss (without penalties), d_real and d_fake (probabilities where the loss has them, else logits),
    d_accuracy, d_sign (mean decision on the reals, -1 to 1), and the penalties in use, without their factors.
    """
    rows = []
    for place, (batch, fake) in enumerate(zip(batches, fakes, strict=True)):
        with _exchange(accelerator, discriminator, last=place == len(batches) - 1):
            loss, row = discriminator_loss(discriminator, batch, fake, objective)
            (loss / len(batches)).backward()
        rows.append(row)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return _mean(rows)


def discriminator_loss(
    discriminator: nn.Module, batch: Batch, fake: Tensor, objective: Objective = PLAIN
) -> tuple[Tensor, dict[str, Tensor]]:
    """D's loss with its penalties, and the statistics of `discriminator_step`.

    Real and fake go through D separately, so that each is normalised by its own batch statistics (as in DCGAN's code
    and PyTorch's tutorial). The loss is summed over the kinds of logits; statistics and penalties on D's gradient use
    `image_logits`.
    """
    penalties = {name: PENALTIES[name] for name in objective.penalties}
    # R1 and R2 take the gradient at the images before augmentation, through it.
    wanted = {penalty.gradient_of for penalty in penalties.values()}
    real = batch.real.detach().requires_grad_("real" in wanted)
    fake = fake.detach().requires_grad_("fake" in wanted)
    seen_real, seen_fake = objective.shown(real, batch, "real"), objective.shown(fake, batch, "fake")
    real_logits, fake_logits = discriminator(seen_real), discriminator(seen_fake)
    loss = torch.stack(list(map(objective.loss.discriminator, real_logits, fake_logits))).sum()
    made = DiscriminatorPass(discriminator, real, fake, seen_real, seen_fake, real_logits, fake_logits, batch.draws)
    values = {name: penalty.compute(made) for name, penalty in penalties.items()}
    total = loss + sum(objective.penalties[name] * value for name, value in values.items())
    on_image = image_logits(real_logits).detach(), image_logits(fake_logits).detach()
    on_real, on_fake = objective.loss.decisions(*on_image)
    right = ((on_real > 0).float().mean() + (on_fake < 0).float().mean()) / 2
    d_real, d_fake = (objective.loss.answers(logits).mean() for logits in on_image)
    row = {"d_loss": loss.detach(), "d_real": d_real, "d_fake": d_fake, "d_accuracy": right, "d_sign": on_real.mean()}
    return total, row | {name: value.detach() for name, value in values.items()}


def generator_step(
    generator: nn.Module,
    discriminator: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    fakes: Sequence[Tensor] | None = None,
    objective: Objective = PLAIN,
    accelerator: Accelerator | None = None,
) -> dict[str, Tensor]:
    """One step of G on the latents of the batches.

    D is frozen meanwhile: gradients pass through it, but computing those of its weights would be wasted. It is a
    `DiscriminatorWrapper`, not wrapped for several processes: DDP would wait for those gradients. `fakes` are the
    images of the latents with their graphs, where these still exist. Returns the mean loss, detached, as g_loss.
    """
    rows = []
    discriminator.requires_grad_(False)
    for place, batch in enumerate(batches):
        with _exchange(accelerator, generator, last=place == len(batches) - 1):
            fake = generator(batch.z) if fakes is None else fakes[place]
            loss = generator_loss(discriminator, batch, fake, objective)
            (loss / len(batches)).backward()
        rows.append({"g_loss": loss.detach()})
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    discriminator.requires_grad_(True)
    return _mean(rows)


def generator_loss(discriminator: nn.Module, batch: Batch, fake: Tensor, objective: Objective = PLAIN) -> Tensor:
    """G's loss, summed over the kinds of logits.

    A paired loss compares with the reals that D has just learnt from, which saves a batch; R3GAN draws others.
    """
    logits = [discriminator(objective.shown(fake, batch, "generator"))]
    if objective.loss.paired:
        with torch.no_grad():
            logits.append(discriminator(objective.shown(batch.real, batch, "real")))
    return torch.stack(list(map(objective.loss.generator, *logits))).sum()


def _exchange(accelerator: Accelerator | None, network: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Processes average their gradients only in the last forward and backward pass of a step."""
    return nullcontext() if accelerator is None or last else accelerator.no_sync(network)


def _mean(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Means of the statistics of equal parts."""
    return rows[0] if len(rows) == 1 else {name: torch.stack([row[name] for row in rows]).mean() for name in rows[0]}
