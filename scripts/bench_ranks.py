"""Two processes against one, on the CPU: the part `ranks`, and the program that its processes run.

Three groups wait side by side and work in turns: one process on all cores; two that `accelerate launch` started, with
half of the batch and half of the cores each, which exchange gradients; and two like these that know nothing of each
other. What the second group takes longer than the third is the price of the exchange (DDP).
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast

from core.cli.errors import UserError
from core.data.dataset import PreparedData
from core.training.distributed import start_accelerator
from scripts.bench_measure import Result, Side, Spread, neighbour_ratios
from scripts.bench_parts import Bench, Settings

PROCESSES = 2
PATIENCE = 60.0  # seconds for a group to end
LAUNCHER = ["-m", "accelerate.commands.launch", "--quiet", "--multi_gpu", "--num_processes", str(PROCESSES)]


@dataclass(frozen=True)
class Worker:
    """A process that trains when told to, or the launcher of several: a number of steps in, a line out when done."""

    process: subprocess.Popen[str]
    errors: Path

    def order(self, steps: int) -> None:
        """Let it make so many steps."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # `wait` says why
            self.process.stdin.write(f"{steps}\n")
            self.process.stdin.flush()

    def wait(self) -> None:
        """Until the steps are done.

        Raises:
            UserError: the process has ended; quotes its last line.
        """
        assert self.process.stdout is not None
        if self.process.stdout.readline().strip() != "done":
            lines = self.errors.read_text(errors="replace").split("\n")
            last = next((line for line in reversed(lines) if line.strip()), "nothing")
            raise UserError(f"a process of the part ranks ended early, and last said: {last.strip()}; leave ranks out")


def ranks(bench: Bench) -> Result:
    """Images a second of two processes and of one, with the same global batch."""
    settings = replace(bench.settings, batch=bench.settings.rank_batch, precision="fp32")
    data = bench.prepared(settings.size).path
    half = replace(settings, batch=settings.batch // PROCESSES)
    alone = {"LOCAL_WORLD_SIZE": str(PROCESSES)}  # how `core.training.distributed.share_cores` learns of the other one
    with contextlib.ExitStack() as stack:
        groups = {
            "ours": [stack.enter_context(worker(settings, data, bench.folder / "together", LAUNCHER, {}))],
            "reference": [stack.enter_context(worker(settings, data, bench.folder / "one", [], {}))],
            "apart": [
                stack.enter_context(worker(half, data, bench.folder / f"apart{number}", [], alone))
                for number in range(PROCESSES)
            ],
        }
        sides = [Side(name, partial(_turn, group, settings.batch)) for name, group in groups.items()]
        rates = bench.interleave(*sides)
    cost = Spread.of(1 - neighbour_ratios(rates["ours"], rates["apart"]))
    note = f"ours: {PROCESSES} processes on the CPU; reference: one; exchanging gradients costs {cost.median:.0%}"
    facts = {"without_exchange": vars(Spread.of(rates["apart"])), "exchange_share": vars(cost)}
    return Result.of_rates("ranks", "images/s", rates, note=note, facts=facts)


def _turn(group: list[Worker], batch: int, steps: int) -> float:
    """Let all of a group work at once; returns the images of all."""
    for one in group:
        one.order(steps)
    for one in group:
        one.wait()
    return steps * batch


@contextlib.contextmanager
def worker(
    settings: Settings, data: Path, folder: Path, launcher: list[str], environment: dict[str, str]
) -> Iterator[Worker]:
    """A process on the CPU that runs this module, or several when `launcher` is not empty; ended at the end."""
    folder.mkdir()
    words = [*launcher, "-m", "scripts.bench_ranks", json.dumps([asdict(settings), str(data), str(folder)])]
    variables = os.environ | {"ACCELERATE_USE_CPU": "true"} | environment
    with (folder / "errors.txt").open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=variables,
        )
    try:
        yield Worker(process, folder / "errors.txt")
    finally:
        assert process.stdin is not None and process.stdout is not None
        with process.stdout:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()  # the end of its orders
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def serve(settings: dict[str, Any], data: str, folder: str) -> None:
    """Train as many steps as each line of standard input says, until it ends."""
    chosen = Settings(**settings)
    accelerator = start_accelerator(chosen.precision, None, Path(folder))
    trainer = Bench(chosen, accelerator, Path(folder)).gan_trainer("run", PreparedData.open(data))
    while True:
        line = sys.stdin.readline() if accelerator.is_main_process else ""
        steps = torch.tensor([int(line or 0)], device=accelerator.device)
        count = int(broadcast(steps, from_process=0).item())
        if not count:
            break
        for _ in range(count):
            trainer.step()
        if accelerator.is_main_process:
            print("done", flush=True)
    accelerator.end_training()


if __name__ == "__main__":
    serve(*json.loads(sys.argv[1]))
