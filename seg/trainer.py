"""A segmentation training run: its network, its examples, its steps and its evaluations."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import nn

from core.cli.errors import UserError
from core.data.dataset import PreparedData
from core.data.images import MEMORY_FORMAT
from core.data.mask_classes import IGNORE
from core.nn.ema import ExponentialAverage
from core.nn.fuse import fold_batch_norm
from core.nn.model_file import FILE_NAME, build_model, save_model
from core.training.best import Best, lost_steps, set_aside, stored_info
from core.training.callbacks import Callback, Pictures
from core.training.curves import Panel
from core.training.loop import TrainingLoop, make_optimizer
from core.training.meter import is_due
from core.training.rundir import RunFolder
from seg.borders import border_map
from seg.data import Examples, training_batches
from seg.losses import loss_terms, total_loss
from seg.metrics import SegmentationMetrics
from seg.network import SegmentationNetwork
from seg.scoring import comparison, data_identity, predictions, scored, write_scores
from seg.settings import TrainConfig, class_weights, learning_rate_factor, training_window

LAST_NAME = "last.safetensors"
PANELS = (
    Panel("loss", {"loss": "sum", "cross_entropy": "cross-entropy", "dice": "Dice", "focal": "focal"}, wide=True),
    Panel("validation", {"valid_miou": "mIoU", "valid_mdice": "mean Dice"}, best="highest"),
    Panel("pixel accuracy", {"accuracy": "training", "valid_pixel_accuracy": "validation"}),
)


class Trainer(TrainingLoop):
    """One segmentation training run: its network, its examples and its evaluations."""

    def __init__(
        self, config: TrainConfig, accelerator: Accelerator, data: PreparedData, run: RunFolder, *callbacks: Callback
    ) -> None:
        statistics = ("loss", *config.loss.factors, "accuracy", "gradient_norm", "learning_rate")
        super().__init__(config, accelerator, run, statistics, *callbacks)
        self.config, self.data = config, data
        self.recipe = config.model["network"] | {"classes": len(data.classes)}
        self.model = self._network()
        # Of the weights as they were read, before training changes them.
        encoder = getattr(self.model, "encoder", None)
        self.pretrained = {} if encoder is None else {"encoder_sha256": encoder.weights_sha256}
        self.ema = ExponentialAverage(self.model, config.ema_half_life)
        self.optimizer = make_optimizer(config.optim, self.model)
        self.base_rate = float(self.optimizer.defaults["lr"])
        weights = class_weights(config, data)
        self.class_weights = None if weights is None else weights.to(accelerator.device)
        self.best = Best(higher_is_better=True)
        self._waiting: tuple[SegmentationNetwork, dict[str, Any], dict[str, Any], SegmentationMetrics] | None = None
        self.load()
        if self.ranks.of_first(self.ranks.together(self._lost)):
            self.best = Best(higher_is_better=True)
        self.examples = self._examples()
        place = accelerator.process_index, accelerator.num_processes, accelerator.device
        workers = (0 if accelerator.device.type == "cpu" else 4) if config.workers is None else config.workers
        self.batches = training_batches(self.examples, self.images_seen, config.batch_size, *place, workers)
        # Wrapped only now: the average and the optimiser hold the bare network.
        if config.compile:  # in place: what the average, the optimiser and the files hold stays as it is
            self.model.compile()
        self.wrapped = accelerator.prepare(self.model)

    def _network(self) -> SegmentationNetwork:
        model = build_model(self.recipe)
        if not isinstance(model, SegmentationNetwork):
            raise UserError(f"model.network is a {type(model).__name__}, not a segmenter")
        if model.channels != 3:
            raise UserError(f"model.network.channels={model.channels}: pictures are RGB, so it must be 3")
        model.initialise(self.config.seed)
        return model.to(self.accelerator.device).to(memory_format=MEMORY_FORMAT)

    def _examples(self) -> Examples:
        config, data = self.config, self.data
        window, margin = training_window(self.model, config.crop, data.image_size)
        borders = None
        if config.border.classes:
            assert data.masks is not None
            cells = [data.classes.index(name) for name in config.border.classes]
            rows = data.indices(config.split)
            quiet = not self.accelerator.is_main_process
            borders = border_map(data.masks[rows], cells, config.border.w0, config.border.sigma, quiet=quiet)
            borders = borders.astype(np.float16)  # half the memory; a weight of 10 keeps three digits
        return Examples(data, config.split, config.seed, config.augment, window, margin, borders)

    def parts(self) -> dict[str, Any]:
        """Network, average, optimiser and the best evaluation."""
        return {"model": self.model, "ema": self.ema.model, "optimizer": self.optimizer, "best": self.best}

    def export(self) -> None:
        """Write the averaged weights as they are now; those of the best evaluation have their own file."""
        save_model(self.run.path / LAST_NAME, self.ema.model, self.recipe, self.model_info())

    def model_info(self) -> dict[str, Any]:
        """What a model file says of itself."""
        kept = ("classes", "palette", "image_size", "resized", "fit", "value_range")
        facts = {key: getattr(self.data, key) for key in kept}
        return {
            "images_seen": self.images_seen,
            **facts,
            "seed": self.config.seed,
            "weights": "ema",
            **self.pretrained,
            **data_identity(self.data),
        }

    def _lost(self) -> bool:
        """Whether there are no best weights to go on from (process 0); those of steps after the checkpoint go aside."""
        file, split = self.run.path / FILE_NAME, self.config.valid_split
        if not (self.ranks.first and file.exists()):
            return True
        images = stored_info(file)["images_seen"]
        if images > self.images_seen:
            names = (f"{split}.png", f"{split}.json", FILE_NAME)
            set_aside(self.run.path, names, images, lost_steps(self.images_seen))
        return bool(images > self.images_seen)

    @property
    def finished(self) -> bool:
        """Whether all images have been seen, or evaluations have not improved for too long."""
        return super().finished or 0 < self.config.patience <= self.best.since

    def step(self) -> None:
        """One step on the next global batch."""
        config, ranks, batch = self.config, self.accelerator.num_processes, next(self.batches)
        rate = self.base_rate * learning_rate_factor(config, self.images_seen)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_factor", 1.0)
        if self.model.dropout.p:  # as a function of the place in the run, so that resuming needs no random state
            words = [config.seed, 2, self.images_seen, self.accelerator.process_index]
            torch.manual_seed(int(np.random.SeedSequence(words).generate_state(1)[0]))
        logits = self.wrapped(batch.images)
        factors = config.loss.factors
        terms = loss_terms(logits, batch.masks, factors, self.class_weights, batch.borders, config.loss.focal_gamma)
        # Divided by what all ranks have together, the sum over ranks is the loss of the whole batch; the gradients are
        # averaged over ranks, hence the factor.
        sums = torch.stack([denominator for _, denominator in terms.values()])
        denominators = dict(zip(terms, self.accelerator.reduce(sums, reduction="sum"), strict=True))
        loss = ranks * total_loss(terms, factors, denominators)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_gradient or math.inf)
        self.optimizer.step()
        self.ema.update(self.model, self.images_seen, config.batch_size)
        parts = {name: ranks * total_loss({name: terms[name]}, {name: 1.0}, denominators).detach() for name in terms}
        known = batch.masks != IGNORE
        right = ((logits.argmax(1) == batch.masks) & known).sum() / known.sum().clamp(min=1)
        used = torch.full((), rate, device=loss.device)
        totals = {"loss": loss.detach(), "accuracy": right, "gradient_norm": norm, "learning_rate": used}
        self.meter.add(totals | parts)
        self.images_seen += config.batch_size

    def status(self, means: dict[str, float]) -> str:
        """Loss, accuracy on the training pictures and the best evaluation."""
        best = "" if self.best.score is None else f", best valid mIoU {self.best.score:.3f}"
        return f"loss {means['loss']:.3f}, pixel accuracy {means['accuracy']:.3f}{best}"

    def evaluate(self) -> None:
        """Score the averaged weights on the validation split, every rank its share; hold them if they are the best.

        They come into the run with the next checkpoint: a killed run continues from its last one.
        """
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        for buffer in self.ema.model.buffers():
            broadcast(buffer)  # every rank has its own batch statistics: all are to score the model of process 0
        rows = self.data.indices(self.config.valid_split)
        metrics, model = SegmentationMetrics(self.data.classes), fold_batch_norm(self.ema.model)
        for predicted, true in predictions(model, self.data, rows[rank::ranks]):
            metrics.update(predicted, true)
        metrics = metrics.reduce(self.accelerator)
        results = scored(metrics, self.data, self.config.valid_split)
        scores = results["dataset"]
        improved = self.best.improved(scores["miou"], self.images_seen)
        if not self.accelerator.is_main_process:
            return
        short = {f"valid_{name}": scores[name] for name in ("miou", "mdice", "pixel_accuracy")}
        self.record(short, short)
        if improved:
            self._waiting = copy.deepcopy(self.ema.model), self.model_info(), results, metrics

    def write_best(self, folder: Path) -> None:
        """Write to `folder` the weights and scores of the best evaluation, if it came after the last checkpoint."""
        if self._waiting is None:
            return
        model, info, results, metrics = self._waiting
        save_model(folder / FILE_NAME, model, self.recipe, info)
        split = self.config.valid_split
        identity = {"images_seen": info["images_seen"], "split": split, **data_identity(self.data)}
        write_scores(results, metrics, folder / f"{split}.json", identity)
        self._waiting = None

    def describe(self) -> str:
        """Model, parameters and data."""
        parameters = sum(p.numel() for p in self.model.parameters())
        valid = len(self.data.indices(self.config.valid_split))
        side = self.examples.window
        return (
            f"{self.config.model['name']}: {parameters:,} parameters, {len(self.data.classes)} classes, "
            f"{len(self.examples.order):,} images in windows of {side}x{side}, {valid:,} to validate"
        )


class Comparisons(Pictures):
    """Pictures of the validation split with true masks and those that the averaged weights predict."""

    def draw(self, loop: TrainingLoop) -> np.ndarray:
        """The first few."""
        assert isinstance(loop, Trainer)
        return comparison(fold_batch_norm(loop.ema.model), loop.data, loop.data.indices(loop.config.valid_split))


class Validation(Callback):
    """Evaluates on the validation split every so many images, and after the last step; keeps the best weights."""

    def begin(self, loop: TrainingLoop) -> None:
        """Evaluate a finished run that has lost its best weights, or its last line would name what is not there."""
        assert isinstance(loop, Trainer)
        if loop.finished and loop.best.score is None:
            loop.evaluate()

    def after_step(self, loop: TrainingLoop, before: int, last: bool) -> None:
        """Evaluate where it is due."""
        assert isinstance(loop, Trainer)
        if last or is_due(before, loop.images_seen, loop.config.valid_every):
            loop.evaluate()

    def before_checkpoint(self, loop: TrainingLoop, folder: Path) -> None:
        """Write the best weights."""
        assert isinstance(loop, Trainer)
        loop.write_best(folder)
