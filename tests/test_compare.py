"""Comparisons at equal cost: figures worked out again by hand, interruptions that leave no trace, and losses told."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prunegym.agent import compare as compare_module
from prunegym.agent import compare_jobs
from prunegym.agent.cli import main
from prunegym.agent.compare import Comparison, Pair, compare
from prunegym.agent.compare_cell import Cell, Found, Ground
from prunegym.agent.compare_folder import begin
from prunegym.agent.compare_pictures import mean_course, pareto, write_pictures
from prunegym.agent.compare_report import markdown, pair_rows, reading, table_rows
from prunegym.agent.compare_run import best_so_far, run_agent, run_cell, winner
from prunegym.agent.compare_settings import (
    CompareConfig,
    CompareSettings,
    cell_digest,
    check_compare,
    read_compare,
    search_settings,
)
from prunegym.agent.configuration import shipped_configs
from prunegym.agent.history import History
from prunegym.agent.intervals import paired_interval
from prunegym.agent.loading import load_task
from prunegym.agent.planner import Planner
from prunegym.agent.progress import Progress
from prunegym.agent.resume import alone
from prunegym.agent.rows import Evaluation
from prunegym.pruning import UserError
from prunegym.pruning.artifact import load_pruned, save_pruned
from prunegym.pruning.budget import solve_counts
from prunegym.pruning.compensation import compensate
from prunegym.pruning.cost import Cost
from prunegym.pruning.plan import PruningPlan
from prunegym.pruning.splits import TensorSplit
from prunegym.pruning.surgery import apply_plan
from prunegym.pruning.task import PruningTask
from prunegym.pruning.trimmer import Trimmer
from torch import nn
from toys import tiny_task

TINY = (
    tiny_task(reward=100)
    + """search:
  candidates: 3
  learner: {episodes_per_update: 2, hidden: [8]}
  trim:
    retraining: {batch_size: 32, learning_rate: 0.01}
    repair: {calibration_images: 64}
compare:
  methods: [agent, uniform, apoz, random_search, cem]
  seeds: [0, 1]
  budgets: [0.4, 0.6]
  evaluations: 4
  retrain_updates: 3
  resamples: 200
"""
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the configuration, where the network's weights are kept between runs, too."""
    folder = tmp_path_factory.mktemp("compare")
    (folder / "tiny.yaml").write_text(TINY)
    return folder


@pytest.fixture(autouse=True)
def _there(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(base / "cache"))
    monkeypatch.chdir(base)


@pytest.fixture(scope="module")
def whole(base: Path) -> Path:
    """A comparison that nothing interrupted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(base / "cache"))
        patch.chdir(base)
        threads = torch.get_num_threads()
        assert main(["compare", "tiny.yaml", "--output", "whole"]) == 0
        torch.set_num_threads(threads)
    return base / "whole"


@pytest.fixture(scope="module")
def config(base: Path) -> CompareConfig:
    return read_compare([str(base / "tiny.yaml")])


@pytest.fixture
def task(config: CompareConfig, whole: Path) -> PruningTask:
    return load_task(replace(config, task=replace(config.task, weights=str(whole / "base.safetensors"))), Progress())


def results_of(folder: Path) -> dict[str, Any]:
    """Return the results without what depends on the clock and on what was scored before."""
    data = json.loads((folder / "results.json").read_text())
    for cell in data["cells"]:
        del cell["seconds"], cell["cached"]
    return data


def found_in(data: dict[str, Any], method: str, seed: int, budget: float) -> dict[str, Any]:
    cell = next(each for each in data["cells"] if (each["method"], each["seed"]) == (method, seed))
    return next(each for each in cell["found"] if each["budget"] == budget)


# ---- end to end ------------------------------------------------------------------------------------------------------
def test_every_method_pays_the_same_and_keeps_to_its_budget(whole: Path) -> None:
    data = results_of(whole)
    methods = ["agent", "uniform", "apoz", "random_search", "cem", "pool"]
    assert {(cell["method"], cell["seed"]) for cell in data["cells"]} == {(m, s) for m in methods for s in (0, 1)}
    for cell in data["cells"]:
        assert 0 < cell["evaluations"] <= 8 if cell["method"] in ("agent", "random_search", "cem") else True
        for found in cell["found"]:
            assert found["macs"] / data["original"]["macs"] == found["kept"] <= found["budget"]
            assert found["within"] == (found["kept"] >= 0.97 * found["budget"])
            assert found["retrain_updates"] == 3
    assert next(c for c in data["cells"] if c["method"] == "random_search")["evaluations"] == 8
    assert data["test_split_readings"] == 1
    assert len(data["pairs"]) == 4 * 2 * 3
    assert {pair["verdict"] for pair in data["pairs"]} == {"too few seeds"}
    for name in ("comparison.md", "pareto.png", "search.png", "scores.sqlite", "config.yaml"):
        assert (whole / name).stat().st_size
    text = (whole / "comparison.md").read_text()
    assert "prunegym compare tiny.yaml --output whole" in text
    assert "too few for a verdict" in text


def test_figures_are_those_of_networks_cut_by_hand(whole: Path, config: CompareConfig, task: PruningTask) -> None:
    data = results_of(whole)
    settings = search_settings(config.search, config.compare, 1, 0.4)
    repair = replace(settings.trim.repair, criterion="apoz")
    trimmer = Trimmer(task, repair)
    images, labels = next(iter(task.selection.batches(1000)))
    counts = solve_counts(trimmer.cost_model, [0.0] * len(trimmer.groups), 0.4, "macs")
    plan = trimmer.plan(counts)
    network = apply_plan(task.network, trimmer.groups, plan)
    compensate(network, task.network, trimmer.groups, plan, trimmer.pristine.statistics, "least_squares")
    with torch.no_grad():
        right = (network.eval()(images).argmax(1) == labels).double().mean().item()
    apoz = found_in(data, "apoz", 1, 0.4)
    assert apoz["before"] == pytest.approx(right)
    assert apoz["widths"] == plan.counts
    kept = load_pruned(whole / "networks" / "apoz-seed1-0.4", task.network)
    with torch.no_grad():
        assert apoz["after"] == pytest.approx((kept(images).argmax(1) == labels).double().mean().item())
        split = task.test.open("the same figure, by hand")
        images, labels = next(iter(split.batches(1000)))
        assert apoz["test"] == pytest.approx((kept(images).argmax(1) == labels).double().mean().item())


def test_a_search_stands_by_its_best_reward(whole: Path) -> None:
    data = results_of(whole)
    for method in ("agent", "random_search", "cem"):
        lines = (whole / "cells" / f"{method}-seed0" / "history.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        for budget in (0.4, 0.6):
            own = [row for row in rows if row["budget"] == budget and row["kept"] >= 0.97 * budget]
            own = own or [row for row in rows if row["budget"] == budget]
            best = max(own, key=lambda row: (row["reward"], -row["loss"]))
            found = found_in(data, method, 0, budget)
            assert found["widths"] == best["widths"]
            assert found["reward_accuracy"] == pytest.approx(best["accuracy"])
            assert len([row for row in rows if row["budget"] == budget and not row["repeated"]]) == len(
                found["best_so_far"]
            )


def test_the_pool_is_never_below_its_members(whole: Path) -> None:
    data = results_of(whole)
    for seed in (0, 1):
        for budget in (0.4, 0.6):
            pool = found_in(data, "pool", seed, budget)
            members = {name: found_in(data, name, seed, budget) for name in ("agent", "uniform", "apoz")}
            assert pool["before"] >= max(each["before"] for each in members.values())
            if pool["made_by"] != "agent":
                assert pool == {
                    **members[pool["made_by"]],
                    "best_so_far": [],
                    "best_reward_so_far": [],
                }


def test_the_pool_takes_another_plan_of_the_agent_where_that_is_the_best(
    whole: Path, config: CompareConfig, task: PruningTask, tmp_path: Path
) -> None:
    narrow = replace(config, compare=replace(config.compare, methods=("agent", "uniform"), budgets=(0.6,)))
    ground = Ground(task, narrow.search, narrow.compare, tmp_path)
    uniform = run_cell(ground, "uniform", 0, "")
    poor = replace(uniform.found[0], before=0.1, candidates=((), uniform.found[0].plans))
    others = {"agent": Cell("agent", 0, "", (poor,), 1, 0, 0, 0.0)}
    pool = run_cell(ground, "pool", 0, "", others).found[0]
    assert pool.made_by == "agent"
    assert pool.plans == uniform.found[0].plans
    assert pool.before == uniform.found[0].before
    assert pool.after == uniform.found[0].after


# ---- interruptions ---------------------------------------------------------------------------------------------------
def test_a_lost_cell_runs_again_and_nothing_else_does(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = results_of(whole)
    lost = whole / "cells" / "cem-seed1.json"
    lost.unlink()
    ran: list[tuple[str, int]] = []
    genuine = compare_jobs.run_cell

    def counted(ground: Ground, method: str, seed: int, *rest: Any) -> Cell:
        ran.append((method, seed))
        return genuine(ground, method, seed, *rest)

    monkeypatch.setattr(compare_jobs, "run_cell", counted)
    assert main(["compare", "--resume", str(whole)]) == 0
    assert ran == [("cem", 1)]
    assert results_of(whole) == before
    assert json.loads(lost.read_text())["cached"] > 0


def test_other_weights_of_a_cell_are_tested_anew(config: CompareConfig, task: PruningTask, tmp_path: Path) -> None:
    few = replace(config, compare=replace(config.compare, methods=("uniform", "l1"), budgets=(0.6,), seeds=(0,)))
    first = compare(task, few, tmp_path)
    folder = tmp_path / "networks" / "uniform-seed0-0.6"
    network = load_pruned(folder, task.network)
    with torch.no_grad():
        list(network.parameters())[-1].add_(100 * torch.eye(10)[3])  # the last bias: it says 3 to everything
    plan = PruningPlan.from_dict(json.loads((folder / "plan.json").read_text())["keep"])
    save_pruned(folder, network, plan, example_shape=tuple(task.example.shape), source=task.source)
    again = compare(task, few, tmp_path)
    key = ("uniform", 0, 0.6)
    assert (first.readings, again.readings) == (1, 2)
    assert again.test[key] < 0.2 < first.test[key]
    assert {name: value for name, value in again.test.items() if name != key} == {
        name: value for name, value in first.test.items() if name != key
    }
    (tmp_path / "test.json").write_text('{"readings": 2}')
    with pytest.raises(UserError, match=r"test.json must be what `prunegym compare` wrote, but is not; delete it"):
        compare(task, few, tmp_path)


def test_a_reading_counts_even_where_it_was_cut_short(
    config: CompareConfig, task: PruningTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = replace(config, compare=replace(config.compare, methods=("uniform",), budgets=(0.6,), seeds=(0,)))

    def halted(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(compare_module, "load_network", halted)
        with pytest.raises(KeyboardInterrupt):
            compare(task, few, tmp_path)
    assert compare(task, few, tmp_path).readings == 2


def test_two_processes_do_not_compare_in_one_folder(config: CompareConfig, task: PruningTask, tmp_path: Path) -> None:
    with alone(tmp_path), pytest.raises(UserError, match="only one process may work in a folder at a time"):
        compare(task, config, tmp_path)
    assert not list(tmp_path.glob("cells"))


def test_other_images_are_another_comparison(config: CompareConfig, task: PruningTask, tmp_path: Path) -> None:
    few = replace(config, compare=replace(config.compare, methods=("uniform",), budgets=(0.6,), seeds=(0,)))
    compare(task, few, tmp_path)
    assert isinstance(task.reward, TensorSplit)
    darker = TensorSplit(task.reward.images / 2, task.reward.labels, name="reward")
    with pytest.raises(UserError, match="was made with others; give what it began with"):
        compare(replace(task, reward=darker), few, tmp_path)


def test_the_model_alone_is_the_agent_whose_policy_never_learns(
    config: CompareConfig, task: PruningTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ground = Ground(task, config.search, config.compare, tmp_path)
    own: list[float] = []
    genuine = Planner.own

    def seen(self: Planner, budget: float) -> Any:
        proposal = genuine(self, budget)
        own.append(float(np.abs(proposal.actions).max()))
        return proposal

    monkeypatch.setattr(Planner, "own", seen)
    cell = run_cell(ground, "surrogate", 0, "")
    assert 0 < cell.evaluations <= 8
    assert own == [0.0] * len(own)  # the uniform plan, from the first to the last
    monkeypatch.setattr(Planner, "own", genuine)
    two = replace(config.search, trim=replace(config.search.trim, rounds=2))
    named = replace(config.compare, methods=("surrogate",))
    with pytest.raises(UserError, match="'surrogate' is the agent's model alone, but this agent has none"):
        check_compare(task.network, task.example, two, named)


def test_an_interrupted_comparison_ends_as_if_nothing_had_happened(
    whole: Path, base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    genuine, calls = Trimmer.evaluate, 0

    def interrupted(self: Trimmer, *arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 14:  # inside the agent's second search
            raise KeyboardInterrupt
        return genuine(self, *arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(Trimmer, "evaluate", interrupted)
        assert main(["compare", "tiny.yaml", "--output", "halted"]) == 130
    assert "go on with: prunegym compare --resume halted" in capsys.readouterr().out
    assert [path.stem for path in sorted((base / "halted" / "cells").glob("*.json"))] == ["agent-seed0"]
    assert main(["compare", "--resume", "halted"]) == 0
    assert results_of(base / "halted") == results_of(whole)


def test_a_comparison_may_be_enlarged(base: Path) -> None:
    words = ["compare", "tiny.yaml", "--output", "grown", "--compare.methods", "[uniform, apoz]"]
    assert main([*words, "--compare.budgets", "[0.6]", "--compare.seeds", "[0]"]) == 0
    first = (base / "grown" / "cells" / "apoz-seed0.json").stat().st_mtime_ns
    assert main([*words, "--compare.budgets", "[0.6]", "--compare.seeds", "[0, 1]"]) == 0
    assert (base / "grown" / "cells" / "apoz-seed0.json").stat().st_mtime_ns == first
    assert main(["compare", "--resume", "grown"]) == 0
    data = results_of(base / "grown")
    assert [(cell["method"], cell["seed"]) for cell in data["cells"]] == [
        ("uniform", 0), ("uniform", 1), ("apoz", 0), ("apoz", 1), ("pool", 0), ("pool", 1),
    ]  # fmt: skip
    assert data["test_split_readings"] == 2
    assert "read twice" in (base / "grown" / "comparison.md").read_text()


def test_several_jobs_give_the_same_results(base: Path, config: CompareConfig, task: PruningTask) -> None:
    few = replace(config, compare=replace(config.compare, methods=("uniform", "apoz"), budgets=(0.6,)))
    torch.set_num_threads(1)
    one = compare(task, few, base / "one")
    two = compare(task, replace(few, jobs=2), base / "two")
    assert [replace(cell, seconds=0.0) for cell in one.cells] == [replace(cell, seconds=0.0) for cell in two.cells]
    assert one.test == two.test


def test_a_folder_of_other_settings_is_refused(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "tiny.yaml", "--output", str(whole), "--compare.evaluations", "5"]) == 2
    said = capsys.readouterr().err
    assert "goes on with the settings, data, device and versions it began with" in said
    assert "agent-seed0.json was made with others" in said
    assert main(["compare", "--resume", "absent"]) == 2
    assert "--resume needs the run folder of a comparison" in capsys.readouterr().err


def test_the_folder_of_another_command_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text("name: x\n")
    (tmp_path / "command.txt").write_text("prunegym search quickstart\n")
    for words in (["--resume", str(tmp_path)], ["tiny.yaml", "--output", str(tmp_path)]):
        assert main(["compare", *words]) == 2
        assert "was made by: prunegym search; give the folder of a comparison" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["command.txt", "config.yaml"]


def test_what_is_added_to_a_resumed_comparison_is_kept(config: CompareConfig, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = begin(replace(config, output=str(folder)), ["prunegym", "compare", "tiny.yaml", "--jobs", "2"])
    assert first.command == ("prunegym", "compare", "tiny.yaml", "--jobs", "2")
    for words in (["--resume", str(folder), "--threads", "1"], [f"--resume={folder}", "--threads", "1"]):
        again = begin(replace(config, resume=str(folder)), ["prunegym", "compare", *words])
        assert again.command == (*first.command, "--threads", "1")
    plain = begin(replace(config, resume=str(folder)), ["prunegym", "compare", "--resume", str(folder)])
    assert plain.command == first.command
    typed = ["prunegym", "compare", "tiny.yaml", "--resume", str(folder)]
    assert begin(replace(config, resume=str(folder)), typed).command == tuple(typed)


def test_a_torn_cell_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "agent-seed0.json"
    path.write_text('{"method": "agent", "fou')
    with pytest.raises(UserError, match=r"agent-seed0.json is not .*delete it, and the cell runs again"):
        Cell.load(path)


def test_a_digest_knows_what_decides_a_cell(config: CompareConfig) -> None:
    first = cell_digest(config, "agent", 0, "weights")
    more = replace(config, compare=replace(config.compare, seeds=(0, 1, 2), methods=("agent", "l1")), jobs=4)
    assert cell_digest(more, "agent", 0, "weights") == first
    longer = replace(config, compare=replace(config.compare, retrain_updates=4))
    others = [(longer, "agent", 0, "weights"), (config, "cem", 0, "weights"), (config, "agent", 1, "weights")]
    assert all(cell_digest(*each) != first for each in [*others, (config, "agent", 0, "other weights")])


# ---- what is refused -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--compare.methods", "[agent, apoc]"], "methods must hold known names, but got 'apoc'; did you mean 'apoz'"),
        (["--compare.methods", "[random_serch]"], "did you mean 'random_search'"),
        (["--compare.seeds", "[1, 2, 1]"], "seeds must differ from each other, but got 1 twice"),
        (["--compare.budgets", "[]"], "budgets must hold at least one"),
        (["--compare.budgets", "[0.3, 0.30000001]"], "budgets must differ within six digits"),
        (["--compare.resamples", "1"], "resamples must be at least 100, but got 1"),
        (["--compare.evaluations", "2", "--search.trim.rounds", "3"], "must hold one episode, search.trim.rounds"),
        (["--compare.budgets", "[1.5]"], "budgets must be in (0, 1], but got 1.5"),
        (["--compare.budgets", "[0.3, 0.0001]"], "0.0001"),
        (["--compare.ranking_scope", "globl"], "scope must be a known name, but got 'globl'; did you mean 'global'"),
        (["--compare.evaluation", "3"], "did you mean 'compare.evaluations'"),
        (["--search.trim.retrain_updates", "2"], "search.trim.retrain_updates must be 0, but got 2"),
        (["--search.max_minutes", "2"], "search.max_minutes must be 0"),
        (["--search.trim.retraining.check_every", "1"], "check_every must be 0, but got 1"),
        (["--output", "a", "--resume", "b"], "got --output and --resume"),
        (["--jobs", "0"], "jobs at least 1, but got 1 and 0"),
    ],
)
def test_mistakes_are_one_sentence_before_anything_runs(
    options: list[str], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prunegym.pruning.prepare.retrain", lambda *_, **__: pytest.fail("training began"))
    assert main(["compare", "tiny.yaml", *options]) == 2
    said = capsys.readouterr().err.strip()
    assert words in said
    assert "Traceback" not in said
    assert not Path("runs").exists() or not any(Path("runs").iterdir())


def test_apoz_without_a_relu_is_refused_up_front(config: CompareConfig) -> None:
    network = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 36, 10))
    with pytest.raises(UserError, match=r"'apoz' needs a ReLU .* take 'apoz' out of compare.methods"):
        check_compare(network, torch.zeros(1, 1, 8, 8), config.search, config.compare)
    without = replace(config.compare, methods=("agent", "uniform", "l1"))
    check_compare(network, torch.zeros(1, 1, 8, 8), config.search, without)


def test_a_range_of_the_search_gives_way_to_the_budgets_compared(config: CompareConfig) -> None:
    trim = replace(config.search.trim, budget=None, budget_range=(0.7, 0.9))
    found = search_settings(replace(config.search, trim=trim), config.compare, 0, 0.4).trim
    assert (found.budget, found.budget_range) == (0.4, None)


@pytest.mark.parametrize("name", shipped_configs("compare"))
def test_shipped_comparisons_can_be_read(name: str) -> None:
    config = read_compare([name])
    assert config.name == name
    assert len(config.compare.seeds) >= 5


# ---- pieces ----------------------------------------------------------------------------------------------------------
def row(number: int, reward: float | None, kept: float, *, budget: float = 0.5, **other: Any) -> Evaluation:
    return Evaluation(
        evaluation=number, episode=number, round=1, accuracy=0.8 + (reward or 0.0) / 10, loss=1.0, kept=kept, params=1,
        macs=1, reward=reward, widths={}, plans=({"a": [number]},), budget=budget, **other,
    )  # fmt: skip


def test_the_winner_keeps_to_the_budget() -> None:
    rows = [row(1, 0.5, 0.47), row(2, 0.9, 0.51), row(3, 0.3, 0.49), row(4, 0.8, 0.3, budget=0.3)]
    history = History(rows=rows)
    assert winner(history, 0.5, 0.03).evaluation == 3  # 2 is above it, 1 too far below
    assert winner(history, 0.5, 0.1).evaluation == 1
    assert winner(history, 0.5, 0.0).evaluation == 1  # none is near: the best of those below
    with pytest.raises(UserError, match=r"no plan that was scored keeps to the budget 0.2"):
        winner(history, 0.2, 0.03)


def test_the_course_counts_what_costs() -> None:
    rows = [row(1, -0.5, 0.5), row(2, 0.5, 0.5), row(3, 0.5, 0.5, repeated=True), row(4, 0.9, 0.3, budget=0.3)]
    rows.append(row(5, 0.1, 0.5))
    course = best_so_far(History(rows=rows), 0.5)
    assert [each and each.evaluation for each in course] == [1, 2, 2]
    assert mean_course([(0.5, 0.7), (None, 0.3, 0.5)])[1:] == pytest.approx([0.5, 0.6])
    assert math.isnan(mean_course([(0.5, 0.7), (None, 0.3, 0.5)])[0])
    rows = [row(1, math.nan, 0.5), row(2, 0.5, 0.5), row(3, 0.9, 0.5)]
    assert [each and each.evaluation for each in best_so_far(History(rows=rows), 0.5)] == [1, 2, 3]


def test_a_reward_is_reached_where_the_best_so_far_is_as_high() -> None:
    found = made().cells[0].found[0]
    assert [replace(found, rewards=(None, 0.1, 0.1, 0.4)).reached(reward) for reward in (-1.0, 0.1, 0.2, 0.5)] == [
        2, 2, 4, None,
    ]  # fmt: skip
    assert replace(found, rewards=(0.01, float(np.float32(0.094)))).reached(0.094) == 2  # single precision is below it


def test_the_agent_serves_every_budget_within_the_sum(config: CompareConfig, task: PruningTask) -> None:
    settings = [search_settings(config.search, config.compare, 3, budget) for budget in (0.4, 0.6)]
    history = History()
    run_agent(task, settings, Trimmer(task, settings[0].trim.repair), history, Progress())
    assert {each.budget for each in history.rows} == {0.4, 0.6}
    assert [each.evaluation for each in history.rows] == list(range(1, len(history.rows) + 1))
    assert history.spent <= 8


# ---- the report ------------------------------------------------------------------------------------------------------
SEEDS = (0, 1, 2, 3, 4)
AGENT = (0.80, 0.81, 0.79, 0.82, 0.80)
BETTER_ONE = (0.84, 0.86, 0.83, 0.85, 0.85)


def made(seeds: int = 5) -> Comparison:
    """Return a comparison whose figures were typed in: the agent loses to APoZ and draws with random search."""
    figures = {"agent": AGENT, "apoz": BETTER_ONE, "random_search": (0.81, 0.80, 0.80, 0.81, 0.80)}
    compared = CompareSettings(methods=tuple(figures), seeds=SEEDS[:seeds], budgets=(0.5,), pool=False)
    cells = []
    for method, values in figures.items():
        curve = (0.5, 0.6) if method != "apoz" else ()
        for seed, value in zip(compared.seeds, values, strict=False):
            one = Found(
                budget=0.5, plans=({"conv": [0]},), reward_accuracy=value, before=value - 0.1, after=value, params=25,
                macs=400 if method == "apoz" else 490, kept=0.49, within=method != "apoz", updates=7, made_by=method,
                curve=curve, rewards=curve,
            )  # fmt: skip
            cells.append(Cell(method, seed, "", (one,), 20 if curve else 0, 0, 0, 2.0))
    pairs = []
    for stage in ("before", "after", "test"):
        for other in ("apoz", "random_search"):
            own, theirs = ([100 * value for value in figures[name][:seeds]] for name in ("agent", other))
            pairs.append(Pair("agent", other, 0.5, stage, paired_interval(own, theirs)))
    config = CompareConfig(compare=compared)
    test = {(cell.method, cell.seed, 0.5): cell.found[0].after - 0.01 for cell in cells}
    whole, original = Cost(params=100, macs=1000), {"before": 0.9, "after": 0.9, "test": 0.89}
    examples = {"train": 10, "reward": 5, "selection": 6, "test": 7}
    return Comparison(config, "toy on data", examples, whole, original, tuple(cells), test, tuple(pairs), 1)


def test_a_loss_is_told_first_and_a_draw_is_no_win() -> None:
    after = [line for line in reading(made()) if "after equal retraining" in line and "selection" in line]
    assert "the agent is worse than APoZ (-4.20 [" in after[0]
    assert "the agent is not distinguishable from random search (+0.00 [" in after[1]
    assert len(after) == 2
    assert not any("better" in line for line in reading(made()))
    assert any("APoZ (49.0 %) lies below the tolerance" in line for line in reading(made()))
    cell = pair_rows(made(), 0.5)[0]
    assert cell[0] == "agent − APoZ"
    assert all(stage.endswith(": worse") for stage in cell[1:])


def test_few_seeds_are_shown_and_never_called_better_or_worse() -> None:
    lines = [line for line in reading(made(seeds=4)) if "tolerance" not in line]
    assert all("over 4 seeds only, too few for a verdict" in line for line in lines)
    assert not any("worse" in line or "better" in line for line in lines)


def test_the_table_holds_means_and_deviations() -> None:
    rows = {each[0]: each for each in table_rows(made(), 0.5)}
    # mean 80.4; squares of the deviations 0.16 + 0.36 + 1.96 + 2.56 + 0.16 = 5.2 over 4
    assert rows["agent"][1:] == (
        "70.40 ± 1.14", "80.40 ± 1.14", "79.40 ± 1.14", "25.0 %", "49.0 %", "20", "2.0", "7",
    )  # fmt: skip
    assert rows["APoZ"][4:7] == ("25.0 %", "40.0 % *", "–")
    assert rows["original"][1:6] == ("90.00", "90.00", "89.00", "100 %", "100 %")


def test_methods_above_the_budget_are_told_apart_from_those_below() -> None:
    one = made()
    cells = tuple(
        replace(cell, found=(replace(cell.found[0], kept=0.52, within=False),)) if cell.method == "agent" else cell
        for cell in one.cells
    )
    lines = reading(replace(one, cells=cells))
    assert any("cost kept by agent (52.0 %) lies above the budget" in line for line in lines)
    assert any("cost kept by APoZ (49.0 %) lies below the tolerance" in line for line in lines)


def test_the_pool_costs_what_its_members_cost() -> None:
    one = made()
    pools = tuple(replace(cell, method="pool", evaluations=0, seconds=0.5) for cell in one.cells_of("apoz"))
    config = replace(one.config, compare=replace(one.config.compare, pool=True))
    test = {**one.test, **{("pool", cell.seed, 0.5): 0.8 for cell in pools}}
    pooled = replace(one, config=config, cells=(*one.cells, *pools), test=test)
    rows = {each[0]: each for each in table_rows(pooled, 0.5)}
    assert rows["pool with a floor"][6:8] == ("20", "4.5")  # the agent's 20; 2 s each of agent and APoZ, and the choice


def test_points_stand_at_the_cost_that_was_compared() -> None:
    one = made()
    search = replace(one.config.search, trim=replace(one.config.search.trim, budget_unit="params"))
    axes = pareto(replace(one, config=replace(one.config, search=search))).axes[0]
    assert axes.get_xlabel() == "parameters kept, % of the original"
    places = [line.get_xdata()[0] for line in axes.get_lines()[1:] if len(line.get_xdata()) == 1]
    assert places
    assert places == pytest.approx([49.0] * len(places), abs=0.3)


def test_the_report_says_how_it_was_made(tmp_path: Path) -> None:
    text = markdown(made(), ["prunegym", "compare", "x y.yaml"], {"torch": "2.0"})
    assert "prunegym compare 'x y.yaml'" in text
    assert "Seeds 0, 1, 2, 3, 4; images: train 10, reward 5, selection 6, test 7" in text
    assert "The test split was read once" in text
    assert "Versions: torch 2.0." in text
    write_pictures(tmp_path, made())
    for name in ("pareto.png", "search.png"):
        assert 5_000 < (tmp_path / name).stat().st_size < 200_000
