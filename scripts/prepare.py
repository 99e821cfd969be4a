"""Prepare a data set: decode, resize to squares (the course's 64x64 unless told otherwise) and store as one array."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from core.cli.console import warn
from core.cli.errors import CommandParser, UserError, reports_errors
from core.cli.text import from_here
from core.data.dataset import PREVIEW, SPLITS, PreparedData
from core.data.decode import DEEP
from core.data.mask_classes import read_classes
from core.prepare.geometry import FITS
from core.prepare.image_source import ImageSource
from core.prepare.pairs import PairOptions
from core.prepare.pets import download_pets
from core.prepare.pipeline import Prepared, prepare
from core.prepare.sources import download_celeba, drawn_source, open_image_source

DRAWN_COUNT = 10_000

EXAMPLES = """
examples:
  facet prepare archive.zip --out data/celeba
  facet prepare drawn --count 10000 --seed 0 --out data/drawn
  facet prepare celeba --download --root data/raw --out data/celeba
  facet prepare photos/ --out data/photos --size 128 --valid 500
  facet prepare isbi2012.zip --out data/isbi --size 512 --classes membrane,cell --valid 5
  facet prepare cells/ --out data/cells --size 256 --fit pad --classes cells.csv
  facet prepare carvana.zip --out data/cars --size 256 --threshold 128
  facet prepare scans12bit/ --out data/scans --range 4095
  facet prepare CelebAMask-HQ.zip --out data/faceparse --size 128
  facet prepare pet --download --root data/raw --out data/pets --size 128
"""

DETAILS = """
sources:
  archive.zip             CelebA from Kaggle (jessicali9530/celeba-dataset), not unpacked
  img_align_celeba.zip    the original CelebA zip; put list_eval_partition.txt next to it for the official split
  FOLDER or other ZIP     all images in it, at any depth, sorted by path; other files are counted by ending
  ARRAY.npy               uint8 pictures, (N, H, W, 3) or (N, 3, H, W)
  drawn                   faces drawn by this program, with masks; needs no data
  celeba --download       CelebA through torchvision (needs gdown; Google Drive often refuses)
  (a folder that is itself called drawn: write ./drawn)

sources with masks, folder or zip:
  images/ beside masks/   pairs of the same file stem; also image(s), img(s), JPEGImages, original beside mask(s),
                          label(s), annotations, SegmentationClass, segmentation, gt, ground_truth, 1st_manual, inside
                          or around folders train(ing), val (or valid, validation), test(ing), which then are the split
  train/, train_masks/    any NAME or NAME_images beside NAME_masks, NAME_labels, NAME_gt, ...
  x.png and x_mask.png    a mask may have _mask, _label, _seg, _segmentation, _gt, _manual1 or _L after the stem of its
                          picture, in folders as above or (but for _L) in the same one
  CelebAMask-HQ.zip       as downloaded; the files of each picture's parts are merged
  oxford-iiit-pet         Oxford-IIIT Pet, unpacked; pet --download fetches it through torchvision

Each picture goes through exactly torchvision's Resize(SIZE) and CenterCrop(SIZE), as in the course; with --fit pad the
longer side becomes SIZE and the rest is black, and ignored in masks. EXIF rotation is not applied and transparency is
dropped, as torchvision's loaders do. Unreadable pictures and those that would be enlarged more than twofold are skipped
and listed in meta.json; more than 1% of them is an error. After an interruption the same command continues.

Pictures of 16 bits are scaled to 8, 65,535 to white, or the MAX of --range: 4095 for 12-bit data.

Masks of one bit, or of 0 and 255 alone, have two classes; other masks of one channel or with a palette hold class
indices, 255 is ignored; colour masks need a class table with colours. A class table is a text file with a line for each
class, `name`, `name,value` or `name,r,g,b`, in the order of the indices; a line `ignore,value` or `ignore,r,g,b` is no
class, those pixels are ignored. Masks with grey levels, as after scaling or in JPEG, are refused: with --threshold N
all pixels from the grey level N on are foreground, the others background.

Pairs without a split of their own: one tenth validates, chosen by a hash of the file stem, or the last N by name (2.png
before 10.png) with --valid N. --limit takes the first pairs and leaves each in the part it has without. Pictures
without masks and without a partition file have no split: with --valid N, N validate, chosen by a hash of the name.

A picture without mask is refused. Where only some pictures have one, as in Pascal VOC with its 2,913 masks for 17,125
JPEGImages, give a folder of the pairs alone: SegmentationClass, and JPEGImages with just the pictures of its stems.
"""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line (default: sys.argv)."""
    parser = CommandParser(prog="facet prepare", description=__doc__, epilog=EXAMPLES, details=DETAILS)
    parser.add_argument("source", help="a zip, a folder, a .npy file, `drawn`, or `celeba` or `pet` with --download")
    parser.add_argument("--out", type=Path, required=True, help="folder to write, e.g. data/celeba")
    parser.add_argument("--size", type=_size, default=64, help="side in pixels, a multiple of 8 (default 64)")
    parser.add_argument("--fit", choices=FITS, default="crop", help="how pictures become square (default crop)")
    parser.add_argument("--classes", help="masks: a table file, names as in membrane,cell, or celebamask-hq")
    parser.add_argument("--threshold", type=_deep, help="masks: grey levels from here on are foreground, e.g. 128")
    parser.add_argument("--range", type=_wide, metavar="MAX", help="16-bit pictures: the value that becomes white")
    parser.add_argument("--valid", type=_positive, help="hold out VALID pictures (see --help-all) for validation")
    parser.add_argument("--limit", type=_positive, help="only the first LIMIT images, for a quick try")
    parser.add_argument("--workers", type=_positive, help="processes (default: one per core)")
    parser.add_argument("--force", action="store_true", help="replace a prepared data set at --out")
    parser.add_argument("--count", type=_positive, help=f"drawn: number of faces (default {DRAWN_COUNT:,})")
    parser.add_argument("--seed", type=_natural, help="drawn: which faces (default 0)")
    parser.add_argument("--download", action="store_true", help="celeba, pet: fetch it from the net")
    parser.add_argument("--root", type=Path, help="celeba, pet: folder for the download (default data/raw)")
    return parser.parse_args(arguments)


def _number(allowed: range, description: str) -> Callable[[str], int]:
    """An argparse type for whole numbers in a range."""

    def convert(text: str) -> int:
        if not text.isdecimal() or int(text) not in allowed:
            raise argparse.ArgumentTypeError(f"{text!r} is not {description}")
        return int(text)

    return convert


_size = _number(range(16, 2049, 8), "a multiple of 8 from 16 to 2048")
_deep = _number(range(1, DEEP + 1), f"a whole number from 1 to {DEEP}")
_wide = _number(range(1, 1 << 31), "a whole number above 0, e.g. 4095 for 12 bits")
_positive = _number(range(1, sys.maxsize), "a whole number above 0")
_natural = _number(range(sys.maxsize), "a whole number of 0 or more")


def cpu_cores() -> int:
    """As `core.training.machine.cpu_cores`, without importing torch, which takes seconds."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def source_of(options: argparse.Namespace) -> ImageSource:
    """The source the command line names.

    Raises:
        UserError: it cannot be read, or an option belongs to another kind of source.
    """
    drawn, download = options.source == "drawn", options.source in ("celeba", "pet") and options.download
    if not drawn and (options.count is not None or options.seed is not None):
        raise UserError("--count and --seed are for the source `drawn`; to take fewer images use --limit")
    if not download and (options.download or options.root is not None):
        raise UserError("--download and --root are for the sources `celeba` and `pet`: pet --download [--root FOLDER]")
    classes = read_classes(options.classes) if options.classes is not None else None
    pairs = PairOptions(
        classes,
        options.valid,
        options.limit,
        workers=options.workers or cpu_cores(),
        threshold=options.threshold,
        value_range=options.range,
    )
    if drawn:
        own = {"classes": "has classes of its own", "valid": "has a split of its own"}
        pairs.refuse("drawn", **own, value_range="has pictures of 8 bits")
        return drawn_source(options.count or DRAWN_COUNT, options.seed or 0)
    if not download:
        return open_image_source(options.source, pairs)
    root = options.root or Path("data/raw")
    if options.source == "pet":
        return download_pets(root, pairs)
    pairs.refuse("celeba", classes="has no masks", valid="has no masks", value_range="has pictures of 8 bits")
    return download_celeba(root)


def summary(result: Prepared) -> str:
    """The lines for standard output: what is where, split, skipped and speed."""
    data = result.data
    counts = None if data.split is None else np.bincount(data.split, minlength=len(SPLITS))
    fresh = len(data) + len(data.meta["skipped"]) - result.resumed
    lines = [
        f"{data.path}: {len(data):,} images {data.image_size}x{data.image_size} from {data.meta['source']}"
        + (f", masks with {len(data.meta['classes'])} classes" if data.masks is not None else ""),
        "split: " + ", ".join(f"{name} {number:,}" for name, number in zip(SPLITS, counts, strict=True))
        if counts is not None
        else "split: none (neither masks nor a list_eval_partition file found): train on split=all, or prepare with "
        f"--valid {min(1000, max(1, len(data) // 10))}, so that `facet report` can tell copies",
        f"skipped: {len(data.meta['skipped'])}" + (" (listed in meta.json)" if data.meta["skipped"] else ""),
        f"{result.seconds:.1f} s, {fresh / result.seconds:,.0f} images/s"
        + (f" ({result.resumed:,} were done before)" if result.resumed else "")
        if result.seconds
        else "already prepared; nothing to do",
        *([f"preview: {data.path / PREVIEW}"] if (data.path / PREVIEW).exists() else []),
    ]
    return "\n".join(lines)


def depth_warning(data: PreparedData) -> str | None:
    """What is odd about the values of the 16-bit pictures, if anything."""
    largest = data.meta.get("largest_value")
    if data.value_range is None and largest is not None and largest <= DEEP // 2:
        bits = max(8, int(largest).bit_length())
        return (
            f"the pictures of 16 bits hold no value above {largest:,} of {DEEP:,}, so they come out dark: if they are "
            f"{bits}-bit data, prepare with --range {2**bits - 1}"
        )
    if data.value_range is not None and largest is None:
        return f"--range {data.value_range} had no effect: no picture has 16 bits"
    return None


@reports_errors
def main() -> None:
    """Command line entry."""
    options = parse()
    result = prepare(
        source_of(options),
        options.out,
        size=options.size,
        fit=options.fit,
        limit=options.limit,
        workers=options.workers or cpu_cores(),
        force=options.force,
    )
    print(from_here(summary(result)))
    if strange := depth_warning(result.data):
        warn(strange)


if __name__ == "__main__":
    main()
