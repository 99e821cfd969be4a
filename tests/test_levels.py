"""Blocks of published networks: the same as torchvision's and timm's on the same weights, and U-Nets made of them."""

import itertools
import json
import sys
from functools import partial
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import timm.layers
import timm.models.resnet
import torch
import torchvision
from mask_data import run
from timm.models._efficientnet_blocks import DepthwiseSeparableConv
from torch import nn
from torch.nn import functional as F
from torchvision.models import densenet, mobilenetv2, resnet
from torchvision.models.googlenet import BasicConv2d
from torchvision.models.googlenet import Inception as TheirInception

import core.training.curves
from core.cli.errors import UserError
from core.nn.blocks import (
    Bottleneck,
    DenseBlock,
    DenseLevel,
    DepthwiseSeparable,
    Inception,
    InvertedResidual,
    SEResBlock,
    SqueezeExcitation,
    StandardisedConv,
    StandardisedWeight,
)
from core.nn.fuse import fold_batch_norm
from core.nn.init import init_he
from core.nn.inspect import inspect_network
from core.nn.model_file import build_model, load_model, save_model
from scripts import compare_blocks
from seg.encoder import EncoderUNet
from seg.levels import LEVELS, Block
from seg.tiling import segment
from seg.trainer import Trainer
from seg.unet import UNet

BATCH = nn.BatchNorm2d


def their_inception():
    """Module 3a; torchvision has a 3x3 convolution in place of the paper's 5x5 one, which it says is a mistake."""
    block = TheirInception(192, 64, 96, 128, 16, 32, 32)
    block.branch3[1] = BasicConv2d(16, 32, kernel_size=5, padding=2)
    return block


def projection(before, after):
    return nn.Sequential(nn.Conv2d(before, after, 1, bias=False), BATCH(after))


attention = partial(timm.layers.SEModule, rd_ratio=1 / 16, rd_divisor=1)
PAIRS = {
    "bottleneck": (Bottleneck(64, 64, norm=BATCH), lambda: resnet.Bottleneck(64, 16)),
    "bottleneck, wider": (
        Bottleneck(24, 32, norm=BATCH),
        lambda: resnet.Bottleneck(24, 8, downsample=projection(24, 32)),
    ),
    "inverted": (InvertedResidual(8, 8, norm=BATCH), lambda: mobilenetv2.InvertedResidual(8, 8, 1, 6)),
    "inverted, wider": (InvertedResidual(8, 12, norm=BATCH), lambda: mobilenetv2.InvertedResidual(8, 12, 1, 6)),
    "depthwise": (
        DepthwiseSeparable(8, 8, norm=BATCH),
        lambda: DepthwiseSeparableConv(8, 8, noskip=True, pw_act=True),
    ),
    "squeeze": (SqueezeExcitation(32), lambda: torchvision.ops.SqueezeExcitation(32, 2)),
    "se": (
        SEResBlock(24, 32, norm=BATCH),
        lambda: timm.models.resnet.BasicBlock(24, 32, downsample=projection(24, 32), attn_layer=attention),
    ),
    "dense": (
        DenseBlock(10, 6, norm=BATCH),
        lambda: densenet._DenseBlock(4, 10, bn_size=4, growth_rate=6, drop_rate=0.0),
    ),
    "inception": (Inception(192, 256, norm=partial(BATCH, eps=0.001)), their_inception),
}


@pytest.mark.parametrize("name", PAIRS)
def test_blocks_are_those_of_others_on_the_same_weights(name):
    torch.manual_seed(0)
    ours, theirs = PAIRS[name][0], PAIRS[name][1]()
    for layer in theirs.modules():
        if isinstance(layer, BATCH):
            layer.running_mean.normal_(0, 0.1)
            layer.running_var.uniform_(0.1, 0.5)
    given, places = theirs.state_dict().values(), ours.state_dict().values()
    for value, place in zip(given, places, strict=True):
        assert value.shape == place.shape
        place.copy_(value)
    channels = next(value.shape[1] for value in given if value.dim() == 4)
    channels = {"dense": 10, "depthwise": 8}.get(name, channels)
    x = torch.randn(2, channels, 9, 11)
    for training in (False, True):
        expected, found = theirs.train(training)(x), ours.train(training)(x)
        assert expected.std() > 0.1 and (found - expected).abs().max() < 1e-5


def test_standardised_weights_are_those_of_timm():
    """Qiao's but for the constant g, and Brock's with the gain of ReLU."""
    level, x = StandardisedConv(8, 16), torch.randn(2, 8, 9, 9)
    raw, gain = level[0][0].parametrizations.weight.original, (2 / (1 - 1 / np.pi)) ** 0.5
    for theirs, factor in (
        (timm.layers.StdConv2d(8, 16, 3, padding=1), gain / 72**0.5),
        (timm.layers.ScaledStdConv2d(8, 16, 3, padding=1, gamma=gain, bias=False), 1),
    ):
        theirs.weight.data.copy_(raw)
        assert (F.conv2d(x, level[0][0].weight, padding=1) - factor * theirs(x)).abs().max() < 1e-5
    assert all(isinstance(block[0].parametrizations.weight[0], StandardisedWeight) for block in level)


def test_standardised_weights_keep_the_variance_of_maps_without_a_norm():
    """Of independent rectified normal values; with zero-mean weights, the mean of the values does not matter."""
    x = torch.randn(16, 64, 40, 40, generator=torch.Generator().manual_seed(0)).relu()
    with torch.no_grad():
        found = StandardisedConv(64, 8, padding=0)[0][0](x)
    assert found.var((0, 2, 3)).numpy() == pytest.approx(np.ones(8), rel=0.05)


def test_a_depthwise_separable_convolution_multiplies_as_often_as_the_paper_says():
    with torch.device("meta"):
        counts = [
            inspect_network(block, torch.zeros(1, 32, 16, 16)).total("multiplications")
            for block in (DepthwiseSeparable(32, 64), nn.Conv2d(32, 64, 3, padding=1))
        ]
    assert counts[0] / counts[1] == pytest.approx(1 / 64 + 1 / 9, rel=1e-12)


# -- U-Nets


def network(block, padding="same", norm="batch"):
    """A small U-Net whose weights and statistics have all been moved."""
    model = UNet(classes=3, widths=[8] * 3, padding=padding, norm=norm, block=block)
    init_he(model)
    generator = torch.Generator().manual_seed(1)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.3, generator=generator)
            layer.running_var.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


def test_the_names_are_those_of_the_configuration():
    assert tuple(LEVELS) == get_args(Block)


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("block", LEVELS)
def test_the_size_of_tiles_matters_to_squeeze_and_excitation_alone(block, padding):
    model = network(block, padding)
    pixels = np.random.default_rng(0).integers(0, 256, (50, 37, 3), np.uint8)
    coarse, fine = (segment(model, pixels, tile, False, [0, 2, 1]) for tile in (8, 28))
    assert coarse.std((1, 2)).min() > 0.01
    assert ((coarse - fine).abs().max() < 1e-5) == (block != "se")


@pytest.mark.parametrize("block", LEVELS)
def test_a_trained_network_survives_its_file_and_folding(block, tmp_path):
    recipe = {"_target_": "seg.unet.UNet", "widths": [5, 8], "classes": 3, "norm": "batch", "block": block}
    model, x = build_model(recipe), torch.randn(2, 3, 16, 16)
    init_he(model)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    F.cross_entropy(model(x), torch.randint(0, 3, (2, 16, 16))).backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert np.mean(moved) > 0.9
    save_model(tmp_path / "m.safetensors", model, recipe, {})
    with torch.inference_mode():
        expected = model.eval()(x)
        assert torch.equal(load_model(tmp_path / "m.safetensors")[0].eval()(x), expected)
        folded = fold_batch_norm(model)
        assert (folded(x) - expected).abs().max() < 1e-5 * max(1, expected.abs().max())
        assert torch.equal(model(x), expected)
    assert not any("parametrizations" in name for name in folded.state_dict())
    # Dense blocks have a norm before the first convolution of each layer.
    left = sum(isinstance(layer, nn.BatchNorm2d) for layer in folded.modules())
    assert left == (12 if block == "dense" else 0)


@pytest.mark.parametrize("block", LEVELS)
def test_any_width_works_or_is_refused(block):
    least = {"dense": 5, "inception": 4}.get(block, 1)
    for width in range(1, 8):
        if width < least:
            with pytest.raises(UserError, match=f"make {width} channels: use widths of at least {least}"):
                UNet(widths=[width, 8], block=block)
        else:
            logits = UNet(widths=[width, 8], block=block, norm="group").eval()(torch.zeros(1, 3, 8, 8))
            assert logits.shape == (1, 2, 8, 8)


def test_standardised_weights_train_in_a_run(discs, tmp_path, monkeypatch):
    monkeypatch.setattr(core.training.curves, "make_figure", lambda rows, panels: None)
    folder = run(discs, tmp_path, "total_images=8", "model.network.block=standardised", "model.network.norm=group")
    weights = load_model(folder.path / "last.safetensors")[0].state_dict()
    assert sum("parametrizations" in name for name in weights) == 6


def test_dense_levels_keep_half_of_their_channels_for_new_maps():
    level = DenseLevel(7, 50)
    assert level[0][0].out_channels == 26 and level(torch.zeros(1, 7, 4, 4)).shape == (1, 50, 4, 4)


def test_the_decoder_of_a_pretrained_network_takes_them_as_well():
    encoder = {"name": "tf_efficientnet_lite0", "weights": "none"}
    model = EncoderUNet(classes=3, encoder=encoder, widths=[8] * 5, block="dense").eval()
    assert model(torch.zeros(1, 3, 40, 33)).shape == (1, 3, 40, 33)
    assert all(isinstance(level, DenseLevel) for level in model.merge)
    with pytest.raises(UserError, match="block='sparse' is unknown"):
        EncoderUNet(encoder=encoder, block="sparse")


# -- the comparison


@pytest.fixture
def ticking(monkeypatch):
    """Each look at the clock is a CPU second."""
    seconds = itertools.count()
    monkeypatch.setattr(compare_blocks, "time", SimpleNamespace(process_time=lambda: next(seconds)))
    monkeypatch.setattr(compare_blocks.torch, "set_num_threads", lambda count: None)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def test_every_block_trains_for_the_same_time(ticking, monkeypatch, capsys, tmp_path):
    rates = []
    step = Trainer.step

    def noted(self):
        rates.append(self.images_seen / self.config.total_images)
        step(self)

    assert {block for block, _ in compare_blocks.ROWS} == set(LEVELS)
    chosen = [("plain", "batch"), ("dense", "batch"), ("standardised", "group")]
    monkeypatch.setattr(compare_blocks, "ROWS", chosen)
    monkeypatch.setattr(Trainer, "step", noted)
    tiny = ["--seconds", "3", "--size", "32", "--count", "10", "--widths", "[5,8]", "--json", str(tmp_path / "b.json")]
    monkeypatch.setattr(sys, "argv", ["compare_blocks", *tiny])
    compare_blocks.main()
    table, report = capsys.readouterr().out, json.loads((tmp_path / "b.json").read_text())
    rows = report["blocks"]
    assert [(row["block"], row["norm"]) for row in rows] == chosen and report["run"]["command"] in table
    assert [row["images_seen"] for row in rows] == [12] * 3
    assert rates == pytest.approx([0, 1 / 3, 2 / 3] * 3)
    assert all(row["ms_per_step"] == 1000 and 0 <= row["miou"] < 1 for row in rows)
    assert all(f" {row['block']} " in table and f"{row['multiplications']:,}" in table for row in rows)
    fine, coarse = 32**2, 16**2  # by hand: 3x3 convolutions, the doubling, the head of 8 classes
    levels = 9 * (3 * 5 + 5 * 5 + 10 * 5 + 5 * 5) * fine + 9 * (5 * 8 + 8 * 8) * coarse
    assert rows[0]["multiplications"] == levels + 4 * 8 * 5 * coarse + 5 * 8 * fine


@pytest.mark.parametrize(
    ("words", "line"),
    [(["--seconds", "0"], "--seconds must be above 0"), (["--count", "9"], "--count must be at least 10")],
)
def test_a_comparison_of_nothing_is_refused(words, line):
    with pytest.raises(UserError, match=line):
        compare_blocks.parse(words)
