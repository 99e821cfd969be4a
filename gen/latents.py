"""Latent vectors as pure functions of seeds, the same on every machine (drawn by NumPy on the CPU)."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

# Second entry of the seed. A stream may coincide with one of sampling ([seed]) or of the batch order ([seed, epoch]);
# this does no harm, since different things are drawn from them.
TRAINING_STREAM = 1


def training_latents(seed: int, images_seen: int, count: int, latent_dim: int) -> Tensor:
    """N(0, 1) latents (count, latent_dim) of the global batch that begins at `images_seen`."""
    rng = np.random.default_rng([seed, TRAINING_STREAM, images_seen])
    return torch.from_numpy(rng.standard_normal((count, latent_dim), dtype=np.float32))


def sample_latents(seeds: Iterable[int], latent_dim: int, truncation: float | None = None) -> Tensor:
    """N(0, 1) latents (len(seeds), latent_dim): row i depends on the i-th seed alone.

    With `truncation` every component beyond it in size is redrawn (Brock et al. 2019, section 3.1): fewer odd pictures,
    less variety, and a worse FID.
    """
    rows = []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        z = rng.standard_normal(latent_dim)
        while truncation is not None and len(outside := np.flatnonzero(np.abs(z) > truncation)):
            z[outside] = rng.standard_normal(len(outside))
        rows.append(torch.from_numpy(z.astype(np.float32)))
    return torch.stack(rows)
