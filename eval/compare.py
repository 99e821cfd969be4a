"""Rank generators by their scores: `facet compare runs/a runs/b`.

Only results that were made alike are compared, and a difference counts only if it exceeds the noise of sampling
(`eval.metrics.significance`).
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from core.cli.config import config_command
from core.cli.console import say, warn
from core.cli.errors import UserError
from core.cli.files import writable, write_json
from core.nn.model_file import load_model
from core.training.distributed import Ranks
from core.training.machine import set_up_cpu
from eval.distances import spread
from eval.features.extractors import Features, make_features
from eval.features.image_sets import open_samples
from eval.features.reference import Reference
from eval.features.settings import FID_DIMS, TIMM, InceptionSection, metric_name, require_features
from eval.features.statistics_file import KnownStatistics
from eval.metrics.significance import Difference, differences_from_best
from eval.page.text import number, with_spread
from eval.results import (
    ALIKE,
    Entry,
    content_of,
    differences_from_terms,
    find_results,
    identities,
    pick,
    ranking_warnings,
    read_result,
    real_images,
    require_comparable,
    require_distinct,
)
from eval.score import (
    FidConfig,
    can_be_written,
    command_of,
    open_real,
    require_at_least,
    require_floor,
    result_path,
    score_source,
    score_terms,
)

SCORING = ("n", "sets", "seed", "split", "reference_count", "reference_seed", "floor", "batch_size", "device")
ALPHA = 0.05
TEST = (
    f"Verdicts: Welch's t-test between the sample sets at {ALPHA:.0%}, Holm's correction over all pairs, since "
    "the best is chosen by the same scores. In them, sd is the root mean square of both spreads."
)
COVERS = (
    "The spread is that of drawing other samples from the same model, against this one reference. How far a training "
    "with another seed would come out is not in it."
)
NOTE = "sd: of drawing samples, not of training again. How verdicts are found: --help"
ONE_SET = "One set has no spread: runs and models give several, folders and archives one."


@dataclass
class CompareConfig:
    """Settings of `eval.compare`; conf/compare.yaml explains each key."""

    sources: list[str] = field(default_factory=list)
    data: str | None = None
    features: str | None = None
    fid: InceptionSection = field(default_factory=lambda: InceptionSection(dims=None))
    n: int = 1000
    sets: int = 5
    seed: int = 0
    split: str = "all"
    reference_count: int | None = None
    reference_seed: int = 0
    floor: bool = False
    out: str | None = None
    batch_size: int | None = None
    device: str = "auto"


@dataclass(frozen=True)
class Row:
    """A line of the ranking; None stands for unknown.

    Attributes:
        facts: what the result says about the source (hash, counts, seeds).
        images_seen: in training; known only while the scored model is still there.
        doubt: what is wrong with the result, in a line; empty when nothing is.
    """

    rank: int
    source: str
    result: str
    facts: dict[str, Any]
    images_seen: int | None
    mean: float
    sd: float | None
    values: list[float]
    excess: float | None
    doubt: str
    verdict: str
    difference: float
    sds: float | None
    p: float | None


def check(config: CompareConfig) -> None:
    """Refuse impossible settings before any work.

    Raises:
        UserError: naming the key.
    """
    if len(config.sources) < 2:
        raise UserError("sources: give two or more runs, models, archives, folders or results (see --help)")
    require_at_least(config, n=2, sets=1, batch_size=1, seed=0, reference_seed=0)
    wanted_metric(config)
    unused = [key for key in SCORING if getattr(config, key) != getattr(CompareConfig(), key)]
    unused += ["fid.weights"] if config.fid.weights is not None else []
    if config.data is None and unused:
        raise UserError(f"{', '.join(unused)}: only for scoring, which needs data=... as well")
    if config.out is not None and (Path(config.out).is_dir() or not writable(Path(config.out).parent)):
        raise UserError(f"out={config.out} cannot be written: give out=FILE.json")


def wanted_metric(config: CompareConfig) -> str | None:
    """The metric that `features` and `fid.dims` name; None when they leave it open.

    Raises:
        UserError: there are no such features.
    """
    if config.features is None and config.fid.dims is None:
        return None
    features = config.features or "inception"
    require_features(features, config.fid.dims)
    return metric_name(features, config.fid.dims)


# --- existing results ---------------------------------------------------------------------------------------------


def stored(config: CompareConfig) -> list[Entry]:
    """Existing results of all sources on one metric: that of the settings, else the only one they all have.

    Raises:
        UserError: a source has no such result, or they share several metrics.
    """
    found = {label: find_results(label) for label in config.sources}
    metric = wanted_metric(config)
    if metric is None and all(found.values()):
        common = set.intersection(*map(set, found.values()))
        if len(common) != 1:
            has = "; ".join(f"{label} has {', '.join(results)}" for label, results in found.items())
            way = f"choose with {' or '.join(map(_setting, sorted(common)))}" if common else "score them alike"
            raise UserError(f"{'several metrics are' if common else 'no metric is'} common to all ({has}): {way}")
        metric = common.pop()
    metric = metric or next((one for results in found.values() for one in results), "FID")
    examples = [entry.result for results in found.values() for entry in results.values()]
    examples.sort(key=lambda result: bool(result["metric"] != metric))
    for label, results in found.items():
        if metric not in results:
            others = f", only of {', '.join(results)}" if results else ""
            command = shlex.join(_fid_command(label, metric, examples[0] if examples else None))
            raise UserError(f"{label} has no result of {metric}{others}: run `{command}`, or give data=... here")
    entries = [found[label][metric] for label in config.sources]
    require_distinct(entries, config.out)
    return entries


def _setting(metric: str) -> str:
    """The setting that chooses a metric."""
    if metric.startswith("FID"):
        return f"fid.dims={metric.removeprefix('FID').removeprefix('-') or FID_DIMS}"
    features = metric.removeprefix("fd_")
    return f"features={features if features in ('random', 'efficientnet') else f'{TIMM}{features}'}"


def _fid_command(label: str, metric: str, example: dict[str, Any] | None) -> list[str]:
    """The command that scores a source in the way `example`, the result of another source, was made."""
    command = ["facet", "score", f"source={'SOURCE' if label.endswith('.json') else label}"]
    if example is None:
        command.append("data=DATA")
    else:
        reference, count = example["reference"], example["source"]["count"]
        command += [f"data={reference['path']}", f"n={count}", "sets=5", f"split={reference['split']}"]
        if reference.get("subset_seed") is not None:
            command += [f"reference_count={reference['count']}", f"reference_seed={reference['subset_seed']}"]
        if example["metric"] == metric and "path" in example["weights"]:
            command.append(f"fid.weights={example['weights']['path']}")
    return [*command, _setting(metric)]


# --- scoring ------------------------------------------------------------------------------------------------------


def made(config: CompareConfig, ranks: Ranks) -> list[Entry]:
    """The results of all sources on the settings: existing ones, and new ones for the rest, which are written.

    With several processes, only the first has all of them.

    Raises:
        UserError: settings, a source or the data are not usable, or the results could not be compared.
    """
    settings = fid_settings(config, config.sources[0])
    reference = open_real(settings)
    features = make_features(settings.features, settings.fid, settings.device, ranks)
    entries = [_planned(config, label, reference, features, ranks) for label in config.sources]
    # Checked before the scoring, which may take hours
    require_distinct(entries, config.out)
    require_comparable(entries)
    for index, entry in enumerate(entries):
        if not entry.scored:
            result = score_source(fid_settings(config, entry.label))
            if result is not None:
                write_json(entry.file, result)
                entries[index] = Entry(entry.label, entry.file, result)
    return entries


def fid_settings(config: CompareConfig, label: str) -> FidConfig:
    """The settings of `eval.fid` for one source."""
    same = {key: getattr(config, key) for key in SCORING}
    return FidConfig(label, str(config.data), config.features or "inception", config.fid, **same)


def _planned(
    config: CompareConfig, label: str, reference: Reference | KnownStatistics, features: Features, ranks: Ranks
) -> Entry:
    """A source with its result on these settings, or, before it is scored, with the terms of that result."""
    if label.endswith(".json"):
        return Entry(label, Path(label), read_result(Path(label)))
    samples = open_samples(Path(label), config.n, config.sets, config.seed)
    terms = score_terms(samples, reference, features)
    settings = fid_settings(config, label)
    file = result_path(settings)
    if config.floor and isinstance(reference, Reference):
        require_floor(reference, samples.count, config.seed)
    different = []
    if file.is_file():
        try:
            existing = read_result(file)
            different = differences_from_terms(existing, terms, config.seed if config.floor else None)
        except UserError:
            different = ["damaged"]
        if not different:
            return Entry(label, file, existing)
    if not can_be_written(file):
        raise UserError(
            f"the result of {label} cannot be written to {file}: run `{command_of(settings)}` with a FILE of yours, "
            "and compare FILE"
        )
    if different and ranks.first:
        say(f"note: {file} is replaced, it is not on these settings ({', '.join(different)})")
    return Entry(label, file, terms)


# --- the ranking --------------------------------------------------------------------------------------------------


def rank(entries: list[Entry]) -> list[Row]:
    """All entries in order of their means, with a verdict on each.

    Raises:
        UserError: they were not made alike.
    """
    require_comparable(entries)
    ordered = sorted(entries, key=lambda entry: float(entry.result["mean"]))
    values, contents = [entry.result["values"] for entry in ordered], identities(ordered)
    differences = differences_from_best(values, contents)
    words = verdicts(differences, values, contents)
    rows = []
    for place, (entry, difference, verdict) in enumerate(zip(ordered, differences, words, strict=True), start=1):
        result, (images_seen, doubt) = entry.result, _look_up(entry)
        named = (place, entry.label, str(entry.file), result["source"], images_seen)
        figures = (result["mean"], spread(result["values"]), result["values"], result["excess"])
        rows.append(Row(*named, *figures, doubt, verdict, **asdict(difference)))
    return rows


def verdicts(differences: list[Difference], values: Sequence[Sequence[float]], contents: Sequence[str]) -> list[str]:
    """A verdict in words on each source, the best one first; arguments as for `differences_from_best`."""
    words = ["best" if len(values[0]) > 1 else "lowest, one set"]
    for index, found in enumerate(differences[1:], start=1):
        if contents[index] == contents[0]:
            words.append("same as the best")
        elif found.p is None:
            words.append("unknown: one set")
        elif found.p > ALPHA:
            words.append("within noise")
        else:
            words.append("worse" if found.sds is None else f"worse by {found.sds:,.1f} sd")
    return words


def _look_up(entry: Entry) -> tuple[int | None, str]:
    """How many images a model has seen in training, and whether the source has changed since it was scored."""
    facts, is_file = entry.result["source"], entry.label.endswith(".json")
    place = Path(str(facts.get("path")) if is_file else entry.label)
    try:
        samples = open_samples(place, 2, 1, 0)
    except UserError:
        return None, "" if is_file else f"{entry.label} cannot be opened any more: its result is all that is known"
    if content_of(samples.facts) != entry.content:
        stale = f"{entry.label} is no longer what {entry.file} is of: score it again, for example with data=... here"
        return None, "" if is_file else stale
    seen = load_model(place)[1].get("images_seen") if samples.facts["kind"] == "model" else None
    return (seen if isinstance(seen, int) else None), ""


def print_ranking(rows: list[Row], result: dict[str, Any]) -> None:
    """Print the ranking as a table; on a terminal of 80 columns, only names of sources are broken.

    Args:
        result: any of the results, for what they all share.
    """
    console = Console()
    if not console.is_terminal:
        console = Console(width=1000)  # one line per source, however long its name
    reference, metric = result["reference"], result["metric"]
    against = f"{reference['path']} ({real_images(reference)})"
    console.print(Text(f"{metric} of {result['source']['count']:,} images a set, against {against}; lower is better"))
    table = Table(box=None)
    columns: dict[str, list[str]] = {
        "rank": [str(row.rank) for row in rows],
        "source": [row.source for row in rows],
        "images seen": ["-" if row.images_seen is None else f"{row.images_seen:,}" for row in rows],
        "score": [with_spread(row.mean, row.sd)[0] for row in rows],
        "sd": [with_spread(row.mean, row.sd)[1] or ("-" if row.sd is None else "0") for row in rows],
        "sets": [str(len(row.values)) for row in rows],
        "excess": ["-" if row.excess is None else number(row.excess) for row in rows],
        "verdict": [row.verdict for row in rows],
    }
    shown = {name: cells for name, cells in columns.items() if set(cells) != {"-"} or name == "sd"}
    for name in shown:
        justify: Literal["left", "right"] = "left" if name in ("source", "verdict") else "right"
        table.add_column(name, justify=justify, no_wrap=name != "source", overflow="fold")
    for cells in zip(*shown.values(), strict=True):
        table.add_row(*map(Text, cells))  # Text, because a name may hold brackets, which rich reads as markup
    console.print(table)
    notes = [NOTE] + ([ONE_SET] if any(len(row.values) == 1 for row in rows) else [])
    console.print(Text("\n".join(notes)), soft_wrap=not console.is_terminal)


def as_json(rows: list[Row], entries: list[Entry], warnings: list[str]) -> dict[str, Any]:
    """The content of the file `out`."""
    alike = {name: pick(entries[0].result, place) for name, place in ALIKE.items()}
    ranking = [asdict(row) for row in rows]
    return {"format": 1, "alike": alike, "test": TEST, "spread": COVERS, "ranking": ranking, "warnings": warnings}


@config_command("compare", CompareConfig)
def main(config: CompareConfig) -> None:
    """Score what is missing, rank, print, and write the ranking where asked."""
    check(config)
    ranks = Ranks.join()
    set_up_cpu()
    entries = stored(config) if config.data is None else made(config, ranks)
    if not ranks.first:
        return
    rows = rank(entries)
    warnings = [row.doubt for row in rows if row.doubt] + ranking_warnings(entries)
    for warning in warnings:
        warn(warning)
    print_ranking(rows, entries[0].result)
    if config.out is not None:
        write_json(config.out, as_json(rows, entries, warnings))
        say(f"ranking in {config.out}")


if __name__ == "__main__":
    main()
