"""Train a GAN on a prepared data set: `accelerate launch --quiet -m gen.train data=data/celeba name=first`.

validate, build, load, then: step / statistics / samples / checkpoint, until `images` have been seen.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from core.bank import ImageBank
from core.blocks import init_normal
from core.config import as_dict, config_command
from core.console import say
from core.curves import FILE_NAME as CURVES_NAME
from core.curves import Panel, draw_curves
from core.data import PreparedData
from core.ema import ExponentialAverage
from core.errors import UserError
from core.images import FASTER, make_grid, to_uint8, write_png
from core.loop import (
    CHANGEABLE,
    LoopConfig,
    TrainingLoop,
    check_common,
    check_least,
    describe_machine,
    make_optimizer,
    run_loop,
)
from core.rundir import RunFolder, flatten
from core.runtime import crossed, process_count
from core.weights import FILE_NAME, build_model, save_model
from gen.latents import sample_latents, training_latents
from gen.monitor import PATIENCE, CollapseMonitor, identical_samples
from gen.score import Best, EvalSection, Scorer, best_so_far, check_section, comparable, score_panel
from gen.steps import STATISTICS, discriminator_step, generator_step

GRID_SAMPLES = 64
PANELS = (
    Panel("losses", {"d_loss": "D", "g_loss": "G"}, wide=True),
    Panel("mean answer of D", {"d_real": "to real images", "d_fake": "to samples"}, limits=(0, 1)),
)


@dataclass
class TrainConfig(LoopConfig):
    """What conf/gen.yaml holds; it explains each key."""

    flip: bool
    grid_every: int
    eval: EvalSection


def validate(config: TrainConfig, data: PreparedData, processes: int) -> None:
    """Refuse settings that cannot work, before anything is built or written.

    Raises:
        UserError: naming the key.
    """
    check_common(config, processes)
    check_least(config, 0, "grid_every")
    check_section(config.eval)
    for key in ("generator", "discriminator"):
        if not isinstance(config.model.get(key), dict):
            raise UserError(f"model.{key} is missing: see conf/model/dcgan.yaml for what a model needs")
    size = config.model["generator"].get("image_size")
    if size != data.image_size:
        raise UserError(
            f"model.image_size={size}, but {data.path} holds {data.image_size}-pixel images: "
            f"set model.image_size={data.image_size} or prepare with --size {size}"
        )


class Trainer(TrainingLoop):
    """One GAN training run: its networks and what is drawn from them."""

    def __init__(self, config: TrainConfig, accelerator: Accelerator, data: PreparedData, run: RunFolder) -> None:
        super().__init__(config, accelerator, run, STATISTICS)
        self.config = config
        self.data_info = {"source": data.meta.get("source"), "count": len(data), "sha256": data.fingerprint}
        self.bank = ImageBank(data.images, data.indices(config.split), accelerator.device, config.seed, config.flip)
        self.generator, self.discriminator = self._networks()
        self.ema = ExponentialAverage(self.generator, config.ema_half_life)
        self.g_optimizer = make_optimizer(config.optim, self.generator)
        self.d_optimizer = make_optimizer(config.optim, self.discriminator)
        self.monitor = CollapseMonitor()
        self.load()
        self.scorer: Scorer | None = None
        self.best: Best | None = None
        self.scored = ""
        if config.eval.every:
            self.scorer = Scorer(config.eval, data, config.split, accelerator, run.path / "features")
            if accelerator.is_main_process:
                self.best = Best(run.path, self.scorer.terms, self.images_seen)
        # Wrapped only now: the average and the optimisers hold the bare networks.
        self.wrapped_generator, self.wrapped_discriminator = accelerator.prepare(self.generator, self.discriminator)

    def _networks(self) -> tuple[nn.Module, nn.Module]:
        recipes = self.config.model["generator"], self.config.model["discriminator"]
        networks = [build_model(recipe) for recipe in recipes]
        for offset, network in enumerate(networks):
            init_normal(network, seed=2 * self.config.seed + offset)
            network.to(self.accelerator.device).to(memory_format=FASTER)
        return networks[0], networks[1]

    def parts(self) -> dict[str, Any]:
        """Networks, average, optimisers and the monitor's memory."""
        return {
            "generator": self.generator,
            "discriminator": self.discriminator,
            "ema": self.ema.model,
            "g_optimizer": self.g_optimizer,
            "d_optimizer": self.d_optimizer,
            "monitor": self.monitor,
        }

    def export(self) -> None:
        """Write the sampling weights and the curves."""
        save_model(self.run.path / FILE_NAME, self.ema.model, self.config.model["generator"], self._info())
        rows = comparable(self.run.read_stats())
        draw_curves(rows, [*PANELS, *score_panel(rows)], self.run.path / CURVES_NAME)

    def before_checkpoint(self) -> None:
        """Write the best weights."""
        if self.best is not None:
            self.best.write()

    def _info(self) -> dict[str, Any]:
        """What a model file says of itself."""
        return {"images_seen": self.images_seen, "data": self.data_info, "seed": self.config.seed, "weights": "ema"}

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

    def status(self, means: dict[str, float]) -> str:
        """Losses, D's answers and the last score."""
        return "D {d_loss:.3f} G {g_loss:.3f} D(real) {d_real:.2f} D(fake) {d_fake:.2f}".format(**means) + self.scored

    def warnings(self, means: dict[str, float]) -> list[str]:
        """Signs of collapse."""
        return self.monitor.check(self.images_seen, means)

    def after_step(self, before: int, last: bool) -> None:
        """A sample grid and a score where they are due; the last weights are scored too."""
        if self.accelerator.is_main_process and crossed(before, self.images_seen, self.config.grid_every):
            self.grid()
        if self.scorer is not None and (last or crossed(before, self.images_seen, self.config.eval.every)):
            self.score(self.scorer)

    @torch.inference_mode()
    def grid(self) -> None:
        """Write the grid of the fixed latents, from the averaged weights."""
        z = sample_latents(range(GRID_SAMPLES), int(self.generator.latent_dim))  # type: ignore[arg-type]
        pixels = to_uint8(self.ema.model(z.to(self.accelerator.device))).cpu().numpy()
        write_png(self.run.samples / f"{self.images_seen:012d}.png", make_grid(pixels))
        if self.images_seen >= PATIENCE and (warning := identical_samples(pixels)):
            self.warn(warning)

    def score(self, scorer: Scorer) -> None:
        """Score the averaged weights, and keep them if they are the best so far."""
        self.fold()  # finds out whether training has diverged, before the time is spent
        started = time.perf_counter()
        score = scorer(self.ema.model)
        if score is None or self.best is None:
            return
        if not self.scored:
            took = time.perf_counter() - started
            every = f"every {self.config.eval.every:,} images (eval.every)"
            say(f"scoring {scorer.n:,} samples (eval.n) took {took:.1f} s; it is done {every}")
        row = scorer.row(score)
        self.run.append_stats({"images": self.images_seen, **row})
        self.accelerator.log({row["metric"]: score}, step=self.images_seen)
        better = self.best.offer(score, self.ema.model, self.config.model["generator"], self._info())
        self.scored = f", {row['metric']} {score:.3g}" + (" (best)" if better else "")

    def describe(self) -> str:
        """Model, parameters, data and machine."""
        parameters = [sum(p.numel() for p in net.parameters()) for net in (self.generator, self.discriminator)]
        return (
            f"{self.config.model['name']}: G {parameters[0]:,} and D {parameters[1]:,} parameters, "
            f"{len(self.bank):,} images, {describe_machine(self.accelerator, self.config.mixed_precision)}"
        )


def run_training(config: TrainConfig) -> RunFolder:
    """Train as `config` says, from the start or from where the run stands, and return its folder.

    Raises:
        UserError: settings, data or run folder that do not fit.
        Interrupted: stopped on request, after saving.
    """
    data = PreparedData.open(config.data)
    validate(config, data, process_count())
    return run_loop(
        config,
        lambda accelerator, run: Trainer(config, accelerator, data, run),
        {"data_sha256": data.fingerprint},
        (*CHANGEABLE, "grid_every", *flatten({"eval": as_dict(config.eval)})),
    )


@config_command("gen", TrainConfig)
def main(config: TrainConfig) -> None:
    """Train a GAN."""
    run = run_training(config)
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"trained: {run.path / FILE_NAME}; next: python -m gen.sample {run.path} --n 1000 --out samples")
        if best := best_so_far(run):
            print(best)


if __name__ == "__main__":
    main()
