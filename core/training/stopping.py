"""Stopping on request: what Ctrl-C, SIGTERM and the end of the terminal do to a training run."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """`received` once SIGINT, SIGTERM or SIGHUP has come. Another one, seconds later, ends the process at once."""

    ECHO = 2.0  # seconds: one Ctrl-C can arrive twice, from the terminal and from the launcher

    def __init__(self) -> None:
        self.received = False
        self._since = 0.0

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received and time.monotonic() - self._since > self.ECHO:
            raise KeyboardInterrupt
        if not self.received:
            self.received, self._since = True, time.monotonic()

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Catch the signals inside the block; outside they act as before."""
        numbers = [signal.SIGINT, signal.SIGTERM]
        # Windows has no SIGHUP, and under nohup it is ignored and must stay so.
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        before = {number: signal.signal(number, self._note) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
