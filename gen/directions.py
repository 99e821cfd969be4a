"""Directions in the space of latents along which a generator's pictures change most, without labels.

Closed-form factorisation of the layer that reads the latents (SeFa: Shen & Zhou 2021, https://arxiv.org/abs/2007.06600):
its output is A z + b, so a step along the unit vector n changes it by |A n|, which is largest along the eigenvectors of
A^T A with the largest eigenvalues.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from core.cli.errors import UserError


@torch.inference_mode()
def entry_matrix(model: nn.Module) -> Tensor:
    """A (outputs, latent_dim), float64 on the CPU, of the layer by which latents enter a generator in eval mode.

    That is the first one with weights to run, whatever its kind. It contains the batch norm after it where that has
    been folded, as in generators from `gen.load`.

    Raises:
        UserError: that layer is not a linear map of the latents.
    """
    latent_dim = int(model.latent_dim)  # type: ignore[arg-type]
    z = torch.linspace(-2, 2, latent_dim).to(next(model.parameters()))[None]
    calls: list[tuple[nn.Module, Tensor]] = []
    layers = [layer for layer in model.modules() if any(True for _ in layer.parameters(recurse=False))]
    hooks = [layer.register_forward_pre_hook(lambda layer, given: calls.append((layer, *given))) for layer in layers]
    try:
        model(z)
    finally:
        for hook in hooks:
            hook.remove()
    layer, seen = calls[0]
    if torch.equal(seen.flatten(), z.flatten()):
        inputs = torch.cat([torch.zeros_like(z), torch.eye(latent_dim).to(z), z])
        bias, *columns, check = layer(inputs.view(-1, *seen.shape[1:])).flatten(1).cpu().double()
        matrix = torch.stack(columns, dim=1) - bias[:, None]
        if torch.allclose(matrix @ z[0].cpu().double(), check - bias, rtol=1e-3, atol=1e-4 * float(matrix.abs().max())):
            return matrix
    raise UserError(
        f"{type(model).__module__}.{type(model).__name__} has no directions: its first layer with weights, "
        f"{type(layer).__name__}, is not a linear map of the latents"
    )


def directions(model: nn.Module, count: int) -> Tensor:
    """The `count` unit vectors, float32 (count, latent_dim), along which the first layer's output changes most.

    They are the eigenvectors of A^T A (`entry_matrix`) with the largest eigenvalues, largest first, orthogonal to one
    another; of the two signs, the one with which the component of largest size is positive.

    Raises:
        UserError: as `entry_matrix`.
    """
    matrix = entry_matrix(model)
    vectors = torch.linalg.eigh(matrix.T @ matrix).eigenvectors.T.flip(0)[:count]
    largest = vectors.gather(1, vectors.abs().argmax(dim=1, keepdim=True))
    return (vectors * largest.sign()).float()
