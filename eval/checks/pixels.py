"""The honesty check of pixels: mistakes in saving, wrong colours and artefacts, found by comparing with real images."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import numpy as np
from scipy.fft import dctn

from core.cli.text import percent
from core.submission.rules import implausible
from eval.checks.verdicts import Check, Figures, Finding, conclude

MOST_IMAGES = 1000  # more cost time and hardly change the statistics
MOST_CUT = 200  # for the search for JPEG blocks, the slowest part
FEWEST_IMAGES = 16  # among fewer, a single picture decides: one dark face may be half black

# A picture is grey when its channels never differ by more than rounding. One of 2,200 CelebA faces is.
GREY_RANGE = 3
GREY_DOUBT, GREY_BAD = 0.10, 0.50
# Channels are swapped when another order fits the reals this much better. For faces in BGR: 2 grey levels, not 25.
SWAPPED_GAIN = 0.5
SWAPPED_LEAST = 6.0  # grey levels; below, every order fits and the comparison means nothing
# Share of pixels at exactly 0 or 255 beyond that of the reals (faces: 1% and 1%).
CLIPPED_DOUBT, CLIPPED_BAD = 0.03, 0.12
# Distance of histograms in grey levels: 2 between sets of 1,000 faces, 8 to 10 for a good DCGAN.
COLOUR_DOUBT = 15.0
CHANCE = 3.0  # standard deviations of a set's mean brightness that chance may add to the distance
# Mean difference of neighbouring pixels in proportion to the reals': faces enlarged twofold have 0.65.
SOFT_DOUBT, NOISY_DOUBT = 0.75, 1.5
# Fine detail in JPEG's 8x8 blocks relative to blocks shifted by half, as a multiple of the reals' value: 0.4 at JPEG
# quality 95, 0.2 at 90, 0.05 at 50; 1.06 for a DCGAN, 1 for other faces. Quality 100 loses too little to be seen.
JPEG_DOUBT, JPEG_BAD = 0.65, 0.30
# Coefficients of a block that JPEG sets to zero first: the row and column numbers add up to 7 or more.
_FINE = np.add.outer(np.arange(8), np.arange(8)) >= 7
_GONE = 1.0  # a coefficient that JPEG set to zero stays below this after the rounding of pixels
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
_NAMES = "RGB"


def pixel_statistics(pixels: np.ndarray, real_pixels: np.ndarray) -> Check:
    """Whether the pixels of samples are distributed like those of reals, and if not, which mistake explains it.

    Args:
        pixels: uint8 (N, H, W, 3), RGB, of samples; 1,000 evenly spaced ones are used.
        real_pixels: uint8 (M, H', W', 3) of reals; sharpness is compared only if H', W' = H, W.
    """
    if min(len(pixels), len(real_pixels)) < FEWEST_IMAGES:
        headline = f"Too few pictures to conclude pixels by: at least {FEWEST_IMAGES} samples and reals are needed."
        return Check("pixels", "skipped", headline, "Sample more, or compare with more reals.", {})
    pixels, reals = _evenly(pixels), _evenly(real_pixels)
    shares, real_shares = _histograms(pixels), _histograms(reals)
    figures = _figures(pixels, reals, shares, real_shares)
    findings = list(_jpeg(figures))
    # One mistake changes all statistics, so only the first that explains them is reported, not its consequences.
    explanations = [_broken(pixels, reals), _grey(figures), _swapped(shares, real_shares)]
    explanations += [_clipped(figures), _colours(pixels, reals, figures)]
    findings += itertools.islice(itertools.chain.from_iterable(explanations), 1)
    if pixels.shape[1:3] == reals.shape[1:3]:
        findings += _sharpness(figures)
    means = ", ".join(
        f"{name} {figures[f'mean_{name}']:.0f} ± {figures[f'sd_{name}']:.0f} "
        f"(reals {figures[f'real_mean_{name}']:.0f} ± {figures[f'real_sd_{name}']:.0f})"
        for name in _NAMES
    )
    fine = (
        "Range, colours and sharpness are those of the real images; colours differ by "
        f"{figures['histogram_distance']:.0f} of 255 levels on average.",
        f"Mean and standard deviation: {means}. At 0: {percent(figures['zeros'])} (reals "
        f"{percent(figures['real_zeros'])}), at 255: {percent(figures['full'])} ({percent(figures['real_full'])}).",
    )
    return conclude("pixels", findings, fine, figures)


def _evenly(pixels: np.ndarray, most: int = MOST_IMAGES) -> np.ndarray:
    """At most `most` of the pictures, evenly spaced."""
    return pixels[np.linspace(0, len(pixels) - 1, min(len(pixels), most)).astype(np.int64)]


def _histograms(pixels: np.ndarray) -> np.ndarray:
    """Share of each pixel value in each channel, float64 (3, 256)."""
    channels = [pixels[..., channel].reshape(-1) for channel in range(3)]
    return np.stack([np.bincount(values, minlength=256) / values.size for values in channels])


def _apart(shares: np.ndarray, others: np.ndarray) -> float:
    """Wasserstein distance of histograms in grey levels, averaged over channels."""
    return float(np.abs(shares.cumsum(axis=1) - others.cumsum(axis=1)).sum(axis=1).mean())


def _figures(pixels: np.ndarray, reals: np.ndarray, shares: np.ndarray, real_shares: np.ndarray) -> Figures:
    histogram_distance = _apart(shares, real_shares)
    figures: Figures = {"samples": len(pixels), "reals": len(reals), "histogram_distance": histogram_distance}
    for prefix, histograms, images in (("", shares, pixels), ("real_", real_shares, reals)):
        figures[f"{prefix}zeros"] = float(histograms[:, 0].mean())
        figures[f"{prefix}full"] = float(histograms[:, 255].mean())
        figures[f"{prefix}grey"] = float((_colour_range(images) < GREY_RANGE).mean())
        # Between horizontal neighbours, in grey levels
        figures[f"{prefix}gradient"] = float(np.abs(np.diff(images[..., 1].astype(np.int16), axis=2)).mean())
        figures[f"{prefix}on_grid"] = on_grid_detail(_evenly(images, MOST_CUT))
        values = np.arange(256)
        for name, share in zip(_NAMES, histograms, strict=True):
            mean = float(share @ values)
            figures[f"{prefix}mean_{name}"] = mean
            figures[f"{prefix}sd_{name}"] = float(np.sqrt(share @ (values - mean) ** 2))
    return figures


def _colour_range(pixels: np.ndarray) -> np.ndarray:
    """The largest difference between channels within each picture, (N,)."""
    channels = [pixels[..., channel] for channel in range(3)]
    # Pairwise, because a minimum over an axis of length 3 takes twenty times as long
    widest = functools.reduce(np.maximum, channels) - functools.reduce(np.minimum, channels)
    return np.asarray(widest.max(axis=(1, 2)))


def on_grid_detail(pixels: np.ndarray) -> float:
    """Fine detail in the 8x8 blocks of JPEG relative to blocks shifted by half a block, of uint8 (N, H, W, 3).

    Counts the cosine coefficients of high frequency that are not zero. JPEG (ITU-T T.81) rounds them to zero in its own
    blocks only, so the value is far below 1 for images that were JPEG files, however sharp, and near 1 for others. It
    is 1 for pictures smaller than 16 pixels or without any detail.
    """
    if min(pixels.shape[1:3]) < 16:
        return 1.0
    luma = pixels @ _LUMA
    on, off = _detail(luma), _detail(luma[:, 4:, 4:])
    return on / off if off > 0 else 1.0


def _detail(luma: np.ndarray) -> float:
    """Share of high-frequency coefficients that are not zero, in whole 8x8 blocks from the corner of (N, H, W)."""
    rows, columns = luma.shape[1] // 8, luma.shape[2] // 8
    blocks = luma[:, : rows * 8, : columns * 8].reshape(len(luma), rows, 8, columns, 8).swapaxes(2, 3)
    coefficients = dctn(blocks, axes=(3, 4), norm="ortho")
    return float((np.abs(coefficients[..., _FINE]) >= _GONE).mean())


def _broken(pixels: np.ndarray, reals: np.ndarray) -> Iterator[Finding]:
    """Pixels that no set of faces can have, by the rules of the packer."""
    reason = implausible(pixels)
    # The rules say nothing if the data break them too: drawings or scans, for example.
    if reason is not None and implausible(reals) is None:
        yield Finding(
            "bad",
            f"The pictures are saved wrongly: {reason}.",
            "The score measures this mistake and not the generator. core.data.images.to_uint8 is the right conversion "
            "from [-1, 1]; images that `gen.sample` writes have it.",
            "saved wrongly",
        )


def _grey(figures: Figures) -> Iterator[Finding]:
    excess = figures["grey"] - figures["real_grey"]
    if excess >= GREY_DOUBT:
        yield Finding(
            "bad" if excess > GREY_BAD else "doubt",
            f"{percent(figures['grey'])} of the samples are grey (reals: {percent(figures['real_grey'])}).",
            "All three channels are equal: one channel was written three times, or the generator has lost its colours.",
            "grey",
        )


def _swapped(shares: np.ndarray, real_shares: np.ndarray) -> Iterator[Finding]:
    as_is = _apart(shares, real_shares)
    orders = list(itertools.permutations(range(3)))[1:]
    best, order = min((_apart(shares[list(order)], real_shares), order) for order in orders)
    if as_is >= SWAPPED_LEAST and best <= SWAPPED_GAIN * as_is:
        name = "".join(_NAMES[order.index(channel)] for channel in range(3))
        yield Finding(
            "bad",
            f"The channels are swapped: read as {name}, the colours differ from the real images' by {best:.0f} of 255 "
            f"levels on average, as RGB by {as_is:.0f}.",
            "OpenCV reads and writes BGR: convert with pixels[..., ::-1] before saving with Pillow.",
            "channels swapped",
        )


def _clipped(figures: Figures) -> Iterator[Finding]:
    excess = max(figures["zeros"] - figures["real_zeros"], figures["full"] - figures["real_full"])
    if excess >= CLIPPED_DOUBT:
        yield Finding(
            "bad" if excess > CLIPPED_BAD else "doubt",
            f"Pixels are clipped: {percent(figures['zeros'])} at 0 and {percent(figures['full'])} at 255 (reals: "
            f"{percent(figures['real_zeros'])} and {percent(figures['real_full'])}).",
            "Values outside the range were cut off: the generator saturates, or pixels were scaled by too much, such "
            "as normalised with other numbers than 0.5 and 0.5.",
            "clipped",
        )


def _colours(pixels: np.ndarray, reals: np.ndarray, figures: Figures) -> Iterator[Finding]:
    # Small sets differ by chance, as much as the brightness of pictures does.
    spread = float(reals.mean(axis=(1, 2, 3)).std())
    limit = COLOUR_DOUBT + CHANCE * spread * np.sqrt(1 / len(pixels) + 1 / len(reals))
    if figures["histogram_distance"] > limit:
        shifts = ", ".join(f"{name} {figures[f'mean_{name}'] - figures[f'real_mean_{name}']:+.0f}" for name in _NAMES)
        contrast = np.mean([figures[f"sd_{name}"] / max(figures[f"real_sd_{name}"], 1e-9) for name in _NAMES])
        yield Finding(
            "doubt",
            f"Colours differ from the data by {figures['histogram_distance']:.0f} of 255 levels on average.",
            f"The channels are shifted by {shifts} and have {contrast:.2f} times the contrast. Either the generator "
            "has not learned the colours yet, or samples and data went through different conversions.",
            "colours off",
        )


def _sharpness(figures: Figures) -> Iterator[Finding]:
    ratio = figures["gradient"] / max(figures["real_gradient"], 1e-9)
    if not SOFT_DOUBT <= ratio <= NOISY_DOUBT:
        how, fault = "rougher", "rough"
        advice = "They are noisy, or have a pattern of the upsampling: look at one of them enlarged."
        if ratio < SOFT_DOUBT:
            how, fault, advice = "softer", "soft", "They are blurred, or were enlarged from a smaller size."
        headline = f"The samples are {how} than the reals: neighbouring pixels differ {ratio:.2f} times as much."
        yield Finding("doubt", headline, advice, fault)


def _jpeg(figures: Figures) -> Iterator[Finding]:
    on_grid, real = figures["on_grid"], figures["real_on_grid"]
    if on_grid < JPEG_DOUBT * real:
        yield Finding(
            "bad" if on_grid < JPEG_BAD * real else "doubt",
            f"The samples were JPEG files: detail in 8x8 blocks is {percent(on_grid)} of what it is between them.",
            "Compression adds blocks and takes away detail, and the score counts both; saving as PNG afterwards does "
            "not bring it back. Save PNG from the start.",
            "JPEG",
        )
    elif real < JPEG_DOUBT and on_grid > real / JPEG_DOUBT:
        yield Finding(
            "doubt",
            f"The reals were JPEG files at this very size: detail in 8x8 blocks is {percent(real)} of what it is "
            "between them.",
            "They have artefacts that good samples lack, and the score counts that. Prepare the data from the "
            "originals, which are shrunk after decoding.",
            "JPEG reals",
        )
