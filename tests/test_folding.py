"""Batch norm folded into the layer before it: the same outputs, or no folding at all."""

from collections.abc import Callable

import pytest
import torch
from prunegym.pruning import PruningTask, RepairSettings, Trimmer, find_groups
from prunegym.pruning.folding import foldable, folded
from prunegym.pruning.networks import build_network
from prunegym.pruning.plan import PruningPlan
from prunegym.pruning.surgery import apply_plan
from torch import Tensor, nn


def is_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def settled(network: nn.Module) -> nn.Module:
    """Give every batch norm statistics and weights of its own, in float64 and evaluation mode."""
    torch.manual_seed(1)
    for module in network.modules():
        if is_norm(module):
            for values in (module.running_mean, module.bias):
                values.data = torch.randn_like(values)
            for values in (module.running_var, module.weight):
                values.data = torch.rand_like(values) + 0.5
    return network.double().eval()


class Small(nn.Module):
    """A convolution with a batch norm behind it; what else reads the convolution is up to `more`."""

    def __init__(self, more: str = "") -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 5)
        self.last = nn.BatchNorm1d(5)
        self.gate = nn.Parameter(torch.zeros(1))
        self.more = more

    def forward(self, images: Tensor) -> Tensor:
        maps = self.conv(images)
        if self.more == "changed in place":
            maps.relu_()
        out = self.norm(maps).relu()
        if self.more == "sum":
            out = out + maps
        if self.more == "closed gate":
            out = out + self.gate * maps
        if self.more == "second norm":
            out = out + self.second(maps)
        if self.more == "called twice":
            out = out + self.norm(self.conv(images.flip(3)))
        if self.more == "norm twice":
            out = self.norm(out)
        if self.more == "looks at its norm":
            out = out * self.norm.eps
        logits = self.fc(out.mean((2, 3)))
        return self.last(logits) if self.more == "linear" else logits


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {  # name -> make, image size, norms
    "resnet20": (lambda: build_network("cifar_resnet20", classes=10), 32, 21),
    "vgg11_bn": (lambda: build_network("vgg11_bn", classes=10), 32, 8),
    "mobilenet_v2": (lambda: build_network("mobilenet_v2", classes=10), 32, 52),
    "convolution and linear": (lambda: Small("linear"), 8, 2),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_folded_network_computes_the_same_without_its_norms(name: str) -> None:
    make, size, norms = NETWORKS[name]
    network = settled(make())
    images = torch.randn(2, 3, size, size, dtype=torch.float64)
    with torch.no_grad():
        expected = network(images)
        pairs = foldable(network, images[:1])
        smaller = folded(network, pairs)
        got = smaller(images)
        again = network(images)
    assert len(pairs) == norms
    assert sum(map(is_norm, network.modules())) - sum(map(is_norm, smaller.modules())) == norms
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(expected, again)  # it is as it was


@pytest.mark.parametrize(
    "more",
    [
        "sum",
        "closed gate",
        "second norm",
        "called twice",
        "norm twice",
        "changed in place",
        "looks at its norm",
    ],
)
def test_a_layer_that_something_else_reads_is_not_folded(more: str) -> None:
    network = Small(more).eval()  # its norms are still the identity: one run with them would show no difference
    assert foldable(network, torch.randn(1, 3, 8, 8)) == ()


class Same(nn.Conv2d):
    """A convolution of a class of its own."""


def hooked() -> nn.Module:
    network = Small()
    network.norm.register_forward_hook(lambda module, given, output: None)
    return network


def own_class() -> nn.Module:
    network = Small()
    network.conv = Same(3, 4, 3, padding=1, bias=False)
    return network


def parametrised() -> nn.Module:
    network = Small()
    nn.utils.parametrizations.weight_norm(network.conv)
    return network


def without_weights() -> nn.Module:
    network = Small("linear")
    network.norm = nn.BatchNorm2d(4, affine=False)
    network.last = nn.BatchNorm1d(5, affine=False)
    return network


def without_statistics() -> nn.Module:
    network = Small()
    network.norm = nn.BatchNorm2d(4, track_running_stats=False)
    return network


class Positions(nn.Module):
    """A linear layer over positions, and a norm of the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc, self.norm = nn.Conv2d(3, 4, 1), nn.Linear(64, 7), nn.BatchNorm1d(4)

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(self.fc(self.conv(images).flatten(2))).mean(2)


@pytest.mark.parametrize("make", [hooked, own_class, parametrised, without_weights, without_statistics, Positions])
def test_what_is_not_plain_is_not_folded(make: Callable[[], nn.Module]) -> None:
    assert foldable(make(), torch.randn(1, 3, 8, 8)) == ()


def test_a_frozen_network_in_training_mode_comes_back_as_it_was() -> None:
    network = Small("linear").requires_grad_(False).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert len(foldable(network, torch.randn(1, 3, 8, 8))) == 2
    assert network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert all(torch.equal(network.state_dict()[name], value) for name, value in before.items())


def test_a_trimmer_folds_in_bfloat16_only() -> None:
    network = build_network("cifar_resnet20", classes=10, seed=0)
    data = torch.randn(40, 3, 32, 32), torch.arange(40) % 10
    task = PruningTask(network, train=data, reward=data, selection=data, test=data)
    scores, norms = {}, {}
    for precision in ("float32", "bfloat16"):
        trimmer = Trimmer(task, RepairSettings(precision=precision))
        read = trimmer._read_only(network)
        norms[precision] = sum(map(is_norm, read.modules()))
        scores[precision] = trimmer.score(network)
    assert norms == {"float32": 21, "bfloat16": 0}
    assert scores["bfloat16"].loss == pytest.approx(scores["float32"].loss, rel=0.02)


def test_pairs_of_the_whole_network_hold_for_what_is_left_of_it() -> None:
    network = settled(build_network("cifar_resnet20", classes=10))
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    groups = find_groups(network, images[:1])
    plan = PruningPlan({group.name: tuple(range(0, group.width, 2)) for group in groups})
    smaller = apply_plan(network, groups, plan)
    with torch.no_grad():
        got = folded(smaller, foldable(network, images[:1]))(images)
        torch.testing.assert_close(got, smaller(images), rtol=1e-9, atol=1e-9)
