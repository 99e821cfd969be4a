"""The material of a report: features and pixels of samples and real images, and which images were trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from core.data.dataset import SPLITS, PreparedData
from core.nn.model_file import load_model
from core.training.rundir import RunFolder
from eval.distances import Score, plan_floor, score_against, spread
from eval.features.cache import Extractor, features_key, remembered, set_key
from eval.features.image_sets import ImageSet, Samples
from eval.features.reference import RealFeatures, open_reference, random_rows
from eval.metrics.frechet import Statistics, frechet_distance

UNKNOWN = (
    "It is not known which images the generator was trained on, so copies are looked for among all real images, and "
    "there is nothing to compare the distances with: give the run folder of a run with split=train."
)
FOREIGN = (
    "The generator was trained on other data than these, so copies of its own training images cannot be seen here: "
    "give its data."
)


class Evidence:
    """Samples and real images, and, after `extract`, their features.

    `n` is the samples in a set; `trained_on` are the rows of the real images to search for the originals of copies,
    `held_out` those that the generator has certainly not seen; `doubt` says what is unknown about its training, if
    anything; `course` is the course's own folder of real images, if available.

    Raises:
        UserError: samples or data cannot be used.
    """

    def __init__(self, samples: Samples, data: Path, seed: int, course: Path | None = None) -> None:
        self.seed, self.samples, self.n = seed, samples, samples.count
        self.reference = open_reference(data)
        self.course = None if course is None else open_reference(course)
        self.data = PreparedData.open(data) if (data / "meta.json").is_file() else None
        every = np.arange(len(self.reference.every))
        self.trained_on, self.held_out, self.doubt = every, every[:0], UNKNOWN
        self._look_up_training()

    def _look_up_training(self) -> None:
        """Read from a run which data and which split it was trained on."""
        if self.samples.facts["kind"] != "model" or self.data is None:
            return
        model = Path(self.samples.facts["model"])
        run = RunFolder(model.parent)
        if load_model(model)[1].get("data", {}).get("sha256") not in (None, self.data.fingerprint):
            self.doubt = FOREIGN
            return
        if not run.config.is_file():
            return
        split = run.read_config().get("split")
        if split == "all" or (split in SPLITS and self.data.split is not None):
            self.trained_on = self.data.indices(split)
            self.held_out = np.setdiff1d(np.arange(len(self.data)), self.trained_on)
            self.doubt = ""

    def extract(self, extractor: Extractor, folder: Path, many: Samples | None = None) -> None:
        """Load or extract all features; every process must call it.

        `folder` keeps the features of samples, the data's own folder those of real images. `many` is a large sample
        set that starts with all the others, whose features are then parts of its own.
        """
        self.extractor, self.folder = extractor, folder
        self.real = RealFeatures(self.reference, extractor, folder)
        # The real images first: they take longest, and their features survive a later failure.
        self.features = self.real.of(np.arange(len(self.real)))
        if self.course is not None:
            self.course_real = RealFeatures(self.course, extractor, folder)
            self.course_real.of(self.course.rows, "course's real images")
        numbers = range(self.samples.sets)
        self.many = None if many is None else extractor.samples(many, 0, folder)
        if self.many is None:
            self.sets = [extractor.samples(self.samples, index, folder) for index in numbers]
        else:
            self.sets = [self.many.take(np.arange(index * self.n, (index + 1) * self.n)) for index in numbers]

    def read_samples(self, most: int) -> None:
        """Read the pixels of the first `most` samples, for the checks."""
        self.images: ImageSet = self.samples.open_set(0)
        self.pixels = self.images.read(0, min(most, len(self.images)))

    def references(self, random: int) -> dict[str, np.ndarray]:
        """Rows of all real images, of the training split if there is one, and of `random` real images, by name."""
        every = np.arange(len(self.reference.every))
        rows = {"all of the data": every}
        if self.data is not None and self.data.split is not None:
            training = np.flatnonzero(self.data.split == SPLITS.index("train"))
            if len(training) > 1:
                rows["training split"] = training
        if random < len(every):
            rows[f"{random:,} random"] = random_rows(every, random, self.seed)
        return rows

    @cached_property
    def drawn(self) -> list[Statistics]:
        """Statistics of every sample set."""
        return [kept.statistics() for kept in self.sets]

    def scores(self, random: int, floor_sets: int) -> list[dict[str, Any]]:
        """The score of the sample sets against each reference; kept on disk."""

        def usual(rows: np.ndarray) -> Callable[[], Score]:
            return lambda: score_against(self.real, rows, self.drawn, self.n, floor_sets, self.seed)

        named = self.references(random).items()
        found = [self._kept_score(name, self.real.key(rows), floor_sets, usual(rows)) for name, rows in named]
        if self.course is not None:
            name = f"the course's {Path(self.course.facts['path']).name}/"
            key = self.course_real.key(self.course.rows)
            score = self._kept_score(name, key, floor_sets, lambda: self._course_score(floor_sets))
            found.append(score | {"course": True})
        return found

    def _kept_score(
        self, name: str, rows: dict[str, Any], floor_sets: int, compute: Callable[[], Score]
    ) -> dict[str, Any]:
        """A score against the real images with the key `rows`, as report.json states it."""
        key = self.key() | {"against": rows, "floor sets": floor_sets}
        score = Score(**remembered(self.folder, "score", key, lambda: asdict(compute())))
        facts = {"against": name, "count": rows["rows"]["count"], "n": self.n, "mean": score.mean}
        facts |= {"sd": spread(score.values), "values": score.values}
        return facts | {"floor": score.floor_facts(self.n, self.seed), "excess": score.excess}

    def key(self) -> dict[str, Any]:
        """What identifies samples and real images together."""
        return features_key(self.extractor.features) | {
            "real": self.real.key(np.arange(len(self.real))),
            "samples": [set_key(self.samples, index) for index in range(self.samples.sets)],
            "seed": self.seed,
        }

    def _course_score(self, floor_sets: int) -> Score:
        """The score against the course's images; images of the data that are not among them give the floor."""
        statistics = self.course_real.sums(np.arange(len(self.course_real))).statistics()
        values = [frechet_distance(one, statistics) for one in self.drawn]
        plan = plan_floor(len(self.real), self.also_in_course, self.n, floor_sets, self.seed)
        if plan.inside or not plan.subsets:
            return Score(values, [], 0, None)
        floor = [frechet_distance(self.features.take(subset).statistics(), statistics) for subset in plan.subsets]
        return Score(values, floor, len(self.course_real), float(np.mean(values) - np.mean(floor)))

    @cached_property
    def also_in_course(self) -> np.ndarray:
        """Rows of real images that are also in the course's folder, pixel for pixel."""
        if self.course is None:
            return np.arange(0)
        known = set(_digests(self.course.images))
        return np.array([row for row, one in enumerate(_digests(self.reference.every)) if one in known], np.int64)

    def real_rows(self, count: int, part: int = 0) -> np.ndarray:
        """Up to `count` random rows of the real images; different parts do not overlap."""
        order = np.random.default_rng(self.seed + 2).permutation(len(self.real))
        return np.sort(order[part * count : (part + 1) * count])

    def real_pixels(self, rows: np.ndarray) -> np.ndarray:
        """uint8 (len(rows), H, W, 3) of some real images."""
        images = self.reference.every.take(rows)
        return images.read(0, len(images))


def _digests(images: ImageSet) -> Iterator[bytes]:
    """The hash of the pixels of every image."""
    return (hashlib.sha256(images.read(index, index + 1).tobytes()).digest() for index in range(len(images)))
