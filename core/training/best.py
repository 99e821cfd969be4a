"""The best evaluation of a run, the weights that had it, and its scores as a plot."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from core.cli.console import say, warn
from core.cli.errors import UserError
from core.cli.files import digest_of, read_json, write_json
from core.nn.model_file import load_model, save_model
from core.training.checkpoint import Stateful
from core.training.curves import Panel
from core.training.rundir import RunFolder

BEST_NAME, BEST_FACTS = "best.safetensors", "best.json"


class Best(Stateful):
    """The best score so far, the images seen by then, and the number of evaluations since."""

    STATE = ("higher_is_better", "score", "images_seen", "since")

    def __init__(self, higher_is_better: bool) -> None:
        self.higher_is_better = higher_is_better
        self.score: float | None = None
        self.images_seen = self.since = 0

    def improved(self, score: float, images_seen: int) -> bool:
        """Note an evaluation; whether it is better than all before."""
        if self.score is None or (score > self.score if self.higher_is_better else score < self.score):
            self.score, self.images_seen, self.since = score, images_seen, 0
            return True
        self.since += 1
        return False


def stored_info(file: Path) -> dict[str, Any]:
    """What a file of best weights says of itself. Raises UserError where it is damaged."""
    try:
        return load_model(file)[1]
    except UserError as error:
        raise UserError(f"{error}: delete it to continue without these weights") from error


def set_aside(folder: Path, names: Sequence[str], images: int, reason: str) -> None:
    """Rename weights that no longer fit a run, and what belongs to them, to STEM-IMAGES.*; the weights come last."""
    tags = (f"-{images:012d}" + (f"-{k}" if k > 1 else "") for k in itertools.count(1))
    renamed = ({name: Path(name).stem + tag + Path(name).suffix for name in names} for tag in tags)
    chosen = next(new for new in renamed if not (folder / new[names[-1]]).exists())
    for name, new in chosen.items():
        if (folder / name).exists():
            (folder / name).rename(folder / new)
    say(f"note: {names[-1]} of {images:,} images is set aside as {chosen[names[-1]]}: {reason}")


def lost_steps(images_seen: int) -> str:
    """Why weights of later steps are set aside where training continues at `images_seen`."""
    return f"training continues before it, at {images_seen:,}"


class BestWeights:
    """The weights with the lowest score so far: best.safetensors and, to read, best.json (on process 0).

    They are held in memory until the next checkpoint: a killed run continues from its last one, and what it repeats may
    turn out differently on a GPU.

    Files that no longer fit are renamed to best-IMAGES.*, with a note, and the search starts again: those with a score
    on other terms, and those of more images than the checkpoint has, as after a damaged checkpoint.

    `terms` are what the scores depend on, which compare where all of it is the same; training continues at
    `images_seen`. Raises UserError where the file that is there is damaged.
    """

    def __init__(self, folder: Path, terms: dict[str, Any], images_seen: int) -> None:
        self.folder, self.terms = folder, terms
        self.best = Best(higher_is_better=False)
        self._waiting: tuple[nn.Module, dict[str, Any], dict[str, Any]] | None = None
        if not (folder / BEST_NAME).exists():
            return
        info = stored_info(folder / BEST_NAME)
        stored = dict(info.get("score", {}))
        score = stored.pop("value", None)
        differing = sorted(key for key in stored.keys() | terms.keys() if stored.get(key) != terms.get(key))
        names = (BEST_FACTS, BEST_NAME)
        if info["images_seen"] > images_seen:
            set_aside(folder, names, info["images_seen"], lost_steps(images_seen))
        elif differing:
            reason = f"scores no longer compare (other {', '.join(differing)})"
            set_aside(folder, names, info["images_seen"], reason)
        else:
            self.best.improved(float(score), info["images_seen"])

    def offer(self, score: float, model: nn.Module, recipe: dict[str, Any], info: dict[str, Any]) -> bool:
        """Keep a copy of these weights if their score is the lowest so far, and say whether it is.

        `recipe` and `info` are as for `core.nn.model_file.save_model`; `info` holds `images_seen`.
        """
        if improved := self.best.improved(score, info["images_seen"]):
            self._waiting = copy.deepcopy(model), recipe, info
        return improved

    def write(self, folder: Path) -> None:
        """Write what is held in memory, if anything, to `folder`. Raises UserError where that fails."""
        if self._waiting is None:
            return
        model, recipe, info = self._waiting
        score = self.best.score
        save_model(folder / BEST_NAME, model, recipe, info | {"score": {"value": score, **self.terms}})
        facts = {"score": score, **self.terms, **info, "model": BEST_NAME, "terms": digest_of(self.terms)}
        write_json(folder / BEST_FACTS, facts)
        self._waiting = None


def comparable(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of stats.jsonl without the scores on other terms than the last one."""
    last = next((row["terms"] for row in reversed(rows) if "score" in row), None)
    return [row for row in rows if "score" not in row or row["terms"] == last]


def score_panel(rows: list[dict[str, Any]]) -> list[Panel]:
    """The plot of the scores among rows that are `comparable`; none without scores."""
    scored = [row for row in rows if "score" in row]
    if not scored:
        return []
    metric, n = scored[-1]["metric"], scored[-1]["n"]
    return [Panel(f"{metric} of {n:,} samples", {"score": metric}, best="lowest", wide=True)]


def best_so_far(run: RunFolder) -> str | None:
    """Where the best weights are, their score and the last one, in a line; None where there are none."""
    facts = run.path / BEST_FACTS
    if not facts.exists():
        return None
    try:
        best = read_json(facts, f"the score is in {BEST_NAME}, too")
    except UserError as error:
        warn(str(error))
        return None
    last = [row for row in run.read_stats() if row.get("terms") == best["terms"]][-1:]
    return (
        f"best: {run.path / BEST_NAME}, {best['metric']} {best['score']:.4g} of {best['n']:,} samples at "
        f"{best['images_seen']:,} images"
    ) + "".join(f"; last: {row['score']:.4g} at {row['images']:,}" for row in last)
