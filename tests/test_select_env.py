"""prunegym/SelectFilters-v0 against both checkers, against weights read off by hand and against a cut made by hand."""

import copy
import math
import pickle
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env as gymnasium_check
from numpy.typing import NDArray
from prunegym.envs import SELECT_FILTERS, SelectFiltersEnv, SelectSettings, TrimSettings
from prunegym.envs.default_task import default_task
from prunegym.envs.select import LARGEST, filter_rows
from prunegym.pruning import (
    GroupSettings,
    PruningPlan,
    PruningTask,
    RepairSettings,
    RetrainSettings,
    Trimmer,
    UserError,
    apply_plan,
    evaluate,
    find_groups,
    retrain,
)
from stable_baselines3.common.env_checker import check_env as sb3_check
from stable_baselines3.common.vec_env import SubprocVecEnv
from torch import nn
from toys import ToyResidual, images, make

WIDTHS = {"conv1": 8, "conv2": 16, "fc1": 64}  # of lenet_small
REPAIR = RepairSettings(compensation="delete", reward_images=100, calibration_images=64)
QUICK = SelectSettings(fine_tune=0, repair=REPAIR)


@pytest.fixture(scope="module")
def task() -> PruningTask:
    return default_task()


@pytest.fixture(scope="module")
def trimmer(task: PruningTask) -> Trimmer:
    return Trimmer(task, REPAIR)


@pytest.fixture(scope="module")
def mlp(task: PruningTask) -> PruningTask:
    """The same data and another network, whose only group is called 1."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(784, 12), nn.ReLU(), nn.Linear(12, 10))
    return PruningTask(network, task.train, task.reward, task.selection, task.test)


@pytest.fixture(scope="module")
def env(trimmer: Trimmer) -> SelectFiltersEnv:
    return SelectFiltersEnv(settings=QUICK, trimmer=trimmer)


def play(env: SelectFiltersEnv, group: str, keep: Any) -> tuple[float, dict[str, Any]]:
    """Play one episode that keeps the filters `keep` of a group."""
    _, info = env.reset(options={"group": group})
    assert info == {"group": group}
    action = np.zeros(env.action_space.n, np.int8)
    action[list(keep)] = 1
    observation, reward, terminated, truncated, info = env.step(action)
    assert observation in env.observation_space
    assert (terminated, truncated) == (True, False)
    return reward, info


def score_by_hand(trimmer: Trimmer, keep: dict[str, list[int]]) -> tuple[nn.Module, float]:
    """Cut without any repair and score on the reward images."""
    cut = apply_plan(trimmer.task.network, trimmer.groups, PruningPlan(keep))
    return cut, evaluate(cut, trimmer.reward.batches(50)).accuracy


def expected_reward(trimmer: Trimmer, accuracy: float, kept: float, accepted: float = 0.02) -> float:
    psi = (accepted - (trimmer.baseline.accuracy - accuracy)) / accepted
    return psi * math.log(1 / kept)


# ---- contracts -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("settings", [QUICK, replace(QUICK, group="fc1", max_filters=70, entries=300, fine_tune=1)])
def test_checkers_find_nothing(settings: SelectSettings, trimmer: Trimmer) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # the filters are a matrix on purpose, and `agent.filterwise` is the policy that takes one
        warnings.filterwarnings("ignore", "Your observation filters has an unconventional shape")
        checked = gym.make(SELECT_FILTERS, settings=settings, trimmer=trimmer).unwrapped
        gymnasium_check(checked)
        sb3_check(checked)


def test_make_without_arguments() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = gym.make(SELECT_FILTERS)
    observation, info = made.reset(seed=3)
    assert observation in made.observation_space
    assert info == {"group": "conv1"}
    _, reward, terminated, truncated, info = made.step(made.action_space.sample())
    assert (terminated, truncated) == (True, False)
    assert float(reward) == info["reward_terms"]["psi_phi"]


def test_spaces_are_as_large_as_the_largest_group_or_as_asked(env: SelectFiltersEnv, trimmer: Trimmer) -> None:
    def spaces(filters: int, entries: int) -> tuple[gym.Space, gym.Space]:
        box = gym.spaces.Box(-10, 10, (filters, entries), np.float32)
        return gym.spaces.Dict(filters=box, mask=gym.spaces.MultiBinary(filters)), gym.spaces.MultiBinary(filters)

    assert (env.observation_space, env.action_space) == spaces(64, 256)  # fc1 has 64 filters of 16 x 4 x 4 weights
    asked = SelectFiltersEnv(settings=replace(QUICK, group="conv2", max_filters=20, entries=200), trimmer=trimmer)
    assert (asked.observation_space, asked.action_space) == spaces(20, 200)  # conv2: 16 of 8 x 5 x 5


# ---- observation -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", WIDTHS)
def test_rows_are_the_layers_weights_without_bias(name: str, env: SelectFiltersEnv, task: PruningTask) -> None:
    observation, _ = env.reset(options={"group": name})
    weight = task.network.get_submodule(name).weight.detach().double().numpy()  # type: ignore[union-attr]
    rms = math.sqrt((weight**2).sum() / weight.size)
    rows, width = weight.reshape(len(weight), -1) / rms, WIDTHS[name]
    assert np.abs(rows).max() < LARGEST
    np.testing.assert_allclose(observation["filters"][:width, : rows.shape[1]], rows, rtol=1e-6)
    assert not observation["filters"][width:].any()
    assert not observation["filters"][:, rows.shape[1] :].any()
    np.testing.assert_array_equal(observation["mask"], [1] * width + [0] * (64 - width))


def test_producers_of_a_residual_sum_stand_side_by_side() -> None:
    network = make(ToyResidual)
    group = next(g for g in find_groups(network, images(network.shape, 1)) if g.name == "stem")
    assert set(group.producers) == {"stem", "conv2"}
    parts = []
    for layer in (network.conv2, network.stem):  # by name
        weight = layer.weight.detach().double().numpy().reshape(6, -1)
        parts.append(weight / np.sqrt((weight**2).mean()))
    np.testing.assert_allclose(filter_rows(network, group), np.concatenate(parts, 1), rtol=1e-6)


def test_channels_of_several_outputs_have_them_side_by_side() -> None:
    """A channel of a group that a grouped convolution reads is a unit of all that one of its groups reads."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 6, 3), nn.Conv2d(6, 6, 3, groups=3), nn.Flatten(), nn.Linear(96, 2)).eval()
    (group,) = find_groups(network, torch.randn(1, 2, 8, 8))
    assert group.width == 3
    pieces = []
    for layer in (network[0], network[1]):
        weight = layer.weight.detach().double().numpy()
        scaled = weight / np.sqrt((weight**2).mean())
        if layer is network[0] or "1" in group.producers:
            pieces.append(scaled.reshape(3, -1))  # outputs 2c and 2c + 1 belong to channel c
    np.testing.assert_allclose(filter_rows(network, group), np.concatenate(pieces, 1), rtol=1e-6)


def test_weights_far_out_are_clipped_and_a_dead_layer_is_zero() -> None:
    network = nn.Sequential(nn.Linear(100, 50), nn.ReLU(), nn.Linear(50, 2)).eval()
    with torch.no_grad():
        network[0].weight.fill_(1e-3)
        network[0].weight[3, 7] = -50.0
    (group,) = find_groups(network, torch.randn(1, 100))
    rows = filter_rows(network, group)
    assert rows[3, 7] == -LARGEST == rows.min()
    with torch.no_grad():
        network[0].weight.zero_()
    assert not filter_rows(network, group).any()


# ---- reward ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "keep"), [("conv1", [0, 3, 4, 7]), ("conv2", range(1, 16)), ("fc1", range(0, 64, 2))])
def test_reward_is_psi_times_phi_of_the_cut_made_by_hand(
    name: str, keep: Any, env: SelectFiltersEnv, trimmer: Trimmer
) -> None:
    reward, info = play(env, name, keep)
    cut, accuracy = score_by_hand(trimmer, {name: list(keep)})
    assert info["accuracy"] == accuracy
    assert info["params"] == sum(parameter.numel() for parameter in cut.parameters())
    assert info["kept"] == len(keep) / WIDTHS[name]
    assert reward == pytest.approx(expected_reward(trimmer, accuracy, info["kept"]))
    assert info["reward_terms"] == {"psi_phi": reward}
    assert info["requested"] == info["executed"] == list(keep) == info["plan"][name]
    others = {other: list(range(width)) for other, width in WIDTHS.items() if other != name}
    assert {other: info["plan"][other] for other in others} == others
    assert set(info) == {
        "group", "requested", "executed", "accuracy", "loss", "params", "macs", "kept", "plan", "reward_terms",
    }  # fmt: skip


def test_keeping_all_pays_nothing(env: SelectFiltersEnv) -> None:
    assert play(env, "conv2", range(16))[0] == 0.0


def test_psi_is_not_clipped_above_one(task: PruningTask) -> None:
    """A network spoilt by one filter gains accuracy when that filter goes: ψ > 1."""
    spoilt = copy.deepcopy(task.network)
    with torch.no_grad():
        spoilt.get_submodule("fc1").bias[5] += 40.0  # type: ignore[union-attr, operator]
    other = PruningTask(spoilt, task.train, task.reward, task.selection, task.test)
    env = SelectFiltersEnv(other, replace(QUICK, group="fc1", accepted_drop=0.1))
    keep = [channel for channel in range(64) if channel != 5]
    reward, info = play(env, "fc1", keep)
    assert info["accuracy"] > env.trimmer.baseline.accuracy + 0.1
    assert reward == pytest.approx(expected_reward(env.trimmer, info["accuracy"], 63 / 64, 0.1))
    assert reward > 2 * math.log(64 / 63)


def test_fine_tuning_is_that_of_retrain(task: PruningTask, trimmer: Trimmer) -> None:
    training = RetrainSettings(batch_size=32, learning_rate=0.01, check_every=1)
    env = SelectFiltersEnv(settings=replace(QUICK, fine_tune=3, retraining=training), trimmer=trimmer)
    keep = [0, 1, 5, 6]
    _, info = play(env, "conv1", keep)
    cut, before = score_by_hand(trimmer, {"conv1": keep})
    retrain(
        cut, task.train, replace(training, updates=3, check_every=0), seed=0
    )  # the selection split is not looked at
    score = evaluate(cut, trimmer.reward.batches(50))
    assert (info["accuracy"], info["loss"]) == (score.accuracy, pytest.approx(score.loss, rel=1e-5))
    assert score.accuracy != before


# ---- actions ---------------------------------------------------------------------------------------------------------
def test_an_empty_action_keeps_the_filter_of_largest_weights(env: SelectFiltersEnv, task: PruningTask) -> None:
    weight = task.network.get_submodule("conv2").weight.detach()  # type: ignore[union-attr]
    _, info = play(env, "conv2", [])
    assert info["requested"] == []
    assert info["executed"] == [int(weight.abs().sum((1, 2, 3)).argmax())]


def test_padding_of_the_action_is_ignored(env: SelectFiltersEnv) -> None:
    reward, info = play(env, "conv1", [1, 2, 3, *range(8, 64)])
    again, other = play(env, "conv1", [1, 2, 3])
    assert (reward, info) == (again, other)
    assert info["requested"] == [1, 2, 3]


@pytest.mark.parametrize(("asked", "left"), [(0, 8), (3, 8), (8, 8), (9, 12), (12, 12), (14, 16)])
def test_a_width_that_is_not_allowed_is_filled_up(asked: int, left: int, task: PruningTask) -> None:
    groups = GroupSettings(channel_multiple=4, minimum_width=6)
    env = SelectFiltersEnv(task, replace(QUICK, groups=groups))
    keep = list(range(16))[16 - asked :]
    _, info = play(env, "conv2", keep)
    sums = task.network.get_submodule("conv2").weight.detach().abs().sum((1, 2, 3)).tolist()  # type: ignore[union-attr]
    dropped = sorted(set(range(16)) - set(keep), key=lambda channel: -sums[channel])
    assert info["executed"] == sorted(keep + dropped[: left - asked])
    assert info["kept"] == left / 16


def test_reset_and_settings_choose_the_group(env: SelectFiltersEnv, trimmer: Trimmer) -> None:
    other = SelectFiltersEnv(settings=replace(QUICK, group="fc1"), trimmer=trimmer)
    assert other.reset()[1] == {"group": "fc1"}
    assert other.reset(options={"group": "conv2"})[1] == {"group": "conv2"}
    for default in ({}, None, {"group": None}):
        assert other.reset(options=default)[1] == {"group": "fc1"}
    assert env.reset()[1] == {"group": "conv1"}


def test_a_subject_left_by_an_earlier_cut(trimmer: Trimmer) -> None:
    first = [0, 2, 4, 5, 7]
    subject = trimmer.examine_trimmed(trimmer.trim(PruningPlan({"conv1": first})))
    env = SelectFiltersEnv(settings=replace(QUICK, group="conv1"), trimmer=trimmer, subject=subject)
    assert env.reset()[0]["mask"].sum() == 5
    reward, info = play(env, "conv1", [1, 3, 4])
    assert info["plan"]["conv1"] == [2, 5, 7]
    _, accuracy = score_by_hand(trimmer, {"conv1": [2, 5, 7]})
    assert info["accuracy"] == accuracy
    assert reward == pytest.approx(expected_reward(trimmer, accuracy, 3 / 5))  # p* stays the pristine network's
    rows = env.reset(options={"group": "conv2"})[0]["filters"]
    assert rows[:16, :125].any()
    assert not rows[:16, 125:].any()  # conv2 now reads 5 maps through 5 x 5 taps


# ---- repeatable, in other processes ----------------------------------------------------------------------------------
def test_episodes_do_not_touch_the_network_and_repeat(trimmer: Trimmer) -> None:
    training = RetrainSettings(batch_size=32)
    env = SelectFiltersEnv(settings=replace(QUICK, fine_tune=2, retraining=training), trimmer=trimmer)
    before = copy.deepcopy(trimmer.task.network.state_dict())
    first = play(env, "conv2", [0, 1, 2, 3, 9])
    start: NDArray[np.float32] = env.reset(seed=1)[0]["filters"]
    play(env, "fc1", range(10))
    assert play(env, "conv2", [0, 1, 2, 3, 9]) == first
    np.testing.assert_array_equal(env.reset(seed=2)[0]["filters"], start)
    after = trimmer.task.network.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    clone = pickle.loads(pickle.dumps(env))
    assert play(clone, "conv2", [0, 1, 2, 3, 9]) == first


class _Maker:
    """Picklable, for a spawned process."""

    def __init__(self, task: PruningTask) -> None:
        self.task = task

    def __call__(self) -> SelectFiltersEnv:
        return SelectFiltersEnv(self.task, replace(QUICK, group="conv2"))


def test_a_spawned_worker_gives_the_same_rewards(task: PruningTask, trimmer: Trimmer) -> None:
    single = SelectFiltersEnv(settings=QUICK, trimmer=trimmer)
    keeps = [[0, 1, 2, 3, 4, 5, 9, 12], [1, 4, 8, 10, 15]]
    worker = SubprocVecEnv([_Maker(task)], start_method="spawn")
    try:
        shown = worker.reset()
        for keep in keeps:
            action = np.zeros((1, 64), np.int8)
            action[0, keep] = 1
            _, rewards, dones, _ = worker.step(action)
            assert rewards[0] == play(single, "conv2", keep)[0]
            assert dones.all()
    finally:
        worker.close()
    np.testing.assert_array_equal(shown["filters"][0], single.reset(options={"group": "conv2"})[0]["filters"])  # type: ignore[index, call-overload]


# ---- mistakes --------------------------------------------------------------------------------------------------------
def test_mistakes_are_named(env: SelectFiltersEnv, trimmer: Trimmer) -> None:
    with pytest.raises(UserError, match="group must be a group that may be cut, but got 'conv3'; did you mean 'conv"):
        env.reset(options={"group": "conv3"})
    with pytest.raises(UserError, match="max_filters must be at least 16 for group 'conv2', but got 9"):
        SelectFiltersEnv(settings=replace(QUICK, max_filters=9), trimmer=trimmer).reset(options={"group": "conv2"})
    with pytest.raises(UserError, match="entries must be at least 256 for group 'fc1', but got 200"):
        SelectFiltersEnv(settings=replace(QUICK, group="fc1", entries=200), trimmer=trimmer)
    with pytest.raises(UserError, match="accepted_drop must be in"):
        SelectSettings(accepted_drop=0.0)
    with pytest.raises(UserError, match="fine_tune must be at least 0, but got -1"):
        SelectSettings(fine_tune=-1)
    with pytest.raises(UserError, match="must have the environment's repair settings"):
        SelectFiltersEnv(settings=replace(QUICK, repair=RepairSettings()), trimmer=trimmer)
    with pytest.raises(UserError, match="must have the environment's group settings"):
        SelectFiltersEnv(settings=replace(QUICK, groups=GroupSettings(minimum_width=2)), trimmer=trimmer)
    env.reset()
    for wrong in (np.ones(8, np.int8), np.full(64, 2), np.full(64, np.nan)):
        with pytest.raises(UserError, match="an action must be 64 numbers, each 0 or 1"):
            env.step(wrong)


@pytest.mark.parametrize(
    ("make_it", "message"),
    [
        (lambda task: SelectFiltersEnv(task, {"fine_tune": 1}), "needs a SelectSettings, but got dict; SelectSettings"),
        (lambda task: SelectFiltersEnv(task, {}), "needs a SelectSettings, but got dict"),
        (lambda task: SelectFiltersEnv(task, TrimSettings()), "needs a SelectSettings, but got TrimSettings"),
        (lambda task: SelectFiltersEnv(task.network), "needs a PruningTask, but got .*; PruningTask.network=…, train="),
        (lambda task: gym.make(SELECT_FILTERS, task=(1, 2)), "SelectFiltersEnv needs a PruningTask, but got tuple"),
        (lambda task: SelectFiltersEnv(trimmer=task), "needs a Trimmer, but got PruningTask"),
        (lambda task: SelectFiltersEnv(task, subject=0), "needs a Subject, but got 0; Trimmer.examine_trimmed"),
    ],
)
def test_arguments_of_another_kind_are_refused(make_it: Callable[[Any], Any], message: str, task: PruningTask) -> None:
    with pytest.raises(UserError, match=message):
        make_it(task)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("f.0", 'options must be a mapping such as {"group": "conv1"}, but got \'f.0\''),
        ({"gruop": "fc1"}, "options must hold known keys only, but got 'gruop'; did you mean 'group'"),
        ({"group": "fc1", 3: 4}, "options must hold known keys only, but got 3; known are group"),
        ({"group": ""}, "group must be a group that may be cut, but got ''; known are conv1, conv2, fc1"),
        ({"group": 0}, "group must be a group that may be cut, but got 0; known are"),
    ],
)
def test_options_of_reset_are_never_ignored(options: Any, message: str, env: SelectFiltersEnv) -> None:
    with pytest.raises(UserError, match=message):
        env.reset(options=options)


def test_a_shared_trimmer_is_of_the_same_task(task: PruningTask, mlp: PruningTask, trimmer: Trimmer) -> None:
    with pytest.raises(UserError, match="a shared trimmer must be of the environment's task, but it is of another"):
        SelectFiltersEnv(mlp, QUICK, trimmer=trimmer)
    assert SelectFiltersEnv(task, QUICK, trimmer=trimmer).trimmer is trimmer


def test_a_subject_comes_with_its_trimmer(task: PruningTask, mlp: PruningTask, trimmer: Trimmer) -> None:
    foreign = Trimmer(mlp, REPAIR)
    with pytest.raises(UserError, match=r"a subject must come with the trimmer that made it, .*, but got no trimmer"):
        SelectFiltersEnv(task, QUICK, subject=foreign.pristine)
    wider = copy.deepcopy(task.network)
    wider.conv1 = nn.Conv2d(1, 9, 5)  # the names of the groups are the same
    wider.conv2 = nn.Conv2d(9, 16, 5)
    nine = Trimmer(PruningTask(wider, task.train, task.reward, task.selection, task.test), REPAIR)
    of_nine = nine.examine_trimmed(nine.trim(PruningPlan({"conv1": [0, 2, 8]})))
    for subject in (foreign.pristine, nine.pristine, of_nine):
        with pytest.raises(UserError, match="its channels are not of that trimmer's network; give its own"):
            SelectFiltersEnv(settings=QUICK, trimmer=trimmer, subject=subject)
    _, info = play(SelectFiltersEnv(settings=QUICK, trimmer=nine, subject=of_nine), "conv1", [1, 2])
    assert info["plan"]["conv1"] == [2, 8]


def test_step_needs_reset(trimmer: Trimmer) -> None:
    env = SelectFiltersEnv(settings=QUICK, trimmer=trimmer)
    with pytest.raises(gym.error.ResetNeeded):
        env.step(np.ones(64, np.int8))
    play(env, "conv1", range(8))
    with pytest.raises(gym.error.ResetNeeded):
        env.step(np.ones(64, np.int8))
