"""The DCGAN: published parameter counts, shapes, ranges; its losses and steps against hand-made oracles."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import binary_cross_entropy

from core.cli.errors import UserError
from core.nn.init import init_normal
from gen.dcgan import Discriminator, Generator
from gen.losses import non_saturating_discriminator, non_saturating_generator
from gen.steps import STATISTICS, Batch, DiscriminatorWrapper, discriminator_step, generator_step


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def test_the_tutorials_parameter_counts():
    assert parameters(Generator()) == 3_576_704
    assert parameters(Discriminator()) == 2_765_568


def test_it_computes_what_the_tutorials_network_computes():
    def up(a, b, stride, padding):
        return [nn.ConvTranspose2d(a, b, 4, stride, padding, bias=False), nn.BatchNorm2d(b), nn.ReLU()]

    def down(a, b):
        return [nn.Conv2d(a, b, 4, 2, 1, bias=False), nn.BatchNorm2d(b), nn.LeakyReLU(0.2)]

    widths = [(512, 256), (256, 128), (128, 64)]
    layers = [layer for pair in widths for layer in up(*pair, 2, 1)]
    generator = nn.Sequential(*up(100, 512, 1, 0), *layers, nn.ConvTranspose2d(64, 3, 4, 2, 1, bias=False), nn.Tanh())
    layers = [layer for b, a in reversed(widths) for layer in down(a, b)]
    head = [nn.Conv2d(3, 64, 4, 2, 1, bias=False), nn.LeakyReLU(0.2)]
    discriminator = nn.Sequential(*head, *layers, nn.Conv2d(512, 1, 4, 1, 0, bias=False))
    z = torch.randn(3, 100, generator=torch.Generator().manual_seed(0))
    for ours, theirs, x in (
        (Generator(), generator, z),
        (Discriminator(), discriminator, torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))),
    ):
        init_normal(ours, seed=5)
        values = iter(ours.state_dict().values())
        theirs.load_state_dict({name: next(values) for name in theirs.state_dict()})
        expected = theirs(x[:, :, None, None] if x.ndim == 2 else x)
        assert torch.allclose(ours(x).flatten(), expected.flatten(), atol=1e-6)


@pytest.mark.parametrize("size", [32, 64, 128])
def test_shapes_at_every_power_of_two(size):
    images = Generator(size, latent_dim=7, width=4)(torch.randn(2, 7))
    assert images.shape == (2, 3, size, size)
    assert images.abs().max() <= 1
    assert Discriminator(size, width=4)(images).shape == (2,)


@pytest.mark.parametrize("size", [16, 63, 96])
def test_impossible_sizes_are_refused(size):
    for network in (Generator, Discriminator):
        with pytest.raises(UserError, match="power of two"):
            network(size)


def test_no_norm_at_generator_output_and_discriminator_input():
    for network in (Generator(width=4), Discriminator(width=4)):
        edge = network.layers[-1] if isinstance(network, Generator) else network.layers[0]
        assert not any(isinstance(layer, nn.BatchNorm2d) for layer in edge)
        assert sum(isinstance(layer, nn.BatchNorm2d) for layer in network.modules()) >= 3
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in Generator(width=4, norm="none").modules())


logits = st.lists(st.floats(-15, 15), min_size=1, max_size=6).map(lambda values: torch.tensor(values).double())


@settings(max_examples=60, deadline=None)
@given(real=logits, fake=logits)
def test_losses_equal_sigmoid_and_cross_entropy(real, fake):
    one, zero = torch.ones_like, torch.zeros_like
    bce_d = binary_cross_entropy(real.sigmoid(), one(real)) + binary_cross_entropy(fake.sigmoid(), zero(fake))
    assert torch.allclose(non_saturating_discriminator(real, fake), bce_d, rtol=1e-6)
    assert torch.allclose(non_saturating_generator(fake), binary_cross_entropy(fake.sigmoid(), one(fake)), rtol=1e-6)


def test_losses_stay_finite_where_cross_entropy_overflows():
    far = torch.tensor([-1e4], requires_grad=True)
    loss = non_saturating_generator(far)
    loss.backward()
    assert loss.item() == 1e4 and far.grad.item() == -1  # -log sigmoid(l) -> -l
    assert non_saturating_discriminator(torch.zeros(4), torch.zeros(4)).item() == pytest.approx(2 * 0.6931472)


def test_each_step_moves_its_own_network_only():
    generator, discriminator = Generator(32, 5, 4), Discriminator(32, 4)
    g_optimizer = torch.optim.SGD(generator.parameters(), 0.1)
    d_optimizer = torch.optim.SGD(discriminator.parameters(), 0.1)
    real = torch.rand(4, 3, 32, 32)
    fake = generator(torch.randn(4, 5))
    before = copy.deepcopy((generator.state_dict(), discriminator.state_dict()))

    def moved(network, old):
        return [name for name, p in network.named_parameters() if not torch.equal(p, old[name])]

    wrapped, batch = DiscriminatorWrapper(discriminator, bf16=False), Batch(real, torch.randn(4, 5))
    statistics = discriminator_step(wrapped, d_optimizer, [batch], [fake])
    assert not moved(generator, before[0]) and len(moved(discriminator, before[1])) == parameters_count(discriminator)
    middle = copy.deepcopy(discriminator.state_dict())
    statistics |= generator_step(generator, wrapped, g_optimizer, [batch], [fake])
    assert not moved(discriminator, middle) and len(moved(generator, before[0])) == parameters_count(generator)
    assert set(statistics) == {*STATISTICS, "d_sign"}
    assert all(value.ndim == 0 and not value.requires_grad for value in statistics.values())
    assert all(p.requires_grad for p in discriminator.parameters())


def parameters_count(network):
    return len(list(network.parameters()))


class Fixed(nn.Module):
    """A discriminator whose logit is the mean pixel times a weight."""

    judges_pixels = False

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return self.weight * x.mean((1, 2, 3))


def test_statistics_and_updates_by_hand():
    network = Fixed()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
    real, fake = torch.full((2, 3, 4, 4), 0.5), torch.full((2, 3, 4, 4), 0.25)
    wrapped = DiscriminatorWrapper(network, bf16=False)
    result = discriminator_step(wrapped, optimizer, [Batch(real, torch.empty(0))], [fake])
    sigmoid = torch.tensor([1.0, 0.5]).sigmoid()  # logits 2 * 0.5 and 2 * 0.25
    assert result["d_real"].item() == pytest.approx(sigmoid[0].item())
    assert result["d_fake"].item() == pytest.approx(sigmoid[1].item())
    assert result["d_accuracy"].item() == 0.5  # all reals right, all fakes wrong
    gradient = -(1 - sigmoid[0]) * 0.5 + sigmoid[1] * 0.25
    assert network.weight.item() == pytest.approx(2 - 0.5 * gradient.item())
