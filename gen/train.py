"""Train a GAN on a prepared data set: `accelerate launch --quiet -m gen.train data=data/celeba name=first`.

validate, build, load, then: step / statistics / samples / checkpoint, until `images` have been seen.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from hydra.errors import HydraException
from hydra.utils import instantiate
from torch import Tensor, nn

from core.bank import ImageBank
from core.blocks import init_normal
from core.config import as_dict, config_command
from core.console import StatusProgress, console, progress_bar, say, warn
from core.data import PreparedData
from core.ema import ExponentialAverage
from core.errors import Interrupted, UserError
from core.images import make_grid, to_uint8, write_png
from core.rundir import RunFolder
from core.runtime import MeanMeter, NonFiniteError, StopRequest, crossed, start_accelerator
from core.state import Checkpoints
from core.weights import FILE_NAME, build_model, save_model
from gen.latents import sample_latents, training_latents
from gen.monitor import PATIENCE, CollapseMonitor, identical_samples
from gen.steps import STATISTICS, discriminator_step, generator_step

GRID_SAMPLES = 64
# Settings that leave every step as it is, so a run may go on with other values.
CHANGEABLE = ("name", "runs", "images", "grid_every", "save_every", "tracker", "data")
VOTE_EVERY = 10  # steps between the moments at which several processes agree to stop


@dataclass
class TrainConfig:
    """What conf/gen.yaml holds; it explains each key."""

    data: str
    name: str
    runs: str
    split: str
    seed: int
    images: int
    batch_size: int
    mixed_precision: str
    flip: bool
    ema_half_life: int
    log_every: int
    grid_every: int
    save_every: int
    tracker: str | None
    model: dict[str, Any]
    optim: dict[str, Any]


def validate(config: TrainConfig, data: PreparedData, processes: int) -> None:
    """Refuse settings that cannot work, before anything is built or written.

    Raises:
        UserError: naming the key.
    """
    if config.name in ("", ".", "..") or Path(config.name).name != config.name:
        raise UserError(f"name={config.name!r} must be a plain folder name; runs=... says where the folder goes")
    for key in ("images", "batch_size", "log_every"):
        if getattr(config, key) < 1:
            raise UserError(f"{key}={getattr(config, key)} must be at least 1")
    for key in ("ema_half_life", "grid_every", "save_every", "seed"):
        if getattr(config, key) < 0:
            raise UserError(f"{key}={getattr(config, key)} must not be negative")
    if config.batch_size % processes or config.batch_size // processes < 2:
        raise UserError(
            f"batch_size={config.batch_size} is the global batch and must give each of {processes} processes "
            "the same number of images, at least 2 (batch norm needs them)"
        )
    for key in ("generator", "discriminator"):
        if not isinstance(config.model.get(key), dict):
            raise UserError(f"model.{key} is missing: see conf/model/dcgan.yaml for what a model needs")
    size = config.model["generator"].get("image_size")
    if size != data.image_size:
        raise UserError(
            f"model.image_size={size}, but {data.path} holds {data.image_size}-pixel images: "
            f"set model.image_size={data.image_size} or prepare with --size {size}"
        )


def make_optimizer(recipe: dict[str, Any], network: nn.Module) -> torch.optim.Optimizer:
    """The optimiser that conf/optim describes, for the parameters of `network`.

    Raises:
        UserError: no such class, or settings it refuses.
    """
    try:
        optimizer = instantiate(recipe)(network.parameters())
    except (HydraException, TypeError, ValueError) as error:
        raise UserError(f"optim: {' '.join(str(error).split())}") from error
    assert isinstance(optimizer, torch.optim.Optimizer)
    return optimizer


class Trainer:
    """One GAN training run: its networks, their state on disk, and what is shown."""

    def __init__(self, config: TrainConfig, accelerator: Accelerator, data: PreparedData, run: RunFolder) -> None:
        self.config, self.accelerator, self.run = config, accelerator, run
        self.data_info = {"source": data.meta["source"], "count": len(data), "sha256": data.fingerprint}
        self.bank = ImageBank(data.images, data.indices(config.split), accelerator.device, config.seed, config.flip)
        self.generator, self.discriminator = self._networks()
        self.ema = ExponentialAverage(self.generator, config.ema_half_life)
        self.g_optimizer = make_optimizer(config.optim, self.generator)
        self.d_optimizer = make_optimizer(config.optim, self.discriminator)
        self.checkpoints = Checkpoints(run.state)
        self.meter, self.monitor = MeanMeter(STATISTICS), CollapseMonitor()
        self.images_seen = 0
        self.load()
        # Wrapped only now: the average and the optimisers hold the bare networks.
        self.wrapped_generator, self.wrapped_discriminator = accelerator.prepare(self.generator, self.discriminator)

    def _networks(self) -> tuple[nn.Module, nn.Module]:
        recipes = self.config.model["generator"], self.config.model["discriminator"]
        networks = [build_model(recipe) for recipe in recipes]
        for offset, network in enumerate(networks):
            init_normal(network, seed=2 * self.config.seed + offset)
            network.to(self.accelerator.device)
        return networks[0], networks[1]

    # -- state on disk

    def _parts(self) -> dict[str, Any]:
        return {
            "generator": self.generator,
            "discriminator": self.discriminator,
            "ema": self.ema.model,
            "g_optimizer": self.g_optimizer,
            "d_optimizer": self.d_optimizer,
            "meter": self.meter,
            "monitor": self.monitor,
        }

    def load(self) -> None:
        """Continue from the newest intact checkpoint, if there is one."""
        state = self.checkpoints.load_newest()
        if state is None:
            return
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.images_seen = int(state["images_seen"])
        if self.accelerator.is_main_process:
            say(f"continuing {self.run.path} at {self.images_seen:,} images")

    def save(self) -> None:
        """Write a checkpoint and the sampling weights (process 0; every process must call it).

        Raises:
            UserError: training has diverged, or the disk is full; what was saved before stays.
        """
        self.fold()
        # Losses are taken before an update: one whose gradients overflowed shows in the weights alone so far.
        for name in ("generator", "discriminator", "ema"):
            if not all(value.isfinite().all() for value in self._parts()[name].state_dict().values()):
                raise self.diverged(f"weights of the {name} are not finite", self.images_seen)
        if self.accelerator.is_main_process:
            state = {name: part.state_dict() for name, part in self._parts().items()}
            self.checkpoints.save(self.images_seen, state | {"images_seen": self.images_seen})
            info = {"images_seen": self.images_seen, "data": self.data_info, "seed": self.config.seed, "weights": "ema"}
            save_model(self.run.path / FILE_NAME, self.ema.model, self.config.model["generator"], info)

    # -- training

    def fold(self) -> None:
        """Collect the statistics of the last steps.

        Raises:
            UserError: a loss is not finite; names the step, the last good checkpoint and what to try.
        """
        first = self.images_seen - len(self.meter.pending) * self.config.batch_size
        try:
            self.meter.fold(self.accelerator)
        except NonFiniteError as error:
            raise self.diverged(str(error), first + (error.step + 1) * self.config.batch_size) from error

    def diverged(self, what: str, images: int) -> UserError:
        """The error for numbers that are no longer finite after `images`: where it stands and what to try."""
        saved = self.checkpoints.files()
        good = f"the last good checkpoint is {saved[-1]}" if saved else "no checkpoint was saved yet"
        return UserError(
            f"training diverged: {what} in the step that ended at {images:,} images; {good}. Try a lower "
            "learning rate (optim.lr=1e-4) or mixed_precision=fp32 under a new name=..."
        )

    def step(self) -> None:
        """One step of D and one of G on the next global batch; G's images serve both."""
        config, ranks = self.config, self.accelerator.num_processes
        rank, device = self.accelerator.process_index, self.accelerator.device
        real = self.bank.batch(self.images_seen, config.batch_size, rank, ranks)
        latent_dim = int(self.generator.latent_dim)  # type: ignore[arg-type]
        z = training_latents(config.seed, self.images_seen, config.batch_size, latent_dim).chunk(ranks)[rank]
        fake: Tensor = self.wrapped_generator(z.to(device))  # (N / ranks, 3, H, W)
        statistics = discriminator_step(self.wrapped_discriminator, self.d_optimizer, real, fake)
        statistics |= generator_step(self.discriminator, self.g_optimizer, fake)
        self.ema.update(self.generator, self.images_seen, config.batch_size)
        self.meter.add(statistics)
        self.images_seen += config.batch_size

    def log(self, started: float, first: int) -> str:
        """Close a statistics interval: fold, write a row, warn; returns the means in words for the progress bar."""
        self.fold()
        means = self.meter.means()
        self.meter.reset()
        warnings = self.monitor.check(self.images_seen, means)
        if self.accelerator.is_main_process:
            rate = (self.images_seen - first) / (time.perf_counter() - started)
            self.run.append_stats({"images": self.images_seen, **means, "images_per_s": rate})
            self.accelerator.log(means, step=self.images_seen)
            for warning in warnings:
                self.warn(warning)
        return "D {d_loss:.3f} G {g_loss:.3f} D(real) {d_real:.2f} D(fake) {d_fake:.2f}".format(**means)

    def warn(self, text: str) -> None:
        """Show a warning and keep it with the statistics."""
        warn(text)
        self.run.append_stats({"images": self.images_seen, "warning": text})

    @torch.inference_mode()
    def grid(self) -> None:
        """Write the grid of the fixed latents, from the averaged weights."""
        z = sample_latents(range(GRID_SAMPLES), int(self.generator.latent_dim))  # type: ignore[arg-type]
        pixels = to_uint8(self.ema.model(z.to(self.accelerator.device))).cpu().numpy()
        write_png(self.run.samples / f"{self.images_seen:012d}.png", make_grid(pixels))
        if self.images_seen >= PATIENCE and (warning := identical_samples(pixels)):
            self.warn(warning)

    def train(self, stop: StopRequest) -> None:
        """Step until `images` have been seen.

        Raises:
            Interrupted: stopped on request, after saving.
        """
        config, main = self.config, self.accelerator.is_main_process
        with progress_bar(quiet=not main) as bar:
            task = bar.add_task(config.name, total=config.images, completed=min(self.images_seen, config.images))
            started, first, told = time.perf_counter(), self.images_seen, time.perf_counter()
            while self.images_seen < config.images:
                before = self.images_seen
                self.step()
                bar.update(task, completed=min(self.images_seen, config.images))
                if crossed(before, self.images_seen, config.log_every):
                    told = self.show(bar, self.log(started, first), told)
                if main and crossed(before, self.images_seen, config.grid_every):
                    self.grid()
                if crossed(before, self.images_seen, config.save_every):
                    self.save()
                if self.stop_agreed(stop):
                    self.save()
                    raise Interrupted(f"saved at {self.images_seen:,} images; the same command continues")
        self.save()

    def show(self, bar: StatusProgress, status: str, told: float) -> float:
        """Update the bar; where none can be drawn (a log file) print a line every half minute instead."""
        bar.status = status
        now = time.perf_counter()
        if console.is_terminal or not self.accelerator.is_main_process or now - told < 30:
            return told
        speed = bar.tasks[0].speed or 0.0
        say(f"{self.config.name}: {self.images_seen:,} of {self.config.images:,} images, {speed:.1f}/s, {status}")
        return now

    def stop_agreed(self, stop: StopRequest) -> bool:
        """Whether all processes stop here: a signal reaches them at different steps, so several take a vote."""
        if self.accelerator.num_processes == 1:
            return stop.received
        if self.images_seen // self.config.batch_size % VOTE_EVERY:
            return False
        votes = torch.tensor([float(stop.received)], device=self.accelerator.device)
        return bool(self.accelerator.reduce(votes, reduction="sum").item() > 0)


def run_training(config: TrainConfig) -> RunFolder:
    """Train as `config` says, from the start or from where the run stands, and return its folder.

    Raises:
        UserError: settings, data or run folder that do not fit.
        Interrupted: stopped on request, after saving.
    """
    data = PreparedData.open(config.data)
    run = RunFolder(Path(config.runs) / config.name)
    validate(config, data, int(os.environ.get("WORLD_SIZE", "1")))
    resolved = as_dict(config) | {"data_sha256": data.fingerprint}
    run.check_config(resolved, CHANGEABLE)
    accelerator = start_accelerator(config.mixed_precision, config.tracker, run.path)
    trainer = Trainer(config, accelerator, data, run)
    if accelerator.is_main_process:
        run.write_config(resolved)
        run.rewind_stats(trainer.images_seen)
        trainer.checkpoints.remove_leftovers()
        say(describe(trainer))
    if config.tracker:
        accelerator.init_trackers("curves")
    with StopRequest().listening() as stop:
        try:
            trainer.train(stop)
        finally:
            accelerator.end_training()
    return run


def describe(trainer: Trainer) -> str:
    """One line about what is about to run."""
    parameters = [sum(p.numel() for p in net.parameters()) for net in (trainer.generator, trainer.discriminator)]
    accelerator = trainer.accelerator
    return (
        f"{trainer.config.model['name']}: G {parameters[0]:,} and D {parameters[1]:,} parameters, "
        f"{len(trainer.bank):,} images, {accelerator.num_processes} x {accelerator.device.type}, "
        f"{torch.get_num_threads()} threads, {trainer.config.mixed_precision}"
    )


@config_command("gen", TrainConfig)
def main(config: TrainConfig) -> None:
    """Train a GAN."""
    run = run_training(config)
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"trained: {run.path / FILE_NAME}; next: python -m gen.sample {run.path} --n 1000 --out samples")


if __name__ == "__main__":
    main()
