"""Train U-Nets that differ in their blocks for the same CPU time on drawn faces, and compare them in one table."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.table import Table

from core.cli.config import compose, quoted, typed
from core.cli.console import console
from core.cli.errors import CommandParser, UserError, reports_errors
from core.cli.files import write_json
from core.data.dataset import PreparedData
from core.nn.fuse import fold_batch_norm
from core.nn.inspect import inspect_network
from core.nn.model_file import build_model
from core.prepare.pipeline import prepare
from core.prepare.sources import drawn_source
from core.training.distributed import start_accelerator
from core.training.rundir import RunFolder
from scripts.bench import describe_run
from scripts.bench_parts import Bench, Settings
from seg.levels import LEVELS
from seg.metrics import SegmentationMetrics
from seg.scoring import predictions
from seg.settings import TrainConfig
from seg.trainer import Trainer

# Group norm, which standardised weights are meant for, has a row of plain blocks to compare with.
ROWS = [(block, "batch") for block in LEVELS if block != "standardised"] + [
    ("plain", "group"),
    ("standardised", "group"),
]
RECIPE = ["batch_size=4", "augment=none", "augment.flip=true", "workers=0"]
RECIPE += ["optim.lr=2e-3", "warmup=200", "ema_half_life=300"]
COLUMNS = {
    "block": "{}",
    "norm": "{}",
    "parameters": "{:,}",
    "multiplications": "{:,}",
    "ms_per_step": "{:.1f}",
    "images_seen": "{:,}",
    "miou": "{:.3f}",
}


def measure(block: str, norm: str, options: argparse.Namespace, accelerator: Accelerator, data: Path) -> dict[str, Any]:
    """One row: a U-Net trained for so many CPU seconds, at the rates of a run that ends then."""
    network = [f"model.network.block={block}", f"model.network.norm={norm}", f"model.network.widths={options.widths}"]
    words = [f"data={quoted(str(data))}", f"name={block}-{norm}", f"seed={options.seed}", *RECIPE, *network]
    prepared, folder = PreparedData.open(data), RunFolder(data.parent / f"{block}-{norm}")
    trainer = Trainer(typed(compose("seg", words), TrainConfig), accelerator, prepared, folder)
    batch, spent, started = trainer.config.batch_size, 0.0, time.process_time()
    while spent < options.seconds:
        if spent:  # the schedule follows the time
            trainer.config.total_images = round(trainer.images_seen * options.seconds / spent)
        trainer.step()
        spent = time.process_time() - started
    metrics, rows = SegmentationMetrics(prepared.classes), prepared.indices("valid")
    for predicted, true in predictions(fold_batch_norm(trainer.ema.model), prepared, rows):
        metrics.update(predicted, true)
    with torch.device("meta"):
        found = inspect_network(build_model(trainer.recipe), torch.zeros(1, 3, options.size, options.size))
    return {
        "block": block,
        "norm": norm,
        "parameters": found.total("parameters"),
        "multiplications": found.total("multiplications"),
        "ms_per_step": 1e3 * spent * batch / trainer.images_seen,
        "images_seen": trainer.images_seen,
        "miou": metrics.results()["dataset"]["miou"],
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read and check the command line (default: sys.argv)."""
    parser = CommandParser(prog="python -m scripts.compare_blocks", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60, help="CPU time to train each (default %(default)g)")
    parser.add_argument("--size", type=int, default=64, help="side of the faces (default %(default)d)")
    parser.add_argument("--count", type=int, default=2000, help="faces, a tenth to validate (default %(default)d)")
    parser.add_argument("--widths", default="[16,32,64,128,256]", help="of the U-Net (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of faces and training (default %(default)d)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the table as JSON, too")
    options = parser.parse_args(arguments)
    if not options.seconds > 0:
        raise UserError("--seconds must be above 0")
    if options.count < 10:
        raise UserError("--count must be at least 10: one of ten faces is for validation")
    return options


@reports_errors
def main() -> None:
    """Command line entry."""
    options = parse()
    with tempfile.TemporaryDirectory(prefix="facet-blocks-") as own, mock.patch.object(console, "quiet", True):
        folder, os.environ["ACCELERATE_USE_CPU"] = Path(own), "true"
        accelerator = start_accelerator("fp32", None, folder)
        torch.set_num_threads(1)
        prepare(drawn_source(options.count, options.seed), folder / "faces", size=options.size, quiet=True)
        run = describe_run(Bench(Settings(), accelerator, folder))
        run["command"] = shlex.join(["python", "-m", "scripts.compare_blocks", *sys.argv[1:]])
        results = [measure(*row, options, accelerator, folder / "faces") for row in ROWS]
    table = Table(*(name.replace("_", " ") for name in COLUMNS))
    for result in results:
        table.add_row(*(form.format(result[name]) for name, form in COLUMNS.items()))
    print("\n".join(f"{key}: {value}" for key, value in run.items()))
    Console(width=None if sys.stdout.isatty() else 150).print(table)
    if options.json:
        write_json(options.json, {"run": run, "settings": vars(options) | {"json": None}, "blocks": results})


if __name__ == "__main__":
    main()
