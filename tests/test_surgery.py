"""A cut network against the masked one, against Torch-Pruning's own cut, and against deliberate corruption."""

import copy
import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch_pruning
from prunegym.pruning.errors import UserError
from prunegym.pruning.grouping import find_groups
from prunegym.pruning.groups import ChannelGroup, shrink_groups
from prunegym.pruning.networks import build_network
from prunegym.pruning.plan import PruningPlan
from prunegym.pruning.surgery import SurgeryError, apply_plan, verify_cut
from prunegym.pruning.torchvision_compat import torchvision
from torch import Tensor, nn
from toys import TOYS, ToyConv, ToyMLP, ToyResidual, images, make, masked_output, random_plan, randomise_norms

LENET_READERS = {"conv1": {"conv2": 1}, "conv2": {"fc1": 16}, "fc1": {"fc2": 1}}
LIMITS = {torch.float32: 1e-5, torch.float64: 1e-10}


def resnet20_readers(groups: tuple[ChannelGroup, ...]) -> dict[str, dict[str, int]]:
    """Write down which layers read which channels of ResNet-20; the trunk's group names come from its width."""
    result = {f"layer{s}.{b}.conv1": {f"layer{s}.{b}.conv2": 1} for s in (1, 2, 3) for b in range(3)}
    trunk = {group.width: group.name for group in groups if group.name not in result}
    result[trunk[16]] = {f"layer1.{b}.conv1": 1 for b in range(3)} | {"layer2.0.conv1": 1, "layer2.0.downsample.0": 1}
    result[trunk[32]] = {"layer2.1.conv1": 1, "layer2.2.conv1": 1, "layer3.0.conv1": 1, "layer3.0.downsample.0": 1}
    result[trunk[64]] = {"layer3.1.conv1": 1, "layer3.2.conv1": 1, "fc": 1}
    return result


def relative(expected: Tensor, got: Tensor) -> float:
    assert expected.shape == got.shape
    return float((expected - got).abs().max() / expected.abs().max())


def digest(network: nn.Module) -> dict[str, str]:
    return {name: hashlib.sha256(t.numpy().tobytes()).hexdigest() for name, t in network.state_dict().items()}


def check_against_mask(
    network: nn.Module,
    groups: tuple[ChannelGroup, ...],
    hand: Mapping[str, Mapping[str, int]],
    x: Tensor,
    seeds: range,
) -> None:
    whole = network(x).detach()
    effects = []
    for seed in seeds:
        plan = random_plan(groups, seed)
        smaller = apply_plan(network, groups, plan)
        expected = masked_output(network, hand, plan, x)
        assert relative(expected, smaller(x).detach()) <= LIMITS[x.dtype]
        effects.append(relative(whole, expected))
        for group in groups:
            for producer in group.producers:
                assert len(smaller.get_submodule(producer).weight) == len(plan[group.name])  # type: ignore[arg-type]
    assert sorted(effects)[len(effects) // 2] > 1e-3  # removing channels does change the output


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("toy", TOYS)
def test_cut_toys_equal_masked_ones(toy: Callable[[], Any], dtype: torch.dtype) -> None:
    network = make(toy, dtype=dtype)
    x = images(network.shape, 4, dtype=dtype)
    check_against_mask(network, find_groups(network, x), network.readers, x, range(10))


@pytest.mark.parametrize("dtype", LIMITS)
def test_cut_lenet_equals_masked_one(dtype: torch.dtype) -> None:
    network = build_network("lenet5_caffe", seed=1).to(dtype).eval()
    x = images((1, 28, 28), 2, dtype=dtype)
    check_against_mask(network, find_groups(network, x), LENET_READERS, x, range(8))


@pytest.mark.parametrize("dtype", LIMITS)
def test_cut_resnet20_equals_masked_one(dtype: torch.dtype) -> None:
    network = randomise_norms(build_network("cifar_resnet20", seed=1)).to(dtype).eval()
    x = images((3, 32, 32), 2, dtype=dtype)
    groups = find_groups(network, x)
    check_against_mask(network, groups, resnet20_readers(groups), x, range(6))


@pytest.mark.parametrize("name", ["lenet_small", "cifar_resnet20"])
def test_weights_are_those_of_torch_prunings_own_cut(name: str) -> None:
    network = randomise_norms(build_network(name, seed=2)).eval()
    x = images((1, 28, 28) if "lenet" in name else (3, 16, 16), 1)
    groups = find_groups(network, x)
    plan = random_plan(groups, 5)
    theirs = copy.deepcopy(network)
    graph = torch_pruning.DependencyGraph().build_dependency(theirs, example_inputs=x)
    for group in groups:
        leaves = sorted(set(range(group.width)) - set(plan[group.name]))
        if leaves:
            layer: Any = theirs.get_submodule(group.name)
            cut = torch_pruning.prune_conv_out_channels
            if isinstance(layer, nn.Linear):
                cut = torch_pruning.prune_linear_out_channels
            graph.get_pruning_group(layer, cut, leaves).prune()
    ours = apply_plan(network, groups, plan)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key
    assert sum(p.numel() for p in ours.parameters()) < sum(p.numel() for p in network.parameters())
    assert torch.equal(ours(x), theirs(x))


def test_original_is_untouched_and_nothing_is_shared() -> None:
    network = make(ToyResidual)
    x = images(network.shape)
    groups = find_groups(network, x)
    before, output = digest(network), network(x)
    smaller = apply_plan(network, groups, PruningPlan({"conv1": [0, 3]}), verify=x)
    with torch.no_grad():
        for tensor in (*smaller.parameters(), *smaller.buffers()):
            tensor.fill_(7)
    assert digest(network) == before
    assert torch.equal(network(x), output)


def test_modes_and_requires_grad_carry_over() -> None:
    network = make(ToyResidual).train()
    network.bn1.eval()
    network.conv1.weight.requires_grad_(False)
    groups = find_groups(network, images(network.shape))
    smaller: Any = apply_plan(network, groups, random_plan(groups, 0), verify=images(network.shape))
    assert smaller.training
    assert network.training
    assert not smaller.bn1.training
    assert not smaller.conv1.weight.requires_grad
    assert smaller.conv2.weight.requires_grad
    assert (smaller.conv1.out_channels, smaller.bn1.num_features) == (len(smaller.conv1.weight),) * 2


@pytest.mark.parametrize("seed", range(5))
def test_two_rounds_equal_the_composed_plan(seed: int) -> None:
    network = make(ToyResidual)
    groups = find_groups(network, images(network.shape))
    first = PruningPlan({"stem": [0, 2, 3, 5], "conv1": [1, 2, 4], "down": [0, 1, 4, 6, 7]})
    halfway = apply_plan(network, groups, first)
    left = shrink_groups(groups, first)
    second = random_plan(left, seed)
    twice = apply_plan(halfway, left, second)
    once = apply_plan(network, groups, first.then(second))
    assert digest(twice) == digest(once)


class Tied(nn.Module):
    """Two readers of one hidden layer share their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(4, 6)
        self.left = nn.Linear(6, 3)
        self.right = nn.Linear(6, 3)
        self.right.weight = self.left.weight

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.hidden(x))
        return self.left(hidden) + self.right(hidden**2)


def test_shared_weights_stay_shared() -> None:
    network = Tied()
    x = images((4,))
    groups = find_groups(network, x)
    plan = PruningPlan({"hidden": [1, 4]})
    smaller: Any = apply_plan(network, groups, plan)
    assert smaller.left.weight is smaller.right.weight
    assert smaller.left.weight.shape == (3, 2)
    expected = masked_output(network, {"hidden": {"left": 1, "right": 1}}, plan, x)
    assert relative(expected, smaller(x).detach()) <= 1e-5


class Looped(nn.Module):
    """One layer that runs twice, and goes by two names; its input and output channels are one group."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.loop = nn.Linear(6, 6)
        self.alias = self.loop
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.alias(torch.relu(self.loop(torch.relu(self.first(x)))))))


def test_layer_that_runs_twice() -> None:
    network = Looped()
    x = images((4,))
    (group,) = find_groups(network, x)
    plan = PruningPlan({group.name: [1, 2, 5]})
    smaller: Any = apply_plan(network, [group], plan, verify=x)
    assert smaller.loop is smaller.alias
    assert smaller.loop.weight.shape == (3, 3)
    expected = masked_output(network, {group.name: {"loop": 1, "last": 1}}, plan, x)
    assert relative(expected, smaller(x).detach()) <= 1e-5


class TiedChain(nn.Module):
    """One square weight in two places of a chain: its rows and columns can only be cut alike."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.second = nn.Linear(6, 6)
        self.third = nn.Linear(6, 6)
        self.third.weight = self.second.weight
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.third(torch.relu(self.second(torch.relu(self.first(x)))))))


def test_rows_and_columns_of_a_weight_in_two_places_are_cut_alike() -> None:
    network, x = TiedChain().double(), images((4,), dtype=torch.float64)
    (group,) = find_groups(network, x)
    assert group.producers == ("first", "second", "third")
    plan = PruningPlan({"first": [0, 2, 3]})
    smaller: Any = apply_plan(network, [group], plan)
    assert smaller.second.weight is smaller.third.weight
    assert smaller.second.weight.shape == (3, 3)
    expected = masked_output(network, {"first": {"second": 1, "third": 1, "last": 1}}, plan, x)
    assert relative(expected, smaller(x).detach()) <= 1e-10


def test_shared_weight_that_would_need_two_shapes_is_refused() -> None:
    network, untied = TiedChain(), TiedChain()
    untied.third.weight = nn.Parameter(untied.second.weight.detach().clone())
    groups = find_groups(untied, images((4,)))
    plan = PruningPlan({"second": [0, 1]})  # rows of second.weight, columns of third.weight
    with pytest.raises(UserError, match=r"shared by 'second.weight' and 'third.weight'.*cut alike"):
        apply_plan(network, groups, plan)
    whole = apply_plan(network, groups, PruningPlan({}))
    assert torch.equal(whole(images((4,))), network(images((4,))))


def tamper(groups: tuple[ChannelGroup, ...], name: str, tensor: str) -> tuple[ChannelGroup, ...]:
    """Rotate one index map by one, so that a wrong channel leaves this tensor only."""

    def twist(group: ChannelGroup) -> ChannelGroup:
        if group.name != name:
            return group
        slices = tuple(
            replace(piece, channel=np.roll(piece.channel, 1)) if piece.tensor == tensor else piece
            for piece in group.slices
        )
        assert any(np.any(a.channel != b.channel) for a, b in zip(slices, group.slices, strict=True))
        return replace(group, slices=slices)

    return tuple(twist(group) for group in groups)


@pytest.mark.parametrize(
    ("toy", "group", "tensor", "layer"),
    [
        (ToyConv, "conv1", "conv1.weight", "conv2"),
        (ToyConv, "conv2", "conv2.bias", "conv2"),
        (ToyConv, "conv2", "fc1.weight", "fc1"),
        (ToyMLP, "fc1", "fc2.weight", "fc2"),
        (ToyResidual, "conv1", "bn1.running_var", "conv2"),
        (ToyResidual, "stem", "stem_bn.bias", "conv1"),
        (ToyResidual, "down", "down_bn.weight", "fc"),
    ],
)
def test_verification_catches_a_corrupted_map_and_names_the_layer(
    toy: Callable[[], Any], group: str, tensor: str, layer: str
) -> None:
    network = make(toy)
    network.load_state_dict({key: value.abs() for key, value in network.state_dict().items()})  # no ReLU is silent
    x = images(network.shape, 8).abs()
    groups = find_groups(network, x)
    plan = PruningPlan({group: [0, 2]})
    apply_plan(network, groups, plan, verify=x)  # the honest maps pass
    with pytest.raises(SurgeryError, match=rf"differs by .*, first at '{layer}'"):
        apply_plan(network, tamper(groups, group, tensor), plan, verify=x)


def test_verification_catches_a_forgotten_batch_norm_count() -> None:
    network = make(ToyResidual)
    x = images(network.shape)
    groups = tuple(
        replace(group, attributes=tuple(cut for cut in group.attributes if cut.module != "bn1"))
        for group in find_groups(network, x)
    )
    with pytest.raises(SurgeryError, match=r"layer 'bn1' says .*5.*, but its tensors have other sizes"):
        apply_plan(network, groups, PruningPlan({"conv1": [0, 1]}), verify=x)


class Scaled(nn.Module):
    """An inverted bottleneck behind a layer scale of 1e-6, as ConvNeXt begins: it hardly shows in the output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide, self.narrow = nn.Linear(5, 6), nn.Linear(6, 8), nn.Linear(8, 6)
        self.gamma = nn.Parameter(torch.full((6,), 1e-6))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        return self.head(x + self.gamma * self.narrow(torch.relu(self.wide(x))))


def test_verification_looks_at_layers_that_hardly_show_in_the_output() -> None:
    network, x = Scaled(), images((5,), 8)
    groups = find_groups(network, x)
    plan = PruningPlan({"wide": [0, 2, 5]})
    apply_plan(network, groups, plan, verify=x)
    wrong = apply_plan(network, tamper(groups, "wide", "narrow.weight"), plan)
    assert (
        relative(apply_plan(network, groups, plan)(x).detach(), wrong(x).detach()) < 1e-5
    )  # the outputs alone do not tell
    with pytest.raises(SurgeryError, match=r"must equal the masked one to 1e-05, but differs by .*, first at 'narrow'"):
        verify_cut(network, wrong, groups, plan, x)


def test_a_random_network_is_not_blamed_on_the_cut() -> None:
    network: Any = make(ToyConv)
    x = images(network.shape)
    groups = find_groups(network, x)
    network.pool.register_forward_hook(lambda _m, _i, output: torch.dropout(output, 0.5, True))
    with pytest.raises(UserError, match=r"same output each time in evaluation mode, but two runs on one input differ"):
        apply_plan(network, groups, PruningPlan({"conv1": [0, 2]}), verify=x)


@pytest.mark.parametrize(("layer", "layout"), [(nn.Conv2d, torch.channels_last), (nn.Conv3d, torch.channels_last_3d)])
def test_memory_format_of_weights_stays(layer: Any, layout: torch.memory_format) -> None:
    network: Any = nn.Sequential(
        layer(3, 8, 3, padding=1), nn.ReLU(), layer(8, 6, 3, padding=1), nn.ReLU(), layer(6, 4, 2)
    )
    x = images((3, *[4] * (network[0].weight.dim() - 2)), 2)
    groups, plan = find_groups(network, x), PruningPlan({"0": [1, 2, 5], "2": [0, 3]})
    expected = apply_plan(network, groups, plan).state_dict()
    smaller: Any = apply_plan(network.to(memory_format=layout), groups, plan, verify=x)
    for place in (0, 2, 4):
        assert smaller[place].weight.is_contiguous(memory_format=layout)
        assert not smaller[place].weight.is_contiguous()
    assert all(torch.equal(value, expected[key]) for key, value in smaller.state_dict().items())
    plain = apply_plan(network.to(memory_format=torch.contiguous_format), groups, plan)
    assert all(parameter.is_contiguous() for parameter in plain.parameters())


def test_verify_returns_the_difference_it_found() -> None:
    network = make(ToyConv)
    x = images(network.shape)
    groups = find_groups(network, x)
    plan = random_plan(groups, 0)
    smaller: Any = apply_plan(network, groups, plan)
    assert 0 <= verify_cut(network, smaller, groups, plan, x) <= 1e-5
    expected = masked_output(network, network.readers, plan, x)
    with torch.no_grad():
        smaller.fc2.bias += 0.5
    found = verify_cut(network, smaller, groups, plan, x, tolerance=1e9)
    assert found == pytest.approx(0.5 / float(expected.abs().max()), rel=1e-3)


@pytest.mark.parametrize("name", ["densenet121", "mobilenet_v2"])
def test_torchvision_networks(name: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = getattr(torchvision.models, name)(num_classes=7)
    randomise_norms(network).double().eval()
    x = images((3, 64, 64), 2, dtype=torch.float64)
    groups = find_groups(network, x)
    rng = np.random.default_rng(0)
    plan = PruningPlan(
        {group.name: rng.permutation(group.width)[: max(1, int(0.7 * group.width))].tolist() for group in groups}
    )
    smaller = apply_plan(network, groups, plan)
    masks: dict[str, Tensor] = {}
    for group in groups:
        for consumer in group.consumers:
            layer: Any = network.get_submodule(consumer.module)
            mask = masks.setdefault(consumer.module, torch.ones(layer.weight.shape[1], dtype=torch.float64))
            mask[torch.from_numpy(consumer.index[~np.isin(consumer.channel, plan[group.name])])] = 0
    for layer_name, mask in masks.items():
        layer = network.get_submodule(layer_name)
        factor = mask if isinstance(layer, nn.Linear) else mask[:, None, None]
        layer.register_forward_pre_hook(lambda _m, args, factor=factor: (args[0] * factor,))
    with torch.no_grad():
        assert relative(network(x), smaller(x)) <= 1e-10
    layers = sum(isinstance(module, (nn.Conv2d, nn.Linear)) for module in network.modules())
    depthwise = sum(isinstance(module, nn.Conv2d) and module.groups > 1 for module in network.modules())
    assert len(masks) == layers - depthwise - 1  # every layer but the first reads something prunable
    before, after = (sum(p.numel() for p in net.parameters()) for net in (network, smaller))
    assert 0.4 < after / before < 0.6  # about 0.7 squared


def test_plan_errors() -> None:
    network = make(ToyConv)
    groups = find_groups(network, images(network.shape))
    with pytest.raises(UserError, match=r"only name groups of its network, but got 'con1'; did you mean 'conv1'\?"):
        apply_plan(network, groups, PruningPlan({"con1": [0]}))
    with pytest.raises(UserError, match=r"'conv1' has channels 0 to 3, but the plan keeps channel 4"):
        apply_plan(network, groups, PruningPlan({"conv1": [0, 4]}))
    with pytest.raises(UserError, match=r"at least one channel in each group, but 'conv1' keeps none"):
        PruningPlan({"conv1": []})
    with pytest.raises(UserError, match=r"distinct indices from 0, but 'conv1' keeps \[1, 1\]"):
        PruningPlan({"conv1": [1, 1]})


def test_groups_of_another_network_are_refused() -> None:
    network = make(ToyConv)
    groups = find_groups(network, images(network.shape))
    with pytest.raises(UserError, match=r"groups must come from this network, but it has no tensor 'conv"):
        apply_plan(make(ToyMLP), groups, PruningPlan({"conv1": [0]}))
    smaller = apply_plan(network, groups, PruningPlan({"conv1": [0]}))
    with pytest.raises(UserError, match=re.escape("call find_groups again or shrink_groups after a cut")):
        apply_plan(smaller, groups, PruningPlan({"conv1": [0]}))
