"""Errors a user can fix, and how every command reports them."""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

EXIT_USER_ERROR = 1
EXIT_INTERRUPTED = 130


class UserError(Exception):
    """Something the user can put right: the message is one line that names the file or key and the way out."""


class Interrupted(Exception):
    """The work was stopped on request after everything worth keeping was saved; the message says how to go on."""


class CommandParser(argparse.ArgumentParser):
    """A parser whose mistakes are a `UserError`: one line and exit code 1, as everywhere, not usage and 2.

    Line breaks in the description and the examples below it are kept.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **settings)

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print."""
        raise UserError(f"{message} (see --help)")


def reports_errors(command: Callable[..., Any]) -> Callable[..., None]:
    """Make `command` end as the exit-code contract says: 0 done, 1 a one-line error, 130 interrupted.

    Exceptions that are not a `UserError` are defects of ours and keep their traceback.
    """

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except UserError as error:
            _tell(f"error: {error}")
            sys.exit(EXIT_USER_ERROR)
        except Interrupted as stop:
            _tell(f"interrupted: {stop}")
            sys.exit(EXIT_INTERRUPTED)
        except KeyboardInterrupt:
            _tell("interrupted")
            sys.exit(EXIT_INTERRUPTED)
        except BrokenPipeError:
            # The reader of our output (`| head`) went away: not an error of ours, and nothing left to say.
            sys.stderr.close()
            sys.exit(EXIT_USER_ERROR)

    return wrapped


def _tell(line: str) -> None:
    """Print on standard error, once however many processes meet the same error."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr)
