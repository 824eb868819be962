"""Schedules and the distillation loss by hand; determinism, restarts, best weights and what must come back."""

import copy
import json
import math
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from prunegym.agent.search import search
from prunegym.agent.settings import SearchSettings
from prunegym.envs.default_task import default_task
from prunegym.envs.trim_settings import TrimSettings
from prunegym.pruning.errors import UserError
from prunegym.pruning.evaluation import Score, evaluate
from prunegym.pruning.plan import PruningPlan
from prunegym.pruning.prepare import TaskSettings, prepare_task
from prunegym.pruning.retraining import RetrainResult, RetrainSettings, rate_factor, retrain
from prunegym.pruning.schedule import Round, Schedule
from prunegym.pruning.splits import TensorSplit
from torch import Tensor, nn
from toys import ToyMLP, ToyResidual, images, make


class Small(nn.Module):
    """One linear layer on flattened 1x2x2 images, with a switchable dropout."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.drop = nn.Dropout(dropout)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.drop(x.flatten(1)))


def split_of(shape: tuple[int, ...], n: int = 48, poison: float | None = None, seed: int = 0) -> TensorSplit:
    """Draw inputs whose label is the largest of their first three numbers; `poison` replaces one image."""
    inputs = images(shape, n, seed)
    split = TensorSplit(inputs, inputs.flatten(1)[:, :3].argmax(1), name="train")
    if poison is not None:
        split.images[0] = poison  # behind the check of its constructor
    return split


def weights(network: nn.Module) -> list[Tensor]:
    return [value.clone() for value in network.state_dict().values()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_rates_by_hand() -> None:
    constant = RetrainSettings(updates=10, schedule="constant")
    assert [rate_factor(constant, step) for step in range(10)] == [1.0] * 10
    cosine = RetrainSettings(updates=8, schedule="cosine")
    np.testing.assert_allclose(
        [rate_factor(cosine, step) for step in (0, 2, 4, 6, 8)], [1, (2 + 2**0.5) / 4, 0.5, (2 - 2**0.5) / 4, 0]
    )
    one_cycle = RetrainSettings(updates=10, schedule="one_cycle")  # three steps up, then seven down
    factors = [rate_factor(one_cycle, step) for step in range(10)]
    np.testing.assert_allclose(factors[:4], [0.25, 0.5, 0.75, 1.0])
    np.testing.assert_allclose(factors[4:], [0.5 + 0.5 * math.cos(math.pi * k / 7) for k in range(1, 7)])
    assert rate_factor(RetrainSettings(updates=1), 0) == 1.0


def test_one_step_of_sgd_by_hand() -> None:
    network = make(Small)
    data = split_of((1, 2, 2), 16)
    before = copy.deepcopy(network)
    x, y = next(iter(data.batches(16)))
    settings = RetrainSettings(updates=1, batch_size=16, learning_rate=0.1, weight_decay=0.01, clip_norm=0)
    result = retrain(network, data, settings, seed=0)
    loss = F.cross_entropy(before(x), y)
    loss.backward()
    assert result.updates == 1
    assert result.loss == pytest.approx(loss.item(), rel=1e-5)
    for new, old in zip(network.parameters(), before.parameters(), strict=True):
        gradient = old.grad + 0.01 * old  # Nesterov's first step: g + momentum * g
        torch.testing.assert_close(new, old - 0.1 * 1.9 * gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_distillation_gradient_by_hand(share: float) -> None:
    """d/dz of T² CE(softmax(t/T), z/T) is T (softmax(z/T) - softmax(t/T)); Hinton et al. 2015, section 2."""
    temperature, rate, n = 3.0, 0.05, 16
    network, teacher = make(Small, 0), make(Small, 7)
    before = copy.deepcopy(network)
    data = split_of((1, 2, 2), n)
    x, y = next(iter(data.batches(n)))
    settings = RetrainSettings(
        updates=1, batch_size=n, learning_rate=rate, momentum=0.0, weight_decay=0.0, clip_norm=0.0,
        distillation=share, temperature=temperature,
    )  # fmt: skip
    retrain(network, data, settings, seed=0, teacher=teacher)
    with torch.no_grad():
        z, t = before(x), teacher(x)
        soft = temperature * ((z / temperature).softmax(1) - (t / temperature).softmax(1))
        hard = z.softmax(1) - F.one_hot(y, 3)
        at_logits = (share * soft + (1 - share) * hard) / n
        torch.testing.assert_close(network.fc.weight, before.fc.weight - rate * at_logits.T @ x.flatten(1))
        torch.testing.assert_close(network.fc.bias, before.fc.bias - rate * at_logits.sum(0))
    assert float(soft.abs().max()) > 0.05


def test_same_seed_gives_the_same_bits() -> None:
    data = split_of(ToyResidual.shape)
    settings = RetrainSettings(updates=12, batch_size=16, crop_padding=1, flip=True, learning_rate=0.05)
    results = []
    for seed in (3, 3, 4):
        network = make(ToyResidual)
        torch.manual_seed(len(results))  # the global state must not matter
        result = retrain(network, data, settings, seed=seed)
        results.append(weights(network))
        assert result.updates == 12
        assert not any(module.training for module in network.modules())
    assert same(results[0], results[1])
    assert not same(results[0], results[2])


def test_dropout_follows_the_seed_and_the_global_state_comes_back() -> None:
    data = split_of((1, 2, 2))
    settings = RetrainSettings(updates=5, batch_size=16)
    outcomes = []
    for start in (1, 2):
        network = make(lambda: Small(0.5))
        torch.manual_seed(start)
        state = torch.get_rng_state()
        retrain(network, data, settings, seed=0)
        assert torch.equal(torch.get_rng_state(), state)
        outcomes.append(weights(network))
    assert same(*outcomes)


def test_no_updates_leave_the_network_alone() -> None:
    network = make(ToyMLP).train()
    before = weights(network)
    result = retrain(network, split_of((5,)), RetrainSettings(updates=0), seed=0)
    assert result.updates == 0
    assert math.isnan(result.loss)
    assert same(weights(network), before)
    assert network.training


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_training_learns(optimizer: Any) -> None:
    data = split_of((5,), 200)  # the label is the largest of the first three inputs
    network = make(ToyMLP)
    before = evaluate(network, data.batches(50))
    steps: list[int] = []
    settings = RetrainSettings(updates=150, batch_size=32, optimizer=optimizer, learning_rate=0.03)
    result = retrain(network, data, settings, seed=0, progress=steps.append)
    after = evaluate(network, data.batches(50))
    assert after.accuracy > max(0.75, before.accuracy + 0.2)
    assert result.loss == pytest.approx(after.loss, abs=0.2)
    assert steps == list(range(1, 151))
    assert result.learning_rate == 0.03


def test_frozen_parameters_stay() -> None:
    network = make(ToyMLP)
    network.fc1.weight.requires_grad_(False)
    frozen, free = network.fc1.weight.clone(), network.fc2.weight.clone()
    retrain(network, split_of((5,)), RetrainSettings(updates=3, batch_size=16), seed=0)
    assert torch.equal(network.fc1.weight, frozen)
    assert not torch.equal(network.fc2.weight, free)


class Cliff(nn.Module):
    """One number w as the second logit; beyond 10 the output is NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        logit = torch.where(self.w.abs() > 10, float("nan"), self.w)
        return torch.stack([torch.zeros_like(logit), logit]).expand(len(x), 2)


def test_too_high_a_rate_starts_again_at_a_quarter() -> None:
    """The label is always 0, so the gradient is sigmoid(w): 0.5 at first, hence steps of half the rate."""
    network = Cliff()
    data = TensorSplit(images((5,), 16), torch.zeros(16, dtype=torch.int64), name="train")
    settings = RetrainSettings(
        updates=2, batch_size=16, learning_rate=64.0, schedule="constant", momentum=0.0, weight_decay=0.0
    )
    with pytest.warns(UserWarning, match="diverged after 2 updates at learning rate 64; it starts again at 16"):
        result = retrain(network, data, settings, seed=0)
    assert (result.updates, result.learning_rate) == (4, 16.0)
    assert network.w.item() == pytest.approx(-8 - 16 / (1 + math.exp(8)), rel=1e-5)
    assert result.loss == pytest.approx(math.log1p(math.exp(-8)), rel=1e-2)


def test_restart_begins_from_the_weights_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Poison the first attempt only: the result must be that of a clean run at a quarter of the rate."""
    clean, restarted = make(ToyMLP), make(ToyMLP)
    data = split_of((5,))
    settings = RetrainSettings(updates=6, batch_size=16, learning_rate=0.04)
    retrain(clean, data, RetrainSettings(updates=6, batch_size=16, learning_rate=0.01), seed=0)
    calls = []

    def poisoned(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        calls.append(1)
        return output * float("nan") if len(calls) == 3 else output

    handle = restarted.register_forward_hook(poisoned)
    with pytest.warns(UserWarning, match="diverged after 3 updates at learning rate 0.04; it starts again at 0.01"):
        result = retrain(restarted, data, settings, seed=0)
    handle.remove()
    assert result.updates == 3 + 6
    assert result.learning_rate == 0.01
    assert same(weights(clean), weights(restarted))


def test_data_that_is_not_finite_ends_in_an_error() -> None:
    network = make(ToyMLP)
    before = weights(network)
    settings = RetrainSettings(updates=5, batch_size=48, learning_rate=0.64)
    with (
        pytest.warns(UserWarning, match="training diverged after 1 updates"),
        pytest.raises(UserError, match=r"diverged four times, the last at learning rate 0.01; is the data finite\?"),
    ):
        retrain(network, split_of((5,), poison=float("nan")), settings, seed=0)
    assert same(weights(network), before)


def test_teacher_comes_back_as_it_was() -> None:
    network, teacher = make(ToyResidual, 0), make(ToyResidual, 1).train()
    teacher.bn1.eval()
    before, flags = weights(teacher), [module.training for module in teacher.modules()]
    settings = RetrainSettings(updates=3, batch_size=16, distillation=0.5)
    retrain(network, split_of(ToyResidual.shape), settings, seed=0, teacher=teacher)
    assert same(weights(teacher), before)
    assert [module.training for module in teacher.modules()] == flags
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_refusals() -> None:
    with pytest.raises(UserError, match="distillation needs a teacher"):
        retrain(make(ToyMLP), split_of((5,)), RetrainSettings(updates=1, distillation=0.5), seed=0)
    with pytest.raises(UserError, match="updates >= 0 and batch_size >= 2, but got -1 and 128"):
        RetrainSettings(updates=-1)
    with pytest.raises(UserError, match="batch_size >= 2, but got 0 and 1"):
        RetrainSettings(batch_size=1)
    for rate in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match=r"learning_rate must be (positive|a finite number), but got"):
            RetrainSettings(learning_rate=rate)
    with pytest.raises(UserError, match=r"distillation must be in \[0, 1\], but got 1.5; it is a share of the loss"):
        RetrainSettings(distillation=1.5)
    with pytest.raises(UserError, match="momentum and label_smoothing must be in"):
        RetrainSettings(momentum=1.0)
    with pytest.raises(UserError, match="temperature positive"):
        RetrainSettings(temperature=0.0)


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("updates", 1.5, "a whole number"), ("updates", True, "a whole number"), ("updates", None, "a whole number"),
        ("batch_size", 2.5, "a whole number"), ("check_every", 1.5, "a whole number"),
        ("crop_padding", 0.5, "a whole number"), ("patience", "3", "a whole number"),
        ("flip", "yes", "true or false"), ("flip", 1, "true or false"), ("carry_state", None, "true or false"),
        ("epochs", "x", "a finite number"), ("epochs", 1e400, "a finite number"),
        ("epochs", 10**400, "a finite number"),
        ("weight_decay", float("nan"), "a finite number"), ("clip_norm", float("nan"), "a finite number"),
        ("clip_norm", True, "a finite number"), ("temperature", float("inf"), "a finite number"),
        ("momentum", float("nan"), "a finite number"), ("label_smoothing", "0.1", "a finite number"),
    ],
)  # fmt: skip
def test_settings_of_another_type_are_refused(name: str, value: Any, wanted: str) -> None:
    with pytest.raises(UserError, match=rf"^{name} must be {wanted}, but got {re.escape(repr(value)[:20])}"):
        RetrainSettings(**{name: value})


def test_numbers_of_numpy_become_plain() -> None:
    settings = RetrainSettings(updates=np.int64(7), learning_rate=np.float32(0.5))  # type: ignore[arg-type]
    assert json.dumps(asdict(settings)) == json.dumps(asdict(RetrainSettings(updates=7, learning_rate=0.5)))


@pytest.mark.parametrize("seed", [-1, 2**63, 1.0, True, "3"])
def test_seeds_of_a_training(seed: Any) -> None:
    with pytest.raises(UserError, match=r"seed must be a whole number from 0 to 2\*\*63 - 1, but got"):
        retrain(make(ToyMLP), split_of((5,)), RetrainSettings(updates=1), seed=seed)
    retrain(make(ToyMLP), split_of((5,)), RetrainSettings(updates=1), seed=2**63 - 1)


@pytest.mark.parametrize("frozen", ["all", "fc1", "none"])
@pytest.mark.parametrize("fails", [False, True])
def test_the_gradient_flags_come_back(frozen: str, fails: bool) -> None:
    """A network frozen for inference trains whole, one frozen in part keeps that part; the flags are as before."""
    network = make(ToyMLP)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(frozen == "none" or not (frozen == "all" or name.startswith(frozen)))
    flags = {name: parameter.requires_grad for name, parameter in network.named_parameters()}
    before = {name: value.detach().clone() for name, value in network.named_parameters()}
    data = split_of((5,), poison=float("nan") if fails else None)
    settings = RetrainSettings(updates=12, batch_size=16, learning_rate=0.1)
    if fails:
        with pytest.warns(UserWarning, match="diverged"), pytest.raises(UserError, match="diverged four times"):
            retrain(network, data, settings, seed=0)
    else:
        retrain(network, data, settings, seed=0)
        moved = {name for name, value in network.named_parameters() if not torch.equal(value, before[name])}
        assert moved == {name for name in before if frozen == "all" or not name.startswith(frozen)}
    assert {name: parameter.requires_grad for name, parameter in network.named_parameters()} == flags
    assert all(parameter.grad is None for parameter in network.parameters())


# ---- epochs ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("examples", "batch_size", "epochs", "updates"),
    [
        (48, 16, 2.0, 6),
        (50, 16, 2.0, 6),  # a last batch that is not full is left out
        (16, 16, 3.0, 3),
        (10, 16, 3.0, 3),  # unless it is the only one
        (48, 16, 0.5, 2),  # 1.5 steps
        (48, 16, 0.01, 1),
    ],
)
def test_epochs_are_the_batches_that_training_reads(
    examples: int, batch_size: int, epochs: float, updates: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = RetrainSettings(epochs=epochs, batch_size=batch_size)
    assert settings.resolved(examples) == replace(settings, epochs=0.0, updates=updates)
    data, passes = split_of((5,), examples), []
    read = data.batches

    def noted(*arguments: Any, **keywords: Any) -> Any:
        passes.append(1)
        return read(*arguments, **keywords)

    monkeypatch.setattr(data, "batches", noted)
    result = retrain(make(ToyMLP), data, settings, seed=0)
    assert result.updates == updates
    assert len(passes) == math.ceil(epochs)


def test_updates_need_no_resolving() -> None:
    settings = RetrainSettings(updates=7)
    assert settings.resolved(1000) is settings
    with pytest.raises(UserError, match="at least one training example, but got 0; give updates instead"):
        RetrainSettings(epochs=1).resolved(0)


def test_a_task_is_trained_for_epochs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    settings = TaskSettings("lenet_small", training=RetrainSettings(epochs=0.5, batch_size=64))
    by_epochs = prepare_task(settings)
    steps = len(by_epochs.train) // 64 / 2
    by_updates = prepare_task(
        replace(settings, training=RetrainSettings(updates=math.floor(steps + 0.5), batch_size=64))
    )
    assert same(weights(by_epochs.network), weights(by_updates.network))
    assert len(list((tmp_path / "prunegym").iterdir())) == 1  # the same training is cached once
    checked = replace(settings, training=replace(settings.training, check_every=2))
    assert len(prepare_task(checked).selection) > 0
    with pytest.raises(UserError, match=r"--task\.training\.updates or --task\.training\.epochs"):
        prepare_task(TaskSettings("lenet_small"))


def test_a_search_counts_its_epochs_in_updates() -> None:
    task = default_task()
    trim = TrimSettings(retraining=RetrainSettings(epochs=0.25, batch_size=32))
    settings = SearchSettings(trim=trim, max_evaluations=1, compare=False)
    result = search(task, settings=settings)
    updates = math.floor(len(task.train) // 32 / 4 + 0.5)
    assert result.schedule.retrain_updates == updates > 1
    assert result.settings.trim.retraining == RetrainSettings(updates=updates, batch_size=32)
    assert search(task, settings=settings, retrain_updates=2).schedule.retrain_updates == 2


def test_a_schedule_refuses_epochs() -> None:
    with pytest.raises(UserError, match="rounds of a schedule count updates, so its retraining must have epochs 0"):
        Schedule((Round(PruningPlan({"conv1": [0]}), 3),), retraining=RetrainSettings(epochs=2))


# ---- best weights and early stop -------------------------------------------------------------------------------------
CHECKED = RetrainSettings(updates=24, batch_size=8, learning_rate=0.6, schedule="constant", check_every=4, clip_norm=0)


def ladder(data: TensorSplit, selection: TensorSplit) -> dict[int, tuple[Score, list[Tensor], RetrainResult]]:
    """Train anew to each checked step (at a constant rate the shorter training is the longer one's beginning)."""
    result = {}
    for updates in range(4, 25, 4):
        network = make(ToyMLP)
        done = retrain(network, data, replace(CHECKED, updates=updates, check_every=0), seed=0)
        result[updates] = (evaluate(network, selection.batches(64)), weights(network), done)
    return result


def test_the_best_checked_weights_are_kept() -> None:
    data, selection = split_of((5,)), split_of((5,), 60, seed=1)
    steps = ladder(data, selection)
    best = max(steps, key=lambda updates: (steps[updates][0].accuracy, -steps[updates][0].loss))
    assert 4 < best < 24  # or first and last would do as well
    network = make(ToyMLP)
    result = retrain(network, data, CHECKED, seed=0, selection=selection)
    score, expected, done = steps[best]
    assert same(weights(network), expected)
    assert (result.best_update, result.best_accuracy) == (best, score.accuracy)
    assert (result.updates, result.stopped_early) == (24, False)
    assert result.state is not None
    assert done.state is not None
    for name, held in done.state.entries.items():
        assert torch.equal(result.state.entries[name]["momentum_buffer"], held["momentum_buffer"])  # type: ignore[arg-type]


@pytest.mark.parametrize("patience", [1, 2, 3])
def test_patience_ends_the_training(patience: int) -> None:
    data, selection = split_of((5,)), split_of((5,), 60, seed=1)
    steps = ladder(data, selection)
    keys = {updates: (score.accuracy, -score.loss) for updates, (score, _, _) in steps.items()}
    best, waited, end = 0, 0, 24
    for updates, key in keys.items():
        better = best == 0 or key > keys[best]
        best, waited = (updates, 0) if better else (best, waited + 1)
        if waited == patience:
            end = updates
            break
    seen: list[int] = []
    network = make(ToyMLP)
    settings = replace(CHECKED, patience=patience)
    result = retrain(network, data, settings, seed=0, selection=selection, progress=seen.append)
    assert (result.updates, result.best_update, result.stopped_early) == (end, best, end < 24)
    assert seen == list(range(1, end + 1))
    assert same(weights(network), steps[best][1])
    if patience == 1:
        assert end < 24


def test_the_last_step_is_scored_too() -> None:
    network = make(ToyMLP)
    settings = RetrainSettings(updates=3, batch_size=16, check_every=50)
    result = retrain(network, split_of((5,)), settings, seed=0, selection=split_of((5,), 30, seed=1))
    assert result.best_update == 3
    assert result.best_accuracy == evaluate(network, split_of((5,), 30, seed=1).batches(30)).accuracy
    unchecked = retrain(make(ToyMLP), split_of((5,)), RetrainSettings(updates=3, batch_size=16), seed=0)
    assert unchecked.best_update == 3
    assert math.isnan(unchecked.best_accuracy)


def test_checks_do_not_disturb_the_training() -> None:
    """Dropout, shuffling and crops draw the same numbers, even where reading the selection split draws its own."""

    class Noisy(TensorSplit):
        def batches(self, *arguments: Any, **keywords: Any) -> Any:
            torch.rand(3)
            return super().batches(*arguments, **keywords)

    inputs = images((1, 2, 2), 20, 5)
    selection = Noisy(inputs, torch.zeros(20, dtype=torch.int64), name="selection")
    settings = RetrainSettings(updates=9, batch_size=16, crop_padding=1, flip=True)
    outputs: list[list[Tensor]] = []
    for every in (0, 2):
        network = make(lambda: Small(0.5))
        seen: list[Tensor] = []
        network.register_forward_hook(
            lambda module, _, output, seen=seen: seen.append(output.detach().clone()) if module.training else None
        )
        retrain(network, split_of((1, 2, 2)), replace(settings, check_every=every), seed=0, selection=selection)
        outputs.append(seen)
    assert len(outputs[0]) == 9
    assert same(*outputs)


def test_a_restart_forgets_the_scores_of_the_diverged_attempt() -> None:
    data, selection = split_of((5,)), split_of((5,), 60, seed=1)
    settings = RetrainSettings(updates=6, batch_size=16, learning_rate=0.04, check_every=2)
    clean, restarted = make(ToyMLP), make(ToyMLP)
    expected = retrain(clean, data, replace(settings, learning_rate=0.01), seed=0, selection=selection)
    calls = []

    def poisoned(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        calls.append(module.training)
        return output * float("nan") if module.training and sum(calls) == 5 else output

    handle = restarted.register_forward_hook(poisoned)
    with pytest.warns(UserWarning, match=r"diverged after 5 updates at learning rate 0\.04"):
        result = retrain(restarted, data, settings, seed=0, selection=selection)
    handle.remove()
    assert same(weights(clean), weights(restarted))
    assert (result.best_update, result.best_accuracy) == (expected.best_update, expected.best_accuracy)
    assert result.updates == 5 + 6


class Root(nn.Module):
    """The second logit is the root of w, whose slope at w = 0 is infinite: a finite loss, then no finite weight."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        logit = self.w.sqrt()
        return torch.stack([torch.zeros_like(logit), logit]).expand(len(x), 2)


def test_a_last_step_that_ruins_the_weights_counts_as_divergence() -> None:
    network = Root()
    data = TensorSplit(images((5,), 16), torch.ones(16, dtype=torch.int64), name="train")
    settings = RetrainSettings(updates=1, batch_size=16, clip_norm=0)
    with pytest.warns(UserWarning, match="diverged after 1 updates"), pytest.raises(UserError, match="four times"):
        retrain(network, data, settings, seed=0)
    assert network.w.item() == 0


# ---- channels last ---------------------------------------------------------------------------------------------------
def strides(network: nn.Module) -> list[tuple[int, ...]]:
    return [value.stride() for value in network.state_dict().values()]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_channels_last_changes_the_layout_while_training_only(precision: Any) -> None:
    settings = RetrainSettings(updates=4, batch_size=16, precision=precision, check_every=2)
    data, selection = split_of(ToyResidual.shape), split_of(ToyResidual.shape, 20, seed=1)
    plain, network = make(ToyResidual), make(ToyResidual)
    before = strides(network)
    layouts = []
    network.conv1.register_forward_pre_hook(
        lambda module, given: (
            layouts.append(
                [tensor.is_contiguous(memory_format=torch.channels_last) for tensor in (given[0], module.weight)]
            )
            if module.training
            else None
        )
    )
    expected = retrain(plain, data, settings, seed=0, selection=selection)
    result = retrain(network, data, replace(settings, channels_last=True), seed=0, selection=selection)
    assert layouts == [[True, True]] * 4
    assert strides(network) == before == strides(plain)
    tolerance = 1e-4 if precision == "float32" else 0.03
    torch.testing.assert_close(network.state_dict(), plain.state_dict(), rtol=tolerance, atol=tolerance)
    assert result.loss == pytest.approx(expected.loss, rel=tolerance)
    retrain(network, data, replace(settings, channels_last=True), seed=0, selection=selection, state=result.state)
    assert strides(network) == before


def test_channels_last_leaves_other_dimensions_alone() -> None:
    settings = RetrainSettings(updates=3, batch_size=16)
    volume = nn.Sequential(nn.Conv3d(1, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 8, 3))
    for network, shape in ((make(ToyMLP), (5,)), (volume, (1, 3, 3, 3))):
        other = copy.deepcopy(network)
        retrain(network, split_of(shape), settings, seed=0)
        retrain(other, split_of(shape), replace(settings, channels_last=True), seed=0)
        assert same(weights(network), weights(other))


def test_no_gradients_are_left_behind() -> None:
    network = make(ToyMLP)
    retrain(network, split_of((5,)), RetrainSettings(updates=2, batch_size=16), seed=0)
    assert all(parameter.grad is None for parameter in network.parameters())


def test_refusals_of_lengths_and_checks() -> None:
    with pytest.raises(UserError, match="but got updates=5 and epochs=2; set one of them to 0"):
        RetrainSettings(updates=5, epochs=2)
    for epochs in (-1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match=r"epochs must be a (number from 0|finite number), but got"):
            RetrainSettings(epochs=epochs)
    with pytest.raises(UserError, match="check_every and patience must be at least 0, but got -1 and 0"):
        RetrainSettings(check_every=-1)
    with pytest.raises(UserError, match="patience=2 and check_every=0; set check_every to the number of updates"):
        RetrainSettings(patience=2)
    with pytest.raises(UserError, match="check_every=5 needs a selection split to score on, but none was given"):
        retrain(make(ToyMLP), split_of((5,)), RetrainSettings(updates=9, check_every=5), seed=0)


def test_scores_by_hand() -> None:
    class Table(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    logits = torch.tensor([[3.0, 2, 1, 0, -1, -2], [0, 1, 2, 3, 4, 5], [0, 0, 9, 0, 0, 0.5]])
    labels = torch.tensor([0, 0, 5])
    pairs = zip(logits.tolist(), labels.tolist(), strict=True)
    loss = -np.mean([math.log(math.exp(row[label]) / sum(map(math.exp, row))) for row, label in pairs])
    one = evaluate(Table(), [(logits[:2], labels[:2]), (logits[2:], labels[2:])])
    assert (one.accuracy, one.examples) == (1 / 3, 3)
    assert one.loss == pytest.approx(loss, rel=1e-6)
    assert evaluate(Table(), [(logits, labels)], "top5_accuracy").accuracy == 2 / 3
    with pytest.raises(UserError, match=r"metric must be a known name, but got 'acuracy'; did you mean 'accuracy'\?"):
        evaluate(Table(), [], "acuracy")
    with pytest.raises(UserError, match="scoring needs at least one example, but the split is empty"):
        evaluate(Table(), [])
