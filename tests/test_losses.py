"""Adversarial losses against numbers worked out by hand, PyTorch's own losses, and what each must be indifferent to."""

import math

import pytest
import torch
from torch.nn import functional as F

from core.cli.errors import UserError
from gen.losses import LOSSES, gan_loss

REAL, FAKE = torch.tensor([2.0, -1.0]).double(), torch.tensor([0.5, -3.0]).double()


def log1pexp(value):
    return math.log1p(math.exp(value))


def sigmoid(value):
    return 1 / (1 + math.exp(-value))


# name: loss of D, loss of G, gradient of D's loss by the reals and by the fakes, of G's loss by the fakes
BY_HAND = {
    "non_saturating": (
        (log1pexp(-2) + log1pexp(1)) / 2 + (log1pexp(0.5) + log1pexp(-3)) / 2,
        (log1pexp(-0.5) + log1pexp(3)) / 2,
        [-sigmoid(-2) / 2, -sigmoid(1) / 2],
        [sigmoid(0.5) / 2, sigmoid(-3) / 2],
        [-sigmoid(-0.5) / 2, -sigmoid(3) / 2],
    ),
    "hinge": ((0 + 2) / 2 + (1.5 + 0) / 2, 1.25, [0, -0.5], [0.5, 0], [-0.5, -0.5]),
    "least_squares": ((1 + 4) / 4 + (0.25 + 9) / 4, (0.25 + 16) / 4, [0.5, -1], [0.25, -1.5], [-0.25, -2]),
    "wasserstein": (-1.25 - 0.5, 1.25, [-0.5, -0.5], [0.5, 0.5], [-0.5, -0.5]),
    "relativistic": (  # the pairs differ by 1.5 and 2
        (log1pexp(-1.5) + log1pexp(-2)) / 2,
        (log1pexp(1.5) + log1pexp(2)) / 2,
        [-sigmoid(-1.5) / 2, -sigmoid(-2) / 2],
        [sigmoid(-1.5) / 2, sigmoid(-2) / 2],
        [-sigmoid(1.5) / 2, -sigmoid(2) / 2],
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_values_and_gradients_worked_out_by_hand(name):
    of_d, of_g, by_real, by_fake, by_fake_of_g = BY_HAND[name]
    real, fake = REAL.clone().requires_grad_(), FAKE.clone().requires_grad_()
    loss = LOSSES[name].discriminator(real, fake)
    assert loss.item() == pytest.approx(of_d)
    gradients = torch.autograd.grad(loss, (real, fake))
    assert gradients[0].tolist() == pytest.approx(by_real) and gradients[1].tolist() == pytest.approx(by_fake)
    loss = LOSSES[name].generator(fake, real.detach())
    assert loss.item() == pytest.approx(of_g)
    assert torch.autograd.grad(loss, fake)[0].tolist() == pytest.approx(by_fake_of_g)


def test_values_that_pytorchs_own_losses_give():
    generator = torch.Generator().manual_seed(0)
    real, fake = 3 * torch.randn(2, 40, generator=generator).double()
    one, zero = torch.ones_like(real), torch.zeros_like(real)
    squares = (F.mse_loss(real, one) + F.mse_loss(fake, zero)) / 2
    assert torch.allclose(LOSSES["least_squares"].discriminator(real, fake), squares)
    hinge = F.margin_ranking_loss(real, zero, one, 1.0) + F.margin_ranking_loss(fake, zero, -one, 1.0)
    assert torch.allclose(LOSSES["hinge"].discriminator(real, fake), hinge)
    pairs = F.binary_cross_entropy_with_logits(real - fake, one)
    assert torch.allclose(LOSSES["relativistic"].discriminator(real, fake), pairs)
    assert torch.allclose(LOSSES["relativistic"].generator(real, fake), pairs)  # the game with the parts exchanged


@pytest.mark.parametrize("name", LOSSES)
def test_where_only_differences_matter_a_common_shift_changes_nothing(name):
    loss = LOSSES[name]
    before, after = loss.discriminator(REAL, FAKE), loss.discriminator(REAL + 5, FAKE + 5)
    assert torch.allclose(before, after) == (loss.boundary is None)
    if loss.paired:
        assert torch.allclose(loss.generator(FAKE, REAL), loss.generator(FAKE + 5, REAL + 5))


@pytest.mark.parametrize("name", LOSSES)
def test_the_means_of_two_halves_average_to_the_whole(name):
    generator = torch.Generator().manual_seed(1)
    real, fake = torch.randn(2, 8, generator=generator).double()
    loss = LOSSES[name]
    for of in (loss.discriminator, lambda real, fake: loss.generator(fake, real)):
        halves = (of(real[:4], fake[:4]) + of(real[4:], fake[4:])) / 2
        assert torch.allclose(halves, of(real, fake))


@pytest.mark.parametrize("name", LOSSES)
def test_logits_of_pixels_count_like_those_of_images(name):
    generator = torch.Generator().manual_seed(2)
    real, fake = torch.randn(2, 3, 4, 4, generator=generator).double()
    loss = LOSSES[name]
    assert torch.allclose(loss.discriminator(real, fake), loss.discriminator(real.flatten(), fake.flatten()))
    assert torch.allclose(loss.generator(fake, real), loss.generator(fake.flatten(), real.flatten()))


@pytest.mark.parametrize("name", LOSSES)
def test_a_step_down_the_gradient_makes_d_more_right(name):
    loss = LOSSES[name]
    real, fake = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    by_real, by_fake = torch.autograd.grad(loss.discriminator(real, fake), (real, fake))
    assert by_real < 0 <= by_fake
    (by_fake,) = torch.autograd.grad(loss.generator(fake, real), fake)
    assert by_fake < 0


def test_decisions_are_taken_at_the_boundary_of_each_loss():
    real, fake = torch.tensor([0.7, 0.3, -2.0]), torch.tensor([0.6, 0.4, -2.0])
    assert [answers.tolist() for answers in LOSSES["hinge"].decisions(real, fake)] == [[1, 1, -1], [1, 1, -1]]
    assert [a.tolist() for a in LOSSES["least_squares"].decisions(real, fake)] == [[1, -1, -1], [1, -1, -1]]
    for name in ("wasserstein", "relativistic"):
        assert [a.tolist() for a in LOSSES[name].decisions(real, fake)] == [[1, -1, 0], [-1, 1, 0]]


def test_the_same_d_is_held_with_decisions_on_images_and_on_pairs():
    """A D whose logits are normal, and whose decisions on single reals have the target mean."""
    generator, middle = torch.Generator().manual_seed(0), torch.erfinv(torch.tensor(0.6)) * math.sqrt(2)
    noise = torch.randn(2, 400_000, generator=generator)
    for name in ("hinge", "relativistic"):
        on_reals, _ = LOSSES[name].decisions(middle + noise[0], -middle + noise[1])
        assert LOSSES[name].overfitting_target == pytest.approx(on_reals.mean().item(), abs=0.006)


def test_what_is_missing_or_unknown_is_told():
    with pytest.raises(ValueError, match="real logits"):
        LOSSES["relativistic"].generator(FAKE)
    assert LOSSES["hinge"].generator(FAKE).item() == 1.25
    with pytest.raises(UserError, match="loss='hing' is unknown: use one of non_saturating, hinge"):
        gan_loss("hing")
    assert gan_loss("hinge") is LOSSES["hinge"]
