"""The whole pipeline on drawn faces, with no data and no download: draw, train, sample, score, pack, segment."""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from core.cli.console import duration, say
from core.cli.errors import EXIT_INTERRUPTED, CommandParser, UserError, reports_errors
from core.cli.files import read_json
from core.cli.text import from_here
from core.data.dataset import PreparedData
from core.data.images import make_grid, write_png
from core.data.mask_pictures import comparison_page
from core.nn.model_file import load_model
from eval.features.extractors import without_download

STUDENT_NUMBER = "20231234"
GRID = 64  # drawn and generated faces shown in demo.png
FEATURES = ("inception", "efficientnet", "random")
IMAGES = 20_000
SEGMENTED = 4  # faces shown in masks.png

EXAMPLES = """
examples:
  facet demo                     about 5 minutes on two cores, 15 to 20 on one shared core
  facet demo --images 100000     train longer; what is already there is continued
"""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line (default: sys.argv)."""
    parser = CommandParser(prog="facet demo", description=__doc__, epilog=EXAMPLES)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for everything (default demo)")
    parser.add_argument("--faces", type=int, default=2000, help="faces to draw (default 2000)")
    parser.add_argument("--images", type=int, default=IMAGES, help=f"images to train for (default {IMAGES})")
    help_of_features = "default: efficientnet where installed, else random; inception gives FID, after a download"
    parser.add_argument("--features", choices=FEATURES, help=help_of_features)
    options = parser.parse_args(arguments)
    if options.faces < 1000:
        raise UserError("--faces must be at least 1000: the score compares 1,000 samples with them")
    data = options.out / "data"
    if data.exists() and len(PreparedData.open(data)) != options.faces:
        raise UserError(f"{data} holds another number of faces than --faces {options.faces}: give another --out")
    return options


def step(title: str, *words: object) -> float:
    """Run one `facet` command as a user would, and return its seconds.

    Raises:
        UserError: it failed; it has said why.
    """
    command = ["facet", *map(str, words)]
    say(f"\n{title}\n$ {shlex.join(command)}", style="bold")
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "scripts.facet", *command[1:]])
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.wait()  # it has received the Ctrl-C as well, and is saving its work
        raise
    if code == EXIT_INTERRUPTED:
        raise KeyboardInterrupt
    if code:
        raise UserError(f"the step `{shlex.join(command)}` failed (exit code {code}), see above")
    return time.perf_counter() - start


def score_settings(features: str) -> list[str]:
    """Settings of `facet score` for these features."""
    if features == "inception":  # against 1,000 of the faces: on a CPU, this network is the slowest part of the demo
        return ["features=inception", "reference_count=1000"]
    return [f"features={features}", "floor=true"]


def pipeline(options: argparse.Namespace) -> dict[str, float]:
    """Run all steps and return the seconds of each."""
    out: Path = options.out
    data, samples, unet = out / "data", out / "samples", out / "unet"
    to_data = [f"data={data}", f"runs={out}"]
    seconds = {}
    seconds["draw"] = step("Draw faces", "prepare", "drawn", "--count", options.faces, "--out", data)
    train = ["experiment=demo", *to_data, "name=run", f"total_images={options.images}"]
    seconds["train"] = step("Train a DCGAN", "train", *train)
    sample = [out / "run", "--n", 1000, "--out", samples, "--overwrite", "--interpolate"]
    seconds["sample"] = step("Draw 1,000 samples", "sample", *sample)
    choice = score_settings(options.features or without_download())
    if options.faces < 2_000:  # 1,000 in the place of samples, and as many to compare them with
        choice = [word for word in choice if word != "floor=true"]
    score = [f"source={samples}", f"data={data}", f"out={out / 'score.json'}", *choice]
    seconds["score"] = step("Score them", "score", *score)
    pack = [samples, "--student-number", STUDENT_NUMBER, "--out", out, "--force"]
    title = "Pack the submission (--force, since after so little training it may look collapsed and be refused)"
    seconds["pack"] = step(title, "package", *pack)
    seconds["check"] = step("Check it as a grader would", "check", out / f"{STUDENT_NUMBER}.tar.gz")
    seconds["segment"] = step("Train a U-Net", "seg-train", "experiment=unet_demo", *to_data, "name=unet")
    test = [unet, "--data", data, "--split", "test", "--out", unet / "test.json"]
    seconds["test"] = step("Score it on faces it has not seen", "seg-evaluate", *test)
    prepared = PreparedData.open(data)
    for row in unseen(prepared):  # as PNG files, as a user would have them
        write_png(out / "faces" / f"{row:04d}.png", np.asarray(prepared.images[row]))
    predict = [unet, out / "faces", "--out", out / "masks", "--overwrite"]
    seconds["predict"] = step("Segment some of them", "predict", *predict)
    return seconds


def unseen(data: PreparedData) -> np.ndarray:
    """Rows of faces that were used neither to train the U-Net nor to choose its weights."""
    return data.indices("test")[:SEGMENTED]


def draw_pictures(out: Path) -> None:
    """Write demo.png (drawn faces, generated faces) and masks.png (unseen faces, true and predicted masks, errors)."""
    data = PreparedData.open(out / "data")
    assert data.masks is not None
    generated = [np.asarray(Image.open(path)) for path in sorted((out / "samples").glob("*.png"))[:GRID]]
    left, right = make_grid(np.asarray(data.images[:GRID])), make_grid(np.stack(generated))
    write_png(out / "demo.png", np.hstack([left, np.full((len(left), 16, 3), 255, np.uint8), right]))
    rows = unseen(data)
    predicted = np.stack([np.asarray(Image.open(out / "masks" / f"{row:04d}.png")) for row in rows])
    masks = {"truth": data.masks[rows], "prediction": predicted}
    write_png(out / "masks.png", comparison_page(np.asarray(data.images[rows]), masks, data.classes, data.palette))


def learnt(scores: dict[str, Any]) -> str:
    """The mean IoU, and the classes that the U-Net has not found at all."""
    classes = scores["per_class"]
    missed = [name for name, score in classes.items() if score["iou"] is not None and round(score["iou"], 4) == 0]
    text = f"mIoU {scores['miou']:.3f} over {len(classes)} classes"
    return f"{text}; not learnt yet after so few images: {', '.join(missed)}" if missed else text


def next_steps(out: Path) -> str:
    """Commands to go on with; the first one only where the environment is not active, as after `make demo`."""
    run, unet = (shlex.quote(str(out / name)) for name in ("run", "unet"))
    lines = [f"facet watch {run}", f"facet play {run} {unet}    # extra 'app', which make demo installs"]
    if sys.prefix != sys.base_prefix and "VIRTUAL_ENV" not in os.environ:
        lines.insert(0, from_here(f"source {Path(sys.executable).with_name('activate')}"))
    return "\n".join(lines)


def summary(out: Path, seconds: dict[str, float]) -> Table:
    """What each step gave, where it is and how long it took."""
    score, test = read_json(out / "score.json"), read_json(out / "unet" / "test.json")
    images = load_model(out / "run")[1]["images_seen"]
    floor = score["floor"] and f" (drawn faces themselves: {score['floor']['mean']:.2g})"
    usual = ", 500 to 600 is normal here" if (score["metric"], images) == ("fd_efficientnet", IMAGES) else ""
    archive = f"{STUDENT_NUMBER}.tar.gz"
    table = Table("step", "seconds", "result", "where", title="Facet demo", title_justify="left")
    table.columns[1].justify = "right"
    for column in table.columns:
        column.overflow = "fold"
    for name, result, where in (
        ("draw", "faces with masks, 64x64", "data"),
        ("train", f"DCGAN, {images:,} images", "run"),
        ("sample", "1,000 PNGs", "samples"),
        ("score", f"{score['metric']} {score['mean']:.3g}{floor or ''}; lower is better{usual}", "score.json"),
        ("pack", "submission", archive),
        ("check", "nothing wrong", archive),
        ("segment", "U-Net", "unet"),
        ("test", learnt(test["dataset"]), "unet/test.json"),
        ("predict", f"masks of {SEGMENTED} unseen faces", "masks"),
        ("look", "drawn faces | generated faces", "demo.png"),
        ("", "faces, true and predicted masks, errors", "masks.png"),
    ):
        table.add_row(name, f"{seconds[name]:.0f}" if name in seconds else "", result, str(out / where))
    return table


@reports_errors
def main() -> None:
    """Command line entry."""
    options = parse()
    seconds = pipeline(options)
    draw_pictures(options.out)
    Console(markup=False).print(summary(options.out, seconds))
    print(f"{duration(sum(seconds.values()))} in all. To see more of it:\n{next_steps(options.out)}")


if __name__ == "__main__":
    main()
