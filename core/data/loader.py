"""Batches of training images whose order depends only on the seed and the number of images seen."""

from __future__ import annotations

import io
import mmap
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeGuard

import numpy as np
import torch
from torch import Tensor

from core.cli.errors import UserError
from core.data.images import to_float


def copies_ahead(device: torch.device) -> bool:
    """Whether to copy to this device from page-locked memory without waiting for its pending work.

    Only CUDA keeps that memory until it was read. Apple's GPUs may read it after it was freed and used again.
    """
    return device.type == "cuda"


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to the device, without waiting for the device's pending work where that is safe."""
    ahead = copies_ahead(device)
    return (values.pin_memory() if ahead else values).to(device, non_blocking=ahead)


class InfiniteSampler:
    """An endless sequence of rows and flips: each epoch is a new permutation, drawn from (seed, epoch).

    Args:
        indices: the rows of an epoch, not empty.
        flip: mirror each picture with probability 1/2.
    """

    def __init__(self, indices: np.ndarray, seed: int = 0, flip: bool = False) -> None:
        if not len(indices):
            raise UserError("the data set is empty: nothing to train on")
        self.indices, self.seed, self.flip = indices, seed, flip
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __len__(self) -> int:
        return len(self.indices)

    def window(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows (int64) and flips (bool), each (count,), from position `start` of the sequence."""
        rows, flips = [], []
        while count:
            epoch, offset = divmod(start, len(self))
            order, mirrored = self._epoch(epoch)
            rows.append(order[offset : offset + count])
            flips.append(mirrored[offset : offset + count])
            start, count = start + len(rows[-1]), count - len(rows[-1])
        return np.concatenate(rows), np.concatenate(flips)

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        if epoch not in self._epochs:
            rng = np.random.default_rng([self.seed, epoch])
            order = self.indices[rng.permutation(len(self))]
            flips = rng.random(len(self)) < 0.5 if self.flip else np.zeros(len(self), bool)
            # The previous epoch is kept because a window can span two.
            self._epochs = {key: value for key, value in self._epochs.items() if key == epoch - 1}
            self._epochs[epoch] = order, flips
        return self._epochs[epoch]


class ImageBank(InfiniteSampler):
    """Batches of prepared images on the training device.

    A batch is a window of the endless sequence, and each rank takes its slice of it. So resuming needs no sampler
    state, no image is dropped at the end of an epoch, and the global batches do not depend on the number of ranks.

    Args:
        images: uint8 (N, H, W, 3), a memory map or an array.
        indices: rows of `images` to train on.
        device: of the batches. All images are copied to a CUDA device if they fit into half of its free memory;
            otherwise each batch is read from the memory map, for a CUDA device while the one before is trained on.
        flip: mirror each picture with probability 1/2.
    """

    def __init__(
        self, images: np.ndarray, indices: np.ndarray, device: torch.device, seed: int = 0, flip: bool = True
    ) -> None:
        super().__init__(indices, seed, flip)
        self.images, self.device = images, device
        fits = device.type == "cuda" and images.nbytes <= torch.cuda.mem_get_info(device)[0] // 2
        self.resident = copy_in_pieces(images, device) if fits else None
        self._ahead: tuple[np.ndarray, Future[Tensor]] | None = None  # the rows that are being read
        self._reader = ThreadPoolExecutor(1) if copies_ahead(device) and not fits else None

    def batch(self, images_seen: int, batch_size: int, rank: int = 0, ranks: int = 1) -> Tensor:
        """The share of `rank` in the global batch that follows `images_seen`.

        Returns:
            float (batch_size / ranks, 3, H, W) in [-1, 1] on the device.
        """
        share = batch_size // ranks
        rows, flips = self.window(images_seen + rank * share, share)
        mirrored = to_device(torch.from_numpy(flips), self.device)
        if self.resident is not None:
            pixels = self.resident[to_device(torch.from_numpy(rows), self.device)]
        else:
            pixels = to_device(self._rows(rows), self.device)
            if self._reader is not None:
                following, _ = self.window(images_seen + batch_size + rank * share, share)
                self._ahead = following, self._reader.submit(self._read, following)
        pixels = torch.where(mirrored[:, None, None, None], pixels.flip(2), pixels)
        return to_float(pixels)

    def _rows(self, rows: np.ndarray) -> Tensor:
        """These pictures, uint8 (N, H, W, 3) on the CPU; what was read ahead if that is them."""
        if self._ahead is not None and np.array_equal(self._ahead[0], rows):
            return self._ahead[1].result()
        return self._read(rows)

    def _read(self, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(read_rows(self.images, rows))


def copy_in_pieces(array: np.ndarray, device: torch.device, piece: int = 1 << 26) -> Tensor:
    """Copy a memory map to a device, about `piece` bytes at a time, so that host memory never holds all of it."""
    whole = torch.empty(array.shape, dtype=torch.uint8, device=device)
    rows = max(1, piece // max(1, array[:1].nbytes))
    for start in range(0, len(array), rows):
        whole[start : start + rows] = torch.from_numpy(np.array(array[start : start + rows]))
    return whole


def is_file_map(array: object) -> TypeGuard[np.memmap]:
    """Whether an array is the whole map of a file; a slice of one has the same file and offset, but other values."""
    if not isinstance(array, np.memmap) or array.filename is None:
        return False
    return isinstance(array.base, mmap.mmap) and array.flags.c_contiguous


class MappedFile:
    """Stands for the map of a file when it is pickled, and is read back as a map: NumPy would pickle the values."""

    def __init__(self, array: np.memmap) -> None:
        self.arguments = array.filename, array.dtype, "r", array.offset, array.shape

    def __reduce__(self) -> tuple[type[np.memmap], tuple]:
        return np.memmap, self.arguments


def read_rows(array: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """A copy of some rows of an array; rows of a memory map are read from its file instead.

    Through the map, each row would load up to half a megabyte around it, which counts as memory of this process while
    the map is open: a thousand scattered rows would take half a gigabyte.
    """
    if not is_file_map(array):
        return np.array(array[rows])
    found = np.empty((len(rows), *array.shape[1:]), array.dtype)
    with io.FileIO(str(array.filename)) as handle:
        for index, row in enumerate(rows.tolist()):
            handle.seek(array.offset + row * found[0].nbytes)
            if handle.readinto(found[index]) != found[index].nbytes:
                raise UserError(f"{array.filename} was cut off while it was read: make it again")
    return found
