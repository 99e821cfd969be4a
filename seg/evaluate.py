"""Score a segmenter on a prepared data set: `python -m seg.evaluate runs/first --data data/faces --split valid`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from core.cli.console import progress_bar, warn
from core.cli.errors import CommandParser, UserError, reports_errors
from core.cli.files import sha256_of, write_json
from core.data.dataset import PreparedData
from core.data.images import make_grid, to_float, write_png
from core.nn.model_file import model_file
from core.training.machine import full_precision, pick_device, set_up_cpu
from seg.loading import load_unet
from seg.metrics import SegmentationMetrics, plot_confusion, table
from seg.tiling import mirror
from seg.unet import UNet

PIXELS_AT_ONCE = 1 << 19  # 32 pictures of 128x128 in a forward pass, 2 of 512x512
EXAMPLES_SHOWN = 8


def whole_logits(model: UNet, images: Tensor) -> Tensor:
    """Logits (N, classes, H, W) at the size of `images` (N, C, H, W), whatever the padding of the network.

    A `valid` network sees the pictures mirrored beyond their borders.
    """
    if model.padding == "same":
        return model(images)
    height, width = images.shape[2:]
    rows, columns = (
        mirror(np.arange(-model.margin, model.input_size(side) - model.margin), side) for side in (height, width)
    )
    return model(images[:, :, rows][:, :, :, columns])[:, :, :height, :width]


@torch.inference_mode()
def predictions(model: UNet, data: PreparedData, rows: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
    """Predicted and true masks (N, H, W) of some rows of `data`, batch by batch, in the order of `rows`."""
    assert data.masks is not None
    device = next(model.parameters()).device
    batch_size = max(1, PIXELS_AT_ONCE // data.image_size**2)
    for start in range(0, len(rows), batch_size):
        chosen = rows[start : start + batch_size]
        images = to_float(torch.from_numpy(data.images[chosen]).to(device))
        with full_precision(device):
            predicted = whole_logits(model, images).argmax(1)
        yield predicted, torch.from_numpy(data.masks[chosen]).to(device).long()


def comparison(model: UNet, data: PreparedData, rows: np.ndarray) -> np.ndarray:
    """Rows of picture, true mask, predicted mask side by side for the first few of `rows`; uint8 (H, W, 3).

    Ignored pixels are white.
    """
    assert data.masks is not None
    rows = rows[: EXAMPLES_SHOWN if data.image_size <= 128 else 3]
    colours = np.full((256, 3), 255, np.uint8)
    colours[: len(data.palette)] = data.palette
    found = torch.cat([predicted for predicted, _ in predictions(model, data, rows)]).cpu().numpy()
    tiles = []
    for row, predicted in zip(rows, found, strict=True):
        tiles += [data.images[row], colours[data.masks[row]], colours[predicted]]
    return make_grid(np.stack(tiles), columns=3 if data.image_size > 128 else 6)


def check_classes(classes: list[str], data: PreparedData, what: str) -> None:
    """Refuse a data set whose classes are not those of a model.

    Raises:
        UserError: naming both.
    """
    if classes != data.classes:
        raise UserError(
            f"{what} knows the classes {', '.join(classes)}, but {data.path} has {', '.join(data.classes)}: "
            "use the data set it was trained for, or train on this one"
        )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read and check the command line."""
    parser = CommandParser(
        prog="python -m seg.evaluate",
        description=__doc__,
        epilog="examples:\n"
        "  python -m seg.evaluate runs/first --data data/faces\n"
        "  python -m seg.evaluate model.safetensors --data data/faces --split test --out scores/test.json\n\n"
        "Writes the scores as JSON, the confusion matrix as PNG beside it, and prints a table. Data-set figures come\n"
        "from one confusion matrix over all pictures; per-image figures are means over pictures.",
    )
    parser.add_argument("source", type=Path, help="run folder (its best weights) or .safetensors file")
    parser.add_argument("--data", type=Path, required=True, help="prepared data set with masks")
    parser.add_argument("--split", default="valid", help="all, train, valid or test (default valid)")
    parser.add_argument("--out", type=Path, help="JSON file (default: <model>-<split>.json beside the model)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default auto)")
    options = parser.parse_args(arguments)
    if options.out is not None and options.out.suffix != ".json":
        raise UserError(f"--out {options.out} must end in .json; the confusion matrix goes beside it as .png")
    return options


@reports_errors
def main() -> None:
    """Command line entry."""
    options = parse()
    set_up_cpu()
    file = model_file(options.source)
    model, info = load_unet(file, pick_device(options.device))
    data = PreparedData.open(options.data)
    check_classes(info["classes"], data, str(file))
    if data.image_size != info["image_size"]:
        warn(f"trained on pictures of {info['image_size']} pixels, {data.path} has {data.image_size}: a poor match")
    rows = data.indices(options.split)
    metrics = SegmentationMetrics(data.classes)
    with progress_bar() as bar:
        task = bar.add_task("evaluating", total=len(rows))
        for predicted, true in predictions(model, data, rows):
            metrics.update(predicted, true)
            bar.update(task, advance=len(true))
    results = scored(metrics, data, options.split)
    out = options.out or file.parent / f"{file.stem}-{options.split}.json"
    report(
        results,
        metrics,
        out,
        {
            "model": str(file),
            "model_sha256": sha256_of(file),
            "images_seen": info["images_seen"],
            "trained_size": info["image_size"],
            "split": options.split,
            **data_identity(data),
        },
    )
    write_png(out.with_suffix(".examples.png"), comparison(model, data, rows))
    Console().print(table(results))
    print(f"written: {out}, {out.with_suffix('.png')} and {out.with_suffix('.examples.png')}")


def data_identity(data: PreparedData) -> dict[str, Any]:
    """What names a data set in results."""
    hashes = {"images_sha256": data.fingerprint, "masks_sha256": data.meta["sha256"].get("masks.npy")}
    return {"data": {"source": data.meta.get("source"), "count": len(data), "image_size": data.image_size, **hashes}}


def scored(metrics: SegmentationMetrics, data: PreparedData, split: str) -> dict[str, Any]:
    """The results of `metrics`.

    Raises:
        UserError: no pixel of the split could be scored.
    """
    results = metrics.results()
    if results["dataset"]["miou"] is None:
        raise UserError(f"{data.path}: every pixel of split {split!r} is ignored (255)")
    return results


def report(results: dict[str, Any], metrics: SegmentationMetrics, out: Path, identity: dict[str, Any]) -> None:
    """Write scores as JSON and their confusion matrix as PNG beside it."""
    write_json(out, {**identity, **results})
    title = f"mIoU {results['dataset']['miou']:.3f}, {results['images']:,} images"
    plot_confusion(metrics.confusion, metrics.classes, out.with_suffix(".png"), title)


if __name__ == "__main__":
    main()
