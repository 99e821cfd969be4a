"""What the tests marked `gpu` share: the device, and a training run of every preset in conf/."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mask_data import write_discs

from core.cli import help as presets_of
from core.cli.config import compose, typed
from core.cli.files import sha256_of, write_json
from core.data.dataset import PreparedData
from core.nn.backbone import is_installed
from core.training.distributed import start_accelerator
from core.training.loop import TrainingLoop
from core.training.machine import choose_precision
from core.training.rundir import RunFolder
from gen.settings import TrainConfig
from gen.settings import validate as validate_gan
from gen.trainer import Trainer
from seg.settings import TrainConfig as SegConfig
from seg.settings import validate as validate_segmenter
from seg.trainer import Trainer as SegTrainer

STAND_IN = os.environ.get("FACET_STAND_IN") == "cpu"  # try these tests without a GPU: tiny networks on the CPU
DEVICE = torch.device("cpu" if STAND_IN else "cuda")
ON_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (STAND_IN or torch.cuda.is_available()), reason="no NVIDIA GPU: pytest -m gpu where one is"),
]
PRETRAINED = ("projected", "unet_encoder", "fcn", "faces_fast", "cpu", "course", "small_data")
# Of the stand-in; a preset that has no such key gets the others.
TINY = {"gen": ["model.image_size=32", "model.width=4", "batch_size=4"], "seg": ["batch_size=2", "workers=0"]}
WIDTHS = ("unet", "unet_small", "unet_demo", "unet_paper")

Preset = tuple[str, str, str]  # command (gen or seg), group (model or experiment), name


def every(*groups: str) -> list[Any]:
    """The presets of these groups as parameters of a test."""
    found = [
        (config, group, name)
        for group in groups
        for config in ("gen", "seg")
        for name in presets_of.choices(config, group)
    ]
    lacks = pytest.mark.skipif(not is_installed(), reason="needs pip install 'facet-faces[pretrained]'")
    return [
        pytest.param(preset, id="-".join(preset[1:]), marks=[lacks] if preset[2] in PRETRAINED else [])
        for preset in found
    ]


def write_blobs(folder: Path, size: int, count: int = 512) -> Path:
    """A prepared data set of coloured blobs."""
    folder.mkdir(parents=True)
    coarse = np.random.default_rng(0).integers(0, 256, (count, 4, 4, 3), np.uint8)
    np.save(folder / "images.npy", coarse.repeat(size // 4, 1).repeat(size // 4, 2))
    meta = {"format": 1, "source": "blobs", "count": count, "image_size": size, "transform": "none", "skipped": []}
    write_json(folder / "meta.json", meta | {"sha256": {"images.npy": sha256_of(folder / "images.npy")}})
    return folder


def write_data(folder: Path) -> dict[str, Path]:
    """Data for each command, of 64 pixels where that is not too slow."""
    return {
        "gen": write_blobs(folder / "blobs", 32 if STAND_IN else 64),
        "seg": write_discs(folder / "discs", count=40, size=64),
    }


def trainer_of(preset: Preset, data: dict[str, Path], folder: Path, *words: str) -> TrainingLoop:
    """A training run of a preset, as its command would begin or continue it, on `DEVICE`."""
    command, group, name = preset
    small = [] if not STAND_IN else TINY[command] + (["model.network.widths=[4,4,4,4,4]"] if name in WIDTHS else [])
    given = [f"{group}={name}", f"data={data[command]}", f"runs={folder}", "name=t", *small, *words]
    config = typed(compose(command, given), TrainConfig if command == "gen" else SegConfig)
    prepared, run = PreparedData.open(data[command]), RunFolder(folder / "t")
    config.mixed_precision = choose_precision(config.mixed_precision, DEVICE)
    accelerator = start_accelerator(config.mixed_precision, None, run.path)
    assert accelerator.device.type == DEVICE.type
    if isinstance(config, SegConfig):
        validate_segmenter(config, prepared, 1)
        return SegTrainer(config, accelerator, prepared, run)
    validate_gan(config, prepared, 1)
    return Trainer(config, accelerator, prepared, run)
