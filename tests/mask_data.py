"""A small prepared data set with masks, whose classes can be told by colour."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from core.cli.config import compose, typed
from core.cli.files import read_json, sha256_of, write_json
from core.training.rundir import RunFolder
from seg.settings import TrainConfig
from seg.train import run_training

CLASSES = ["ground", "l_disc", "r_disc", "rare"]
PALETTE = [[20, 20, 20], [250, 60, 60], [60, 250, 60], [60, 60, 250]]


def write_discs(folder: Path, count: int = 24, size: int = 32, valid: int = 7, seed: int = 0) -> Path:
    """Pictures with a disc of class 1 in their left half and one of class 2 in the right; the last ones validate.

    Both discs have the same colour, so that only their side tells them apart; a few pixels are to be ignored.
    """
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size]
    masks = np.zeros((count, size, size), np.uint8)
    for mask in masks:
        for label, centre in ((1, 0.27), (2, 0.73)):
            across, down = size * (centre + rng.uniform(-0.05, 0.05)), size * rng.uniform(0.3, 0.7)
            mask[(x - across) ** 2 + (y - down) ** 2 < (size * rng.uniform(0.14, 0.2)) ** 2] = label
    masks[::5, 2:6, 2:6] = 3
    colours = np.array([[60, 60, 60], [200, 160, 120], [200, 160, 120], [40, 60, 220]])
    images = np.clip(colours[masks] + rng.normal(0, 12, (count, size, size, 3)), 0, 255).astype(np.uint8)
    masks[:, -1, :] = 255
    split = np.zeros(count, np.uint8)
    split[count - valid :] = 1
    for name, array in (("images", images), ("masks", masks), ("split", split)):
        np.save(folder / f"{name}.npy", array)
    meta = {"format": 1, "source": "discs", "count": count, "image_size": size, "transform": "none", "skipped": []}
    meta |= {"classes": CLASSES, "palette": PALETTE, "resized": False, "fit": "crop", "value_range": 4095}
    hashes = {f"{name}.npy": sha256_of(folder / f"{name}.npy") for name in ("images", "masks", "split")}
    write_json(folder / "meta.json", meta | {"sha256": hashes})
    return folder


def describe_again(folder: Path, **changes: Any) -> None:
    """Write meta.json anew: with these changes, and for the files as they are now."""
    meta = read_json(folder / "meta.json") | changes
    write_json(folder / "meta.json", meta | {"sha256": {name: sha256_of(folder / name) for name in meta["sha256"]}})


SMALL = ["model.network.widths=[4,8]", "batch_size=4", "log_every=8", "valid_every=16", "save_every=0", "warmup=0"]
SMALL.append("mixed_precision=fp32")  # on any machine


def words(discs: Path, runs: Path, *more: str, name: str = "t") -> list[str]:
    """The command line of a run."""
    return [f"data={discs}", f"runs={runs}", f"name={name}", *more]


def run(discs: Path, runs: Path, *more: str, name: str = "t") -> RunFolder:
    """Train a tiny network."""
    return run_training(typed(compose("seg", words(discs, runs, *SMALL, *more, name=name)), TrainConfig))
