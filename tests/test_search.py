"""The search: reproducible to the bit, honest with the test split, within its limits, and better than chance."""

import csv
import itertools
import json
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prunegym.agent import LearnerSettings, SearchResult, SearchSettings, search
from prunegym.agent.finalists import Finalist, compare_pair
from prunegym.agent.history import COLUMNS, History
from prunegym.agent.learner import make_learner, noise_setter
from prunegym.agent.randomness import derive_seed
from prunegym.agent.report import headers, markdown, table_rows, training_lines
from prunegym.agent.run_folder import RunFolder, results
from prunegym.agent.settings import MethodSettings
from prunegym.agent.workers import make_environments
from prunegym.envs import RewardSettings, TrimEnv, TrimSettings
from prunegym.envs.default_task import DEFAULT_TASK
from prunegym.pruning import (
    PruningTask,
    Schedule,
    Score,
    Trimmer,
    UserError,
    build,
    load_data,
    prepare_task,
    retraining,
)
from prunegym.pruning.artifact import load_pruned
from prunegym.pruning.heuristics import NetworkTrimmingSettings
from prunegym.pruning.retraining import RetrainResult, RetrainSettings
from prunegym.pruning.splits import SealedSplit
from scipy.stats import binomtest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

GROUPS = 3
QUICK = SearchSettings(
    trim=TrimSettings(retraining=RetrainSettings(updates=10, batch_size=32, learning_rate=0.01)),
    learner=LearnerSettings(episodes_per_update=6, hidden=[8]),
    methods=MethodSettings(NetworkTrimmingSettings(max_rounds=2)),
    max_evaluations=24,
    candidates=2,
    pool=False,
    noise_check="off",
)


def fresh_task() -> PruningTask:
    """Return the digits task with a test split that nobody has opened (its weights come from the cache)."""
    return prepare_task(DEFAULT_TASK, seed=0)


@pytest.fixture(scope="module")
def task() -> PruningTask:
    return fresh_task()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[SearchResult, Path]:
    """One search with a run folder, seed 1."""
    folder = RunFolder.create(tmp_path_factory.mktemp("search") / "run")
    return search(fresh_task(), settings=QUICK, seed=1, run_folder=folder), folder.path


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


# ---- reproducible ----------------------------------------------------------------------------------------------------
def test_the_same_seed_gives_the_same_bits(run: tuple[SearchResult, Path]) -> None:
    torch.manual_seed(77)  # neither global random state may matter
    np.random.seed(77)  # noqa: NPY002
    again = search(fresh_task(), settings=QUICK, seed=1)
    first = run[0]
    assert again.history.rows == first.history.rows
    assert again.schedule == first.schedule
    for one, other in zip(again.finalists, first.finalists, strict=True):
        assert same_weights(one.network, other.network)
        assert (one.name, one.test, one.selection) == (other.name, other.test, other.selection)
    policies = again.policy.policy.state_dict(), first.policy.policy.state_dict()
    assert all(torch.equal(policies[0][name], value) for name, value in policies[1].items())


def test_another_seed_searches_elsewhere(run: tuple[SearchResult, Path], task: PruningTask) -> None:
    other = search(task, settings=replace(QUICK, compare=False, max_evaluations=7), seed=2)
    assert [row.widths for row in other.history.rows] != [row.widths for row in run[0].history.rows[:7]]


def test_purposes_never_share_a_seed() -> None:
    seeds = {derive_seed(root, purpose) for root in range(50) for purpose in ("task", "repair", "learner")}
    assert len(seeds) == 150
    assert all(0 <= seed < 2**31 for seed in seeds)


# ---- honest ----------------------------------------------------------------------------------------------------------
def test_the_test_split_is_read_once_after_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    task, events = fresh_task(), []
    train, select, look = Trimmer.trim, Trimmer.score_selection, SealedSplit.open

    def trim(self: Trimmer, *arguments: Any, **keywords: Any) -> Any:
        events.append("trim")
        return train(self, *arguments, **keywords)

    def score_selection(self: Trimmer, network: nn.Module) -> Score:
        events.append("selection")
        return select(self, network)

    def opened(self: SealedSplit, reason: str) -> Any:
        events.append("test")
        return look(self, reason)

    monkeypatch.setattr(Trimmer, "trim", trim)
    monkeypatch.setattr(Trimmer, "score_selection", score_selection)
    monkeypatch.setattr(SealedSplit, "open", opened)
    result = search(task, settings=QUICK, max_evaluations=6)
    assert len(task.test.readings) == 1
    assert events[-1] == "test"
    assert events.count("test") == 1
    assert events.count("selection") == 2 + len(result.finalists)  # the two candidates, and each finalist
    names = [finalist.name for finalist in result.finalists]
    assert names == ["original", "uniform", "network_trimming", "network_trimming_repaired", "agent"]
    assert all(name in task.test.readings[0] for name in names)


def test_test_accuracies_and_verdicts_by_hand(run: tuple[SearchResult, Path]) -> None:
    result = run[0]
    splits = load_data("digits", settings=DEFAULT_TASK.splits)  # read anew, not from the task
    batch = next(iter(splits.test.open("test").batches(len(splits.test))))
    right = {}
    for finalist in result.finalists:
        with torch.inference_mode():
            logits = finalist.network.eval()(batch.images)
        right[finalist.name] = (logits.argmax(1) == batch.labels).numpy()
        assert finalist.test == pytest.approx(right[finalist.name].mean())
    assert [verdict.second for verdict in result.verdicts] == list(right)[1:-1]
    for verdict in result.verdicts:
        gained = int((right["agent"] & ~right[verdict.second]).sum())
        lost = int((right[verdict.second] & ~right["agent"]).sum())
        assert (verdict.only_first, verdict.only_second) == (gained, lost)
        assert verdict.points == pytest.approx(100 * (gained - lost) / len(batch.labels))
        assert verdict.p_value == pytest.approx(binomtest(gained, gained + lost).pvalue if gained + lost else 1.0)


@pytest.mark.parametrize(
    ("gained", "lost", "outcome"), [(20, 2, "better"), (2, 20, "worse"), (7, 5, "not distinguishable"), (0, 0, None)]
)
def test_a_verdict(gained: int, lost: int, outcome: str | None) -> None:
    right = np.ones((2, 100), dtype=bool)
    right[1, :gained] = False
    right[0, gained : gained + lost] = False
    one, other = (
        Finalist(name, name, nn.Identity(), None, None, (), None, right=row)  # type: ignore[arg-type]
        for name, row in zip("ab", right, strict=True)
    )
    verdict = compare_pair(one, other)
    assert verdict.outcome == (outcome or "not distinguishable")
    assert verdict.points == pytest.approx(gained - lost)


def test_all_are_compared_at_the_same_budget_and_retraining(run: tuple[SearchResult, Path]) -> None:
    result = run[0]
    whole = result.finalists[0].cost.macs
    for finalist in result.finalists[1:]:
        assert finalist.schedule is not None
        assert finalist.cost.macs <= 0.3 * whole
        assert finalist.schedule.retrain_updates == 10
        assert finalist.cost.params == sum(parameter.numel() for parameter in finalist.network.parameters())


def test_the_winner_is_the_best_candidate_on_the_selection_split(run: tuple[SearchResult, Path]) -> None:
    result = run[0]
    assert [row for row, _ in result.candidates] == result.history.ranked()[:2]
    ordered = sorted(result.history.rows, key=lambda row: (-(row.reward or 0), row.loss))
    assert result.candidates[0][0].evaluation == ordered[0].evaluation
    best = max(result.candidates, key=lambda pair: (pair[1].accuracy, -pair[1].loss))[0]
    assert result.schedule.plan.to_dict() == best.plans[-1]
    assert same_weights(build(Trimmer(fresh_task(), result.schedule.repair), result.schedule).network, result.network)


IMPATIENT = RetrainSettings(updates=60, batch_size=32, learning_rate=0.3, clip_norm=0.5, check_every=2, patience=1)


def test_the_report_counts_the_updates_that_were_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patience ends trainings at different steps; each step is counted where it is taken."""
    taken: list[int] = []
    step = retraining._update
    monkeypatch.setattr(retraining, "_update", lambda *arguments: (taken.append(1), step(*arguments))[1])
    result = search(fresh_task(), settings=replace(QUICK, trim=replace(QUICK.trim, retraining=IMPATIENT)), seed=4)
    pruned = result.finalists[1:]
    assert sum(finalist.updates_taken for finalist in pruned) == len(taken) < 60 * len(pruned)
    assert len({finalist.updates_taken for finalist in pruned}) > 1
    rows = {row[0]: row for row in table_rows(result)}
    text, written = markdown(result), results(result)
    assert "same number of retraining updates (column" not in text
    assert "did not take the same number of retraining updates, though all were allowed 60" in text
    for finalist, entry in zip(pruned, written["finalists"][1:], strict=True):
        column = headers(result).index("retraining")
        assert rows[finalist.label][column] == str(finalist.updates_taken)
        assert (entry["retrain_updates"], entry["retrain_updates_asked"]) == (finalist.updates_taken, 60)
        last = finalist.rounds[-1].training
        assert last is not None
        assert entry["rounds"][-1]["best_update"] == last.best_update
        assert entry["rounds"][-1]["best_accuracy_selection_split"] == finalist.selection.accuracy
        kept = f"the weights of update {last.best_update} were kept ({100 * finalist.selection.accuracy:.2f} % on the"
        said = [line for line in training_lines(result) if line.startswith(finalist.label) and kept in line]
        whole = last.best_update == finalist.rounds[-1].retrain_updates
        assert len(said) == (0 if whole else 1)
        assert all(line in text for line in said)
        if finalist.rounds[-1].stopped_early:
            assert f"stopped early, after {last.updates} of {finalist.rounds[-1].retrain_updates} updates" in said[0]
    assert same_weights(build(Trimmer(fresh_task(), result.schedule.repair), result.schedule).network, result.network)


def test_the_same_number_is_claimed_where_it_is_true(run: tuple[SearchResult, Path]) -> None:
    assert "- Every pruned network got the same number of retraining updates (column *retraining*), on" in markdown(
        run[0]
    )
    assert training_lines(run[0]) == []


def test_a_divergence_is_told_with_all_its_updates(run: tuple[SearchResult, Path]) -> None:
    """Asked for 10 updates at rate 0.01; 3 were lost to a divergence before 10 at a quarter of the rate."""
    agent = run[0].finalists[-1]
    done = replace(agent.rounds[-1], training=RetrainResult(13, 0.5, 0.0025, best_update=10))
    told = replace(run[0], finalists=[*run[0].finalists[:-1], replace(agent, rounds=(done,))])
    assert training_lines(told) == [
        "agent: training diverged and began again at the learning rate 0.0025, 13 updates in all where 10 were asked "
        "for; the weights of update 10 were kept."
    ]
    assert "did not take the same number of retraining updates, though all were allowed 10;" in markdown(told)


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"working_directory": 5}', '{"working_directory": "absent"}', "[" * 9999]
)
def test_a_run_that_does_not_say_where_it_started(text: str, tmp_path: Path) -> None:
    assert RunFolder(tmp_path).started_in is None
    (tmp_path / "versions.json").write_text(text)
    assert RunFolder(tmp_path).started_in is None


def test_candidates_are_what_the_search_scored(task: PruningTask, monkeypatch: pytest.MonkeyPatch) -> None:
    """With training inside the episode and checks for the final one: a candidate's training is not scored either."""
    seen: list[tuple[float, float]] = []
    inner = build

    def recording(trimmer: Trimmer, schedule: Schedule, **keywords: Any) -> Any:
        built = inner(trimmer, schedule, **keywords)
        seen.append((built.rounds[-1].after_retraining.accuracy, built.rounds[-1].after_retraining.loss))
        return built

    monkeypatch.setattr("prunegym.agent.pool.build", recording)
    trim = replace(QUICK.trim, rounds=2, retrain_updates=4, retraining=IMPATIENT)
    result = search(task, settings=replace(QUICK, trim=trim, compare=False, max_evaluations=8))
    assert seen[:2] == [(row.accuracy, row.loss) for row, _ in result.candidates]
    assert same_weights(inner(Trimmer(task, result.schedule.repair), result.schedule).network, result.network)


# ---- limits ----------------------------------------------------------------------------------------------------------
def test_the_evaluations_are_counted(run: tuple[SearchResult, Path]) -> None:
    rows = run[0].history.rows
    assert [row.evaluation for row in rows] == list(range(1, 25))
    assert run[0].stopped_by == "max_evaluations"
    assert all(row.kept <= 0.3 for row in rows)
    assert all(row.reward == pytest.approx(10 * (row.accuracy - run[0].reference_accuracy)) for row in rows)


@pytest.mark.parametrize(("limit", "rounds"), [(1, 1), (2, 1), (5, 1), (9, 1), (7, 2), (8, 2)])
def test_never_more_evaluations_than_allowed(limit: int, rounds: int, task: PruningTask) -> None:
    settings = replace(QUICK, compare=False, trim=replace(QUICK.trim, rounds=rounds), max_evaluations=limit)
    result = search(task, settings=settings)
    rows = result.history.rows
    assert len(result.history.finished) == limit // rounds
    assert len(result.schedule.rounds) == rounds
    assert len(rows) <= limit
    if limit % rounds:
        return  # the last episode with noise may be left unfinished
    assert [row.round for row in rows] == [1 + place % rounds for place in range(len(rows))]
    assert [row.reward is not None for row in rows] == [(place + 1) % rounds == 0 for place in range(len(rows))]
    assert [row.episode for row in rows] == [1 + place // rounds for place in range(len(rows))]


def test_minutes_end_the_search(task: PruningTask) -> None:
    result = search(task, settings=replace(QUICK, compare=False, max_evaluations=5000, max_minutes=0.01))
    assert result.stopped_by == "max_minutes"
    assert 0 < len(result.history.rows) < 500


def test_the_last_evaluation_is_the_policy_without_noise(run: tuple[SearchResult, Path]) -> None:
    result = run[0]
    env = TrimEnv(fresh_task(), result.settings.trim)
    observation, _ = env.reset()
    for _ in range(GROUPS):
        action, _ = result.policy.predict(observation, deterministic=True)
        observation, reward, _, _, info = env.step(action)
    assert info["plan"] == result.history.rows[-1].plans[-1]
    assert reward == pytest.approx(result.history.rows[-1].reward)


# ---- learners --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("algorithm", ["A2C", "SAC", "TRPO", "RecurrentPPO"])
def test_other_algorithms_by_name(algorithm: str, task: PruningTask) -> None:
    learner = replace(QUICK.learner, algorithm=algorithm, episodes_per_update=3)
    result = search(task, settings=replace(QUICK, learner=learner, compare=False, max_evaluations=8))
    assert type(result.policy).__name__ == algorithm
    assert len(result.history.rows) == 8
    assert result.finalists[-1].name == "agent"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (LearnerSettings(algorithm="POP"), "algorithm must be a known name, but got 'POP'; did you mean 'PPO'"),
        (LearnerSettings(algorithm="DQN"), "DQN must work with one continuous action"),
        (LearnerSettings(algorithm="MaskablePPO"), "MaskablePPO must work with one continuous action"),
        (LearnerSettings(arguments={"n_epoch": 3}), "got 'n_epoch'; did you mean 'n_epochs'"),
        (LearnerSettings(arguments={"policy": "CnnPolicy"}), "got 'policy'"),
    ],
)
def test_learners_that_cannot_work_are_refused(settings: LearnerSettings, message: str, task: PruningTask) -> None:
    with pytest.raises(UserError, match=message):
        search(task, settings=replace(QUICK, learner=settings))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LearnerSettings(workers=0), "workers and episodes_per_update must be at least 1"),
        (lambda: LearnerSettings(learning_rate=0), "learning_rate must be positive"),
        (lambda: SearchSettings(max_evaluations=0), "max_evaluations and candidates must be at least 1"),
        (lambda: SearchSettings(max_minutes=-1), "max_minutes at least 0"),
        (lambda: SearchSettings(max_minutes=np.nan), "max_minutes must be a finite number, but got nan"),
        (lambda: SearchSettings(seed=10**40), r"seed must be a whole number from 0 to 2\*\*63 - 1"),
        (lambda: SearchSettings(candidates=1.5), "candidates must be a whole number, but got 1.5"),  # type: ignore[arg-type]
        (lambda: LearnerSettings(noise_start=np.inf), "noise_start must be a finite number, but got inf"),
        (lambda: LearnerSettings(hidden=[8.5]), "hidden must be a list of whole numbers, but got"),  # type: ignore[list-item]
        (lambda: NetworkTrimmingSettings(sigmas=np.nan), "sigmas must be a finite number, but got nan"),
    ],
)
def test_impossible_settings(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"budget": 1e-4}, "smallest reachable budget"),
        ({"budget": 0.0}, r"budget must be in \(0, 1\], but got budget=0"),
        ({"budget_unit": "flops"}, "budget_unit must be one of macs, params"),
        ({"seed": -1}, "seed must be a whole number from 0"),
        ({"seed": 10**40}, r"seed must be a whole number from 0 to 2\*\*63 - 1, but got 1000"),
        ({"max_evaluations": 0}, "max_evaluations and candidates must be at least 1"),
        ({"retrain_updates": -1}, "updates >= 0"),
    ],
)
def test_impossible_requests_are_refused_before_any_work(
    keywords: dict[str, Any], message: str, task: PruningTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trimmer, "trim", lambda *_, **__: pytest.fail("a network was cut"))
    with pytest.raises(UserError, match=message):
        search(task, settings=QUICK, **keywords)


def test_the_noise_follows_its_schedule(task: PruningTask, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[float, float]] = []

    def recording(learner: Any, settings: LearnerSettings) -> Callable[[float], None]:
        inner = noise_setter(learner, settings)
        assert inner is not None

        def set_noise(spent: float) -> None:
            inner(spent)
            seen.append((spent, float(learner.policy.log_std.detach()[0])))

        return set_noise

    monkeypatch.setattr(History, "has_scored", lambda *_: False)  # repeats spend nothing, and would hold the noise up
    monkeypatch.setattr("prunegym.agent.learning.noise_setter", recording)
    learner = LearnerSettings(episodes_per_update=4, noise_start=-0.5, noise_end=-2.5, hidden=[8])
    result = search(task, settings=replace(QUICK, learner=learner, compare=False, max_evaluations=21))
    assert [spent for spent, _ in seen] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])  # 20 with noise, the last without
    assert [noise for _, noise in seen] == pytest.approx([-0.5, -0.9, -1.3, -1.7, -2.1])
    assert not result.policy.policy.log_std.requires_grad


def test_an_update_sees_whole_episodes(task: PruningTask) -> None:
    trim = replace(QUICK.trim, rounds=2)
    workers = make_environments(task, trim, Trimmer(task, trim.repair), workers=1, seed=0)
    settings = LearnerSettings(episodes_per_update=5)
    learner: Any = make_learner(settings, workers, steps_per_episode=2 * GROUPS, seed=0, log_folder=None)
    assert (learner.n_steps, learner.batch_size, learner.gamma, learner.gae_lambda) == (30, 30, 1.0, 1.0)
    assert learner.lr_schedule(1.0) == pytest.approx(2e-3)
    assert learner.lr_schedule(0.0) == pytest.approx(2e-4)


# ---- a landscape with a known optimum --------------------------------------------------------------------------------
def test_the_search_climbs_a_known_landscape(task: PruningTask, monkeypatch: pytest.MonkeyPatch) -> None:
    """Accuracy is replaced by a concave function of the widths; brute force knows the best under the budget."""
    ideal = {"conv1": 0.9, "conv2": 0.25, "fc1": 0.6}

    def landscape(shares: list[float]) -> float:
        return 1.0 - 0.5 * sum((share - best) ** 2 for share, best in zip(shares, ideal.values(), strict=True))

    def score(self: Trimmer, network: Any) -> Score:
        present = (network.conv1.out_channels / 8, network.conv2.out_channels / 16, network.fc1.out_features / 64)
        return Score(landscape(list(present)), 0.0, 100)

    monkeypatch.setattr(Trimmer, "score", score)
    model = Trimmer(task).cost_model
    best = max(
        landscape([first / 8, second / 16, hidden / 64])
        for first, second, hidden in itertools.product(range(1, 9), range(1, 17), range(1, 65))
        if model.share(np.array([first, second, hidden]), "macs") <= 0.3
    )
    env, rng = TrimEnv(task), np.random.default_rng(0)
    random = []
    for _ in range(60):
        env.reset()
        for action in rng.uniform(-1, 1, (3, 1)).astype(np.float32):
            info = env.step(action)[-1]
        random.append(info["accuracy"])
    result = search(task, settings=replace(QUICK, compare=False, learner=LearnerSettings(), max_evaluations=150))
    rows = result.history.rows
    found = max(row.accuracy for row in rows)
    assert found <= best
    assert best - found < 0.05 * (best - np.mean(random))
    own = rows[-1].accuracy  # of the policy without noise; what is tried before is new each time, good or not
    assert own > np.mean([row.accuracy for row in rows[:30]])
    assert best - own < 0.1 * (best - np.mean(random))


# ---- what is written -------------------------------------------------------------------------------------------------
FILES = {
    "command.txt", "config.yaml", "history.csv", "manifest.json", "plan.json", "policy.zip", "pruned.safetensors",
    "report.md", "results.json", "schedule.json", "seeds.json", "versions.json",
}  # fmt: skip


def test_save_writes_a_run_folder_and_refuses_a_full_one(run: tuple[SearchResult, Path], tmp_path: Path) -> None:
    result = run[0]
    folder = result.save(tmp_path / "saved")
    assert {path.name for path in folder.iterdir()} >= FILES
    assert same_weights(load_pruned(folder), result.network)
    assert Schedule.load(folder / "schedule.json") == result.schedule
    with zipfile.ZipFile(folder / "policy.zip") as archive:
        assert "policy.pth" in archive.namelist()
    with pytest.raises(UserError, match=r"needs an empty folder, but .*saved holds files"):
        result.save(folder)


def test_the_history_on_disk_is_the_history(run: tuple[SearchResult, Path]) -> None:
    result, folder = run
    with (folder / "history.csv").open() as file:
        table = list(csv.DictReader(file))
    assert tuple(table[0]) == COLUMNS
    assert len(table) == len(result.history.rows)
    best = -np.inf
    for line, row in zip(table, result.history.rows, strict=True):
        assert row.reward is not None
        best = max(best, row.reward)
        assert float(line["accuracy"]) == row.accuracy
        assert float(line["reward"]) == row.reward
        assert float(line["best_reward"]) == best
        assert [int(width) for width in line["widths"].split()] == list(row.widths.values())


def test_the_results_are_written(run: tuple[SearchResult, Path]) -> None:
    result, folder = run
    written = json.loads((folder / "results.json").read_text())
    distinct = {json.dumps(row.plans) for row in result.history.rows}
    assert (written["max_evaluations"], written["stopped_by"]) == (24, "max_evaluations")
    assert written["evaluations"] == len(distinct) <= 24
    assert written["test_split_readings"] == list(result.task.test.readings)
    assert len(written["test_split_readings"]) == 1
    assert [entry["accuracy_test_split"] for entry in written["finalists"]] == [f.test for f in result.finalists]
    assert written["finalists"][-1]["widths"] == result.plan.counts
    assert same_weights(load_pruned(folder), result.network)
    report = (folder / "report.md").read_text()
    assert all(finalist.label in report for finalist in result.finalists)
    assert all((folder / name).is_file() for name in report_pictures(report))
    versions = json.loads((folder / "versions.json").read_text())
    assert versions["torch"] == torch.__version__


def report_pictures(report: str) -> list[str]:
    names = [part.split(")")[0] for part in report.split("](")[1:]]
    pictures = [name for name in names if name.endswith((".png", ".svg"))]
    assert pictures
    return pictures


def test_tensorboard_shows_the_search(run: tuple[SearchResult, Path]) -> None:
    result, folder = run
    logs = sorted({path.parent for path in (folder / "tensorboard").rglob("events.out.*")})
    assert len(logs) == 1
    events = EventAccumulator(str(logs[0])).Reload()
    tags = set(events.Tags()["scalars"])
    assert tags >= {
        "prune/accuracy", "prune/kept", "prune/best_accuracy", "prune/best_reward", "prune/evaluations",
        "prune/term_gain_over_uniform",
    }  # fmt: skip
    counted = [event.value for event in events.Scalars("prune/evaluations")]
    assert counted == sorted(counted)
    assert counted[-1] in (23, 24)
    shown = [event.value for event in events.Scalars("prune/accuracy")]
    assert shown == pytest.approx([row.accuracy for row in result.history.rows])


def interrupt_after(calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the trim after `calls` raise KeyboardInterrupt, once."""
    count, inner = itertools.count(1), Trimmer.trim

    def trim(self: Trimmer, *arguments: Any, **keywords: Any) -> Any:
        if next(count) == calls:
            raise KeyboardInterrupt
        return inner(self, *arguments, **keywords)

    monkeypatch.setattr(Trimmer, "trim", trim)


def test_an_interrupted_search_builds_its_best_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_after(10, monkeypatch)
    folder = RunFolder.create(tmp_path / "run")
    result = search(fresh_task(), settings=replace(QUICK, compare=False), run_folder=folder)
    assert result.stopped_by == "interrupt"
    rows = result.history.rows
    assert len(rows) == 9  # the tenth cut did not happen; the first one was the uniform plan's, too
    candidates = [row.plans[-1] for row in result.history.ranked()[:2]]
    assert result.schedule.plan.to_dict() in candidates
    assert {path.name for path in folder.path.iterdir()} >= FILES
    assert json.loads((folder.path / "results.json").read_text())["stopped_by"] == "interrupt"
    assert len((folder.path / "history.csv").read_text().splitlines()) == 10
    assert same_weights(load_pruned(folder.path), result.network)


def test_an_interrupt_before_the_first_plan_builds_the_uniform_one(monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_after(1, monkeypatch)
    result = search(fresh_task(), settings=replace(QUICK, compare=False))
    assert (result.stopped_by, result.history.rows, result.candidates) == ("interrupt", [], [])
    assert result.finalists[-1].cost.macs <= 0.3 * result.finalists[0].cost.macs
    assert result.schedule.made_by == "uniform"


def test_a_search_without_a_budget(task: PruningTask) -> None:
    """Objective "accuracy_floor": the heuristics are then run to the size that the agent chose."""
    trim = replace(QUICK.trim, budget=None, action="ratio", reward=RewardSettings("accuracy_floor"))
    result = search(task, settings=replace(QUICK, trim=trim, max_evaluations=8))
    agent = result.finalists[-1].cost.macs
    assert [finalist.cost.macs <= agent for finalist in result.finalists[1:]] == [True] * 4
    assert result.reference_accuracy != result.reference_accuracy  # none
