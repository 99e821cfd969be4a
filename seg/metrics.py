"""How good predicted masks are: IoU, Dice and accuracy over a data set and by image, a table and a plot of confusions.

Everything is counted in integers, so results do not depend on how pictures are grouped into batches and ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from rich.table import Table
from torch import Tensor

from core.cli.errors import UserError
from core.cli.files import atomic_path
from core.data.mask_classes import IGNORE

# Per-image scores are summed as whole multiples of 2^-40: exact in any order, with room for 8 million pictures.
_UNIT = 2.0**-40
_NUMBERED_CLASSES = 20  # with more, the cells of the plot are too small for numbers
_ROOMY_CLASSES = 8  # with more, too small for a decimal place


class SegmentationMetrics:
    """Counts of predictions against targets, batch by batch.

    Two families that never mix:

    - Data set: IoU = TP / (TP + FP + FN) and Dice = 2 TP / (2 TP + FP + FN) of a class from the pixels of all
      pictures together. A class that is neither in a target nor predicted is absent: null, and left out of the means.
    - By image: the same for each picture and the classes it has in target or prediction. The score of a picture is the
      mean over these; `per_image` has the mean over pictures with a valid pixel, and for each class the mean over the
      pictures that have it.

    Pixels whose target is 255 are left out of everything, whatever is predicted there.

    Args:
        classes: names, in the order of the class indices.
    """

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = list(classes)
        count = len(self.classes)
        self._confusion = torch.zeros(count, count, dtype=torch.int64)
        # For each class: sums of IoU and Dice (in units of _UNIT), pictures that have it.
        self._by_class = torch.zeros(3, count, dtype=torch.int64)
        # Sums of the pictures' mean IoU and Dice (in units), pictures with a valid pixel, pictures, ignored pixels.
        self._totals = torch.zeros(5, dtype=torch.int64)

    @property
    def confusion(self) -> np.ndarray:
        """Pixels by true class (rows) and predicted class (columns), int64 (C, C)."""
        return self._confusion.numpy().copy()

    def update(self, predicted: Tensor, target: Tensor) -> None:
        """Count one batch.

        Args:
            predicted: integers (N, H, W), class indices.
            target: integers (N, H, W), class indices or 255 = ignore; on the same device.

        Raises:
            UserError: a class index without a name.
            ValueError: the shapes differ.
        """
        if predicted.shape != target.shape:
            raise ValueError(f"prediction {tuple(predicted.shape)} does not fit target {tuple(target.shape)}")
        images, count = len(target), len(self.classes)
        valid = target != IGNORE
        true, guess = target[valid].long(), predicted[valid].long()
        for name, values in (("mask", true), ("prediction", guess)):
            if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < count:
                raise UserError(
                    f"a {name} holds class indices {int(values.min())} to {int(values.max())}, but there are {count} "
                    "classes: prepare the data set again with its class names"
                )
        image = torch.arange(images, device=target.device)[:, None, None].expand_as(target)[valid]
        cells = torch.bincount((image * count + true) * count + guess, minlength=images * count * count)
        confusions = cells.reshape(images, count, count).cpu()
        self._confusion += confusions.sum(0)
        *scores, present = _overlaps(confusions)
        for row, score in enumerate(scores):
            self._by_class[row] += _in_units(score).sum(0)
            self._totals[row] += _in_units(score.sum(1) / present.sum(1).clamp(min=1)).sum()
        self._by_class[2] += present.sum(0)
        self._totals[2:] += torch.tensor([int(present.any(1).sum()), images, target.numel() - true.numel()])

    def reduce(self, accelerator: Accelerator) -> SegmentationMetrics:
        """The counts of all ranks together, the same on each, exact; this object keeps its own."""
        parts = (self._confusion, self._by_class, self._totals)
        # One message, and on the ranks' device: NCCL takes no CPU tensors.
        mine = torch.cat([part.flatten() for part in parts]).to(accelerator.device)
        summed = accelerator.reduce(mine, reduction="sum").cpu().split([part.numel() for part in parts])
        total = SegmentationMetrics(self.classes)
        total._confusion, total._by_class, total._totals = (
            flat.reshape(part.shape) for flat, part in zip(summed, parts, strict=True)
        )
        return total

    def results(self) -> dict[str, Any]:
        """All scores, JSON-ready, shares between 0 and 1, null where there is nothing to score.

        Returns:
            `images`, `pixels` (valid), `ignored_pixels`, `dataset` (miou, mdice, pixel_accuracy, per_class of iou,
            dice and true pixels), `per_image` (images with a valid pixel, miou, mdice, per_class of iou, dice and
            images), `absent` (classes in neither targets nor predictions), `predicted_only` (classes in predictions
            alone: their IoU is 0 and counts). With two classes also `pixel_error`, the share of wrong pixels
            (ISBI 2012; Arganda-Carreras et al. 2015).
        """
        true, guessed = self._confusion.sum(1), self._confusion.sum(0)
        accuracy = _ratio(int(self._confusion.diagonal().sum()), int(true.sum()))
        iou, dice, present = (row[0] for row in _overlaps(self._confusion[None]))
        sums, totals = self._by_class[:2].double() * _UNIT, self._totals[:2].double() * _UNIT
        having, (scored, images, ignored) = self._by_class[2], self._totals[2:].tolist()
        result = {
            "images": images,
            "pixels": int(true.sum()),
            "ignored_pixels": ignored,
            "dataset": {
                "miou": _ratio(float(iou.sum()), int(present.sum())),
                "mdice": _ratio(float(dice.sum()), int(present.sum())),
                "pixel_accuracy": accuracy,
                "per_class": self._per_class(iou, dice, present, "pixels", true),
            },
            "per_image": {
                "images": scored,
                "miou": _ratio(float(totals[0]), scored),
                "mdice": _ratio(float(totals[1]), scored),
                "per_class": self._per_class(sums[0], sums[1], having, "images", having),
            },
            "absent": self._names((true == 0) & (guessed == 0)),
            "predicted_only": self._names((true == 0) & (guessed > 0)),
        }
        if len(self.classes) == 2:
            result["pixel_error"] = None if accuracy is None else 1 - accuracy
        return result

    def _per_class(self, iou: Tensor, dice: Tensor, parts: Tensor, key: str, counts: Tensor) -> dict[str, Any]:
        """Means of sums over the given number of parts, and one further count under `key`, all (C,), by class name."""
        columns = zip(self.classes, iou.tolist(), dice.tolist(), parts.tolist(), counts.tolist(), strict=True)
        return {name: {"iou": _ratio(a, n), "dice": _ratio(b, n), key: count} for name, a, b, n, count in columns}

    def _names(self, chosen: Tensor) -> list[str]:
        return [name for name, is_chosen in zip(self.classes, chosen.tolist(), strict=True) if is_chosen]


def _overlaps(confusions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """IoU and Dice, float64 (N, C), 0 where a class has no pixel, and whether it has one, from (N, C, C) counts."""
    both = confusions.diagonal(dim1=1, dim2=2)
    sizes = confusions.sum(2) + confusions.sum(1)
    present = sizes > 0
    iou = both.double() / (sizes - both).clamp(min=1)
    return iou, 2 * both.double() / sizes.clamp(min=1), present


def _in_units(scores: Tensor) -> Tensor:
    return (scores / _UNIT).round().long()


def _ratio(part: float, whole: int) -> float | None:
    return part / whole if whole else None


def plot_confusion(counts: np.ndarray, classes: Sequence[str], path: str | Path, title: str) -> None:
    """Write a confusion matrix (C, C) as PNG: each row in percent of the pixels of that true class, empty rows grey.

    Raises:
        UserError: the file cannot be written.
    """
    from matplotlib.figure import Figure  # takes half a second, which other commands need not wait for

    pixels = counts.sum(1, keepdims=True)
    shares = np.where(pixels > 0, 100 * counts / np.maximum(pixels, 1), np.nan)
    side = max(3.6, 0.45 * len(classes)) + 1.6
    figure = Figure(figsize=(side, side - 0.9), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.set_facecolor("0.85")  # shows where there is no number
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    axes.set_xticks(range(len(classes)), classes, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(classes)), classes)
    axes.set(xlabel="predicted class", ylabel="true class", title=title)
    roomy = len(classes) <= _ROOMY_CLASSES
    size = 10 if roomy else 8
    if len(classes) <= _NUMBERED_CLASSES:
        for (row, column), share in np.ndenumerate(shares):
            if share > 0 or (row == column and share == 0):  # an empty diagonal would look like a fault
                colour = "white" if share > 55 else "black"
                axes.text(column, row, _percent(share, roomy), ha="center", va="center", color=colour, fontsize=size)
    figure.colorbar(picture, label="% of the true class", shrink=0.8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def _percent(share: float, roomy: bool) -> str:
    if share == 0:
        return "0"
    if roomy:
        return f"{share:.1f}" if share >= 0.05 else "<0.1"
    return f"{share:.0f}" if share >= 0.5 else "<1"


def table(results: dict[str, Any]) -> Table:
    """The data-set scores by class for a terminal, from `SegmentationMetrics.results`."""
    dataset, pixels = results["dataset"], max(1, results["pixels"])
    lines = Table("class", caption=_caption(results))
    for heading in ("IoU", "Dice", "% of pixels"):
        lines.add_column(heading, justify="right")
    for name, scores in dataset["per_class"].items():
        lines.add_row(name, _score(scores["iou"]), _score(scores["dice"]), f"{100 * scores['pixels'] / pixels:.2f}")
    lines.add_section()
    lines.add_row("mean", _score(dataset["miou"]), _score(dataset["mdice"]), "")
    return lines


def _caption(results: dict[str, Any]) -> str:
    parts = [
        f"{results['images']:,} images, pixel accuracy {_score(results['dataset']['pixel_accuracy'])}",
        f"by image: mIoU {_score(results['per_image']['miou'])}, Dice {_score(results['per_image']['mdice'])}",
    ]
    for heading in ("absent", "predicted_only"):
        if results[heading]:
            parts.append(f"{heading.replace('_', ' ')}: {', '.join(results[heading])}")
    return "\n".join(parts)


def _score(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
