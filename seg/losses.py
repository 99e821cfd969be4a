"""Segmentation losses, each as a numerator and a denominator, which add up exactly over ranks and parts of a batch.

All are computed in float32 or better, whatever the type of the logits, and leave ignored pixels out.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from core.cli.errors import UserError
from core.data.mask_classes import IGNORE

TERMS = ("cross_entropy", "dice", "focal")

Fractions = dict[str, tuple[Tensor, Tensor]]


def loss_terms(
    logits: Tensor,
    target: Tensor,
    names: Collection[str],
    class_weights: Tensor | None = None,
    border: Tensor | None = None,
    focal_gamma: float = 2.0,
) -> Fractions:
    """The chosen losses of one batch.

    With p the softmax, p_t its value for the true class and the pixel weight w = class weight + border weight, 0 at
    ignored pixels (Ronneberger et al. 2015, eq. 1-2):

    - `cross_entropy`: sum of w * -log p_t over the sum of w.
    - `focal`: sum of w * (1 - p_t)^gamma * -log p_t over the sum of w (Lin et al. 2017, eq. 4).
    - `dice`: sum of 1 - 2 sum(p t) / (sum p + sum t) over the pairs of an image and a class that occurs in it, over
      the number of pairs. This is Milletari et al. (2016, section 3) with plain for squared sums, and by class and
      image, so that a large background counts no more than a small part. Pixel weights do not enter.

    Args:
        logits: (N, C, H, W), any floating type.
        target: int64 (N, H, W), 0..C-1 or 255 = ignore.
        names: which of `TERMS`.
        class_weights: (C,), or None for 1 everywhere.
        border: (N, H, W), added to the class weights, or None.
        focal_gamma: at least 0; 0 makes `focal` the cross-entropy.

    Returns:
        Name to (numerator, denominator), scalars; the denominators have no gradient. All are 0 where every pixel is
        ignored.

    Raises:
        UserError: a name is not one of `TERMS`.
        ValueError: the sizes of logits and target differ.
    """
    if unknown := sorted(set(names) - set(TERMS)):
        raise UserError(f"unknown loss {unknown[0]!r}: use {', '.join(TERMS)}")
    if logits.shape[:1] + logits.shape[2:] != target.shape:  # gather would accept a smaller target silently
        raise ValueError(f"logits {tuple(logits.shape)} do not fit the target {tuple(target.shape)}")
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    log_p = F.log_softmax(logits, dim=1)
    valid = target != IGNORE
    terms: Fractions = {}
    if "dice" in names:
        terms["dice"] = _dice(log_p.exp(), target, valid)
    if "cross_entropy" in names or "focal" in names:
        known = target.masked_fill(~valid, 0)
        log_pt = log_p.gather(1, known[:, None])[:, 0]
        weight = _pixel_weights(known, valid, class_weights, border, log_p.dtype)
        total = weight.sum()
        if "cross_entropy" in names:
            terms["cross_entropy"] = -(weight * log_pt).sum(), total
        if "focal" in names:
            terms["focal"] = -(weight * _miss(log_pt).pow(focal_gamma) * log_pt).sum(), total
    return terms


def _pixel_weights(
    known: Tensor, valid: Tensor, class_weights: Tensor | None, border: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """(N, H, W): class weight plus border weight, 0 at ignored pixels."""
    weight = torch.ones_like(known, dtype=dtype) if class_weights is None else class_weights.to(dtype)[known]
    if border is not None:
        weight = weight + border.to(dtype)
    return weight.masked_fill(~valid, 0)


def _miss(log_pt: Tensor) -> Tensor:
    """1 - p_t, accurate near p_t = 1 and never 0, where a power below 1 has no finite slope."""
    return (-torch.expm1(log_pt)).clamp(min=torch.finfo(log_pt.dtype).eps)


def _dice(p: Tensor, target: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Numerator and denominator of the Dice loss from probabilities (N, C, H, W)."""
    # Not scatter_add, which on a GPU adds in a different order each time.
    members = target[:, None] == torch.arange(p.shape[1], device=p.device)[:, None, None]
    overlap = p.masked_fill(~members, 0).sum((2, 3))
    size = members.sum((2, 3))
    predicted = p.masked_fill(~valid[:, None], 0).sum((2, 3))
    # A class that occurs has at least one pixel, so the clamp only keeps the others from 0 / 0.
    loss = 1 - 2 * overlap / (predicted + size).clamp(min=1)
    present = size > 0
    return loss.masked_fill(~present, 0).sum(), present.sum().to(p.dtype)


def total_loss(terms: Fractions, factors: dict[str, float], denominators: dict[str, Tensor] | None = None) -> Tensor:
    """Sum of factor * numerator / denominator; a term whose denominator is 0 (nothing but ignored pixels) adds 0.

    Args:
        terms: from `loss_terms`.
        factors: by name; every name must be in `terms`.
        denominators: by name, summed over all ranks, in place of those in `terms`. The ranks' values then add up to
            the loss of the whole batch, so gradients must be summed, not averaged.
    """
    parts = []
    for name, factor in factors.items():
        numerator, own = terms[name]
        denominator = own if denominators is None else denominators[name]
        parts.append(factor * numerator / torch.where(denominator > 0, denominator, torch.ones_like(denominator)))
    return torch.stack(parts).sum()


def median_frequency_weights(counts: Sequence[int] | np.ndarray) -> Tensor:
    """Class weights that balance rare and frequent classes: median frequency / frequency (Eigen & Fergus 2015).

    The frequency of a class is its share of all labelled pixels (the paper divides by the pixels of the images that
    have the class). Classes without a pixel are left out of the median and get weight 0.

    Args:
        counts: labelled pixels of each class, (C,).

    Returns:
        float32 (C,).

    Raises:
        UserError: no pixel is labelled.
    """
    pixels = np.asarray(counts, np.float64)
    present = pixels > 0
    if not present.any():
        raise UserError("class weights need labelled pixels, and every pixel of the masks is ignored")
    frequency = pixels / pixels.sum()
    weights = np.zeros(len(pixels))
    weights[present] = np.median(frequency[present]) / frequency[present]
    return torch.from_numpy(weights).float()
