"""Blocks: the size arithmetic against torch itself, biases, initialisation."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from core.blocks import ConvBlock, UpBlock, conv_output_size, doublings, init_normal, norm_layer, transposed_output_size
from core.errors import UserError

geometry = {
    "size": st.integers(1, 20),
    "kernel": st.integers(1, 5),
    "stride": st.integers(1, 4),
    "padding": st.integers(0, 3),
    "dilation": st.integers(1, 3),
}


@settings(max_examples=150, deadline=None)
@given(**geometry)
def test_conv_output_size_is_what_torch_gives(size, kernel, stride, padding, dilation):
    conv = nn.Conv2d(1, 1, kernel, stride, padding, dilation)
    x = torch.zeros(1, 1, size, size)
    try:
        expected = conv(x).shape[-1]
    except RuntimeError:
        with pytest.raises(UserError, match="kernel"):
            conv_output_size(size, kernel, stride, padding, dilation)
    else:
        assert conv_output_size(size, kernel, stride, padding, dilation) == expected


@settings(max_examples=150, deadline=None)
@given(**geometry, output_padding=st.integers(0, 4))
def test_transposed_output_size_is_what_torch_gives(size, kernel, stride, padding, dilation, output_padding):
    conv = nn.ConvTranspose2d(1, 1, kernel, stride, padding, output_padding, dilation=dilation)
    x = torch.zeros(1, 1, size, size)
    try:
        expected = conv(x).shape[-1]
    except RuntimeError:
        with pytest.raises(UserError):
            transposed_output_size(size, kernel, stride, padding, dilation, output_padding)
    else:
        assert transposed_output_size(size, kernel, stride, padding, dilation, output_padding) == expected


def test_the_known_sizes():
    assert conv_output_size(64, 4, 2, 1) == 32
    assert transposed_output_size(1, 4, 1, 0) == 4
    assert [conv_output_size(572, 3), conv_output_size(570, 3)] == [570, 568]  # the U-Net's first two
    with pytest.raises(UserError, match="stride=0"):
        conv_output_size(64, 3, 0)


@pytest.mark.parametrize("block", [ConvBlock, UpBlock])
def test_bias_follows_from_the_norm(block):
    assert block(2, 3)[0].bias is None
    assert block(2, 3, norm=None)[0].bias is not None
    assert block(2, 3, norm=None, bias=False)[0].bias is None
    assert [type(layer) for layer in block(2, 3)][1:] == [nn.BatchNorm2d, nn.ReLU]
    assert len(block(2, 3, norm=None, activation=None)) == 1


@pytest.mark.parametrize("block", [ConvBlock, UpBlock])
def test_groups_and_dilation_reach_the_convolution(block):
    layer = block(4, 8, kernel=3, stride=1, padding=2, dilation=2, groups=2)[0]
    assert (layer.groups, layer.dilation) == (2, (2, 2))
    assert layer.weight.numel() == 4 * 8 * 9 // 2
    assert layer(torch.zeros(1, 4, 9, 9)).shape == (1, 8, 9, 9)


def test_init_normal_draws_the_papers_distributions():
    net = nn.Sequential(ConvBlock(64, 256, kernel=4), UpBlock(256, 64, norm=None), nn.Linear(300, 300))
    init_normal(net, seed=3)
    for weight in (net[0][0].weight, net[1][0].weight, net[2].weight):
        count = weight.numel()
        assert abs(weight.mean()) < 5 * 0.02 / count**0.5
        assert abs(weight.std() / 0.02 - 1) < 5 / (2 * count) ** 0.5
    assert abs(net[0][1].weight.mean() - 1) < 5 * 0.02 / 16
    for bias in (net[0][1].bias, net[1][0].bias, net[2].bias):
        assert torch.count_nonzero(bias) == 0


def test_init_normal_depends_on_its_seed_alone():
    def weights(seed):
        torch.manual_seed(torch.randint(1000, ()).item())
        block = ConvBlock(2, 3)
        init_normal(block, seed=seed)
        return block[0].weight

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_doublings_and_norms_refuse_the_impossible():
    assert [doublings(size) for size in (32, 64, 128)] == [3, 4, 5]
    for size in (0, -64, 16, 48, 100):
        with pytest.raises(UserError, match="power of two"):
            doublings(size)
    with pytest.raises(UserError, match="batch, none"):
        norm_layer("bach")
