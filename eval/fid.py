"""Score a folder of PNGs, a packed archive or a trained model: `python -m eval.fid source=... data=...`.

The network and its input are those of pytorch-fid, the distance is ours in float64. The name FID is kept for the
2048-dimensional Inception features; every other choice is reported under a name of its own.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from core.cli.config import config_command
from core.cli.console import say, warn
from core.cli.errors import UserError
from core.cli.files import writable, write_json
from core.training.distributed import Ranks, pick_device, set_up_cpu
from eval.features.cache import Extractor
from eval.features.extractors import (
    PUBLISHED_SHA256_PREFIX,
    Features,
    InceptionFeatures,
    RandomFeatures,
    find_weights,
    require_dims,
)
from eval.features.image_sets import Source, is_run, open_source
from eval.features.reference import RealFeatures, Reference, open_reference
from eval.score import Score, plan_floor, score_against, spread

FEATURES = "features"  # folder in a run, for those of its samples
DISTANCE = "squared Frechet distance of Gaussians, float64, trace of the root by symmetric eigenvalues"
BIAS = (
    "Few images bias the score upward: at 1,000, a perfect sampler has FID of about 13-15 against all of CelebA and "
    "18-21 against 1,000 reals. Compare equal numbers only."
)
OTHER_SCALE = (
    "{} is on another scale than FID, and few images bias it upward: compare it with {} at equal numbers only."
)


@dataclass
class FidSection:
    """The Inception network: weights file (None: hub cache, else download) and block by its dimensions."""

    weights: str | None = None
    dims: int = 2048


@dataclass
class FidConfig:
    """Settings of `eval.fid`; conf/fid.yaml says what each means."""

    source: str
    data: str
    features: str = "inception"
    fid: FidSection = field(default_factory=FidSection)
    n: int = 1000
    sets: int = 3
    seed: int = 0
    split: str = "all"
    reference_count: int | None = None
    reference_seed: int = 0
    floor: bool = False
    floor_sets: int = 3
    out: str | None = None
    batch_size: int = 16
    device: str = "auto"


def score(config: FidConfig) -> dict[str, Any] | None:
    """Compute the score as configured and return the result, without writing it.

    Several processes share the work on features; all but the first then return None.

    Returns:
        JSON-ready: metric, values (one per sample set), mean, sd (None for one set), floor, excess, and everything
        needed to reproduce them.

    Raises:
        UserError: source, reference, weights or settings are not usable.
    """
    _check(config)
    ranks = Ranks.join()
    source = open_source(Path(config.source), config.n, config.sets, config.seed, config.device)
    reference = open_reference(Path(config.data), config.split, config.reference_count, config.reference_seed)
    extractor = Extractor(make_features(config.features, config.fid, config.device, ranks), config.batch_size, ranks)
    with features_folder(source, result_path(config), ranks) as folder:
        real = RealFeatures(reference, extractor, folder)
        # The reference first: it takes longest, and is kept should anything fail afterwards.
        real.of(reference.rows)
        plan = plan_floor(len(real), reference.rows, source.count, config.floor_sets, config.seed)
        if config.floor:
            for index, subset in enumerate(plan.subsets):
                real.of(subset, f"floor {index + 1}/{len(plan.subsets)}")
        sets = [extractor.samples(source, index, folder) for index in range(source.sets)]
        if not ranks.first:
            return None
        drawn = [kept.statistics() for kept in sets]
        floor_sets = config.floor_sets if config.floor else 0
        found = score_against(real, reference.rows, drawn, source.count, floor_sets, config.seed)
    warnings = source.warnings + doubts(source.open_set(0).size, reference, extractor.features)
    if config.floor and not plan.subsets:
        warnings.append(
            f"no floor at {source.count:,} images: it needs {2 * source.count:,} real images, there are {len(real):,}"
        )
    return _result(config, source, reference, extractor.features, found, warnings)


@contextmanager
def features_folder(source: Source, result: Path, ranks: Ranks) -> Iterator[Path]:
    """The folder for features of samples: in a run they are kept, beside anything else removed after the block."""
    kept = run_features(source)
    if kept is not None:
        yield kept
        return
    folder = result.with_name(f".{result.name}.{ranks.of_first(os.getpid())}.features")
    try:
        yield folder
        ranks.wait()
    finally:
        if ranks.first:
            shutil.rmtree(folder, ignore_errors=True)


def run_features(source: Source) -> Path | None:
    """Where a run keeps features of samples of this one of its models; None for what is not of a run."""
    if source.facts["kind"] != "model":
        return None
    model = Path(source.facts["model"])
    return model.parent / FEATURES / model.stem if is_run(model.parent) and writable(model.parent) else None


def make_features(name: str, inception: FidSection, device: str, ranks: Ranks | None = None) -> Features:
    """The extractor of this name, `inception` or `random`, on `device` (`auto`: a GPU if there is one).

    Args:
        ranks: processes that all make it; the first of them downloads the weights where they are not here.

    Raises:
        UserError: unknown name, device or dims; weights that cannot be had.
    """
    place = pick_device(device)
    if name == "random":
        return RandomFeatures(place)
    if name != "inception":
        raise UserError(f"features={name}: use inception, or random for the fd_random substitute")
    ranks = ranks or Ranks()
    if ranks.first:
        find_weights(inception.weights)
    ranks.wait()
    return InceptionFeatures(inception.dims, find_weights(inception.weights), place)


def _check(config: FidConfig) -> None:
    """Refuse numbers that make no sense before any work."""
    for key, least in (("n", 2), ("sets", 1), ("floor_sets", 1), ("batch_size", 1), ("seed", 0), ("reference_seed", 0)):
        if getattr(config, key) < least:
            raise UserError(f"{key}={getattr(config, key)}: must be at least {least}")
    if config.features == "inception":
        require_dims(config.fid.dims)


def doubts(size: tuple[int, int], reference: Reference, features: Features) -> list[str]:
    """What else to warn of once both sides are known."""
    doubts = []
    if size != reference.every.size:
        (height, width), (real_height, real_width) = size, reference.every.size
        doubts.append(f"scored images are {width}x{height}, the reference is {real_width}x{real_height}")
    if features.name == "inception" and not features.weights_sha256.startswith(PUBLISHED_SHA256_PREFIX):
        doubts.append("the Inception weights are not pytorch-fid's published file (another sha256)")
    return doubts


def _result(
    config: FidConfig,
    source: Source,
    reference: Reference,
    features: Features,
    found: Score,
    warnings: list[str],
) -> dict[str, Any]:
    """Everything needed to read the score and to reproduce it."""
    weights = {"path": str(features.weights)} if isinstance(features, InceptionFeatures) else {}
    return {
        "metric": features.metric,
        "mean": found.mean,
        "sd": spread(found.values),
        "values": found.values,
        "floor": found.floor_facts(source.count, config.seed),
        "excess": found.excess,
        "source": source.facts,
        "reference": reference.facts,
        "features": {"name": features.name, "dims": features.dims, "transform": features.transform},
        "weights": weights | {"sha256": features.weights_sha256},
        "distance": DISTANCE,
        "device": str(features.device),
        "versions": versions(),
        "warnings": warnings,
    }


def versions() -> dict[str, str]:
    """Versions of what computed a result."""
    packages = ("facet-faces", "torch", "torchvision", "pytorch-fid", "numpy", "pillow")
    return {"python": platform.python_version()} | {name: _version(name) for name in packages}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"  # Facet itself, run from its folder


def result_path(config: FidConfig) -> Path:
    """Where a result belongs: `out`, else next to what is scored, under a name that says the metric.

    Only a run takes it inside: a folder of images may be packed or scored by others as it is.

    Raises:
        UserError: it cannot be written there.
    """
    metric = "fd_random" if config.features == "random" else f"fid-{config.fid.dims}"
    source = Path(config.source)
    if config.out is not None:
        path = Path(config.out)
    elif is_run(source):
        path = source / f"{metric}.json"
    else:
        path = Path(f"{source.absolute()}.{metric}.json")
    existing = next(parent for parent in path.absolute().parents if parent.exists())
    if path.is_dir() or not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"the result cannot be written to {path}: give out=PATH.json")
    return path


def report(result: dict[str, Any]) -> str:
    """The score for a reader: a few lines of text."""
    source, reference, floor = result["source"], result["reference"], result["floor"]
    sets = f"{source['sets']} sets of {source['count']:,}" if source["sets"] > 1 else f"{source['count']:,} images"
    part = "" if reference["split"] == "all" else f", split {reference['split']}"
    chosen = "" if reference["subset_seed"] is None else f", chosen with seed {reference['subset_seed']}"
    rows = [
        (result["metric"], _with_sd(result["mean"], result["sd"])),
        ("scored", f"{source['path']}, {sets}"),
        ("reference", f"{reference['path']}, {reference['count']:,} images{part}{chosen}"),
    ]
    if floor is not None:
        spread = f"{floor['count']:,} reals against {floor['against']:,} others"
        rows.append(("floor", f"{_with_sd(floor['mean'], floor['sd'])}   {spread}"))
        rows.append(("excess", _number(result["excess"])))
    lines = [f"{name:<10} {text}" for name, text in rows]
    metric = result["metric"]
    return "\n".join([*lines, BIAS if metric == "FID" else OTHER_SCALE.format(metric, metric)])


def _with_sd(mean: float, sd: float | None) -> str:
    return _number(mean) if sd is None else f"{_number(mean)} ± {_number(sd)} (sd)"


def _number(value: float) -> str:
    """Three digits that matter: shallow features and fd_random have values far below 1."""
    return f"{value:.3f}" if abs(value) >= 1 else f"{value:.3g}"


@config_command("fid", FidConfig)
def main(config: FidConfig) -> None:
    """Score, print, and write the result as JSON."""
    _check(config)
    path = result_path(config)
    set_up_cpu()
    result = score(config)
    if result is None:
        return
    for warning in result["warnings"]:
        warn(warning)
    # Printed before it is written: a full disk then costs the file, not the number.
    print(report(result))
    write_json(path, result)
    say(f"result in {path}")


if __name__ == "__main__":
    main()
