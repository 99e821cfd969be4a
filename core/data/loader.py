"""Training order as a function of (seed, step), and ImageBank: prepared uint8 pictures, on the device when they fit."""

from __future__ import annotations

import io
import mmap

import numpy as np
import torch
from torch import Tensor

from core.cli.errors import UserError
from core.data.images import to_float


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """A copy of a tensor on the CPU (itself, for the CPU) that does not wait until the device has done its other work.

    From ordinary memory a driver may wait all the same; from page-locked memory it need not.
    """
    return (values.pin_memory() if device.type == "cuda" else values).to(device, non_blocking=True)


class InfiniteSampler:
    """An endless sequence of rows: every epoch is a fresh permutation with fresh flips, drawn from (seed, epoch).

    Args:
        indices: the rows of an epoch, not empty.
        flip: mirror each picture with probability 1/2; without it all flips are False.
    """

    def __init__(self, indices: np.ndarray, seed: int = 0, flip: bool = False) -> None:
        if not len(indices):
            raise UserError("the data set is empty: nothing to train on")
        self.indices, self.seed, self.flip = indices, seed, flip
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __len__(self) -> int:
        return len(self.indices)

    def window(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows (int64) and flips (bool) at positions start..start+count-1 of the sequence."""
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
            # A window can span two epochs, so the last two are kept.
            self._epochs = {key: value for key, value in self._epochs.items() if key == epoch - 1}
            self._epochs[epoch] = order, flips
        return self._epochs[epoch]


class ImageBank(InfiniteSampler):
    """Batches of training images whose content depends on (seed, images seen) alone.

    A batch is a window of the endless sequence, and a rank takes its slice of the window: resuming needs no sampler
    state, nothing is dropped at the end of an epoch, and any number of ranks sees the same global batches.

    Args:
        images: uint8 (N, H, W, 3), a memory map or an array.
        indices: positions in `images` to train on.
        device: where the batches are wanted. On a CUDA device the pictures are copied there at once if they fit into
            half of its free memory; otherwise each batch is gathered from the memory map.
        flip: mirror each picture with probability 1/2.
    """

    def __init__(
        self, images: np.ndarray, indices: np.ndarray, device: torch.device, seed: int = 0, flip: bool = True
    ) -> None:
        super().__init__(indices, seed, flip)
        self.images, self.device = images, device
        self.resident = self._copy_to_device() if device.type == "cuda" else None

    def _copy_to_device(self) -> Tensor | None:
        with torch.cuda.device(self.device):
            free, _ = torch.cuda.mem_get_info()
        if self.images.nbytes > free // 2:
            return None
        return copy_in_pieces(self.images, self.device)

    def batch(self, images_seen: int, batch_size: int, rank: int = 0, ranks: int = 1) -> Tensor:
        """The part of `rank` of the global batch that follows `images_seen`.

        Returns:
            float (batch_size / ranks, 3, H, W) in [-1, 1] on the device.
        """
        share = batch_size // ranks
        rows, flips = self.window(images_seen + rank * share, share)
        mirrored = to_device(torch.from_numpy(flips), self.device)
        if self.resident is not None:
            pixels = self.resident[to_device(torch.from_numpy(rows), self.device)]
        else:
            pixels = to_device(torch.from_numpy(read_rows(self.images, rows)), self.device)
        pixels = torch.where(mirrored[:, None, None, None], pixels.flip(2), pixels)
        return to_float(pixels)


def copy_in_pieces(array: np.ndarray, device: torch.device, piece: int = 1 << 26) -> Tensor:
    """A whole memory map on a device, about `piece` bytes at a time, so that host memory does not hold it too."""
    whole = torch.empty(array.shape, dtype=torch.uint8, device=device)
    rows = max(1, piece // max(1, array[:1].nbytes))
    for start in range(0, len(array), rows):
        whole[start : start + rows] = torch.from_numpy(np.array(array[start : start + rows]))
    return whole


def read_rows(array: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """A copy of some rows of an array; of a memory map they are read from its file.

    Pages of a map count as memory of the process as long as it is open, and up to half a megabyte around each row that
    is touched comes with it: a thousand rows here and there of a large file would be half a gigabyte.
    """
    # A part of a map names the file and offset of the whole: only the whole one can be read by its numbers.
    if not isinstance(array, np.memmap) or not isinstance(array.base, mmap.mmap) or array.filename is None:
        return np.array(array[rows])
    found = np.empty((len(rows), *array.shape[1:]), array.dtype)
    with io.FileIO(array.filename) as handle:
        for index, row in enumerate(rows.tolist()):
            handle.seek(array.offset + row * found[0].nbytes)
            if handle.readinto(found[index]) != found[index].nbytes:
                raise UserError(f"{array.filename} was cut off while it was read: make it again")
    return found
