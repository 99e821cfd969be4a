"""Trained networks that only pass gradients on to their input: the same functions in less time."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

from core.nn.fuse import fold_foreign, replace

Context = Any  # the ctx argument of autograd functions


def speed_up(network: nn.Module) -> None:
    """Change a network in eval mode in place so that it computes the same in less time; its weights must be frozen.

    Batch norm is folded: a quarter of the time of EfficientNet-Lite0. Strided depthwise convolutions get another
    backward pass: half of the rest in bf16 on a CPU.
    """
    fold_foreign(network)
    for name, module in list(network.named_modules()):
        depthwise = isinstance(module, nn.Conv2d) and 1 < module.groups == module.in_channels == module.out_channels
        if depthwise and max(module.stride) > 1 and max(module.dilation) == 1:
            replace(network, name, StridedDepthwise(module).requires_grad_(False))


class StridedDepthwise(nn.Module):
    """A frozen depthwise convolution with a stride whose backward pass is a convolution without one.

    On a CPU with bf16 multiplication, oneDNN's own backward pass takes 11 to 90 times as long (torch 2.14).
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias, self.stride = conv.weight, conv.bias, conv.stride
        # timm's Conv2dSame pads as TensorFlow does, by what the size of the image demands.
        self.padding: Any = None if type(conv).__name__ == "Conv2dSame" else conv.padding

    def forward(self, x: Tensor) -> Tensor:
        """As the convolution that it replaces."""
        sides = []
        for axis in (1, 0):  # as F.pad wants them
            size, kernel, stride = x.shape[2 + axis], self.weight.shape[2 + axis], self.stride[axis]
            if self.padding is None:
                missing = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
                sides += [missing // 2, missing - missing // 2]
            else:
                sides += [self.padding[axis]] * 2
        y: Tensor = _Strided.apply(F.pad(x, sides), self.weight, self.stride)
        return y if self.bias is None else y + self.bias[:, None, None].to(y.dtype)


class _Strided(Function):
    """(x, w) -> depthwise convolution without padding; differentiable in x any number of times."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, w: Tensor, stride: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(w)
        ctx.size, ctx.stride = x.shape[2:], stride
        return F.conv2d(x, w, stride=stride, groups=len(w))

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, None, None]:
        (w,) = ctx.saved_tensors
        (height, width), (down, right), (high, wide) = ctx.size, ctx.stride, w.shape[2:]
        # As if the forward pass had moved pixel by pixel, and the results between had been left out.
        between = grad.new_zeros(len(grad), height - high + 1, width - wide + 1, len(w)).permute(0, 3, 1, 2)
        between[:, :, ::down, ::right] = grad
        flipped = w.flip(2, 3).to(grad.dtype)
        return F.conv2d(between, flipped, padding=(high - 1, wide - 1), groups=len(w)), None, None
