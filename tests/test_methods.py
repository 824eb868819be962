"""One contract for every registered method: the goal, the record, the replay; then each ranking's own rule by hand."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from prunegym.agent.methods import METHODS
from prunegym.agent.prune import PruneSettings, check_method, prune
from prunegym.agent.settings import AmcSettings, MethodSettings, TryAndLearnSettings
from prunegym.envs import TrimEnv, TrimSettings
from prunegym.envs.default_task import default_task
from prunegym.pruning import (
    GroupSettings,
    PruningPlan,
    PruningTask,
    RepairSettings,
    Trimmer,
    UserError,
    apply_plan,
    build,
    compensate,
    count_cost,
    find_groups,
    measure,
    shrink_groups,
)
from prunegym.pruning.criteria import CRITERIA, RankingContext
from prunegym.pruning.data import TensorSplit
from prunegym.pruning.groups import ChannelGroup
from prunegym.pruning.heuristics import (
    DataFreeSettings,
    Goal,
    NetworkTrimmingSettings,
    Pruned,
    RankingSettings,
    rank_and_cut,
)
from prunegym.pruning.retraining import RetrainSettings
from prunegym.pruning.saliency import cut_off, merge_problem, merge_sequence
from prunegym.pruning.statistics import Statistics
from torch import nn

UPDATES = RetrainSettings(updates=8, batch_size=32, learning_rate=0.01)
NONE = RetrainSettings()
SERVING = [name for name in METHODS if name != "bn_scale"]  # the small LeNet has no batch norm
FEW = MethodSettings(
    amc=AmcSettings(evaluations=12, warmup_episodes=4, candidates=2), try_and_learn=TryAndLearnSettings(evaluations=12)
)


@pytest.fixture(scope="module")
def task() -> PruningTask:
    return default_task()


def pruned(task: PruningTask, method: str, **others: Any) -> Pruned:
    return prune(task, PruneSettings(method, **{"budget": 0.3, "budget_unit": "params", "methods": FEW, **others}))


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


# ---- every method ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", SERVING)
def test_a_method_meets_the_budget_and_tells_where_its_plans_come_from(method: str, task: PruningTask) -> None:
    before = {name: value.clone() for name, value in task.network.state_dict().items()}
    readings = tuple(task.test.readings)  # other tests share the default task
    made = pruned(task, method, retraining=UPDATES, seed=5)
    whole = count_cost(task.network, task.example)
    assert count_cost(made.network, task.example).params <= 0.3 * whole.params
    assert made.stopped_by == "budget"
    for place, record in enumerate(made):
        assert (record.provenance.method, record.provenance.round) == (method, place + 1)
        assert record.provenance.compensation == METHODS[method].compensation
        assert record.plan.counts == record.built.widths
    assert made[-1].plan == made.schedule.plan
    assert made.schedule.retrain_updates == 8 == sum(record.provenance.retrain_updates for record in made)
    for name, value in task.network.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    assert tuple(task.test.readings) == readings


@pytest.mark.parametrize("method", SERVING)
def test_a_method_replays_bit_for_bit(method: str, task: PruningTask) -> None:
    made, again = (pruned(task, method, retraining=UPDATES, seed=5) for _ in range(2))
    assert [record.plan for record in made] == [record.plan for record in again]
    assert same_weights(made.network, again.network)
    assert same_weights(build(Trimmer(task, made.schedule.repair), made.schedule).network, made.network)


@pytest.mark.parametrize("method", SERVING)
def test_a_method_stops_at_an_accepted_drop(method: str, task: PruningTask) -> None:
    made = pruned(task, method, budget=None, accepted_drop=0.1)
    base = Trimmer(task, made.schedule.repair).baseline.accuracy
    assert made.stopped_by in ("accuracy", "rule", "search" if method == "amc" else "rounds")
    assert all(base - entry.after_retraining.accuracy <= 0.1 for entry in made.rounds)
    assert made.rounds[-1].cost.params < count_cost(task.network, task.example).params


@pytest.mark.parametrize("rate", [0.01, 0.5])
@pytest.mark.parametrize("method", ["network_trimming", "l1", "taylor_2017"])
def test_the_delivered_network_keeps_to_the_accepted_drop(method: str, rate: float, task: PruningTask) -> None:
    """Also where the training that closes the run ruins the network; and where training is what makes room."""
    retraining = replace(UPDATES, updates=60, learning_rate=rate, clip_norm=0.0)
    made = pruned(task, method, budget=None, accepted_drop=0.03, retraining=retraining)
    trimmer = Trimmer(task, made.schedule.repair)
    accuracy = trimmer.score(made.network).accuracy
    assert trimmer.baseline.accuracy - accuracy <= 0.03
    assert accuracy == made[-1].built.after_retraining.accuracy
    assert same_weights(build(trimmer, made.schedule).network, made.network)
    assert sum(record.provenance.retrain_updates for record in made) == made.schedule.retrain_updates <= 60


def test_training_makes_room_under_an_accuracy_floor(task: PruningTask) -> None:
    free = pruned(task, "l1", budget=None, accepted_drop=0.02)
    trained = pruned(task, "l1", budget=None, accepted_drop=0.02, retraining=replace(UPDATES, updates=100))
    assert trained[-1].built.cost.params < 0.7 * free[-1].built.cost.params
    assert trained.schedule.retrain_updates == 100


def test_a_floor_is_approached_in_tenths_of_what_can_be_cut(task: PruningTask) -> None:
    """fc1 holds hardly any MACs: a tenth of all of them would be more than there is."""
    made = pruned(task, "l1", budget=None, budget_unit="macs", accepted_drop=0.9, groups=GroupSettings(include="fc1"))
    widths = [record.plan.counts["fc1"] for record in made]
    assert widths[0] in (57, 58)  # 1 + 0.9 · 63, rounded down within the budget
    assert widths == sorted(widths, reverse=True)
    assert widths[-1] == 1


def test_the_recorded_apoz_is_that_of_the_delivered_network(task: PruningTask) -> None:
    retraining = replace(UPDATES, updates=60, learning_rate=0.05)
    made = pruned(task, "network_trimming", budget=None, accepted_drop=0.05, retraining=retraining)
    trimmer = Trimmer(task, made.schedule.repair)
    groups = find_groups(made.network, task.example)
    found = measure(made.network, groups, trimmer.calibration.batches(100))
    for name, recorded in made.mean_apoz[-1].items():
        apoz = found.groups[name].apoz
        assert apoz is not None
        assert recorded == pytest.approx(apoz.mean(), abs=1e-9)


@pytest.mark.parametrize("drop", [None, 0.03])
def test_progress_only_grows(drop: float | None, task: PruningTask) -> None:
    seen: list[int] = []
    settings = PruneSettings(
        "l1", budget=0.1 if drop is None else None, budget_unit="params", accepted_drop=drop,
        retraining=replace(UPDATES, updates=60),
    )  # fmt: skip
    prune(task, settings, progress=seen.append)
    assert seen == sorted(set(seen))
    assert seen[-1] == 60


def test_a_ranking_measures_only_what_it_reads(task: PruningTask) -> None:
    trimmer = Trimmer(task, RepairSettings(criterion="l1", compensation="delete"), lean=True)
    lean = trimmer.pristine.statistics
    assert lean.groups["fc1"].taylor_2017 is None
    assert not lean.consumers
    assert trimmer.with_settings(RepairSettings("taylor_2017", "fold_mean")).pristine.statistics.consumers
    whole = Trimmer(task, RepairSettings(criterion="l1", compensation="delete"))
    assert rank_order(trimmer) == rank_order(whole)
    with pytest.raises(UserError, match='must measure everything for observation "full"'):
        TrimEnv(task, TrimSettings(repair=trimmer.settings), trimmer=trimmer)


def rank_order(trimmer: Trimmer) -> dict[str, list[int]]:
    return {name: order.tolist() for name, order in trimmer.pristine.orders.items()}


@pytest.mark.parametrize("method", SERVING)
def test_a_method_takes_any_compensation(method: str, task: PruningTask) -> None:
    made = pruned(task, method, compensation="fold_mean")
    assert {record.provenance.compensation for record in made} == {"fold_mean"}


@pytest.mark.parametrize("method", SERVING)
def test_a_method_keeps_to_the_allowed_widths(method: str, task: PruningTask) -> None:
    made = pruned(task, method, budget=0.4, groups=GroupSettings(channel_multiple=4, ignore="conv1"))
    assert all(width % 4 == 0 for name, width in made.schedule.plan.counts.items() if name != "conv1")
    assert made.schedule.plan.counts.get("conv1", 8) == 8


# ---- rankings by hand ------------------------------------------------------------------------------------------------
def ranked(task: PruningTask, criterion: str, goal: Goal, **settings: Any) -> Pruned:
    return rank_and_cut(Trimmer(task), goal, RankingSettings(**settings), criterion=criterion, retraining=NONE)


def test_a_global_ranking_takes_the_weakest_of_all_groups(task: PruningTask) -> None:
    made = ranked(task, "l1", Goal(0.5), scope="global", channels_per_round=10)
    scores = []
    for name in ("conv1", "conv2", "fc1"):
        sums = getattr(task.network, name).weight.detach().double().abs().flatten(1).sum(1)
        scores += [(float(value), name, channel) for channel, value in enumerate(sums / sums.norm())]
    weakest = {(name, channel) for _, name, channel in sorted(scores)[:10]}
    widths = {"conv1": 8, "conv2": 16, "fc1": 64}
    assert {
        (name, channel) for name, width in widths.items() for channel in set(range(width)) - set(made[0].plan[name])
    } == weakest


def test_a_local_ranking_has_one_multiple_of_the_mean_as_threshold(task: PruningTask) -> None:
    made = ranked(task, "l2", Goal(0.6), scope="local")
    removed, kept = [], []
    for name in ("conv1", "conv2", "fc1"):
        norms = getattr(task.network, name).weight.detach().double().flatten(1).norm(dim=1).numpy()
        ratio = norms / norms.mean()
        stays = np.isin(np.arange(len(ratio)), made[0].plan[name])
        removed += ratio[~stays].tolist()
        kept += ratio[stays].tolist()
    assert max(removed) <= min(kept)


def test_the_mac_regulariser_moves_the_cut_to_expensive_layers(task: PruningTask) -> None:
    plain = ranked(task, "l1", Goal(0.5, "macs"), scope="global", channels_per_round=1)
    heavy = ranked(task, "l1", Goal(0.5, "macs"), scope="global", channels_per_round=1, mac_regulariser=1e3)
    # one channel of conv1 costs more MACs than one of any other group, so with a strong λ nothing else leaves first
    assert heavy[0].plan.counts["conv1"] == 7
    assert len(heavy) < len(plain)


def test_updates_between_are_those_asked_for(task: PruningTask) -> None:
    settings = MethodSettings(taylor=RankingSettings("global", channels_per_round=16, updates_between=3))
    retraining = replace(UPDATES, updates=40)
    made = pruned(task, "taylor_2017", methods=settings, retraining=retraining)
    assert [record.provenance.retrain_updates for record in made][:-1] == [3] * (len(made) - 1)
    assert made.schedule.retrain_updates == 40


def test_rounds_approach_the_budget_by_equal_factors(task: PruningTask) -> None:
    made = ranked(task, "l1", Goal(0.125), scope="global", rounds=3)
    whole = count_cost(task.network, task.example).params
    shares = [entry.cost.params / whole for entry in made.rounds]
    assert len(shares) == 3
    assert all(share <= 0.5**place for share, place in zip(shares, (1, 2, 3), strict=True))
    assert all(share > 0.8 * 0.5**place for share, place in zip(shares, (1, 2, 3), strict=True))


def test_the_random_control_treats_layers_of_like_names_independently() -> None:
    names = [f"layer{stage}.0.conv1" for stage in range(1, 9)]
    criterion = CRITERIA["random"]
    groups = [ChannelGroup(name, 16, (), (), (), (), ()) for name in names]
    context = RankingContext(nn.Identity(), Statistics({}, {}, 1, 0.0), seed=3)
    orders = {tuple(np.argsort(criterion.score(group, context))) for group in groups}
    assert len(orders) == len(names)


# ---- bad input -------------------------------------------------------------------------------------------------------
def test_a_method_that_cannot_serve_names_the_alternatives(task: PruningTask) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(784, 12), nn.Tanh(), nn.Linear(12, 10))
    plain = PruningTask(network, task.train, task.reward, task.selection, task.test)
    with pytest.raises(UserError, match=r"'apoz' needs a ReLU behind every channel group, but none follows 1; .*l1"):
        pruned(plain, "apoz")
    with pytest.raises(UserError, match=r"'bn_scale' needs a batch norm with weights behind .*, but none follows 1"):
        pruned(plain, "bn_scale")
    with pytest.raises(UserError, match=r"Network Trimming needs a ReLU .*'taylor_2017', 'l2'"):
        pruned(plain, "network_trimming")


def test_bad_requests(task: PruningTask) -> None:
    with pytest.raises(UserError, match="got 'taylor'; did you mean 'taylor_2017'"):
        PruneSettings("taylor")
    with pytest.raises(UserError, match="needs a budget, an accepted drop of accuracy, or both"):
        PruneSettings(budget=None)
    with pytest.raises(UserError, match="compensation must be a known name"):
        PruneSettings(compensation="none_at_all")
    with pytest.raises(UserError, match=r"lost \d+\.\d\d points in its first round, more than the accepted 0;"):
        pruned(task, "random", budget=0.05, accepted_drop=0.0, methods=MethodSettings(ranking=RankingSettings()))
    narrow = MethodSettings(ranking=RankingSettings("global", narrowest=0.5))
    with pytest.raises(UserError, match=r"narrowest 0.5 every group .* still costs 0\.\d+ of the params"):
        pruned(task, "l1", budget=0.1, methods=narrow)
    unknown = PruneSettings(methods=MethodSettings(NetworkTrimmingSettings(targets=("convx",))))
    with pytest.raises(UserError, match="got 'convx'; did you mean 'conv2'"):
        check_method(task.network, task.example, unknown)
    assert PruneSettings(compensation="none").compensation == "delete"
    with pytest.raises(UserError, match="prune needs a PruningTask, but got Linear"):
        prune(nn.Linear(2, 2), PruneSettings())  # type: ignore[arg-type]
    for settings, came in (("l1", "'l1'"), ({}, "dict"), ({"method": "l1"}, "dict"), (None, "None")):
        with pytest.raises(UserError, match=f"prune needs a PruneSettings, but got {came}; PruneSettings.method=…"):
            prune(task, settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"scope": "globl"}, "did you mean 'global'"),
        ({"norm": "l3"}, "norm must be one of own, l2, mean, none, but got 'l3'"),
        ({"rounds": 0}, "rounds >= 1"),
        ({"channels_per_round": 3}, "scope 'uniform' decides how much"),
        ({"mac_regulariser": -1.0}, "mac_regulariser >= 0"),
        ({"narrowest": math.nan}, "narrowest must be a finite number"),
    ],
)
def test_ranking_settings_outside_their_ranges(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        RankingSettings(**values)


# ---- data-free -------------------------------------------------------------------------------------------------------
class Unreadable(TensorSplit):
    """A split that must not be read."""

    def batches(self, *arguments: Any, **keywords: Any) -> Any:
        raise AssertionError("data was read")

    subset = prepared = batches


@pytest.fixture(scope="module")
def mlp(task: PruningTask) -> PruningTask:
    torch.manual_seed(3)
    network = nn.Sequential(
        nn.Flatten(), nn.Linear(784, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 10)
    )
    return PruningTask(network, task.train, task.reward, task.selection, task.test)


def test_data_free_plans_and_weights_need_no_training_image(mlp: PruningTask) -> None:
    sealed = PruningTask(
        mlp.network,
        Unreadable(mlp.train.images, mlp.train.labels, name="train"),
        mlp.reward,
        mlp.selection,
        mlp.test,
        example_input=mlp.example,
    )
    made, known = pruned(sealed, "data_free", budget=0.4), pruned(mlp, "data_free", budget=0.4)
    assert [record.plan for record in made] == [record.plan for record in known]
    assert same_weights(made.network, known.network)
    with pytest.raises(AssertionError, match="data was read"):
        pruned(sealed, "data_free", budget=0.4, compensation="least_squares")


def test_data_free_merges_one_layer_after_another(mlp: PruningTask) -> None:
    made = pruned(mlp, "data_free", budget=0.045)
    assert [record.plan.counts["1"] < 24 for record in made] == [True, True]
    assert [record.plan.counts["3"] < 16 for record in made] == [False, True]
    first, second = (made[place].plan.counts for place in (0, 1))
    network, groups = mlp.network, find_groups(mlp.network, mlp.example)
    for name, count in (("1", first["1"]), ("3", second["3"])):  # the second layer as the first merges left it
        group = next(each for each in groups if each.name == name)
        removed = merge_sequence(merge_problem(network, group), steps=group.width - count).removed
        plan = PruningPlan({name: sorted(set(range(group.width)) - set(removed.tolist()))})
        smaller = apply_plan(network, groups, plan)
        compensate(smaller, network, groups, plan, None, "data_free")
        network, groups = smaller, shrink_groups(groups, plan)
    assert same_weights(network, made.network)


def test_data_free_reads_no_label_and_leaves_a_layer_of_one_neuron_alone(task: PruningTask) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(784, 1), nn.ReLU(), nn.Linear(1, 12), nn.ReLU(), nn.Linear(12, 10))
    labels = task.reward.labels.flip(0)
    one, other = (
        PruningTask(network, task.train, (task.reward.images, each), task.selection, task.test)
        for each in (task.reward.labels, labels)
    )
    plans = [pruned(each, "data_free", budget=0.93)[-1].plan for each in (one, other)]
    assert plans[0] == plans[1]
    assert plans[0].counts["1"] == 1
    assert plans[0].counts["3"] < 12


@pytest.mark.parametrize("compensation", [None, "data_free", "delete"])
def test_data_free_repairs_leave_batch_norm_alone(compensation: str | None, task: PruningTask) -> None:
    torch.manual_seed(1)
    network = nn.Sequential(
        nn.Conv2d(1, 6, 3, stride=3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(6, 10),
    )  # fmt: skip
    norm = PruningTask(network, task.train, task.reward, task.selection, task.test)
    settings = MethodSettings(data_free=DataFreeSettings(layers="all"))
    made = pruned(norm, "data_free", budget=0.7, methods=settings, compensation=compensation)
    assert made.schedule.repair.recalibration_images == 0
    assert made[0].provenance.seed == 0


def test_data_free_by_the_weights_alone_merges_by_them_too(mlp: PruningTask) -> None:
    settings = MethodSettings(data_free=DataFreeSettings(bias=False))
    made = pruned(mlp, "data_free", budget=0.5, methods=settings)
    assert made[0].provenance.compensation == "data_free_weights"
    group = find_groups(mlp.network, mlp.example)[0]
    removed = merge_sequence(merge_problem(mlp.network, group, bias=False)).removed
    gone = set(range(24)) - set(made[0].plan["1"])
    assert gone == set(removed[: len(gone)].tolist())
    assert made[0].plan != pruned(mlp, "data_free", budget=0.5)[0].plan


def test_data_free_stops_at_the_mode_of_the_histogram(mlp: PruningTask) -> None:
    settings = MethodSettings(data_free=DataFreeSettings(stop="mode"))
    made = pruned(mlp, "data_free", budget=0.05, methods=settings)
    group = find_groups(mlp.network, mlp.example)[0]
    safe = cut_off(merge_sequence(merge_problem(mlp.network, group)).saliency)
    assert made.schedule.plan.counts["1"] == 24 - safe
    assert made.stopped_by in ("rule", "rounds")
    assert 0 < safe < 23


def test_data_free_on_convolutions_is_an_extension_that_must_be_asked_for(task: PruningTask) -> None:
    torch.manual_seed(1)
    network = nn.Sequential(
        nn.Conv2d(1, 6, 3, stride=3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10),
    )  # fmt: skip
    convolutional = PruningTask(network, task.train, task.reward, task.selection, task.test)
    with pytest.raises(UserError, match=r"this network has none; set methods.data_free.layers to 'all' .* use l1, l2"):
        pruned(convolutional, "data_free")
    settings = MethodSettings(data_free=DataFreeSettings(layers="all"))
    assert pruned(convolutional, "data_free", methods=settings).stopped_by == "budget"


def test_data_free_names_a_budget_that_linear_layers_cannot_meet(task: PruningTask) -> None:
    with pytest.raises(UserError, match=r"merging in fc1, but one channel in each still costs 0\.\d+ of the params"):
        pruned(task, "data_free", budget=0.05)
    with pytest.raises(UserError, match="layers must be one of linear, all, but got 'conv'"):
        DataFreeSettings(layers="conv")
