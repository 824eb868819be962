"""Paired bootstrap intervals against the bootstrap distribution counted out in full, and the verdicts they allow."""

import itertools

import numpy as np
import pytest
from prunegym.agent.intervals import Interval, paired_interval
from prunegym.pruning.errors import UserError
from scipy.stats import norm
from scipy.stats import t as student

DIFFERENCES = [0.713, -0.241, 1.127, 0.389, 2.318]


def every_mean(differences: list[float]) -> np.ndarray:
    """Return the sorted means of all n**n resamples of n differences."""
    return np.sort([np.mean(drawn) for drawn in itertools.product(differences, repeat=len(differences))])


def bca_by_hand(differences: list[float], confidence: float) -> tuple[float, float]:
    """Efron's BCa (1987) on the bootstrap distribution counted out in full; ties count by half."""
    means, centre, n = every_mean(differences), np.mean(differences), len(differences)
    below = ((means < centre - 1e-12).mean() + (means <= centre + 1e-12).mean()) / 2
    bias = norm.ppf(below)
    left_out = np.array([np.mean(differences[:i] + differences[i + 1 :]) for i in range(n)])
    slope = left_out.mean() - left_out
    acceleration = (slope**3).sum() / (6 * (slope**2).sum() ** 1.5)
    ends = []
    for share in ((1 - confidence) / 2, (1 + confidence) / 2):
        point = bias + norm.ppf(share)
        ends.append(np.quantile(means, norm.cdf(bias + point / (1 - acceleration * point))))
    return ends[0], ends[1]


def test_five_pairs_agree_with_all_3125_resamples() -> None:
    second = [80.0, 81.0, 79.5, 82.0, 80.5]
    first = [figure + difference for figure, difference in zip(second, DIFFERENCES, strict=True)]
    found = paired_interval(first, second, resamples=20_000)
    low, high = bca_by_hand(DIFFERENCES, 0.95)
    assert found.method == "BCa"
    assert found.mean == pytest.approx(np.mean(DIFFERENCES))
    assert found.low == pytest.approx(low, abs=0.03)
    assert found.high == pytest.approx(high, abs=0.03)
    percentile = np.quantile(every_mean(DIFFERENCES), [0.025, 0.975])
    assert abs(found.low - percentile[0]) > 0.05  # it is not simply the percentile interval


def test_fewer_than_five_pairs_are_shown_by_their_range_and_give_no_verdict() -> None:
    found = paired_interval([1.0, 2.0, 4.0, 3.5], [0.0] * 4, confidence=0.8)
    assert (found.low, found.high, found.method) == (1.0, 4.0, "range")
    assert found.verdict == "too few seeds"


def test_a_verdict_needs_students_t_too() -> None:
    differences = [0.2, 0.1, 1.4, 0.9, 0.05]
    found = paired_interval(differences, [0.0] * 5)
    t = np.mean(differences) / (np.std(differences, ddof=1) / np.sqrt(5))
    assert found.p_value == pytest.approx(2 * student.sf(t, 4))
    assert found.low is not None
    assert found.low > 0  # the bootstrap alone would call it better
    assert found.p_value > 0.05
    assert found.verdict == "not distinguishable"
    assert paired_interval(differences, [0.0] * 5, confidence=0.85).verdict == "better"


def test_five_equal_methods_are_seldom_told_apart() -> None:
    random = np.random.default_rng(0)
    found = [paired_interval(random.standard_normal(5), np.zeros(5), resamples=400) for _ in range(300)]
    wrong = sum(each.verdict != "not distinguishable" for each in found)
    alone = sum(each.low is not None and each.high is not None and not each.low <= 0 <= each.high for each in found)
    assert wrong <= 24  # 15 expected of a level of 5 %, with a standard deviation of 3.8
    assert alone > wrong  # the bootstrap alone errs more often


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ([1.0, 2.0, 1.5, 0.5, 1.2], "better"),
        ([-1.0, -2.0, -1.5, -0.5, -1.2], "worse"),
        ([1.0, -2.0, 1.5, -0.5, 0.2], "not distinguishable"),
    ],
)
def test_the_verdict_is_where_the_interval_lies(differences: list[float], verdict: str) -> None:
    found = paired_interval([70 + each for each in differences], [70.0] * 5)
    assert found.verdict == verdict
    assert found.positive == sum(each > 0 for each in differences)
    assert found.negative == sum(each < 0 for each in differences)


def test_swapping_the_two_turns_the_interval_round() -> None:
    first, second = [81.0, 80.2, 83.1, 79.9, 80.8], [80.0, 80.5, 81.0, 79.0, 80.1]
    there, back = paired_interval(first, second), paired_interval(second, first)
    assert back.mean == pytest.approx(-there.mean)
    assert (back.low, back.high) == (pytest.approx(-there.high, abs=0.05), pytest.approx(-there.low, abs=0.05))


def test_equal_differences_have_an_interval_of_one_point() -> None:
    second = [80.1, 81.7, 79.3, 82.9, 80.3]
    better = paired_interval([figure + 0.3 for figure in second], second)  # equal up to rounding
    assert (better.method, better.verdict) == ("equal", "better")
    assert better.low == better.high == pytest.approx(0.3)
    same = paired_interval(second, second)
    assert (same.mean, same.low, same.high, same.verdict) == (0.0, 0.0, 0.0, "not distinguishable")


def test_one_pair_has_no_interval_and_two_have_one() -> None:
    one = paired_interval([81.0], [80.0])
    assert one == Interval(1.0, None, None, "none", 1, 1, 0)
    assert one.verdict == "too few seeds"
    two = paired_interval([81.0, 83.0], [80.0, 80.0])
    assert (two.low, two.high, two.method) == (1.0, 3.0, "range")
    assert two.verdict == "too few seeds"


def test_equal_seeds_give_equal_intervals() -> None:
    assert paired_interval(DIFFERENCES, [0.0] * 5, seed=3) == paired_interval(DIFFERENCES, [0.0] * 5, seed=3)


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ([1.0, 2.0], [1.0], "same number of at least one seed each, but got 2 and 1"),
        ([], [], "same number of at least one seed each, but got 0 and 0"),
        ([1.0, float("nan")], [1.0, 1.0], "must be finite"),
    ],
)
def test_figures_that_are_no_pairs_are_refused(first: list[float], second: list[float], words: str) -> None:
    with pytest.raises(UserError, match=words):
        paired_interval(first, second)
