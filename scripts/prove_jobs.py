"""The stages of `facet prove` as jobs: processes that end in time, whose outcomes are kept, and what came of them."""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from core.cli.config import quoted
from core.cli.console import duration, say
from core.cli.errors import EXIT_INTERRUPTED
from core.cli.files import read_json, write_json
from core.cli.lock import sole_owner
from core.training.machine import cpu_cores, cpuinfo, native_bf16, pick_device
from core.training.rundir import RunFolder
from scripts.bench import describe_commit
from scripts.prove_tests import forget_failures, read_journal

ROOT = Path(__file__).resolve().parent.parent
TO_END = 25.0  # seconds that a process gets to save its work
LEAST = 60.0  # seconds without which no job begins
STEPS = ["tests/test_gpu.py", "tests/test_gpu_steps.py"]
COMPILE = ["tests/test_gpu_compile.py"]
OUTCOMES = ("passed", "failed", "skipped")
SAMPLES = 1000  # that the course run leaves as PNG files
SCORES = 4  # on the way of the course run, besides that at its end


@dataclass(frozen=True)
class Job:
    """A command, `python -m` with these words, that is done once it has ended with 0.

    One that `goes_on` keeps what it has done when it is told to end, and then ends with 130.
    """

    name: str
    words: tuple[str, ...]
    goes_on: bool = False


def jobs_of(options: argparse.Namespace, ends: float) -> Iterator[Job]:
    """What the stages consist of, in order."""
    out, select = options.out, ["-k", options.select] if options.select else []
    for stage in options.stages:
        if stage in ("tests", "compile"):
            files = STEPS if stage == "tests" else COMPILE
            end = str(ends - TO_END)
            yield Job(stage, ("scripts.prove_tests", str(out / f"{stage}.jsonl"), end, *select, *files), goes_on=True)
        elif stage == "bench":
            yield from _bench_jobs(options)
        else:
            yield from _course_jobs(options)


def _bench_jobs(options: argparse.Namespace) -> Iterator[Job]:
    # A few parts in a job: one that fails or takes too long does not take the others along.
    for name, parts, *more in (
        ("steps", "gan-step unet-step data"),
        ("steps-fp32", "gan-step unet-step", "--precision", "fp32"),
        ("files", "gan-epoch sample prepare"),
        ("scores", "features frechet"),
    ):
        words = ["--parts", *parts.split(), "--seconds", f"{options.seconds:g}", *more]
        small = [] if options.device == "cuda" else ["--width", "8", "--batch", "8", "--unet-batch", "4"]
        yield Job(f"bench-{name}", ("scripts.bench", *words, *small, "--json", str(options.out / f"bench-{name}.json")))


def _course_jobs(options: argparse.Namespace) -> Iterator[Job]:
    out, data = options.out, options.data or options.out / "data"
    if options.data is None:
        words = ("scripts.prepare", "drawn", "--count", str(options.faces), "--out", str(data))
        yield Job("data", words, goes_on=True)
    real, run = f"data={quoted(str(data))}", out / "course"
    place = [
        real,
        f"runs={quoted(str(out))}",
        "name=course",
        f"total_images={options.images}",
        f"lr_schedule.over={options.images}",
        "mixed_precision=auto",
    ]
    scores = [f"eval.every={max(1, options.images // SCORES)}", "eval.n=5_000"]
    yield Job("course", ("gen.train", "experiment=course", *place, *scores, *options.settings), goes_on=True)
    samples = ["--n", str(SAMPLES), "--out", str(out / "samples"), "--grid", "--overwrite"]
    yield Job("samples", ("gen.sample", str(run), *samples))
    names: dict[str, list[str]] = {"efficientnet": []}
    if options.weights is not None:
        names["inception"] = [f"fid.weights={quoted(str(options.weights))}"]
    for name, more in names.items():
        result = f"out={quoted(str(out / f'score-{name}.json'))}"
        given = f"source={quoted(str(run))}", real, "floor=true", f"features={name}", result, *more
        yield Job(f"score-{name}", ("eval.fid", *given))


class Keeper:
    """Runs jobs until the time is over; outcomes are in jobs.json in the folder, and what they printed in logs/."""

    def __init__(self, out: Path, ends: float, device: str) -> None:
        self.out, self.ends, self.began = out, ends, time.time()
        self.path = out / "jobs.json"
        self.kept: dict[str, Any] = read_json(self.path) if self.path.exists() else {}
        self.environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        if device == "cpu":
            self.environment |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "FACET_STAND_IN": "cpu"}

    def state(self, job: Job) -> str:
        """`done` or `failed`, or `left` where it has not been or has other words now (but for the time)."""
        kept = self.kept.get(job.name, {})
        return str(kept["state"]) if kept.get("words") == _timeless(job) else "left"

    def forget_failures(self) -> None:
        """Let everything that failed be tried again."""
        self.kept = {name: job for name, job in self.kept.items() if job["state"] != "failed"}
        for journal in (self.out / "tests.jsonl", self.out / "compile.jsonl"):
            if forget_failures(journal):
                self.kept.pop(journal.stem, None)

    def run(self, job: Job) -> None:
        """Run a job, or go on with it, as far as the time goes, and keep its outcome."""
        left = self.ends - time.time()
        if self.state(job) != "left" or left < LEAST:
            return
        log = self.out / "logs" / f"{job.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        say(f"{job.name}: {duration(left)} left; its output goes to {log}")
        started = time.time()
        with log.open("ab") as stream:
            process = subprocess.Popen(
                [sys.executable, "-m", *job.words], cwd=ROOT, env=self.environment, stdout=stream, stderr=stream
            )
            try:
                stopped = _wait(process, self.ends - TO_END)
            except KeyboardInterrupt:
                _stop(process)  # which may not have received the Ctrl-C as well
                raise
        seconds = time.time() - started
        code = process.returncode
        if code == 0:
            self._keep(job, "done", seconds)
        elif stopped and not job.goes_on and started - self.began < LEAST:
            self._keep(job, "failed", seconds, "takes longer than a call: give more --minutes")
        elif not stopped and code != EXIT_INTERRUPTED:
            lines = log.read_text("utf-8", "replace").strip().splitlines()
            self._keep(job, "failed", seconds, f"exit code {code}: {lines[-1] if lines else 'it said nothing'}")

    def _keep(self, job: Job, state: str, seconds: float, reason: str = "") -> None:
        say(f"{job.name}: {state} after {duration(seconds)}" + (f", {reason}" if reason else ""))
        self.kept[job.name] = {"state": state, "words": _timeless(job), "seconds": round(seconds, 1), "reason": reason}
        write_json(self.path, self.kept)


def _timeless(job: Job) -> list[str]:
    """The words of a job without the time at which tests end."""
    return [word for place, word in enumerate(job.words) if (job.words[0], place) != ("scripts.prove_tests", 2)]


def _wait(process: subprocess.Popen[bytes], until: float) -> bool:
    """Wait for a process until a time and end it then; whether it had to be ended."""
    try:
        process.wait(max(0.0, until - time.time()))
    except subprocess.TimeoutExpired:
        _stop(process)
        return True
    return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Let a process save its work and end, or end it."""
    process.terminate()
    try:
        process.wait(TO_END - 5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def run_stages(options: argparse.Namespace, ends: float) -> tuple[list[str], list[str]]:
    """Run what is left of the stages and write the summary; names of what failed, and of what is left.

    A job whose predecessor in the course failed is not begun.
    """
    out: Path = options.out
    with sole_owner(out / ".lock", f"works in {out}", "let it finish"):
        keeper = Keeper(out, ends, options.device)
        if options.again:
            keeper.forget_failures()
        jobs = list(jobs_of(options, ends))
        blocked = ""
        for job in jobs:
            if not (blocked and job.name.startswith(("course", "samples", "score"))):
                keeper.run(job)
            if job.name in ("data", "course") and keeper.state(job) != "done":
                blocked = job.name
        states = {job.name: keeper.state(job) for job in jobs}
        summary = summarise(options, keeper, states)
        write_json(out / "summary.json", summary)
        show(summary, out)
    return [name for name in states if states[name] == "failed"], [name for name in states if states[name] == "left"]


def summarise(options: argparse.Namespace, keeper: Keeper, states: dict[str, str]) -> dict[str, Any]:
    """Everything that was found so far, ready for JSON."""
    out: Path = options.out
    return {
        "machine": describe_machine(options.device),
        "commit": describe_commit(),
        "jobs": {name: {"state": state} | _facts(keeper, name) for name, state in states.items()},
        "left": [name for name, state in states.items() if state == "left"],
        "tests": _tests(out / "tests.jsonl"),
        "compile": _tests(out / "compile.jsonl"),
        "bench": _bench(out),
        "course": _course(out),
    }


def _facts(keeper: Keeper, name: str) -> dict[str, Any]:
    return {key: value for key, value in keeper.kept.get(name, {}).items() if key in ("seconds", "reason") and value}


def describe_machine(kind: str) -> dict[str, Any]:
    """What it consists of, and the software that matters for speed."""
    device = pick_device("cpu" if kind == "cpu" else "auto")
    found: dict[str, Any] = {
        "device": device.type,
        "cpu": cpuinfo("model name") or platform.processor() or platform.machine(),
        "cores": cpu_cores(),
        "native_bf16": native_bf16(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        found |= {"gpu": facts.name, "gpus": torch.cuda.device_count(), "gpu_mib": facts.total_memory >> 20}
        found |= {"cudnn": torch.backends.cudnn.version()}
    return found


def _tests(journal: Path) -> dict[str, Any]:
    """Numbers of tests by outcome, and what failed and what was skipped, with the reasons."""
    results = read_journal(journal)
    by = {name: [test for test, row in results.items() if row["outcome"] == name] for name in OUTCOMES}
    counts: dict[str, Any] = {name: len(tests) for name, tests in by.items()}
    return counts | {f"{name}_tests": {test: results[test]["reason"] for test in by[name]} for name in OUTCOMES[1:]}


def _bench(out: Path) -> list[dict[str, Any]]:
    """Each part with its rates and the ratio, medians."""
    rows = []
    for path in sorted(out.glob("bench-*.json")):
        found = read_json(path)
        for part in found["parts"]:
            medians = {key: part[key]["median"] for key in ("ours", "reference", "ratio")}
            precision = found["run"]["precision"]
            rows.append({"part": part["part"], "precision": precision, "unit": part["unit"], **medians})
    return rows


def _course(out: Path) -> dict[str, Any]:
    """How far the run has come, how fast and in how much memory, and its scores."""
    rows = RunFolder(out / "course").read_stats()
    whole = [row for row in rows if "images_per_s" in row]
    fast = sorted(row["images_per_s"] for row in whole)
    scores = {path.stem.removeprefix("score-"): read_json(path) for path in sorted(out.glob("score-*.json"))}
    kept = ("metric", "mean", "sd", "floor", "excess")
    return {
        "images": max((row["images"] for row in rows), default=0),
        "images_per_s": fast[len(fast) // 2] if fast else None,
        "gpu_peak_mib": max((row["gpu_peak_mib"] for row in whole if "gpu_peak_mib" in row), default=None),
        "scores_on_the_way": [
            {key: row[key] for key in ("images", "metric", "n", "score")} for row in rows if "score" in row
        ],
        "scores": {name: {key: result[key] for key in kept} for name, result in scores.items()},
    }


def show(summary: dict[str, Any], out: Path) -> None:
    """Print the summary as a short table."""
    table = Table("what", "found", title="Facet on this machine", title_justify="left", show_header=False)
    machine, course = summary["machine"], summary["course"]
    table.add_row("machine", f"{machine.get('gpu', machine['cpu'])}, torch {machine['torch']}")
    for stage in ("tests", "compile"):
        counts = summary[stage]
        if any(counts[name] for name in OUTCOMES):
            table.add_row(stage, ", ".join(f"{counts[name]} {name}" for name in OUTCOMES))
        for test, reason in counts["failed_tests"].items():
            table.add_row("failed", f"{test.rpartition('::')[2]}: {reason[:100]}")
    for row in summary["bench"]:
        ratio = f"{row['ratio']:.3g}" if row["unit"] == "ms/batch" else f"{row['ratio']:.2f} x"
        figures = f"{row['ours']:,.4g} {row['unit']}, {row['reference']:,.4g} the usual way: {ratio}"
        table.add_row(f"{row['part']}, {row['precision']}", figures)
    if course["images_per_s"]:
        memory = "" if course["gpu_peak_mib"] is None else f", {course['gpu_peak_mib']:,.0f} MiB at most"
        table.add_row("course", f"{course['images']:,} images, {course['images_per_s']:,.0f}/s{memory}")
    for row in course["scores_on_the_way"]:
        table.add_row(f"at {row['images']:,}", f"{row['metric']} {row['score']:.4g} of {row['n']:,} samples")
    for result in course["scores"].values():
        table.add_row("at the end", f"{result['metric']} {result['mean']:.4g} of {SAMPLES:,} samples")
    for name, job in summary["jobs"].items():
        if job["state"] == "failed" and name not in ("tests", "compile"):
            table.add_row("failed", f"{name}: {job['reason'][:150]}")
    Console(markup=False, width=None if sys.stdout.isatty() else 150).print(table)
    print(f"everything is in {out}, the figures in {out / 'summary.json'}")
