"""Check a packed submission as a grader would; all problems are listed, not only the first."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from core.cli.errors import CommandParser, UserError, reports_errors
from core.submission.rules import EXPECTED_COUNT, check_archive

EXAMPLES = """
examples:
  facet check 20231234.tar.gz
  facet check handin/20231234.tar.gz

A submission is <student number>.tar.gz with a folder <student number>/ of exactly 1,000 different 64x64 8-bit RGB PNGs.
A student number is 5 to 12 digits, with at most one letter before. Archives from strangers are safe to check: nothing
is unpacked to disk. Exit code 0: nothing wrong; 1: problems, all listed.
"""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line (default: sys.argv)."""
    parser = CommandParser(prog="facet check", description=__doc__, epilog=EXAMPLES)
    parser.add_argument("archive", type=Path, metavar="ARCHIVE", help="a .tar.gz that facet package or someone wrote")
    return parser.parse_args(arguments)


def stop_on(problems: list[str], what: Path) -> None:
    """List problems on standard error, and raise a `UserError` if there are any."""
    for problem in problems:
        print(f"- {problem}", file=sys.stderr)
    if problems:
        raise UserError(f"{len(problems)} problem{'s' * (len(problems) > 1)} in {what}")


@reports_errors
def main() -> None:
    """Entry point."""
    archive: Path = parse().archive
    stop_on(check_archive(archive), archive)
    print(f"{archive}: nothing wrong, {EXPECTED_COUNT:,} images")


if __name__ == "__main__":
    main()
