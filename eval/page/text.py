"""Numbers and sentences of the report page: how many digits to show, and what a score means in words."""

from __future__ import annotations

import math
from typing import Any

from core.cli.text import percent

COURSE_TARGET = 20  # FID that the course asks for, at 1,000 images against 1,000 reals
COURSE_COUNT = 1000
# FID points that 1,000 reals add: a perfect sampler has 18 to 21 against them, 13 to 15 against all of CelebA.
FEWER_REALS = 6
NOISE = 2  # standard deviations within which two numbers count as equal


def number(value: float | None) -> str:
    """A number for a reader: few digits, thousands grouped; a dash for None and values that are not finite."""
    if value is None or not math.isfinite(value):
        return "–"
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}".replace("-", "−")
    size = math.floor(math.log10(abs(value)))
    if size < -4:
        digits, exponent = f"{value:.1e}".split("e")
        raised = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
        return f"{digits.replace('-', '−')} × 10{raised}"
    # Three digits below 1, two decimals up to 100, then one, then none
    return _fixed(value, 2 - size if size < 0 else 2 if size < 2 else 1 if size < 3 else 0)


def with_spread(value: float | None, spread: float | None) -> tuple[str, str]:
    """A value and its spread to the same decimal: ("18.94", "0.21"); no spread if it is None, not finite or zero.

    The spread has two digits if the value then has at most four, else one.
    """
    if value is None or spread is None or not math.isfinite(spread) or spread <= 0 or not math.isfinite(value):
        return number(value), ""
    last = -math.floor(math.log10(spread))  # decimal of the first digit of the spread
    fitting = 3 - math.floor(math.log10(abs(value))) if value else last + 1
    decimals = max(0, last, min(last + 1, fitting))
    if decimals > 6:
        return number(value), number(spread)
    return _fixed(value, decimals), _fixed(spread, decimals)


def on_one_line(value: float, spread: float | None) -> str:
    """`18.94 ± 0.21`, or the value alone if the spread is unknown."""
    shown, by = with_spread(value, spread)
    return f"{shown} ± {by}" if by else shown


def _fixed(value: float, decimals: int) -> str:
    text = f"{value:,.{decimals}f}"
    return text.replace("-", "−") if float(text.replace(",", "")) else text.lstrip("-")


def setting(value: Any) -> str:
    """A setting as YAML and the command line write it; a list without brackets, and `none` where nothing is in it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return (", ".join(map(setting, value)) if isinstance(value, list) else str(value)) or "none"


def title_of(name: str) -> str:
    """`mode_collapse` -> `Mode collapse`."""
    words = name.replace("_", " ").strip()
    return words[:1].upper() + words[1:]


def has_target(metric: str, score: dict[str, Any]) -> bool:
    """Whether the course's target applies: it is an FID at 1,000 images."""
    return metric == "FID" and score["n"] == COURSE_COUNT


def verdict(report: dict[str, Any]) -> tuple[str, str]:
    """What the score means: a tone (`ok`, `doubt`, `bad` or `plain`) and up to three sentences, failed checks first."""
    scores, checks = report.get("scores") or [], report.get("checks") or []
    found = [_failed_checks(checks), _against_target(report["metric"], scores), _above_floor(scores)]
    if judge := report.get("judge"):  # first of all if the score means little for it, else last
        found.insert(0 if judge["same"] else 3, _trained_against(judge, report["metric"]))
    said = [part for part in found if part]
    # "ok" only if nothing speaks against it
    tones = (tone for tone, _ in said if tone)
    tone = min(tones, key=("bad", "doubt", "plain", "ok").index, default="plain")
    return tone, " ".join(sentence for _, sentence in said)


def _against_target(metric: str, scores: list[dict[str, Any]]) -> tuple[str, str] | None:
    scores = [score for score in scores if has_target(metric, score)]
    if not scores:
        return None
    # The score nearest to the course's: against the course's own reals, else against 1,000 others, else the first
    score = min(scores, key=lambda score: 0 if score.get("course") else 1 if score["count"] == COURSE_COUNT else 2)
    where = f"against {score['against']}"
    gap, spread = COURSE_TARGET - score["mean"], score.get("sd")
    if score["count"] > COURSE_COUNT and not score.get("course"):
        if 0 < gap < FEWER_REALS:
            return "doubt", (
                f"Not known to be below the course's target of {COURSE_TARGET}: it is, by {number(gap)} {where}, but "
                f"against 1,000 reals, as in the course, it would be about {FEWER_REALS} points higher."
            )
        where += " (against 1,000 reals, as in the course, it would be several points higher)"
    if spread is not None and abs(gap) <= NOISE * spread:
        return "doubt", f"Too close to the course's target of {COURSE_TARGET} to call, {where}."
    side, tone = ("Below", "ok") if gap > 0 else ("Above", "plain")
    chance = "; one sample set alone does not tell how much of it is chance" if spread is None else ""
    return tone, f"{side} the course's target of {COURSE_TARGET}, by {number(abs(gap))} {where}{chance}."


def _above_floor(scores: list[dict[str, Any]]) -> tuple[str | None, str] | None:
    """What the floor of the first score says; no tone where that depends on the purpose of the score."""
    if not scores or not scores[0].get("floor"):
        return None
    score, floor, excess = scores[0], scores[0]["floor"], scores[0]["excess"]
    noise = math.hypot(score.get("sd") or 0, floor.get("sd") or 0)
    if abs(excess) <= NOISE * noise:
        return "ok", (
            f"As close to {score['against']} as other real images are: this score cannot tell the samples from reals, "
            "so the checks for copies decide."
        )
    if excess < 0:
        return "doubt", (
            f"Closer to {score['against']} than other real images are: a sign of copied images, or of a reference "
            "that is not what it seems."
        )
    share = percent(excess / score["mean"])
    return None, (
        f"Against {score['against']}, {number(excess)} ({share}) is the generator's; real images in its place would "
        f"score {number(floor['mean'])}."
    )


def _trained_against(judge: dict[str, Any], metric: str) -> tuple[str | None, str] | None:
    network = judge["network"]
    if judge["same"]:
        return "doubt", (
            f"This score looks through {network}, the very network that the generator was trained against, so it "
            "flatters the generator: see what others say of it, below."
        )
    if metric == "fd_random":
        return None
    return None, (
        f"The generator was trained against {network}, and pretrained networks see alike: the score flatters it beside "
        "generators that were not."
    )


def _failed_checks(checks: list[dict[str, Any]]) -> tuple[str, str] | None:
    for tone, words in (("bad", "the score means little until that is put right"), ("doubt", "read what they found")):
        found = [check for check in checks if check["verdict"] == tone]
        faults = [check.get("fault") for check in found]
        names = [
            title_of(check["name"]).lower() + (f": {fault}" if fault else "")
            for check, fault in zip(found, faults, strict=True)
        ]
        if tone == "bad" and set(faults) == {"undertrained"}:
            words = "the generator has not learned enough yet, and the score says how far it is"
        if names:
            return tone, f"{'Failed' if tone == 'bad' else 'Doubtful'} checks ({', '.join(names)}): {words}."
    return None
