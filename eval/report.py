"""Judge generated images on one page: `python -m eval.report runs/faces data=data/celeba`.

Score with its spread and floor against several references, KID, precision and recall, honesty checks, pictures.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from core.config import config_command
from core.console import say
from core.errors import UserError
from core.files import atomic_path, write_json
from core.images import make_grid, png_bytes
from core.runtime import share_cores
from eval.checks import Check, mode_collapse, sample_size
from eval.collect import features_key, kept_features, remembered
from eval.copy_checks import duplicates, memorisation
from eval.evidence import Evidence
from eval.extrapolate import extrapolate
from eval.features import InceptionFeatures
from eval.fid import FidSection, doubts, make_features, versions
from eval.frechet import frechet_distance
from eval.kernel import kernel_distance_subsets
from eval.manifold import Manifold, manifold, nearest
from eval.page import render_page
from eval.pixel_checks import pixel_statistics
from eval.reference import reference_key
from eval.sources import is_run, open_source

GRID = 64  # pictures of each kind on the page
HELD_OUT = 1000  # real images that show how near unseen faces come to the training images
KID_REALS = 10_000  # real images that KID's subsets are drawn from


@dataclass
class ReportConfig:
    """What conf/report.yaml holds; its help explains each key."""

    source: str
    data: str
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


def build(config: ReportConfig, folder: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The content of report.json, and the PNG files that go onto the page.

    Args:
        folder: where features of samples and figures that take long are kept.

    Raises:
        UserError: settings, source, data or weights that are not usable.
    """
    check(config)
    features = make_features(config.features, config.fid, config.device)
    source, data = Path(config.source), Path(config.data)
    evidence = Evidence(source, data, features, folder, config.n, config.sets, config.seed, config.batch_size)
    scores = [evidence.scores(way, config.floor_sets) for way in evidence.comparisons(config.reference_count)]
    larger, infinity = at_larger_numbers(config, evidence)
    measures = {"kid": kid(config, evidence), "manifold": asdict(faithfulness(evidence))}
    checks = honesty(evidence, measures["manifold"]["coverage"])
    pictures = {check.name: png_bytes(check.pictures) for check in checks if check.pictures is not None}
    pictures["samples"] = png_bytes(make_grid(evidence.pixels[:GRID]))
    pictures["reals"] = png_bytes(make_grid(evidence.real_pixels(evidence.real_rows(GRID))))
    facts = evidence.source.facts
    report = {
        "format": 1,
        "subject": {name: facts[name] for name in ("path", "kind", "count", "sets")},
        "metric": features.metric,
        "scores": scores,
        "larger": larger,
        "infinity": infinity,
        **measures,
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
    if config.infinity and max(config.large, default=0) < 10_000:
        raise UserError("infinity=true extrapolates from at least 10,000 samples: give large=[10000] or more")


def at_larger_numbers(config: ReportConfig, evidence: Evidence) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """The score against all real images at the numbers in `large`, and extrapolated from the largest.

    Raises:
        UserError: the source is not a model, which alone can give more samples.
    """
    if not config.large:
        return [], None
    if evidence.source.facts["kind"] != "model":
        raise UserError(f"large={config.large} needs a run or model: {config.source} holds just what it holds")
    real = evidence.statistics()
    larger = []
    for count in sorted(config.large):
        source = open_source(Path(config.source), count, 1, config.seed)
        key = {name: value for name, value in source.facts.items() if name not in ("path", "model")}
        drawn = kept_features(
            lambda source=source: source.open_set(0),  # type: ignore[misc]
            key | {"set": 0},
            evidence.folder,
            evidence.features,
            config.batch_size,
            f"{count:,} samples",
        )
        larger.append({"n": count, "value": frechet_distance(evidence.statistics(drawn), real)})
    if not config.infinity:
        return larger, None
    found = extrapolate(real, drawn, seed=config.seed)
    infinity = {"value": found.value, "points": found.points, "from": found.start, "to": found.stop}
    return larger, infinity | {"residual": found.residual}


def kid(config: ReportConfig, evidence: Evidence) -> dict[str, Any]:
    """KID over all sample sets; kept, since it takes a while."""
    generated = np.concatenate([np.asarray(drawn) for drawn in evidence.sets])
    reals = evidence.real_rows(min(KID_REALS, len(evidence.real)))
    size = min(1000, evidence.n, len(reals))
    key = key_of(evidence) | {"subsets": config.kid_subsets, "size": size, "reals": len(reals)}
    return remembered(
        evidence.folder,
        "kid",
        key,
        lambda: (
            asdict(
                kernel_distance_subsets(
                    np.asarray(evidence.real[reals]), generated, config.kid_subsets, size, config.seed
                )
            )
            | {"subset_size": size}
        ),
    )


def key_of(evidence: Evidence) -> dict[str, Any]:
    """What names samples and real images together."""
    return {
        "extractor": features_key(evidence.features),
        "real": reference_key(evidence.reference, evidence.features),
        "samples": {name: value for name, value in evidence.source.facts.items() if name not in ("path", "model")},
        "seed": evidence.seed,
    }


def faithfulness(evidence: Evidence) -> Manifold:
    """Precision, recall, density and coverage of the first set against as many real images."""
    reals = evidence.real[evidence.real_rows(evidence.n)]
    return manifold(np.asarray(reals), np.asarray(evidence.sets[0]))


def honesty(evidence: Evidence, coverage: float) -> list[Check]:
    """All checks of the first sample set, the most serious matters first."""
    rows = evidence.real_rows(evidence.n)
    real, drawn, pixels = np.asarray(evidence.real[rows]), np.asarray(evidence.sets[0]), evidence.pixels
    real_pixels = evidence.real_pixels(rows)
    others = evidence.real_rows(evidence.n, part=1)
    floor_coverage = manifold(real, np.asarray(evidence.real[others])).coverage if len(others) == len(rows) else None
    near = remembered(evidence.folder, "nearest", key_of(evidence), lambda: neighbours(evidence))
    train, unseen = (
        (np.array(part[0]), np.array(part[1], dtype=np.int64)) for part in (near["train"], near["held_out"])
    )
    transform = evidence.reference.facts.get("transform")
    sizes = evidence.images.size, evidence.reference.images.size
    return [
        pixel_statistics(pixels, real_pixels),
        duplicates(pixels, drawn, real),
        memorisation(
            pixels,
            train,
            unseen if len(unseen[0]) else None,
            lambda index: evidence.real_pixels(evidence.trained_on[index]),
        ),
        mode_collapse(drawn, real, pixels, real_pixels, coverage, floor_coverage),
        sample_size(evidence.n, len(evidence.real), evidence.features.dims, sizes, transform=transform),
    ]


def neighbours(evidence: Evidence) -> dict[str, Any]:
    """Distance and index of the training image nearest to each sample, and to each of some held-out reals."""
    chosen = np.random.default_rng(evidence.seed).permutation(evidence.held_out)[:HELD_OUT]
    queries = {"train": np.asarray(evidence.sets[0]), "held_out": np.asarray(evidence.real[np.sort(chosen)])}
    found = {}
    for name, features in queries.items():
        distance, index = nearest(features, evidence.blocks(evidence.trained_on)) if len(features) else ([], [])
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
        f"Against {score['against']} there is no floor: the reference has too few real images for it."
        for score in scores
        if score["floor"] is None
    ]
    if len(evidence.held_out) == 0:
        lines.append("No real image is known to be unseen by the generator, so copying is judged by pictures alone.")
    warned = evidence.source.warnings + doubts(evidence.images.size, evidence.reference, evidence.features)
    return lines + [f"{warning[0].upper()}{warning[1:]}." for warning in warned]


def provenance(config: ReportConfig, evidence: Evidence) -> dict[str, Any]:
    """Everything needed to reproduce the report."""
    features = evidence.features
    weights = {"weights": str(features.weights)} if isinstance(features, InceptionFeatures) else {}
    return {
        "features": features_key(features) | weights,
        "samples": evidence.source.facts,
        "real images": evidence.reference.facts,
        "settings": {"seed": config.seed, "floor_sets": config.floor_sets, "reference_count": config.reference_count},
        "device": str(features.device),
        "versions": versions(),
    }


def target(config: ReportConfig) -> Path:
    """The folder of the report.

    Raises:
        UserError: `out` is a file.
    """
    source = Path(config.source)
    default = source / "report" if is_run(source) else Path(f"{source.absolute()}.report")
    folder = default if config.out is None else Path(config.out)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"out={folder} is a file: give a folder for report.html and report.json")
    return folder


def source_first(words: list[str]) -> list[str]:
    """The command line with a leading path written as `source=path`."""
    if words and "=" not in words[0] and not words[0].startswith("-"):
        return [f"source='{words[0]}'", *words[1:]]
    return words


@config_command("report", ReportConfig)
def command(config: ReportConfig) -> None:
    """Write the report."""
    check(config)
    folder = target(config)
    share_cores()
    report, pictures = build(config, folder / "cache")
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
