"""The U-Net: the paper's sizes and counts, every option, every input size, and how far an output can see."""

from itertools import product
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils import parametrize

from core.cli.errors import UserError
from core.nn.blocks import Norm, Upsampling
from core.nn.init import init_he
from seg import unet
from seg.levels import Block
from seg.unet import UNet

TINY = (2, 3, 4)
BLOCKS = get_args(Block)


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def on_meta(**settings):
    """A network without memory: sizes and counts of the large ones cost nothing."""
    with torch.device("meta"):
        return UNet(**settings)


def crops_of(model, size):
    """The crops that a forward pass really makes, coarsest first."""
    cut = []

    def crop(x, height, width):
        cut.append(((x.shape[2] - height) / 2, (x.shape[3] - width) / 2))
        return original(x, height, width)

    original = unet.center_crop
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unet, "center_crop", crop)
        model(torch.zeros(1, 1, size, size, device="meta"))
    return cut


def test_the_papers_network():
    model = on_meta(channels=1, classes=2, padding="valid")
    assert parameters(model) == 31_030_658
    assert model(torch.zeros(1, 1, 572, 572, device="meta")).shape == (1, 2, 388, 388)
    assert crops_of(model, 572) == [(4, 4), (16, 16), (40, 40), (88, 88)]
    assert (model.output_size(572), model.input_size(388), model.margin) == (388, 572, 92)


def test_the_usual_variant_with_batch_norm():
    assert parameters(on_meta(channels=3, classes=1, norm="batch")) == 31_037_633


@pytest.mark.parametrize("depth, block", [(1, "plain"), (2, "plain"), (3, "plain"), *product([2], BLOCKS[1:])])
def test_valid_sizes_are_those_that_a_forward_pass_gives(depth, block):
    model = UNet(1, 2, (2 if block == "plain" else 5,) * (depth + 1), padding="valid", block=block)
    possible = []
    for size in range(1, 2 * model.margin + 5 * 2**depth):
        if size == model.input_size(max(1, size - 2 * model.margin)):
            assert model(torch.zeros(1, 1, size, size)).shape[2:] == (model.output_size(size),) * 2
            assert model.output_size(size) == size - 2 * model.margin
            possible.append(size)
    assert len(possible) >= 2 and set(np.diff(possible)) == {2**depth}
    for size in set(range(1, possible[-1])) - set(possible):
        with pytest.raises(UserError, match="padding=same") as error:
            model(torch.zeros(1, 1, size, possible[0]))
        named = [int(word) for word in str(error.value).split("use ")[1].split(",")[0].split(" or ")]
        assert set(named) <= {*possible, possible[-1] + 2**depth}
        distance = min(abs(size - fitting) for fitting in possible)
        assert min(abs(size - fitting) for fitting in named) == distance


@settings(max_examples=30, deadline=None)
@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    block=st.sampled_from(BLOCKS),
    norm=st.sampled_from(get_args(Norm)),
    up=st.sampled_from(get_args(Upsampling)),
)
def test_padded_networks_keep_any_size(height, width, block, norm, up):
    model = UNet(3, 5, (5, 6, 7), up=up, norm=norm, block=block).eval()
    assert model(torch.zeros(1, 3, height, width)).shape == (1, 5, height, width)


@pytest.mark.parametrize(
    "norm, block, up",
    [
        *product(get_args(Norm), BLOCKS[:2], get_args(Upsampling)),
        *product(["none", "batch", "group"], BLOCKS[2:], ["transposed"]),
    ],
)
def test_every_option_learns(norm, block, up):
    """Each combination fits one random picture better after a few steps, and every parameter gets a gradient."""
    torch.manual_seed(0)
    model = UNet(1, 3, (5, 8, 8), norm=norm, block=block, up=up)
    init_he(model, seed=0)
    x, y = torch.randn(2, 1, 8, 8), torch.randint(0, 3, (2, 8, 8))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(20):
        loss = torch.nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(
    "depth, up, block",
    [
        *product([1, 2, 3], get_args(Upsampling), ["plain"]),
        *product([2], ["transposed", "bilinear"], [block for block in BLOCKS[1:] if block != "se"]),
    ],
)
def test_the_margin_is_how_far_an_output_block_sees(depth, up, block):
    """Gradients of one aligned output block reach exactly `margin` pixels beyond it, and no farther."""
    torch.manual_seed(1)
    model = UNet(1, 1, (4 if block == "plain" else 8,) * (depth + 1), up=up, block=block).eval().double()
    for module in list(model.modules()):  # standardised weights have both signs
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight")
    torch.nn.init.uniform_(model.head[0].weight)
    for parameter in model.parameters():
        parameter.data.abs_()  # nothing cancels and no ReLU is silent
        if block == "inverted":
            parameter.data.mul_(0.3)  # nor saturated
    side = model.multiple * 2 * (-(-model.margin // model.multiple) + 2)
    start = side // 2 // model.multiple * model.multiple
    seen = torch.zeros(side, side, dtype=torch.bool)
    for seed in range(4):  # max-pooling passes each gradient to one pixel of four
        x = torch.rand(1, 1, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        x.requires_grad_()
        model(x)[0, 0, start : start + model.multiple, start : start + model.multiple].sum().backward()
        seen |= x.grad[0, 0] != 0
    rows = torch.nonzero(seen.any(1)).flatten()
    assert rows[0] == start - model.margin or rows[-1] == start + model.multiple - 1 + model.margin
    assert rows[0] >= start - model.margin and rows[-1] < start + model.multiple + model.margin


def test_dropout_acts_in_the_two_coarsest_levels_while_training_only():
    model = UNet(1, 2, TINY, dropout=0.5)
    init_he(model, seed=0)
    shapes = []
    model.dropout.register_forward_hook(lambda layer, inputs, output: shapes.append(output.shape[1]))
    x = torch.randn(1, 1, 16, 16)
    assert not torch.equal(model(x), model(x))
    assert shapes == [3, 4] * 2
    assert torch.equal(model.eval()(x), model(x))


@pytest.mark.parametrize(
    "settings, line",
    [
        ({"widths": [8]}, "at least two"),
        ({"widths": [8, 0]}, "widths=0"),
        ({"padding": "full"}, "same or valid"),
        ({"padding": "valid", "up": "bilinear"}, "needs up=transposed"),
        ({"up": "cubic"}, "transposed, nearest, bilinear, bicubic"),
        ({"block": "sparse"}, "plain, residual, bottleneck"),
        ({"norm": "batchnorm"}, "batch, instance"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"classes": 0}, "classes=0"),
    ],
)
def test_arguments_out_of_range_are_named(settings, line):
    with pytest.raises(UserError, match=line):
        UNet(**settings)
