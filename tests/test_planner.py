"""The planning learner where rewards are known beforehand: a best plan that is given, and spaces of few plans."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prunegym.agent import learning
from prunegym.agent.controls import run_control
from prunegym.agent.history import History
from prunegym.agent.learner import imagines, make_learner
from prunegym.agent.learning import learn, play
from prunegym.agent.planner import Planner, Proposal, key_of
from prunegym.agent.progress import Progress
from prunegym.agent.resume import HISTORY, Standing, take_up
from prunegym.agent.rows import Evaluation
from prunegym.agent.settings import ImaginationSettings, LearnerSettings, SearchSettings
from prunegym.envs import RewardSettings, TrimEnv, TrimSettings
from prunegym.pruning import Evaluated, PruningTask, Score, Trimmer, UserError, solve_counts
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import nn
from toys import images, make

BEST = np.array([0.6, -0.4, 0.2, -0.7, 0.5, -0.2])
"""Actions that leave the best plan of six groups at every budget."""
QUICK = LearnerSettings(episodes_per_update=6, hidden=[16], imagination=ImaginationSettings(updates=2, walks=32))
RANGE = TrimSettings(budget=None, budget_range=(0.3, 0.6), budget_levels=3)


pytestmark = pytest.mark.usefixtures("one_thread")


def deep() -> Any:
    """Make six groups of 64 neurons; takes (N, 5)."""
    layers: list[nn.Module] = [nn.Linear(5, 64), nn.ReLU()]
    for _ in range(5):
        layers += [nn.Linear(64, 64), nn.ReLU()]
    network: Any = nn.Sequential(*layers, nn.Linear(64, 3))
    network.shape = (5,)
    return network


def middling() -> Any:
    """Make two groups, of 16 and 12 neurons; takes (N, 5)."""
    network: Any = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))
    network.shape = (5,)
    return network


def shallow() -> Any:
    """Make one group of 8 neurons; takes (N, 5)."""
    network: Any = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    network.shape = (5,)
    return network


def distance(counts: Any, widths: Any) -> float:
    """Return the mean squared distance of the log-odds of staying from those that `BEST` asks for."""
    share = (np.asarray(counts) - 0.5) / widths
    odds = np.log(share / (1 - share)) / 3.0
    return float(np.mean((odds - odds.mean() - BEST + BEST.mean()) ** 2))


class Known(Trimmer):
    """Scores a plan by its widths alone; nothing is cut."""

    def __init__(self, network: Any, worth: Callable[[Any, Any], float]) -> None:
        labels = torch.arange(12) % 3
        splits = {name: (images(network.shape, 12, seed), labels) for seed, name in enumerate(("train", "reward"))}
        other = (images(network.shape, 12, 7), labels)
        super().__init__(PruningTask(network, **splits, selection=other, test=other))
        self.worth = worth
        self.calls = 0

    def evaluate(self, plan: Any, subject: Any = None, *, retraining: Any = None, seed: int = 0) -> Evaluated:
        self.calls += 1
        counts = np.array([plan.counts[group.name] for group in self.groups])
        value = self.worth(counts, self.cost_model.widths)
        return Evaluated(Score(value, -value, 12), self.cost_of(plan), plan)


@pytest.fixture(scope="module")
def six() -> Known:
    return Known(make(deep), lambda counts, widths: -distance(counts, widths))


@pytest.fixture(scope="module")
def two() -> Known:
    return Known(make(middling), lambda counts, widths: float(counts[0] / 16))


def searched(
    trimmer: Trimmer,
    settings: TrimSettings,
    evaluations: int,
    *,
    seed: int = 0,
    learner: LearnerSettings = QUICK,
    standing: Standing | None = None,
) -> tuple[History, str]:
    standing = standing or Standing()
    search = SearchSettings(settings, learner, max_evaluations=evaluations, seed=seed)
    environment = TrimEnv(settings=settings, trimmer=trimmer)
    _, stopped_by = learn(
        trimmer.task, search, trimmer, environment, standing.history, None, Progress(), standing=standing
    )
    return standing.history, stopped_by


def planner_of(
    trimmer: Trimmer, settings: TrimSettings, learner: LearnerSettings = QUICK, seed: int = 0, reach: float = 0.3
) -> Planner:
    def made(walks: Any, steps: int) -> Any:
        return make_learner(learner, walks, steps_per_episode=steps, seed=seed, log_folder=None, imagined=True)

    budgets = settings.budgets or (float(settings.budget or 0),)
    return Planner(learner.imagination, TrimEnv(settings=settings, trimmer=trimmer), budgets, reach, made, seed)


def row_of(proposal: Proposal, reward: float | None, number: int = 1, *, repeated: bool = False) -> Evaluation:
    widths = {f"g{place}": int(count) for place, count in enumerate(proposal.counts)}
    plans = tuple({name: list(range(count)) for name, count in widths.items()} for _ in range(1))
    return Evaluation(number, number, 1, 0.5, 1.0, 0.3, 1, 1, reward, widths, plans, proposal.budget, repeated)


# ---- what it finds ---------------------------------------------------------------------------------------------------
def test_it_comes_nearer_to_a_known_best_plan_than_chance(six: Known) -> None:
    settings = TrimSettings(budget=0.4)
    practice = ImaginationSettings(updates=4, walks=32)
    learner = replace(QUICK, hidden=[32], learning_rate=1e-2, imagination=practice)  # fewer and larger steps
    environment = TrimEnv(settings=settings, trimmer=six)
    assert distance(environment.widths_after(BEST[None], np.array([0.4]))[0], 64) < 0.001  # by rounding
    reached, by_chance, own = [], [], []
    for seed in range(5):
        chance = History()
        run_control("random", environment, evaluations=60, budgets=[0.4], seed=seed, history=chance)
        history, stopped_by = searched(six, settings, 60, seed=seed, learner=learner)
        assert (stopped_by, len(history.rows), chance.spent) == ("max_evaluations", 60, 60)
        distances, others = (
            [distance(list(row.widths.values()), 64) for row in each.rows] for each in (history, chance)
        )
        reached.append(min(distances))
        own.append(distances[-1])
        by_chance.append(min(others))
    assert sum(here < there for here, there in zip(reached, by_chance, strict=True)) >= 4
    assert np.median(reached) < 0.3 * np.median(by_chance)
    start = distance(environment.widths_after(np.zeros((1, 6)), np.array([0.4]))[0], 64)
    assert np.median(own) < 0.4 * start  # the policy's own plan, without noise; it began at the uniform one


def test_it_starts_at_the_uniform_plan(six: Known) -> None:
    planner = planner_of(six, RANGE)
    for budget in (0.3, 0.45, 0.6):  # one of them is none of its own
        own = planner.own(budget)
        assert own.actions.tolist() == [0.0] * 6
        assert own.counts.tolist() == solve_counts(six.cost_model, np.zeros(6), budget, "macs").tolist()
    history, _ = searched(six, RANGE, 20)
    first = history.rows[0]
    uniform = solve_counts(six.cost_model, np.zeros(6), float(first.budget or 0), "macs")
    assert list(first.widths.values()) == uniform.tolist()
    assert first.reward == 0.0


def test_half_of_the_proposals_lies_around_the_uniform_plan_wherever_the_policy_stands(six: Known) -> None:
    quiet = replace(QUICK, noise_start=-12.0, imagination=replace(QUICK.imagination, proposals=200))
    for reach in (0.0, 0.3):
        planner = planner_of(six, TrimSettings(budget=0.4), quiet, reach=reach)
        with torch.no_grad():
            planner.learner.policy.action_net.bias.fill_(0.6)  # far from the uniform plan, whose actions are 0
        drawn = np.array([proposal.actions for proposal in planner._proposals(planner._tried(0.4, History()), 0.4)])
        around, own = drawn[::2], drawn[1::2]
        assert np.abs(own - 0.6).max() < 1e-3
        assert abs(around.mean()) < 0.02
        assert around.std() == pytest.approx(reach / 3**0.5, rel=0.15, abs=1e-4)  # a uniform number's square: a third


def test_a_quarter_of_the_proposals_lies_around_the_best_plans_so_far(six: Known) -> None:
    quiet = replace(QUICK, noise_start=-12.0)
    planner, history, known = planner_of(six, RANGE, replace(quiet, noise_start=-1.0), reach=1e-9), History(), {}
    for number, budget in enumerate([level for level in RANGE.budgets for _ in range(8)]):
        planner._order = [budget]
        (proposal,) = planner.propose(history, 1)
        reward = float(np.sin(7 * number))
        history.add(row_of(proposal, reward, number + 1))
        known.setdefault(budget, []).append((reward, proposal.actions.tolist()))
    best = {budget: [actions for _, actions in sorted(tried, reverse=True)] for budget, tried in known.items()}
    for budget in RANGE.budgets:
        allowed = [row for level, rows in best.items() for row in rows[: 5 if level == budget else 1]]
        for one in (planner, restored(planner, six, history)):
            around = one._tried(budget, history)[1::4]
            found = {min(range(len(allowed)), key=lambda k: np.abs(row - allowed[k]).max()) for row in around}
            assert found == set(range(len(allowed)))  # each of them, and
            assert max(min(np.abs(row - other).max() for other in allowed) for row in around) < 1e-6  # nothing else


def restored(planner: Planner, trimmer: Trimmer, history: History) -> Planner:
    """Return another planner that stands where this one does, as after a checkpoint."""
    other = planner_of(trimmer, RANGE, reach=planner.reach)
    other.restore(planner.state(), history)
    return other


# ---- what is scored --------------------------------------------------------------------------------------------------
def test_no_plan_is_scored_twice_and_each_budget_gets_its_share(six: Known) -> None:
    history, stopped_by = searched(six, RANGE, 3 * 12 + 3)  # two updates and the policy's own plan for each
    assert stopped_by == "max_evaluations"
    found = [key_of(row) for row in history.rows]
    assert len(set(found[:36])) == 36
    levels = [round(budget, 6) for budget in RANGE.budgets]
    assert Counter(round(budget, 6) for budget, _ in found[:36]) == dict.fromkeys(levels, 12)
    assert [round(budget, 6) for budget, _ in found[36:]] == levels
    for budget, counts in found:
        share = six.cost_model.share(np.array(counts), "macs")
        assert 0.9 * budget < share <= budget


def test_equal_seeds_give_equal_histories_and_others_do_not(six: Known) -> None:
    settings = TrimSettings(budget=0.4)
    torch.manual_seed(1)
    first, _ = searched(six, settings, 20, seed=3)
    torch.manual_seed(2)
    np.random.seed(2)  # noqa: NPY002
    second, _ = searched(six, settings, 20, seed=3)
    assert first.rows == second.rows
    third, _ = searched(six, settings, 20, seed=4)
    assert [row.widths for row in first.rows] != [row.widths for row in third.rows]


def test_a_space_of_few_plans_is_searched_to_its_end(two: Known) -> None:
    settings = TrimSettings(budget=0.5)
    environment = TrimEnv(settings=settings, trimmer=two)
    apart = np.linspace(-1, 1, 2001)  # of two scores, only the difference matters
    every = environment.widths_after(np.column_stack((apart, -apart)), np.full(2001, 0.5))
    history, stopped_by = searched(two, settings, 200)
    assert stopped_by == "repeats"
    assert {tuple(row.widths.values()) for row in history.rows} == {tuple(row) for row in every.tolist()}
    assert [row.repeated for row in history.rows] == [False] * history.spent + [True]  # the policy's own plan
    assert 5 <= history.spent < 40


def test_one_group_has_one_plan_at_each_budget() -> None:
    trimmer = Known(make(shallow), lambda counts, widths: float(counts[0]))
    history, stopped_by = searched(trimmer, RANGE, 50)
    assert stopped_by == "repeats"
    assert len({key_of(row) for row in history.rows}) == 3
    assert history.spent == len({row.widths["0"] for row in history.rows})


def test_what_is_new_at_another_budget_is_proposed_and_learned_from(six: Known) -> None:
    planner = planner_of(six, RANGE)
    history, seen = History(), []
    for number, proposal in enumerate(planner.propose(history, 4), 1):
        history.add(row_of(proposal, float(number), number))
    low = history.rows[0]
    history.add(replace(low, evaluation=5, episode=5, budget=0.9, reward=7.0, repeated=True))
    history.add(replace(low, evaluation=6, episode=6, repeated=True))
    history.add(replace(low, evaluation=7, episode=7, reward=None))  # an episode that has not ended
    planner.model.fit = lambda features, rewards: seen.append((features, rewards))  # type: ignore[method-assign]
    planner.learn_from(history)
    ((features, rewards),) = seen
    assert rewards == [1.0, 2.0, 3.0, 4.0, 7.0]
    assert features.shape == (5, 7)
    np.testing.assert_allclose(np.exp(features[0, :6]), np.array(list(low.widths.values())) / 64)
    np.testing.assert_allclose(np.exp(features[:, 6]), [low.budget] * 4 + [0.9])
    np.testing.assert_array_equal(features[0, :6], features[4, :6])


def test_proposals_begin_with_the_policys_own_and_hold_no_repeats(six: Known) -> None:
    planner, history = planner_of(six, TrimSettings(budget=0.4)), History()
    for update in range(3):
        own = planner.own(0.4)
        proposals = planner.propose(history, 5)
        assert len({proposal.key for proposal in proposals}) == len(proposals) == 5
        assert not {proposal.key for proposal in proposals} & {key_of(row) for row in history.rows}
        if own.key not in {key_of(row) for row in history.rows}:
            assert proposals[0].key == own.key
        for proposal in proposals:
            reward = -distance(proposal.counts, 64)
            history.add(row_of(proposal, reward, len(history.rows) + 1))
        planner.learn_from(history)
        assert planner.updates == update + 1


def test_episodes_are_played_as_proposed(six: Known) -> None:
    environment = TrimEnv(settings=RANGE, trimmer=six)
    actions = np.random.default_rng(0).uniform(-1, 1, (5, 6))
    budgets = np.array([0.3, 0.6, 0.3, 0.5, 0.6])
    widths = environment.widths_after(actions, budgets)
    proposals = [Proposal(*each) for each in zip(actions, widths, budgets.tolist(), strict=True)]
    workers = DummyVecEnv([lambda: TrimEnv(settings=RANGE, trimmer=six)] * 3)
    played = list(play(workers, proposals))  # three, then two
    assert [proposal for proposal, _, _ in played] == proposals
    for proposal, info, reward in played:
        assert [len(keep) for keep in info["plan"].values()] == proposal.counts.tolist()
        assert info["budget"] == proposal.budget
        uniform = solve_counts(six.cost_model, np.zeros(6), proposal.budget, "macs")
        assert reward == pytest.approx(10 * (distance(uniform, 64) - distance(proposal.counts, 64)))


# ---- rewards that tell nothing ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["equal", "nan", "infinite", "all nan"])
def test_rewards_that_tell_little_end_no_search(kind: str) -> None:
    def worth(counts: Any, widths: Any) -> float:
        bad = kind == "all nan" or counts[0] > counts[1]
        return {"equal": 0.5, "infinite": float("-inf")}.get(kind, float("nan")) if bad else 0.5

    trimmer = Known(make(deep), worth)
    reward = RewardSettings(weights={"accuracy": 1.0})
    history, stopped_by = searched(trimmer, TrimSettings(budget=0.4, reward=reward), 20)
    assert (stopped_by, len(history.rows)) == ("max_evaluations", 20)


@pytest.mark.parametrize("updates", [0, 2])
def test_a_policy_that_diverges_is_named(two: Known, updates: int) -> None:
    learner = replace(QUICK, learning_rate=1e30, imagination=ImaginationSettings(updates=updates, walks=32))
    with pytest.raises(UserError, match=r"PPO diverged; lower learning_rate, which is 1e\+30"):
        searched(two, TrimSettings(budget=0.4), 30, learner=learner)


# ---- where it does not plan ------------------------------------------------------------------------------------------
ABLE = {
    "as it is": ({}, {}, True),
    "A2C": ({}, {"algorithm": "A2C"}, True),
    "a range": ({"budget": None, "budget_range": (0.3, 0.6)}, {}, True),
    "no practice": ({}, {"imagination": ImaginationSettings(updates=0)}, False),
    "two rounds": ({"rounds": 2}, {}, False),
    "ratios": ({"action": "ratio"}, {}, False),
    "AMC's observation": ({"observation": "amc"}, {}, False),
    "RecurrentPPO": ({}, {"algorithm": "RecurrentPPO"}, False),
    "SAC": ({}, {"algorithm": "SAC"}, False),
    "rollouts of its own": ({}, {"arguments": {"n_steps": 4, "batch_size": 4}}, False),
}


@pytest.mark.parametrize("case", ABLE)
def test_it_plans_where_it_can_and_else_learns_step_by_step(
    case: str, two: Known, monkeypatch: pytest.MonkeyPatch
) -> None:
    trim, learner, able = ABLE[case]
    settings, agent = replace(TrimSettings(budget=0.5), **trim), replace(QUICK, **learner)
    assert imagines(agent, settings) == able
    ways: list[str] = []
    for kind in ("PlannedSearch", "StepwiseSearch"):
        run = getattr(learning, kind).run
        monkeypatch.setattr(
            getattr(learning, kind), "run", lambda self, kind=kind, run=run: (ways.append(kind), run(self))[1]
        )
    history, _ = searched(two, settings, 6, learner=agent)
    assert ways == ["PlannedSearch" if able else "StepwiseSearch"]
    assert len(history.rows) >= 6


def test_its_log_counts_the_steps_of_scored_episodes(six: Known, monkeypatch: pytest.MonkeyPatch) -> None:
    dump, steps = Logger.dump, []
    monkeypatch.setattr(Logger, "dump", lambda self, step=0: (steps.append(step), dump(self, step))[1])
    history, _ = searched(six, RANGE, 14)
    assert steps == [6 * number for number in range(1, len(history.rows) + 1)]


# ---- an end in between -----------------------------------------------------------------------------------------------
def resumed(
    trimmer: Known, settings: TrimSettings, evaluations: int, folder: Path, interrupt: Callable[[], Any]
) -> Any:
    """Search in a folder, interrupted, and go on there."""
    standing = Standing(folder, "this", History(folder / HISTORY))
    with interrupt():
        history, stopped_by = searched(trimmer, settings, evaluations, standing=standing)
    assert stopped_by == "interrupt"
    told: list[str] = []
    standing = take_up(folder, "this", told.append)
    assert standing.checkpoint is not None
    return len(history.rows), searched(trimmer, settings, evaluations, standing=standing)


@pytest.mark.parametrize("after", [17, 26])
def test_a_search_goes_on_as_if_nothing_had_ended_it(
    six: Known, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    expected, _ = searched(six, RANGE, 33)

    def interrupt() -> Any:
        context = monkeypatch.context()
        patched = context.__enter__()
        evaluate, left = Known.evaluate, [after]

        def stop(self: Known, *arguments: Any, **keywords: Any) -> Evaluated:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return evaluate(self, *arguments, **keywords)

        patched.setattr(Known, "evaluate", stop)
        return _Leaving(context)

    played, (history, _) = resumed(six, RANGE, 33, tmp_path, interrupt)
    assert 12 <= played < 30
    assert history.rows == expected.rows


class _Leaving:
    """Ends a context that has begun."""

    def __init__(self, context: Any) -> None:
        self.context = context

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: Any) -> None:
        self.context.__exit__(*error)


def test_a_search_that_found_nothing_new_goes_on_looking_as_far(
    two: Known, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, spread = TrimSettings(budget=0.5), []
    tried = Planner._tried

    def recorded(self: Planner, budget: float, history: History) -> Any:
        spread.append(self.stale)
        return tried(self, budget, history)

    monkeypatch.setattr(Planner, "_tried", recorded)
    expected, _ = searched(two, settings, 200)
    whole, _ = spread.copy(), spread.clear()

    def interrupt() -> Any:
        context = monkeypatch.context()
        patched = context.__enter__()
        propose = Planner.propose

        def stop(self: Planner, history: History, count: int) -> Any:
            if self.stale == 7:
                raise KeyboardInterrupt
            return propose(self, history, count)

        patched.setattr(Planner, "propose", stop)
        return _Leaving(context)

    _, (history, stopped_by) = resumed(two, settings, 200, tmp_path, interrupt)
    assert stopped_by == "repeats"
    assert history.rows == expected.rows
    assert spread == whole
