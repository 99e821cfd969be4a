"""Judge generated images on one page: `facet report runs/faces data=data/celeba`.

The page has the score with its spread and floor against several references, other measures, honesty checks and
pictures.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from core.cli.config import config_command
from core.cli.console import progress_bar, say
from core.cli.errors import Interrupted, UserError
from core.cli.files import atomic_path, digest_of, writable, write_json
from core.data.images import make_grid, png_bytes
from core.training.distributed import Ranks
from core.training.machine import set_up_cpu
from eval.checks.collapse import unlearned
from eval.checks.copies import duplicates, memorisation
from eval.checks.evidence import Evidence
from eval.checks.pixels import pixel_statistics
from eval.checks.verdicts import Check, Manifold, mode_collapse, sample_size
from eval.features.cache import Extractor, features_key, remembered
from eval.features.extractors import make_features
from eval.features.image_sets import is_run, open_samples
from eval.features.settings import InceptionSection, network_of, require_features
from eval.judged import OtherViews, is_same, judge_of, name_of
from eval.measures import MEASURES, prdc_and_floor
from eval.metrics.fid_infinity import extrapolate
from eval.metrics.frechet import frechet_distance
from eval.metrics.prdc import nearest
from eval.page.page import render_page
from eval.run_facts import curves_of, run_facts, when
from eval.score import require_at_least, require_two_sides, run_features, score_warnings, versions

GRID = 64  # samples and real images shown on the page
CHECKED = 5_000  # samples that the checks look at, since they compare all with all
HELD_OUT = 1000  # real images that show how near unseen faces come to the training images


@dataclass
class ReportConfig:
    """Settings of `eval.report`; conf/report.yaml explains each key."""

    source: str
    data: str
    real: str | None = None
    features: str = "inception"
    fid: InceptionSection = field(default_factory=InceptionSection)
    n: int = 1000
    sets: int = 5
    seed: int = 0
    reference_count: int = 1000
    floor_sets: int = 5
    large: list[int] = field(default_factory=list)
    infinity: bool = False
    kid_subsets: int = 50
    out: str | None = None
    batch_size: int | None = None
    device: str = "auto"


def build(config: ReportConfig, folder: Path) -> tuple[dict[str, Any], dict[str, bytes]] | None:
    """The content of report.json, and the PNG files for the page.

    Several processes share the extraction of features; only the first one returns a result.

    Args:
        folder: keeps features of samples and figures that are slow to compute, unless the samples come from a run that
            can keep them.

    Raises:
        UserError: settings, source, data or weights are not usable.
    """
    check(config)
    software = versions()
    ranks = Ranks.join()
    path = Path(config.source)
    samples = open_samples(path, config.n, config.sets, config.seed, config.device)
    if config.large and samples.facts["kind"] != "model":
        raise UserError(f"large={config.large} needs a run or model: the number of images in {config.source} is fixed")
    evidence = Evidence(samples, Path(config.data), config.seed, None if config.real is None else Path(config.real))
    judge, section = judge_of(samples), config.fid
    views = None
    if judge is not None:
        views = OtherViews(samples, config.features, section, config.reference_count, config.device, ranks)
        if config.features == "efficientnet":  # the weights are those of Inception, for the other view
            section = InceptionSection(None, section.dims)
    extractor = Extractor(make_features(config.features, section, config.device, ranks), config.batch_size, ranks)
    many = None
    if config.large:  # these samples start with all the sets, so no image is extracted twice
        many = open_samples(path, max(*config.large, config.n * config.sets), 1, config.seed, config.device)
    evidence.extract(extractor, run_features(samples) or folder, many)
    if views is not None:
        views.extract(evidence.real, evidence.sets[0], config.batch_size, run_features(samples) or folder, config.seed)
    if not ranks.first:
        return None
    evidence.read_samples(CHECKED)
    scores = evidence.scores(config.reference_count, config.floor_sets)
    larger, infinity = at_larger_numbers(config, evidence)
    measures = {measure.key: measure.compute(evidence, config.kid_subsets) for measure in MEASURES}
    checks = honesty_checks(evidence)
    pictures = {check.name: png_bytes(check.pictures) for check in checks if check.pictures is not None}
    pictures["samples"] = png_bytes(make_grid(evidence.pixels[:GRID], transparent=True))
    pictures["reals"] = png_bytes(make_grid(evidence.real_pixels(evidence.real_rows(GRID)), transparent=True))
    if curves := curves_of(samples):
        pictures["curves"] = curves
    report = {
        "format": 1,
        "subject": {name: samples.facts[name] for name in ("path", "kind", "count", "sets")},
        "run": run_facts(samples),
        "metric": extractor.features.metric,
        "judge": None
        if judge is None or views is None
        else {"network": name_of(judge), "sha256": judge.get("sha256"), "same": is_same(judge, extractor.features)}
        | {"views": views.table(judge)},
        "scores": scores,
        "larger": larger,
        "infinity": infinity,
        **measures,
        "checks": [as_json(check) for check in checks],
        "limits": limits(evidence, scores),
        "provenance": provenance(config, evidence, software),
    }
    return report, pictures


def check(config: ReportConfig) -> None:
    """Refuse impossible settings before any work.

    Raises:
        UserError: naming the key.
    """
    require_at_least(config, n=2, sets=1, floor_sets=1, batch_size=1, seed=0, reference_count=2, kid_subsets=2)
    if not all(isinstance(count, int) and count >= 2 for count in config.large):  # OmegaConf lets lists into the list
        raise UserError(f"large={config.large}: each must be a whole number of at least 2")
    require_features(config.features, config.fid.dims)
    require_two_sides(config.source, config.data)
    if config.infinity and max(config.large, default=0) < 10_000:
        raise UserError("infinity=true extrapolates from at least 10,000 samples: give large=[10000] or more")


def at_larger_numbers(config: ReportConfig, evidence: Evidence) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """The score against all real images at the numbers in `large`, and extrapolated from the largest; kept on disk.

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
        with progress_bar("subsets") as bar:
            track = partial(bar.track, description="FID at infinity")
            found = extrapolate(real, drawn, seed=config.seed, track=track)
        infinity = {"value": found.value, "points": found.points, "from": found.start, "to": found.stop}
        return {"larger": larger, "infinity": infinity | {"residual": found.residual}}

    kept = remembered(evidence.folder, "large", key, compute)
    return kept["larger"], kept["infinity"]


def honesty_checks(evidence: Evidence) -> list[Check]:
    """All checks on the first sample set, or on its first 5,000 samples."""
    rows, pixels = evidence.real_rows(min(evidence.n, CHECKED)), evidence.pixels
    real, drawn = evidence.features[rows], evidence.sets[0][: len(pixels)]
    real_pixels = evidence.real_pixels(rows)
    found = prdc_and_floor(evidence)
    manifold = None
    if found is not None:
        sides = {name: (getattr(found[0], name), getattr(found[1], name)) for name in ("precision", "coverage")}
        manifold = Manifold(**sides, network=network_of(evidence.extractor.features.metric))
    digests = {name: digest_of({"rows": getattr(evidence, name).tolist()}) for name in ("trained_on", "held_out")}
    key = evidence.key() | digests | {"most": HELD_OUT}
    near = remembered(evidence.folder, "nearest", key, lambda: neighbours(evidence))
    train, unseen = ((np.array(part[0]), np.array(part[1], np.int64)) for part in (near["train"], near["held_out"]))
    every = evidence.reference.every
    by_pixels = pixel_statistics(pixels, real_pixels)
    return [
        by_pixels,
        duplicates(pixels, drawn, real),
        memorisation(
            pixels,
            train,
            unseen if len(unseen[0]) else None,
            lambda index: evidence.real_pixels(evidence.trained_on[index]),
        ),
        mode_collapse(drawn, real, pixels, real_pixels, manifold, unlearned(pixels, by_pixels)),
        sample_size(
            evidence.n,
            len(evidence.real),
            evidence.features.shape[1],
            sizes=(evidence.images.size, every.size),
            lossy=(evidence.images.lossy, every.lossy),
        ),
    ]


def neighbours(evidence: Evidence) -> dict[str, Any]:
    """Distance and index of the training image nearest to each sample, and to each of up to 1,000 held-out reals."""
    chosen = np.random.default_rng(evidence.seed).permutation(evidence.held_out)[:HELD_OUT]
    queries = {"train": evidence.sets[0][:CHECKED], "held_out": evidence.features[np.sort(chosen)]}
    trained_on = evidence.features.take(evidence.trained_on)
    found = {}
    for name, features in queries.items():
        distance, index = nearest(features, trained_on.blocks()) if len(features) else ([], [])
        found[name] = [np.asarray(distance).tolist(), np.asarray(index).tolist()]
    return found


def as_json(check: Check) -> dict[str, Any]:
    """A check as report.json states it; the page shows its pictures under its name."""
    names = ("name", "verdict", "fault", "judgement", "headline", "details", "figures", "caption")
    plain = {name: getattr(check, name) for name in names}
    return plain | {"pictures": None if check.pictures is None else check.name}


def limits(evidence: Evidence, scores: list[dict[str, Any]]) -> list[str]:
    """What limits the meaning of the score, one sentence each."""
    lines = [
        f"The score is biased upward at {evidence.n:,} samples: compare it with scores at the same number and against "
        "the same reference only."
    ]
    if evidence.samples.sets == 1:
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
            "split=train leaves real images to compare with. Data without a split get one by facet prepare --valid N."
        )
    warnings = score_warnings(evidence.samples, evidence.images.size, evidence.reference, evidence.extractor.features)
    return lines + [f"{warning[0].upper()}{warning[1:]}." for warning in warnings]


def provenance(config: ReportConfig, evidence: Evidence, software: dict[str, str]) -> dict[str, Any]:
    """Everything needed to reproduce the report."""
    features = evidence.extractor.features
    weights = {} if features.weights is None else {"weights": str(features.weights)}
    return {
        "features": features_key(features) | weights,
        "samples": evidence.samples.facts,
        "real images": evidence.reference.facts,
        "course's real images": None if evidence.course is None else evidence.course.facts,
        "settings": {"seed": config.seed, "floor_sets": config.floor_sets, "reference_count": config.reference_count},
        "device": str(features.device),
        "versions": software,
    }


def summary(report: dict[str, Any]) -> list[str]:
    """For the terminal: what other networks say of a generator that pleased one, and the checks."""
    judge, lines = report["judge"], []
    if judge is not None:
        which = (
            ", the very network of this score, which flatters it" if judge["same"] else ", which flatters this score"
        )
        lines.append(f"trained against {judge['network']}{'' if report['metric'] == 'fd_random' else which}")
        lines += [f"  {told(view)}" for view in judge["views"]]
    width = max(len(entry["judgement"]) for entry in report["checks"]) + 2
    return lines + [f"{each['judgement']:<{width}}{each['name']}: {each['headline']}" for each in report["checks"]]


def told(view: dict[str, Any]) -> str:
    """What one network sees: `fd_random 0.311 (real images 0.0164), recall 0.04 (real images 0.61)`."""
    pairs = ((view["metric"], "value", "floor"), ("recall", "recall", "recall_of_reals"))
    shown = [(name, view[value], view[usual]) for name, value, usual in pairs if view[value] is not None]
    return ", ".join(
        f"{name} {value:.3g}" + ("" if usual is None else f" (real images {usual:.3g})") for name, value, usual in shown
    )


def target(config: ReportConfig) -> Path:
    """The folder of the report.

    Raises:
        UserError: the folder cannot be written to.
    """
    source = Path(config.source)
    default = source / "report" if is_run(source) else Path(f"{source.resolve()}.report")
    folder = default if config.out is None else Path(config.out)
    if (folder.exists() and not folder.is_dir()) or not writable(folder):
        raise UserError(f"the report cannot be written to {folder}: give out=FOLDER, for report.html and report.json")
    return folder


@config_command("report", ReportConfig)
def main(config: ReportConfig) -> None:
    """Write the report."""
    check(config)
    folder = target(config)
    set_up_cpu()
    try:
        built = build(config, folder / "cache")
    except KeyboardInterrupt:
        raise Interrupted("features and figures computed so far are kept; the same command continues") from None
    if built is None:
        return
    report, pictures = {"made": when()} | built[0], built[1]
    write_json(folder / "report.json", report)
    with atomic_path(folder / "report.html") as temporary:
        temporary.write_text(render_page(report, pictures), encoding="utf-8")
    first = report["scores"][0]
    by = "" if first["sd"] is None else f" ± {first['sd']:.3g}"
    print(f"{report['metric']} {first['mean']:.4g}{by} against {first['against']}")
    for line in summary(report):
        print(line)
    say(f"report: {folder / 'report.html'}")


if __name__ == "__main__":
    main()
