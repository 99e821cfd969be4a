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
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from core.cli.errors import CommandParser, UserError, reports_errors
from core.cli.files import write_json
from core.training.distributed import PRECISIONS, cpu_cores, pick_device, process_count, start_accelerator, wait_for_all
from core.training.machine import choose_precision, cpuinfo, native_bf16
from scripts import bench_parts, bench_ranks, bench_tools
from scripts.bench_measure import Result
from scripts.bench_parts import Bench, Settings, silence

Part = Callable[[Bench], Result]

TRAINING: dict[str, Part] = {
    "gan-step": bench_parts.gan_step,
    "gan-epoch": bench_parts.gan_epoch,
    "unet-step": bench_parts.unet_step,
    "data": bench_parts.data_share,
    "scaling": bench_parts.scaling,
}
SINGLE: dict[str, Part] = {
    "sample": bench_tools.sample,
    "features": bench_tools.features,
    "frechet": bench_tools.frechet,
    "prepare": bench_tools.prepare_files,
    "ranks": bench_ranks.ranks,
}
PARTS = TRAINING | SINGLE
# What fits into three minutes on two cores.
DEFAULT = [part for part in PARTS if part not in ("scaling", "ranks")]
PAPER_WIDTHS = (64, 128, 256, 512, 1024)
GPU_MATRIX = 8192  # a smaller product does not fill a large GPU
GPU_FEATURES = 1000  # images; fewer would measure how long pytorch-fid's workers take to start

EXAMPLES = """
parts (without --parts all but scaling and ranks, in two to three minutes on two cores; --parts all for all):
  gan-step    DCGAN training step: images in memory
  gan-epoch   DCGAN training from files: prepared data against a DataLoader over JPEGs
  unet-step   U-Net training step: examples in memory
  data        time to make a batch, as a share of the training step
  sample      1,000 samples as PNG files
  features    Inception features of PNG files, against pytorch-fid
  frechet     Frechet distance, against SciPy's matrix root
  prepare     JPEGs to a prepared data set
  scaling     training from a million pictures against ten thousand
  ranks       two processes against one, on the CPU

examples:
  python -m scripts.bench
  python -m scripts.bench --parts gan-step gan-epoch --seconds 60 --json bench.json
  python -m scripts.bench --parts gan-step --batch 512 --precision bf16 --compile
  python -m scripts.bench --parts unet-step --paper --precision bf16            the paper's widths at 256x256, for a GPU
  accelerate launch --quiet --multi_gpu --num_processes 4 -m scripts.bench --parts gan-step gan-epoch --batch 2048

The GPU is used if there is one (ACCELERATE_USE_CPU=true for none). Both sides take turns, A B A B ..., in one process;
first runs do not count. Ratio: median and quartiles over neighbouring turns; above 1 ours is faster. Under accelerate
launch the parts that train run on all processes, and the others are left out. docs/performance.md explains each part.
"""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read and check the command line (default: sys.argv)."""
    parser = CommandParser(prog="python -m scripts.bench", description=__doc__, epilog=EXAMPLES)
    parser.add_argument("--parts", nargs="+", choices=["all", *PARTS], metavar="PART", help="what to measure")
    parser.add_argument("--seconds", type=float, default=Settings.seconds, help="for each part (default %(default)g)")
    parser.add_argument("--batch", type=int, default=Settings.batch, help="images a DCGAN step (default %(default)d)")
    parser.add_argument("--size", type=int, default=Settings.size, help="side of the faces (default %(default)d)")
    parser.add_argument("--width", type=int, default=Settings.width, help="DCGAN feature maps (default %(default)d)")
    parser.add_argument("--precision", choices=("auto", *PRECISIONS), default="auto", help="of our side (default auto)")
    parser.add_argument("--compile", action="store_true", help="torch.compile and fused optimisers on our side")
    parser.add_argument("--paper", action="store_true", help="U-Net of the paper's widths at 256x256")
    parser.add_argument("--unet-batch", type=int, default=Settings.unet_batch, help="images (default %(default)d)")
    parser.add_argument("--samples", type=int, default=Settings.samples, help="PNG files (default %(default)d)")
    parser.add_argument("--dims", type=int, choices=(64, 192, 768, 2048), default=Settings.dims, help="of features")
    parser.add_argument("--images", type=int, default=Settings.largest, help="in scaling (default %(default)d)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the table as JSON, too")
    options = parser.parse_args(arguments)
    _check(options, process_count())
    return options


def _check(options: argparse.Namespace, processes: int) -> None:
    """Refuse what cannot be measured.

    Raises:
        UserError: naming the option.
    """
    least = {"batch": 2 * processes, "unet_batch": 2 * processes, "samples": 1, "images": 1, "width": 1}
    for key, value in least.items():
        if getattr(options, key) < value:
            raise UserError(f"--{key.replace('_', '-')} must be at least {value}")
    for key in ("batch", "unet_batch"):
        if getattr(options, key) % processes:
            raise UserError(f"--{key.replace('_', '-')} must be divisible by the number of processes, {processes}")
    if not 0 < options.seconds < 1e5:
        raise UserError("--seconds must be above 0 (and below 100,000)")
    if options.size not in (32, 64, 128, 256):
        raise UserError("--size must be 32, 64, 128 or 256: a DCGAN doubles, and the drawn faces are no larger")
    alone = [part for part in options.parts or () if part in SINGLE]
    if alone and processes > 1:
        raise UserError(f"--parts {alone[0]} runs on one process: start it without accelerate launch")


def choose_parts(wanted: list[str], processes: int) -> list[str]:
    """The parts to run, in the order of the table; on several processes those that train."""
    possible = PARTS if processes == 1 else TRAINING
    return [part for part in possible if part in wanted or "all" in wanted]


def choose_settings(options: argparse.Namespace, device: torch.device) -> Settings:
    """What the command line says, completed by what suits the machine."""
    paper = options.paper
    return Settings(
        seconds=options.seconds,
        batch=options.batch,
        size=options.size,
        width=options.width,
        precision=choose_precision(options.precision, device),
        compile=options.compile,
        unet_batch=options.unet_batch,
        samples=options.samples,
        dims=options.dims,
        largest=options.images,
        unet_widths=PAPER_WIDTHS if paper else Settings.unet_widths,
        unet_size=256 if paper else Settings.unet_size,
        features=GPU_FEATURES if device.type == "cuda" else Settings.features,
        matrix=GPU_MATRIX if device.type == "cuda" else Settings.matrix,
    )


def describe_run(accelerator: Accelerator, settings: Settings) -> dict[str, Any]:
    """Machine, software, command and commit: what a measured number means nothing without."""
    device = accelerator.device
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "command": shlex.join(["python", "-m", "scripts.bench", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "cpu": cpuinfo("model name") or platform.processor() or platform.machine(),
        "cores": cpu_cores(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "device": device.type,
        "processes": accelerator.num_processes,
        "native_bf16": native_bf16(device),
        "precision": settings.precision,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def commit() -> str | None:
    """The commit of the code, with -dirty where files differ from it; None outside a repository or without git."""
    git = shutil.which("git")
    if git is None:
        return None
    command = [git, "describe", "--always", "--dirty", "--exclude", "*"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def measure(bench: Bench, names: list[str]) -> list[Result]:
    """All parts, one after another, under a progress bar that is drawn only between them."""
    # Its own console: what is measured draws bars on the shared one, which are muted. Not refreshed by a thread, which
    # would take part of the processor from what is measured.
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        auto_refresh=False,
        disable=not bench.accelerator.is_main_process,
    )
    results = []
    with bar:
        task = bar.add_task("", total=len(names))
        for name in names:
            bar.update(task, description=name, refresh=True)
            with silence():
                results.append(PARTS[name](bench))
            if bench.device.type == "cuda":
                torch.cuda.empty_cache()
            bar.update(task, advance=1, refresh=True)
    return results


def number(value: float) -> str:
    """Three digits, whatever the size."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def ratio_text(result: Result) -> tuple[str, str]:
    """Median and quartiles of a ratio, times or in percent."""
    ratio = result.ratio
    if result.share:
        return f"{ratio.median:.1%}", f"{ratio.low:.1%} - {ratio.high:.1%}"
    return f"{ratio.median:.2f} x", f"{ratio.low:.2f} - {ratio.high:.2f}"


def table_of(results: list[Result]) -> Table:
    """One line a part."""
    table = Table(title="Facet against the usual way", title_justify="left")
    for name in ("part", "ours", "reference", "unit", "ratio", "quartiles", "note"):
        numeric = name in ("ours", "reference", "ratio", "quartiles")
        table.add_column(name, justify="right" if numeric else "left", no_wrap=name != "note", overflow="fold")
    for result in results:
        measured = (number(result.ours.median), number(result.reference.median))
        table.add_row(result.part, *measured, result.unit, *ratio_text(result), result.note)
    return table


def header_of(run: dict[str, Any]) -> str:
    """The same facts for people."""
    gpu = f", {run['processes']} x {run['gpu']}" if run["gpu"] else f", {run['processes']} process(es)"
    bf16 = "native" if run["native_bf16"] else "not native"
    return (
        f"{run['cpu']}, {run['cores']} cores, {run['threads']} threads{gpu}; bf16 {bf16}; ours in {run['precision']}\n"
        f"torch {run['torch']}, Python {run['python']}, commit {run['commit'] or 'unknown'}, {run['date']}\n"
        f"$ {run['command']}"
    )


def as_json(run: dict[str, Any], settings: Settings, results: list[Result]) -> dict[str, Any]:
    """Everything in the table and what it was measured with."""
    return {"run": run, "settings": asdict(settings), "parts": [asdict(result) for result in results]}


def shared_folder(accelerator: Accelerator, own: str) -> Path:
    """The temporary folder of process 0, on all processes."""
    names = [own]
    broadcast_object_list(names, from_process=0)
    return Path(names[0])


def run_bench(options: argparse.Namespace) -> None:
    """Measure and show."""
    with tempfile.TemporaryDirectory(prefix="facet-bench-", ignore_cleanup_errors=True) as own:
        settings = choose_settings(options, pick_device())
        accelerator = start_accelerator(settings.precision, None, Path(own))
        bench = Bench(settings, accelerator, shared_folder(accelerator, own))
        results = measure(bench, choose_parts(options.parts or DEFAULT, process_count()))
        wait_for_all()
        if accelerator.is_main_process:
            run = describe_run(accelerator, settings)
            print(header_of(run))
            # A file is given room for the notes: rich would assume 80 columns.
            Console(width=None if sys.stdout.isatty() else 150).print(table_of(results))
            if options.json:
                write_json(options.json, as_json(run, settings, results))
        accelerator.end_training()


@reports_errors
def main() -> None:
    """Command line entry."""
    run_bench(parse())


if __name__ == "__main__":
    main()
