"""What a training run does besides its steps: a loop takes a list of callbacks and calls their hooks."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from core.cli.config import as_dict
from core.cli.console import duration, say
from core.cli.errors import UserError
from core.data.grids import captioned, write_png
from core.training.best import comparable, score_panel
from core.training.curves import FILE_NAME, Panel, draw_curves
from core.training.distributed import TRACKERS
from core.training.meter import is_due

if TYPE_CHECKING:
    from core.training.loop import TrainingLoop


class Callback:
    """Hooks that do nothing unless a subclass overrides them. All processes call all of them, in the list's order."""

    def start(self, loop: TrainingLoop) -> None:
        """Before the first step, the state being loaded; nothing has been written yet."""

    def begin(self, loop: TrainingLoop) -> None:
        """Before the first step; the run folder has its settings."""

    def after_step(self, loop: TrainingLoop, before: int, last: bool) -> None:
        """The images seen went from `before` to `loop.images_seen`; `last`: no step follows."""

    def after_row(self, loop: TrainingLoop, values: dict[str, float]) -> None:
        """A row of statistics with these values was written (process 0)."""

    def after_picture(self, loop: TrainingLoop, picture: np.ndarray) -> None:
        """A picture, uint8 (H, W, 3), was written to samples/ (process 0)."""

    def before_checkpoint(self, loop: TrainingLoop, folder: Path) -> None:
        """Write to `folder` the files that are to come into the run together with the checkpoint that follows."""

    def after_checkpoint(self, loop: TrainingLoop) -> None:
        """A checkpoint and the model files were written."""

    def status(self) -> str:
        """What to add to the progress line."""
        return ""


class Forecast(Callback):
    """Says once, when the speed is known, how long the rest of the run will take.

    Args:
        advice: what to do on a CPU where that is more than a day.
    """

    SETTLED, WORTH_TELLING, DAY = 15.0, 120.0, 86_400.0  # seconds

    def __init__(self, advice: str) -> None:
        self.advice, self.told = advice, False
        self.began: tuple[float, int] | None = None  # when, and the images seen

    def after_step(self, loop: TrainingLoop, before: int, last: bool) -> None:
        """Measure from the end of the first step, which is slower than the others."""
        now, seen = time.perf_counter(), loop.images_seen
        if self.began is None:
            self.began = now, seen
        elapsed, images = now - self.began[0], seen - self.began[1]
        if self.told or elapsed < self.SETTLED or not images:
            return
        self.told = True
        left = (loop.settings.total_images - seen) * elapsed / images
        if left < self.WORTH_TELLING or not loop.accelerator.is_main_process:
            return
        say(f"about {duration(left)} for the rest, at {images / elapsed:,.0f} images/s")
        if left > self.DAY and loop.accelerator.device.type == "cpu":
            say(f"note: {self.advice}")


class Tracker(Callback):
    """Sends statistics and pictures to the tracker that the accelerator was started with."""

    def start(self, loop: TrainingLoop) -> None:
        """Open the tracker; a UserError on all processes where it refuses."""
        loop.ranks.together(lambda: self._open(loop))

    def _open(self, loop: TrainingLoop) -> None:
        name, tracker = loop.settings.name, str(loop.settings.tracker)
        # Each start is a W&B run of its own, and `group` holds them together: a training that goes on from a checkpoint
        # may repeat steps, which W&B would refuse. Its capture of the console would disturb the progress bar.
        of_wandb = {"dir": str(loop.run.path), "name": name, "group": name, "settings": {"console": "off"}}
        options = {"wandb": of_wandb | {"config": as_dict(loop.settings)}}
        try:
            loop.accelerator.init_trackers(TRACKERS[tracker], init_kwargs=options)
        except Exception as error:  # each has errors of its own
            advice = "`wandb login`, WANDB_MODE=offline or " if tracker == "wandb" else ""
            reason = " ".join(str(error).split())
            raise UserError(f"tracker={tracker} cannot start ({reason}): use {advice}tracker=null") from error

    def after_row(self, loop: TrainingLoop, values: dict[str, float]) -> None:
        """Send a row."""
        loop.accelerator.log(values, step=loop.images_seen)

    def after_picture(self, loop: TrainingLoop, picture: np.ndarray) -> None:
        """Send a picture."""
        for tracker in loop.accelerator.trackers:
            options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"samples": picture[None]}, step=loop.images_seen, **options)


class Pictures(Callback, ABC):
    """Writes a picture before the first step, at 1, 2, 5, 10, ... thousand images, every `every` images and at the end.

    It shows under it how many images have been seen. What draws it must not change the run by a bit.
    """

    def __init__(self, every: int) -> None:
        self.every = every

    @abstractmethod
    def draw(self, loop: TrainingLoop) -> np.ndarray:
        """The picture of process 0, uint8 (H, W, 3)."""

    def begin(self, loop: TrainingLoop) -> None:
        """Write the one of no image."""
        if loop.images_seen == 0:
            self._write(loop)

    def after_step(self, loop: TrainingLoop, before: int, last: bool) -> None:
        """Write it where it is due."""
        seen = loop.images_seen
        if last or is_due(before, seen, self.every) or milestone(before) != milestone(seen):
            self._write(loop)

    def _write(self, loop: TrainingLoop) -> None:
        if loop.accelerator.is_main_process:
            page = captioned(self.draw(loop), f"{loop.images_seen:,} images seen")
            write_png(loop.run.samples / f"{loop.images_seen:012d}.png", page)
            for callback in loop.callbacks:
                callback.after_picture(loop, page)


def milestone(images: int) -> int:
    """The last of 1,000, 2,000, 5,000, 10,000, ... up to `images`; 0 before the first."""
    scale = 10 ** (len(str(images)) - 1)
    return max(k * scale for k in (1, 2, 5) if k * scale <= images) if scale >= 1000 else 0


class Curves(Callback):
    """Draws curves.png after every checkpoint: the panels, and the scores if there are any."""

    def __init__(self, panels: Sequence[Panel]) -> None:
        self.panels = panels

    def after_checkpoint(self, loop: TrainingLoop) -> None:
        """Draw."""
        if loop.accelerator.is_main_process:
            rows = comparable(loop.run.read_stats())
            draw_curves(rows, [*self.panels, *score_panel(rows)], loop.run.path / FILE_NAME)
