"""Momentum is cut like the weights: slices written out by hand, the next step computed by hand."""

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from prunegym.pruning import PruningPlan, PruningTask, RepairSettings, Trimmer, UserError, apply_plan, find_groups
from prunegym.pruning.optimizer_state import OptimizerState, capture, carry_optimizer, restore, slice_state
from prunegym.pruning.retraining import RetrainSettings, retrain
from prunegym.pruning.splits import TensorSplit
from torch import Tensor, nn
from toys import ToyConv, ToyMLP, ToyResidual, images, make


class ToyDepthwise(nn.Module):
    """A depthwise convolution between two others; takes (N, 2, 6, 6)."""

    shape = (2, 6, 6)

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 6, 3, bias=False)
        self.bn = nn.BatchNorm2d(6)
        self.deep = nn.Conv2d(6, 6, 3, groups=6)
        self.point = nn.Conv2d(6, 4, 1)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.deep(torch.relu(self.bn(self.first(x))))
        return self.fc(torch.relu(self.point(maps)).mean((2, 3)))


class Tied(nn.Module):
    """Two readers of one hidden layer that share their weight, each with its own bias; takes (N, 5)."""

    shape = (5,)

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(5, 6)
        self.one, self.two = nn.Linear(6, 3), nn.Linear(6, 3)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.hidden(x))
        return self.one(hidden) + self.two(-hidden).sigmoid()


Hand = Mapping[str, tuple[list[int] | None, list[int] | None]]

# what stays of each parameter, worked out by hand: entries along the first and the second dimension, None = all
CASES: dict[str, tuple[Callable[[], Any], dict[str, list[int]], Hand]] = {
    "flatten": (
        ToyConv,
        {"conv1": [0, 2], "conv2": [1, 4, 5], "fc1": [0, 3, 7]},
        {
            "conv1.weight": ([0, 2], None),
            "conv1.bias": ([0, 2], None),
            "conv2.weight": ([1, 4, 5], [0, 2]),
            "conv2.bias": ([1, 4, 5], None),
            "fc1.weight": ([0, 3, 7], [4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23]),  # 2x2 features a channel
            "fc1.bias": ([0, 3, 7], None),
            "fc2.weight": (None, [0, 3, 7]),
            "fc2.bias": (None, None),
        },
    ),
    "residual": (
        ToyResidual,
        {"stem": [1, 3, 4], "conv1": [0, 4], "down": [2, 5, 6, 7]},
        {
            "stem.weight": ([1, 3, 4], None),
            "stem_bn.weight": ([1, 3, 4], None),
            "stem_bn.bias": ([1, 3, 4], None),
            "conv1.weight": ([0, 4], [1, 3, 4]),
            "bn1.weight": ([0, 4], None),
            "bn1.bias": ([0, 4], None),
            "conv2.weight": ([1, 3, 4], [0, 4]),
            "bn2.weight": ([1, 3, 4], None),
            "bn2.bias": ([1, 3, 4], None),
            "down.weight": ([2, 5, 6, 7], [1, 3, 4]),
            "down_bn.weight": ([2, 5, 6, 7], None),
            "down_bn.bias": ([2, 5, 6, 7], None),
            "fc.weight": (None, [2, 5, 6, 7]),
            "fc.bias": (None, None),
        },
    ),
    "depthwise": (
        ToyDepthwise,
        {"first": [0, 2, 5], "point": [1, 3]},
        {
            "first.weight": ([0, 2, 5], None),
            "bn.weight": ([0, 2, 5], None),
            "bn.bias": ([0, 2, 5], None),
            "deep.weight": ([0, 2, 5], None),
            "deep.bias": ([0, 2, 5], None),
            "point.weight": ([1, 3], [0, 2, 5]),
            "point.bias": ([1, 3], None),
            "fc.weight": (None, [1, 3]),
            "fc.bias": (None, None),
        },
    ),
    "tied": (
        Tied,
        {"hidden": [1, 2, 4]},
        {
            "hidden.weight": ([1, 2, 4], None),
            "hidden.bias": ([1, 2, 4], None),
            "one.weight": (None, [1, 2, 4]),
            "one.bias": (None, None),
            "two.bias": (None, None),
        },
    ),
}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1),
}
SHAPED = {"sgd": {"momentum_buffer"}, "adamw": {"exp_avg", "exp_avg_sq"}}


def by_hand(value: Tensor, hand: tuple[list[int] | None, list[int] | None]) -> Tensor:
    rows, columns = hand
    value = value if rows is None else value[rows]
    return value if columns is None else value[:, columns]


def loss_of(network: nn.Module, x: Tensor) -> Tensor:
    return F.cross_entropy(network(x), x.flatten(1)[:, :3].argmax(1))


def trained(toy: Callable[[], Any], kind: str, steps: int = 3) -> tuple[Any, torch.optim.Optimizer]:
    network = make(toy)
    optimizer = OPTIMIZERS[kind](network.parameters())
    for seed in range(steps):
        optimizer.zero_grad()
        loss_of(network, images(network.shape, 8, seed)).backward()
        optimizer.step()
    return network, optimizer


def tensors_of(state: OptimizerState) -> dict[str, dict[str, Tensor]]:
    return {name: {key: torch.as_tensor(value) for key, value in held.items()} for name, held in state.entries.items()}


def same_states(one: OptimizerState | None, other: OptimizerState | None) -> bool:
    assert one is not None
    assert other is not None
    a, b = tensors_of(one), tensors_of(other)
    return a.keys() == b.keys() and all(
        a[name].keys() == b[name].keys() and all(torch.equal(a[name][key], b[name][key]) for key in a[name])
        for name in a
    )


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("case", CASES)
def test_momentum_is_sliced_and_the_next_step_is_the_one_by_hand(case: str, kind: str) -> None:
    toy, keep, hand = CASES[case]
    network, optimizer = trained(toy, kind)
    groups = find_groups(network, images(network.shape, 1))
    plan = PruningPlan(keep)
    smaller: Any = apply_plan(network, groups, plan)
    carried = carry_optimizer(optimizer, network, smaller, groups, plan)
    old = dict(network.named_parameters())
    new = dict(smaller.named_parameters())
    assert old.keys() == hand.keys() == new.keys()
    assert [id(p) for p in carried.param_groups[0]["params"]] == [id(p) for p in smaller.parameters()]
    for name, cut in hand.items():
        before, after = optimizer.state[old[name]], carried.state[new[name]]
        assert before.keys() == after.keys() >= SHAPED[kind]
        for key in SHAPED[kind]:
            assert float(before[key].abs().max()) > 0
            assert torch.equal(after[key], by_hand(before[key], cut)), (name, key)
        assert all(torch.equal(after[key], before[key]) for key in before.keys() - SHAPED[kind])  # counts of steps

    x = images(network.shape, 8, 77)
    start = {name: value.detach().clone() for name, value in new.items()}
    gradients = dict(zip(new, torch.autograd.grad(loss_of(smaller, x), list(new.values())), strict=True))
    expected = {}
    for name, cut in hand.items():
        remembered = {key: by_hand(optimizer.state[old[name]][key], cut) for key in SHAPED[kind]}
        if kind == "sgd":
            expected[name] = start[name] - 0.1 * (0.9 * remembered["momentum_buffer"] + gradients[name])
        else:  # Loshchilov & Hutter 2019, algorithm 2, with the bias corrections of the fourth step
            first = (0.9 * remembered["exp_avg"] + 0.1 * gradients[name]) / (1 - 0.9**4)
            second = (0.999 * remembered["exp_avg_sq"] + 0.001 * gradients[name] ** 2) / (1 - 0.999**4)
            expected[name] = start[name] * (1 - 0.01 * 0.1) - 0.01 * first / (second.sqrt() + 1e-8)
    carried.zero_grad()
    loss_of(smaller, x).backward()
    carried.step()
    for name, value in new.items():
        assert not torch.equal(value, start[name]), name
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("toy", [ToyConv, ToyResidual, ToyDepthwise, Tied])
def test_a_state_that_is_twice_the_weights_stays_so(toy: Callable[[], Any]) -> None:
    network = make(toy)
    groups = find_groups(network, images(network.shape, 1))
    doubled = {name: {"momentum_buffer": 2 * value.detach()} for name, value in network.named_parameters()}
    for seed in range(5):
        keep = {
            group.name: torch.randperm(group.width, generator=torch.Generator().manual_seed(seed))[: 1 + seed].tolist()
            for group in groups
        }
        plan = PruningPlan(keep)
        smaller = apply_plan(network, groups, plan)
        sliced = tensors_of(slice_state(OptimizerState("torch.optim.sgd.SGD", doubled), groups, plan, network))
        for name, value in smaller.named_parameters():
            assert torch.equal(sliced[name]["momentum_buffer"], 2 * value)


def test_tied_weights_have_one_momentum_under_either_name() -> None:
    network, optimizer = trained(Tied, "sgd")
    state = capture(optimizer, network)
    assert list(state.entries) == ["hidden.weight", "hidden.bias", "one.weight", "one.bias", "two.bias"]
    renamed = OptimizerState(state.kind, {"two.weight": state.entries["one.weight"]})
    groups = find_groups(network, images(network.shape, 1))
    plan = PruningPlan({"hidden": [0, 5]})
    smaller: Any = apply_plan(network, groups, plan)
    fresh = OPTIMIZERS["sgd"](smaller.parameters())
    assert restore(fresh, smaller, slice_state(renamed, groups, plan, network))
    buffer = optimizer.state[network.one.weight]["momentum_buffer"]
    assert torch.equal(fresh.state[smaller.one.weight]["momentum_buffer"], buffer[:, [0, 5]])
    assert smaller.one.weight is smaller.two.weight


def test_groups_and_hyperparameters_are_carried_and_the_old_optimizer_is_left_alone() -> None:
    network = make(ToyConv)
    biases = [value for name, value in network.named_parameters() if name.endswith("bias")]
    weights = [network.conv2.weight, network.conv1.weight, network.fc2.weight]  # fc1.weight is not trained
    optimizer = torch.optim.SGD(
        [{"params": weights, "weight_decay": 0.1, "note": "w"}, {"params": biases, "lr": 0.5}], lr=0.2, momentum=0.8
    )
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    loss_of(network, images(network.shape, 8)).backward()
    optimizer.step()
    scheduler.step()
    before = copy.deepcopy(optimizer.state_dict())
    groups = find_groups(network, images(network.shape, 1))
    plan = PruningPlan({"conv1": [3], "conv2": [0, 1, 2]})
    smaller: Any = apply_plan(network, groups, plan)
    carried = carry_optimizer(optimizer, network, smaller, groups, plan)
    assert type(carried) is torch.optim.SGD
    first, second = carried.param_groups
    assert [id(p) for p in first["params"]] == [
        id(p) for p in (smaller.conv2.weight, smaller.conv1.weight, smaller.fc2.weight)
    ]
    assert [len(p) for p in second["params"]] == [1, 3, 8, 3]
    assert (first["lr"], first["weight_decay"], first["momentum"], first["note"]) == (0.1, 0.1, 0.8, "w")
    assert (second["lr"], second["weight_decay"], second["initial_lr"]) == (0.25, 0, 0.5)
    loss_of(smaller, images(network.shape, 8)).backward()
    untrained = smaller.fc1.weight.clone()
    carried.step()
    first["lr"] = 99.0
    assert torch.equal(smaller.fc1.weight, untrained)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for place, held in before["state"].items():
        assert torch.equal(after["state"][place]["momentum_buffer"], held["momentum_buffer"])
    torch.optim.lr_scheduler.ExponentialLR(carried, 0.5, last_epoch=1)  # a new schedule can take over


def test_a_captured_state_is_a_copy_and_so_is_a_restored_one() -> None:
    network, optimizer = trained(ToyMLP, "sgd")
    state = capture(optimizer, network)
    before = {name: held["momentum_buffer"].clone() for name, held in tensors_of(state).items()}
    other = OPTIMIZERS["sgd"](network.parameters())
    assert restore(other, network, state)
    for each in (optimizer, other):
        loss_of(network, images(network.shape, 8)).backward()
        each.step()
    assert all(torch.equal(held["momentum_buffer"], before[name]) for name, held in tensors_of(state).items())


def test_another_kind_of_optimizer_begins_at_rest() -> None:
    network, optimizer = trained(ToyMLP, "sgd")
    other = OPTIMIZERS["adamw"](network.parameters())
    assert not restore(other, network, capture(optimizer, network))
    assert not other.state
    without = OPTIMIZERS["sgd"]([network.fc1.weight])
    assert restore(without, network, capture(optimizer, network))
    assert list(without.state) == [network.fc1.weight]  # what it does not train is passed over


def test_refusals() -> None:
    network, optimizer = trained(ToyMLP, "sgd")
    state = capture(optimizer, network)
    groups = find_groups(network, images(network.shape, 1))
    plan = PruningPlan({"fc1": [0, 1]})
    smaller = apply_plan(network, groups, plan)
    fresh = OPTIMIZERS["sgd"](smaller.parameters())
    with pytest.raises(UserError, match=r"shape \(2, 5\), but 'momentum_buffer' of 'fc1.weight' has shape \(6, 5\)"):
        restore(fresh, smaller, state)
    with pytest.raises(UserError, match=r"one of shape \(6, 5\) is not among them; make the optimizer from network"):
        capture(optimizer, smaller)
    with pytest.raises(UserError, match=r"'fc1\.wait'; did you mean 'fc1\.weight'"):
        restore(fresh, smaller, OptimizerState(state.kind, {"fc1.wait": {}}))
    with pytest.raises(UserError, match="may only name groups of its network, but got 'conv1'"):
        slice_state(state, groups, PruningPlan({"conv1": [0]}), network)
    other = torch.optim.LBFGS(network.parameters(), max_iter=2)

    def closure() -> Tensor:
        other.zero_grad()
        loss = loss_of(network, images(network.shape, 8))
        loss.backward()
        return loss

    other.step(closure)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="a number or have the parameter's shape"):
        carry_optimizer(other, network, smaller, groups, plan)


# ---- through retraining ----------------------------------------------------------------------------------------------
def split_of(shape: tuple[int, ...], n: int = 48, seed: int = 0) -> TensorSplit:
    inputs = images(shape, n, seed)
    return TensorSplit(inputs, inputs.flatten(1)[:, :3].argmax(1), name="train")


def whole(**settings: Any) -> RetrainSettings:
    """Train on the whole split each step, at a constant rate: a long training is two short ones."""
    return RetrainSettings(batch_size=48, schedule="constant", **settings)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_two_trainings_with_the_state_between_are_one(optimizer: Any) -> None:
    data = split_of((5,))
    once, twice, rested = make(ToyMLP), make(ToyMLP), make(ToyMLP)
    retrain(once, data, whole(updates=8, optimizer=optimizer), seed=0)
    first = retrain(twice, data, whole(updates=3, optimizer=optimizer), seed=0)
    assert set(tensors_of(first.state)["fc1.weight"]) >= SHAPED[optimizer]  # type: ignore[arg-type]
    second = retrain(twice, data, whole(updates=5, optimizer=optimizer), seed=0, state=first.state)
    torch.testing.assert_close(twice.state_dict(), once.state_dict(), rtol=1e-4, atol=1e-6)
    assert second.state is not None
    for updates in (3, 5):
        retrain(rested, data, whole(updates=updates, optimizer=optimizer), seed=0)
    assert float((rested.fc1.weight - once.fc1.weight).detach().abs().max()) > 1e-3


def test_a_step_of_retraining_after_a_cut_by_hand() -> None:
    """Nesterov as in PyTorch: v = mu v + g, then the step is g + mu v."""
    network = make(ToyConv)
    data = split_of(network.shape)
    result = retrain(network, data, whole(updates=2), seed=0)
    assert result.state is not None
    groups = find_groups(network, images(network.shape, 1))
    _, keep, hand = CASES["flatten"]
    smaller: Any = apply_plan(network, groups, PruningPlan(keep))
    state = slice_state(result.state, groups, PruningPlan(keep), network)
    before = copy.deepcopy(smaller)
    x, y = next(iter(data.batches(48)))
    F.cross_entropy(before(x), y).backward()
    retrain(smaller, data, whole(updates=1, learning_rate=0.1, weight_decay=0, clip_norm=0), seed=0, state=state)
    whole_momentum = tensors_of(result.state)
    for (name, new), old in zip(smaller.named_parameters(), before.parameters(), strict=True):
        momentum = 0.9 * by_hand(whole_momentum[name]["momentum_buffer"], hand[name]) + old.grad
        torch.testing.assert_close(new, old - 0.1 * (old.grad + 0.9 * momentum), rtol=1e-4, atol=1e-6)
        assert not torch.equal(new, old)


def test_a_diverged_attempt_starts_again_from_the_state_given() -> None:
    data = split_of((5,))
    state = retrain(make(ToyMLP), data, whole(updates=4), seed=0).state
    clean, restarted = make(ToyMLP), make(ToyMLP)
    expected = retrain(clean, data, whole(updates=6, learning_rate=0.01), seed=0, state=state)
    calls = []

    def poisoned(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        calls.append(1)
        return output * math.nan if len(calls) == 3 else output

    handle = restarted.register_forward_hook(poisoned)
    with pytest.warns(UserWarning, match="diverged after 3 updates at learning rate 0.04"):
        result = retrain(restarted, data, whole(updates=6, learning_rate=0.04), seed=0, state=state)
    handle.remove()
    assert all(torch.equal(a, b) for a, b in zip(clean.parameters(), restarted.parameters(), strict=True))
    assert same_states(result.state, expected.state)


def test_no_state_without_updates_or_when_it_is_not_carried() -> None:
    data = split_of((5,))
    state = retrain(make(ToyMLP), data, whole(updates=4), seed=0).state
    assert retrain(make(ToyMLP), data, whole(updates=0), seed=0, state=state).state is None
    given, rested = make(ToyMLP), make(ToyMLP)
    assert retrain(given, data, whole(updates=2, carry_state=False), seed=0, state=state).state is None
    retrain(rested, data, whole(updates=2), seed=0)
    assert all(torch.equal(a, b) for a, b in zip(given.parameters(), rested.parameters(), strict=True))
    other = make(ToyMLP)  # SGD's momentum says nothing to AdamW
    adam = retrain(other, data, whole(updates=1, optimizer="adamw"), seed=0, state=state).state
    assert tensors_of(adam)["fc1.weight"]["step"].item() == 1  # type: ignore[arg-type]


def conv_trimmer() -> Trimmer:
    network = make(ToyConv)
    parts = [split_of(network.shape, 48, seed) for seed in range(4)]
    return Trimmer(PruningTask(network, *parts), RepairSettings(calibration_images=16, compensation="fold_mean"))


def test_rounds_carry_the_state_through_each_cut() -> None:
    trimmer = conv_trimmer()
    settings = RetrainSettings(updates=4, batch_size=16)
    first = trimmer.retrain(trimmer.trim(PruningPlan({"conv2": [0, 1, 3, 4, 5]})), settings, seed=1)
    assert first.state is not None
    assert first.retraining is not None
    assert first.state is first.retraining.state
    second = trimmer.trim(PruningPlan({"conv1": [0, 3], "conv2": [1, 2, 4]}), trimmer.examine_trimmed(first))
    untrained = trimmer.retrain(second, RetrainSettings(), seed=2)  # no updates: the memory waits for the next cut
    third = trimmer.trim(PruningPlan({"conv2": [0, 2]}), trimmer.examine_trimmed(untrained))
    momentum = {name: held["momentum_buffer"] for name, held in tensors_of(first.state).items()}
    sliced = {name: held["momentum_buffer"] for name, held in tensors_of(third.state).items()}  # type: ignore[arg-type]
    assert torch.equal(sliced["conv2.weight"], momentum["conv2.weight"][[1, 4]][:, [0, 3]])
    assert torch.equal(sliced["conv1.bias"], momentum["conv1.bias"][[0, 3]])
    assert torch.equal(sliced["fc1.weight"], momentum["fc1.weight"][:, [4, 5, 6, 7, 16, 17, 18, 19]])
    assert torch.equal(sliced["fc2.weight"], momentum["fc2.weight"])

    expected, rested = copy.deepcopy(third.network), copy.deepcopy(third.network)
    retrain(expected, trimmer.task.train, settings, seed=3, state=third.state)
    retrain(rested, trimmer.task.train, settings, seed=3)
    done = trimmer.retrain(third, settings, seed=3)
    assert torch.equal(done.network.conv2.weight, expected.conv2.weight)  # type: ignore[union-attr,arg-type]
    assert not torch.equal(done.network.conv2.weight, rested.conv2.weight)  # type: ignore[union-attr,arg-type]


def test_trimming_and_training_in_one_call_or_two_is_the_same() -> None:
    trimmer = conv_trimmer()
    settings = RetrainSettings(updates=3, batch_size=16)
    subject = trimmer.examine_trimmed(trimmer.trim(PruningPlan({"conv1": [0, 1, 3]}), retraining=settings, seed=1))
    assert subject.state is not None
    plan = PruningPlan({"conv2": [0, 2, 5]})
    one = trimmer.trim(plan, subject, retraining=settings, seed=2)
    two = trimmer.retrain(trimmer.trim(plan, subject), settings, seed=2)
    assert same_states(one.state, two.state)
    pairs = zip(one.network.state_dict().items(), two.network.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for (_, a), b in pairs)
    off = trimmer.trim(plan, subject, retraining=RetrainSettings(updates=3, batch_size=16, carry_state=False), seed=2)
    assert off.state is None
