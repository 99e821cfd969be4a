"""Training examples for segmentation, each a pure function of (seed, its position in the training sequence)."""

from __future__ import annotations

import atexit
import functools
import itertools
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors

from core.cli.errors import UserError
from core.data.dataset import PreparedData
from core.data.images import to_float
from core.data.loader import InfiniteSampler, MappedFile, copies_ahead, is_file_map, to_device
from core.data.mask_classes import mirrored_classes
from seg.augment import Augmentation, Example, augment, crop


@dataclass(frozen=True)
class Batch:
    """One rank's share of a batch.

    Attributes:
        images: float (N, 3, H, W) in [-1, 1].
        masks: int64 (N, h, w) of class indices with 255 = ignore; smaller than the images for a `valid` network.
        borders: float (N, h, w) weights, or None.
    """

    images: Tensor
    masks: Tensor
    borders: Tensor | None


class Examples(Dataset):
    """Position in the endless training sequence -> augmented example.

    Args:
        data: a prepared data set with masks.
        split: part of the data to train on.
        window: side of the masks in pixels; the whole picture when it equals `data.image_size`.
        margin: further pixels of the image on each side.
        borders: floating (n, H, W) border weights of the n pictures of the split, in their order, or None.

    Raises:
        UserError: the data set has no masks.
    """

    def __init__(
        self,
        data: PreparedData,
        split: str,
        seed: int,
        amounts: Augmentation,
        window: int,
        margin: int,
        borders: np.ndarray | None,
    ) -> None:
        if data.masks is None:
            raise UserError(f"{data.path} has no masks: prepare a source that has them")
        self.images, self.masks = data.images, data.masks
        self.borders = None if borders is None else torch.from_numpy(borders)  # which spawned workers share
        self.order, self.seed = InfiniteSampler(data.indices(split), seed), seed
        self.amounts, self.window, self.margin = amounts, window, margin
        self.mirrored = mirrored_classes(data.classes)

    def __getstate__(self) -> dict[str, Any]:
        """The maps as the files they map: a spawned worker would otherwise receive a copy of the whole data set."""
        return {name: MappedFile(value) if is_file_map(value) else value for name, value in vars(self).items()}

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor, Tensor]:
        """Image uint8 (H, W, 3), mask uint8 (h, w) and border weights float (h, w), or (0,) without any."""
        row = int(self.order.window(position, 1)[0][0])
        border = None
        if self.borders is not None:
            place = int(np.searchsorted(self.order.indices, row))  # the rows of a split are ascending
            border = tv_tensors.Mask(self.borders[place].float())
        # np.array copies, since the arrays are read-only maps.
        image = torch.from_numpy(np.array(self.images[row])).permute(2, 0, 1)
        example = Example(tv_tensors.Image(image), tv_tensors.Mask(torch.from_numpy(np.array(self.masks[row]))), border)
        rng = np.random.default_rng([self.seed, 1, position])  # 1: apart from the draws for the order
        example = augment(example, self.amounts, self.mirrored, rng)
        if self.margin or self.window < example.mask.shape[-1]:
            example = crop(example, self.window, self.margin, rng)
        weights = torch.empty(0) if example.border is None else example.border.as_subclass(Tensor)
        return example.image.as_subclass(Tensor).permute(1, 2, 0), example.mask.as_subclass(Tensor), weights


def _positions(images_seen: int, batch_size: int, rank: int, ranks: int) -> Iterator[list[int]]:
    """The positions of one rank, batch after batch, from `images_seen` on without end."""
    share = batch_size // ranks
    for start in itertools.count(images_seen + rank * share, batch_size):
        yield list(range(start, start + share))


def _leave_stopping_to_training(leaving: Any, worker: int) -> None:
    """Set up a worker, which `leaving.value` tells whether the training process has saved and ends.

    A scheduler or a closing terminal signals all processes alike, but the loss of a worker would end the training
    before it has saved. Python sends SIGTERM to the workers that are left when it ends, and waits for them.
    """
    signal.set_wakeup_fd(-1)  # which would pass its signals on to the training process as that one's own
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGHUP"):  # not on Windows
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0) if leaving.value else None)


def training_batches(
    examples: Examples,
    images_seen: int,
    batch_size: int,
    rank: int,
    ranks: int,
    device: torch.device,
    workers: int,
) -> Iterator[Batch]:
    """The share of `rank` in each global batch after `images_seen`, without end.

    Args:
        workers: processes that make examples ahead of time; 0 makes them in this process. The batches are the same.
    """
    # Elsewhere a fork is unsafe or missing: the workers are spawned, and map the files themselves.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    leaving = context.RawValue("b", 0)
    atexit.register(setattr, leaving, "value", 1)
    loader: DataLoader = DataLoader(
        examples,
        batch_sampler=_positions(images_seen, batch_size, rank, ranks),
        num_workers=workers,
        worker_init_fn=functools.partial(_leave_stopping_to_training, leaving),
        multiprocessing_context=context if workers else None,
        pin_memory=copies_ahead(device),
        generator=torch.Generator(),  # otherwise the loader would draw from the global one
    )
    for images, masks, borders in loader:
        yield Batch(
            to_float(to_device(images, device)),
            to_device(masks, device).long(),
            to_device(borders, device) if examples.borders is not None else None,
        )
