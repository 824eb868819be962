"""The linear algebra of repair and of greedy choice against brute force and direct formulas."""

import itertools

import numpy as np
import pytest
from prunegym.pruning.least_squares import ConsumerProblem, choose_greedily, eliminate, solve_mixing

FloatArray = np.ndarray


def problem(seed: int, channels: int, per_channel: int = 1, others: int = 0) -> ConsumerProblem:
    """Draw a covariance of full rank and a weight; `others` leading features belong to another group."""
    rng = np.random.default_rng(seed)
    size = channels * per_channel + others
    data = rng.normal(size=(3 * size, size)) @ rng.normal(size=(size, size))
    weight = rng.normal(size=(size, 5))
    features = tuple(np.arange(per_channel) + others + place * per_channel for place in range(channels))
    return ConsumerProblem(data.T @ data / len(data), weight @ weight.T, features)


def residual(item: ConsumerProblem, kept: tuple[int, ...]) -> float:
    """Compute tr(M Σ_S|K) = tr(W_Sᵀ Σ_S|K W_S) directly, over the group's own features."""
    own = np.concatenate(item.features)
    keep = np.concatenate([item.features[channel] for channel in kept]) if kept else np.array([], dtype=int)
    gone = np.setdiff1d(own, keep)
    left = item.moment[np.ix_(gone, gone)].copy()
    if len(keep):
        cross = item.moment[np.ix_(keep, gone)]
        left -= cross.T @ np.linalg.solve(item.moment[np.ix_(keep, keep)], cross)
    return float(np.trace(item.weight[np.ix_(gone, gone)] @ left))


def total(problems: list[ConsumerProblem], kept: tuple[int, ...]) -> float:
    return sum(residual(item, kept) for item in problems)


CASES = [(1, 1, 0), (1, 2, 0), (3, 1, 0), (2, 2, 0), (1, 1, 4)]  # features per channel, consumers, foreign features


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("per_channel", "consumers", "others"), CASES)
def test_each_greedy_pick_is_the_best_one(seed: int, per_channel: int, consumers: int, others: int) -> None:
    problems = [problem(10 * seed + place, 5, per_channel, others) for place in range(consumers)]
    order = choose_greedily(problems).order.tolist()
    assert sorted(order) == [0, 1, 2, 3, 4]
    for place in range(4):
        chosen = tuple(order[:place])
        tried = {channel: total(problems, (*chosen, channel)) for channel in range(5) if channel not in chosen}
        assert order[place] == min(tried, key=lambda channel: tried[channel])
    best_single = min(itertools.combinations(range(5), 1), key=lambda kept: total(problems, kept))
    assert (order[0],) == best_single


@pytest.mark.parametrize("seed", range(6))
def test_greedy_is_near_the_best_of_all_subsets(seed: int) -> None:
    problems = [problem(seed, 6)]
    order = choose_greedily(problems).order.tolist()
    whole = total(problems, ())
    for count in range(1, 6):
        best = min(total(problems, kept) for kept in itertools.combinations(range(6), count))
        ours = total(problems, tuple(order[:count]))
        assert best - 1e-9 * whole <= ours <= best + 0.25 * whole


def test_greedy_is_exact_for_uncorrelated_channels() -> None:
    variance, weight = np.array([1.0, 4.0, 0.5, 2.0]), np.array([3.0, 1.0, 1.0, 2.0])
    item = ConsumerProblem(np.diag(variance), np.diag(weight**2), tuple(np.array([k]) for k in range(4)))
    assert choose_greedily([item]).order.tolist() == [0, 3, 1, 2]  # variance x weight²: 9, 4, 0.5, 8
    np.testing.assert_allclose(eliminate([item], [0, 3, 1, 2]) * 21.5, [21.5, 12.5, 4.5, 0.5, 0.0], atol=1e-6)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("per_channel", "consumers", "others"), CASES)
def test_eliminate_is_the_direct_formula(seed: int, per_channel: int, consumers: int, others: int) -> None:
    problems = [problem(20 * seed + place, 5, per_channel, others) for place in range(consumers)]
    order = np.random.default_rng(seed).permutation(5).tolist()
    curve = eliminate(problems, order)
    expected = [
        np.mean([residual(item, tuple(order[:count])) / residual(item, ()) for item in problems]) for count in range(6)
    ]
    np.testing.assert_allclose(curve, expected, atol=1e-6)
    assert curve[0] == 1.0
    assert curve[-1] == pytest.approx(0.0, abs=1e-6)
    assert (np.diff(curve) <= 0).all()


def test_duplicates_and_dead_channels_are_chosen_last() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 5)) * [1.0, 2.0, 3.0, 1.5, 1.0]
    x[:, 3] = 2.0 * x[:, 2]  # a copy
    x[:, 4] = 0.0  # dead
    weight = rng.normal(size=(5, 3))
    item = ConsumerProblem(x.T @ x / 400, weight @ weight.T, tuple(np.array([k]) for k in range(5)))
    order = choose_greedily([item]).order.tolist()
    assert set(order[:3]) in ({0, 1, 2}, {0, 1, 3})
    np.testing.assert_allclose(eliminate([item], order)[3:], 0.0, atol=1e-6)


@pytest.mark.parametrize("rows", [None, 50])
@pytest.mark.parametrize("seed", range(3))
def test_mixing_by_the_normal_equations(seed: int, rows: int | None) -> None:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(50, 6)) @ rng.normal(size=(6, 6)) * [1.0, 1e-3, 1e3, 1.0, 10.0, 0.1]
    moment = x.T @ x / 50
    kept, removed = np.array([0, 2, 5]), np.array([1, 3, 4])
    ridge = 1e-4 + (0.05 * 3 / 50 if rows else 0.0)
    # ridge regression is plain least squares with extra rows against zeros, each in its feature's own unit
    extra = np.diag([np.sqrt(50 * ridge * moment[k, k]) for k in kept])
    stacked, targets = np.vstack([x[:, kept], extra]), np.vstack([x[:, removed], np.zeros((3, 3))])
    expected = np.linalg.lstsq(stacked, targets, rcond=None)[0]
    np.testing.assert_allclose(solve_mixing(moment, kept, removed, rows=rows), expected, rtol=1e-6)
    weight = rng.normal(size=(3, 7))
    np.testing.assert_allclose(solve_mixing(moment, kept, removed, weight, rows=rows), expected @ weight, rtol=1e-6)
    np.testing.assert_allclose(
        solve_mixing(moment, kept, removed, weight[:, :2], rows=rows), expected @ weight[:, :2], rtol=1e-6
    )


def test_singular_systems_stay_harmless() -> None:
    kept, removed = np.array([0, 1]), np.array([2])
    twin = np.array([[1.0, 1.0, 1.0], [1.0, 1.0, 1.0], [1.0, 1.0, 1.0]])
    mixing = solve_mixing(twin, kept, removed)
    np.testing.assert_allclose(mixing, [[0.5], [0.5]], rtol=1e-3)  # shared between the twins, neither blows up
    assert (solve_mixing(np.zeros((3, 3)), kept, removed) == 0).all()


def test_indefinite_system_falls_back_with_a_warning() -> None:
    broken = np.array([[1.0, 3.0, 1.0], [3.0, 1.0, 1.0], [1.0, 1.0, 1.0]])  # no covariance: rounding at its worst
    with pytest.warns(UserWarning, match="system of 2 features is singular; its pseudo-inverse is used"):
        mixing = solve_mixing(broken, np.array([0, 1]), np.array([2]))
    np.testing.assert_allclose(broken[:2, :2] @ mixing, broken[:2, 2:], atol=1e-3)
