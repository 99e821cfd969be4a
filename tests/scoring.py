"""What the tests of scoring share: small pictures, data sets of them, and weights in pytorch-fid's format."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from pytorch_fid import inception as published
from torch import nn

from core.cli.files import sha256_of, write_json
from core.nn.init import init_normal
from core.nn.model_file import build_model, save_model

WEIGHTS_NAME = "pt_inception-2015-12-05-6726825d.pth"


def pictures(seed: int, count: int, side: int = 32, brightness: float = 0) -> np.ndarray:
    """Smooth coloured noise, uint8 (count, side, side, 3)."""
    generator = np.random.default_rng(seed)
    coarse = generator.normal(128 + brightness, 50, (count, 6, 6, 3)).clip(0, 255).astype(np.uint8)
    return np.stack([np.asarray(Image.fromarray(one).resize((side, side), Image.Resampling.BICUBIC)) for one in coarse])


def write_folder(folder: Path, images: np.ndarray) -> Path:
    folder.mkdir(parents=True)
    for index, picture in enumerate(images):
        Image.fromarray(picture).save(folder / f"{index:04d}.png")
    return folder


def write_prepared(folder: Path, images: np.ndarray, split: np.ndarray | None = None) -> Path:
    folder.mkdir(parents=True)
    arrays = {"images.npy": images} | ({} if split is None else {"split.npy": split})
    for name, array in arrays.items():
        np.save(folder / name, array)
    meta = {"format": 1, "count": len(images), "sha256": {name: sha256_of(folder / name) for name in arrays}}
    write_json(folder / "meta.json", meta)
    return folder


def write_two_folders(parent: Path) -> tuple[Path, Path]:
    """A folder to score and one to compare with, 24 pictures each."""
    fake = write_folder(parent / "fake", pictures(1, 24, brightness=10))
    return fake, write_folder(parent / "real", pictures(2, 24))


@functools.cache
def random_state() -> dict[str, torch.Tensor]:
    """Seeded random weights in pytorch-fid's format, He-scaled so that features stay of order one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(published, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patch.setattr(torchvision.models.Inception3, "load_state_dict", lambda self, state: None)
        network = published.fid_inception_v3()
    generator = torch.Generator().manual_seed(7)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            layer.weight.data.normal_(0, (2 / layer.weight[0].numel()) ** 0.5, generator=generator)
        elif isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.1, generator=generator)
            layer.running_var.uniform_(0.5, 1.5, generator=generator)
    return dict(network.state_dict())


def fill_hub(home: Path, state: dict[str, torch.Tensor]) -> Path:
    (home / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(state, home / "hub" / "checkpoints" / WEIGHTS_NAME)
    return home


def write_short_weights(path: Path) -> Path:
    """The random weights up to the block of dims=192, a small file."""
    torch.save({name: value for name, value in random_state().items() if name.startswith("Conv2d")}, path)
    return path


def lively_generator(folder: Path) -> Path:
    """A model file in `folder`: a small generator with weights large enough to give lively pictures."""
    recipe = {"_target_": "gen.dcgan.Generator", "image_size": 32, "latent_dim": 6, "width": 4}
    generator = build_model(recipe)
    init_normal(generator, std=0.3)
    save_model(folder / "model.safetensors", generator, recipe, {})
    return folder / "model.safetensors"


def small_segmenter(folder: Path) -> Path:
    """A model file in `folder`: a U-Net of three classes, untrained, for pictures at their own scale."""
    recipe = {"_target_": "seg.unet.UNet", "widths": [4, 8], "classes": 3}
    info = {"classes": ["a", "b", "c"], "palette": [[0, 0, 0], [9, 9, 9], [0, 9, 0]], "image_size": 32, "fit": "crop"}
    network = build_model(recipe)
    network.initialise(0)
    save_model(folder / "model.safetensors", network, recipe, info | {"images_seen": 1, "resized": False})
    return folder / "model.safetensors"
