"""Settings of a segmentation run: what they are, whether they can work, and what follows from them."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.cli.errors import UserError
from core.data.dataset import PreparedData
from core.data.mask_classes import IGNORE
from core.training.loop import LoopConfig, check_common, check_least, warn_of_repeats
from seg.augment import Augmentation
from seg.losses import TERMS, median_frequency_weights
from seg.network import SegmentationNetwork

SCHEDULES = ("cosine", "poly", "constant")


@dataclass
class LossConfig:
    """Factors of the parts of the loss."""

    cross_entropy: float
    dice: float
    focal: float
    focal_gamma: float

    @property
    def factors(self) -> dict[str, float]:
        """The parts in use."""
        return {name: getattr(self, name) for name in TERMS if getattr(self, name) > 0}


@dataclass
class BorderConfig:
    """The weight map of `seg.borders`."""

    classes: list[str]
    w0: float
    sigma: float


@dataclass
class TrainConfig(LoopConfig):
    """What conf/seg.yaml holds; it explains each key."""

    valid_split: str
    crop: int | None
    schedule: str
    warmup: int
    clip_gradient: float
    loss: LossConfig
    class_weights: Any
    border: BorderConfig
    augment: Augmentation
    valid_every: int
    patience: int
    workers: int | None


def validate(config: TrainConfig, data: PreparedData, processes: int) -> None:
    """Refuse settings and data that cannot work, with a UserError, before anything is built or written."""
    if not isinstance(config.model.get("network"), dict):
        raise UserError("model.network is missing: see conf/model/unet_small.yaml for what a segmenter needs")
    check_common(config, processes, 2 if config.model["network"].get("norm") == "batch" else 1)
    check_least(config, 0, "warmup", "clip_gradient", "patience")
    check_least(config, 1, "valid_every")
    if config.workers is not None:
        check_least(config, 0, "workers")
    if config.schedule not in SCHEDULES:
        raise UserError(f"schedule={config.schedule!r} is unknown: use one of {', '.join(SCHEDULES)}")
    if config.warmup > config.total_images:
        raise UserError(
            f"warmup={config.warmup} must not exceed total_images={config.total_images}: the rise would never end; "
            f"give warmup={config.total_images // 4} or so"
        )
    config.augment.check()
    _check_loss(config, data.classes)
    assert data.masks is not None
    # A value without a class would end in the middle of a step, on a GPU without saying which.
    for row in itertools.chain(data.indices(config.split), data.indices(config.valid_split)):
        mask = data.masks[row]
        wrong = mask[(mask >= len(data.classes)) & (mask != IGNORE)]
        if len(wrong):
            raise UserError(
                f"{data.path}: mask {row} holds the value {wrong[0]}, but there are {len(data.classes)} classes: "
                "prepare the data set again"
            )
    class_weights(config, data)
    warn_of_repeats(config, data)


def _check_loss(config: TrainConfig, classes: list[str]) -> None:
    for key in ("cross_entropy", "dice", "focal", "focal_gamma"):
        value = getattr(config.loss, key)
        if not (value >= 0 and math.isfinite(value)):
            raise UserError(f"loss.{key}={value} must be a number from 0 up")
    if not config.loss.factors:
        raise UserError(f"loss: give at least one of {', '.join(TERMS)} a factor above 0")
    unknown = [name for name in config.border.classes if name not in classes]
    if unknown:
        raise UserError(f"border.classes: the data have no class {unknown[0]!r} but {', '.join(classes)}")
    if config.border.classes and not (config.border.w0 > 0 and config.border.sigma > 0):
        raise UserError("border.w0 and border.sigma must be above 0")


def class_weights(config: TrainConfig, data: PreparedData) -> Tensor | None:
    """Weight of each class, float (classes,), as `class_weights` says; None for equal ones.

    Raises UserError unless it is one non-negative number a class, or a known word.
    """
    wanted, count = config.class_weights, len(data.classes)
    if wanted is None:
        return None
    if wanted == "median_frequency":
        assert data.masks is not None
        counts = np.zeros(256, np.int64)
        for row in data.indices(config.split):
            counts += np.bincount(data.masks[row].ravel(), minlength=256)
        return median_frequency_weights(counts[:count])
    given = wanted if isinstance(wanted, list) else []
    possible = all(isinstance(value, (int, float)) and 0 <= value < math.inf for value in given)
    if not possible or len(given) != count or not any(given):
        raise UserError(
            f"class_weights={wanted} must be median_frequency, or a list of {count} numbers from 0 up, not all 0, one "
            f"for each of {', '.join(data.classes)}"
        )
    return torch.tensor(wanted, dtype=torch.float32)


def learning_rate_factor(config: TrainConfig, images_seen: int) -> float:
    """What the learning rate is multiplied by in the step that begins at `images_seen`.

    A linear rise over `warmup` images, times one of: half a cosine down to 0 at `images` (Loshchilov & Hutter 2017),
    (1 - t)^0.9 with t = images seen / `images` (Chen et al. 2018), 1.
    """
    rise = min(1.0, (images_seen + config.batch_size) / config.warmup) if config.warmup else 1.0
    t = min(1.0, images_seen / config.total_images)
    shapes = {"cosine": 0.5 * (1 + math.cos(math.pi * t)), "poly": (1 - t) ** 0.9, "constant": 1.0}
    return rise * shapes[config.schedule]


def training_window(model: SegmentationNetwork, crop: int | None, image_size: int) -> tuple[int, int]:
    """Side of the scored window of training pictures, and the pixels of surroundings that the network needs.

    Without `crop` it is the whole picture, or for a `valid` network the largest output it can have within it. Raises
    UserError where `crop` exceeds the pictures, or no input of a `valid` network gives it.
    """
    if crop is not None and not 1 <= crop <= image_size:
        raise UserError(f"crop={crop} must be from 1 to the side of the prepared pictures, {image_size}")
    if model.padding == "same":
        return crop or image_size, 0
    fitting = [size for size in range(1, image_size + 1) if model.input_size(size) == size + 2 * model.margin]
    if not fitting:
        raise UserError(
            f"model.network.padding=valid has no output that fits into {image_size} pixels: use padding=same"
        )
    if crop is not None and crop not in fitting:
        nearest = sorted(sorted(fitting, key=lambda size: abs(size - crop))[:2])
        raise UserError(f"crop={crop} is no output of this network: use {' or '.join(map(str, nearest))}")
    return crop or fitting[-1], model.margin
