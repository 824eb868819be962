"""A saved network comes back to the bit from its folder alone, without pickle; damaged and foreign files are named."""

import copy
import hashlib
import importlib.metadata
import json
import os
import pickletools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch_pruning
from prunegym.envs.default_task import default_task
from prunegym.pruning import PruningPlan, PruningTask, UserError, apply_plan, build_network, find_groups, load_data
from prunegym.pruning.artifact import load_pruned, save_pruned, write_atomically
from prunegym.pruning.data import SplitSettings
from prunegym.pruning.manifest import MANIFEST, PLAN, WEIGHTS
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from toys import images, random_plan, randomise_norms

KEEP = PruningPlan({"conv1": [1, 2, 6], "conv2": range(3, 11), "fc1": range(0, 64, 4)})


@pytest.fixture(scope="module")
def task() -> PruningTask:
    return default_task()


@pytest.fixture(scope="module")
def smaller(task: PruningTask) -> nn.Module:
    return apply_plan(task.network, find_groups(task.network, task.example), KEEP).eval()


@pytest.fixture
def folder(tmp_path: Path, task: PruningTask, smaller: nn.Module) -> Path:
    save_pruned(tmp_path / "made" / "here", smaller, KEEP, example_shape=tuple(task.example.shape), source=task.source)
    return tmp_path / "made" / "here"


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


# ---- artifacts -------------------------------------------------------------------------------------------------------
def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sign(folder: Path, content: dict[str, Any]) -> None:
    """Write a manifest with right digests, worked out from the format's description."""
    content["sha256"] = {name: sha256((folder / name).read_bytes()) for name in (WEIGHTS, PLAN)}
    content["sha256"][MANIFEST] = sha256(json.dumps(content, sort_keys=True).encode())
    (folder / MANIFEST).write_text(json.dumps(content))


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / MANIFEST).read_text())


def test_a_saved_network_comes_back_exactly(folder: Path, task: PruningTask, smaller: nn.Module) -> None:
    loaded = load_pruned(folder)
    assert same_weights(loaded, smaller)
    inputs = next(iter(task.selection.batches(50))).images
    with torch.inference_mode():
        assert torch.equal(loaded(inputs), smaller(inputs))
    assert not loaded.training
    assert sorted(path.name for path in folder.iterdir()) == sorted([MANIFEST, PLAN, WEIGHTS])  # no drafts left


def test_the_files_hold_no_pickle(folder: Path, smaller: nn.Module) -> None:
    tensors = load_file(folder / WEIGHTS)
    assert {name: tuple(value.shape) for name, value in tensors.items()} == {
        name: tuple(value.shape) for name, value in smaller.state_dict().items()
    }
    assert json.loads((folder / PLAN).read_text()) == {"keep": KEEP.to_dict()}
    assert PruningPlan.load(folder / PLAN) == KEEP
    for path in folder.iterdir():
        data = path.read_bytes()
        assert not data.startswith((b"PK", b"\x80"))
        with pytest.raises(Exception, match=r"opcode|pickle|stack|exhausted|expected|unicode|codec|literal"):
            list(pickletools.genops(data))


def test_the_manifest_says_how_to_rebuild(folder: Path, task: PruningTask) -> None:
    content = read(folder)
    data = load_data("digits", settings=SplitSettings(**task.source["splits"]))
    assert content["format"] == 2
    assert content["network"] == {
        "name": "lenet_small", "arguments": {}, "classes": 10, "image_shape": [1, 28, 28], "started_in": None,
    }  # fmt: skip
    assert content["data"] == {"name": "digits", "mean": list(data.mean), "std": list(data.std)}
    assert (content["example_shape"], content["dtype"]) == ([1, 1, 28, 28], "float32")
    assert content["widths"] == {"conv1": 3, "conv2": 8, "fc1": 16}
    assert content["counts"] == {
        "conv1": {"in_channels": 1, "out_channels": 3, "groups": 1},
        "conv2": {"in_channels": 3, "out_channels": 8, "groups": 1},
        "fc1": {"in_features": 8 * 4 * 4, "out_features": 16},
        "fc2": {"in_features": 16, "out_features": 10},
    }
    assert content["versions"]["torch"] == importlib.metadata.version("torch")
    assert set(content["versions"]) == {"prunegym", "torch", "torchvision", "python"}
    assert content["sha256"][WEIGHTS] == sha256((folder / WEIGHTS).read_bytes())
    signed = read(folder)
    sign(folder, content)
    assert read(folder) == signed


NAMED = {"lenet5_caffe": (1, 28, 28), "cifar_resnet20": (3, 16, 16), "mobilenet_v3_small": (3, 32, 32)}
FRESH = """
import sys, numpy, torch, prunegym
for name in sys.argv[2:]:
    folder = sys.argv[1] + "/" + name
    with torch.inference_mode():
        logits = prunegym.load_pruned(folder)(torch.from_numpy(numpy.load(folder + "/inputs.npy")))
    numpy.save(folder + "/fresh.npy", logits.numpy())
"""


def cut(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, PruningPlan]:
    """Build a network of `NAMED`, cut at random and with batch norms that show a wrong index."""
    shape = NAMED[name]
    network = build_network(name, classes=10, in_channels=shape[0], image_size=shape[-1], seed=3).eval()
    randomise_norms(network, 3)
    groups = find_groups(network, images(shape, 1))
    plan = random_plan(groups, 3)
    return apply_plan(network, groups, plan).to(dtype).eval(), plan


def save_named(folder: Path, name: str, network: nn.Module, plan: PruningPlan) -> None:
    source = {"network": name, "network_arguments": {}, "classes": 10, "image_shape": NAMED[name]}
    save_pruned(folder, network, plan, example_shape=(1, *NAMED[name]), source=source)


def test_named_networks_come_back_from_the_folder_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here and in a fresh process, to the bit: a flatten, residual sums, grouped convolutions, squeeze and excite."""
    expected = {}
    for name, shape in NAMED.items():
        network, plan = cut(name)
        save_named(tmp_path / name, name, network, plan)
        inputs = images(shape, 5)
        np.save(tmp_path / name / "inputs.npy", inputs.numpy())
        with torch.inference_mode():
            expected[name] = network(inputs)
    monkeypatch.setattr(
        torch_pruning.DependencyGraph, "build_dependency", lambda *_, **__: pytest.fail("a network was traced")
    )
    for name, shape in NAMED.items():
        with torch.inference_mode():
            assert torch.equal(load_pruned(tmp_path / name)(images(shape, 5)), expected[name])
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    subprocess.run([sys.executable, "-c", FRESH, tmp_path, *NAMED], check=True, env=environment, timeout=120)
    for name in NAMED:
        assert np.array_equal(np.load(tmp_path / name / "fresh.npy"), expected[name].numpy())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_the_type_comes_back(dtype: torch.dtype, tmp_path: Path) -> None:
    network, plan = cut("cifar_resnet20", dtype)
    save_named(tmp_path, "cifar_resnet20", network, plan)
    assert read(tmp_path)["dtype"] == str(dtype).removeprefix("torch.")
    loaded = load_pruned(tmp_path)
    assert same_weights(loaded, network)
    assert all(value.dtype == network.state_dict()[name].dtype for name, value in loaded.state_dict().items())
    assert loaded.conv1.weight.dtype == dtype
    assert loaded.bn1.num_batches_tracked.dtype == torch.int64


# ---- damaged and foreign folders -------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", [WEIGHTS, PLAN, MANIFEST])
@pytest.mark.parametrize("place", [3, 0.5, -3])
def test_an_altered_byte_is_noticed(place: float, name: str, folder: Path) -> None:
    data = bytearray((folder / name).read_bytes())
    data[place if isinstance(place, int) else int(place * len(data))] ^= 1
    (folder / name).write_bytes(bytes(data))
    with pytest.raises(UserError, match=rf"here/{name}.*copy the folder again"):
        load_pruned(folder)


@pytest.mark.parametrize("name", [WEIGHTS, PLAN])
def test_the_digest_is_named_where_it_is_the_reason(name: str, folder: Path) -> None:
    text = (folder / name).read_bytes()
    (folder / name).write_bytes(text.replace(b"[1, 2, 6]", b"[1, 2, 5]") if name == PLAN else text[:-1] + b"?")
    with pytest.raises(UserError, match=rf"here/{name} must be the file that was saved, but its SHA-256 differs"):
        load_pruned(folder)


def test_an_edited_manifest_is_noticed(folder: Path) -> None:
    content = read(folder)
    content["data"]["mean"] = [0.25]
    (folder / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"here/{MANIFEST} must be as it was saved, but its SHA-256 differs"):
        load_pruned(folder)


@pytest.mark.parametrize("length", [0, 1, 60, -1])
@pytest.mark.parametrize("name", [WEIGHTS, PLAN, MANIFEST])
def test_a_cut_off_file_is_noticed(name: str, length: int, folder: Path) -> None:
    # Without the line break at its end a manifest is still whole.
    data = (folder / name).read_bytes().rstrip(b"\n")
    (folder / name).write_bytes(data[:length])
    with pytest.raises(UserError, match=f"here/{name} must be.*cut off"):
        load_pruned(folder)


@pytest.mark.parametrize("name", [WEIGHTS, PLAN, MANIFEST])
def test_a_missing_file_is_named(name: str, folder: Path) -> None:
    (folder / name).unlink()
    with pytest.raises(UserError, match=f"here/{name} is not there; copy the whole folder"):
        load_pruned(folder)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is a folder, but there is none at .*absent; check the path"):
        load_pruned(tmp_path / "absent")


def test_a_folder_of_the_older_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pruned.json").write_text(json.dumps({"format": 1, "weights": WEIGHTS, "keep": {}}))
    (tmp_path / WEIGHTS).write_bytes(b"")
    with pytest.raises(UserError, match=r"holds pruned\.json; it was saved by another version.*prunegym apply"):
        load_pruned(tmp_path)


def without(key: str) -> Callable[[dict[str, Any]], Any]:
    return lambda content: content.pop(key)


def with_entry(*keys: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    def change(content: dict[str, Any]) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *((without(key), f"must hold '{key}', but does not") for key in (
            "format", "network", "data", "example_shape", "dtype", "widths", "counts", "versions",
        )),
        (with_entry("format", value=3), "must have format 2, but has 3; it was saved by another version"),
        (with_entry("format", value="2"), "'format' .* must be a whole number, but is '2'"),
        (with_entry("network", value=["lenet"]), "'network' .* must be a mapping or null"),
        (with_entry("network", value={}), r"must hold 'network\.name', but does not"),
        (with_entry("network", "name", value=5), r"'network\.name' .* must be a text, but is 5"),
        (with_entry("network", "arguments", value=None), r"'network\.arguments' .* must be a mapping, but is None"),
        (with_entry("network", "classes", value="ten"), r"'network\.classes' .* but is 'ten'"),
        (with_entry("network", "image_shape", value=[1, 28.0]), r"'network\.image_shape' .* but is \[1, 28\.0\]"),
        (with_entry("data", "mean", value=["a"]), r"'data\.mean' .* must be a list of numbers or null"),
        (with_entry("example_shape", value=[1, -1]), "'example_shape' .* must be a list of positive whole numbers"),
        (with_entry("dtype", value="float33"), "'dtype' .* must be one of float16, .*, but is 'float33'"),
        (with_entry("dtype", value=[]), "'dtype' .* must be one of"),
        (with_entry("widths", "conv1", value=True), "'widths' .* must be a mapping from groups"),
        (with_entry("counts", "conv1", value=3), "'counts' .* must be layer -> attribute"),
        (with_entry("counts", "conv1", "out_channels", value=0), "'counts' .* must be layer -> attribute"),
        (with_entry("versions", value=None), "'versions' .* must be a mapping"),
    ],
)  # fmt: skip
def test_a_wrong_entry_of_the_manifest_is_named(change: Callable[..., Any], message: str, folder: Path) -> None:
    content = read(folder)
    change(content)
    sign(folder, content)
    with pytest.raises(UserError, match=message) as caught:
        load_pruned(folder)
    assert f"here/{MANIFEST}" in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "null", '{"format": 2}', "[" * 5000])
def test_a_manifest_that_is_none_is_named(text: str, folder: Path) -> None:
    (folder / MANIFEST).write_text(text)
    with pytest.raises(UserError, match=f"here/{MANIFEST} must .*copy the folder again"):
        load_pruned(folder)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "lacks 'conv1.weight'"),
        ({"fc9.weight": torch.zeros(2)}, "has a tensor too many, 'fc9.weight'"),
        ({"fc1.bias": torch.zeros(65)}, r"'fc1.bias' has shape \(65,\) there and \(64,\) in the uncut network"),
        ({"fc1.bias": torch.zeros(1, 16)}, r"'fc1.bias' has shape \(1, 16\)"),
        ({"fc1.bias": torch.zeros(16, dtype=torch.int64)}, r"'fc1.bias' is torch.int64 there and torch.float32"),
    ],
)
def test_foreign_tensors_are_refused_though_their_digest_is_right(
    tensors: dict[str, Tensor], message: str, folder: Path
) -> None:
    own = load_file(folder / WEIGHTS)
    save_file({**own, **tensors} if tensors else {"body.weight": torch.zeros(3)}, folder / WEIGHTS)
    sign(folder, read(folder))
    with pytest.raises(UserError, match=f"here/{WEIGHTS} must fit the network, but .*{message}"):
        load_pruned(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_entry("counts", "fc1", "in_features", value=127), "must give 'fc1' the sizes of its tensors"),
        (without("counts"), "must hold 'counts'"),
        (with_entry("counts", value={}), "must give 'conv1' the sizes of its tensors"),
        (with_entry("counts", "conv1", "out_channels", value=9), r"conv1\.out_channels is 9 there and 8 in the uncut"),
        (with_entry("counts", "conv1", "kernel", value=1), r"conv1\.kernel is 1 there and absent"),
        (with_entry("counts", "conv9", value={"groups": 1}), r"conv9\.groups is 1 there and absent"),
        (with_entry("dtype", value="float64"), "must hold float64 as its manifest says"),
        (with_entry("widths", "conv1", value=2), f"{PLAN} must leave the widths that {MANIFEST} names"),
        (with_entry("network", "name", value="lenet_smal"), "cannot be built: .*did you mean 'lenet_small'"),
        (with_entry("network", "name", value="absent_module:make"), "cannot be built: .*pass the original"),
        (with_entry("network", "arguments", value={"widths": "abc"}), "cannot be built: TypeError"),
        (with_entry("network", "arguments", value={"widths": [8, 16, 32]}), f"{PLAN} must fit .* of 'fc1', which has"),
        (with_entry("network", "name", value="lenet300_100"), rf"{WEIGHTS} must fit .* lacks 'fc3\.weight'"),
    ],
)
def test_a_manifest_of_another_network_is_refused(change: Callable[..., Any], message: str, folder: Path) -> None:
    content = read(folder)
    change(content)
    sign(folder, content)
    with pytest.raises(UserError, match=message) as caught:
        load_pruned(folder)
    assert "here/" in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[]", '{"keep": [1]}', '{"keep": {"conv1": []}}'])
def test_a_plan_file_without_a_plan_is_refused_though_its_digest_is_right(text: str, folder: Path) -> None:
    (folder / PLAN).write_text(text)
    sign(folder, read(folder))
    with pytest.raises(UserError, match=f"here/{PLAN} must "):
        load_pruned(folder)


# ---- networks of the user's own --------------------------------------------------------------------------------------
class Own(nn.Module):
    """A user's network, with a weight that two layers share."""

    def __init__(self, hidden: int = 6) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(5, hidden), nn.ReLU(), nn.Linear(hidden, 4), nn.ReLU())
        self.one = nn.Linear(4, 3)
        self.two = nn.Linear(4, 3)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.body(x)
        return self.one(hidden) + self.two(hidden)


OWN_PLAN = PruningPlan({"body.1": [0, 2, 5]})


def cut_own() -> nn.Module:
    torch.manual_seed(0)
    network = Own().eval()
    return apply_plan(network, find_groups(network, torch.zeros(1, 5)), OWN_PLAN)


def test_a_users_own_network_is_passed_in(tmp_path: Path) -> None:
    smaller, inputs = cut_own(), torch.randn(40, 5)
    save_pruned(tmp_path, smaller, OWN_PLAN, example_shape=(1, 5), source={})
    with pytest.raises(UserError, match=r"no name to build it by; pass the original: load_pruned\(folder, network\)"):
        load_pruned(tmp_path)
    original = Own()
    before = copy.deepcopy(original.state_dict())
    loaded = load_pruned(tmp_path, original)
    with torch.inference_mode():
        assert torch.equal(loaded(inputs), smaller(inputs))
    assert loaded.one.weight is loaded.two.weight
    assert all(torch.equal(before[name], value) for name, value in original.state_dict().items())
    assert original.body[1].out_features == 6
    for other, message in (
        (Own(hidden=5), f"{PLAN} must fit the network, but keeps channel 5 of 'body.1', which has 5 channels"),
        (nn.Sequential(nn.Linear(5, 6)), f"{WEIGHTS} must fit .*pass the architecture that it was cut from"),
    ):
        with pytest.raises(UserError, match=message):
            load_pruned(tmp_path, other)


def test_a_shared_tensor_cannot_come_back_with_two_contents(tmp_path: Path) -> None:
    save_pruned(tmp_path, cut_own(), OWN_PLAN, example_shape=(1, 5), source={})
    tensors = load_file(tmp_path / WEIGHTS)
    save_file({**tensors, "two.weight": tensors["two.weight"] + 1}, tmp_path / WEIGHTS)
    sign(tmp_path, read(tmp_path))
    with pytest.raises(UserError, match=r"'two\.weight', which is shared, differs there"):
        load_pruned(tmp_path, Own())


@pytest.mark.parametrize("name", ["own_saved_network:make", "own_saved_network.py:make"])
def test_a_users_own_network_is_imported_by_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "from torch import nn\ndef make(hidden):\n"
    code += "    return nn.Sequential(nn.Linear(5, hidden), nn.ReLU(), nn.Linear(hidden, 3))\n"
    (tmp_path / "own_saved_network.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "own_saved_network", raising=False)
    network = build_network(name, arguments={"hidden": 7}, seed=1).eval()
    plan = PruningPlan({"0": [1, 6]})
    smaller = apply_plan(network, find_groups(network, torch.zeros(1, 5)), plan)
    source = {"network": name, "network_arguments": {"hidden": 7}, "data": "mine"}
    save_pruned(tmp_path / "saved", smaller, plan, example_shape=(1, 5), source=source)
    assert read(tmp_path / "saved")["data"] == {"name": "mine", "mean": None, "std": None}
    assert same_weights(load_pruned(tmp_path / "saved"), smaller)
    (tmp_path / "own_saved_network.py").unlink()
    monkeypatch.delitem(sys.modules, "own_saved_network")
    with pytest.raises(UserError, match=f"{MANIFEST} cannot be built: .*; pass the original"):
        load_pruned(tmp_path / "saved")
    assert same_weights(load_pruned(tmp_path / "saved", network), smaller)  # passed in, nothing is imported
    monkeypatch.delitem(sys.modules, "own_saved_network", raising=False)


@pytest.mark.parametrize("name", ["own_moved_network:make", "own_moved_network.py:make"])
def test_a_users_own_network_is_found_from_elsewhere(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative to the folder in which its name was typed, which may move together with the saved one."""
    project, module = tmp_path / "project", "own_moved_network"
    project.mkdir()
    (project / f"{module}.py").write_text("from torch import nn\ndef make():\n    return nn.Linear(5, 3)\n")
    monkeypatch.chdir(project)
    network = build_network("own_moved_network.py:make")
    source = {"network": name, "network_arguments": {}}
    save_pruned(project / "runs" / "one", network, PruningPlan({}), example_shape=(1, 5), source=source)
    content = read(project / "runs" / "one")
    assert content["network"]["name"] == name
    assert content["network"]["started_in"] == "../.."
    project.rename(tmp_path / "moved")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if not entry.startswith(str(tmp_path))])
    assert same_weights(load_pruned(tmp_path / "moved" / "runs" / "one"), network)
    monkeypatch.delitem(sys.modules, module)

    other = "from torch import nn\ndef make():\n    return nn.Linear(4, 3)\n"  # the working directory comes first
    (tmp_path / "elsewhere" / f"{module}.py").write_text(other)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if not entry.startswith(str(tmp_path))])
    with pytest.raises(UserError, match="must fit the network"):
        load_pruned(tmp_path / "moved" / "runs" / "one")
    monkeypatch.delitem(sys.modules, module)


def test_a_manifest_without_the_folder_of_the_name_is_read(tmp_path: Path) -> None:
    network = build_network("lenet_small", seed=0)
    save_pruned(tmp_path, network, PruningPlan({}), example_shape=(1, 1, 28, 28), source={"network": "lenet_small"})
    content = read(tmp_path)
    del content["network"]["started_in"]
    sign(tmp_path, content)
    assert same_weights(load_pruned(tmp_path), network)


class Scaled(nn.Module):
    """Keeps a buffer out of its state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(5, 3)
        self.register_buffer("scale", torch.ones(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.scale


class Noted(nn.Linear):
    """Keeps something that is no tensor."""

    def get_extra_state(self) -> Any:
        return {"note": "text"}

    def set_extra_state(self, state: Any) -> None:
        del state


def test_buffers_outside_the_state_dict_come_back(tmp_path: Path) -> None:
    network = Scaled()
    network.scale.copy_(torch.tensor([2.0, -1.0, 0.5]))
    save_pruned(tmp_path, network, PruningPlan({}), example_shape=(1, 5), source={})
    assert load_pruned(tmp_path, Scaled()).scale.tolist() == [2.0, -1.0, 0.5]


@pytest.mark.parametrize(
    ("network", "source", "message"),
    [
        (Noted(5, 3), {}, "holds tensors only, but '_extra_state' keeps other state"),
        (nn.Flatten(), {}, "must be of float16, .* but is of none"),
        (nn.Linear(5, 3), {"network": "x:y", "network_arguments": {"device": torch.device("cpu")}}, "must be plain"),
    ],
)
def test_what_cannot_be_saved_is_refused(
    network: nn.Module, source: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        save_pruned(tmp_path / "here", network, PruningPlan({}), example_shape=(1, 5), source=source)
    assert not (tmp_path / "here").exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"needs a folder to be saved in, but .*file/here: Not a directory"):
        save_pruned(tmp_path / "file" / "here", Own(), PruningPlan({}), example_shape=(1, 5), source={})


def test_a_save_that_fails_leaves_the_older_network(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    write = Path.write_bytes

    def fail(self: Path, data: bytes) -> int:
        if MANIFEST in self.name:
            raise OSError(28, "No space left on device")
        return write(self, data)

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(UserError, match=r"here: No space left on device"):
        save_pruned(folder, Own(), PruningPlan({}), example_shape=(1, 5), source={})
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_file_is_complete_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(b"old")

    def fail(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[:1])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
