"""Grouped convolutions whose second derivatives are grouped convolutions as well.

PyTorch computes these second derivatives with one small convolution per group: 1,900 more kernels per step for R1 and
R2 in the default `gen.r3gan`. Here y = conv(x, w) and its two derivatives are three bilinear maps whose derivatives are
again among the three, so gradient penalties of any order need only a few large convolutions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function

Context = Any  # the ctx argument of autograd functions


class _Geometry(NamedTuple):
    """Of a convolution; lists are (vertical, horizontal)."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int


def _backward(grad: Tensor, x: Tensor, w: Tensor, geometry: _Geometry, of_input: bool) -> Tensor:
    """The gradient of sum(grad * conv(x, w)) with respect to x (`of_input`) or to w."""
    stride, padding, dilation, groups = geometry
    mask = [of_input, not of_input, False]
    both = torch.ops.aten.convolution_backward(grad, x, w, None, stride, padding, dilation, False, [0, 0], groups, mask)
    return both[0] if of_input else both[1]


class _Convolve(Function):
    """(x, w) -> y."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, w: Tensor, geometry: _Geometry) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.geometry = geometry
        stride, padding, dilation, groups = geometry
        return torch.ops.aten.convolution(x, w, None, stride, padding, dilation, False, [0, 0], groups)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        of_x = _InputGradient.apply(grad, w, x, ctx.geometry) if ctx.needs_input_grad[0] else None
        of_w = _WeightGradient.apply(grad, x, w, ctx.geometry) if ctx.needs_input_grad[1] else None
        return of_x, of_w, None


class _InputGradient(Function):
    """(dy, w) -> dx; of `like`, an x, only the shape matters."""

    @staticmethod
    def forward(ctx: Context, grad: Tensor, w: Tensor, like: Tensor, geometry: _Geometry) -> Tensor:
        ctx.save_for_backward(grad, w)
        ctx.geometry = geometry
        return _backward(grad, like, w, geometry, of_input=True)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        dy, w = ctx.saved_tensors
        of_dy = _Convolve.apply(grad, w, ctx.geometry) if ctx.needs_input_grad[0] else None
        of_w = _WeightGradient.apply(dy, grad, w, ctx.geometry) if ctx.needs_input_grad[1] else None
        return of_dy, of_w, None, None


class _WeightGradient(Function):
    """(dy, x) -> dw; of `like`, a w, only the shape matters."""

    @staticmethod
    def forward(ctx: Context, grad: Tensor, x: Tensor, like: Tensor, geometry: _Geometry) -> Tensor:
        ctx.save_for_backward(grad, x)
        ctx.geometry = geometry
        return _backward(grad, x, like, geometry, of_input=False)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        dy, x = ctx.saved_tensors
        of_dy = _Convolve.apply(x, grad, ctx.geometry) if ctx.needs_input_grad[0] else None
        of_x = _InputGradient.apply(dy, grad, x, ctx.geometry) if ctx.needs_input_grad[1] else None
        return of_dy, of_x, None, None


class GroupedConv2d(nn.Conv2d):
    """`nn.Conv2d` with groups and zero padding, for networks that are differentiated twice."""

    def forward(self, x: Tensor) -> Tensor:
        """As `nn.Conv2d`, which does the work under autocast, where this project takes no second derivatives."""
        device = x.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            return super().forward(x)
        geometry = _Geometry(list(self.stride), list(self.padding), list(self.dilation), self.groups)  # type: ignore[arg-type]
        y = _Convolve.apply(x, self.weight, geometry)
        return y if self.bias is None else y.add_(self.bias[:, None, None])
