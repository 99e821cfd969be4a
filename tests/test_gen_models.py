"""The generator family: shapes, sizes, gradients, spectral norm, and what each network must be at its start."""

import math

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn
from torch.nn.utils import parametrize

from core.cli.config import compose
from core.cli.errors import UserError
from core.nn.model_file import build_model, load_model, save_model
from core.training.checkpoint import Checkpoints
from gen import dcgan, projected, r3gan, resnet, unetgan
from gen.penalties import float32_logits, zero_centred
from gen.resnet import SelfAttention, level_widths
from gen.unetgan import consistency, cutmix, cutmix_masks

MODELS = ("dcgan", "dcgan_plus", "projected", "resnet", "r3gan", "unetgan")
SPECTRAL = {
    "dcgan_plus": lambda: dcgan.Discriminator(32, width=4, norm="spectral"),
    "resnet": lambda: resnet.Discriminator(32, width=4, attention=16),
    "unetgan": lambda: unetgan.Discriminator(32, width=4),
}
GENERATORS = {
    "resnet": lambda size=32: resnet.Generator(size, 6, 4, attention=16),
    "r3gan": lambda size=32: r3gan.Generator(size, 6, 4),
}
DISCRIMINATORS = SPECTRAL | {
    "r3gan": lambda: r3gan.Discriminator(32, width=4),
    "projected": lambda: projected.Discriminator(32, resolution=32, head_width=4, pixel_width=4),
}


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def awake(network, seed=0):
    """The network with nothing at zero: neither the ends of branches nor the strength of attention."""
    network.initialise(seed)
    with torch.no_grad():
        for place, p in enumerate(network.parameters()):
            if not p.any():
                p.copy_(0.1 * noise(*p.shape, seed=place))
    return network


def recipes(model, *overrides):
    config = compose("gen", ["data=x", "name=x", f"model={model}", *overrides])
    model = OmegaConf.to_container(config.model, resolve=True)
    return model["generator"], model["discriminator"]


@pytest.mark.parametrize("model", MODELS)
def test_presets_keep_within_15_million_parameters_in_the_generator(model):
    with torch.device("meta"):
        generator = build_model(recipes(model)[0])
    assert generator.image_size == 64
    assert sum(p.numel() for p in generator.parameters()) <= 15_000_000


@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("model", MODELS)
def test_presets_at_every_power_of_two(model, size):
    generator, discriminator = (
        build_model(recipe) for recipe in recipes(model, f"model.image_size={size}", "model.width=2")
    )
    generator.initialise(0)
    discriminator.initialise(1)
    images = generator(noise(2, generator.latent_dim))
    assert images.shape == (2, 3, size, size) and images.abs().max() <= 1
    assert discriminator(images).shape == (2,)


@pytest.mark.parametrize("network", [network for make in (GENERATORS, DISCRIMINATORS) for network in make.values()])
def test_gradients_reach_every_parameter(network):
    network = awake(network())
    if isinstance(network, unetgan.Discriminator):
        image, pixels = network.forward_all(noise(2, 3, 32, 32))
        output = image.sum() + pixels.mean()
    elif hasattr(network, "latent_dim"):
        output = network(noise(2, network.latent_dim)).square().mean()
    else:
        output = network(noise(2, 3, 32, 32)).sum()
    output.backward()
    silent = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert not silent


@pytest.mark.parametrize("network", DISCRIMINATORS.values())
def test_each_image_is_judged_by_itself(network):
    network = awake(network()).eval()
    x = noise(3, 3, 32, 32)
    alone = torch.cat([network(picture[None]) for picture in x])
    assert torch.allclose(network(x), alone, atol=1e-5)


def test_the_modern_generator_takes_a_single_latent():
    generator = awake(r3gan.Generator(32, 6, 4)).train()
    z = noise(2, 6)
    assert torch.allclose(generator(z)[:1], generator(z[:1]), atol=1e-6)


@pytest.mark.parametrize("network", DISCRIMINATORS.values())
def test_second_derivatives_of_every_discriminator(network):
    """The slope of R1 along a random direction of all weights, against a central difference in float64.

    R1 of a network with ReLUs jumps where one of them turns on; the step is too short to meet such a place.
    """
    network = awake(network()).double().eval()  # in eval mode spectral norm does not iterate
    x = noise(2, 3, 32, 32).double()
    parameters = list(network.parameters())
    direction = [noise(*p.shape, seed=place).double() * p.abs().mean() for place, p in enumerate(parameters)]
    gradients = torch.autograd.grad(zero_centred(*float32_logits(network, x)), parameters, allow_unused=True)
    slope = sum((g * d).sum() for g, d in zip(gradients, direction, strict=True) if g is not None).item()
    values = []
    for step in (1e-8, -2e-8):  # to one side, then from there to the other
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p += step * d
        values.append(zero_centred(*float32_logits(network, x)).item())
    assert abs(slope) > 0 and slope == pytest.approx((values[0] - values[1]) / 2e-8, rel=1e-4)


# -- spectral norm


def normalised(network):
    return [layer for layer in network.modules() if parametrize.is_parametrized(layer, "weight")]


@pytest.mark.parametrize("network", SPECTRAL.values())
def test_every_weight_has_spectral_norm_one(network):
    network = network()
    network.initialise(0)
    for _ in range(60):
        for layer in normalised(network):
            layer.weight  # noqa: B018 (looking at it is an iteration)
    network.eval()
    layers = [layer for layer in network.modules() if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d))]
    assert len(normalised(network)) == len(layers) > 3
    for layer in layers:
        largest = torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item()
        assert 1 - 1e-5 < largest < 1.02  # the iteration comes from below, slowly where two values are close


@pytest.mark.parametrize("network", SPECTRAL.values())
def test_spectral_norm_forgets_the_scale_of_the_weights_but_not_the_seed(network):
    first, second, other = network(), network(), network()
    for net, seed in ((first, 3), (second, 3), (other, 4)):
        torch.manual_seed(torch.randint(1000, ()).item())
        net.initialise(seed)
    states = [net.state_dict() for net in (first, second, other)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert not torch.equal(*(next(iter(normalised(net))).weight for net in (first, other)))
    with torch.no_grad():
        for layer in normalised(second):
            layer.parametrizations.weight.original.mul_(7)
    x = noise(2, 3, 32, 32)
    # The singular vectors of 7 W are those of W.
    assert torch.allclose(first.eval()(x), second.eval()(x), rtol=1e-4)


@pytest.mark.parametrize("network", SPECTRAL.values())
def test_singular_values_are_found_outside_autocast(network):
    network, seen = network(), []
    for layer in normalised(network):
        (norm,) = [part for part in layer.parametrizations.modules() if type(part).__name__ == "_SpectralNorm"]
        norm.register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    with torch.autocast("cpu", torch.bfloat16):
        network(noise(2, 3, 32, 32))
    assert seen and not any(seen)


@pytest.mark.parametrize("network", SPECTRAL.values())
def test_the_state_of_power_iterations_survives_a_checkpoint(network, tmp_path):
    trained, fresh = network(), network()
    trained.initialise(0)
    x = noise(2, 3, 32, 32)
    trained(x)
    Checkpoints(tmp_path).save(8, {"images_seen": 8, "d": trained.state_dict()})
    fresh.load_state_dict(Checkpoints(tmp_path).load_newest()["d"])
    for _ in range(3):  # each look at the weights moves the vectors on
        assert torch.equal(trained(x), fresh(x))


# -- model files


@pytest.mark.parametrize("model", MODELS)
def test_a_generator_is_rebuilt_from_its_file_alone(model, tmp_path):
    recipe = recipes(model, "model.image_size=32", "model.width=2")[0]
    generator = awake(build_model(recipe))
    generator(noise(4, generator.latent_dim))  # batch norm has seen something
    save_model(tmp_path / "g.safetensors", generator, recipe, {})
    z = noise(3, generator.latent_dim, seed=1)
    loaded, _ = load_model(tmp_path / "g.safetensors")
    assert torch.equal(loaded(z), generator.eval()(z))


# -- resnet


def test_self_attention_against_the_formula_pixel_by_pixel():
    layer = SelfAttention(16).double()
    with torch.no_grad():
        layer.strength.fill_(0.7)
    x = noise(2, 16, 3, 4).double()
    result = layer(x)
    wf, wg, wh, wv = (part.weight[:, :, 0, 0] for part in (layer.key, layer.query, layer.value, layer.out))
    for picture, attended in zip(x.flatten(2), result.flatten(2), strict=True):  # (C, HW)
        for j in range(12):
            weights = [((wf @ picture[:, i]) @ (wg @ picture[:, j])).exp() for i in range(12)]
            read = sum(w / sum(weights) * (wh @ picture[:, i]) for i, w in enumerate(weights))
            assert torch.allclose(attended[:, j], picture[:, j] + 0.7 * (wv @ read))
    assert torch.equal(SelfAttention(16)(x.float()), x.float())  # it begins as if it were not there


def test_attention_sits_where_it_is_asked_for():
    def sides(network, x):
        seen = []
        for layer in network.modules():
            if isinstance(layer, SelfAttention):
                layer.register_forward_hook(lambda _, __, output: seen.append(output.shape[-1]))
        network(x)
        return seen

    assert sides(resnet.Generator(64, 5, 2, attention=32), noise(2, 5)) == [32]
    assert sides(resnet.Discriminator(64, 2, attention=32), noise(2, 3, 64, 64)) == [32]
    assert sides(resnet.Generator(64, 5, 2), noise(2, 5)) == []
    for network in (lambda: resnet.Generator(64, attention=4), lambda: resnet.Discriminator(64, attention=64)):
        with pytest.raises(UserError, match="attention="):
            network()


def test_widths_double_up_to_eight_times_the_finest():
    assert level_widths(64, 5) == [64, 128, 256, 512, 512]
    for network in (resnet.Generator, resnet.Discriminator, r3gan.Generator, unetgan.Discriminator):
        with pytest.raises(UserError, match="width=0"):
            network(width=0)
        with pytest.raises(UserError, match="power of two"):
            network(image_size=48)


@pytest.mark.parametrize("block", [resnet.UpResBlock(4, 6), resnet.DownResBlock(4, 6)])
def test_the_way_round_a_block_may_exchange_resampling_and_convolution(block):
    x = noise(2, 4, 8, 8)
    one, other = block.shortcut
    assert torch.allclose(block.shortcut(x), one(other(x)), atol=1e-6)


# -- r3gan


def test_the_modern_networks_begin_as_linear_maps():
    """With branches at zero nothing but convolutions and interpolation is left."""
    generator, discriminator = r3gan.Generator(32, 6, 8).double(), r3gan.Discriminator(32, 8).double()
    generator.initialise(0)
    discriminator.initialise(1)
    for network, a, b in (
        (generator.layers[:-1], noise(2, 6, 1, 1), noise(2, 6, 1, 1, seed=1)),  # without tanh
        (discriminator.layers, noise(2, 3, 32, 32), noise(2, 3, 32, 32, seed=1)),
    ):
        a, b = a.double(), b.double()
        assert torch.allclose(network(2 * a - 3 * b), 2 * network(a) - 3 * network(b), atol=1e-9)
    x = noise(2, 3, 32, 32).double()
    bent = awake(discriminator)
    assert not torch.allclose(bent(2 * x), 2 * bent(x), rtol=1e-2)


def test_the_modern_networks_begin_with_well_scaled_outputs():
    generator = r3gan.Generator(64, 64, 16)
    generator.initialise(0)
    before_tanh = generator.layers[:-1](noise(8, 64, 1, 1))
    assert 0.2 < before_tanh.std() < 2  # interpolation averages some of it away
    blocks = [block for block in generator.modules() if isinstance(block, r3gan.Bottleneck)]
    first = blocks[0].branch[0][0].weight
    expected = math.sqrt(2 / (1 + 0.2**2) / first.shape[1]) * len(blocks) ** -0.25
    assert first.std().item() == pytest.approx(expected, rel=0.02)
    assert first.std() > 0 and not any(block.branch[-1][0].weight.any() for block in blocks)


# -- U-Net discriminator


def test_pixel_logits_come_with_the_image_logit():
    network = unetgan.Discriminator(32, 4)
    network.initialise(0)
    network.eval()
    x = noise(2, 3, 32, 32)
    image, pixels = network.forward_all(x)
    assert torch.equal(image, network(x)) and pixels.shape == (2, 32, 32)
    changed = x.clone()
    changed[:, :, :8, :8] += 5
    difference = (network.forward_all(changed)[1] - pixels).abs()
    assert difference[:, :8, :8].mean() > 3 * difference[:, 16:, 16:].mean()  # decisions are about their place
    network.up[-1].register_forward_hook(lambda _, __, output: torch.zeros_like(output))
    fine, fine_changed = network.forward_all(x)[1], network.forward_all(changed)[1]  # by the finest skip alone
    far = slice(12, None)  # beyond the four 3x3 convolutions of the finest level
    assert not torch.equal(fine, fine_changed) and torch.equal(fine[:, far, far], fine_changed[:, far, far])


def test_cutmix_masks_are_boxes_of_uniform_area_drawn_from_the_moment():
    masks = cutmix_masks(0, 128, 2000, 32)
    assert masks.shape == (2000, 1, 32, 32) and set(masks.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(masks, cutmix_masks(0, 128, 2000, 32))
    for other in ((1, 128), (0, 160)):
        assert not torch.equal(masks, cutmix_masks(*other, 2000, 32))
    assert masks.mean().item() == pytest.approx(0.5, abs=0.04)  # as much real as generated: the coin
    is_box = [
        (kind == kind.amax(2, keepdim=True) * kind.amax(3, keepdim=True)).flatten(1).all(1)
        for kind in (masks, 1 - masks)
    ]  # a box is the product of its rows and its columns
    assert (is_box[0] | is_box[1]).all()
    boxes = torch.where(is_box[0][:, None, None, None], masks, 1 - masks)
    # Of a side s about a uniform centre s - s^2/4 stay inside on average. The area a = s^2 is uniform before the cut:
    # the share is the integral of 2 s (s - s^2/4)^2 from 0 to 1.
    assert boxes.mean().item() == pytest.approx(2 * (1 / 4 - 1 / 10 + 1 / 96), abs=0.025)


def test_cutmix_and_its_consistency():
    real, fake = noise(2, 3, 4, 4), noise(2, 3, 4, 4, seed=1)
    masks = torch.zeros(2, 1, 4, 4)
    masks[:, :, :, :2] = 1
    mixed = cutmix(real, fake, masks)
    assert torch.equal(mixed[..., :2], real[..., :2]) and torch.equal(mixed[..., 2:], fake[..., 2:])
    assert consistency(mixed[:, 0], real[:, 0], fake[:, 0], masks).item() == 0  # a judge of single pixels
    assert consistency(mixed[:, 0] + 3, real[:, 0], fake[:, 0], masks).item() == pytest.approx(9)
