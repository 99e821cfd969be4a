"""DiscriminatorWrapper generated images on one page: `python -m eval.report runs/faces data=data/celeba`.

Score with its spread and floor against several references, KID, precision and recall, honesty checks, pictures.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from core.cli.config import config_command, quoted
from core.cli.console import say
from core.cli.errors import UserError
from core.cli.files import atomic_path, digest_of, writable, write_json
from core.data.images import make_grid, png_bytes
from core.training.distributed import Ranks, set_up_cpu
from eval.checks.copies import duplicates, memorisation
from eval.checks.evidence import Evidence
from eval.checks.pixels import pixel_statistics
from eval.checks.verdicts import Check, mode_collapse, sample_size
from eval.features.cache import Extractor, features_key, remembered
from eval.features.extractors import InceptionFeatures, require_dims
from eval.features.image_sets import LOSSY, FileImages, ImageSet, is_run, open_source
from eval.fid import FidSection, doubts, make_features, run_features, versions
from eval.metrics.fid_infinity import extrapolate
from eval.metrics.frechet import frechet_distance
from eval.metrics.kid import kernel_distance_subsets
from eval.metrics.prdc import Manifold, manifold, nearest
from eval.page.page import render_page

GRID = 64  # pictures of each kind on the page
CHECKED = 5_000  # samples that the checks look at: they compare all with all
HELD_OUT = 1000  # real images that show how near unseen faces come to the training images
KID_IMAGES = 10_000  # of each side, that KID's subsets are drawn from
KID_SIZE = 1000  # images of a subset (Binkowski et al. 2018)
NEIGHBOURS = 5  # k of precision, recall, density and coverage


@dataclass
class ReportConfig:
    """What conf/report.yaml holds; its help explains each key."""

    source: str
    data: str
    real: str | None = None
    features: str = "inception"
    fid: FidSection = field(default_factory=FidSection)
    n: int = 1000
    sets: int = 5
    seed: int = 0
    reference_count: int = 1000
    floor_sets: int = 5
    large: list[int] = field(default_factory=list)
    infinity: bool = False
    kid_subsets: int = 50
    out: str | None = None
    batch_size: int = 16
    device: str = "auto"


def build(config: ReportConfig, folder: Path) -> tuple[dict[str, Any], dict[str, bytes]] | None:
    """The content of report.json, and the PNG files that go onto the page.

    Several processes share the work on features; all but the first then return None.

    Args:
        folder: where features of samples and figures that take long are kept, unless the run that they come from can
            keep them.

    Raises:
        UserError: settings, source, data or weights that are not usable.
    """
    check(config)
    ranks = Ranks.join()
    source = open_source(Path(config.source), config.n, config.sets, config.seed, config.device)
    if config.large and source.facts["kind"] != "model":
        raise UserError(f"large={config.large} needs a run or model: {config.source} holds just what it holds")
    evidence = Evidence(source, Path(config.data), config.seed, None if config.real is None else Path(config.real))
    extractor = Extractor(make_features(config.features, config.fid, config.device, ranks), config.batch_size, ranks)
    folder = run_features(source) or folder
    many = None
    if config.large:  # the sets are the first of these samples: no image is looked at twice
        count = max(*config.large, config.n * config.sets)
        many = open_source(Path(config.source), count, 1, config.seed, config.device)
    evidence.extract(extractor, folder, many)
    if not ranks.first:
        return None
    evidence.read_samples(CHECKED)
    scores = evidence.scores(config.reference_count, config.floor_sets)
    larger, infinity = at_larger_numbers(config, evidence)
    faithful, floor = faithfulness(evidence)
    checks = honesty(evidence, faithful, floor)
    pictures = {check.name: png_bytes(check.pictures) for check in checks if check.pictures is not None}
    pictures["samples"] = png_bytes(make_grid(evidence.pixels[:GRID]))
    pictures["reals"] = png_bytes(make_grid(evidence.real_pixels(evidence.real_rows(GRID))))
    facts = source.facts
    report = {
        "format": 1,
        "subject": {name: facts[name] for name in ("path", "kind", "count", "sets")},
        "metric": extractor.features.metric,
        "scores": scores,
        "larger": larger,
        "infinity": infinity,
        "kid": kid(config, evidence),
        "manifold": None if faithful is None else asdict(faithful),
        "checks": [as_json(check) for check in checks],
        "limits": limits(config, evidence, scores),
        "provenance": provenance(config, evidence),
    }
    return report, pictures


def check(config: ReportConfig) -> None:
    """Refuse numbers that make no sense before any work.

    Raises:
        UserError: naming the key.
    """
    least = {"n": 2, "sets": 1, "floor_sets": 1, "batch_size": 1, "seed": 0, "reference_count": 2, "kid_subsets": 2}
    for key, limit in least.items():
        if getattr(config, key) < limit:
            raise UserError(f"{key}={getattr(config, key)}: must be at least {limit}")
    if any(count < 2 for count in config.large):
        raise UserError(f"large={config.large}: each must be at least 2")
    if config.features == "inception":
        require_dims(config.fid.dims)
    if config.infinity and max(config.large, default=0) < 10_000:
        raise UserError("infinity=true extrapolates from at least 10,000 samples: give large=[10000] or more")


def at_larger_numbers(config: ReportConfig, evidence: Evidence) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """The score against all real images at the numbers in `large`, and extrapolated from the largest; kept.

    The smaller sets are the first samples of the largest one.
    """
    if evidence.many is None:
        return [], None
    drawn = evidence.many.take(np.arange(max(config.large)))
    key = evidence.key() | {"large": sorted(config.large), "infinity": config.infinity}

    def compute() -> dict[str, Any]:
        real = evidence.real.sums(np.arange(len(evidence.real))).statistics()
        larger = [
            {"n": count, "value": frechet_distance(drawn.take(np.arange(count)).sums().statistics(), real)}
            for count in sorted(config.large)
        ]
        if not config.infinity:
            return {"larger": larger, "infinity": None}
        found = extrapolate(real, drawn, seed=config.seed)
        infinity = {"value": found.value, "points": found.points, "from": found.start, "to": found.stop}
        return {"larger": larger, "infinity": infinity | {"residual": found.residual}}

    kept = remembered(evidence.folder, "large", key, compute)
    return kept["larger"], kept["infinity"]


def kid(config: ReportConfig, evidence: Evidence) -> dict[str, Any]:
    """KID over all sample sets, 10,000 images at most; kept, since it takes a while.

    A subset holds at most half of the smaller side: subsets that are nearly the whole show no spread.
    """
    count, sets = evidence.n, evidence.source.sets
    each = min(count, KID_IMAGES // sets + 1)
    reals = evidence.real_rows(min(KID_IMAGES, len(evidence.real)))
    size = max(2, min(KID_SIZE, each * sets // 2, len(reals) // 2))
    key = evidence.key() | {"subsets": config.kid_subsets, "size": size, "reals": len(reals), "of a set": each}

    def compute() -> dict[str, Any]:
        generated = np.concatenate([drawn[:each] for drawn in evidence.sets])
        real = evidence.features[reals]
        return asdict(kernel_distance_subsets(real, generated, config.kid_subsets, size, config.seed))

    return remembered(evidence.folder, "kid", key, compute) | {"subset_size": size}


def faithfulness(evidence: Evidence) -> tuple[Manifold | None, Manifold | None]:
    """Precision, recall, density and coverage of the first set, and of other real images in its place; kept.

    Both at one number, at most half of the real images; None where these are too few.
    """
    count = min(evidence.n, len(evidence.real) // 2, CHECKED)
    if count <= NEIGHBOURS:
        return None, None

    def compute() -> dict[str, Any]:
        real, others = (evidence.features[evidence.real_rows(count, part)] for part in (0, 1))
        drawn = evidence.sets[0][:count]
        return {name: asdict(manifold(real, one, NEIGHBOURS)) for name, one in (("samples", drawn), ("reals", others))}

    found = remembered(evidence.folder, "manifold", evidence.key() | {"count": count, "k": NEIGHBOURS}, compute)
    return Manifold(**found["samples"]), Manifold(**found["reals"])


def honesty(evidence: Evidence, faithful: Manifold | None, floor: Manifold | None) -> list[Check]:
    """All checks of the first sample set, of its first 5,000 samples if there are more."""
    rows, pixels = evidence.real_rows(min(evidence.n, CHECKED)), evidence.pixels
    real, drawn = evidence.features[rows], evidence.sets[0][: len(pixels)]
    real_pixels = evidence.real_pixels(rows)
    coverage, usual = (None if found is None else found.coverage for found in (faithful, floor))
    digests = {name: digest_of({"rows": getattr(evidence, name).tolist()}) for name in ("trained_on", "held_out")}
    key = evidence.key() | digests | {"most": HELD_OUT}
    near = remembered(evidence.folder, "nearest", key, lambda: neighbours(evidence))
    train, unseen = ((np.array(part[0]), np.array(part[1], np.int64)) for part in (near["train"], near["held_out"]))
    sizes = evidence.images.size, evidence.reference.every.size
    return [
        pixel_statistics(pixels, real_pixels),
        duplicates(pixels, drawn, real),
        memorisation(
            pixels,
            train,
            unseen if len(unseen[0]) else None,
            lambda index: evidence.real_pixels(evidence.trained_on[index]),
        ),
        mode_collapse(drawn, real, pixels, real_pixels, coverage, usual),
        sample_size(
            evidence.n,
            len(evidence.real),
            evidence.features.shape[1],
            sizes,
            lossy=(lossy_files(evidence.images), lossy_files(evidence.reference.every)),
        ),
    ]


def lossy_files(images: ImageSet) -> int:
    """How many of these are files of a lossy format."""
    return sum(file.suffix[1:].lower() in LOSSY for file in images.files) if isinstance(images, FileImages) else 0


def neighbours(evidence: Evidence) -> dict[str, Any]:
    """Distance and index of the training image nearest to each sample, and to each of some held-out reals."""
    chosen = np.random.default_rng(evidence.seed).permutation(evidence.held_out)[:HELD_OUT]
    queries = {"train": evidence.sets[0][:CHECKED], "held_out": evidence.features[np.sort(chosen)]}
    trained_on = evidence.features.take(evidence.trained_on)
    found = {}
    for name, features in queries.items():
        distance, index = nearest(features, trained_on.blocks()) if len(features) else ([], [])
        found[name] = [np.asarray(distance).tolist(), np.asarray(index).tolist()]
    return found


def as_json(check: Check) -> dict[str, Any]:
    """A check as report.json holds it; its pictures are on the page under its name."""
    shown = {name: getattr(check, name) for name in ("name", "verdict", "headline", "details", "figures")}
    return shown | {"pictures": None if check.pictures is None else check.name}


def limits(config: ReportConfig, evidence: Evidence, scores: list[dict[str, Any]]) -> list[str]:
    """What limits the meaning of the score, one sentence each."""
    lines = [
        f"The score is biased upward at {evidence.n:,} samples: compare it with scores at the same number and against "
        "the same reference only."
    ]
    if evidence.source.sets == 1:
        lines.append("There is one sample set, so nothing is known of the spread: a run or model can give several.")
    lines += [
        f"Against {score['against']} there is no floor: there are too few real images for it."
        for score in scores
        if score["floor"] is None
    ]
    if evidence.course is not None and not len(evidence.also_in_course):
        lines.append(
            "None of the course's real images was found in the data, pixel for pixel. Unless they are other pictures, "
            "they were made in another way, and their floor may be that of pictures against themselves: too low."
        )
    if evidence.doubt:
        lines.append(evidence.doubt)
    elif not len(evidence.held_out):
        lines.append(
            "The generator was trained on all of the data, so copying is judged by pictures alone: a run with "
            "split=train leaves real images to compare with."
        )
    warned = evidence.source.warnings + doubts(evidence.images.size, evidence.reference, evidence.extractor.features)
    return lines + [f"{warning[0].upper()}{warning[1:]}." for warning in warned]


def provenance(config: ReportConfig, evidence: Evidence) -> dict[str, Any]:
    """Everything needed to reproduce the report."""
    features = evidence.extractor.features
    weights = {"weights": str(features.weights)} if isinstance(features, InceptionFeatures) else {}
    return {
        "features": features_key(features) | weights,
        "samples": evidence.source.facts,
        "real images": evidence.reference.facts,
        "course's real images": None if evidence.course is None else evidence.course.facts,
        "settings": {"seed": config.seed, "floor_sets": config.floor_sets, "reference_count": config.reference_count},
        "device": str(features.device),
        "versions": versions(),
    }


def target(config: ReportConfig) -> Path:
    """The folder of the report.

    Raises:
        UserError: it is a file or cannot be written to.
    """
    source = Path(config.source)
    default = source / "report" if is_run(source) else Path(f"{source.resolve()}.report")
    folder = default if config.out is None else Path(config.out)
    if (folder.exists() and not folder.is_dir()) or not writable(folder):
        raise UserError(f"the report cannot be written to {folder}: give out=FOLDER, for report.html and report.json")
    return folder


def source_first(words: list[str]) -> list[str]:
    """The command line with a leading path written as `source=path`."""
    if words and not words[0].startswith("-") and ("=" not in words[0] or Path(words[0]).exists()):
        return [f"source={quoted(words[0])}", *words[1:]]
    return words


@config_command("report", ReportConfig)
def command(config: ReportConfig) -> None:
    """Write the report."""
    check(config)
    folder = target(config)
    set_up_cpu()
    built = build(config, folder / "cache")
    if built is None:
        return
    report, pictures = built
    write_json(folder / "report.json", report)
    with atomic_path(folder / "report.html") as temporary:
        temporary.write_text(render_page(report, pictures), encoding="utf-8")
    first = report["scores"][0]
    by = "" if first["sd"] is None else f" ± {first['sd']:.3g}"
    print(f"{report['metric']} {first['mean']:.4g}{by} against {first['against']}")
    for entry in report["checks"]:
        print(f"{entry['verdict']:<8}{entry['headline']}")
    say(f"report: {folder / 'report.html'}")


def main() -> None:
    """Entry point; the source may stand first without its key."""
    sys.argv[1:] = source_first(sys.argv[1:])
    command()


if __name__ == "__main__":
    main()
