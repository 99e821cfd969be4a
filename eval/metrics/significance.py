"""Whether scores differ by more than the noise of sampling.

The test is Welch's between the sample sets. Those of one model are independent, because each has its own seeds. Two
models may share theirs: the same latents in two networks give unrelated pictures. Where they do not (two states of one
training), scores go up and down together, their difference varies less than the test assumes, and the test is only the
more cautious.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import ttest_ind_from_stats

from eval.page.text import number

ALPHA = 0.05
TEST = (
    f"Verdicts: Welch's t-test between the sample sets at {ALPHA:.0%}, Holm's correction over all pairs, since "
    "the best is chosen by the same scores. In them, sd is the root mean square of both spreads."
)
COVERS = (
    "The spread is that of drawing other samples from the same model, against this one reference. How far a training "
    "with another seed would come out is not in it."
)
ONE_SET = "One set has no spread: a run or model gives several, a folder or archive only that one."


@dataclass(frozen=True)
class Judgement:
    """How one source compares with the best.

    Attributes:
        verdict: in words.
        difference: its mean less that of the best.
        sds: the difference in standard deviations of a set (root mean square of both); None without a spread.
        p: two-sided, corrected for the number of comparisons; None where nothing was tested.
    """

    verdict: str
    difference: float
    sds: float | None
    p: float | None


def welch(a: Sequence[float], b: Sequence[float]) -> float:
    """Two-sided p-value of Welch's t-test (Welch 1947) of equal means, for two or more values each.

    Where neither side varies at all (generators that ignore their latents), any difference is one: 0, else 1.
    """
    if np.ptp(a) == 0 and np.ptp(b) == 0:
        return float(a[0] == b[0])
    sides = [figure for values in (a, b) for figure in (np.mean(values), np.std(values, ddof=1), len(values))]
    return float(ttest_ind_from_stats(*sides, equal_var=False).pvalue)


def holm(p: Sequence[float]) -> list[float]:
    """p-values corrected by Holm's step-down procedure (Holm 1979), in the given order.

    Rejecting those at most alpha keeps the chance of any false rejection at most alpha, whatever their dependence.
    """
    adjusted, least = [0.0] * len(p), 0.0
    for done, index in enumerate(sorted(range(len(p)), key=lambda index: p[index])):
        least = max(least, min(1.0, (len(p) - done) * p[index]))
        adjusted[index] = least
    return adjusted


def judge(values: Sequence[Sequence[float]], contents: Sequence[str]) -> list[Judgement]:
    """A verdict on each source, where lower scores are better.

    Every pair counts as a comparison. Which source is the best is read off the same values, so each pair could have
    become one with the best: corrected for those with the best alone, ten equal models of five sets each would show
    a difference in 9% of all cases instead of 5% (simulated).

    Args:
        values: scores of the sample sets, one sequence a source, in order of their means.
        contents: what names the content of each source: equal ones are not tested against each other.
    """
    pairs = [
        (i, j)
        for i, j in itertools.combinations(range(len(values)), 2)
        if min(len(values[i]), len(values[j])) > 1 and contents[i] != contents[j]
    ]
    corrected = dict(zip(pairs, holm([welch(values[i], values[j]) for i, j in pairs]), strict=True))
    best = values[0]
    judgements = [Judgement("best" if len(best) > 1 else "lowest, one set", 0.0, None, None)]
    for index in range(1, len(values)):
        difference, p = float(np.mean(values[index]) - np.mean(best)), corrected.get((0, index))
        sds = _in_deviations(difference, best, values[index])
        verdict = _verdict(difference, sds, p, len(best), contents[index] == contents[0])
        judgements.append(Judgement(verdict, difference, sds, p))
    return judgements


def _verdict(difference: float, sds: float | None, p: float | None, best_sets: int, same: bool) -> str:
    if same:
        return "the same as the best"
    if p is None:
        return f"{'the best has one set' if best_sets == 1 else 'one set'}: cannot be told from noise"
    if p > ALPHA:
        return "within noise of the best"
    return f"worse by {number(difference)}" + ("" if sds is None else f" ({sds:,.1f} sd)")


def _in_deviations(difference: float, a: Sequence[float], b: Sequence[float]) -> float | None:
    """The difference of two means in standard deviations of one set; None where there is none to divide by."""
    if min(len(a), len(b)) < 2:
        return None
    spread = math.sqrt((np.var(a, ddof=1) + np.var(b, ddof=1)) / 2)
    return difference / spread if spread > 0 else None
