"""Stopping on request: what Ctrl-C, SIGTERM and the end of the terminal do to a training run."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from types import FrameType

from core.cli.console import console, say
from core.cli.errors import EXIT_INTERRUPTED


class StopRequest:
    """`received` once SIGINT, SIGTERM or SIGHUP has come, which a line says. Another one ends the process at once.

    A thread answers: Python runs handlers in the main thread alone, which may be inside one operation for a minute.
    `work` is what will be finished first.
    """

    ECHO = 1.0  # seconds: one Ctrl-C can arrive twice, from the terminal and from the launcher

    def __init__(self, work: str = "this step") -> None:
        self.received, self.work = False, work

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = True

    def _answer(self, arriving: socket.socket, numbers: Collection[int]) -> None:
        """Read the number of each signal, which the system's handler has written; 0 is the end."""
        since = None
        while number := arriving.recv(1)[0]:
            if number not in numbers:
                continue
            if since is None:
                since = time.monotonic()
                _tell(f"finishing {self.work}, then saving; Ctrl-C again stops at once")
            elif time.monotonic() - since > self.ECHO:
                _tell("interrupted: stopped at once; what was saved before is kept")
                if console.is_terminal:  # which shows a bar without a cursor
                    console.show_cursor()
                    console.file.write("\n")
                    console.file.flush()
                os._exit(EXIT_INTERRUPTED)  # files are written under another name first

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Catch the signals inside the block; outside they act as before."""
        numbers = [signal.SIGINT, signal.SIGTERM]
        # Windows has no SIGHUP, and under nohup it is ignored and must stay so.
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        arriving, arrived = socket.socketpair()
        arrived.setblocking(False)
        woken = signal.set_wakeup_fd(arrived.fileno(), warn_on_full_buffer=False)
        before = {number: signal.signal(number, self._note) for number in numbers}
        answering = threading.Thread(target=self._answer, args=(arriving, numbers), daemon=True)
        answering.start()
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(woken)
            arrived.send(b"\0")  # closing it would not do: forked processes have it open as well
            answering.join()
            arriving.close()
            arrived.close()


def _tell(line: str) -> None:
    """Say it in the first of several processes."""
    if os.environ.get("RANK", "0") == "0":
        say(line)
