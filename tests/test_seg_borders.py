"""Border weights against a slow direct computation, closed forms and symmetry."""

from __future__ import annotations

import math
from collections import deque

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.cli.errors import UserError
from seg.borders import NEGLIGIBLE, border_map, border_weights


def cells_of(inside: np.ndarray) -> list[np.ndarray]:
    """Coordinates (n, 2) of every 4-connected region, by flooding."""
    left = {(int(row), int(column)) for row, column in np.argwhere(inside)}
    cells = []
    while left:
        queue, cell = deque([left.pop()]), []
        while queue:
            row, column = queue.popleft()
            cell.append((row, column))
            for neighbour in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
                if neighbour in left:
                    left.remove(neighbour)
                    queue.append(neighbour)
        cells.append(np.array(cell))
    return cells


def directly(mask: np.ndarray, foreground: list[int], w0: float, sigma: float) -> np.ndarray:
    """The equation with every distance to every pixel of every cell."""
    inside = np.isin(mask, foreground)
    cells = cells_of(inside)
    weights = np.zeros(mask.shape)
    if len(cells) < 2:
        return weights
    for place in np.argwhere(~inside & (mask != 255)):
        d1, d2 = sorted(float(np.sqrt(((cell - place) ** 2).sum(1).min())) for cell in cells)[:2]
        weights[tuple(place)] = w0 * math.exp(-((d1 + d2) ** 2) / (2 * sigma**2))
    return weights


def random_mask(seed: int, height: int, width: int, share: float) -> np.ndarray:
    generator = np.random.default_rng(seed)
    mask = np.where(generator.random((height, width)) < share, generator.integers(1, 4, (height, width)), 0)
    mask[generator.random((height, width)) < 0.05] = 255
    return mask.astype(np.uint8)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    height=st.integers(1, 24),
    width=st.integers(1, 24),
    share=st.sampled_from([0.01, 0.1, 0.5]),
    sigma=st.sampled_from([0.5, 1.0, 2.0, 5.0]),
    foreground=st.sampled_from([[1], [1, 3], [1, 2, 3]]),
)
def test_every_weight_is_that_of_the_equation(
    seed: int, height: int, width: int, share: float, sigma: float, foreground: list[int]
) -> None:
    mask = random_mask(seed, height, width, share)
    ours = border_weights(mask, foreground, w0=10, sigma=sigma)
    assert ours.dtype == np.float32 and ours.shape == mask.shape
    np.testing.assert_allclose(ours, directly(mask, foreground, 10, sigma), rtol=1e-5, atol=NEGLIGIBLE * 10)


def test_between_two_walls_the_weight_depends_on_the_width_of_the_gap() -> None:
    mask = np.zeros((30, 20), np.uint8)
    mask[:, :5], mask[:, 11:] = 1, 1
    weights = border_weights(mask, [1], w0=10, sigma=5)
    np.testing.assert_allclose(weights[:, 5:11], 10 * math.exp(-(7**2) / 50), rtol=1e-6)
    assert not weights[mask == 1].any()


def test_two_points_give_an_ellipse_of_equal_sums_of_distances() -> None:
    mask = np.zeros((21, 21), np.uint8)
    mask[10, 6], mask[10, 14] = 2, 2
    weights = border_weights(mask, [2], w0=4, sigma=5)
    assert weights[10, 10] == pytest.approx(4 * math.exp(-(8**2) / 50), rel=1e-6)
    # 3-4-5 triangles: the sum of distances is 10 at the ends of both axes of the ellipse.
    for place in ((13, 10), (7, 10), (10, 5), (10, 15)):
        assert weights[place] == pytest.approx(4 * math.exp(-(10**2) / 50), rel=1e-6)


@pytest.mark.parametrize("axes", [(0,), (1,), (0, 1)])
def test_mirroring_the_mask_mirrors_the_weights(axes: tuple[int, ...]) -> None:
    mask = random_mask(3, 40, 33, 0.03)
    weights = border_weights(mask, [1, 2, 3], sigma=2)
    assert weights.any()
    assert np.array_equal(border_weights(np.flip(mask, axes), [1, 2, 3], sigma=2), np.flip(weights, axes))


def test_one_cell_of_two_touching_classes_has_no_border_but_diagonal_neighbours_do() -> None:
    mask = np.zeros((8, 8), np.uint8)
    mask[2, 2], mask[2, 3] = 1, 2
    assert not border_weights(mask, [1, 2]).any()
    mask[2, 3], mask[3, 3] = 0, 2
    assert border_weights(mask, [1, 2])[2, 3] == pytest.approx(10 * math.exp(-(2**2) / 50))


def test_weights_grow_with_w0_alone() -> None:
    mask = random_mask(4, 20, 20, 0.05)
    assert np.array_equal(2 * border_weights(mask, [1], w0=3), border_weights(mask, [1], w0=6))


def test_a_map_holds_the_weights_of_every_mask() -> None:
    masks = np.stack([random_mask(seed, 16, 12, 0.1) for seed in range(3)])
    maps = border_map(masks, [1, 2], w0=5, sigma=3, quiet=True)
    assert maps.dtype == np.float32 and maps.any(axis=(1, 2)).all()
    for mask, weights in zip(masks, maps, strict=True):
        assert np.array_equal(weights, border_weights(mask, [1, 2], w0=5, sigma=3))


@pytest.mark.parametrize(("w0", "sigma"), [(-1, 5), (10, 0), (10, float("nan"))])
def test_impossible_settings_are_refused(w0: float, sigma: float) -> None:
    with pytest.raises(UserError, match=r"w0 must be at least 0 and sigma above 0"):
        border_weights(np.zeros((4, 4), np.uint8), [1], w0, sigma)
