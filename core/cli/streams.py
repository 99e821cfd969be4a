"""Standard output and error that cannot end a command: its work and its files count for more than what it prints."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO


class SturdyStream:
    """A text stream that keeps its first failure (a full disk, a reader that has gone) and drops all that follows.

    Characters that its encoding lacks are written as backslash escapes.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self.stream: Any = stream or open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115 (None: closed before the start)
        self.failure: OSError | None = None
        if hasattr(self.stream, "reconfigure"):
            self.stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        """Write if possible."""
        self._attempt(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        """Flush if possible."""
        self._attempt(self.stream.flush)

    def _attempt(self, act: Callable[..., Any], *arguments: Any) -> None:
        if self.failure is not None:
            return
        try:
            act(*arguments)
        except OSError as error:
            self.failure = error
            # What is still buffered is written once more when the interpreter ends: it must not fail a second time.
            with contextlib.suppress(OSError), open(os.devnull, "wb") as null:  # noqa: PTH123
                os.dup2(null.fileno(), self.stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextlib.contextmanager
def sturdy_streams() -> Iterator[Callable[[], OSError | None]]:
    """Make sys.stdout and sys.stderr sturdy; yields what flushes them and returns why standard output failed, if so."""
    before = sys.stdout, sys.stderr
    out, err = map(SturdyStream, before)

    def failure() -> OSError | None:
        out.flush()
        return out.failure

    sys.stdout, sys.stderr = out, err
    try:
        yield failure
    finally:
        out.flush()
        err.flush()
        sys.stdout, sys.stderr = before


LOADING = "loading the libraries ..."
_loading: list[TextIO] = []  # the terminal that shows it


def say_loading() -> None:
    """Say on a terminal, in the first of several processes, why nothing happens yet."""
    if sys.stderr is not None and sys.stderr.isatty() and os.environ.get("RANK", "0") == "0" and not _loading:
        print(LOADING, end="", flush=True, file=sys.stderr)
        _loading.append(sys.stderr)


def wipe_loading() -> None:
    """Take the words back."""
    while _loading:
        print("\r" + " " * len(LOADING), end="\r", flush=True, file=_loading.pop())
