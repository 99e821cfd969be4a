"""The score of one source against real images: what `eval.fid` computes, and `eval.compare` where a result is missing.

The network and its input are those of pytorch-fid by default; the distance is computed here in float64. Only the
distance on 2048-dimensional Inception features is called FID. Every other choice is reported under another name.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from core import __version__
from core.cli.errors import Interrupted, UserError
from core.cli.files import writable
from core.training.distributed import Ranks
from core.training.rundir import flatten
from eval.distances import Score, plan_floor, score_against, spread
from eval.features.cache import ExtractionInterrupted, Extractor
from eval.features.extractors import PUBLISHED_SHA256_PREFIX, Features, dims_of, make_features
from eval.features.image_sets import Samples, is_run, open_samples
from eval.features.reference import RealFeatures, Reference, open_reference
from eval.features.settings import FID_DIMS, InceptionSection, metric_name, require_features
from eval.features.statistics_file import SUFFIX, KnownStatistics, open_statistics
from eval.judged import flattery
from eval.metrics.frechet import frechet_distance

RUN_FEATURES = "features"  # folder in a run that keeps the features of its samples
DISTANCE = "squared Frechet distance of Gaussians, float64, trace of the root by symmetric eigenvalues"


@dataclass
class FidConfig:
    """Settings of `eval.fid`; conf/fid.yaml explains each key."""

    source: str
    data: str
    features: str = "inception"
    fid: InceptionSection = field(default_factory=InceptionSection)
    n: int = 1000
    sets: int = 3
    seed: int = 0
    split: str = "all"
    reference_count: int | None = None
    reference_seed: int = 0
    floor: bool = False
    floor_sets: int = 3
    out: str | None = None
    batch_size: int | None = None
    device: str = "auto"


def check(config: FidConfig) -> None:
    """Refuse impossible settings before any work.

    Raises:
        UserError: naming the key.
    """
    require_at_least(config, n=2, sets=1, floor_sets=1, batch_size=1, seed=0, reference_seed=0)
    require_features(config.features, config.fid.dims)
    require_two_sides(config.source, config.data)


def require_two_sides(source: str, data: str) -> None:
    """Refuse to compare a folder or file with itself, which would be taken for a perfect score.

    Raises:
        UserError: naming it.
    """
    if Path(source).exists() and Path(data).exists() and Path(source).samefile(data):
        raise UserError(f"source and data are both {source}: data= is for the real images, such as data=data/celeba")


def require_at_least(config: object, **least: int) -> None:
    """Check the lower limits of numeric settings.

    Raises:
        UserError: naming the first key below its limit.
    """
    for key, limit in least.items():
        value = getattr(config, key)
        if value is not None and value < limit:
            raise UserError(f"{key}={value}: must be at least {limit}")


def score_source(config: FidConfig) -> dict[str, Any] | None:
    """Compute a score without writing it.

    Several processes share the extraction of features; only the first one returns a result.

    Returns:
        JSON-ready: metric, values (one per sample set), mean, sd (None for one set), floor, excess, and everything
        needed to reproduce them.

    Raises:
        UserError: source, reference, weights or settings are not usable.
    """
    check(config)
    software = versions()
    ranks = Ranks.join()
    samples = open_samples(Path(config.source), config.n, config.sets, config.seed, config.device)
    reference = open_real(config)
    if config.floor and isinstance(reference, Reference):
        require_floor(reference, samples.count, config.seed)
    features = make_features(config.features, config.fid, config.device, ranks)
    extractor = Extractor(features, config.batch_size, ranks)
    with _sample_features(samples, result_path(config), ranks) as folder:
        found = _distances(config, samples, reference, extractor, folder)
    if found is None:
        return None
    warnings = score_warnings(samples, samples.open_set(0).size, reference, features)
    figures = {
        "mean": found.mean,
        "sd": spread(found.values),
        "values": found.values,
        "floor": found.floor_facts(samples.count, config.seed),
        "excess": found.excess,
    }
    terms = score_terms(samples, reference, features)
    weights = {} if features.weights is None else {"path": str(features.weights)}
    terms["weights"] = weights | terms["weights"]
    made = {"device": str(features.device), "versions": software, "warnings": warnings}
    return {"metric": terms.pop("metric")} | figures | terms | made


def require_floor(reference: Reference, count: int, seed: int) -> None:
    """Refuse, before any work, a floor for which there are too few real images.

    Raises:
        UserError: says how many there are and how many are needed.
    """
    total, rows = len(reference.every), reference.rows
    if plan_floor(total, rows, count, 1, seed).subsets:
        return
    needed = 2 * count if len(rows) == total else len(rows) + count
    raise UserError(
        f"floor=true: {count:,} images a set need {needed:,} real images, there are {total:,}: "
        "give more, score fewer (n=), or leave out floor=true"
    )


def open_real(config: FidConfig) -> Reference | KnownStatistics:
    """What the source is compared with.

    Raises:
        UserError: it cannot be used, or is a file of statistics where the settings need the images.
    """
    path = Path(config.data)
    if path.suffix.lower() != SUFFIX or not path.is_file():
        return open_reference(path, config.split, config.reference_count, config.reference_seed)
    unmet = [key for key in ("split", "reference_count", "floor") if getattr(config, key) != getattr(FidConfig, key)]
    if unmet:
        raise UserError(
            f"{path} holds statistics and no images, from which no floor or excess can be computed and none be chosen: "
            f"leave out {', '.join(unmet)}, or give a prepared data set"
        )
    return open_statistics(path, dims_of(config.features, config.fid.dims))


def _distances(
    config: FidConfig, samples: Samples, reference: Reference | KnownStatistics, extractor: Extractor, folder: Path
) -> Score | None:
    """The score of every sample set; None except for the first process.

    Args:
        folder: for the features of samples.
    """
    real = None
    if isinstance(reference, Reference):
        real = RealFeatures(reference, extractor, folder)
        # The reference first: it takes longest, and its features survive a later failure.
        real.of(reference.rows)
        if config.floor:
            plan = plan_floor(len(real), reference.rows, samples.count, config.floor_sets, config.seed)
            for index, subset in enumerate(plan.subsets):
                real.of(subset, f"floor {index + 1}/{len(plan.subsets)}")
    sets = [extractor.samples(samples, index, folder) for index in range(samples.sets)]
    if not extractor.ranks.first:
        return None
    drawn = [kept.statistics() for kept in sets]
    if isinstance(reference, KnownStatistics):
        return Score([frechet_distance(one, reference.statistics) for one in drawn], [], 0, None)
    assert real is not None
    floor_sets = config.floor_sets if config.floor else 0
    return score_against(real, reference.rows, drawn, samples.count, floor_sets, config.seed)


def score_terms(samples: Samples, reference: Reference | KnownStatistics, features: Features) -> dict[str, Any]:
    """The part of a result that says how it was made; known before anything is computed."""
    return {
        "metric": features.metric,
        "source": samples.facts,
        "reference": reference.facts,
        "features": {"name": features.name, "dims": features.dims, "transform": features.transform},
        "weights": {"sha256": features.weights_sha256},
        "distance": DISTANCE,
    }


def score_warnings(
    samples: Samples, size: tuple[int, int], reference: Reference | KnownStatistics, features: Features
) -> list[str]:
    """What makes a score of samples of this size (height, width) doubtful, one line each."""
    warnings = [*samples.warnings, *reference.warnings]
    if isinstance(reference, Reference) and size != reference.every.size:
        (height, width), (real_height, real_width) = size, reference.every.size
        warnings.append(f"scored images are {width}x{height}, the reference is {real_width}x{real_height}")
    if features.name == "inception" and not features.weights_sha256.startswith(PUBLISHED_SHA256_PREFIX):
        warnings.append("the Inception weights are not pytorch-fid's published file (another sha256)")
    flattered = flattery(samples, features)
    return warnings if flattered is None else [flattered, *warnings]


def result_path(config: FidConfig) -> Path:
    """Where a result belongs: `out`, else in a run or beside anything else, under a name that says the metric.

    Nothing is written into a folder of images, because it may be packed or scored again as it is.
    """
    inception = config.features == "inception"
    metric = f"fid-{config.fid.dims or FID_DIMS}" if inception else metric_name(config.features)
    source = Path(config.source)
    if config.out is not None:
        return Path(config.out)
    return source / f"{metric}.json" if is_run(source) else Path(f"{source.absolute()}.{metric}.json")


def command_of(settings: FidConfig) -> str:
    """The command that makes a result on these settings in a file of one's own."""
    given, usual = (flatten(asdict(config)) for config in (settings, FidConfig(settings.source, settings.data)))
    words = [f"{key}={value}" for key, value in given.items() if value != usual[key] and value is not None]
    source = [f"source={settings.source}", f"data={settings.data}"]
    return shlex.join(["facet", "score", *source, *words, "out=FILE.json"])


def can_be_written(path: Path) -> bool:
    """Whether a result file can be written or replaced."""
    return not path.is_dir() and writable(path.absolute().parent)


def run_features(samples: Samples) -> Path | None:
    """The folder in a run that keeps features of samples of this model; None unless the samples come from a run."""
    if samples.facts["kind"] != "model":
        return None
    model = Path(samples.facts["model"])
    return model.parent / RUN_FEATURES / model.stem if is_run(model.parent) and writable(model.parent) else None


@contextmanager
def _sample_features(samples: Samples, result: Path, ranks: Ranks) -> Iterator[Path]:
    """The folder for features of samples: kept in a run, else a temporary one beside the result."""
    kept = run_features(samples)
    if kept is not None:
        try:
            yield kept
        except KeyboardInterrupt:
            raise Interrupted(f"features are kept in {kept} and with the data; the same command continues") from None
        return
    folder = result.with_name(f".{result.name}.{ranks.of_first(os.getpid())}.features")
    try:
        yield folder
        ranks.wait()
    except KeyboardInterrupt:
        raise Interrupted("features of the scored images are not kept, those of the real ones are") from None
    except ExtractionInterrupted as stop:
        if stop.folder.is_relative_to(folder):
            raise Interrupted("these features are not kept, those of real images extracted before are") from None
        raise
    finally:
        if ranks.first:
            shutil.rmtree(folder, ignore_errors=True)


def versions() -> dict[str, str]:
    """Versions of the software that computed a result."""
    found = {"python": platform.python_version(), "facet-faces": __version__}
    for package in ("torch", "torchvision", "pytorch-fid", "timm", "numpy", "pillow"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "unknown"  # not installed, or without metadata
    return found
