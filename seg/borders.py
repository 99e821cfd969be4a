"""The weight map that makes a network learn the gaps between touching cells (Ronneberger et al. 2015, eq. 2)."""

from __future__ import annotations

import math
from collections.abc import Collection

import numpy as np
from scipy import ndimage

from core.cli.console import progress_bar
from core.cli.errors import UserError
from core.data.mask_classes import IGNORE

NEGLIGIBLE = 1e-4  # share of w0 below which a weight may become 0


def border_weights(mask: np.ndarray, foreground: Collection[int], w0: float = 10.0, sigma: float = 5.0) -> np.ndarray:
    """w0 * exp(-(d1 + d2)^2 / (2 sigma^2)) at background pixels, d1 and d2 the distances to the two nearest cells.

    A cell is a 4-connected region of foreground pixels, whatever their classes. Distances are Euclidean, from the
    centre of the pixel to the centre of the cell's nearest pixel. Cells farther than sigma * sqrt(2 ln(1 / 1e-4)),
    about 4.3 sigma, may be left out, which changes no weight by more than 1e-4 * w0.

    Args:
        mask: uint8 (H, W) of class indices, 255 = ignore.
        foreground: the class indices that make up cells.
        w0: weight where two cells would meet, at least 0.
        sigma: width of the gaps that count, in pixels, above 0.

    Returns:
        float32 (H, W) in [0, w0) to add to the class weights: 0 at foreground and ignored pixels, and everywhere when
        there are fewer than two cells.

    Raises:
        UserError: w0 or sigma out of range.
    """
    if not w0 >= 0 or not sigma > 0:
        raise UserError(f"border weights with w0={w0} and sigma={sigma}: w0 must be at least 0 and sigma above 0")
    inside = np.isin(mask, list(foreground)) & (mask != IGNORE)
    cells, count = ndimage.label(inside)  # 4-connected by default
    if count < 2:
        return np.zeros(mask.shape, np.float32)
    weights = w0 * np.exp(-(_two_distances(cells, sigma) ** 2) / (2 * sigma**2))
    weights[inside | (mask == IGNORE)] = 0
    return weights.astype(np.float32)


def _two_distances(cells: np.ndarray, sigma: float) -> np.ndarray:
    """d1 + d2 of each pixel, infinite where the second cell is too far to matter."""
    # Where d2 alone exceeds the reach, the weight is negligible.
    reach = math.ceil(sigma * math.sqrt(-2 * math.log(NEGLIGIBLE)))
    nearest, second = np.full((2, *cells.shape), np.inf)
    for label, (rows, columns) in enumerate(ndimage.find_objects(cells), start=1):
        window = _grown(rows, reach), _grown(columns, reach)
        distance = ndimage.distance_transform_edt(cells[window] != label)
        second[window] = np.minimum(second[window], np.maximum(nearest[window], distance))
        nearest[window] = np.minimum(nearest[window], distance)
    return nearest + second


def _grown(part: slice, reach: int) -> slice:
    """A range of pixels with `reach` more on each side; slicing stops at the far edge by itself."""
    return slice(max(0, part.start - reach), part.stop + reach)


def border_map(
    masks: np.ndarray, foreground: Collection[int], w0: float = 10.0, sigma: float = 5.0, *, quiet: bool = False
) -> np.ndarray:
    """`border_weights` of many masks, uint8 (N, H, W), as float32 (N, H, W); `quiet` hides the progress bar.

    Raises:
        UserError: w0 or sigma out of range.
    """
    weights = np.zeros(masks.shape, np.float32)
    with progress_bar("masks", quiet=quiet) as bar:
        for index in bar.track(range(len(masks)), description="border weights"):
            weights[index] = border_weights(masks[index], foreground, w0, sigma)
    return weights
