"""The parts of the benchmark around training: preparing, sampling and scoring. They run on one process."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torchvision
from pytorch_fid import inception as published
from torch import nn

from core.cli.config import compose
from core.data.images import write_png
from core.nn.init import init_he, init_normal
from core.nn.model_file import FILE_NAME, build_model, save_model
from core.prepare.pipeline import prepare
from core.prepare.sources import open_image_source
from core.training.distributed import Ranks, cpu_cores
from eval.features.cache import Extractor
from eval.features.extractors import InceptionFeatures
from eval.features.image_sets import list_images
from eval.metrics.frechet import Statistics, frechet_distance
from gen.sample import generate_batches, write_samples
from scripts import bench_reference as reference
from scripts.bench_measure import Result, Side, Spread, neighbour_ratios
from scripts.bench_parts import Bench, gan_config

WARM_SAMPLES = 16


def sample(bench: Bench) -> Result:
    """PNG files from a model file, loading it included, against a loop that makes and saves one after another."""
    settings, device = bench.settings, bench.device
    recipe = gan_config(settings, bench.folder, bench.folder, "sample").model["generator"]
    model = bench.folder / "sample" / FILE_NAME
    network = build_model(recipe)
    init_normal(network)
    save_model(model, network, recipe, {})
    plain = reference.generator(settings.size, settings.width).to(device).eval()
    init_normal(plain)

    def ours(runs: int, count: int = settings.samples) -> float:
        for _ in range(runs):
            pictures = generate_batches(model, range(count), device=str(device))
            write_samples(pictures, count, bench.folder / "sample" / "ours")
        return runs * count

    # One picture costs what the next one does, so that a quarter of them tells the rate.
    def one_by_one(runs: int, count: int = max(1, settings.samples // 4)) -> float:
        for _ in range(runs):
            reference.save_samples(plain, count, bench.folder / "sample" / "reference", device)
        return runs * count

    rates = bench.interleave(
        Side("ours", ours, warm=partial(ours, 1, WARM_SAMPLES)),
        Side("reference", one_by_one, warm=partial(one_by_one, 1, WARM_SAMPLES), plain=True),
    )
    seconds = settings.samples / np.median(rates["ours"])
    note = f"{settings.samples:,} PNG files take {seconds:.2g} s, loading the model included"
    return Result.of_rates("sample", "images/s", rates, note=note)


def features(bench: Bench) -> Result:
    """Inception features of PNG files against pytorch-fid's own loop, with random weights."""
    settings, folder = bench.settings, bench.folder / "pngs"
    images = bench.prepared(settings.size).images
    for index in range(settings.features):
        write_png(folder / f"{index:04d}.png", np.asarray(images[index % len(images)]))
    weights, network = inception_networks(settings.dims, bench.folder)
    pictures = list_images(folder)
    batch = int(compose("fid", ["source=none", "data=none"]).batch_size)  # what eval.fid uses
    extractor = Extractor(InceptionFeatures(settings.dims, weights, bench.device), batch, Ranks())
    numbers = itertools.count()  # what is kept under one key would not be extracted again
    network.to(bench.device)

    def ours(runs: int) -> float:
        for _ in range(runs):
            extractor.extract(lambda: pictures, {"kind": "run", "number": next(numbers)}, bench.folder, "features")
        return runs * settings.features

    def theirs(runs: int) -> float:
        for _ in range(runs):
            reference.published_features(pictures.files, network, settings.dims, bench.device, cpu_cores())
        return runs * settings.features

    rates = bench.interleave(Side("ours", ours), Side("reference", theirs, plain=True))
    note = f"{settings.dims} dimensions; reference: pytorch-fid"
    return Result.of_rates("features", "images/s", rates, note=note)


def inception_networks(dims: int, folder: Path) -> tuple[Path, nn.Module]:
    """A weights file with random weights in pytorch-fid's format, and its network with the same: no download."""
    with (
        mock.patch.object(published, "load_state_dict_from_url", return_value={}),
        mock.patch.object(torchvision.models.Inception3, "load_state_dict"),
    ):
        whole = published.fid_inception_v3()
    init_he(whole)
    path = folder / "inception.pth"
    torch.save(whole.state_dict(), path)
    with mock.patch.object(published, "load_state_dict_from_url", return_value=whole.state_dict()):
        network = published.InceptionV3([published.InceptionV3.BLOCK_INDEX_BY_DIM[dims]])
    assert isinstance(network, nn.Module)
    return path, network.eval()


def frechet(bench: Bench) -> Result:
    """The distance of two sets of features, moments included, against the formula with SciPy's matrix root."""
    count, dims = bench.settings.moments
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((count, dims)), 1.1 * rng.standard_normal((count, dims)) + 0.1

    def ours(first: np.ndarray, second: np.ndarray) -> float:
        return frechet_distance(Statistics.of(first), Statistics.of(second))

    def times(distance, runs: int) -> float:  # type: ignore[no-untyped-def]
        for _ in range(runs):
            distance(a, b)
        return runs

    few = a[:, :16], b[:, :16]
    rates = bench.interleave(
        Side("ours", partial(times, ours), warm=lambda: ours(*few)),
        Side("reference", partial(times, reference.frechet_by_sqrtm), warm=lambda: reference.frechet_by_sqrtm(*few)),
    )
    milliseconds = {name: Spread.of(1e3 / values) for name, values in rates.items()}
    return Result(
        "frechet",
        "ms",
        milliseconds["ours"],
        milliseconds["reference"],
        Spread.of(neighbour_ratios(rates["ours"], rates["reference"])),
        note=f"{count:,} x {dims:,} against as many, on the CPU; reference: SciPy's sqrtm",
        facts={"turns": len(rates["ours"])},
    )


def prepare_files(bench: Bench) -> Result:
    """`scripts.prepare` of JPEG files, its worker processes and checksums included, against a loop over the files."""
    settings, jpegs, out = bench.settings, bench.jpegs, bench.folder

    def ours(runs: int) -> float:
        done = 0
        for _ in range(runs):
            workers = cpu_cores()
            source = open_image_source(jpegs)
            done += len(prepare(source, out / "prepared", size=settings.size, workers=workers, force=True).data)
        return done

    def loop(runs: int) -> float:
        return sum(reference.prepare_one_by_one(jpegs, settings.size, out / "loop.npy") for _ in range(runs))

    rates = bench.interleave(Side("ours", ours), Side("reference", loop, plain=True))
    note = f"JPEGs of 178x218; ours with {cpu_cores()} worker processes"
    return Result.of_rates("prepare", "images/s", rates, note=note)
