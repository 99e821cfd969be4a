"""Masks to look at: every class and every border shows, masks stay as they are, errors are marked where they are."""

import numpy as np
import pytest
from PIL import Image

from core.data.dataset import PREVIEW
from core.data.mask_classes import IGNORE, default_palette
from core.data.mask_pictures import (
    PAGE,
    SMALLEST,
    WRONG,
    comparison_page,
    errors,
    legend,
    overlay,
    overlay_with_legend,
    room,
)
from core.prepare.pipeline import prepare
from core.prepare.sources import drawn_source

NAMES = ["ground", "disc", "ring"]
PALETTE = default_palette(3)


def two_halves(side=256, left=1, right=2):
    mask = np.full((side, side), left, np.uint8)
    mask[:, side // 2 :] = right
    return mask


def test_the_overlay_tints_the_grey_picture_and_lines_run_between_classes():
    pixels = np.full((256, 256, 3), (30, 90, 210), np.uint8)
    grey = round(0.299 * 30 + 0.587 * 90 + 0.114 * 210)
    page = overlay(pixels, two_halves(), PALETTE).astype(int)
    assert page.shape == (256, 256, 3)
    for column, index in ((3, 1), (250, 2)):
        expected = 0.6 * np.array(PALETTE[index]) + 0.4 * grey
        assert np.abs(page[3, column] - expected).max() <= 2
    assert (page[:, 127] == 0).all() and (page[:, 128] == 255).all()
    light = overlay(pixels, np.zeros((256, 256), np.uint8), PALETTE)[3, 3]
    assert np.abs(light - (0.25 * np.array(PALETTE[0]) + 0.75 * grey)).max() <= 2


@pytest.mark.parametrize("level", [0, 255])
def test_every_border_has_a_black_and_a_white_pixel_on_any_picture(level):
    """Of blocks of 5x5 pixels, too small for numbers, on white and on black."""
    blocks = np.random.default_rng(0).integers(0, 3, (60, 60)).astype(np.uint8)
    mask = blocks.repeat(5, axis=0).repeat(5, axis=1)
    page = overlay(np.full((300, 300, 3), level, np.uint8), mask, PALETTE)
    middle = page[2::5]  # of each row of blocks: the lines between rows are above and below
    rows, columns = np.nonzero(blocks[:, 1:] != blocks[:, :-1])
    assert len(rows) > 1000
    assert (middle[rows, 5 * columns + 4] == 0).all() and (middle[rows, 5 * columns + 5] == 255).all()


@pytest.mark.parametrize(("width", "lined"), [(1, 0), (2, 0), (4, 0), (5, 2), (9, 2)])
def test_lines_leave_a_thin_class_its_colour(width, lined):
    mask = np.zeros((300, 300), np.uint8)
    mask[100 : 100 + width, 20:280] = 2
    page = overlay(np.full((300, 300, 3), 128, np.uint8), mask, PALETTE)
    column = page[100 : 100 + width, 150].astype(int)
    own = (np.abs(column - (0.6 * np.array(PALETTE[2]) + 0.4 * 128)) <= 2).all(axis=1)
    assert own.sum() == width - lined
    assert (page[99, 150] == 0).all() and (page[100 + width, 150] == 255).all(), "the ground has its lines"


def test_numbers_stand_in_their_class_and_only_where_there_is_room():
    pixels = np.zeros((300, 300, 3), np.uint8)
    mask = np.zeros((300, 300), np.uint8)
    mask[40:120, 40:120], mask[200:206, 200:260] = 1, 2
    white = (overlay(pixels, mask, PALETTE) == 255).all(axis=2)
    white[38:122, 38:122] &= False
    assert (overlay(pixels, mask, PALETTE)[70:90, 70:90] == 255).all(axis=2).any()  # the digit in the middle
    white[198:208, 198:262] = False  # the outline of what is too thin for a number
    rows, columns = np.nonzero(white)
    assert 0 < np.ptp(rows) < 20 and 0 < np.ptp(columns) < 20  # the 0 on the ground, and nothing else


def test_small_pictures_are_enlarged_and_large_ones_get_thicker_lines():
    page = overlay(np.zeros((64, 50, 3), np.uint8), two_halves(64)[:, :50], PALETTE)
    assert page.shape == (4 * 64, 4 * 50, 3)
    assert (page[5, 127] == 0).all() and (page[5, 128] == 255).all() and (page[5, 126] != 0).any()
    wide = np.zeros((10, 3 * PAGE), np.uint8)
    wide[:, 300:] = 1
    row = overlay(np.full((*wide.shape, 3), 99, np.uint8), wide, PALETTE)[5]
    assert (row[297:300] == 0).all() and (row[300:303] == 255).all() and (row[[296, 303]] != 255).any()


def test_errors_are_marked_but_not_where_the_truth_is_unknown():
    true, predicted = two_halves(), two_halves()
    predicted[50, 30] = 0
    true[60, 30] = IGNORE
    page = errors(np.full((256, 256, 3), 200, np.uint8), true, predicted)
    marked = (page == WRONG).all(axis=2)
    assert marked.sum() == 1 and marked[50, 30] and page[60, 30].tolist() == [104, 104, 104]
    assert (page[-20:, :100] == 255).any()  # the share, in letters
    page = errors(np.full((256, 256, 3), 200, np.uint8), true, 3 - true)
    rows, columns = np.nonzero((page == 255).all(axis=2))
    around = page[rows.min() - 2 : rows.max() + 3, columns.min() - 2 : columns.max() + 3]
    assert len(rows) and not (around == WRONG).all(axis=2).any(), "white letters on yellow cannot be read"


def test_the_legend_names_what_occurs_in_its_colour():
    page = legend([0, 2, IGNORE], NAMES, PALETTE, 400, 14)
    colours = {tuple(map(int, colour)) for colour in page.reshape(-1, 3)}
    assert {tuple(PALETTE[0]), tuple(PALETTE[2]), (255, 255, 255)} <= colours and tuple(PALETTE[1]) not in colours
    assert page.shape[1] == 400
    narrow = legend([0, 2, IGNORE], NAMES, PALETTE, 90, 14)
    assert narrow.shape[1] == 90 and narrow.shape[0] > 2 * page.shape[0]  # three lines
    legend([0], ["a\nb" + "x" * 500], PALETTE, 90, 14)


def test_an_overlay_with_its_legend_holds_the_overlay():
    pixels, mask = np.full((256, 20, 3), 120, np.uint8), two_halves()[:, 118:138]
    before = mask.copy()
    page = overlay_with_legend(pixels, mask, NAMES, PALETTE)
    assert np.array_equal(page[:256, :20], overlay(pixels, mask, PALETTE)) and (page[:256, 20:] == 255).all()
    assert (page[256:] == PALETTE[1]).all(axis=2).any() and page.shape[1] > 100
    assert np.array_equal(mask, before)


@pytest.mark.parametrize(("side", "shown"), [(64, 256), (128, 256), (256, 256), (512, 512), (1024, 512)])
def test_a_page_has_its_pictures_at_a_size_to_look_at(side, shown):
    count = min(2, room(side, 4))
    pictures = np.full((count, side, side, 3), 77, np.uint8)
    truth, guess = (np.full((count, side, side), index, np.uint8) for index in (1, 2))
    page = comparison_page(pictures, {"truth": truth, "prediction": guess}, NAMES, PALETTE)
    assert shown >= SMALLEST and page.shape[1] == 4 * (shown + 4) + 4
    top = 14 + 2 * 4 + 4
    middle = [page[top + 9, 4 + column * (shown + 4) + 9].tolist() for column in range(4)]
    assert middle[0] == [77, 77, 77] and middle[3] == list(WRONG)
    assert middle[1] != middle[2] and (page[:top] != 255).any()  # headings
    assert (page[-30:] == PALETTE[1]).all(axis=2).any() and (page[-30:] == PALETTE[2]).all(axis=2).any()


def test_examples_without_predictions_stand_side_by_side():
    pictures, masks = np.zeros((8, 64, 64, 3), np.uint8), np.ones((8, 64, 64), np.uint8)
    assert room(64, 2) == 8
    page = comparison_page(pictures, {"mask": masks}, NAMES, PALETTE)
    assert page.shape[1] == 4 * (256 + 4) + 4


def test_the_preview_of_prepared_masks_is_such_a_page(tmp_path):
    prepare(drawn_source(3, 0), tmp_path / "d", size=16, quiet=True)
    page = np.asarray(Image.open(tmp_path / "d" / PREVIEW))
    assert page.shape[1] == 4 * (256 + 4) + 4 and page.shape[0] > 2 * 256  # two groups of picture and mask
    below = {tuple(map(int, colour)) for colour in page[-50:].reshape(-1, 3)}
    assert set(map(tuple, PALETTE)) <= below
