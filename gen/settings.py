"""Settings of a GAN's training run: what they are, whether they can work, and what follows from them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from core.cli.errors import UserError
from core.data.dataset import PreparedData
from core.training.loop import LoopConfig, check_common, check_least
from eval.online import EvalSection, check_section
from gen.losses import gan_loss
from gen.schedule import cosine
from gen.steps import PENALTIES, STATISTICS


@dataclass
class Schedule:
    """Factor that goes from 1 to `end` over so many images; see `gen.schedule.cosine`."""

    end: float
    over: int


@dataclass
class RegularizeSection:
    """Weights of what is added to D's loss, and the schedule of those of R1 and R2."""

    r1: float
    r2: float
    gradient_penalty: float
    cutmix: float
    schedule: Schedule

    @property
    def used(self) -> tuple[str, ...]:
        """Names of those in use."""
        return tuple(name for name in PENALTIES if getattr(self, name) > 0)

    @property
    def of_gradients(self) -> tuple[str, ...]:
        """Those that need D's gradient at single images, and second derivatives."""
        return tuple(name for name in self.used if name != "cutmix")

    def weights(self, images_seen: int) -> dict[str, float]:
        """Factors in the step that begins at `images_seen`; gamma / 2 for R1 and R2."""
        half = cosine(self.schedule.end, self.schedule.over, images_seen) / 2
        return {name: getattr(self, name) * (half if name in ("r1", "r2") else 1.0) for name in self.used}


@dataclass
class DiffaugSection:
    """How often D sees augmented images. `p`: a number or "adaptive"; `ada_target` None: what suits the loss."""

    p: Any
    ada_target: float | None
    ada_images: int

    @property
    def adaptive(self) -> bool:
        """Whether p follows D's overfitting."""
        return bool(self.p == "adaptive")


@dataclass
class TrainConfig(LoopConfig):
    """What conf/gen.yaml holds; it explains each key."""

    flip: bool
    grid_every: int
    loss: str
    regularize: RegularizeSection
    diffaug: DiffaugSection
    d_lr_factor: float
    n_critic: int
    lr_schedule: Schedule
    accumulate: int
    eval: EvalSection

    @property
    def statistics(self) -> tuple[str, ...]:
        """What the steps of this run report."""
        return (*STATISTICS, *self.regularize.used, *(["augment_p"] if self.diffaug.adaptive else []))


# Keys that the configuration of older runs lacks, with the values that do what those runs did.
ADDED: dict[str, Any] = {
    "loss": "non_saturating",
    "regularize.r1": 0.0,
    "regularize.r2": 0.0,
    "regularize.gradient_penalty": 0.0,
    "regularize.cutmix": 0.0,
    "regularize.schedule.end": 1.0,
    "regularize.schedule.over": 0,
    "diffaug.p": 0.0,
    "diffaug.ada_target": None,
    "diffaug.ada_images": 500_000,
    "d_lr_factor": 1.0,
    "n_critic": 1,
    "lr_schedule.end": 1.0,
    "lr_schedule.over": 0,
    "accumulate": 1,
}


def validate(config: TrainConfig, data: PreparedData, processes: int) -> None:
    """Refuse settings that cannot work, before anything is built or written.

    Raises:
        UserError: naming the key.
    """
    check_common(config, processes)
    check_least(config, 0, "grid_every")
    check_least(config, 1, "n_critic", "accumulate")
    share = config.batch_size // processes
    if share % config.accumulate or share // config.accumulate < 2:
        raise UserError(
            f"accumulate={config.accumulate} must divide the {share} images of each process into equal parts of at "
            "least 2 (batch norm needs them)"
        )
    check_section(config.eval)
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


def _check_game(config: TrainConfig) -> None:
    gan_loss(config.loss)
    regularize, diffaug = config.regularize, config.diffaug
    for name in PENALTIES:
        _check_number(f"regularize.{name}", getattr(regularize, name))
    _check_number("d_lr_factor", config.d_lr_factor)
    if not config.d_lr_factor:
        raise UserError("d_lr_factor=0 would keep D from learning: give a factor above 0")
    for key, schedule in (("regularize.schedule", regularize.schedule), ("lr_schedule", config.lr_schedule)):
        _check_number(f"{key}.end", schedule.end)
        if schedule.over < 0 or (schedule.over == 0) != (schedule.end == 1):
            given = f"end={schedule.end:g} over={schedule.over}"
            raise UserError(f"{key}: {given} does nothing or has no duration: change both, or neither (end=1 over=0)")
    if regularize.schedule.over and not (regularize.r1 or regularize.r2):
        raise UserError("regularize.schedule changes r1 and r2, but both are 0: set one of them, or leave it out")
    if not diffaug.adaptive:
        _check_number("diffaug.p", diffaug.p, most=1, words=" or adaptive")
    if diffaug.ada_target is not None:
        _check_number("diffaug.ada_target", diffaug.ada_target, most=1, words=", or null")
    if diffaug.ada_images < 1:
        raise UserError(f"diffaug.ada_images={diffaug.ada_images} must be at least 1")


def _check_number(key: str, value: Any, most: float = math.inf, words: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (0 <= value <= most) or value == math.inf:
        raise UserError(f"{key}={value} must be a number from 0 {'up' if most == math.inf else f'to {most}'}{words}")


def check_networks(config: TrainConfig, generator: nn.Module, discriminator: nn.Module) -> None:
    """Refuse networks that do not fit the other settings.

    Raises:
        UserError: naming the key.
    """
    if not isinstance(getattr(generator, "latent_dim", None), int):
        raise UserError(f"model.generator is a {type(generator).__name__}, not a generator")
    if not hasattr(discriminator, "initialise") or hasattr(discriminator, "latent_dim"):
        raise UserError(f"model.discriminator is a {type(discriminator).__name__}, not a discriminator")
    normalised = any(isinstance(layer, nn.BatchNorm2d) for layer in discriminator.modules())
    if normalised and (penalties := config.regularize.of_gradients):
        raise UserError(
            f"regularize.{penalties[0]} needs a D that judges each image by itself, but this one has batch norm: use "
            "another model, or model.norm=none"
        )
    if config.regularize.cutmix and not hasattr(discriminator, "forward_all"):
        raise UserError("regularize.cutmix needs a D that judges pixels: use model=unetgan, or regularize.cutmix=0")
    bounded = config.regularize.of_gradients or any(map(is_parametrized, discriminator.modules()))  # spectral norm
    if config.loss == "wasserstein" and not bounded:
        raise UserError("loss=wasserstein needs regularize.gradient_penalty (10 in the paper), else its D is unbounded")
    _check_shapes(generator, discriminator, config.model["generator"]["image_size"])


@torch.no_grad()
def _check_shapes(generator: nn.Module, discriminator: nn.Module, size: int) -> None:
    """Refuse networks that do not make images, or not one logit an image."""
    for name, network, given, wanted in (
        ("generator", generator, (2, generator.latent_dim), (2, 3, size, size)),
        ("discriminator", discriminator, (2, 3, size, size), (2,)),
    ):
        try:
            shape = tuple(network.eval()(torch.zeros(given)).shape)  # type: ignore[arg-type]
        except RuntimeError as error:
            raise UserError(f"model.{name} cannot read {given}: {str(error).splitlines()[0]}") from error
        network.train()
        if shape != wanted:
            raise UserError(f"model.{name} makes {shape} of {given}, but {wanted} is needed: check its sizes")
