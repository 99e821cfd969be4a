"""The loss around trained segmenters, in a plane of two random directions (Li et al. 2018)."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.cli.console import progress_bar
from core.cli.errors import CommandParser, Interrupted, UserError, reports_errors
from core.cli.files import atomic_path, read_json, write_json
from core.cli.lock import sole_owner
from core.data.dataset import PreparedData
from core.data.images import to_float
from core.data.mask_classes import IGNORE
from core.nn.landscape import losses_at, positions, random_direction, sharpness
from core.nn.model_file import FILE_NAME, model_file
from core.training.machine import PRECISIONS, full_precision, pick_device, set_up_cpu
from core.training.stopping import StopRequest
from scripts.options import check_options
from seg.loading import load_unet
from seg.network import SegmentationNetwork
from seg.scoring import PIXELS_AT_ONCE, whole_logits

RADIUS = 0.25  # of the square in which sharpness looks for the largest loss
FLOOR, CEILING = 1e-6, 100.0  # of the losses as drawn: rounding can make 0, and beyond it height says nothing more
SAVE_EVERY = 2.0  # seconds between writings of the points
EPILOG = """
Each filter of a random direction has the length of the model's own filter, so that models can be compared; biases and
norms stay. At distance 1 each filter has moved by its own length. The loss is the cross-entropy of the pixels of the
same pictures at every point. Sharpness is (largest loss within 0.25 - L) / (1 + L) for the loss L of the model.

  facet landscape runs/plain runs/residual --data data/drawn --out landscape.png

The points are kept in a .json file beside the picture: the same command continues where it was stopped, and finds the
points of models that have not changed.
"""


@dataclass(frozen=True)
class Subject:
    """A model whose surface is drawn: its name on the picture, the network, and what identifies it."""

    name: str
    network: SegmentationNetwork
    sha256: str


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read and check the command line (default: sys.argv)."""
    parser = CommandParser(prog="facet landscape", description=__doc__, epilog=EPILOG)
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL", help="run folder or .safetensors file")
    parser.add_argument("--data", type=Path, required=True, help="prepared data set with masks")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.png", help="the picture")
    parser.add_argument("--points", type=int, default=25, help="on each axis, an odd number (default 25)")
    parser.add_argument("--reach", type=float, default=1.0, help="largest distance on each axis (default 1)")
    parser.add_argument("--split", default="valid", help="all, train, valid or test (default valid)")
    parser.add_argument("--images", type=int, default=64, help="the first so many of the split (default 64)")
    parser.add_argument("--seed", type=int, default=0, help="of the directions (default 0)")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="default fp32")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default auto)")
    parser.add_argument("--overwrite", action="store_true", help="drop points of other settings")
    options = parser.parse_args(arguments)
    if options.out.suffix != ".png":
        raise UserError(f"--out {options.out}: the name must end in .png; the points go beside it as .json")
    if options.points < 3 or options.points % 2 == 0:
        raise UserError(f"--points {options.points}: give an odd number from 3 up, which has the model in the middle")
    if not RADIUS <= options.reach < math.inf:
        raise UserError(f"--reach {options.reach} must be a number from {RADIUS} up")
    check_options(options, images=1)
    return options


def load_subjects(models: list[Path], data: PreparedData, device: torch.device) -> list[Subject]:
    """The models, which must know the classes of the data.

    Their batch norm is folded, which changes nothing: a filter and its random direction are scaled alike.
    """
    subjects = []
    for model in models:
        file = model_file(model)
        network, info = load_unet(file, device)
        if info["classes"] != data.classes:
            raise UserError(f"{file} knows the classes {', '.join(info['classes'])}, {data.path} has other ones")
        name = file.parent.absolute().name if file.name == FILE_NAME else file.stem
        subjects.append(Subject(name, network, info["sha256"]))
    return subjects


def batch_loss(data: PreparedData, rows: np.ndarray, device: torch.device, precision: str) -> Callable[..., float]:
    """What computes the mean cross-entropy of a segmenter over the labelled pixels of these rows."""
    assert data.masks is not None
    at_once = max(1, PIXELS_AT_ONCE // data.image_size**2)
    pieces = [rows[start : start + at_once] for start in range(0, len(rows), at_once)]
    batches: list[tuple[Tensor, Tensor]] = [
        (to_float(torch.from_numpy(data.images[piece]).to(device)), torch.from_numpy(data.masks[piece]).to(device))
        for piece in pieces
    ]
    labelled = sum(int((masks != IGNORE).sum()) for _, masks in batches)
    if not labelled:
        raise UserError(f"{data.path}: every pixel of the first {len(rows)} pictures is ignored (255)")

    def mode() -> AbstractContextManager[Any]:
        return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else full_precision(device)

    @torch.no_grad()
    def loss(model: nn.Module) -> float:
        assert isinstance(model, SegmentationNetwork)
        total = 0.0
        for images, masks in batches:
            with mode():
                logits = whole_logits(model, images)
            total += F.cross_entropy(logits.float(), masks.long(), ignore_index=IGNORE, reduction="sum").item()
        return total / labelled

    return loss


class Points:
    """The losses that were computed so far, in a file: SHA-256 of a model -> losses in the order of `positions`.

    Raises:
        UserError: the file is damaged, or of other settings and `overwrite` is not given.
    """

    def __init__(self, path: Path, settings: dict[str, Any], overwrite: bool) -> None:
        self.path, self.settings, self.losses = path, settings, dict[str, list[float | None]]()
        self.saved = time.monotonic()
        if path.exists() and not overwrite:
            kept = read_json(path, "give another --out, or --overwrite to start anew")
            if (before := kept.get("settings")) != settings:
                known = before if isinstance(before, dict) else {}
                changed = [f"{key}={known.get(key)}" for key in settings if known.get(key) != settings[key]]
                raise UserError(
                    f"{path} holds points of other settings ({', '.join(changed)}): give another --out, or "
                    "--overwrite to start anew"
                )
            self.losses = kept["losses"]

    def save(self) -> None:
        """Write the file."""
        write_json(self.path, {"settings": self.settings, "losses": self.losses})
        self.saved = time.monotonic()

    def compute(self, subjects: list[Subject], loss: Callable[..., float]) -> None:
        """The points that are missing; Interrupted, with all that there are saved, on Ctrl-C."""
        places = positions(self.settings["points"], self.settings["reach"])
        self.losses = {subject.sha256: self.losses.get(subject.sha256, []) for subject in subjects}
        with StopRequest().listening() as stop, progress_bar("points") as bar:
            for subject in subjects:
                found = self.losses[subject.sha256]
                task = bar.add_task(subject.name, total=len(places), completed=len(found))
                seed = 2 * self.settings["seed"]
                ways = random_direction(subject.network, seed), random_direction(subject.network, seed + 1)
                for value in losses_at(subject.network, places[len(found) :], ways, loss):
                    found.append(value if math.isfinite(value) else None)
                    bar.update(task, advance=1)
                    if stop.received or time.monotonic() > self.saved + SAVE_EVERY:
                        self.save()
                    if stop.received:
                        done, total = sum(map(len, self.losses.values())), len(self.losses) * len(places)
                        raise Interrupted(f"{done:,} of {total:,} points are kept: the same command continues")
        self.save()

    def surface(self, subject: Subject) -> np.ndarray:
        """(points, points); what is not finite is as high as the highest that is."""
        values = np.array(self.losses[subject.sha256], dtype=np.float64)
        if np.isnan(values[len(values) // 2]):
            raise UserError(f"{subject.name}: its own loss is not finite: it cannot be drawn")
        return np.nan_to_num(values, nan=np.nanmax(values)).reshape(self.settings["points"], -1)


def draw(surfaces: dict[str, np.ndarray], reach: float, path: Path) -> None:
    """Contours above, the surface below, a column for each model, all on one logarithmic scale of the loss.

    Losses above `CEILING` are drawn as high as it: around deep networks they reach millions.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    clipped = {title: np.clip(surface, FLOOR, CEILING) for title, surface in surfaces.items()}
    low, high = min(map(np.min, clipped.values())), max(map(np.max, clipped.values()))
    high = max(high, 1.01 * low)
    norm, levels = LogNorm(low, high), np.geomspace(low, high, 16)
    layout = ConstrainedLayoutEngine(w_pad=0.2)  # inches, for axes in space, which it does not measure
    figure = Figure(figsize=(4.2 * len(clipped) + 0.9, 7.5), dpi=100, layout=layout)
    line = np.linspace(-reach, reach, len(next(iter(clipped.values()))))
    tops, spaces = [], list[Any]()
    for column, (title, surface) in enumerate(clipped.items(), 1):
        top = figure.add_subplot(2, len(clipped), column)
        filled = top.contourf(line, line, surface, levels, norm=norm, cmap="viridis")
        top.contour(line, line, surface, levels, colors="white", linewidths=0.4)
        top.plot(0, 0, "+", color="white", markersize=10)
        top.set(aspect="equal", xlabel="second direction", ylabel="first direction")
        top.set_title(title, pad=12)  # clear of the uppermost tick
        tops.append(top)
        below: Any = figure.add_subplot(2, len(clipped), len(clipped) + column, projection="3d")
        x, y = np.meshgrid(line, line)
        # Axes in space cannot be logarithmic.
        below.plot_surface(x, y, np.log10(surface), facecolors=filled.cmap(norm(surface)), rcount=99, ccount=99)
        below.set(zlim=(math.log10(low), math.log10(high)), xlabel="second", ylabel="first")
        below.set_box_aspect(None, zoom=1.2)
        spaces.append(below)
    label = f"cross-entropy (at most {CEILING:g}), logarithmic"
    bar = figure.colorbar(filled, ax=tops, label=label, ticks=LogLocator(subs=(1, 2, 5)))
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    bar.ax.yaxis.set_minor_formatter(NullFormatter())
    ticks = [tick for tick in bar.get_ticks() if low <= tick <= high]
    for below in spaces:
        below.set_zticks(np.log10(ticks), [f"{tick:g}" for tick in ticks])
    with atomic_path(path) as temporary:
        # Tight, for with one column labels reach beyond the figure.
        figure.savefig(temporary, format="png", bbox_inches="tight", pad_inches=0.2)


def run(options: argparse.Namespace) -> dict[str, np.ndarray]:
    """Compute and draw; the surface of each model by its title, which has its figures."""
    device = pick_device(options.device)
    data = PreparedData.open(options.data)
    subjects = load_subjects(options.models, data, device)
    rows = data.indices(options.split)[: options.images]
    loss = batch_loss(data, rows, device, options.precision)
    settings = {key: getattr(options, key) for key in ("points", "reach", "split", "images", "seed", "precision")}
    settings |= {"device": device.type, "data": data.fingerprint, "masks": data.meta["sha256"]["masks.npy"]}
    points = Points(options.out.with_suffix(".json"), settings, options.overwrite)
    points.compute(subjects, loss)
    surfaces = {}
    for subject in subjects:
        surface = points.surface(subject)
        centre = surface[options.points // 2, options.points // 2]
        sharp = sharpness(surface, options.reach, RADIUS)
        surfaces[f"{subject.name}: loss {centre:.3f}, sharpness {sharp:.2f}"] = surface
    draw(surfaces, options.reach, options.out)
    return surfaces


@reports_errors
def main() -> None:
    """Command line entry."""
    options = parse()
    set_up_cpu(options.precision)
    lock = options.out.with_suffix(".lock")
    with sole_owner(lock, f"computes {options.out}", "wait until it has ended, or give another --out"):
        surfaces = run(options)
    print(*surfaces, sep="\n")
    print(f"written: {options.out} and {options.out.with_suffix('.json')}")


if __name__ == "__main__":
    main()
