"""Merging without data: by hand, exact for scaled duplicates wherever the channels pass, better than deleting."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from prunegym.pruning.compensation import compensate
from prunegym.pruning.errors import UserError
from prunegym.pruning.grouping import find_groups
from prunegym.pruning.plan import PruningPlan
from prunegym.pruning.statistics import measure
from prunegym.pruning.surgery import apply_plan
from torch import Tensor, nn
from toys import TOYS, ToyConv, ToyMLP, ToyResidual, images, labelled, make

DOUBLE = torch.float64
Plan = Mapping[str, Sequence[int]]


def merged(network: Any, plan: Plan, x: Tensor, method: str = "merge") -> Any:
    groups = find_groups(network, x[:1])
    smaller = apply_plan(network, groups, PruningPlan(plan), verify=x)
    compensate(smaller, network, groups, PruningPlan(plan), None, method)
    return smaller


def without(network: Any, group: str, channel: int) -> dict[str, list[int]]:
    x = images(network.shape, dtype=next(network.parameters()).dtype)
    width = next(g.width for g in find_groups(network, x) if g.name == group)
    return {group: [kept for kept in range(width) if kept != channel]}


def scale_channel(tensors: Sequence[Any], target: int, source: int, factor: float) -> None:
    with torch.no_grad():
        for tensor in tensors:
            tensor[target] = factor * tensor[source]


def fill(layer: Any, **values: Any) -> None:
    with torch.no_grad():
        for name, value in values.items():
            tensor = getattr(layer, name)
            tensor.copy_(torch.tensor(value, dtype=tensor.dtype).reshape(tensor.shape))


def test_linear_by_hand() -> None:
    network = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1)).double()
    fill(network[0], weight=[[3, 4], [1, 0], [6, 8], [0, -2]], bias=[0.5, 0.2, 1.0, 0.1])
    fill(network[2], weight=[[1, 10, 100, 1000]], bias=[7])
    smaller = merged(network, {"0": [0, 1]}, images((2,), dtype=DOUBLE))
    # channel 2 is twice channel 0; channel 3 points away from both and stays deleted
    torch.testing.assert_close(smaller[2].weight, torch.tensor([[1.0 + 2 * 100, 10.0]], dtype=DOUBLE))
    assert smaller[2].bias.item() == 7.0


def test_ratio_is_that_of_the_norms_and_the_bias_decides_between_equals() -> None:
    network = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)).double()
    fill(network[0], weight=[[1, 1], [2, 2], [0, 5]], bias=[0.9, 0.2, 0.5])
    fill(network[2], weight=[[1, 10, 100]], bias=[0])
    smaller = merged(network, {"0": [0, 1]}, images((2,), dtype=DOUBLE))
    torch.testing.assert_close(smaller[2].weight, torch.tensor([[1.0, 10 + 100 * 5 / 8**0.5]], dtype=DOUBLE))


def test_without_an_activation_the_constant_is_exact() -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0, 2, 0]]))  # 3 is twice 1
    x = images((3,), dtype=DOUBLE)
    torch.testing.assert_close(merged(network, {"0": [0, 1, 2]}, x)(x), network(x))


def norm_network() -> Any:
    network = nn.Sequential(nn.Conv2d(2, 3, 3, bias=False), nn.BatchNorm2d(3, eps=0), nn.ReLU(), nn.Conv2d(3, 2, 1))
    with torch.no_grad():
        network[0].weight[2] = network[0].weight[0]
    return network.double().eval()


def test_batch_norm_is_folded_in() -> None:
    network = norm_network()
    scale_channel([network[0].weight], 2, 0, 4.0)
    # f = w γ/σ x + β − γ μ/σ: channel 0 has (w, 1), channel 2 has (4 w · 3/2 = 6 w, −3 + 3·6/2 = 6)
    fill(network[1], weight=[2, 1, 3], bias=[2, 0, -3], running_mean=[1, 0, -6], running_var=[4, 1, 4])
    x = images((2, 5, 5), dtype=DOUBLE)
    smaller = merged(network, {"0": [0, 1]}, x)
    old, new = network[3].weight.flatten(1), smaller[3].weight.flatten(1)  # (out, in)
    torch.testing.assert_close(new[:, 0], old[:, 0] + 6 * old[:, 2])
    torch.testing.assert_close(new[:, 1], old[:, 1])
    torch.testing.assert_close(smaller(x), network(x), rtol=1e-10, atol=1e-10)


def test_constant_is_the_difference_of_the_means_that_batch_norm_promises() -> None:
    network = norm_network()
    fill(network[1], weight=[1.5, 1, 1.5], bias=[0.2, 0, 0.9], running_mean=[0.3, 0, 0.3], running_var=[1, 1, 1])
    smaller = merged(network, {"0": [0, 1]}, images((2, 5, 5), dtype=DOUBLE))
    z = (np.arange(200_000) + 0.5) / 200_000 * 20 - 10
    density = np.exp(-(z**2) / 2) / np.exp(-(z**2) / 2).sum()
    first, third = ((np.maximum(0, mean + 1.5 * z) * density).sum() for mean in (0.2, 0.9))
    old = network[3].weight.flatten(1)
    torch.testing.assert_close(smaller[3].bias, network[3].bias + (third - first) * old[:, 2], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(smaller[3].weight.flatten(1)[:, 0], old[:, 0] + old[:, 2])


class Depthwise(nn.Module):
    """Pointwise, depthwise, pointwise convolutions as in MobileNet."""

    shape = (3, 6, 6)

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Conv2d(3, 5, 1, bias=False)
        self.up_bn = nn.BatchNorm2d(5)
        self.deep = nn.Conv2d(5, 5, 3, padding=1, groups=5, bias=False)
        self.deep_bn = nn.BatchNorm2d(5)
        self.down = nn.Conv2d(5, 4, 1)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.deep_bn(self.deep(torch.relu(self.up_bn(self.up(x))))))
        return self.fc(torch.relu(self.down(x)).mean((2, 3)))


class Dense(nn.Module):
    """Concatenation, and batch norms in front of the layers that read, as in DenseNet."""

    shape = (3, 6, 6)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 5, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(5)
        self.conv1 = nn.Conv2d(5, 4, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(9)
        self.conv2 = nn.Conv2d(9, 4, 3, padding=1)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        first = self.stem(x)
        second = self.conv1(torch.relu(self.norm1(first)))
        both = torch.cat([first, second], 1)
        return self.fc(torch.relu(self.conv2(torch.relu(self.norm2(both)))).mean((2, 3)))


def forget_offsets(*norms: Any) -> None:
    """Make batch norms pure factors, so that scaling their weight scales their output."""
    for norm in norms:
        torch.nn.init.zeros_(norm.bias)
        norm.running_mean.zero_()
        norm.running_var.fill_(1.0)


CASES: dict[str, tuple[Callable[[], Any], str, Callable[[Any], list[Tensor]]]] = {
    "linear": (ToyMLP, "fc1", lambda n: [n.fc1.weight, n.fc1.bias]),
    "pool": (ToyConv, "conv1", lambda n: [n.conv1.weight, n.conv1.bias]),
    "flatten": (ToyConv, "conv2", lambda n: [n.conv2.weight, n.conv2.bias]),
    "norm": (ToyResidual, "conv1", lambda n: [n.bn1.weight, n.bn1.bias]),
    "sum": (ToyResidual, "stem", lambda n: [n.stem_bn.weight, n.stem_bn.bias, n.bn2.weight, n.bn2.bias]),
    "depthwise": (Depthwise, "up", lambda n: [n.up_bn.weight, n.up_bn.bias, n.deep_bn.bias, n.deep_bn.running_mean]),
    "concatenation": (Dense, "conv1", lambda n: [n.conv1.weight]),
    "pre-activation": (Dense, "stem", lambda n: [n.stem.weight, n.stem.bias]),
}


def duplicate(name: str, dtype: torch.dtype, factor: float) -> tuple[Any, dict[str, list[int]]]:
    """Build a case: channel 2 of one group computes `factor` times what channel 1 does."""
    toy, group, scaled = CASES[name]
    network = make(toy, 1, dtype)  # with this seed no case is dead behind its ReLU
    if name == "pre-activation":
        forget_offsets(network.norm1, network.norm2)
    if name == "concatenation":
        forget_offsets(network.norm2)
    parts: dict[str, list[str]] = {
        "norm": ["conv1", "bn1"],
        "sum": ["stem", "stem_bn", "conv2", "bn2"],
        "depthwise": ["up", "up_bn", "deep", "deep_bn"],
        "pre-activation": ["stem", "norm1"],
        "concatenation": ["conv1"],
    }
    for part in parts.get(name, []):
        module = network.get_submodule(part)
        scale_channel([t for t in (*module.parameters(), *module.buffers()) if t.dim()], 2, 1, 1.0)
    offset = {"pre-activation": 0, "concatenation": 5}
    if name in offset:
        norm2 = [t for t in (*network.norm2.parameters(), *network.norm2.buffers()) if t.dim()]
        scale_channel(norm2, offset[name] + 2, offset[name] + 1, 1.0)
    scale_channel(scaled(network), 2, 1, factor)
    return network, without(network, group, 2)


@pytest.mark.parametrize("method", ["merge", "data_free"])
@pytest.mark.parametrize("factor", [1.0, 2.5])
@pytest.mark.parametrize("name", CASES)
def test_scaled_duplicate_leaves_without_a_trace(name: str, factor: float, method: str) -> None:
    network, plan = duplicate(name, DOUBLE, factor)
    x = images(network.shape, 16, dtype=DOUBLE)
    assert float((merged(network, plan, x, "delete")(x) - network(x)).detach().abs().max()) > 1e-3
    torch.testing.assert_close(merged(network, plan, x, method)(x), network(x), rtol=1e-9, atol=1e-9)
    single = network.float()
    x = x.float()
    torch.testing.assert_close(merged(single, plan, x, method)(x), single(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", CASES)
def test_near_duplicate_loses_less_than_deleting(name: str, seed: int) -> None:
    network, plan = duplicate(name, DOUBLE, 1.5)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in network.parameters():
            tensor += 0.05 * tensor.std(correction=0) * torch.randn(tensor.shape, generator=generator, dtype=DOUBLE)
    x = images(network.shape, 32, seed, DOUBLE)
    deleted, close = (
        float((merged(network, plan, x, m)(x) - network(x)).detach().square().mean()) for m in ("delete", "merge")
    )
    assert close < 0.5 * deleted


@pytest.mark.parametrize("toy", TOYS)
def test_statistics_are_not_read(toy: Callable[[], Any]) -> None:
    network = make(toy)
    batches = labelled(network)
    groups = find_groups(network, batches[0][0])
    plan = PruningPlan({group.name: range(group.width // 2) for group in groups})
    states = []
    for statistics in (None, measure(network, groups, batches), measure(network, groups, batches, grams=False)):
        smaller = apply_plan(network, groups, plan)
        compensate(smaller, network, groups, plan, statistics, "merge")
        states.append(smaller.state_dict())
    for key, value in states[0].items():
        assert all(torch.equal(value, state[key]) for state in states), key
    smaller = apply_plan(network, groups, plan)
    with pytest.raises(UserError, match="'fold_mean' needs second moments"):
        compensate(smaller, network, groups, plan, None, "fold_mean")


def test_constant_channel_goes_into_the_bias() -> None:
    network = make(ToyMLP, 0, DOUBLE)
    with torch.no_grad():
        network.fc1.weight[2], network.fc1.bias[2] = 0.0, 0.7
    x = images((5,), 16, dtype=DOUBLE)
    torch.testing.assert_close(merged(network, {"fc1": [0, 1, 3, 4, 5]}, x)(x), network(x))
