"""Convolution blocks that the generators, discriminators and the U-Net share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from core.cli.errors import UserError
from core.nn.grouped_conv import GroupedConv2d

Norm = Literal["batch", "instance", "group", "layer", "none"]
Upsampling = Literal["transposed", "nearest", "bilinear", "bicubic"]
NormLayer = Callable[[int], nn.Module]  # channels -> layer, such as nn.BatchNorm2d
Activation = Callable[[], nn.Module]  # nothing -> layer, such as nn.ReLU


class ConvBlock(nn.Sequential):
    """Convolution, then normalisation, then activation: (N, in, H, W) -> (N, out, H', W').

    H' is `core.nn.sizes.conv_output_size(H, ...)`.

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

    H' is `core.nn.sizes.transposed_output_size(H, ...)`.
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


class StandardisedConv(DoubleConv):
    """A `DoubleConv` with `StandardisedWeight`s, which Qiao et al. 2019 combine with group norm."""

    def __init__(self, in_channels: int, out_channels: int, padding: int = 1, norm: NormLayer | None = None) -> None:
        super().__init__(in_channels, out_channels, padding, norm)
        for layer in list(self.modules()):
            if isinstance(layer, nn.Conv2d):
                parametrize.register_parametrization(layer, "weight", StandardisedWeight())


class StandardisedWeight(nn.Module):
    """Weight standardisation (Qiao et al. 2019, section "Weight Standardization"): W -> g (W - mean) / sd, same shape.

    Mean and standard deviation are over the N weights of each output channel. The paper has g = 1, but a norm after the
    convolution makes g irrelevant. Here g = sqrt(2 / (1 - 1/pi) / N), so that maps keep their variance through
    convolution and ReLU without a norm, too (Brock et al. 2021, section "Scaled Weight Standardization").
    """

    def forward(self, weight: Tensor) -> Tensor:
        """The standardised weight."""
        gain = math.sqrt(2 / (1 - 1 / math.pi) / weight[0].numel())
        return gain * F.layer_norm(weight, weight.shape[1:], eps=1e-6)


class DepthwiseSeparable(nn.Sequential):
    """A 3x3 `ConvBlock` of each channel by itself, then a 1x1 `ConvBlock` (Howard et al. 2017, section 3.1).

    (N, in, H, W) -> (N, out, H', W'), with 1/out + 1/9 of the multiplications of a 3x3 convolution. `padding` as for
    `ConvBlock`.
    """

    def __init__(self, in_channels: int, out_channels: int, padding: int = 1, norm: NormLayer | None = None) -> None:
        super().__init__(
            ConvBlock(in_channels, in_channels, padding=padding, groups=in_channels, norm=norm),
            ConvBlock(in_channels, out_channels, kernel=1, norm=norm),
        )


class Residual(nn.Module):
    """y = relu(F(x) + S(x)) for a body F and a shortcut S (He et al. 2016, equations 1 and 2).

    Where the channels change, S is a 1x1 convolution (option B of the paper). Where F shrinks the map, the result of S
    is cropped to the centre.
    """

    def __init__(self, body: nn.Module, in_channels: int, out_channels: int, norm: NormLayer | None) -> None:
        super().__init__()
        self.body = body
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != out_channels:
            self.shortcut = ConvBlock(in_channels, out_channels, kernel=1, norm=norm, activation=None)
        self.activation = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """The activated sum of the body and the shortcut."""
        long = self.body(x)
        return self.activation(long + center_crop(self.shortcut(x), long.shape[2], long.shape[3]))


class ResBlock(Residual):
    """A `Residual` of two 3x3 convolutions (He et al. 2016, figure 2); shapes as for `DoubleConv`."""

    body: nn.Sequential

    def __init__(self, in_channels: int, out_channels: int, padding: int = 1, norm: NormLayer | None = None) -> None:
        body = nn.Sequential(
            ConvBlock(in_channels, out_channels, padding=padding, norm=norm),
            ConvBlock(out_channels, out_channels, padding=padding, norm=norm, activation=None),
        )
        super().__init__(body, in_channels, out_channels, norm)


class SqueezeExcitation(nn.Module):
    """Channels weighted by what the whole map shows: y = x * sigmoid(W2 relu(W1 z)), z the mean over H and W.

    (N, C, H, W) -> the same; W1 has C / `reduction` rows (Hu et al. 2018, equations 2 to 4).
    """

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        hidden = max(1, channels // reduction)
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            ConvBlock(channels, hidden, kernel=1, norm=None),
            ConvBlock(hidden, channels, kernel=1, norm=None, activation=nn.Sigmoid),
        )

    def forward(self, x: Tensor) -> Tensor:
        """The weighted map."""
        return x * self.gate(x)


class SEResBlock(ResBlock):
    """A `ResBlock` with `SqueezeExcitation` before the sum (Hu et al. 2018, figure 3)."""

    def __init__(self, in_channels: int, out_channels: int, padding: int = 1, norm: NormLayer | None = None) -> None:
        super().__init__(in_channels, out_channels, padding, norm)
        self.body.append(SqueezeExcitation(out_channels))


class Bottleneck(Residual):
    """A `Residual` of 1x1, 3x3 and 1x1 convolutions; the first two have out / 4 channels (He et al. 2016, figure 5).

    (N, in, H, W) -> (N, out, H', W'); `padding` as for `ConvBlock`.
    """

    def __init__(self, in_channels: int, out_channels: int, padding: int = 1, norm: NormLayer | None = None) -> None:
        narrow = max(1, out_channels // 4)
        body = nn.Sequential(
            ConvBlock(in_channels, narrow, kernel=1, norm=norm),
            ConvBlock(narrow, narrow, padding=padding, norm=norm),
            ConvBlock(narrow, out_channels, kernel=1, norm=norm, activation=None),
        )
        super().__init__(body, in_channels, out_channels, norm)


class InvertedResidual(nn.Module):
    """y = F(x), plus x if in = out: F widens, convolves each channel by itself, and narrows without an activation.

    (N, in, H, W) -> (N, out, H', W'); the wide maps have 6 in channels (Sandler et al. 2018, section 3.3 and table 1).
    `padding` as for `ConvBlock`; without it, x is cropped to the centre.
    """

    def __init__(self, in_channels: int, out_channels: int, padding: int = 1, norm: NormLayer | None = None) -> None:
        super().__init__()
        wide = 6 * in_channels
        self.body = nn.Sequential(
            ConvBlock(in_channels, wide, kernel=1, norm=norm, activation=nn.ReLU6),
            ConvBlock(wide, wide, padding=padding, groups=wide, norm=norm, activation=nn.ReLU6),
            ConvBlock(wide, out_channels, kernel=1, norm=norm, activation=None),
        )
        self.shortcut = in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        """The body, and the shortcut if there is one."""
        y: Tensor = self.body(x)
        return y + center_crop(x, y.shape[2], y.shape[3]) if self.shortcut else y


class DenseBlock(nn.Module):
    """Layers that see all maps before them: x_l = H_l([x_0, ..., x_(l-1)]); the result is [x_0, ..., x_layers].

    (N, in, H, W) -> (N, in + layers * growth, H', W'). H is norm, ReLU, a 1x1 convolution to 4 growth channels, norm,
    ReLU, a 3x3 convolution (Huang et al. 2017, equation 2 and "bottleneck layers"). `padding` as for `ConvBlock`.
    """

    def __init__(
        self, in_channels: int, growth: int, layers: int = 4, padding: int = 1, norm: NormLayer | None = None
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(
                *([norm(channels)] if norm else []),
                nn.ReLU(),
                ConvBlock(channels, 4 * growth, kernel=1, norm=norm),
                ConvBlock(4 * growth, growth, padding=padding, bias=norm is None, norm=None, activation=None),
            )
            for channels in range(in_channels, in_channels + layers * growth, growth)
        )

    def forward(self, x: Tensor) -> Tensor:
        """All maps, one after another."""
        for layer in self.layers:
            x = _joined([x, layer(x)])
        return x


class DenseLevel(nn.Sequential):
    """A `DenseBlock` of four layers that makes half of the channels; a 1x1 `ConvBlock` before it makes the others.

    (N, in, H, W) -> (N, out, H', W'), as in the smallest network of Jegou et al. 2017 (FC-DenseNet56).

    Raises:
        UserError: too few channels for one a layer.
    """

    def __init__(self, in_channels: int, out_channels: int, padding: int = 1, norm: NormLayer | None = None) -> None:
        growth = max(1, out_channels // 8)
        if out_channels <= 4:
            raise UserError(f"a dense block cannot make {out_channels} channels: use widths of at least 5")
        first = out_channels - 4 * growth
        block = DenseBlock(first, growth, padding=padding, norm=norm)
        super().__init__(ConvBlock(in_channels, first, kernel=1, norm=norm), block)


class Inception(nn.Module):
    """1x1, 3x3 and 5x5 convolutions and a 3x3 max-pooling beside each other, their maps concatenated.

    (N, in, H, W) -> (N, out, H', W'), in the proportions of module 3a (Szegedy et al. 2015, figure 2b and table 1):
    192 -> 256 channels is that module. `padding` 1 keeps the size; 0 removes two pixels from every side.

    Raises:
        UserError: too few channels for one a branch.
    """

    def __init__(self, in_channels: int, out_channels: int, padding: int = 1, norm: NormLayer | None = None) -> None:
        super().__init__()
        if out_channels < 4:
            raise UserError(f"an inception module cannot make {out_channels} channels: use widths of at least 4")
        one, five = out_channels // 4, max(1, out_channels // 8)
        three = out_channels - one - 2 * five  # the pooling has as many as the 5x5 convolution
        before_three, before_five = 3 * out_channels // 8, max(1, out_channels // 16)
        point = partial(ConvBlock, in_channels, kernel=1, norm=norm)
        self.branches = nn.ModuleList(
            [
                point(one),
                nn.Sequential(point(before_three), ConvBlock(before_three, three, padding=padding, norm=norm)),
                nn.Sequential(point(before_five), ConvBlock(before_five, five, 5, padding=2 * padding, norm=norm)),
                nn.Sequential(nn.MaxPool2d(3, stride=1, padding=padding), point(five)),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        """The maps of the branches, one after another."""
        return _joined([branch(x) for branch in self.branches])


def _joined(maps: Sequence[Tensor]) -> Tensor:
    """Maps (N, C_i, H_i, W_i), cropped to the smallest and concatenated along the channels."""
    height, width = (min(x.shape[axis] for x in maps) for axis in (2, 3))
    return torch.cat([center_crop(x, height, width) for x in maps], dim=1)


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
