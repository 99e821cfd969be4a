"""Augmentation of what D sees: known changes, their shares and gradients; the controller by hand-computed numbers."""

import numpy as np
import pytest
import torch

from gen.augment import (
    AMOUNTS,
    DRAWS,
    GATES,
    STREAMS,
    AdaptiveProbability,
    augment,
    augmentation_draws,
    cutout,
    translate,
)


def images(count=4, size=16, seed=0):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed)).double() * 2 - 1


def draws_of(count, gates, **amounts):
    """Draws that make exactly the named changes at p = 1/2, with these amounts."""
    draws = torch.full((count, DRAWS), 0.9)
    for gate in gates:
        draws[:, GATES.index(gate)] = 0.1
    for name, value in amounts.items():
        draws[:, len(GATES) + AMOUNTS.index(name)] = value
    return draws


def shifted(picture, down, right):
    """A picture moved pixel by pixel, 0 coming in."""
    moved = np.zeros_like(picture)
    height, width = picture.shape[1:]
    for y in range(height):
        for x in range(width):
            if 0 <= y - down < height and 0 <= x - right < width:
                moved[:, y, x] = picture[:, y - down, x - right]
    return moved


def test_probability_zero_is_the_identity_and_one_changes_all():
    x, draws = images(50), augmentation_draws(0, 0, STREAMS["real"], 50)
    assert torch.equal(augment(x, 0.0, draws), x)
    assert torch.equal(augment(x, 0.0, torch.zeros_like(draws)), x)
    assert torch.equal(augment(x, 0.5, draws_of(50, [])), x)
    assert ((augment(x, 1.0, draws) - x).abs().amax((1, 2, 3)) > 0).all()


def test_translation_moves_each_image_by_its_own_offset():
    x = images(5, 8)
    down, right = torch.tensor([0, 2, -2, 1, -1]), torch.tensor([0, -1, 2, 2, -2])
    moved = translate(x, down, right, 2)
    for picture, result, dy, dx in zip(x, moved, down.tolist(), right.tolist(), strict=True):
        assert np.array_equal(result.numpy(), shifted(picture.numpy(), dy, dx))


@pytest.mark.parametrize("down, right, offsets", [(0.0, 0.99, (-2, 2)), (0.5, 0.5, (0, 0)), (0.3, 0.7, (-1, 1))])
def test_translation_reaches_an_eighth_of_the_side(down, right, offsets):
    x = images(2, 16)
    moved = augment(x, 0.5, draws_of(2, ["translation"], down=down, right=right))
    assert np.array_equal(moved[1].numpy(), shifted(x[1].numpy(), *offsets))


def test_cutout_hides_a_square_of_half_the_side():
    x = torch.ones(1, 3, 8, 8)
    expected = torch.ones(8, 8)
    expected[2:6, 3:7] = 0
    assert torch.equal(cutout(x, torch.tensor([2]), torch.tensor([3]))[0, 1], expected)
    corner = cutout(x, torch.tensor([-2]), torch.tensor([6]))[0, 0]
    assert corner.sum() == 64 - 2 * 2 and corner[:2, 6:].sum() == 0
    # Along one axis the corner takes 9 places, -2 to 6, which hide 2 3 4 4 4 4 4 3 2 pixels.
    count = 20_000
    draws = augmentation_draws(0, 0, STREAMS["real"], count)
    draws[:, : len(GATES)] = draws_of(1, ["cutout"])[:, : len(GATES)]
    hidden = 1 - augment(torch.ones(count, 3, 8, 8), 0.5, draws).mean().item()
    along = np.array([2, 3, 4, 4, 4, 4, 4, 3, 2]) / 8
    share, spread = along.mean() ** 2, np.sqrt((along**2).mean() ** 2 - along.mean() ** 4)
    assert hidden == pytest.approx(share, abs=4 * spread / count**0.5)


def test_colour_changes_by_known_amounts():
    x = images()
    assert torch.allclose(augment(x, 0.5, draws_of(4, ["brightness"], brightness=0.75)), x + 0.25)
    mean = x.mean(1, keepdim=True)
    assert torch.allclose(augment(x, 0.5, draws_of(4, ["saturation"], saturation=0.0)), mean.expand_as(x))
    assert torch.allclose(augment(x, 0.5, draws_of(4, ["saturation"], saturation=0.75)), 1.5 * x - 0.5 * mean)
    assert torch.allclose(augment(x, 0.5, draws_of(4, ["saturation"], saturation=0.5)), x)
    flat = augment(x, 0.5, draws_of(4, ["contrast"], contrast=0.0))
    assert torch.allclose(flat.mean((1, 2, 3)), x.mean((1, 2, 3)))
    assert torch.allclose(flat.std((1, 2, 3)), x.std((1, 2, 3)) / 2)


@pytest.mark.parametrize("gate", GATES)
def test_each_change_is_made_with_its_probability(gate):
    count, p = 4000, 0.3
    draws = augmentation_draws(7, 640, STREAMS["real"], count)
    others = [place for place, name in enumerate(GATES) if name != gate]
    draws[:, others] = 0.95
    x = images(1, 8).expand(count, -1, -1, -1)
    changed = ((augment(x, p, draws) - x).abs().amax((1, 2, 3)) > 0).double().mean().item()
    still = {"translation": 1 / 9}.get(gate, 0.0)  # 3 x 3 offsets, one of which is none
    expected = p * (1 - still)
    assert changed == pytest.approx(expected, abs=4 * (expected * (1 - expected) / count) ** 0.5)


def test_gradients_pass_through_every_change():
    draws = augmentation_draws(1, 0, STREAMS["fake"], 2)
    x = images(2, 8).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: augment(x, 1.0, draws), (x,), fast_mode=True)
    (gradient,) = torch.autograd.grad(augment(x, 0.5, draws_of(2, ["cutout"], top=0.5, left=0.5)).sum(), x)
    expected = torch.ones_like(x)
    expected[:, :, 2:6, 2:6] = 0
    assert torch.equal(gradient, expected)


def test_ranks_make_the_changes_of_one_process():
    x, draws = images(8), augmentation_draws(0, 256, STREAMS["fake"], 8)
    parts = [augment(part, 0.6, rows) for part, rows in zip(x.chunk(2), draws.chunk(2), strict=True)]
    assert torch.equal(torch.cat(parts), augment(x, 0.6, draws))
    assert torch.equal(draws, augmentation_draws(0, 256, STREAMS["fake"], 8))
    others = [(1, 256, STREAMS["fake"]), (0, 264, STREAMS["fake"]), (0, 256, STREAMS["real"])]
    assert all(not torch.equal(draws, augmentation_draws(*other, 8)) for other in others)
    assert draws.min() >= 0 and draws.max() < 1 and draws.shape == (8, 12)


def feed(controller, *signs, batch=100):
    for sign in signs:
        controller.update(torch.tensor(sign), batch)
    return controller.p


def test_the_probability_follows_the_sign_of_overfitting():
    controller = AdaptiveProbability(target=0.6, ada_images=10_000, every=4)
    assert feed(controller, 0.9, 0.9, 0.9) == 0  # not due
    assert feed(controller, 0.9) == pytest.approx(0.04)  # 400 of 10,000 images
    assert feed(controller, 1.0, 1.0, 0.9, -0.4) == pytest.approx(0.08)  # the mean 0.625 decides, not the last
    assert feed(controller, 0.5, 0.5, 0.7, 0.6) == pytest.approx(0.04)
    assert feed(controller, *[0.0] * 12) == 0  # never below
    assert feed(controller, *[1.0] * 96) == pytest.approx(0.96)
    assert feed(controller, *[1.0] * 12) == 1  # never above
    assert feed(controller, *[0.6] * 4) in (0.96, 1)


def test_the_published_speed():
    controller = AdaptiveProbability(0.6)
    for _ in range(0, 250_000, 64):
        controller.update(torch.tensor(1.0), 64)
    assert controller.p == pytest.approx(0.5, abs=4 * 64 / 500_000)


def test_a_restored_controller_goes_on_as_if_never_stopped():
    straight, stopped = AdaptiveProbability(0.6, ada_images=5_000), AdaptiveProbability(0.6, ada_images=5_000)
    signs = np.random.default_rng(0).uniform(0.3, 1, 50).astype(np.float32).tolist()
    feed(straight, *signs)
    feed(stopped, *signs[:22])  # between two moves
    restored = AdaptiveProbability(0.6, ada_images=5_000)
    restored.load_state_dict(stopped.state_dict())
    feed(restored, *signs[22:])
    assert restored.state_dict() == straight.state_dict() and 0 < straight.p < 1
