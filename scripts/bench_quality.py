"""Time to quality: how long the usual loop trains until its faces are good enough, and how long `faces_fast` does."""

from __future__ import annotations

import copy
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from core.cli.config import compose, quoted, typed
from core.cli.files import atomic_path, read_json, write_json
from core.data.dataset import PreparedData
from core.data.loader import ImageBank
from core.training.allocator import ordinary_allocation
from core.training.rundir import RunFolder
from eval.features.extractors import make_features
from eval.features.settings import InceptionSection
from eval.online import Scorer
from gen.sample import BATCH_SIZE
from gen.settings import TrainConfig
from scripts import bench_reference as reference
from scripts.bench_measure import Result, spread
from scripts.bench_parts import Bench, Settings, TurnTrainer

SAMPLES, DIMS = 1000, 768
LONGEST = 2_000_000  # images after which a side is given up


class Usual:
    """`bench_reference.GanLoop` on batches of prepared images in memory, mirrored at random."""

    turn = 12_800  # images between scores

    def __init__(self, settings: Settings, data: PreparedData, accelerator: Accelerator, folder: Path) -> None:
        self.batch, self.file, self.images = settings.batch, folder / "reference.pt", 0
        words = ["data=none", f"model.width={settings.width}", f"model.image_size={data.images.shape[1]}"]
        loop = self.loop = reference.GanLoop(compose("gen", words).model, accelerator.device, ranks=1)
        self.bank = ImageBank(data.images, data.indices("all"), accelerator.device)
        parts = ("generator", "discriminator", "g_optimizer", "d_optimizer")
        self.parts: dict[str, Any] = {name: getattr(loop, name) for name in parts}
        torch.manual_seed(0)
        if self.file.exists():
            state = torch.load(self.file, weights_only=True)
            self.images = state["images"]
            torch.set_rng_state(state["random"])
            for name, part in self.parts.items():
                part.load_state_dict(state[name])

    def train(self) -> None:
        """Train until the next score."""
        with ordinary_allocation():
            for start in range(self.images, self.images + self.turn, self.batch):
                self.loop.step(self.bank.batch(start, self.batch).contiguous())
        self.images += self.turn

    def model(self) -> nn.Module:
        """The generator, in eval mode."""
        return copy.deepcopy(self.loop.generator).eval()

    def save(self) -> None:
        """Write what is needed to continue."""
        state = {name: part.state_dict() for name, part in self.parts.items()}
        with atomic_path(self.file) as path:
            torch.save(state | {"images": self.images, "random": torch.get_rng_state()}, path)


class Ours:
    """`experiment=faces_fast` as it is shipped."""

    turn = 2_560

    def __init__(self, _: Settings, data: PreparedData, accelerator: Accelerator, folder: Path) -> None:
        words = [f"data={quoted(str(data.path))}", "name=ours", "experiment=faces_fast", f"save_every={self.turn}"]
        words.append(f"model.image_size={data.images.shape[1]}")
        config = typed(compose("gen", words), TrainConfig)
        self.trainer = TurnTrainer(config, accelerator, data, RunFolder(folder / "ours"))

    @property
    def images(self) -> int:
        """Images seen."""
        return self.trainer.images_seen

    def train(self) -> None:
        """Train until the next score."""
        self.trainer.turn(self.turn // self.trainer.settings.batch_size)

    def model(self) -> nn.Module:
        """The averaged generator."""
        return self.trainer.ema.model

    def save(self) -> None:
        """Nothing: the run has saved itself at the end of its turn."""


def race(side: Usual | Ours, scorer: Scorer, target: float, file: Path) -> list[dict[str, float]]:
    """Train until the score is at most `target`; its rows in `file`, one a score: images, score, seconds so far.

    The seconds are those of training alone. A file from an earlier start is continued where the side stands.
    """
    known = read_json(file)["rows"] if file.exists() else []
    rows: list[dict[str, float]] = [row for row in known if row["images"] <= side.images]
    while side.images < LONGEST and not (rows and rows[-1]["score"] <= target):
        spent = rows[-1] if rows else {"seconds": 0.0, "cpu_seconds": 0.0}
        wall, cpu = time.perf_counter(), time.process_time()
        side.train()
        row = {"images": side.images, "seconds": spent["seconds"] + time.perf_counter() - wall}
        row["cpu_seconds"] = spent["cpu_seconds"] + time.process_time() - cpu
        score = scorer(side.model())
        assert score is not None  # on the only process
        rows.append(row | {"score": score})
        side.save()
        write_json(file, {"rows": rows})
    return rows


def quality(bench: Bench) -> Result:
    """Training until FID-768 is as low as --target: experiment=faces_fast against the usual loop, for hours."""
    settings, accelerator = bench.settings, bench.accelerator
    assert settings.data is not None
    folder = Path(settings.keep or bench.folder / "quality")
    folder.mkdir(parents=True, exist_ok=True)
    data, network = PreparedData.open(settings.data), InceptionSection(settings.weights, DIMS)
    make = partial(make_features, "inception", network, str(accelerator.device))
    scorer = Scorer(make, SAMPLES, BATCH_SIZE, data, "all", accelerator, folder / "features")
    sides: dict[str, type[Usual | Ours]] = {"ours": Ours, "reference": Usual}
    found = {}
    for name, kind in sides.items():
        side = kind(settings, data, accelerator, folder)
        found[name] = race(side, scorer, settings.target, folder / f"{name}.json")
    ours, theirs = found["ours"][-1], found["reference"][-1]
    said = "{name} {score:.2f} after {images:,} images".format
    reached = ", ".join(said(name=name, **rows[-1]) for name, rows in found.items())
    ratio = {key: spread(np.array([theirs[key] / ours[key]])) for key in ("seconds", "cpu_seconds")}
    minutes = [spread(np.array([row["seconds"] / 60])) for row in (ours, theirs)]
    note = f"{reached}; {ratio['cpu_seconds']['median']:.1f} x the CPU time"
    return Result("quality", "minutes", minutes[0], minutes[1], ratio["seconds"], share=False, note=note, facts=found)
