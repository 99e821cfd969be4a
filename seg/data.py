"""Training examples for segmentation, each a pure function of (seed, its position in the training sequence)."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors

from core.cli.errors import UserError
from core.data.dataset import PreparedData
from core.data.images import to_float
from core.data.loader import InfiniteSampler
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
        split: where to train.
        window: side of the scored area; the whole picture when it equals `data.image_size`.
        margin: pixels of picture around it.
        borders: floating (n, H, W) border weights of the n pictures of the split, in their order, or None.
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
        self.images, self.masks, self.borders = data.images, data.masks, borders
        self.order, self.seed = InfiniteSampler(data.indices(split), seed), seed
        self.amounts, self.window, self.margin = amounts, window, margin
        self.mirrored = mirrored_classes(data.classes)

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor, Tensor]:
        """Image uint8 (H, W, 3), mask uint8 (h, w) and border weights float (h, w; empty when there are none)."""
        row = int(self.order.window(position, 1)[0][0])
        border = None
        if self.borders is not None:
            place = int(np.searchsorted(self.order.indices, row))  # the rows of a split are ascending
            border = tv_tensors.Mask(torch.from_numpy(self.borders[place]).float())
        # np.array copies: the arrays are read-only maps
        image = torch.from_numpy(np.array(self.images[row])).permute(2, 0, 1)
        example = Example(tv_tensors.Image(image), tv_tensors.Mask(torch.from_numpy(np.array(self.masks[row]))), border)
        rng = np.random.default_rng([self.seed, 1, position])  # 1: apart from the draws for the order
        example = augment(example, self.amounts, self.mirrored, rng)
        if self.margin or self.window < example.mask.shape[-1]:
            example = crop(example, self.window, self.margin, rng)
        weights = torch.empty(0) if example.border is None else example.border.as_subclass(Tensor)
        return example.image.as_subclass(Tensor).permute(1, 2, 0), example.mask.as_subclass(Tensor), weights


class _Share:
    """Sampler: the positions of one rank, batch after batch, from `images_seen` on without end."""

    def __init__(self, images_seen: int, batch_size: int, rank: int, ranks: int) -> None:
        self.start, self.batch_size, self.rank, self.share = images_seen, batch_size, rank, batch_size // ranks

    def __iter__(self) -> Iterator[list[int]]:
        start = self.start + self.rank * self.share
        while True:
            yield list(range(start, start + self.share))
            start += self.batch_size


def _leave_signals(worker: int) -> None:
    """Stopping is the business of the training process, which then ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def training_batches(
    examples: Examples,
    images_seen: int,
    batch_size: int,
    rank: int,
    ranks: int,
    device: torch.device,
    workers: int,
) -> Iterator[Batch]:
    """The share of `rank` of every global batch that follows `images_seen`, without end.

    Args:
        workers: processes that make examples ahead of time; 0 makes them here. The batches are the same.
    """
    loader: DataLoader = DataLoader(
        examples,
        batch_sampler=_Share(images_seen, batch_size, rank, ranks),
        num_workers=workers,
        worker_init_fn=_leave_signals,
        # Workers share the arrays of a forked process; a spawned one would be sent copies of them.
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # else the loader would draw a number from the global one
    )
    for images, masks, borders in loader:
        yield Batch(
            to_float(images.to(device, non_blocking=True)),
            masks.to(device, non_blocking=True).long(),
            borders.to(device, non_blocking=True) if examples.borders is not None else None,
        )
