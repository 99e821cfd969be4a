"""The grids that a run has kept, as a movie: `facet timelapse runs/first --out first.mp4`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path

import numpy as np
from PIL import Image

from core.cli.errors import CommandParser, UserError, reports_errors
from core.data.decode import reason_of
from core.data.movie import require_movie, write_movie
from core.training.rundir import RunFolder, no_run

FPS = 20
SECONDS = 8.0
LAST_SHARE = 0.25  # of the time, for which the last grid stays longer than the others
EPILOG = """
A generator's grids show the same latents after more and more images, a segmenter's the same pictures; training writes
one every `grid_every` images (segmentation: `valid_every`), and each says below it how many images had been seen.

examples:
  facet timelapse runs/first --out first.mp4        needs PyAV: pip install 'facet-faces[video]'
  facet timelapse runs/first --out first.gif --seconds 5
"""


def kept_grids(run: RunFolder) -> list[tuple[int, Path]]:
    """Images seen and path of each grid of a run, in order; a UserError where there are fewer than two."""
    grids = run.pictures()
    if not grids and not run.config.is_file():
        raise no_run(run.path)
    if len(grids) < 2:
        raise UserError(
            f"{run.samples} holds {len(grids)} grids, and a movie takes 2: train longer, or with a smaller grid_every"
        )
    return grids


def frames(grids: list[tuple[int, Path]], count: int) -> Iterator[np.ndarray]:
    """About `count` pictures, uint8 (H, W, 3): all grids for equal times, but the last one longer.

    Raises:
        UserError: a grid cannot be read, or has another size than the first.
    """
    each = max(1, round(count * (1 - LAST_SHARE) / len(grids)))
    size = None
    for number, (_, path) in enumerate(grids, 1):
        try:
            with Image.open(path) as picture:
                grid = np.asarray(picture.convert("RGB"))
        except Exception as error:  # decoders raise nearly anything for damaged files
            raise UserError(f"cannot read {path}: {reason_of(error)}; delete it to go on without it") from error
        if grid.shape != (size := size or grid.shape):
            raise UserError(f"{path} has another size than {grids[0][1]}: delete those of an earlier run")
        yield from repeat(grid, each + round(count * LAST_SHARE) * (number == len(grids)))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read and check the command line."""
    parser = CommandParser(
        prog="facet timelapse", description="Show how the samples of a run improved, as a movie.", epilog=EPILOG
    )
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the movie: .mp4, .gif or .webp")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"how long it lasts (default {SECONDS:g})")
    options = parser.parse_args(arguments)
    if not 1 <= options.seconds <= 600:
        raise UserError("--seconds must be 1 to 600")
    require_movie(options.out, "--out")
    return options


@reports_errors
def main() -> None:
    """Command line entry."""
    options = parse()
    grids = kept_grids(RunFolder(options.run))
    write_movie(options.out, frames(grids, round(FPS * options.seconds)), FPS)
    print(f"{len(grids)} grids, from {grids[0][0]:,} to {grids[-1][0]:,} images: {options.out}")


if __name__ == "__main__":
    main()
