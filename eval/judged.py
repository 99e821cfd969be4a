"""Generators whose discriminator looked through a pretrained network, and what that does to scores.

FID rests on a network trained on ImageNet. A generator that learned to please such a network may have a better FID than
its pictures deserve (Kynkäänniemi et al. 2023, "The Role of ImageNet Classes in Fréchet Inception Distance"). So a
report on it shows distances on other features beside its score.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from core.nn.backbone import DEFAULT
from core.training.distributed import Ranks
from eval.distances import plan_floor, score_against
from eval.features.cache import Extractor, KeptFeatures
from eval.features.extractors import Features, make_features
from eval.features.image_sets import Samples
from eval.features.reference import RealFeatures, random_rows
from eval.features.settings import TIMM, InceptionSection, network_of
from eval.measures import NEIGHBOURS
from eval.metrics.prdc import prdc


def judge_of(samples: Samples) -> dict[str, Any] | None:
    """`network` and `sha256` of what the discriminator of a model looked through; None if unknown or nothing."""
    judge = samples.facts.get("judged_by")
    return judge if isinstance(judge, dict) and isinstance(judge.get("network"), str) else None


def name_of(judge: dict[str, Any]) -> str:
    """The network in words."""
    return network_of("fd_efficientnet") if _plain(judge["network"]) == DEFAULT else str(judge["network"])


def is_same(judge: dict[str, Any], features: Features) -> bool:
    """Whether a distance on these features looks through the very network that the discriminator did."""
    own = DEFAULT if features.name == "efficientnet" else features.name
    return _plain(own) == _plain(judge["network"])


def _plain(name: str) -> str:
    """A network's name without that of its weights."""
    return name.partition(".")[0]


def flattery(samples: Samples, features: Features) -> str | None:
    """A warning if a distance on these features flatters the generator of the samples."""
    judge = judge_of(samples)
    if judge is None or features.name == "random":
        return None
    if is_same(judge, features):
        return (
            f"the score looks through {name_of(judge)}, the very network that the generator was trained against: it "
            "flatters the generator and does not rank it among others"
        )
    return (
        f"the generator was trained against {name_of(judge)}, and pretrained networks see alike: the score flatters it "
        "beside generators that were not"
    )


class OtherViews:
    """Samples and some real images in the features of networks that the generator was not trained against.

    These are the random network, which needs no file, and Inception where its weights were given but do not make the
    score.

    Args:
        samples: of a generator; the first set is looked at.
        features, inception: settings of the score.
        count: random real images to compare with.
    """

    def __init__(
        self, samples: Samples, features: str, inception: InceptionSection, count: int, device: str, ranks: Ranks
    ) -> None:
        given = inception.weights is not None and not features.startswith(("inception", TIMM))
        names = ["inception"] * given + ["random"] * (features != "random")
        self.samples, self.count, self.ranks = samples, count, ranks
        self.features = [make_features(name, inception, device, ranks) for name in names]

    def extract(self, own: RealFeatures, drawn: KeptFeatures, batch_size: int | None, folder: Path, seed: int) -> None:
        """Load or extract features; every process must call it.

        Args:
            own, drawn: real images and samples in the features of the score.
            folder: keeps the features of samples.
        """
        self.seed, self.views = seed, [(own, drawn)]
        self.rows = random_rows(np.arange(len(own)), min(self.count, len(own)), seed)
        self.plan = plan_floor(len(own), self.rows, self.samples.count, 1, seed)
        for features in self.features:
            extractor = Extractor(features, batch_size, self.ranks)
            real = RealFeatures(own.reference, extractor, folder)
            for part in (self.rows, *self.plan.subsets):
                real.of(part, f"real images, {features.name}")
            self.views.append((real, extractor.samples(self.samples, 0, folder)))

    def table(self, judge: dict[str, Any]) -> list[dict[str, Any]]:
        """Distance and recall of the samples, and of real images in their place; first on the features of the score."""
        return [self._row(real, drawn, judge) for real, drawn in self.views]

    def _row(self, real: RealFeatures, drawn: KeptFeatures, judge: dict[str, Any]) -> dict[str, Any]:
        features, count = real.extractor.features, self.samples.count
        score = score_against(real, self.rows, [drawn.statistics()], count, 1, self.seed)
        row = {"metric": features.metric, "network": network_of(features.metric), "same": is_same(judge, features)}
        row |= {"value": score.mean, "floor": score.floor[0] if score.floor else None}
        most = min(count, len(self.rows))
        sides = {"recall": drawn}
        if self.plan.subsets and not self.plan.inside:
            sides["recall_of_reals"] = real.of(self.plan.subsets[0])
        reals = real.of(self.rows)[:most]
        if most <= NEIGHBOURS:
            sides = {}
        recalls = {name: prdc(reals, side[:most], NEIGHBOURS).recall for name, side in sides.items()}
        return row | {"recall": None, "recall_of_reals": None} | recalls
