"""A GAN's training run: its networks, its steps and the grids of its samples."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from core.data.dataset import PreparedData
from core.data.images import MEMORY_FORMAT, make_grid, to_uint8
from core.data.loader import ImageBank, to_device
from core.nn.ema import ExponentialAverage
from core.nn.model_file import FILE_NAME, build_model, save_model
from core.training.callbacks import Callback, Pictures
from core.training.curves import Panel
from core.training.loop import TrainingLoop, make_optimizer
from core.training.recorded import Recorded, can_record
from core.training.rundir import RunFolder
from gen.augment import STREAMS, AdaptiveProbability, augmentation_draws, is_off
from gen.latents import sample_latents, training_latents
from gen.losses import gan_loss
from gen.monitor import PATIENCE, CollapseMonitor, identical_samples
from gen.penalties import PENALTIES
from gen.sample import GRID_SAMPLES
from gen.settings import TrainConfig, check_networks
from gen.steps import Batch, DiscriminatorWrapper, Objective, discriminator_step, generator_step


def panels(loss: str) -> list[Panel]:
    """The plots of a run with this loss; panels without numbers are not drawn."""
    probable = gan_loss(loss).probabilistic
    answers = {"d_real": "to real images", "d_fake": "to samples"}
    return [
        Panel("losses", {"d_loss": "D", "g_loss": "G"}, wide=True),
        Panel("mean answer of D" if probable else "mean logit of D", answers, limits=(0, 1) if probable else None),
        Panel("penalties of D, before their factors", {name: p.title for name, p in PENALTIES.items()}, wide=True),
        Panel("probability of each augmentation", {"augment_p": "p"}, limits=(0, 1)),
    ]


class Trainer(TrainingLoop):
    """One GAN training run: its networks and what is drawn from them."""

    def __init__(
        self, config: TrainConfig, accelerator: Accelerator, data: PreparedData, run: RunFolder, *callbacks: Callback
    ) -> None:
        super().__init__(config, accelerator, run, config.statistics, *callbacks)
        self.config, self.data = config, data
        self.bank = ImageBank(data.images, data.indices(config.split), accelerator.device, config.seed, config.flip)
        self.generator, self.discriminator = (build_model(config.model[key]) for key in ("generator", "discriminator"))
        check_networks(config, self.generator, self.discriminator)
        for offset, network in enumerate((self.generator, self.discriminator)):
            network.initialise(2 * config.seed + offset)  # type: ignore[operator]
            network.to(accelerator.device).to(memory_format=MEMORY_FORMAT)
        self.latent_dim = int(self.generator.latent_dim)  # type: ignore[arg-type]
        self.ema = ExponentialAverage(self.generator, config.ema_half_life)
        self.g_optimizer = make_optimizer(config.optim, self.generator)
        self.d_optimizer = make_optimizer(config.optim, self.discriminator)
        rate_of_g, rate_of_d = (float(made.param_groups[0]["lr"]) for made in (self.g_optimizer, self.d_optimizer))
        self.rates = [(self.g_optimizer, rate_of_g), (self.d_optimizer, rate_of_d * config.d_lr_factor)]
        self.monitor = CollapseMonitor(config.loss)
        self.adaptive: AdaptiveProbability | None = None
        if config.diffaug.adaptive:
            target, suited = config.diffaug.ada_target, gan_loss(config.loss).overfitting_target
            target = suited if target is None else target
            self.adaptive = AdaptiveProbability(target, config.diffaug.ada_images, device=accelerator.device)
        self.load()
        # Wrapped only now: the average and the optimisers hold the bare networks.
        bf16 = accelerator.mixed_precision == "bf16"
        self.d_of_generator = DiscriminatorWrapper(self.discriminator, bf16)
        own = DiscriminatorWrapper(self.discriminator, bf16 and not config.second_order)
        if config.compile:  # in place: what the average, the optimisers and the files hold stays as it is
            self.generator.compile()
            self.d_of_generator.compile()
            if not config.second_order:  # torch.compile does not do second derivatives
                own.compile()
        self.wrapped_generator, self.wrapped_discriminator = accelerator.prepare(self.generator, own)
        optimizers = [self.g_optimizer, self.d_optimizer]
        self.records = (
            config.cuda_graph and not config.compile and accelerator.num_processes == 1 and can_record(optimizers)
        )
        self.recorded = {last: Recorded(optimizers) for last in (False, True)}  # without a step of G, and with one

    def parts(self) -> dict[str, Any]:
        """Networks, average, optimisers, the monitor's memory and the probability of augmentation if it adapts."""
        adaptive = {} if self.adaptive is None else {"augmentation": self.adaptive}
        named = ("generator", "discriminator", "g_optimizer", "d_optimizer", "monitor")
        return adaptive | {name: getattr(self, name) for name in named} | {"ema": self.ema.model}

    def export(self) -> None:
        """Write the averaged weights."""
        save_model(self.run.path / FILE_NAME, self.ema.model, self.config.model["generator"], self.model_info())

    def model_info(self) -> dict[str, Any]:
        """What a model file says of itself."""
        data = {"source": self.data.meta.get("source"), "count": len(self.data), "sha256": self.data.fingerprint}
        info = {"images_seen": self.images_seen, "data": data, "seed": self.config.seed, "weights": "ema"}
        # Scores on features like those that D judges by flatter a generator.
        judge = getattr(self.discriminator, "pretrained", None)
        return info if judge is None else info | {"judged_by": judge}

    def step(self) -> None:
        """`n_critic` steps of D, each on the next global batch, then one of G on the last of these batches."""
        config, accelerator, before, rows = self.config, self.accelerator, self.images_seen, []
        for optimizer, rate in self.rates:
            for group in optimizer.param_groups:
                group["lr"] = rate * config.lr_schedule.factor(before)
        passed = config.n_critic * config.batch_size
        for start in range(before, before + passed, config.batch_size):
            p = config.diffaug.p if self.adaptive is None else self.adaptive.p
            objective, batches = config.objective(start, p), self.batches(start, p)
            last = start + config.batch_size == before + passed
            learn = partial(self._learn, last=last)
            if self.records:
                row = self.recorded[last](learn, batches, objective.on(accelerator.device))
            else:
                row = learn(batches, objective)
            if self.adaptive is not None:
                row["augment_p"] = p
                self.adaptive.update(accelerator.reduce(row["d_sign"], "mean"), config.batch_size)
            rows.append(row)
        self.ema.update(self.generator, before, passed)
        for row in rows:  # one a batch, so that images can be counted by rows
            self.meter.add(rows[-1] | row)
        self.images_seen += passed

    def _learn(self, batches: list[Batch], objective: Objective, last: bool) -> dict[str, Tensor]:
        """A step of D, and after the `last` batch of a step one of G."""
        # G's own step reuses the images of D's last step, unless several batches would have to keep their graphs.
        keep = last and len(batches) == 1
        with torch.set_grad_enabled(keep):
            fakes = [self.wrapped_generator(batch.z) for batch in batches]  # (n, 3, H, W) each
        d, d_optimizer = self.wrapped_discriminator, self.d_optimizer
        row = discriminator_step(d, d_optimizer, batches, fakes, objective, self.accelerator)
        if not last:
            return row
        g, d, g_optimizer = self.wrapped_generator, self.d_of_generator, self.g_optimizer
        kept = fakes if keep else None
        return row | generator_step(g, d, g_optimizer, batches, kept, objective, self.accelerator)

    def batches(self, start: int, augment_p: float | Tensor) -> list[Batch]:
        """This process's share of the global batch that begins at `start`, in `accumulate` parts.

        Every random number is drawn for the global batch, as a function of the seed and `start`.
        """
        config, accelerator, count = self.config, self.accelerator, self.config.accumulate
        rank, ranks, size, seed = accelerator.process_index, accelerator.num_processes, config.batch_size, config.seed

        def own(values: Tensor) -> list[Tensor]:
            return list(to_device(values.chunk(ranks)[rank], accelerator.device).chunk(count))

        z = own(training_latents(seed, start, size, self.latent_dim))
        reals = self.bank.batch(start, size, rank, ranks).chunk(count)
        streams = {} if is_off(augment_p) else STREAMS
        augment = {name: own(augmentation_draws(seed, start, stream, size)) for name, stream in streams.items()}
        makers = {name: PENALTIES[name].draw for name in config.penalties}
        draws = {name: own(draw(seed, start, size, self.data.image_size)) for name, draw in makers.items() if draw}

        def part(numbers: dict[str, list[Tensor]], place: int) -> dict[str, Tensor]:
            return {name: rows[place] for name, rows in numbers.items()}

        return [Batch(real, z[k], part(augment, k), part(draws, k)) for k, real in enumerate(reals)]

    def status(self, means: dict[str, float]) -> str:
        """Losses, the share of decisions that D gets right, and its answers where they are probabilities."""
        text = "loss of D {d_loss:.3f}, of G {g_loss:.3f}; D is right in {d_accuracy:.0%}"
        if gan_loss(self.config.loss).probabilistic:
            text = "loss of D {d_loss:.2f}, of G {g_loss:.2f}; D(real) {d_real:.2f}, D(fake) {d_fake:.2f}"
        return text.format(**means)

    def warnings(self, means: dict[str, float]) -> list[str]:
        """Signs of collapse."""
        return self.monitor.check(self.images_seen, means)

    def describe(self) -> str:
        """Model, parameters and data."""
        parameters = [sum(p.numel() for p in net.parameters()) for net in (self.generator, self.discriminator)]
        sizes = f"G {parameters[0]:,} and D {parameters[1]:,} parameters"
        return f"{self.config.model['name']}: {sizes}, {len(self.bank):,} images"


class SampleGrid(Pictures):
    """Grids of samples of fixed latents, from the averaged weights; warns if all samples are alike."""

    @torch.inference_mode()
    def draw(self, loop: TrainingLoop) -> np.ndarray:
        """The grid."""
        assert isinstance(loop, Trainer)
        z = sample_latents(range(GRID_SAMPLES), loop.latent_dim)
        pixels = to_uint8(loop.ema.model(z.to(loop.accelerator.device))).cpu().numpy()
        if loop.images_seen >= PATIENCE and (warning := identical_samples(pixels)):
            loop.warn(warning)
        return make_grid(pixels)
