"""Exponential moving average of a model's weights, BatchNorm buffers included."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


class ExponentialAverage(Generic[Model]):
    """Average of a generator's weights over training (Karras et al. 2018, appendix A.1).

    The images after which a past weight counts half are a tenth of those seen, at most `half_life`, so that the random
    initial weights are forgotten early (as in the code of Karras et al. 2020). Running means and variances are averaged
    too: with live ones the averaged weights would be normalised wrongly. `torch.optim.swa_utils.AveragedModel` would
    wait for the device in every step. The model must not yet be wrapped for several processes or mixed precision.
    """

    RAMP_UP = 0.1  # half-life as a share of the images seen, until it reaches `half_life`

    def __init__(self, model: Model, half_life: int) -> None:
        self.model: Model = copy.deepcopy(model).eval().requires_grad_(False)
        self.half_life = half_life
        # What is averaged, found once: both models keep their tensors and change them in place.
        self._live: nn.Module | None = None
        self._pairs: dict[bool, tuple[list[Tensor], list[Tensor]]] = {}

    def decay(self, images_seen: int, batch_size: int) -> float:
        """Weight of the old average in one step of `batch_size` images: 0.5 ** (batch / half-life)."""
        half_life = min(self.half_life, self.RAMP_UP * images_seen)
        return 0.5 ** (batch_size / half_life) if half_life > 0 else 0.0

    @torch.no_grad()
    def update(self, model: nn.Module, images_seen: int, batch_size: int) -> None:
        """Move the average towards `model` (unwrapped) after a step that began at `images_seen`."""
        weight = 1.0 - self.decay(images_seen, batch_size)
        if self._live is not model:
            self._live = model
            pairs = list(zip(self.model.state_dict().values(), model.state_dict().values(), strict=True))
            for floating in (True, False):  # the others are counters such as num_batches_tracked
                chosen = [pair for pair in pairs if pair[0].is_floating_point() == floating]
                self._pairs[floating] = [old for old, _ in chosen], [new for _, new in chosen]
        torch._foreach_lerp_(*self._pairs[True], weight)
        if self._pairs[False][0]:
            torch._foreach_copy_(*self._pairs[False])
