"""prunegym/Trim-v0 against Gymnasium's and SB3's checkers, against hand-made arithmetic, and against brute force."""

import hashlib
import itertools
import math
import pickle
import re
import warnings
from dataclasses import replace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env as gymnasium_check
from numpy.typing import NDArray
from prunegym.agent.workers import make_environments
from prunegym.envs import FEATURES, TRIM, RewardSettings, TrimEnv, TrimSettings
from prunegym.envs.default_task import default_task
from prunegym.envs.observation import AMC_FEATURES, Feature, GroupObservation
from prunegym.pruning import GroupSettings, PruningPlan, PruningTask, RepairSettings, Trimmer, UserError, apply_plan
from prunegym.pruning.cost import count_cost
from prunegym.pruning.evaluation import Score
from prunegym.pruning.heuristics import uniform
from prunegym.pruning.retraining import RetrainSettings
from prunegym.pruning.splits import TensorSplit
from stable_baselines3.common.env_checker import check_env as sb3_check
from stable_baselines3.common.vec_env import SubprocVecEnv

WIDTHS = (8, 16, 64)  # conv1, conv2, fc1 of lenet_small
FLOOR = RewardSettings("accuracy_floor")
RULES = {
    "score": TrimSettings(),
    "ratio": TrimSettings(action="ratio"),
    "threshold": TrimSettings(action="threshold", repair=RepairSettings("apoz")),
}


@pytest.fixture(scope="module")
def task() -> PruningTask:
    return default_task()


@pytest.fixture(scope="module")
def trimmer(task: PruningTask) -> Trimmer:
    return Trimmer(task, RepairSettings())


@pytest.fixture(scope="module")
def apoz_trimmer(task: PruningTask) -> Trimmer:
    return Trimmer(task, RepairSettings("apoz"))


def episode(env: TrimEnv, actions: Any, **reset: Any) -> list[tuple[NDArray[np.float32], float, dict[str, Any]]]:
    """Play `actions`; the first entry is what `reset` gave."""
    observation, info = env.reset(**reset)
    steps = [(observation, 0.0, info)]
    for place, action in enumerate(actions):
        observation, reward, terminated, truncated, info = env.step(np.array([action], np.float32))
        assert terminated == (place + 1 == len(actions))
        assert not truncated
        steps.append((observation, reward, info))
    return steps


def lenet_cost(widths: Any, size: int) -> dict[str, int]:
    """Parameters and MACs of the LeNet, by hand."""
    first, second, hidden = (int(width) for width in widths)
    maps = ((size - 4), (size - 4) // 2 - 4)  # sides of the two convolutions' outputs
    side = maps[1] // 2
    return {
        "params": first * 26 + second * (first * 25 + 1) + hidden * (second * side**2 + 1) + 10 * (hidden + 1),
        "macs": maps[0] ** 2 * first * 25
        + maps[1] ** 2 * second * first * 25
        + hidden * second * side**2
        + 10 * hidden,
    }


def widths_of(info: dict[str, Any]) -> list[int]:
    return [len(keep) for keep in info["plan"].values()]


def apoz_by_hand(trimmer: Trimmer, network: torch.nn.Module) -> list[NDArray[np.float64]]:
    """Return the share of exact zeros behind each of the three ReLUs, per channel, on the calibration images."""
    seen: list[torch.Tensor] = []
    layers: list[Any] = [network.relu1, network.relu2, network.relu3]
    handles = [layer.register_forward_hook(lambda _m, _i, output: seen.append(output)) for layer in layers]
    with torch.no_grad():
        network(next(iter(trimmer.calibration.batches(len(trimmer.calibration)))).images)
    for handle in handles:
        handle.remove()
    return [(out == 0).double().transpose(0, 1).flatten(1).mean(1).numpy() for out in seen]


# ---- contracts -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("rule", RULES)
def test_checkers_find_nothing(rule: str, rounds: int, trimmer: Trimmer, apoz_trimmer: Trimmer) -> None:
    shared = apoz_trimmer if rule == "threshold" else trimmer
    settings = replace(RULES[rule], rounds=rounds)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gym.make(TRIM, settings=settings, trimmer=shared).unwrapped
        gymnasium_check(env)  # with the specification that `make` gives, it also tries every render mode
        sb3_check(env)


def test_make_without_arguments() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gym.make(TRIM)
    observation, _ = env.reset(seed=3)
    total, ended = 0.0, False
    for _ in WIDTHS:
        assert not ended
        observation, reward, ended, truncated, info = env.step(env.action_space.sample())
        total += float(reward)
        assert observation in env.observation_space
        assert not truncated
    assert ended
    assert info["kept"] <= 0.3
    assert total == pytest.approx(10 * (info["accuracy"] - info["reference_accuracy"]))


def test_spaces_are_the_documented_ones(trimmer: Trimmer) -> None:
    env = TrimEnv(trimmer=trimmer)
    assert env.observation_space == gym.spaces.Box(
        np.array([feature.low for feature in FEATURES], np.float32),
        np.array([feature.high for feature in FEATURES], np.float32),
        dtype=np.float32,
    )
    assert env.action_space == gym.spaces.Box(-1, 1, (1,), np.float32)
    assert len({feature.name for feature in FEATURES}) == len(FEATURES)


@pytest.mark.parametrize(("heading", "features"), [('"full"', FEATURES), ('"amc"', AMC_FEATURES)])
def test_the_docstring_table_lists_every_feature_with_its_range(heading: str, features: tuple[Feature, ...]) -> None:
    part = (TrimEnv.__doc__ or "").split(f"    {heading}, `Box` of shape ")[1]
    rows = re.findall(r"^\s*\| (\d+)(?:–(\d+))? \| (.+?) \| (-?\d) \| (-?\d) \|", part.split("`Box`")[0], re.MULTILINE)
    described = [
        (place, names, int(low), int(high))
        for first, last, names, low, high in rows
        for place in range(int(first), int(last or first) + 1)
    ]
    assert [place for place, *_ in described] == list(range(len(features)))
    assert part.startswith(f"({len(features)},)")
    for feature, (_, names, low, high) in zip(features, described, strict=True):
        assert (feature.low, feature.high) == (low, high), feature.name
        assert feature.name.split("_")[0] in names.replace("above", "apoz"), feature.name


# ---- observation -----------------------------------------------------------------------------------------------------
def test_each_row_describes_the_group_that_the_next_action_trims(trimmer: Trimmer) -> None:
    env = TrimEnv(settings=TrimSettings(rounds=2), trimmer=trimmer)
    actions = [0.5, -0.25, 0.125, -0.75, 0.25, 1.0]
    steps = episode(env, actions)
    names = [group.name for group in trimmer.groups]
    first_plan = PruningPlan.from_dict(steps[3][2]["plan"])
    trimmed = trimmer.trim(first_plan)
    subjects = [trimmer.pristine, trimmer.examine_trimmed(trimmed)]
    describe = GroupObservation(trimmer.cost_model).describe
    index = {feature.name: place for place, feature in enumerate(FEATURES)}
    for t, action in enumerate(actions):
        row, subject, place = steps[t][0], subjects[t // 3], t % 3
        widths = WIDTHS if t < 3 else tuple(first_plan.counts.values())
        np.testing.assert_array_equal(row[2:24], describe(subject)[place].astype(np.float32))
        assert row[index["position"]] == place / 2
        assert row[index["round"]] == (t // 3) / 2
        assert row[index["log_width"]] == pytest.approx(math.log2(widths[place]) / 12)
        assert row[index["width_ratio"]] == pytest.approx(widths[place] / WIDTHS[place])
        assert row[index["target"]] == pytest.approx(0.3 ** ((t // 3 + 1) / 2))
        assert steps[t + 1][2]["group"] == names[place]
        drop = 0.0 if t < 3 else trimmer.baseline.accuracy - steps[3][2]["accuracy"]
        assert row[index["accuracy_drop"]] == pytest.approx(drop, abs=1e-6)
        del action


def test_previous_action_is_the_action_of_the_step_before(trimmer: Trimmer) -> None:
    """Also at the first group of a later round, and after the last step; 0 only after `reset`."""
    actions = [0.5, -0.25, 0.125, -0.75, 0.25, 1.0]
    steps = episode(TrimEnv(settings=TrimSettings(rounds=2), trimmer=trimmer), actions)
    place = [feature.name for feature in FEATURES].index("previous_action")
    assert [float(row[place]) for row, *_ in steps] == [0.0, *actions]


def test_the_first_observations_by_hand(task: PruningTask, trimmer: Trimmer) -> None:
    steps = episode(TrimEnv(trimmer=trimmer), [0.0, 0.0, 0.0])
    size = task.example.shape[-1]
    whole, apoz = lenet_cost(WIDTHS, size), apoz_by_hand(trimmer, task.network)
    for place in range(3):
        row = dict(zip((feature.name for feature in FEATURES), steps[place][0].tolist(), strict=True))
        without = lenet_cost([0 if other == place else width for other, width in enumerate(WIDTHS)], size)
        values = apoz[place]
        expected = {
            "params_share": 1 - without["params"] / whole["params"],
            "macs_share": 1 - without["macs"] / whole["macs"],
            "kernel": (5, 5, 1)[place] / 11,
            "stride": 1 / 4,
            "producers": 1 / 6,
            "consumers": 1 / 6,
            "has_relu": 1.0,
            "apoz_mean": values.mean(),
            "apoz_std": 2 * values.std(),
            "apoz_p10": np.percentile(values, 10),
            "apoz_p50": np.median(values),
            "apoz_p90": np.percentile(values, 90),
            "apoz_above": (values > values.mean() + values.std()).mean(),
            "spent": 1.0,  # rule "score" decides nothing before the last group
            "reachable": lenet_cost((1, 1, 1), size)["macs"] / whole["macs"],
        }
        assert {name: row[name] for name in expected} == pytest.approx(expected, abs=1e-6)
    shares = [row[[f.name for f in FEATURES].index("taylor_share")] for row, *_ in steps[:3]]
    assert sum(shares) == pytest.approx(1.0, abs=1e-6)
    assert min(shares) > 0


def test_spent_follows_the_decisions_of_rule_ratio(task: PruningTask, trimmer: Trimmer) -> None:
    settings = TrimSettings(budget=0.9, action="ratio", largest_trim=0.5)
    steps = episode(TrimEnv(settings=settings, trimmer=trimmer), [-1.0, -1.0, -1.0])  # halves each group
    size, names = task.example.shape[-1], [feature.name for feature in FEATURES]
    whole = lenet_cost(WIDTHS, size)["macs"]
    spent = [row[names.index("spent")] for row, *_ in steps]
    decided = [(8, 16, 64), (4, 16, 64), (4, 8, 64), (4, 8, 32)]
    assert spent == pytest.approx([lenet_cost(widths, size)["macs"] / whole for widths in decided])
    reachable = [row[names.index("reachable")] for row, *_ in steps]
    assert reachable == pytest.approx([lenet_cost((4, 8, 32), size)["macs"] / whole] * 4)


# ---- start -----------------------------------------------------------------------------------------------------------
def fingerprint(network: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in network.state_dict().items():
        digest.update(name.encode() + value.contiguous().numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("updates", [0, 3])
def test_reset_starts_from_the_pristine_weights(updates: int, task: PruningTask, trimmer: Trimmer) -> None:
    before = fingerprint(task.network)
    training = RetrainSettings(batch_size=32)
    env = TrimEnv(settings=TrimSettings(rounds=2, retrain_updates=updates, retraining=training), trimmer=trimmer)
    rng = np.random.default_rng(0)
    start, first = env.reset()[0], None
    for _ in range(4):
        episode(env, rng.uniform(-1, 1, 6))
        again = episode(env, [0.3, -0.4, 0.5, 0.1, 0.0, -0.2])
        np.testing.assert_array_equal(again[0][0], start)
        first = first or again
        for (row, reward, info), (row_0, reward_0, info_0) in zip(again, first, strict=True):
            np.testing.assert_array_equal(row, row_0)
            assert (reward, info) == (reward_0, info_0)
        assert fingerprint(task.network) == before
    assert not task.network.training


def test_options_change_the_budget_of_one_episode(trimmer: Trimmer) -> None:
    env = TrimEnv(trimmer=trimmer)
    target = [feature.name for feature in FEATURES].index("target")
    other = episode(env, [0.1, 0.2, 0.3], options={"budget": 0.6})
    usual = episode(env, [0.1, 0.2, 0.3])
    assert (other[0][0][target], usual[0][0][target]) == (np.float32(0.6), np.float32(0.3))
    assert usual[3][2]["kept"] <= 0.3 < other[3][2]["kept"] <= 0.6
    with pytest.raises(UserError, match="smallest reachable budget"):
        env.reset(options={"budget": 1e-4})


RANGED = TrimSettings(budget=None, budget_range=(0.2, 0.8), budget_levels=3)


def test_each_episode_draws_one_of_the_levels_of_a_range(trimmer: Trimmer) -> None:
    assert RANGED.budgets == (0.2, pytest.approx(0.4), 0.8)  # even steps of the logarithm: the middle is √(0.2 · 0.8)
    env = TrimEnv(settings=RANGED, trimmer=trimmer)
    target = [feature.name for feature in FEATURES].index("target")
    seen = []
    for count in range(12):
        steps = episode(env, [0.1, 0.1, 0.1], **({"seed": 4} if count == 0 else {}))
        info = steps[-1][2]
        assert steps[0][0][target] == np.float32(info["budget"])
        assert info["kept"] <= info["budget"]
        assert steps[-1][1] == 0.0  # a constant score is the uniform plan of the very budget that was drawn
        seen.append(info["budget"])
    assert set(seen) == set(RANGED.budgets)
    other = TrimEnv(settings=RANGED, trimmer=trimmer)
    again = [episode(other, [0.5, 0.1, 0.1], **({"seed": 4} if count == 0 else {}))[-1][2] for count in range(12)]
    assert [info["budget"] for info in again] == seen
    assert len(other._uniform) == 3


def test_a_budget_of_the_range_can_be_named(trimmer: Trimmer) -> None:
    env = TrimEnv(settings=replace(RANGED, budget=0.5), trimmer=trimmer)
    assert episode(env, [0.0] * 3, options={"budget": 0.3})[-1][2]["budget"] == 0.3
    assert episode(env, [0.0] * 3, options={"budget": None})[-1][2]["budget"] in RANGED.budgets
    assert episode(env, [0.0] * 3)[-1][2]["budget"] in RANGED.budgets
    with pytest.raises(UserError, match=r"budget must lie in budget_range, from 0\.2 to 0\.8, but got budget=0\.9"):
        env.reset(options={"budget": 0.9})
    with pytest.raises(UserError, match="smallest reachable budget"):
        TrimEnv(settings=replace(RANGED, budget_range=(0.001, 0.8)), trimmer=trimmer)
    same = replace(RANGED, budget_range=[0.4, 0.4])  # type: ignore[arg-type]  # as a file gives it
    assert same.budgets == (0.4,)
    assert same == replace(RANGED, budget_range=(0.4, 0.4))


def test_checkers_find_nothing_with_a_range_of_budgets(trimmer: Trimmer) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gymnasium_check(gym.make(TRIM, settings=RANGED, trimmer=trimmer).unwrapped)


class Store(dict[str, Score]):
    """Scores in memory."""

    def put(self, key: str, score: Score) -> None:
        self[key] = score


@pytest.mark.parametrize("rounds", [1, 2])
def test_a_known_plan_is_paid_from_the_store(rounds: int, task: PruningTask, monkeypatch: pytest.MonkeyPatch) -> None:
    store, settings, actions = Store(), TrimSettings(rounds=rounds), [0.9, -0.9, 0.2] * rounds
    plain = episode(TrimEnv(task, settings), actions)[-1]
    scored = []
    inner = Trimmer.score
    monkeypatch.setattr(Trimmer, "score", lambda self, network: scored.append(network) or inner(self, network))
    for again in (False, True):
        env = TrimEnv(settings=settings, trimmer=Trimmer(task, settings.repair, scores=store))
        assert env.trimmer.baseline.examples == 300
        scored.clear()
        _, paid, info = episode(env, actions)[-1]
        assert info == {**plain[2], "cached": again}
        assert paid == plain[1]
        assert len(store) == 2  # the plan and the uniform plan
        assert len(scored) == 2 * (rounds if not again else rounds - 1)  # earlier rounds are cut for real
    assert [info["cached"] for *_, info in episode(env, actions) if "cached" in info] == [False] * (rounds - 1) + [True]


# ---- actions ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("unit", ["macs", "params"])
def test_score_meets_the_budget_in_every_random_episode(unit: str, task: PruningTask, trimmer: Trimmer) -> None:
    env = TrimEnv(settings=TrimSettings(budget=0.25, budget_unit=unit), trimmer=trimmer)
    rng, size, seen = np.random.default_rng(1), task.example.shape[-1], set()
    whole = lenet_cost(WIDTHS, size)
    for count in range(50):
        info = episode(env, rng.uniform(-1, 1, 3))[-1][2]
        widths = widths_of(info)
        by_hand = lenet_cost(widths, size)
        assert {"params": info["params"], "macs": info["macs"]} == by_hand
        assert info["kept"] == by_hand[unit] / whole[unit] <= 0.25
        wider = [np.add(widths, np.eye(3, dtype=int)[place]) for place in range(3) if widths[place] < WIDTHS[place]]
        assert any(lenet_cost(more, size)[unit] / whole[unit] > 0.25 for more in wider)
        seen.add(tuple(widths))
        if count < 5:
            cut = apply_plan(task.network, trimmer.groups, PruningPlan.from_dict(info["plan"]))
            cost = count_cost(cut, task.example)
            assert (cost.params, cost.macs) == (info["params"], info["macs"])
    assert len(seen) > 10


@pytest.mark.parametrize("action", [-1.0, -0.3, 0.0, 0.77, 1.0])
def test_a_constant_score_is_the_uniform_plan_and_pays_nothing(action: float, trimmer: Trimmer) -> None:
    env = TrimEnv(trimmer=trimmer)
    _, reward, info = episode(env, [action] * 3)[-1]
    start = uniform(trimmer, budget=0.3, unit="macs", retraining=RetrainSettings())
    assert info["plan"] == start.plan.to_dict()
    assert reward == 0.0
    assert info["reward_terms"] == {"gain_over_uniform": 0.0}
    low = max((count - 1) / width for count, width in zip(widths_of(info), WIDTHS, strict=True))
    high = min((count + 1) / width for count, width in zip(widths_of(info), WIDTHS, strict=True))
    assert low < high  # one share explains all widths, within one channel


def test_uniform_pays_nothing_over_rounds_with_retraining(trimmer: Trimmer) -> None:
    settings = TrimSettings(budget=0.2, rounds=2, retrain_updates=4, retraining=RetrainSettings(batch_size=32))
    env = TrimEnv(settings=settings, trimmer=trimmer)
    assert episode(env, [0.4] * 6)[-1][1] == 0.0
    uneven = episode(env, [1.0, -1.0, -1.0, 1.0, -1.0, -1.0])[-1]
    assert uneven[1] == pytest.approx(10 * (uneven[2]["accuracy"] - env.uniform(0.2).score.accuracy))
    assert uneven[1] != 0.0


def test_a_higher_score_keeps_more_of_its_group(trimmer: Trimmer) -> None:
    env = TrimEnv(trimmer=trimmer)
    for place in range(3):
        low, high = (np.full(3, 0.0), np.full(3, 0.0))
        low[place], high[place] = -0.5, 0.5
        narrow, wide = (widths_of(episode(env, actions)[-1][2])[place] for actions in (low, high))
        assert narrow < wide


def test_a_loose_budget_never_clips_a_ratio(trimmer: Trimmer) -> None:
    env = TrimEnv(settings=TrimSettings(budget=1.0, action="ratio", largest_trim=0.9), trimmer=trimmer)
    rng = np.random.default_rng(2)
    for _ in range(20):
        actions = rng.uniform(-1, 1, 3).astype(np.float32)
        info = episode(env, actions)[-1][2]
        keep = [1 - 0.9 * (1 - float(action)) / 2 for action in actions]
        assert list(info["requested"].values()) == pytest.approx(keep)
        assert widths_of(info) == [max(1, round(share * width)) for share, width in zip(keep, WIDTHS, strict=True)]


def test_a_tight_budget_clips_a_ratio_as_little_as_it_must(task: PruningTask, trimmer: Trimmer) -> None:
    budget, trim = 0.2, 0.9
    env = TrimEnv(settings=TrimSettings(budget=budget, action="ratio", largest_trim=trim), trimmer=trimmer)
    rng, size, clipped = np.random.default_rng(3), task.example.shape[-1], 0
    whole = lenet_cost(WIDTHS, size)["macs"]
    least = [max(1, round((1 - trim) * width)) for width in WIDTHS]
    for _ in range(20):
        actions = rng.uniform(-1, 1, 3).astype(np.float32)
        info = episode(env, actions)[-1][2]
        expected: list[int] = []
        for place, width in enumerate(WIDTHS):  # brute force: the most that lets the later groups still meet it
            asked = max(1, round((1 - trim * (1 - float(actions[place])) / 2) * width))
            fitting = [
                count
                for count in range(1, asked + 1)
                if lenet_cost([*expected, count, *least[place + 1 :]], size)["macs"] <= budget * whole
            ]
            expected.append(max(fitting))
            clipped += expected[-1] < asked
        assert widths_of(info) == expected
        assert info["kept"] <= budget
    assert clipped > 10


@pytest.mark.parametrize("trim", [0.5, 0.9, 0.95, 0.9609375])
def test_what_a_ratio_can_reach_is_what_its_strongest_action_leaves(trim: float, trimmer: Trimmer) -> None:
    env = TrimEnv(settings=TrimSettings(budget=1.0, action="ratio", largest_trim=trim), trimmer=trimmer)
    steps = episode(env, [-1.0] * 3)
    reachable = [feature.name for feature in FEATURES].index("reachable")
    assert steps[0][0][reachable] == pytest.approx(steps[-1][2]["kept"], abs=1e-6)


def test_threshold_zero_is_network_trimmings_rule_round_after_round(apoz_trimmer: Trimmer) -> None:
    settings = TrimSettings(budget=None, rounds=3, action="threshold", repair=apoz_trimmer.settings, reward=FLOOR)
    info = episode(TrimEnv(settings=settings, trimmer=apoz_trimmer), [0.0] * 9)[-1][2]
    network, present = apoz_trimmer.task.network, PruningPlan.full(apoz_trimmer.groups)
    subject, left = None, [sum(WIDTHS)]
    for plan in info["plans"]:
        keep = {}
        for group, apoz in zip(apoz_trimmer.groups, apoz_by_hand(apoz_trimmer, network), strict=True):
            threshold = math.fsum(apoz) / len(apoz) + math.sqrt(((apoz - apoz.mean()) ** 2).mean())
            keep[group.name] = [present[group.name][c] for c, value in enumerate(apoz) if value <= threshold]
        assert plan == keep
        relative = PruningPlan(keep).relative_to(present)
        trimmed = apoz_trimmer.trim(relative, subject)
        network, present, subject = trimmed.network, PruningPlan(keep), apoz_trimmer.examine_trimmed(trimmed)
        left.append(sum(present.counts.values()))
    assert left == sorted(set(left), reverse=True)  # each round removes something


def test_threshold_enforces_a_budget_in_the_last_round_only(apoz_trimmer: Trimmer) -> None:
    settings = TrimSettings(budget=0.3, rounds=2, action="threshold", repair=apoz_trimmer.settings)
    steps = episode(TrimEnv(settings=settings, trimmer=apoz_trimmer), [1.0] * 6)
    assert steps[3][2]["kept"] > 0.3**0.5
    assert 0.25 < steps[6][2]["kept"] <= 0.3


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("rule", RULES)
def test_no_group_ever_empties(rule: str, rounds: int, trimmer: Trimmer, apoz_trimmer: Trimmer) -> None:
    shared = apoz_trimmer if rule == "threshold" else trimmer
    budget = 0.06  # little above what the largest trim leaves
    env = TrimEnv(settings=replace(RULES[rule], budget=budget, rounds=rounds), trimmer=shared)
    for corner in itertools.product([-1.0, 1.0], repeat=3):
        steps = episode(env, list(corner) * rounds)
        for _, _, info in steps[3::3]:
            assert all(1 <= kept <= width for kept, width in zip(widths_of(info), WIDTHS, strict=True))
            assert all(0 < share <= 1 for share in info["executed"].values())
        assert steps[-1][2]["kept"] <= budget


# ---- reward and info -------------------------------------------------------------------------------------------------
def test_reward_is_terms_times_weights(trimmer: Trimmer) -> None:
    reward = RewardSettings(weights={"accuracy": 2.0, "saving": 3.0, "gain_over_uniform": -1.0})
    env = TrimEnv(settings=TrimSettings(reward=reward), trimmer=trimmer)
    steps = episode(env, [0.9, -0.9, 0.1])
    assert [paid for _, paid, _ in steps[:3]] == [0.0, 0.0, 0.0]
    _, paid, info = steps[3]
    terms = info["reward_terms"]
    assert terms == {
        "accuracy": info["accuracy"],
        "saving": 1 - info["kept"],
        "gain_over_uniform": info["accuracy"] - info["reference_accuracy"],
    }
    assert paid == pytest.approx(2 * terms["accuracy"] + 3 * terms["saving"] - terms["gain_over_uniform"])


def test_divergence_gain_is_agreement_beyond_the_uniform_plans(task: PruningTask, trimmer: Trimmer) -> None:
    env = TrimEnv(settings=TrimSettings(reward=RewardSettings(weights={"divergence_gain": 2.0})), trimmer=trimmer)
    _, paid, info = episode(env, [0.9, -0.9, 0.1])[-1]
    start = uniform(trimmer, budget=0.3, unit="macs", retraining=RetrainSettings())
    inputs = next(iter(task.reward.batches(len(task.reward)))).images
    with torch.no_grad():
        whole, ours, theirs = (
            torch.log_softmax(network(inputs).double(), 1)
            for network in (task.network, trimmer.trim(PruningPlan.from_dict(info["plan"])).network,
                            trimmer.trim(start.plan).network)
        )  # fmt: skip
    ours, theirs = ((whole.exp() * (whole - other)).sum(1).mean() for other in (ours, theirs))
    assert info["divergence"] == pytest.approx(float(ours), rel=1e-4)
    assert paid == pytest.approx(2 * float(theirs - ours), rel=1e-3)
    assert episode(env, [0.2] * 3)[-1][1] == 0.0


def test_parameters_gain_is_the_logarithm_of_parameters_over_the_uniform_plans(
    task: PruningTask, trimmer: Trimmer
) -> None:
    reward = RewardSettings(weights={"parameters_gain": 3.0})
    env = TrimEnv(settings=TrimSettings(reward=reward), trimmer=trimmer)
    _, paid, info = episode(env, [0.9, -0.9, 0.1])[-1]
    image = task.example.shape[-1]
    start = uniform(trimmer, budget=0.3, unit="macs", retraining=RetrainSettings())
    ours, theirs = (lenet_cost(tuple(map(len, plan.values())), image)["params"]
                    for plan in (info["plan"], start.plan.to_dict()))  # fmt: skip
    assert ours != theirs
    assert paid == pytest.approx(3 * math.log(ours / theirs))
    assert episode(env, [0.2] * 3)[-1][1] == 0.0


@pytest.mark.parametrize("accepted", [0.02, 0.5])
def test_accuracy_floor_is_psi_times_phi(accepted: float, task: PruningTask, trimmer: Trimmer) -> None:
    reward = RewardSettings("accuracy_floor", accepted_drop=accepted)
    settings = TrimSettings(budget=None, action="ratio", budget_unit="params", reward=reward)
    _, paid, info = episode(TrimEnv(settings=settings, trimmer=trimmer), [0.2, -0.6, -0.9])[-1]
    psi = (accepted - (trimmer.baseline.accuracy - info["accuracy"])) / accepted
    phi = math.log(lenet_cost(WIDTHS, task.example.shape[-1])["params"] / info["params"])
    assert paid == pytest.approx(psi * phi)
    assert phi > 0.5
    assert "reference_accuracy" not in info


def test_info_holds_what_is_documented_and_no_clock(trimmer: Trimmer) -> None:
    names = [group.name for group in trimmer.groups]
    steps = episode(TrimEnv(settings=TrimSettings(rounds=2), trimmer=trimmer), [0.5, -0.5, 0.0, 0.2, 0.1, -0.4])
    scored = {
        "group", "requested", "executed", "accuracy", "loss", "divergence", "params", "macs", "kept", "plan", "cached",
    }  # fmt: skip
    ended = scored | {"budget", "reward_terms", "reference_accuracy", "plans"}
    assert [set(info) for _, _, info in steps] == [{"group"}] * 3 + [scored] + [{"group"}] * 2 + [ended]
    for _, _, info in steps[3::3]:
        assert list(info["requested"]) == list(info["executed"]) == list(info["plan"]) == names
        executed = [kept / width for kept, width in zip(widths_of(info), WIDTHS, strict=True)]
        assert list(info["executed"].values()) == pytest.approx(executed)
        assert info["accuracy"] == pytest.approx(round(info["accuracy"] * 300) / 300)  # of 300 reward images
        assert info["divergence"] > 0
        assert info["cached"] is False
    assert steps[6][2]["budget"] == 0.3
    assert steps[6][2]["plans"] == [steps[3][2]["plan"], steps[6][2]["plan"]]
    sigmoids = [1 / (1 + math.exp(-3 * action)) for action in (0.5, -0.5, 0.0)]
    assert list(steps[3][2]["requested"].values()) == pytest.approx(sigmoids)


# ---- pictures, copies, processes -------------------------------------------------------------------------------------
def test_render(trimmer: Trimmer) -> None:
    text = TrimEnv(trimmer=trimmer, render_mode="ansi")
    text.reset()
    assert all(f"{name.name} " in text.render() for name in trimmer.groups)
    info = episode(text, [0.2, -0.2, 0.4])[-1][2]
    shown = text.render()
    for name, kept, width in zip(info["plan"], widths_of(info), WIDTHS, strict=True):
        assert re.search(rf"^{name} .* {kept}/{width}$", shown, re.MULTILINE)
    picture = TrimEnv(trimmer=trimmer, render_mode="rgb_array")
    picture.reset()
    before = picture.render()
    episode(picture, [0.2, -0.2, 0.4])
    after = picture.render()
    for frame in (before, after):
        assert frame.dtype == np.uint8
        assert frame.ndim == 3
        assert frame.shape[2] == 3
    assert not np.array_equal(before, after)


def test_a_pickled_environment_continues_identically(task: PruningTask) -> None:
    env = TrimEnv(task, TrimSettings(rounds=2))
    env.reset(seed=5)
    env.step(np.array([0.3], np.float32))
    copy = pickle.loads(pickle.dumps(env))
    for action in (-0.8, 0.6, 0.1, -0.1, 0.9):
        ours, theirs = (each.step(np.array([action], np.float32)) for each in (env, copy))
        np.testing.assert_array_equal(ours[0], theirs[0])
        assert ours[1:] == theirs[1:]
    assert ours[2]


def test_spawned_workers_give_the_same_rewards(task: PruningTask, trimmer: Trimmer) -> None:
    plans = np.array([[0.9, -0.9, 0.2], [-0.6, 0.8, -0.3]])
    single = TrimEnv(trimmer=trimmer)
    expected = [[reward for _, reward, _ in episode(single, plan)[1:]] for plan in plans]
    workers = make_environments(task, TrimSettings(), trimmer, workers=2, seed=0)
    assert isinstance(workers, SubprocVecEnv)
    try:
        workers.reset()
        rewards = [workers.step(plans[:, place, None].astype(np.float32))[1] for place in range(3)]
    finally:
        workers.close()
    np.testing.assert_array_equal(np.transpose(rewards), expected)
    assert np.count_nonzero(rewards[2]) > 0


# ---- mistakes --------------------------------------------------------------------------------------------------------
def test_an_unreachable_budget_names_the_smallest(trimmer: Trimmer) -> None:
    with pytest.raises(UserError, match="smallest reachable budget") as caught:
        TrimEnv(settings=TrimSettings(budget=0.001), trimmer=trimmer)
    named = re.search(r"costs (0\.\d+) of the macs", str(caught.value))
    assert named is not None
    info = episode(TrimEnv(settings=TrimSettings(budget=float(named[1])), trimmer=trimmer), [0.0] * 3)[-1][2]
    assert widths_of(info) == [1, 1, 1]


def test_a_ratio_refuses_what_its_largest_trim_cannot_reach(trimmer: Trimmer) -> None:
    with pytest.raises(UserError, match=r"trimming 30% of each group.*raise largest_trim or the budget"):
        TrimEnv(settings=TrimSettings(budget=0.3, action="ratio", largest_trim=0.3), trimmer=trimmer)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TrimSettings(action="threshold"), "criterion must be 'apoz', but got 'least_squares'"),
        (lambda: TrimSettings(rounds=0), "rounds must be at least 1"),
        (lambda: TrimSettings(retrain_updates=-1), "retrain_updates at least 0"),
        (lambda: TrimSettings(score_scale=0.0), "score_scale must be positive"),
        (lambda: TrimSettings(largest_trim=1.0), r"largest_trim in \(0, 1\)"),
        (lambda: TrimSettings(budget=None), "objective 'budget' needs a budget"),
        (lambda: TrimSettings(budget=1.5), r"budget must be in \(0, 1\], but got budget=1.5"),
        (lambda: TrimSettings(budget=-1), r"budget must be in \(0, 1\], but got budget=-1"),
        (lambda: TrimSettings(budget=float("nan")), "budget must be a finite number or None, but got nan"),
        (lambda: TrimSettings(budget_range=(0.5, 0.2)), r"both in \(0, 1\], but got \[0.5, 0.2\]; give two shares"),
        (lambda: TrimSettings(budget_range=(0.0, 0.5)), r"budget_range must be the lowest and the highest budget"),
        (lambda: TrimSettings(budget_range=(0.1, 1.5)), r"budget_range must be the lowest and the highest budget"),
        (lambda: TrimSettings(budget_range=(0.5,)), r"but got \[0.5\]; give two shares"),  # type: ignore[arg-type]
        (lambda: TrimSettings(budget_range=0.5), "budget_range must be a list of finite numbers or None"),  # type: ignore[arg-type]
        (lambda: TrimSettings(budget_range=(0.4, 0.8)), "from 0.4 to 0.8, but got budget=0.3; widen the range"),
        (lambda: TrimSettings(budget_levels=1), "budget_levels must be at least 2, but got 1"),
        (lambda: TrimSettings(budget_unit="flops"), "budget_unit must be one of macs, params, but got 'flops'"),
        (lambda: TrimSettings(budget=None, action="ratio", budget_unit="flops", reward=FLOOR), "budget_unit must be"),
        (lambda: TrimSettings(score_scale=float("inf")), "score_scale must be a finite number, but got inf"),
        (lambda: TrimSettings(rounds=1.5), "rounds must be a whole number, but got 1.5"),  # type: ignore[arg-type]
        (lambda: TrimSettings(reward=RewardSettings(weights={"saving": math.nan})), "weights must be .*finite numbers"),
        (lambda: TrimSettings(repair=3), "repair must be RepairSettings, but got 3"),  # type: ignore[arg-type]
        (lambda: RepairSettings(seed=10**40), r"seed must be a whole number from 0 to 2\*\*63 - 1, but got 1000"),
        (lambda: RepairSettings(seed=-1), "seed must be a whole number from 0"),
        (lambda: RewardSettings("budgte"), "got 'budgte'; did you mean 'budget'"),
        (lambda: RewardSettings(weights={"savings": 1.0}), "got 'savings'; did you mean 'saving'"),
        (lambda: RewardSettings(accepted_drop=2.0), r"accepted_drop must be in \(0, 1\], but got 2.0"),
        (lambda: RepairSettings("apozz"), "did you mean 'apoz'"),
    ],
)
def test_impossible_settings_are_refused(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (TrimSettings(action="scores"), "got 'scores'; did you mean 'score'"),
        (TrimSettings(budget=None, reward=FLOOR), "action 'score' needs a budget"),
        (TrimSettings(repair=RepairSettings("apoz")), "shared trimmer must have the environment's repair settings"),
    ],
)
def test_an_environment_refuses(settings: TrimSettings, message: str, trimmer: Trimmer) -> None:
    with pytest.raises(UserError, match=message):
        TrimEnv(settings=settings, trimmer=trimmer)


def test_mistakes_in_use(trimmer: Trimmer) -> None:
    with pytest.raises(UserError, match=r"render_mode must be one of .*ansi.*, but got 'human'"):
        TrimEnv(trimmer=trimmer, render_mode="human")
    env = TrimEnv(trimmer=trimmer)
    with pytest.raises(gym.error.ResetNeeded, match=r"call reset\(\) before step\(\)"):
        env.step(np.zeros(1, np.float32))
    env.reset()
    for action in (np.array([np.nan]), np.array([np.inf]), np.zeros(2), np.zeros(0)):
        with pytest.raises(UserError, match="one finite number"):
            env.step(action)
    with pytest.warns(UserWarning, match="needs a render_mode"):
        assert env.render() is None
    episode(env, [0.0] * 3)
    with pytest.raises(gym.error.ResetNeeded, match="episode has ended"):
        env.step(np.zeros(1, np.float32))


class Forbidden(TensorSplit):
    """A selection split that nobody may read."""

    def batches(self, *_: Any, **__: Any) -> Any:
        pytest.fail("the selection split was read")


def test_no_reward_depends_on_the_selection_split(task: PruningTask) -> None:
    forbidden = Forbidden(torch.zeros(4, 1, 28, 28), torch.zeros(4, dtype=torch.int64), name="selection")
    training = RetrainSettings(batch_size=32, learning_rate=0.05)
    checked = replace(training, check_every=1, patience=1)
    infos = []
    for chosen, settings in ((replace(task, selection=forbidden), checked), (task, training)):
        env = TrimEnv(chosen, TrimSettings(budget=0.1, rounds=2, retrain_updates=6, retraining=settings))
        infos.append([info for *_, info in episode(env, [0.3, -0.5, 0.1] * 2) if "accuracy" in info])
    assert len(infos[0]) == 2
    assert infos[0] == infos[1]


# ---- not every width, not every group --------------------------------------------------------------------------------
EIGHTS = GroupSettings(channel_multiple=8)


@pytest.fixture(scope="module")
def eights(task: PruningTask) -> dict[str, Trimmer]:
    return {name: Trimmer(task, settings.repair, EIGHTS) for name, settings in RULES.items()}


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("rule", RULES)
def test_every_width_is_a_multiple_of_eight(
    rule: str, rounds: int, task: PruningTask, eights: dict[str, Trimmer]
) -> None:
    settings = replace(RULES[rule], budget=0.4, budget_unit="params", rounds=rounds, groups=EIGHTS)
    env = TrimEnv(settings=settings, trimmer=eights[rule])
    rng, seen = np.random.default_rng(0), set()
    for count in range(8):
        steps = episode(env, rng.uniform(-1, 1, 3 * rounds))
        for _, _, info in steps[3::3]:
            assert all(width % 8 == 0 for width in widths_of(info))
            for share, width in zip(info["executed"].values(), WIDTHS, strict=True):
                assert round(share * width, 9) % 8 == 0
            seen.add(tuple(widths_of(info)))
        assert steps[-1][2]["kept"] <= 0.4
        if count == 0:
            cut: Any = apply_plan(task.network, env.trimmer.groups, PruningPlan.from_dict(steps[-1][2]["plan"]))
            made = [cut.conv1.out_channels, cut.conv2.out_channels, cut.fc1.out_features]
            assert made == widths_of(steps[-1][2])
    assert len(seen) > 1


def test_the_reference_is_uniform_in_multiples_too(eights: dict[str, Trimmer]) -> None:
    env = TrimEnv(settings=TrimSettings(budget_unit="params", groups=EIGHTS), trimmer=eights["score"])
    _, reward, info = episode(env, [0.4] * 3)[-1]
    start = uniform(eights["score"], budget=0.3, unit="params", retraining=RetrainSettings())
    assert info["plan"] == start.plan.to_dict()
    assert all(count % 8 == 0 for count in start.plan.counts.values())
    assert reward == 0.0


def test_a_ratio_takes_the_nearest_multiple_that_leaves_the_budget_reachable(
    task: PruningTask, eights: dict[str, Trimmer]
) -> None:
    budget, trim, size = 0.3, 0.9, task.example.shape[-1]
    settings = TrimSettings(budget=budget, budget_unit="params", action="ratio", largest_trim=trim, groups=EIGHTS)
    env = TrimEnv(settings=settings, trimmer=eights["ratio"])
    rng, whole, clipped = np.random.default_rng(3), lenet_cost(WIDTHS, size)["params"], 0
    for _ in range(20):
        actions = rng.uniform(-1, 1, 3).astype(np.float32)
        expected: list[int] = []
        for place, width in enumerate(WIDTHS):
            asked = math.floor((1 - trim * (1 - float(actions[place])) / 2) * width + 0.5)
            nearest = min(range(8, width + 1, 8), key=lambda count: (abs(count - asked), count))
            fitting = [
                count
                for count in range(8, nearest + 1, 8)
                if lenet_cost([*expected, count, *(8, 8, 8)[place + 1 :]], size)["params"] <= budget * whole
            ]
            expected.append(fitting[-1])
            clipped += fitting[-1] < nearest
        steps = episode(env, actions)
        assert widths_of(steps[-1][2]) == expected
        reachable = steps[0][0][[feature.name for feature in FEATURES].index("reachable")]
        assert reachable == pytest.approx(lenet_cost((8, 8, 8), size)["params"] / whole)
    assert clipped > 3
    with pytest.raises(UserError, match=r"trimming 10% of each group.*of the params with channel_multiple 8, but got"):
        TrimEnv(settings=replace(settings, largest_trim=0.1), trimmer=eights["ratio"])


def test_a_threshold_keeps_the_best_of_those_above_it_up_to_a_multiple(eights: dict[str, Trimmer]) -> None:
    trimmer = eights["threshold"]
    settings = TrimSettings(
        budget=None, action="threshold", repair=trimmer.settings, reward=FLOOR, groups=EIGHTS, budget_unit="params"
    )
    info = episode(TrimEnv(settings=settings, trimmer=trimmer), [0.0, -0.5, -0.25])[-1][2]
    apoz = apoz_by_hand(trimmer, trimmer.task.network)
    fewer = 0
    for z, values, keep in zip((1.0, 0.0, 0.5), apoz, info["plan"].values(), strict=True):
        below = int((values <= values.mean() + z * values.std()).sum())
        count = 8 * math.ceil(below / 8)
        assert set(keep) == set(np.argsort(values, kind="stable")[:count].tolist())
        fewer += below < count < len(values)
    assert fewer
    assert sum(widths_of(info)) < sum(WIDTHS)


def test_ignored_groups_are_not_walked(task: PruningTask) -> None:
    settings = TrimSettings(budget_unit="params", groups=GroupSettings(ignore="conv*"))
    env = TrimEnv(task, settings)
    steps = episode(env, [0.3])
    assert list(steps[-1][2]["plan"]) == ["fc1"]
    whole, size = lenet_cost(WIDTHS, 28)["params"], 28
    fitting = [width for width in range(1, 65) if lenet_cost((8, 16, width), size)["params"] <= 0.3 * whole]
    assert widths_of(steps[-1][2]) == [fitting[-1]]
    with pytest.raises(UserError, match="shared trimmer must have the environment's group settings"):
        TrimEnv(settings=TrimSettings(), trimmer=env.trimmer)
