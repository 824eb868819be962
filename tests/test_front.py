"""One training for every budget: the pool's floor, plans for a budget that is asked for, and the whole front."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from prunegym.agent import LearnerSettings, SearchResult, SearchSettings, search
from prunegym.agent.cli import main
from prunegym.agent.configuration import resolve, stored_config
from prunegym.agent.front import TrainedAgent, candidates_at, find_front
from prunegym.agent.front_report import table_rows
from prunegym.agent.history import History
from prunegym.agent.loading import load_task
from prunegym.agent.pool import best_of, heuristics_plans, judge, own_budget, reshaped, rows_within
from prunegym.agent.progress import Progress
from prunegym.agent.report import choice_lines, markdown
from prunegym.agent.rows import Evaluation
from prunegym.agent.run_folder import RunFolder, results
from prunegym.envs import RewardSettings, TrimSettings
from prunegym.envs.default_task import DEFAULT_TASK
from prunegym.pruning import PruningTask, Schedule, Trimmer, UserError, build, prepare_task
from prunegym.pruning.budget import solve_counts
from prunegym.pruning.evaluation import right_answers
from prunegym.pruning.heuristics import Goal, RankingSettings, rank_and_cut, uniform
from prunegym.pruning.retraining import RetrainSettings
from prunegym.pruning.splits import SealedSplit
from safetensors.torch import load_file
from torch import nn
from toys import tiny_task

LEVELS = (0.1, 0.2, 0.4)
RANGED = (
    tiny_task(updates=60)
    + """search:
  max_evaluations: 18
  candidates: 2
  compare: false
  latency_batches: []
  noise_check: "off"
  learner: {episodes_per_update: 3, hidden: [8]}
  trim:
    budget: null
    budget_range: [0.1, 0.4]
    budget_levels: 3
    retraining: {updates: 5, batch_size: 32, learning_rate: 0.01}
"""
)
QUICK = SearchSettings(
    trim=TrimSettings(retraining=RetrainSettings(updates=5, batch_size=32, learning_rate=0.01)),
    learner=LearnerSettings(episodes_per_update=4, hidden=[8]),
    max_evaluations=8,
    candidates=2,
    compare=False,
    latency_batches=(),
    noise_check="off",
)
NONE = RetrainSettings(updates=0)


@pytest.fixture(scope="module")
def task() -> PruningTask:
    return prepare_task(DEFAULT_TASK, seed=0)


@pytest.fixture(scope="module")
def trimmer(task: PruningTask) -> Trimmer:
    return Trimmer(task)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A search over three budgets, on the command line."""
    place = tmp_path_factory.mktemp("front")
    (place / "tiny.yaml").write_text(RANGED)
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(place / "cache"))
        patch.chdir(place)
        assert main(["search", "tiny.yaml", "--output", "run"]) == 0
        yield place / "run"
    torch.set_num_threads(threads)  # the configuration set it


@pytest.fixture(scope="module")
def agent(run: Path) -> TrainedAgent:
    folder = RunFolder.existing(run)
    config = resolve(stored_config(run / "config.yaml")[0])
    config = replace(config, task=replace(config.task, weights=str(folder.base)))
    trimmer = Trimmer(load_task(config, Progress()), config.search.trim.repair, config.search.trim.groups)
    return TrainedAgent.load(folder, trimmer, config.search)


@pytest.fixture
def sealed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SealedSplit, "open", lambda *_: pytest.fail("the test split was read"))


def accuracy(trimmer: Trimmer, network: nn.Module) -> float:
    """Return the share of right answers on the selection split, counted here."""
    right, selection = 0, trimmer.task.selection
    with torch.inference_mode():
        for images, labels in selection.batches(50):
            right += int(right_answers(network.eval()(images), labels, "accuracy").sum())
    return right / len(selection)


def heuristics_by_hand(trimmer: Trimmer, budget: float, unit: str = "macs") -> dict[str, float]:
    """Return each heuristic's accuracy on the selection split at a budget, from the methods that the package offers."""
    start = build(trimmer, uniform(trimmer, budget=budget, unit=unit, retraining=NONE))
    found = {"uniform": accuracy(trimmer, start.network)}
    for name in ("apoz", "taylor_2019", "l1"):
        made = rank_and_cut(trimmer, Goal(budget, unit), RankingSettings(), criterion=name, retraining=NONE)
        found[name] = accuracy(trimmer, made.network)
    return found


# ---- the pool --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("budget", "unit"), [(0.15, "macs"), (0.5, "params")])
def test_the_heuristics_plans_are_those_of_their_methods(trimmer: Trimmer, budget: float, unit: str) -> None:
    plans = heuristics_plans(trimmer, budget, unit)
    assert list(plans) == ["uniform", "apoz", "taylor_2019", "l1"]
    assert plans["uniform"] == uniform(trimmer, budget=budget, unit=unit, retraining=NONE).plan
    for name in ("apoz", "taylor_2019", "l1"):
        made = rank_and_cut(trimmer, Goal(budget, unit), RankingSettings(), criterion=name, retraining=NONE)
        assert plans[name] == made.schedule.plan


def test_a_criterion_that_the_network_cannot_serve_is_left_out(task: PruningTask) -> None:
    smooth = nn.Sequential(nn.Flatten(), nn.Linear(784, 12), nn.Tanh(), nn.Linear(12, 10))
    plans = heuristics_plans(Trimmer(replace(task, network=smooth)), 0.5, "macs")
    assert list(plans) == ["uniform", "taylor_2019", "l1"]


def test_a_search_takes_the_best_of_the_pool(task: PruningTask) -> None:
    result = search(task, settings=QUICK, seed=1)
    trimmer = Trimmer(task, result.schedule.repair)
    expected = heuristics_by_hand(trimmer, 0.3)
    assert {one.made_by: one.selection.accuracy for one in result.rivals} == pytest.approx(expected)
    own = max(score.accuracy for _, score in result.candidates)
    bare = replace(result.schedule, rounds=tuple(replace(entry, retrain_updates=0) for entry in result.schedule.rounds))
    taken = accuracy(trimmer, build(trimmer, bare).network)
    assert taken == pytest.approx(max(own, *expected.values()))
    assert (result.schedule.made_by == "agent") == (own >= max(expected.values()))


@pytest.fixture(scope="module")
def misled(task: PruningTask) -> SearchResult:
    """A search that is paid for errors, so that a heuristic's plan is better than all of its own."""
    trim = replace(QUICK.trim, budget=0.12, reward=RewardSettings(weights={"gain_over_uniform": -1.0}))
    return search(task, settings=replace(QUICK, trim=trim, candidates=1))


def test_a_heuristics_plan_is_taken_where_it_is_better_and_named(misled: SearchResult) -> None:
    best = max(misled.rivals, key=lambda one: (one.selection.accuracy, -one.selection.loss))
    own = misled.candidates[0][1].accuracy
    assert own < best.selection.accuracy
    assert misled.schedule.made_by == best.made_by
    assert misled.schedule.plan == best.plans[-1]
    assert (misled.finalists[-1].name, misled.finalists[-1].label) == ("pool", f"pool: {best.label}")
    (line,) = choice_lines(misled)
    assert line.startswith(f"The plan that was built is {best.label}'s: ")
    assert f"the agent's best {100 * own:.2f} %" in line
    assert line in markdown(misled)
    written = results(misled)
    assert written["made_by"] == best.made_by
    assert {one["made_by"]: one["accuracy_selection_split"] for one in written["pool"]} == {
        one.made_by: one.selection.accuracy for one in misled.rivals
    }


def test_without_a_pool_the_agent_stands_alone(task: PruningTask) -> None:
    result = search(task, settings=replace(QUICK, pool=False, max_evaluations=3))
    assert (result.schedule.made_by, result.rivals, result.finalists[-1].name) == ("agent", [], "agent")


# ---- plans for a budget ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("budget", "ends", "levels", "own"),
    [
        (None, (0.1, 0.4), 5, 0.2),  # 0.1, 0.141, 0.2, 0.283, 0.4; the mean is sqrt(0.1 x 0.4) = 0.2
        (None, (0.1, 0.4), 2, 0.1),  # both are equally near
        (None, (0.25, 0.25), 4, 0.25),
        (0.3, (0.1, 0.4), 5, 0.3),
        (0.3, None, 5, 0.3),
    ],
)
def test_the_budget_of_a_runs_own_network(
    budget: float | None, ends: tuple[float, float] | None, levels: int, own: float
) -> None:
    trim = TrimSettings(budget=budget, budget_range=ends, budget_levels=levels)
    assert own_budget(trim) == pytest.approx(own)
    assert ends is None or budget is not None or own_budget(trim) in trim.budgets


def row(number: int, budget: float, accuracy: float, reward: float, kept: float) -> Evaluation:
    plans = ({"conv1": list(range(number))},)
    return Evaluation(number, number, 1, accuracy, 1.0, kept, 1, 1, reward, {"conv1": number}, plans, budget)


def test_rows_that_keep_to_a_budget() -> None:
    """Rewards are paid above the uniform plan of the same budget, so a small budget's may look better than they are."""
    rows = [
        row(1, 0.1, 0.80, 9.0, 0.09),
        row(2, 0.3, 0.90, 1.0, 0.29),
        row(3, 0.3, 0.92, 1.2, 0.30),
        row(4, 0.3, 0.70, -1.0, 0.28),
        row(5, 0.6, 0.99, 2.0, 0.55),
    ]
    assert [one.evaluation for one in rows_within(History(rows=rows), 0.3, 2)] == [3, 2]
    better = [*rows, row(6, 0.1, 0.95, 10.0, 0.1)]
    assert [one.evaluation for one in rows_within(History(rows=better), 0.3, 2)] == [3, 2, 6]
    assert [one.evaluation for one in rows_within(History(rows=rows), 0.2, 2)] == [1]
    assert rows_within(History(rows=rows), 0.05, 2) == []


def test_a_plan_is_reshaped_by_its_log_odds(trimmer: Trimmer) -> None:
    """A plan is made from scores that are log-odds up to one number, so another budget needs only another number."""
    scores = np.array([0.8, -0.6, 0.1])
    small, large = (solve_counts(trimmer.cost_model, scores, budget, "params") for budget in (0.3, 0.6))
    found = reshaped(trimmer, trimmer.plan(small), 0.6, "params")
    assert trimmer.cost_model.share(found.counts, "params") <= 0.6
    widths = trimmer.cost_model.widths
    assert np.abs(np.array(list(found.counts.values())) - large).max() <= 0.06 * widths.max()  # shares were rounded
    orders = trimmer.pristine.orders
    assert all(set(keep) == set(orders[name][: len(keep)].tolist()) for name, keep in found.items())
    with pytest.raises(UserError, match="budget must be reachable"):
        reshaped(trimmer, trimmer.plan(small), 1e-5, "params")


def test_a_saved_policy_repeats_what_it_played_last(agent: TrainedAgent) -> None:
    """The last rows of the search are the policy's own, without noise, one for each budget."""
    last = agent.history.rows[-len(LEVELS) :]
    assert [one.budget for one in last] == pytest.approx(LEVELS)
    for one in last:
        assert one.budget is not None
        assert agent.plans(one.budget)[0][0].to_dict() == one.plans[-1]


def test_a_runs_own_network_is_the_best_at_the_middle_budget(run: Path, agent: TrainedAgent) -> None:
    written = json.loads((run / "results.json").read_text())
    assert (written["budget"], written["budget_range"]) == (pytest.approx(0.2), [0.1, 0.4])
    middle = agent.settings.trim.budgets[1]
    numbers = [one["evaluation"] for one in written["candidates"]]
    under = [
        one.evaluation for one in sorted(agent.history.rows, key=lambda one: -one.accuracy) if one.budget == middle
    ]
    assert agent.history.rows[numbers[0] - 1].accuracy == agent.history.rows[under[0] - 1].accuracy
    assert written["finalists"][-1]["macs_kept"] <= middle
    assert "the network built here keeps 0.2." in (run / "report.md").read_text()


@pytest.mark.parametrize("budget", [0.06, 0.14, 0.4, 0.7])
def test_plans_for_any_budget_keep_to_it(agent: TrainedAgent, budget: float) -> None:
    plans = agent.plans(budget)
    assert len(set(plans)) == len(plans) >= 2
    assert all(agent.trimmer.cost_model.share(each[-1].counts, "macs") <= budget for each in plans)
    outside = not 0.1 <= budget <= 0.4
    assert (f"at {budget:g} its own plans are guesses" in agent.outside(budget)) == outside


@pytest.mark.usefixtures("sealed")
def test_apply_builds_the_best_plan_for_a_budget_to_the_bit(
    run: Path, agent: TrainedAgent, capsys: pytest.CaptureFixture[str]
) -> None:
    for place in ("one", "two"):
        torch.manual_seed(len(place))  # neither global random state may matter
        assert main(["apply", str(run), "--budget", "0.3", "--output", place]) == 0
    one, two = (load_file(f"{place}/pruned.safetensors") for place in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    schedule = Schedule.load("one/schedule.json")
    candidates = candidates_at(agent, 0.3)
    best = best_of(candidates)
    assert (schedule.plan, schedule.made_by, schedule.retrain_updates) == (best.plans[-1], best.made_by, 5)
    assert best.selection.accuracy >= max(heuristics_by_hand(agent.trimmer, 0.3).values())
    assert f"Taken: a plan by {best.label};" in capsys.readouterr().out
    assert main(["apply", "one", "--output", "three"]) == 0  # what was made is a run of its own
    three = load_file("three/pruned.safetensors")
    assert all(torch.equal(one[name], three[name]) for name in one)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["apply", "run", "--budget", "0.3", "--schedule", "x.json"], "got --schedule and --budget; give one of them"),
        (["apply", "run", "--budget", "1.5"], "budget must be in (0, 1], but got budget=1.5"),
        (["apply", "run", "--budget", "0.00001"], "budget must be reachable"),
        (["pareto", "run", "--budgets", "0.2", "0.00001"], "budget must be reachable"),
        (["pareto", "run", "--budgets", "0.2", "0.2"], "must differ within 4 decimals"),
        (["pareto", "run", "--retrain_updates", "-1"], "retrain_updates must be at least 0"),
    ],
)
def test_mistakes(options: list[str], words: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(options) == 2
    assert words in capsys.readouterr().err
    assert not list(Path().glob("runs/*"))


def test_a_folder_without_an_agent(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("schedule.json", "config.yaml"):
        (tmp_path / name).write_text((run / name).read_text())
    for command in (["apply", str(tmp_path), "--budget", "0.2"], ["pareto", str(tmp_path)]):
        assert main(command) == 2
        assert "an agent is read from policy.zip, but" in capsys.readouterr().err


def test_a_policy_of_another_learner(run: Path, agent: TrainedAgent) -> None:
    wide = replace(agent.settings, learner=replace(agent.settings.learner, hidden=[9]))
    with pytest.raises(UserError, match=r"policy\.zip must hold the policy that .*config\.yaml describes"):
        TrainedAgent.load(RunFolder.existing(run), agent.trimmer, wide)


def test_an_agent_that_learns_step_by_step(task: PruningTask, tmp_path: Path) -> None:
    """DDPG, two rounds with training in between: its own plans come from an episode that is played for real."""
    learner = LearnerSettings(algorithm="DDPG", warmup_episodes=1, hidden=[8], episodes_per_update=2)
    settings = replace(QUICK, trim=replace(QUICK.trim, rounds=2, retrain_updates=1), learner=learner)
    folder = RunFolder.create(tmp_path / "run")
    result = search(task, settings=settings, run_folder=folder)
    loaded = TrainedAgent.load(folder, Trimmer(task, result.settings.trim.repair), result.settings)
    own = loaded.plans(0.3)[0]
    assert [plan.to_dict() for plan in own] == list(result.history.finished[-1].plans)
    assert all(loaded.trimmer.cost_model.share(each[-1].counts, "macs") <= 0.2 for each in loaded.plans(0.2))


# ---- the front -------------------------------------------------------------------------------------------------------
@pytest.mark.usefixtures("sealed")
def test_the_front_never_falls_and_is_never_below_the_heuristics(agent: TrainedAgent) -> None:
    front = find_front(agent)
    assert [point.budget for point in front.points] == pytest.approx(LEVELS)
    reached: dict[str, float] = {}
    for point in front.points:
        by_hand = heuristics_by_hand(agent.trimmer, point.budget)
        reached = {name: max(figure, reached.get(name, 0.0)) for name, figure in by_hand.items()}
        assert {name: point.makers[name].selection.accuracy for name in reached} == pytest.approx(reached)
        own = point.makers["agent"].selection.accuracy
        assert point.taken.selection.accuracy == pytest.approx(max(own, *reached.values()))
        assert point.kept <= point.budget
        assert point.taken.budget is not None
        assert point.taken.budget <= point.budget
    figures = [point.taken.selection.accuracy for point in front.points]
    assert figures == sorted(figures)
    assert front.original.accuracy == pytest.approx(accuracy(agent.trimmer, agent.trimmer.task.network))
    again = find_front(agent)
    assert table_rows(again) == table_rows(front)


@pytest.mark.usefixtures("sealed")
def test_pareto_on_the_command_line(run: Path, agent: TrainedAgent, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--budgets", "0.35", "0.12", "--retrain_updates", "4"]
    assert main(["pareto", str(run), *options, "--output", "front"]) == 0
    said = capsys.readouterr().out
    assert "The test split was not read." in said
    assert "…" not in said  # no figure is cut off
    written = json.loads(Path("front/pareto.json").read_text())
    assert [point["budget"] for point in written["points"]] == [0.12, 0.35]
    assert 1000 < Path("front/pareto.png").stat().st_size < 200_000
    for point in written["points"]:
        schedule = Schedule.load(f"front/{point['schedule']}")
        assert schedule.retrain_updates == 4
        assert (schedule.plan.counts, schedule.made_by) == (point["widths"], point["made_by"])
        built = build(agent.trimmer, schedule)
        assert point["retrained"]["front"] == pytest.approx(accuracy(agent.trimmer, built.network))
        judged = judge(agent.trimmer, agent.settings.trim, (schedule.plan,), "")
        assert point["accuracy"] == judged.selection.accuracy
        start = uniform(agent.trimmer, budget=point["budget"], unit="macs", retraining=NONE)
        assert point["makers"]["uniform"] >= accuracy(agent.trimmer, build(agent.trimmer, start).network) - 1e-9
        assert math.isfinite(point["retrained"]["uniform"])
    chosen = written["points"][0]
    assert main(["apply", str(run), "--schedule", f"front/{chosen['schedule']}", "--output", "chosen"]) == 0
    assert Schedule.load("chosen/schedule.json").plan.counts == chosen["widths"]
    assert f"selection accuracy {100 * chosen['retrained']['front']:.2f} %" in capsys.readouterr().out
    assert main(["pareto", "chosen"]) == 2  # what `apply` made holds no agent
