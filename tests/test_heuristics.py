"""Uniform and Network Trimming: the published rule by hand, the budget, the exact number of updates, and replay."""

import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from prunegym.envs.default_task import default_task
from prunegym.pruning import (
    CostModel,
    GroupSettings,
    PruningTask,
    RepairSettings,
    Trimmer,
    UserError,
    build,
    build_network,
    find_groups,
    measure,
)
from prunegym.pruning.heuristics import Goal, NetworkTrimmingSettings, Pruned, network_trimming, uniform
from prunegym.pruning.heuristics.ablation import forget, selection_overlap, train_from_scratch
from prunegym.pruning.retraining import RetrainSettings
from torch import nn

WIDTHS = {"conv1": 8, "conv2": 16, "fc1": 64}
UPDATES = RetrainSettings(updates=23, batch_size=32, learning_rate=0.01)
NONE = RetrainSettings()


def by_apoz(
    trimmer: Trimmer,
    *,
    budget: float | None = None,
    unit: str = "params",
    drop: float | None = None,
    compensation: str = "delete",
    settings: NetworkTrimmingSettings | None = None,
    **others: Any,
) -> Pruned:
    """Run Network Trimming, as published where nothing else is asked for."""
    trimmer = trimmer.with_settings(replace(trimmer.settings, compensation=compensation))
    return network_trimming(trimmer, Goal(budget, unit, drop), settings, **others)


@pytest.fixture(scope="module")
def task() -> PruningTask:
    return default_task()


@pytest.fixture(scope="module")
def trimmer(task: PruningTask) -> Trimmer:
    return Trimmer(task)


@pytest.fixture(scope="module")
def trained(trimmer: Trimmer) -> Pruned:
    """Several rounds to 30 % of the parameters, 23 updates in all."""
    settings = NetworkTrimmingSettings(max_rounds=4)
    return by_apoz(trimmer, budget=0.3, unit="params", retraining=UPDATES, seed=3, settings=settings)


def lenet_cost(widths: Mapping[str, int], unit: str) -> int:
    """Cost of the small LeNet on 1x28x28 images, by hand."""
    first, second, hidden = widths["conv1"], widths["conv2"], widths["fc1"]
    if unit == "params":
        return first * 26 + second * (first * 25 + 1) + hidden * (second * 16 + 1) + 10 * (hidden + 1)
    return 24**2 * first * 25 + 8**2 * second * first * 25 + hidden * second * 16 + 10 * hidden


def share(widths: Mapping[str, int], unit: str) -> float:
    return lenet_cost(widths, unit) / lenet_cost(WIDTHS, unit)


def apoz_of(trimmer: Trimmer, network: nn.Module) -> dict[str, NDArray[np.float64]]:
    """Return the share of exact zeros behind each ReLU, per channel, on the calibration images."""
    seen: list[torch.Tensor] = []
    layers: list[Any] = [module for module in network.modules() if isinstance(module, nn.ReLU)]
    handles = [layer.register_forward_hook(lambda _m, _i, output: seen.append(output)) for layer in layers]
    with torch.no_grad():
        network(next(iter(trimmer.calibration.batches(len(trimmer.calibration)))).images)
    for handle in handles:
        handle.remove()
    values = [(out == 0).double().transpose(0, 1).flatten(1).mean(1).numpy() for out in seen]
    return dict(zip(WIDTHS, values, strict=True))


def above(apoz: NDArray[np.float64], sigmas: float = 1.0) -> set[int]:
    """Return the channels whose APoZ lies above mean + sigmas standard deviations."""
    mean = math.fsum(apoz) / len(apoz)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in apoz) / len(apoz))
    return {channel for channel, value in enumerate(apoz) if value > mean + sigmas * deviation}


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


# ---- uniform ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("unit", ["macs", "params"])
@pytest.mark.parametrize("budget", [0.05, 0.3, 0.77, 1.0])
def test_uniform_keeps_one_share_within_the_budget(budget: float, unit: str, trimmer: Trimmer) -> None:
    schedule = uniform(trimmer, budget=budget, unit=unit, retraining=UPDATES, seed=4)
    counts = schedule.plan.counts
    assert share(counts, unit) <= budget
    low = max((counts[name] - 1) / width for name, width in WIDTHS.items() if counts[name] > 1)
    assert low < min((counts[name] + 1) / width for name, width in WIDTHS.items())
    narrower = [name for name in WIDTHS if counts[name] < WIDTHS[name]]
    assert bool(narrower) == (budget < 1)
    assert not narrower or any(share({**counts, name: counts[name] + 1}, unit) > budget for name in narrower)
    for name in WIDTHS:
        best_first = trimmer.pristine.orders[name][: counts[name]]
        assert set(schedule.plan[name]) == {int(channel) for channel in best_first}
    assert (schedule.retrain_updates, schedule.seed, schedule.made_by) == (23, 4, "uniform")
    assert build(trimmer, replace(schedule, rounds=schedule.rounds[:1])).rounds[-1].widths == counts


def test_uniform_refuses_an_unreachable_budget(trimmer: Trimmer) -> None:
    with pytest.raises(UserError, match="one channel per group already costs"):
        uniform(trimmer, budget=1e-4, unit="params", retraining=NONE)


# ---- Network Trimming: which channels leave --------------------------------------------------------------------------
@pytest.mark.parametrize("sigmas", [0.5, 1.0, 1.5])
def test_the_first_round_removes_what_lies_above_mean_plus_sigma(sigmas: float, trimmer: Trimmer) -> None:
    settings = NetworkTrimmingSettings(sigmas=sigmas, max_rounds=2, targets=tuple(WIDTHS))
    made = by_apoz(trimmer, budget=0.1, retraining=NONE, settings=settings)
    apoz = apoz_of(trimmer, trimmer.task.network)
    removed = {name: set(range(width)) - set(made.schedule.rounds[0].plan[name]) for name, width in WIDTHS.items()}
    assert removed == {name: above(values, sigmas) for name, values in apoz.items()}
    assert sum(map(len, removed.values())) > 0


def test_each_round_measures_anew(trimmer: Trimmer) -> None:
    settings = NetworkTrimmingSettings(max_rounds=3, targets=("conv2", "fc1"))
    made = by_apoz(trimmer, budget=0.1, retraining=NONE, settings=settings)
    repair = replace(trimmer.settings, criterion="apoz", compensation="delete")
    first = build(Trimmer(trimmer.task, repair), replace(made.schedule, rounds=made.schedule.rounds[:1]))
    before, after = made.schedule.rounds[0].plan, made.schedule.rounds[1].plan
    apoz = apoz_of(trimmer, first.network)
    for name in settings.targets:
        left = [channel for place, channel in enumerate(before[name]) if place not in above(apoz[name])]
        assert list(after[name]) == left
        assert made.mean_apoz[1][name] == pytest.approx(apoz[name].mean())
    assert after["conv1"] == tuple(range(8))  # no target
    assert after != before


def test_the_published_method_repairs_nothing(trimmer: Trimmer) -> None:
    settings = NetworkTrimmingSettings(max_rounds=1, targets=("conv2",))
    made = by_apoz(trimmer, budget=0.6, retraining=NONE, settings=settings)
    keep, original = list(made.schedule.plan["conv2"]), trimmer.task.network
    torch.testing.assert_close(made.network.conv2.weight, original.conv2.weight[keep], rtol=0, atol=0)
    columns = [channel * 16 + place for channel in keep for place in range(16)]
    torch.testing.assert_close(made.network.fc1.weight, original.fc1.weight[:, columns], rtol=0, atol=0)
    torch.testing.assert_close(made.network.fc1.bias, original.fc1.bias, rtol=0, atol=0)
    repaired = by_apoz(trimmer, budget=0.6, retraining=NONE, settings=settings, compensation="least_squares")
    assert repaired.schedule.plan == made.schedule.plan
    assert not same_weights(repaired.network, made.network)
    assert repaired.rounds[-1].after_trim.loss < made.rounds[-1].after_trim.loss


# ---- budget, updates, rounds -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("unit", ["macs", "params"])
@pytest.mark.parametrize("budget", [0.07, 0.35, 0.9])
def test_the_budget_is_met_from_below_within_one_channel(budget: float, unit: str, trimmer: Trimmer) -> None:
    settings = NetworkTrimmingSettings(max_rounds=3)
    made = by_apoz(trimmer, budget=budget, unit=unit, retraining=NONE, settings=settings)
    counts, before = made.schedule.plan.counts, WIDTHS
    assert share(counts, unit) <= budget
    if len(made.schedule.rounds) > 1:
        before = made.schedule.rounds[-2].plan.counts
        assert share(before, unit) > budget
    reduced = [name for name in made.mean_apoz[0] if counts[name] < before[name]]
    assert any(share({**counts, name: counts[name] + 1}, unit) > budget for name in reduced)
    assert made.rounds[-1].cost.of(unit) == lenet_cost(counts, unit)
    last = made.schedule.rounds[-1]
    assert made.forced == (len(made.schedule.rounds) == 3 and gave_way(trimmer, made, last.plan))


def gave_way(trimmer: Trimmer, made: Pruned, plan: Any) -> bool:
    """Return whether the last round removed more than the threshold allows, from what the round before left."""
    earlier = replace(made.schedule, rounds=made.schedule.rounds[:-1])
    network = build(trimmer, earlier).network
    before = earlier.plan
    apoz = apoz_of(trimmer, network)
    return any(
        {before[name].index(channel) for channel in before[name] if channel not in plan[name]} - above(apoz[name])
        for name in made.mean_apoz[0]
    )


def test_the_updates_are_exactly_those_asked_for(trained: Pruned, trimmer: Trimmer) -> None:
    updates = [entry.retrain_updates for entry in trained.schedule.rounds]
    assert len(updates) == 4
    assert sum(updates) == 23
    assert updates[:-1] == [3, 3, 3]  # half of 23 over the three rounds before the last
    assert updates == [entry.retrain_updates for entry in trained.rounds]
    settings = NetworkTrimmingSettings(max_rounds=8)
    early = by_apoz(trimmer, budget=0.9, retraining=UPDATES, settings=settings)  # met before round 8
    assert len(early.rounds) < 8
    assert early.schedule.retrain_updates == 23


def test_progress_counts_to_the_total(trimmer: Trimmer) -> None:
    seen: list[int] = []
    settings = NetworkTrimmingSettings(max_rounds=3)
    by_apoz(trimmer, budget=0.2, retraining=UPDATES, settings=settings, progress=seen.append)
    assert seen == list(range(1, 24))


def test_rounds_are_nested(trained: Pruned) -> None:
    plans = [entry.plan for entry in trained.schedule.rounds]
    assert len(plans) > 1
    for earlier, later in itertools.pairwise(plans):
        assert all(set(later[name]) <= set(earlier[name]) for name in WIDTHS)
        assert later != earlier
    assert len(trained.mean_apoz) == len(plans) + 1
    assert trained.schedule.made_by == "network_trimming"


def test_the_schedule_replays_bit_for_bit(trained: Pruned, trimmer: Trimmer) -> None:
    again = build(trimmer, trained.schedule)
    assert [entry.widths for entry in again.rounds] == [entry.widths for entry in trained.rounds]
    assert same_weights(again.network, trained.network)
    assert again.rounds[-1].after_retraining == trained.rounds[-1].after_retraining


def test_an_accepted_drop_stops_the_rounds(trimmer: Trimmer) -> None:
    common: dict[str, Any] = {"budget": 0.05, "retraining": NONE}
    free = by_apoz(trimmer, **common, settings=NetworkTrimmingSettings())
    strict = by_apoz(trimmer, **common, drop=0.05)
    drops = [trimmer.baseline.accuracy - entry.after_retraining.accuracy for entry in free.rounds]
    expected = next(place for place, drop in enumerate(drops) if place and drop > 0.05)
    assert len(strict.rounds) == expected < len(free.rounds)
    assert [entry.widths for entry in strict.rounds] == [entry.widths for entry in free.rounds[:expected]]
    assert share(strict.schedule.plan.counts, "params") > 0.05


def test_an_accepted_drop_still_spends_all_updates(trimmer: Trimmer) -> None:
    """The comparison at equal retraining needs them also where the drop ends the rounds early."""
    settings = NetworkTrimmingSettings(max_rounds=6, final_share=1.0)
    made = by_apoz(trimmer, budget=0.05, drop=0.0, retraining=UPDATES, settings=settings)
    assert len(made.rounds) < 6
    assert made.schedule.retrain_updates == 23


@pytest.mark.parametrize(("drop", "share"), [(None, 0.5), (0.03, 0.0), (0.03, 0.5)])
def test_only_the_last_round_looks_at_the_selection_split(drop: float | None, share: float, trimmer: Trimmer) -> None:
    """Also where the accepted drop makes an intermediate round the last one; the schedule replays bit for bit."""
    checked = replace(UPDATES, check_every=2, patience=1)
    settings = NetworkTrimmingSettings(max_rounds=4, final_share=share)
    made = by_apoz(trimmer, budget=0.1, drop=drop, retraining=checked, seed=3, settings=settings)
    trainings = [entry.training for entry in made.rounds if entry.training is not None]
    checked_last = made.schedule.retraining.check_every > 0  # not where the checked training would break the floor
    unscored = [math.isnan(training.best_accuracy) for training in trainings]
    assert unscored == [True] * (len(trainings) - 1) + [not checked_last]
    assert checked_last or drop is not None
    assert made.schedule.retrain_updates == 23 if checked_last else made.schedule.retrain_updates < 23
    assert [entry.updates_taken for entry in made.rounds[:-1]] == [entry.retrain_updates for entry in made.rounds[:-1]]
    again = build(trimmer, made.schedule)
    assert same_weights(again.network, made.network)
    assert again.rounds == made.rounds


# ---- targets ---------------------------------------------------------------------------------------------------------
def test_only_the_given_targets_are_trimmed(trimmer: Trimmer) -> None:
    settings = NetworkTrimmingSettings(targets=("fc1",), max_rounds=2)
    made = by_apoz(trimmer, budget=0.5, retraining=NONE, settings=settings)
    assert list(made.mean_apoz[0]) == ["fc1"]
    assert {**made.schedule.plan.counts, "fc1": 0} == {"conv1": 8, "conv2": 16, "fc1": 0}
    assert made.schedule.plan.counts["fc1"] < 64


def test_the_automatic_targets_are_the_fewest_that_can_meet_the_budget(trimmer: Trimmer) -> None:
    apoz, whole = apoz_of(trimmer, trimmer.task.network), lenet_cost(WIDTHS, "params")
    weight = {n: v.mean() * (1 - lenet_cost({**WIDTHS, n: 0}, "params") / whole) for n, v in apoz.items()}
    order = sorted(WIDTHS, key=lambda name: -weight[name])
    for budget in (0.9, 0.5, 0.3, 0.1, 0.02):
        reached = [
            set(order[:count])
            for count in (1, 2, 3)
            if share({**WIDTHS, **{name: max(1, round(0.4 * WIDTHS[name])) for name in order[:count]}}, "params")
            <= budget
        ]
        settings = NetworkTrimmingSettings(max_rounds=1)
        made = by_apoz(trimmer, budget=budget, retraining=NONE, settings=settings)
        assert set(made.mean_apoz[0]) == (reached[0] if reached else set(WIDTHS)), budget


def test_targets_that_do_not_exist_or_do_not_suffice(trimmer: Trimmer) -> None:
    with pytest.raises(UserError, match="got 'fc_1'; did you mean 'fc1'"):
        by_apoz(trimmer, budget=0.5, retraining=NONE, settings=NetworkTrimmingSettings(targets=("fc_1",)))
    with pytest.raises(UserError, match=r"one channel in each still costs 0\.\d+ of the params; the budget is 0.05"):
        by_apoz(trimmer, budget=0.05, retraining=NONE, settings=NetworkTrimmingSettings(targets=("fc1",)))
    least = share({**WIDTHS, "fc1": 1}, "params")
    with pytest.raises(UserError, match=re.escape(f"{least:.4f}")):
        by_apoz(trimmer, budget=0.05, retraining=NONE, settings=NetworkTrimmingSettings(targets=("fc1",)))
    with pytest.raises(UserError, match="smallest reachable budget"):
        by_apoz(trimmer, budget=1e-5, retraining=NONE)


@pytest.mark.parametrize("values", [{"max_rounds": 0}, {"final_share": 1.5}, {"narrowest": 0.0}, {"target_share": 2.0}])
def test_settings_outside_their_ranges(values: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="max_rounds >= 1, final_share in"):
        NetworkTrimmingSettings(**values)


def test_a_network_without_relu_is_told_what_else_there_is(task: PruningTask) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(784, 12), nn.Tanh(), nn.Linear(12, 10))
    plain = PruningTask(network, task.train, task.reward, task.selection, task.test)
    with pytest.raises(UserError, match=r"needs a ReLU behind .*'taylor_2017', 'l2' or 'least_squares'"):
        by_apoz(Trimmer(plain), budget=0.5, retraining=NONE)
    assert build(Trimmer(plain), uniform(Trimmer(plain), budget=0.5, unit="params", retraining=NONE)).cost.params < 4765


def test_the_trimmers_statistics_are_those_of_the_hand_computation(trimmer: Trimmer) -> None:
    """Guards the oracle: `measure` and the hooks above must mean the same by APoZ."""
    by_hand = apoz_of(trimmer, trimmer.task.network)
    measured = measure(trimmer.task.network, trimmer.groups, trimmer.calibration.batches(100))
    for name, values in by_hand.items():
        np.testing.assert_allclose(measured.groups[name].apoz, values, rtol=0, atol=1e-12)


def test_repair_settings_of_the_caller_do_not_choose_the_channels(task: PruningTask, trimmer: Trimmer) -> None:
    settings = NetworkTrimmingSettings(max_rounds=2)
    other = Trimmer(task, RepairSettings(criterion="l1", compensation="fold_mean"))
    plans = [by_apoz(each, budget=0.3, retraining=NONE, settings=settings).schedule for each in (trimmer, other)]
    assert plans[0] == plans[1]
    assert plans[0].repair.criterion == "apoz"
    assert plans[0].repair.compensation == "delete"


# ---- not every width allowed -----------------------------------------------------------------------------------------
EIGHTS = GroupSettings(channel_multiple=8)


@pytest.fixture(scope="module")
def eights(task: PruningTask) -> Trimmer:
    return Trimmer(task, group_settings=EIGHTS)


@pytest.mark.parametrize("budget", [0.15, 0.3, 0.77])
def test_uniform_in_multiples_of_eight(budget: float, eights: Trimmer) -> None:
    counts = uniform(eights, budget=budget, unit="params", retraining=NONE).plan.counts
    assert all(count % 8 == 0 for count in counts.values())
    assert share(counts, "params") <= budget
    wider = [{**counts, name: counts[name] + 8} for name in WIDTHS if counts[name] < WIDTHS[name]]
    assert any(share(more, "params") > budget for more in wider)


def test_of_those_above_the_threshold_the_best_stay_up_to_the_next_multiple(eights: Trimmer) -> None:
    settings = NetworkTrimmingSettings(sigmas=0.3, max_rounds=2, targets=("conv2", "fc1"))
    made = by_apoz(eights, budget=0.15, retraining=NONE, settings=settings)
    partly = 0
    for name, apoz in apoz_of(eights, eights.task.network).items():
        count = 8 * math.ceil((WIDTHS[name] - len(above(apoz, 0.3))) / 8) if name in settings.targets else 8
        kept = apoz[list(made.schedule.rounds[0].plan[name])]
        np.testing.assert_array_equal(np.sort(kept), np.sort(apoz)[:count])  # dead channels tie
        partly += count < WIDTHS[name] and count > WIDTHS[name] - len(above(apoz, 0.3))
    assert partly


@pytest.mark.parametrize("unit", ["macs", "params"])
@pytest.mark.parametrize("budget", [0.25, 0.5, 0.7])
def test_network_trimming_meets_the_budget_in_multiples(budget: float, unit: str, eights: Trimmer) -> None:
    if budget < share({"conv1": 8, "conv2": 8, "fc1": 8}, unit):
        with pytest.raises(UserError, match=r"narrowest allowed width per group already costs .* channel_multiple 8"):
            by_apoz(eights, budget=budget, unit=unit, retraining=NONE)
        return
    made = by_apoz(eights, budget=budget, unit=unit, retraining=NONE, settings=NetworkTrimmingSettings(max_rounds=3))
    plans = [entry.plan for entry in made.schedule.rounds]
    assert all(count % 8 == 0 for plan in plans for count in plan.counts.values())
    assert share(plans[-1].counts, unit) <= budget
    assert all(share(plan.counts, unit) > budget for plan in plans[:-1])
    again = build(eights, made.schedule)
    assert same_weights(again.network, made.network)
    assert same_weights(build(Trimmer(eights.task), made.schedule).network, made.network)  # the plan decides


def test_targets_that_do_not_suffice_in_multiples(eights: Trimmer) -> None:
    least = share({**WIDTHS, "fc1": 8}, "params")
    with pytest.raises(
        UserError, match=rf"the narrowest allowed width in each still costs {least:.4f} of the params with channel_mul"
    ):
        by_apoz(eights, budget=0.2, retraining=NONE, settings=NetworkTrimmingSettings(targets=("fc1",)))


# ---- what the paper reports ------------------------------------------------------------------------------------------
def test_the_published_vgg16_widths_give_the_published_ratios() -> None:
    """Hu et al. 2016, conv5-3 and fc6 of VGG-16 on ImageNet: structure only, random weights, no data."""
    example = torch.zeros(1, 3, 224, 224)
    network = build_network("vgg16", classes=1000, in_channels=3, image_size=224)
    groups = find_groups(network, example, include=["features.28", "classifier.0"])
    model = CostModel(network, groups, example)
    published = {
        (512, 4096): "1.00", (488, 3477): "1.19", (451, 2937): "1.45", (430, 2479): "1.71", (420, 2121): "1.96",
        (400, 1787): "2.28", (390, 1513): "2.59",
    }  # fmt: skip
    for (conv, hidden), ratio in published.items():
        cost = model.cost({"features.28": conv, "classifier.0": hidden})
        fewer = 512 * 9 * (512 - conv) + (512 - conv) + 4096 * (512 * 49 + 1) - hidden * (conv * 49 + 1)
        assert cost.params == 138_357_544 - fewer - 4096 * (4096 - hidden)
        assert f"{model.full.params / cost.params:.2f}" == ratio
    assert cost.params == 53_365_677  # 53.37 M


def test_from_scratch_keeps_the_architecture_and_nothing_else(trimmer: Trimmer, trained: Pruned) -> None:
    first, again = (train_from_scratch(trimmer, trained.schedule.plan, NONE, seed=4) for _ in range(2))
    assert same_weights(first.network, again.network)
    shapes = {name: value.shape for name, value in trained.network.state_dict().items()}
    assert {name: value.shape for name, value in first.network.state_dict().items()} == shapes
    for name, value in first.network.named_parameters():
        assert not torch.isclose(value, dict(trained.network.named_parameters())[name]).any(), name
    assert first.score.accuracy < 0.3 < trained.rounds[-1].after_retraining.accuracy  # ten classes, untrained
    learnt = train_from_scratch(trimmer, trained.schedule.plan, replace(UPDATES, updates=60), seed=4)
    assert learnt.score.accuracy > first.score.accuracy + 0.2


def test_a_layer_that_cannot_forget_is_named() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

    with pytest.raises(UserError, match=r"0 \(Scaled\) has parameters but no reset_parameters"):
        forget(nn.Sequential(Scaled()))


def test_the_overlap_counts_channels_chosen_on_either_data(trimmer: Trimmer) -> None:
    found = selection_overlap(trimmer, 0.7)
    on_train = {name: above(values, 0.7) for name, values in apoz_of(trimmer, trimmer.task.network).items()}
    other = Trimmer(trimmer.task)
    other.calibration = trimmer.reward
    assert len(trimmer.reward) <= len(trimmer.calibration)
    on_heldout = {name: above(values, 0.7) for name, values in apoz_of(other, trimmer.task.network).items()}
    for name, overlap in found.items():
        one, two = on_train[name], on_heldout[name]
        assert (overlap.train, overlap.heldout, overlap.both) == (len(one), len(two), len(one & two))
        assert overlap.share == len(one & two) / len(one | two)
