"""Tiles: their size changes nothing, every pixel sees what it needs; averaging respects the symmetries."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.data.images import to_float
from core.nn.init import init_he
from seg import tiling
from seg.tiling import mirror, segment
from seg.unet import UNet

CLASSES = 3
SWAP = [0, 2, 1]
KINDS = {
    "padded": {"up": "transposed", "norm": "batch"},
    "nearest": {"up": "nearest", "norm": "batch"},
    "bilinear": {"up": "bilinear", "norm": "none", "block": "residual"},
    "bicubic": {"up": "bicubic", "norm": "batch"},
    "unpadded": {"padding": "valid", "norm": "batch"},
}


def network(kind, depth=2):
    """A small U-Net in which every weight and statistic has been moved, so that a mistake of a pixel shows."""
    model = UNet(classes=CLASSES, widths=[4] * (depth + 1), **KINDS[kind])
    init_he(model)
    generator = torch.Generator().manual_seed(1)
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.3, generator=generator)
            layer.running_var.uniform_(0.5, 1.5, generator=generator)
    with torch.no_grad():
        # Probabilities far from 0 and 1, which would hide differences of the logits.
        for parameter in model.head.parameters():
            parameter.mul_(0.5)
    return model.eval()


MODELS = {kind: network(kind) for kind in KINDS}


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def forward(model, pixels):
    with torch.inference_mode():
        return model(to_float(torch.from_numpy(pixels)[None])).softmax(1)[0].numpy()


def padded(pixels, before, after_height, after_width):
    """Mirrored by numpy, which has its own code for margins larger than the picture."""
    for axis, after in enumerate((after_height, after_width)):
        widths = [(0, 0)] * 3
        widths[axis] = (before, after)
        pixels = np.pad(pixels, widths, mode="edge" if pixels.shape[axis] == 1 else "reflect")
    return pixels


def mirrored_by_hand(model, pixels):
    """The whole picture in one forward pass, continued on all sides by far more than the network can see."""
    height, width = pixels.shape[:2]
    if model.padding == "valid":
        sides = [model.input_size(side) - model.margin - side for side in (height, width)]
        return forward(model, padded(pixels, model.margin, *sides))[:, :height, :width]
    border = 20 * model.multiple
    output = forward(model, padded(pixels, border, border, border))
    return output[:, border : border + height, border : border + width]


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(list(KINDS)), st.integers(1, 60), st.integers(1, 60), st.integers(6, 40))
def test_any_tile_gives_what_the_whole_mirrored_picture_gives(kind, height, width, tile):
    model, pixels = MODELS[kind], picture(height, width)
    result = segment(model, pixels, tile, False, SWAP)
    assert result.dtype == torch.float32 and result.shape == (CLASSES, height, width)
    fits = max(height, width) <= -(-tile // model.multiple) * model.multiple
    whole = forward(model, pixels) if fits and model.padding == "same" else mirrored_by_hand(model, pixels)
    assert np.abs(result.numpy() - whole).max() < 1e-5
    assert result.sum(0).sub(1).abs().max() < 1e-5


def test_the_probabilities_compared_here_do_vary():
    for kind, model in MODELS.items():
        values = segment(model, picture(40, 50), 8, False, SWAP)
        assert values.std((1, 2)).min() > 0.01, kind


@pytest.mark.parametrize("kind", KINDS)
def test_a_deeper_network_does_not_depend_on_the_tile_either(kind):
    model, pixels = network(kind, depth=3), picture(75, 53)
    coarse, fine = (segment(model, pixels, tile, False, SWAP) for tile in (16, 56))
    assert (coarse - fine).abs().max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tile", [64, 8])
def test_averaging_commutes_with_every_flip_and_turn(kind, tile):
    model, pixels = MODELS[kind], picture(11, 18)
    plain = segment(model, pixels, tile, True, SWAP)
    assert plain.sum(0).sub(1).abs().max() < 1e-5
    assert (plain - segment(model, pixels, tile, False, SWAP)).abs().max() > 0.01
    across = segment(model, np.ascontiguousarray(pixels[:, ::-1]), tile, True, SWAP)
    assert torch.allclose(across, plain.flip(2)[SWAP], atol=1e-5)
    upside_down = segment(model, np.ascontiguousarray(pixels[::-1]), tile, True, SWAP)
    assert torch.allclose(upside_down, plain.flip(1)[SWAP], atol=1e-5)
    turned = segment(model, np.rot90(pixels), tile, True, SWAP)
    assert torch.allclose(turned, torch.rot90(plain, 1, (1, 2)), atol=1e-5)


def test_the_average_is_over_all_eight_views():
    model, pixels = MODELS["bilinear"], picture(9, 14)
    # Each view and the way back on (rows, columns), written out; quarter turns undo one another, the others themselves.
    pairs = [
        (lambda a: a, lambda a: a, False),
        (lambda a: a[::-1, ::-1], lambda a: a[::-1, ::-1], False),
        (lambda a: a.swapaxes(0, 1)[::-1], lambda a: a[::-1].swapaxes(0, 1), False),
        (lambda a: a.swapaxes(0, 1)[:, ::-1], lambda a: a[:, ::-1].swapaxes(0, 1), False),
        (lambda a: a[::-1], lambda a: a[::-1], True),
        (lambda a: a[:, ::-1], lambda a: a[:, ::-1], True),
        (lambda a: a.swapaxes(0, 1), lambda a: a.swapaxes(0, 1), True),
        (lambda a: a.swapaxes(0, 1)[::-1, ::-1], lambda a: a.swapaxes(0, 1)[::-1, ::-1], True),
    ]
    expected = np.zeros((9, 14, CLASSES))
    for there, back, mirror_image in pairs:
        seen = back(forward(model, np.ascontiguousarray(there(pixels))).transpose(1, 2, 0))
        expected += (seen[..., SWAP] if mirror_image else seen) / 8
    result = segment(model, pixels, 16, True, SWAP).permute(1, 2, 0).numpy()
    assert np.abs(result - expected).max() < 1e-5


@given(st.integers(1, 9), st.integers(0, 40), st.integers(0, 40))
def test_mirroring_repeats_the_line_forth_and_back(length, before, after):
    line = np.arange(length)
    period = np.concatenate([line, line[-2:0:-1]])
    expected = np.take(period, np.arange(-before, length + after), mode="wrap")
    assert np.array_equal(mirror(np.arange(-before, length + after), length), expected)


def test_rotated_and_read_only_pictures_are_taken():
    pixels = picture(30, 20)
    pixels.flags.writeable = False
    result = segment(MODELS["padded"], pixels.transpose(1, 0, 2), 8, False, SWAP)
    assert result.shape == (CLASSES, 20, 30)


@pytest.mark.parametrize("kind", ["padded", "unpadded"])
def test_several_tiles_at_a_time_change_nothing(kind, monkeypatch):
    """As on a GPU; 12 tiles are no multiple of 5."""
    pixels = picture(44, 60)
    alone = segment(MODELS[kind], pixels, 16, False, SWAP)
    monkeypatch.setattr(tiling, "tiles_at_once", lambda device, side: 5)
    torch.testing.assert_close(segment(MODELS[kind], pixels, 16, False, SWAP), alone, rtol=0, atol=1e-5)
