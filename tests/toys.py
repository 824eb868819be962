"""Small networks that carry their own right answers, worked out by hand beside the layers."""

import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import torch
from prunegym.pruning.groups import ChannelGroup
from prunegym.pruning.plan import PruningPlan
from torch import Tensor, nn


class ToyConv(nn.Module):
    """Two convolutions, a flatten and two linear layers; takes (N, 2, 8, 8)."""

    params = (4 * 2 * 9 + 4) + (6 * 4 * 9 + 6) + (8 * 24 + 8) + (3 * 8 + 3)
    macs = 64 * 4 * 2 * 9 + 4 * 6 * 4 * 9 + 8 * 24 + 3 * 8
    widths: ClassVar[dict[str, int]] = {"conv1": 4, "conv2": 6, "fc1": 8}
    readers: ClassVar[dict[str, dict[str, int]]] = {"conv1": {"conv2": 1}, "conv2": {"fc1": 4}, "fc1": {"fc2": 1}}
    shape = (2, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, 3, padding=1)  # -> (N, 4, 8, 8)
        self.pool = nn.MaxPool2d(2)  # -> (N, 4, 4, 4)
        self.conv2 = nn.Conv2d(4, 6, 3)  # -> (N, 6, 2, 2)
        self.relu = nn.ReLU()
        self.fc1 = nn.Linear(24, 8)
        self.fc2 = nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.pool(self.relu(self.conv1(images)))
        maps = self.relu(self.conv2(maps))
        return self.fc2(self.relu(self.fc1(maps.flatten(1))))


class ToyTurned(ToyConv):
    """ToyConv with positions before channels behind the flatten."""

    def forward(self, images: Tensor) -> Tensor:
        maps = self.relu(self.conv2(self.pool(self.relu(self.conv1(images)))))
        return self.fc2(self.relu(self.fc1(maps.permute(0, 2, 3, 1).flatten(1))))


class ToyMLP(nn.Module):
    """Three linear layers; takes (N, 5)."""

    params = (6 * 5 + 6) + (4 * 6 + 4) + (3 * 4 + 3)
    macs = 6 * 5 + 4 * 6 + 3 * 4
    widths: ClassVar[dict[str, int]] = {"fc1": 6, "fc2": 4}
    readers: ClassVar[dict[str, dict[str, int]]] = {"fc1": {"fc2": 1}, "fc2": {"fc3": 1}}
    shape = (5,)

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(5, 6)
        self.fc2 = nn.Linear(6, 4)
        self.fc3 = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(torch.relu(self.fc2(torch.relu(self.fc1(x)))))


class ToyResidual(nn.Module):
    """A residual sum (its group has two producers and two ReLUs) and a strided 1x1 reader; takes (N, 3, 6, 6)."""

    params = (6 * 3 * 9 + 12) + (5 * 6 * 9 + 10) + (6 * 5 * 9 + 12) + (8 * 6 + 16) + (3 * 8 + 3)
    macs = 36 * (6 * 3 * 9 + 5 * 6 * 9 + 6 * 5 * 9) + 9 * 8 * 6 + 3 * 8
    widths: ClassVar[dict[str, int]] = {"stem": 6, "conv1": 5, "down": 8}
    readers: ClassVar[dict[str, dict[str, int]]] = {
        "stem": {"conv1": 1, "down": 1},
        "conv1": {"conv2": 1},
        "down": {"fc": 1},
    }
    shape = (3, 6, 6)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.stem_bn = nn.BatchNorm2d(6)
        self.conv1 = nn.Conv2d(6, 5, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(5)
        self.conv2 = nn.Conv2d(5, 6, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(6)
        self.down = nn.Conv2d(6, 8, 1, stride=2, bias=False)  # -> (N, 8, 3, 3)
        self.down_bn = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        first = torch.relu(self.stem_bn(self.stem(images)))
        inner = torch.relu(self.bn1(self.conv1(first)))
        summed = torch.relu(self.bn2(self.conv2(inner)) + first)
        last = torch.relu(self.down_bn(self.down(summed)))
        return self.fc(last.mean((2, 3)))


class Wired(nn.Module):
    """Layers by name, and a function that wires them."""

    def __init__(self, run: Callable[[Any, Tensor], Any], **layers: Any) -> None:
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


TOYS: list[Callable[[], Any]] = [ToyConv, ToyMLP, ToyResidual]


def tiny_task(*, reward: int = 200, updates: int = 30) -> str:
    """Return the beginning of a configuration whose network is trained in a moment, on `reward` reward images."""
    return f"""
name: tiny
threads: 1
task:
  network: lenet_small
  data: digits
  splits: {{reward: {reward}, selection: 100}}
  training: {{updates: {updates}, batch_size: 64, learning_rate: 0.05, schedule: one_cycle}}
"""


def benchmark(name: str) -> ModuleType:
    """Import `benchmarks/<name>.py`, which is no part of the package."""
    path = Path(__file__).resolve().parents[1] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses, and other benchmarks, look up the module
    spec.loader.exec_module(module)
    return module


def make(toy: Callable[[], Any], seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """Build a toy with random weights and random batch-norm statistics, in evaluation mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = toy()
    return randomise_norms(network, seed).to(dtype).eval()


def randomise_norms(network: Any, seed: int = 0) -> Any:
    """Give every batch norm random statistics and a random affine part: the defaults hide a missing cut."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.5, generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.normal_(0, 0.3, generator=generator)
    return network


def images(shape: Sequence[int], n: int = 4, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Draw (n, *shape) inputs."""
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def labelled(
    network: Any, n: int = 12, batch: int = 5, seed: int = 0, dtype: torch.dtype = torch.float32
) -> list[tuple[Tensor, Tensor]]:
    """Draw n labelled inputs for a toy with three classes, in batches."""
    inputs = images(network.shape, n, seed, dtype)
    labels = torch.randint(0, 3, (n,), generator=torch.Generator().manual_seed(seed))
    return list(zip(inputs.split(batch), labels.split(batch), strict=True))


def random_plan(groups: Sequence[ChannelGroup], seed: int) -> PruningPlan:
    """Keep a random set of at least one channel of each group; at least one channel leaves somewhere."""
    rng = np.random.default_rng(seed)
    keep = {}
    for place, group in enumerate(groups):
        count = int(rng.integers(1, group.width + (place > 0)))
        keep[group.name] = rng.permutation(group.width)[:count].tolist()
    return PruningPlan(keep)


def masked_output(
    network: nn.Module, readers: Mapping[str, Mapping[str, int]], plan: Mapping[str, Sequence[int]], x: Tensor
) -> Tensor:
    """Run the whole network while the removed channels are zeroed at every layer that reads them.

    Args:
        network: Full-size network.
        readers: By hand: group name -> reading layer -> input features per channel.
        plan: Channels that stay.
        x: Inputs.
    """
    factors: dict[str, Tensor] = {}
    for group, layers in readers.items():
        for name, per_channel in layers.items():
            layer: Any = network.get_submodule(name)
            linear = isinstance(layer, nn.Linear)
            factor = torch.zeros(layer.in_features if linear else layer.in_channels, dtype=x.dtype)
            for channel in plan[group]:
                factor[channel * per_channel : (channel + 1) * per_channel] = 1.0
            factors[name] = factor if linear else factor[:, None, None]
    handles = [
        network.get_submodule(name).register_forward_pre_hook(lambda _m, args, factor=factor: (args[0] * factor,))
        for name, factor in factors.items()
    ]
    try:
        with torch.no_grad():
            return network(x)
    finally:
        for handle in handles:
            handle.remove()
