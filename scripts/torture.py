"""Kill commands with SIGKILL at bad moments, start them again, and compare what they end with.

An undisturbed command comes first. Then the same one is killed, again and again, and at last allowed to end: it has to
leave the same files with the same content, none half-written, none left over, and no process.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from core.cli.errors import CommandParser, UserError, reports_errors
from core.cli.files import write_json
from core.data.images import write_png
from core.nn.model_file import build_model, save_model
from core.prepare.pipeline import prepare
from core.prepare.sources import drawn_source
from scripts.torture_files import damaged, differences

ROOT = Path(__file__).resolve().parent.parent
MARK = "FACET_TORTURE"  # an environment variable by which the processes of a command are found
GRACE = 30.0  # seconds after a kill in which all processes of the command have to be gone
LIMIT = 300.0  # seconds for a command
IN_A_ROW = 4  # kills before a command is allowed to end

EXAMPLES = """
examples:
  python -m scripts.torture                               52 kills, about 10 minutes on two cores
  python -m scripts.torture --kills 200 --seed 1 --json torture.json
  python -m scripts.torture --kills 10 --only train ranks --out torn

A process is killed after a random time, or when a given file is being written or has just been, with nothing said to it
before. Of several processes one is killed or all are. Exit code 0: nothing was lost; 1: something was, and is listed.
Linux only.
"""


@dataclass(frozen=True)
class Task:
    """A command that is killed.

    Attributes:
        words: its command line after `python -m`, run in a folder of its own.
        share: of all kills.
        moments: files whose appearance, or change, is a moment to kill; those that end with .part are being written.
        inputs: what the command reads, by its name in the folder.
        victims: who is killed: "all" processes, the "first" one alone, or a rank by its number.
    """

    words: tuple[str, ...]
    share: int
    moments: tuple[str, ...]
    inputs: tuple[str, ...] = ()
    victims: tuple[str, ...] = ("all",)


@dataclass
class Tally:
    """What became of one task."""

    kills: int = 0
    moments: dict[str, int] = field(default_factory=dict)
    ends: int = 0  # times that the command was allowed to end, and compared
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)


DATA, FACES, MODEL = "data", "faces", "model.safetensors"  # what commands read
SMALL = ("data=data", "name=t", "batch_size=8", "total_images=1000", "log_every=104", "save_every=100")
GAN = (*SMALL, "model.width=4", "grid_every=200", "model.image_size=32")
SEG = ("model.network.widths=[4,8]", "valid_every=100", "warmup=0", "workers=1")
SCORED = ("features=random", "n=1000", "floor_sets=2", "reference_count=50", "kid_subsets=2", "device=cpu")
LAUNCH = ("accelerate.commands.launch", "--quiet", "--multi_gpu", "--num_processes", "2", "-m")
OF_RUN = ("runs/t/state/.*.part", "runs/t/state/*.pt", "runs/t/.*.part", "runs/t/*.safetensors", "runs/t/*.jsonl")
BEST = ("runs/t/.best*.part", "runs/t/best*.safetensors")

TASKS: dict[str, Task] = {
    "prepare": Task(
        ("scripts.prepare", "drawn", "--count", "240", "--workers", "2", "--out", "made"),
        8,
        ("made.part", "made.part/journal.jsonl", "made.part/.meta.json.*.part", "made.part/names.txt", "made"),
        victims=("all", "first"),
    ),
    "train": Task(("gen.train", *GAN, "eval.every=500", "eval.n=2000"), 16, (*OF_RUN, *BEST), (DATA,)),
    "seg": Task(("seg.train", *SMALL, *SEG), 10, (*OF_RUN, *BEST), (DATA,), ("all", "first")),
    "sample": Task(
        ("gen.sample", MODEL, "--n", "400", "--out", "samples", "--overwrite"),
        4,
        (".samples.part", "samples"),
        (MODEL,),
    ),
    "report": Task(
        ("eval.report", FACES, "data=data", *SCORED, "out=page"),
        4,
        ("page/**/*.part", "page/**/*", "data/**/*.part", "data/**/*"),
        (DATA, FACES),
    ),
    "package": Task(
        ("scripts.package", FACES, "--student-number", "20231234", "--out", "."), 4, (".*.part", "*.gz"), (FACES,)
    ),
    "ranks": Task((*LAUNCH, "gen.train", *GAN), 6, OF_RUN, (DATA,), ("all", "first", "0", "1")),
}


def make_inputs(folder: Path, needed: set[str]) -> None:
    """Write what the commands read."""
    if DATA in needed:
        prepare(drawn_source(100, 0), folder / DATA, size=32, quiet=True)
    if FACES in needed:
        faces = prepare(drawn_source(1000, 1), folder / "drawn", size=64, workers=2, quiet=True).data.images
        (folder / FACES).mkdir()
        for index, face in enumerate(faces):
            write_png(folder / FACES / f"{index:04d}.png", face)
    if MODEL in needed:
        recipe = {"_target_": "gen.dcgan.Generator", "width": 4, "image_size": 64, "latent_dim": 8}
        save_model(folder / MODEL, build_model(recipe), recipe, {})


# --- processes ------------------------------------------------------------------------------------------------------


def start(task: Task, folder: Path) -> subprocess.Popen[bytes]:
    """Start the command in its folder, in a process group of its own; what it says is added to a file beside it."""
    environment = os.environ | {MARK: str(folder), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    with folder.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", *task.words],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def processes(folder: Path) -> dict[int, str]:
    """The living processes that come from a command in `folder`: process id -> rank, empty for those without."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):  # it has ended, or is another user's
                variables = dict(
                    pair.split(b"=", 1) for pair in (entry / "environ").read_bytes().split(b"\0") if b"=" in pair
                )
                if variables.get(MARK.encode()) == os.fsencode(folder):
                    found[int(entry.name)] = variables.get(b"RANK", b"").decode()
    return found


def send(ids: Iterable[int], number: signal.Signals = signal.SIGKILL) -> None:
    """Send a signal to processes, some of which may have ended."""
    for one in ids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(one, number)


def orphans(folder: Path) -> list[int]:
    """Processes of the command that are still there after the grace time; they are killed then."""
    deadline = time.monotonic() + GRACE
    while left := list(processes(folder)):
        if time.monotonic() > deadline:
            send(left)
            return left
        time.sleep(0.1)
    return []


class Moment:
    """Reached when files that fit `pattern` have appeared, or changed, `times` times since the command started."""

    def __init__(self, folder: Path, pattern: str, times: int) -> None:
        self.folder, self.pattern, self.times = folder, pattern, times
        self.before = self._look()

    def _look(self) -> set[tuple[str, int]]:
        found = set()
        for path in self.folder.glob(self.pattern):
            with contextlib.suppress(OSError):  # it is gone already
                # A file that is being written changes all the time, and counts once.
                found.add((str(path), 0 if self.pattern.endswith(".part") else path.stat().st_mtime_ns))
        return found

    def reached(self) -> bool:
        """Look again."""
        now = self._look()
        self.times -= len(now - self.before)
        self.before = now
        return self.times <= 0


# --- one task -------------------------------------------------------------------------------------------------------


class Failed(Exception):
    """A command did not do what it should; the message says which."""


def finish(task: Task, folder: Path) -> float:
    """Run the command to its end and return how many seconds that took; Failed if it does not succeed."""
    started = time.monotonic()
    running = start(task, folder)
    try:
        code = running.wait(LIMIT)
    except subprocess.TimeoutExpired:
        send(processes(folder))
        raise Failed(f"not done after {LIMIT:g} seconds") from None
    _require_success(code, folder)
    return time.monotonic() - started


def _require_success(code: int, folder: Path) -> None:
    if code:
        log = folder.with_suffix(".log").read_text("utf-8", "replace")
        raise Failed(f"exit code {code}: {' '.join(log.split())[-300:]}")


def kill_once(task: Task, folder: Path, seconds: float, rng: random.Random) -> str | None:
    """Start the command and kill it at a moment, which is returned; None if the command ended before."""
    pattern = rng.choice(("", *task.moments))
    delay, pause = rng.uniform(0.2, 1.0) * seconds, rng.choice((0.0, 0.0, 0.001, 0.005))
    victim = rng.choice(task.victims)
    moment = Moment(folder, pattern, rng.choice((1, 1, 2, 5))) if pattern else None
    running, started = start(task, folder), time.monotonic()
    known, looked = {running.pid}, started
    while not (moment.reached() if moment else time.monotonic() - started > delay):
        if (code := running.poll()) is not None:
            _require_success(code, folder)
            return None
        if time.monotonic() - started > LIMIT:
            send(processes(folder))
            raise Failed(f"not done after {LIMIT:g} seconds")
        if time.monotonic() - looked > 1:
            known, looked = {running.pid, *processes(folder)}, time.monotonic()
        time.sleep(0.0005)
    time.sleep(pause)
    send(known, signal.SIGSTOP)  # looking for all processes takes longer than a file is being written
    ids = {running.pid: "", **processes(folder)}
    chosen = [running.pid] if victim == "first" else [one for one, rank in ids.items() if victim in ("all", rank)]
    send(chosen)
    send(ids.keys() - chosen, signal.SIGCONT)
    try:
        running.wait(LIMIT)
    except subprocess.TimeoutExpired:
        send(processes(folder))
        raise Failed(f"the launcher did not end after rank {victim} was killed") from None
    if running.returncode == 0 or not chosen:
        return None
    return f"{pattern or 'any time'}, {victim} killed"


def torture(task: Task, inputs: Path, work: Path, kills: int, rng: random.Random, bar: Callable[[], object]) -> Tally:
    """Kill a command `kills` times and compare; the folders stay in `work`."""
    tally, started = Tally(), time.monotonic()
    calm = torn = fresh(work / "calm", task, inputs)
    try:
        seconds = finish(task, calm)
        tries = 0
        while tally.kills < kills:
            torn = fresh(work / f"torn-{tally.ends}", task, inputs)
            for _ in range(min(IN_A_ROW, kills - tally.kills)):
                tries += 1
                moment = kill_once(task, torn, seconds, rng)
                if left := orphans(torn):
                    tally.faults.append(f"{torn}: {len(left)} processes outlived the kill ({moment})")
                tally.faults += [f"{torn}: half-written after {moment}: {entry}" for entry in damaged(torn)]
                if moment is None:
                    break
                tally.kills += 1
                tally.moments[moment] = tally.moments.get(moment, 0) + 1
                bar()
            if tries > 5 * kills + 20:
                raise Failed("the command mostly ends before it can be killed")
            finish(task, torn)
            tally.ends += 1
            tally.faults += [f"{torn}: {entry}" for entry in [*damaged(torn), *differences(torn, calm)]]
            if left := orphans(torn):
                tally.faults.append(f"{torn}: {len(left)} processes outlived the end")
            if not tally.faults:
                shutil.rmtree(torn)
    except Failed as failure:
        tally.faults.append(f"{work}: {failure}")
    finally:  # Ctrl-C, which does not reach the command
        send([*processes(calm), *processes(torn)])
    tally.seconds = time.monotonic() - started
    return tally


def fresh(folder: Path, task: Task, inputs: Path) -> Path:
    """A folder with what the command reads."""
    folder.mkdir(parents=True)
    for name in task.inputs:
        source = inputs / name
        (shutil.copytree if source.is_dir() else shutil.copy2)(source, folder / name)
    return folder


def shares(names: Sequence[str], kills: int) -> dict[str, int]:
    """How many of all kills each task gets, at least one."""
    total = sum(TASKS[name].share for name in names)
    return {name: max(1, round(kills * TASKS[name].share / total)) for name in names}


# --- the command ----------------------------------------------------------------------------------------------------


def table_of(tallies: dict[str, Tally]) -> Table:
    """One line per task."""
    table = Table(title="Killed and started again", title_justify="left")
    for name in ("command", "kills", "moments", "compared", "faults", "seconds"):
        table.add_column(name, justify="left" if name == "command" else "right")
    for name, tally in tallies.items():
        numbers = [tally.kills, len(tally.moments), tally.ends, len(tally.faults)]
        table.add_row(name, *map(str, numbers), f"{tally.seconds:.0f}")
    return table


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line (default: sys.argv)."""
    parser = CommandParser(prog="python -m scripts.torture", description=__doc__, epilog=EXAMPLES)
    parser.add_argument("--kills", type=int, default=52, help="of all commands together (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed kills at other moments (default 0)")
    parser.add_argument("--only", nargs="+", choices=TASKS, metavar="COMMAND", help=f"some of {', '.join(TASKS)}")
    parser.add_argument("--out", type=Path, help="new folder to work in, which stays (default: a temporary one)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the counts as JSON, too")
    options = parser.parse_args(arguments)
    if options.kills < 1:
        parser.error("--kills must be at least 1")
    if options.out and options.out.exists():
        parser.error(f"--out {options.out} exists: name a new folder")
    return options


@contextlib.contextmanager
def work_folder(out: Path | None) -> Iterator[Path]:
    """The folder that was asked for, or a temporary one."""
    if out is not None:
        out.mkdir(parents=True)
        yield out.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="facet-torture-", ignore_cleanup_errors=True) as own:
        yield Path(own).resolve()


@reports_errors
def main() -> None:
    """Command line entry."""
    options = parse()
    if not Path("/proc/self/environ").is_file():
        raise UserError("scripts.torture finds processes in /proc, which this system lacks: run it on Linux")
    names = [name for name in TASKS if name in (options.only or TASKS)]
    counts = shares(names, options.kills)
    tallies: dict[str, Tally] = {}
    with work_folder(options.out) as work, Progress(console=Console(stderr=True), transient=True) as bar:
        make_inputs(work / "inputs", {need for name in names for need in TASKS[name].inputs})
        for name in names:
            line = bar.add_task(name, total=counts[name])
            rng = random.Random(f"{options.seed} {name}")
            step = functools.partial(bar.advance, line)
            tallies[name] = torture(TASKS[name], work / "inputs", work / name, counts[name], rng, step)
    kills = sum(tally.kills for tally in tallies.values())
    print(f"seed {options.seed}, {kills} kills")
    Console(width=None if sys.stdout.isatty() else 100).print(table_of(tallies))
    for name, tally in tallies.items():
        for fault in tally.faults:
            print(f"{name}: {fault}")
    if options.json:
        found = {"seed": options.seed, "kills": kills, "commands": {name: vars(each) for name, each in tallies.items()}}
        write_json(options.json, found)
    sys.exit(any(tally.faults for tally in tallies.values()))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # clean up, as after Ctrl-C
    main()
