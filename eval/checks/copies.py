"""The honesty checks for copies: samples that repeat each other, and samples that repeat training images."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image
from scipy.stats import betabinom, rankdata

from core.cli.text import percent
from core.data.images import make_grid
from eval.checks.verdicts import BLOCK, Check, Figures, Finding, as_many, conclude, nearest_among, thumbnails

# Two pictures are the same when their root mean square difference is at most this share of the standard deviation of
# all pixels: 15 of 74 grey levels for faces. The closest two of 1,000 faces differ by 25, noise of 5 levels by 5.
SAME_PIXELS = 0.20
# Shares of samples. CelebA holds a few photographs twice, up to one in 500 in parts of it, so that few are no fault.
TWINS_DOUBT, TWINS_BAD = 0.005, 0.01
COPIES_BAD = 0.01
# A sample is close to a training image if it is nearer than all but this share of held-out reals.
CLOSE = 0.01
CLOSE_DOUBT, CLOSE_BAD = 0.03, 0.10
RARE = 1e-4  # below this probability, a number of close samples is not taken for chance
# Probability that a sample is nearer to the training set than a held-out real; 0.5 for a perfect generator.
NEARER_DOUBT = 0.60
CERTAIN = 4.0  # standard deviations of the rank sum
SHRUNK = 0.95  # median distance relative to that of held-out reals; below, all distances have shrunk
PAIRS_SHOWN, PAIRS_A_ROW = 12, 4
NEAREST = "Samples, each with the training image nearest to it on its right, the closest first"

Nearest = tuple[np.ndarray, np.ndarray]  # distances and indices
Reader = Callable[[np.ndarray], np.ndarray]


def duplicates(pixels: np.ndarray, features: np.ndarray, real_features: np.ndarray | None = None) -> Check:
    """Whether samples are equal to other samples, or nearly so.

    Candidates are found by features and by thumbnails and decided by pixels. Features alone cannot decide, because
    invisible noise moves Inception features as much as a different face does.

    Args:
        pixels, features: uint8 (N, H, W, 3) and float (N, D) of samples.
        real_features: float (M, D) of reals, M at least N where possible, for their usual distance; or None.
    """
    count = len(pixels)
    if count < 2:
        return Check("duplicates", "skipped", "A single sample cannot be repeated.", "Score more samples.", {})
    repeats = count - len({hashlib.sha256(picture.tobytes()).digest() for picture in pixels})
    distance, nearest = nearest_among(features)
    candidates = [nearest, nearest_among(thumbnails(pixels))[1]]
    apart = np.stack([pixel_distance(pixels, pixels[others]) for others in candidates])
    twin = np.choose(apart.argmin(axis=0), candidates)
    twins = np.flatnonzero(apart.min(axis=0) <= SAME_PIXELS * _deviation(pixels))
    figures: Figures = {"samples": count, "exact_duplicates": repeats, "with_a_twin": len(twins)}
    figures |= {"share_with_a_twin": len(twins) / count, "median_distance": float(np.median(distance))}
    if real_features is not None and len(real_features) > 1:
        usual = nearest_among(as_many(real_features, count))[0]
        figures["median_distance_of_reals"] = float(np.median(usual))
    closest = twins[np.argsort(apart.min(axis=0)[twins], kind="stable")]
    pairs = dict.fromkeys((min(i, j), max(i, j)) for i, j in zip(closest, twin[closest], strict=True))  # each pair once
    shown = pairs_grid(*(pixels[list(side)] for side in zip(*pairs, strict=True))) if pairs else None
    fine = (
        f"No two of the {count:,} samples are the same.",
        "Neither exactly nor nearly: the closest ones differ as different pictures do.",
    )
    if len(twins):
        fine = (
            f"Only {len(twins):,} of the {count:,} samples look the same as another one.",
            "So few may be chance, or in the data: CelebA itself holds some photographs twice. Look at them.",
        )
    findings = _duplicate_findings(count, repeats, len(twins))
    return conclude("duplicates", findings, fine, figures, shown, "Samples beside their twins, the closest first")


def _duplicate_findings(count: int, repeats: int, twins: int) -> Iterator[Finding]:
    if repeats:
        yield Finding(
            "bad",
            f"{repeats:,} of the {count:,} samples repeat another one pixel for pixel.",
            "The same seeds were drawn twice, or files were copied to reach the number. Draw every sample with a "
            "seed of its own; the score of a set with repetitions is worth nothing.",
            "repeated",
        )
    # Exact repeats count here with their originals; more twins than those are altered copies.
    if twins > 2 * repeats and twins / count > TWINS_DOUBT:
        yield Finding(
            "bad" if twins / count >= TWINS_BAD else "doubt",
            f"{twins:,} of the {count:,} samples ({percent(twins / count)}) look the same as another one.",
            "The generator gives nearly one picture for different seeds (mode collapse), or samples were altered "
            "and added again. Look at the pairs; an earlier checkpoint may be better.",
            "repeated",
        )


def memorisation(
    pixels: np.ndarray, train_nearest: Nearest, held_out_nearest: Nearest | None, read_train: Reader
) -> Check:
    """Whether samples are nearer to training images than real images that the generator has never seen.

    The rank sum of the two sets of distances, as a z value, is the test for data copying of Meehan et al. ("A
    Non-Parametric Test to Detect Data-Copying in Generative Models", AISTATS 2020) over the whole space instead of
    cell by cell: far below 0 means copying, far above 0 means samples off the data. It misses a few copies among many
    good samples, which the share of samples nearer than 1% of held-out reals and the comparison of pixels find.

    Args:
        pixels: uint8 (N, H, W, 3) of samples.
        train_nearest: distance (N,) and index (N,) of the training image nearest to each sample in features.
        held_out_nearest: the same for held-out reals (M,), against the same training images; None if there are none.
        read_train: uint8 pixels (K, H, W, 3) of the training images with these indices (K,).
    """
    distance, index = train_nearest
    copies = _distance_from_originals(pixels, index, read_train) <= SAME_PIXELS * _deviation(pixels)
    number, share = int(copies.sum()), float(copies.mean())
    first = np.lexsort((distance, ~copies))[:PAIRS_SHOWN]
    shown = pairs_grid(pixels[first], _at_size(read_train(index[first]), pixels.shape[1:3]))
    figures: Figures = {"samples": len(distance), "copies": number, "median_distance": float(np.median(distance))}
    findings = []
    if number:
        headline = f"{number:,} of the {len(copies):,} samples ({percent(share)}) are copies of training images."
        advice = (
            "They agree pixel by pixel with their nearest training image, as it is or mirrored. A few may be honest "
            "where the data hold a picture several times; more mean that the generator has learned pictures by heart "
            "(or that training images were handed in), and the score rewards it. Train on more images, or stop earlier."
        )
        findings.append(Finding("bad" if share >= COPIES_BAD else "doubt", headline, advice, "copied"))
    if held_out_nearest is not None and len(held_out_nearest[0]) > 1:
        return _against_held_out(distance, held_out_nearest[0], findings, figures, shown)
    if findings:
        return conclude("memorisation", findings, ("", ""), figures, shown, NEAREST)
    headline = "There are no held-out real images to compare with."
    details = (
        "No sample equals its nearest training image in pixels, but how near is too near only held-out reals can tell: "
        "train on split=train of data with a split (facet prepare --valid N makes one), which keeps the rest for it."
    )
    return Check("memorisation", "skipped", headline, details, figures, shown, caption=NEAREST)


def _distance_from_originals(pixels: np.ndarray, index: np.ndarray, read_train: Reader) -> np.ndarray:
    """Distance in pixels of each sample from its training image, (N,), reading a block of images at a time."""
    apart = []
    for start in range(0, len(pixels), BLOCK):
        block = pixels[start : start + BLOCK]
        originals = _at_size(read_train(index[start : start + BLOCK]), pixels.shape[1:3])
        # A generator trained with mirrored images copies these as well.
        apart.append(np.minimum(pixel_distance(block, originals), pixel_distance(block[:, :, ::-1], originals)))
    return np.concatenate(apart)


def _against_held_out(
    distance: np.ndarray, held_out: np.ndarray, findings: list[Finding], figures: Figures, shown: np.ndarray
) -> Check:
    """The check with the distances of held-out reals, which may add a finding."""
    z, nearer = rank_sum(distance, held_out)
    close, by_chance = _close_share(distance, held_out)
    median = float(np.median(held_out))
    shrinking = float(np.median(distance) / max(median, 1e-12))
    figures |= {"held_out": len(held_out), "median_distance_of_held_out": median}
    figures |= {"nearer_than_1_percent_of_held_out": close, "probability_nearer": nearer, "z": z}
    many_close = close > CLOSE_DOUBT and by_chance < RARE
    as_a_whole = z < -CERTAIN and nearer > NEARER_DOUBT
    # Are some samples still exceptionally near after scaling all distances to the median of the held-out ones?
    rest_close, rest_chance = _close_share(distance / shrinking, held_out) if shrinking > 0 else (1.0, 0.0)
    exceptional = rest_close > CLOSE_DOUBT and rest_chance < RARE
    if (many_close or as_a_whole) and shrinking < SHRUNK and not exceptional and not findings:
        nearer_all = "All samples lie nearer to the training images than held-out reals do"
        headline = f"{nearer_all} (median {shrinking:.2f} times as far), no single pair stands out."
        advice = (
            "Copying is not the only explanation: blurred samples, or ones enlarged from half the size, lie nearer to "
            "everything because they lack detail. See what the pixel check says of sharpness, and look at the pairs: "
            "the same person in the same pose is memorised, a mere resemblance is not."
        )
        findings.append(Finding("doubt", headline, advice, "near the data"))
    elif many_close or as_a_whole:
        headline = (
            f"{percent(close)} of the samples are nearer to a training image than 1% of held-out reals are "
            f"(z = {z:.1f})."
        )
        advice = (
            "A generator that has not memorised has about 1% there and z near 0. Look at the pairs; train on more "
            "images, or use an earlier checkpoint."
        )
        findings.append(Finding("bad" if close > CLOSE_BAD else "doubt", headline, advice, "copied"))
    told, more = "about as far from the training images as", ""
    if z > CERTAIN:
        told, more = "farther from the training images than", " Farther means that they do not look like the data yet."
    fine = (
        f"No sample is a copy: {percent(close)} are nearer to a training image than 1% of held-out reals are.",
        f"As a whole they are {told} held-out reals (z = {z:.1f}; below -{CERTAIN:.0f} would mean copying).{more}",
    )
    return conclude("memorisation", findings, fine, figures, shown, NEAREST)


def rank_sum(distance: np.ndarray, held_out: np.ndarray) -> tuple[float, float]:
    """Mann-Whitney test: the z value of samples' distances, and the probability that a sample is nearer.

    z is negative when samples are nearer, and standard normal when both come from one distribution. Ties are not
    corrected for, since continuous distances have none.
    """
    n, m = len(distance), len(held_out)
    ranks = rankdata(np.concatenate([distance, held_out]))
    farther = float(ranks[:n].sum() - n * (n + 1) / 2)  # pairs in which the sample is farther; ties count half
    return (farther - n * m / 2) / float(np.sqrt(n * m * (n + m + 1) / 12)), 1 - farther / (n * m)


def _close_share(distance: np.ndarray, held_out: np.ndarray) -> tuple[float, float]:
    """Share of samples nearer than the 1% quantile of held-out reals, and the probability of so many by chance.

    How many of n values fall below the k-th smallest of m from the same distribution is beta-binomial, whatever that
    distribution. So the probability includes the uncertainty of a quantile of few held-out reals.
    """
    n, m = len(distance), len(held_out)
    kth = max(1, round(CLOSE * m))
    below = int((distance < np.sort(held_out)[kth - 1]).sum())
    return below / n, float(betabinom.sf(below - 1, n, kth, m + 1 - kth))


def pixel_distance(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Root mean square difference in grey levels, float64 (N,), of two arrays of pictures (N, H, W, 3)."""
    squares = [np.square(np.subtract(a, b, dtype=np.float32)).mean() for a, b in zip(first, second, strict=True)]
    return np.sqrt(np.array(squares, np.float64))


def _deviation(pixels: np.ndarray) -> float:
    """Standard deviation of all pixels, estimated from at most 1,000 pictures."""
    return float(pixels[:: -(-len(pixels) // 1000)].std(dtype=np.float64))


def _at_size(pixels: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    if pixels.shape[1:3] == tuple(size):
        return pixels
    resized = [Image.fromarray(one).resize((size[1], size[0]), Image.Resampling.BILINEAR) for one in pixels]
    return np.stack([np.asarray(one) for one in resized])


def pairs_grid(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """A grid of at most 12 pairs of pictures (N, H, W, 3) side by side, four pairs per row: uint8 RGBA."""
    pairs = np.concatenate([left[:PAIRS_SHOWN], right[:PAIRS_SHOWN]], axis=2)
    return make_grid(pairs, columns=min(PAIRS_A_ROW, len(pairs)), gap=4, transparent=True)
