"""Honesty checks: what a score alone does not show. Here, what they share, and mode collapse and sample size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch.nn import functional

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
DENSEST_SHOWN = 16  # pictures of the most repeated mode
BLOCK = 500  # rows of a distance matrix in memory at once: 200 MB for 50,000 samples
# What low coverage means without and with repeated samples.
FEW = (
    "The samples differ from one another, so either kinds of faces are missing or the samples lie off the data "
    "altogether: low precision and density say the latter.",
    "Together with the repetitions this is mode collapse: whole kinds of faces are missing.",
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
        pictures: RGB uint8 (H, W, 3) that illustrate it, or None.
    """

    name: str
    verdict: Verdict
    headline: str
    details: str
    figures: Figures
    pictures: np.ndarray | None = None


class Finding(NamedTuple):
    """A problem: how bad, what (one sentence), what it means and what to do (a few sentences)."""

    verdict: Verdict
    headline: str
    advice: str


def conclude(
    name: str, found: Iterable[Finding], fine: tuple[str, str], figures: Figures, pictures: np.ndarray | None = None
) -> Check:
    """A check from its findings: the gravest gives verdict and headline, all of them the details; `fine` if none."""
    findings = sorted(found, key=lambda finding: -_GRAVITY.index(finding.verdict))
    if not findings:
        return Check(name, "ok", *fine, figures, pictures)
    first, *others = findings
    details = " ".join([first.advice, *(f"{finding.headline} {finding.advice}" for finding in others)])
    return Check(name, first.verdict, first.headline, details, figures, pictures)


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


def percent(share: float) -> str:
    """A share as text with two significant digits, never 0% for something that occurs."""
    return f"{100 * share:.0f}%" if share >= 0.0995 or share == 0 else f"{100 * share:.2g}%"


def mode_collapse(
    features: np.ndarray,
    real_features: np.ndarray,
    pixels: np.ndarray,
    real_pixels: np.ndarray,
    coverage: float | None = None,
    floor_coverage: float | None = None,
) -> Check:
    """Whether the samples leave out parts of the data or repeat a few modes.

    Two pictures count as the same mode when they are nearer, both in features and in thumbnails, than half of all reals
    are to their nearest neighbour. Either alone misleads: smooth pictures are near in features whatever they show, and
    a shared background alone makes pixels agree. The effective number of samples weights each sample by
    1 / (samples of its mode). Both figures are compared with those of as many reals.

    Args:
        features, real_features: float (N, D) of samples and (M, D) of reals, M at least N where possible.
        pixels, real_pixels: uint8 (N, H, W, 3) and (M, H', W', 3) of the same.
        coverage, floor_coverage: of the reals by the samples (Naeem et al. 2020) and by as many other reals, if known.
    """
    # Equal numbers of both, with the distances between reals as the yardstick
    count = min(len(features), len(real_features))
    if count < FEWEST:
        headline = f"Too few images to tell modes apart: at least {FEWEST} samples and reals are needed."
        return Check("mode collapse", "skipped", headline, "Score more samples.", {"samples": count})
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
    shown = None
    if findings:  # the sample at the centre of the densest mode, and those nearest to it
        apart = np.square(np.asarray(spaces[0], np.float64) - spaces[0][neighbours.argmax()]).sum(axis=1)
        shown = make_grid(pixels[chosen[np.argsort(apart, kind="stable")[:DENSEST_SHOWN]]])
    covered = ""
    if coverage is not None and floor_coverage:
        figures |= {"coverage": coverage, "coverage_of_other_reals": floor_coverage}
        if (ratio := coverage / floor_coverage) < COVERAGE_DOUBT:
            headline = (
                f"Only {percent(coverage)} of the real images have a sample near them (of as many other reals: "
                f"{percent(floor_coverage)})."
            )
            findings.append(Finding("bad" if ratio < COVERAGE_BAD else "doubt", headline, FEW[bool(findings)]))
        covered = f" They cover {percent(coverage)} of the data's neighbourhoods."
    headline = f"The samples are about as varied as {count:,} real images."
    worth = f"they are worth {distinct:,.0f} different pictures (reals: {real_distinct:,.0f}).{covered}"
    return conclude("mode collapse", findings, (headline, f"Counted by neighbourhoods, {worth}"), figures, shown)


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
        )
    if ratio < DISTINCT_DOUBT:
        yield Finding(
            "bad" if ratio < DISTINCT_BAD else "doubt",
            f"The samples are worth only {distinct:,.0f} different pictures, as many reals {real_distinct:,.0f}.",
            "They crowd together: few modes, or pictures so blurred that they resemble one another. Look at the "
            "grid of samples; sampling with less truncation or training longer gives more variety.",
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
    findings = list(_size_findings(reference_count, dims, sizes, lossy))
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


def _size_findings(count: int, dims: int, sizes: tuple[Size, Size], lossy: tuple[int, int]) -> Iterator[Finding]:
    (height, width), (real_height, real_width) = sizes
    if sizes[0] != sizes[1]:
        yield Finding(
            "bad",
            f"The samples are {width}x{height} pixels, the reals {real_width}x{real_height}.",
            "Inception sees both at 299x299, so the difference in sharpness counts as a difference in content. Sample "
            "at the size of the data, or prepare the data at the size of the samples.",
        )
    if lossy[0]:
        yield Finding(
            "bad",
            f"{lossy[0]:,} of the scored files are JPEG or WebP.",
            "Lossy files score differently from the pictures they were made of: save PNG.",
        )
    if lossy[1]:
        yield Finding(
            "doubt",
            f"{lossy[1]:,} of the real files are JPEG or WebP.",
            "Samples saved as PNG then lack artefacts that the reals have: prepare the data set from its originals, "
            "which are shrunk after decoding.",
        )
    if count <= dims:
        yield Finding(
            "doubt",
            f"The {count:,} real images are fewer than the {dims:,} dimensions.",
            "Their covariance is singular: there is a distance, but it depends strongly on which reals were taken. "
            "Take all of the data as the reference.",
        )
