"""Draw samples from a trained generator: `facet sample runs/first --n 1000 --out samples`."""

from __future__ import annotations

import argparse
import math
import shutil
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from core.cli.console import progress_bar
from core.cli.errors import CommandParser, UserError, reports_errors
from core.cli.files import IMAGE_CACHE
from core.cli.text import from_here
from core.data.images import MEMORY_FORMAT, make_grid, png_bytes, to_uint8, write_png
from core.data.movie import MOST_FPS, require_movie, write_movie
from core.nn.fuse import fold_batch_norm
from core.nn.model_file import load_model
from core.training.machine import full_precision, pick_device, set_up_cpu
from gen.latents import sample_latents
from gen.networks import Generator

BATCH_SIZE, GPU_BATCH_SIZE = 64, 256
GRID_SAMPLES = 64
INTERPOLATION_ROWS, INTERPOLATION_STEPS = 8, 10


def load_generator(run_or_file: str | Path, device: str) -> tuple[nn.Module, dict[str, Any]]:
    """The generator of a run folder or model file on `device`, with batch norm folded, and its `info`.

    See `core.nn.model_file.load_model` and `core.nn.fuse.fold_batch_norm`.
    """
    model, info = load_model(run_or_file)
    if not isinstance(model, Generator):
        way_out = ": use facet predict" if "classes" in info else ""
        raise UserError(f"{run_or_file} holds a {type(model).__name__}, not a generator{way_out}")
    return fold_batch_norm(model).to(pick_device(device)).to(memory_format=MEMORY_FORMAT), info


@torch.inference_mode()
def render(model: nn.Module, z: Tensor) -> np.ndarray:
    """Latents (N, latent_dim) -> uint8 pixels (N, H, W, 3), from a model in eval mode."""
    device = next(model.parameters()).device
    # Full float32 even on GPUs with TF32, so that a seed gives the same picture on every machine.
    with full_precision(device):
        return to_uint8(model(z.to(device))).cpu().numpy()


def generate_batches(
    run_or_file: str | Path,
    seeds: Iterable[int],
    truncation: float | None = None,
    batch_size: int | None = None,
    device: str = "auto",
) -> Iterator[np.ndarray]:
    """Samples of a run folder or model file, uint8 (batch, H, W, 3): the i-th picture depends on the i-th seed alone.

    Uses the averaged weights in eval mode. Another batch size or machine changes a picture by at most 1 grey level
    (floating-point sums in another order). `batch_size` is 64 if not given, on a GPU 256. For `truncation` see
    `gen.latents.sample_latents`.

    Raises:
        UserError: no model, a damaged one, one that is not a generator, or no such device.
    """
    model, _ = load_generator(run_or_file, device)
    latent_dim = int(model.latent_dim)  # type: ignore[arg-type]
    remaining = iter(seeds)
    at_once = batch_size or (GPU_BATCH_SIZE if next(model.parameters()).is_cuda else BATCH_SIZE)
    chunks = iter(lambda: list(islice(remaining, at_once)), [])
    return (render(model, sample_latents(chunk, latent_dim, truncation)) for chunk in chunks)


def generate(run_or_file: str | Path, seeds: Iterable[int], **options: Any) -> np.ndarray:
    """All that `generate_batches` yields, as one array (N, H, W, 3)."""
    return np.concatenate(list(generate_batches(run_or_file, seeds, **options)))


def interpolation_grid(run_or_file: str | Path, seed: int, truncation: float | None, device: str) -> np.ndarray:
    """Rows of pictures that lead from one latent to another along the great circle between them (White 2016).

    A straight line would pass through latents much shorter than any seen in training.
    """
    model, _ = load_generator(run_or_file, device)
    latent_dim = int(model.latent_dim)  # type: ignore[arg-type]
    ends = sample_latents(range(seed, seed + 2 * INTERPOLATION_ROWS), latent_dim, truncation)
    steps = torch.linspace(0, 1, INTERPOLATION_STEPS)
    path = torch.cat([slerp(ends[2 * row], ends[2 * row + 1], steps) for row in range(INTERPOLATION_ROWS)])
    return make_grid(render(model, path), columns=INTERPOLATION_STEPS)


def slerp(start: Tensor, end: Tensor, steps: Tensor) -> Tensor:
    """Spherical interpolation (len(steps), D) from `start` (D,) at 0 to `end` (D,) at 1 (Shoemake 1985)."""
    angle = torch.arccos(torch.dot(start, end) / (start.norm() * end.norm()))
    weights = torch.stack([torch.sin((1 - steps) * angle), torch.sin(steps * angle)]) / torch.sin(angle)
    return weights[0][:, None] * start + weights[1][:, None] * end


def check_target(out: Path, overwrite: bool) -> None:
    """Refuse, with a UserError, to mix new samples with what a folder already holds."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: choose another folder with --out")
    present = sorted(path.name for path in out.iterdir() if path.name != IMAGE_CACHE) if out.exists() else []
    foreign = [name for name in present if not (name.startswith("image_") and name.endswith(".png"))]
    if foreign:
        raise UserError(f"{out} holds other files ({foreign[0]}): choose a new or empty folder with --out")
    if present and not overwrite:
        raise UserError(f"{out} already holds {len(present)} samples: give --overwrite to replace them")


def write_samples(batches: Iterable[np.ndarray], count: int, out: Path) -> np.ndarray:
    """Write image_0000.png, ... into `out`, which appears only when complete, and return the first 64 for a grid."""
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    first: list[np.ndarray] = []
    digits = max(4, len(str(count - 1)))
    try:
        part.mkdir(parents=True)
        with progress_bar() as bar:
            task = bar.add_task(from_here(f"sampling to {out}"), total=count)
            for index, picture in enumerate(chain.from_iterable(batches)):
                (part / f"image_{index:0{digits}d}.png").write_bytes(png_bytes(picture))
                first += [picture] if index < GRID_SAMPLES else []
                bar.advance(task)
        if out.exists():
            shutil.rmtree(out)
        part.rename(out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return np.stack(first)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read and check the command line."""
    parser = CommandParser(
        prog="facet sample",
        description="Draw samples from a trained generator and write them as PNG files.",
        epilog="examples:\n"
        "  facet sample runs/first --n 1000 --out samples\n"
        "  facet sample model.safetensors --n 64 --out faces --grid --interpolate --truncation 1.5\n"
        "  facet sample runs/first --walk faces.mp4 --seconds 20    or .gif or .webp, which need no PyAV\n",
    )
    parser.add_argument("source", type=Path, help="run folder or .safetensors file")
    parser.add_argument("--n", type=int, default=1000, help="number of samples (default 1000)")
    parser.add_argument("--out", type=Path, help="folder for image_0000.png, image_0001.png, ...")
    parser.add_argument("--seed", type=int, default=0, help="image i is made from seed SEED + i (default 0)")
    parser.add_argument("--truncation", type=float, help="redraw latent components beyond +-T; not for scoring")
    parser.add_argument("--grid", action="store_true", help="also write <out>.grid.png with the first 64")
    parser.add_argument("--interpolate", action="store_true", help="also write <out>.interpolation.png")
    parser.add_argument(
        "--walk", type=Path, metavar="FILE", help=".mp4, .gif or .webp of faces that change into others, in a loop"
    )
    parser.add_argument("--seconds", type=float, default=12, help="of the walk (default 12)")
    parser.add_argument("--fps", type=int, default=25, help=f"pictures a second, at most {MOST_FPS} (default 25)")
    usual = f"default {BATCH_SIZE}, on a GPU {GPU_BATCH_SIZE}"
    parser.add_argument("--batch-size", type=int, help=usual)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default auto)")
    parser.add_argument("--overwrite", action="store_true", help="replace samples already in the folder")
    options = parser.parse_args(arguments)
    for name in ("n", "batch_size"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1")
    if options.seed < 0:
        raise UserError("--seed must not be negative")
    if options.truncation is not None and not 0.1 <= options.truncation < math.inf:
        raise UserError("--truncation must be at least 0.1: below that hardly any latent is left")
    check_outputs(options)
    return options


def check_outputs(options: argparse.Namespace) -> None:
    """Refuse, with a UserError, a command line without a result, and a walk that cannot be written."""
    if options.out is None and options.walk is None:
        raise UserError("give --out FOLDER for samples, --walk FILE for a movie, or both")
    if options.out is None and (options.grid or options.interpolate):
        raise UserError("--grid and --interpolate are written beside the samples: give --out FOLDER, too")
    if options.walk is not None:
        require_movie(options.walk, "--walk")
    if not 1 <= options.fps <= MOST_FPS:
        raise UserError(f"--fps must be 1 to {MOST_FPS}")
    if not 1 <= options.seconds <= 600:
        raise UserError("--seconds must be 1 to 600")


def write_walk(options: argparse.Namespace) -> None:
    """Write the movie that the command line asks for."""
    from gen.walk import walk  # which imports this module

    model, _ = load_generator(options.source, options.device)
    count = round(options.seconds * options.fps)
    pictures = walk(model, options.seed, count, options.seconds, options.truncation)
    with progress_bar() as bar:
        write_movie(
            options.walk, bar.track(pictures, count, description=f"walking to {options.walk.name}"), options.fps
        )
    print(f"walk of {count:,} pictures, {options.seconds:g} s: {options.walk}")


def write_folder(options: argparse.Namespace) -> None:
    """Write the samples, and the grids that the command line asks for."""
    out: Path = options.out.resolve()  # `.` and links have no name of their own to put a temporary one beside
    check_target(out, options.overwrite)
    seeds = range(options.seed, options.seed + options.n)
    batches = generate_batches(options.source, seeds, options.truncation, options.batch_size, options.device)
    first = write_samples(batches, options.n, out)
    print(f"{options.n:,} samples (seeds {seeds[0]}-{seeds[-1]}): {options.out}")
    if options.grid:
        write_png(path := out.with_name(f"{out.name}.grid.png"), make_grid(first))
        print(from_here(f"grid of the first {len(first)}: {path}"))
    if options.interpolate:
        grid = interpolation_grid(options.source, options.seed, options.truncation, options.device)
        write_png(path := out.with_name(f"{out.name}.interpolation.png"), grid)
        print(from_here(f"interpolation: {path}"))


@reports_errors
def main() -> None:
    """Command line entry."""
    options = parse()
    set_up_cpu()
    if options.out is not None:
        write_folder(options)
    if options.walk is not None:
        write_walk(options)


if __name__ == "__main__":
    main()
