"""Fill the missing parts of one picture by a network that has seen nothing else (Ulyanov et al. 2018)."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from core.cli.console import progress_bar, say
from core.cli.errors import CommandParser, Interrupted, UserError, reports_errors
from core.data.decode import decode, reason_of
from core.data.grids import captioned
from core.data.images import make_grid, write_png
from core.drawn.damage import draw_damage
from core.drawn.face import draw_face
from core.training.machine import pick_device, set_up_cpu
from core.training.stopping import StopRequest
from scripts.options import check_options
from seg.deep_prior import DeepPrior, diffuse, psnr

DRAWN = "drawn"
COLUMNS = ".columns.png"
FILTER = Image.Resampling.BILINEAR  # with a known support, unlike Lanczos, whose ringing reaches far
WIDEST = 384  # pixels of an enlarged picture's longer side
GREY = 128  # what missing pixels look like in the picture with columns
EPILOG = """
No training set: an untrained U-Net without skips shows the known pixels of this one picture better and better, and in
between what comes easiest to it, which looks like the rest of the picture. Known pixels stay as they are.

  facet inpaint photo.jpg --mask scratches.png --out whole.png     white is what is missing, as in most programs
  facet inpaint photo.jpg --mask drawn:3 --out whole.png           strokes and blocks at random: how well does it do?
  facet inpaint drawn:7 --mask drawn:1 --size 64 --out face.png    the same with a face that the program draws

Beside the result, OUT.columns.png shows the original (if known), what was left of it, diffusion and the result. The
original is known where the mask is drawn, or with --original.
"""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read and check the command line (default: sys.argv)."""
    parser = CommandParser(prog="facet inpaint", description=__doc__, epilog=EPILOG)
    parser.add_argument("picture", help="the picture, or drawn:NUMBER for a drawn face")
    parser.add_argument("--mask", required=True, help="picture, white where pixels are missing, or drawn:SEED")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.png", help="the filled picture")
    parser.add_argument("--original", help="the picture before it was damaged, to measure against")
    parser.add_argument("--size", type=int, default=128, help="a longer side is scaled down to it (default 128)")
    parser.add_argument("--iterations", type=int, default=1500, help="steps of the fit (default 1500)")
    parser.add_argument("--seed", type=int, default=0, help="of the network and its input (default 0)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default auto)")
    options = parser.parse_args(arguments)
    if options.out.suffix != ".png":
        raise UserError(f"--out {options.out}: the name must end in .png")
    check_options(options, size=16, iterations=1)
    return options


def drawn_number(word: str, option: str) -> int | None:
    """The number of `drawn:NUMBER`; None for a path."""
    name, colon, number = word.partition(":")
    if name != DRAWN or Path(word).exists():
        return None
    if not (colon and number.isdecimal()):
        raise UserError(f"{option} {word}: write {DRAWN}:NUMBER, such as {DRAWN}:1")
    return int(number)


def read(word: str, option: str) -> Image.Image:
    """A picture file, RGB, or a drawn face."""
    number = drawn_number(word, option)
    if number is not None:
        return draw_face(0, number)[0]
    try:
        with Path(word).open("rb") as handle:
            return decode(handle)
    except FileNotFoundError as error:
        raise UserError(f"no picture at {word}") from error
    except OSError as error:
        if error.filename is not None:
            raise
        raise UserError(f"cannot read {word}: {reason_of(error)}") from error
    except Exception as error:  # decoders raise nearly anything for damaged files
        raise UserError(f"cannot read {word}: {reason_of(error)}") from error


def read_all(options: argparse.Namespace) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Picture and original, uint8 (H, W, 3), and the missing pixels, bool (H, W), at the size to work at."""
    picture = read(options.picture, "PICTURE")
    share = min(1, options.size / max(picture.size))
    size = max(1, round(picture.width * share)), max(1, round(picture.height * share))
    if share < 1:
        say(f"{options.picture} is scaled from {picture.width}x{picture.height} to {size[0]}x{size[1]} (--size)")

    def scaled(word: str, option: str) -> Image.Image:
        other = read(word, option)
        if other.size != picture.size:
            sizes = " and ".join(f"{one.width}x{one.height}" for one in (other, picture))
            raise UserError(f"{option} {word} and {options.picture} must have the same size, but have {sizes}")
        return other

    pixels = np.asarray(picture.resize(size, FILTER))
    seed = drawn_number(options.mask, "--mask")
    if seed is None:
        # A pixel to which a missing one has contributed is missing.
        mask = scaled(options.mask, "--mask").convert("L").point(lambda value: 255 * (value > 127))
        missing = np.asarray(mask.resize(size, FILTER)) > 0
    else:
        missing = draw_damage(*size, seed)
    original = pixels if seed is not None else None
    if options.original is not None:
        original = np.asarray(scaled(options.original, "--original").resize(size, FILTER))
    return pixels, missing, original


def run(fit: DeepPrior, iterations: int) -> None:
    """Do so many steps, or fewer, but at least one, where Ctrl-C ends them early."""
    with StopRequest().listening() as stop, progress_bar("steps") as bar:
        task = bar.add_task("fitting", total=iterations)
        while fit.steps < iterations and not (stop.received and fit.steps):
            bar.status = f"mean square error of the known pixels {fit.step():.5f}"
            bar.update(task, advance=1)


def columns(named: dict[str, np.ndarray]) -> np.ndarray:
    """Pictures, uint8 (H, W, 3) of one size, side by side with their names below, small ones enlarged."""
    height, width = next(iter(named.values())).shape[:2]
    times = max(1, min(round(192 / min(height, width)), WIDEST // max(height, width)))
    large = {name: picture.repeat(times, axis=0).repeat(times, axis=1) for name, picture in named.items()}
    return make_grid(np.stack([captioned(picture, name) for name, picture in large.items()]), columns=len(large))


@reports_errors
def main() -> None:
    """Command line entry."""
    options = parse()
    set_up_cpu()
    pixels, missing, original = read_all(options)
    fit = DeepPrior(pixels, missing, options.seed, pick_device(options.device))
    diffused = diffuse(pixels, missing).round().astype(np.uint8)
    run(fit, options.iterations)
    measured = {"diffusion": diffused, "deep prior": fit.picture()}
    named = {"damaged": np.where(missing[..., None], np.uint8(GREY), pixels)}
    scores: dict[str, float] = {}
    if original is None:
        named |= measured
    else:
        scores = {name: psnr(picture, original, missing) for name, picture in measured.items()}
        named = {"original": original} | named | {f"{name}, {scores[name]:.1f} dB": measured[name] for name in scores}
    beside = options.out.with_suffix(COLUMNS)
    write_png(options.out, measured["deep prior"])
    write_png(beside, columns(named))
    print(f"{100 * missing.mean():.1f}% of {pixels.shape[1]}x{pixels.shape[0]} pixels were missing")
    for name, score in scores.items():
        print(f"{name}: PSNR {score:.2f} dB over them")
    if scores and scores["deep prior"] < scores["diffusion"]:
        print(f"below diffusion: give more than {fit.steps:,} steps (--iterations)")
    print(f"written: {options.out} and {beside}")
    if fit.steps < options.iterations:
        raise Interrupted(f"after {fit.steps:,} of {options.iterations:,} steps; {options.out} is what they gave")


if __name__ == "__main__":
    main()
