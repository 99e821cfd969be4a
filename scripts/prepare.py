"""Prepare a data set: decode, resize to the course's 64x64 and store as one array that training reads at once."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np

from core.data import SPLITS
from core.errors import CommandParser, UserError, reports_errors
from core.prepare import Prepared, prepare
from core.sources import Source, download_celeba, drawn_source, open_source

SIZES = (32, 64, 128, 256)
DRAWN_COUNT = 10_000

EXAMPLES = """
sources:
  archive.zip             CelebA from Kaggle (jessicali9530/celeba-dataset), not unpacked
  img_align_celeba.zip    the original CelebA zip; put list_eval_partition.txt next to it for the official split
  FOLDER or other ZIP     all images in it, at any depth, sorted by path
  drawn                   faces drawn by this program, with masks; needs no data
  celeba --download       CelebA through torchvision (needs gdown; Google Drive often refuses)
  (a folder that is itself called drawn: write ./drawn)

examples:
  python -m scripts.prepare archive.zip --out data/celeba
  python -m scripts.prepare drawn --count 10000 --seed 0 --out data/drawn
  python -m scripts.prepare celeba --download --root data/raw --out data/celeba
  python -m scripts.prepare photos/ --out data/photos --size 128 --limit 500

Each picture goes through exactly torchvision's Resize(SIZE) and CenterCrop(SIZE), as in the course. EXIF rotation is
not applied and transparency is dropped, as torchvision's loaders do. Unreadable pictures and those whose shorter side
is under half of SIZE are skipped and listed in meta.json; more than 1% of them is an error. Interrupted, the same
command continues.
"""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line (default: sys.argv)."""
    parser = CommandParser(prog="python -m scripts.prepare", description=__doc__, epilog=EXAMPLES)
    parser.add_argument("source", help="a zip, a folder, `drawn`, or `celeba` with --download")
    parser.add_argument("--out", type=Path, required=True, help="folder to write, e.g. data/celeba")
    parser.add_argument("--size", type=int, choices=SIZES, default=64, help="side in pixels (default 64)")
    parser.add_argument("--limit", type=_positive, help="only the first LIMIT images, for a quick try")
    parser.add_argument("--workers", type=_positive, help="processes (default: one per core)")
    parser.add_argument("--force", action="store_true", help="replace a prepared data set at --out")
    parser.add_argument("--count", type=_positive, help=f"drawn: number of faces (default {DRAWN_COUNT:,})")
    parser.add_argument("--seed", type=_natural, help="drawn: which faces (default 0)")
    parser.add_argument("--download", action="store_true", help="celeba: fetch it from the net")
    parser.add_argument("--root", type=Path, help="celeba: folder for the download (default data/raw)")
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 0 or more")
    return int(text)


def cpu_cores() -> int:
    """As `core.runtime.cpu_cores`, which would cost the seconds that importing torch takes."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def source_of(options: argparse.Namespace) -> Source:
    """The source the command line names.

    Raises:
        UserError: it cannot be read, or an option belongs to another kind of source.
    """
    drawn, download = options.source == "drawn", options.source == "celeba" and options.download
    if not drawn and (options.count is not None or options.seed is not None):
        raise UserError("--count and --seed are for the source `drawn`; to take fewer images use --limit")
    if not download and (options.download or options.root is not None):
        raise UserError("--download and --root are for the source `celeba`: celeba --download [--root FOLDER]")
    if drawn:
        return drawn_source(options.count or DRAWN_COUNT, options.seed or 0)
    return download_celeba(options.root or Path("data/raw")) if download else open_source(options.source)


def report(result: Prepared) -> str:
    """The lines for standard output: what is where, split, skipped and speed."""
    data = result.data
    counts = None if data.split is None else np.bincount(data.split, minlength=len(SPLITS))
    fresh = len(data) + len(data.meta["skipped"]) - result.resumed
    lines = [
        f"{data.path}: {len(data):,} images {data.image_size}x{data.image_size} from {data.meta['source']}"
        + (f", masks with {len(data.meta['classes'])} classes" if data.masks is not None else ""),
        "split: " + ", ".join(f"{name} {number:,}" for name, number in zip(SPLITS, counts, strict=True))
        if counts is not None
        else "split: none (no list_eval_partition file found): train on split=all",
        f"skipped: {len(data.meta['skipped'])}" + (" (listed in meta.json)" if data.meta["skipped"] else ""),
        f"{result.seconds:.1f} s, {fresh / result.seconds:,.0f} images/s"
        + (f" ({result.resumed:,} were done before)" if result.resumed else "")
        if result.seconds
        else "already prepared; nothing to do",
    ]
    return "\n".join(lines)


@reports_errors
def main() -> None:
    """Entry point."""
    options = parse()
    print(
        report(
            prepare(
                source_of(options),
                options.out,
                size=options.size,
                limit=options.limit,
                workers=options.workers or cpu_cores(),
                force=options.force,
            )
        )
    )


if __name__ == "__main__":
    main()
