"""Score a segmenter on a prepared data set: `facet seg-evaluate runs/first --data data/faces --split valid`."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from core.cli.console import progress_bar, warn
from core.cli.errors import CommandParser, UserError, reports_errors
from core.cli.files import writable
from core.data.dataset import PreparedData
from core.data.images import write_png
from core.nn.model_file import model_file
from core.training.machine import pick_device, set_up_cpu
from seg.loading import load_unet
from seg.metrics import SegmentationMetrics, table
from seg.scoring import comparison, data_identity, predictions, scored, write_scores

EXAMPLES = """examples:
  facet seg-evaluate runs/first --data data/faces
  facet seg-evaluate model.safetensors --data data/faces --split test --out scores/test.json

Writes the scores as JSON, the confusion matrix as PNG beside it, and prints a table. Data-set figures come
from one confusion matrix over all pictures; per-image figures are means over pictures."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read and check the command line."""
    parser = CommandParser(prog="facet seg-evaluate", description=__doc__, epilog=EXAMPLES)
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
    if info["classes"] != data.classes:
        raise UserError(
            f"{file} knows the classes {', '.join(info['classes'])}, but {data.path} has {', '.join(data.classes)}: "
            "use the data set it was trained for, or train on this one"
        )
    if data.image_size != info["image_size"]:
        warn(f"trained on pictures of {info['image_size']} pixels, {data.path} has {data.image_size}: a poor match")
    out = options.out or file.parent / f"{file.stem}-{options.split}.json"
    if not writable(out.parent):
        raise UserError(f"the scores cannot be written to {out}: give --out FILE.json")
    rows = data.indices(options.split)
    metrics = SegmentationMetrics(data.classes)
    with progress_bar() as bar:
        task = bar.add_task("evaluating", total=len(rows))
        for predicted, true in predictions(model, data, rows):
            metrics.update(predicted, true)
            bar.update(task, advance=len(true))
    results = scored(metrics, data, options.split)
    identity = {
        "model": str(file),
        "model_sha256": info["sha256"],
        "images_seen": info["images_seen"],
        "trained_size": info["image_size"],
        "split": options.split,
        **data_identity(data),
    }
    write_scores(results, metrics, out, identity)
    write_png(out.with_suffix(".examples.png"), comparison(model, data, rows))
    Console(markup=False).print(table(results))
    print(f"written: {out}, {out.with_suffix('.png')} and {out.with_suffix('.examples.png')}")


if __name__ == "__main__":
    main()
