"""Progress bars and messages, on standard error."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich import progress
from rich.console import Console, RenderableType
from rich.table import Column
from rich.text import Text

from core.cli.streams import wipe_loading
from core.cli.text import from_here

# Standard output is for results alone, so that `command > file` stores nothing else.
console = Console(stderr=True)
ONE_LINE: dict[str, Any] = {"no_wrap": True, "overflow": "ellipsis"}


class NameColumn(progress.ProgressColumn):
    """What is done; a name too long for the line is cut."""

    def render(self, task: progress.Task) -> Text:
        """The description, without markup: it may name a file with [."""
        return Text(task.description, **ONE_LINE)


class CountColumn(progress.ProgressColumn):
    """How much is done, of how much, and the recent speed in units per second: `64/2,000 images, 85/s`."""

    def __init__(self, unit: str) -> None:
        super().__init__(Column(**ONE_LINE))
        self.unit = unit

    def render(self, task: progress.Task) -> Text:
        """The numbers of a task; no speed before its second update."""
        total = "" if task.total is None else f"/{task.total:,.0f}"
        speed = task.finished_speed or task.speed
        rate = f", {speed:,.{0 if speed >= 100 else 1}f}/s" if speed else ""
        return Text(f"{task.completed:,.0f}{total} {self.unit}{rate}", style="green")


class ClockColumn(progress.ProgressColumn):
    """Times of a task in words: `2 s elapsed, 40 s left`."""

    max_refresh = 0.5

    def __init__(self) -> None:
        super().__init__(Column(**ONE_LINE))

    def render(self, task: progress.Task) -> Text:
        """Both times while it runs and the second can be told."""
        elapsed = task.finished_time if task.finished else task.elapsed
        words = [] if elapsed is None else [f"{duration(elapsed)} elapsed"]
        words += [] if task.finished or task.time_remaining is None else [f"{duration(task.time_remaining)} left"]
        return Text(", ".join(words), style="yellow")


def duration(seconds: float) -> str:
    """A time in one unit: `40 s`, `12 min`, `3.5 h`, `2.1 days`."""
    for most, size, unit in ((100, 1, "s"), (6_000, 60, "min")):
        if seconds < most:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 3_600:.1f} h" if seconds < 36 * 3_600 else f"{seconds / 86_400:,.1f} days"


class StatusProgress(progress.Progress):
    """A progress bar with a line of text below it: beside it, there is no room on 80 columns."""

    status = ""

    def stop(self) -> None:
        """End the bar, unless it is hidden: some versions of rich print an empty line even then."""
        if not self.disable:
            super().stop()

    def get_renderables(self) -> Iterable[RenderableType]:
        """The bar, then the status."""
        yield from super().get_renderables()
        if self.status:
            yield Text(self.status, style="cyan", **ONE_LINE)


def progress_bar(unit: str = "images", *, quiet: bool = False) -> StatusProgress:
    """A bar with description, count, speed and times, in 80 columns; `quiet` hides it, as on ranks other than 0."""
    # The name and the bar share the room that the others leave.
    bar = progress.BarColumn(bar_width=None, table_column=Column(max_width=12))
    columns = [NameColumn(), bar, CountColumn(unit), ClockColumn()]
    return StatusProgress(*columns, console=console, disable=quiet, speed_estimate_period=60)


def say(text: str, style: str | None = None) -> None:
    """Print a message unwrapped, so that paths can be copied, and without markup, for file names with [."""
    wipe_loading()
    console.print(from_here(text), style=style, soft_wrap=True, highlight=False, markup=False)


def warn(text: str) -> None:
    """Print a warning that stands out."""
    say(f"warning: {text}", style="yellow")
