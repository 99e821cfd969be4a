"""Training with every loss, regulariser and aid: against plain loops, interrupted, on two ranks."""

import math

import numpy as np
import pytest
import torch
from test_train import assert_equal, launch, no_plots, outcome, overrides, run  # noqa: F401 (a fixture)
from torch import nn
from torch.nn import functional as F

from core.cli.config import compose, typed
from core.nn.model_file import build_model, load_model
from core.training.checkpoint import Checkpoints
from core.training.rundir import RunFolder
from gen import dcgan, train, trainer, unetgan
from gen.augment import DRAWS, GATES, AdaptiveProbability
from gen.latents import training_latents
from gen.losses import LOSSES
from gen.monitor import PATIENCE, CollapseMonitor
from gen.sample import generate
from gen.settings import Schedule, TrainConfig
from gen.steps import Batch, DiscriminatorWrapper, Objective, discriminator_loss, discriminator_step, generator_loss

R3 = {
    "model": "r3gan",
    "loss": "relativistic",
    "regularize.r1": 1.0,
    "regularize.r2": 0.5,
    "optim.betas": "[0.0,0.99]",
}
PRESETS = {
    "dcgan": {"loss": "least_squares", "accumulate": 2},
    "dcgan_plus": {"loss": "hinge", "n_critic": 2, "diffaug.p": 0.5},
    "resnet": {"loss": "hinge", "d_lr_factor": 2.0, "model.attention": 16},
    "r3gan": R3 | {"diffaug.p": "adaptive", "diffaug.ada_images": 100, "diffaug.ada_target": 0.0},
    "unetgan": {"loss": "hinge", "regularize.cutmix": 1.0},
    "projected": {
        "loss": "hinge",
        "model.discriminator.resolution": 32,
        "model.discriminator.head_width": 8,
        "model.discriminator.pixel_width": 4,
        "optim.betas": "[0.0,0.99]",
    },
    "wasserstein": {"model": "r3gan", "loss": "wasserstein", "regularize.gradient_penalty": 10.0, "n_critic": 3},
}


def preset(name, **more):
    return {"model": name} | PRESETS[name] | more


def state_of(folder):
    return Checkpoints(folder.state).load_newest()


# -- presets


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", PRESETS)
def test_presets_step_resume_bit_by_bit_and_sample_from_their_file(prepared, tmp_path, name, precision):
    settings = preset(name, mixed_precision=precision)
    straight = run(prepared, tmp_path / "straight", total_images=40, **settings)
    for images in (16, 40):
        stopped = run(prepared, tmp_path / "stopped", total_images=images, **settings)
    assert_equal(outcome(stopped), outcome(straight))
    start = networks(configured(prepared, tmp_path, **settings))
    for part, net in zip(("generator", "discriminator"), start, strict=True):
        after = state_of(straight)[part]
        assert any(not torch.equal(value, after[key]) for key, value in net.named_parameters())
    pixels = generate(straight.path / "model.safetensors", range(3), device="cpu")
    assert pixels.shape == (3, 32, 32, 3) and pixels.std() > 0


def test_statistics_are_those_in_use(prepared, tmp_path):
    (row,) = run(prepared, tmp_path / "m", total_images=24, **preset("r3gan")).read_stats()
    assert row["r1"] > 0 and row["r2"] > 0 and 0 <= row["augment_p"] < 1
    (row,) = run(prepared, tmp_path / "w", total_images=24, **preset("wasserstein")).read_stats()
    assert row["gradient_penalty"] > 0 and not {"r1", "r2", "augment_p", "cutmix"} & row.keys()
    (row,) = run(prepared, tmp_path / "d", total_images=24).read_stats()
    assert {*row} == {"images", "d_loss", "g_loss", "d_real", "d_fake", "d_accuracy", "images_per_s"}


# -- against plain loops


def networks(config):
    """G and D at their start, and their optimisers."""
    nets = [build_model(config.model[key]) for key in ("generator", "discriminator")]
    for offset, net in enumerate(nets):
        net.initialise(2 * config.seed + offset)
    return nets


def real_batch(prepared, config, start):
    """Rows and mirrors as the data order has them, by hand."""
    faces = np.load(prepared / "images.npy")
    pictures = []
    for place in range(start, start + config.batch_size):
        epoch, offset = divmod(place, len(faces))
        rng = np.random.default_rng([config.seed, epoch])
        order = rng.permutation(len(faces))
        picture = faces[order[offset]]
        pictures.append(picture[:, ::-1] if (rng.random(len(faces)) < 0.5)[offset] else picture)
    return torch.from_numpy(np.stack(pictures).transpose(0, 3, 1, 2).copy()).float() / 127.5 - 1


def configured(prepared, runs, **settings):
    return typed(compose("gen", overrides(prepared, runs, **settings)), TrainConfig)


def test_default_settings_are_the_plain_dcgan_loop(prepared, tmp_path):
    config = configured(prepared, tmp_path, total_images=48)
    state = state_of(train.run_training(config))
    g, d = networks(config)
    g_optimizer, d_optimizer = (torch.optim.Adam(net.parameters(), 2e-4, (0.5, 0.999)) for net in (g, d))
    for start in range(0, 48, 8):
        fake = g(training_latents(0, start, 8, 100))
        d_loss = F.softplus(-d(real_batch(prepared, config, start))).mean() + F.softplus(d(fake.detach())).mean()
        d_optimizer.zero_grad()
        d_loss.backward()
        d_optimizer.step()
        g_optimizer.zero_grad()
        F.softplus(-d(fake)).mean().backward()
        g_optimizer.step()
    for part, net in (("generator", g), ("discriminator", d)):
        for name, value in net.state_dict().items():
            assert torch.allclose(value, state[part][name], atol=1e-6), (part, name)


def test_relativistic_game_with_r1_r2_schedules_and_two_steps_of_d_by_hand(prepared, tmp_path):
    schedules = {
        "regularize.schedule.end": 0.5,
        "regularize.schedule.over": 64,
        "lr_schedule.end": 0.25,
        "lr_schedule.over": 32,
    }
    settings = R3 | schedules | {"optim": "sgd", "optim.lr": 0.01, "n_critic": 2, "d_lr_factor": 3.0}
    del settings["optim.betas"]
    config = configured(prepared, tmp_path, total_images=48, **settings)
    state = state_of(train.run_training(config))
    g, d = networks(config)
    g_optimizer, d_optimizer = (torch.optim.SGD(net.parameters(), 1.0, 0.99) for net in (g, d))
    for before in range(0, 48, 16):
        rate = 0.01 * (0.25 + 0.75 * 0.5 * (1 + math.cos(math.pi * min(1, before / 32))))
        g_optimizer.param_groups[0]["lr"], d_optimizer.param_groups[0]["lr"] = rate, 3 * rate
        for start in (before, before + 8):
            real = real_batch(prepared, config, start).requires_grad_()
            fake = g(training_latents(0, start, 8, 64))
            shown = fake.detach().requires_grad_()
            real_logits, fake_logits = d(real), d(shown)
            slopes = [
                torch.autograd.grad(logits.sum(), x, create_graph=True)[0].square().sum() / 8
                for logits, x in ((real_logits, real), (fake_logits, shown))
            ]
            weight = 0.5 + 0.5 * 0.5 * (1 + math.cos(math.pi * start / 64))
            loss = F.softplus(fake_logits - real_logits).mean()
            d_optimizer.zero_grad()
            (loss + weight * (1.0 / 2 * slopes[0] + 0.5 / 2 * slopes[1])).backward()
            d_optimizer.step()
        g_optimizer.zero_grad()
        F.softplus(d(real) - d(fake)).mean().backward()
        g_optimizer.step()
    for part, net in (("generator", g), ("discriminator", d)):
        for name, value in net.state_dict().items():
            assert torch.allclose(value, state[part][name], atol=1e-5, rtol=1e-4), (part, name)


def test_parts_of_a_batch_add_up_to_it(prepared, tmp_path):
    settings = R3 | {"optim": "sgd", "optim.lr": 0.01, "diffaug.p": 0.7, "total_images": 24}
    del settings["optim.betas"]
    whole, parts = (run(prepared, tmp_path / str(k), accumulate=k, **settings) for k in (1, 4))
    states = state_of(whole), state_of(parts)
    for part in ("generator", "discriminator", "ema"):
        for name, value in states[0][part].items():
            assert torch.allclose(value, states[1][part][name], atol=1e-5), (part, name)
    for a, b in zip(outcome(whole)[1], outcome(parts)[1], strict=True):
        assert a == pytest.approx(b, rel=1e-3)


# -- steps


NO_LATENTS = torch.empty(0)


class Linear(nn.Module):
    """Logits <weight, x>."""

    judges_pixels = False

    def __init__(self, size=8):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, size, size, generator=torch.Generator().manual_seed(0)))

    def forward(self, x):
        return (self.weight * x).flatten(1).sum(1)


def test_penalties_are_of_the_images_before_their_augmentation():
    network = Linear()
    weight = network.weight.detach().clone()
    draws = torch.full((2, DRAWS), 0.9)
    draws[:, GATES.index("cutout")] = 0.1
    draws[:, -2:] = 0.5  # the corner of the square: rows and columns 2 to 5
    objective = Objective(penalties={"r1": 0.5, "r2": 2.0}, augment_p=0.5)
    real, fake = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8)
    batch = Batch(real, NO_LATENTS, {"real": draws, "fake": draws[:, [0] * DRAWS]})
    optimizer = torch.optim.SGD(network.parameters(), 0.0)
    result = discriminator_step(DiscriminatorWrapper(network, False), optimizer, [batch], [fake], objective)
    seen = weight.clone()
    seen[:, 2:6, 2:6] = 0
    assert result["r1"].item() == pytest.approx(seen.square().sum().item(), rel=1e-5)
    assert result["r2"].item() == pytest.approx(weight.square().sum().item(), rel=1e-5)  # 0.9 is no change at all


def test_d_is_told_the_right_images_and_penalties_change_its_step():
    real, fake = torch.rand(4, 3, 8, 8), torch.rand(4, 3, 8, 8)
    gradients = []
    for weights in ({}, {"r1": 0.3}):
        network = Linear()
        optimizer = torch.optim.SGD(network.parameters(), 1.0)
        wrapped = DiscriminatorWrapper(network, False)
        discriminator_step(wrapped, optimizer, [Batch(real, NO_LATENTS)], [fake], Objective(penalties=weights))
        gradients.append(Linear().weight - network.weight)
    # The gradient of ||w||^2 is 2 w.
    assert torch.allclose(gradients[1] - gradients[0], 0.3 * 2 * Linear().weight, atol=1e-5)


def test_g_learns_through_the_augmentation_of_its_own_draws():
    network, leaf = Linear(), torch.rand(2, 3, 8, 8, requires_grad=True)
    draws = torch.full((2, DRAWS), 0.9)
    draws[:, GATES.index("cutout")] = 0.1
    draws[:, -2:] = 0.5
    objective, batch = Objective(LOSSES["hinge"], augment_p=0.5), Batch(leaf, NO_LATENTS, {"generator": draws})
    # D is linear, so that the gradient that this loss leaves in the images is their place in its weights.
    generator_loss(DiscriminatorWrapper(network.requires_grad_(False), False), batch, leaf, objective).backward()
    assert not leaf.grad[:, :, 2:6, 2:6].any() and leaf.grad[:, :, :2].all()
    assert network.weight.grad is None


def test_the_u_net_is_trained_on_images_pixels_and_cutmix():
    network = unetgan.Discriminator(32, 4)
    network.initialise(0)
    real, fake = torch.rand(2, 3, 32, 32), -torch.rand(2, 3, 32, 32)
    masks = unetgan.cutmix_masks(0, 0, 2, 32)
    judge = DiscriminatorWrapper(network.eval(), bf16=False)  # in eval mode spectral norm stays as it is
    optimizer = torch.optim.SGD(network.parameters(), 0.0)
    batch, objective = Batch(real, NO_LATENTS, draws={"cutmix": masks}), Objective(LOSSES["hinge"], {"cutmix": 1.0})
    discriminator_loss(judge, batch, fake, objective)[0].backward()
    # Biases of the heads shift real and fake alike, and within the margins of the hinge that cancels.
    assert all(p.grad.any() for p in network.parameters() if p.ndim > 1)
    result = discriminator_step(judge, optimizer, [batch], [fake], objective)
    (a, pixels_a), (b, pixels_b) = network.forward_all(real), network.forward_all(fake)
    hinge = [F.relu(1 - r).mean() + F.relu(1 + f).mean() for r, f in ((a, b), (pixels_a, pixels_b))]
    assert result["d_loss"].item() == pytest.approx(sum(hinge).item(), rel=1e-5)
    mixed = network.forward_all(torch.where(masks > 0, real, fake))[1]
    expected = F.mse_loss(mixed, torch.where(masks[:, 0] > 0, pixels_a, pixels_b))
    assert result["cutmix"].item() == pytest.approx(expected.item(), rel=1e-4)
    loss = generator_loss(judge, batch, fake, Objective(LOSSES["hinge"]))
    assert loss.item() == pytest.approx(-(b.mean() + pixels_b.mean()).item(), rel=1e-5)


@pytest.mark.parametrize("penalised", [False, True])
def test_a_penalised_d_steps_in_float32_and_judges_for_g_in_bf16(prepared, tmp_path, monkeypatch, penalised):
    seen = []

    def build(recipe):
        network = original(recipe)
        if "Discriminator" in recipe["_target_"]:
            network.layers[0][0].register_forward_hook(lambda _, __, output: seen.append(output.dtype))
        return network

    original = trainer.build_model
    monkeypatch.setattr(trainer, "build_model", build)
    settings = {"loss": "relativistic", "model": "r3gan", "regularize.r2": 1.0 if penalised else 0.0}
    run(prepared, tmp_path, mixed_precision="bf16", total_images=8, **settings)
    own = torch.float32 if penalised else torch.bfloat16
    # D is tried before training; then its step: real, fake; G's: fake, and its real partners
    assert seen == [torch.float32, own, own, torch.bfloat16, torch.bfloat16]


def test_the_probability_of_augmentation_follows_ds_answers_to_reals(prepared, tmp_path, monkeypatch):
    seen, real_step = [], trainer.discriminator_step

    def watched(network, optimizer, batches, fakes, objective, *rest):
        result = real_step(network, optimizer, batches, fakes, objective, *rest)
        seen.append((objective.augment_p, result["d_sign"]))
        return result

    monkeypatch.setattr(trainer, "discriminator_step", watched)
    settings = {"diffaug.p": "adaptive", "diffaug.ada_images": 400, "diffaug.ada_target": 0.1}
    folder = run(prepared, tmp_path, total_images=120, **settings)
    controller = AdaptiveProbability(0.1, 400)
    for p, sign in seen:
        assert p == controller.p
        controller.update(sign, 8)
    assert state_of(folder)["augmentation"] == controller.state_dict() and controller.p > 0
    rows = [row["augment_p"] for row in folder.read_stats()]
    assert rows == pytest.approx([np.mean([p for p, _ in seen[k : k + 3]]) for k in range(0, 15, 3)])


# -- schedules, monitor


def test_half_a_cosine():
    assert Schedule(0.25, 0).factor(10**9) == 1
    assert [Schedule(0.2, 100).factor(n) for n in (0, 50, 100, 10**6)] == pytest.approx([1, 0.6, 0.2, 0.2])
    assert Schedule(3.0, 100).factor(25) == pytest.approx(1 + 2 * (1 - math.cos(math.pi / 4)) / 2)


@pytest.mark.parametrize("loss, wins, chance", [("hinge", 1, 0), ("wasserstein", 0, 0), ("non_saturating", 1, 1)])
def test_signs_of_collapse_that_mean_nothing_under_a_loss_are_not_told(loss, wins, chance):
    for means, expected in (
        ({"d_accuracy": 1.0, "d_loss": 0.01}, wins),
        ({"d_accuracy": 0.5, "d_loss": math.log(4)}, chance),
    ):
        monitor = CollapseMonitor(loss)
        assert len(monitor.check(0, means) + monitor.check(PATIENCE, means)) == expected


# -- several processes


@pytest.mark.slow
@pytest.mark.parametrize("name", ["r3gan", "unetgan", "wasserstein", "projected"])
def test_two_ranks_follow_one(prepared, tmp_path, name):
    """By plain gradient descent, in which rounding stays as small as it is."""
    settings = preset(name, optim="sgd", accumulate=2, **{"optim.lr": 0.003}) | {"total_images": 48}
    settings.pop("optim.betas", None)
    if name in ("unetgan", "projected"):
        # Spectral norm moves on with every part of a batch, and batch norm in G would see other batches.
        settings |= {"accumulate": 1, "model.generator._target_": "gen.r3gan.Generator"}
    done = launch(2, prepared, tmp_path / "two", **settings)
    assert done.returncode == 0, done.stderr
    two, two_rows = outcome(RunFolder(tmp_path / "two" / "t"))
    one, one_rows = outcome(run(prepared, tmp_path / "one", **settings))
    assert len(one_rows) == len(two_rows) > 0
    for a, b in zip(one_rows, two_rows, strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)
    assert one.get("augmentation") == two.get("augmentation")
    # A pretrained network passes rounding on fifty layers deep.
    most = 5e-5 if name == "projected" else 2e-5
    for part in ("generator", "discriminator", "ema"):
        for key, value in one[part].items():
            assert torch.allclose(value, two[part][key], atol=most), (part, key)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dcgan_plus", "resnet"])
def test_two_ranks_with_batch_norm_in_g_alone_judge_the_same_reals(prepared, tmp_path, name):
    """In the first step; samples are normalised by other batches."""
    settings = preset(name, total_images=8, batch_size=8, log_every=8, n_critic=1)
    done = launch(2, prepared, tmp_path / "two", **settings)
    assert done.returncode == 0, done.stderr
    ((two,), (one,)) = RunFolder(tmp_path / "two" / "t").read_stats(), run(prepared, tmp_path, **settings).read_stats()
    assert two["d_real"] == pytest.approx(one["d_real"], rel=1e-4)
    assert two["d_fake"] != one["d_fake"] and two["d_fake"] == pytest.approx(one["d_fake"], abs=0.5)


@pytest.mark.slow
def test_two_ranks_in_bf16_with_penalties(prepared, tmp_path):
    settings = preset("r3gan", mixed_precision="bf16", total_images=24)
    done = launch(2, prepared, tmp_path, **settings)
    assert done.returncode == 0, done.stderr
    (row,) = RunFolder(tmp_path / "t").read_stats()
    assert row["r1"] > 0


def test_the_bare_network_is_what_is_saved(prepared, tmp_path):
    folder = run(prepared, tmp_path, total_images=8, **preset("r3gan"))
    assert not [name for name in state_of(folder)["discriminator"] if name.startswith("network")]
    assert isinstance(load_model(run(prepared, tmp_path / "d", total_images=8).path)[0], dcgan.Generator)
