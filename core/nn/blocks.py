"""Convolution blocks that the DCGAN and the U-Net share, their initialisation and their size arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from core.cli.errors import UserError
from core.nn.grouped_conv import GroupedConv2d

Norm = Literal["batch", "instance", "group", "layer", "none"]
Upsampling = Literal["transposed", "nearest", "bilinear", "bicubic"]
NormLayer = Callable[[int], nn.Module]  # channels -> layer, such as nn.BatchNorm2d
Activation = Callable[[], nn.Module]  # nothing -> layer, such as nn.ReLU


def conv_output_size(size: int, kernel: int, stride: int = 1, padding: int = 0, dilation: int = 1) -> int:
    """Pixels that a convolution leaves of `size` pixels: (N + 2P - D(F-1) - 1)/S + 1, rounded down.

    Raises:
        UserError: the kernel is larger than the padded input, or a parameter is out of range.
    """
    _check_geometry(size, kernel, stride, padding, dilation)
    reach = dilation * (kernel - 1) + 1
    if size + 2 * padding < reach:
        raise UserError(
            f"a convolution with kernel {kernel}, dilation {dilation} spans {reach} pixels, but its input has only "
            f"{size} + 2*{padding} padding: use a larger image, more padding or fewer layers"
        )
    return (size + 2 * padding - reach) // stride + 1


def transposed_output_size(
    size: int, kernel: int, stride: int = 1, padding: int = 0, dilation: int = 1, output_padding: int = 0
) -> int:
    """Pixels that a transposed convolution makes of `size` pixels: (N-1)S - 2P + D(F-1) + output_padding + 1.

    Raises:
        UserError: nothing would be left, or a parameter is out of range.
    """
    _check_geometry(size, kernel, stride, padding, dilation)
    if not 0 <= output_padding < max(stride, dilation):
        raise UserError(f"output_padding={output_padding} must be at least 0 and below stride or dilation")
    result = (size - 1) * stride - 2 * padding + dilation * (kernel - 1) + output_padding + 1
    if result < 1:
        raise UserError(
            f"a transposed convolution with kernel {kernel}, stride {stride}, padding {padding} leaves {result} "
            f"pixels of {size}: use less padding or a larger kernel"
        )
    return result


def _check_geometry(size: int, kernel: int, stride: int, padding: int, dilation: int) -> None:
    for name, value, least in (
        ("size", size, 1),
        ("kernel", kernel, 1),
        ("stride", stride, 1),
        ("padding", padding, 0),
        ("dilation", dilation, 1),
    ):
        if value < least:
            raise UserError(f"{name}={value} must be at least {least}")


class ConvBlock(nn.Sequential):
    """Convolution, then normalisation, then activation: (N, in, H, W) -> (N, out, H', W').

    A convolution in front of a normalisation has no bias, since the normalisation would remove it
    (Ioffe & Szegedy 2015, section 3.2). H' is `conv_output_size(H, ...)`.

    Args:
        bias: None follows from `norm`; True or False overrides.
        norm: makes the normalisation from the channel count; None for no normalisation (hence a bias).
        activation: makes the activation; None for a linear block.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int = 3,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        groups: int = 1,
        bias: bool | None = None,
        norm: NormLayer | None = nn.BatchNorm2d,
        activation: Activation | None = nn.ReLU,
    ) -> None:
        bias = norm is None if bias is None else bias
        kind = nn.Conv2d if groups == 1 else GroupedConv2d
        conv = kind(in_channels, out_channels, kernel, stride, padding, dilation, groups=groups, bias=bias)
        super().__init__(*_with_norm_and_activation(conv, out_channels, norm, activation))


class UpBlock(nn.Sequential):
    """Transposed convolution, then normalisation, then activation: (N, in, H, W) -> (N, out, H', W').

    With kernel 4, stride 2, padding 1 it doubles height and width; H' is `transposed_output_size(H, ...)`.
    Arguments as for `ConvBlock`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int = 4,
        stride: int = 2,
        padding: int = 1,
        dilation: int = 1,
        groups: int = 1,
        bias: bool | None = None,
        norm: NormLayer | None = nn.BatchNorm2d,
        activation: Activation | None = nn.ReLU,
    ) -> None:
        bias = norm is None if bias is None else bias
        conv = nn.ConvTranspose2d(
            in_channels, out_channels, kernel, stride, padding, dilation=dilation, groups=groups, bias=bias
        )
        super().__init__(*_with_norm_and_activation(conv, out_channels, norm, activation))


def _with_norm_and_activation(
    conv: nn.Module, channels: int, norm: NormLayer | None, activation: Activation | None
) -> list[nn.Module]:
    layers = [conv]
    if norm is not None:
        layers.append(norm(channels))
    if activation is not None:
        layers.append(activation())
    return layers


class ResizeBlock(nn.Sequential):
    """Doubling by interpolation, then a padded 3x3 convolution: (N, in, H, W) -> (N, out, 2H, 2W).

    The alternative to a transposed convolution that leaves no checkerboard (Odena et al. 2016).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        mode: Literal["nearest", "bilinear", "bicubic"],
    ) -> None:
        enlarge = nn.Upsample(scale_factor=2, mode=mode, align_corners=None if mode == "nearest" else False)
        super().__init__(enlarge, ConvBlock(in_channels, out_channels, padding=1, norm=None, activation=None))


def doubling_block(up: Upsampling, in_channels: int, out_channels: int) -> nn.Module:
    """The linear block that doubles height and width in a U-Net's decoder: the "up-convolution" of the paper
    (transposed, 2x2, stride 2), or an interpolation with a 3x3 convolution.

    Raises:
        UserError: unknown name.
    """
    if up == "transposed":
        return UpBlock(in_channels, out_channels, kernel=2, stride=2, padding=0, norm=None, activation=None)
    if up not in get_args(Upsampling):
        raise UserError(f"up={up!r} is unknown: use one of {', '.join(get_args(Upsampling))}")
    return ResizeBlock(in_channels, out_channels, up)


class DoubleConv(nn.Sequential):
    """Two 3x3 `ConvBlock`s, a level of the U-Net: (N, in, H, W) -> (N, out, H', W').

    `padding` 1 keeps the size, 0 takes two pixels from every side.
    """

    def __init__(self, in_channels: int, out_channels: int, padding: int = 1, norm: NormLayer | None = None) -> None:
        super().__init__(
            ConvBlock(in_channels, out_channels, padding=padding, norm=norm),
            ConvBlock(out_channels, out_channels, padding=padding, norm=norm),
        )


class ResBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut around them, activated after the sum (He et al. 2016, figure 2).

    Shapes as for `DoubleConv`; where the channels change, the shortcut is a 1x1 convolution (option B of the paper),
    and without padding it is cropped to the middle.
    """

    def __init__(self, in_channels: int, out_channels: int, padding: int = 1, norm: NormLayer | None = None) -> None:
        super().__init__()
        self.body = nn.Sequential(
            ConvBlock(in_channels, out_channels, padding=padding, norm=norm),
            ConvBlock(out_channels, out_channels, padding=padding, norm=norm, activation=None),
        )
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != out_channels:
            self.shortcut = ConvBlock(in_channels, out_channels, kernel=1, norm=norm, activation=None)
        self.activation = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """The activated sum of both ways."""
        long = self.body(x)
        return self.activation(long + center_crop(self.shortcut(x), long.shape[2], long.shape[3]))


def center_crop(x: Tensor, height: int, width: int) -> Tensor:
    """The middle (N, C, height, width) of a map that is larger by an even number of pixels."""
    top, left = (x.shape[2] - height) // 2, (x.shape[3] - width) // 2
    return x[:, :, top : top + height, left : left + width]


GROUP_CHANNELS = 16  # channels that are normalised together; as good as 32 groups in Wu & He 2018, table 3


def _group_norm(channels: int) -> nn.Module:
    # Where 16 does not divide the channels: the largest number below that divides both.
    return nn.GroupNorm(channels // math.gcd(channels, GROUP_CHANNELS), channels)


def _layer_norm(channels: int) -> nn.Module:
    # Over channels and pixels of each image: layer normalisation of a convolution (Wu & He 2018, section 3.1).
    return nn.GroupNorm(1, channels)


def _instance_norm(channels: int) -> nn.Module:
    return nn.InstanceNorm2d(channels, affine=True)


def norm_layer(name: Norm) -> NormLayer | None:
    """The normalisation that a configuration names: batch, instance, group (of 16 channels), layer or none.

    Raises:
        UserError: unknown name.
    """
    layers: dict[str, NormLayer | None] = {
        "batch": nn.BatchNorm2d,
        "instance": _instance_norm,
        "group": _group_norm,
        "layer": _layer_norm,
        "none": None,
    }
    if name not in layers:
        raise UserError(f"norm={name!r} is unknown: use one of {', '.join(layers)}")
    return layers[name]


_NORMS = (nn.BatchNorm2d, nn.InstanceNorm2d, nn.GroupNorm)
_WEIGHTED = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)


class _OutsideAutocast(nn.Module):
    """A parametrisation whose products autocast would round to bfloat16 on some devices: singular values with them."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            return self.inner(weight)


def spectral(module: nn.Module) -> None:
    """Divide the weight of every convolution and linear layer in `module` by its largest singular value.

    Spectral normalisation (Miyato et al. 2018, section 2.1), torch's parametrisation: one power iteration whenever the
    weight is looked at in training mode, in float32 also within autocast. The initialisations below draw the weight
    that is divided.
    """
    for layer in list(module.modules()):
        if isinstance(layer, _WEIGHTED):
            parametrizations.spectral_norm(layer)
            norms: nn.ModuleList = layer.parametrizations.weight  # type: ignore[union-attr, assignment]
            norms[0] = _OutsideAutocast(norms[0])


POWER_ITERATIONS = 15  # from random vectors, before the first step


def _weight_to_draw(layer: nn.Module) -> Tensor:
    """The parameter behind the weight of `layer`."""
    if parametrize.is_parametrized(layer, "weight"):
        return layer.parametrizations.weight.original  # type: ignore[union-attr, return-value]
    return layer.weight  # type: ignore[return-value]


def _restart_power_iteration(layer: nn.Module, generator: torch.Generator) -> None:
    """Find the singular vectors of a newly drawn weight, from vectors that `generator` draws; nothing without them."""
    if not parametrize.is_parametrized(layer, "weight"):
        return
    for vector in layer.parametrizations.weight[0].buffers():  # type: ignore[union-attr, index]
        _draw(vector, 0.0, 1.0, generator)
        vector /= vector.norm()
    for _ in range(POWER_ITERATIONS):
        layer.weight  # noqa: B018 (looking at it is an iteration)


def _draw(target: Tensor, mean: float, std: float, generator: torch.Generator) -> None:
    """Fill `target`, on whatever device, with normal values drawn on the CPU: devices draw their own from a seed."""
    target.copy_(torch.empty(target.shape, dtype=target.dtype).normal_(mean, std, generator=generator))


@torch.no_grad()
def init_normal(module: nn.Module, std: float = 0.02, seed: int = 0) -> None:
    """DCGAN initialisation (Radford et al. 2015, section 4): weights N(0, std), norm gains N(1, std), biases 0.

    Drawn from a generator of its own, so that the weights depend on `seed` alone.
    """
    generator = torch.Generator().manual_seed(seed)
    for layer in module.modules():
        if isinstance(layer, _WEIGHTED):
            _draw(_weight_to_draw(layer), 0.0, std, generator)
            _restart_power_iteration(layer, generator)
        elif isinstance(layer, _NORMS):
            _draw(layer.weight, 1.0, std, generator)
        else:
            continue
        if isinstance(layer.bias, Tensor):
            layer.bias.zero_()


@torch.no_grad()
def init_he(module: nn.Module, seed: int = 0) -> None:
    """He initialisation (He et al. 2015; Ronneberger et al. 2015, section 3): weights N(0, sqrt(2 / N)), biases 0.

    N is the number of inputs that reach one output: in a transposed convolution with stride s only one weight in s^2
    meets an output. Norm gains are 1. Drawn from a generator of its own, as in `init_normal`.
    """
    generator = torch.Generator().manual_seed(seed)
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            inputs = layer.in_channels / layer.groups * math.prod(layer.kernel_size)
            if isinstance(layer, nn.ConvTranspose2d):
                inputs /= math.prod(layer.stride)
            _draw(_weight_to_draw(layer), 0.0, math.sqrt(2.0 / inputs), generator)
            _restart_power_iteration(layer, generator)
        elif isinstance(layer, _NORMS):
            layer.weight.fill_(1.0)
        else:
            continue
        if isinstance(layer.bias, Tensor):
            layer.bias.zero_()


def require_positive(**values: int) -> None:
    """Refuse a count (of channels, say) that is not a whole number from 1 up.

    Raises:
        UserError: naming the first such value.
    """
    for name, value in values.items():
        if not isinstance(value, int) or value < 1:
            raise UserError(f"{name}={value!r} must be a whole number of at least 1")


def doublings(image_size: int, base: int = 4, least: int = 32) -> int:
    """How often a `base`-pixel map is doubled to reach `image_size`: 64 -> 4.

    Raises:
        UserError: `image_size` is not a power of two from `least` up.
    """
    steps = round(math.log2(image_size / base)) if image_size > 0 else 0
    if image_size < least or base << steps != image_size:
        raise UserError(f"image_size={image_size} must be a power of two from {least} up (32, 64, 128, ...)")
    return steps
