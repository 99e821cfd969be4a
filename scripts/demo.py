"""The whole pipeline on drawn faces, with no data and no download: draw, train, sample, score, pack, segment."""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from core.cli.console import say
from core.cli.errors import EXIT_INTERRUPTED, CommandParser, UserError, reports_errors
from core.data.dataset import PreparedData
from core.data.images import make_grid, write_png
from core.nn.model_file import load_model
from eval.features.extractors import find_weights
from seg.predict import overlay

STUDENT_NUMBER = "20231234"
GRID = 64  # pictures of each kind on the result page
SEGMENTED = 10  # faces on the page of masks

EXAMPLES = """
examples:
  python -m scripts.demo                     about six minutes on two quiet cores
  python -m scripts.demo --images 100000     train longer; what is already there is continued
"""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line (default: sys.argv)."""
    parser = CommandParser(prog="python -m scripts.demo", description=__doc__, epilog=EXAMPLES)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for everything (default demo)")
    parser.add_argument("--faces", type=int, default=2000, help="faces to draw (default 2000)")
    parser.add_argument("--images", type=int, default=20_000, help="images to train for (default 20000)")
    parser.add_argument("--features", choices=("auto", "inception", "random"), default="auto", help="for the score")
    options = parser.parse_args(arguments)
    if options.faces < 1000:
        raise UserError("--faces must be at least 1000: the score compares 1,000 samples with them")
    data = options.out / "data"
    if data.exists() and len(PreparedData.open(data)) != options.faces:
        raise UserError(f"{data} holds another number of faces than --faces {options.faces}: give another --out")
    return options


def step(title: str, module: str, *words: object) -> float:
    """Run one command of the pipeline as a user would, and return its seconds.

    Raises:
        UserError: it failed (it has said why).
    """
    command = ["-m", module, *map(str, words)]
    say(f"\n{title}\n$ python {' '.join(command)}", style="bold")
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *command])
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.wait()  # it has had the Ctrl-C as well, and saves what it has
        raise
    if code == EXIT_INTERRUPTED:
        raise KeyboardInterrupt
    if code:
        raise UserError(f"the step `python {' '.join(command)}` failed (exit code {code}), see above")
    return time.perf_counter() - start


def choose_features(wanted: str) -> list[str]:
    """Settings of eval.fid: Inception when its weights can be had, else the stated substitute, saying why."""
    if wanted == "random":
        return ["features=random", "floor=true"]
    socket.setdefaulttimeout(10)  # behind some firewalls a connection is neither made nor refused
    try:
        weights = find_weights(None)
    except UserError as error:
        if wanted == "inception":
            raise
        say(f"reporting fd_random instead of FID: {error}", style="yellow")
        return ["features=random", "floor=true"]
    # Against 1,000 of the faces: the network is the slowest part of the demo on a CPU.
    return [f"fid.weights={weights}", "reference_count=1000"]


def pipeline(options: argparse.Namespace) -> dict[str, float]:
    """Run all steps and return the seconds of each."""
    out: Path = options.out
    data, samples = out / "data", out / "samples"
    archive = f"{STUDENT_NUMBER}.tar.gz"
    seconds = {}
    seconds["draw"] = step("Draw faces", "scripts.prepare", "drawn", "--count", options.faces, "--out", data)
    train = ["experiment=demo", f"data={data}", f"runs={out}", "name=run", f"total_images={options.images}"]
    seconds["train"] = step("Train a DCGAN", "gen.train", *train)
    sample = [out / "run", "--n", 1000, "--out", samples, "--overwrite", "--interpolate"]
    seconds["sample"] = step("Draw 1,000 samples", "gen.sample", *sample)
    result = out / "score.json"
    score = [f"source={samples}", f"data={data}", f"out={result}", *choose_features(options.features)]
    seconds["score"] = step("Score them", "eval.fid", *score)
    pack = [samples, "--student-number", STUDENT_NUMBER, "--out", out, "--force"]
    seconds["pack"] = step("Pack the submission", "scripts.package", *pack)
    seconds["check"] = step("Check it as a grader would", "scripts.package", "--check", out / archive)
    segment = ["experiment=unet_demo", f"data={data}", f"runs={out}", "name=unet"]
    seconds["segment"] = step("Train a U-Net", "seg.train", *segment)
    test = ["--data", data, "--split", "test", "--out", out / "unet" / "test.json"]
    seconds["test"] = step("Score it on faces it has not seen", "seg.evaluate", out / "unet", *test)
    faces = write_faces(out)
    predict = [out / "unet", faces, "--out", out / "masks", "--overwrite"]
    seconds["predict"] = step("Segment some of them", "seg.predict", *predict)
    return seconds


def unseen(data: PreparedData) -> np.ndarray:
    """Rows of the faces on the page of masks: neither trained on nor used to choose the weights."""
    return data.indices("test")[:SEGMENTED]


def write_faces(out: Path) -> Path:
    """Write the unseen faces as PNG files, as a user would have them."""
    data = PreparedData.open(out / "data")
    for row in unseen(data):
        write_png(out / "faces" / f"{row:04d}.png", np.asarray(data.images[row]))
    return out / "faces"


def picture(out: Path) -> Path:
    """One PNG: drawn faces on the left, generated ones on the right."""
    drawn = PreparedData.open(out / "data").images[:GRID]
    files = sorted((out / "samples").glob("*.png"))[:GRID]
    generated = np.stack([np.asarray(Image.open(path)) for path in files])
    grids = [make_grid(np.asarray(drawn)), make_grid(generated)]
    space = np.full((len(grids[0]), 16, 3), 255, np.uint8)
    write_png(out / "demo.png", np.concatenate([grids[0], space, grids[1]], axis=1))
    return out / "demo.png"


def mask_picture(out: Path) -> Path:
    """One PNG: unseen faces, their true masks over them, and the masks that the U-Net gives them."""
    data = PreparedData.open(out / "data")
    assert data.masks is not None
    rows = unseen(data)
    faces, masks = np.asarray(data.images[rows]), data.masks[rows]
    true = [overlay(face, mask, data.palette) for face, mask in zip(faces, masks, strict=True)]
    predicted = [np.asarray(Image.open(out / "masks" / f"{row:04d}.overlay.png")) for row in rows]
    grid = make_grid(np.concatenate([faces, np.stack(true), np.stack(predicted)]), columns=len(rows))
    write_png(out / "masks.png", grid.repeat(2, axis=0).repeat(2, axis=1))
    return out / "masks.png"


def summary(out: Path, seconds: dict[str, float]) -> Table:
    """What lies where, and what it took."""
    score = json.loads((out / "score.json").read_text(encoding="utf-8"))
    _, model = load_model(out / "run")
    scored = f"{score['metric']} {score['mean']:.3g}"
    if score["floor"] is not None:
        scored += f" (drawn faces themselves: {score['floor']['mean']:.2g})"
    test = json.loads((out / "unet" / "test.json").read_text(encoding="utf-8"))
    table = Table(title="Facet demo", title_justify="left")
    for name in ("step", "seconds", "result", "where"):
        table.add_column(name, justify="right" if name == "seconds" else "left", overflow="fold")
    rows = [
        ("draw", "faces with masks, 64x64", out / "data"),
        ("train", f"DCGAN, {model['images_seen']:,} images", out / "run"),
        ("sample", "1,000 PNGs", out / "samples"),
        ("score", scored, out / "score.json"),
        ("pack", "submission", out / f"{STUDENT_NUMBER}.tar.gz"),
        ("check", "nothing wrong", out / f"{STUDENT_NUMBER}.tar.gz"),
        ("segment", "U-Net", out / "unet"),
        ("test", f"mIoU {test['dataset']['miou']:.3f} over 8 classes", out / "unet" / "test.json"),
        ("predict", f"masks of {SEGMENTED} unseen faces", out / "masks"),
    ]
    for name, result, where in rows:
        table.add_row(name, f"{seconds[name]:.0f}", result, str(where))
    table.add_row("look", "", "drawn faces | generated faces", str(picture(out)))
    table.add_row("", "", "faces, true masks, predicted masks", str(mask_picture(out)))
    return table


@reports_errors
def main() -> None:
    """Command line entry."""
    options = parse()
    seconds = pipeline(options)
    Console().print(summary(options.out, seconds))


if __name__ == "__main__":
    main()
