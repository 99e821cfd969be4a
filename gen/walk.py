"""Walks through the space of latents: faces that turn into one another and end where they began."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from core.data.images import make_grid
from gen.latents import sample_latents
from gen.sample import BATCH_SIZE, render, slerp

COLUMNS, ROWS = 4, 2  # faces beside one another
SECONDS_A_FACE = 2.0  # from one random face to the next
FEWEST_FACES = 3  # with two, the way back would be the way there
SMALLEST_SIDE = 128  # pixels; smaller faces are enlarged, as players of movies do it badly


def closed_path(corners: Tensor, frames: int) -> Tensor:
    """Latents (frames, D) on great circles from each corner (K, D) to the next and from the last to the first.

    They are equally far apart in time: the one after the last would be the first, so a loop has no jerk.
    """
    place = torch.arange(frames, dtype=torch.float64) * len(corners) / frames
    legs = place.long()
    path = torch.empty(frames, corners.shape[1])
    for leg in range(len(corners)):
        own = legs == leg
        path[own] = slerp(corners[leg], corners[(leg + 1) % len(corners)], (place[own] - leg).float())
    return path


def walk(
    model: nn.Module, seed: int, frames: int, seconds: float, truncation: float | None = None
) -> Iterator[np.ndarray]:
    """The pictures of a closed walk of eight faces, each uint8 (H, W, 3), drawn as they are read.

    Every face passes through random ones, the first of them those of `seed`, `seed` + 1, ...; for `truncation` see
    `gen.latents.sample_latents`. The generator is in eval mode, as `gen.load` gives it.
    """
    faces, corners = COLUMNS * ROWS, max(FEWEST_FACES, round(seconds / SECONDS_A_FACE))
    z = sample_latents(range(seed, seed + faces * corners), int(model.latent_dim), truncation)  # type: ignore[arg-type]
    paths = torch.stack([closed_path(z[face::faces], frames) for face in range(faces)], dim=1)  # (frames, faces, D)
    at_once = BATCH_SIZE // faces
    for start in range(0, frames, at_once):
        part = paths[start : start + at_once]
        pictures = render(model, part.flatten(0, 1))
        for one in pictures.reshape(len(part), faces, *pictures.shape[1:]):
            yield make_grid(_enlarged(one), columns=COLUMNS)


def _enlarged(pictures: np.ndarray) -> np.ndarray:
    """The pictures (N, H, W, 3), a whole number of times as large if they are small."""
    height, width = pictures.shape[1:3]
    times = -(-SMALLEST_SIDE // width)
    if times == 1:
        return pictures
    size = times * width, times * height
    return np.stack([np.asarray(Image.fromarray(one).resize(size, Image.Resampling.BICUBIC)) for one in pictures])
