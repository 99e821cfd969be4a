"""Depthwise convolutions of any network whose backward pass takes a CPU less time."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

Context = Any  # the ctx argument of autograd functions
Pair = tuple[int, int]  # vertical, horizontal
WINDOW = 3  # side of the largest kernel for which oneDNN's own weight gradient is fast


def quicken(network: nn.Module) -> None:
    """Make `DepthwiseConv2d`s, in place, of the depthwise convolutions that gain: with a stride, or above 3x3."""
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.Conv2d) and _gains(module):
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, DepthwiseConv2d(module))


def _gains(conv: nn.Conv2d) -> bool:
    if isinstance(conv.padding, str) or conv.padding_mode != "zeros" or max(conv.dilation) > 1:
        return False
    depthwise = 1 < conv.groups == conv.in_channels == conv.out_channels
    within = all(pad < side for pad, side in zip(conv.padding, conv.kernel_size, strict=True))
    return depthwise and within and (max(conv.stride) > 1 or max(conv.kernel_size) > WINDOW)


class DepthwiseConv2d(nn.Conv2d):
    """The same function as the convolution that it is made of, with the same weights.

    On a CPU with bf16 multiplication, oneDNN's gradients of strided depthwise convolutions take 11 to 90 times as long
    as these, and its weight gradients of 5x5 kernels 9 to 20 times; in float32 up to 4 times (torch 2.14).
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        with torch.device("meta"):
            super().__init__(
                conv.in_channels,
                conv.out_channels,
                conv.kernel_size,  # type: ignore[arg-type]
                conv.stride,  # type: ignore[arg-type]
                conv.padding,  # type: ignore[arg-type]
                groups=conv.groups,
                bias=False,
            )
        self.weight, self.bias = conv.weight, conv.bias
        # timm's Conv2dSame pads as TensorFlow does, by what the size of the image demands.
        self.as_needed = type(conv).__name__ == "Conv2dSame"
        self.train(conv.training)

    def forward(self, x: Tensor) -> Tensor:
        """As the convolution."""
        if self.as_needed:
            from timm.layers import pad_same

            x = pad_same(x, list(self.kernel_size), list(self.stride))
        wanted = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        if x.device.type != "cpu" or not wanted:
            return super().forward(x)
        y: Tensor = _Depthwise.apply(x, self.weight, self.stride, self.padding)
        return y if self.bias is None else y + self.bias[:, None, None].to(y.dtype)


class _Depthwise(Function):
    """(x, w) -> depthwise convolution; differentiable any number of times."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, w: Tensor, stride: Pair, padding: Pair) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, w)
        ctx.size, ctx.stride, ctx.padding = x.shape[2:], stride, padding
        return F.conv2d(x, w, stride=stride, padding=padding, groups=len(w))

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, w = ctx.saved_tensors
        w, moves = w.to(grad.dtype), (ctx.stride, ctx.padding)
        to_x = _input_gradient(grad, w, ctx.size, *moves) if ctx.needs_input_grad[0] else None
        to_w = _weight_gradient(grad, x.to(grad.dtype), w, *moves) if ctx.needs_input_grad[1] else None
        return to_x, to_w, None, None


def _input_gradient(grad: Tensor, w: Tensor, size: torch.Size, stride: Pair, padding: Pair) -> Tensor:
    """A convolution without stride: as if the forward pass had moved pixel by pixel, and some were left out."""
    if max(stride) > 1:
        height, width = (
            pixels + 2 * pad - side + 1 for pixels, pad, side in zip(size, padding, w.shape[2:], strict=True)
        )
        between = grad.new_zeros(len(grad), height, width, len(w)).permute(0, 3, 1, 2)
        between[:, :, :: stride[0], :: stride[1]] = grad
        grad = between
    rest = [side - 1 - pad for side, pad in zip(w.shape[2:], padding, strict=True)]
    return F.conv2d(grad, w.flip(2, 3), padding=rest, groups=len(w))


def _weight_gradient(grad: Tensor, x: Tensor, w: Tensor, stride: Pair, padding: Pair) -> Tensor:
    """Window by window of the kernel, each as the gradient of a kernel of that size."""
    x = F.pad(x, [padding[1], padding[1], padding[0], padding[0]])
    sides = [min(side, WINDOW) for side in w.shape[2:]]
    spans = [(count - 1) * step + side for count, step, side in zip(grad.shape[2:], stride, sides, strict=True)]
    window, gradient = w.new_empty(len(w), 1, *sides), torch.zeros_like(w)
    # The last window of a row may overlap the one before.
    rows, columns = (
        [min(start, side - part) for start in range(0, side, part)]
        for side, part in zip(w.shape[2:], sides, strict=True)
    )
    for row, column in product(rows, columns):
        seen = x[:, :, row : row + spans[0], column : column + spans[1]]
        convolution = [list(stride), [0, 0], [1, 1], False, [0, 0], len(w), [False, True, False]]
        found = torch.ops.aten.convolution_backward(grad, seen, window, None, *convolution)[1]
        gradient[:, :, row : row + sides[0], column : column + sides[1]] = found
    return gradient
