"""Schedules replay to the same weights, are plain JSON, and mistakes in them are named."""

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from prunegym.envs.default_task import default_task
from prunegym.pruning import (
    PruningPlan,
    PruningTask,
    RepairSettings,
    Round,
    Schedule,
    Trimmer,
    UserError,
    build,
)
from prunegym.pruning.retraining import RetrainSettings
from prunegym.pruning.schedule import Built, round_seed
from torch import nn

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


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


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
        ({"seed": -1}, "the seed of a schedule must be a whole number from 0"),
        ({"seed": 10**40}, r"the seed of a schedule must be a whole number from 0 to 2\*\*63 - 1"),
        ({"seed": 2**63}, "but got 9223372036854775808"),
        ({"repair": {"seed": 10**40}}, "seed must be a whole number from 0"),
        ({"retraining": {"weight_decay": math.nan}}, "weight_decay must be a finite number, but got nan"),
        ({"retraining": {"clip_norm": 10**400}}, "clip_norm must be a finite number"),
    ],
)
def test_a_broken_schedule_is_explained_and_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "edited.json"
    path.write_text(json.dumps({**SCHEDULE.to_dict(), **change}))
    with pytest.raises(UserError, match=message) as caught:
        Schedule.load(path)
    assert "edited.json" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "must be JSON, but .*x.json is not"),
        ("[]", "x.json: .*rounds"),
        ("[" * 100_000 + "]" * 100_000, "must be JSON, but .*x.json is not"),
    ],
    ids=["open", "list", "deep"],
)
def test_no_schedule_at_all(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=message):
        Schedule.load(tmp_path / "x.json")
    with pytest.raises(UserError, match=r"must be readable, but .*absent\.json is not"):
        Schedule.load(tmp_path / "absent.json")


def test_the_largest_seed_builds(task: PruningTask) -> None:
    repair = replace(SCHEDULE.repair, seed=2**63 - 1)
    made = build(Trimmer(task, repair), replace(SCHEDULE, repair=repair, seed=2**63 - 1))
    assert 0 <= round_seed(2**63 - 1, 1) < 2**63
    assert made.rounds[-1].widths == SECOND.counts


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


# ---- the selection split ---------------------------------------------------------------------------------------------
def test_only_the_last_training_is_scored(trimmer: Trimmer, built: Built) -> None:
    """The first round equals the one trained without checks; patience ends the second."""
    impatient = replace(SCHEDULE.retraining, check_every=1, patience=1, learning_rate=0.2)
    rounds = (SCHEDULE.rounds[0], Round(SECOND, 40))
    scored = build(trimmer, replace(SCHEDULE, rounds=rounds, retraining=impatient))
    blind = build(trimmer, replace(SCHEDULE, rounds=rounds, retraining=impatient.without_checks()))
    first, last = scored.rounds
    assert first.after_retraining == blind.rounds[0].after_retraining
    assert first.training is not None
    assert math.isnan(first.training.best_accuracy)
    assert (first.updates_taken, first.stopped_early) == (5, False)
    assert last.training is not None
    assert last.training.best_accuracy == trimmer.score_selection(scored.network).accuracy
    assert last.stopped_early
    assert last.updates_taken == last.training.best_update + 1 < last.retrain_updates == 40
    assert scored.updates_taken == 5 + last.updates_taken
    assert blind.updates_taken == 45
    assert last.training.state is None  # a record needs no copy of the momentum


def test_a_round_without_training_took_no_updates(trimmer: Trimmer) -> None:
    made = build(trimmer, Schedule((Round(FIRST),), SCHEDULE.repair))
    assert (made.rounds[0].training, made.updates_taken) == (None, 0)
