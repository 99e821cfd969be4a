"""Grouped convolutions against PyTorch's own, to the third derivative, and what they cost."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from core.nn.grouped_conv import GroupedConv2d

GEOMETRIES = [
    {"kernel_size": 3, "padding": 1, "groups": 2},
    {"kernel_size": 3, "stride": 2, "padding": (0, 2), "dilation": (1, 2), "groups": 4, "bias": False},
    {"kernel_size": 5, "groups": 8},
]


def derivatives(layer: nn.Conv2d, x: torch.Tensor) -> list[torch.Tensor]:
    """First to third derivatives of a smooth scalar with respect to input and parameters."""
    inputs = [x, *layer.parameters()]
    value = layer(x).square().sum()
    found = [value]
    for _ in range(3):
        gradients = torch.autograd.grad(value, inputs, create_graph=True)
        found += gradients
        value = sum((gradient.square().sum() for gradient in gradients), torch.zeros(()))
    return found


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_derivatives_are_those_of_pytorch(geometry):
    torch.manual_seed(0)
    plain = nn.Conv2d(8, 16, **geometry).double()
    ours = GroupedConv2d(8, 16, **geometry).double()
    ours.load_state_dict(plain.state_dict())
    x = torch.randn(2, 8, 7, 6, dtype=torch.float64, requires_grad=True)
    for mine, theirs in zip(derivatives(ours, x), derivatives(plain, x), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=0)


class Count(TorchDispatchMode):
    """Counts convolutions and their first derivatives as they are dispatched."""

    number = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += "convolution" in str(function)
        return function(*args, **(kwargs or {}))


def penalised(layer: nn.Module) -> int:
    """Number of convolutions in a step with a gradient penalty."""
    x = torch.randn(2, 16, 4, 4, requires_grad=True)
    with Count() as count:
        y = layer(x)
        (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        (y.sum() + gradient.square().sum()).backward()
    return count.number


def test_a_penalty_costs_the_same_number_of_convolutions_whatever_the_groups():
    few, many = (penalised(GroupedConv2d(16, 16, 3, padding=1, groups=groups)) for groups in (2, 16))
    assert few == many < penalised(nn.Conv2d(16, 16, 3, padding=1, groups=16))


@pytest.mark.parametrize(("grad", "bf16"), product([True, False], [True, False]))
def test_it_is_a_layer_like_any_other(grad, bf16):
    plain, ours = nn.Conv2d(8, 8, 3, padding=1, groups=4), GroupedConv2d(8, 8, 3, padding=1, groups=4)
    ours.load_state_dict(plain.state_dict())
    x = torch.randn(2, 8, 5, 5).contiguous(memory_format=torch.channels_last)
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        mine, theirs = ours(x), plain(x)
    assert mine.dtype == theirs.dtype and mine.requires_grad == grad
    assert mine.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(mine, theirs)
