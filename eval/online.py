"""A score of the averaged generator while it trains, and the best weights by it.

Nothing here draws from a random state or changes a network, so a run ends bit by bit the same with and without it.
The modules of `eval` are imported only when a score is wanted: loading what they need takes seconds.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import distributed, nn

from core.cli.console import say
from core.cli.errors import UserError
from core.cli.files import digest_of, read_json, write_json
from core.data.dataset import PreparedData
from core.nn.model_file import load_model, save_model
from core.training.curves import Panel
from core.training.rundir import RunFolder
from eval.features.settings import InceptionSection
from gen.latents import sample_latents
from gen.sample import render

if TYPE_CHECKING:
    from eval.features.extractors import Features
    from eval.metrics.frechet import Statistics

LEAST_SAMPLES = 2_000
BEST_NAME, BEST_FACTS = "best.safetensors", "best.json"

Result = TypeVar("Result")


@dataclass
class EvalSection:
    """When and how samples are scored during training; conf/gen.yaml explains each key."""

    every: int
    n: int
    features: str
    fid: InceptionSection
    batch_size: int


def check_section(section: EvalSection) -> None:
    """Refuse settings that cannot work.

    Raises:
        UserError: naming the key.
    """
    if section.every < 0:
        raise UserError(f"eval.every={section.every} must not be negative")
    if section.batch_size < 1:
        raise UserError(f"eval.batch_size={section.batch_size} must be at least 1")
    if section.n < LEAST_SAMPLES:
        raise UserError(
            f"eval.n={section.n} must be at least {LEAST_SAMPLES:,}: with fewer samples, bias and noise of the score "
            "choose the wrong weights"
        )


class Scorer:
    """The Frechet distance of fixed samples of a generator to the real images of a training split.

    Args:
        section: checked settings.
        data, split: the real images; their statistics are computed here unless they are kept beside the data.
        accelerator: each of its processes makes a share of the samples, and all must do everything together.
        spare: folder for the features of the real images when that of the data cannot be written to.

    Attributes:
        terms: metric, number of samples, features and real images. Scores compare where all of these are the same.

    Raises:
        UserError: features that cannot be had, or a split that cannot be used.
    """

    def __init__(
        self, section: EvalSection, data: PreparedData, split: str, accelerator: Accelerator, spare: Path
    ) -> None:
        from eval.features.extractors import make_features
        from eval.features.reference import open_reference, reference_sums

        def make() -> Features:
            try:
                return make_features(section.features, section.fid, str(accelerator.device))
            except UserError as error:
                raise UserError(f"eval: {error}") from error

        def prepare() -> tuple[Features, Statistics | None]:
            features = make()
            reference = open_reference(data.path, split)
            return features, reference_sums(reference, features, section.batch_size, spare).statistics()

        prepared = alone_first(accelerator, prepare)
        # The others come later, so that missing weights are downloaded once.
        self.features, self.real = prepared or (make(), None)
        self.accelerator, self.n, self.batch_size = accelerator, section.n, section.batch_size
        names = ("name", "dims", "weights_sha256", "transform")
        self.terms = {
            "metric": self.features.metric,
            "n": section.n,
            "features": {name: getattr(self.features, name) for name in names},
            "reference": {"sha256": data.fingerprint, "split": split, "count": len(data.indices(split))},
        }

    def __call__(self, model: nn.Module) -> float | None:
        """Score a generator in eval mode by its samples of the seeds 0 to n - 1 (every process must call it).

        Batch statistics in `model`, which every process has its own of, are overwritten by those of process 0.

        Returns:
            The distance on process 0, None on the others.
        """
        from eval.metrics.frechet import Statistics, frechet_distance

        for buffer in model.buffers():
            broadcast(buffer)
        seeds = share(self.n, self.batch_size, self.accelerator.process_index, self.accelerator.num_processes)
        batches = [seeds[start : start + self.batch_size] for start in range(0, len(seeds), self.batch_size)]
        latent_dim = int(model.latent_dim)  # type: ignore[arg-type]
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


class Best:
    """The weights with the lowest score so far: best.safetensors and, to read, best.json (on process 0).

    They are held in memory and written with the next checkpoint, just before it. So a killed run, which continues from
    its last checkpoint, seldom leaves weights of steps that are then done anew and, on a GPU, with another result: only
    where it is killed between the two writes.

    Files that do not fit any more are renamed to best-IMAGES.*, with a note, and the search starts again: those with a
    score on other terms, and those of more images than the checkpoint has, which happens when the run is set back
    by hand or by a damaged checkpoint.

    Args:
        folder: of the run.
        terms: what the scores depend on; see `Scorer`.
        images_seen: where training continues.

    Raises:
        UserError: the file that is there is damaged.
    """

    def __init__(self, folder: Path, terms: dict[str, Any], images_seen: int) -> None:
        self.folder, self.terms = folder, terms
        self.score = math.inf
        self._waiting: tuple[nn.Module, dict[str, Any], dict[str, Any]] | None = None
        if (folder / BEST_NAME).exists():
            self._continue(images_seen)

    def _continue(self, images_seen: int) -> None:
        _, info = load_model(self.folder / BEST_NAME)
        stored = dict(info.get("score", {}))
        score = stored.pop("value", None)
        differing = sorted(key for key in stored.keys() | self.terms.keys() if stored.get(key) != self.terms.get(key))
        if info["images_seen"] > images_seen:
            self._set_aside(info["images_seen"], f"training continues before it, at {images_seen:,}")
        elif differing:
            self._set_aside(info["images_seen"], f"scores no longer compare (other {', '.join(differing)})")
        else:
            self.score = float(score)

    def _set_aside(self, images: int, reason: str) -> None:
        stems = (f"best-{images:012d}" + (f"-{k}" if k > 1 else "") for k in itertools.count(1))
        stem = next(stem for stem in stems if not (self.folder / f"{stem}.safetensors").exists())
        for name in (BEST_FACTS, BEST_NAME):
            old = self.folder / name
            if old.exists():
                old.rename(self.folder / f"{stem}{old.suffix}")
        say(f"note: {BEST_NAME} of {images:,} images is set aside as {stem}.safetensors: {reason}")

    def offer(self, score: float, model: nn.Module, recipe: dict[str, Any], info: dict[str, Any]) -> bool:
        """Keep a copy of these weights if their score is the lowest so far, and say whether it is.

        Args:
            recipe, info: as for `core.nn.model_file.save_model`.
        """
        if not score < self.score:
            return False
        self.score = score
        self._waiting = copy.deepcopy(model), recipe, info
        return True

    def write(self) -> None:
        """Write what is held in memory, if anything.

        Raises:
            UserError: it cannot be written.
        """
        if self._waiting is None:
            return
        model, recipe, info = self._waiting
        save_model(self.folder / BEST_NAME, model, recipe, info | {"score": {"value": self.score, **self.terms}})
        facts = {"score": self.score, **self.terms, **info, "model": BEST_NAME, "terms": digest_of(self.terms)}
        write_json(self.folder / BEST_FACTS, facts)
        self._waiting = None


def comparable(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of stats.jsonl without the scores on other terms than the last one."""
    last = next((row["terms"] for row in reversed(rows) if "score" in row), None)
    return [row for row in rows if "score" not in row or row["terms"] == last]


def score_panel(rows: list[dict[str, Any]]) -> list[Panel]:
    """The plot of the scores among rows that are `comparable`; none without scores."""
    scored = [row for row in rows if "score" in row]
    if not scored:
        return []
    metric, n = scored[-1]["metric"], scored[-1]["n"]
    return [Panel(f"{metric} of {n:,} samples", {"score": metric}, best="lowest", wide=True)]


def best_so_far(run: RunFolder) -> str | None:
    """Where the best weights are, their score and the last one, in a line; None where there are none.

    Raises:
        UserError: best.json is damaged.
    """
    if not (run.path / BEST_FACTS).exists():
        return None
    best = read_json(run.path / BEST_FACTS)
    last = [row for row in run.read_stats() if row.get("terms") == best["terms"]][-1:]
    return (
        f"best: {run.path / BEST_NAME}, {best['metric']} {best['score']:.4g} of {best['n']:,} samples at "
        f"{best['images_seen']:,} images"
    ) + "".join(f"; last: {row['score']:.4g} at {row['images']:,}" for row in last)
