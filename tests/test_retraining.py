"""Schedules and the distillation loss by hand; determinism, restarts and what must come back."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from prunegym.pruning.errors import UserError
from prunegym.pruning.evaluation import evaluate
from prunegym.pruning.retraining import RetrainSettings, rate_factor, retrain
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


def split_of(shape: tuple[int, ...], n: int = 48, poison: float | None = None) -> TensorSplit:
    """Draw inputs whose label is the largest of their first three numbers; `poison` replaces one image."""
    inputs = images(shape, n)
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
        with pytest.raises(UserError, match="learning_rate must be positive"):
            RetrainSettings(learning_rate=rate)
    with pytest.raises(UserError, match=r"distillation must be in \[0, 1\], but got 1.5; it is a share of the loss"):
        RetrainSettings(distillation=1.5)
    with pytest.raises(UserError, match="momentum and label_smoothing must be in"):
        RetrainSettings(momentum=1.0)
    with pytest.raises(UserError, match="temperature positive"):
        RetrainSettings(temperature=0.0)


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
