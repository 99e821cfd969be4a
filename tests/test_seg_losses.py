"""Segmentation losses against closed forms, PyTorch's and torchvision's own, and numerical gradients."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

from core.cli.errors import UserError
from seg.losses import TERMS, loss_terms, median_frequency_weights, total_loss

ONE_EACH = dict.fromkeys(TERMS, 1.0)


def batch(seed: int, images: int = 2, classes: int = 4, size: int = 6, ignored: float = 0.2) -> tuple[Tensor, Tensor]:
    """Random logits in float64 and a target of which about a share is ignored."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(images, classes, size, size, generator=generator, dtype=torch.float64)
    target = torch.randint(0, classes, (images, size, size), generator=generator)
    target[torch.rand(target.shape, generator=generator) < ignored] = 255
    return logits, target


def value(logits: Tensor, target: Tensor, name: str, **settings: object) -> float:
    numerator, denominator = loss_terms(logits, target, [name], **settings)[name]  # type: ignore[arg-type]
    return float(numerator / denominator)


def confident(guess: Tensor, classes: int, strength: float = 50.0) -> Tensor:
    """Logits that give the guessed classes all probability, up to exp(-strength)."""
    return strength * F.one_hot(guess, classes).permute(0, 3, 1, 2).double()


def halves() -> tuple[Tensor, Tensor]:
    """A 4x4 target whose right half is class 1, and a guess that finds the upper half of it alone."""
    target = torch.zeros(1, 4, 4, dtype=torch.long)
    target[:, :, 2:] = 1
    guess = target.clone()
    guess[:, 2:] = 0
    return guess, target


# Closed forms


def test_a_perfect_mask_costs_nothing() -> None:
    _, target = halves()
    for name in TERMS:
        assert value(confident(target, 2), target, name) == pytest.approx(0, abs=1e-12)


def test_dice_of_a_half_found_region() -> None:
    guess, target = halves()
    # Class 1: 2 * 4 / (4 + 8); class 0: 2 * 8 / (12 + 8).
    assert value(confident(guess, 2), target, "dice") == pytest.approx(1 - (8 / 12 + 16 / 20) / 2, abs=1e-12)


def test_cross_entropy_of_a_half_found_region_is_the_strength_at_the_missed_pixels() -> None:
    guess, target = halves()
    assert value(confident(guess, 2, 7.0), target, "cross_entropy") == pytest.approx(
        (4 * math.log1p(math.exp(7)) + 12 * math.log1p(math.exp(-7))) / 16
    )


def test_equal_logits_cost_the_logarithm_of_the_number_of_classes() -> None:
    _, target = batch(0, classes=5)
    flat = torch.zeros(2, 5, 6, 6)
    assert value(flat, target, "cross_entropy") == pytest.approx(math.log(5))
    assert value(flat, target, "focal", focal_gamma=2.0) == pytest.approx(0.8**2 * math.log(5))


def test_predicting_background_everywhere_costs_dice_half_however_rare_the_other_class() -> None:
    target = torch.zeros(1, 100, 100, dtype=torch.long)
    target[0, 50, 50] = 1
    nothing = confident(torch.zeros_like(target), 2)
    assert value(nothing, target, "dice") == pytest.approx((1 + 1 / 19_999) / 2)
    right = value(confident(target, 2), target, "dice")
    assert right < 1e-9


def test_dice_counts_only_the_classes_an_image_has() -> None:
    target = torch.tensor([[[0, 0]], [[2, 255]]])
    numerator, denominator = loss_terms(confident(torch.tensor([[[0, 0]], [[1, 1]]]), 3), target, ["dice"])["dice"]
    assert float(denominator) == 2
    assert float(numerator) == pytest.approx(1), "image 0 is right, image 1 misses its class altogether"


# Other implementations


@pytest.mark.parametrize("weights", [None, [0.5, 1.0, 3.0, 0.0]])
def test_cross_entropy_is_that_of_pytorch(weights: list[float] | None) -> None:
    logits, target = batch(1)
    given = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    assert value(logits, target, "cross_entropy", class_weights=given) == pytest.approx(
        float(F.cross_entropy(logits, target, weight=given, ignore_index=255)), rel=1e-12
    )


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 5.0])
def test_focal_loss_of_two_classes_is_that_of_torchvision(gamma: float) -> None:
    logits, target = batch(2, classes=2)
    valid = target != 255
    expected = sigmoid_focal_loss(
        (logits[:, 1] - logits[:, 0])[valid], target[valid].double(), alpha=-1, gamma=gamma, reduction="mean"
    )
    assert value(logits, target, "focal", focal_gamma=gamma) == pytest.approx(float(expected), rel=1e-9)


def test_weighted_terms_follow_their_equations_pixel_by_pixel() -> None:
    logits, target = batch(3)
    weights = np.array([0.5, 1.0, 3.0, 2.0])
    border = np.random.default_rng(0).uniform(0, 10, target.shape)
    entropy = focal = total = 0.0
    for place in zip(*np.nonzero(target.numpy() != 255), strict=True):
        image, row, column = place
        powers = np.exp(logits[image, :, row, column].numpy())
        true = int(target[place])
        p, w = powers[true] / powers.sum(), weights[true] + border[place]
        entropy, focal, total = entropy - w * np.log(p), focal - w * (1 - p) ** 1.5 * np.log(p), total + w
    terms = loss_terms(
        logits, target, ["cross_entropy", "focal"], torch.from_numpy(weights), torch.from_numpy(border), 1.5
    )
    for name, expected in (("cross_entropy", entropy), ("focal", focal)):
        assert [float(part) for part in terms[name]] == pytest.approx([expected, total], rel=1e-10)


def test_dice_follows_its_equation_region_by_region() -> None:
    logits, target = batch(4, classes=5, size=3)
    p = np.exp(logits.numpy()) / np.exp(logits.numpy()).sum(1, keepdims=True)
    scores = []
    for image in range(2):
        valid = target[image].numpy() != 255
        for label in np.unique(target[image].numpy()[valid]):
            t = (target[image].numpy() == label)[valid].astype(float)
            q = p[image, label][valid]
            scores.append(1 - 2 * (q * t).sum() / (q.sum() + t.sum()))
    assert [float(part) for part in loss_terms(logits, target, ["dice"])["dice"]] == pytest.approx(
        [sum(scores), len(scores)], rel=1e-10
    )


# Gradients


@pytest.mark.parametrize("name", TERMS)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    logits, target = batch(5, classes=3, size=2)
    border = torch.rand(target.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)

    def loss(x: Tensor) -> Tensor:
        return total_loss(loss_terms(x, target, [name], weights, border, 1.5), {name: 2.0})

    assert torch.autograd.gradcheck(loss, logits.requires_grad_())


@pytest.mark.parametrize("gamma", [0.0, 0.1, 0.9, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_have_finite_losses_and_gradients(gamma: float, dtype: torch.dtype) -> None:
    logits = torch.tensor([[1e4, -1e4], [0.0, 0.0], [30.0, -30.0], [90.0, 0.0]], dtype=dtype).T[None, :, :, None]
    logits.requires_grad_()
    for label in (0, 1):
        terms = loss_terms(logits, torch.full((1, 4, 1), label), TERMS, focal_gamma=gamma)
        loss = total_loss(terms, ONE_EACH)
        assert loss.dtype == torch.float32 and loss.isfinite()
        (gradient,) = torch.autograd.grad(loss, logits)
        assert gradient.isfinite().all() and gradient.abs().max() > 0


def test_a_batch_of_nothing_but_ignored_pixels_costs_nothing_and_moves_nothing() -> None:
    logits, target = batch(6, ignored=1.1)
    weights, border = torch.ones(4), torch.ones(target.shape)
    terms = loss_terms(logits.requires_grad_(), target, TERMS, weights, border)
    assert [float(denominator) for _, denominator in terms.values()] == [0, 0, 0]
    loss = total_loss(terms, dict.fromkeys(TERMS, 100.0))
    loss.backward()
    assert float(loss.detach()) == 0 and logits.grad is not None and not logits.grad.any()


@pytest.mark.parametrize("name", TERMS)
def test_ignored_pixels_have_no_influence(name: str) -> None:
    logits, target = batch(7)
    changed = torch.where((target == 255)[:, None], -3 * logits + 1, logits)
    assert value(changed, target, name) == value(logits, target, name)


# Parts of a batch, sums


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), cut=st.integers(1, 4), ignored=st.sampled_from([0.0, 0.5, 0.97]))
def test_the_terms_of_two_parts_add_up_to_those_of_the_batch(seed: int, cut: int, ignored: float) -> None:
    logits, target = batch(seed, images=5, ignored=ignored)
    whole = loss_terms(logits, target, TERMS)
    parts = [loss_terms(logits[part], target[part], TERMS) for part in (slice(cut), slice(cut, None))]
    everyone = {name: denominator for name, (_, denominator) in whole.items()}
    for name in TERMS:
        for side in (0, 1):
            assert float(parts[0][name][side] + parts[1][name][side]) == pytest.approx(float(whole[name][side]))
    together = sum(float(total_loss(part, ONE_EACH, everyone)) for part in parts)
    assert together == pytest.approx(float(total_loss(whole, ONE_EACH)))


def test_the_total_weighs_its_terms() -> None:
    logits, target = batch(8)
    total = total_loss(loss_terms(logits, target, TERMS), {"dice": 3.0, "focal": 0.5})
    assert float(total) == pytest.approx(3 * value(logits, target, "dice") + 0.5 * value(logits, target, "focal"))


def test_half_precision_logits_are_summed_in_float32() -> None:
    logits = torch.zeros(1, 2, 300, 300, dtype=torch.bfloat16)
    numerator, denominator = loss_terms(logits, torch.zeros(1, 300, 300, dtype=torch.long), TERMS)["cross_entropy"]
    assert numerator.dtype == torch.float32 and float(denominator) == 90_000
    assert float(numerator) == pytest.approx(90_000 * math.log(2), rel=1e-5)


# Refusals and class weights


def test_an_unknown_loss_is_refused() -> None:
    with pytest.raises(UserError, match=r"unknown loss 'jaccard': use cross_entropy, dice, focal"):
        loss_terms(*batch(0), ["dice", "jaccard"])


@pytest.mark.parametrize("shape", [(2, 5, 6), (2, 6, 7), (1, 6, 6)])
def test_a_target_of_another_size_is_refused(shape: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        loss_terms(batch(0)[0], torch.zeros(shape, dtype=torch.long), TERMS)


def test_median_frequency_weights_balance_the_classes_that_occur() -> None:
    assert median_frequency_weights([800, 100, 0, 50]).tolist() == [0.125, 1, 0, 2]
    with pytest.raises(UserError, match="every pixel of the masks is ignored"):
        median_frequency_weights(np.zeros(3, np.int64))
