"""Convolution blocks that the generators, discriminators and the U-Net share, and their size arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

from torch import Tensor, nn

from core.cli.errors import UserError
from core.nn.grouped_conv import GroupedConv2d

Norm = Literal["batch", "instance", "group", "layer", "none"]
Upsampling = Literal["transposed", "nearest", "bilinear", "bicubic"]
NormLayer = Callable[[int], nn.Module]  # channels -> layer, such as nn.BatchNorm2d
Activation = Callable[[], nn.Module]  # nothing -> layer, such as nn.ReLU


def conv_output_size(size: int, kernel: int, stride: int = 1, padding: int = 0, dilation: int = 1) -> int:
    """Output size in pixels of a convolution: (N + 2P - D(F-1) - 1)/S + 1, rounded down.

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
    """Output size in pixels of a transposed convolution: (N-1)S - 2P + D(F-1) + output_padding + 1.

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
    for name, value in (("size", size), ("kernel", kernel), ("stride", stride), ("dilation", dilation)):
        if value < 1:
            raise UserError(f"{name}={value} must be at least 1")
    if padding < 0:
        raise UserError(f"padding={padding} must be at least 0")


class ConvBlock(nn.Sequential):
    """Convolution, then normalisation, then activation: (N, in, H, W) -> (N, out, H', W').

    H' is `conv_output_size(H, ...)`.

    Args:
        bias: by default only without `norm`, which would remove it (Ioffe & Szegedy 2015, section 3.2).
        norm: makes the normalisation layer from the channel count; None for none.
        activation: makes the activation layer; None for a linear block.
    """

    transposed = False

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
        layer = nn.ConvTranspose2d if self.transposed else nn.Conv2d if groups == 1 else GroupedConv2d
        conv = layer(in_channels, out_channels, kernel, stride, padding, dilation=dilation, groups=groups, bias=bias)
        super().__init__(conv, *([norm(out_channels)] if norm else []), *([activation()] if activation else []))


class UpBlock(ConvBlock):
    """A `ConvBlock` with a transposed convolution, which by default doubles height and width.

    H' is `transposed_output_size(H, ...)`.
    """

    transposed = True

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int = 4, stride: int = 2, padding: int = 1, **options: Any
    ) -> None:
        super().__init__(in_channels, out_channels, kernel, stride, padding, **options)


class Projection(UpBlock):
    """An `UpBlock` that spreads one pixel, such as a vector of latents: (N, in, 1, 1) -> (N, out, size, size).

    Each pixel of the output reads each input channel once, through a weight of its own.
    """

    def __init__(self, in_channels: int, out_channels: int, size: int = 4, **options: Any) -> None:
        super().__init__(in_channels, out_channels, kernel=size, stride=1, padding=0, **options)


class ResizeBlock(nn.Sequential):
    """Upsampling by 2, then a padded 3x3 convolution: (N, in, H, W) -> (N, out, 2H, 2W).

    Unlike a transposed convolution, it leaves no checkerboard artefacts (Odena et al. 2016).
    """

    def __init__(self, in_channels: int, out_channels: int, mode: Literal["nearest", "bilinear", "bicubic"]) -> None:
        enlarge = nn.Upsample(scale_factor=2, mode=mode, align_corners=None if mode == "nearest" else False)
        super().__init__(enlarge, ConvBlock(in_channels, out_channels, padding=1, norm=None, activation=None))


def doubling_block(up: Upsampling, in_channels: int, out_channels: int) -> nn.Module:
    """The linear block that doubles height and width in a U-Net decoder.

    Either the paper's "up-convolution" (transposed, 2x2, stride 2) or interpolation and a 3x3 convolution.

    Raises:
        UserError: unknown name.
    """
    if up == "transposed":
        return UpBlock(in_channels, out_channels, kernel=2, stride=2, padding=0, norm=None, activation=None)
    if up not in get_args(Upsampling):
        raise UserError(f"up={up!r} is unknown: use one of {', '.join(get_args(Upsampling))}")
    return ResizeBlock(in_channels, out_channels, up)


class DoubleConv(nn.Sequential):
    """Two 3x3 `ConvBlock`s, one level of a U-Net: (N, in, H, W) -> (N, out, H', W').

    `padding` 1 keeps the size; 0 removes two pixels from every side.
    """

    def __init__(self, in_channels: int, out_channels: int, padding: int = 1, norm: NormLayer | None = None) -> None:
        super().__init__(
            ConvBlock(in_channels, out_channels, padding=padding, norm=norm),
            ConvBlock(out_channels, out_channels, padding=padding, norm=norm),
        )


class ResBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut around them, activated after the sum (He et al. 2016, figure 2).

    Shapes as for `DoubleConv`. Where the channels change, the shortcut is a 1x1 convolution (option B of the paper);
    without padding, its result is cropped to the centre.
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
        """The activated sum of the body and the shortcut."""
        long = self.body(x)
        return self.activation(long + center_crop(self.shortcut(x), long.shape[2], long.shape[3]))


def center_crop(x: Tensor, height: int, width: int) -> Tensor:
    """The central (N, C, height, width) of a larger feature map, whose excess is even on both axes."""
    top, left = (x.shape[2] - height) // 2, (x.shape[3] - width) // 2
    return x[:, :, top : top + height, left : left + width]


GROUP_CHANNELS = 16  # channels normalised together; as good as 32 groups in Wu & He 2018, table 3


def _group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(channels // math.gcd(channels, GROUP_CHANNELS), channels)


NORM_LAYERS: dict[str, NormLayer | None] = {
    "batch": nn.BatchNorm2d,
    "instance": partial(nn.InstanceNorm2d, affine=True),
    "group": _group_norm,
    "layer": partial(nn.GroupNorm, 1),  # over channels and pixels of each image (Wu & He 2018, section 3.1)
    "none": None,
}


def norm_layer(name: Norm) -> NormLayer | None:
    """The normalisation that a configuration names: batch, instance, group (of 16 channels), layer or none.

    Raises:
        UserError: unknown name.
    """
    if name not in NORM_LAYERS:
        raise UserError(f"norm={name!r} is unknown: use one of {', '.join(NORM_LAYERS)}")
    return NORM_LAYERS[name]


def require_positive(**values: int) -> None:
    """Check that each value (a number of channels, say) is a positive integer.

    Raises:
        UserError: naming the first that is not.
    """
    for name, value in values.items():
        if not isinstance(value, int) or value < 1:
            raise UserError(f"{name}={value!r} must be a whole number of at least 1")


def doublings(image_size: int, base: int = 4, least: int = 32) -> int:
    """How many times a `base`-pixel map is doubled to reach `image_size`: 64 -> 4.

    Raises:
        UserError: `image_size` is not a power of two from `least` up.
    """
    steps = round(math.log2(image_size / base)) if image_size > 0 else 0
    if image_size < least or base << steps != image_size:
        raise UserError(f"image_size={image_size} must be a power of two from {least} up (32, 64, 128, ...)")
    return steps
