"""Train a GAN on a prepared data set: `accelerate launch --quiet -m gen.train data=data/celeba name=first`.

validate, build, load, then: step / statistics / samples / checkpoint, until `images` have been seen.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from core.cli.config import as_dict, config_command
from core.cli.console import say
from core.data.dataset import PreparedData
from core.data.images import MEMORY_FORMAT, make_grid, to_uint8, write_png
from core.data.loader import ImageBank, to_device
from core.nn.ema import ExponentialAverage
from core.nn.model_file import FILE_NAME, build_model, save_model
from core.training.curves import FILE_NAME as CURVES_NAME
from core.training.curves import Panel, draw_curves
from core.training.distributed import is_due, process_count
from core.training.loop import CHANGEABLE, TrainingLoop, describe_machine, make_optimizer, run_loop
from core.training.rundir import RunFolder, flatten
from eval.online import Best, Scorer, best_so_far, comparable, score_panel
from gen.augment import FAKE_STREAM, GENERATOR_STREAM, REAL_STREAM, AdaptiveProbability, augmentation_draws
from gen.latents import sample_latents, training_latents
from gen.losses import gan_loss
from gen.monitor import PATIENCE, CollapseMonitor, identical_samples
from gen.regularizers import mixing_weights
from gen.schedule import cosine
from gen.settings import ADDED, TrainConfig, check_networks, validate
from gen.steps import DiscriminatorWrapper, Terms, discriminator_step, generator_step
from gen.unetgan import cutmix_masks

GRID_SAMPLES = 64
ANSWERS = {"d_real": "to real images", "d_fake": "to samples"}
PENALTIES = {"r1": "R1", "r2": "R2", "gradient_penalty": "gradient penalty", "cutmix": "CutMix consistency"}


def panels(loss: str) -> list[Panel]:
    """The plots of a run with this loss; those without numbers are left out when they are drawn."""
    probable = gan_loss(loss).probabilistic
    return [
        Panel("losses", {"d_loss": "D", "g_loss": "G"}, wide=True),
        Panel("mean answer of D" if probable else "mean logit of D", ANSWERS, limits=(0, 1) if probable else None),
        Panel("penalties of D, before their factors", PENALTIES, wide=True),
        Panel("probability of each augmentation", {"augment_p": "p"}, limits=(0, 1)),
    ]


@dataclass(frozen=True)
class Part:
    """What a process needs of a global batch for one pass: real images and latents (n, ...), and the terms."""

    real: Tensor
    z: Tensor
    terms: Terms


class Trainer(TrainingLoop):
    """One GAN training run: its networks and what is drawn from them."""

    def __init__(self, config: TrainConfig, accelerator: Accelerator, data: PreparedData, run: RunFolder) -> None:
        super().__init__(config, accelerator, run, config.statistics)
        self.config = config
        self.data_info = {"source": data.meta.get("source"), "count": len(data), "sha256": data.fingerprint}
        self.bank = ImageBank(data.images, data.indices(config.split), accelerator.device, config.seed, config.flip)
        self.generator, self.discriminator = self._networks()
        self.ema = ExponentialAverage(self.generator, config.ema_half_life)
        self.g_optimizer = make_optimizer(config.optim, self.generator)
        self.d_optimizer = make_optimizer(config.optim, self.discriminator)
        self.rates = [
            (optimizer, float(optimizer.param_groups[0]["lr"]) * factor)
            for optimizer, factor in ((self.g_optimizer, 1.0), (self.d_optimizer, config.d_lr_factor))
        ]
        self.loss = gan_loss(config.loss)
        self.monitor = CollapseMonitor(config.loss)
        self.adaptive: AdaptiveProbability | None = None
        if config.diffaug.adaptive:
            target = self.loss.overfitting_target if config.diffaug.ada_target is None else config.diffaug.ada_target
            self.adaptive = AdaptiveProbability(target, config.diffaug.ada_images)
        self.load()
        self.scorer: Scorer | None = None
        self.best: Best | None = None
        self.scored = ""
        if config.eval.every:
            self.scorer = Scorer(config.eval, data, config.split, accelerator, run.path / "features")
            if accelerator.is_main_process:
                self.best = Best(run.path, self.scorer.terms, self.images_seen)
        # Wrapped only now: the average and the optimisers hold the bare networks.
        bf16 = accelerator.mixed_precision == "bf16"
        self.judge = DiscriminatorWrapper(self.discriminator, bf16)
        own = DiscriminatorWrapper(self.discriminator, bf16 and not config.regularize.of_gradients)
        if config.compile:  # in place: what the average, the optimisers and the files hold stays as it is
            self.generator.compile()
            self.judge.compile()
            if not config.regularize.of_gradients:  # torch.compile does not do second derivatives
                own.compile()
        self.wrapped_generator, self.wrapped_discriminator = accelerator.prepare(self.generator, own)

    def _networks(self) -> tuple[nn.Module, nn.Module]:
        recipes = self.config.model["generator"], self.config.model["discriminator"]
        networks = [build_model(recipe) for recipe in recipes]
        check_networks(self.config, *networks)
        for offset, network in enumerate(networks):
            network.initialise(2 * self.config.seed + offset)  # type: ignore[operator]
            network.to(self.accelerator.device).to(memory_format=MEMORY_FORMAT)
        return networks[0], networks[1]

    def parts(self) -> dict[str, Any]:
        """Networks, average, optimisers, the monitor's memory and the probability of augmentation if it adapts."""
        adaptive = {} if self.adaptive is None else {"augmentation": self.adaptive}
        return adaptive | {
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
        draw_curves(rows, [*panels(self.config.loss), *score_panel(rows)], self.run.path / CURVES_NAME)

    def before_checkpoint(self) -> None:
        """Write the best weights."""
        if self.best is not None:
            self.best.write()

    def _info(self) -> dict[str, Any]:
        """What a model file says of itself."""
        return {"images_seen": self.images_seen, "data": self.data_info, "seed": self.config.seed, "weights": "ema"}

    def step(self) -> None:
        """So many steps of D and then one of G on the next global batches; the images that D saw last serve both."""
        config, before = self.config, self.images_seen
        for optimizer, rate in self.rates:
            for group in optimizer.param_groups:
                group["lr"] = rate * cosine(config.lr_schedule.end, config.lr_schedule.over, before)
        rows = []
        for start in range(before, before + config.n_critic * config.batch_size, config.batch_size):
            parts = self.parts_of(start)
            # The graph of G's images outlives D's step only where one batch is all there is to keep.
            last = start == before + (config.n_critic - 1) * config.batch_size
            keep = last and len(parts) == 1
            with torch.set_grad_enabled(keep):
                fakes = [self.wrapped_generator(part.z) for part in parts]  # (n, 3, H, W) each
            rows.append(self.train_discriminator(parts, fakes))
        of_generator = self.train_generator(parts, fakes if keep else None)
        passed = config.n_critic * config.batch_size
        self.ema.update(self.generator, before, passed)
        for row in rows:  # one a batch, so that images can be counted by rows
            self.meter.add(row | of_generator)
        self.images_seen += passed

    def train_discriminator(self, parts: list[Part], fakes: list[Tensor]) -> dict[str, Tensor]:
        """One step of D; its statistics."""
        rows = []
        for part, fake in zip(parts, fakes, strict=True):
            with self._exchange(self.wrapped_discriminator, part.terms.last):
                network, optimizer = self.wrapped_discriminator, self.d_optimizer
                rows.append(discriminator_step(network, optimizer, part.real, fake, part.terms))
        row = _mean(rows)
        if self.adaptive is not None:
            row["augment_p"] = torch.full((), self.adaptive.p, device=self.accelerator.device)
            self.adaptive.update(self.accelerator.reduce(row["d_sign"], "mean"), self.config.batch_size)
        return row

    def train_generator(self, parts: list[Part], fakes: list[Tensor] | None) -> dict[str, Tensor]:
        """One step of G, on `fakes` if they still have their graphs, else made anew; its statistics."""
        rows = []
        for place, part in enumerate(parts):
            with self._exchange(self.wrapped_generator, part.terms.last):
                fake = fakes[place] if fakes else self.wrapped_generator(part.z)
                rows.append(generator_step(self.judge, self.g_optimizer, fake, part.terms, part.real))
        return _mean(rows)

    def _exchange(self, network: nn.Module, last: bool) -> contextlib.AbstractContextManager[None]:
        """Processes average their gradients only where a step is complete."""
        return contextlib.nullcontext() if last else self.accelerator.no_sync(network)

    def parts_of(self, start: int) -> list[Part]:
        """What this process trains on of the global batch that begins at `start`: one part, or `accumulate` parts."""
        config, device, count = self.config, self.accelerator.device, self.config.accumulate
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        size, seed = config.batch_size, config.seed

        def own(values: Tensor) -> list[Tensor]:
            return list(to_device(values.chunk(ranks)[rank], device).chunk(count))

        z = own(training_latents(seed, start, size, int(self.generator.latent_dim)))  # type: ignore[arg-type]
        reals = self.bank.batch(start, size, rank, ranks).chunk(count)
        weights = config.regularize.weights(start)
        p = config.diffaug.p if self.adaptive is None else self.adaptive.p
        streams = (REAL_STREAM, FAKE_STREAM, GENERATOR_STREAM) if p else ()
        draws = {stream: own(augmentation_draws(seed, start, stream, size)) for stream in streams}
        mixing = own(mixing_weights(seed, start, size)) if "gradient_penalty" in weights else [None] * count
        image_size = config.model["generator"]["image_size"]
        masks = own(cutmix_masks(seed, start, size, image_size)) if "cutmix" in weights else [None] * count
        parts = []
        for place, real in enumerate(reals):
            drawn = {stream: rows[place] for stream, rows in draws.items()}
            last = place == count - 1
            terms = Terms(self.loss, weights, mixing[place], masks[place], p, drawn, count, last)
            parts.append(Part(real, z[place], terms))
        return parts

    def status(self, means: dict[str, float]) -> str:
        """Losses, D's answers and the last score."""
        return "D {d_loss:.3f} G {g_loss:.3f} D(real) {d_real:.2f} D(fake) {d_fake:.2f}".format(**means) + self.scored

    def warnings(self, means: dict[str, float]) -> list[str]:
        """Signs of collapse."""
        return self.monitor.check(self.images_seen, means)

    def after_step(self, before: int, last: bool) -> None:
        """A sample grid and a score where they are due; the last weights are scored too."""
        if self.accelerator.is_main_process and is_due(before, self.images_seen, self.config.grid_every):
            self.grid()
        if self.scorer is not None and (last or is_due(before, self.images_seen, self.config.eval.every)):
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


def _mean(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Means of the statistics of equal parts."""
    return rows[0] if len(rows) == 1 else {name: torch.stack([row[name] for row in rows]).mean() for name in rows[0]}


def run_training(config: TrainConfig) -> RunFolder:
    """Train as `config` says, from the start or from where the run stands, and return its folder.

    Raises:
        UserError: settings, data or run folder that do not fit.
        Interrupted: stopped on request, after saving.
    """
    data = PreparedData.open(config.data)
    validate(config, data, process_count())
    idle = () if config.diffaug.adaptive else ("diffaug.ada_target", "diffaug.ada_images")  # without effect
    return run_loop(
        config,
        lambda accelerator, run: Trainer(config, accelerator, data, run),
        {"data_sha256": data.fingerprint},
        (*CHANGEABLE, "grid_every", *flatten({"eval": as_dict(config.eval)}), *idle),
        ADDED,
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
