"""Rankings: a contract for every criterion, and each one's meaning on numbers made up by hand."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from prunegym.pruning.criteria import CRITERIA, RankingContext, get_criterion, rank_channels, residual_curve
from prunegym.pruning.errors import UserError
from prunegym.pruning.grouping import find_groups
from prunegym.pruning.groups import ChannelGroup
from prunegym.pruning.least_squares import consumer_problems
from prunegym.pruning.statistics import GroupStatistics, Statistics, measure
from torch import nn
from toys import TOYS, ToyConv, ToyMLP, ToyResidual, images, labelled, make


def context_of(toy: Callable[[], Any], seed: int = 0) -> tuple[RankingContext, tuple[ChannelGroup, ...]]:
    network = make(toy, dtype=torch.float64)
    batches = labelled(network, 40, 16, dtype=torch.float64)
    groups = find_groups(network, batches[0][0])
    return RankingContext(network, measure(network, groups, batches), seed), groups


def made_up(**arrays: Any) -> tuple[RankingContext, tuple[ChannelGroup, ...]]:
    """Replace the statistics of ToyMLP's second group (four channels) by hand-made ones."""
    network = make(ToyMLP)
    groups = find_groups(network, images(network.shape))[1:]
    zero = np.zeros(4)
    fields = dict.fromkeys(("apoz", "mean_activation", "taylor_2017", "taylor_2019", "l1", "l2"), zero) | arrays
    return RankingContext(network, Statistics({"fc2": GroupStatistics(**fields)}, {}, 1, 0.0)), groups


PAIRS = [(toy, name) for toy in TOYS for name in CRITERIA if toy is ToyResidual or not CRITERIA[name].needs_norm]
"""Every criterion on every toy for which it is defined."""


@pytest.mark.parametrize(("toy", "name"), PAIRS)
class TestEveryCriterion:
    def test_orders_are_permutations_and_repeatable(self, toy: Callable[[], Any], name: str) -> None:
        context, groups = context_of(toy)
        orders = rank_channels(name, groups, context)
        assert list(orders) == [group.name for group in groups]
        for group in groups:
            assert sorted(orders[group.name].tolist()) == list(range(group.width))
        again = rank_channels(name, groups, context)
        assert all(np.array_equal(orders[key], again[key]) for key in orders)

    def test_scores_are_finite_and_high_means_first(self, toy: Callable[[], Any], name: str) -> None:
        context, groups = context_of(toy)
        orders = rank_channels(name, groups, context)
        for group in groups:
            scores = CRITERIA[name].score(group, context)
            assert scores.shape == (group.width,)
            assert np.isfinite(scores).all()
            assert (np.diff(scores[orders[group.name]]) <= 0).all()

    def test_has_a_sentence(self, toy: Callable[[], Any], name: str) -> None:
        assert len(CRITERIA[name].description.split()) >= 4
        assert CRITERIA[name].needs_relu == (name == "apoz")
        assert CRITERIA[name].needs_norm == (name == "bn_scale")


@pytest.mark.parametrize("name", ["mean_activation", "taylor_2017", "taylor_2019", "l1", "l2"])
def test_large_values_come_first(name: str) -> None:
    context, groups = made_up(**{name: np.array([0.2, 5.0, 0.0, 0.2])})
    assert rank_channels(name, groups, context)["fc2"].tolist() == [1, 0, 3, 2]  # a tie keeps the lower index first


def test_few_zeros_come_first() -> None:
    context, groups = made_up(apoz=np.array([0.9, 0.1, 1.0, 0.5]))
    assert rank_channels("apoz", groups, context)["fc2"].tolist() == [1, 3, 0, 2]


def test_taylor_2017_is_what_was_measured() -> None:
    """The layer-wise norm of the paper belongs to the comparison of layers, see `normalised_scores`."""
    context, groups = made_up(taylor_2017=np.array([3.0, 0.0, 4.0, 0.0]))
    assert CRITERIA["taylor_2017"].score(groups[0], context).tolist() == [3, 0, 4, 0]
    silent, groups = made_up()
    assert (CRITERIA["taylor_2017"].score(groups[0], silent) == 0).all()


def test_bn_scale_sums_over_tied_layers() -> None:
    network = make(ToyResidual)
    with torch.no_grad():
        network.stem_bn.weight.copy_(torch.tensor([1.0, -2.0, 0.0, 4.0, 0.5, 0.0]))
        network.bn2.weight.copy_(torch.tensor([0.0, 1.0, 0.25, -1.0, 0.0, 6.0]))
        network.bn1.weight.copy_(torch.tensor([0.1, -0.2, 0.0, 0.3, 0.0]))
    groups = {group.name: group for group in find_groups(network, images(network.shape))}
    context = RankingContext(network, Statistics({}, {}, 1, 0.0))
    score = CRITERIA["bn_scale"].score
    np.testing.assert_allclose(score(groups["stem"], context), [1.0, 3.0, 0.25, 5.0, 0.5, 6.0])
    np.testing.assert_allclose(score(groups["conv1"], context), [0.1, 0.2, 0.0, 0.3, 0.0], rtol=1e-6)
    assert rank_channels("bn_scale", [groups["stem"]], context)["stem"].tolist() == [5, 3, 1, 0, 4, 2]


@pytest.mark.parametrize("layers", [[], [nn.BatchNorm1d(4, affine=False)]])
def test_bn_scale_needs_weights_of_a_batch_norm(layers: list[nn.Module]) -> None:
    network = nn.Sequential(nn.Linear(5, 4), *layers, nn.ReLU(), nn.Linear(4, 3))
    groups = find_groups(network, images((5,)))
    context = RankingContext(network, Statistics({}, {}, 1, 0.0))
    message = "'bn_scale' needs a batch norm with weights behind each group, but none follows '0'; use 'l2'"
    with pytest.raises(UserError, match=message):
        rank_channels("bn_scale", groups, context)


def test_random_depends_on_seed_and_name_only() -> None:
    one, groups = context_of(ToyConv, seed=1)
    two, _ = context_of(ToyConv, seed=2)
    bare, _ = made_up()
    first, other = rank_channels("random", groups, one), rank_channels("random", groups, two)
    assert any(first[name].tolist() != other[name].tolist() for name in first)
    unmeasured = RankingContext(bare.network, bare.statistics, seed=1)
    assert all(np.array_equal(first[g.name], rank_channels("random", [g], unmeasured)[g.name]) for g in groups)


def test_least_squares_puts_a_duplicate_last() -> None:
    network = make(ToyMLP, 4, torch.float64)
    with torch.no_grad():
        network.fc1.weight[3], network.fc1.bias[3] = network.fc1.weight[0], network.fc1.bias[0]
        network.fc1.weight[5], network.fc1.bias[5] = 0.0, 0.5  # a constant is worth nothing either
    batches = labelled(network, 60, 20, dtype=torch.float64)
    groups = find_groups(network, batches[0][0])
    context = RankingContext(network, measure(network, groups, batches))
    order = rank_channels("least_squares", groups, context)["fc1"].tolist()
    assert 5 in order[-2:]
    assert {0, 3} & set(order[-2:])
    curve = residual_curve(groups[0], context, order)
    assert curve[0] == 1.0
    np.testing.assert_allclose(curve[4:], 0.0, atol=1e-6)
    assert curve[3] > 1e-4
    worst = residual_curve(groups[0], context, order[::-1])
    assert (worst >= curve - 1e-9).all()


def test_consumer_problem_by_hand() -> None:
    context, groups = context_of(ToyMLP)
    (problem,) = consumer_problems(context.network, groups[0], context.statistics)
    x = torch.cat([x for x, _ in labelled(context.network, 40, 16, dtype=torch.float64)])
    read = torch.relu(context.network.get_submodule("fc1")(x))
    np.testing.assert_allclose(problem.moment, np.cov(read.detach().numpy().T, bias=True), atol=1e-12)
    weight = context.network.get_submodule("fc2").weight.detach().numpy()
    np.testing.assert_allclose(problem.weight, weight.T @ weight, atol=1e-12)
    assert [feature.tolist() for feature in problem.features] == [[0], [1], [2], [3], [4], [5]]


def test_errors() -> None:
    with pytest.raises(UserError, match=r"criterion must be a known name, but got 'tailor'; did you mean 'taylor_20"):
        get_criterion("tailor")
    network = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    batches = [(images((5,), 6), torch.tensor([0, 1, 2, 0, 1, 2]))]
    groups = find_groups(network, batches[0][0])
    context = RankingContext(network, measure(network, groups, batches, gradients=False))
    with pytest.raises(UserError, match="criterion 'apoz' needs a ReLU behind each group, but none follows '0'"):
        rank_channels("apoz", groups, context)
    with pytest.raises(UserError, match=r"Taylor criterion needs statistics with gradients"):
        rank_channels("taylor_2019", groups, context)
    broken, groups = made_up(l1=np.array([1.0, np.nan, 0.0, 0.0]))
    with pytest.raises(UserError, match="scores must be finite, but criterion 'l1' gave NaN for group 'fc2'"):
        rank_channels("l1", groups, broken)
