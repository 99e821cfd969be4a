"""The measures of a report beside its score: one row in `MEASURES` each, for report.json and the page.

To add one, write its metric in eval/metrics and give it a row here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from core.cli.console import progress_bar
from eval.checks.evidence import Evidence
from eval.features.cache import remembered
from eval.metrics.kid import kid_of_subsets
from eval.metrics.prdc import Prdc, prdc

KID_IMAGES = 10_000  # images of each side that KID's subsets are drawn from
KID_SIZE = 1000  # images of a subset (Binkowski et al. 2018)
PRDC_IMAGES = 5_000
NEIGHBOURS = 5  # k of precision, recall, density and coverage


@dataclass(frozen=True)
class Figure:
    """A number of a measure as the page shows it.

    Attributes:
        key: its name in the measure's part of report.json.
        better: which values are better, as in "lower".
        meaning: a sentence or two, which may quote numbers of the measure as `{name}`.
        label: its name on the page; empty for `key`.
        elsewhere: its name where the features are not Inception's; empty for the same.
        sd: name of its standard deviation in report.json, if it has one.
    """

    key: str
    better: str
    meaning: str
    label: str = ""
    sd: str = ""
    elsewhere: str = ""


@dataclass(frozen=True)
class Measure:
    """A measure of samples.

    Attributes:
        key: its name in report.json.
        compute: from features, and the number of subsets for measures that average over random ones: JSON-ready
            numbers, or None where there are too few images.
        figures: the numbers that the page shows.
        note: how they were measured, for the page; may quote numbers as `{name}`.
    """

    key: str
    compute: Callable[[Evidence, int], dict[str, Any] | None]
    figures: tuple[Figure, ...]
    note: str = ""


def measure_kid(evidence: Evidence, subsets: int) -> dict[str, Any]:
    """KID over all sample sets, at most 10,000 images; kept on disk.

    A subset holds at most half of the smaller side, since subsets of nearly all images would show no spread.
    """
    sets = evidence.samples.sets
    each = min(evidence.n, KID_IMAGES // sets + 1)
    reals = evidence.real_rows(min(KID_IMAGES, len(evidence.real)))
    size = max(2, min(KID_SIZE, each * sets // 2, len(reals) // 2))
    key = evidence.key() | {"subsets": subsets, "size": size, "reals": len(reals), "of a set": each}

    def compute() -> dict[str, Any]:
        generated = np.concatenate([drawn[:each] for drawn in evidence.sets])
        with progress_bar("subsets") as bar:
            track = partial(bar.track, description="KID")
            return asdict(kid_of_subsets(evidence.features[reals], generated, subsets, size, evidence.seed, track))

    return remembered(evidence.folder, "kid", key, compute) | {"subset_size": size}


def prdc_and_floor(evidence: Evidence) -> tuple[Prdc, Prdc] | None:
    """Precision, recall, density and coverage of the first sample set, and of real images in its place; kept on disk.

    Both at one number of images, at most half of the real ones; None where these are too few.
    """
    count = min(evidence.n, len(evidence.real) // 2, PRDC_IMAGES)
    if count <= NEIGHBOURS:
        return None

    def compute() -> dict[str, Any]:
        real, others = (evidence.features[evidence.real_rows(count, part)] for part in (0, 1))
        drawn = evidence.sets[0][:count]
        return {name: asdict(prdc(real, one, NEIGHBOURS)) for name, one in (("samples", drawn), ("reals", others))}

    found = remembered(evidence.folder, "manifold", evidence.key() | {"count": count, "k": NEIGHBOURS}, compute)
    return Prdc(**found["samples"]), Prdc(**found["reals"])


def measure_prdc(evidence: Evidence, subsets: int) -> dict[str, Any] | None:
    """Precision, recall, density and coverage of the first sample set."""
    found = prdc_and_floor(evidence)
    return None if found is None else asdict(found[0])


KID = Figure(
    "mean",
    "lower",
    "Another distance, without FID's bias: 0 for a perfect generator at any number. Mean and spread of {subsets:,} "
    "subsets of {subset_size:,}.",
    label="KID",
    sd="sd",
    elsewhere="Kernel distance",
)
PRDC = (
    Figure("precision", "higher", "Share of the samples that lie where real images lie. Low: many samples look wrong."),
    Figure("recall", "higher", "Share of the real images that lie where samples lie. Low: kinds of faces are missing."),
    Figure("density", "nearer 1", "How densely real images surround the samples; above 1 if they are too typical."),
    Figure("coverage", "higher", "Share of the real images with a sample close by. Low: samples repeat a few faces."),
)
PRDC_NOTE = (
    "Precision to coverage: a ball around each image reaches its neighbour number {k}; {real:,} real images, "
    "{generated:,} samples."
)
MEASURES = (
    Measure("kid", measure_kid, (KID,)),
    Measure("manifold", measure_prdc, PRDC, PRDC_NOTE),
)
