"""Feed damaged and hostile input to everything that reads files or settings; only success or one clear line may follow.

Each input is a valid one with a few random changes, and depends on the seed, the target and its number alone.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import io
import random
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from unittest import mock

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from core.cli.console import console
from core.cli.errors import EXIT_INTERRUPTED, CommandParser, UserError, reports_errors
from core.cli.files import write_json

try:
    import resource
except ImportError:  # Windows: no limit on memory there
    resource = None  # type: ignore[assignment]

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 5.0  # that one input may take
GROWTH = 512 << 20  # bytes by which one input may raise the peak of memory
ROOM = 4 << 30  # bytes of address space beyond what is in use: a request for more fails, as on a full machine
LONGEST = 400  # characters of a message
KEPT = 3  # inputs of one kind of finding that are written to disk

EXAMPLES = """
examples:
  python -m scripts.fuzz                                  100,000 inputs, about a quarter of an hour on one core
  python -m scripts.fuzz --count 5000 --seed 1 --only model archive
  python -m scripts.fuzz --replay findings/model-0-17.bin

A finding is an input after which anything but success or a one-line error that names the file or key follows, or that
takes more than 5 seconds or 512 MiB. Findings are written to the folder --out. Exit code 0: no finding; 1: findings.
"""


@dataclass(frozen=True)
class Layer:
    """Valid inputs of one kind and how a changed one becomes a whole input, as with a checksum that is right again."""

    seeds: Sequence[bytes]
    wrap: Callable[[bytes], bytes] = bytes


@dataclass(frozen=True)
class Target:
    """Something that reads untrusted input.

    Attributes:
        layers: where inputs come from; each is as likely.
        words: bytes that mean something to the reader.
        read: reads an input, in a folder of its own that is empty. True: accepted; False: refused. May raise UserError.
        names: what of an input a message may name; one of them is enough.
        share: of all inputs, relative to other targets: slow readers get fewer.
    """

    layers: Sequence[Layer]
    words: Sequence[bytes]
    read: Callable[[bytes, Path], bool]
    names: Callable[[bytes], Sequence[str]]
    share: float = 1.0


@dataclass
class Tally:
    """What came of the inputs of a target; `findings` counts by kind, `files` has the first inputs of each."""

    inputs: int = 0
    accepted: int = 0
    refused: int = 0
    seconds: float = 0.0
    findings: dict[str, int] = field(default_factory=dict)
    files: dict[str, list[str]] = field(default_factory=dict)


class _TooSlow(BaseException):
    """Not an Exception, which readers of damaged files catch and report."""


# --- inputs ---------------------------------------------------------------------------------------------------------


def make_input(target: Target, name: str, seed: int, number: int) -> bytes:
    """Input `number` of a target, the same on every machine that encodes the valid inputs alike; 0 is unchanged."""
    rng = random.Random(f"{seed} {name} {number}")
    layer = rng.choice(target.layers)
    data = bytearray(rng.choice(layer.seeds))
    for _ in range(min(number, rng.choice((1, 1, 1, 2, 3, 6)))):
        _change(data, rng, layer.seeds, target.words)
    return layer.wrap(bytes(data))


def _change(data: bytearray, rng: random.Random, seeds: Sequence[bytes], words: Sequence[bytes]) -> None:
    """Change the data in one place."""
    place, kind = rng.randrange(len(data) + 1), rng.randrange(9)
    length = rng.choice((1, 1, 2, 4, 8, 64, 512))
    if kind == 0 and data:
        data[place % len(data)] ^= 1 << rng.randrange(8)
    elif kind == 1:
        data[place : place + length] = rng.randbytes(length)
    elif kind == 2:
        del data[place:]
    elif kind == 3:
        del data[place : place + length]
    elif kind == 4:
        data[place:place] = data[place : place + length] * rng.choice((1, 2, 50))
    elif kind == 5:  # the rest of another one
        other = rng.choice(seeds)
        data[place:] = other[rng.randrange(len(other) + 1) :]
    elif kind == 6 and words:
        word = rng.choice(words)
        data[place : place + rng.choice((0, len(word)))] = word
    elif kind == 7:  # a number in binary
        width = rng.choice((1, 2, 4, 8))
        value = rng.choice((0, 1, 2 ** (8 * width) - 1, 2 ** (8 * width - 1), 2 ** (4 * width), 0x7FFF_FFFF))
        data[place : place + width] = (value % 256**width).to_bytes(width, rng.choice(("little", "big")))
    else:
        _change_number(data, rng)


NUMBERS = (b"0", b"-1", b"1e999", b"9" * 30, b"4294967296", b"65537", b"0.5", b"NaN", b"null", b"true", b'"x"', b"[]")


def _change_number(data: bytearray, rng: random.Random) -> None:
    """Replace one of the numbers written in digits, if there is any."""
    digits = [place for place, byte in enumerate(data) if 48 <= byte <= 57]
    if digits:
        start = stop = rng.choice(digits)
        while stop < len(data) and 48 <= data[stop] <= 57:
            stop += 1
        data[start:stop] = rng.choice(NUMBERS)


# --- verdicts -------------------------------------------------------------------------------------------------------


def judge(target: Target, data: bytes, folder: Path) -> tuple[bool, str]:
    """Read one input as a command does: whether it was accepted, and the kind of finding, empty if all was right."""
    before, started, accepted, finding = _peak(), time.perf_counter(), False, ""
    shown = io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace")  # as standard error is
    try:
        with _time_limit(), contextlib.redirect_stderr(shown):
            accepted = reporting(target.read)(data, folder)
    except SystemExit as stop:
        if stop.code == EXIT_INTERRUPTED:
            raise KeyboardInterrupt from stop
        shown.seek(0)
        if fault := _fault_of(shown.read(), target.names(data)):
            finding = f"{fault}, raised at {_place(stop.__context__ or stop)}"
    except _TooSlow as error:
        finding = f"more than {SECONDS:g} seconds at {_place(error)}"
    except BaseException as error:
        finding = f"{type(error).__module__}.{type(error).__qualname__} at {_place(error)}".removeprefix("builtins.")
    if not finding and time.perf_counter() - started > SECONDS:
        finding = f"more than {SECONDS:g} seconds in one call"
    if not finding and _peak() - before > GROWTH:
        finding = f"more than {GROWTH >> 20} MiB"
        _forget_peak()
    return accepted, finding


def reporting(read: Callable[[bytes, Path], bool]) -> Callable[[bytes, Path], bool]:
    """`read` with its errors reported as those of a command: a line on standard error and SystemExit."""

    def call(data: bytes, folder: Path) -> bool:
        result: list[bool] = []
        reports_errors(lambda: result.append(read(data, folder)))()
        return result[0]

    return call


def _fault_of(text: str, names: Sequence[str]) -> str:
    """What is wrong with an error message as it was printed, or nothing."""
    line = text.removesuffix("\n")
    if not line.isprintable():
        return "message of several lines or with control characters"
    if not 0 < len(line) <= LONGEST:
        return f"message of no or more than {LONGEST} characters"
    if not any(name in line for name in names):
        return "message without the file or key"
    return ""


def _place(error: BaseException) -> str:
    """The innermost line of this project, this module apart, in the traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if Path(frame.filename).is_relative_to(ROOT)]
    last = next((frame for frame in reversed(ours) if frame.filename != __file__), None)
    return f"{Path(last.filename).relative_to(ROOT).as_posix()}:{last.lineno}" if last else "an unknown place"


def _peak() -> int:
    """The most memory, in bytes, that this process has had so far; 0 where that is unknown."""
    if resource is None:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _forget_peak() -> None:
    """Let the peak start from what is in use (on Linux), else inputs after a large one could take as much unnoticed."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    """Raise _TooSlow in code that takes longer than it may; one call of a C function is only noticed afterwards."""
    if not hasattr(signal, "setitimer"):
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise _TooSlow

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _memory_limit() -> Iterator[None]:
    """Let requests for very much memory fail here, so that they do not bring down the machine."""
    status = Path("/proc/self/status")
    if resource is None or not status.is_file():
        yield
        return
    used = next(
        int(line.split()[1]) for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmSize")
    )
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used * 1024 + ROOM, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


# --- runs -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def workplace() -> Iterator[Path]:
    """A folder in memory if possible, with the project's messages silent and the limit on memory in force."""
    memory = Path("/dev/shm")
    with (
        tempfile.TemporaryDirectory(prefix="facet-fuzz-", dir=memory if memory.is_dir() else None) as folder,
        mock.patch.object(console, "quiet", True),
        warnings.catch_warnings(),
        _memory_limit(),
    ):
        warnings.simplefilter("ignore")  # of decoders, about damage
        _forget_peak()
        yield Path(folder)


def fuzz(target: Target, name: str, count: int, seed: int, out: Path, on_input: Callable[[], object]) -> Tally:
    """Read `count` inputs of a target; the first ones of each kind of finding are written to `out`."""
    tally, started = Tally(), time.perf_counter()
    with workplace() as work:
        for number in range(count):
            data, folder = make_input(target, name, seed, number), work / str(number)
            folder.mkdir()
            accepted, finding = judge(target, data, folder)
            shutil.rmtree(folder)
            tally.inputs += 1
            tally.accepted += accepted and not finding
            tally.refused += not accepted and not finding
            if finding:
                tally.findings[finding] = tally.findings.get(finding, 0) + 1
                files = tally.files.setdefault(finding, [])
                if len(files) < KEPT:
                    out.mkdir(parents=True, exist_ok=True)
                    path = out / f"{name}-{seed}-{number}.bin"
                    path.write_bytes(data)
                    files.append(str(path))
            on_input()
    tally.seconds = time.perf_counter() - started
    return tally


def shares(targets: dict[str, Target], count: int) -> dict[str, int]:
    """How many of `count` inputs each target gets, at least one."""
    total = sum(target.share for target in targets.values())
    return {name: max(1, round(count * target.share / total)) for name, target in targets.items()}


def replay(targets: dict[str, Target], path: Path) -> bool:
    """Read one input that was written before, with the traceback of what it raises; whether it is a finding."""
    name = path.name.partition("-")[0]
    if name not in targets or not path.is_file():
        raise UserError(f"{path} is no input: give a file TARGET-SEED-NUMBER.bin that `scripts.fuzz` has written")
    data = path.read_bytes()
    with workplace() as work:
        for again in (work / "first", work / "second"):
            again.mkdir()
        accepted, finding = judge(targets[name], data, work / "first")
        try:
            targets[name].read(data, work / "second")
        except Exception:
            traceback.print_exc()
    print(finding or ("accepted" if accepted else "refused, rightly"))
    return bool(finding)


def table_of(tallies: dict[str, Tally]) -> Table:
    """One line per target."""
    table = Table(title="Inputs read", title_justify="left")
    for name in ("target", "inputs", "accepted", "refused", "findings", "seconds"):
        table.add_column(name, justify="left" if name == "target" else "right")
    for name, tally in tallies.items():
        numbers = [tally.inputs, tally.accepted, tally.refused, sum(tally.findings.values())]
        table.add_row(name, *(f"{number:,}" for number in numbers), f"{tally.seconds:.1f}")
    return table


def parse(names: Sequence[str], arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line (default: sys.argv)."""
    parser = CommandParser(prog="python -m scripts.fuzz", description=__doc__, epilog=EXAMPLES)
    parser.add_argument("--count", type=int, default=100_000, help="inputs of all targets together (default 100,000)")
    parser.add_argument("--seed", type=int, default=0, help="another seed makes other inputs (default 0)")
    parser.add_argument("--only", nargs="+", choices=names, metavar="TARGET", help=f"some of {', '.join(names)}")
    parser.add_argument("--out", type=Path, default=Path("findings"), help="folder for findings (default findings)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the counts as JSON, too")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="only read this input, and show its traceback")
    options = parser.parse_args(arguments)
    if options.count < 1:
        parser.error("--count must be at least 1")
    return options


@reports_errors
def main() -> None:
    """Command line entry."""
    from scripts.fuzz_targets import make_targets  # imports torch, which --help need not wait for

    with tempfile.TemporaryDirectory(prefix="facet-fuzz-data-") as own:
        with mock.patch.object(console, "quiet", True):
            targets = make_targets(Path(own))
        options = parse(list(targets))
        if options.replay:
            sys.exit(replay(targets, options.replay))
        chosen = {name: target for name, target in targets.items() if name in (options.only or targets)}
        counts = shares(chosen, options.count)
        tallies: dict[str, Tally] = {}
        with Progress(console=Console(stderr=True), transient=True) as bar:
            for name, target in chosen.items():
                task = bar.add_task(name, total=counts[name])
                step = lambda task=task: bar.advance(task)  # noqa: E731
                tallies[name] = fuzz(target, name, counts[name], options.seed, options.out, step)
    print(f"seed {options.seed}, {sum(counts.values()):,} inputs")
    Console(width=None if sys.stdout.isatty() else 100).print(table_of(tallies))
    for name, tally in tallies.items():
        for finding, times in sorted(tally.findings.items(), key=lambda entry: -entry[1]):
            again = shlex.join(["python", "-m", "scripts.fuzz", "--replay", tally.files[finding][0]])
            print(f"{name}: {times:,} x {finding}\n    {again}")
    if options.json:
        write_json(
            options.json, {"seed": options.seed, "targets": {name: vars(each) for name, each in tallies.items()}}
        )
    sys.exit(any(tally.findings for tally in tallies.values()))


if __name__ == "__main__":
    faulthandler.enable()  # names the line of Python from which a decoder crashed
    main()
