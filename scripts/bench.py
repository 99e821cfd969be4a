"""Measure Facet against what one would write instead, side by side in one run: one table, and JSON."""

from __future__ import annotations

import argparse
import datetime
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate.utils import broadcast_object_list
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from core.cli.console import console
from core.cli.errors import CommandParser, UserError, reports_errors
from core.cli.files import write_json
from core.training.distributed import PRECISIONS, process_count, start_accelerator, wait_for_all
from core.training.machine import choose_precision, cpu_cores, cpuinfo, native_bf16, pick_device
from scripts import bench_parts as parts
from scripts.bench_measure import Result
from scripts.bench_parts import Bench, Settings
from scripts.bench_quality import quality

TRAINING = ("gan-step", "gan-epoch", "unet-step", "data", "scaling")  # on any number of processes
ALONE = ("sample", "fold", "features", "frechet", "prepare", "ranks")
PARTS: dict[str, Callable[[Bench], Result]] = {n: getattr(parts, n.replace("-", "_")) for n in TRAINING + ALONE}
DEFAULT = [part for part in PARTS if part not in ("scaling", "fold", "ranks")]
LONG = {"quality": quality}  # hours
PAPER: dict[str, Any] = {"unet_widths": (64, 128, 256, 512, 1024), "unet_size": 256}
# A smaller product does not fill a large GPU; fewer images would measure how long pytorch-fid's workers take to start.
GPU = {"matrix": 8192, "features": 1000}

EXAMPLES = f"""
parts (default: all but scaling, fold, ranks and quality, in two to three minutes on two cores):
{chr(10).join(f"  {name:<11} {part.__doc__}" for name, part in (PARTS | LONG).items())}

examples:
  facet bench
  facet bench --parts gan-step gan-epoch --seconds 60 --json bench.json
  facet bench --parts unet-step --paper --precision bf16            the paper's widths at 256x256, for a GPU
  facet bench --parts quality --data data/celeba --weights pt_inception-2015-12-05-6726825d.pth --keep runs/quality
  accelerate launch --quiet --multi_gpu --num_processes 4 -m scripts.bench --parts gan-step gan-epoch --batch 2048

A GPU is used if there is one (unless ACCELERATE_USE_CPU=true). Both sides take turns, A B A B ..., in one process;
first runs do not count. Ratio: median and quartiles over neighbouring turns; above 1 ours is faster. Under accelerate
launch the parts that train run on all processes, and the others are left out. docs/performance.md explains each part.
"""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read and check the command line (default: sys.argv)."""
    parser = CommandParser(prog="facet bench", description=__doc__, epilog=EXAMPLES)
    parser.add_argument("--parts", nargs="+", choices=["all", *PARTS, *LONG], metavar="P", help="what to measure")
    parser.add_argument("--seconds", type=float, default=Settings.seconds, help="per part (default %(default)g)")
    parser.add_argument("--batch", type=int, default=Settings.batch, help="images per DCGAN step (default %(default)d)")
    parser.add_argument("--size", type=int, default=Settings.size, help="side of the faces (default %(default)d)")
    parser.add_argument("--width", type=int, default=Settings.width, help="DCGAN feature maps (default %(default)d)")
    parser.add_argument(
        "--unet-batch", type=int, metavar="N", default=Settings.unet_batch, help="images (default %(default)d)"
    )
    parser.add_argument("--precision", choices=("auto", *PRECISIONS), default="auto", help="of our side (default auto)")
    parser.add_argument("--compile", action="store_true", help="torch.compile and fused optimisers on our side")
    parser.add_argument("--paper", action="store_true", help="U-Net of the paper's widths at 256x256")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the table as JSON, too")
    parser.add_argument("--data", metavar="FOLDER", help="of quality: prepared data set")
    parser.add_argument("--weights", metavar="PATH", help="of quality: Inception (default: a download)")
    parser.add_argument("--keep", metavar="FOLDER", help="of quality: where the same command continues")
    parser.add_argument("--target", type=float, default=Settings.target, help="of quality (default %(default)g)")
    options, processes = parser.parse_args(arguments), process_count()
    for name, batch in (("--batch", options.batch), ("--unet-batch", options.unet_batch)):
        if batch < 2 * processes or batch % processes:
            raise UserError(f"{name} must be at least {2 * processes} and divisible by the {processes} process(es)")
    if not 0 < options.seconds < 1e5:
        raise UserError("--seconds must be above 0 (and below 100,000)")
    if options.size not in (32, 64, 128, 256):
        raise UserError("--size must be 32, 64, 128 or 256: a DCGAN doubles, and the drawn faces are no larger")
    if "quality" in (options.parts or ()) and options.data is None:
        raise UserError("--parts quality needs --data, a prepared data set")
    alone = [part for part in options.parts or () if part in ALONE or part in LONG]
    if alone and processes > 1:
        raise UserError(f"--parts {alone[0]} runs on one process: start it without accelerate launch")
    wanted, possible = options.parts or DEFAULT, TRAINING + ALONE if processes == 1 else TRAINING
    options.parts = [part for part in possible if part in wanted or "all" in wanted]
    options.parts += [part for part in LONG if part in wanted]
    return options


def choose_settings(options: argparse.Namespace, device: torch.device) -> Settings:
    """What the command line says, with sizes that suit the device."""
    given = {name: value for name, value in vars(options).items() if hasattr(Settings, name)}
    given |= (PAPER if options.paper else {}) | (GPU if device.type == "cuda" else {})
    return Settings(**given | {"precision": choose_precision(options.precision, device)})


def describe_run(bench: Bench) -> dict[str, Any]:
    """Machine, software, command and commit, without which a measured number means nothing."""
    device = bench.accelerator.device
    return {
        "command": shlex.join(["python", "-m", "scripts.bench", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": describe_commit(),
        "cpu": cpuinfo("model name") or platform.processor() or platform.machine(),
        "cores": cpu_cores(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "device": device.type,
        "processes": bench.accelerator.num_processes,
        "native_bf16": native_bf16(device),
        "precision": bench.settings.precision,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def describe_commit() -> str | None:
    """The commit of this checkout, `-dirty` if files were changed; None outside a repository or without git."""
    git = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    known = shutil.which("git") and subprocess.run(git, cwd=Path(__file__).parent, capture_output=True, text=True)
    return (known and known.stdout.strip()) or None


def table_of(results: list[Result]) -> Table:
    """One line per part."""
    table = Table(title="Facet against the usual way", title_justify="left")
    for name in ("part", "ours", "reference", "unit", "ratio", "quartiles", "note"):
        numeric = name in ("ours", "reference", "ratio", "quartiles")
        table.add_column(name, justify="right" if numeric else "left", no_wrap=name != "note", overflow="fold")
    for result in results:
        rates = [result.ours["median"], result.reference["median"]]
        numbers = [f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}" for rate in rates]
        form, unit = ("{:.1%}", "") if result.share else ("{:.2f}", " x")
        low, median, high = (form.format(result.ratio[key]) for key in ("low", "median", "high"))
        table.add_row(result.part, *numbers, result.unit, median + unit, f"{low} - {high}", result.note)
    return table


def measure(bench: Bench, names: list[str]) -> list[Result]:
    """The results of the parts, one after another."""
    if bench.accelerator.is_main_process:
        # The black pictures of `scaling` take no room, but their checksums take time.
        needed = bench.settings if "scaling" in names else replace(bench.settings, counts=())
        parts.make_data(needed, bench.folder)
    wait_for_all()
    results, hidden = [], not bench.accelerator.is_main_process
    with Progress(console=Console(stderr=True), auto_refresh=False, disable=hidden) as bar:  # a thread would take time
        for name in bar.track(names):
            bar.update(bar.task_ids[0], description=name, refresh=True)
            results.append((PARTS | LONG)[name](bench))
            torch.cuda.empty_cache()  # does nothing without a GPU
    return results


@reports_errors
def main() -> None:
    """Command line entry."""
    options = parse()
    warnings.filterwarnings("ignore", message="This DataLoader will create")  # two workers on one core
    with (
        tempfile.TemporaryDirectory(prefix="facet-bench-", ignore_cleanup_errors=True) as own,
        mock.patch.object(console, "quiet", True),  # bars and messages of what is measured
    ):
        settings = choose_settings(options, pick_device())
        accelerator = start_accelerator(settings.precision, None, Path(own))
        bench = Bench(settings, accelerator, Path(broadcast_object_list([own])[0]))
        results = measure(bench, options.parts)
        wait_for_all()
        if accelerator.is_main_process:
            run = describe_run(bench)
            print("\n".join(f"{key}: {value}" for key, value in run.items()))
            # In a file rich would assume 80 columns, which leave no room for the notes.
            Console(width=None if sys.stdout.isatty() else 150).print(table_of(results))
            if options.json:
                found = {"run": run, "settings": asdict(settings), "parts": [asdict(result) for result in results]}
                write_json(options.json, found)


if __name__ == "__main__":
    main()
