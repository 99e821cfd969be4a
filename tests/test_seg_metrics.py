"""Scores of masks against torchmetrics, closed forms and themselves in other groupings; the plot and the table."""

from __future__ import annotations

import io
import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.axes import Axes
from PIL import Image
from rich.console import Console
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix, MulticlassF1Score, MulticlassJaccardIndex

from core.cli.errors import UserError
from seg.metrics import SegmentationMetrics, plot_confusion, table

NAMES = ["background", "skin", "hair", "hat", "neck"]


def pictures(seed: int, count: int = 6, classes: int = 4, ignored: float = 0.2) -> tuple[Tensor, Tensor]:
    """A prediction that is right about half of the time, and its target, of which about a share is ignored."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(0, classes, (count, 5, 7), generator=generator)
    # Blocks of one class, so that pictures lack classes.
    target[:, :, :4] = target[:, :1, :1]
    guess = torch.randint(0, classes, target.shape, generator=generator)
    predicted = torch.where(torch.rand(target.shape, generator=generator) < 0.5, target, guess)
    target[torch.rand(target.shape, generator=generator) < ignored] = 255
    return predicted, target


def scored(predicted: Tensor, target: Tensor, names: list[str] = NAMES) -> dict[str, Any]:
    metrics = SegmentationMetrics(names)
    metrics.update(predicted, target)
    return metrics.results()


def ranks_together(*others: SegmentationMetrics) -> Any:
    """A stand-in for an Accelerator of ranks that hold these metrics besides the caller's."""

    def reduce(mine: Tensor, reduction: str) -> Tensor:
        assert reduction == "sum"
        caught: list[Tensor] = []
        catcher: Any = SimpleNamespace(device="cpu", reduce=lambda theirs, reduction: caught.append(theirs) or theirs)
        for other in others:
            other.reduce(catcher)
        return torch.stack([mine, *caught]).sum(0)

    return SimpleNamespace(device="cpu", reduce=reduce)


# Another implementation


@pytest.mark.parametrize("seed", range(3))
def test_the_data_set_scores_are_those_of_torchmetrics(seed: int) -> None:
    predicted, target = pictures(seed, classes=5)
    ours = scored(predicted, target)["dataset"]
    settings: dict[str, Any] = {"num_classes": 5, "ignore_index": 255}
    for metric, by_class, mean in (("iou", MulticlassJaccardIndex, "miou"), ("dice", MulticlassF1Score, "mdice")):
        theirs = by_class(average="none", **settings)(predicted, target)
        assert [scores[metric] for scores in ours["per_class"].values()] == pytest.approx(theirs.tolist())
        assert ours[mean] == pytest.approx(float(by_class(average="macro", **settings)(predicted, target)))
    accuracy = MulticlassF1Score(average="micro", **settings)(predicted, target)
    assert ours["pixel_accuracy"] == pytest.approx(float(accuracy))


def test_the_confusion_matrix_is_that_of_torchmetrics() -> None:
    predicted, target = pictures(3, classes=5)
    metrics = SegmentationMetrics(NAMES)
    metrics.update(predicted, target)
    theirs = MulticlassConfusionMatrix(num_classes=5, ignore_index=255)(predicted, target)
    assert metrics.confusion.tolist() == theirs.tolist()


def test_the_scores_by_image_are_means_of_those_of_torchmetrics_over_what_each_picture_has() -> None:
    predicted, target = pictures(4, classes=4)
    rows, means = [], []
    for guess, true in zip(predicted, target, strict=True):
        row = MulticlassJaccardIndex(num_classes=5, average="none", ignore_index=255)(guess[None], true[None])
        valid = true != 255
        present = [bool(((guess == label) & valid).any() or (true == label).any()) for label in range(5)]
        rows.append([float(score) if there else np.nan for score, there in zip(row, present, strict=True)])
        means.append(np.nanmean(rows[-1]))
    ours = scored(predicted, target)["per_image"]
    assert ours["miou"] == pytest.approx(np.mean(means))
    for label, name in enumerate(NAMES[:4]):
        column = [row[label] for row in rows]
        assert ours["per_class"][name]["iou"] == pytest.approx(np.nanmean(column))
        assert ours["per_class"][name]["images"] == np.isfinite(column).sum()
    assert ours["per_class"]["neck"] == {"iou": None, "dice": None, "images": 0}


# Closed forms


def test_both_families_of_a_small_example() -> None:
    target = torch.tensor([[[0, 0, 1, 1]], [[0, 0, 0, 255]]])
    predicted = torch.tensor([[[0, 1, 1, 1]], [[0, 0, 0, 1]]])
    result = scored(predicted, target, ["cell", "membrane"])
    assert result == {
        "images": 2,
        "pixels": 7,
        "ignored_pixels": 1,
        "dataset": {
            "miou": pytest.approx((4 / 5 + 2 / 3) / 2),
            "mdice": pytest.approx((8 / 9 + 4 / 5) / 2),
            "pixel_accuracy": pytest.approx(6 / 7),
            "per_class": {
                "cell": {"iou": pytest.approx(4 / 5), "dice": pytest.approx(8 / 9), "pixels": 5},
                "membrane": {"iou": pytest.approx(2 / 3), "dice": pytest.approx(4 / 5), "pixels": 2},
            },
        },
        "per_image": {
            "images": 2,
            "miou": pytest.approx(((1 / 2 + 2 / 3) / 2 + 1) / 2),
            "mdice": pytest.approx(((2 / 3 + 4 / 5) / 2 + 1) / 2),
            "per_class": {
                "cell": {"iou": pytest.approx((1 / 2 + 1) / 2), "dice": pytest.approx((2 / 3 + 1) / 2), "images": 2},
                "membrane": {"iou": pytest.approx(2 / 3), "dice": pytest.approx(4 / 5), "images": 1},
            },
        },
        "absent": [],
        "predicted_only": [],
        "pixel_error": pytest.approx(1 / 7),
    }


def test_absent_classes_are_named_and_left_out_and_invented_ones_count_as_zero() -> None:
    target = torch.tensor([[[0, 0, 0, 1]]])
    predicted = torch.tensor([[[0, 0, 2, 1]]])
    result = scored(predicted, target)
    assert result["absent"] == ["hat", "neck"] and result["predicted_only"] == ["hair"]
    per_class = result["dataset"]["per_class"]
    assert per_class["hat"] == {"iou": None, "dice": None, "pixels": 0}
    assert per_class["hair"] == {"iou": 0, "dice": 0, "pixels": 0}
    assert result["dataset"]["miou"] == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert "pixel_error" not in result


@pytest.mark.parametrize("images", [0, 2])
def test_without_a_valid_pixel_every_score_is_null(images: int) -> None:
    nothing = torch.full((images, 3, 3), 255, dtype=torch.uint8)
    result = scored(torch.zeros_like(nothing), nothing, ["cell", "membrane"])
    assert result["images"] == images and result["ignored_pixels"] == 9 * images and result["pixels"] == 0
    scores = [result["dataset"][key] for key in ("miou", "mdice", "pixel_accuracy")]
    assert [*scores, result["per_image"]["miou"], result["pixel_error"]] == [None] * 5
    assert result["absent"] == ["cell", "membrane"]


def test_a_picture_without_a_valid_pixel_does_not_pull_the_mean_by_image_down() -> None:
    target = torch.zeros(2, 2, 2, dtype=torch.uint8)
    target[1] = 255
    by_image = scored(torch.zeros_like(target), target)["per_image"]
    assert by_image["miou"] == 1 and by_image["images"] == 1


# Grouping


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), cuts=st.sets(st.integers(1, 8)), ignored=st.sampled_from([0.0, 0.3, 0.95]))
def test_any_grouping_into_batches_and_ranks_gives_identical_results(seed: int, cuts: set[int], ignored: float) -> None:
    predicted, target = pictures(seed, count=9, ignored=ignored)
    whole = scored(predicted, target)
    edges = [0, *sorted(cuts), 9]
    batches = [slice(start, stop) for start, stop in pairwise(edges)]
    one, ranks = SegmentationMetrics(NAMES), [SegmentationMetrics(NAMES) for _ in range(3)]
    for index, batch in enumerate(batches):
        one.update(predicted[batch], target[batch].to(torch.uint8))
        ranks[index % 3].update(predicted[batch], target[batch])
    assert one.results() == whole
    together = ranks[0].reduce(ranks_together(*ranks[1:]))
    assert together.results() == whole
    assert np.array_equal(together.confusion, one.confusion)


def test_the_counts_of_a_rank_stay_its_own() -> None:
    metrics, other = SegmentationMetrics(NAMES), SegmentationMetrics(NAMES)
    metrics.update(*pictures(5))
    other.update(*pictures(6))
    before = metrics.results()
    assert metrics.reduce(ranks_together(other)).results() != before
    assert metrics.results() == before


def test_results_are_json() -> None:
    result = scored(*pictures(7))
    assert json.loads(json.dumps(result, allow_nan=False)) == result


# Refusals


@pytest.mark.parametrize(("label", "where"), [(5, "mask"), (254, "mask"), (5, "prediction"), (255, "prediction")])
def test_a_class_without_a_name_is_refused_and_counts_nowhere(label: int, where: str) -> None:
    target = torch.zeros(1, 4, 4, dtype=torch.uint8)
    predicted = torch.zeros_like(target)
    (target if where == "mask" else predicted)[0, 1, 2] = label
    metrics = SegmentationMetrics(NAMES)
    with pytest.raises(UserError, match=f"a {where} holds class indices 0 to {label}, but there are 5 classes"):
        metrics.update(predicted, target)
    assert metrics.results()["images"] == 0 and not metrics.confusion.any()


def test_masks_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        scored(torch.zeros(1, 4, 5, dtype=torch.long), torch.zeros(1, 4, 4, dtype=torch.long))


# What a person sees


def test_the_plot_shades_rows_by_share_and_greys_classes_without_pixels(tmp_path: Path) -> None:
    counts = np.zeros((25, 25), np.int64)
    counts[np.arange(24), np.arange(24)] = 7
    plot_confusion(counts, [str(label) for label in range(25)], tmp_path / "plots" / "confusion.png", "25 classes")
    with Image.open(tmp_path / "plots" / "confusion.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int).reshape(-1, 3)
    darkest, lightest, grey = (8, 48, 107), (247, 251, 255), (217, 217, 217)
    shares = {colour: (np.abs(pixels - colour).max(1) <= 1).sum() for colour in (darkest, lightest, grey)}
    # The colour bar shows a little of both ends too; of the matrix itself 24 cells are full, 25 grey and 576 empty.
    cell = shares[grey] / 25
    assert cell > 100
    assert 22 < shares[darkest] / cell < 30
    assert 500 < shares[lightest] / cell < 600
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["confusion.png"]


def test_the_diagonal_of_the_plot_has_a_number_also_where_nothing_was_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = {}
    monkeypatch.setattr(Axes, "text", lambda self, column, row, text, **style: shown.update({(row, column): text}))
    counts = np.array([[5, 5, 0], [2, 0, 8], [0, 0, 0]])
    plot_confusion(counts, ["face", "glasses", "absent"], tmp_path / "confusion.png", "")
    assert shown == {(0, 0): "50.0", (0, 1): "50.0", (1, 0): "20.0", (1, 1): "0", (1, 2): "80.0"}


def test_the_table_has_a_line_for_every_class_and_the_mean() -> None:
    target = torch.tensor([[[0, 0, 0, 1]]])
    stream = io.StringIO()
    result = scored(torch.tensor([[[0, 0, 2, 1]]]), target)
    Console(file=stream, width=80).print(table(result))
    text = stream.getvalue()
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    assert cells == [
        ["background", "0.6667", "0.8000", "75.00"],
        ["skin", "1.0000", "1.0000", "25.00"],
        ["hair", "0.0000", "0.0000", "0.00"],
        ["hat", "-", "-", "0.00"],
        ["neck", "-", "-", "0.00"],
        ["mean", "0.5556", "0.6000", ""],
    ]
    assert "pixel accuracy 0.7500" in text and "absent: hat, neck" in text and "predicted only: hair" in text
