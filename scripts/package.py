"""Pack 1,000 images as a submission, or check a packed one; all problems are listed, not only the first."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from core.cli.console import progress_bar
from core.cli.errors import CommandParser, UserError, reports_errors
from core.cli.files import sha256_of
from core.cli.text import listed, shown
from core.submission import rules
from core.submission.rules import EXPECTED_COUNT

EXAMPLES = """
examples:
  facet package runs/faces --student-number 20231234           sample 1,000 images and pack them
  facet package runs/faces --student-number 20231234 --seed 5000
  facet package images/ --student-number 20231234 --out handin  pack a folder of 1,000 PNGs unchanged
  facet check 20231234.tar.gz                                   nothing is unpacked to disk

A submission is <student number>.tar.gz with a folder <student number>/ of exactly 1,000 different 64x64 8-bit RGB PNGs.
A student number is 5 to 12 digits, with at most one letter before. The same input gives the same bytes. Files that
operating systems leave behind (.DS_Store, Thumbs.db, desktop.ini, __MACOSX, ._*) are not packed; in an archive they are
a problem. Exit code 0: packed, or nothing wrong; 1: problems, all listed, and nothing written.
"""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line (default: sys.argv)."""
    parser = CommandParser(prog="facet package", description=__doc__, epilog=EXAMPLES)
    parser.add_argument("source", nargs="?", type=Path, help="folder of PNGs, run folder, or .safetensors model file")
    parser.add_argument("--student-number", metavar="NUMBER", help="names the archive and the folder in it")
    parser.add_argument("--out", type=Path, help="folder for the archive (default: the current one)")
    parser.add_argument("--seed", type=int, help=f"run, model: image seeds SEED..SEED+{EXPECTED_COUNT - 1} (default 0)")
    parser.add_argument("--force", action="store_true", help="replace a different archive of the same name")
    parser.add_argument("--check", type=Path, metavar="ARCHIVE", help="only check an archive")
    options = parser.parse_args(arguments)
    packing = [options.source, options.student_number, options.out, options.seed]
    if options.check is None and None in packing[:2]:
        parser.error("give SOURCE and --student-number to pack, or --check ARCHIVE")
    if options.seed is not None and options.seed < 0:
        parser.error("--seed must not be negative")
    if options.check is not None and (options.force or any(value is not None for value in packing)):
        parser.error("--check ARCHIVE cannot be combined with other arguments")
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


def stop_on(problems: list[str], what: Path) -> None:
    """List problems on standard error, and raise a `UserError` if there are any."""
    for problem in problems:
        print(f"- {problem}", file=sys.stderr)
    if problems:
        raise UserError(f"{len(problems)} problem{'s' * (len(problems) > 1)} in {what}")


def pack(source: Path, student_number: str, out: Path, seed: int | None, force: bool) -> Path:
    """Check the images of a folder or model and write the archive."""
    rules.require_student_number(student_number)
    if not source.exists():
        raise UserError(f"{source} does not exist: give a folder of {EXPECTED_COUNT:,} PNGs, a run or a model file")
    problems: list[str] = []
    if source.suffix == ".safetensors" or (source / "model.safetensors").is_file():
        entries = sampled(source, seed or 0)
    elif source.is_file():
        hint = f"to check an archive: --check {shlex.quote(str(source))}"
        raise UserError(f"{source} is neither a folder nor a .safetensors model ({hint})")
    elif seed is not None:
        raise UserError(f"--seed is for a run or a model, and {source} has no model.safetensors")
    else:
        entries, problems = gathered(source)
    stop_on(problems + rules.check_images(entries), source)
    return rules.write_archive(entries, student_number, out, force=force)


@reports_errors
def main() -> None:
    """Entry point."""
    options = parse()
    if options.check is not None:
        stop_on(rules.check_archive(options.check), options.check)
        print(f"{options.check}: nothing wrong, {EXPECTED_COUNT:,} images")
        return
    target = pack(options.source, options.student_number, options.out or Path(), options.seed, options.force)
    print(f"{target}: {EXPECTED_COUNT:,} images, {target.stat().st_size / 1e6:.1f} MB, sha256 {sha256_of(target)}")


if __name__ == "__main__":
    main()
