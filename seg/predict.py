"""Segment pictures of any size with a trained U-Net: `facet predict runs/unet photos/ --out masks`."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from core.cli.callable_module import make_callable
from core.cli.console import progress_bar, say, warn
from core.cli.errors import CommandParser, UserError, reports_errors
from core.cli.files import atomic_path
from core.data.bounds import bounded_pictures, machine_memory
from core.data.decode import decode, reason_of
from core.data.images import write_png
from core.data.mask_classes import mirrored_classes
from core.data.mask_pictures import overlay_with_legend
from core.prepare.store import is_image, natural, open_store
from core.submission.archive import listed, shown
from core.training.machine import pick_device, set_up_cpu
from seg.loading import load_unet
from seg.network import SegmentationNetwork
from seg.tiling import segment

TILE = 512
MASK, OVERLAY, PROBABILITIES = ".png", ".overlay.png", ".npz"
MAX_SCALED_PIXELS = 1 << 27  # scaling up the shorter side of a 1 x 10,000 picture would take gigabytes
# Memory in bytes, measured: of each pixel of a picture, with its mask and overlay, and of each pixel and class at the
# scale of the network, where averaging keeps copies.
PIXEL_BYTES, CLASS_BYTES, AVERAGED_CLASS_BYTES = 24, 4, 16
SHOWN_SHARES = 8


@dataclass(frozen=True)
class Segmenter:
    """A trained network and what a prediction needs besides it.

    Attributes:
        model: in eval mode, on its device.
        classes, palette: names and RGB colours (0..255) in index order.
        size: pixels to which the shorter side is scaled, with `longer` the longer one; None keeps pictures as they are.
        reason: the scale and where it comes from, for people.
        value_range: the value of 16-bit pictures that becomes 255; None for 65,535.
    """

    model: SegmentationNetwork
    classes: list[str]
    palette: list[list[int]]
    size: int | None
    longer: bool
    reason: str
    value_range: int | None

    def scaled(self, picture: Image.Image, average: bool = False, keep: bool = False) -> Image.Image:
        """The picture at the scale of the network.

        Args:
            average, keep: whether the prediction will be averaged, and its probabilities kept.

        Raises:
            ValueError: it, or its prediction, would not fit into memory.
        """
        size = picture.size if self.size is None else scaled_size(*picture.size, self.size, self.longer)
        pixels, per_class = picture.width * picture.height, AVERAGED_CLASS_BYTES if average else CLASS_BYTES
        needed = PIXEL_BYTES * pixels + len(self.classes) * (per_class * size[0] * size[1] + 4 * keep * pixels)
        if needed > machine_memory():
            raise ValueError(
                f"{picture.width}x{picture.height} in {len(self.classes)} classes takes {needed / 1e9:,.0f} GB of "
                f"memory, this machine has {machine_memory() / 1e9:,.0f}: cut it up, or give a smaller --size"
            )
        return picture if self.size is None else picture.resize(size, Image.Resampling.BILINEAR)

    def planes(self, scaled: Image.Image, width: int, height: int, tile: int, average: bool) -> Iterator[Tensor]:
        """Probabilities of one class after another, float32 (height, width) on the CPU, resized bilinearly.

        `tile` and `average` are those of `seg.tiling.segment`.
        """
        for plane in segment(self.model, np.asarray(scaled), tile, average, mirrored_classes(self.classes)):
            if plane.shape == (height, width):
                yield plane
            else:
                yield F.interpolate(plane[None, None], (height, width), mode="bilinear", antialias=True)[0, 0]


def scaled_size(width: int, height: int, size: int, longer: bool = False) -> tuple[int, int]:
    """Width and height when the shorter (or the longer) of them becomes `size`, rounded as in preparation.

    Raises:
        ValueError: the picture would not fit into memory.
    """
    if longer:
        scaled = max(1, size * width // max(width, height)), max(1, size * height // max(width, height))
    else:
        long = int(size * max(width, height) / min(width, height))
        scaled = (size, long) if width <= height else (long, size)
    if scaled[0] * scaled[1] > MAX_SCALED_PIXELS:
        raise ValueError(
            f"{width}x{height} would be scaled to {scaled[0]}x{scaled[1]}: give a smaller --size, or native"
        )
    return scaled


def load_segmenter(run_or_file: str | Path, device: str = "auto", size: int | str | None = None) -> Segmenter:
    """The segmenter of a run folder or model file.

    Args:
        size: side in pixels, `native` for pictures as they are, or None for the scale of the training.

    Raises:
        UserError: no model, a damaged one, not a segmenter, or no such device.
    """
    model, info = load_unet(run_or_file, pick_device(device))
    trained = info["image_size"] if info["resized"] else None
    chosen, why = (trained, "as in training") if size is None else (size, f"as --size {size} says")
    scale = None if chosen in (None, "native") else int(str(chosen))
    side = "longer" if info["fit"] == "pad" else "shorter"
    what = "pictures at their own scale" if scale is None else f"{side} side scaled to {scale} pixels"
    reason = f"scale: {what}, {why}"
    return Segmenter(model, info["classes"], info["palette"], scale, side == "longer", reason, info.get("value_range"))


@dataclass(frozen=True)
class Job:
    """One picture, and the path of its results without their suffix."""

    source: Path
    stem: Path

    def target(self, suffix: str) -> Path:
        """Where the result with this suffix goes."""
        return self.stem.with_name(self.stem.name + suffix)


def find_pictures(inputs: Sequence[Path], out: Path) -> list[Job]:
    """The pictures that the inputs name: files as given, and those in folders at any depth in natural order.

    Hidden files are left out, and so are the results in `out`; of other files in folders, a note says how many.

    Raises:
        UserError: an input does not exist or cannot be read, is the folder of the results, or has no picture.
    """
    jobs = []
    own = out.resolve()
    for place in inputs:
        if place.is_dir():
            if place.resolve() == own:
                raise UserError(f"--out {out} is the folder of the pictures: choose another, or masks would mix in")
            store = open_store(place)
            names = [name for name in store.files if own not in (place / name).resolve().parents]
            found = [place / name for name in sorted(filter(is_image, names), key=natural)]
            if not found:
                raise UserError(f"no pictures in {place} besides the results in {out}")
            if others := store.left_out(names):
                say(f"note: {others}")
            jobs += [Job(path, out / path.relative_to(place).with_suffix("")) for path in found]
        elif place.is_file():
            jobs.append(Job(place, out / place.stem))
        else:
            raise UserError(f"no picture or folder at {place}")
    return jobs


def check_targets(jobs: Sequence[Job], suffixes: Sequence[str], overwrite: bool) -> None:
    """Refuse whatever would lose a file, before anything is written.

    Raises:
        UserError: two pictures share a result, or a result would replace a picture or exists already.
    """
    writers: dict[Path, Path] = {}
    for job in jobs:
        for suffix in suffixes:
            other = writers.setdefault(job.target(suffix), job.source)
            if other is not job.source:
                raise UserError(
                    f"{other} and {job.source} would both be written to {job.target(suffix)}: give each picture once, "
                    "and those of the same name to runs with different --out"
                )
    pictures = {job.source.resolve() for job in jobs}
    present = [target for target in writers if target.exists()]
    for target in present:
        if target.resolve() in pictures:
            raise UserError(f"{target} is a picture to be segmented and would be replaced: choose another --out")
    if present and not overwrite:
        more = f" and {len(present) - 1:,} more results exist" if len(present) > 1 else " exists"
        raise UserError(f"{present[0]}{more}: continue with --resume, replace with --overwrite, or give another --out")


def read_picture(path: Path, value_range: int | None = None) -> Image.Image:
    """One file in RGB, see `core.data.decode.decode`; raises whatever the decoder raises for a damaged picture."""
    with bounded_pictures(), path.open("rb") as content:
        with Image.open(content) as picture:
            frames = getattr(picture, "n_frames", 1)
        content.seek(0)
        result = decode(content, value_range)
    if frames > 1:
        warn(f"{shown(str(path))} holds {frames} pictures: only the first is segmented")
    return result


def classify(planes: Iterable[Tensor], keep: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """The most probable class of each pixel (the first of equals), from one class after another to save memory.

    Returns:
        The mask, uint8 (H, W), and with `keep` the probabilities, float16 (classes, H, W), else None.
    """
    kept = []
    for number, plane in enumerate(planes):
        if number == 0:
            best, mask = torch.full_like(plane, -1.0), torch.zeros(plane.shape, dtype=torch.uint8)
        mask[plane > best] = number
        best = torch.maximum(best, plane)
        if keep:
            kept.append(plane.half().numpy())
    return mask.numpy(), np.stack(kept) if keep else None


def write_mask(path: Path, mask: np.ndarray, palette: Sequence[Sequence[int]]) -> None:
    """Write class indices (H, W) as a PNG whose values are the indices and whose palette has the class colours."""
    picture = Image.fromarray(mask)
    picture.putpalette([value for colour in palette for value in colour])
    with atomic_path(path) as temporary:
        picture.save(temporary, format="PNG")


def write_probabilities(path: Path, probabilities: np.ndarray, classes: list[str]) -> None:
    """Write `probabilities`, float16 (classes, H, W), and the names as `classes` into a compressed .npz."""
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        np.savez_compressed(stream, probabilities=probabilities, classes=np.array(classes))


def predict(
    segmenter: Segmenter, jobs: Sequence[Job], suffixes: Sequence[str], tile: int = TILE, average: bool = False
) -> tuple[np.ndarray, list[str]]:
    """Segment pictures and write the results named by `suffixes`; an unreadable picture does not stop the others.

    Returns:
        Pixels of each class over all masks, int64 (classes,), and one line for each unreadable picture.

    Raises:
        UserError: a result cannot be written, or the device's memory is too small for a tile.
    """
    pixels_of = np.zeros(len(segmenter.classes), np.int64)
    failures = []
    with progress_bar("pictures") as bar:
        task = bar.add_task("segmenting", total=len(jobs))
        for job in jobs:
            try:
                picture = read_picture(job.source, segmenter.value_range)
                scaled = segmenter.scaled(picture, average, PROBABILITIES in suffixes)
            except Exception as error:  # decoders raise nearly anything for damaged files
                failures.append(f"{shown(str(job.source))} ({reason_of(error)})")
                warn(f"cannot read {failures[-1]}")
                bar.advance(task)
                continue
            try:
                planes = segmenter.planes(scaled, *picture.size, tile, average)
                mask, probabilities = classify(planes, PROBABILITIES in suffixes)
            except torch.cuda.OutOfMemoryError as error:
                raise UserError(f"{job.source}: the GPU's memory is full: give a smaller --tile than {tile}") from error
            write_mask(job.target(MASK), mask, segmenter.palette)
            if OVERLAY in suffixes:
                page = overlay_with_legend(np.asarray(picture), mask, segmenter.classes, segmenter.palette)
                write_png(job.target(OVERLAY), page)
            if probabilities is not None:
                write_probabilities(job.target(PROBABILITIES), probabilities, segmenter.classes)
            pixels_of += np.bincount(mask.reshape(-1), minlength=len(pixels_of))
            bar.advance(task)
    return pixels_of, failures


def shares(pixels_of: np.ndarray, classes: Sequence[str]) -> str:
    """Shares of the classes in all pixels, largest first: `skin 41.0%, hair 30.2%, ...`."""
    order = np.argsort(-pixels_of, kind="stable")
    parts = [f"{classes[index]} {pixels_of[index] / pixels_of.sum():.1%}" for index in order[:SHOWN_SHARES]]
    rest = f", {len(order) - SHOWN_SHARES} others" if len(order) > SHOWN_SHARES else ""
    return ", ".join(parts) + rest


EXAMPLES = """
results, for a picture a/b.jpg of the folder a:
  DIR/b.png               class of each pixel as its value, at the picture's size, with the class colours as palette
  DIR/b.overlay.png       to look at: the picture in grey under the class colours, outlines and numbers, with a legend;
                          small ones are enlarged (not with --no-overlay)
  DIR/b.npz               with --probabilities: float16 (classes, height, width), and the class names

examples:
  facet predict runs/unet photos/ --out masks
  facet predict runs/unet/model.safetensors scan.tif --out masks --size native --tile 1024 --average

Pictures are decoded as in training: no EXIF rotation, transparency dropped, the first picture of a file. Those that
cannot be read, or need more memory than there is, are listed at the end, with exit code 1; all others are done.
"""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read and check the command line."""
    parser = CommandParser(
        prog="facet predict", description="Segment pictures of any size with a trained U-Net.", epilog=EXAMPLES
    )
    parser.add_argument("model", type=Path, help="run folder or .safetensors file")
    parser.add_argument("inputs", type=Path, nargs="+", metavar="INPUT", help="pictures, and folders of pictures")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the results")
    parser.add_argument("--size", metavar="N", help="side in pixels to scale to, or native (default: as in training)")
    parser.add_argument("--tile", type=int, default=TILE, help=f"side of a tile of large pictures (default {TILE})")
    parser.add_argument("--average", action="store_true", help="mean over the 8 flips and turns, 8 times the work")
    parser.add_argument("--probabilities", action="store_true", help="also write the class probabilities")
    parser.add_argument("--no-overlay", action="store_true", help="no tinted pictures")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default auto)")
    parser.add_argument("--overwrite", action="store_true", help="replace results that exist")
    parser.add_argument("--resume", action="store_true", help="leave pictures alone that have all their results")
    options = parser.parse_args(arguments)
    if options.size not in (None, "native"):
        if not (options.size.isdecimal() and int(options.size) >= 1):
            raise UserError(f"--size {options.size} is neither a whole number of pixels above 0 nor native")
        options.size = int(options.size)
    if options.tile < 1:
        raise UserError("--tile must be at least 1")
    return options


@reports_errors
def main() -> None:
    """Command line entry."""
    options = parse()
    suffixes = [MASK] + [OVERLAY] * (not options.no_overlay) + [PROBABILITIES] * options.probabilities
    jobs = find_pictures(options.inputs, options.out)
    check_targets(jobs, suffixes, options.overwrite or options.resume)
    if options.resume:
        present = len(jobs)
        # Each result is complete or absent.
        jobs = [job for job in jobs if not all(job.target(suffix).exists() for suffix in suffixes)]
        say(f"{present - len(jobs)} of {present} pictures are done already")
    set_up_cpu()
    torch.backends.cudnn.benchmark = False  # pictures come in many sizes, and each would be tried out
    segmenter = load_segmenter(options.model, options.device, options.size)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to --out {options.out}: {error.strerror}") from error
    say(segmenter.reason)
    pixels_of, failures = predict(segmenter, jobs, suffixes, options.tile, options.average)
    if done := len(jobs) - len(failures):
        print(f"{done} masks in {options.out}: {shares(pixels_of, segmenter.classes)}")
    if failures:
        raise UserError(f"{len(failures)} of {len(jobs)} pictures could not be read: {listed(failures)}")


make_callable(__name__, "seg.masks:masks_of")  # from seg import predict


if __name__ == "__main__":
    main()
