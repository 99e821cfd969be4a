"""Batch norm folded into convolutions: the same results, fewer layers, and nothing else changed."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from core.data.images import to_uint8
from core.nn.blocks import ConvBlock, UpBlock
from core.nn.fuse import fold_batch_norm
from core.nn.model_file import build_model, save_model
from gen.latents import sample_latents
from gen.sample import generate, load_generator
from seg.loading import load_unet


def trained(network):
    """The network as if trained: batch statistics, scales and shifts that differ from channel to channel."""
    generator = torch.Generator().manual_seed(0)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for values, low, high in (
                (layer.running_mean, -1, 1),
                (layer.running_var, 0.2, 3),
                (layer.weight.data, -1.5, 1.5),
                (layer.bias.data, -1, 1),
            ):
                values.uniform_(low, high, generator=generator)
    return network.eval()


def norms(network):
    return sum(isinstance(layer, nn.BatchNorm2d) for layer in network.modules())


BLOCKS = [
    (ConvBlock, {"stride": 2, "padding": 1}, 0),
    (ConvBlock, {"kernel": 1, "bias": True, "activation": None}, 0),
    (ConvBlock, {"groups": 2, "padding": 1}, 0),
    (ConvBlock, {"groups": 8, "dilation": 2}, 0),
    (UpBlock, {}, 0),
    (UpBlock, {"bias": True, "activation": None}, 0),
    (UpBlock, {"groups": 2}, 1),  # left as it is
    (ConvBlock, {"norm": nn.InstanceNorm2d}, 0),
    (ConvBlock, {"norm": None, "activation": None}, 0),
]


@pytest.mark.parametrize(("block", "options", "left"), BLOCKS)
def test_blocks_give_the_same(block, options, left):
    plain = trained(block(8, 12 if options.get("groups") != 8 else 16, **options)).double()
    folded, x = fold_batch_norm(plain), torch.randn(2, 8, 9, 9, dtype=torch.double)
    assert norms(folded) == left
    torch.testing.assert_close(folded(x), plain(x), rtol=1e-12, atol=1e-12)


NETWORKS = [
    ("gen.dcgan.Generator", {"width": 8}, (4, 100), 0),
    ("gen.resnet.Generator", {"width": 8}, (4, 128), 5),  # those that precede a convolution stay
    ("seg.unet.UNet", {"widths": [4, 8, 16], "norm": "batch"}, (2, 3, 40, 40), 0),
    ("seg.unet.UNet", {"widths": [4, 8], "norm": "batch", "block": "residual", "up": "bilinear"}, (2, 3, 40, 40), 0),
    ("seg.encoder.EncoderUNet", {"encoder": {"weights": "none"}}, (2, 3, 40, 40), 0),
    ("seg.encoder.EncoderUNet", {"encoder": {"name": "resnet10t", "weights": "none"}}, (2, 3, 40, 40), 0),
    ("seg.fcn.FCN", {"encoder": {"name": "densenet121", "weights": "none"}}, (2, 3, 40, 40), 62),  # as with resnet
]


@pytest.mark.parametrize(("target", "options", "shape", "left"), NETWORKS)
def test_networks_give_the_same_and_stay_as_they_are(target, options, shape, left):
    plain = trained(build_model({"_target_": target, **options}))
    plain.train()
    before = copy.deepcopy(plain.state_dict())
    folded = fold_batch_norm(plain)
    assert norms(folded) == left and not folded.training and plain.training
    assert all(torch.equal(value, before[name]) for name, value in plain.state_dict().items())
    x = torch.randn(shape)
    with torch.inference_mode():
        expected, found = plain.eval()(x), folded(x)
    assert (found - expected).abs().max() < 1e-5 * max(1, expected.abs().max())


def test_samples_and_predictions_use_it(tmp_path):
    recipe = {"_target_": "gen.dcgan.Generator", "width": 8}
    generator = trained(build_model(recipe))
    save_model(tmp_path / "g.safetensors", generator, recipe, {})
    assert norms(load_generator(tmp_path / "g.safetensors", "cpu")[0]) == 0
    with torch.inference_mode():
        expected = to_uint8(generator(sample_latents(range(8), 100))).numpy()
    found = generate(tmp_path / "g.safetensors", range(8), device="cpu")
    assert expected.std() > 20 and np.abs(found.astype(int) - expected).max() <= 1

    recipe = {"_target_": "seg.unet.UNet", "widths": [4, 8], "norm": "batch"}
    info = {"classes": ["a", "b"], "palette": [[0, 0, 0], [9, 9, 9]], "image_size": 32, "resized": True, "fit": "crop"}
    save_model(tmp_path / "u.safetensors", build_model(recipe), recipe, info | {"images_seen": 1})
    assert norms(load_unet(tmp_path / "u.safetensors", torch.device("cpu"))[0]) == 0
