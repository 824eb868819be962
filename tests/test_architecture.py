"""Architecture files: what a search found, built again from random weights, and used as a network."""

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from prunegym.agent.cli import main
from prunegym.agent.run_folder import RunFolder
from prunegym.pruning import (
    Built,
    PruningPlan,
    PruningTask,
    Round,
    Schedule,
    SplitSettings,
    TaskSettings,
    UserError,
    apply_plan,
    build_network,
    find_groups,
    prepare_task,
)
from prunegym.pruning.architecture import Architecture
from prunegym.pruning.artifact import load_pruned
from prunegym.pruning.narrowing import forget, narrow
from prunegym.pruning.networks import build_architecture
from prunegym.pruning.retraining import RetrainSettings
from torch import nn
from toys import benchmark

LENET: dict[str, Any] = {"network": "lenet_small", "input_shape": [1, 28, 28], "widths": {"conv1": 3, "fc1": 20}}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)  # the configurations set it


def shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in network.state_dict().items()}


def written(
    tmp_path: Path, original: nn.Module, plan: PruningPlan, shape: tuple[int, ...], **source: Any
) -> tuple[Path, nn.Module]:
    """Write a run folder as any command does; returns its architecture file and the network that `plan` leaves."""
    images, labels = torch.randn(8, *shape, generator=torch.Generator().manual_seed(0)), torch.zeros(8).long()
    pair = (images, labels)
    task = PruningTask(original, pair, pair, pair, pair, source=source)
    groups = find_groups(original, task.example)
    pruned = apply_plan(original, groups, plan)
    built = Built(pruned, Schedule((Round(plan),), made_by="uniform"), ())
    folder = RunFolder.create(tmp_path / "run")
    folder.write_built(task, built, budget=0.5, budget_unit="params")
    return folder.path / "architecture.yaml", pruned


# ---- the round trip --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "shape", "arguments"),
    [
        ("lenet5_caffe", (1, 28, 28), {}),
        ("cifar_resnet20", (3, 32, 32), {}),
        ("cifar_vgg16_bn", (3, 32, 32), {"widths": (8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20)}),
        ("mobilenet_v2", (3, 32, 32), {"width_mult": 0.25}),
    ],
)
def test_a_written_architecture_builds_the_same_shapes(
    name: str, shape: tuple[int, ...], arguments: dict[str, Any], tmp_path: Path
) -> None:
    """Which channels left does not matter: any plan of these widths has the same shapes."""
    network = build_network(
        name, classes=7, in_channels=shape[0], image_size=shape[1], arguments=arguments, seed=0
    ).eval()
    generator = torch.Generator().manual_seed(1)
    keep = {}
    for group in find_groups(network, torch.zeros(1, *shape)):
        count = int(torch.randint(1, group.width + 1, (), generator=generator))
        keep[group.name] = torch.randperm(group.width, generator=generator)[:count].tolist()
    source = {"network": name, "network_arguments": arguments, "classes": 7, "image_shape": shape}
    path, pruned = written(tmp_path, network, PruningPlan(keep), shape, **source)
    built = build_architecture(path, seed=3)
    assert shapes(built) == shapes(pruned)
    assert sum(p.numel() for p in built.parameters()) == sum(p.numel() for p in pruned.parameters())
    assert built.training
    assert built.eval()(torch.zeros(2, *shape)).shape == (2, 7)
    content = yaml.safe_load(path.read_text())
    assert content["found_by"]["params"] == sum(p.numel() for p in pruned.parameters())
    whole = sum(p.numel() for p in network.parameters())
    assert content["found_by"]["params_kept"] == pytest.approx(content["found_by"]["params"] / whole, abs=1e-6)
    assert (content["found_by"]["budget"], content["found_by"]["budget_unit"]) == (0.5, "params")
    assert str(tmp_path) not in path.read_text()


def test_a_search_leaves_an_architecture_that_can_be_edited_trained_and_pruned_again() -> None:
    quick = [
        "--task.training.updates=30", "--search.trim.retraining.updates=5", "--budget=0.3", "--output=found",
        "--search.max_evaluations=4", "--search.learner.episodes_per_update=2", "--search.compare=false",
        "--search.pool=false",
    ]  # fmt: skip
    assert main(["search", "quickstart", "--task.network=lenet_small", *quick]) == 0
    path = Path("found/architecture.yaml")
    assert shapes(build_architecture(path)) == shapes(load_pruned("found"))
    found = Architecture.load(path)
    assert (found.found_by.made_by, found.found_by.budget, found.found_by.budget_unit) == ("agent", 0.3, "params")
    text = path.read_text().replace(f"fc1: {found.widths['fc1']}\n", "fc1: 5\n")
    Path("edited.yaml").write_text(text)
    again = ["--task.training.updates=30", "--search.trim.retraining.updates=5", "--budget=0.7", "--output=again"]
    assert main(["prune", "--method", "l1", "quickstart", "--task.network=edited.yaml", *again]) == 0
    Path("edited.yaml").unlink()
    network = load_pruned("again")  # the saved network holds the widths it was narrowed to
    assert network.get_submodule("fc1").out_features <= 5
    assert shapes(build_architecture("again/architecture.yaml")) == shapes(network)


def test_a_task_trains_an_architecture_from_scratch_and_saves_without_the_file() -> None:
    Path("small.yaml").write_text(yaml.safe_dump(LENET))
    settings = TaskSettings(
        network="small.yaml", splits=SplitSettings(reward=200, selection=100), training=RetrainSettings(updates=40)
    )
    task = prepare_task(settings, seed=1)
    fresh = build_architecture("small.yaml", classes=10, in_channels=1, image_size=task.example.shape[-1], seed=1)
    assert shapes(task.network) == shapes(fresh)
    assert not torch.equal(task.network.get_submodule("fc2").weight, fresh.get_submodule("fc2").weight)
    assert task.source["network"] == "lenet_small"
    rebuilt = build_network(
        task.source["network"], in_channels=1, image_size=task.example.shape[-1],
        arguments=task.source["network_arguments"], seed=1,
    )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(rebuilt.parameters(), fresh.parameters(), strict=True))
    kept = list(Path("cache/prunegym").glob("*.safetensors"))
    prepare_task(replace(settings, network="lenet_small"), seed=1)
    assert len(list(Path("cache/prunegym").glob("*.safetensors"))) == len(kept) + 1  # other widths, other weights


def test_the_data_and_the_users_settings_come_before_the_file(tmp_path: Path) -> None:
    Path("small.yaml").write_text(yaml.safe_dump(LENET))
    settings = TaskSettings(network="small.yaml", network_arguments={"group_widths": {"conv1": 2}})
    assert settings.unfolded().network_arguments == {"group_widths": {"conv1": 2}}
    other = build_network("small.yaml", classes=3, in_channels=2, image_size=16)
    assert shapes(other)["conv1.weight"] == (3, 2, 5, 5)
    assert shapes(other)["fc1.weight"] == (20, 16)  # one position is left of 16x16
    assert shapes(other)["fc2.weight"] == (3, 20)
    (tmp_path / "inner").mkdir()
    Path("small.yaml").rename("inner/small.yaml")
    assert settings.located(tmp_path / "inner").unfolded().network == "lenet_small"


# ---- initial weights -------------------------------------------------------------------------------------------------
def test_the_weights_are_those_of_a_new_network_of_these_widths() -> None:
    """Against a network whose constructor was given the widths: bounds ±1/√fan-in, and all of the range is used."""
    given = {**LENET, "network": "lenet5_caffe", "widths": {"conv1": 3, "fc1": 40}}
    built = build_architecture(given, seed=0)
    narrow_made = build_network("lenet5_caffe", arguments={"widths": (3, 50, 40)}, seed=0)
    assert shapes(built) == shapes(narrow_made)
    fan_in = {"conv1": 25, "conv2": 3 * 25, "fc1": 800, "fc2": 40}
    for name, fan in fan_in.items():
        layer: Any = built.get_submodule(name)
        bound = 1 / math.sqrt(fan)
        assert 0.8 * bound < layer.weight.abs().max() <= bound * (1 + 1e-6), name
        assert layer.bias.abs().max() <= bound * (1 + 1e-6), name
        reference: Any = narrow_made.get_submodule(name)
        if layer.weight.numel() > 1000:
            spread, expected = (float(one.weight.detach().std()) for one in (layer, reference))
            assert spread == pytest.approx(expected, rel=0.06), name


def test_torchvision_keeps_its_own_scale_for_a_smaller_fan_in() -> None:
    """ResNet-18 draws N(0, 2 / fan-out); PyTorch's default would have the variance 1 / (3 fan-in)."""
    given = {"network": "resnet18", "input_shape": [3, 32, 32], "widths": {"layer1.0.conv1": 16}, "classes": 4}
    layer: Any = build_architecture(given, seed=0).get_submodule("layer1.0.conv2")
    assert tuple(layer.weight.shape) == (64, 16, 3, 3)
    wide = math.sqrt(2 / (64 * 9))
    assert float(layer.weight.detach().std()) == pytest.approx(wide * math.sqrt(64 / 16), rel=0.02)


def test_the_seed_decides_and_the_random_state_comes_back() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first, again, other = (build_architecture(LENET, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.get_submodule("fc1").weight, other.get_submodule("fc1").weight)


TRAINED = """
import torch
from torch import nn

def make(hidden=6):
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, hidden), nn.ReLU(), nn.Linear(hidden, 3))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(7.0)
    return network
"""


def test_nothing_is_left_of_weights_that_a_users_function_brings(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "own_trained.py").write_text(TRAINED)
    network = build_network("code/own_trained.py:make", arguments={"hidden": 8})
    plan = PruningPlan({"1": [0, 2, 5]})
    path, _ = written(
        tmp_path, network, plan, (1, 2, 2), network=str(tmp_path / "code" / "own_trained.py") + ":make",
        network_arguments={"hidden": 8}, image_shape=(1, 2, 2), started_in=str(tmp_path),
    )  # fmt: skip
    assert str(tmp_path) not in path.read_text()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    built = build_architecture(path, seed=0)
    assert shapes(built)["1.weight"] == (3, 4)
    assert all(bool((value.abs() < 1).all()) for value in built.parameters())


def test_a_network_without_a_name_is_passed_in(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    path, _ = written(tmp_path, network, PruningPlan({"1": [4]}), (1, 2, 2))
    with pytest.raises(UserError, match=r"must name its network to be built, but .*says null; pass the network"):
        build_architecture(path)
    built = build_architecture(path, network=network, seed=0)
    assert shapes(built)["3.weight"] == (3, 1)
    assert shapes(network)["3.weight"] == (3, 6)


def test_attention_forgets_as_its_constructor_draws() -> None:
    """PyTorch zeroes the biases of attention after its inner layer has drawn them."""
    attention = nn.MultiheadAttention(8, 2)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.fill_(3.0)
    forget(nn.Sequential(attention))
    assert attention.in_proj_weight is not None
    assert bool((attention.in_proj_weight.abs() <= math.sqrt(6 / (8 + 24)) + 1e-6).all())  # Xavier uniform
    assert not attention.out_proj.bias.any()


# ---- mistakes --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("change", "wording"),
    [
        (lambda c: c.update(width=c.pop("widths")), "known keys only, but got 'width'; did you mean 'widths'"),
        (lambda c: c.pop("widths"), "has no 'widths'; add it"),
        (lambda c: c.update(widths={"conv3": 2}), "groups of the network, but got 'conv3'; did you mean 'conv"),
        (lambda c: c.update(widths={"fc2": 2}), "groups that can be cut, but got 'fc2': "),
        (lambda c: c.update(widths={"conv1": 9}), "group 'conv1' must keep 1 to 8 channels, but got 9"),
        (lambda c: c.update(widths={"conv1": 0}), "width of group 'conv1' must be a whole number from 1, but got 0"),
        (lambda c: c.update(widths={"conv1": "many"}), "widths must be a mapping of whole numbers"),
        (lambda c: c.update(widths=[3]), "widths must be a mapping of whole numbers"),
        (lambda c: c.update(widths={1: 3}), "must be names, but got 1; put it in quotes"),
        (lambda c: c.update(network="lenet_smal"), "'lenet_smal'; did you mean 'lenet_small'"),
        (lambda c: c.update(network=3), "network must be a text or None, but got 3"),
        (lambda c: c.update(arguments={"widht": 3}), "'widht'; its arguments are: .*widths"),
        (lambda c: c.update(input_shape=[1, 0, 8]), r"input_shape must be positive numbers .* but got \[1, 0, 8\]"),
        (lambda c: c.update(input_shape="8x8"), "input_shape must be a list of whole numbers"),
        (lambda c: c.update(classes=0), "classes must be 1 or more, but got 0"),
        (lambda c: c.update(format=2), "must have format 1, but got 2"),
        (lambda c: c.update(found_by={"bugdet": 1}), "found_by .*'bugdet'; did you mean 'budget'"),
    ],
)
def test_wrong_files_are_explained(change: Callable[[dict[str, Any]], Any], wording: str) -> None:
    content = dict(LENET)
    change(content)
    Path("wrong.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match=rf"wrong\.yaml: .*{wording}"):
        build_architecture("wrong.yaml")


@pytest.mark.parametrize(
    ("text", "wording"),
    [
        ("widths: {conv1: [", r"must be YAML, but wrong\.yaml is not"),
        ("just a text", "an architecture must be a mapping"),
        ("", "has no 'network'"),
        ("network: lenet_small\nwidths:\n  conv1: 3\n  conv1: 4\n", "'conv1' is given twice"),
    ],
)
def test_files_that_are_none_are_explained(text: str, wording: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("wrong.yaml").write_text(text)
    assert main(["search", "quickstart", "--task.network=wrong.yaml"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    with pytest.raises(UserError, match=wording) as problem:
        build_architecture("wrong.yaml")
    assert str(problem.value) in said


def test_a_missing_file_and_missing_shape() -> None:
    with pytest.raises(UserError, match=r"must be readable, but none\.yaml is not: No such file"):
        build_network("none.yaml")
    Path("own_plain.py").write_text("from torch import nn\n\ndef make():\n    return nn.Linear(4, 2)\n")
    with pytest.raises(UserError, match=r"group_widths of 'own_plain.py:make' need the shape of an image"):
        build_network("own_plain.py:make", arguments={"group_widths": {"a": 1}})
    with pytest.raises(UserError, match=r"must map groups to channels, such as \{conv1: 6\}, but got 3"):
        narrow(nn.Linear(2, 2), 3, (2,), drawn=True)  # type: ignore[arg-type]


# ---- the control -----------------------------------------------------------------------------------------------------
def cells(page: str) -> Mapping[str, list[str]]:
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    return {row[0]: row[1:] for row in rows}


def test_the_control_trains_the_same_architecture_for_each_length(capsys: pytest.CaptureFixture[str]) -> None:
    tiny = ["--task.network=lenet_small", "--task.training.updates=20", "--search.trim.retraining.updates=6"]
    assert main(["prune", "--method", "l1", "quickstart", *tiny, "--budget=0.3", "--output=run"]) == 0
    module = benchmark("architecture")
    assert module.main(["run", "quickstart", *tiny, "--seeds", "0", "1", "--double", "--table", "page.md"]) == 0
    table = cells(Path("page.md").read_text())
    params = f"{sum(p.numel() for p in load_pruned('run').parameters()):,}"
    lengths = {"pruned, fine-tuned": "6", "from scratch, the retraining's updates": "6",
               "from scratch, the original's updates": "20",
               "from scratch, twice the original's updates": "40"}  # fmt: skip
    for row, updates in lengths.items():
        assert (table[row][0], table[row][2]) == (params, updates), row
        assert "±" in table[row][4], row
    capsys.readouterr()
    assert module.main(["run/architecture.yaml", "quickstart", *tiny]) == 0
    only = cells(capsys.readouterr().out)
    assert "pruned, fine-tuned" not in only
    assert only["from scratch, the original's updates"][0] == params
    with pytest.raises(UserError, match=r"--seeds must name two or more, but got \[3, 3\]"):
        module.main(["run", "quickstart", "--seeds", "3", "3"])
