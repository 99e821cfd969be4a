"""Which differences between scores are noise: against SciPy, by hand, and on many draws of equal models."""

import numpy as np
import pytest
from scipy.stats import ttest_ind

from eval import compare
from eval.metrics.significance import differences_from_best, holm, welch


def test_welch_is_scipys_test_of_the_values_themselves():
    rng = np.random.default_rng(3)
    for sizes in ((2, 2), (5, 5), (3, 8)):
        a, b = (rng.normal(mean, 1 + mean, size) for mean, size in enumerate(sizes))
        assert welch(a, b) == pytest.approx(ttest_ind(a, b, equal_var=False).pvalue, rel=1e-9)
    assert 0 < welch([1.0, 1.0, 1.0], [1.1, 1.2, 1.3]) < 1, "one side may be constant"
    assert welch([2.0, 2.0], [2.0, 2.0, 2.0]) == 1 and welch([2.0, 2.0], [2.5, 2.5]) == 0


def test_holm_by_hand():
    # In order: 4 x 0.005, 3 x 0.01, 2 x 0.03, then 1 x 0.04, which may not be below the one before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.7]) == [1.0, 1.0] and holm([]) == []


def judged(groups, contents=None):
    """Verdicts in words; without `contents`, all are different."""
    ordered, contents = sorted(groups, key=np.mean), contents or [str(index) for index in range(len(groups))]
    return compare.verdicts(differences_from_best(ordered, contents), ordered, contents)


@pytest.mark.parametrize(("sources", "sets"), [(2, 3), (2, 5), (6, 10)])
def test_equal_models_are_told_apart_in_at_most_one_case_of_twenty(sources, sets):
    rng = np.random.default_rng(0)
    draws = [judged(rng.normal(20, 0.3, (sources, sets))) for _ in range(200)]
    within = np.mean([set(found[1:]) == {"within noise"} for found in draws])
    assert 0.93 <= within < 1, "5% of 200, give or take 1.5%; never wrong would mean that nothing is ever told apart"


def test_models_far_apart_are_never_within_noise_and_the_distance_is_said():
    rng = np.random.default_rng(1)
    for _ in range(100):
        near, far = rng.normal(20, 0.3, 5), rng.normal(25, 0.3, 5)
        found = differences_from_best([near, far], ["a", "b"])[1]
        verdict = judged([near, far])[1]
        assert verdict.startswith("worse by ") and verdict.endswith(" sd") and found.p < 0.05
        assert found.difference == pytest.approx(far.mean() - near.mean())
        assert found.sds == pytest.approx(found.difference / np.sqrt((near.var(ddof=1) + far.var(ddof=1)) / 2))
    assert judged([[1.0, 2.0, 3.0], [5.0, 6.0, 7.0]])[1] == "worse by 4.0 sd"


def test_more_sources_need_a_larger_difference():
    rng = np.random.default_rng(5)
    pair = [[1.0, 1.1, 1.2], [1.4, 1.5, 1.6]]
    many = pair + [list(rng.normal(1.3, 0.3, 3)) for _ in range(6)]
    assert differences_from_best(pair, ["0", "1"])[1].p == pytest.approx(ttest_ind(*pair, equal_var=False).pvalue)
    words = compare.verdicts(differences_from_best(many, "abcdefgh"), many, "abcdefgh")
    assert words[1] == "within noise"


def test_a_single_set_is_never_judged():
    assert judged([[1.0], [50.0]]) == ["lowest, one set", "unknown: one set"]
    assert judged([[1.0, 1.1], [50.0]]) == ["best", "unknown: one set"]
    # It is no comparison either, so the correction is not for it.
    alone, beside = (
        differences_from_best(groups, "abc")[1].p
        for groups in ([[1.0, 2.0], [3.0, 5.0]], [[1.0, 2.0], [3.0, 5.0], [9.0]])
    )
    assert alone == beside


def test_sets_without_spread_and_equal_content():
    assert judged([[1.0, 1.0], [1.0, 1.0]])[1] == "within noise"
    assert judged([[1.0, 1.0], [1.5, 1.5]])[1] == "worse", "no spread to express it in"
    assert judged([[1.0, 1.1], [9.0, 9.1]], ["same", "same"])[1] == "same as the best"
    # The same model twice is no comparison: two pairs are left of three, so the smaller p counts twice.
    groups = [[1.0, 2.0], [3.0, 5.0], [3.5, 5.5]]
    least = min(ttest_ind(groups[0], group, equal_var=False).pvalue for group in groups[1:])
    assert differences_from_best(groups, ["a", "b", "b"])[2].p == pytest.approx(2 * least)


# Results that are there
