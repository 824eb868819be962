"""Every structure of convolutional networks: groups, cuts and second rounds against masks written by hand."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch_pruning
from prunegym.pruning import grouping
from prunegym.pruning.artifact import load_pruned, save_pruned
from prunegym.pruning.groups import shrink_groups
from prunegym.pruning.labels import Labels, compact, varies
from prunegym.pruning.plan import PruningPlan
from prunegym.pruning.surgery import apply_plan
from torch import Tensor, nn
from toys import Wired, images

Owners = Mapping[str, Sequence[tuple[str, int]]]  # reading layer -> group and unit behind each input feature
IMAGE = (3, 8, 8)


@dataclass(frozen=True)
class Case:
    """A network with its right answers: widths of its groups, and who owns what each layer reads."""

    network: Callable[[], nn.Module]
    widths: Mapping[str, int]
    owners: Owners
    shape: tuple[int, ...] = IMAGE


def all_of(group: str, n: int, times: int = 1) -> list[tuple[str, int]]:
    """Return one input feature per unit, or `times` in a row (a flatten)."""
    return [(group, unit) for unit in range(n) for _ in range(times)]


def chain(norm: Callable[[], nn.Module], widths: Mapping[str, int], unit: int = 1) -> Case:
    """A convolution of six channels, something behind it, a convolution and a linear layer."""
    owners = {"b": [("a", channel // unit) for channel in range(6)], "fc": all_of("b", 5)}

    def run(net: Any, x: Tensor) -> Tensor:
        return net.fc(torch.relu(net.b(torch.relu(net.norm(net.a(x))))).mean((2, 3)))

    def network() -> nn.Module:
        return Wired(run, a=nn.Conv2d(3, 6, 3), norm=norm(), b=nn.Conv2d(6, 5, 3), fc=nn.Linear(5, 2))

    return Case(network, widths, owners if "a" in widths else {"fc": owners["fc"]})


def between(middle: Callable[[Any, Tensor], Tensor], **layers: Any) -> Callable[[], nn.Module]:
    """Return a builder of: `a`, ReLU, something, `b`, ReLU, mean, `fc`."""

    def run(net: Any, x: Tensor) -> Tensor:
        return net.fc(torch.relu(net.b(middle(net, torch.relu(net.a(x))))).mean((2, 3)))

    return lambda: Wired(run, **{name: build() if callable(build) else build for name, build in layers.items()})


def conv(before: int, after: int, kernel: int = 1, **options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Conv2d(before, after, kernel, **options)


def shuffled(x: Tensor, groups: int) -> Tensor:
    n, channels, h, w = x.shape
    return x.view(n, groups, channels // groups, h, w).transpose(1, 2).reshape(n, channels, h, w)


def decoder(net: Any, x: Tensor) -> Tensor:
    code = torch.relu(net.down2(torch.relu(net.down1(x))))
    return net.out(torch.relu(net.norm(net.up2(torch.relu(net.up1(code))))))


def two_branches(net: Any, x: Tensor) -> Tensor:
    maps = torch.cat([torch.relu(net.a(x)), torch.relu(net.b(x))], 1)  # -> (N, 7, 6, 6)
    return net.out(torch.relu(net.fc(maps.flatten(1))))


def excited(net: Any, maps: Tensor) -> Tensor:
    return maps * torch.sigmoid(net.up(torch.relu(net.down(F.adaptive_avg_pool2d(maps, 1)))))


def gated(net: Any, maps: Tensor) -> Tensor:
    one, other = maps.chunk(2, 1)
    return torch.tanh(one) * torch.sigmoid(other)


def two_ways(net: Any, maps: Tensor) -> Tensor:
    one, other = torch.split(maps, maps.shape[1] // 2, 1)
    return torch.cat([torch.relu(net.left(one)), other], 1)


def halves_by_slices(net: Any, maps: Tensor) -> Tensor:
    half = maps.size(1) // 2
    return torch.cat([torch.relu(net.left(maps[:, :half])), maps[:, half:]], 1)


def windowed(net: Any, maps: Tensor) -> Tensor:
    n, channels, h, w = maps.shape
    windows = maps.view(n, channels, h // 3, 3, w // 3, 3).permute(0, 2, 4, 3, 5, 1).reshape(-1, 9, channels)
    mixed = torch.relu(net.same(windows))  # -> (N * windows, 9, channels)
    mixed = mixed.view(n, h // 3, w // 3, 3, 3, -1).permute(0, 5, 1, 3, 2, 4)
    return mixed.reshape(n, -1, h, w)


def padded_shortcut(net: Any, maps: Tensor) -> Tensor:
    return torch.relu(net.wide(maps)) + F.pad(maps[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))


def last_of_one_dimension(net: Any, x: Tensor) -> Tensor:
    return net.fc(torch.relu(net.b(torch.relu(net.norm(net.a(x))))).flatten(1))


A, B6 = conv(3, 6, 3), conv(6, 5, 3)
MIDDLE = {"b": all_of("a", 6), "fc": all_of("b", 5)}
WIDTHS = {"a": 6, "b": 5}
CASES: dict[str, Case] = {
    "Conv1d": Case(
        lambda: Wired(last_of_one_dimension, a=nn.Conv1d(3, 6, 3), norm=nn.BatchNorm1d(6), b=nn.Conv1d(6, 5, 3),
                      fc=nn.Linear(5 * 4, 2)),
        WIDTHS, {"b": all_of("a", 6), "fc": all_of("b", 5, 4)}, (3, 8),
    ),
    "Conv3d": Case(
        lambda: Wired(last_of_one_dimension, a=nn.Conv3d(3, 6, 3), norm=nn.BatchNorm3d(6), b=nn.Conv3d(6, 5, 3),
                      fc=nn.Linear(5 * 8, 2)),
        WIDTHS, {"b": all_of("a", 6), "fc": all_of("b", 5, 8)}, (3, 6, 6, 6),
    ),
    "ConvTranspose2d": Case(
        lambda: Wired(decoder, down1=nn.Conv2d(3, 6, 3, 2, 1), down2=nn.Conv2d(6, 8, 3, 2, 1),
                      up1=nn.ConvTranspose2d(8, 5, 2, 2), up2=nn.ConvTranspose2d(5, 7, 2, 2),
                      norm=nn.BatchNorm2d(7), out=nn.Conv2d(7, 3, 1)),
        {"down1": 6, "down2": 8, "up1": 5, "up2": 7},
        {"down2": all_of("down1", 6), "up1": all_of("down2", 8), "up2": all_of("up1", 5), "out": all_of("up2", 7)},
    ),
    "ConvTranspose1d": Case(
        lambda: Wired(decoder, down1=nn.Conv1d(3, 6, 3, 2, 1), down2=nn.Conv1d(6, 8, 3, 2, 1),
                      up1=nn.ConvTranspose1d(8, 5, 2, 2), up2=nn.ConvTranspose1d(5, 7, 2, 2),
                      norm=nn.BatchNorm1d(7), out=nn.Conv1d(7, 3, 1)),
        {"down1": 6, "down2": 8, "up1": 5, "up2": 7},
        {"down2": all_of("down1", 6), "up1": all_of("down2", 8), "up2": all_of("up1", 5), "out": all_of("up2", 7)},
        (3, 8),
    ),
    "batch norm without weights": chain(lambda: nn.BatchNorm2d(6, affine=False), WIDTHS),
    "batch norm without running statistics": chain(lambda: nn.BatchNorm2d(6, track_running_stats=False), WIDTHS),
    "batch norm of nothing": chain(lambda: nn.BatchNorm2d(6, affine=False, track_running_stats=False), WIDTHS),
    "PReLU per channel": chain(lambda: nn.PReLU(6), WIDTHS),
    "instance norm": chain(lambda: nn.InstanceNorm2d(6), WIDTHS),
    "instance norm with weights": chain(lambda: nn.InstanceNorm2d(6, affine=True), WIDTHS),
    "group norm: a unit is a norm group": chain(lambda: nn.GroupNorm(3, 6), {"a": 3, "b": 5}, unit=2),
    "group norm without weights": chain(lambda: nn.GroupNorm(2, 6, affine=False), {"a": 2, "b": 5}, unit=3),
    "parameters outside layers": Case(
        between(lambda net, maps: maps * net.gamma + net.beta, a=A, b=B6, fc=lambda: nn.Linear(5, 2),
                gamma=lambda: nn.Parameter(torch.randn(6, 1, 1)), beta=lambda: nn.Parameter(torch.randn(1, 6, 1, 1))),
        WIDTHS, MIDDLE,
    ),
    "a parameter that is viewed": Case(
        between(lambda net, maps: maps * net.gamma.view(1, -1, 1, 1), a=A, b=B6, fc=lambda: nn.Linear(5, 2),
                gamma=lambda: nn.Parameter(torch.randn(6))),
        WIDTHS, MIDDLE,
    ),
    "a parameter with an entry per position": Case(
        between(lambda net, maps: maps + net.place, a=A, b=B6, fc=lambda: nn.Linear(5, 2),
                place=lambda: nn.Parameter(torch.randn(1, 6, 6, 6))),
        WIDTHS, MIDDLE,
    ),
    "one number for all channels": Case(
        between(lambda net, maps: maps * net.scale + net.map, a=A, b=B6, fc=lambda: nn.Linear(5, 2),
                scale=lambda: nn.Parameter(torch.randn(1)), map=lambda: nn.Parameter(torch.randn(1, 1, 6, 6))),
        WIDTHS, MIDDLE,
    ),
    "a module called twice in a row": Case(
        between(lambda net, maps: torch.relu(net.same(torch.relu(net.same(maps)))), a=A, b=B6, same=conv(6, 6),
                fc=lambda: nn.Linear(5, 2)),
        WIDTHS, MIDDLE | {"same": all_of("a", 6)},
    ),
    "a module called on two scales": Case(
        between(lambda net, maps: torch.relu(net.same(maps))[..., ::2, ::2] + net.same(maps[..., ::2, ::2]), a=A,
                same=conv(6, 4), b=conv(4, 5, 3), fc=lambda: nn.Linear(5, 2)),
        {"a": 6, "same": 4, "b": 5}, {"same": all_of("a", 6), "b": all_of("same", 4), "fc": all_of("b", 5)},
    ),
    "chunk: a unit has a channel in each half": Case(
        between(gated, a=conv(3, 12, 3), b=B6, fc=lambda: nn.Linear(5, 2)), WIDTHS, MIDDLE,
    ),
    "gated linear unit": Case(
        between(lambda net, maps: F.glu(maps, 1), a=conv(3, 12, 3), b=B6, fc=lambda: nn.Linear(5, 2)), WIDTHS, MIDDLE,
    ),
    "split by a size taken at run time": Case(
        between(two_ways, a=conv(3, 12, 3), left=conv(6, 4), b=conv(10, 5, 3), fc=lambda: nn.Linear(5, 2)),
        {"a": 6, "left": 4, "b": 5},
        {"left": all_of("a", 6), "b": all_of("left", 4) + all_of("a", 6), "fc": all_of("b", 5)},
    ),
    "slices at half": Case(
        between(halves_by_slices, a=conv(3, 12, 3), left=conv(6, 4), b=conv(10, 5, 3), fc=lambda: nn.Linear(5, 2)),
        {"a": 6, "left": 4, "b": 5},
        {"left": all_of("a", 6), "b": all_of("left", 4) + all_of("a", 6), "fc": all_of("b", 5)},
    ),
    "channel shuffle": Case(
        # (3 groups, 4) -> (4, 3): feature j * 3 + g holds channel g * 4 + j, and all j of a column leave together
        between(lambda net, maps: shuffled(maps, 3), a=conv(3, 12, 3), b=conv(12, 5, 3), fc=lambda: nn.Linear(5, 2)),
        {"a": 4, "b": 5}, {"b": all_of("a", 4, 3), "fc": all_of("b", 5)},
    ),
    "channel shuffle as a module": Case(
        between(lambda net, maps: net.mix(maps), a=conv(3, 12, 3), b=conv(12, 5, 3), mix=lambda: nn.ChannelShuffle(3),
                fc=lambda: nn.Linear(5, 2)),
        {"a": 4, "b": 5}, {"b": all_of("a", 4, 3), "fc": all_of("b", 5)},
    ),
    "pixel shuffle": Case(
        between(lambda net, maps: F.pixel_shuffle(maps, 2), a=conv(3, 24, 3), b=B6, fc=lambda: nn.Linear(5, 2)),
        WIDTHS, MIDDLE,
    ),
    "concatenation, flatten, linear": Case(
        lambda: Wired(two_branches, a=nn.Conv2d(3, 4, 3), b=nn.Conv2d(3, 3, 3), fc=nn.Linear(7 * 36, 6),
                      out=nn.Linear(6, 2)),
        {"a": 4, "b": 3, "fc": 6}, {"fc": all_of("a", 4, 36) + all_of("b", 3, 36), "out": all_of("fc", 6)},
    ),
    "the same channels twice": Case(
        between(lambda net, maps: torch.cat([maps, maps], 1), a=conv(3, 3, 3), b=B6, fc=lambda: nn.Linear(5, 2)),
        {"a": 3, "b": 5}, {"b": all_of("a", 3) * 2, "fc": all_of("b", 5)},
    ),
    "windows, there and back": Case(
        between(windowed, a=A, same=lambda: nn.Linear(6, 6), b=B6, fc=lambda: nn.Linear(5, 2)),
        {"a": 6, "b": 5, "same": 6}, {"same": all_of("a", 6), "b": all_of("same", 6), "fc": all_of("b", 5)},
    ),
    "squeeze and excitation": Case(
        between(excited, a=A, down=conv(6, 4), up=conv(4, 6), b=B6, fc=lambda: nn.Linear(5, 2)),
        {"a": 6, "down": 4, "b": 5}, MIDDLE | {"down": all_of("a", 6), "up": all_of("down", 4)},
    ),
    "depthwise convolution of two maps a channel": Case(
        between(lambda net, maps: net.deep(maps), a=A, deep=conv(6, 12, groups=6), b=conv(12, 5, 3),
                fc=lambda: nn.Linear(5, 2)),
        WIDTHS, {"b": all_of("a", 6, 2), "fc": all_of("b", 5)},
    ),
    "a shortcut padded with channels of zeros": Case(
        # six channels lie behind two of padding: only what `a` produces can leave, there and in `wide`
        between(padded_shortcut, a=lambda: nn.Conv2d(3, 6, 3, padding=1), wide=conv(6, 10, 3, stride=2, padding=1),
                b=conv(10, 5, 3), fc=lambda: nn.Linear(5, 2)),
        WIDTHS,
        {"wide": all_of("a", 6), "fc": all_of("b", 5),
         "b": [("", 0)] * 2 + all_of("a", 6) + [("", 0)] * 2},
    ),
}  # fmt: skip


def built(case: Case) -> Any:
    """Build with random weights and norms, in double precision."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = case.network().double().eval()
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None:
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2.0)
            if isinstance(module, (nn.modules.batchnorm._NormBase, nn.GroupNorm)) and module.weight is not None:
                module.weight.data.uniform_(0.5, 2.0)
                module.bias.data.normal_()
    return network


def masked(network: nn.Module, owners: Owners, plan: Mapping[str, Sequence[int]], x: Tensor) -> Tensor:
    """Run the whole network with what was removed zeroed at each layer that reads it."""
    handles = []
    for name, features in owners.items():
        stays = torch.tensor([not group or unit in plan[group] for group, unit in features], dtype=x.dtype)
        layer = network.get_submodule(name)
        factor = stays if isinstance(layer, nn.Linear) else stays.view(1, -1, *[1] * (x.dim() - 2))
        handles.append(layer.register_forward_pre_hook(lambda _m, args, factor=factor: (args[0] * factor,)))
    try:
        with torch.no_grad():
            return network(x)
    finally:
        for handle in handles:
            handle.remove()


def some(widths: Mapping[str, int], seed: int) -> PruningPlan:
    """Keep a random set of each group; something always leaves."""
    rng = np.random.default_rng(seed)
    return PruningPlan({name: rng.permutation(n)[: rng.integers(1, max(n, 2))].tolist() for name, n in widths.items()})


def close(expected: Tensor, got: Tensor) -> bool:
    return expected.shape == got.shape and float((expected - got).abs().max()) <= 1e-10 * float(expected.abs().max())


@pytest.mark.parametrize("name", CASES)
def test_any_plan_gives_what_the_mask_gives(name: str) -> None:
    case = CASES[name]
    network, x = built(case), images(case.shape, 3, dtype=torch.float64)
    groups = grouping.find_groups(network, x)
    assert {group.name: group.width for group in groups} == dict(case.widths)
    whole = network(x).detach()
    for seed in range(6):
        plan = some(case.widths, seed)
        expected = masked(network, case.owners, plan, x)
        assert not close(whole, expected)
        smaller = apply_plan(network, groups, plan, verify=x)
        assert close(expected, smaller(x).detach())
        assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize("name", CASES)
def test_a_cut_network_is_saved_and_comes_back(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    network, x = built(case), images(case.shape, 3, dtype=torch.float64)
    plan = some(case.widths, 1)
    smaller = apply_plan(network, grouping.find_groups(network, x), plan)
    save_pruned(tmp_path, smaller, plan, example_shape=(1, *case.shape), source={})
    assert torch.equal(load_pruned(tmp_path, network)(x), smaller(x))


@pytest.mark.parametrize("name", CASES)
def test_a_second_round_needs_no_tracing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    network, x = built(case), images(case.shape, 3, dtype=torch.float64)
    groups = grouping.find_groups(network, x)

    def forbidden(*_: Any, **__: Any) -> Any:
        raise AssertionError("traced again")

    for module, function in ((grouping, "survey_groups"), (grouping, "trace_forward"), (grouping, "label_drafts"),
                             (torch_pruning, "DependencyGraph")):  # fmt: skip
        monkeypatch.setattr(module, function, forbidden)
    first = PruningPlan({group.name: list(range(group.width))[-max(1, group.width - 1) :] for group in groups})
    halfway, left = apply_plan(network, groups, first), shrink_groups(groups, first)
    second = some({group.name: group.width for group in left}, 1)
    twice = apply_plan(halfway, left, second, verify=x)
    assert close(masked(network, case.owners, first.then(second), x), twice(x).detach())


def flat_tuple(net: Any, x: Tensor) -> Any:
    maps = torch.relu(net.a(x))
    return net.fc(torch.relu(net.b(maps)).mean((2, 3))), {"second": net.head(maps.mean((2, 3)))}


def recurrent(net: Any, x: Tensor) -> Tensor:
    steps = torch.relu(net.b(torch.relu(net.a(x)))).flatten(2).transpose(1, 2)
    return net.fc(net.rnn(steps)[0].mean(1))


def embedded(net: Any, x: Tensor) -> Tensor:
    pooled = net.a(x).mean((2, 3)) + net.table(torch.zeros(len(x), dtype=torch.long))
    return net.fc(torch.relu(net.b(torch.relu(pooled))))


def attended(net: Any, x: Tensor) -> Tensor:
    tokens = net.a(x).flatten(2).transpose(1, 2)  # -> (N, 36, 6)
    return net.fc(torch.relu(net.b(tokens + net.attention(tokens, tokens, tokens)[0])).mean(1))


def matched(net: Any, x: Tensor) -> Tensor:
    tokens = net.a(x).flatten(2).transpose(1, 2)
    weights = torch.softmax(net.query(tokens) @ net.key(tokens).transpose(1, 2), -1)
    return net.fc(torch.relu(net.b(tokens + net.out(weights @ net.value(tokens)))).mean(1))


def hard_pieces(net: Any, maps: Tensor) -> Tensor:
    one, other = torch.split(maps, [4, 8], 1)
    return torch.cat([one, net.left(other)], 1)


def by_channel_mean(net: Any, maps: Tensor) -> Tensor:
    return maps - maps.mean(1, keepdim=True)


def weight_function(net: Any, maps: Tensor) -> Tensor:
    weight = net.left.weight - net.left.weight.mean((1, 2, 3), keepdim=True)
    return F.conv2d(maps, weight, net.left.bias)


REFUSED: dict[str, tuple[Callable[[], nn.Module], dict[str, int], str, str]] = {
    # network, groups that can still be cut, a layer that stays whole, why
    "group norm of one group": (chain(lambda: nn.GroupNorm(1, 6), {}).network, {"b": 5}, "a", "GroupNorm 'norm' is"),
    "layer norm over maps": (
        chain(lambda: nn.LayerNorm([6, 6, 6]), {}).network, {"b": 5}, "a", "normalises over more than the channels"),
    "softmax over channels": (chain(lambda: nn.Softmax(1), {}).network, {"b": 5}, "a", "softmax runs over its"),
    "local response norm": (
        chain(lambda: nn.LocalResponseNorm(3), {}).network, {"b": 5}, "a", "local_response_norm is not an operation"),
    "mean over channels": (
        between(by_channel_mean, a=A, b=B6, fc=lambda: nn.Linear(5, 2)), {"b": 5}, "a", "mean runs over its channels"),
    "pieces of fixed size": (
        between(hard_pieces, a=conv(3, 12, 3), left=conv(8, 4), b=conv(8, 5, 3), fc=lambda: nn.Linear(5, 2)),
        {"left": 4, "b": 5}, "a", "only part of the channels|fixes the sizes of its pieces"),
    "a slice of fixed size": (
        between(lambda net, maps: maps[:, :4], a=A, b=conv(4, 5, 3), fc=lambda: nn.Linear(5, 2)), {"b": 5}, "a",
        "only part of the channels|fixes the places"),
    "a shuffle of fixed size": (
        between(lambda net, maps: maps.view(-1, 3, 4, 6, 6).transpose(1, 2).reshape(-1, 12, 6, 6), a=conv(3, 12, 3),
                b=conv(12, 5, 3), fc=lambda: nn.Linear(5, 2)),
        {"b": 5}, "a", "a trial cut went wrong: the cut network does not run"),
    "a number of channels in a formula": (
        between(lambda net, maps: maps / maps.shape[1], a=A, b=B6, fc=lambda: nn.Linear(5, 2)), {"b": 5}, "a",
        "a trial cut went wrong: .* must equal the masked one"),
    "weight norm": (
        between(lambda net, maps: maps, a=lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 6, 3)), b=B6,
                fc=lambda: nn.Linear(5, 2)),
        {"b": 5}, "a", "a.weight is computed, not stored"),
    "a function of a layer's weight": (
        between(weight_function, a=A, left=conv(6, 4), b=conv(4, 5, 3), fc=lambda: nn.Linear(5, 2)), {"b": 5}, "left",
        "it is not called in the forward pass"),
    "LSTM": (
        lambda: Wired(recurrent, a=nn.Conv2d(3, 6, 3), b=nn.Conv2d(6, 5, 1), rnn=nn.LSTM(5, 7, batch_first=True),
                      fc=nn.Linear(7, 2)),
        {"a": 6}, "b", "lstm is not an operation whose channels can be followed"),
    "embedding": (
        lambda: Wired(embedded, a=nn.Conv2d(3, 6, 3), table=nn.Embedding(4, 6), b=nn.Linear(6, 5), fc=nn.Linear(5, 2)),
        {"b": 5}, "a", "Embedding 'table' is not a layer type"),
    "attention as a module": (
        lambda: Wired(attended, a=nn.Conv2d(3, 6, 3), attention=nn.MultiheadAttention(6, 2, batch_first=True),
                      b=nn.Linear(6, 5), fc=nn.Linear(5, 2)),
        {"b": 5}, "a", "attention 'attention' reads it, whose queries, keys and values stay whole"),
    "attention by functions": (
        lambda: Wired(matched, a=nn.Conv2d(3, 6, 3), query=nn.Linear(6, 4), key=nn.Linear(6, 4), value=nn.Linear(6, 4),
                      out=nn.Linear(4, 6), b=nn.Linear(6, 5), fc=nn.Linear(5, 2)),
        {"a": 6, "b": 5}, "query", r"attention \(matmul\) mixes its channels; it stays whole"),
    "grouped transposed convolution": (
        between(lambda net, maps: net.up(maps), a=A, up=lambda: nn.ConvTranspose2d(6, 6, 2, 2, groups=3), b=B6,
                fc=lambda: nn.Linear(5, 2)),
        {"b": 5}, "a", "'up' is a grouped transposed convolution"),
    "a map for all channels": (
        between(lambda net, maps: maps * torch.sigmoid(net.map(maps)), a=A, map=conv(6, 1), b=B6,
                fc=lambda: nn.Linear(5, 2)),
        {"a": 6, "b": 5}, "map", "spread over other channels by broadcasting"),
    "a layer that never runs": (
        between(lambda net, maps: maps, a=A, b=B6, spare=lambda: nn.Linear(7, 9), fc=lambda: nn.Linear(5, 2)),
        {"a": 6, "b": 5}, "spare", "it is not called in the forward pass"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_stays_whole_is_listed_and_the_rest_is_cut_right(name: str) -> None:
    build, widths, whole, reason = REFUSED[name]
    network = built(Case(build, widths, {}))
    x = images(IMAGE, 3, dtype=torch.float64)
    survey = grouping.survey_groups(network, x)
    assert {group.name: group.width for group in survey.groups} == widths
    reasons = [item.reason for item in survey.refused if item.name == whole]
    assert any(re.search(reason, given) for given in reasons), reasons
    for seed in range(3):
        apply_plan(network, survey.groups, some(widths, seed), verify=x)


def test_every_output_of_a_network_is_compared() -> None:
    layers = {"a": nn.Conv2d(3, 6, 3), "b": nn.Conv2d(6, 5, 3), "fc": nn.Linear(5, 2), "head": nn.Linear(6, 4)}
    network, x = Wired(flat_tuple, **layers).double().eval(), images(IMAGE, 3, dtype=torch.float64)
    groups = grouping.find_groups(network, x)
    plan = PruningPlan({"a": [0, 2, 5], "b": [1, 4]})
    first, rest = apply_plan(network, groups, plan, verify=x)(x)
    maps = torch.relu(F.conv2d(x, network.a.weight, network.a.bias))[:, [0, 2, 5]]
    inner = F.conv2d(maps, network.b.weight[[1, 4]][:, [0, 2, 5]], network.b.bias[[1, 4]])
    by_hand = F.linear(torch.relu(inner).mean((2, 3)), network.fc.weight[:, [1, 4]], network.fc.bias)
    second = F.linear(maps.mean((2, 3)), network.head.weight[:, [0, 2, 5]], network.head.bias)
    assert close(by_hand.detach(), first.detach())
    assert close(second.detach(), rest["second"].detach())


def test_layer_norm_normalises_over_the_channels_that_stay() -> None:
    network = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 3)).double()
    with torch.no_grad():
        network[1].weight.uniform_(0.5, 2.0)
        network[1].bias.normal_()
    x = images((4,), 5, dtype=torch.float64)
    groups = grouping.find_groups(network, x)
    keep = [0, 3, 4]
    smaller = apply_plan(network, groups, PruningPlan({"0": keep}), verify=x)
    with torch.no_grad():
        inner = network[0](x)[:, keep]
        inner = (inner - inner.mean(1, keepdim=True)) / torch.sqrt(inner.var(1, correction=0, keepdim=True) + 1e-5)
        inner = F.gelu(inner * network[1].weight[keep] + network[1].bias[keep])
        assert close(inner @ network[3].weight[:, keep].T + network[3].bias, smaller(x))


def test_labels_leave_a_rectangle_whatever_leaves() -> None:
    labels = Labels()
    table = labels.new((2, 3))  # rows of a view into two groups
    settled = labels.settle(table)
    assert settled.shape == (1, 3)
    assert labels.roots(table).tolist() == [[0, 1, 2], [0, 1, 2]]
    labels.freeze(table[1, 2], "because")
    assert [labels.reason(root) for root in range(3)] == [None, None, "because"]
    labels.unite(table[0, 0], table[0, 2])
    assert labels.reason(0) == "because"
    assert varies(compact(labels.root_tensor(table))) == [1]
