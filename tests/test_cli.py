"""The command line in-process: exit codes, one-line mistakes, and a search that `apply` rebuilds to the bit."""

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from prunegym.agent.cli import main
from prunegym.agent.configuration import read_config, shipped_configs
from prunegym.agent.loading import load_task
from prunegym.agent.progress import Progress
from prunegym.pruning import SplitSettings, build_network
from prunegym.pruning.artifact import load_pruned
from prunegym.pruning.prepare import TaskSettings
from prunegym.pruning.splits import SealedSplit
from prunegym.pruning.trimmer import Trimmer
from safetensors.torch import load_file, save_file
from toys import tiny_task

TINY = (
    tiny_task()
    + """search:
  max_evaluations: 6
  candidates: 2
  learner: {episodes_per_update: 3, hidden: [8]}
  trim:
    budget: 0.3
    retraining: {updates: 5, batch_size: 32, learning_rate: 0.01}
"""
)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)  # the configurations set it


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Return a function that runs a command which must fail at once, and returns the one line it said."""
    monkeypatch.setattr(Trimmer, "trim", lambda *_, **__: pytest.fail("a network was cut"))

    def run(*arguments: str, untrained: bool = True) -> str:
        if untrained:
            monkeypatch.setattr("prunegym.pruning.prepare.retrain", lambda *_, **__: pytest.fail("training began"))
        capsys.readouterr()
        assert main(list(arguments)) == 2
        said = capsys.readouterr().err.strip().splitlines()
        lines = [line for line in said if not re.search(r"\d+%\|", line)]  # without progress bars
        assert len(lines) == 1, said
        assert lines[0].startswith("prunegym: ")
        assert "Traceback" not in lines[0]
        return lines[0]

    return run


# ---- mistakes --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["serch"], ["'serch'", "did you mean 'search'"]),
        (["search", "quickstar"], ["configuration file quickstar does not exist", "did you mean 'quickstart'"]),
        (["search", "x" * 300], ["configuration file xxx", "does not exist"]),
        (["search", "absent/nothing.yaml"], ["configuration file absent/nothing.yaml does not exist"]),
        (["search", "quickstart", "--budgt", "0.3"], ["--budgt", "did you mean 'budget'"]),
        (
            ["search", "quickstart", "--search.trim.rouns", "2"],
            ["search.trim.rouns", "did you mean 'search.trim.rounds'"],
        ),
        (["search", "quickstart", "--search.trim.rounds", "two"], ["search.trim.rounds", "two"]),
        (["search", "quickstart", "--budget", "much"], ["budget", "much"]),
        (["search", "quickstart", "--search.max_evaluations", "0"], ["max_evaluations", "at least 1", "0"]),
        (["search", "quickstart", "--max_evaluations", "0"], ["max_evaluations", "at least 1", "0"]),
        (["search", "quickstart", "--device", "gpu"], ["device must be auto, cpu or cuda", "'gpu'"]),
        (["search", "quickstart", "--task.network", "lenet_smal"], ["'lenet_smal'", "did you mean 'lenet_small'"]),
        (["search", "quickstart", "--task.data", "digit"], ["'digit'", "did you mean 'digits'"]),
        (["search", "quickstart", "--search.trim.repair.criterion", "apoc"], ["'apoc'", "did you mean 'apoz'"]),
        (["search", "quickstart", "--search.trim.reward.objective", "budge"], ["'budge'", "did you mean 'budget'"]),
        (["search", "quickstart", "--task.training.updates", "0"], ["untrained network", "--task.weights"]),
        (["search", "quickstart", "--task.weights", "absent.safetensors"], ["absent.safetensors"]),
        (["search", "lenet_mnist"], ["mnist", "--data_root"]),
        (["apply"], ["run"]),
        (["apply", "absent"], ["schedule.json", "absent"]),
        (["search", "quickstart", "--budget", "abc"], ["--budget must be a number, but got abc"]),
        (["search", "quickstart", "--budget", "nan"], ["--budget must be a number, but got nan"]),
        (["search", "quickstart", "--budget", "-1"], ["budget must be in (0, 1], but got budget=-1"]),
        (["search", "quickstart", "--search.trim.budget", "-1"], ["budget must be in (0, 1], but got budget=-1"]),
        (["search", "quickstart", "--seed", "1.5"], ["--seed must be a whole number, but got 1.5"]),
        (["search", "quickstart", "--seed", "1" + "0" * 40], ["seed must be a whole number from 0 to 2**63 - 1"]),
        (["search", "quickstart", "--task.splits.seed", "-1"], ["seed must be a whole number from 0 to 2**63 - 1"]),
        (["search", "quickstart", "--threads", "-3"], ["threads must be at least 0, but got -3"]),
        (["search", "quickstart", "--search.compare", "maybe"], ["--search.compare must be true or false", "maybe"]),
        (["search", "quickstart", "--search.trim.retraining.weight_decay", ".nan"], ["weight_decay must be a finite"]),
        (["search", "quickstart", "--search.trim.retraining.optimizer", "sgdd"], ["optimizer", "did you mean 'sgd'"]),
        (["search", "quickstart", "--search.trim", "3"], ["search.trim must hold settings, but got 3"]),
        (["search", "quickstart", "--search", "{trim: 3}"], ["search.trim must hold settings, but got 3 (--search)"]),
        (["search", "quickstart", "--task.training.updates=5", "--task.training.epochs=1"], ["updates=5 and epochs=1"]),
        (["search", "quickstart", "--task.splits.reward", "3000"], ["--task.splits.reward", "--task.splits.selection"]),
        (["search", "quickstart", "extra"], ["unexpected argument 'extra'; `prunegym search --help`"]),
        (["search", "--config"], ["--config needs a file"]),
        (["apply", "RUN", "x"], ["unexpected argument 'x'; `prunegym apply --help`"]),
        (["apply", "absent", "--shedule", "x"], ["--shedule", "did you mean 'schedule'"]),
    ],
)
def test_a_mistake_is_one_line_that_helps(arguments: list[str], words: list[str], refused: Callable[..., str]) -> None:
    line = refused(*arguments)
    for word in words:
        assert word.lower() in line.lower()


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("budget: 0.3", "bugdet: 0.3", ["search.trim.bugdet", "did you mean 'search.trim.budget'"]),
        ("candidates: 2", "candidate: 2", ["search.candidate", "did you mean 'search.candidates'"]),
        ("task:", "taks:", ["taks", "did you mean 'task'"]),
        ("updates: 5", "updates: five", ["updates", "five"]),
        ("budget: 0.3", "action: scores", ["'scores'", "did you mean 'score'"]),
        ("episodes_per_update: 3", "algorithm: PPP", ["'PPP'", "did you mean 'PPO'"]),
        ("name: tiny", "name: [", ["tiny.yaml"]),
        ("name: tiny", "task: 5", ["'task' is in lines 2 and 4", "tiny.yaml"]),
        ("budget: 0.3", "budget: 0.3\n    budget: 0.4", ["'budget' is in lines", "tiny.yaml"]),
        ("name: tiny", "serach: {}", ["unknown key 'serach'", "did you mean 'search'", "tiny.yaml"]),
        ("name: tiny", "5: {}", ["unknown key '5'", "tiny.yaml"]),
        ("updates: 5,", "updates: null,", ["updates must be a whole number, but got None"]),
        ("{reward: 200, selection: 100}", "200", ["task.splits must hold settings, but got 200 (", "tiny.yaml"]),
        ("{episodes_per_update: 3, hidden: [8]}", "[PPO]", ["search.learner must hold settings, but got ['PPO'] ("]),
    ],
)
def test_a_mistake_in_the_file(old: str, new: str, words: list[str], config: Path, refused: Callable[..., str]) -> None:
    assert TINY.count(old) == 1
    config.write_text(TINY.replace(old, new))
    line = refused("search", str(config), untrained=False)
    for word in words:
        assert word in line


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("task: 5\n", ["task must hold settings, but got 5 (", "tiny.yaml)"]),
        ("search: null\n", ["search must hold settings, but got nothing (", "tiny.yaml)"]),
        ("search: {trim: 3}\n", ["search.trim must hold settings, but got 3 (", "tiny.yaml)"]),
        ("", ["a configuration must hold sections such as", "tiny.yaml is empty"]),
        ("- 1\n", ["a configuration must hold sections such as", "tiny.yaml holds [1]"]),
        ("name: !!python/object:os.system x\n", ["must be YAML, but", "tiny.yaml is not"]),
        ("[" * 5000, ["must be YAML, but", "tiny.yaml is not"]),
    ],
)
def test_a_file_that_is_no_configuration(
    text: str, words: list[str], config: Path, refused: Callable[..., str]
) -> None:
    config.write_text(text)
    line = refused("search", str(config))
    for word in words:
        assert word in line
    assert refused("search", "--config", str(config)) == line  # however the file is named


def test_a_directory_is_no_configuration(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    assert "must be a YAML file, but folder is a directory" in refused("search", "folder")


@pytest.mark.parametrize("section", ["search.trim.retraining", "task.training"])
@pytest.mark.parametrize(
    "written", [["--{}.epochs", "2"], ["--{}.epochs=2"], ["--{}.epochs", "2", "--{}.updates", "0"]]
)
def test_epochs_replace_the_updates_of_the_file(section: str, written: list[str], config: Path) -> None:
    def lengths(arguments: list[str], path: Path) -> tuple[int, float]:
        found = read_config([str(path), *(part.format(section) for part in arguments)])
        training = found.task.training if section == "task.training" else found.search.trim.retraining
        return training.updates, training.epochs

    assert lengths(written, config) == (0, 2)
    other = config.with_name("other.yaml")
    other.write_text(TINY.replace("updates: 30", "epochs: 3").replace("updates: 5", "epochs: 3"))
    assert lengths(["--{}.updates", "9"], other) == (9, 0)
    assert lengths(["--{}.updates", "0"], other) == (0, 3)  # none is no replacement
    assert lengths([], other) == (0, 3)


@pytest.mark.parametrize("name", ["x[/red]y", "new[bold]x"])
def test_names_of_folders_are_no_markup(
    name: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = ["--max_evaluations", "1", "--search.compare", "false", "--search.latency_batches", "[]"]
    assert main(["search", str(config), *quick, "--output", name]) == 0
    said = capsys.readouterr().out
    assert f"run folder: {name}\n" in said
    assert f"run folder: {name} (report.md" in said
    assert main(["apply", name, "--output", f"again{name.replace('/', '')}"]) == 0
    assert f"written to again{name.replace('/', '')}" in capsys.readouterr().out
    assert (tmp_path / name / "report.md").is_file()


def test_given_weights_show_no_training(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file(build_network("lenet_small", seed=0).state_dict(), tmp_path / "mine.safetensors")
    load_task(read_config([str(config), "--task.weights", "mine.safetensors"]), Progress(enabled=True))
    assert "train network" not in capsys.readouterr().err
    load_task(read_config([str(config)]), Progress(enabled=True))
    assert "train network" in capsys.readouterr().err


def test_missing_data_names_folder_and_option(refused: Callable[..., str], tmp_path: Path) -> None:
    line = refused("search", "lenet_mnist", "--data_root", str(tmp_path / "nowhere"))
    assert str(tmp_path / "nowhere") in line
    assert "--data_root" in line


def test_an_unreachable_budget_ends_before_any_training(refused: Callable[..., str], config: Path) -> None:
    line = refused("search", str(config), "--budget", "0.0001")
    assert "smallest reachable budget" in line


def test_a_full_output_folder_ends_before_any_training(
    refused: Callable[..., str], config: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    line = refused("search", str(config), "--output", str(tmp_path / "mine"))
    assert "empty folder" in line
    assert "--output" in line
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_a_refused_search_leaves_no_run_folder(refused: Callable[..., str], config: Path, tmp_path: Path) -> None:
    refused("search", str(config), "--budget", "0.0001", untrained=False)
    assert not list(tmp_path.glob("runs/*"))


# ---- help ------------------------------------------------------------------------------------------------------------
def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("search", "apply", *shipped_configs()))
    assert main([]) == 2
    for command, options in (("search", ("--budget", "--search.learner.algorithm")), ("apply", ("--schedule",))):
        with pytest.raises(SystemExit) as ended:
            main([command, "--help"])
        assert ended.value.code == 0
        said = capsys.readouterr().out
        assert all(option in said for option in options)


@pytest.mark.parametrize("name", [*shipped_configs(), "quickstart.yaml"])
def test_shipped_configurations_are_found_by_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def stop(settings: object, **_: object) -> None:
        seen.append(settings)
        raise KeyboardInterrupt

    monkeypatch.setattr("prunegym.agent.loading.prepare_task", stop)
    assert main(["search", name]) == 130
    assert len(seen) == 1


def test_shipped_configurations_are_some() -> None:
    assert {"quickstart", "lenet_mnist"} <= set(shipped_configs())


# ---- end to end ------------------------------------------------------------------------------------------------------
def test_search_then_apply(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    look = SealedSplit.open

    def recording(self: SealedSplit, reason: str) -> object:
        opened.append(reason)
        return look(self, reason)

    monkeypatch.setattr(SealedSplit, "open", recording)
    assert main(["search", str(config), "--seed", "3"]) == 0
    said = capsys.readouterr().out
    run = tmp_path / "runs" / "tiny-1"
    assert str(run.relative_to(tmp_path)) in said
    assert "agent" in said
    results = json.loads((run / "results.json").read_text())
    assert (results["evaluations"], results["seed"], results["budget"]) == (6, 3, 0.3)
    assert "search" in (run / "command.txt").read_text()
    assert json.loads((run / "seeds.json").read_text())["root"] == 3
    assert len(opened) == 1

    assert main(["apply", str(run)]) == 0
    made = tmp_path / "runs" / "apply-1"
    first, again = (load_file(folder / "pruned.safetensors") for folder in (run, made))
    assert list(first) == list(again)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert (made / "schedule.json").read_text() == (run / "schedule.json").read_text()

    assert main(["apply", str(made), "--output", str(tmp_path / "third")]) == 0  # what apply made is a run too
    third = load_file(tmp_path / "third" / "pruned.safetensors")
    assert all(torch.equal(first[name], third[name]) for name in first)

    edited = json.loads((run / "schedule.json").read_text())
    edited["rounds"][0]["keep"]["fc1"] = [0, 5, 9]
    (tmp_path / "mine.json").write_text(json.dumps(edited))
    assert main(["apply", str(run), "--schedule", str(tmp_path / "mine.json"), "--output", "edited"]) == 0
    changed = load_file(tmp_path / "edited" / "pruned.safetensors")
    assert changed["fc1.weight"].shape[0] == 3
    assert changed["conv1.weight"].shape == first["conv1.weight"].shape
    assert len(opened) == 1  # `apply` does not look at the test split

    edited["rounds"][0]["keep"]["fc7"] = [0]
    (tmp_path / "mine.json").write_text(json.dumps(edited))
    capsys.readouterr()
    assert main(["apply", str(run), "--schedule", str(tmp_path / "mine.json"), "--output", "broken"]) == 2
    assert "'fc7'; did you mean 'fc1'" in capsys.readouterr().err


def test_a_value_on_the_command_line_beats_the_file(config: Path, tmp_path: Path) -> None:
    arguments = ["--search.trim.budget", "0.5", "--search.compare", "false", "--max_evaluations", "2"]
    assert main(["search", str(config), *arguments, "--output", "here"]) == 0
    results = json.loads((tmp_path / "here" / "results.json").read_text())
    assert (results["budget"], results["evaluations"]) == (0.5, 2)
    assert len(results["finalists"]) == 2  # the original, and what was searched for
    assert main(["search", str(config), *arguments, "--budget", "0.4", "--output", "there"]) == 0
    assert json.loads((tmp_path / "there" / "results.json").read_text())["budget"] == 0.4
    assert len(list((tmp_path / "cache" / "prunegym").glob("*.safetensors"))) == 1  # trained once


# ---- a run that is used from elsewhere -------------------------------------------------------------------------------
MINE = """
from torch import nn

def make_net():
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 12), nn.ReLU(), nn.Linear(12, 10))
"""


@pytest.mark.parametrize("network", ["mynet_elsewhere.py:make_net", "mynet_elsewhere:make_net"])
def test_a_run_of_ones_own_network_is_used_from_elsewhere(
    network: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names stay as they were typed; they are looked for where the run was started, also after all of it moved."""
    project = tmp_path / "project"
    project.mkdir()
    (project / "mynet_elsewhere.py").write_text(MINE)
    (project / "tiny.yaml").write_text(TINY.replace("network: lenet_small", f"network: {network}"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(project)
    quick = ["--max_evaluations", "1", "--search.compare", "false", "--search.latency_batches", "[]"]
    assert main(["search", "tiny.yaml", *quick, "--output", "run"]) == 0
    project.rename(tmp_path / "moved")
    run, away = tmp_path / "moved" / "run", tmp_path / "away"
    written = "".join(path.read_text() for path in run.iterdir() if path.suffix in (".json", ".yaml", ".txt"))
    assert str(project) not in written

    def leave(folder: Path) -> None:
        folder.mkdir()
        monkeypatch.chdir(folder)
        sys.modules.pop("mynet_elsewhere", None)
        monkeypatch.setattr(sys, "path", [entry for entry in sys.path if not entry.startswith(str(tmp_path))])

    leave(away)
    assert main(["apply", str(run), "--output", "again"]) == 0
    first, again = (load_file(folder / "pruned.safetensors") for folder in (run, away / "again"))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert f"network: {network}\n" in (away / "again" / "config.yaml").read_text()

    leave(tmp_path / "further")  # what `apply` made points to the same folder
    assert main(["export", str(away / "again"), "--format", "torch"]) == 0
    leave(tmp_path / "furthest")
    assert main(["apply", str(away / "again"), "--output", "third"]) == 0
    leave(tmp_path / "end")
    loaded = load_pruned(tmp_path / "furthest" / "third").state_dict()
    assert all(torch.equal(first[name], loaded[name]) for name in first)
    sys.modules.pop("mynet_elsewhere", None)


def test_relative_paths_are_looked_for_here_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started, here = tmp_path / "started", tmp_path / "here"
    for folder in (started / "images", here):
        folder.mkdir(parents=True)
    for name in ("w.safetensors", "unseen.txt", "net.py"):
        (started / name).touch()
    (here / "unseen.txt").touch()
    monkeypatch.chdir(here)
    typed = TaskSettings(
        "net.py:make", weights="w.safetensors", data_root="images", splits=SplitSettings(heldout="unseen.txt")
    )
    found = typed.located(started)
    assert found.network == f"{started / 'net.py'}:make"
    assert (found.weights, found.data_root) == (str(started / "w.safetensors"), str(started / "images"))
    assert found.splits.heldout == "unseen.txt"
    assert typed.located(None) == typed
    absolute = TaskSettings(data_root=str(tmp_path / "absent"))
    assert absolute.located(started) == absolute


def test_a_failed_apply_leaves_no_folder(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick = ["--max_evaluations", "1", "--search.compare", "false", "--search.latency_batches", "[]"]
    assert main(["search", str(config), *quick, "--output", "run"]) == 0
    schedule = json.loads((tmp_path / "run" / "schedule.json").read_text())
    whole = {"keep": {"conv1": list(range(8))}}
    (tmp_path / "back.json").write_text(json.dumps({**schedule, "rounds": [*schedule["rounds"], whole]}))
    capsys.readouterr()
    assert main(["apply", "run", "--schedule", "back.json", "--output", "made"]) == 2
    assert "back" in capsys.readouterr().err
    assert not (tmp_path / "made").exists()
    (tmp_path / "seed.json").write_text(json.dumps({**schedule, "seed": 10**40}))
    assert main(["apply", "run", "--schedule", "seed.json", "--output", "made"]) == 2
    assert "the seed of a schedule must be a whole number" in capsys.readouterr().err
    assert not (tmp_path / "made").exists()
