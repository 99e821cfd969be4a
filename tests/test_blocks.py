"""Blocks: the size arithmetic against torch itself, biases, initialisation."""

from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from core.cli.errors import UserError
from core.nn.blocks import (
    ConvBlock,
    DoubleConv,
    Projection,
    ResBlock,
    ResizeBlock,
    UpBlock,
    Upsampling,
    doubling_block,
    doublings,
    norm_layer,
)
from core.nn.init import init_he, init_normal
from core.nn.sizes import conv_output_size, transposed_output_size

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
        expected = 0
    if expected == 0:  # torch refuses some empty outputs and returns others
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
    with pytest.raises(UserError, match="batch, instance, group, layer, none"):
        norm_layer("bach")
    with pytest.raises(UserError, match="up='cubic'"):
        doubling_block("cubic", 2, 2)


@pytest.mark.parametrize(
    "name, over", [("batch", (0, 2, 3)), ("instance", (2, 3)), ("layer", (1, 2, 3)), ("group", (2, 3, 4))]
)
def test_every_norm_removes_mean_and_spread_over_its_own_axes(name, over):
    x = 3 + 5 * torch.randn(4, 32, 9, 9, generator=torch.Generator().manual_seed(0))
    y = norm_layer(name)(32)(x)
    if name == "group":  # 16 channels a group
        y = y.reshape(4, 2, 16, 9, 9)
    assert torch.allclose(y.mean(over), torch.zeros(()), atol=1e-5)
    assert torch.allclose(y.var(over, correction=0), torch.ones(()), atol=1e-3)
    assert [norm_layer("group")(channels).num_groups for channels in (64, 24, 8)] == [4, 3, 1]
    assert norm_layer("none") is None


@pytest.mark.parametrize("up", get_args(Upsampling))
def test_every_doubling_doubles(up):
    assert doubling_block(up, 6, 4)(torch.zeros(2, 6, 5, 7)).shape == (2, 4, 10, 14)


@pytest.mark.parametrize("mode", ["nearest", "bilinear", "bicubic"])
def test_interpolation_keeps_a_constant_map_constant(mode):
    block = ResizeBlock(1, 1, mode)
    nn.init.constant_(block[1][0].weight, 1 / 9)
    nn.init.zeros_(block[1][0].bias)
    inner = block(torch.ones(1, 1, 6, 6))[:, :, 1:-1, 1:-1]  # the convolution mixes zeros into the rim
    assert torch.allclose(inner, torch.ones_like(inner), atol=1e-6)


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("channels", [3, 8])
def test_a_residual_block_with_a_silent_body_is_its_shortcut(padding, channels):
    block = ResBlock(channels, 8, padding=padding)
    for layer in block.body:
        nn.init.zeros_(layer[0].weight)
        nn.init.zeros_(layer[0].bias)
    x = torch.randn(2, channels, 9, 10)
    cut = x if padding else x[:, :, 2:-2, 2:-2]
    shortcut = block.shortcut(x)
    assert torch.allclose(block(x), (shortcut if padding else shortcut[:, :, 2:-2, 2:-2]).relu())
    assert isinstance(block.shortcut, nn.Identity) == (channels == 8)
    assert block(x).shape == DoubleConv(channels, 8, padding)(x).shape == (2, 8, *cut.shape[2:])


def test_he_initialisation_keeps_the_second_moment_through_rectified_layers():
    """The derivation of He et al. 2015, section 2.2: E[y^2] of what enters a ReLU layer is preserved."""
    net = nn.Sequential(
        *(ConvBlock(64, 64, padding=1, norm=None) for _ in range(4)), doubling_block("transposed", 64, 64)
    )
    init_he(net, seed=1)
    x = torch.randn(4, 64, 24, 24, generator=torch.Generator().manual_seed(0)).relu()
    before = 2 * x.square().mean()
    middle = net(x)[:, :, 10:-10, 10:-10]  # zero padding lowers it at the rim
    # Five layers of half or twice the variance would be a factor of 32; the draw of 64 channels alone gives 1.6.
    assert 0.4 < middle.square().mean() / before < 2.5
    assert all(torch.count_nonzero(layer.bias) == 0 for layer in net.modules() if isinstance(layer, nn.Conv2d))


def test_he_initialisation_counts_what_reaches_an_output_of_a_transposed_convolution():
    for kernel, stride in ((2, 2), (4, 2), (3, 1)):
        layer = UpBlock(128, 128, kernel, stride, 0, norm=None)
        init_he(layer, seed=0)
        reaching = 128 * kernel**2 / stride**2
        assert abs(layer[0].weight.std() / (2 / reaching) ** 0.5 - 1) < 0.02


def test_he_initialisation_of_a_projection_counts_the_one_pixel_it_reads():
    """Each output is a sum over 128 latents of variance 1, with weights of variance 2 / 128."""
    layer = Projection(128, 512, norm=None, activation=None)
    init_he(layer, seed=0)
    z = torch.randn(64, 128, 1, 1, generator=torch.Generator().manual_seed(0))
    assert layer(z).shape == (64, 512, 4, 4) and layer(z).std().item() == pytest.approx(2**0.5, rel=0.02)
