"""What a person sees while a command works: progress bars with rate and time left, on standard error."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

# Results go to standard output, everything else here, so that `command > file` keeps only the result.
console = Console(stderr=True)


class RateColumn(ProgressColumn):
    """Units per second over the recent past."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        """The speed of one task, or a dash before the first update."""
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.1f} {self.unit}/s" if speed else f"- {self.unit}/s", style="cyan")


class StatusProgress(Progress):
    """A progress bar with a line of text below it, which keeps the bar readable on 80 columns."""

    status = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        """The bar, then the status."""
        yield from super().get_renderables()
        if self.status:
            yield Text(self.status, style="cyan")


def progress_bar(unit: str = "images", *, quiet: bool = False) -> StatusProgress:
    """A rich progress bar: description, bar, done of total, rate, elapsed and remaining time; `status` below it.

    `quiet` hides it (ranks other than 0, tests).
    """
    return StatusProgress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=12),
        MofNCompleteColumn(),
        RateColumn(unit),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=quiet,
        speed_estimate_period=60,
    )


def say(text: str, style: str | None = None) -> None:
    """Print one message as it is: no wrapping (a path must stay in one piece) and no markup in file names."""
    console.print(text, style=style, soft_wrap=True, highlight=False, markup=False)


def warn(text: str) -> None:
    """Print a warning that stands out."""
    say(f"warning: {text}", style="yellow")
