"""Scores against hand-made sums, what a stored score answers for, and how networks are run to be scored."""

import copy
import math
import multiprocessing
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from prunegym.envs.default_task import default_task
from prunegym.pruning import (
    PruningPlan,
    PruningTask,
    RepairSettings,
    RetrainSettings,
    Score,
    Trimmed,
    Trimmer,
    UserError,
    evaluate,
    recalibrate,
)
from prunegym.pruning.cost import count_cost
from prunegym.pruning.evaluation import log_probabilities
from prunegym.pruning.fingerprint import split_digest
from prunegym.pruning.precision import takes_channels_last
from prunegym.pruning.splits import TensorSplit
from torch import Tensor, nn
from toys import ToyConv, ToyMLP, ToyResidual, Wired, images, labelled, make

REPAIR = RepairSettings(calibration_images=16, recalibration_images=32, batch_size=16)
TRAINING = RetrainSettings(updates=2, batch_size=16)


class Store(dict[str, Score]):
    """Scores in memory, with the interface of a file of scores."""

    def put(self, key: str, score: Score) -> None:
        self[key] = score


def split_of(shape: Any, n: int, seed: int) -> TensorSplit:
    labels = torch.randint(0, 3, (n,), generator=torch.Generator().manual_seed(seed))
    return TensorSplit(images(shape, n, seed), labels, name="toy")


def task_of(network: Any) -> PruningTask:
    return PruningTask(network, *(split_of(network.shape, 48, seed) for seed in range(4)))


def trimmer_of(network: Any, store: Store | None = None, **repair: Any) -> Trimmer:
    return Trimmer(task_of(network), replace(REPAIR, **repair), scores=store)


CUT = {ToyConv: {"conv1": [0, 2, 3], "fc1": [1, 2, 5, 7]}, ToyResidual: {"stem": [0, 2, 5], "conv1": [1, 3]}}


# ---- divergence ------------------------------------------------------------------------------------------------------
def test_divergence_is_the_mean_kl_of_the_outputs() -> None:
    first, second = make(ToyConv), make(ToyConv, seed=1)
    batches = labelled(first, 12, 5)
    score = evaluate(second, batches, original=log_probabilities(first, batches))
    inputs = torch.cat([each for each, _ in batches])
    with torch.no_grad():
        expected, got = (F.log_softmax(network(inputs).double(), 1) for network in (first, second))
    by_hand = float(F.kl_div(got, expected, reduction="batchmean", log_target=True))
    assert score.divergence == pytest.approx(by_hand, rel=1e-5)
    assert by_hand > 0.001
    assert math.isnan(evaluate(second, batches).divergence)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_only_the_original_agrees_with_itself(precision: str) -> None:
    trimmer = trimmer_of(make(ToyConv), precision=precision)
    assert trimmer.baseline.divergence == 0.0
    assert trimmer.trim(PruningPlan(CUT[ToyConv])).score.divergence > 0
    assert math.isnan(trimmer.score_selection(trimmer.task.network).divergence)


def test_an_error_gives_network_and_modes_back_at_once() -> None:
    network = make(ToyConv).train()
    found = None
    try:
        evaluate(network, [(images((2, 8, 8), 6), torch.full((6,), 7))])  # there is no class 7
    except IndexError:  # whose frames are alive here
        found = network.training, torch.is_inference_mode_enabled()
    assert found == (True, False)


def test_scores_that_do_not_know_a_number_can_still_be_equal() -> None:
    one = Score(0.5, 1.0, 4)
    same = pickle.loads(pickle.dumps(one))  # whose nan is another object
    assert one == same
    assert hash(one) == hash(same)
    others = [Score(0.5, 1.0, 4, 0.0), Score(0.5, math.nan, 4), Score(0.25, 1.0, 4), Score(0.5, 1.0, 5)]
    assert all(one != other for other in others)
    assert one != (0.5, 1.0, 4)


# ---- how networks are run --------------------------------------------------------------------------------------------
def looked_at(module: Any, x: Tensor) -> Tensor:
    maps = module.conv(x)
    return module.fc(maps.view(len(maps), -1))  # refuses maps that lie channels last


def test_a_network_that_refuses_a_layout_is_scored_in_its_own() -> None:
    network: Any = Wired(looked_at, conv=nn.Conv2d(2, 4, 3), fc=nn.Linear(4 * 36, 3)).eval()
    network.shape = (2, 8, 8)
    assert not takes_channels_last(network, images(network.shape, 1))
    assert not takes_channels_last(make(ToyMLP), images((5,), 1))
    assert takes_channels_last(make(ToyConv), images((2, 8, 8), 1))
    trimmer = trimmer_of(network)
    assert trimmer.reward.images.is_contiguous()  # type: ignore[attr-defined]
    expected = evaluate(network, trimmer.task.reward.batches(48))
    assert trimmer.baseline.accuracy == expected.accuracy
    assert trimmer.baseline.loss == pytest.approx(expected.loss, rel=1e-5)


def test_a_network_may_refuse_a_layout_in_its_own_way() -> None:
    def picky(module: Any, x: Tensor) -> Tensor:
        if not x.is_contiguous():
            raise ValueError("rows first")
        return module.fc(x.flatten(1))

    network: Any = Wired(picky, fc=nn.Linear(2 * 64, 3)).eval()
    assert not takes_channels_last(network, images((2, 8, 8), 1))


def test_images_lie_channels_last_and_the_network_as_before() -> None:
    trimmer = trimmer_of(make(ToyResidual))
    for split in (trimmer.reward, trimmer.recalibration):
        batch = next(iter(split.batches(16))).images
        assert batch.is_contiguous(memory_format=torch.channels_last)
    trimmed = trimmer.trim(PruningPlan(CUT[ToyResidual]))
    expected = evaluate(trimmed.network, trimmer.task.reward.batches(48))
    assert trimmed.score.loss == pytest.approx(expected.loss, rel=1e-5)
    assert all(tensor.is_contiguous() for tensor in trimmed.network.state_dict().values())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_images_are_not_changed_by_a_network_that_begins_in_place(precision: str) -> None:
    network: Any = Wired(lambda module, x: module.fc(x.relu_()), fc=nn.Linear(5, 3)).eval()
    batches = labelled(make(ToyMLP))
    before = copy.deepcopy(batches)
    assert evaluate(network, batches, precision=precision) == evaluate(network, batches, precision=precision)
    assert all(torch.equal(one, other) for (one, _), (other, _) in zip(batches, before, strict=True))


def test_recalibration_in_bfloat16_finds_nearly_the_same_statistics() -> None:
    full, half = make(ToyResidual), make(ToyResidual)
    batches = [images(full.shape, 64, seed) for seed in range(4)]
    recalibrate(full, batches)
    recalibrate(half, batches, precision="bfloat16")
    for name in ("stem_bn", "bn1", "bn2", "down_bn"):
        exact, near = full.get_submodule(name), half.get_submodule(name)
        assert near.running_mean.dtype == near.running_var.dtype == torch.float32
        scale = exact.running_var.sqrt()
        assert float(((near.running_mean - exact.running_mean) / scale).abs().max()) < 0.01
        torch.testing.assert_close(near.running_var, exact.running_var, rtol=0.02, atol=0)
        assert not torch.equal(near.running_var, exact.running_var)
        assert int(near.num_batches_tracked) == 4


def test_bfloat16_scores_nearly_the_same_and_leaves_the_network_in_float32() -> None:
    plan = PruningPlan(CUT[ToyResidual])
    full, half = (trimmer_of(make(ToyResidual), precision=precision) for precision in ("float32", "bfloat16"))
    one, other = full.trim(plan), half.trim(plan)
    assert other.score.loss == pytest.approx(one.score.loss, rel=0.02)
    assert other.score.loss != one.score.loss
    assert {tensor.dtype for tensor in other.network.parameters()} == {torch.float32}
    batches = list(half.task.selection.batches(16))
    assert half.score_selection(other.network) == evaluate(other.network, batches)  # in float32


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(UserError, match="precision must be a known name, but got 'bfloat61'; did you mean 'bfloat16'"):
        RepairSettings(precision="bfloat61")  # type: ignore[arg-type]
    for use in (evaluate, recalibrate):
        with pytest.raises(UserError, match="precision must be a known name, but got 'half'"):
            use(make(ToyConv), labelled(make(ToyConv)), precision="half")  # type: ignore[operator]


# ---- evaluate --------------------------------------------------------------------------------------------------------
def chain(trimmer: Trimmer, training: RetrainSettings | None) -> Any:
    """Return what a first round leaves, for a second one."""
    return trimmer.examine_trimmed(trimmer.trim(PruningPlan({"conv1": [0, 1, 3]}), retraining=training, seed=1))


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("training", [None, TRAINING])
def test_evaluate_is_trim_without_the_network(training: RetrainSettings | None, stored: bool) -> None:
    trimmer = trimmer_of(make(ToyConv), Store() if stored else None)
    for subject in (None, chain(trimmer, training)):
        plan = PruningPlan({"conv1": [0, 2], "conv2": [1, 2, 5]})
        expected = trimmer.trim(plan, subject, retraining=training, seed=4)
        for again in (False, True):
            found = trimmer.evaluate(plan, subject, retraining=training, seed=4)
            assert (found.score, found.cost, found.plan) == (expected.score, expected.cost, expected.plan)
            assert found.cost == count_cost(expected.network, trimmer.task.example)
            assert found.cached == (stored and again)


def test_what_is_stored_is_not_worked_out_again(monkeypatch: pytest.MonkeyPatch) -> None:
    store, plan = Store(), PruningPlan(CUT[ToyConv])
    first = trimmer_of(make(ToyConv), store).evaluate(plan)
    again = trimmer_of(make(ToyConv), store)

    def unwanted(*_: Any, **__: Any) -> Trimmed:
        pytest.fail("a plan was cut")

    monkeypatch.setattr(Trimmer, "trim", unwanted)
    assert again.evaluate(plan) == replace(first, cached=True)
    assert again.with_settings(again.settings).evaluate(plan).cached
    whole = PruningPlan({**CUT[ToyConv], "conv2": range(6)})  # the same plan, with each group named
    assert again.evaluate(whole).cached
    assert "statistics" not in vars(again.pristine)


def pixel(split: TensorSplit) -> TensorSplit:
    """Change every image of a split by little, so that those that are drawn are changed."""
    return TensorSplit(split.images + 1e-6 * torch.arange(8), split.labels, name="toy")


def relabelled(split: TensorSplit) -> TensorSplit:
    return TensorSplit(split.images, (split.labels + 1) % 3, name="toy")


class Louder(ToyConv):
    """The same weights and modules, wired otherwise."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(2 * images)


def nudged() -> Any:
    network = make(ToyConv)
    network.fc2.bias.data[0] += 1e-4
    return network


def of_task(**changes: Any) -> Trimmer:
    return Trimmer(replace(task_of(make(ToyConv)), **changes), REPAIR)


WHOLE = task_of(make(ToyConv))
CHANGES: dict[str, Callable[[], Trimmer]] = {
    "weight": lambda: trimmer_of(nudged()),
    "code": lambda: trimmer_of(make(Louder)),
    "train images": lambda: of_task(train=pixel(WHOLE.train)),
    "reward images": lambda: of_task(reward=pixel(WHOLE.reward)),
    "reward labels": lambda: of_task(reward=relabelled(WHOLE.reward)),
    "metric": lambda: of_task(metric="top5_accuracy"),
    "compensation": lambda: trimmer_of(make(ToyConv), compensation="fold_mean"),
    "calibration": lambda: trimmer_of(make(ToyConv), calibration_images=17),
    "reward size": lambda: trimmer_of(make(ToyConv), reward_images=40),
    "batch size": lambda: trimmer_of(make(ToyConv), batch_size=8),
    "precision": lambda: trimmer_of(make(ToyConv), precision="bfloat16"),
    "draw": lambda: trimmer_of(make(ToyConv), seed=1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_score_answers_for_nothing_else(change: str) -> None:
    store, plan = Store(), PruningPlan(CUT[ToyConv])
    trimmer_of(make(ToyConv), store).evaluate(plan)
    other = CHANGES[change]()
    other.scores = store
    assert not other.evaluate(plan).cached
    assert other.evaluate(plan).cached
    assert len(store) == 2


class Showing(ToyConv):
    """Names an object of its own in its text, as some networks do with functions."""

    def extra_repr(self) -> str:
        self.shown = object()
        return repr(self.shown)


def test_where_an_object_lies_in_memory_is_of_no_account() -> None:
    networks = make(Showing), make(Showing)
    assert len({repr(network) for network in networks}) == 2
    assert len({trimmer_of(network).fingerprint for network in networks}) == 1


def test_a_criterion_chooses_plans_and_scores_none() -> None:
    store, plan = Store(), PruningPlan(CUT[ToyConv])
    trimmer_of(make(ToyConv), store, criterion="l1").evaluate(plan)
    assert trimmer_of(make(ToyConv), store, criterion="taylor_2017").evaluate(plan).cached


def test_a_score_answers_for_one_training_only() -> None:
    store, plan = Store(), PruningPlan(CUT[ToyConv])
    trimmer = trimmer_of(make(ToyConv), store)
    for training in (None, TRAINING, replace(TRAINING, learning_rate=0.01), replace(TRAINING, updates=3)):
        assert not trimmer.evaluate(plan, retraining=training).cached
        assert trimmer.evaluate(plan, retraining=training).cached
    assert not trimmer.evaluate(plan, retraining=TRAINING, seed=1).cached
    assert trimmer.evaluate(plan, retraining=RetrainSettings(), seed=1).cached  # trains nothing, with whatever seed
    longer = of_task(train=split_of(ToyConv.shape, 49, 0), selection=WHOLE.selection)
    longer.recalibration, longer.calibration, longer.scores = trimmer.recalibration, trimmer.calibration, store
    assert longer.evaluate(plan).cached
    assert not longer.evaluate(plan, retraining=TRAINING).cached  # which reads images that others did not


def test_the_selection_split_counts_where_a_training_is_checked_on_it() -> None:
    store, plan, checked = Store(), PruningPlan(CUT[ToyConv]), replace(TRAINING, check_every=1)
    first, other = trimmer_of(make(ToyConv), store), of_task(selection=pixel(WHOLE.selection))
    other.scores = store
    for training in (TRAINING, checked):
        first.evaluate(plan, retraining=training)
    assert other.evaluate(plan, retraining=TRAINING).cached
    assert not other.evaluate(plan, retraining=checked).cached


def test_a_later_round_answers_for_its_whole_history() -> None:
    store, plan = Store(), PruningPlan({"conv2": [1, 2, 5]})
    trimmer = trimmer_of(make(ToyConv), store)
    subjects = [chain(trimmer, None), chain(trimmer, TRAINING), chain(trimmer, replace(TRAINING, updates=3))]
    assert [trimmer.evaluate(plan, subject).cached for subject in subjects] == [False] * 3
    assert [trimmer.evaluate(plan, subject).cached for subject in subjects] == [True] * 3
    assert not trimmer.evaluate(PruningPlan({"conv1": [0, 1, 3], "conv2": [1, 2, 5]})).cached  # at once, not in two
    cut = trimmer.trim(PruningPlan({"conv1": [0, 1, 3]}))
    trained = trimmer.retrain(cut, TRAINING, seed=1)  # in two calls what `chain` does in one
    assert trimmer.evaluate(plan, trimmer.examine_trimmed(trained)).cached


def test_a_later_round_answers_for_the_repair_of_the_earlier_ones() -> None:
    first, plan, store = PruningPlan({"conv1": [0, 1, 3]}), PruningPlan({"conv2": [1, 2, 5]}), Store()
    trimmer = trimmer_of(make(ToyConv), store)
    other = trimmer.with_settings(replace(trimmer.settings, compensation="fold_mean"))
    assert not other.evaluate(plan, other.examine_trimmed(other.trim(first))).cached
    assert not other.evaluate(plan, other.examine_trimmed(trimmer.trim(first))).cached
    assert other.evaluate(plan, other.examine_trimmed(trimmer.trim(first))).cached


def test_means_are_numbers_whatever_holds_them() -> None:
    pixels = (255 * torch.rand(6, 2, 4, 4, generator=torch.Generator().manual_seed(0))).to(torch.uint8)
    labels, mean, std = torch.arange(6) % 3, [0.5, 0.25], [0.5, 1.0]
    kinds = (list, torch.tensor, lambda each: np.array(each, np.float32))
    splits = [TensorSplit(pixels, labels, name="toy", mean=kind(mean), std=kind(std)) for kind in kinds]
    assert len({split_digest(split) for split in splits}) == 1
    assert split_digest(TensorSplit(pixels, labels, name="toy", mean=std, std=std)) != split_digest(splits[0])


def test_a_network_of_unknown_history_is_not_looked_up() -> None:
    store = Store()
    trimmer = trimmer_of(make(ToyConv), store)
    foreign = trimmer.examine(make(ToyConv, seed=5), trimmer.groups, PruningPlan.full(trimmer.groups))
    for _ in range(2):
        assert not trimmer.evaluate(PruningPlan(CUT[ToyConv]), foreign).cached
    assert not store


def tell(queue: Any) -> None:
    queue.put(Trimmer(default_task()).fingerprint)


def test_another_process_finds_the_same_fingerprint() -> None:
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    child = context.Process(target=tell, args=(queue,))
    child.start()
    child.join(180)
    assert child.exitcode == 0
    assert queue.get() == Trimmer(default_task()).fingerprint


# ---- cost ------------------------------------------------------------------------------------------------------------
def mixed(module: Any, x: Tensor) -> Tensor:
    maps = torch.relu(module.conv(x)).flatten(2)  # (N, C, 36)
    return module.fc(module.mix(maps).mean(2))


@pytest.mark.parametrize("toy", [ToyConv, ToyResidual])
def test_a_foretold_cost_is_the_counted_one(toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trimmer = trimmer_of(make(toy))
    trimmed = trimmer.trim(PruningPlan(CUT[toy]))
    assert trimmed.cost == count_cost(trimmed.network, trimmer.task.example)

    def unwanted(*_: Any) -> None:
        pytest.fail("a network was run to be counted")

    monkeypatch.setattr("prunegym.pruning.trimmer.count_cost", unwanted)
    assert trimmer.cost_of(trimmed.plan) == trimmed.cost


def test_a_cost_that_cannot_be_foretold_is_counted() -> None:
    """A layer that reads positions is run once for each channel, so that its weights are used less after a cut."""
    network: Any = Wired(mixed, conv=nn.Conv2d(2, 6, 3), mix=nn.Linear(36, 36), fc=nn.Linear(6, 3)).eval()
    network.shape = (2, 8, 8)
    trimmer = trimmer_of(network, Store())
    plan = PruningPlan({"conv": [0, 3]})
    counted = count_cost(trimmer.trim(plan).network, trimmer.task.example)
    assert trimmer.cost_model.cost(plan.counts) != counted
    assert [trimmer.evaluate(plan).cost for _ in range(2)] == [counted] * 2
