"""Channel groups against names, widths and index maps worked out by hand."""

import hashlib
import re
import threading
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from prunegym.pruning.errors import UserError, closest
from prunegym.pruning.grouping import find_groups, survey_groups
from prunegym.pruning.groups import ChannelGroup, shrink_groups
from prunegym.pruning.networks import build_network
from prunegym.pruning.plan import PruningPlan
from prunegym.pruning.surgery import apply_plan
from torch import Tensor, nn
from torch.nn.utils import prune
from toys import TOYS, ToyConv, ToyResidual, images, make, random_plan


def by_name(groups: Any) -> dict[str, ChannelGroup]:
    return {group.name: group for group in groups}


def readers(group: ChannelGroup) -> set[str]:
    return {consumer.module for consumer in group.consumers}


@pytest.mark.parametrize("toy", TOYS)
def test_toys_have_the_groups_they_say(toy: Callable[[], Any]) -> None:
    network = make(toy)
    groups = find_groups(network, images(network.shape, 1))
    assert {group.name: group.width for group in groups} == network.widths
    assert list(by_name(groups)) == list(network.widths)  # in order of execution
    for group in groups:
        assert readers(group) == set(network.readers[group.name])


def test_lenet() -> None:
    groups = find_groups(build_network("lenet5_caffe", seed=0), torch.zeros(1, 1, 28, 28))
    assert [(g.name, g.width, g.producers, sorted(readers(g)), g.kernel, g.stride) for g in groups] == [
        ("conv1", 20, ("conv1",), ["conv2"], 5, 1),
        ("conv2", 50, ("conv2",), ["fc1"], 5, 1),
        ("fc1", 500, ("fc1",), ["fc2"], 1, 1),
    ]
    assert all(group.rectified for group in groups)
    assert [[site.call for site in group.sites] for group in groups] == [[0], [1], [2]]


def test_flatten_gives_each_channel_its_block_of_features() -> None:
    group = by_name(find_groups(build_network("lenet5_caffe", seed=0), torch.zeros(1, 1, 28, 28)))["conv2"]
    (consumer,) = group.consumers
    assert consumer.index.tolist() == list(range(50 * 16))  # 4x4 positions a channel, channel-major
    assert consumer.channel.tolist() == [feature // 16 for feature in range(50 * 16)]
    assert {(cut.module, cut.attribute): cut.per_channel for cut in group.attributes} == {
        ("conv2", "out_channels"): 1,
        ("fc1", "in_features"): 16,
    }
    assert sorted((piece.tensor, piece.dim, len(piece.index)) for piece in group.slices) == [
        ("conv2.bias", 0, 50),
        ("conv2.weight", 0, 50),
        ("fc1.weight", 1, 800),
    ]


def test_resnet20() -> None:
    groups = by_name(find_groups(build_network("cifar_resnet20", seed=0), torch.zeros(1, 3, 32, 32)))
    inner = [f"layer{stage}.{block}.conv1" for stage in (1, 2, 3) for block in range(3)]
    trunk = ["conv1", "layer2.0.conv2", "layer3.0.conv2"]
    assert set(groups) == {*inner, *(name for name in groups if name not in inner)}
    assert len(groups) == 9 + 3
    for name in inner:
        block = name.removesuffix(".conv1")
        assert groups[name].width == {"1": 16, "2": 32, "3": 64}[name[5]]
        assert groups[name].producers == (name,)
        assert readers(groups[name]) == {f"{block}.conv2"}
        assert [c.norm for c in groups[name].consumers] == [f"{block}.bn2"]
        assert len(groups[name].sites) == 1
    trunks = {group.width: group for name, group in groups.items() if name not in inner}
    assert set(trunks) == {16, 32, 64}
    second = [f"layer1.{block}.conv2" for block in range(3)]
    assert set(trunks[16].producers) == {trunk[0], *second}
    assert readers(trunks[16]) == {
        *(f"layer1.{block}.conv1" for block in range(3)),
        "layer2.0.conv1",
        "layer2.0.downsample.0",
    }
    assert len(trunks[16].sites) == 4  # behind the stem and behind each of the three sums
    assert set(trunks[64].producers) == {"layer3.0.downsample.0", *(f"layer3.{block}.conv2" for block in range(3))}
    assert readers(trunks[64]) == {"layer3.1.conv1", "layer3.2.conv1", "fc"}
    assert len(trunks[64].sites) == 3
    assert trunks[16].stride == 1
    assert trunks[64].stride == 2  # the shortcut


def test_output_layer_is_refused_with_its_reason() -> None:
    network = make(ToyConv)
    survey = survey_groups(network, images(network.shape, 1))
    assert [(item.name, item.width, item.reason) for item in survey.refused] == [
        ("fc2", 3, "its channels are the network's outputs")
    ]


def test_a_grouped_convolution_loses_whole_groups() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3, groups=4), nn.ReLU(), nn.Conv2d(12, 6, 1), nn.Flatten(),
        nn.Linear(6 * 16, 2),
    )  # fmt: skip
    groups = find_groups(network, torch.zeros(1, 3, 8, 8))
    assert [(group.name, group.width) for group in groups] == [("0", 4), ("3", 6)]
    smaller = apply_plan(network, groups, PruningPlan({"0": [0, 3], "3": range(6)}))
    cut = smaller[1]
    assert (cut.in_channels, cut.out_channels, cut.groups) == (4, 6, 2)
    assert torch.equal(cut.weight, network[1].weight[[0, 1, 2, 9, 10, 11]])
    assert torch.equal(smaller[0].weight, network[0].weight[[0, 1, 6, 7]])
    assert torch.equal(smaller[3].weight, network[3].weight[:, [0, 1, 2, 9, 10, 11]])


def test_a_convolution_of_one_input_group_is_refused_with_its_reason() -> None:
    network = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(8, 6, 1), nn.Flatten(), nn.Linear(6 * 36, 2))
    survey = survey_groups(network, torch.zeros(1, 4, 8, 8))
    assert [group.name for group in survey.groups] == ["1"]
    assert [item.reason for item in survey.refused if item.name != "3"] == [
        "grouped convolution '0' is not wholly between its channels"
    ]


def test_depthwise_convolution_joins_the_group_it_reads() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.Flatten(), nn.Linear(216, 2)
    )
    groups = find_groups(network, torch.zeros(1, 3, 8, 8))
    assert [(group.name, group.width, sorted(readers(group))) for group in groups] == [("0", 8, ["3"]), ("3", 6, ["5"])]
    assert ("1", "groups", 1) in [(cut.module, cut.attribute, cut.per_channel) for cut in groups[0].attributes]


class Variant(nn.Module):
    """One convolution, an activation in one of many styles, one linear layer; takes (N, 2, 4, 4)."""

    def __init__(self, style: str) -> None:
        super().__init__()
        self.style = style
        self.conv = nn.Conv2d(2, 5, 3, padding=1)
        self.norm = nn.BatchNorm2d(5)
        self.relu = nn.ReLU()
        self.inplace = nn.ReLU(inplace=True)
        self.gelu = nn.GELU()
        self.fc = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.conv(x)
        match self.style:
            case "module":
                maps = self.relu(maps)
            case "in-place module":
                maps = self.inplace(maps)
            case "function":
                maps = F.relu(maps)
            case "torch function":
                maps = torch.relu(maps)
            case "method":
                maps = maps.relu()
            case "in-place method":
                maps = maps.relu_()
            case "relu6":
                maps = F.relu6(maps)
            case "behind norm":
                maps = self.relu(self.norm(maps))
            case "relu then pool":
                maps = F.max_pool2d(self.relu(maps), 2)
            case "pool then relu":
                maps = self.relu(F.max_pool2d(maps, 2))
            case "gelu":
                maps = self.gelu(maps)
            case "gelu and relu":
                maps = self.gelu(maps) + self.relu(maps)
        return self.fc(maps.mean((2, 3)))


RELU_STYLES = ["module", "in-place module", "function", "torch function", "method", "in-place method", "relu6"]
RELU_STYLES += ["behind norm", "relu then pool", "pool then relu"]


@pytest.mark.parametrize("style", RELU_STYLES)
def test_relu_is_found_in_every_style(style: str) -> None:
    (group,) = find_groups(Variant(style), torch.zeros(1, 2, 4, 4))
    (site,) = group.sites
    assert (site.call, site.dim, site.rectified) == (0, 1, True)
    assert site.module == ("norm" if style == "behind norm" else "conv")
    assert site.index.tolist() == site.channel.tolist() == [0, 1, 2, 3, 4]


def test_other_activations_are_seen_but_not_rectified() -> None:
    (smooth,) = find_groups(Variant("gelu"), torch.zeros(1, 2, 4, 4))
    assert [(site.call, site.rectified) for site in smooth.sites] == [(0, False)]
    (none,) = find_groups(Variant("none"), torch.zeros(1, 2, 4, 4))
    assert [(site.module, site.call, site.rectified) for site in none.sites] == [("conv", None, False)]
    assert not smooth.rectified
    assert not none.rectified


def test_a_relu_is_preferred_over_other_activations() -> None:
    (group,) = find_groups(Variant("gelu and relu"), torch.zeros(1, 2, 4, 4))
    assert [(site.call, site.rectified) for site in group.sites] == [(1, True)]


def test_reused_relu_module_gives_one_site_per_call() -> None:
    network = make(ToyConv)  # its one nn.ReLU runs three times
    groups = find_groups(network, images(network.shape, 1))
    assert [[(site.module, site.call, site.dim) for site in group.sites] for group in groups] == [
        [("conv1", 0, 1)],
        [("conv2", 1, 1)],
        [("fc1", 2, -1)],
    ]


def test_relu_behind_a_residual_sum() -> None:
    network = make(ToyResidual)
    group = by_name(find_groups(network, images(network.shape, 1)))["stem"]
    assert set(group.producers) == {"stem", "conv2"}
    assert [site.call for site in group.sites] == [0, 2]  # behind the stem, behind the sum; 1 is conv1's
    assert all(site.rectified for site in group.sites)


def test_network_comes_back_untouched() -> None:
    network = make(ToyResidual).train()
    network.bn1.eval()
    network.conv1.weight.requires_grad_(False)
    state = {name: hashlib.sha256(value.numpy().tobytes()).digest() for name, value in network.state_dict().items()}
    flags = [module.training for module in network.modules()]
    needed = [parameter.requires_grad for parameter in network.parameters()]
    random_state = torch.get_rng_state()
    find_groups(network, images(network.shape, 2))
    assert {
        name: hashlib.sha256(value.numpy().tobytes()).digest() for name, value in network.state_dict().items()
    } == state
    assert [module.training for module in network.modules()] == flags
    assert [parameter.requires_grad for parameter in network.parameters()] == needed
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)


def pairs(part: Any) -> list[tuple[int, int]]:
    return sorted(zip(part.index.tolist(), part.channel.tolist(), strict=True))


def summary(group: ChannelGroup) -> dict[str, Any]:
    """Write a group as plain sorted data, so that two can be compared with ==."""
    return {
        "width": group.width,
        "producers": group.producers,
        "slices": sorted((piece.tensor, piece.dim, pairs(piece)) for piece in group.slices),
        "consumers": sorted((c.module, c.norm or "", pairs(c)) for c in group.consumers),
        "attributes": sorted((cut.module, cut.attribute, cut.per_channel) for cut in group.attributes),
        "sites": sorted((s.module, str(s.call), s.dim, pairs(s), s.rectified, s.positions) for s in group.sites),
        "kernel": (group.kernel, group.stride),
    }


def concatenating() -> nn.Module:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left = nn.Conv2d(2, 3, 1)
            self.right = nn.Conv2d(2, 5, 1)
            self.norm = nn.BatchNorm2d(8)
            self.last = nn.Conv2d(8, 4, 1)
            self.fc = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            maps = torch.relu(self.norm(torch.cat([self.left(x), self.right(x)], 1)))
            return self.fc(torch.relu(self.last(maps)).mean((2, 3)))

    return Branches()


class Flattened(nn.Module):
    """ReLUs behind a flatten and behind a concatenation without norm; takes (N, 2, 4, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(2, 3, 1), nn.Conv2d(2, 5, 3, padding=1)
        self.one, self.two, self.fc = nn.Linear(8 * 16, 6), nn.Linear(8 * 16, 5), nn.Linear(11, 2)

    def forward(self, x: Tensor) -> Tensor:
        maps = torch.relu(torch.cat([self.left(x), self.right(x)], 1).flatten(1))
        return self.fc(torch.relu(torch.cat([self.one(maps), self.two(maps)], 1)))


def test_relu_behind_a_flatten_and_a_concatenation() -> None:
    groups = by_name(find_groups(Flattened(), torch.zeros(1, 2, 4, 4)))
    sites = {name: [(s.call, s.dim, s.rectified, s.positions) for s in group.sites] for name, group in groups.items()}
    behind = {"left": [(0, -1, True, 16)], "right": [(0, -1, True, 16)]}
    assert sites == behind | {"one": [(1, -1, True, 1)], "two": [(1, -1, True, 1)]}
    assert pairs(groups["right"].sites[0]) == [(3, 0), (4, 1), (5, 2), (6, 3), (7, 4)]
    assert pairs(groups["two"].sites[0]) == [(6, 0), (7, 1), (8, 2), (9, 3), (10, 4)]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["lenet_small", "cifar_resnet20", "concatenation", "flatten"])
def test_shrunk_groups_are_those_found_in_the_cut_network(name: str, seed: int) -> None:
    if name in ("concatenation", "flatten"):
        network, example = Flattened() if name == "flatten" else concatenating(), torch.zeros(1, 2, 4, 4)
    else:
        network = build_network(name, seed=0)
        example = torch.zeros(1, 1, 28, 28) if "lenet" in name else torch.zeros(1, 3, 16, 16)
    groups = find_groups(network, example)
    plan = random_plan(groups, seed)
    shrunk = shrink_groups(groups, plan)
    found = find_groups(apply_plan(network, groups, plan), example)
    assert [group.name for group in shrunk] == [group.name for group in found]
    assert sum(group.width for group in shrunk) < sum(group.width for group in groups)
    for ours, theirs in zip(shrunk, found, strict=True):
        assert summary(ours) == summary(theirs)


def test_concatenated_channels_keep_their_offset() -> None:
    groups = by_name(find_groups(concatenating(), torch.zeros(1, 2, 4, 4)))
    (reader,) = groups["right"].consumers
    assert pairs(reader) == [(3, 0), (4, 1), (5, 2), (6, 3), (7, 4)]
    kept = by_name(shrink_groups(tuple(groups.values()), {"left": [2], "right": [0, 4]}))
    assert pairs(kept["left"].consumers[0]) == [(0, 0)]
    assert pairs(kept["right"].consumers[0]) == [(1, 0), (2, 1)]
    assert pairs(kept["right"].sites[0]) == [(1, 0), (2, 1)]
    assert kept["last"].width == 4  # not named: stays whole
    assert kept["right"].sites[0].index.dtype == np.int64


def test_example_input_is_untouched_by_a_network_that_begins_in_place() -> None:
    class Begins(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.mul_(2.0))

    example = torch.tensor([[-1.0, 2.0, -3.0, 4.0]])
    assert [group.width for group in find_groups(Begins(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)), example)] == [5]
    assert example.tolist() == [[-1.0, 2.0, -3.0, 4.0]]


class Shared(nn.Module):
    """The second convolution's output goes to its batch norm and, where `twice`, past it as well."""

    def __init__(self, twice: bool) -> None:
        super().__init__()
        self.twice = twice
        self.first = nn.Conv2d(2, 4, 1)
        self.second = nn.Conv2d(4, 4, 1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.second(torch.relu(self.first(x)))
        normal = torch.relu(self.norm(maps))
        return self.fc((normal + maps if self.twice else normal).mean((2, 3)))


@pytest.mark.parametrize("twice", [False, True])
def test_norm_can_hold_a_constant_only_where_nothing_else_reads_the_layer(twice: bool) -> None:
    groups = find_groups(Shared(twice), torch.zeros(1, 2, 3, 3))
    assert [(c.module, c.norm) for c in groups[0].consumers] == [("second", None if twice else "norm")]


class Branching(nn.Module):
    """A layer without bias and a batch norm, wired by a function that decides whether they belong together."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor], second: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.run = run
        self.first, self.second, self.norm, self.fc = nn.Conv2d(2, 4, 1), second, norm, nn.Linear(4, 2)
        self.inplace = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.run(self, torch.relu(self.first(x))).mean((2, 3)))


def added_in_place(net: Any, maps: Tensor) -> Tensor:
    out = net.second(maps)
    out += maps
    return torch.relu(net.norm(out))


def filled_beside_autograd(net: Any, maps: Tensor) -> Tensor:
    out = net.second(maps)
    with torch.no_grad():
        out.mul_(2.0)
    return torch.relu(net.norm(out))


NORMS: dict[str, tuple[Callable[[Any, Tensor], Tensor], str | None]] = {
    "directly behind": (lambda net, maps: torch.relu(net.norm(net.second(maps))), "norm"),
    "behind an in-place ReLU": (lambda net, maps: net.norm(net.inplace(net.second(maps))), None),
    "behind an in-place sum": (added_in_place, None),
    "behind an in-place change that autograd does not see": (filled_beside_autograd, None),
    "called twice": (lambda net, maps: torch.relu(net.norm(net.norm(net.second(maps)))), None),
    "serving two layers": (lambda net, maps: net.norm(net.second(net.norm(maps))), None),
    "behind a layer that runs twice": (lambda net, maps: net.norm(net.second(net.second(maps).relu())), None),
}


@pytest.mark.parametrize("name", NORMS)
def test_norm_belongs_to_the_layer_whose_untouched_output_it_takes(name: str) -> None:
    run, norm = NORMS[name]
    network = Branching(run, nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4))
    groups = find_groups(network, torch.zeros(1, 2, 3, 3))
    assert {c.norm for group in groups for c in group.consumers if c.module == "second"} == {norm}


def test_norm_over_other_channels_than_the_layers_is_not_its_norm() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.norm = nn.Linear(6, 5), nn.Linear(5, 4, bias=False), nn.BatchNorm1d(4)
            self.last = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:  # (N, 4, 6): as many tokens as the second layer has channels
            return self.last(torch.relu(self.norm(self.second(torch.relu(self.first(x)))))).mean(1)

    (group,) = (group for group in find_groups(Tokens(), torch.zeros(2, 4, 6)) if group.name == "first")
    assert [(c.module, c.norm) for c in group.consumers] == [("second", None)]


def test_a_network_that_holds_computed_tensors_says_what_to_do() -> None:
    class Storing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = make(ToyConv)
            self.seen: dict[str, Any] = {}

        def forward(self, x: Tensor) -> Tensor:
            maps = self.body.conv1(x)
            self.seen["last"] = [maps]
            return self.body(x)

    x = images(ToyConv.shape, 2)
    network = Storing()
    groups = find_groups(network, x)  # its own passes leave nothing behind
    assert [group.width for group in groups] == [4, 6, 8]
    plan = PruningPlan({"body.conv1": [0, 2]})
    apply_plan(network, groups, plan, verify=x)
    network(x)
    message = "'seen' holds a tensor that was computed, with its history; delete the attribute"
    with pytest.raises(UserError, match=message):
        find_groups(network, x)
    with pytest.raises(UserError, match=message):
        apply_plan(network, groups, plan)
    masked = make(ToyConv)
    prune.random_unstructured(masked.conv2, "weight", 0.5)
    with pytest.raises(UserError, match=r"'conv2.weight' holds .*; call torch.nn.utils.prune.remove on the layer"):
        find_groups(masked, x)
    prune.remove(masked.conv2, "weight")
    assert len(find_groups(masked, x)) == 3
    normed = make(ToyConv)
    with pytest.warns(FutureWarning, match="weight_norm"):
        torch.nn.utils.weight_norm(normed.conv1)
    with pytest.raises(UserError, match=r"'conv1.weight' holds .*; call torch.nn.utils.remove_weight_norm"):
        find_groups(normed, x)
    locked = make(ToyConv)
    locked.lock = threading.Lock()
    with pytest.raises(UserError, match=r"copy.deepcopy fails with TypeError: .*lock.*; keep what cannot be copied"):
        find_groups(locked, x)


def test_parameters_of_whole_numbers_stay_without_gradients() -> None:
    network = make(ToyConv)
    network.steps = nn.Parameter(torch.tensor([1, 2]), requires_grad=False)
    network.flag = nn.Parameter(torch.tensor([True]), requires_grad=False)
    assert [group.width for group in find_groups(network, images(network.shape, 1))] == [4, 6, 8]
    assert not network.steps.requires_grad


def test_a_random_network_is_refused_and_random_numbers_stay_as_they_were() -> None:
    def dropped(net: Any, maps: Tensor) -> Tensor:
        return F.dropout(net.norm(net.second(maps)), 0.5)

    network = Branching(dropped, nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    state = torch.get_rng_state()
    with pytest.raises(UserError, match=r"same output each time in evaluation mode, .* training=self.training"):
        find_groups(network, torch.zeros(1, 2, 3, 3))
    assert torch.equal(torch.get_rng_state(), state)

    def idle(net: Any, maps: Tensor) -> Tensor:
        torch.rand(3)
        return net.norm(net.second(maps))

    network = Branching(idle, nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    state = torch.get_rng_state()
    find_groups(network, torch.zeros(1, 2, 3, 3))
    assert torch.equal(torch.get_rng_state(), state)


def test_groups_that_cannot_be_proved_are_offered_with_a_warning() -> None:
    network = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    with torch.no_grad():
        network[2].bias[0] = float("nan")
    with pytest.warns(UserWarning, match="outputs are not finite, so that its channel groups could not be proved"):
        assert [group.width for group in find_groups(network, torch.zeros(1, 4))] == [5]

    class Roots(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.sqrt())

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # values that the network takes are given, so that its cut is proved on them
        find_groups(Roots(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)), torch.ones(1, 4))


def test_a_call_that_groups_share_is_observed_by_all_of_them_or_none() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right, self.last = nn.Linear(4, 3), nn.Linear(4, 2), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            left, right = self.left(x), self.right(x)
            return self.last(torch.relu(torch.cat([left, right, left], 1)))

    groups = find_groups(Twice(), torch.zeros(1, 4))
    assert {group.name: [(s.module, s.call) for s in group.sites] for group in groups} == {
        "left": [("left", None)],
        "right": [("right", None)],
    }


def test_wrong_input_shape_is_named() -> None:
    with pytest.raises(UserError, match=re.escape("must accept an input of shape (1, 3, 8, 8)")):
        find_groups(ToyConv(), torch.zeros(1, 3, 8, 8))


def test_network_without_groups_says_why() -> None:
    with pytest.raises(UserError, match=r"at least one prunable.*1: its channels are the network's outputs"):
        find_groups(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), torch.zeros(1, 4))
    with pytest.raises(UserError, match=r"none was found \(no layer with channels\)"):
        find_groups(nn.Sequential(nn.Flatten()), torch.zeros(1, 4))


def test_layer_that_never_runs_is_no_group() -> None:
    network = ToyConv()
    network.spare = nn.Linear(7, 7)
    groups = find_groups(network, images(network.shape, 1))
    assert [group.name for group in groups] == list(ToyConv.widths)


def test_closest_names_the_nearest_or_all() -> None:
    assert closest("Tailor_2017", ["taylor_2017", "l2"]) == "; did you mean 'taylor_2017'?"
    assert closest("zzz", ["b", "a"]) == "; known are a, b"


class Shuffled(nn.Module):
    """Two grouped convolutions with a channel shuffle between them; takes (N, 3, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 6, 1)
        self.one, self.two = (nn.Conv2d(16, 16, 3, padding=1, groups=4) for _ in range(2))
        self.fc = nn.Linear(6, 2)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.one(self.first(images))
        maps = maps.view(len(maps), 4, 4, 8, 8).transpose(1, 2).reshape(len(maps), 16, 8, 8)
        return self.fc(torch.relu(self.last(self.two(maps))).mean((2, 3)))


class OnTheInput(nn.Module):
    """A depthwise convolution of the input, summed with another convolution; takes (N, 3, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.d, self.k, self.c = nn.Conv2d(3, 3, 3, groups=3, padding=1), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 4, 1)
        self.fc = nn.Linear(4, 2)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(torch.relu(self.c(torch.relu(self.d(images) + self.k(images)))).mean((2, 3)))


@pytest.mark.parametrize(("network", "whole"), [(Shuffled(), "first"), (OnTheInput(), "k")])
def test_what_a_trial_cut_shows_to_be_wrong_is_left_whole(network: nn.Module, whole: str) -> None:
    survey = survey_groups(network, torch.zeros(1, 3, 8, 8))
    reasons = {item.name: item.reason for item in survey.refused}
    assert whole in reasons
    assert survey.groups
    keep = {group.name: range(1, group.width) for group in survey.groups}
    apply_plan(network, survey.groups, PruningPlan(keep), verify=torch.randn(2, 3, 8, 8))


class Functional(nn.Module):
    """Its first channels are made by a parameter of its own; takes (N, 3, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 3, 3, 3))
        self.v = nn.Parameter(torch.randn(5, 6))
        self.c = nn.Conv2d(8, 6, 3)
        self.f = nn.Linear(5, 2)

    def forward(self, images: Tensor) -> Tensor:
        maps = torch.relu(self.c(torch.relu(nn.functional.conv2d(images, self.w))))
        return self.f(torch.relu(nn.functional.linear(maps.mean((2, 3)), self.v)))


def test_parameters_that_functions_use_as_weights_are_listed() -> None:
    survey = survey_groups(Functional(), torch.zeros(1, 3, 8, 8))
    told = {item.name: (item.width, item.reason) for item in survey.refused}
    assert told["w"] == (
        8,
        "a function uses this parameter as weights; put it into a layer to have its channels followed",
    )
    assert told["v"][0] == 5
    assert {group.name for group in survey.groups} <= {"c"}
