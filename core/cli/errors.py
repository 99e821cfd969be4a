"""Errors a user can fix, and how every command reports them."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import difflib
import functools
import hashlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from core import __version__
from core.cli.streams import SturdyStream, say_loading, sturdy_streams, wipe_loading
from core.cli.text import from_here, shown

EXIT_USER_ERROR = 1
EXIT_INTERRUPTED = 130


class UserError(Exception):
    """A mistake that the user can correct: the message is one line that names the file or key and the remedy."""


class Interrupted(Exception):
    """The user stopped the work, and it has been saved; the message says how to continue."""


class CommandParser(argparse.ArgumentParser):
    """An argparse parser that reports mistakes as a `UserError` and keeps the line breaks of description and epilog.

    `--help` prints them and the options, `--help-all` the text `details` as well.
    """

    def __init__(self, details: str = "", **settings: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **settings)
        self.details = details
        more = "explain everything" if details else argparse.SUPPRESS
        self.add_argument("--help-all", action=_HelpAll, nargs=0, help=more)
        self.add_argument("--version", action="version", version=f"facet {__version__}", help=argparse.SUPPRESS)

    def error(self, message: str) -> NoReturn:
        """Raise a `UserError` where argparse would print its usage and exit with code 2."""
        known = {name.lstrip("-"): name for name in self._option_string_actions}
        unknown = message.split() if message.startswith("unrecognized") else []
        options = [word.lstrip("-").partition("=")[0] for word in unknown if word.startswith("-")]
        near = [known[one] for option in options for one in difflib.get_close_matches(option, known, n=1)]
        raise UserError(message + (f": did you mean {near[0]}?" if near else " (see --help)"))


class _HelpAll(argparse.Action):
    """Print the whole help and exit."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        assert isinstance(parser, CommandParser)
        print(parser.format_help() + parser.details)
        parser.exit()


def reports_errors(command: Callable[..., Any]) -> Callable[..., None]:
    """Make `command` exit with 0 when done, 1 after a one-line error, 130 when interrupted.

    Files and folders that cannot be accessed are errors of this kind, too. All other exceptions are defects and keep
    their traceback. What cannot be printed does not end the command, but makes it exit with 1.
    """

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        if signal.getsignal(signal.SIGINT) is _leave:  # everything is imported
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if isinstance(sys.stdout, SturdyStream):  # within a command, such as `facet`, that sees to the streams
            return guarded(*args, **kwargs)
        exits, code = False, None
        with sturdy_streams() as failure:
            try:
                guarded(*args, **kwargs)
            except SystemExit as stop:
                # Its code alone: the exception would keep the command's objects alive, and with them processes that
                # end only when their owner goes.
                exits, code = True, stop.code
            if reason := failure():
                print(f"error: cannot print the results: {reason.strerror}", file=sys.stderr)
                exits, code = True, code or EXIT_USER_ERROR
        _leave_the_others(code)
        if exits:
            sys.exit(code)

    def guarded(*args: Any, **kwargs: Any) -> None:
        wipe_loading()
        try:
            command(*args, **kwargs)
        except UserError as error:
            _stop(f"error: {error}", EXIT_USER_ERROR)
        except Interrupted as stop:
            _stop(f"interrupted: {stop}", EXIT_INTERRUPTED)
        except KeyboardInterrupt:
            _stop("interrupted", EXIT_INTERRUPTED)
        except OSError as error:
            if error.filename is None:
                raise
            name = error.filename if isinstance(error.filename, (str, bytes)) else str(error.filename)
            _stop(f"error: cannot access {shown(os.fsdecode(name), most=300)}: {error.strerror}", EXIT_USER_ERROR)

    return wrapped


def _leave_the_others(code: Any) -> None:
    """End a process that has exchanged tensors with others at once, without tearing down the interpreter.

    Gloo's threads may still hold the tensors of the last exchange, and DistributedDataParallel never lets them end. One
    that drops a tensor while Python finalises needs the interpreter, is made to exit inside C++, and std::terminate
    aborts the process: about once in a hundred launches on a busy machine.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        atexit._run_exitfuncs()  # among them what ends the processes that load data
        os._exit(code or 0)


def explain_early_interrupts() -> None:
    """Make Ctrl-C while `python -m` still imports a command what it is later: one line and exit code 130.

    Say on a terminal that it does so: PyTorch takes seconds.

    To be called by the package that holds the command, before its first import; nothing happens in other programs that
    import the package.
    """
    if sys.argv[:1] != ["-m"]:
        return
    say_loading()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


def _leave(*_: object) -> NoReturn:
    """Handle SIGINT while modules are imported, where callbacks and libraries may swallow an exception."""
    with contextlib.suppress(SystemExit):
        _stop("interrupted", EXIT_INTERRUPTED)
    os._exit(EXIT_INTERRUPTED)


def _stop(line: str, code: int) -> NoReturn:
    """Exit with a line on standard error, which names the process if it is not the first of several.

    What a damaged file has brought into the message cannot control the terminal: it is escaped.
    """
    rank = os.environ.get("RANK", "0")
    line = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in from_here(line))
    wipe_loading()
    if _first_to_say(line):
        print(line if rank == "0" else f"process {rank}: {line}", file=sys.stderr)
    sys.exit(code)


def _first_to_say(line: str) -> bool:
    """Whether no other process of this launch has stopped with this line on this machine: usually all of them do.

    Each gets the name of a file in torch's temporary folder of the launch. Without it, every process speaks.
    """
    place = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not place:
        return True
    digest = hashlib.sha256(line.encode(errors="backslashreplace")).hexdigest()[:16]
    try:
        (Path(place).parent.parent / f"said-{digest}").touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        return True
    return True
