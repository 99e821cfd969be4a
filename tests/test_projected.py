"""The discriminator in a frozen network's features, and what makes that network faster."""

import copy
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from test_train import no_plots, run  # noqa: F401 (a fixture)
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import is_parametrized

from core.cli.errors import UserError
from core.nn.backbone import Backbone, state_sha256, timm_network
from core.nn.ema import ExponentialAverage
from core.nn.model_file import load_model
from core.training.checkpoint import Checkpoints
from eval.features.extractors import RandomFeatures
from eval.metrics.frechet import Statistics, frechet_distance
from gen.latents import training_latents
from gen.losses import LOSSES, image_logits
from gen.projected import Discriminator, FrozenFeatures
from gen.resnet import Generator
from gen.steps import Batch, DiscriminatorWrapper, Objective, discriminator_step, generator_step


def noise(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(scope="module")
def judge():
    network = Discriminator(64, head_width=8, pixel_width=4)
    network.initialise(1)
    return network


# -- the frozen part


def test_nothing_frozen_changes_and_gradients_reach_g_through_it():
    d, g = Discriminator(64, head_width=8, pixel_width=0), Generator(64, 8, 2)
    d.initialise(1)
    g.initialise(0)
    frozen = copy.deepcopy(d.frozen.module.state_dict())
    heads, before = copy.deepcopy(d.state_dict()), copy.deepcopy(g.state_dict())
    optimisers = [torch.optim.Adam(network.parameters(), 0.01) for network in (g, d)]
    wrapped, objective = DiscriminatorWrapper(d.train(), bf16=False), Objective(LOSSES["hinge"])
    for start in (0, 4):
        batch = Batch(noise(4, 3, 64, 64, seed=start), training_latents(0, start, 4, 8))
        discriminator_step(wrapped, optimisers[1], [batch], [g(batch.z)], objective)
        generator_step(g, wrapped, optimisers[0], [batch], None, objective)
    for name, value in d.frozen.module.state_dict().items():
        assert torch.equal(value, frozen[name]), name
    assert not any(p.requires_grad or p.grad is not None for p in d.frozen.module.parameters())
    assert not any(module.training for module in d.frozen.module.modules())
    for network, old in ((d, heads), (g, before)):
        for name, p in network.named_parameters():
            assert not torch.equal(p, old[name]) or "weight" not in name, name


def test_the_frozen_part_belongs_to_no_state_parameter_or_copy(judge):
    assert {name.split(".")[0] for name in judge.state_dict()} == {
        "backbone_sha256",
        "scale",
        "passes",
        "heads",
        "pixels",
    }
    owned = {id(p) for p in judge.parameters()}
    assert not owned & {id(p) for p in judge.frozen.module.parameters()}
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in judge.modules())
    assert copy.deepcopy(judge).frozen.module is judge.frozen.module
    assert all(is_parametrized(m) for m in judge.modules() if isinstance(m, nn.Conv2d))


def test_it_moves_along_with_the_heads():
    judge = Discriminator(64, head_width=2, pixel_width=0, weights="none").double()
    assert {p.dtype for p in judge.frozen.module.parameters()} == {torch.float64}
    assert judge(noise(2, 3, 64, 64).double()).dtype == torch.float64


def test_projections_mix_channels_then_scales_from_coarse_to_fine():
    torch.manual_seed(0)
    parts = {kind: FrozenFeatures(Backbone(), 64, kind) for kind in ("none", "channels", "scales")}
    scales = parts["scales"]
    parts["channels"].load_state_dict(scales.state_dict(), strict=False)
    x = noise(2, 3, 64, 64)
    raw, mixed, projected = (parts[kind](x) for kind in ("none", "channels", "scales"))
    assert [tuple(found.shape[1:]) for found in projected] == [(24, 16, 16), (40, 8, 8), (112, 4, 4), (320, 2, 2)]
    for conv, before, after in zip(scales.channels, raw, mixed, strict=True):
        torch.testing.assert_close(after, torch.einsum("oc,nchw->nohw", conv.weight[:, :, 0, 0], before))
    expected = mixed[3]
    for place in (2, 1, 0):
        larger = F.interpolate(expected, scale_factor=2, mode="bilinear")
        expected = mixed[place] + F.conv2d(larger, scales.scales[place].weight, padding=1)
        torch.testing.assert_close(projected[place], expected, rtol=1e-4, atol=1e-3)


def test_projections_and_scales_follow_from_the_seed(judge):
    again, other = (Discriminator(64, head_width=8, pixel_width=4) for _ in range(2))
    again.initialise(1)
    other.initialise(2)
    x = noise(2, 3, 64, 64)
    same, another, own = (network.eval()(x) for network in (again, other, copy.deepcopy(judge)))
    assert torch.equal(same, own) and not torch.equal(another, own)
    assert torch.equal(again.scale, judge.scale) and not torch.equal(other.scale, judge.scale)


def test_maps_of_photographs_have_about_unit_size(judge):
    """Scaled by random pictures; of photographs the second moment is within a factor of 4."""
    folder = Path(importlib.util.find_spec("sklearn").origin).parent / "datasets" / "images"
    with Image.open(folder / "china.jpg") as photo:
        boxes = [(left, top, left + 256, top + 256) for top in (0, 150) for left in (0, 200, 380)]
        windows = np.stack([np.asarray(photo.resize((64, 64), Image.Resampling.BICUBIC, box)) for box in boxes])
    maps = judge.frozen.module(torch.from_numpy(windows).permute(0, 3, 1, 2) / 127.5 - 1)
    for found, scale in zip(maps, judge.scale, strict=True):
        assert 0.25 < (found * scale).square().mean() < 4


def test_images_are_resized_to_the_resolution():
    judge = Discriminator(32, resolution=96, strides=[8, 16], head_width=2, pixel_width=0, projections="none")
    seen = []
    judge.frozen.module.backbone.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    x = noise(1, 3, 32, 32)
    first, second = judge.eval().forward_all(x)
    assert torch.equal(seen[0], F.interpolate(x, (96, 96), mode="bilinear"))
    assert first.shape == (1, 3, 3) and second.shape == (1, 3, 3)  # 12 and 6 pixels, halved until they are at most 4


def test_in_training_the_view_of_the_frozen_network_moves_all_ways_alike():
    judge = Discriminator(32, resolution=32, strides=[8], head_width=2, projections="none", pixel_width=2, jitter=1)
    seen, ways = [], []
    judge.frozen.module.backbone.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    x = noise(2, 3, 32, 32)
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)), mode="reflect")
    windows = {way: padded[:, :, way[0] : way[0] + 32, way[1] : way[1] + 32] for way in np.ndindex(3, 3)}
    with torch.no_grad():
        for _ in range(90):
            judge.forward_all(x)
            ways += [way for way, window in windows.items() if np.array_equal(seen[-1].numpy(), window)]
    assert len(ways) == 90 and all(7 <= ways.count(way) <= 13 for way in windows)
    assert {ways[k] for k in range(0, 90, 3)} == set(windows)  # those of the reals, in steps of three passes
    judge.eval().forward_all(x)
    assert torch.equal(seen[-1], x) and judge.passes == 90


def test_the_gain_is_of_the_gradient_of_the_pixels_alone(judge):
    network, x = copy.deepcopy(judge).eval(), noise(2, 3, 64, 64).requires_grad_()
    logits, slopes = {}, {}
    for gain in (1.0, 10.0):
        network.pixel_gain = gain
        logits[gain] = network.forward_all(x)
        slopes[gain] = [torch.autograd.grad(found.sum(), x, retain_graph=True)[0] for found in logits[gain]]
    assert all(map(torch.equal, logits[1], logits[10]))
    assert all(map(torch.equal, slopes[1][:-1], slopes[10][:-1]))
    torch.testing.assert_close(slopes[10][-1], 10 * slopes[1][-1])


# -- heads and losses


def test_the_loss_is_the_sum_over_the_heads_and_the_pixels(judge):
    network = copy.deepcopy(judge).eval()  # in eval mode spectral norm stays as it is
    real, fake = noise(4, 3, 64, 64, seed=1), noise(4, 3, 64, 64, seed=2)
    answers = [network.forward_all(images) for images in (real, fake)]
    assert [tuple(logits.shape) for logits in answers[0]] == [(4, 4, 4)] * 3 + [(4, 2, 2), (4,)]
    assert torch.equal(answers[0][-1], network.pixels(real))
    expected = sum(F.relu(1 - r).mean() + F.relu(1 + f).mean() for r, f in zip(*answers, strict=True))
    wrapped, frozen = DiscriminatorWrapper(network, bf16=False), torch.optim.SGD(network.parameters(), 0.0)
    row = discriminator_step(wrapped, frozen, [Batch(real, torch.empty(0))], [fake], Objective(LOSSES["hinge"]))
    assert row["d_loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    # Statistics weigh each head equally, however many places it has.
    mean = sum(logits.mean() for logits in answers[0]) / 5
    assert row["d_real"].item() == pytest.approx(mean.item(), rel=1e-4, abs=1e-6)
    assert torch.allclose(network(real), image_logits(answers[0]))


def test_the_coarse_discriminator_sees_what_is_left_at_16_pixels_and_how_much_the_batch_differs():
    network = Discriminator(64, head_width=4, pixel_width=4, coarse_width=4, projections="none")
    network.initialise(0)
    network.eval()  # spectral norm stays as it is
    checks = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).tile(32, 32)
    images = torch.cat([noise(1, 3, 64, 64), torch.linspace(-1, 1, 3)[:, None, None, None].expand(3, 3, 64, 64)])
    batches = images, images + checks, images[:1].expand(4, -1, -1, -1)
    before, finer, alike = (network.forward_all(batch)[-2] for batch in batches)
    assert before.shape == (4,)
    assert torch.allclose(before, finer, atol=1e-5), "patterns of two pixels vanish"
    assert torch.allclose(alike, alike[:1].expand(4)) and abs(alike[0] - before[0]) > 1e-5
    x = images.clone().requires_grad_()
    (slope,) = torch.autograd.grad(network.forward_all(x)[-2].sum(), x)
    assert torch.allclose(slope, F.interpolate(F.avg_pool2d(slope, 4), scale_factor=4), atol=1e-7)
    assert slope.abs().sum() > 0 and all(is_parametrized(m) for m in network.coarse if hasattr(m, "weight"))


def test_r1_is_the_gradient_of_the_mean_logit_through_the_frozen_network(judge):
    network = copy.deepcopy(judge).eval()
    real, fake = noise(2, 3, 64, 64, seed=1), noise(2, 3, 64, 64, seed=2)
    leaf = real.clone().requires_grad_()
    (slope,) = torch.autograd.grad(network(leaf).sum(), leaf)
    wrapped, optimizer = DiscriminatorWrapper(network, bf16=False), torch.optim.SGD(network.parameters(), 0.0)
    objective = Objective(LOSSES["relativistic"], {"r1": 1.0})
    row = discriminator_step(wrapped, optimizer, [Batch(real, torch.empty(0))], [fake], objective)
    assert row["r1"].item() == pytest.approx(slope.square().sum().item() / 2, rel=1e-4)


def test_the_deviation_over_the_batch_is_one_more_channel():
    network = Discriminator(64, head_width=4, pixel_width=0, minibatch_deviation=True, projections="none")
    network.initialise(0)
    layer = next(m for m in network.modules() if type(m).__name__ == "_MinibatchDeviation")
    x = noise(5, 4, 3, 3)
    y = layer(x)
    assert torch.equal(y[:, :4], x)
    expected = np.std(x.numpy(), axis=0).mean()
    assert torch.allclose(y[:, 4], torch.full((5, 3, 3), float(expected)), rtol=1e-4)
    one, two = noise(1, 3, 64, 64, seed=1), noise(1, 3, 64, 64, seed=2)
    network.eval()
    assert not torch.allclose(network(torch.cat([one, one])), network(torch.cat([one, two]))[0])


# -- the run


def test_a_checkpoint_holds_no_frozen_weights_and_refuses_others(prepared, tmp_path):
    file = tmp_path / "weights.safetensors"
    one, other = (timm_network("mobilenetv3_small_050", "none").state_dict() for _ in range(2))
    save_file(one, file)
    settings = {
        "model": "projected",
        "model.discriminator.backbone": "mobilenetv3_small_050",
        "model.discriminator.weights": file,
        "model.discriminator.head_width": 4,
        "model.discriminator.pixel_width": 0,
    }
    folder = run(prepared, tmp_path, total_images=8, **settings)
    saved = Checkpoints(folder.state).load_newest()["discriminator"]
    assert sum(value.numel() for value in saved.values()) < 100_000
    digest = state_sha256(Backbone("mobilenetv3_small_050", str(file)).network.state_dict())
    assert bytes(saved["backbone_sha256"].tolist()).hex() == digest
    assert load_model(folder.path)[1]["judged_by"] == {"network": "mobilenetv3_small_050", "sha256": digest}
    save_file(other, file)
    with pytest.raises(UserError, match="weights of mobilenetv3_small_050 are not those that this run began with"):
        run(prepared, tmp_path, total_images=16, **settings)


def blobs(seed, count):
    """Pictures (count, 3, 32, 32): an orange or a blue disc somewhere on grey."""
    rng, place = np.random.default_rng(seed), np.arange(32)
    down, right = rng.uniform(10, 22, (2, count, 1, 1))
    inside = (place[:, None] - down) ** 2 + (place - right) ** 2 < 64
    colour = np.array([[1, 0.2, -0.8], [-0.8, 0, 0.9]])[rng.integers(0, 2, count)]
    return torch.from_numpy(np.where(inside[:, None], colour[:, :, None, None], 0.0)).float()


@pytest.mark.slow
def test_a_gan_learns_discs_of_two_colours():
    """For comparison: grey pictures score 6.1, noise 5.2, discs of one colour 4.1, others of both 0.04."""
    features = RandomFeatures(torch.device("cpu"))

    def statistics(images):
        return Statistics.of(features(((images + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()))

    d = Discriminator(32, resolution=32, strides=[4, 8, 16], head_width=16, pixel_width=8)
    g, real, z = Generator(32, 16, 8), statistics(blobs(1, 400)), training_latents(1, 0, 400, 16)
    d.initialise(1)
    g.initialise(0)
    average = ExponentialAverage(g, 200)
    of_g, of_d = (torch.optim.Adam(network.parameters(), lr, (0.0, 0.99)) for network, lr in ((g, 2e-3), (d, 1e-3)))
    wrapped, objective, scores = DiscriminatorWrapper(d, bf16=False), Objective(LOSSES["hinge"]), []
    for step in range(101):
        if step in (0, 100):
            with torch.no_grad():
                scores.append(frechet_distance(statistics(average.model(z)), real))
        batch = Batch(blobs(1000 + step, 8), training_latents(0, step, 8, 16))
        fake = g(batch.z)
        discriminator_step(wrapped, of_d, [batch], [fake], objective)
        generator_step(g, wrapped, of_g, [batch], [fake], objective)
        average.update(g, 8 * step, 8)
    assert scores[0] > 50 and scores[1] < 3.5, scores


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"projections": "all"}, "projections='all' is unknown: use one of none, channels, scales"),
        ({"head_width": 0}, "head_width=0 must be"),
        ({"resolution": 0}, "resolution=0 must be"),
        ({"coarse_width": -1}, "coarse_width=-1 must be"),
        ({"jitter": 64}, "jitter=64 must be a whole number from 0 to 63"),
        ({"jitter": 4.0}, "jitter=4.0 must be"),
        ({"pixel_gain": 0.0}, "pixel_gain=0.0 must be above 0"),
        ({"backbone": "efficientnet_lite9"}, "unknown network 'efficientnet_lite9'"),
    ],
)
def test_arguments_out_of_range(settings, text):
    with pytest.raises(UserError, match=text):
        Discriminator(**settings)
