"""The loss around a trained network, in a plane of two random directions (Li et al. 2018)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

Direction = dict[str, Tensor]  # name of a parameter -> how far it moves


def filter_norms(weight: Tensor, transposed: bool = False) -> Tensor:
    """Euclidean norm of the weights of each output channel, in a shape that broadcasts to that of `weight`."""
    axis = 1 if transposed else 0
    return torch.linalg.vector_norm(weight, dim=[other for other in range(weight.ndim) if other != axis], keepdim=True)


@torch.no_grad()
def random_direction(model: nn.Module, seed: int) -> Direction:
    """Normal values, each filter scaled to the norm that it has in the model (section 4, "filter normalization").

    Without this, the flatness of a plot would depend on the scale of the weights, which batch norm makes arbitrary.
    Biases and the gains of norms stay where they are, as in the paper's code: vectors have no entry. Drawn on the CPU
    from `seed` alone, for networks whose weights are not computed from others (see
    `core.nn.fuse.drop_parametrizations`).
    """
    generator, found = torch.Generator().manual_seed(seed), {}
    for path, layer in model.named_modules():
        for name, weight in layer.named_parameters(recurse=False):
            if weight.ndim < 2:
                continue
            drawn = torch.randn(weight.shape, generator=generator).to(weight)
            transposed = isinstance(layer, nn.ConvTranspose2d)
            scale = filter_norms(weight, transposed) / filter_norms(drawn, transposed)
            found[f"{path}.{name}".lstrip(".")] = drawn * scale
    return found


@contextmanager
def displaced(model: nn.Module, *moves: tuple[float, Direction]) -> Iterator[None]:
    """Inside the block, the parameters are moved by the sum of factor * direction; afterwards they are as before."""
    parameters = dict(model.named_parameters())
    before = {name: parameters[name].detach().clone() for name in {name for _, way in moves for name in way}}
    try:
        with torch.no_grad():
            for factor, way in moves:
                for name, step in way.items():
                    parameters[name].add_(step, alpha=factor)
        yield
    finally:
        with torch.no_grad():
            for name, value in before.items():
                parameters[name].copy_(value)


def positions(points: int, reach: float) -> np.ndarray:
    """(points^2, 2): the places of a square grid from -reach to reach, row by row; the first number is that of the row.

    With an odd number of points the middle one is exactly 0.
    """
    line = reach * (2 * np.arange(points) - (points - 1)) / (points - 1)
    return np.stack(np.meshgrid(line, line, indexing="ij"), axis=-1).reshape(-1, 2)


def losses_at(
    model: nn.Module, places: np.ndarray, ways: tuple[Direction, Direction], loss: Callable[[nn.Module], float]
) -> Iterator[float]:
    """The loss with the parameters moved by x times the first and y times the second direction, for each (x, y)."""
    for x, y in places.tolist():
        with displaced(model, (x, ways[0]), (y, ways[1])):
            value = loss(model)
        yield value


def sharpness(surface: np.ndarray, reach: float, radius: float) -> float:
    """(largest loss - L) / (1 + L) for the loss L in the middle (Keskar et al. 2017, equation 3), here in one plane.

    Args:
        surface: (n, n) with n odd, from -reach to reach.
        radius: of the square around the middle in which the largest is looked for.
    """
    middle = len(surface) // 2
    steps = int(middle * radius / reach + 1e-9)
    near = surface[middle - steps : middle + steps + 1, middle - steps : middle + steps + 1]
    centre = surface[middle, middle]
    return float((near.max() - centre) / (1 + centre))
