"""Checks of options that several commands have."""

from __future__ import annotations

import argparse

from core.cli.errors import UserError
from core.cli.files import writable


def check_options(options: argparse.Namespace, **least: int) -> None:
    """Check `--seed`, that `--out` can be written, and the lower limits of other numbers.

    Raises:
        UserError: naming the first option that cannot be used.
    """
    for name, limit in {**least, "seed": 0}.items():
        if getattr(options, name) < limit:
            raise UserError(f"--{name} must be at least {limit}")
    if options.seed >= 2**62:
        raise UserError("--seed must be below 2^62")
    if not writable(options.out.parent):
        raise UserError(f"cannot write to {options.out.parent}: give another --out")
