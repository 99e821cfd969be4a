"""Honesty checks: what a score alone does not show. Here, what they share, and mode collapse and sample size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch.nn import functional

from core.cli.text import percent
from core.data.images import make_grid

Size = tuple[int, int]
Figures = dict[str, float | int]
Verdict = Literal["ok", "doubt", "bad", "skipped"]
_GRAVITY: tuple[Verdict, ...] = ("ok", "doubt", "bad")

# Coverage as a share of that of other reals. A sampler that misses a third of the data's neighbourhoods stays below
# 0.7, one that knows only a few faces below 0.3.
COVERAGE_DOUBT, COVERAGE_BAD = 0.7, 0.3
# Share of samples around a single one, beyond that of reals: 1% to 3% around the densest of 300 faces, 3% for a DCGAN.
DENSE_DOUBT, DENSE_BAD = 0.05, 0.20
# Effective number of different samples as a share of that of as many reals: 0.87 for a good DCGAN.
DISTINCT_DOUBT, DISTINCT_BAD = 0.4, 0.15
FEWEST = 100  # samples; among fewer, a handful that look alike by chance is a large share
USUAL = 1_000  # samples that the course scores; with fewer, the bias of the distance is larger than readers know it
DENSEST_SHOWN = 16  # pictures of the most repeated mode
BLOCK = 500  # rows of a distance matrix in memory at once: 200 MB for 50,000 samples
PRECISE = 0.5  # precision as a share of that of other reals; below, samples lie off the data
UNLEARNED = (
    "This is no collapse: the generator has not learned enough yet. Train longer, or with another recipe; the score "
    "says how far it is."
)
# What low coverage means where samples do not lie off the data, without and with repetitions.
FEW = (
    "The samples differ from one another and look like the data, but leave out whole kinds of it: the generator has "
    "dropped modes. Larger batches and more data help; an earlier checkpoint may have more.",
    "Together with the repetitions this is mode collapse: whole kinds of pictures are missing.",
)


@dataclass(frozen=True)
class Check:
    """The outcome of one check.

    Attributes:
        name: short name, the key in reports.
        verdict: `ok`, `doubt` (look at it before relying on the score), `bad` (the score misleads) or `skipped`.
        headline: the result, one sentence.
        details: what it means and what to do, a few sentences.
        figures: the numbers behind it.
        pictures: uint8 (H, W, 3), or (H, W, 4) with transparent gaps, that illustrate it; or None.
        fault: what a doubt or a bad verdict is about, in a word or two, such as `collapsed`.
        caption: what the pictures show.
    """

    name: str
    verdict: Verdict
    headline: str
    details: str
    figures: Figures
    pictures: np.ndarray | None = None
    fault: str = ""
    caption: str = ""

    @property
    def judgement(self) -> str:
        """The verdict, with what it is about: `bad: collapsed`."""
        return f"{self.verdict}: {self.fault}" if self.fault else self.verdict


class Finding(NamedTuple):
    """A problem: how bad, what (one sentence), what it means and what to do (a few sentences), and its name."""

    verdict: Verdict
    headline: str
    advice: str
    fault: str


class Manifold(NamedTuple):
    """Precision and coverage (Naeem et al. 2020), each of the samples and of as many other reals.

    `network` names what the features are of: other features give other values.
    """

    precision: tuple[float, float]
    coverage: tuple[float, float]
    network: str


def conclude(
    name: str,
    found: Iterable[Finding],
    fine: tuple[str, str],
    figures: Figures,
    pictures: np.ndarray | None = None,
    caption: str = "",
) -> Check:
    """A check from its findings: the gravest gives verdict, headline and name, all the details; `fine` if none."""
    findings = sorted(found, key=lambda finding: -_GRAVITY.index(finding.verdict))
    if not findings:
        return Check(name, "ok", *fine, figures, pictures, caption=caption)
    first, *others = findings
    details = " ".join([first.advice, *(f"{finding.headline} {finding.advice}" for finding in others)])
    return Check(name, first.verdict, first.headline, details, figures, pictures, first.fault, caption)


def distances_among(features: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Distances (rows, N) between features (N, D), block by block, each with the index of its first row.

    The distance of a vector from itself is infinite, since it is not its own neighbour.
    """
    # Centred and in float64, because the product form loses small distances between long vectors
    points = np.asarray(features, np.float64)
    points = points - points.mean(axis=0)
    squares = (points**2).sum(axis=1)
    for start in range(0, len(points), BLOCK):
        rows = slice(start, start + BLOCK)
        squared = squares[rows, None] + squares - 2 * points[rows] @ points.T
        squared[np.arange(len(squared)), start + np.arange(len(squared))] = np.inf
        yield start, np.sqrt(squared.clip(min=0))


def nearest_among(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distance float64 (N,) and index int64 (N,) of the nearest other vector for features (N, D), N at least 2."""
    distance, index = np.empty(len(features)), np.empty(len(features), np.int64)
    for start, block in distances_among(features):
        nearest = block.argmin(axis=1)
        index[start : start + len(block)] = nearest
        distance[start : start + len(block)] = block[np.arange(len(block)), nearest]
    return distance, index


def as_many(features: np.ndarray, count: int) -> np.ndarray:
    """`count` random vectors, the same at every call; all if there are no more.

    Distances to nearest neighbours fall with the number of vectors, so sets are compared at equal numbers.
    """
    if len(features) <= count:
        return features
    return features[np.sort(np.random.default_rng(0).choice(len(features), count, replace=False))]


def mode_collapse(
    features: np.ndarray,
    real_features: np.ndarray,
    pixels: np.ndarray,
    real_pixels: np.ndarray,
    manifold: Manifold | None = None,
    unlearned: str = "",
) -> Check:
    """Whether the samples leave out parts of the data or repeat a few modes, and if so, whether that is a collapse.

    A generator that has hardly been trained repeats itself, too, and covers nothing. Its pixels give it away, or, where
    nothing is repeated, its precision.

    Two pictures count as the same mode when they are nearer, both in features and in thumbnails, than half of all reals
    are to their nearest neighbour. Either alone misleads: smooth pictures are near in features whatever they show, and
    a shared background alone makes pixels agree. The effective number of samples weights each sample by
    1 / (samples of its mode). Both figures are compared with those of as many reals.

    Args:
        features, real_features: float (N, D) of samples and (M, D) of reals, M at least N where possible.
        pixels, real_pixels: uint8 (N, H, W, 3) and (M, H', W', 3) of the same.
        manifold: what precision and coverage are, if known.
        unlearned: what the pixels say against the samples being pictures yet, a sentence; empty if nothing.
    """
    # Equal numbers of both, with the distances between reals as the yardstick
    count = min(len(features), len(real_features))
    if count < FEWEST:
        headline = f"Too few images to tell modes apart: at least {FEWEST} samples and reals are needed."
        return Check("variety", "skipped", headline, "Score more samples.", {"samples": count})
    chosen, reals = (as_many(np.arange(len(one)), count) for one in (features, real_features))
    spaces = (features[chosen], thumbnails(pixels[chosen]))
    real_spaces = (real_features[reals], thumbnails(real_pixels[reals]))
    radii = tuple(float(np.median(nearest_among(space)[0])) for space in real_spaces)
    neighbours, real_neighbours = _neighbours(spaces, radii), _neighbours(real_spaces, radii)
    dense, real_dense = float(neighbours.max() / count), float(real_neighbours.max() / count)
    distinct, real_distinct = float((1 / neighbours).sum()), float((1 / real_neighbours).sum())
    figures: Figures = {"samples": count, "densest_share": dense, "densest_share_of_reals": real_dense}
    figures |= {"effective_number": distinct, "effective_number_of_reals": real_distinct}
    findings = list(_repetition(dense, real_dense, distinct, real_distinct))
    repeated, shown = bool(findings), None
    if findings:  # the sample at the centre of the densest mode, and those nearest to it
        apart = np.square(np.asarray(spaces[0], np.float64) - spaces[0][neighbours.argmax()]).sum(axis=1)
        shown = make_grid(pixels[chosen[np.argsort(apart, kind="stable")[:DENSEST_SHOWN]]], transparent=True)
    covered = ""
    if manifold is not None:
        figures |= {"coverage": manifold.coverage[0], "coverage_of_other_reals": manifold.coverage[1]}
        findings += _low_coverage(manifold, repeated)
        covered = f" They cover {percent(manifold.coverage[0])} of the data's neighbourhoods ({manifold.network})."
    if unlearned and findings:  # which explains them
        gravest = max((finding.verdict for finding in findings), key=_GRAVITY.index)
        findings = [Finding(gravest, unlearned, UNLEARNED, "undertrained")]
    headline = f"The samples are about as varied as {count:,} real images."
    worth = f"they are worth {distinct:,.0f} different pictures (reals: {real_distinct:,.0f}).{covered}"
    fine = (headline, f"Counted by neighbourhoods, {worth}")
    caption = "The samples around the one that is repeated most"
    return conclude("variety", findings, fine, figures, shown, caption)


def _low_coverage(manifold: Manifold, repeated: bool) -> Iterator[Finding]:
    (coverage, usual), (precision, usual_precision) = manifold.coverage, manifold.precision
    ratio = coverage / usual if usual else 1.0
    if ratio >= COVERAGE_DOUBT:
        return
    headline = (
        f"The samples lie near {f'only {percent(coverage)}' if coverage else 'none'} of the real images, as "
        f"{manifold.network} sees them; as many other real images lie near {percent(usual)}."
    )
    advice, fault = FEW[repeated], "collapsed" if repeated else "few kinds"
    if not repeated and precision < PRECISE * usual_precision:
        few = f"Only {percent(precision)}" if precision else "None"
        off = f"{few} of the samples lie where real images do, and {percent(usual_precision)} of other real images."
        advice, fault = f"{off} {UNLEARNED}", "undertrained"
    yield Finding("bad" if ratio < COVERAGE_BAD else "doubt", headline, advice, fault)


def thumbnails(pixels: np.ndarray) -> np.ndarray:
    """Pictures (N, H, W, 3) as 8x8 averages, float64 (N, 192), without detail and noise."""
    blocks = [torch.from_numpy(pixels[start : start + BLOCK]) for start in range(0, len(pixels), BLOCK)]
    small = [functional.adaptive_avg_pool2d(block.permute(0, 3, 1, 2).float(), 8).flatten(1) for block in blocks]
    return np.asarray(torch.cat(small).double().numpy())


def _neighbours(spaces: tuple[np.ndarray, ...], radii: tuple[float, ...]) -> np.ndarray:
    """How many pictures lie within the radius of each picture in every space, itself included."""
    counts = []
    for blocks in zip(*(distances_among(space) for space in spaces), strict=True):
        # <=, so that repetitions count where all reals are repeated and the radius is 0
        within = [block <= radius for (_, block), radius in zip(blocks, radii, strict=True)]
        counts.append(np.logical_and.reduce(within).sum(axis=1))
    return np.concatenate(counts) + 1


def _repetition(dense: float, real_dense: float, distinct: float, real_distinct: float) -> Iterator[Finding]:
    excess, ratio = dense - real_dense, distinct / real_distinct
    if excess > DENSE_DOUBT:
        yield Finding(
            "bad" if excess > DENSE_BAD else "doubt",
            f"One mode is repeated: {percent(dense)} of the samples lie around a single one "
            f"({percent(real_dense)} among reals).",
            "The generator draws nearly the same picture from many seeds. Use an earlier checkpoint; a smaller "
            "learning rate of the discriminator or a gradient penalty keeps it from happening.",
            "collapsed" if excess > DENSE_BAD else "repetitive",
        )
    if ratio < DISTINCT_DOUBT:
        yield Finding(
            "bad" if ratio < DISTINCT_BAD else "doubt",
            f"The samples are worth only {distinct:,.0f} different pictures, as many reals {real_distinct:,.0f}.",
            "They crowd together: few modes, or pictures so blurred that they resemble one another. Look at the "
            "grid of samples; sampling with less truncation or training longer gives more variety.",
            "collapsed" if ratio < DISTINCT_BAD else "repetitive",
        )


def sample_size(
    count: int, reference_count: int, dims: int, sizes: tuple[Size, Size], lossy: tuple[int, int] = (0, 0)
) -> Check:
    """What the numbers and file formats of images mean for the score.

    Args:
        count, reference_count: images in a sample set, and real images they are compared with.
        dims: dimensions of the features.
        sizes: (height, width) of samples and of reals.
        lossy: JPEG or WebP files among samples and among reals.
    """
    findings = list(_size_findings(count, reference_count, dims, sizes, lossy))
    told = (
        f"Few images bias the distance upward: {count:,} perfect samples would not score 0 but about the floor of "
        "other reals. Compare only scores at the same number of samples and of reals, and read the excess over the "
        "floor."
    )
    if min(count, reference_count) <= dims:
        told += f" With no more images than the {dims:,} dimensions this bias is large."
    fine = (f"{count:,} samples against {reference_count:,} real images: compare with scores at these numbers.", told)
    check = conclude("sample size", findings, fine, {"count": count, "reference": reference_count, "dims": dims})
    return replace(check, details=f"{check.details} {told}") if findings else check


def _size_findings(
    count: int, reference_count: int, dims: int, sizes: tuple[Size, Size], lossy: tuple[int, int]
) -> Iterator[Finding]:
    (height, width), (real_height, real_width) = sizes
    if sizes[0] != sizes[1]:
        yield Finding(
            "bad",
            f"The samples are {width}x{height} pixels, the reals {real_width}x{real_height}.",
            "Inception sees both at 299x299, so the difference in sharpness counts as a difference in content. Sample "
            "at the size of the data, or prepare the data at the size of the samples.",
            "other size",
        )
    if lossy[0]:
        yield Finding(
            "bad",
            f"{lossy[0]:,} of the scored files are JPEG or WebP.",
            "Lossy files score differently from the pictures they were made of: save PNG.",
            "lossy files",
        )
    if lossy[1]:
        yield Finding(
            "doubt",
            f"{lossy[1]:,} of the real files are JPEG or WebP.",
            "Samples saved as PNG then lack artefacts that the reals have: prepare the data set from its originals, "
            "which are shrunk after decoding.",
            "lossy reals",
        )
    if count < min(dims, USUAL):
        yield Finding(
            "doubt",
            f"{count:,} samples are few for {dims:,} dimensions.",
            f"Score {USUAL:,}, as is usual: the distance of fewer is further from that of many.",
            "few samples",
        )
    if reference_count <= dims:
        yield Finding(
            "doubt",
            f"The {reference_count:,} real images are no more than the {dims:,} dimensions.",
            "Their covariance is singular: there is a distance, but it depends strongly on which reals were taken. "
            "Take all of the data as the reference.",
            "few reals",
        )
