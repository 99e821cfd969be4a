"""Augmentation: masks move with their pictures, sides change places in mirrors, chance follows from the position."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_data import write_discs
from scipy import ndimage
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as V

from core.cli.config import compose
from core.cli.errors import UserError
from core.data.dataset import PreparedData
from core.data.mask_classes import IGNORE
from seg.augment import Augmentation, Example, augment, crop, elastic_field
from seg.data import Examples, training_batches

NOTHING = {
    "flip": False,
    "vertical_flip": False,
    "swap_sides": False,
    "rotate": 0,
    "translate": 0,
    "scale": 0,
    "shear": 0,
    "elastic": 0,
    "colour": 0,
}


def amounts(**changes):
    return Augmentation(**(NOTHING | changes))


def example(mask, border=None):
    """A picture that shows its own mask: 60 grey levels a class."""
    mask = torch.as_tensor(mask, dtype=torch.uint8)
    image = tv_tensors.Image((mask * 60).expand(3, *mask.shape))
    return Example(image, tv_tensors.Mask(mask), None if border is None else tv_tensors.Mask(border))


def blobs(size=48, seed=0):
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(size, size)), 5)
    return np.digitize(noise, np.quantile(noise, [0.3, 0.7])).astype(np.uint8)


def varied(mask, seed=0, mirrored=(0, 1, 2), border=None, **changes):
    return augment(example(mask, border), amounts(**changes), mirrored, np.random.default_rng(seed))


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    flips=st.tuples(st.booleans(), st.booleans()),
    rotate=st.sampled_from([0, 30, 180]),
    translate=st.sampled_from([0, 0.2]),
    scale=st.sampled_from([0, 0.3]),
    shear=st.sampled_from([0, 15]),
    elastic=st.sampled_from([0, 3]),
)
def test_a_mask_moves_with_its_picture(seed, flips, **changes):
    border = torch.arange(48 * 48, dtype=torch.float32).reshape(48, 48)
    found = varied(blobs(seed=seed), seed, flip=flips[0], vertical_flip=flips[1], border=border, **changes)
    mask, grey = np.asarray(found.mask), np.asarray(found.image)[0].astype(float)
    assert mask.shape == (48, 48) and set(np.unique(mask)) <= {0, 1, 2, IGNORE}
    # The picture is interpolated and the mask is not: away from class borders they agree (a class is 60 levels).
    around = [rank(mask, 7, mode="constant", cval=IGNORE) for rank in (ndimage.minimum_filter, ndimage.maximum_filter)]
    flat = (around[0] == mask) & (around[1] == mask) & (mask != IGNORE)
    # The border weights are the numbers of the pixels: each must lie where its pixel's class now lies.
    place = np.asarray(found.border).round().astype(int)
    # Of an island of a pixel, interpolation shows something, while the nearest pixel may be beside it for all places.
    around = [rank(blobs(seed=seed), 3) for rank in (ndimage.minimum_filter, ndimage.maximum_filter)]
    calm = flat & (around[0] == around[1]).reshape(-1)[np.clip(place, 0, place.size - 1)]
    assert calm.sum() >= 0.9 * flat.sum()
    assert np.abs(grey - 60.0 * mask)[calm].max(initial=0) <= 10
    assert (blobs(seed=seed).reshape(-1)[place[flat]] == mask[flat]).all()


@pytest.mark.parametrize("flip, vertical_flip, mirror", [(1, 0, True), (0, 1, True), (1, 1, False), (0, 0, False)])
def test_left_and_right_change_places_in_a_mirror_alone(flip, vertical_flip, mirror):
    class Always:
        def random(self):
            return 0.0

    mask = np.array([[0, 1, 2], [3, 1, IGNORE]], np.uint8)
    changed = augment(
        example(mask),
        amounts(flip=bool(flip), vertical_flip=bool(vertical_flip), swap_sides=True),
        (0, 2, 1, 3),
        Always(),
    )
    expected = mask[:, ::-1] if flip else mask
    expected = expected[::-1] if vertical_flip else expected
    if mirror:
        expected = np.array([0, 2, 1, 3, *range(4, 256)], np.uint8)[expected]
    assert (np.asarray(changed.mask) == expected).all()


def test_sides_stay_when_the_swap_is_off_and_flips_come_half_the_time():
    mask = np.array([[1, 0, 0]], np.uint8)
    seen = [np.asarray(varied(mask, seed, (0, 2, 1), flip=True).mask)[0].tolist() for seed in range(400)]
    assert {tuple(row) for row in seen} == {(1, 0, 0), (0, 0, 1)}
    assert 150 < seen.count([0, 0, 1]) < 250
    swapped = [
        np.asarray(varied(mask, seed, (0, 2, 1), flip=True, swap_sides=True).mask)[0].tolist() for seed in range(9)
    ]
    assert [1, 0, 0] in swapped and [0, 0, 2] in swapped and [0, 0, 1] not in swapped


def test_elastic_vectors_have_the_papers_spread_and_reach_the_corners_unchanged():
    """On a 3x3 grid the corners of the dense field are the corner vectors themselves: N(0, sigma pixels)."""
    rng = np.random.default_rng(0)
    fields = torch.stack([elastic_field(20, 40, 10.0, rng)[0] for _ in range(600)])
    corners = fields[:, [0, 0, -1, -1], [0, -1, 0, -1]] * torch.tensor([40 / 2, 20 / 2])  # back to pixels
    assert torch.allclose(corners.std(0), torch.full((4, 2), 10.0), rtol=0.12)
    steps = fields.diff(dim=2).abs().max() * 40 / 2
    assert steps < 6 * 10 / 4  # smooth: 20 columns between two vectors of a few tens of pixels


def test_elastic_deformation_is_what_scipy_makes_of_the_same_displacements():
    field = elastic_field(32, 32, 3.0, np.random.default_rng(4))
    image = torch.as_tensor(
        ndimage.gaussian_filter(np.random.default_rng(1).normal(size=(32, 32)), 3), dtype=torch.float32
    )
    ours = V.elastic(tv_tensors.Image(image[None]), field, fill=0)[0]
    pixels = field[0].numpy() * 32 / 2
    y, x = np.mgrid[:32, :32].astype(float)
    theirs = ndimage.map_coordinates(image.numpy(), [y + pixels[..., 1], x + pixels[..., 0]], order=1, mode="nearest")
    inside = (y + pixels[..., 1] > 0) & (y + pixels[..., 1] < 31) & (x + pixels[..., 0] > 0) & (x + pixels[..., 0] < 31)
    assert np.abs(np.asarray(ours) - theirs)[inside].max() < 1e-4
    assert inside.mean() > 0.6


@settings(max_examples=30, deadline=None)
@given(size=st.integers(1, 12), margin=st.integers(0, 11), seed=st.integers(0, 99))
def test_windows_show_the_mirrored_surroundings(size, margin, seed):
    mask = np.arange(12 * 12, dtype=np.uint8).reshape(12, 12)
    window = crop(
        Example(tv_tensors.Image(torch.as_tensor(mask)[None]), tv_tensors.Mask(torch.as_tensor(mask)), None),
        size,
        margin,
        np.random.default_rng(seed),
    )
    inner, outer = np.asarray(window.mask), np.asarray(window.image)[0]
    top, left = divmod(int(inner[0, 0]), 12)
    padded = np.pad(mask, margin, mode="reflect")
    assert inner.shape == (size, size)
    assert (outer == padded[top : top + size + 2 * margin, left : left + size + 2 * margin]).all()
    assert (inner == mask[top : top + size, left : left + size]).all()


def test_colour_leaves_the_mask_alone_and_changes_the_picture():
    before = example(blobs())
    after = varied(blobs(), colour=0.5)
    assert (after.mask == before.mask).all() and not torch.equal(after.image, before.image)


@pytest.mark.parametrize("key, value", [("rotate", 181), ("scale", 1.0), ("colour", -0.1), ("elastic", float("nan"))])
def test_amounts_out_of_range_are_named(key, value):
    with pytest.raises(UserError, match=f"augment.{key}"):
        amounts(**{key: value}).check()


@pytest.mark.parametrize("preset", ["faces", "cells", "none"])
def test_every_preset_is_within_range(preset):
    config = compose("seg", ["data=x", "name=x", f"augment={preset}"]).augment
    Augmentation(**config).check()


BORDERS = np.arange(17 * 32 * 32, dtype=np.float32).reshape(17, 32, 32)


def batches(data, images_seen, rank=0, ranks=1, workers=0, count=3):
    examples = Examples(data, "train", 3, amounts(flip=True, rotate=20, elastic=2, colour=0.2), 24, 4, BORDERS)
    stream = training_batches(examples, images_seen, 4, rank, ranks, torch.device("cpu"), workers)
    return [next(stream) for _ in range(count)]


def test_batches_depend_on_seed_and_position_alone(tmp_path):
    data = PreparedData.open(write_discs(tmp_path / "discs"))
    torch.manual_seed(5)
    state = torch.get_rng_state()
    whole = batches(data, 8, count=6)
    assert torch.equal(torch.get_rng_state(), state)
    assert whole[0].images.shape == (4, 3, 32, 32) and whole[0].masks.shape == (4, 24, 24)
    later = batches(data, 16)
    ranks = [batches(data, 8, rank, 2, count=6) for rank in range(2)]
    parallel = batches(data, 8, workers=1)
    for part in ("images", "masks", "borders"):
        assert all(torch.equal(getattr(a, part), getattr(b, part)) for a, b in zip(whole[2:], later, strict=False))
        joined = [torch.cat([getattr(a, part), getattr(b, part)]) for a, b in zip(*ranks, strict=True)]
        assert all(torch.equal(getattr(a, part), b) for a, b in zip(whole, joined, strict=True))
        assert all(torch.equal(getattr(a, part), getattr(b, part)) for a, b in zip(whole, parallel, strict=False))


def test_border_weights_belong_to_their_picture(tmp_path):
    """With an interleaved split the n-th weight map is that of the n-th training picture."""
    folder = write_discs(tmp_path / "discs")
    data = PreparedData.open(folder)
    split = np.arange(24, dtype=np.uint8) % 2
    data = PreparedData(data.path, data.images, data.masks, split, data.meta)
    borders = np.broadcast_to(np.arange(12, dtype=np.float32)[:, None, None] * 2, (12, 32, 32)).copy()
    examples = Examples(data, "train", 0, amounts(), 32, 0, borders)
    for position in range(12):
        image, _, border = examples[position]
        row = int(border[0, 0])
        assert (image.numpy() == data.images[row]).all() and (border == row).all()
