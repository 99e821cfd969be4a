"""What every training command does around its steps: resuming, progress, statistics, checkpoints, stopping."""

from __future__ import annotations

import contextlib
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from accelerate import Accelerator
from hydra.errors import HydraException
from hydra.utils import instantiate
from torch import nn

from core.cli.config import as_dict
from core.cli.console import StatusProgress, console, duration, progress_bar, say, warn
from core.cli.errors import Interrupted, UserError
from core.cli.lock import sole_owner
from core.cli.streams import say_loading, wipe_loading
from core.data.dataset import PreparedData
from core.nn.model_file import FILE_NAME
from core.training.callbacks import Callback, Tracker
from core.training.checkpoint import Checkpoints
from core.training.distributed import Ranks, start_accelerator
from core.training.machine import choose_precision, explained_compiler, explained_memory, gpu_memory, pick_device
from core.training.meter import MeanMeter, NonFiniteError, Speed, is_due
from core.training.rundir import RunFolder
from core.training.stopping import StopRequest

VOTE_EVERY = 10  # steps between votes of several processes on whether to stop
# Settings that do not change any step, so a run may continue with other values.
CHANGEABLE = ("name", "runs", "total_images", "save_every", "tracker", "data")


@dataclass
class LoopConfig:
    """The settings that all training commands have; conf/gen.yaml and conf/seg.yaml explain each key."""

    data: str
    name: str
    runs: str
    split: str
    seed: int
    total_images: int
    batch_size: int
    mixed_precision: str
    compile: bool
    ema_half_life: int
    log_every: int
    save_every: int
    tracker: str | None
    model: dict[str, Any]
    optim: dict[str, Any]


def check_common(config: LoopConfig, processes: int, least_images: int = 2) -> None:
    """Refuse settings that cannot work in any training command, with a UserError that names the key.

    `least_images` is per process and step; batch normalisation needs two.
    """
    if config.name in ("", ".", "..") or Path(config.name).name != config.name:
        raise UserError(f"name={config.name!r} must be a plain folder name; runs=... says where the folder goes")
    check_least(config, 1, "total_images", "batch_size", "log_every")
    check_least(config, 0, "ema_half_life", "save_every", "seed")
    if config.seed >= 2**63:
        raise UserError(f"seed={config.seed} is too large: at most 2^63 - 1")
    if config.batch_size % processes or config.batch_size // processes < least_images:
        raise UserError(
            f"batch_size={config.batch_size} is the global batch and must give each of {processes} processes the same "
            f"number of images, at least {least_images}" + (" (batch norm needs them)" if least_images == 2 else "")
        )


def warn_of_repeats(config: LoopConfig, data: PreparedData) -> None:
    """Say in the first process if every batch has images more than once."""
    count = len(data.indices(config.split))
    if config.batch_size > count and os.environ.get("RANK", "0") == "0":
        what = f"batch_size={config.batch_size} exceeds the {count:,} images of split={config.split}"
        warn(f"{what}: every batch has some of them more than once")


def check_least(section: object, least: int, *keys: str, prefix: str = "") -> None:
    """Refuse numbers below `least`, with a UserError that names the key; `prefix` is that of the section's keys."""
    for key in keys:
        if not getattr(section, key) >= least:  # NaN is not either
            needed = f"be at least {least}" if least else "not be negative"
            raise UserError(f"{prefix}{key}={getattr(section, key)} must {needed}")


def make_optimizer(recipe: dict[str, Any], network: nn.Module) -> torch.optim.Optimizer:
    """The optimiser that conf/optim describes, for the parameters of `network`; UserError for settings it refuses.

    Weight decay, if any, is for weights alone: vectors such as biases are a parameter group without it. Parameters of
    modules with an attribute `lr_factor` are groups of their own: the factor stays with them, times the rate.
    """
    try:
        if recipe.get("fused", False) is None and next(network.parameters()).is_cuda:
            recipe = recipe | {"fused": True}  # left open: one kernel for all weights
        make = instantiate(recipe, _convert_="all")  # plain lists, which every torch loads back from a checkpoint
        parameters = [value for value in network.parameters() if value.requires_grad]
        optimizer = make(parameters)
        groups = _groups(network, parameters, optimizer.defaults)
        if len(groups) > 1:
            optimizer = make(groups)
    except (HydraException, TypeError, ValueError, RuntimeError, IndexError) as error:
        raise UserError(f"optim: {' '.join(str(error).split())}") from error
    assert isinstance(optimizer, torch.optim.Optimizer)
    settings = optimizer.param_groups[0]
    if not settings["lr"] > 0:
        raise UserError(f"optim.lr={settings['lr']} must be above 0")
    if not isinstance(settings.get("fused"), (bool, NoneType)):
        raise UserError(f"optim.fused={settings['fused']} must be true, false or null")
    return optimizer


def _groups(network: nn.Module, parameters: list[nn.Parameter], defaults: dict[str, Any]) -> list[dict[str, Any]]:
    """The parameter groups that differ in learning rate or weight decay."""
    factors = {
        value: float(getattr(module, "lr_factor", 1.0))
        for module in network.modules()
        if hasattr(module, "lr_factor")
        for value in module.parameters()
    }
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for value in parameters:
        factor, decays = factors.get(value, 1.0), bool(defaults.get("weight_decay")) and value.ndim > 1
        group = groups.setdefault((factor, decays), {"params": []})
        group["params"].append(value)
        if factor != 1:
            group |= {"lr": defaults["lr"] * factor, "lr_factor": factor}
        if defaults.get("weight_decay") and not decays:
            # Biases and the gains of norms are not pulled towards 0, where they would switch channels off.
            group["weight_decay"] = 0.0
    return list(groups.values())


class TrainingLoop(ABC):
    """One training run: its state on disk, its progress and its steps, which a subclass defines.

    `names` are those of the scalars that `step` adds to `meter`.
    """

    def __init__(
        self, config: LoopConfig, accelerator: Accelerator, run: RunFolder, names: tuple[str, ...], *callbacks: Callback
    ) -> None:
        self.settings, self.accelerator, self.run = config, accelerator, run
        self.callbacks = [*callbacks, *([Tracker()] if config.tracker else [])]
        self.ranks = Ranks(accelerator.process_index, accelerator.num_processes)
        self.checkpoints, self.meter = Checkpoints(run.state), MeanMeter(names)
        self.means: dict[str, float] = {}  # of the last interval
        self.images_seen, self.told = 0, -math.inf  # `told`: when a log file last got a line

    @abstractmethod
    def parts(self) -> dict[str, Any]:
        """What a checkpoint holds besides `meter`: name -> object with `state_dict` and `load_state_dict`."""

    @abstractmethod
    def step(self) -> None:
        """Train on the next global batch: update the networks, `meter` and `images_seen`."""

    @abstractmethod
    def export(self) -> None:
        """Write the model files (called on process 0 after each checkpoint)."""

    @abstractmethod
    def describe(self) -> str:
        """One line about what is about to run."""

    @abstractmethod
    def status(self, means: dict[str, float]) -> str:
        """The mean statistics of an interval as text for the progress bar."""

    def warnings(self, means: dict[str, float]) -> list[str]:
        """Warnings that the mean statistics of an interval call for."""
        return []

    @property
    def finished(self) -> bool:
        """Whether no step remains."""
        return self.images_seen >= self.settings.total_images

    def load(self) -> None:
        """Continue from the newest intact checkpoint, if there is one: process 0 says which, on all of them."""
        ranks, checkpoints = self.ranks, self.checkpoints
        state = ranks.together(lambda: checkpoints.load_newest() if ranks.first else None)
        images = ranks.of_first(None if state is None else int(state["images_seen"]))
        ranks.together(lambda: checkpoints.settle(images or 0) if ranks.first else None)
        if images is None:
            return
        ranks.together(lambda: self._continue(state or checkpoints.load(images)))
        if ranks.first:
            say(f"continuing {self.run.path} at {self.images_seen:,} images")

    def _continue(self, state: dict[str, Any]) -> None:
        """Take over the state in a checkpoint. Raises UserError where this version has other parts."""
        try:
            for name, part in (self.parts() | {"meter": self.meter}).items():
                if isinstance(part, torch.optim.Optimizer):
                    for own, saved in zip(part.param_groups, state[name]["param_groups"], strict=False):
                        if "fused" in own:  # a matter of this device, not of the one that saved it
                            saved["fused"] = own["fused"]
                part.load_state_dict(state[name])
        except (KeyError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{self.run.path} cannot be continued by this version ({reason}): finish it with the one that began "
                "it, or use another name=..."
            ) from error
        self.images_seen = int(state["images_seen"])
        before, now = state.get("machine", self.machine), self.machine
        if self.ranks.first and before != now:
            others = "" if before["processes"] == now["processes"] else ", batch statistics or dropout"
            was, is_now = ("{processes} x {device}".format(**machine) for machine in (before, now))
            say(f"note: {was} trained it so far, now {is_now} does: the batches are the same, but not rounding{others}")

    @property
    def machine(self) -> dict[str, Any]:
        """What trains: the number of processes and the kind of their device."""
        return {"processes": self.ranks.count, "device": self.accelerator.device.type}

    def save(self) -> None:
        """Write a checkpoint and the model files, in all processes. UserError after divergence or with a full disk."""
        self.fold()
        # The last loss was computed before its update: if its gradients overflowed, only the weights show it so far.
        for name, part in self.parts().items():
            if isinstance(part, nn.Module) and not all(value.isfinite().all() for value in part.state_dict().values()):
                raise self.diverged(f"weights of the {name} are not finite", self.images_seen)
        folder = self.checkpoints.companions(self.images_seen)
        for callback in self.callbacks:
            callback.before_checkpoint(self, folder)
        if self.accelerator.is_main_process:
            state = {name: part.state_dict() for name, part in (self.parts() | {"meter": self.meter}).items()}
            self.checkpoints.save(self.images_seen, state | {"images_seen": self.images_seen, "machine": self.machine})
            self.checkpoints.settle(self.images_seen)
            self.export()
        for callback in self.callbacks:
            callback.after_checkpoint(self)

    def fold(self) -> None:
        """Collect the statistics of the last steps; UserError where a loss is not finite."""
        first = self.images_seen - len(self.meter.pending) * self.settings.batch_size
        try:
            self.meter.fold(self.accelerator)
        except NonFiniteError as error:
            raise self.diverged(str(error), first + (error.step + 1) * self.settings.batch_size) from error

    def diverged(self, what: str, images: int) -> UserError:
        """The error for numbers that are no longer finite after `images`."""
        saved = self.checkpoints.files()
        good = f"the last good checkpoint is {saved[-1]}" if saved else "no checkpoint was saved yet"
        return UserError(
            f"training diverged: {what} in the step that ended at {images:,} images; {good}. Try a lower "
            "learning rate (optim.lr=1e-4) or mixed_precision=fp32 under a new name=..."
        )

    def log(self, speed: Speed) -> None:
        """End a statistics interval: write a row and warn."""
        self.fold()
        self.means = self.meter.means()
        self.meter.reset()
        warnings = self.warnings(self.means)
        if self.accelerator.is_main_process:
            speeds = {"images_per_s": speed.read(self.images_seen)}
            self.record(self.means | speeds | gpu_memory(self.accelerator.device), self.means)
            for warning in warnings:
                self.warn(warning)

    def log_rest(self, speed: Speed) -> None:
        """Write a row of the interval that has begun, if any, which goes on, and replaces it, when the run does."""
        self.fold()
        means = self.meter.means()
        self.means = means or self.means
        if means and self.accelerator.is_main_process:
            speeds = {"images_per_s": speed.read(self.images_seen)}
            self.record(means | speeds | gpu_memory(self.accelerator.device) | {"partial": True}, means)

    def show(self, bar: StatusProgress, last: bool) -> None:
        """Update the line below the bar; a log file gets one every half minute, and the last one."""
        bar.status = self.status(self.means) + "".join(callback.status() for callback in self.callbacks)
        due = last or time.perf_counter() - self.told >= 30
        if self.accelerator.is_main_process and not console.is_terminal and due:
            task = bar.tasks[0]
            left = "" if task.time_remaining is None else f", {duration(task.time_remaining)} left"
            seen = f"{self.images_seen:,} of {self.settings.total_images:,} images, {task.speed or 0.0:.1f}/s"
            say(f"{self.settings.name}: {seen}{left}, {bar.status}")
            self.told = time.perf_counter()

    def record(self, row: dict[str, Any], values: dict[str, float]) -> None:
        """Add a row to stats.jsonl (process 0); callbacks get the `values` among it."""
        self.run.append_stats({"images": self.images_seen, **row})
        for callback in self.callbacks:
            callback.after_row(self, values)

    def warn(self, text: str) -> None:
        """Show a warning and add it to the statistics."""
        warn(text)
        self.run.append_stats({"images": self.images_seen, "warning": text})

    def train(self, stop: StopRequest) -> None:
        """Step until all images have been seen, or raise Interrupted on request, after saving."""
        config, main = self.settings, self.accelerator.is_main_process
        with progress_bar(quiet=not main) as bar:
            first = self.images_seen
            task = bar.add_task(config.name, total=config.total_images, completed=min(first, config.total_images))
            for callback in self.callbacks:
                callback.begin(self)
            speed = Speed(first)
            bar.status = "" if self.finished else "first step running"  # which may take minutes
            while not self.finished:
                before = self.images_seen
                self.step()
                bar.update(task, completed=min(self.images_seen, config.total_images))
                if is_due(before, self.images_seen, config.log_every):
                    self.log(speed)
                with speed.paused():
                    for callback in self.callbacks:
                        callback.after_step(self, before, last=self.images_seen >= config.total_images)
                    if is_due(before, self.images_seen, config.save_every):
                        self.save()
                stopping = self.stop_agreed(stop)
                if ends := stopping or self.finished:
                    self.log_rest(speed)
                bar.status = ""
                if self.means:  # after the callbacks, which may have found a new best
                    self.show(bar, ends)
                if stopping:
                    self.save()
                    raise Interrupted(self.farewell())
        self.save()

    def farewell(self) -> str:
        """What a run says that was asked to stop."""
        picture = self.run.last_picture()
        shown = "" if picture is None else f"; newest picture: {picture}"
        return f"saved at {self.images_seen:,} images; the same command continues{shown}"

    def stop_agreed(self, stop: StopRequest) -> bool:
        """Whether all processes stop here. A signal reaches them at different steps, so they vote."""
        if self.accelerator.num_processes == 1:
            return stop.received
        if self.images_seen // self.settings.batch_size % VOTE_EVERY:
            return False
        votes = torch.tensor([float(stop.received)], device=self.accelerator.device)
        return bool(self.accelerator.reduce(votes, reduction="sum").item() > 0)


def run_loop(
    config: LoopConfig,
    build: Callable[[Accelerator, RunFolder], TrainingLoop],
    identity: dict[str, Any],
    changeable: Collection[str],
    reasons: Mapping[str, str] | None = None,
) -> RunFolder:
    """Train from the start or from where the run stands, and return its folder.

    `build` makes the loop, its state loaded. `identity`, such as hashes of the data, and all of `config` but the keys
    `changeable` must stay when a run continues; `reasons` say of some keys why. Raises UserError for a run folder of
    other settings, for divergence or a full disk, and Interrupted on request, after saving.
    """
    run = RunFolder(Path(config.runs) / config.name)
    # Stored as resolved: on another machine `auto` may choose differently, and such a run must not continue unnoticed.
    config.mixed_precision = choose_precision(config.mixed_precision, pick_device())
    resolved = as_dict(config) | identity
    accelerator = start_accelerator(config.mixed_precision, config.tracker, run.path)
    with contextlib.ExitStack() as stack:

        def claim() -> None:
            advice = "let it finish or stop it, or use another name=..."
            stack.enter_context(sole_owner(run.path / ".lock", f"is training {run.path}", advice))
            run.remove_leftovers()
            # A run that ended before it saved anything has nothing to continue, and nothing to lose.
            if Checkpoints(run.state).files() or (run.path / FILE_NAME).exists():
                run.check_config(resolved, changeable, reasons)

        main = accelerator.is_main_process
        Ranks(accelerator.process_index, accelerator.num_processes).together(lambda: claim() if main else None)
        say_loading()  # torch imports its compiler for the optimisers
        loop = build(accelerator, run)
        wipe_loading()
        for callback in loop.callbacks:
            callback.start(loop)
        if main:
            run.write_config(resolved)
            run.rewind_stats(loop.images_seen, goes_on=not loop.finished)
            machine = f"{accelerator.num_processes} x {accelerator.device.type}, {torch.get_num_threads()} threads"
            say(f"{loop.describe()}, {machine}, {config.mixed_precision}")
        work = "this step" if accelerator.num_processes == 1 else f"up to {VOTE_EVERY} steps"
        stop = stack.enter_context(StopRequest(work).listening())
        stack.callback(lambda: [tracker.finish() for tracker in accelerator.trackers])
        stack.enter_context(explained_memory(getattr(config, "accumulate", None)))
        if config.compile:
            stack.enter_context(explained_compiler())
        loop.train(stop)
    return run
