"""Initial weights and spectral normalisation of convolutional networks."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from core.nn.blocks import Projection

POWER_ITERATIONS = 15  # from random vectors, before the first step
_NORMS = (nn.BatchNorm2d, nn.InstanceNorm2d, nn.GroupNorm)
_WEIGHTED = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)


def init_normal(module: nn.Module, std: float = 0.02, seed: int = 0) -> None:
    """DCGAN initialisation (Radford et al. 2015, section 4): weights N(0, std), norm gains N(1, std), biases 0.

    Drawn from its own generator, so that the weights depend on `seed` alone.
    """
    _initialise(module, seed, lambda layer: std, gain_std=std)


def init_he(module: nn.Module, seed: int = 0) -> None:
    """He initialisation (He et al. 2015; Ronneberger et al. 2015, section 3): weights N(0, sqrt(2 / N)), biases 0.

    N is the number of inputs that reach one output: in a transposed convolution with stride s, one weight in s^2
    meets an output, in a `Projection` one alone. Norm gains are 1, linear layers are left alone. Drawn from its own
    generator, as in `init_normal`.
    """
    of_one_pixel = {block[0] for block in module.modules() if isinstance(block, Projection)}

    def std(layer: nn.Module) -> float | None:
        if not isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            return None
        inputs = layer.in_channels / layer.groups * (1 if layer in of_one_pixel else math.prod(layer.kernel_size))
        if isinstance(layer, nn.ConvTranspose2d):
            inputs /= math.prod(layer.stride)
        return math.sqrt(2.0 / inputs)

    _initialise(module, seed, std, gain_std=None)


@torch.no_grad()
def _initialise(
    module: nn.Module, seed: int, weight_std: Callable[[nn.Module], float | None], gain_std: float | None
) -> None:
    """Draw all weights; a layer whose `weight_std` is None is skipped, and without `gain_std` norm gains are 1."""
    generator = torch.Generator().manual_seed(seed)
    for layer in module.modules():
        if isinstance(layer, _WEIGHTED):
            std = weight_std(layer)
            if std is None:
                continue
            _draw_weight(layer, std, generator)
        elif isinstance(layer, _NORMS):
            if gain_std is None:
                layer.weight.fill_(1.0)
            else:
                _draw(layer.weight, 1.0, gain_std, generator)
        else:
            continue
        if isinstance(layer.bias, Tensor):
            layer.bias.zero_()


def _draw(target: Tensor, mean: float, std: float, generator: torch.Generator) -> None:
    """Fill `target` with normal values drawn on the CPU: other devices draw different values from the same seed."""
    target.copy_(torch.empty(target.shape, dtype=target.dtype).normal_(mean, std, generator=generator))


def _draw_weight(layer: nn.Module, std: float, generator: torch.Generator) -> None:
    """Draw the weight N(0, std); under spectral normalisation the undivided weight and fresh singular vectors."""
    if not parametrize.is_parametrized(layer, "weight"):
        _draw(layer.weight, 0.0, std, generator)  # type: ignore[arg-type]
        return
    weight: parametrize.ParametrizationList = layer.parametrizations.weight  # type: ignore[union-attr, assignment]
    _draw(weight.original, 0.0, std, generator)
    for vector in weight[0].buffers():
        _draw(vector, 0.0, 1.0, generator)
        vector /= vector.norm()
    for _ in range(POWER_ITERATIONS):
        layer.weight  # noqa: B018 (each access is one iteration)


def apply_spectral_norm(module: nn.Module) -> None:
    """Divide the weight of every convolution and linear layer in `module` by its largest singular value.

    Spectral normalisation (Miyato et al. 2018, section 2.1) by torch's parametrisation: one power iteration each time
    the weight is read in training mode, in float32 even under autocast. The initialisers draw the undivided weight.
    """
    for layer in list(module.modules()):
        if isinstance(layer, _WEIGHTED):
            parametrizations.spectral_norm(layer)
            norms: nn.ModuleList = layer.parametrizations.weight  # type: ignore[union-attr, assignment]
            norms[0] = _OutsideAutocast(norms[0])


class _OutsideAutocast(nn.Module):
    """Runs a parametrisation in float32: some devices' autocast would round its products, and the singular values."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            return self.inner(weight)
