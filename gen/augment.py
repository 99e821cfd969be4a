"""Differentiable augmentation of what D sees, and the probability that holds D's overfitting at a target.

The changes are those of DiffAugment (Zhao et al. 2020). As in adaptive augmentation (Karras et al. 2020, section 2.3),
each is applied to each image with probability p, to reals and fakes alike; G's gradient passes through it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from core.data.images import MEMORY_FORMAT

# Second entry of the seed, see gen.latents: one stream for each of the three times a step shows images to D.
STREAMS = {"real": 2, "fake": 3, "generator": 4}
# Uniform numbers per image: whether each of the five changes is made, then how.
GATES = ("brightness", "saturation", "contrast", "translation", "cutout")
AMOUNTS = ("brightness", "saturation", "contrast", "down", "right", "top", "left")
DRAWS = len(GATES) + len(AMOUNTS)


def augmentation_draws(seed: int, images_seen: int, stream: int, count: int) -> Tensor:
    """Uniform numbers (count, 12) in [0, 1) for the global batch that begins at `images_seen`, drawn on the CPU."""
    rng = np.random.default_rng([seed, stream, images_seen])
    return torch.from_numpy(rng.random((count, DRAWS), dtype=np.float32))


def is_off(p: float | Tensor) -> bool:
    """Whether nothing is augmented at this probability; one on a device counts as on, since reading it would wait."""
    return not isinstance(p, Tensor) and p == 0


def augment(images: Tensor, p: float | Tensor, draws: Tensor) -> Tensor:
    """Change each image in up to five ways, each with probability `p`.

    Brightness: + U(-1/2, 1/2). Saturation: colours 0 to 2 times as far from their mean over the channels. Contrast: 1/2
    to 3/2 times as far from the mean of the image. Translation: see `translate`, up to 1/8 of the side either way.
    Cutout: see `cutout`. Colours are not clipped, which would stop gradients.

    Args:
        images: (N, 3, H, W), square, in [-1, 1].
        p: in [0, 1], a number or a scalar on the device of the images; at 0 the images come back as they are.
        draws: (N, 12), rows of `augmentation_draws`.
    """
    if is_off(p):
        return images
    draws = draws.to(images.device)[:, :, None, None, None]  # each column (N, 1, 1, 1)
    gate = dict(zip(GATES, (draws[:, : len(GATES)] < p).unbind(1), strict=True))
    amount = dict(zip(AMOUNTS, draws[:, len(GATES) :].unbind(1), strict=True))
    images = torch.where(gate["brightness"], images + (amount["brightness"] - 0.5), images)
    mean = images.mean(1, keepdim=True)
    images = torch.where(gate["saturation"], mean + 2 * amount["saturation"] * (images - mean), images)
    mean = images.mean((1, 2, 3), keepdim=True)
    images = torch.where(gate["contrast"], mean + (amount["contrast"] + 0.5) * (images - mean), images)
    size, reach = images.shape[-1], images.shape[-1] // 8
    down, right = ((amount[way] * (2 * reach + 1)).long().flatten() - reach for way in ("down", "right"))
    images = torch.where(gate["translation"], translate(images, down, right, reach), images)
    top, left = ((amount[way] * (size + 1)).long().flatten() - size // 4 for way in ("top", "left"))
    images = torch.where(gate["cutout"], cutout(images, top, left), images)
    return images.contiguous(memory_format=MEMORY_FORMAT)


def translate(images: Tensor, down: Tensor, right: Tensor, reach: int) -> Tensor:
    """Move each image (N, C, H, W) by whole numbers of pixels (N,) from -reach to reach; outside is mid-grey (0)."""
    padded = F.pad(images, (reach, reach, reach, reach))
    rows = torch.arange(images.shape[2], device=images.device) + reach - down[:, None]  # (N, H)
    columns = torch.arange(images.shape[3], device=images.device) + reach - right[:, None]  # (N, W)
    padded = torch.take_along_dim(padded, rows[:, None, :, None], 2)
    return torch.take_along_dim(padded, columns[:, None, None, :], 3)


def cutout(images: Tensor, top: Tensor, left: Tensor) -> Tensor:
    """Turn a square of half the side mid-grey (0), up to a quarter of each image (N, C, H, H).

    Its corner is at the whole numbers `top`, `left` (N,); parts outside the image hide nothing.
    """
    place, side = torch.arange(images.shape[-1], device=images.device), images.shape[-1] // 2
    rows = (place >= top[:, None]) & (place < top[:, None] + side)  # (N, H)
    columns = (place >= left[:, None]) & (place < left[:, None] + side)
    return images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0)


class AdaptiveProbability:
    """The p that keeps the mean decision of D on reals at a target (Karras et al. 2020, section 3: heuristic r_t).

    r_t is E[sign(D(real))]: 0 for a D that cannot recognise reals, 1 for one that has memorised them (or whose G is
    poor). Where only differences of logits mean anything it is E[sign(D(real) - D(fake))] over pairs. After every
    `every` updates p moves by the images seen since / `ada_images`: up if the mean was above `target`, else down.
    For `target`, 0 to 1, see `gen.losses.GanLoss.overfitting_target`; p could rise from 0 to 1 in `ada_images` images.

    Attributes:
        p: float64 scalar on the device, where it stays: reading it in a step would wait for all work before it.
    """

    def __init__(
        self, target: float, ada_images: int = 500_000, every: int = 4, device: torch.device | str = "cpu"
    ) -> None:
        self.target, self.ada_images, self.every = target, ada_images, every
        self.p, self.images = torch.zeros((), dtype=torch.float64, device=device), 0
        self.pending: list[Tensor] = []

    def update(self, mean_sign: Tensor, batch_size: int) -> None:
        """Note one step of D on a global batch of `batch_size` images.

        `mean_sign` is the mean of `gen.losses.GanLoss.decisions` over its reals, a scalar on the device that is the
        same on all processes.
        """
        self.pending.append(mean_sign.detach())
        self.images += batch_size
        if len(self.pending) < self.every:
            return
        excess = torch.stack(self.pending).mean().double() - self.target
        self.p = (self.p + excess.sign() * (self.images / self.ada_images)).clamp(0.0, 1.0)
        self.pending, self.images = [], 0

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs."""
        return {"p": self.p.item(), "images": self.images, "pending": [value.item() for value in self.pending]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        device = self.p.device
        self.p, self.images = torch.tensor(state["p"], dtype=torch.float64, device=device), int(state["images"])
        self.pending = [torch.tensor(value, device=device) for value in state["pending"]]
