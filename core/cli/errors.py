"""Errors a user can fix, and how every command reports them."""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any, NoReturn

EXIT_USER_ERROR = 1
EXIT_INTERRUPTED = 130


class UserError(Exception):
    """A mistake that the user can correct: the message is one line that names the file or key and the remedy."""


class Interrupted(Exception):
    """The user stopped the work, and it has been saved; the message says how to continue."""


class CommandParser(argparse.ArgumentParser):
    """An argparse parser that reports mistakes as a `UserError` and keeps the line breaks of description and epilog."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **settings)

    def error(self, message: str) -> NoReturn:
        """Raise a `UserError` where argparse would print its usage and exit with code 2."""
        raise UserError(f"{message} (see --help)")


def reports_errors(command: Callable[..., Any]) -> Callable[..., None]:
    """Make `command` exit with 0 when done, 1 after a one-line error, 130 when interrupted.

    All other exceptions are defects and keep their traceback.
    """

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except UserError as error:
            _stop(f"error: {error}", EXIT_USER_ERROR)
        except Interrupted as stop:
            _stop(f"interrupted: {stop}", EXIT_INTERRUPTED)
        except KeyboardInterrupt:
            _stop("interrupted", EXIT_INTERRUPTED)
        except BrokenPipeError:
            # Whoever read our output, such as `| head`, has closed it: no error, and no one left to tell.
            sys.stderr.close()
            sys.exit(EXIT_USER_ERROR)

    return wrapped


def explain_early_interrupts() -> None:
    """Make Ctrl-C while `python -m` still imports a command what it is later: one line and exit code 130.

    To be called by the package that holds the command, before its first import; nothing happens in other programs that
    import the package.
    """
    if sys.argv[:1] != ["-m"]:
        return
    before = sys.excepthook

    def report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):
            with contextlib.suppress(SystemExit):
                _stop("interrupted", EXIT_INTERRUPTED)
            os._exit(EXIT_INTERRUPTED)  # Python itself would end by the signal
        before(kind, error, trace)

    sys.excepthook = report


def _stop(line: str, code: int) -> NoReturn:
    """Exit with a line on standard error, from the first process only: all of them usually meet the same error."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr)
    sys.exit(code)
