"""What the page of `facet watch` says of a run folder, which a training may be writing to meanwhile."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from core.cli.console import duration
from core.cli.errors import UserError
from core.cli.files import read_json
from core.cli.lock import is_owned
from core.training.best import comparable, score_panel
from core.training.rundir import RunFolder, flatten, no_run
from eval.distances import spread
from eval.page.run_page import Grid, RunFacts
from eval.page.text import number, on_one_line
from eval.results import NAMES, read_result, real_images
from gen.trainer import panels
from seg.trainer import PANELS

HASHES = {"data_sha256": "data_sha256.images.npy"}  # as a segmenter, which has more files, calls the same
RECENT = 5  # rows whose median speed tells the time left
Rows = list[dict[str, Any]]
Score = tuple[str, str, str]  # name, value, remark


class WatchedRun:
    """A run folder to be looked at again and again.

    Raises:
        UserError: it is none, or its settings cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.folder = RunFolder(path)
        if not self.folder.config.is_file():
            if is_owned(path / ".lock"):
                raise UserError(f"{path} has only just begun: try again in a moment")
            raise no_run(path)
        self.folder.read_config()
        self._read: tuple[Any, tuple[Rows, str]] = None, ([], "")

    @property
    def name(self) -> str:
        """That of the folder."""
        return self.folder.path.resolve().name

    def facts(self, picture: Callable[[int, Path], str], most: int | None = None) -> RunFacts:
        """What there is to be said now.

        Args:
            picture: makes the source of a picture from the images seen and its path.
            most: pictures to take at most, the first and the last among them; None takes all.

        Raises:
            UserError: settings or statistics cannot be read.
        """
        folder, config = self.folder, self.folder.read_config()
        (every, complaint), pictures = self._rows(), folder.pictures()
        rows, problems = comparable(every), [complaint] if complaint else []
        seen = max([row["images"] for row in rows] + [images for images, _ in pictures], default=0)
        if most is not None and len(pictures) > most:
            pictures = [pictures[round(place)] for place in np.linspace(0, len(pictures) - 1, most)]
        try:
            segments = "valid_split" in config
            state, progress = self._state(config, rows, seen)
            scores = [*(_validations(rows) if segments else _online_scores(rows)), *self._stored(problems)]
            return RunFacts(
                name=self.name,
                path=str(folder.path),
                state=state,
                progress=progress,
                share=min(1.0, seen / config["total_images"]),
                about=f"{config['model']['name']}, batch of {config['batch_size']}, {config['mixed_precision']}",
                rows=rows,
                panels=PANELS if segments else [*panels(config["loss"]), *score_panel(rows)],
                grids=[Grid(images, picture(images, path)) for images, path in pictures],
                scores=scores,
                classes=self._classes(config["valid_split"], problems) if segments else {},
                advice="" if scores else _advice(config, folder.path, segments),
                problems=problems,
                # A generator's data are pictures alone, and their hash has no file name
                settings={HASHES.get(key, key): value for key, value in flatten(config).items()},
            )
        except (KeyError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"{folder.path} is no run of this program, or of an earlier version ({reason})") from error

    def _rows(self) -> tuple[Rows, str]:
        """The statistics, and what is wrong with them; read again only where the file has changed."""
        try:
            facts = self.folder.stats.stat()
        except FileNotFoundError:
            return [], ""
        now = facts.st_mtime_ns, facts.st_size
        if self._read[0] != now:
            self._read = now, self.folder.scan_stats()
        return self._read[1]

    def _state(
        self, config: dict[str, Any], rows: Rows, seen: int
    ) -> tuple[Literal["training", "finished", "stopped"], str]:
        """Whether it trains, and how far it is, in words."""
        total, patience = config["total_images"], config.get("patience") or 0
        so_far = f"{seen:,} of {total:,} images"
        if is_owned(self.folder.path / ".lock"):
            return "training", ", ".join([so_far, *self._pace(total, rows)])
        if seen >= total:
            return "finished", f"All {total:,} images seen"
        scored = [row["valid_miou"] for row in rows if "valid_miou" in row]
        if scored and 0 < patience <= len(scored) - 1 - scored.index(max(scored)):
            return "finished", f"{so_far}: {patience} evaluations without a better mIoU (patience)"
        return "stopped", f"{so_far}: the same command continues it"

    def _pace(self, total: int, rows: Rows) -> Iterator[str]:
        """Speed, time left and the age of the last row, in words."""
        speeds = [row["images_per_s"] for row in rows if row.get("images_per_s", 0) > 0][-RECENT:]
        if not speeds:
            return
        speed, age = statistics.median(speeds), max(0.0, time.time() - self._read[0][0] / 1e9)
        left = (total - rows[-1]["images"]) / speed - age
        yield f"{speed:,.1f}/s"
        yield f"about {duration(left)} left" if left > 0 else "nearly done"
        yield f"last row {duration(age)} ago"

    def _stored(self, problems: list[str]) -> Iterator[Score]:
        """What `facet score` and `facet seg-evaluate` have written; files that are damaged become problems."""
        for file in sorted(self.folder.path.glob("*.json")):
            try:
                if file.name.startswith(NAMES):
                    found = read_result(file)
                    against = f"{found['source']['count']:,} samples against {real_images(found['reference'])}"
                    score = on_one_line(found["mean"], spread(found["values"]))
                    yield str(found["metric"]), score, f"facet score, {against}"
                elif file.name.startswith("model-"):
                    found = read_json(file)
                    remark = f"facet seg-evaluate, split {found['split']}"
                    yield "mIoU", number(found["dataset"]["miou"]), remark
            except UserError as error:
                problems.append(str(error))

    def _classes(self, split: str, problems: list[str]) -> dict[str, float | None]:
        """The IoU of each class in the best evaluation, once there is a checkpoint."""
        file = self.folder.path / f"{split}.json"
        try:
            found = read_json(file)["dataset"]["per_class"] if file.exists() else {}
        except UserError as error:
            problems.append(str(error))
            return {}
        return {name: scores["iou"] for name, scores in found.items()}


def _online_scores(rows: Rows) -> Iterator[Score]:
    """The best and the last score while training; `rows` are comparable."""
    scored = [row for row in rows if "score" in row]
    if scored:
        best, last = min(scored, key=lambda row: row["score"]), scored[-1]
        for word, row in (("best", best), ("last", last)):
            where = f"{word} of {len(scored)} while training, {row['n']:,} samples, at {row['images']:,} images"
            yield row["metric"], number(row["score"]), where


def _validations(rows: Rows) -> Iterator[Score]:
    """The best and the last evaluation on the validation split."""
    scored = [row for row in rows if "valid_miou" in row]
    if scored:
        best, last = max(scored, key=lambda row: row["valid_miou"]), scored[-1]
        names = {"valid_miou": "mIoU", "valid_mdice": "mean Dice", "valid_pixel_accuracy": "pixel accuracy"}
        for key, name in names.items():
            remark = f"validation, best of {len(scored)} by mIoU, at {best['images']:,} images"
            yield name, number(best[key]), remark if key == "valid_miou" else "of the same"
        if last is not best:
            yield "mIoU", number(last["valid_miou"]), f"validation, last, at {last['images']:,} images"


def _advice(config: dict[str, Any], path: Path, segments: bool) -> str:
    """How a run without scores gets some."""
    if segments:
        return f"None yet: the first evaluation comes after {config['valid_every']:,} images (valid_every)."
    return f"None yet: eval.every=... scores while training, and facet score {path} data=... scores what is there."
