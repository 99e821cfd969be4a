"""Generators of faces: models, losses, training, sampling.

from gen import load, generate
pictures = generate(load("runs/first"), 16)
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from core.cli.errors import explain_early_interrupts

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

explain_early_interrupts()


def load(run_or_file: str | Path, device: str = "auto") -> nn.Module:
    """The generator of a run folder or model file: latents (N, latent_dim) -> images (N, 3, H, W) in [-1, 1].

    It is in eval mode, with batch norm folded. Raises UserError: no model, a damaged one, or no such device.
    """
    from gen.sample import load_generator  # here, so that `import gen` does not load torch

    return load_generator(run_or_file, device)[0]


def generate(
    model: nn.Module | str | Path, latents: int | Iterable[int] | np.ndarray, truncation: float | None = None
) -> np.ndarray:
    """Pictures uint8 (N, H, W, 3) of a generator, or of that in a run folder or model file.

    Args:
        latents: a number N for those of the seeds 0 to N - 1, seeds, or latents themselves, float (N, latent_dim). A
            seed gives the same picture as in `facet sample`.
        truncation: see `gen.latents.sample_latents`; for seeds.

    Raises:
        UserError: as `load`; latents of another shape, or none.
    """
    import numpy as np
    import torch

    from core.cli.errors import UserError
    from gen.latents import sample_latents
    from gen.sample import BATCH_SIZE, render

    network = load(model) if isinstance(model, (str, Path)) else model
    latent_dim = int(network.latent_dim)  # type: ignore[arg-type]
    if isinstance(latents, int):
        latents = range(latents)
    given = latents if isinstance(latents, np.ndarray) else np.array(list(latents))
    if given.ndim == 1 and given.dtype.kind in "iu" and len(given):
        z = sample_latents(given.tolist(), latent_dim, truncation)
    elif given.ndim == 2 and given.shape[1] == latent_dim and len(given):
        z = torch.from_numpy(given.astype(np.float32))
    else:
        raise UserError(f"latents {given.dtype} {given.shape}: give seeds (N,) or latents (N, {latent_dim}), N above 0")
    return np.concatenate([render(network, part) for part in z.split(BATCH_SIZE)])
