"""Pack 1,000 images as a submission; all problems are listed, not only the first."""

from __future__ import annotations

import argparse
import io
import shlex
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from core.cli.console import progress_bar, say, warn
from core.cli.errors import CommandParser, UserError, reports_errors
from core.cli.files import sha256_of
from core.cli.text import listed, shown
from core.submission import rules
from core.submission.rules import EXPECTED_COUNT
from scripts.check import stop_on

EXAMPLES = """
examples:
  facet package runs/faces --student-number 20231234           sample 1,000 images and pack them
  facet package runs/faces --student-number 20231234 --seed 5000
  facet package images/ --student-number 20231234 --out handin  pack a folder of 1,000 PNGs unchanged

A submission is <student number>.tar.gz with a folder <student number>/ of exactly 1,000 different 64x64 8-bit RGB PNGs.
A student number is 5 to 12 digits, with at most one letter before. The same input gives the same bytes. Files that
operating systems leave behind (.DS_Store, Thumbs.db, desktop.ini, __MACOSX, ._*) are not packed, nor are the features
of facet score (.facet-fid); in an archive they are a problem. What a collapsed generator draws (one colour, noise, one
face over and over) is refused, too, and shown in NUMBER.refused.png beside the archive. The last score and the warnings
of a run are told. Exit code 0: packed; 1: problems, all listed, and nothing packed.
"""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line (default: sys.argv)."""
    parser = CommandParser(prog="facet package", description=__doc__, epilog=EXAMPLES)
    parser.add_argument("source", type=Path, help="folder of PNGs, run folder, or .safetensors model file")
    parser.add_argument("--student-number", required=True, metavar="NUMBER", help="names the archive and its folder")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the archive (default: the current one)")
    parser.add_argument("--seed", type=int, help=f"run, model: image seeds SEED..SEED+{EXPECTED_COUNT - 1} (default 0)")
    parser.add_argument("--force", action="store_true", help="pack what looks collapsed; replace another archive")
    options = parser.parse_args(arguments)
    if options.seed is not None and options.seed < 0:
        parser.error("--seed must not be negative")
    return options


def sampled(source: Path, first_seed: int) -> list[tuple[str, bytes]]:
    """The images of a model for `EXPECTED_COUNT` seeds, as PNG files."""
    # Imported here because they load torch, which checking an archive does not need
    from core.data.images import png_bytes
    from core.nn.model_file import model_file
    from gen.sample import generate_batches

    batches = generate_batches(model_file(source), range(first_seed, first_seed + EXPECTED_COUNT))
    files: list[tuple[str, bytes]] = []
    with progress_bar() as bar:
        task = bar.add_task("sampling", total=EXPECTED_COUNT)
        for batch in batches:
            files += [(f"image_{number:04d}.png", png_bytes(pixels)) for number, pixels in enumerate(batch, len(files))]
            bar.update(task, completed=len(files))
    return files


def gathered(source: Path) -> tuple[list[tuple[str, bytes]], list[str]]:
    """The files of a folder and the problems found while reading it; prints the names left out."""
    with progress_bar("files") as bar:
        task = bar.add_task("reading", total=None)
        folder = rules.read_folder(source, lambda done, total: bar.update(task, completed=done, total=total))
    if folder.left_out:
        print(f"left out, as no images: {listed([shown(name) for name in folder.left_out])}", file=sys.stderr)
    return folder.entries, folder.problems


def stop_on_collapse(entries: list[tuple[str, bytes]], picture: Path, force: bool) -> None:
    """Refuse images of a collapsed generator, and write `picture` of them; with `force`, only warn.

    Raises:
        UserError: they have one colour, are noise or all alike, or more than a few are the same; names `picture`.
    """
    # Imported here because they load torch, which checking an archive does not need
    from core.data.images import write_png
    from eval.checks.collapse import collapse
    from eval.checks.copies import duplicates
    from eval.checks.verdicts import thumbnails

    pixels = np.stack([np.asarray(Image.open(io.BytesIO(content)).convert("RGB")) for _, content in entries])
    checks = [collapse(pixels), duplicates(pixels, thumbnails(pixels))]
    bad = [check for check in checks if check.verdict == "bad"]
    for check in checks:
        if check.verdict == "doubt" or (force and check in bad):
            warn(check.headline)
    if bad and not force:
        assert bad[0].pictures is not None
        write_png(picture, bad[0].pictures)
        raise UserError(f"{bad[0].headline} Look at {picture}. {bad[0].details} To pack them nevertheless: --force")


def tell_of_run(model: Path) -> None:
    """Say the scores and warnings of the run that a model file belongs to, if it belongs to one."""
    from core.training.best import best_so_far
    from core.training.rundir import RunFolder
    from eval.results import find_results

    run = RunFolder(model.parent)
    if not run.config.is_file():
        return
    try:
        results = find_results(str(run.path))
    except UserError as error:  # a damaged result is no reason not to pack
        results = {}
        warn(str(error))
    scores = [f"{metric} {entry.result['mean']:.4g} ({entry.file})" for metric, entry in results.items()]
    best = best_so_far(run)
    say(f"last score: {', '.join(scores)}" if scores else f"{run.path} has no result of facet score")
    if best:
        say(best)
    for row in run.read_stats():
        if "warning" in row:
            warn(f"training said at {row['images']:,} images: {row['warning']}")


def pack(source: Path, student_number: str, out: Path, seed: int | None, force: bool) -> Path:
    """Check the images of a folder or model and write the archive."""
    rules.require_student_number(student_number)
    if not source.exists():
        raise UserError(f"{source} does not exist: give a folder of {EXPECTED_COUNT:,} PNGs, a run or a model file")
    problems: list[str] = []
    model = source / "model.safetensors" if (source / "model.safetensors").is_file() else source
    if model.suffix == ".safetensors":
        entries = sampled(source, seed or 0)
        tell_of_run(model)
    elif source.is_file():
        hint = f"to check an archive: facet check {shlex.quote(str(source))}"
        raise UserError(f"{source} is neither a folder nor a .safetensors model ({hint})")
    elif seed is not None:
        raise UserError(f"--seed is for a run or a model, and {source} has no model.safetensors")
    else:
        entries, problems = gathered(source)
    stop_on(problems + rules.check_images(entries), source)
    stop_on_collapse(entries, out / f"{student_number}.refused.png", force)
    return rules.write_archive(entries, student_number, out, force=force)


@reports_errors
def main() -> None:
    """Entry point."""
    options = parse()
    target = pack(options.source, options.student_number, options.out, options.seed, options.force)
    print(f"{target}: {EXPECTED_COUNT:,} images, {target.stat().st_size / 1e6:.1f} MB, sha256 {sha256_of(target)}")


if __name__ == "__main__":
    main()
