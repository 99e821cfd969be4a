"""The evaluation report as one HTML page without a script, a font or anything else from the network.

The templates escape all text (paths, names, sentences), and a content security policy keeps the page from loading or
running anything.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from eval.features.settings import network_of, scale_of
from eval.measures import MEASURES
from eval.page.plots import bar_chart, curve_chart
from eval.page.text import COURSE_TARGET, has_target, number, on_one_line, setting, title_of, verdict, with_spread

HERE = Path(__file__).parent
KINDS = {"folder": "a folder of images", "archive": "a packed archive", "model": "a trained model"}
SEVERITY = ("bad", "doubt", "ok", "skipped")
FID_SCALE = "Few images bias FID upward: compare scores at the same number and against the same reference only."


def environment() -> Environment:
    """What renders the templates: it escapes all that they are given, and refuses variables that do not exist."""
    made = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    made.filters |= {"number": number, "on_one_line": on_one_line, "setting": setting, "title_of": title_of}
    made.filters["grouped"] = "{:,}".format
    made.globals |= {"with_spread": with_spread, "style": Markup((HERE / "style.css").read_text("utf-8"))}
    return made


def render_page(report: dict[str, Any], pictures: dict[str, bytes]) -> str:
    """The page for a report.

    Args:
        report: the content of report.json. Parts that are None or missing are left out; the first score is shown large.
        pictures: PNG files: `samples`, `reals`, `curves` of the run, and those that checks name.

    Returns:
        A complete HTML document, to be written as UTF-8.
    """
    subject, metric = report["subject"], report["metric"]
    scores, checks, infinity = report.get("scores") or [], report.get("checks") or [], report.get("infinity")
    counts = {tone: sum(check["verdict"] == tone for check in checks) for tone in SEVERITY}
    target = COURSE_TARGET if any(has_target(metric, score) for score in scores) else None
    tone, sentence = verdict(report)
    page = (
        environment()
        .get_template("page.html")
        .render(
            subject=subject,
            kind=KINDS.get(subject["kind"], subject["kind"]),
            metric=metric,
            network=network_of(metric),
            inception=metric.startswith("FID"),
            made=report.get("made"),
            run=report.get("run"),
            judge=report.get("judge"),
            scale=FID_SCALE if metric == "FID" else scale_of(metric),
            scores=scores,
            bars=bar_chart(scores, target) if scores else None,
            tone=tone,
            sentence=sentence,
            checks=sorted(checks, key=lambda check: SEVERITY.index(check["verdict"])),
            check_counts=", ".join(f"{count} {tone}" for tone, count in counts.items() if count),
            measures=[(measure, report[measure.key]) for measure in MEASURES if report.get(measure.key)],
            larger=report.get("larger"),
            infinity=infinity,
            curve=curve_chart(infinity) if infinity else None,
            limits=report.get("limits"),
            provenance=_flat(report.get("provenance") or {}),
            pictures={key: base64.b64encode(data).decode() for key, data in pictures.items()},
        )
    )
    # Undecodable bytes in file names become question marks
    return page.encode("utf-8", "replace").decode()


def _flat(value: Any, name: str = "") -> list[tuple[str, str]]:
    """Nested dicts and lists as (name, text): names joined by dots, lists of plain values on one line."""
    if isinstance(value, dict):
        return [row for key, inner in value.items() for row in _flat(inner, f"{name}.{key}" if name else str(key))]
    if isinstance(value, list) and any(isinstance(inner, dict | list) for inner in value):
        return [row for index, inner in enumerate(value) for row in _flat(inner, f"{name}[{index}]")]
    return [] if value is None else [(name, setting(value))]
