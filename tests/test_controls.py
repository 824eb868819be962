"""Searches without a policy: against optima known beforehand, generations recomputed by hand, and the real task."""

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from prunegym.agent.controls import CONTROLS, ControlSettings, CrossEntropy, run_control
from prunegym.agent.history import History
from prunegym.agent.randomness import derive_seed
from prunegym.envs import TrimEnv, TrimSettings
from prunegym.envs.default_task import default_task
from prunegym.pruning import UserError
from toy_env import WalkEnv

NAMES = sorted(CONTROLS)
OPTIMUM = [0.7, -0.5, 0.2, -0.8, 0.5, -0.1]


def found(
    name: str, env: WalkEnv, *, evaluations: int = 300, seed: int = 0, settings: ControlSettings | None = None
) -> History:
    history = History()
    run_control(name, env, evaluations=evaluations, budgets=[None], seed=seed, history=history, settings=settings)
    return history


def best_distance(history: History) -> float:
    """Root mean square distance of the best plan from the optimum; the reward is minus its square."""
    assert history.best is not None
    return math.sqrt(-(history.best.reward or 0.0))


# ---- they search -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_fitted_gaussians_find_the_optimum_and_chance_does_not(seed: int) -> None:
    """The expected best of 300 uniform draws in six dimensions is about 0.24 away: 2 (6 / (300 π³))^(1/6) / √6."""
    distance = {name: best_distance(found(name, WalkEnv(OPTIMUM), seed=seed)) for name in NAMES}
    assert distance["cem"] < 0.06
    assert distance["cma_es"] < 0.06
    assert 0.12 < distance["random"] < 0.45


@pytest.mark.parametrize("name", ["cem", "cma_es"])
def test_an_optimum_at_the_bounds_is_found(name: str) -> None:
    history = found(name, WalkEnv([1.0, -1.0, 1.0]))
    assert best_distance(history) < 0.06


@pytest.mark.parametrize("name", NAMES)
def test_one_group_alone_can_be_searched(name: str) -> None:
    assert best_distance(found(name, WalkEnv([0.4]), evaluations=60)) < 0.06


@pytest.mark.parametrize("name", NAMES)
def test_actions_keep_to_their_bounds(name: str) -> None:
    env = WalkEnv([1.0, -1.0, 0.9])
    found(name, env, settings=ControlSettings(start_std=2.0, sigma=2.0))
    played = np.array(env.played)
    assert np.abs(played).max() <= 1.0
    assert played.std(axis=0).min() > 0.01


def test_two_generations_of_the_cross_entropy_method_by_hand() -> None:
    """Population 5, two elites (40 %), smoothing 0.6, least deviation 0.3."""
    settings = ControlSettings(population=5, elites=0.4, smoothing=0.6, start_std=0.5, least_std=0.3)
    env = WalkEnv([0.9, -0.9], grain=10**6)
    found("cem", env, evaluations=15, seed=3, settings=settings)
    rng = np.random.default_rng(derive_seed(3, "cem at None"))
    mean, std = np.zeros(2), np.full(2, 0.5)
    for generation in range(3):
        draws = [
            [min(1.0, max(-1.0, m + s * rng.standard_normal())) for m, s in zip(mean, std, strict=True)]
            for _ in range(5)
        ]
        np.testing.assert_allclose(env.played[5 * generation : 5 * generation + 5], draws, atol=1e-6)
        costs = [(x - 0.9) ** 2 + (y + 0.9) ** 2 for x, y in draws]
        one, two = (draws[place] for place in sorted(range(5), key=costs.__getitem__)[:2])
        for axis in range(2):
            middle, half = (one[axis] + two[axis]) / 2, abs(one[axis] - two[axis]) / 2  # deviation of two numbers
            mean[axis] = 0.6 * middle + 0.4 * mean[axis]
            std[axis] = max(0.3, 0.6 * half + 0.4 * std[axis])


def test_the_first_of_equal_rewards_is_the_elite() -> None:
    control = CrossEntropy(1, ControlSettings(population=4, elites=0.25, smoothing=1.0), np.random.default_rng(0))
    control.tell(np.array([[0.1], [0.2], [0.3], [0.4]]), np.array([1.0, 2.0, 2.0, 0.0]))
    assert (control.mean.item(), control.std.item()) == (0.2, 0.05)


# ---- reproducible ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", NAMES)
def test_equal_seeds_equal_histories_and_no_global_random_number(name: str) -> None:
    runs = []
    for state, seed in ((1, 5), (2, 5), (2, 6)):
        np.random.seed(state)  # noqa: NPY002
        torch.manual_seed(state)
        before = np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
        runs.append(found(name, WalkEnv(OPTIMUM), evaluations=40, seed=seed).rows)
        after = np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
        assert all(np.array_equal(one, other) for one, other in zip(before[0], after[0], strict=True))
        assert torch.equal(before[1], after[1])
    assert runs[0] == runs[1]
    assert runs[1] != runs[2]


# ---- counted ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("evaluations", "rounds", "spent"), [(1, 1, 1), (37, 1, 37), (12, 3, 12), (14, 3, 12)])
def test_the_evaluations_are_spent_and_no_more(name: str, evaluations: int, rounds: int, spent: int) -> None:
    history, seen = History(), []
    env = WalkEnv([0.3, -0.3], rounds=rounds)
    end = run_control(
        name, env, evaluations=evaluations, budgets=[None], seed=0, history=history,
        report=lambda now: seen.append(len(now.rows)),
    )  # fmt: skip
    assert (end, history.spent) == ("max_evaluations", spent)
    assert seen == list(range(1, len(history.rows) + 1))
    assert [row.round for row in history.rows] == [1 + place % rounds for place in range(len(history.rows))]
    assert all(len(row.plans) == rounds for row in history.finished)
    assert all(len(actions) == 2 * rounds for actions in env.played)


@pytest.mark.parametrize("name", NAMES)
def test_repeated_plans_cost_nothing(name: str) -> None:
    """Actions are rounded to -1, 0 and 1: nine plans; eight distinct ones are paid for, however often they come."""
    history = found(name, WalkEnv([0.3, -0.3], grain=1), evaluations=8, settings=ControlSettings(start_std=1.5))
    distinct = {str(row.plans) for row in history.rows}
    assert history.spent == len(distinct) <= 8
    assert len(history.rows) > 8


@pytest.mark.parametrize("name", NAMES)
def test_a_search_that_repeats_itself_ends(name: str) -> None:
    history = History()
    end = run_control(name, WalkEnv([0.1], grain=1), evaluations=7, budgets=[None], seed=0, history=history)
    distinct = {str(row.plans) for row in history.rows}
    assert (end, history.spent, len(history.rows)) == ("repeats", len(distinct), 70)


@pytest.mark.parametrize("name", NAMES)
def test_budgets_share_the_evaluations(name: str) -> None:
    env, history = WalkEnv(OPTIMUM), History()
    run_control(name, env, evaluations=23, budgets=[0.3, 0.5, 0.8], seed=0, history=history)
    budgets = [row.budget for row in history.rows]
    assert [key for key, _ in itertools.groupby(budgets)] == [0.3, 0.5, 0.8]
    assert [budgets.count(budget) for budget in (0.3, 0.5, 0.8)] == [8, 8, 7]
    alone = WalkEnv(OPTIMUM)
    run_control(name, alone, evaluations=8, budgets=[0.5], seed=0, history=History())
    assert alone.played == env.played[8:16]  # a budget's search does not depend on the others
    assert history.best_at(0.5) in history.rows[8:16]


def test_a_search_after_another_has_its_own_count() -> None:
    history, env = History(), WalkEnv(OPTIMUM)
    for seed in (0, 1):
        run_control("random", env, evaluations=6, budgets=[None], seed=seed, history=history)
    assert history.spent == 12


def test_the_environments_own_budget_is_recorded() -> None:
    assert {row.budget for row in found("random", WalkEnv([0.1], budget=0.4), evaluations=3).rows} == {0.4}


def test_seconds_end_a_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look at the clock takes one second: of ten seconds each budget has five, its second from the last end."""
    clock = itertools.count()
    monkeypatch.setattr("prunegym.agent.controls.time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    history = History()
    end = run_control(
        "random", WalkEnv([0.1]), evaluations=100, budgets=[0.3, 0.5], seed=0, history=history, max_seconds=10
    )
    assert end == "max_minutes"
    budgets = [row.budget for row in history.rows]
    assert [budgets.count(budget) for budget in (0.3, 0.5)] == [4, 4]


# ---- refused ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "ce"}, r"a control must be a known name, but got 'ce'; did you mean 'cem'\?"),
        ({"budgets": []}, "budgets must be distinct and at least one, but got"),
        ({"budgets": [0.3, 0.3]}, r"budgets must be distinct and at least one, but got \[0.3, 0.3\]"),
        ({"evaluations": 3}, "evaluations must be at least rounds x budgets = 2 x 2, but got 3"),
        ({"max_seconds": -1.0}, "max_seconds must be at least 0, but got -1.0"),
        ({"seed": -1}, "seed must be a whole number from 0"),
        ({"history": []}, "run_control needs a History"),
        ({"settings": {}}, "run_control needs a ControlSettings"),
    ],
)
def test_impossible_requests_are_refused(changes: dict[str, Any], message: str) -> None:
    request = {"name": "cem", "evaluations": 8, "budgets": [0.3, 0.5], "seed": 0, "history": History()} | changes
    with pytest.raises(UserError, match=message):
        run_control(request.pop("name"), WalkEnv([0.1], rounds=2), **request)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"population": 1}, "population must be at least 2 and elites in"),
        ({"elites": 0.0}, r"elites in \(0, 1\], but got 20 and 0.0"),
        ({"smoothing": 1.1}, r"smoothing must be in \(0, 1\], but got 1.1"),
        ({"start_std": 0.0}, "start_std must be positive"),
        ({"least_std": 0.6}, r"least_std in \[0, start_std\], but got 0.5 and 0.6"),
        ({"sigma": 0.0}, "sigma must be positive"),
        ({"cma_population": 3}, "cma_population at least 4, or 0"),
        ({"population": 2.5}, "population must be a whole number"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(ControlSettings(), **changes)


# ---- the real environment --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", NAMES)
def test_the_digits_task_is_searched(name: str) -> None:
    env = TrimEnv(default_task(), TrimSettings(budget=0.3, rounds=1))
    history = History()
    run_control(name, env, evaluations=10, budgets=[0.3, 0.5], seed=0, history=history)
    assert history.spent == 10
    for budget in (0.3, 0.5):
        best = history.best_at(budget)
        assert best is not None
        rows = [row for row in history.rows if row.budget == budget]
        assert all(row.kept <= budget for row in rows)
        assert best.reward == max(row.reward for row in rows if row.reward is not None)
        reference = env.uniform(budget).score.accuracy
        assert best.reward == pytest.approx(10 * (best.accuracy - reference))


def test_two_rounds_of_the_digits_task() -> None:
    history = History()
    env = TrimEnv(default_task(), TrimSettings(budget=0.3, rounds=2))
    run_control("cem", env, evaluations=7, budgets=[None], seed=0, history=history)
    assert (history.spent, len(history.finished)) == (6, 3)
    assert all(len(row.plans) == 2 for row in history.finished)
    assert {row.budget for row in history.rows} == {0.3}
