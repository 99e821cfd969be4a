"""Depthwise convolutions with our backward pass against PyTorch's, and the networks that have them."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from core.nn import backbone
from core.nn.backbone import Backbone
from core.nn.depthwise import DepthwiseConv2d, quicken
from core.nn.fuse import fold_foreign


def plain_backbone(monkeypatch, name, frozen):
    """As a library made it, in float64."""
    torch.manual_seed(0)
    with monkeypatch.context() as patch:
        patch.setattr(backbone, "quicken", lambda network: None)
        return Backbone(name, "none", frozen, strides=(8, 16)).double()


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "size"),
    [(3, 2, 1, 4), (5, 1, 2, 4), (5, 2, 2, 5), (7, 1, (3, 0), 7), ((1, 4), (1, 3), 0, 6)],
)
def test_a_depthwise_convolution_and_its_derivatives(kernel, stride, padding, size):
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 2, kernel, stride, padding, groups=2).double()
    network = nn.Sequential(conv)
    quicken(network)
    (layer,) = network
    assert isinstance(layer, DepthwiseConv2d) and layer.weight is conv.weight and layer.bias is conv.bias
    x = torch.randn(1, 2, size, size + 1, dtype=torch.float64, requires_grad=True)
    results = []
    for module in (conv, layer):
        y = module(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, conv.weight, conv.bias))))
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)

    def convolve(x, weight):
        return torch.func.functional_call(layer, {"weight": weight}, (x,))

    assert gradcheck(convolve, (x, conv.weight)) and gradgradcheck(convolve, (x, conv.weight))


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 4, 3, groups=4),
        nn.Conv2d(4, 4, 5, groups=2),
        nn.Conv2d(4, 8, 5, groups=4),
        nn.Conv2d(4, 4, 5, dilation=2, groups=4),
        nn.Conv2d(4, 4, 5, padding="same", groups=4),
        nn.Conv2d(4, 4, 5, padding=2, padding_mode="reflect", groups=4),
        nn.Conv2d(4, 4, 5, padding=5, groups=4),
        nn.Conv2d(1, 1, 5),
    ],
)
def test_other_convolutions_stay_as_they_are(conv):
    network = nn.Sequential(conv)
    quicken(network)
    assert network[0] is conv


@pytest.mark.parametrize(("name", "count"), [("tf_efficientnet_lite0", 11), ("mobilenetv2_100", 4)])
def test_a_network_learns_the_same_in_less_time(name, count, monkeypatch):
    slow = plain_backbone(monkeypatch, name, frozen=False)
    fast = copy.deepcopy(slow)
    quicken(fast.network)
    assert sum(isinstance(layer, DepthwiseConv2d) for layer in fast.modules()) == count
    assert list(fast.state_dict()) == list(slow.state_dict())
    x = torch.rand(2, 3, 48, 40, dtype=torch.float64)
    for network in (slow, fast):
        sum(found.square().mean() for found in network(x)).backward()
    for ours, theirs in zip(fast.parameters(), slow.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)


def test_under_autocast_the_weights_get_gradients_in_their_own_type():
    conv = nn.Conv2d(8, 8, 5, 2, 2, groups=8)
    network = nn.Sequential(nn.Conv2d(3, 8, 1), copy.deepcopy(conv))
    quicken(network)
    x = torch.randn(2, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y = network(x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    found = network[1].weight.grad
    assert found.dtype == torch.float32
    inside = network[0](x).detach()
    exact = torch.autograd.grad(conv(inside).square().sum(), conv.weight)[0]
    torch.testing.assert_close(found, exact, rtol=0.05, atol=0.02 * exact.abs().max().item())


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "resnet18", "densenet121", "mobilenetv2_100"])
def test_a_frozen_network_computes_the_same_in_less_time(name, monkeypatch):
    slow = plain_backbone(monkeypatch, name, frozen=True)
    with torch.no_grad():
        for layer in slow.modules():
            if isinstance(layer, nn.BatchNorm2d):
                for value, low, high in ((layer.running_var, 0.5, 2), (layer.weight, 0.5, 2), (layer.bias, -1, 1)):
                    value.uniform_(low, high)
                layer.running_mean.uniform_(-1, 1)
    fast = copy.deepcopy(slow)
    quicken(fast.network)
    fold_foreign(fast.network)
    left = sum(isinstance(layer, nn.BatchNorm2d) for layer in fast.modules())
    # Those of DenseNet come before convolutions, or read what others read too.
    assert left == 0 if name != "densenet121" else 0 < left < 121
    x = torch.rand(2, 3, 48, 40, dtype=torch.float64, requires_grad=True)
    outcomes = []
    for network in (slow, fast):
        maps = network(x)
        loss = sum(found.square().mean() for found in maps)
        (slope,) = torch.autograd.grad(loss, x)
        outcomes.append((*maps, slope))
    for a, b in zip(*outcomes, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * a.abs().max().item())
