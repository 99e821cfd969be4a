"""What a report judges by: features and pixels of the samples and of the real images, and which rows are what."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from core.cli.errors import UserError
from core.data.dataset import SPLITS, PreparedData
from core.nn.model_file import load_model
from eval.features.cache import Extractor, features_key, remembered, set_key
from eval.features.image_sets import ImageSet, Source
from eval.features.reference import RealFeatures, open_reference, random_rows
from eval.metrics.frechet import Statistics, frechet_distance
from eval.score import Score, plan_floor, score_against, spread

UNKNOWN = (
    "It is not known which images the generator was trained on, so copies are looked for among all real images, and "
    "there is nothing to compare the distances with: give the run folder of a run with split=train."
)
FOREIGN = (
    "The generator was trained on other data than these, so copies of its own training images cannot be seen here: "
    "give its data."
)


@dataclass(frozen=True)
class Comparison:
    """One way to choose the real images that samples are compared with.

    Attributes:
        name: in words.
        rows: positions in the real images, ascending.
    """

    name: str
    rows: np.ndarray


class Evidence:
    """Samples and real images, and, after `extract`, their features.

    Attributes:
        n: samples in a set.
        trained_on: rows of the real images among which copies are looked for.
        held_out: rows that the generator has certainly not seen.
        doubt: what is not known about its training, in a sentence; empty when all is known.

    Args:
        course: the course's own folder of real images, if it is at hand.

    Raises:
        UserError: source or data cannot be used.
    """

    def __init__(self, source: Source, data: Path, seed: int, course: Path | None = None) -> None:
        self.seed, self.source, self.n = seed, source, source.count
        self.reference = open_reference(data)
        self.course = None if course is None else open_reference(course)
        self.data = PreparedData.open(data) if (data / "meta.json").is_file() else None
        every = np.arange(len(self.reference.every))
        self.trained_on, self.held_out, self.doubt = every, every[:0], UNKNOWN
        self._look_up_training()

    def _look_up_training(self) -> None:
        """What a run says of its training: on which data, and on which split of them."""
        if self.source.facts["kind"] != "model" or self.data is None:
            return
        model = Path(self.source.facts["model"])
        trained = load_model(model)[1].get("data", {}).get("sha256")
        if trained not in (None, self.data.fingerprint):
            self.doubt = FOREIGN
            return
        config = model.parent / "config.yaml"
        if not config.is_file():
            return
        try:
            split = OmegaConf.select(OmegaConf.load(config), "split")
        except Exception as error:  # OmegaConf passes on the YAML parser's own exceptions
            raise UserError(f"cannot read {config}: {' '.join(str(error).split())}") from error
        if split == "all" or (split in SPLITS and self.data.split is not None):
            self.trained_on = self.data.indices(split)
            self.held_out = np.setdiff1d(np.arange(len(self.data)), self.trained_on)
            self.doubt = ""

    def extract(self, extractor: Extractor, folder: Path, many: Source | None = None) -> None:
        """Get all features, from where they are kept or by the network; every process must call it.

        Args:
            folder: where those of samples are kept; those of the real images are kept in the folder of the data.
            many: one set of samples, of which all others are the first; their features are then parts of its.
        """
        self.extractor, self.folder = extractor, folder
        self.real = RealFeatures(self.reference, extractor, folder)
        # The real images first: they take longest, and are kept should anything fail afterwards.
        self.features = self.real.of(np.arange(len(self.real)))
        if self.course is not None:
            self.course_real = RealFeatures(self.course, extractor, folder)
            self.course_real.of(self.course.rows, "course's real images")
        numbers = range(self.source.sets)
        if many is None:
            self.many = None
            self.sets = [extractor.samples(self.source, index, folder) for index in numbers]
        else:
            self.many = extractor.samples(many, 0, folder)
            self.sets = [self.many.take(np.arange(index * self.n, (index + 1) * self.n)) for index in numbers]

    def read_samples(self, most: int) -> None:
        """Read the pictures of the first `most` samples, for the checks."""
        self.images: ImageSet = self.source.open_set(0)
        self.pixels = self.images.read(0, min(most, len(self.images)))

    def comparisons(self, random: int) -> list[Comparison]:
        """All real images, the training split where there is one, and `random` real images."""
        every = np.arange(len(self.reference.every))
        ways = [Comparison("all of the data", every)]
        if self.data is not None and self.data.split is not None:
            training = np.flatnonzero(self.data.split == SPLITS.index("train"))
            if len(training) > 1:
                ways.append(Comparison("training split", training))
        if random < len(every):
            ways.append(Comparison(f"{random:,} random", random_rows(every, random, self.seed)))
        return ways

    @cached_property
    def drawn(self) -> list[Statistics]:
        """Statistics of every sample set."""
        return [kept.statistics() for kept in self.sets]

    def scores(self, random: int, floor_sets: int) -> list[dict[str, Any]]:
        """The score of the sample sets against every choice of real images; kept."""

        def usual(rows: np.ndarray) -> Callable[[], Score]:
            return lambda: score_against(self.real, rows, self.drawn, self.n, floor_sets, self.seed)

        found = [
            self._kept_score(way.name, self.real.key(way.rows), floor_sets, usual(way.rows))
            for way in self.comparisons(random)
        ]
        if self.course is not None:
            name = f"the course's {Path(self.course.facts['path']).name}/"
            key = self.course_real.key(self.course.rows)
            score = self._kept_score(name, key, floor_sets, lambda: self._course_score(floor_sets))
            found.append(score | {"course": True})
        return found

    def _kept_score(
        self, name: str, rows: dict[str, Any], floor_sets: int, compute: Callable[[], Score]
    ) -> dict[str, Any]:
        """A score as the report holds it, against the real images with this key."""
        key = self.key() | {"against": rows, "floor sets": floor_sets}
        score = Score(**remembered(self.folder, "score", key, lambda: asdict(compute())))
        return {
            "against": name,
            "count": rows["rows"]["count"],
            "n": self.n,
            "mean": score.mean,
            "sd": spread(score.values),
            "values": score.values,
            "floor": score.floor_facts(self.n, self.seed),
            "excess": score.excess,
        }

    def key(self) -> dict[str, Any]:
        """What names samples and real images together."""
        return features_key(self.extractor.features) | {
            "real": self.real.key(np.arange(len(self.real))),
            "samples": [set_key(self.source, index) for index in range(self.source.sets)],
            "seed": self.seed,
        }

    def _course_score(self, floor_sets: int) -> Score:
        """The score against the course's images; the floor is that of images of the data which are not among them."""
        statistics = self.course_real.sums(np.arange(len(self.course_real))).statistics()
        values = [frechet_distance(one, statistics) for one in self.drawn]
        plan = plan_floor(len(self.real), self.also_in_course, self.n, floor_sets, self.seed)
        if plan.inside or not plan.subsets:
            return Score(values, [], 0, None)
        floor = [frechet_distance(self.features.take(subset).statistics(), statistics) for subset in plan.subsets]
        return Score(values, floor, len(self.course_real), float(np.mean(values) - np.mean(floor)))

    @cached_property
    def also_in_course(self) -> np.ndarray:
        """Rows of the real images that the course's folder holds too, pixel for pixel."""
        if self.course is None:
            return np.arange(0)
        known = {digest for _, digest in _digests(self.course.images)}
        return np.array([row for row, digest in _digests(self.reference.every) if digest in known], np.int64)

    def real_rows(self, count: int, part: int = 0) -> np.ndarray:
        """Up to `count` random rows of the real images; different parts do not overlap."""
        order = np.random.default_rng(self.seed + 2).permutation(len(self.real))
        return np.sort(order[part * count : (part + 1) * count])

    def real_pixels(self, rows: np.ndarray) -> np.ndarray:
        """uint8 (len(rows), H, W, 3) of some real images."""
        images = self.reference.every.take(rows)
        return images.read(0, len(images))


def _digests(images: ImageSet) -> Iterator[tuple[int, bytes]]:
    """Number and hash of the pixels of every image."""
    for index in range(len(images)):
        yield index, hashlib.sha256(images.read(index, index + 1).tobytes()).digest()
