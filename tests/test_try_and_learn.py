"""Try-and-learn: the filter-wise policy by hand, a layer whose useless filters are known, budgets, order and replay."""

import math
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from prunegym.agent.filterwise import FilterEncoder, FilterwisePolicy, NormalisedReturns
from prunegym.agent.settings import TryAndLearnSettings
from prunegym.agent.try_and_learn import TryAndLearnResult, try_and_learn
from prunegym.envs import SelectFiltersEnv, SelectSettings
from prunegym.envs.default_task import default_task
from prunegym.pruning import (
    GroupSettings,
    PruningPlan,
    PruningTask,
    RepairSettings,
    RetrainSettings,
    Trimmer,
    UserError,
    apply_plan,
    build,
    evaluate,
)
from prunegym.pruning.heuristics import Goal
from stable_baselines3 import A2C, PPO
from torch import Tensor, nn

WIDTHS = {"conv1": 8, "conv2": 16, "fc1": 64}  # of lenet_small
REPAIR = RepairSettings(compensation="delete", reward_images=100, calibration_images=64)
FEW = TryAndLearnSettings(evaluations=12, fine_tune=1, initial_keep=0.8, accepted_drop=0.05)
UPDATES = RetrainSettings(updates=23, batch_size=32, learning_rate=0.01)
NONE = RetrainSettings()
ALL = Goal(accepted_drop=1.0)  # all layers, b in the settings: as published


@pytest.fixture(scope="module")
def trimmer() -> Trimmer:
    return Trimmer(default_task(), REPAIR)


@pytest.fixture(scope="module")
def trained(trimmer: Trimmer) -> TryAndLearnResult:
    return try_and_learn(trimmer, ALL, FEW, retraining=UPDATES, seed=3)


# ---- the policy ------------------------------------------------------------------------------------------------------
def spaces(filters: int, entries: int = 12) -> tuple[gym.spaces.Dict, gym.spaces.MultiBinary]:
    box = gym.spaces.Box(-10, 10, (filters, entries), np.float32)
    return gym.spaces.Dict(filters=box, mask=gym.spaces.MultiBinary(filters)), gym.spaces.MultiBinary(filters)


def make_policy(filters: int, *, trained: bool = True, **keywords: Any) -> FilterwisePolicy:
    """Make a policy; `trained`: with random weights in all of its layers, as after some updates."""
    policy = FilterwisePolicy(*spaces(filters), lambda _: 1e-3, **keywords)
    if trained:
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return policy


def observe(filters: int, there: int, seed: int = 0, garbage: float = 0.0) -> dict[str, NDArray[Any]]:
    """Show `there` filters with room for `filters`; padding holds `garbage`."""
    rows = np.full((filters, 12), garbage, np.float32)
    rows[:there] = np.random.default_rng(seed).normal(size=(there, 12))
    return {"filters": rows, "mask": (np.arange(filters) < there).astype(np.int8)}


def logits_of(policy: FilterwisePolicy, observation: dict[str, NDArray[Any]]) -> Tensor:
    tensors, _ = policy.obs_to_tensor(observation)
    with torch.no_grad():
        return policy.get_distribution(tensors).distribution.logits[0]  # type: ignore[union-attr]


def value_of(policy: FilterwisePolicy, observation: dict[str, NDArray[Any]]) -> float:
    tensors, _ = policy.obs_to_tensor(observation)
    with torch.no_grad():
        return float(policy.predict_values(tensors))


def test_the_policys_size_does_not_depend_on_the_number_of_filters() -> None:
    small, large = (make_policy(filters).state_dict() for filters in (8, 64))
    assert {name: value.shape for name, value in small.items()} == {name: value.shape for name, value in large.items()}
    assert all(8 not in value.shape for value in small.values())


@pytest.mark.parametrize("keep", [0.9, 0.5, 0.02])
def test_before_training_every_filter_has_the_same_keep_probability(keep: float) -> None:
    policy = make_policy(20, trained=False, initial_keep=keep)
    probabilities = policy.keep_probabilities(observe(20, 14))
    torch.testing.assert_close(probabilities[:14], torch.full((14,), keep))
    assert probabilities[14:].tolist() == [0.0] * 6


def test_permuted_filters_have_permuted_logits_and_the_same_value() -> None:
    policy, shown = make_policy(16), observe(16, 16)
    order = np.random.default_rng(1).permutation(16)
    other = {"filters": shown["filters"][order], "mask": shown["mask"]}
    logits = logits_of(policy, shown)
    assert logits.std() > 0.1
    torch.testing.assert_close(logits_of(policy, other), logits[torch.from_numpy(order)], rtol=1e-4, atol=1e-5)
    assert value_of(policy, other) == pytest.approx(value_of(policy, shown), rel=1e-4)


@pytest.mark.parametrize("garbage", [0.0, 7.0])
def test_padding_changes_nothing(garbage: float) -> None:
    small, large = make_policy(9), make_policy(30)
    large.load_state_dict(small.state_dict())
    exact, padded = observe(9, 9), observe(30, 9, garbage=garbage)
    torch.testing.assert_close(logits_of(large, padded)[:9], logits_of(small, exact), rtol=1e-4, atol=1e-5)
    assert value_of(large, padded) == pytest.approx(value_of(small, exact), rel=1e-4)


def test_a_filter_is_judged_beside_the_others() -> None:
    policy, shown = make_policy(6), observe(6, 6)
    other = {**shown, "filters": shown["filters"].copy()}
    other["filters"][5] *= -3.0
    assert (logits_of(policy, shown)[:5] - logits_of(policy, other)[:5]).abs().min() > 1e-4


def test_logits_by_hand() -> None:
    """Codes with mean 0 and standard deviation 1 over the filters, the mean code beside them."""
    policy, shown = make_policy(12), observe(12, 9)
    weights = {name: value.double().numpy() for name, value in policy.state_dict().items()}

    def layer(name: str, values: NDArray[np.float64]) -> NDArray[np.float64]:
        return values @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    encoder, heads = "features_extractor.encoder", "mlp_extractor"
    codes = np.tanh(layer(f"{encoder}.2", np.maximum(layer(f"{encoder}.0", shown["filters"][:9].astype(float)), 0)))
    apart = (codes - codes.mean(0)) / np.sqrt(codes.var(0) + 1e-5)
    both = np.concatenate((apart, np.tile(codes.mean(0), (9, 1))), axis=1)
    expected = layer(f"{heads}.last", np.tanh(layer(f"{heads}.first", both)))[:, 0]
    np.testing.assert_allclose(logits_of(policy, shown)[:9].numpy(), expected, rtol=1e-3, atol=1e-4)


def test_an_untrained_code_knows_a_filters_size_and_sign() -> None:
    encoder = FilterEncoder(spaces(1)[0])
    rows = torch.randn(1, 8, 12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        code, twice, mirrored = (
            encoder({"filters": factor * rows, "mask": torch.ones(1, 8)})[..., :-1] for factor in (1.0, 2.0, -1.0)
        )
    assert (twice - code).abs().mean() > 0.01
    assert (mirrored + code).abs().mean() > 0.01


def test_filters_that_are_alike_have_the_same_logit() -> None:
    shown = observe(5, 5)
    shown["filters"][:] = shown["filters"][0]
    logits = logits_of(make_policy(5), shown)
    torch.testing.assert_close(logits, logits[:1].expand(5), rtol=1e-4, atol=1e-4)


def test_log_probability_and_entropy_by_hand_without_padding() -> None:
    policy, shown = make_policy(25), observe(25, 10)
    tensors, _ = policy.obs_to_tensor(shown)
    p = policy.keep_probabilities(shown)[:10].double()
    for seed in range(20):
        torch.manual_seed(seed)
        with torch.no_grad():
            actions, value, log_prob = policy(tensors)
        assert not actions[0, 10:].any()
        a = actions[0, :10].double()
        by_hand = (a * p.log() + (1 - a) * (1 - p).log()).sum()
        assert float(log_prob) == pytest.approx(float(by_hand), rel=1e-4)
    with torch.no_grad():
        again_value, again, entropy = policy.evaluate_actions(tensors, actions)
    assert float(again) == pytest.approx(float(log_prob))
    assert float(again_value) == pytest.approx(float(value))
    assert entropy is not None
    assert float(entropy) == pytest.approx(float(-(p * p.log() + (1 - p) * (1 - p).log()).sum()), rel=1e-4)


def test_gradients_of_many_padded_rows_are_those_of_none() -> None:
    gradients, weights = [], make_policy(10).state_dict()
    for room in (10, 200):
        policy, shown = make_policy(room), observe(room, 10)
        policy.load_state_dict(weights)
        tensors, _ = policy.obs_to_tensor(shown)
        actions = torch.zeros(1, room)
        actions[0, :10] = torch.tensor([1.0, 0, 1, 1, 0, 0, 1, 0, 1, 1])
        _, log_prob, _ = policy.evaluate_actions(tensors, actions)
        log_prob.sum().backward()
        gradients.append([p.grad for p in policy.parameters() if p.grad is not None])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    assert any(bool(gradient.abs().max() > 1e-3) for gradient in gradients[0])


def test_a_saved_policy_comes_back(tmp_path: Path) -> None:
    policy, shown = make_policy(12, hidden=24, initial_keep=0.7), observe(12, 7)
    policy.save(str(tmp_path / "policy.zip"))
    loaded = FilterwisePolicy.load(str(tmp_path / "policy.zip"))
    assert (loaded.hidden, loaded.initial_keep) == (24, 0.7)
    assert torch.equal(logits_of(loaded, shown), logits_of(policy, shown))


@pytest.mark.parametrize("algorithm", [A2C, PPO])
def test_a_saved_algorithm_comes_back_and_learns_on(algorithm: Any, tmp_path: Path, trimmer: Trimmer) -> None:
    env = SelectFiltersEnv(settings=SelectSettings(fine_tune=0, repair=REPAIR), trimmer=trimmer)
    extra = {"batch_size": 4} if algorithm is PPO else {}
    learner = algorithm(FilterwisePolicy, env, n_steps=4, seed=0, device="cpu", **extra).learn(4)
    learner.save(tmp_path / "learner.zip")
    loaded = algorithm.load(tmp_path / "learner.zip", env=env, device="cpu")
    observation, _ = env.reset()
    for deterministic in (True, False):
        pair = []
        for each in (learner, loaded):
            torch.manual_seed(1)
            pair.append(each.predict(observation, deterministic=deterministic)[0])
        np.testing.assert_array_equal(*pair)
    loaded.learn(4)


def test_policy_mistakes_are_named() -> None:
    with pytest.raises(UserError, match=r"initial_keep in \(0, 1\), but got 64 and 1.0"):
        make_policy(4, initial_keep=1.0)
    observation, _ = spaces(4)
    with pytest.raises(UserError, match="action space must be MultiBinary, one number a filter"):
        FilterwisePolicy(observation, gym.spaces.Discrete(4), lambda _: 1e-3)


# ---- returns ---------------------------------------------------------------------------------------------------------
def advantages(rewards: list[float]) -> NDArray[np.float32]:
    buffer = NormalisedReturns(len(rewards), *spaces(2), device="cpu", gamma=1.0, gae_lambda=1.0)
    for reward in rewards:
        shown: Any = {name: value[None] for name, value in observe(2, 2).items()}
        buffer.add(shown, np.ones((1, 2)), np.array([reward]), np.ones(1), torch.tensor([0.4]), torch.zeros(1))
    buffer.compute_returns_and_advantage(torch.tensor([9.0]), np.ones(1, bool))
    np.testing.assert_array_equal(buffer.returns[:, 0], np.float32(rewards))
    return buffer.advantages[:, 0]


def test_returns_are_normalised() -> None:
    rewards = [0.5, -1.0, 2.0, 0.25, 0.0]
    mean = math.fsum(rewards) / 5
    spread = math.sqrt(math.fsum((reward - mean) ** 2 for reward in rewards) / 4)
    np.testing.assert_allclose(advantages(rewards), [(reward - mean) / spread for reward in rewards], rtol=1e-6)


def test_equal_returns_teach_nothing() -> None:
    for reward in np.random.default_rng(0).uniform(-3, 3, 200):
        assert not advantages([float(reward)] * 5).any()
    assert not advantages([0.0] * 5).any()


# ---- a layer whose useless filters are known -------------------------------------------------------------------------
USELESS = [1, 4, 6, 9, 13, 15]


def known_task(useless: list[int]) -> PruningTask:
    """Class k is seen by one hidden unit alone; the units in `useless` are read by nobody.

    Images (N, 10, 1, 1): 1 to 1.5 in the place of the class, less than 0.5 elsewhere; as many of each class.
    """
    generator = torch.Generator().manual_seed(0)
    width = 10 + len(useless)
    useful = [unit for unit in range(width) if unit not in useless]
    network = nn.Sequential(nn.Flatten(), nn.Linear(10, width), nn.ReLU(), nn.Linear(width, 10))
    first: Any = network[1]
    last: Any = network[3]
    with torch.no_grad():
        for layer in (first, last):
            layer.weight.zero_()
            layer.bias.zero_()
        first.weight.copy_(torch.randn(width, 10, generator=generator))
        for label, unit in enumerate(useful):
            first.weight[unit] = 0.0
            first.weight[unit, label] = 1.0
            last.weight[label, unit] = 1.0
    labels = torch.arange(200) % 10
    pictures = 0.49 * torch.rand(200, 10, 1, 1, generator=generator)
    pictures[torch.arange(200), labels] = 1 + pictures[torch.arange(200), labels]
    pair = (pictures, labels)
    return PruningTask(network.eval(), pair, pair, pair, pair)


def test_useless_filters_are_dropped_and_the_others_stay() -> None:
    """Each useful filter is worth a tenth of the accuracy: ψφ has its one optimum at dropping the useless ones."""
    trimmer = Trimmer(known_task(USELESS), RepairSettings(compensation="delete", recalibration_images=0))
    assert trimmer.baseline.accuracy == 1.0
    useful = np.array([unit not in USELESS for unit in range(16)])
    settings = TryAndLearnSettings(accepted_drop=0.15, evaluations=200)
    optimum = math.log(16 / 10)

    def paid(action: NDArray[np.bool_]) -> float:
        return (1 - 0.1 * (useful & ~action).sum() / 0.15) * math.log(16 / max(1, action.sum()))

    best, at_random = [], []
    for seed in range(3):
        (layer,) = try_and_learn(trimmer, ALL, settings, retraining=NONE, seed=seed).layers
        keep = np.array(layer.probabilities)
        assert keep[useful].mean() > 0.85
        assert keep[~useful].mean() < 0.4
        assert np.mean(layer.rewards[-25:]) > np.mean(layer.rewards[:25]) + 0.1
        assert layer.rewards[-1] == pytest.approx(paid(keep > 0.5))
        best.append(max(layer.rewards))
        rng = np.random.default_rng(seed)
        at_random.append(max(paid(rng.random(16) < rng.uniform(0.3, 1.0)) for _ in range(settings.evaluations)))
    assert max(best) <= optimum + 1e-9
    assert np.mean(best) > 0.65 * optimum
    assert np.mean(best) > np.mean(at_random) + 0.08


def test_a_layer_stays_whole_where_nothing_pays() -> None:
    trimmer = Trimmer(known_task([]), RepairSettings(compensation="delete", recalibration_images=0))
    settings = replace(FEW, accepted_drop=0.01, initial_keep=0.5)
    made = try_and_learn(trimmer, ALL, settings, retraining=NONE)
    (layer,) = made.layers
    assert max(reward for reward, width in zip(layer.rewards, layer.widths, strict=True) if width < 10) < 0
    assert (layer.chosen, layer.kept, layer.forced) == ("whole", 10, False)
    assert made[-1].plan.counts == {"1": 10}


# ---- layer by layer --------------------------------------------------------------------------------------------------
def test_layers_follow_from_low_to_high_and_the_best_try_is_taken(trained: TryAndLearnResult, trimmer: Trimmer) -> None:
    assert [layer.group for layer in trained.layers] == list(WIDTHS)
    plan = PruningPlan.full(trimmer.groups)
    for layer, record in zip(trained.layers, trained, strict=True):
        assert len(layer.rewards) == len(layer.accuracies) == len(layer.widths) == FEW.evaluations
        assert len(layer.probabilities) == layer.width == WIDTHS[layer.group]
        for reward, accuracy, width in zip(layer.rewards, layer.accuracies, layer.widths, strict=True):
            psi = (0.05 - (trimmer.baseline.accuracy - accuracy)) / 0.05
            assert reward == pytest.approx(psi * math.log(layer.width / width))
        best = int(np.argmax(layer.rewards))
        assert layer.rewards[best] > 0
        assert layer.kept == layer.widths[best] < layer.width
        assert layer.chosen == ("policy" if best == FEW.evaluations - 1 else "tried")
        assert record.provenance.method == trained.schedule.made_by == "try_and_learn"
        assert record.provenance.criterion == "policy"
        assert record.provenance.compensation == "delete"
        changed = {name for name in WIDTHS if record.plan[name] != plan[name]}
        assert changed == {layer.group}
        plan = record.plan
        assert plan.counts[layer.group] == layer.kept


def test_the_policys_own_choice_is_tried_last(trimmer: Trimmer) -> None:
    """Without retraining nothing is fine-tuned: the last score is that of a cut made by hand."""
    settings = replace(FEW, layers=("conv2",), initial_keep=0.5, evaluations=11, accepted_drop=0.5)
    (layer,) = try_and_learn(trimmer, ALL, settings, retraining=NONE, seed=1).layers
    keep = [channel for channel, p in enumerate(layer.probabilities) if p > 0.5]
    assert 1 <= len(keep) < 16
    cut = apply_plan(trimmer.task.network, trimmer.groups, PruningPlan({"conv2": keep}))
    assert layer.widths[-1] == len(keep)
    assert layer.accuracies[-1] == evaluate(cut, trimmer.reward.batches(50)).accuracy


@pytest.mark.parametrize(("between", "asked"), [(-1, [5, 5, 13]), (4, [4, 4, 15]), (0, [0, 0, 23])])
def test_updates_are_shared_and_add_up(between: int, asked: list[int], trimmer: Trimmer) -> None:
    made = try_and_learn(trimmer, ALL, replace(FEW, updates_between=between), retraining=UPDATES)
    assert [record.provenance.retrain_updates for record in made] == asked  # 23 in all, half of them early
    assert [entry.retrain_updates for entry in made.schedule.rounds] == asked


@pytest.mark.parametrize("compensation", ["delete", "least_squares"])
def test_the_schedule_replays_to_the_same_network(
    compensation: str, trimmer: Trimmer, trained: TryAndLearnResult
) -> None:
    made = trained
    if compensation != "delete":
        settings = replace(FEW, evaluations=7)
        other = trimmer.with_settings(replace(REPAIR, compensation=compensation))
        made = try_and_learn(other, Goal(0.5), settings, retraining=UPDATES)
    assert made.schedule.repair.compensation == compensation
    again = build(Trimmer(default_task()), made.schedule)
    first, second = made.network.state_dict(), again.network.state_dict()
    assert list(first) == list(second)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_same_seed_gives_the_same_and_global_random_numbers_come_back(
    trimmer: Trimmer, trained: TryAndLearnResult
) -> None:
    before = (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate())  # noqa: NPY002
    again = try_and_learn(trimmer, ALL, FEW, retraining=UPDATES, seed=3)
    assert torch.equal(torch.get_rng_state(), before[0])
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002
    assert random.getstate() == before[2]
    assert again.layers == trained.layers
    assert again[-1].plan == trained[-1].plan
    other = try_and_learn(trimmer, ALL, replace(FEW, layers=("conv1",)), retraining=UPDATES, seed=4)
    assert other.layers[0].widths != trained.layers[0].widths


def test_callbacks_count_updates_and_networks(trimmer: Trimmer) -> None:
    updates: list[int] = []
    tried: list[int] = []
    settings = replace(FEW, layers=("conv*",))
    try_and_learn(trimmer, ALL, settings, retraining=UPDATES, progress=updates.append, evaluated=tried.append)
    assert updates == list(range(1, 24))
    assert tried == list(range(1, 2 * FEW.evaluations + 1))


# ---- budgets ---------------------------------------------------------------------------------------------------------
def share(widths: dict[str, int], unit: str) -> float:
    """Cost of the small LeNet on 1x28x28 images relative to the whole one's, by hand."""

    def cost(first: int, second: int, hidden: int) -> int:
        if unit == "params":
            return first * 26 + second * (first * 25 + 1) + hidden * (second * 16 + 1) + 10 * (hidden + 1)
        return 24**2 * first * 25 + 8**2 * second * first * 25 + hidden * second * 16 + 10 * hidden

    return cost(**dict(zip(("first", "second", "hidden"), widths.values(), strict=True))) / cost(8, 16, 64)


@pytest.mark.parametrize(("unit", "budget"), [("params", 0.9), ("params", 0.3), ("params", 0.05), ("macs", 0.6)])
def test_the_budget_is_met_by_one_filter(unit: str, budget: float, trimmer: Trimmer) -> None:
    made = try_and_learn(trimmer, Goal(budget, unit), FEW, retraining=NONE)
    widths, last = made[-1].plan.counts, made.layers[-1].group
    assert made.stopped_by == "budget"
    assert share(widths, unit) <= budget < share({**widths, last: widths[last] + 1}, unit)
    assert all(share(record.plan.counts, unit) > budget for record in made[:-1])


def test_what_the_budget_takes_or_leaves_follows_the_probabilities(trimmer: Trimmer) -> None:
    settings = replace(FEW, layers=("fc1",))
    free = try_and_learn(trimmer, ALL, settings, retraining=NONE, seed=2)
    chosen, (layer,) = set(free[-1].plan["fc1"]), free.layers
    likely = sorted(range(64), key=lambda channel: -layer.probabilities[channel])
    for count, forced in ((len(chosen) - 7, True), (len(chosen) + 3, False)):
        budget = share({**WIDTHS, "fc1": count}, "params")
        made = try_and_learn(trimmer, Goal(budget), settings, retraining=NONE, seed=2)
        assert made.layers[0].rewards == layer.rewards
        assert made.forced is made.layers[0].forced is forced
        if forced:
            expected = [channel for channel in likely if channel in chosen][:count]
        else:
            expected = [*chosen, *[channel for channel in likely if channel not in chosen][: count - len(chosen)]]
        assert list(made[-1].plan["fc1"]) == sorted(expected)


def test_early_layers_leave_the_later_ones_a_budget_they_can_meet(trimmer: Trimmer) -> None:
    least = share({**WIDTHS, "conv1": 1, "conv2": 1}, "params")
    settings = replace(FEW, layers=("conv1", "conv2"))
    made = try_and_learn(trimmer, Goal(least * 1.0001), settings, retraining=NONE)
    assert {name: made[-1].plan.counts[name] for name in ("conv1", "conv2")} == {"conv1": 1, "conv2": 1}
    assert made.forced
    with pytest.raises(UserError, match=f"one channel in each still costs {least:.4f} of the params"):
        try_and_learn(trimmer, Goal(least * 0.999), settings, retraining=NONE)


def test_what_is_reserved_for_later_layers_by_hand(trimmer: Trimmer) -> None:
    """A policy that drops nothing takes all that it may; costs in parameters, the budget is 5370 of them (4-8-32).

    conv1 keeps 8: 3/4 of the uniform plan's 8 and 32 are left, and 8-6-24 costs 3992. conv2: the uniform plan of the
    rest is 8-7-30 (5315), int(3/4 · 30) = 22 are left for fc1, and 208 + 201 c + 22 (16 c + 1) + 230 <= 5370 up to
    c = 8. fc1: 208 + 1608 + 129 f + 10 (f + 1) <= 5370 up to f = 25.
    """
    budget = share({"conv1": 4, "conv2": 8, "fc1": 32}, "params")
    settings = replace(FEW, evaluations=6, initial_keep=1 - 1e-7, entropy=0.0)
    made = try_and_learn(trimmer, Goal(budget), settings, retraining=NONE)
    assert made[-1].plan.counts == {"conv1": 8, "conv2": 8, "fc1": 25}
    assert [(layer.chosen, layer.forced) for layer in made.layers] == [
        ("whole", False),
        ("whole", True),
        ("whole", True),
    ]


def test_widths_are_allowed_ones() -> None:
    groups = GroupSettings(channel_multiple=4, minimum_width=4)
    trimmer = Trimmer(default_task(), REPAIR, groups)
    made = try_and_learn(trimmer, Goal(0.4), replace(FEW, initial_keep=0.6), retraining=NONE)
    assert all(width % 4 == 0 for record in made for width in record.plan.counts.values())
    assert all(width % 4 == 0 for layer in made.layers for width in layer.widths)
    assert share(made[-1].plan.counts, "params") <= 0.4


def test_an_accepted_drop_is_kept_to(trimmer: Trimmer) -> None:
    """It is also the b of the reward, where the settings have none."""
    settings = replace(FEW, accepted_drop=None)
    made = try_and_learn(trimmer, Goal(accepted_drop=0.03), settings, retraining=UPDATES, seed=3)
    layer = made.layers[0]
    for reward, accuracy, width in zip(layer.rewards, layer.accuracies, layer.widths, strict=True):
        psi = (0.03 - (trimmer.baseline.accuracy - accuracy)) / 0.03
        assert reward == pytest.approx(psi * math.log(8 / width))
    assert all(record.built.after_retraining.accuracy >= trimmer.baseline.accuracy - 0.03 for record in made)
    assert len(made.layers) - len(made) == (made.stopped_by == "accuracy")


def test_a_goal_that_accepts_no_drop_has_the_default_b() -> None:
    """Useless units leave at no loss, and ψ is not divided by 0."""
    assert [TryAndLearnSettings().drop_for(goal) for goal in (None, Goal(0.5), Goal(accepted_drop=0.0))] == [0.02] * 3
    assert TryAndLearnSettings().drop_for(Goal(accepted_drop=0.03)) == 0.03
    assert TryAndLearnSettings(accepted_drop=0.05).drop_for(Goal(accepted_drop=0.0)) == 0.05
    trimmer = Trimmer(known_task(USELESS), RepairSettings(compensation="delete", recalibration_images=0))
    settings = TryAndLearnSettings(evaluations=100)
    made = try_and_learn(trimmer, Goal(accepted_drop=0.0), settings, retraining=NONE)
    (layer,) = made.layers
    for reward, accuracy, width in zip(layer.rewards, layer.accuracies, layer.widths, strict=True):
        assert reward == pytest.approx((0.02 - (1.0 - accuracy)) / 0.02 * math.log(16 / width))
    assert 10 <= layer.kept < 16
    assert made[-1].built.after_retraining.accuracy == 1.0


# ---- mistakes --------------------------------------------------------------------------------------------------------
def test_mistakes_are_named(trimmer: Trimmer) -> None:
    with pytest.raises(UserError, match="layers must match layers that may be cut, but 'conv3' matches none; did you"):
        try_and_learn(trimmer, ALL, replace(FEW, layers=("conv3",)), retraining=NONE)
    with pytest.raises(UserError, match=r"budget must be reachable, but got budget=0\.001"):
        try_and_learn(trimmer, Goal(0.001), retraining=NONE)
    other: Any = REPAIR
    with pytest.raises(UserError, match="try_and_learn needs a TryAndLearnSettings, but got RepairSettings"):
        try_and_learn(trimmer, ALL, other, retraining=NONE)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"accepted_drop": 0.0}, "accepted_drop must be in"),
        ({"evaluations": 5}, "evaluations larger, but got 5 and 5"),
        ({"episodes_per_update": 1}, "episodes_per_update must be at least 2"),
        ({"initial_keep": 1.0}, r"initial_keep in \(0, 1\)"),
        ({"entropy": -0.1}, "entropy must be at least 0"),
        ({"fine_tune": -1}, "fine_tune must be at least 0"),
        ({"updates_between": -2}, "updates_between at least -1"),
        ({"hidden": 1.5}, "hidden must be a whole number"),
    ]
    for values, text in wrong:
        with pytest.raises(UserError, match=text):
            TryAndLearnSettings(**values)


@pytest.mark.parametrize("settings", [{"entropy": 1e30}, {"learning_rate": 1e37}])
def test_a_policy_that_diverges_is_named(settings: dict[str, float], trimmer: Trimmer) -> None:
    """The training goes wrong, not the network's: the settings that make it so are named with their values."""
    chosen = replace(FEW, initial_keep=0.5, layers=("conv1",), **settings)
    text = (
        "policy of layer conv1 must stay finite, but it diverged; lower learning_rate, which is "
        f"{chosen.learning_rate:g}, or entropy, which is {chosen.entropy:g}"
    )
    with pytest.raises(UserError, match=re.escape(text)):
        try_and_learn(trimmer, ALL, chosen, retraining=NONE)
