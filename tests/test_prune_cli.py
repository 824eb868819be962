"""`prunegym prune` and `prunegym methods`, as a user types them."""

import json
from pathlib import Path
from typing import Any

import pytest
from prunegym.agent.cli import main
from prunegym.agent.methods import METHODS
from prunegym.pruning.artifact import load_pruned

QUICK = [
    "quickstart", "--task.training.updates", "40", "--search.trim.retraining.updates", "12",
    "--task.network", "lenet_small",
]  # fmt: skip


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def results(run: str) -> dict[str, Any]:
    return dict(json.loads((Path("runs") / run / "results.json").read_text()))


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["prune", *arguments]) == 2
    return capsys.readouterr().err


def test_every_method_is_listed_with_its_source(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    printed = capsys.readouterr().out
    for method in METHODS.values():
        assert f"{method.name:<18}{method.description}\n" in printed
        assert f"{method.source}; repair as published: {method.compensation}" in printed


def test_a_run_leaves_everything_needed_to_load_and_replay(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prune", "--method", "network_trimming", *QUICK, "--budget", "0.3"]) == 0
    printed = capsys.readouterr().out
    assert "network_trimming on lenet_small on digits, budget 30 % of the params;" in printed
    assert "the budget is met" in printed
    told = results("quickstart-network_trimming-1")
    assert (told["method"], told["budget"], told["stopped_by"]) == ("network_trimming", 0.3, "budget")
    assert len(told["test_split_readings"]) == 1
    assert sum(plan["provenance"]["retrain_updates"] for plan in told["plans"]) == 12
    run = Path("runs/quickstart-network_trimming-1")
    network = load_pruned(run)
    assert sum(parameter.numel() for parameter in network.parameters()) == told["plans"][-1]["params"]
    report = (run / "report.md").read_text()
    assert all(f"APoZ {name}, before → after" in report for name in told["mean_apoz"][0])
    assert f"{told['plans'][0]['params']:,}" in report
    assert main(["apply", str(run), "--output", "again"]) == 0
    assert f"{told['plans'][-1]['params']:,} parameters" in capsys.readouterr().out.replace("\n", " ")
    before, after = ((folder / "pruned.safetensors").read_bytes() for folder in (run, Path("again")))
    assert before == after


def test_the_configuration_may_come_last_and_the_repair_may_be_chosen() -> None:
    options = ["--method=l1", "--compensation", "least_squares", *QUICK[1:], "--budget", "0.4", "quickstart"]
    assert main(["prune", *options]) == 0
    told = results("quickstart-l1-1")
    assert told["plans"][0]["provenance"]["compensation"] == "least_squares"
    assert "not the published one" in Path("runs/quickstart-l1-1/report.md").read_text()


def test_an_accepted_drop_alone_replaces_the_files_budget() -> None:
    options = ["--method", "l1", "--accepted_drop", "0.05", *QUICK, "--search.trim.retraining.updates", "0"]
    assert main(["prune", *options]) == 0
    told = results("quickstart-l1-1")
    assert (told["budget"], told["accepted_drop"]) == (None, 0.05)
    first, last = told["plans"][0], told["plans"][-1]
    assert last["params"] < first["params"]
    original = told["finalists"][0]["params"]
    assert last["params"] > 0.05 * original  # the file's budget was not the goal


def test_mistakes_are_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert "prune needs a method, one of network_trimming" in refused(capsys, *QUICK)
    assert "got 'taylor'; did you mean 'taylor_2017'" in refused(capsys, "--method", "taylor", *QUICK)
    assert "did you mean 'least_squares'" in refused(capsys, "--method", "l1", "--compensation", "least_square", *QUICK)
    assert "prune needs a configuration" in refused(capsys, "--method", "l1")
    assert "accepted_drop must be in [0, 1]" in refused(capsys, "--method", "l1", "--accepted_drop", "5", *QUICK)
    assert "unknown option --search.methods.taylr" in refused(
        capsys, "--method", "l1", *QUICK, "--search.methods.taylr.rounds", "3"
    )
    assert "unknown option --methd; did you mean --method?" in refused(capsys, "--methd", "l1", *QUICK)
    assert "--method may be given once, but it is there 2 times" in refused(
        capsys, "--method", "l1", "--method", "l2", *QUICK
    )
    assert "--max_evaluations is an option of a search that prune does not read; use" in refused(
        capsys, "--method", "amc", *QUICK, "--max_evaluations", "9"
    )
    assert "does not read; use --compensation" in refused(
        capsys, "--method", "l1", *QUICK, "--search.trim.repair.compensation", "merge"
    )
    assert "rounds >= 1" in refused(capsys, "--method", "l1", *QUICK, "--search.methods.ranking.rounds", "0")
    assert "needs a batch norm with weights behind every channel group" in refused(
        capsys, "--method", "bn_scale", *QUICK
    )
    assert not list(Path("runs").glob("*")) if Path("runs").exists() else True


def test_a_refused_run_leaves_the_users_folder(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine").mkdir()
    refused(capsys, "--method", "bn_scale", *QUICK, "--output", "mine")
    assert list(Path("mine").iterdir()) == []


def test_a_goal_out_of_reach_is_refused_before_any_training(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "merging in fc1, but one channel in each still costs" in refused(
        capsys, "--method", "data_free", *QUICK, "--budget", "0.05"
    )
    assert not list((tmp_path / "cache").glob("**/*.safetensors"))


def test_an_interrupt_before_the_report_keeps_the_network(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("prunegym.agent.cli.read_test_split", interrupt)
    assert main(["prune", "--method", "l1", *QUICK, "--budget", "0.4", "--output", "kept"]) == 130
    assert "the network is kept: prunegym apply kept" in capsys.readouterr().out
    assert load_pruned("kept") is not None


def test_a_budget_that_is_not_met_is_said() -> None:
    settings = ["--search.methods.data_free.stop", "mode", "--compensation", "none"]
    assert main(["prune", "--method", "data_free", *QUICK, "--budget", "0.3", *settings]) == 0
    assert "the budget is NOT met" in Path("runs/quickstart-data_free-1/report.md").read_text()


def test_the_settings_of_a_method_are_options() -> None:
    settings = ["--search.methods.taylor.channels_per_round", "30", "--search.methods.taylor.updates_between", "2"]
    assert main(["prune", "--method", "taylor_2019", *QUICK, "--budget", "0.3", *settings]) == 0
    told = results("quickstart-taylor_2019-1")
    assert [plan["provenance"]["retrain_updates"] for plan in told["plans"]][:-1] == [2] * (len(told["plans"]) - 1)
    assert told["plans"][-1]["params"] <= 0.3 * told["finalists"][0]["params"]
