"""A score of the averaged generator while it trains, and the best weights by it if it ranks models well enough.

Nothing here draws from a random state or changes a network: a run ends bit for bit the same with and without it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import distributed, nn

from core.cli.console import say
from core.cli.errors import UserError
from core.cli.files import digest_of
from core.data.dataset import PreparedData
from core.nn.fuse import fold_batch_norm
from core.training.best import BestWeights
from core.training.callbacks import Callback
from core.training.loop import TrainingLoop
from core.training.meter import is_due
from eval.features.extractors import GPU_BATCH, Features, make_features, without_download
from eval.features.reference import open_reference, reference_sums
from eval.features.settings import InceptionSection
from eval.metrics.frechet import Statistics, frechet_distance
from gen.latents import sample_latents
from gen.sample import BATCH_SIZE, render
from gen.trainer import Trainer

Result = TypeVar("Result")


class OnlineScore(Callback):
    """Scores samples of the averaged generator every so many images and after the last step.

    The best weights are kept where the features are trustworthy.

    Args:
        every: images between scores.
        n, batch_size: samples a score, and samples at a time on each process (None: what suits the device).
        features: `auto` (`efficientnet`, or `random` where it is not installed) or those of `eval.fid`.
        fid: `weights` and `dims` of the network, as in `eval.fid`.
    """

    def __init__(self, every: int, n: int, features: str, fid: dict[str, Any], batch_size: int | None) -> None:
        self.every, self.n, self.batch_size, self.features = every, n, batch_size, features
        self.fid = InceptionSection(**fid)
        self.scorer: Scorer | None = None
        self.best: BestWeights | None = None
        self.text = ""

    def start(self, loop: TrainingLoop) -> None:
        """Make the features and the statistics of the real images, and look for the best weights so far."""
        trainer = _trainer(loop)
        main = trainer.accelerator.is_main_process
        name = without_download(quiet=not main) if self.features == "auto" else self.features

        def make() -> Features:
            try:
                return make_features(name, self.fid, str(trainer.accelerator.device))
            except UserError as error:
                raise UserError(f"eval: {error}") from error

        folder, split = trainer.run.path / "features", trainer.config.split
        at_once = self.batch_size or (GPU_BATCH if trainer.accelerator.device.type == "cuda" else BATCH_SIZE)
        self.scorer = Scorer(make, self.n, at_once, trainer.data, split, trainer.accelerator, folder)
        if not main:
            return
        if self.scorer.features.trustworthy:
            self.best = BestWeights(trainer.run.path, self.scorer.terms, trainer.images_seen)
        else:
            say(
                f"note: {self.scorer.features.metric} is recorded but chooses no best weights, since it is too coarse "
                "for that: eval.features=efficientnet or inception does"
            )

    def after_step(self, loop: TrainingLoop, before: int, last: bool) -> None:
        """Score where it is due."""
        if last or is_due(before, loop.images_seen, self.every):
            self.score(_trainer(loop))

    def score(self, trainer: Trainer) -> None:
        """Score the averaged weights, and keep them if they are the best so far."""
        assert self.scorer is not None
        trainer.fold()  # finds out whether training has diverged, before the time is spent
        started = time.perf_counter()
        score = self.scorer(trainer.ema.model)
        if score is None:
            return
        if not self.text:
            took = time.perf_counter() - started
            every = f"every {self.every:,} images (eval.every)"
            say(f"scoring {self.n:,} samples (eval.n) took {took:.1f} s; it is done {every}")
        row = self.scorer.row(score)
        trainer.record(row, {row["metric"]: score})
        recipe, info = trainer.config.model["generator"], trainer.model_info()
        better = self.best is not None and self.best.offer(score, trainer.ema.model, recipe, info)
        self.text = f", {row['metric']} {score:.3g}" + (" (best)" if better else "")

    def before_checkpoint(self, loop: TrainingLoop, folder: Path) -> None:
        """Write the best weights."""
        if self.best is not None:
            self.best.write(folder)

    def status(self) -> str:
        """The last score."""
        return self.text


def _trainer(loop: TrainingLoop) -> Trainer:
    assert isinstance(loop, Trainer)
    return loop


class Scorer:
    """The Frechet distance of fixed samples of a generator to the real images of a training split.

    Args:
        make: makes the features.
        n, batch_size: samples a score, and samples at a time.
        data, split: the real images; their statistics are computed here unless they are kept beside the data.
        accelerator: each of its processes makes a share of the samples, and all must do everything together.
        spare: folder for the features of the real images when that of the data cannot be written to.

    Attributes:
        terms: metric, number of samples, features and real images. Scores compare where all of these are the same.

    Raises:
        UserError: features that cannot be had, or a split that cannot be used.
    """

    def __init__(
        self,
        make: Callable[[], Features],
        n: int,
        batch_size: int,
        data: PreparedData,
        split: str,
        accelerator: Accelerator,
        spare: Path,
    ) -> None:
        def prepare() -> tuple[Features, Statistics | None]:
            features = make()
            reference = open_reference(data.path, split)
            return features, reference_sums(reference, features, batch_size, spare).statistics()

        prepared = alone_first(accelerator, prepare)
        # The others come later, so that missing weights are downloaded once.
        self.features, self.real = prepared or (make(), None)
        self.accelerator, self.n, self.batch_size = accelerator, n, batch_size
        names = ("name", "dims", "weights_sha256", "transform")
        self.terms = {
            "metric": self.features.metric,
            "n": n,
            "features": {name: getattr(self.features, name) for name in names},
            "reference": {"sha256": data.fingerprint, "split": split, "count": len(data.indices(split))},
        }

    def __call__(self, model: nn.Module) -> float | None:
        """Score a generator in eval mode by its samples of the seeds 0 to n - 1 (every process must call it).

        Batch statistics in `model`, which every process has its own of, are overwritten by those of process 0.

        Returns:
            The distance on process 0, None on the others.
        """
        for buffer in model.buffers():
            broadcast(buffer)
        seeds = share(self.n, self.batch_size, self.accelerator.process_index, self.accelerator.num_processes)
        batches = [seeds[start : start + self.batch_size] for start in range(0, len(seeds), self.batch_size)]
        latent_dim = int(model.latent_dim)  # type: ignore[arg-type]
        model = fold_batch_norm(model)  # as `facet sample` does, bit for bit
        found = [self.features(render(model, sample_latents(batch, latent_dim))) for batch in batches]
        drawn = self._gather(np.concatenate([np.zeros((0, self.features.dims), np.float32), *found]))
        return None if self.real is None else frechet_distance(Statistics.of(drawn), self.real)

    def _gather(self, own: np.ndarray) -> np.ndarray:
        """The features of all processes, float32 (n, D), in the order of the seeds, each once."""
        ranks = self.accelerator.num_processes
        if ranks == 1:
            return own
        counts = [len(share(self.n, self.batch_size, rank, ranks)) for rank in range(ranks)]
        # Only equal shapes can be gathered: shares are filled up, and the filling is cut off again.
        filled = np.zeros((max(counts), own.shape[1]), np.float32)
        filled[: len(own)] = own
        every = self.accelerator.gather(torch.from_numpy(filled).to(self.accelerator.device)).cpu().numpy()
        shares = np.split(every, ranks)
        return np.concatenate([rows[:count] for rows, count in zip(shares, counts, strict=True)])

    def row(self, score: float) -> dict[str, Any]:
        """A score for stats.jsonl; `terms` is the same for scores that compare."""
        return {"score": score, "metric": self.terms["metric"], "n": self.n, "terms": digest_of(self.terms)}


def share(n: int, batch_size: int, rank: int, ranks: int) -> range:
    """The part of the seeds 0 to n - 1 that a process takes: contiguous, and of whole batches.

    So a sample has the same neighbours in its batch, and the same rounding, on any number of processes.
    """
    batches = math.ceil(n / batch_size)
    first, last = (min(n, batch_size * (batches * place // ranks)) for place in (rank, rank + 1))
    return range(first, last)


def alone_first(accelerator: Accelerator, work: Callable[[], Result]) -> Result | None:
    """Do `work` on process 0 while the others wait, however long it takes; its result there, None on the others.

    Raises:
        UserError: that of the work, on all processes.
    """
    if accelerator.num_processes == 1:
        return work()
    # In a group of their own: a wait in the usual one ends the run after minutes, which the statistics of a large data
    # set can exceed, and there that limit is wanted. Gloo waits on the CPU, whatever device trains.
    group: Any = distributed.new_group(backend="gloo", timeout=timedelta(days=1))
    result: Result | None = None
    failure: list[str | None] = [None]
    if accelerator.is_main_process:
        try:
            result = work()
        except UserError as error:
            failure = [str(error)]
    distributed.broadcast_object_list(failure, src=0, group=group)
    distributed.destroy_process_group(group)
    if failure[0] is not None:
        raise UserError(failure[0])
    return result
