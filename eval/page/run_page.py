"""Training runs as one HTML page, side by side: grids over time, curves, scores, warnings, settings.

Its script moves the slider, reads the curves under the pointer and, while the page is served, asks for what is new. A
content security policy allows this script alone, and nothing from elsewhere; the templates escape all text.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from markupsafe import Markup

from core.data.grids import CAPTION
from core.training.curves import Panel
from eval.page.curves import HEIGHT, WIDTH, charts_of
from eval.page.page import HERE, environment
from eval.page.text import setting

MOST_DIFFERENCES = 15  # of settings that stand open
TONES = {"training": "skipped", "finished": "ok", "stopped": "doubt", "unreadable": "bad"}


@dataclass(frozen=True)
class Grid:
    """A picture that a run has written, and where the page finds it."""

    images: int  # seen by then
    source: str  # address, or data: with the content


@dataclass(frozen=True)
class RunFacts:
    """What the page says of a run."""

    name: str
    path: str
    state: Literal["training", "finished", "stopped", "unreadable"]
    progress: str = ""  # in words
    share: float = 0.0  # of its images that it has seen
    about: str = ""  # what is trained, in a line
    rows: list[dict[str, Any]] = field(default_factory=list)  # of stats.jsonl
    panels: Sequence[Panel] = ()
    grids: list[Grid] = field(default_factory=list)
    scores: list[tuple[str, str, str]] = field(default_factory=list)  # name, value, remark
    classes: dict[str, float | None] = field(default_factory=dict)  # IoU of each
    advice: str = ""  # how to get a score
    problems: list[str] = field(default_factory=list)  # with the files of the run
    settings: dict[str, Any] = field(default_factory=dict)  # dotted key: value

    @property
    def warnings(self) -> list[tuple[int, str]]:
        """Those of the training, with the images seen by then."""
        return [(row["images"], str(row["warning"])) for row in self.rows if "warning" in row]


def parts_of(runs: Sequence[RunFacts]) -> dict[str, str]:
    """What may change while a run trains, as HTML: the content of the elements of these ids."""
    made = environment()
    made.globals |= {"height": HEIGHT, "width": WIDTH, "tones": TONES}
    macros: Any = made.get_template("run_parts.html").module
    parts: dict[str, str] = {}
    for place, (run, charts) in enumerate(zip(runs, charts_of([(run.rows, run.panels) for run in runs]), strict=True)):
        named = {"head": macros.head(run), "curves": macros.curves(charts), "scores": macros.scores(run)}
        named |= {"classes": macros.classes(run), "warnings": macros.warnings(run)}
        parts |= {f"{name}-{place}": str(text) for name, text in named.items()}
    table, names = _settings(runs), [run.name for run in runs]
    parts["differing"] = str(macros.settings(names, _differing(table))) if len(runs) > 1 else ""
    return parts | {"settings": str(macros.settings(names, table))}


def grids_of(runs: Sequence[RunFacts]) -> list[list[dict[str, Any]]]:
    """The pictures of each run, for the page's script."""
    return [[{"images": grid.images, "source": grid.source} for grid in run.grids] for run in runs]


def render_runs(runs: Sequence[RunFacts], written: str, live: bool) -> str:
    """The page, complete: a HTML document, to be written as UTF-8.

    Args:
        written: when, in words.
        live: the page is served by `facet watch`, which it asks for news; else it holds its pictures itself.
    """
    script, style = ((HERE / name).read_text("utf-8") for name in ("run_page.js", "run_page.css"))
    page = (
        environment()
        .get_template("run_page.html")
        .render(
            runs=runs,
            parts={name: Markup(text) for name, text in parts_of(runs).items()},
            grids=grids_of(runs),
            written=written,
            live=live,
            script=Markup(script),
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
            more_style=Markup(style),
            strip=CAPTION,
            differences=len(_differing(_settings(runs))),
            most_differences=MOST_DIFFERENCES,
        )
    )
    # Undecodable bytes in file names become question marks
    return page.encode("utf-8", "replace").decode()


def _settings(runs: Sequence[RunFacts]) -> dict[str, list[str]]:
    """Each setting as text, one for each run."""
    keys = list(dict.fromkeys(key for run in runs for key in run.settings))
    return {key: [setting(run.settings[key]) if key in run.settings else "–" for run in runs] for key in keys}


def _differing(table: dict[str, list[str]]) -> dict[str, list[str]]:
    return {key: values for key, values in table.items() if len(set(values)) > 1 and key != "name"}
