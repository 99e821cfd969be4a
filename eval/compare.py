"""Rank generators by their scores: `python -m eval.compare runs/a runs/b`.

Only results that were made alike are compared, and a difference counts only where it is more than the noise of
sampling (`eval.metrics.significance`).
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from core.cli.config import config_command, quoted
from core.cli.console import say, warn
from core.cli.errors import UserError
from core.cli.files import writable, write_json
from core.nn.model_file import load_model
from core.training.distributed import Ranks, set_up_cpu
from eval.features.extractors import Features
from eval.features.image_sets import open_source
from eval.features.reference import Reference, open_reference
from eval.fid import DISTANCE, FidConfig, FidSection, make_features, result_path, score
from eval.metrics.significance import COVERS, ONE_SET, TEST, Judgement, judge
from eval.page.text import number, with_spread
from eval.results import (
    ALIKE,
    Entry,
    content_of,
    doubts,
    find_results,
    identities,
    pick,
    read_result,
    require_comparable,
    require_distinct,
)
from eval.score import plan_floor, spread

SCORING = ("n", "sets", "seed", "split", "reference_count", "reference_seed", "floor", "batch_size", "device")


@dataclass
class InceptionSection:
    """The Inception network: weights file and block by its dimensions; conf/compare.yaml says what None means."""

    weights: str | None = None
    dims: int | None = None


@dataclass
class CompareConfig:
    """Settings of `eval.compare`; conf/compare.yaml says what each means."""

    sources: list[str] = field(default_factory=list)
    data: str | None = None
    features: str | None = None
    fid: InceptionSection = field(default_factory=InceptionSection)
    n: int = 1000
    sets: int = 5
    seed: int = 0
    split: str = "all"
    reference_count: int | None = None
    reference_seed: int = 0
    floor: bool = False
    out: str | None = None
    batch_size: int = 16
    device: str = "auto"


@dataclass(frozen=True)
class Row:
    """A line of the ranking; None stands for what is not known.

    Attributes:
        facts: what the result says about the source (hash, counts, seeds).
        images_seen: in training; only where the model that was scored is still there.
        doubt: what is wrong with it, in a line; empty when nothing is.
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
    judgement: Judgement
    doubt: str


def check(config: CompareConfig) -> None:
    """Refuse settings that make no sense before any work.

    Raises:
        UserError: naming the key.
    """
    if len(config.sources) < 2:
        raise UserError("give two or more runs, models, archives, folders or results to compare (see --help)")
    for key, least in (("n", 2), ("sets", 1), ("batch_size", 1), ("seed", 0), ("reference_seed", 0)):
        if getattr(config, key) < least:
            raise UserError(f"{key}={getattr(config, key)}: must be at least {least}")
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
        UserError: unknown features.
    """
    if config.features not in (None, "inception", "random"):
        raise UserError(f"features={config.features}: use inception, or random for the fd_random substitute")
    if config.features == "random":
        return "fd_random"
    if config.features is None and config.fid.dims is None:
        return None
    return "FID" if config.fid.dims in (None, 2048) else f"FID-{config.fid.dims}"


# Results that are there


def stored(config: CompareConfig) -> list[Entry]:
    """The results of all sources on one metric: that of the settings, else the only one that all of them have.

    Raises:
        UserError: a source has none, or it is not clear which to take.
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
    dims = metric.removeprefix("FID").removeprefix("-") or "2048"
    return "features=random" if metric == "fd_random" else f"fid.dims={dims}"


def _fid_command(label: str, metric: str, example: dict[str, Any] | None) -> list[str]:
    """The command that scores a source, like the result `example` of another one."""
    command = ["python", "-m", "eval.fid", f"source={'SOURCE' if label.endswith('.json') else label}"]
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


# Results that are made


def made(config: CompareConfig, ranks: Ranks) -> list[Entry]:
    """The results of all sources on the settings: those that are there, the rest scored and written.

    Of several processes, only the first has them all.

    Raises:
        UserError: settings, a source or the data are not usable, or the results could not be compared.
    """
    reference = open_reference(Path(str(config.data)), config.split, config.reference_count, config.reference_seed)
    settings = fid_settings(config, config.sources[0])
    features = make_features(settings.features, settings.fid, settings.device, ranks)
    entries = [_planned(config, label, reference, features, ranks) for label in config.sources]
    # Before the work rather than after it
    require_distinct(entries, config.out)
    require_comparable(entries)
    for index, entry in enumerate(entries):
        if not entry.scored:
            result = score(fid_settings(config, entry.label))
            if result is not None:
                write_json(entry.file, result)
                entries[index] = Entry(entry.label, entry.file, result)
    return entries


def fid_settings(config: CompareConfig, label: str) -> FidConfig:
    """The settings of `eval.fid` for one source."""
    section = FidSection(config.fid.weights, config.fid.dims or 2048)
    same = {key: getattr(config, key) for key in SCORING}
    return FidConfig(label, str(config.data), config.features or "inception", section, **same)


def _planned(config: CompareConfig, label: str, reference: Reference, features: Features, ranks: Ranks) -> Entry:
    """A source with the result it has on these settings, else with what its result will say of how it was made."""
    if label.endswith(".json"):
        return Entry(label, Path(label), read_result(Path(label)))
    source = open_source(Path(label), config.n, config.sets, config.seed)
    plan = {
        "metric": features.metric,
        "source": source.facts,
        "reference": reference.facts,
        "features": {"name": features.name, "dims": features.dims, "transform": features.transform},
        "weights": {"sha256": features.weights_sha256},
        "distance": DISTANCE,
    }
    file = result_path(fid_settings(config, label))
    if not file.is_file():
        return Entry(label, file, plan)
    try:
        there = read_result(file)
        floor = plan_floor(len(reference.every), reference.rows, source.count, int(config.floor), config.seed)
        other = _differences(there, plan, config.seed if floor.subsets else None)
    except UserError:
        other = ["damaged"]
    if not other:
        return Entry(label, file, there)
    if ranks.first:
        say(f"note: {file} is replaced, it is not on these settings ({', '.join(other)})")
    return Entry(label, file, plan)


def _differences(there: dict[str, Any], plan: dict[str, Any], floor_seed: int | None) -> list[str]:
    """In what a result is not the one planned; more sets than planned will do."""
    other = [name for name, place in ALIKE.items() if pick(there, place) != pick(plan, place)]
    if content_of(there["source"]) != content_of(plan["source"]):
        other.append("content")
    seeds = plan["source"].get("first_seeds", [])
    if there["source"].get("first_seeds", [])[: len(seeds)] != seeds:
        other.append("sets or seed")
    if floor_seed is not None and (there["floor"] or {}).get("seed") != floor_seed:
        other.append("floor")
    return other


# The ranking


def rank(entries: list[Entry]) -> list[Row]:
    """All entries in order of their means, with a verdict on each.

    Raises:
        UserError: they were not made alike.
    """
    require_comparable(entries)
    ordered = sorted(entries, key=lambda entry: float(entry.result["mean"]))
    judgements = judge([entry.result["values"] for entry in ordered], identities(ordered))
    rows = []
    for index, (entry, judgement) in enumerate(zip(ordered, judgements, strict=True)):
        result, (images_seen, doubt) = entry.result, _look_up(entry)
        values, named = result["values"], (index + 1, entry.label, str(entry.file), result["source"], images_seen)
        rows.append(Row(*named, result["mean"], spread(values), values, result["excess"], judgement, doubt))
    return rows


def _look_up(entry: Entry) -> tuple[int | None, str]:
    """Images a model has seen in training, and whether the source is no longer what was scored."""
    facts, is_file = entry.result["source"], entry.label.endswith(".json")
    place = Path(str(facts.get("path")) if is_file else entry.label)
    try:
        source = open_source(place, 2, 1, 0).facts
    except UserError:
        return None, "" if is_file else f"{entry.label} cannot be opened any more: its result is all that is known"
    if content_of(source) != entry.content:
        stale = f"{entry.label} is no longer what {entry.file} is of: score it again, for example with data=... here"
        return None, "" if is_file else stale
    seen = load_model(place)[1].get("images_seen") if source["kind"] == "model" else None
    return (seen if isinstance(seen, int) else None), ""


def print_ranking(rows: list[Row], result: dict[str, Any]) -> None:
    """The ranking as a table on standard output, without lines where that is not a terminal.

    Args:
        result: any of the results, for what they have in common.
    """
    console = Console()
    if not console.is_terminal:
        console = Console(width=1000)  # a line a source, whatever the length of its name
    reference, metric = result["reference"], result["metric"]
    part = "" if reference["split"] == "all" else f", split {reference['split']}"
    against = f"{reference['path']} ({reference['count']:,} images{part})"
    console.print(Text(f"{metric} of {result['source']['count']:,} images a set, against {against}; lower is better"))
    table = Table(box=box.HEAVY_HEAD if console.is_terminal else None)
    columns: dict[str, list[str]] = {
        "rank": [str(row.rank) for row in rows],
        "source": [row.source for row in rows],
        "images seen": ["-" if row.images_seen is None else f"{row.images_seen:,}" for row in rows],
        metric: [with_spread(row.mean, row.sd)[0] for row in rows],
        "sd": [with_spread(row.mean, row.sd)[1] or ("-" if row.sd is None else "0") for row in rows],
        "sets": [str(len(row.values)) for row in rows],
        "excess": ["-" if row.excess is None else number(row.excess) for row in rows],
        "verdict": [row.judgement.verdict for row in rows],
    }
    shown = {name: cells for name, cells in columns.items() if set(cells) != {"-"} or name == "sd"}
    for name in shown:
        table.add_column(name, justify="left" if name in ("source", "verdict") else "right", overflow="fold")
    for cells in zip(*shown.values(), strict=True):
        table.add_row(*map(Text, cells))  # as text: a name may hold brackets
    console.print(table)
    notes = [TEST, COVERS] + ([ONE_SET] if any(len(row.values) == 1 for row in rows) else [])
    console.print(Text("\n".join(notes)), soft_wrap=not console.is_terminal)


def as_json(rows: list[Row], entries: list[Entry], warnings: list[str]) -> dict[str, Any]:
    """What the file `out` holds."""
    common = {name: pick(entries[0].result, place) for name, place in ALIKE.items()}
    ranking = []
    for row in rows:
        plain = asdict(row)
        ranking.append(plain | plain.pop("judgement"))
    return {"format": 1, "alike": common, "test": TEST, "spread": COVERS, "ranking": ranking, "warnings": warnings}


def sources_first(words: list[str]) -> list[str]:
    """The command line with leading paths written as `sources=[...]`."""
    count = 0
    while count < len(words) and words[count][:1] != "-" and ("=" not in words[count] or Path(words[count]).exists()):
        count += 1
    return [f"sources=[{','.join(map(quoted, words[:count]))}]", *words[count:]] if count else words


@config_command("compare", CompareConfig)
def command(config: CompareConfig) -> None:
    """Score what is missing, rank, print, and write the ranking where asked."""
    check(config)
    ranks = Ranks.join()
    set_up_cpu()
    entries = stored(config) if config.data is None else made(config, ranks)
    if not ranks.first:
        return
    rows = rank(entries)
    warnings = [row.doubt for row in rows if row.doubt] + doubts(entries)
    for warning in warnings:
        warn(warning)
    print_ranking(rows, entries[0].result)
    if config.out is not None:
        write_json(config.out, as_json(rows, entries, warnings))
        say(f"ranking in {config.out}")


def main() -> None:
    """Entry point; the sources may stand first without their key."""
    sys.argv[1:] = sources_first(sys.argv[1:])
    command()


if __name__ == "__main__":
    main()
