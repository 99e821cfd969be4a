"""The evaluation report as one HTML page that needs nothing else: no network, no fonts, no scripts.

What comes from outside (paths, names, sentences) is escaped, and a content security policy forbids the page to load or
run anything.
"""

from __future__ import annotations

import base64
from typing import Any

from eval.page.plots import infinity_curve, score_bars
from eval.page.style import STYLE
from eval.page.text import COURSE_TARGET, escaped, has_target, number, title_of, verdict, with_spread

KINDS = {"folder": "a folder of images", "archive": "a packed archive", "model": "a trained model"}
WORDS = {"ok": "ok", "doubt": "doubt", "bad": "bad", "skipped": "skipped"}
ICONS = {
    "ok": '<path d="M2.5 8.5 6.5 12.5 13.5 4"/>',
    "doubt": '<path d="M8 2.5v7M8 13.4v.1"/>',
    "bad": '<path d="M3.5 3.5l9 9M12.5 3.5l-9 9"/>',
    "skipped": '<path d="M3 8h10"/>',
}
SEVERITY = ("bad", "doubt", "ok", "skipped")
FAITHFUL = {
    "precision": "Share of the samples that lie where real images lie. Low: many samples look wrong.",
    "recall": "Share of the real images that lie where samples lie. Low: whole kinds of faces are missing.",
    "density": "How densely real images surround the samples; about 1 for reals, more for all too typical samples.",
    "coverage": "Share of the real images with a sample close by. Low: the samples repeat a few kinds of faces.",
}
OTHER_SCALES = {
    "FID": "Few images bias FID upward: compare scores at the same number and against the same reference only.",
    "fd_random": "fd_random is a coarse substitute on a random network: it ranks similar models, and is no FID.",
}
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def render_page(report: dict[str, Any], pictures: dict[str, bytes]) -> str:
    """The page for a report.

    Args:
        report: what report.json holds; parts that are None or missing are left out. The first of its scores is
            the one in large digits.
        pictures: PNG files: `samples` and `reals`, and those that checks name.

    Returns:
        A complete HTML document, to be written as UTF-8.
    """
    subject, metric = report["subject"], report["metric"]
    scores = report.get("scores") or []
    headline = f"{metric} {with_spread(scores[0]['mean'], scores[0].get('sd'))[0]}" if scores else metric
    sections = [
        _head(report, subject, metric, scores),
        _scores(scores),
        _side_by_side(pictures, subject),
        _checks(report.get("checks") or [], pictures),
        _measures(report.get("kid"), report.get("manifold")),
        _more_samples(report.get("larger") or [], report.get("infinity"), metric),
        _limits(report.get("limits") or []),
        _provenance(report.get("provenance") or {}),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<title>{escaped(headline)}: {escaped(subject['path'])}</title>\n<style>\n{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{''.join(sections)}</main>\n</body>\n</html>\n"
    )


def _section(title: str, *parts: str) -> str:
    return f"<section>\n<h2>{title}</h2>\n{''.join(parts)}</section>\n"


def _picture(key: str | None, pictures: dict[str, bytes], alt: str, caption: str = "") -> str:
    """A figure, or nothing where there is no such picture."""
    if key is None or key not in pictures:
        return ""
    data = base64.b64encode(pictures[key]).decode()
    return (
        "<figure>"
        + (f"<figcaption>{escaped(caption)}</figcaption>" if caption else "")
        + f'<img src="data:image/png;base64,{data}" alt="{escaped(alt)}"></figure>\n'
    )


def _spread(value: float | None, spread: float | None) -> str:
    """A value and its spread, which may stand below it where the column is narrow."""
    if value is None:
        return "–"
    shown, by = with_spread(value, spread)
    return f'<span class="value">{shown}</span>' + (f' <span class="spread">± {by}</span>' if by else "")


def _head(report: dict[str, Any], subject: dict[str, Any], metric: str, scores: list[dict[str, Any]]) -> str:
    """Title, the score in large digits, its parts as bars, and what it means."""
    sets = f"{subject['sets']} independent sets of {subject['count']:,} samples"
    amount = sets if subject["sets"] > 1 else f"{subject['count']:,} images"
    title = (
        f'<header>\n<p class="eyebrow">Evaluation report</p>\n<h1>{escaped(subject["path"])}</h1>\n'
        f'<p class="muted">{escaped(KINDS.get(subject["kind"], subject["kind"]))}, {amount}</p>\n</header>\n'
    )
    if not scores:
        return title + '<div class="score card"><p>No score was computed.</p></div>\n'
    first = scores[0]
    value, spread = with_spread(first["mean"], first.get("sd"))
    by = f" <small>± {spread}</small>" if spread else ""
    tone, sentence = verdict(report)
    target = COURSE_TARGET if any(has_target(metric, score) for score in scores) else None
    scale = OTHER_SCALES.get(metric, f"{metric} is on another scale than FID: compare it with {metric} alone.")
    said = f'<p class="verdict {tone}">{escaped(sentence)}</p>\n' if sentence else ""
    return (
        f'{title}<div class="score card">\n<div>\n'
        f'<p><span class="metric">{escaped(metric)}</span> at {first["n"]:,} images '
        f"against {escaped(first['against'])}</p>\n"
        f'<p class="big">{value}{by}</p>\n{_excess(first)}{said}</div>\n'
        f'<div class="plot">\n{score_bars(scores, target)}\n{_legend(scores)}'
        f'<p class="note">{escaped(scale)}</p>\n</div>\n</div>\n'
    )


def _excess(score: dict[str, Any]) -> str:
    """Spread and floor in words."""
    values = score.get("values") or []
    spread = (
        f"± is one standard deviation over {len(values)} sets." if score.get("sd") else "One set: no spread is known."
    )
    if not score.get("floor"):
        return f'<p class="excess muted">{spread} No floor was measured.</p>\n'
    floor = score["floor"]
    return (
        f'<p class="excess"><strong>{number(score.get("excess"))}</strong> above the floor of '
        f"{_spread(floor['mean'], floor.get('sd'))}, which {floor['count']:,} real images score against "
        f'{floor["against"]:,} others. <span class="muted">{spread}</span></p>\n'
    )


def _legend(scores: list[dict[str, Any]]) -> str:
    entries = [("excess", "above the floor")] if any(score.get("floor") for score in scores) else [("excess", "score")]
    if any(score.get("floor") for score in scores):
        entries.insert(0, ("floor", "floor: what real images score"))
    if any(score.get("sd") for score in scores):
        entries.append(("spread", "± 1 standard deviation"))
    spans = "".join(f'<span><span class="swatch {name}"></span>{words}</span>' for name, words in entries)
    return f'<p class="legend">{spans}</p>\n'


def _scores(scores: list[dict[str, Any]]) -> str:
    """The table of scores against each reference."""
    if not scores:
        return ""
    bodies = []
    for score in scores:
        floor = score.get("floor") or {}
        values = score.get("values") or []
        single = " · ".join(number(value) for value in values)
        sets = f'<tr><td class="sets" colspan="4">single sets: {single}</td></tr>\n' if len(values) > 1 else ""
        bodies.append(
            f'<tbody>\n<tr><th scope="row">{escaped(score["against"])}<br>'
            f'<span class="muted">{score["count"]:,} images</span></th>'
            f"<td>{_spread(score['mean'], score.get('sd'))}</td>"
            f"<td>{_spread(floor.get('mean'), floor.get('sd'))}</td>"
            f"<td>{_spread(score.get('excess'), None)}</td></tr>\n"
            f"{sets}</tbody>\n"
        )
    head = "".join(f'<th scope="col">{name}</th>' for name in ("Reference", "Score", "Floor", "Excess"))
    return _section(
        "Against each reference",
        f"<p>The same {scores[0]['n']:,} samples a set, compared with different sets of real images.</p>\n",
        f'<div class="card">\n<table class="scores">\n<thead><tr>{head}</tr></thead>\n'
        f"{''.join(bodies)}</table>\n</div>\n",
    )


def _side_by_side(pictures: dict[str, bytes], subject: dict[str, Any]) -> str:
    figures = _picture("samples", pictures, f"Grid of samples from {subject['path']}", "Samples, not selected")
    figures += _picture("reals", pictures, "Grid of real images of the reference", "Real images")
    return _section("Samples and real images", f'<div class="pair">\n{figures}</div>\n') if figures else ""


def _checks(checks: list[dict[str, Any]], pictures: dict[str, bytes]) -> str:
    """A card per check, the worst first."""
    if not checks:
        return ""
    counts = {word: sum(check["verdict"] == word for check in checks) for word in SEVERITY}
    summary = ", ".join(f"{count} {WORDS[word]}" for word, count in counts.items() if count)
    ordered = sorted(checks, key=lambda check: SEVERITY.index(check["verdict"]))
    cards = "".join(_check(check, pictures) for check in ordered)
    return _section("Honesty checks", f"<p>{summary}</p>\n", f'<div class="checks">\n{cards}</div>\n')


def _check(check: dict[str, Any], pictures: dict[str, bytes]) -> str:
    name, tone = title_of(check["name"]), check["verdict"]
    figure = _picture(check.get("pictures"), pictures, f"{name}: {check['headline']}")
    icon = f'<svg viewBox="0 0 16 16" aria-hidden="true">{ICONS[tone]}</svg>'
    figures = "".join(
        f"<div><dt>{escaped(key.replace('_', ' '))}</dt><dd>{number(value)}</dd></div>"
        for key, value in (check.get("figures") or {}).items()
    )
    return (
        f'<article class="check card{" pictured" if figure else ""}">\n'
        f'<header><h3>{escaped(name)}</h3><span class="badge {tone}">{icon}{WORDS[tone]}</span></header>\n'
        f'<p class="headline">{escaped(check["headline"])}</p>\n'
        + (f"<p>{escaped(check['details'])}</p>\n" if check.get("details") else "")
        + (f'<dl class="figures">{figures}</dl>\n' if figures else "")
        + f"{figure}</article>\n"
    )


def _measures(kid: dict[str, Any] | None, manifold: dict[str, Any] | None) -> str:
    """KID, precision, recall, density and coverage, a line of explanation each."""
    cards, note = [], ""
    if kid:
        words = (
            f"Another distance, without FID's bias: 0 for a perfect generator at any number. Mean and spread of "
            f"{kid['subsets']:,} subsets of {kid['subset_size']:,}."
        )
        cards.append(_measure("KID", _spread(kid["mean"], kid.get("sd")), words))
    if manifold:
        cards += [_measure(title_of(name), number(manifold[name]), words) for name, words in FAITHFUL.items()]
        note = (
            f'<p class="note">Precision to coverage: balls around each image that reach to its neighbour '
            f"number {manifold['k']}; {manifold['real']:,} real images, {manifold['generated']:,} samples.</p>\n"
        )
    if not cards:
        return ""
    return _section("Other measures", f'<div class="measures">\n{"".join(cards)}</div>\n', note)


def _measure(name: str, value: str, words: str) -> str:
    shown = f'<h3>{name}</h3>\n<p class="number">{value}</p>'
    return f'<div class="card">{shown}\n<p class="note">{escaped(words)}</p></div>\n'


def _more_samples(larger: list[dict[str, Any]], infinity: dict[str, Any] | None, metric: str) -> str:
    """Scores at larger numbers of samples, and where they lead."""
    parts, name = [], escaped(metric)
    if larger:
        rows = "".join(f'<tr><th scope="row">{row["n"]:,}</th><td>{number(row["value"])}</td></tr>\n' for row in larger)
        parts.append(
            f'<table class="larger">\n<thead><tr><th scope="col">Samples</th><th scope="col">{name}</th></tr></thead>\n'
            f"<tbody>\n{rows}</tbody>\n</table>\n"
        )
    if infinity:
        parts.append(
            f"<p><strong>{name} at infinitely many samples: {number(infinity['value'])}</strong>, from "
            f"{len(infinity['points'])} subsets of {infinity['from']:,} to {infinity['to']:,} samples by a straight "
            f"line in 1/N; residual {number(infinity['residual'])}.</p>\n"
            f'<div class="plot curve">\n{infinity_curve(infinity, metric)}\n</div>\n'
        )
    return _section("With more samples", f'<div class="card">\n{"".join(parts)}</div>\n') if parts else ""


def _limits(limits: list[str]) -> str:
    items = "".join(f"<li>{escaped(limit)}</li>\n" for limit in limits)
    return _section("What limits the score", f'<ul class="limits">\n{items}</ul>\n') if limits else ""


def _provenance(provenance: dict[str, Any]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escaped(name)}</th><td>{escaped(value)}</td></tr>\n' for name, value in _flat(provenance)
    )
    table = f'<div class="card">\n<table class="provenance">\n<tbody>\n{rows}</tbody>\n</table>\n</div>\n'
    return _section("Where the numbers come from", table) if rows else ""


def _flat(value: Any, name: str = "") -> list[tuple[str, str]]:
    """Nested dicts and lists as (name, text): names joined by dots, lists of plain values on one line."""
    if isinstance(value, dict):
        return [row for key, inner in value.items() for row in _flat(inner, f"{name}.{key}" if name else str(key))]
    if isinstance(value, list) and any(isinstance(inner, dict | list) for inner in value):
        return [row for index, inner in enumerate(value) for row in _flat(inner, f"{name}[{index}]")]
    if isinstance(value, list):
        return [(name, ", ".join(map(str, value)))]
    return [] if value is None else [(name, str(value))]
