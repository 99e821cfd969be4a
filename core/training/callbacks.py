"""What a training run does besides its steps: a loop takes a list of callbacks and calls their hooks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from core.training.best import comparable, score_panel
from core.training.curves import FILE_NAME, Panel, draw_curves

if TYPE_CHECKING:
    from core.training.loop import TrainingLoop


class Callback:
    """Hooks that do nothing unless a subclass overrides them. All processes call all of them, in the list's order."""

    def start(self, loop: TrainingLoop) -> None:
        """Before the first step, the state being loaded; nothing has been written yet."""

    def after_step(self, loop: TrainingLoop, before: int, last: bool) -> None:
        """The images seen went from `before` to `loop.images_seen`; `last`: no step follows."""

    def after_row(self, loop: TrainingLoop, values: dict[str, float]) -> None:
        """A row of statistics with these values was written (process 0)."""

    def before_checkpoint(self, loop: TrainingLoop, folder: Path) -> None:
        """Write to `folder` the files that are to come into the run together with the checkpoint that follows."""

    def after_checkpoint(self, loop: TrainingLoop) -> None:
        """A checkpoint and the model files were written."""

    def status(self) -> str:
        """What to add to the progress line."""
        return ""


class Tracker(Callback):
    """Sends statistics to the tracker that the accelerator was started with."""

    def start(self, loop: TrainingLoop) -> None:
        """Open the tracker."""
        loop.accelerator.init_trackers("curves")

    def after_row(self, loop: TrainingLoop, values: dict[str, float]) -> None:
        """Send a row."""
        loop.accelerator.log(values, step=loop.images_seen)


class Curves(Callback):
    """Draws curves.png after every checkpoint: the panels, and the scores if there are any."""

    def __init__(self, panels: Sequence[Panel]) -> None:
        self.panels = panels

    def after_checkpoint(self, loop: TrainingLoop) -> None:
        """Draw."""
        if loop.accelerator.is_main_process:
            rows = comparable(loop.run.read_stats())
            draw_curves(rows, [*self.panels, *score_panel(rows)], loop.run.path / FILE_NAME)
