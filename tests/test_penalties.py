"""Gradient penalties: closed forms, numerical second derivatives, float32 within autocast."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

from gen.penalties import (
    float32_logits,
    gradient_penalty,
    mixing_weights,
    squared_gradients,
    zero_centred,
)


def images(count=4, size=5, seed=0):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed)).double()


def linear(weight):
    return lambda x: (weight * x).flatten(1).sum(1)


def half_square(x):
    """Its gradient is x itself."""
    return x.square().flatten(1).sum(1) / 2


def smooth_network(seed=0):
    """A small network without kinks, so that finite differences are exact to their order."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.Softplus(), nn.Conv2d(4, 1, 2), nn.Tanh(), nn.Flatten(0, -1))
    return net.double()


def test_closed_forms():
    weight = images(1, seed=1)[0]
    x, logits = float32_logits(linear(weight), images())
    assert zero_centred(x, logits).item() == pytest.approx(weight.square().sum().item())
    x, logits = float32_logits(half_square, images())
    assert zero_centred(x, logits).item() == pytest.approx(images().square().sum().item() / 4)
    assert torch.allclose(squared_gradients(x, half_square(x)), images().square().sum((1, 2, 3)))


def test_the_gradient_of_the_sum_holds_each_images_own():
    net = smooth_network()
    x, logits = float32_logits(net, images())
    alone = []
    for picture in images():
        leaf = picture[None].requires_grad_()
        net(leaf).backward()
        alone.append(leaf.grad.square().sum())
    assert torch.allclose(squared_gradients(x, logits), torch.stack(alone))


def by_parameters(of_network):
    """A function of the parameters of a network, and these."""
    net = smooth_network()
    names = [name for name, _ in net.named_parameters()]

    def value(*parameters):
        values = dict(zip(names, parameters, strict=True))
        return of_network(lambda x: functional_call(net, values, (x,)))

    return value, tuple(p.detach().clone().requires_grad_() for p in net.parameters())


def test_second_derivatives_are_those_of_finite_differences():
    def by_r1(network):
        return zero_centred(*float32_logits(network, images(2)))

    def by_gradient_penalty(network):
        return gradient_penalty(network, images(2), images(2, seed=3), torch.tensor([0.3, 0.8]).double())

    for of_network in (by_r1, by_gradient_penalty):
        value, parameters = by_parameters(of_network)
        assert torch.autograd.gradcheck(value, parameters)
        gradients = torch.autograd.grad(value(*parameters), parameters, allow_unused=True)
        assert gradients[0].abs().sum() > 0 and gradients[2].abs().sum() > 0


def test_gradient_penalty_of_known_slopes():
    real, fake = images(), images(seed=5)
    weights = torch.tensor([0.0, 0.25, 0.5, 1.0]).double()
    slope = images(1, seed=1)[0]
    slope = 3 * slope / slope.norm()
    assert gradient_penalty(linear(slope), real, fake, weights).item() == pytest.approx(4)  # (3 - 1)^2
    between = torch.stack([w * a + (1 - w) * b for w, a, b in zip(weights, real, fake, strict=True)])
    expected = (between.flatten(1).norm(dim=1) - 1).square().mean()
    assert gradient_penalty(half_square, real, fake, weights).item() == pytest.approx(expected.item())


def test_a_flat_discriminator_has_a_penalty_with_finite_gradients():
    weight = torch.zeros(3, 5, 5, dtype=torch.double, requires_grad=True)
    penalty = gradient_penalty(linear(weight), images(), images(seed=5), torch.full((4,), 0.5))
    penalty.backward()
    assert penalty.item() == 1 and weight.grad.isfinite().all()


def test_the_means_of_two_halves_average_to_the_whole():
    net = smooth_network()
    parts = [zero_centred(*float32_logits(net, part)) for part in (images(), images()[:2], images()[2:])]
    assert torch.allclose(parts[0], (parts[1] + parts[2]) / 2)
    assert parts[1].item() != pytest.approx(parts[2].item())


def test_penalties_within_autocast_are_computed_in_float32():
    net, x = smooth_network().float(), images().float()
    expected = zero_centred(*float32_logits(net, x))
    mixed = gradient_penalty(net, x, -x, torch.full((4,), 0.25))
    with torch.autocast("cpu", torch.bfloat16):
        leaf, logits = float32_logits(net, x)
        inside = zero_centred(leaf, logits)
        assert logits.dtype == inside.dtype == torch.float32
        assert torch.equal(gradient_penalty(net, x, -x, torch.full((4,), 0.25)), mixed)
        rough = zero_centred(leaf, net(leaf))
    assert torch.equal(inside, expected) and not torch.equal(rough, expected)
    leaf, logits = float32_logits(net, x.bfloat16())
    assert leaf.dtype == logits.dtype == torch.float32


def test_mixing_weights_are_uniform_and_a_function_of_the_moment():
    weights = mixing_weights(3, 1280, 4000)
    assert torch.equal(weights, mixing_weights(3, 1280, 4000)) and weights.dtype == torch.float32
    assert not torch.equal(weights, mixing_weights(3, 1408, 4000))
    assert not torch.equal(weights, mixing_weights(4, 1280, 4000))
    assert weights.min() >= 0 and weights.max() < 1
    assert weights.mean().item() == pytest.approx(0.5, abs=4 / (12 * 4000) ** 0.5)
