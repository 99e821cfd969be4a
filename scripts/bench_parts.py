"""The parts of the benchmark that train: steps, training from files, data loading, and how it grows with the data."""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from core.cli.config import compose, quoted, typed
from core.cli.console import console
from core.data.dataset import PreparedData
from core.training.distributed import StopRequest, is_due, wait_for_all
from core.training.rundir import RunFolder
from gen.train import TrainConfig, Trainer
from scripts import bench_data as files
from scripts import bench_reference as reference
from scripts.bench_flops import gan_step_flops, matrix_side, unet_step_flops
from scripts.bench_measure import Clock, Result, Side, Spread, interleave, neighbour_ratios
from seg.settings import TrainConfig as SegConfig
from seg.train import Trainer as SegTrainer

ENDLESS = 10**9  # images: more than any part gets to


@dataclass(frozen=True)
class Settings:
    """Sizes of everything that is measured.

    Attributes:
        seconds: for each part, its first runs and slow parts' extra turns apart.
        batch, size, width: of the DCGAN, the batch of all processes together.
        precision: fp32 or bf16, of our side.
        compile: our side's networks with torch.compile, and its optimisers fused.
        unet_widths, unet_size, unet_batch: of the U-Nets.
        samples: pictures in our run of `sample`; the reference makes a quarter of them.
        features, dims: images in a run of `features` and the dimensions of a feature.
        moments: samples and dimensions in `frechet`.
        faces, count: different drawn faces, and how many pictures are made of them by repetition.
        largest: pictures of the largest data set in `scaling`.
        rank_batch: global batch in `ranks`, on the CPU whatever the device.
        matrix: side of the matrices whose product is the yardstick.
    """

    seconds: float = 10.0
    batch: int = 128
    size: int = 64
    width: int = 64
    precision: str = "fp32"
    compile: bool = False
    unet_widths: tuple[int, ...] = (16, 32, 64, 128, 256)
    unet_size: int = 64
    unet_batch: int = 16
    samples: int = 1000
    features: int = 16
    dims: int = 2048
    moments: tuple[int, int] = (1000, 2048)
    faces: int = 64
    count: int = 2048
    largest: int = 1_000_000
    rank_batch: int = 64
    matrix: int = 2048


class Bench:
    """What the parts share: settings, processes, a clock and the data, made when a part first asks for them.

    Args:
        folder: a temporary folder that all processes see.
    """

    def __init__(self, settings: Settings, accelerator: Accelerator, folder: Path) -> None:
        self.settings, self.accelerator, self.folder = settings, accelerator, folder
        self.clock = Clock(accelerator)

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        device = self.accelerator.device
        assert isinstance(device, torch.device)
        return device

    @property
    def ranks(self) -> int:
        """Processes that train together."""
        return int(self.accelerator.num_processes)

    @property
    def share(self) -> int:
        """Images of a batch that fall to this process."""
        return self.settings.batch // self.ranks

    def interleave(self, *sides: Side) -> dict[str, np.ndarray]:
        """The rates of the sides, see `bench_measure.interleave`."""
        return interleave(sides, self.settings.seconds, self.clock)

    @cached_property
    def faces(self) -> list[files.Face]:
        """Drawn pictures and masks."""
        return files.draw_faces(self.settings.faces)

    def _shared(self, folder: Path, make: Callable[[], object]) -> Path:
        """A folder that process 0 makes."""
        if self.accelerator.is_main_process and not folder.exists():
            make()
        wait_for_all()
        return folder

    def prepared(self, size: int) -> PreparedData:
        """The faces prepared at this size."""
        folder = self.folder / f"faces{size}"
        return PreparedData.open(
            self._shared(folder, lambda: files.prepare_faces(self.faces, self.settings.count, size, folder))
        )

    @cached_property
    def jpegs(self) -> Path:
        """The faces as JPEG files."""
        folder = self.folder / "jpegs"
        return self._shared(folder, lambda: files.write_jpegs(self.faces, self.settings.count, folder))

    def real(self) -> Tensor:
        """A batch of this process, float (share, 3, size, size), channel planes."""
        rows = np.arange(self.share) % self.settings.count
        pixels = torch.from_numpy(np.asarray(self.prepared(self.settings.size).images[rows])).to(self.device)
        return pixels.permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()

    def gan_trainer(self, name: str, data: PreparedData | None = None) -> TurnTrainer:
        """Our training run."""
        data = data or self.prepared(self.settings.size)
        config = gan_config(self.settings, data.path, self.folder / "runs", name)
        return TurnTrainer(config, self.accelerator, data, RunFolder(self.folder / "runs" / name))


def gan_config(settings: Settings, data: Path, runs: Path, name: str) -> TrainConfig:
    """Settings of `gen.train` as its user gets them, but for what this benchmark varies."""
    words = [
        f"data={quoted(str(data))}",
        f"runs={quoted(str(runs))}",
        f"name={name}",
        f"total_images={ENDLESS}",
        f"batch_size={settings.batch}",
        f"mixed_precision={settings.precision}",
        *compiled(settings),
        f"model.image_size={settings.size}",
        f"model.width={settings.width}",
    ]
    return typed(compose("gen", words), TrainConfig)


def compiled(settings: Settings) -> list[str]:
    """What `--compile` adds to the settings of a training command."""
    return ["compile=true", "optim.fused=true"] if settings.compile else []


class TurnTrainer(Trainer):
    """A training run in turns: checkpoints are written when they are due, not at the end of every turn."""

    saved = 0

    def save(self) -> None:
        """As in a run that goes on."""
        if is_due(self.saved, self.images_seen, self.settings.save_every):
            super().save()
            self.saved = self.images_seen

    def turn(self, steps: int) -> float:
        """Train for so many steps with all that a run does around them; returns their images."""
        self.settings.total_images = self.images_seen + steps * self.settings.batch_size
        self.train(StopRequest())
        return float(steps * self.settings.batch_size)


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Keep progress bars and messages of what is measured off the terminal; they are made as always."""
    before, console.quiet = console.quiet, True
    try:
        with warnings.catch_warnings():
            # On one core the tutorial's two workers are more than PyTorch advises.
            warnings.filterwarnings("ignore", message="This DataLoader will create")
            yield
    finally:
        console.quiet = before


def repeated(step: Callable[[], object], amount: float) -> Callable[[int], float]:
    """Work for a `Side`: so many steps of `amount` each."""

    def work(count: int) -> float:
        for _ in range(count):
            step()
        return count * amount

    return work


def arithmetic(bench: Bench, per_image: float, rates: dict[str, np.ndarray]) -> tuple[str, dict[str, Any]]:
    """A note and facts: what our side reaches of the arithmetic of a matrix product measured in the same turns."""
    achieved = rates["ours"] * per_image / bench.ranks
    share = Spread.of(neighbour_ratios(achieved, rates["matrix"]))
    reached, peak = Spread.of(achieved).median, Spread.of(rates["matrix"]).median
    processes = " a process" if bench.ranks > 1 else ""
    rate = f"{reached / 1e12:.3g} TFLOP/s" if reached >= 1e12 else f"{reached / 1e9:.3g} GFLOP/s"
    product = f"a matrix product in {bench.settings.precision} ({peak / 1e9:,.0f} GFLOP/s)"
    note = f"{rate}{processes}, {share.median:.0%} of {product}"
    facts = {
        "flop_per_image": per_image,
        "flop_per_second": reached,
        "matrix_flop_per_second": peak,
        "share_of_matrix": vars(share),
        "matrix": bench.settings.matrix,
    }
    return note, {"flops": facts}


def gan_step(bench: Bench) -> Result:
    """Our DCGAN training step, its batch and its average included, against the plain one on images in memory."""
    settings, trainer, real = bench.settings, bench.gan_trainer("step"), bench.real()
    plain = reference.GanLoop(settings.size, settings.width, bench.device, bench.ranks)
    rates = bench.interleave(
        Side("ours", repeated(trainer.step, settings.batch)),
        Side("reference", repeated(lambda: plain.step(real), settings.batch), plain=True),
        matrix_side(bench.device, settings.precision, settings.matrix),
    )
    note, facts = arithmetic(bench, gan_step_flops(trainer.config.model), rates)
    return Result.of_rates("gan-step", "images/s", rates, note=note, facts=facts)


def gan_epoch(bench: Bench) -> Result:
    """Training with statistics, grids and checkpoints from a prepared folder, against the plain step fed with JPEGs."""
    settings, trainer = bench.settings, bench.gan_trainer("epoch")
    plain = reference.GanLoop(settings.size, settings.width, bench.device, bench.ranks)
    loader = reference.FolderLoader(bench.jpegs, settings.size, bench.share, bench.accelerator.process_index)

    def epoch(steps: int) -> float:
        for images in loader.batches(steps):
            plain.step(images.to(bench.device))
        return steps * settings.batch

    # Fewer batches than workers would leave one of them idle.
    rates = bench.interleave(Side("ours", trainer.turn), Side("reference", epoch, reference.LOADER_WORKERS, plain=True))
    note = f"ours from a prepared folder; reference: {reference.LOADER_WORKERS} workers decode JPEGs of 178x218"
    return Result.of_rates("gan-epoch", "images/s", rates, note=note)


def unet_step(bench: Bench) -> Result:
    """Our U-Net step, with its loss, clipping and average, against the plain one; both on examples in memory."""
    settings = bench.settings
    data = bench.prepared(settings.unet_size)
    words = [
        f"data={quoted(str(data.path))}",
        f"runs={quoted(str(bench.folder / 'runs'))}",
        "name=unet",
        f"total_images={ENDLESS}",
        f"batch_size={settings.unet_batch}",
        f"mixed_precision={settings.precision}",
        *compiled(settings),
        "augment=none",
        "workers=0",
        f"model.network.widths={list(settings.unet_widths)}",
    ]
    config = typed(compose("seg", words), SegConfig)
    trainer = SegTrainer(config, bench.accelerator, data, RunFolder(bench.folder / "runs" / "unet"))
    batches = list(itertools.islice(trainer.batches, 2))
    trainer.batches = itertools.cycle(batches)
    images, masks = batches[0].images.contiguous(), batches[0].masks
    plain = reference.UNetLoop(settings.unet_widths, len(data.classes), bench.device, bench.ranks)
    rates = bench.interleave(
        Side("ours", repeated(trainer.step, settings.unet_batch)),
        Side("reference", repeated(lambda: plain.step(images, masks), settings.unet_batch), plain=True),
        matrix_side(bench.device, settings.precision, settings.matrix),
    )
    note, facts = arithmetic(bench, unet_step_flops(trainer.recipe, settings.unet_size), rates)
    return Result.of_rates("unet-step", "images/s", rates, note=note, facts=facts)


def data_share(bench: Bench) -> Result:
    """Time to make a batch against the time of a whole training step."""
    trainer = bench.gan_trainer("data")
    rates = bench.interleave(Side("ours", loading(bench, trainer)), Side("reference", repeated(trainer.step, 1)))
    load, step = 1e3 / rates["ours"], 1e3 / rates["reference"]
    return Result(
        "data",
        "ms/batch",
        Spread.of(load),
        Spread.of(step),
        Spread.of(neighbour_ratios(load, step)),
        share=True,
        note="ours: making a batch; reference: the whole step",
        facts={"turns": len(load)},
    )


def loading(bench: Bench, trainer: Trainer) -> Callable[[int], float]:
    """Work for a `Side`: the batches of this process, one after another."""
    batch, rank = bench.settings.batch, bench.accelerator.process_index
    place = itertools.count()
    return repeated(lambda: trainer.bank.batch(next(place) * batch, batch, rank, bench.ranks), 1)


def scaling(bench: Bench) -> Result:
    """Training steps from a large data set against those from a small one, and how long batches of each take."""
    settings = bench.settings
    counts = [max(settings.batch, settings.largest // smaller) for smaller in (1, 10, 100)]
    trainers = []
    for number, count in enumerate(counts):
        folder = bench.folder / f"black{number}"
        if bench.accelerator.is_main_process:
            files.write_sparse(folder, count, settings.size)
        wait_for_all()
        trainers.append(bench.gan_trainer(f"scaling{number}", files.open_sparse(folder)))
    rates = bench.interleave(
        Side("ours", repeated(trainers[0].step, settings.batch)),
        Side("reference", repeated(trainers[-1].step, settings.batch)),
        *(Side(f"{count:,}", loading(bench, trainer)) for count, trainer in zip(counts, trainers, strict=True)),
    )
    loads = {f"{count:,}": Spread.of(1e3 / rates[f"{count:,}"]).median for count in counts}
    text = ", ".join(f"{milliseconds:.2g} ms from {count}" for count, milliseconds in reversed(loads.items()))
    note = f"ours: {counts[0]:,} pictures; reference: {counts[-1]:,}; a batch takes {text}"
    return Result.of_rates("scaling", "images/s", rates, note=note, facts={"milliseconds_per_batch": loads})
