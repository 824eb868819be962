"""The oracle against real cuts and masks written by hand, and rank correlations against ones worked out by hand."""

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from prunegym.pruning.criteria import CRITERIA, RankingContext, normalised_scores
from prunegym.pruning.errors import UserError
from prunegym.pruning.grouping import find_groups
from prunegym.pruning.groups import ChannelGroup
from prunegym.pruning.oracle import Correlation, OracleLoss, oracle, rank_correlation
from prunegym.pruning.plan import PruningPlan
from prunegym.pruning.statistics import GroupStatistics, Statistics, measure
from prunegym.pruning.surgery import apply_plan
from torch import Tensor, nn
from toys import TOYS, ToyConv, ToyMLP, ToyResidual, ToyTurned, Wired, images, labelled, make, masked_output

Batches = list[tuple[Tensor, Tensor]]


def mean_loss(run: Callable[[Tensor], Tensor], batches: Batches) -> float:
    logits = torch.cat([run(inputs) for inputs, _ in batches]).detach()
    return float(F.cross_entropy(logits, torch.cat([labels for _, labels in batches])))


def by_cutting(network: nn.Module, groups: Sequence[ChannelGroup], batches: Batches) -> dict[str, np.ndarray]:
    """Return the change of the loss when each channel is cut away for real."""
    whole = mean_loss(network, batches)
    return {
        group.name: np.array(
            [
                mean_loss(apply_plan(network, groups, PruningPlan({group.name: rest})), batches) - whole
                for rest in ([c for c in range(group.width) if c != channel] for channel in range(group.width))
            ]
        )
        for group in groups
    }


class Block(nn.Module):
    """Writes over its input, and counts its runs."""

    runs: ClassVar[int] = 0

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, 5, 3, padding=1)
        self.norm = nn.BatchNorm2d(5)
        self.relu = nn.ReLU(inplace=True)
        self.second = nn.Conv2d(5, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        Block.runs += 1
        return self.relu(self.second(self.relu(self.norm(self.first(x.mul_(1.1))))))


class Postman(nn.Module):
    """Passes a value on behind the network's back, and only once."""

    def __init__(self) -> None:
        super().__init__()
        self.letters: list[Tensor] = []
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        self.letters.append(x.mean((1, 2, 3)))
        return torch.relu(self.conv(x))


class Pair(nn.Module):
    """Returns no tensor but two."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 5, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.relu(self.a(x)), torch.relu(self.b(x))


def concatenated(net: Any, x: Tensor) -> Tensor:
    both = torch.cat([torch.relu(net.a(x)), torch.relu(net.norm(net.b(x)))], 1)
    return net.fc2(torch.relu(net.fc(both.flatten(1))))


def paired(net: Any, x: Tensor) -> Tensor:
    return net.fc(torch.relu(net.c(torch.cat(net.pair(x), 1))).mean((2, 3)))


def normalised(net: Any, x: Tensor) -> Tensor:
    return net.c(torch.relu(net.b(net.norm(net.a(x)))))


def posted(net: Any, x: Tensor) -> Tensor:
    maps = net.first(x)
    return net.fc(torch.relu(net.conv(maps)).mean((2, 3))) + net.first.letters.pop()[:, None] * net.scale.weight[0]


def decoded(net: Any, x: Tensor) -> Tensor:
    return net.fc(torch.relu(net.up(torch.relu(net.down(x)))).mean((2, 3)))


def twice(net: Any, x: Tensor) -> Tensor:
    maps = torch.relu(net.stem(x))
    maps = torch.relu(net.same(maps)) + maps
    maps = torch.relu(net.same(maps)) + maps
    return net.fc(maps.mean((2, 3)))


def blocks() -> nn.Module:
    body = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(inplace=True), Block(6), Block(6), nn.MaxPool2d(2))
    return nn.Sequential(body, nn.Flatten(), nn.Linear(54, 7), nn.ReLU(inplace=True), nn.Linear(7, 3))


NETWORKS: dict[str, tuple[Callable[[], Any], tuple[int, ...], int]] = {  # name -> network, input, channels
    "conv": (ToyConv, ToyConv.shape, 18),
    "turned": (ToyTurned, ToyConv.shape, 18),
    "mlp": (ToyMLP, ToyMLP.shape, 10),
    "residual": (ToyResidual, ToyResidual.shape, 19),
    "concatenation": (
        lambda: Wired(concatenated, a=nn.Conv2d(3, 4, 3), b=nn.Conv2d(3, 5, 3), norm=nn.BatchNorm2d(5),
                      fc=nn.Linear(9 * 16, 6), fc2=nn.Linear(6, 3)),
        (3, 6, 6), 15,
    ),
    "layer norm": (
        lambda: Wired(normalised, a=nn.Linear(5, 6), norm=nn.LayerNorm(6), b=nn.Linear(6, 4), c=nn.Linear(4, 3)),
        (5,), 10,
    ),
    "two outputs": (
        lambda: Wired(paired, pair=Pair(), c=nn.Conv2d(9, 4, 3), fc=nn.Linear(4, 3)), (3, 6, 6), 13,
    ),
    "transposed": (
        lambda: Wired(decoded, down=nn.Conv2d(3, 5, 3, 2), up=nn.ConvTranspose2d(5, 6, 2, 2), fc=nn.Linear(6, 3)),
        (3, 7, 7), 11,
    ),
    "shared layer": (
        lambda: Wired(twice, stem=nn.Conv2d(3, 5, 3), same=nn.Conv2d(5, 5, 3, padding=1), fc=nn.Linear(5, 3)),
        (3, 6, 6), 5,
    ),
    "in place": (blocks, (3, 6, 6), 6 + 5 + 6 + 5 + 6 + 7),
    "behind the back": (
        lambda: Wired(posted, first=Postman(), conv=nn.Conv2d(4, 6, 3), fc=nn.Linear(6, 3), scale=nn.Linear(3, 1)),
        (3, 6, 6), 10,
    ),
}  # fmt: skip


def prepared(name: str) -> tuple[Any, tuple[ChannelGroup, ...], Batches]:
    build, shape, _ = NETWORKS[name]
    network = make(build, 3, torch.float64)
    network.shape = shape
    batches = labelled(network, 11, 4, 1, torch.float64)
    return network, find_groups(network, batches[0][0].clone()), batches


@pytest.mark.parametrize("name", NETWORKS)
def test_equals_the_cut_of_each_channel(name: str) -> None:
    network, groups, batches = prepared(name)
    assert sum(group.width for group in groups) == NETWORKS[name][2]
    expected = by_cutting(network, groups, batches)
    found = oracle(network, groups, batches)
    assert found.keys() == expected.keys()
    for group, change in expected.items():
        np.testing.assert_allclose(found[group].change, change, rtol=1e-9, atol=1e-12)
        np.testing.assert_array_equal(found[group].magnitude, np.abs(found[group].change))
    assert max(np.abs(change).max() for change in expected.values()) > 1e-3


@pytest.mark.parametrize("toy", TOYS)
def test_equals_a_mask_written_by_hand(toy: Callable[[], Any]) -> None:
    network = make(toy, 1)
    batches = labelled(network, 30, 7)
    groups = find_groups(network, batches[0][0])
    found = oracle(network, groups, batches)
    whole = {name: list(range(width)) for name, width in network.widths.items()}
    for name, width in network.widths.items():
        for channel in range(width):
            plan = {**whole, name: [other for other in range(width) if other != channel]}
            without = mean_loss(lambda x, plan=plan: masked_output(network, network.readers, plan, x), batches)
            assert found[name].change[channel] == pytest.approx(without - mean_loss(network, batches), abs=3e-7)


def test_a_batch_norm_constant_leaves_with_its_channel() -> None:
    """By hand: the channel is the constant 2 behind its batch norm, and class 0 reads it with weight 1."""
    network = nn.Sequential(nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2, eps=0.0), nn.ReLU(), nn.Linear(2, 2)).eval()
    with torch.no_grad():
        network[0].weight.zero_()
        network[1].bias.copy_(torch.tensor([2.0, 0.0]))
        network[3].weight.copy_(torch.tensor([[1.0, 5.0], [0.0, 5.0]]))
        network[3].bias.zero_()
    inputs, labels = images((2,), 6), torch.zeros(6, dtype=torch.int64)
    found = oracle(network, find_groups(network, inputs), [(inputs, labels)])["0"]
    np.testing.assert_allclose(found.change, [math.log(2) - math.log(1 + math.exp(-2)), 0.0], atol=1e-6)


def test_what_precedes_the_readers_runs_once_a_batch() -> None:
    network, groups, batches = prepared("in place")
    last = next(group for group in groups if group.width == 7)
    Block.runs = 0
    oracle(network, groups, batches, channels={last.name: range(7)})
    loss, recorded, proof = 3, 3, 2  # batches, batches, and the first batch recorded and run once without the group
    assert Block.runs == 2 * (loss + recorded + proof)  # two blocks; each channel by itself would be 2 · 3 · 7 more
    Block.runs = 0
    oracle(network, groups, batches, channels={last.name: [1]})
    assert Block.runs == 2 * (loss + 3)  # one channel is run plainly


def test_the_network_comes_back_as_it_was() -> None:
    network = make(ToyResidual)
    network.train()
    network.bn1.eval()
    batches = labelled(network)
    groups = find_groups(network, batches[0][0])
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    inputs = [x.clone() for x, _ in batches]
    modes = {name: module.training for name, module in network.named_modules()}
    oracle(network, groups, batches)
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())
    assert {name: module.training for name, module in network.named_modules()} == modes
    assert not any("forward" in vars(module) or module._forward_pre_hooks for module in network.modules())
    assert all(torch.equal(x, before) for (x, _), before in zip(batches, inputs, strict=True))


def test_only_the_channels_asked_for_are_measured() -> None:
    network = make(ToyConv, dtype=torch.float64)
    batches = labelled(network, dtype=torch.float64)
    groups = find_groups(network, batches[0][0])
    done: list[int] = []
    whole = oracle(network, groups, batches, progress=done.append)
    assert done == [4, 10, 18]
    done.clear()
    some = oracle(network, groups, batches, channels={"fc1": [6, 0, 6], "conv1": []}, progress=done.append)
    assert done == [2]
    assert list(some) == ["conv1", "conv2", "fc1"]
    assert np.isnan(some["conv1"].change).all()
    assert np.isnan(some["conv2"].change).all()
    assert np.flatnonzero(~np.isnan(some["fc1"].change)).tolist() == [0, 6]
    np.testing.assert_allclose(some["fc1"].change[[0, 6]], whole["fc1"].change[[0, 6]], rtol=0, atol=1e-15)


def test_the_only_channel_of_a_group_cannot_leave() -> None:
    network = nn.Sequential(nn.Linear(4, 1), nn.ReLU(), nn.Linear(1, 3), nn.ReLU(), nn.Linear(3, 3)).eval()
    inputs = images((4,), 5)
    found = oracle(network, find_groups(network, inputs), [(inputs, torch.arange(5) % 3)])
    assert np.isnan(found["0"].change).all()
    assert np.isfinite(found["2"].change).all()


def test_wrong_requests_are_refused() -> None:
    network = make(ToyMLP)
    batches = labelled(network)
    groups = find_groups(network, batches[0][0])
    with pytest.raises(UserError, match="at least one batch of data, but none came"):
        oracle(network, groups, [])
    with pytest.raises(UserError, match=r"known groups, but got 'fc22'; did you mean 'fc2'\?"):
        oracle(network, groups, batches, channels={"fc22": [0]})
    with pytest.raises(UserError, match="channels of group 'fc2' must be from 0 to 3, but got 4"):
        oracle(network, groups, batches, channels={"fc2": [0, 4]})
    with pytest.raises(UserError, match="loss of the whole network must be finite, but it is nan"):
        oracle(network, groups, [(batches[0][0] * math.nan, batches[0][1])])


def losses(**changes: Sequence[float]) -> dict[str, OracleLoss]:
    return {name: OracleLoss(np.array(change, dtype=float)) for name, change in changes.items()}


def test_correlations_by_hand() -> None:
    truth = losses(a=[0.1, -0.4, 0.2, -0.3], b=[-5.0, 7.0, 6.0])  # ranks of |change|: 1 4 2 3 and 1 3 2; 1 4 2 3 5 7 6
    found = rank_correlation({"a": np.array([1.0, 2, 3, 4]), "b": np.array([0.3, 0.1, 0.2])}, truth)
    # differences of ranks: a 0 2 1 1, b 2 2 0; together scores rank 4 5 6 7 3 1 2, differences 3 1 4 4 2 6 4
    assert found.by_group["a"] == pytest.approx(1 - 6 * (0 + 4 + 1 + 1) / (4 * 15))
    assert found.by_group["b"] == pytest.approx(1 - 6 * (4 + 4 + 0) / (3 * 8))
    assert found.all == pytest.approx(1 - 6 * (9 + 1 + 16 + 16 + 4 + 36 + 16) / (7 * 48))
    assert found.mean == pytest.approx((0.4 - 1) / 2)


def test_ties_share_their_mean_rank() -> None:
    found = rank_correlation({"a": np.array([1.0, 1, 2])}, losses(a=[0.1, 0.2, 0.3]))
    assert found.all == pytest.approx(math.sqrt(3) / 2)  # of the ranks (1.5, 1.5, 3) and (1, 2, 3)


def test_nan_is_left_out() -> None:
    truth = losses(a=[1, math.nan, 3, 2, 9], b=[math.nan, 4, math.nan])
    scores = {"a": np.array([1.0, 50, 3, 2, math.nan]), "b": np.array([9.0, 9, 9])}
    found = rank_correlation(scores, truth)
    assert found.by_group["a"] == pytest.approx(1.0)
    assert math.isnan(found.by_group["b"])  # a single channel has no ranking
    assert found.mean == found.by_group["a"]
    assert found.all == pytest.approx(1.0)


def test_a_constant_ranking_gives_nan() -> None:
    truth = losses(a=[1, -2, 3], b=[0.5, -0.5, 0.5])
    found = rank_correlation({"a": np.zeros(3), "b": np.arange(3.0)}, truth)
    assert isinstance(found, Correlation)
    assert math.isnan(found.by_group["a"])
    assert math.isnan(found.by_group["b"])
    assert math.isnan(found.mean)
    assert math.isfinite(found.all)


def test_other_groups_or_widths_are_refused() -> None:
    truth = losses(a=[1, 2], b=[1, 2, 3])
    with pytest.raises(UserError, match="of the same groups, but only one of them has b"):
        rank_correlation({"a": np.zeros(2)}, truth)
    with pytest.raises(UserError, match=r"group 'b' has 3 channels and scores of shape \(2,\)"):
        rank_correlation({"a": np.zeros(2), "b": np.zeros(2)}, truth)


def test_taylor_is_the_oracle_where_the_loss_is_nearly_linear() -> None:
    """One example, and a last layer so weak that the loss is linear in its inputs: |change| = |gradient · value|."""
    network = make(ToyConv, 2, torch.float64)
    with torch.no_grad():
        network.fc1.bias.fill_(1.0)  # every unit is active
        network.fc2.weight.mul_(1e-4)
    batches = labelled(network, 1, dtype=torch.float64)
    groups = find_groups(network, batches[0][0])
    truth = oracle(network, groups, batches, channels={"fc1": range(8)})
    statistics = measure(network, groups, batches, grams=False)
    taylor = statistics.groups["fc1"].taylor_2017
    assert taylor is not None
    np.testing.assert_allclose(taylor, truth["fc1"].magnitude, rtol=1e-3)
    found = rank_correlation(normalised_scores("taylor_2017", groups, RankingContext(network, statistics)), truth)
    assert found.all == found.mean == pytest.approx(1.0)


def test_a_random_ranking_stands_at_chance() -> None:
    generator = np.random.default_rng(0)
    truth = losses(a=generator.normal(size=2000))
    assert abs(rank_correlation({"a": generator.random(2000)}, truth).all) < 3 / math.sqrt(2000 - 1)


class TestNormalisedScores:
    @staticmethod
    def made_up(values: Sequence[float]) -> tuple[tuple[ChannelGroup, ...], RankingContext]:
        network = make(ToyMLP)
        groups = find_groups(network, images(network.shape))[1:]
        array = np.array(values, dtype=float)
        fields = dict.fromkeys(("apoz", "mean_activation", "taylor_2017", "taylor_2019", "l1", "l2"), array)
        return groups, RankingContext(network, Statistics({"fc2": GroupStatistics(**fields)}, {}, 1, 0.0))

    @pytest.mark.parametrize(
        ("norm", "expected"),
        [("l2", [0.6, 0, -0.8, 0]), ("mean", [12 / 7, 0, -16 / 7, 0]), ("none", [3, 0, -4, 0])],
    )
    def test_by_hand(self, norm: str, expected: Sequence[float]) -> None:
        groups, context = self.made_up([3, 0, -4, 0])
        np.testing.assert_allclose(normalised_scores("l1", groups, context, norm)["fc2"], expected)

    def test_the_euclidean_norm_is_taken_by_default(self) -> None:
        groups, context = self.made_up([3, 0, 4, 0])
        for norm in ({}, {"norm": "l2"}):
            np.testing.assert_allclose(
                normalised_scores("taylor_2017", groups, context, **norm)["fc2"], [0.6, 0, 0.8, 0]
            )

    @pytest.mark.parametrize("norm", ["l2", "mean", "none"])
    def test_a_silent_group_stays_at_zero(self, norm: str) -> None:
        groups, context = self.made_up([0, 0, 0, 0])
        assert normalised_scores("l1", groups, context, norm)["fc2"].tolist() == [0, 0, 0, 0]

    @pytest.mark.parametrize("name", CRITERIA)
    def test_groups_are_brought_to_one_length_and_keep_their_order(self, name: str) -> None:
        network = make(ToyResidual, dtype=torch.float64)
        batches = labelled(network, 40, 16, dtype=torch.float64)
        groups = find_groups(network, batches[0][0])
        context = RankingContext(network, measure(network, groups, batches))
        scores = normalised_scores(name, groups, context)
        for group in groups:
            assert np.linalg.norm(scores[group.name]) == pytest.approx(1.0)
            plain = CRITERIA[name].score(group, context)
            assert np.argsort(scores[group.name]).tolist() == np.argsort(plain).tolist()

    def test_wrong_requests_are_refused(self) -> None:
        groups, context = self.made_up([3, 0, math.nan, 0])
        with pytest.raises(UserError, match="norm must be a known name, but got 'l3'"):
            normalised_scores("l1", groups, context, "l3")
        with pytest.raises(UserError, match="criterion 'l1' gave NaN for group 'fc2'"):
            normalised_scores("l1", groups, context)
