"""`facet inspect`: what papers, lecture notes and gradients say of networks, and one line for a mistake."""

import json
import sys
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torchvision import models

from core.nn import backbone
from core.nn.blocks import ConvBlock
from core.nn.inspect import Inspection, inspect_network
from core.nn.model_file import build_model, save_model
from scripts import inspect_network as command

LINEAR = {"norm": None, "activation": None}


def taken_apart(network: nn.Module, *shape: int) -> Inspection:
    return inspect_network(network.to("meta"), torch.zeros(1, *shape, device="meta"))


def classifier(name: str, size: int = 224) -> Inspection:
    with torch.device("meta"):
        options = {"init_weights": False} if name == "googlenet" else {}
        return taken_apart(models.get_model(name, weights=None, **options), 3, size, size)


def sizes(found: Inspection, *kinds: str) -> list[int]:
    return [layer.output[-1] for layer in found.layers if layer.kind in kinds]


# -- single layers


def test_a_5x5_convolution_of_3_channels_to_10_has_760_parameters():
    (layer,) = taken_apart(ConvBlock(3, 10, kernel=5, padding=2, **LINEAR), 3, 32, 32).layers
    assert layer.parameters == 760 and layer.output == [10, 32, 32] and layer.map_bytes == 4 * 10 * 32 * 32
    assert layer.multiplications == 32 * 32 * 10 * 75 and layer.field == [5, 5]


def test_three_3x3_see_as_far_as_one_7x7_with_fewer_parameters():
    stack = taken_apart(nn.Sequential(*(ConvBlock(8, 8, bias=False, **LINEAR) for _ in range(3))), 8, 32, 32)
    large = taken_apart(ConvBlock(8, 8, kernel=7, bias=False, **LINEAR), 8, 32, 32)
    assert [layer.field for layer in stack.layers] == [[3, 3], [5, 5], [7, 7]] and large.layers[0].field == [7, 7]
    assert stack.layers[-1].output == large.layers[0].output
    assert (stack.total("parameters"), large.total("parameters")) == (27 * 8 * 8, 49 * 8 * 8)


def test_depthwise_separable_convolution_takes_fewer_multiplications():
    full = taken_apart(ConvBlock(3, 256, kernel=5, **LINEAR), 3, 12, 12)
    depthwise = ConvBlock(3, 3, kernel=5, groups=3, **LINEAR)
    separable = taken_apart(nn.Sequential(depthwise, ConvBlock(3, 256, kernel=1, **LINEAR)), 3, 12, 12)
    assert full.layers[0].output == separable.layers[1].output == [256, 8, 8]
    assert (full.total("multiplications"), separable.total("multiplications")) == (1_228_800, 53_952)


def test_sides_of_a_kernel_are_told_apart():
    (layer,) = taken_apart(nn.Conv2d(1, 1, (1, 7), stride=(1, 2)), 1, 16, 16).layers
    assert layer.field == [1, 7] and layer.stride == [1, 2]


# -- published networks


def test_vgg16_is_the_table_of_the_lecture_notes():
    """CS231n, "Convolutional Neural Networks": values of each map, and weights without biases."""
    found = classifier("vgg16")
    table = [(3_211_264, 1728), (3_211_264, 36_864), (802_816, 0), (1_605_632, 73_728), (1_605_632, 147_456)]
    table += [(401_408, 0), (802_816, 294_912), (802_816, 589_824), (802_816, 589_824), (200_704, 0)]
    table += [(401_408, 1_179_648), (401_408, 2_359_296), (401_408, 2_359_296), (100_352, 0)]
    table += [(100_352, 2_359_296)] * 3 + [(25_088, 0)]
    table += [(4096, 102_760_448), (4096, 16_777_216), (1000, 4_096_000)]
    rows = [layer for layer in found.layers if layer.kind != "AdaptiveAvgPool2d"]  # torchvision's; 7x7 to 7x7 here
    biases = [layer.output[0] if layer.parameters else 0 for layer in rows]
    assert [(row.map_bytes // 4, row.parameters - bias) for row, bias in zip(rows, biases, strict=True)] == table
    assert found.total("parameters") == 138_357_544 and sum(biases) == 13_416
    assert found.total("multiplications") == pytest.approx(15.5e9, rel=0.01)
    # The notes' total of 24 million values is more than their lines, with the input, add up to.
    assert sum(values for values, _ in table) + 224 * 224 * 3 == 15_237_608
    assert [row.field for row in rows[-5:]] == [[196, 196], [212, 212], None, None, None] and rows[-1].known


def test_alexnet():
    found = classifier("alexnet")
    assert sizes(found, "Conv2d", "MaxPool2d") == [55, 27, 27, 13, 13, 13, 13, 6]
    assert found.total("parameters") == pytest.approx(60e6, rel=0.02)


def test_googlenet_has_5_million_parameters_besides_classifier_and_auxiliary_heads():
    found = classifier("googlenet")
    classes = next(layer.parameters for layer in found.layers if layer.name == "fc")
    assert found.total("parameters") - classes == 5_599_904 and classes == 1024 * 1000 + 1000
    assert {name.partition(".")[0] for name in found.idle} == {"aux1", "aux2"} and sum(found.idle.values()) == 6_379_984
    assert sizes(found, "Inception") == [28] * 2 + [14] * 5 + [7] * 2
    assert found.total("multiplications") == pytest.approx(1.5e9, rel=0.01)  # as in table 1 of the paper


@pytest.mark.parametrize(("depth", "billions"), [(34, 3.6), (50, 3.8), (152, 11.3)])
def test_resnets_of_the_paper(depth, billions):
    """He et al. 2016, table 1. Halving is done by the first 1x1 convolution of a bottleneck there, not by the 3x3."""
    with torch.device("meta"):
        network = models.get_model(f"resnet{depth}", weights=None)
    for block in network.modules():
        if isinstance(block, models.resnet.Bottleneck):
            block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride
    assert taken_apart(network, 3, 224, 224).total("multiplications") / 1e9 == pytest.approx(billions, rel=0.02)


def test_lenet5_has_60_thousand_parameters():
    block, pool = partial(ConvBlock, kernel=5, norm=None, activation=nn.Tanh), nn.AvgPool2d(2)
    layers = [block(1, 6), pool, block(6, 16), pool, block(16, 120), nn.Flatten(), nn.Linear(120, 84), nn.Tanh()]
    found = taken_apart(nn.Sequential(*layers, nn.Linear(84, 10)), 1, 32, 32)
    assert sizes(found, "Conv2d", "AvgPool2d") == [28, 14, 10, 5, 1]
    assert [layer.parameters for layer in found.layers if layer.parameters] == [156, 2416, 48_120, 10_164, 850]
    assert found.total("parameters") == 61_706  # the paper's third layer reads fewer maps: 60,000
    c5 = next(layer for layer in found.layers if layer.output == [120, 1, 1])
    assert c5.field == [32, 32] and c5.stride == [4, 4]


def test_the_papers_unet_makes_388_pixels_of_572():
    network = build_model({"_target_": "seg.unet.UNet", "channels": 1, "padding": "valid"})
    found = taken_apart(network, 1, 572, 572)
    down = [570, 568, 284, 282, 280, 140, 138, 136, 68, 66, 64, 32, 30, 28]
    up = [56, 54, 52, 104, 102, 100, 200, 198, 196, 392, 390, 388, 388]
    assert sizes(found, "Conv2d", "MaxPool2d", "ConvTranspose2d") == down + up  # figure 1 of the paper
    assert found.total("parameters") == sum(p.numel() for p in network.parameters()) == 31_030_658


def test_dcgan_by_hand():
    g, d = (
        taken_apart(build_model({"_target_": f"gen.dcgan.{name}"}), *shape)
        for name, shape in (("Generator", (100,)), ("Discriminator", (3, 64, 64)))
    )
    inner = 16 * (64 * 128 * 16**2 + 128 * 256 * 8**2 + 256 * 512 * 4**2)
    assert (g.total("parameters"), d.total("parameters")) == (3_576_704, 2_765_568)
    assert g.total("multiplications") == 16 * 100 * 512 + inner + 16 * 64 * 3 * 32**2
    assert d.total("multiplications") == 16 * 3 * 64 * 32**2 + inner + 16 * 512
    assert all(layer.field is None and layer.known for layer in g.layers)  # every pixel sees all latents
    assert d.layers[-1].field == [94, 94] and d.layers[-1].stride == [16, 16]


# -- receptive fields


@pytest.mark.parametrize(
    ("up", "padding", "block"),
    [
        ("transposed", "same", "plain"),
        ("nearest", "same", "plain"),
        ("bilinear", "same", "plain"),
        ("bicubic", "same", "residual"),
        ("transposed", "valid", "plain"),
    ],
)
def test_receptive_fields_are_what_gradients_reach(up, padding, block):
    options = {"channels": 1, "classes": 1, "widths": [2, 2, 2], "up": up, "padding": padding, "block": block}
    network = build_model({"_target_": "seg.unet.UNet", **options}).double()
    network.pool = nn.AvgPool2d(2)  # which passes gradients on to all that a maximum could come from
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.uniform_(0.1, 1)
    size = 140
    x = torch.rand(1, 1, size, size, dtype=torch.double, requires_grad=True)
    row = network(x)[0, 0]
    reached = []
    for place in range(len(row) // 2, len(row) // 2 + 4):
        (gradient,) = torch.autograd.grad(row[place, place], x, retain_graph=True)
        lines = gradient[0, 0].abs().sum(1).nonzero()
        reached.append(int(lines[-1] - lines[0]) + 1)
    layer = taken_apart(network.float(), 1, size, size).layers[-1]
    assert layer.field == [max(reached)] * 2 and layer.stride == [1, 1]


class Mean(nn.Module):
    def forward(self, x):
        return x.mean()


class Gated(nn.Module):
    def __init__(self, gate):
        super().__init__()
        self.conv, self.gate = nn.Conv2d(4, 4, 3, padding=1), gate

    def forward(self, x):
        return self.conv(x) * self.gate(x)


@pytest.mark.parametrize(
    ("network", "field", "known"),
    [
        (Gated(nn.Identity()), [3, 3], True),
        (Gated(nn.AdaptiveAvgPool2d(1)), None, True),
        (Gated(Mean()), None, True),
        (Gated(nn.Softmax(1)), [3, 3], True),
        (Gated(nn.Conv2d(4, 4, 5, padding=2)), [5, 5], True),
        (nn.Sequential(nn.PixelShuffle(2), nn.Conv2d(1, 1, 3)), None, False),
        (nn.Sequential(nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 2)), None, True),
        (nn.Sequential(nn.ZeroPad2d(2), nn.Conv2d(4, 1, 3), nn.ReflectionPad2d(1)), [3, 3], True),
    ],
)
def test_what_sees_all_and_what_cannot_be_followed(network, field, known):
    last = taken_apart(network, 4, 8, 8).layers[-1]
    assert (last.field, last.known) == (field, known)


# -- what is counted


def test_weights_that_are_used_twice_count_once_and_multiply_twice():
    conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
    found = taken_apart(nn.Sequential(conv, nn.ReLU(inplace=True), conv), 4, 8, 8)
    assert [layer.parameters for layer in found.layers] == [144, 0]
    assert found.total("multiplications") == 2 * 144 * 64 and found.layers[1].field == [5, 5]


def test_parts_have_a_line_for_what_they_do_themselves():
    found = taken_apart(build_model({"_target_": "gen.resnet.Discriminator", "width": 8, "attention": 32}), 3, 64, 64)
    attention = next(layer for layer in found.layers if layer.kind == "SelfAttention")
    assert attention.parameters == 1 and attention.multiplications == 2 * 1024 * 1024 * 1  # width 8: one inner channel
    network = build_model({"_target_": "gen.resnet.Discriminator", "width": 8, "attention": 32})
    assert found.total("parameters") == sum(p.numel() for p in network.parameters()) and not found.idle


def test_the_network_is_left_alone():
    network = build_model({"_target_": "gen.dcgan.Discriminator", "width": 4, "norm": "spectral"})
    names = list(network.state_dict())
    taken_apart(network, 3, 64, 64)
    assert list(network.state_dict()) == names and network.training
    spectral = [layer for layer in network.modules() if parametrize.is_parametrized(layer)]
    assert spectral and all("weight" in vars(type(layer)) for layer in spectral)  # which classes of copies share


# -- the command


def run(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["inspect", *map(str, words)])
    try:
        command.main()
        code = 0
    except SystemExit as stop:
        code = stop.code
    told = capsys.readouterr()
    return code, told.out, told.err


def test_both_halves_of_a_gan_fit_on_a_screen(monkeypatch, capsys, tmp_path):
    code, out, _ = run(monkeypatch, capsys, "dcgan", "model.width=32", "--size", 128, "--json", tmp_path / "a.json")
    assert code == 0 and max(map(len, out.splitlines())) <= 100
    g, d = json.loads((tmp_path / "a.json").read_text())["networks"]
    assert g["class"] == "gen.dcgan.Generator" and g["input"] == [1, 100] and d["input"] == [1, 3, 128, 128]
    assert g["layers"][-1]["output"] == [3, 128, 128] and g["layers"][-1]["field"] == "all"
    assert d["layers"][0]["field"] == [4, 4] and d["layers"][0]["stride"] == [2, 2]
    assert f"parameters:      {g['parameters']:,}" in out and f"multiplications: {d['multiplications']:,}" in out


@pytest.mark.parametrize(
    ("words", "texts"),
    [
        (["unet"], ["input 1x3x572x572", "2x388x388"]),
        (["unet_small", "+model.network.classes=19", "--size", "100", "--batch", "2"], ["2x3x100x100", "19x100x100"]),
        (["torchvision:alexnet"], ["parameters:      61,100,840", "64x55x55"]),
        (["torchvision:googlenet"], ["took no part:    6,379,984 parameters of aux1, aux2"]),
    ],
)
def test_networks_by_name(monkeypatch, capsys, words, texts):
    code, out, _ = run(monkeypatch, capsys, *words)
    assert code == 0 and all(text in out for text in texts) and max(map(len, out.splitlines())) <= 100


def test_networks_of_timm(monkeypatch, capsys):
    pytest.importorskip("timm")
    code, out, _ = run(monkeypatch, capsys, "timm:resnet18")
    assert code == 0 and "parameters:      11,689,512" in out
    code, _, err = run(monkeypatch, capsys, "timm:resnet19")
    assert (
        code == 1 and err.startswith("error: unknown network 'resnet19': did you mean resnet") and err.count("\n") == 1
    )


def test_model_files(monkeypatch, capsys, tmp_path):
    generator = {"_target_": "gen.dcgan.Generator", "width": 4}
    save_model(tmp_path / "run" / "model.safetensors", build_model(generator), generator, {"images_seen": 1})
    unet = {"_target_": "seg.unet.UNet", "widths": [2, 4]}
    save_model(tmp_path / "unet.safetensors", build_model(unet), unet, {"image_size": 48})
    code, out, _ = run(monkeypatch, capsys, tmp_path / "run")
    assert code == 0 and "gen.dcgan.Generator" in out and "3x64x64" in out
    code, out, _ = run(monkeypatch, capsys, tmp_path / "unet.safetensors")
    assert code == 0 and "input 1x3x48x48" in out
    code, _, err = run(monkeypatch, capsys, tmp_path / "run", "--size", 32)
    assert code == 1 and err.startswith("error: --size 32 is for networks that take images")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["dcgn"], "error: dcgn is no model and no file: did you mean dcgan"),
        (["zzz"], "error: zzz is no model and no file: models are dcgan, "),
        (["torchvision:vgg17"], "error: torchvision has no classifier 'vgg17': did you mean vgg1"),
        ([__file__], "error: cannot read tests/test_inspect.py: "),
        (["dcgan", "model.widht=3"], "error: unknown key 'model.widht': did you mean 'model.width'?"),
        (["dcgan", "--size", "40"], "error: image_size=40 must be a power of two"),
        (["unet", "--size", "300"], ""),
        (["unet", "--size", "301"], "error: a picture side of 301 pixels does not fit this network"),
        (["dcgan", "--batch", "0"], "error: --batch must be at least 1"),
        (["torchvision:alexnet", "--size", "8"], "error: torchvision:alexnet does not take 3x8x8: "),
        (["torchvision:alexnet", "model.width=3"], "error: model.width=3 is for models of conf/model"),
    ],
)
def test_mistakes_get_one_line(monkeypatch, capsys, words, line):
    code, _, err = run(monkeypatch, capsys, *words)
    assert (code == 1 and err.count("\n") == 1 if line else code == 0) and err.startswith(line)


def test_without_timm_it_says_how_to_get_it(monkeypatch, capsys):
    find = backbone.importlib.util.find_spec
    monkeypatch.setattr(backbone.importlib.util, "find_spec", lambda name: None if name == "timm" else find(name))
    code, _, err = run(monkeypatch, capsys, "timm:resnet18")
    assert code == 1 and err == f"error: pretrained networks need timm: {backbone.INSTALL}\n"
