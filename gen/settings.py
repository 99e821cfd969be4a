"""Settings of a GAN's training run: what they are, whether they can work, and what follows from them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from core.cli.errors import UserError
from core.data.dataset import PreparedData
from core.training.loop import LoopConfig, check_common, check_least, warn_of_repeats
from gen.losses import gan_loss
from gen.networks import Discriminator, Generator
from gen.penalties import PENALTIES
from gen.steps import STATISTICS, Objective

LEAST_SAMPLES = 2_000  # of a score that chooses weights


@dataclass
class Schedule:
    """A factor that goes from 1 to `end` over the first `over` images seen; 0 for a factor of 1 throughout."""

    end: float
    over: int

    def factor(self, images_seen: int) -> float:
        """The factor in the step that begins at `images_seen`: half a cosine (Loshchilov & Hutter 2017), then `end`."""
        progress = min(1.0, images_seen / self.over) if self.over else 0.0
        return self.end + (1.0 - self.end) * (1.0 + math.cos(math.pi * progress)) / 2


@dataclass
class DiffaugSection:
    """How often D sees augmented images."""

    p: Any  # a number or "adaptive"
    ada_target: float | None  # None: what suits the loss
    ada_images: int

    @property
    def adaptive(self) -> bool:
        """Whether p follows D's overfitting."""
        return bool(self.p == "adaptive")


@dataclass
class FidSection:
    """The network of scores."""

    weights: str | None
    dims: int


@dataclass
class EvalSection:
    """When and how samples are scored during training, by the callback that `_target_` names."""

    _target_: str
    every: int
    n: int
    features: str
    fid: FidSection
    batch_size: int | None


@dataclass
class TrainConfig(LoopConfig):
    """What conf/gen.yaml holds; it explains each key."""

    flip: bool
    grid_every: int
    loss: str
    regularize: dict[str, Any]
    diffaug: DiffaugSection
    d_lr_factor: float
    n_critic: int
    lr_schedule: Schedule
    accumulate: int
    cuda_graph: bool
    eval: EvalSection

    @property
    def penalties(self) -> list[str]:
        """Names of the penalties in use."""
        return [name for name in PENALTIES if self.regularize[name] > 0]

    @property
    def second_order(self) -> list[str]:
        """Names of those that need D's gradient at single images."""
        return [name for name in self.penalties if PENALTIES[name].second_order]

    @property
    def statistics(self) -> tuple[str, ...]:
        """What the steps of this run report."""
        return (*STATISTICS, *self.penalties, *(["augment_p"] if self.diffaug.adaptive else []))

    def objective(self, images_seen: int, augment_p: float | Tensor) -> Objective:
        """What the step that begins at `images_seen` minimises."""
        half = Schedule(**self.regularize["schedule"]).factor(images_seen) / 2
        factors = {name: self.regularize[name] * (half if PENALTIES[name].halved else 1.0) for name in self.penalties}
        return Objective(gan_loss(self.loss), factors, augment_p)


def validate(config: TrainConfig, data: PreparedData, processes: int) -> None:
    """Refuse settings that cannot work, before anything is built or written, with a UserError that names the key."""
    check_common(config, processes)
    check_least(config, 0, "grid_every")
    check_least(config, 1, "n_critic", "accumulate")
    share = config.batch_size // processes
    if share % config.accumulate or share // config.accumulate < 2:
        raise UserError(
            f"accumulate={config.accumulate} must divide the {share} images of each process into equal parts of at "
            "least 2 (batch norm needs them)"
        )
    check_least(config.eval, 0, "every", prefix="eval.")
    if config.eval.batch_size is not None:
        check_least(config.eval, 1, "batch_size", prefix="eval.")
    if config.eval.n < LEAST_SAMPLES:
        raise UserError(
            f"eval.n={config.eval.n} must be at least {LEAST_SAMPLES:,}: with fewer samples, bias and noise of the "
            "score choose the wrong weights"
        )
    _check_game(config)
    for key in ("generator", "discriminator"):
        if not isinstance(config.model.get(key), dict):
            raise UserError(f"model.{key} is missing: see conf/model/dcgan.yaml for what a model needs")
    size = config.model["generator"].get("image_size")
    if size != data.image_size:
        raise UserError(
            f"model.image_size={size}, but {data.path} holds {data.image_size}-pixel images: "
            f"set model.image_size={data.image_size} or prepare with --size {size}"
        )
    warn_of_repeats(config, data)


def _check_game(config: TrainConfig) -> None:
    if not isinstance(config.regularize["schedule"], dict):
        raise UserError("regularize.schedule needs end and over: leave it at its default, or give both")
    gan_loss(config.loss)
    regularize, diffaug = config.regularize, config.diffaug
    for name in PENALTIES:
        _check_number(f"regularize.{name}", regularize[name])
    _check_number("d_lr_factor", config.d_lr_factor)
    if not config.d_lr_factor:
        raise UserError("d_lr_factor=0 would keep D from learning: give a factor above 0")
    of_penalties = Schedule(**regularize["schedule"])
    for key, schedule in (("regularize.schedule", of_penalties), ("lr_schedule", config.lr_schedule)):
        _check_number(f"{key}.end", schedule.end)
        _check_number(f"{key}.over", schedule.over)
        if (schedule.over == 0) != (schedule.end == 1):
            given = f"end={schedule.end:g} over={schedule.over}"
            raise UserError(f"{key}: {given} does nothing or has no duration: change both, or neither (end=1 over=0)")
    if of_penalties.over and not any(PENALTIES[name].halved for name in config.penalties):
        raise UserError("regularize.schedule changes r1 and r2, but both are 0: set one of them, or leave it out")
    if not diffaug.adaptive:
        _check_number("diffaug.p", diffaug.p, most=1, words=" or adaptive")
    if diffaug.ada_target is not None:
        _check_number("diffaug.ada_target", diffaug.ada_target, most=1, words=", or null")
    check_least(diffaug, 1, "ada_images", prefix="diffaug.")


def _check_number(key: str, value: Any, most: float = math.inf, words: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (0 <= value <= most) or value == math.inf:
        raise UserError(f"{key}={value} must be a number from 0 {'up' if most == math.inf else f'to {most}'}{words}")


@torch.no_grad()
def check_networks(config: TrainConfig, generator: nn.Module, discriminator: nn.Module) -> None:
    """Refuse networks that do not fit the other settings, with a UserError that names the key."""
    if not isinstance(generator, Generator):
        raise UserError(f"model.generator is a {type(generator).__name__}, not a generator")
    if not isinstance(discriminator, Discriminator):
        raise UserError(f"model.discriminator is a {type(discriminator).__name__}, not a discriminator")
    normalised = any(isinstance(layer, nn.BatchNorm2d) for layer in discriminator.modules())
    if normalised and config.second_order:
        raise UserError(
            f"regularize.{config.second_order[0]} needs a D that judges each image by itself, but this one has batch "
            "norm: use another model, or model.norm=none"
        )
    for name in config.penalties:
        if PENALTIES[name].needs_pixels and not discriminator.judges_pixels:
            raise UserError(
                f"regularize.{name} needs a D that judges pixels: use model=unetgan, or regularize.{name}=0"
            )
    bounded = config.second_order or any(map(is_parametrized, discriminator.modules()))  # spectral norm
    if config.loss == "wasserstein" and not bounded:
        raise UserError("loss=wasserstein needs regularize.gradient_penalty (10 in the paper), else its D is unbounded")
    size = config.model["generator"]["image_size"]
    images = (2, 3, size, size)
    for name, network, given, wanted in (
        ("generator", generator, (2, generator.latent_dim), images),
        ("discriminator", discriminator, images, (2,)),
    ):
        try:
            shape = tuple(network.eval()(torch.zeros(given)).shape)
        except RuntimeError as error:
            raise UserError(f"model.{name} cannot read {given}: {str(error).splitlines()[0]}") from error
        network.train()
        if shape != wanted:
            raise UserError(f"model.{name} makes {shape} of {given}, but {wanted} is needed: check its sizes")
