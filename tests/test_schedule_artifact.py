"""Schedules replay to the same weights, files round-trip without pickle, and damaged files are named."""

import copy
import json
import pickletools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from prunegym.envs.default_task import default_task
from prunegym.pruning import PruningPlan, PruningTask, RepairSettings, Round, Schedule, Trimmer, UserError, build
from prunegym.pruning.artifact import MANIFEST, WEIGHTS, load_pruned, save_pruned, write_atomically
from prunegym.pruning.retraining import RetrainSettings
from prunegym.pruning.schedule import Built, round_seed
from safetensors.torch import load_file
from torch import Tensor, nn

FIRST = PruningPlan({"conv1": [0, 1, 2, 4, 6], "conv2": range(2, 14), "fc1": range(0, 64, 2)})
SECOND = PruningPlan({"conv1": [1, 2, 6], "conv2": range(3, 11), "fc1": range(0, 64, 4)})
TRAINING = RetrainSettings(batch_size=32, learning_rate=0.01, distillation=0.3)
SCHEDULE = Schedule((Round(FIRST, 5), Round(SECOND, 7)), RepairSettings(calibration_images=128), TRAINING, 11, "hand")


@pytest.fixture(scope="module")
def task() -> PruningTask:
    return default_task()


@pytest.fixture(scope="module")
def trimmer(task: PruningTask) -> Trimmer:
    return Trimmer(task, SCHEDULE.repair)


@pytest.fixture(scope="module")
def built(trimmer: Trimmer) -> Built:
    return build(trimmer, SCHEDULE)


@pytest.fixture
def folder(tmp_path: Path, task: PruningTask, built: Built) -> Path:
    shape = tuple(task.example.shape)
    save_pruned(tmp_path / "made" / "here", built.network, SECOND, example_shape=shape, source=task.source)
    return tmp_path / "made" / "here"


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


def outputs(network: nn.Module, task: PruningTask) -> Tensor:
    with torch.inference_mode():
        return network(next(iter(task.selection.batches(50))).images)


# ---- schedules -------------------------------------------------------------------------------------------------------
def test_a_schedule_survives_json(tmp_path: Path) -> None:
    SCHEDULE.save(tmp_path / "schedule.json")
    text = (tmp_path / "schedule.json").read_text()
    assert Schedule.load(tmp_path / "schedule.json") == SCHEDULE
    assert Schedule.from_dict(json.loads(text)).to_dict() == SCHEDULE.to_dict()
    assert '"conv1": [1, 2, 6]' in text  # a person can edit it
    assert SCHEDULE.retrain_updates == 12
    assert SCHEDULE.plan == SECOND


def test_an_edited_file_is_what_is_built(tmp_path: Path, trimmer: Trimmer) -> None:
    path = tmp_path / "schedule.json"
    SCHEDULE.save(path)
    path.write_text(path.read_text().replace('"conv1": [1, 2, 6]', '"conv1": [1, 6]').replace(": 7", ": 0"))
    edited = build(trimmer, Schedule.load(path))
    assert edited.rounds[-1].widths == {"conv1": 2, "conv2": 8, "fc1": 16}
    assert [entry.retrain_updates for entry in edited.rounds] == [5, 0]
    assert edited.network.conv1.out_channels == 2


def test_only_rounds_are_needed() -> None:
    schedule = Schedule.from_dict({"rounds": [{"keep": {"conv1": [3, 0]}}]})
    assert schedule == Schedule((Round(PruningPlan({"conv1": [0, 3]}), 0),))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rounds": []}, "at least one round"),
        ({"rounds": {"keep": {}}}, "must hold a list 'rounds'"),
        ({"format": 99}, "format 1, but got 99"),
        ({"rounds": [{"widths": {"conv1": 3}}]}, "round 0 of a schedule must hold 'keep'"),
        ({"rounds": [{"keep": {"conv1": []}}]}, "'conv1' keeps none"),
        ({"rounds": [{"keep": {"conv1": [0, 0]}}]}, "distinct indices"),
        (
            {"rounds": [{"keep": {"conv1": [0]}, "retrain_updates": -2}]},
            "retrain_updates of round 0 must be a whole number from 0, but got -2",
        ),
        ({"rounds": [{"keep": {"conv1": [0]}, "retrain_updates": 1.5}]}, "retrain_updates of round 0 .* got 1.5"),
        ({"repair": {"criterium": "apoz"}}, "'criterium'; did you mean 'criterion'"),
        ({"repair": {"criterion": "apos"}}, "did you mean 'apoz'"),
        ({"repair": [1]}, "'repair' of a schedule must hold settings"),
        ({"retraining": {"learning_rat": 1}}, "did you mean 'learning_rate'"),
        ({"retraining": {"learning_rate": -1}}, "learning_rate must be positive"),
        ({"retraining": {"learning_rate": "fast"}}, "learning_rate"),
        ({"seed": "x"}, "seed"),
    ],
)
def test_a_broken_schedule_is_explained_and_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "edited.json"
    path.write_text(json.dumps({**SCHEDULE.to_dict(), **change}))
    with pytest.raises(UserError, match=message) as caught:
        Schedule.load(path)
    assert "edited.json" in str(caught.value)


@pytest.mark.parametrize(("text", "message"), [("{", "must be JSON, but .*x.json is not"), ("[]", "x.json: .*rounds")])
def test_no_schedule_at_all(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=message):
        Schedule.load(tmp_path / "x.json")
    with pytest.raises(UserError, match=r"must be readable, but .*absent\.json is not"):
        Schedule.load(tmp_path / "absent.json")


# ---- building --------------------------------------------------------------------------------------------------------
def test_building_twice_gives_the_same_bits(task: PruningTask, trimmer: Trimmer, built: Built) -> None:
    before = copy.deepcopy(task.network.state_dict())
    torch.manual_seed(99)  # the global random state must not matter
    again = build(Trimmer(task, SCHEDULE.repair), SCHEDULE)
    assert same_weights(again.network, built.network)
    assert [entry.after_retraining for entry in again.rounds] == [entry.after_retraining for entry in built.rounds]
    assert not same_weights(build(trimmer, replace(SCHEDULE, seed=12)).network, built.network)
    assert all(torch.equal(task.network.state_dict()[name], value) for name, value in before.items())


def test_building_uses_the_schedules_own_repair(task: PruningTask, built: Built) -> None:
    other = Trimmer(task, RepairSettings(criterion="l1", compensation="delete"))
    assert same_weights(build(other, SCHEDULE).network, built.network)


def test_rounds_are_nested_and_each_is_recorded(built: Built, task: PruningTask) -> None:
    assert [entry.widths for entry in built.rounds] == [FIRST.counts, SECOND.counts]
    assert [entry.retrain_updates for entry in built.rounds] == [5, 7]
    assert built.cost == built.rounds[-1].cost
    assert built.cost.params == sum(parameter.numel() for parameter in built.network.parameters())
    assert built.rounds[0].cost.params > built.rounds[1].cost.params
    assert built.network.fc1.in_features == 8 * 16  # 8 maps of 4x4
    assert not built.network.training


def test_rounds_are_cut_from_what_the_round_before_left(task: PruningTask, trimmer: Trimmer, built: Built) -> None:
    """Replayed by hand with `trim` and `retrain`, in the numbering of what is left."""
    first = trimmer.retrain(trimmer.trim(FIRST), replace(TRAINING, updates=5), seed=round_seed(11, 0))
    relative = PruningPlan({name: [FIRST[name].index(channel) for channel in keep] for name, keep in SECOND.items()})
    second = trimmer.trim(relative, trimmer.examine_trimmed(first))
    second = trimmer.retrain(second, replace(TRAINING, updates=7), seed=round_seed(11, 1))
    assert second.plan == SECOND
    assert same_weights(second.network, built.network)


def test_a_channel_that_left_does_not_come_back(trimmer: Trimmer) -> None:
    back = Schedule((Round(SECOND), Round(FIRST)), SCHEDULE.repair)
    with pytest.raises(UserError, match=r"'conv1' wants \[0, 4\] back"):
        build(trimmer, back)


@pytest.mark.parametrize(
    ("keep", "message"),
    [({"conv3": [0]}, "'conv3'; did you mean 'conv"), ({"conv1": [0, 8]}, "channels 0 to 7, but the plan keeps")],
)
def test_a_plan_for_another_network_is_refused(keep: dict[str, list[int]], message: str, trimmer: Trimmer) -> None:
    with pytest.raises(UserError, match=message):
        build(trimmer, Schedule((Round(PruningPlan(keep)),), SCHEDULE.repair))


def test_progress_counts_over_all_rounds(trimmer: Trimmer) -> None:
    seen: list[int] = []
    build(trimmer, SCHEDULE, progress=seen.append)
    assert seen == list(range(1, 13))


# ---- artifacts -------------------------------------------------------------------------------------------------------
def test_a_saved_network_comes_back_exactly(folder: Path, task: PruningTask, built: Built) -> None:
    loaded = load_pruned(folder)
    assert same_weights(loaded, built.network)
    assert torch.equal(outputs(loaded, task), outputs(built.network, task))
    assert not loaded.training
    assert sorted(path.name for path in folder.iterdir()) == sorted([MANIFEST, WEIGHTS])  # no drafts left


def test_the_files_hold_no_pickle(folder: Path, built: Built) -> None:
    tensors = load_file(folder / WEIGHTS)
    assert {name: tuple(value.shape) for name, value in tensors.items()} == {
        name: tuple(value.shape) for name, value in built.network.state_dict().items()
    }
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["keep"] == SECOND.to_dict()
    for path in folder.iterdir():
        data = path.read_bytes()
        assert not data.startswith((b"PK", b"\x80"))
        with pytest.raises(Exception, match=r"opcode|pickle|stack|exhausted|expected|unicode|codec|literal"):
            list(pickletools.genops(data))


@pytest.mark.parametrize("place", [3, 200, -1])
def test_an_altered_byte_is_noticed(place: int, folder: Path) -> None:
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[place] ^= 1
    (folder / WEIGHTS).write_bytes(bytes(data))
    with pytest.raises(UserError, match=rf"here/{WEIGHTS} must be the file that was saved, but its SHA-256 differs"):
        load_pruned(folder)


def test_a_cut_off_file_is_noticed(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-10])
    with pytest.raises(UserError, match=f"{WEIGHTS}.*SHA-256"):
        load_pruned(folder)


@pytest.mark.parametrize("name", [WEIGHTS, MANIFEST])
def test_a_missing_file_is_named(name: str, folder: Path) -> None:
    (folder / name).unlink()
    with pytest.raises(UserError, match=f"here/{name} is not there"):
        load_pruned(folder)


def test_a_broken_manifest_is_named(folder: Path) -> None:
    (folder / MANIFEST).write_text("{")
    with pytest.raises(UserError, match=f"{MANIFEST} must be JSON"):
        load_pruned(folder)


@pytest.mark.parametrize("key", ["sha256", "keep", "example_shape", "source"])
def test_a_manifest_without_an_entry_is_a_users_error(key: str, folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest[key]
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="here"):
        load_pruned(folder)


def test_weights_that_do_not_fit_the_plan_are_named(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["keep"]["conv1"] = [0]
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=f"{WEIGHTS} must fit the network cut to the plan"):
        load_pruned(folder)


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


def test_a_users_own_network_is_passed_in(tmp_path: Path) -> None:
    torch.manual_seed(0)
    inputs, labels = torch.randn(40, 5), torch.randint(0, 3, (40,))
    data = (inputs, labels)
    task = PruningTask(Own(), data, data, data, data)
    trimmer = Trimmer(task, RepairSettings(recalibration_images=0))
    group = trimmer.groups[0]
    trimmed = trimmer.trim(PruningPlan({group.name: [0, 2, 5]}))
    save_pruned(tmp_path, trimmed.network, trimmed.plan, example_shape=(1, 5), source={})
    with pytest.raises(UserError, match=r"no name to build it by; pass the original: load_pruned\(folder, network\)"):
        load_pruned(tmp_path)
    original = Own()
    before = copy.deepcopy(original.state_dict())
    loaded = load_pruned(tmp_path, original)
    with torch.inference_mode():
        assert torch.equal(loaded(inputs), trimmed.network(inputs))
    assert all(torch.equal(before[name], value) for name, value in original.state_dict().items())
    with pytest.raises(UserError):
        load_pruned(tmp_path, Own(hidden=4))


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
