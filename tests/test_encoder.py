"""U-Nets and FCNs on pretrained networks: sizes, closed forms, what is trained and how fast, files, tiles."""

import sys
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_data import run, words
from test_seg_train import assert_equal, no_plots, outcome, stop_after  # noqa: F401 (a fixture)
from torch.nn import functional as F

from core.cli.config import compose
from core.cli.errors import Interrupted, UserError
from core.cli.files import read_json
from core.data.images import to_float
from core.nn import backbone
from core.nn.backbone import DEFAULT, Backbone
from core.nn.model_file import build_model, load_model, read_recipe
from core.training.checkpoint import Checkpoints
from core.training.loop import make_optimizer
from scripts import bench_encoder
from seg.encoder import EncoderUNet
from seg.fcn import FCN
from seg.loading import load_unet
from seg.tiling import segment
from seg.unet import UNet

RANDOM = {"weights": "none"}
KINDS = {"unet_encoder": EncoderUNet, "fcn": FCN}
NETWORKS = {}


def pictures(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def network(kind, channels, classes, frozen=False):
    """Made once: only forward passes follow."""
    if (kind, channels, classes) not in NETWORKS:
        model = KINDS[kind](channels, classes, RANDOM | {"name": "lcnet_035"})
        model.initialise(0)
        NETWORKS[kind, channels, classes] = model.eval()
    return NETWORKS[kind, channels, classes]


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(list(KINDS)), st.integers(1, 70), st.integers(1, 70), st.sampled_from([1, 3, 5]), st.integers(1, 3)
)
def test_any_size_channels_and_classes(kind, height, width, channels, classes):
    with torch.no_grad():
        logits = network(kind, channels, classes)(pictures(2, channels, height, width))
    assert logits.shape == (2, classes, height, width) and logits.isfinite().all()


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize(
    "name",
    ["torchvision:alexnet", "torchvision:googlenet", "vgg16", "inception_v3", "xception", "convnext_tiny", "dla34"],
)
def test_networks_of_every_design_fit(kind, name):
    with torch.device("meta"):
        model = KINDS[kind](3, 2, RANDOM | {"name": name}).eval()
        assert model(torch.zeros(1, 3, 150, 100)).shape == (1, 2, 150, 100)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_doublings_without_a_level_are_bilinear(count):
    model = EncoderUNet(3, 2, RANDOM | {"name": "lcnet_035"}, widths=[8] * count)
    model.initialise(0)
    taken = []
    model.eval().head.register_forward_hook(lambda module, inputs, output: taken.append(output))
    with torch.no_grad():
        found = model(pictures(1, 3, 96, 64))
    (logits,) = taken
    assert logits.shape[2:] == (96 * 2**count // 32, 64 * 2**count // 32)
    torch.testing.assert_close(found, F.interpolate(logits, (96, 64), mode="bilinear", align_corners=False))


@pytest.mark.parametrize(("finest", "steps"), [(32, [32]), (16, [2, 16]), (8, [2, 2, 8])])
def test_a_new_fcn_interpolates_its_coarsest_scores(finest, steps):
    model = FCN(3, 4, finest=finest)
    model.initialise(3)
    assert model.encoder.strides == tuple(s for s in (8, 16, 32) if s >= finest)
    x = pictures(1, 3, 128, 160)
    with torch.no_grad():
        logits = model.eval()(x)
        wanted = model.scores[-1](model.encoder(x)[-1])
        for step in steps:
            wanted = F.interpolate(wanted, scale_factor=step, mode="bilinear", align_corners=False)
    inside = slice(32, -32)  # transposed convolutions see zeros beyond the borders
    assert wanted.std() > 0.1
    torch.testing.assert_close(logits[:, :, inside, inside], wanted[:, :, inside, inside], rtol=1e-4, atol=1e-4)


def test_an_fcn_learns_from_all_its_maps():
    model = FCN(3, 4)
    model.initialise(0)
    F.cross_entropy(model(pictures(2, 3, 64, 64)), torch.zeros(2, 64, 64, dtype=torch.long)).backward()
    assert all(score.weight.grad.abs().sum() > 0 for score in model.scores)


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_seed_decides_all_but_pretrained_weights(kind):
    states, pretrained = [], Backbone().weights_sha256
    for seed in (0, 0, 1):
        model = KINDS[kind](3, 2)
        torch.manual_seed(len(states))
        model.initialise(seed)
        assert model.encoder.weights_sha256 == pretrained == backbone.state_sha256(model.encoder.network.state_dict())
        states.append(backbone.state_sha256(model.state_dict()))
    assert states[0] == states[1] != states[2]
    drawn = []
    for seed in (0, 0, 1):
        (model := KINDS[kind](3, 2, RANDOM)).initialise(seed)
        drawn.append(backbone.state_sha256(model.encoder.state_dict()))
    assert drawn[0] == drawn[1] != drawn[2]


OPTIMISERS = {
    "adam": {"_target_": "torch.optim.Adam", "_partial_": True, "lr": 0.01},
    "adamw": {"_target_": "torch.optim.AdamW", "_partial_": True, "lr": 0.01, "weight_decay": 0.1},
}


@pytest.mark.parametrize("optimiser", list(OPTIMISERS))
def test_a_factor_of_the_rate_makes_groups_of_the_encoder(optimiser):
    decay, lite = OPTIMISERS[optimiser].get("weight_decay", 0), {"name": "lcnet_035"} | RANDOM
    for encoder, factors in ((lite, {1.0}), (lite | {"lr_factor": 0.1}, {0.1, 1.0}), (lite | {"freeze": True}, {1.0})):
        model = EncoderUNet(3, 2, encoder)
        groups = make_optimizer(OPTIMISERS[optimiser], model).param_groups
        assert len(groups) == len(factors) * (2 if decay else 1)
        of = {id(value): group for group in groups for value in group["params"]}
        assert len(of) == sum(len(group["params"]) for group in groups)
        for name, value in model.named_parameters():
            factor = encoder.get("lr_factor", 1.0) if name.startswith("encoder.") else 1.0
            if encoder.get("freeze") and name.startswith("encoder."):
                assert id(value) not in of
            else:
                group = of[id(value)]
                assert (group["lr"], group.get("lr_factor", 1.0)) == (pytest.approx(0.01 * factor), factor)
                assert group["weight_decay"] == (decay if value.ndim > 1 else 0)


def test_a_plain_network_has_the_groups_that_it_always_had():
    model = UNet(widths=(4, 8), norm="batch")
    weights, others = ([v for v in model.parameters() if (v.ndim > 1) is wide] for wide in (True, False))
    expected = {"adam": [list(model.parameters())], "adamw": [weights, others]}
    for name, groups in expected.items():
        optimiser = make_optimizer(OPTIMISERS[name], model)
        assert [[id(v) for v in g["params"]] for g in optimiser.param_groups] == [[id(v) for v in g] for g in groups]
        assert not any("lr_factor" in group for group in optimiser.param_groups)


ENCODER = ["model=unet_encoder", "model.network.widths=[8,8]", "optim=adamw", "model.network.encoder.lr_factor=0.25"]
SHORT = ["total_images=16", "warmup=8", "batch_size=4", "log_every=4", "valid_every=8", "schedule=poly"]
TINY = ["model.network.encoder.name=lcnet_035", "model.network.encoder.weights=none"]


def train(discs, runs, *more):
    return run(discs, runs, *ENCODER, *SHORT, *more)


def test_rates_keep_their_factor_and_resumed_runs_end_bit_identical(discs, tmp_path, monkeypatch):
    seen, step = [], torch.optim.AdamW.step

    def noting(optimiser, *arguments, **options):
        seen.append({(group.get("lr_factor", 1.0), group["lr"]) for group in optimiser.param_groups})
        return step(optimiser, *arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", noting)
    straight = outcome(train(discs, tmp_path / "straight", *TINY))
    base = compose("seg", words(discs, tmp_path, *ENCODER)).optim.lr
    rises = [0.5, 1, 1, 1]
    rates = [base * rise * (1 - images / 16) ** 0.9 for rise, images in zip(rises, range(0, 16, 4), strict=True)]
    for found, rate in zip(seen, rates, strict=True):
        assert dict(found) == {1.0: pytest.approx(rate), 0.25: pytest.approx(rate / 4)}
    stop_after(monkeypatch, 2)
    with pytest.raises(Interrupted):
        train(discs, tmp_path / "stopped", *TINY)
    stop_after(monkeypatch, 0)
    assert_equal(outcome(train(discs, tmp_path / "stopped", *TINY)), straight)


@pytest.mark.parametrize("freeze", ["true", "false"])
def test_files_tell_of_the_weights_and_are_read_without_them(discs, tmp_path, monkeypatch, freeze):
    folder = train(discs, tmp_path, f"model.network.encoder.freeze={freeze}", "total_images=8")
    wanted = Backbone()
    monkeypatch.setattr(backbone, "package_file", None)
    recipe, info = read_recipe(folder.path)
    assert info["encoder_sha256"] == wanted.weights_sha256
    assert recipe["encoder"] == {"name": DEFAULT, "weights": "package", "freeze": freeze == "true", "lr_factor": 0.25}
    model, _ = load_model(folder.path)
    trained = backbone.state_sha256(model.encoder.network.state_dict())
    assert (trained == wanted.weights_sha256) is (freeze == "true")
    last = Checkpoints(folder.state).load_newest()["ema"]
    assert_equal(load_model(folder.path / "last.safetensors")[0].state_dict(), last)
    x = pictures(1, 3, 40, 33)
    with torch.no_grad():
        torch.testing.assert_close(load_unet(folder.path, torch.device("cpu"))[0](x), model(x), rtol=1e-4, atol=1e-4)


def smooth_picture(height, width):
    """In noise, what is far away would matter as much as what is near."""
    coarse = torch.rand(1, 3, height // 16, width // 16, generator=torch.Generator().manual_seed(0)) * 255
    smooth = F.interpolate(coarse, (height, width), mode="bicubic")[0]
    return smooth.clamp(0, 255).byte().permute(1, 2, 0).contiguous().numpy()


@pytest.mark.parametrize("kind", list(KINDS))
def test_tiles_give_what_the_whole_picture_gives_as_far_as_pixels_matter(kind):
    few = {"widths": [8, 8]} if kind == "unet_encoder" else {"finest": 32}
    model = KINDS[kind](3, 3, **few).eval()
    model.initialise(0)
    border, pixels = 384, smooth_picture(64, 96)
    around = to_float(torch.from_numpy(np.pad(pixels, [(border, border), (border, border), (0, 0)], "reflect"))[None])
    with torch.inference_mode():
        whole = model(around).softmax(1)[0, :, border:-border, border:-border]
    tiled = segment(model, pixels, 64, False, [0, 1, 2])
    assert whole.std() > 0.02
    assert (tiled - whole).abs().max() < 0.02
    model.margin = 32
    assert (segment(model, pixels, 64, False, [0, 1, 2]) - whole).abs().max() > 0.02  # as the pixels left out do matter
    fits = segment(model, pixels, 96, False, [0, 1, 2])
    with torch.inference_mode():
        assert torch.equal(fits, model(to_float(torch.from_numpy(pixels)[None])).softmax(1)[0])


@pytest.mark.parametrize(
    ("kind", "arguments", "line"),
    [
        ("unet_encoder", {"encoder": RANDOM | {"lr_factor": 0}}, "encoder.lr_factor=0 must be above 0; freeze=true"),
        ("unet_encoder", {"widths": [8] * 6}, "must hold 1 to 5 numbers: tf_efficientnet_lite0 halves pictures that"),
        ("unet_encoder", {"widths": []}, "must hold 1 to 5 numbers"),
        ("unet_encoder", {"widths": [8, 0]}, "widths=0 must be a whole number of at least 1"),
        ("unet_encoder", {"classes": 0}, "classes=0 must be a whole number"),
        ("unet_encoder", {"up": "cubic"}, "up='cubic' is unknown"),
        ("fcn", {"finest": 4}, "finest=4 must be 8, 16 or 32"),
        ("fcn", {"encoder": {"nam": "x"}}, "unexpected keyword argument 'nam'"),
        ("fcn", {"encoder": {"name": "resnet19"}}, "unknown network 'resnet19': did you mean resnet18"),
    ],
)
def test_arguments_out_of_range_are_named(kind, arguments, line):
    recipe = {"_target_": f"{KINDS[kind].__module__}.{KINDS[kind].__name__}", "encoder": RANDOM} | arguments
    with torch.device("meta"), pytest.raises(UserError) as error:
        build_model(recipe)
    assert line in str(error.value) and "\n" not in str(error.value)


@pytest.fixture
def compare(discs, monkeypatch):
    """Runs the comparison with `smp` in place of segmentation_models_pytorch."""

    def command(smp, *more):
        monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", smp)
        monkeypatch.setattr("sys.argv", ["bench_encoder", str(discs), "--seconds=0.01", *more])
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # restored afterwards
        monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
        bench_encoder.main()

    return command


def test_the_comparison_says_what_it_lacks(compare, capsys):
    with pytest.raises(SystemExit) as error:
        compare(None, "batch_size=2", *TINY)
    assert error.value.code == 1
    assert "pip install --no-deps segmentation_models_pytorch==0.6.0" in capsys.readouterr().err


def test_both_sides_of_the_comparison_train_alike(compare, monkeypatch, tmp_path):
    """With a network in place of theirs that has the same encoder."""

    class Theirs(torch.nn.Module):
        def __init__(self, name, encoder_weights, classes):
            super().__init__()
            assert (name, encoder_weights) == (f"tu-{DEFAULT}", None)
            self.encoder, self.head = torch.nn.Module(), torch.nn.Conv2d(3, classes, 1)
            self.encoder.model = Backbone(weights="none").network

        def initialize(self):
            torch.nn.init.zeros_(self.head.weight)

        def forward(self, x):
            assert x.shape[2] % 32 == x.shape[3] % 32 == 0
            return self.head(x)

    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", smp := SimpleNamespace(Unet=Theirs))
    model = bench_encoder.Reference(4)
    model.initialise(0)
    assert model(pictures(1, 3, 40, 33)).shape == (1, 4, 40, 33)
    assert backbone.state_sha256(model.network.encoder.model.state_dict()) == Backbone().weights_sha256
    paths = ["--out", str(tmp_path / "o"), "--json", str(tmp_path / "j")]
    compare(smp, "--images=8", *paths, "batch_size=4", "model.network.widths=[8]", *TINY)
    found = read_json(tmp_path / "j")
    ours = EncoderUNet(3, 4, RANDOM | {"name": "lcnet_035"}, widths=[8])
    assert found["ours: parameters"]["count"] == sum(value.numel() for value in ours.parameters())
    for what, precision in product(("training step", "prediction"), ("fp32", "bf16")):
        assert found[f"{what}, {precision}, images/s"]["smp"]["median"] > 0
    for side in ("ours", "smp"):
        assert found[f"{side}: trained"]["miou"] == read_json(tmp_path / "o" / side / "valid.json")["dataset"]["miou"]
        assert read_recipe(tmp_path / "o" / side)[1]["images_seen"] == 8
