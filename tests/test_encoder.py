"""U-Nets and FCNs on pretrained networks: sizes, closed forms, what is trained and how fast, files, tiles."""

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_data import SMALL, run, words
from test_seg_train import assert_equal, no_plots, outcome, stop_after  # noqa: F401 (a fixture)
from torch.nn import functional as F

from core.cli.config import compose, typed
from core.cli.errors import Interrupted, UserError
from core.data.images import to_float
from core.nn import backbone
from core.nn.backbone import DEFAULT, Backbone
from core.nn.fuse import fold_batch_norm
from core.nn.model_file import load_model, read_recipe
from core.training.checkpoint import Checkpoints
from core.training.loop import make_optimizer
from seg.encoder import EncoderUNet
from seg.fcn import FCN
from seg.loading import load_unet
from seg.settings import TrainConfig
from seg.tiling import segment
from seg.train import run_training
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
SHORT = ["total_images=20", "warmup=8", "batch_size=4", "log_every=4", "valid_every=8", "schedule=poly"]
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
    rises = [0.5, 1, 1, 1, 1]
    rates = [base * rise * (1 - images / 20) ** 0.9 for rise, images in zip(rises, range(0, 20, 4), strict=True)]
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


def picture(height, width):
    """A smooth picture: in noise, what is far away matters as much as what is near."""
    coarse = np.random.default_rng(0).integers(0, 256, (3, height // 16, width // 16), np.uint8)
    smooth = F.interpolate(torch.from_numpy(coarse)[None].float(), (height, width), mode="bicubic")[0]
    return smooth.clamp(0, 255).byte().permute(1, 2, 0).contiguous().numpy()
