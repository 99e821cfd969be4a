"""The parts of the benchmark; `--help` shows their docstrings."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import socket
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torchvision
from accelerate import Accelerator
from numpy.lib.format import open_memmap
from omegaconf import DictConfig
from pytorch_fid import inception as published
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from core.cli.config import compose, quoted, typed
from core.cli.files import sha256_of, write_json
from core.data.dataset import FORMAT, PreparedData
from core.data.images import MEMORY_FORMAT, write_png
from core.drawn.face import draw_face
from core.nn.fuse import fold_batch_norm
from core.nn.init import init_he
from core.nn.model_file import FILE_NAME, build_model, save_model
from core.prepare import pipeline
from core.prepare.sources import drawn_source, open_image_source
from core.training.distributed import Ranks, start_accelerator
from core.training.machine import cpu_cores
from core.training.meter import is_due
from core.training.rundir import RunFolder
from core.training.stopping import StopRequest
from eval.features.cache import Extractor
from eval.features.extractors import InceptionFeatures
from eval.features.image_sets import list_images
from eval.metrics.frechet import Statistics, frechet_distance
from gen.sample import BATCH_SIZE, generate_batches, write_samples
from gen.settings import TrainConfig
from gen.trainer import Trainer
from scripts import bench_reference as reference
from scripts.bench_measure import Result, Side, Work, interleave, neighbour_ratios, spread
from seg.settings import TrainConfig as SegConfig
from seg.trainer import Trainer as SegTrainer


@dataclass(frozen=True)
class Settings:
    """Sizes of everything that is measured; batches are those of all processes together."""

    seconds: float = 10.0  # per part
    batch: int = 128
    size: int = 64
    width: int = 64
    precision: str = "fp32"  # of our side
    compile: bool = False  # our networks with torch.compile, our optimisers fused
    unet_widths: tuple[int, ...] = (16, 32, 64, 128, 256)
    unet_size: int = 64
    unet_batch: int = 16
    samples: int = 1000  # in our run of `sample`; the reference makes a quarter of them
    features: int = 16  # images in a run of `features`
    dims: int = 2048
    moments: tuple[int, int] = (1000, 2048)  # samples and dimensions in `frechet`
    faces: int = 64  # drawn once each
    count: int = 2048  # pictures, by repeating the faces
    counts: tuple[int, ...] = (1_000_000, 100_000, 10_000)  # pictures in `scaling`
    rank_batch: int = 64  # in `ranks`
    matrix: int = 2048  # side of the matrices whose product is the yardstick
    data: str | None = None  # of `quality`: a prepared data set, weights of Inception, where to continue, and the goal
    weights: str | None = None
    keep: str | None = None
    target: float = 1.17


@dataclass(frozen=True)
class Bench:
    """What the parts share; `folder` is a temporary folder that all processes see, and holds what `make_data` made."""

    settings: Settings
    accelerator: Accelerator
    folder: Path

    def compare(self, part: str, unit: str, note: str, ours: Side, theirs: Side, *, share: bool = False) -> Result:
        """The result of a part that measures two sides."""
        return Result.of(part, unit, interleave(self.settings.seconds, ours, theirs), note, share=share)

    def config(self, command: str, data: str, *words: str) -> DictConfig:
        """The defaults of a training command, except for what the benchmark varies; runs do not end by themselves."""
        data, compiled = quoted(str(self.folder / data)), ["compile=true", "optim.fused=true"]
        goal = ["name=bench", "total_images=1_000_000_000", f"mixed_precision={self.settings.precision}"]
        return compose(command, [f"data={data}", *goal, *words, *(compiled if self.settings.compile else [])])

    def gan_trainer(self, name: str, data: str = "faces") -> TurnTrainer:
        """Our DCGAN training run on one of the data sets."""
        sizes, run = self.settings, RunFolder(self.folder / "runs" / name)
        words = [f"batch_size={sizes.batch}", f"model.image_size={sizes.size}", f"model.width={sizes.width}"]
        config = typed(self.config("gen", data, *words), TrainConfig)
        return TurnTrainer(config, self.accelerator, PreparedData.open(config.data), run)


class TurnTrainer(Trainer):
    """A training run in turns: checkpoints are written when they are due, not at the end of every turn."""

    saved = 0

    def save(self) -> None:
        """Write a checkpoint if one is due."""
        if is_due(self.saved, self.images_seen, self.settings.save_every):
            super().save()
            self.saved = self.images_seen

    def turn(self, steps: int) -> None:
        """Train for a number of steps, with everything that a run does around them."""
        self.settings.total_images = self.images_seen + steps * self.settings.batch_size
        self.train(StopRequest())


def make_data(settings: Settings, folder: Path) -> None:
    """Faces as JPEG files and prepared, others with masks, and black pictures in sparse files that take no room."""
    jpegs = folder / "jpegs" / "faces"  # torchvision's ImageFolder wants a subfolder
    jpegs.mkdir(parents=True)
    files = [jpegs / f"face-{index:06d}.jpg" for index in range(settings.count)]
    for index, file in enumerate(files[: settings.faces]):
        draw_face(0, index)[0].save(file, quality=90)  # about 11 KB, as in CelebA
    for index, file in enumerate(files[settings.faces :]):
        file.write_bytes(files[index % settings.faces].read_bytes())
    pipeline.prepare(open_image_source(jpegs.parent), folder / "faces", size=settings.size, workers=cpu_cores())
    pipeline.prepare(drawn_source(settings.faces, 0), folder / "masks", size=settings.unet_size)
    for count in settings.counts:
        black, shape = folder / f"black{count}", (count, settings.size, settings.size, 3)
        black.mkdir()
        open_memmap(black / "images.npy", mode="w+", dtype=np.uint8, shape=shape).flush()
        hashes = {"images.npy": sha256_of(black / "images.npy")}
        write_json(black / "meta.json", {"format": FORMAT, "count": count, "sha256": hashes})


def compare_steps(part: str, bench: Bench, batch: int, ours: Work, theirs: Work) -> Result:
    """The result of two training steps, and how much of the rate of a matrix product ours reaches."""
    with FlopCounterMode(display=False) as counter:  # two operations per multiply-add, on this process
        ours()
    width, precision = bench.settings.matrix, bench.settings.precision
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32  # which on a GPU may use TF32
    a, b = (torch.randn(width, width, device=bench.accelerator.device).to(dtype) for _ in range(2))
    sides = Side("ours", ours, batch), Side("reference", theirs, batch, plain=True)
    rates = interleave(bench.settings.seconds, *sides, Side("matrix", lambda: a @ b, 2.0 * width**3))
    achieved = rates["ours"] / batch * counter.get_total_flops()
    share, reached, peak = map(spread, (neighbour_ratios(achieved, rates["matrix"]), achieved, rates["matrix"]))
    product = f"a matrix product in {precision} ({peak['median'] / 1e9:,.0f} GFLOP/s)"
    note = f"{reached['median'] / 1e9:,.4g} GFLOP/s per process, {share['median']:.0%} of {product}"
    per_image = counter.get_total_flops() * bench.accelerator.num_processes / batch
    flops = {"flop_per_image": per_image, "flop_per_second": reached, "matrix": peak, "share_of_matrix": share}
    return Result.of(part, "images/s", rates, note, flops=flops)


def gan_step(bench: Bench) -> Result:
    """DCGAN training step: images in memory."""
    batch, trainer = bench.settings.batch, bench.gan_trainer("step")
    plain = reference.GanLoop(trainer.config.model, bench.accelerator.device, bench.accelerator.num_processes)
    real = trainer.bank.batch(0, batch, bench.accelerator.process_index, bench.accelerator.num_processes).contiguous()
    return compare_steps("gan-step", bench, batch, trainer.step, lambda: plain.step(real))


def gan_epoch(bench: Bench) -> Result:
    """DCGAN training from files: prepared data against a DataLoader over JPEGs."""
    settings, trainer, workers = bench.settings, bench.gan_trainer("epoch"), reference.WORKERS
    plain = reference.GanLoop(trainer.config.model, bench.accelerator.device, bench.accelerator.num_processes)
    share, rank = settings.batch // bench.accelerator.num_processes, bench.accelerator.process_index
    loader = reference.FolderLoader(bench.folder / "jpegs", settings.size, share, rank)

    def epoch(steps: int) -> None:
        for images in loader.batches(steps):
            plain.step(images.to(bench.accelerator.device))

    ours = Side("ours", trainer.turn, settings.batch, counted=True)
    theirs = Side("reference", epoch, settings.batch, plain=True, counted=True, least=workers)  # none idles
    note = f"ours from a prepared folder; reference: {workers} workers decode JPEGs of 178x218"
    return bench.compare("gan-epoch", "images/s", note, ours, theirs)


def unet_step(bench: Bench) -> Result:
    """U-Net training step: examples in memory."""
    settings, data = bench.settings, PreparedData.open(bench.folder / "masks")
    sizes = [f"batch_size={settings.unet_batch}", f"model.network.widths={list(settings.unet_widths)}"]
    config = typed(bench.config("seg", "masks", *sizes, "augment=none", "workers=0"), SegConfig)
    trainer = SegTrainer(config, bench.accelerator, data, RunFolder(bench.folder / "runs" / "unet"))
    batches = list(itertools.islice(trainer.batches, 2))
    trainer.batches = itertools.cycle(batches)
    images, masks = batches[0].images.contiguous(), batches[0].masks
    plain = reference.UNetLoop(trainer.recipe, bench.accelerator.device, bench.accelerator.num_processes)
    return compare_steps("unet-step", bench, settings.unet_batch, trainer.step, lambda: plain.step(images, masks))


def data(bench: Bench) -> Result:
    """Time to make a batch, as a share of the training step."""
    trainer, note = bench.gan_trainer("data"), "ours: making a batch; reference: the whole step"
    sides = _loading(bench, trainer, "ours"), Side("reference", trainer.step)
    return bench.compare("data", "ms/batch", note, *sides, share=True)


def _loading(bench: Bench, trainer: Trainer, name: str) -> Side:
    batch, rank, places = bench.settings.batch, bench.accelerator.process_index, itertools.count()
    return Side(name, lambda: trainer.bank.batch(next(places) * batch, batch, rank, bench.accelerator.num_processes))


def scaling(bench: Bench) -> Result:
    """Training from a million pictures against ten thousand."""
    batch, counts = bench.settings.batch, bench.settings.counts
    trainers = {f"{count:,}": bench.gan_trainer(f"scaling{count}", f"black{count}") for count in counts}
    large, *_, small = trainers
    sides = [Side("ours", trainers[large].step, batch), Side("reference", trainers[small].step, batch)]
    sides += [_loading(bench, trainer, name) for name, trainer in trainers.items()]
    rates = interleave(bench.settings.seconds, *sides)
    loads = {name: spread(1e3 / rates[name])["median"] for name in trainers}
    text = ", ".join(f"{loads[name]:.2g} ms from {name}" for name in reversed(trainers))
    note = f"ours: {large} pictures; reference: {small}; a batch takes {text}"
    return Result.of("scaling", "images/s", rates, note, milliseconds_per_batch=loads)


def sample(bench: Bench) -> Result:
    """1,000 samples as PNG files."""
    device, folder, count = bench.accelerator.device, bench.folder / "sample", bench.settings.samples
    recipe, model = bench.gan_trainer("sample").config.model["generator"], folder / FILE_NAME
    save_model(model, network := build_model(recipe), recipe, {})
    plain, fewer = network.to(device).eval(), max(1, count // 4)  # all pictures take the same time
    batches = partial(generate_batches, model, range(count), device=str(device))
    ours = Side("ours", lambda: write_samples(batches(), count, folder / "ours"), count)
    saving = partial(reference.save_samples, plain, fewer, folder / "reference", device)
    note, theirs = f"{count:,} PNG files, loading the model included", Side("reference", saving, fewer, plain=True)
    return bench.compare("sample", "images/s", note, ours, theirs)


def fold(bench: Bench) -> Result:
    """Networks with batch norm folded, against the same without."""
    settings, device, sides = bench.settings, bench.accelerator.device, []
    z, pictures = torch.randn(BATCH_SIZE, 100), torch.randn(settings.unet_batch, 3, *[settings.unet_size] * 2)
    recipe = {"image_size": settings.size, "width": settings.width}
    unet = {"widths": list(settings.unet_widths), "norm": "batch"}
    for name, inputs, target in (("", z, "gen.dcgan.Generator"), (" U-Net", pictures, "seg.unet.UNet")):
        plain = build_model({"_target_": target, **(unet if name else recipe)}).eval()
        inputs = inputs.to(device).contiguous(memory_format=MEMORY_FORMAT) if name else inputs.to(device)
        for side, network in (("ours", fold_batch_norm(plain)), ("reference", plain)):
            placed = network.to(device).to(memory_format=MEMORY_FORMAT)
            sides.append(Side(side + name, torch.inference_mode()(partial(placed, inputs)), len(inputs)))
    rates = interleave(settings.seconds, *sides)
    ratio = spread(neighbour_ratios(rates["ours U-Net"], rates["reference U-Net"]))
    figures = "{median:.2f} x ({low:.2f} - {high:.2f})".format(**ratio)
    note = f"DCGAN generator, {len(z)} at a time; U-Net at {settings.unet_size} pixels: {figures}"
    return Result.of("fold", "images/s", rates, note, unet=ratio)


def features(bench: Bench) -> Result:
    """Inception features of PNG files, against pytorch-fid."""
    count, dims, device = bench.settings.features, bench.settings.dims, bench.accelerator.device
    faces, folder = PreparedData.open(bench.folder / "faces").images, bench.folder / "pngs"
    for index in range(count):
        write_png(folder / f"{index:04d}.png", np.asarray(faces[index % len(faces)]))
    pictures = list_images(folder)
    weights, network = inception_networks(dims, bench.folder)
    extractor = Extractor(InceptionFeatures(dims, weights, device), None, Ranks())
    keys = ({"kind": "run", "number": number} for number in itertools.count())  # a new one, since features are kept
    ours = Side("ours", lambda: extractor.extract(lambda: pictures, next(keys), bench.folder, "features"), count)
    loop = partial(reference.published_features, pictures.files, network.to(device), dims, device, cpu_cores())
    theirs = Side("reference", loop, count, plain=True)
    return bench.compare("features", "images/s", f"{dims} dimensions; reference: pytorch-fid", ours, theirs)


def inception_networks(dims: int, folder: Path) -> tuple[Path, nn.Module]:
    """A weights file in pytorch-fid's format with random weights, and its network with the same: no download."""
    with (
        mock.patch.object(published, "load_state_dict_from_url", return_value={}),
        mock.patch.object(torchvision.models.Inception3, "load_state_dict"),
    ):
        whole = published.fid_inception_v3()
    init_he(whole)
    torch.save(whole.state_dict(), path := folder / "inception.pth")
    with mock.patch.object(published, "load_state_dict_from_url", return_value=whole.state_dict()):
        network: nn.Module = published.InceptionV3([published.InceptionV3.BLOCK_INDEX_BY_DIM[dims]])
    return path, network.eval()


def frechet(bench: Bench) -> Result:
    """Frechet distance, against SciPy's matrix root."""
    count, dims = bench.settings.moments
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((count, dims)), 1.1 * rng.standard_normal((count, dims)) + 0.1
    ours = Side("ours", lambda: frechet_distance(Statistics.of(a), Statistics.of(b)))
    theirs = Side("reference", lambda: reference.frechet_by_sqrtm(a, b))
    note = f"{count:,} x {dims:,} against as many, on the CPU; reference: SciPy's sqrtm"
    return bench.compare("frechet", "ms", note, ours, theirs)


def prepare(bench: Bench) -> Result:
    """JPEGs to a prepared data set."""
    size, count, workers, folder = bench.settings.size, bench.settings.count, cpu_cores(), bench.folder
    jpegs, note = folder / "jpegs", f"JPEGs of 178x218; ours with {workers} worker processes"
    again = partial(pipeline.prepare, out=folder / "again", size=size, workers=workers, force=True)
    ours = Side("ours", lambda: again(open_image_source(jpegs)), count)
    theirs = Side(
        "reference", lambda: reference.prepare_one_by_one(jpegs, size, folder / "loop.npy"), count, plain=True
    )
    return bench.compare("prepare", "images/s", note, ours, theirs)


def ranks(bench: Bench) -> Result:
    """Two processes against one, on the CPU."""
    batch, alone = bench.settings.rank_batch, {"ACCELERATE_USE_CPU": "true"}
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    share = alone | {"LOCAL_WORLD_SIZE": "2"}  # half of the cores
    joined = share | {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    context = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:

        def side(name: str, size: int, *environments: dict[str, str]) -> Side:
            given = replace(bench.settings, batch=size, precision="fp32"), bench.folder
            pools = [(stack.enter_context(context.Pool(1)), (*given, words)) for words in environments]

            def turn(steps: int) -> None:
                for running in [pool.apply_async(_take_steps, (steps, *words)) for pool, words in pools]:
                    running.get()

            return Side(name, turn, batch, counted=True)

        ours = side("ours", batch, *(joined | {"RANK": rank, "LOCAL_RANK": rank} for rank in "01"))
        apart = side("apart", batch // 2, share, share)  # the same work without an exchange of gradients
        rates = interleave(bench.settings.seconds, ours, side("reference", batch, alone), apart)
    cost = spread(1 - neighbour_ratios(rates["ours"], rates["apart"]))
    note = f"ours: 2 processes on the CPU; reference: one; exchanging gradients costs {cost['median']:.0%}"
    return Result.of("ranks", "images/s", rates, note, without_exchange=spread(rates["apart"]), exchange_share=cost)


def _take_steps(steps: int, settings: Settings, folder: Path, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    for _ in range(steps):
        _trainer(settings, folder).step()


@cache
def _trainer(settings: Settings, folder: Path) -> Trainer:
    bench = Bench(settings, start_accelerator(settings.precision, None, folder), folder)
    return bench.gan_trainer(f"rank{os.getpid()}")
