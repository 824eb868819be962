"""The benchmarks of transfer and of rounds: their plans against episodes played by hand, their costs counted anew."""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prunegym.agent.cli import main
from prunegym.agent.configuration import read_config, stored_config
from prunegym.agent.loading import load_task
from prunegym.agent.progress import Progress
from prunegym.agent.run_folder import RunFolder
from prunegym.agent.settings import SearchConfig
from prunegym.envs import TrimEnv
from prunegym.pruning import PruningPlan, PruningTask, Score, Trimmer, UserError
from prunegym.pruning.heuristics import uniform
from prunegym.pruning.schedule import Round, build
from stable_baselines3 import PPO
from toys import benchmark

CONFIG = """\
name: tiny
threads: 1
task:
  network: lenet_small
  data: digits
  splits: {reward: 200, selection: 150, test: 0.25}
  training: {updates: 30, batch_size: 64, learning_rate: 0.05, schedule: one_cycle}
search:
  max_evaluations: 4
  learner: {episodes_per_update: 2, hidden: [8, 8], imagination: {updates: 1, walks: 4, proposals: 8}}
  pool: false
  compare: false
  noise_check: "off"
  latency_batches: []
  trim:
    budget: 0.2
    budget_unit: params
    retraining: {updates: 2, batch_size: 32}
    repair: {calibration_images: 64}
"""
OTHER = "--task.network lenet300_100"
BUDGETS = (0.2, 0.3)
PARAMS = (8 * 25 + 8) + (16 * 8 * 25 + 16) + (64 * 16 * 16 + 64) + (10 * 64 + 10)  # of lenet_small, 8-16-64


TRANSFER = benchmark("transfer")
ROUNDS = benchmark("rounds")


@pytest.fixture(scope="module", autouse=True)
def _alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="module")
def run(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A finished search whose policy has other weights than it learned: it keeps more of later groups."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    assert main(["search", str(config_file), "--output", str(folder)]) == 0
    policy: Any = PPO.load(folder / "policy.zip", device="cpu")
    with torch.no_grad():
        for weight in policy.policy.parameters():
            weight.normal_(0, 0.03, generator=torch.Generator().manual_seed(weight.numel()))
        first, second = policy.policy.mlp_extractor.policy_net[0], policy.policy.mlp_extractor.policy_net[2]
        first.weight[0, 0], first.bias[0] = 4.0, -2.0  # of the position in the walk, from 0 to 1
        second.weight[0, 0], policy.policy.action_net.weight[0, 0] = 2.0, 0.6
    policy.save(folder / "policy.zip")
    return RunFolder.existing(folder)


@pytest.fixture(scope="module")
def target(config_file: Path) -> tuple[SearchConfig, PruningTask]:
    config = read_config([str(config_file), *OTHER.split()])
    return config, load_task(config, Progress())


@pytest.fixture(scope="module")
def task(config_file: Path) -> PruningTask:
    return load_task(read_config([str(config_file)]), Progress())


def played_by_hand(policy: Any, environment: TrimEnv) -> dict[str, Any]:
    observation, _ = environment.reset()
    ended, info = False, {}
    while not ended:
        action, _ = policy.predict(observation, deterministic=True)
        observation, _, ended, _, info = environment.step(action)
    return info


# ---- transfer --------------------------------------------------------------------------------------------------------
def test_a_transferred_plan_is_what_the_policy_does_in_the_targets_environment(
    run: RunFolder, target: tuple[SearchConfig, PruningTask]
) -> None:
    config, task = target
    source, _ = stored_config(run.path / "config.yaml")
    options = argparse.Namespace(budgets=list(BUDGETS), random=3, seed=0, retrain_updates=0)
    found = TRANSFER.measured(run, source, config, options)
    policy = PPO.load(run.path / "policy.zip", device="cpu")
    trimmer = Trimmer(task, config.search.trim.repair)
    for cell, budget in zip(found.cells, BUDGETS, strict=True):
        info = played_by_hand(policy, TrimEnv(task, replace(config.search.trim, budget=budget), trimmer=trimmer))
        made = trimmer.trim(PruningPlan.from_dict(info["plan"]))
        assert cell.cut[0].name == "transferred"
        assert cell.cut[0].cost.params == info["params"]
        assert cell.cut[0].selection.accuracy == trimmer.score_selection(made.network).accuracy
        assert cell.kept["transferred"] == pytest.approx(info["kept"])
        assert cell.kept["transferred"] <= budget
        schedule = uniform(trimmer, budget=budget, unit="params", retraining=config.search.trim.retraining)
        straight, own = schedule.plan.counts, made.plan.counts
        expected = np.mean([abs(own[group.name] - straight[group.name]) / group.width for group in trimmer.groups])
        assert cell.distance["transferred"] == pytest.approx(expected)
        assert expected > 0.02
        assert cell.distance["uniform"] == 0


def test_random_search_takes_the_plan_that_the_environment_pays_best(target: tuple[SearchConfig, PruningTask]) -> None:
    config, task = target
    trim = replace(config.search.trim, budget=0.2)
    trimmer = Trimmer(task, trim.repair)
    environment = TrimEnv(task, trim, trimmer=trimmer)
    best, accuracies = TRANSFER.random_search(trimmer, trim, environment.uniform(0.2), 4, seed=3)
    actions = np.random.default_rng(3).uniform(-1.0, 1.0, (40, 2))[:4].astype(np.float32)
    paid = []
    for episode in actions:
        environment.reset()
        for action in episode:
            _, reward, _, _, info = environment.step(action[None])
        paid.append((reward, -info["loss"], info["plan"]))
    assert len(accuracies) == 4
    assert best.plan.to_dict() == max(paid, key=lambda entry: entry[:2])[2]


def test_a_policy_of_other_actions_is_refused(run: RunFolder, target: tuple[SearchConfig, PruningTask]) -> None:
    source, _ = stored_config(run.path / "config.yaml")
    ratio = replace(source.search, trim=replace(source.search.trim, action="ratio"))
    with pytest.raises(UserError, match="action 'score' and one round, but got 'ratio' and 1; name another run"):
        TRANSFER.borrowed(ratio, target[0].search, 0.2)


def test_the_page_of_transfer_names_what_was_measured(
    run: RunFolder, config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "transfer.md"
    words = [str(run.path), f"{config_file} {OTHER}", "--budgets", "0.2", "0.3", "--random", "3",
             "--retrain_updates", "3", "--table", str(table)]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["transfer.py", *words])
    assert TRANSFER.main() == 0
    text = table.read_text()
    assert "# A policy of lenet_small on digits, applied to other networks" in text
    assert "trained for 20% of the params with 4 evaluations" in text
    assert "| plan | networks scored | 20% | 30% † |" in text
    assert "### After 3 updates" in text
    for name in ("transferred policy", "uniform", "APoZ", "Taylor 2019", "L1", "random search, best by reward"):
        assert f"\n| {name} |" in text
    counts = [int(word) for word in text.split("the transferred policy is better in ")[1].split() if word.isdigit()]
    assert counts[0] <= 10  # five rivals at two budgets
    assert " of 10 pairs" in text


# ---- rounds ----------------------------------------------------------------------------------------------------------
WAYS = ROUNDS.ways_of(2, 2, 3)


@pytest.fixture(scope="module")
def outcomes(config_file: Path, task: PruningTask) -> dict[str, Any]:
    search = read_config([str(config_file)]).search
    return {way.name: ROUNDS.played(way, task, search, seed=1, evaluations=4) for way in WAYS}


def test_every_way_costs_the_same(outcomes: dict[str, Any]) -> None:
    for way in WAYS:
        outcome = outcomes[way.name]
        assert outcome.finished.updates_taken == way.updates == 7
        assert [len(outcome.finished.rounds), outcome.finished.rounds[0].updates_taken] == [
            way.rounds, way.inside if way.rounds > 1 else 7,
        ]  # fmt: skip
        assert outcome.evaluations in ((3, 4) if way.searched else (0,))  # the policy's own plan may be known already
        assert outcome.finished.cost.params <= 0.2 * PARAMS
    assert outcomes["rounds"].evaluations == 4
    assert outcomes["rounds"].updates == 4 * 2  # two networks of each episode, two updates each
    trained = outcomes["trained"]  # a repeat is not trained again, nor is the uniform plan that rewards refer to
    assert trained.updates in (4 * trained.evaluations, 4 * (trained.evaluations - 1))
    assert outcomes["cut"].updates == outcomes["planned"].updates == 0


def test_what_won_scores_again_what_the_search_saw(config_file: Path, task: PruningTask, outcomes: Any) -> None:
    search = read_config([str(config_file)]).search
    for way in WAYS[:3]:
        settings = ROUNDS.settings_of(way, search, 1, 4, len(task.train))
        schedule = outcomes[way.name].finished.schedule
        inside = tuple(Round(entry.plan, way.inside) for entry in schedule.rounds)
        again = build(Trimmer(task, settings.trim.repair), replace(schedule, rounds=inside), verify=False)
        assert again.rounds[-1].after_retraining.accuracy == outcomes[way.name].seen


def test_uniform_rounds_are_those_that_rewards_refer_to(config_file: Path, task: PruningTask) -> None:
    search = read_config([str(config_file)]).search
    for way in (WAYS[4], WAYS[5]):
        settings = ROUNDS.settings_of(way, search, 1, 4, len(task.train))
        trimmer = Trimmer(task, settings.trim.repair)
        environment = TrimEnv(task, settings.trim, trimmer=trimmer)
        plans, seen = ROUNDS.uniform_rounds(environment)
        assert seen == environment.uniform(0.2).score.accuracy
        assert len(plans) == way.rounds
        share = trimmer.cost_model.share(plans[0].counts, "params")
        assert 0.9 * 0.2 ** (1 / way.rounds) < share <= 0.2 ** (1 / way.rounds)


def test_differences_are_paired_by_seed(outcomes: dict[str, Any]) -> None:
    base = outcomes["uniform"]

    def outcome(selection: float, test: float) -> Any:
        return replace(base, finished=replace(base.finished, selection=Score(selection, 0.1, 100), test=test))

    first = [outcome(0.80 + 0.01 * seed, 0.7) for seed in range(5)]
    second = [outcome(0.79 + 0.01 * seed, 0.7) for seed in range(5)]
    selection, test = ROUNDS.intervals(first, second)
    assert [selection.mean, selection.low, selection.high] == pytest.approx([1.0, 1.0, 1.0])
    assert selection.verdict == "better"
    assert [test.mean, test.verdict] == [0.0, "not distinguishable"]
    lines = ROUNDS.said(WAYS[0], [(WAYS[1], selection, test)])
    assert lines[0].endswith(f"is better than **{WAYS[1].label}** on the selection split.")


def test_the_test_split_is_read_once_for_all_rounds(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, tasks = tmp_path / "rounds.md", []

    def load(*arguments: Any) -> PruningTask:
        tasks.append(load_task(*arguments))
        return tasks[-1]

    monkeypatch.setattr(ROUNDS, "load_task", load)
    monkeypatch.setattr(ROUNDS, "ways_of", lambda *numbers: [WAYS[0], WAYS[5]])
    words = [str(config_file), "--evaluations", "2", "--seeds", "2", "--table", str(table), "--budget", "0.1"]
    monkeypatch.setattr(sys, "argv", ["rounds.py", *words])
    assert ROUNDS.main() == 0
    assert len(tasks[0].test.readings) == 1
    text = table.read_text()
    assert "10.0% of the params" in text
    assert "| agent, 2 rounds | 2 × 2 + 3 | 2 | 4 |" in text
    assert "too few seeds" in text


def test_a_comparison_of_rounds_needs_rounds(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["rounds.py", str(config_file), "--rounds", "1"])
    with pytest.raises(UserError, match=r"rounds must be at least 2, .* but got 1, 20, 60 and 120"):
        ROUNDS.main()
