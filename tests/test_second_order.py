"""Curvature against autograd one example at a time, and the surgeon's correction against a constrained minimum."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from prunegym.pruning.errors import UserError
from prunegym.pruning.grouping import find_groups
from prunegym.pruning.second_order import (
    brain_damage,
    brain_surgeon,
    diagonal_fisher,
    outgoing_fisher,
)
from torch import Tensor, nn
from toys import ToyConv, ToyMLP, ToyResidual, labelled, make

DOUBLE = torch.float64


def gradients_one_by_one(network: nn.Module, name: str, batches: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return (N, …) the gradient of each example's own loss."""
    parameter = dict(network.named_parameters())[name]
    found = []
    for inputs, labels in batches:
        for image, label in zip(inputs, labels, strict=True):
            loss = F.cross_entropy(network(image[None]), label[None])
            found.append(torch.autograd.grad(loss, parameter)[0])
    return torch.stack(found)


@pytest.mark.parametrize(
    ("toy", "layers"),
    [(ToyMLP, ["fc1", "fc3"]), (ToyConv, ["conv1", "conv2", "fc1"]), (ToyResidual, ["conv1", "bn1", "fc"])],
)
def test_diagonal_is_the_mean_square_of_single_gradients(toy: type, layers: list[str]) -> None:
    network = make(toy, dtype=DOUBLE)
    batches = labelled(network, 40, 35, dtype=DOUBLE)  # more than are in memory at once, and a short batch
    network.train()
    fisher = diagonal_fisher(network, layers, batches)
    assert network.training
    network.eval()
    expected = {name for name, _ in network.named_parameters() if name.rpartition(".")[0] in layers}
    assert set(fisher) == expected
    for name, value in fisher.items():
        single = gradients_one_by_one(network, name, batches)
        torch.testing.assert_close(value, single.square().mean(0), rtol=1e-9, atol=1e-14)
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize(("toy", "name"), [(ToyMLP, "fc2"), (ToyConv, "conv2"), (ToyResidual, "conv1")])
def test_damage_counts_all_weights_that_leave_with_a_channel(toy: type, name: str) -> None:
    network = make(toy, dtype=DOUBLE)
    batches = labelled(network, 20, 8, dtype=DOUBLE)
    group = next(group for group in find_groups(network, batches[0][0]) if group.name == name)
    # By hand: dimension 0 of what produces the channel, dimension 1 of what reads it.
    leaving = {
        ToyMLP: {"fc2.weight": 0, "fc2.bias": 0, "fc3.weight": 1},
        ToyConv: {"conv2.weight": 0, "conv2.bias": 0, "fc1.weight": 1},
        ToyResidual: {"conv1.weight": 0, "bn1.weight": 0, "bn1.bias": 0, "conv2.weight": 1},
    }[toy]
    expected = np.zeros(group.width)
    for tensor, dim in leaving.items():
        weight = dict(network.named_parameters())[tensor].detach()
        each = gradients_one_by_one(network, tensor, batches).square().mean(0) * weight.square() / 2
        each = each.movedim(dim, 0)
        if (toy, tensor) == (ToyConv, "fc1.weight"):
            each = each.unflatten(0, (6, 4))  # four positions a channel behind the flatten
        expected += each.reshape(group.width, -1).sum(1).numpy()
    np.testing.assert_allclose(brain_damage(network, group, batches), expected, rtol=1e-9)


def test_outgoing_fisher_is_the_mean_outer_product() -> None:
    network = make(ToyMLP, dtype=DOUBLE)
    batches = labelled(network, 30, 12, dtype=DOUBLE)
    rows = gradients_one_by_one(network, "fc2.weight", batches).transpose(1, 2).flatten(1)  # (N, in · out)
    torch.testing.assert_close(outgoing_fisher(network, "fc2", batches), rows.T @ rows / 30, rtol=1e-9, atol=1e-14)
    assert not network.fc2._forward_hooks
    assert all(parameter.grad is None for parameter in network.parameters())


def curvature(neurons: int, outputs: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(3 * neurons * outputs, neurons * outputs, generator=generator, dtype=DOUBLE)
    rows *= torch.rand(neurons * outputs, generator=generator, dtype=DOUBLE) + 0.1
    weight = torch.randn(neurons, outputs, generator=generator, dtype=DOUBLE)
    return weight, rows.T @ rows / len(rows)


def constrained_minimum(weight: Tensor, hessian: np.ndarray, gone: list[int]) -> tuple[np.ndarray, float]:
    """Minimise ½ (v − w)ᵀ H (v − w) with v = 0 for the neurons that left, by its stationary equations in numpy."""
    outputs = weight.shape[1]
    start = weight.numpy().ravel()
    fixed = np.concatenate([np.arange(outputs) + neuron * outputs for neuron in gone])
    selector = np.eye(len(start))[fixed]
    equations = np.block([[hessian, selector.T], [selector, np.zeros((len(fixed), len(fixed)))]])
    change = np.linalg.solve(equations, np.concatenate([np.zeros(len(start)), -start[fixed]]))[: len(start)]
    return (start + change).reshape(weight.shape), float(change @ hessian @ change / 2)


@pytest.mark.parametrize(("neurons", "outputs"), [(7, 3), (12, 1), (5, 4)])
def test_each_step_is_the_best_single_removal_and_all_weights_are_optimal(neurons: int, outputs: int) -> None:
    weight, fisher = curvature(neurons, outputs)
    damping = 0.05
    hessian = (fisher + damping * fisher.diagonal().mean() * torch.eye(len(fisher), dtype=DOUBLE)).numpy()
    gone: list[int] = []
    before = 0.0
    kept = fisher.clone()
    for step in brain_surgeon(weight, fisher, steps=neurons - 1, damping=damping):
        growth = {
            neuron: constrained_minimum(weight, hessian, [*gone, neuron])[1] - before
            for neuron in range(neurons)
            if neuron not in gone
        }
        assert step.neuron == min(growth, key=lambda neuron: growth[neuron])
        gone.append(step.neuron)
        best, total = constrained_minimum(weight, hessian, gone)
        np.testing.assert_allclose(step.saliency, total - before, rtol=1e-7)
        np.testing.assert_allclose(step.weight.numpy(), best, atol=1e-8)
        assert (step.weight[gone] == 0).all()
        before = total
    assert len(gone) == neurons - 1
    assert torch.equal(fisher, kept)


def test_all_can_leave_and_the_lowest_of_equals_first() -> None:
    weight, fisher = torch.ones(4, 2, dtype=DOUBLE), torch.eye(8, dtype=DOUBLE)
    steps = list(brain_surgeon(weight, fisher, steps=4))
    assert [step.neuron for step in steps] == [0, 1, 2, 3]
    np.testing.assert_allclose([step.saliency for step in steps], 1.001)  # ½ · 2 · (1 + damping)
    assert (steps[-1].weight == 0).all()
    assert (weight == 1).all()


def test_the_correction_helps_a_network() -> None:
    network = make(ToyMLP, dtype=DOUBLE)
    batches = labelled(network, 200, 50, dtype=DOUBLE)
    fisher = outgoing_fisher(network, "fc2", batches)
    (step,) = itertools.islice(brain_surgeon(network.fc2.weight.T, fisher, steps=1), 1)
    inputs = torch.cat([x for x, _ in batches])
    before = network(inputs).softmax(1).detach()
    shifts = []
    for weight in (step.weight.T, network.fc2.weight.detach().clone().index_fill(1, torch.tensor([step.neuron]), 0.0)):
        kept = network.fc2.weight.detach().clone()
        network.fc2.weight.data.copy_(weight)
        shifts.append(float((network(inputs).softmax(1).detach() - before).square().mean()))
        network.fc2.weight.data.copy_(kept)
    assert shifts[0] < shifts[1]


def test_errors() -> None:
    network = make(ToyConv)
    batches = labelled(network)
    with pytest.raises(UserError, match="layer must be one of the network's, but got 'conv9'; see"):
        diagonal_fisher(network, ["conv9"], batches)
    with pytest.raises(UserError, match="needs at least one example, but none came"):
        diagonal_fisher(network, ["fc1"], [])
    with pytest.raises(UserError, match="needs at least one example, but none came"):
        outgoing_fisher(network, "fc1", [])
    with pytest.raises(UserError, match=r"must be an nn.Linear of the network, but 'conv1' is Conv2d"):
        outgoing_fisher(network, "conv1", batches)
    everywhere = nn.Sequential(nn.Linear(5, 4), nn.Flatten(), nn.Linear(8, 3))
    with pytest.raises(UserError, match=r"must run once on \(N, 5\), but it ran on \[\(6, 2, 5\)\]; choose"):
        outgoing_fisher(everywhere, "0", [(torch.zeros(6, 2, 5), torch.zeros(6, dtype=torch.int64))])
    weight, fisher = curvature(3, 2)
    with pytest.raises(UserError, match=r"steps must be in \[0, 3\], but got steps=4"):
        brain_surgeon(weight, fisher, steps=4)
    with pytest.raises(UserError, match="damping must be above 0, but got damping=0"):
        brain_surgeon(weight, fisher, steps=1, damping=0.0)
    with pytest.raises(UserError, match=r"fisher must be \(6, 6\) for weights 3 x 2"):
        brain_surgeon(weight, fisher[:4, :4], steps=1)
