"""Progress bars and messages, on standard error."""

from __future__ import annotations

from collections.abc import Iterable

from rich import progress
from rich.console import Console, RenderableType
from rich.text import Text

# Standard output is for results alone, so that `command > file` stores nothing else.
console = Console(stderr=True)


class RateColumn(progress.ProgressColumn):
    """Recent speed in units per second."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: progress.Task) -> Text:
        """The speed of a task; a dash before its first update."""
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.1f} {self.unit}/s" if speed else f"- {self.unit}/s", style="cyan")


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
            yield Text(self.status, style="cyan")


def progress_bar(unit: str = "images", *, quiet: bool = False) -> StatusProgress:
    """A bar with description, count, rate, elapsed and remaining time; `quiet` hides it, as on ranks other than 0."""
    # Without markup, since a description may name a file with [ in it.
    done = [
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(bar_width=12),
        progress.MofNCompleteColumn(),
    ]
    times = [progress.TimeElapsedColumn(), progress.TextColumn("left"), progress.TimeRemainingColumn()]
    return StatusProgress(*done, RateColumn(unit), *times, console=console, disable=quiet, speed_estimate_period=60)


def say(text: str, style: str | None = None) -> None:
    """Print a message as it is: unwrapped, so that paths can be copied, and without markup, for file names with [."""
    console.print(text, style=style, soft_wrap=True, highlight=False, markup=False)


def warn(text: str) -> None:
    """Print a warning that stands out."""
    say(f"warning: {text}", style="yellow")
