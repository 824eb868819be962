"""Data-free pruning: by hand, against a literal implementation with a cut at every step, and without any data."""

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from prunegym.pruning.compensation import compensate
from prunegym.pruning.criteria import RankingContext, rank_channels
from prunegym.pruning.data import Split
from prunegym.pruning.data_free import data_free_substitutions
from prunegym.pruning.errors import UserError
from prunegym.pruning.grouping import find_groups
from prunegym.pruning.plan import PruningPlan
from prunegym.pruning.saliency import (
    NOBODY,
    MergeProblem,
    cut_off,
    merge_problem,
    merge_sequence,
    saliency_matrix,
    serves_published,
)
from prunegym.pruning.statistics import Statistics
from prunegym.pruning.surgery import apply_plan
from prunegym.pruning.task import PruningTask
from torch import nn
from toys import TOYS, ToyConv, ToyMLP, ToyResidual, Wired, images, make

DOUBLE = torch.float64
INF = math.inf


def fill(layer: Any, weight: Any, bias: Any = None) -> None:
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weight, dtype=layer.weight.dtype).reshape(layer.weight.shape))
        if bias is not None:
            layer.bias.copy_(torch.tensor(bias, dtype=layer.bias.dtype))


def two_layers(incoming: Any, bias: Any, outgoing: Any) -> Any:
    """Linear, ReLU, linear with these weights; incoming (hidden, in), outgoing (out, hidden)."""
    hidden, width = np.shape(incoming)
    network = nn.Sequential(
        nn.Linear(width, hidden, bias=bias is not None), nn.ReLU(), nn.Linear(hidden, len(outgoing))
    ).double()
    fill(network[0], incoming, bias)
    fill(network[2], outgoing)
    return network


def lone_group(network: Any, width: int) -> Any:
    return find_groups(network, images((width,), dtype=DOUBLE))[0]


def test_matrix_by_hand() -> None:
    network = two_layers([[3, 4], [4, 3], [0, 2]], [5, 2.5, -1], [[1, 10, 2], [3, 0, -4]])
    # α = 5, 5, 2; ŵ = (.6, .8), (.8, .6), (0, 1); b̂ = 1, .5, -.5; mean squares of α a: 25·5, 25·50, 4·10
    weights = {
        (0, 1): math.hypot(0.2, 0.2) / math.hypot(1.4, 1.4),
        (0, 2): math.hypot(0.6, 0.2) / math.hypot(0.6, 1.8),
        (1, 2): math.hypot(0.8, 0.4) / math.hypot(0.8, 1.6),
    }
    biases = {(0, 1): 0.5 / 1.5, (0, 2): 1.5 / 0.5, (1, 2): INF}
    squares = [125.0, 1250.0, 40.0]
    expected = np.full((3, 3), INF)
    plain = np.full((3, 3), INF)
    for (one, other), distance in weights.items():
        for stays, leaves in ((one, other), (other, one)):
            expected[stays, leaves] = squares[leaves] * (distance + biases[one, other]) ** 2
            plain[stays, leaves] = squares[leaves] * distance**2
    group = lone_group(network, 2)
    np.testing.assert_allclose(saliency_matrix(network, group), expected, rtol=1e-12)
    np.testing.assert_allclose(merge_problem(network, group, bias=False).matrix(), plain, rtol=1e-12)


def test_without_biases_only_the_weights_count_and_two_zero_biases_are_equal() -> None:
    bare = two_layers([[3, 4], [4, 3]], None, [[1, 10]])
    zero = two_layers([[3, 4], [4, 3]], [0, 0], [[1, 10]])
    expected = [[INF, 2500 / 49], [25 / 49, INF]]  # (.2 / 1.4)² = 1 / 49
    for network in (bare, zero):
        np.testing.assert_allclose(saliency_matrix(network, lone_group(network, 2)), expected, rtol=1e-12)


def test_all_readers_count_together() -> None:
    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(m.a(x))
        return torch.cat([m.b(hidden), m.c(hidden)], 1)

    network = Wired(run, a=nn.Linear(2, 2, bias=False), b=nn.Linear(2, 1), c=nn.Linear(2, 2)).double()
    fill(network.a, [[3, 4], [4, 3]])
    fill(network.b, [[1, 2]])
    fill(network.c, [[3, 4], [5, 6]])
    group = lone_group(network, 2)
    # mean squares over the three neurons that read: 25 · (1 + 9 + 25) / 3 and 25 · (4 + 16 + 36) / 3
    np.testing.assert_allclose(
        saliency_matrix(network, group), [[INF, 25 * 56 / 3 / 49], [25 * 35 / 3 / 49, INF]], rtol=1e-12
    )
    assert serves_published(network, group)


def test_squares_of_taps_and_positions_are_summed() -> None:
    network = make(ToyConv, dtype=DOUBLE)
    groups = {group.name: group for group in find_groups(network, images(network.shape, dtype=DOUBLE))}
    for name, reader in (("conv1", network.conv2), ("conv2", network.fc1)):
        weight = network.get_submodule(name).weight.detach().flatten(1)
        outgoing = reader.weight.detach().unflatten(1, (len(weight), -1)).flatten(2)  # (out, channels, taps or places)
        expected = outgoing.square().sum(2).mean(0) * weight.square().sum(1)
        found = merge_problem(network, groups[name]).outgoing.diagonal()
        np.testing.assert_allclose(found, expected.numpy(), rtol=1e-12)


def literal(network: Any, steps: int) -> tuple[list[int], list[float], Any]:
    """Do the published procedure with loops: matrices of weights, a smaller network after each step.

    The matrix is built once; after a merge the row and column of what left go, and the column of what stayed is
    worked out again. Returns the removed neurons in the numbering of the start, their saliencies and the network.
    """
    w = network[0].weight.detach().numpy().copy()
    b = None if network[0].bias is None else network[0].bias.detach().numpy().copy()
    a = network[2].weight.detach().numpy().copy()
    names = list(range(len(w)))

    def distance(i: int, j: int) -> float:
        one, other = w[i] / np.linalg.norm(w[i]), w[j] / np.linalg.norm(w[j])
        found = np.linalg.norm(one - other) / np.linalg.norm(one + other)
        if b is not None:
            first, second = b[i] / np.linalg.norm(w[i]), b[j] / np.linalg.norm(w[j])
            if first != second:
                found += abs(first - second) / abs(first + second)
        return float(found)

    def entry(i: int, j: int) -> float:
        folded = [a[n, j] * np.linalg.norm(w[j]) for n in range(len(a))]
        return INF if i == j else float(np.mean(np.square(folded)) * distance(i, j) ** 2)

    matrix = np.array([[entry(i, j) for j in range(len(w))] for i in range(len(w))])
    removed, saliencies = [], []
    for _ in range(steps):
        i, j = np.unravel_index(matrix.argmin(), matrix.shape)
        saliencies.append(matrix[i, j])
        removed.append(names.pop(j))
        a[:, i] += np.linalg.norm(w[j]) / np.linalg.norm(w[i]) * a[:, j]
        w, a = np.delete(w, j, 0), np.delete(a, j, 1)
        b = None if b is None else np.delete(b, j)
        matrix = np.delete(np.delete(matrix, j, 0), j, 1)
        i -= int(j < i)
        for other in range(len(w)):
            matrix[other, i] = entry(other, int(i))
    smaller = two_layers(w, b, a)
    with torch.no_grad():
        smaller[2].bias.copy_(network[2].bias)
    return removed, saliencies, smaller


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_criterion_and_repair_are_the_published_procedure(seed: int, bias: bool) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 14, bias=bias), nn.ReLU(), nn.Linear(14, 3))

    network = make(build, seed, DOUBLE)
    x = images((4,), 32, dtype=DOUBLE)
    groups = find_groups(network, x)
    assert serves_published(network, groups[0])
    order = rank_channels("data_free", groups, RankingContext(network, Statistics({}, {}, 0, math.nan)))["0"]
    sequence = merge_sequence(merge_problem(network, groups[0]))
    assert order.tolist() == [*np.setdiff1d(np.arange(14), sequence.removed), *sequence.removed[::-1]]
    for steps in range(1, 14):
        removed, saliencies, expected = literal(network, steps)
        assert sequence.removed[:steps].tolist() == removed
        np.testing.assert_allclose(sequence.saliency[:steps], saliencies, rtol=1e-9)
        plan = PruningPlan({"0": sorted(order[: 14 - steps].tolist())})
        smaller: Any = apply_plan(network, groups, plan, verify=x)
        compensate(smaller, network, groups, plan, None, "data_free")
        torch.testing.assert_close(smaller(x), expected(x), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(smaller[2].bias, network[2].bias, rtol=0, atol=0)
    assert any(int(into) in sequence.removed for into in sequence.kept_into)  # there were chains


@pytest.mark.parametrize("seed", range(4))
def test_only_those_allowed_leave(seed: int) -> None:
    network = make(lambda: nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 3)), seed, DOUBLE)
    problem = merge_problem(network, lone_group(network, 4))
    matrix, allowed = problem.matrix(), [1, 2, 5, 6]
    sequence = merge_sequence(problem, allowed=allowed)
    first = matrix[:, allowed].min(0)
    assert sequence.removed[0] == allowed[int(first.argmin())]
    assert sequence.saliency[0] == pytest.approx(first.min())
    assert sorted(sequence.removed.tolist()) == allowed
    assert set(sequence.ends().tolist()) <= {0, 3, 4, 7, 8}
    assert len(merge_sequence(problem, allowed=allowed, steps=2).removed) == 2
    assert len(merge_sequence(problem).removed) == 8
    assert not len(merge_sequence(problem, allowed=[]).removed)


def test_a_chain_ends_where_the_last_one_stays() -> None:
    # 0 → 1 → 2: distances make 0 and 1 nearest, the merged channel 1 then leaves into 2
    network = two_layers([[1, 0], [2, 0.02], [10, 1]], None, [[1, 1, 100]])
    sequence = merge_sequence(merge_problem(network, lone_group(network, 2)))
    assert sequence.removed.tolist() == [0, 1]
    assert sequence.kept_into.tolist() == [1, 2]
    assert sequence.ends().tolist() == [2, 2]
    assert sequence.saliency[1] > merge_problem(network, lone_group(network, 2)).matrix()[2, 1]  # a_1 has grown
    found = data_free_substitutions(network, find_groups(network, images((2,), dtype=DOUBLE)), {"0": [2]})
    (item,) = found["2"]
    ratios = dict(zip(item.feature.tolist(), item.ratio.tolist(), strict=True))
    alpha = [1.0, math.hypot(2, 0.02), math.hypot(10, 1)]
    assert ratios == {0: pytest.approx(alpha[0] / alpha[2]), 1: pytest.approx(alpha[1] / alpha[2])}
    assert (item.source == 2).all()
    assert (item.constant == 0).all()


def test_ties_take_the_lowest_index() -> None:
    network = two_layers([[1, 2]] * 2 + [[2, 1]] * 3, [0.5] * 5, [[1, 1, 1, 1, 1]])
    sequence = merge_sequence(merge_problem(network, lone_group(network, 2)), steps=3)
    assert sequence.removed.tolist() == [0, 2, 3]
    assert sequence.kept_into.tolist() == [1, 3, 4]
    assert (sequence.saliency == 0).all()


def test_dead_and_constant_neurons_leave_first_and_take_nobody() -> None:
    network = two_layers([[1, 0], [0, 0], [0, 0], [0, 3], [1, 1]], [0.1, -2, 0.7, 0.2, 0.4], [[1, 9, 9, 1, 1]])
    group, x = lone_group(network, 2), images((2,), 16, dtype=DOUBLE)
    matrix = saliency_matrix(network, group)
    assert np.isinf(matrix[[1, 2]][:, [0, 3, 4]]).all()
    assert (matrix[0, [1, 2]] == 0).all()
    sequence = merge_sequence(merge_problem(network, group), steps=2)
    assert sequence.removed.tolist() == [1, 2]
    assert sequence.kept_into.tolist() == [NOBODY, NOBODY]
    smaller: Any = apply_plan(network, [group], PruningPlan({"0": [0, 3, 4]}))
    compensate(smaller, network, [group], PruningPlan({"0": [0, 3, 4]}), None, "data_free")
    torch.testing.assert_close(smaller(x), network(x))
    network[2].bias = None  # nothing can hold the constant: it costs its squared effect, the dead one still nothing
    matrix = saliency_matrix(network, group)
    assert (matrix[[0, 3, 4], 1] == 0).all()
    np.testing.assert_allclose(matrix[[0, 3, 4], 2], 81 * 0.7**2)


def test_where_nobody_can_stand_in_the_least_read_is_deleted() -> None:
    network = two_layers([[1.0], [-2.0], [0.0]], [0, 0, 0], [[5, 1, 1]])
    sequence = merge_sequence(merge_problem(network, lone_group(network, 1)))
    assert sequence.removed.tolist() == [2, 1]  # the dead one, then 1 with α² a² = 4 against 25
    assert sequence.kept_into.tolist() == [NOBODY, NOBODY]
    assert sequence.saliency.tolist() == [0, INF]


def test_duplicates_and_their_scale_by_the_batch_norm_behind() -> None:
    network = make(ToyResidual, dtype=DOUBLE)
    with torch.no_grad():
        network.conv1.weight[3] = -2 * network.conv1.weight[1]
        network.bn1.running_mean[3] = -2 * network.bn1.running_mean[1]
        network.bn1.running_var[3] = 4 * (network.bn1.running_var[1] + network.bn1.eps) - network.bn1.eps
        network.bn1.weight[3], network.bn1.bias[3] = -3 * network.bn1.weight[1], 3 * network.bn1.bias[1]
    groups = {group.name: group for group in find_groups(network, images(network.shape, dtype=DOUBLE))}
    matrix = saliency_matrix(network, groups["conv1"])
    assert matrix.argmin() in (1 * 5 + 3, 3 * 5 + 1)
    assert matrix.min() < 1e-20
    assert np.sort(matrix.ravel())[2] > 1e-6
    assert not any(serves_published(network, group) for group in groups.values())


def test_what_was_published() -> None:
    def served(network: Any) -> dict[str, bool]:
        groups = find_groups(network, images(network.shape))
        return {group.name: serves_published(network, group) for group in groups}

    assert served(make(ToyMLP)) == {"fc1": True, "fc2": True}
    assert served(make(ToyConv)) == {"conv1": False, "conv2": False, "fc1": True}
    smooth = Wired(lambda m, x: m.b(torch.tanh(m.a(x))), a=nn.Linear(5, 4), b=nn.Linear(4, 3))
    normed = Wired(
        lambda m, x: m.b(torch.relu(m.n(m.a(x)))), a=nn.Linear(5, 4), n=nn.BatchNorm1d(4), b=nn.Linear(4, 3)
    ).eval()
    for network in (smooth, normed):
        network.shape = (5,)
        assert served(network) == {"a": False}


def never(*arguments: Any, **keywords: Any) -> Any:
    raise AssertionError("no example may enter the network")


@pytest.mark.parametrize("toy", TOYS)
def test_no_data_is_touched(toy: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    network = make(toy)
    groups = find_groups(network, images(network.shape))
    for function in ("linear", "conv2d", "batch_norm", "cross_entropy"):
        monkeypatch.setattr(F, function, never)
    monkeypatch.setattr(type(network), "forward", never)
    context = RankingContext(network, Statistics({}, {}, 0, math.nan))
    orders = rank_channels("data_free", groups, context)
    plan = PruningPlan({group.name: orders[group.name][: group.width // 2].tolist() for group in groups})
    smaller = apply_plan(network, groups, plan)
    before = {key: value.clone() for key, value in smaller.state_dict().items()}
    compensate(smaller, network, groups, plan, None, "data_free")
    assert any(not torch.equal(value, before[key]) for key, value in smaller.state_dict().items())
    assert all(torch.isfinite(value).all() for value in smaller.state_dict().values())


class Unread(Split):
    """A split that nothing may read."""

    def __init__(self) -> None:
        super().__init__("unread")

    def __len__(self) -> int:
        return 1

    batches = subset = to = example = prepared = never


def test_a_task_whose_data_cannot_be_read_is_pruned() -> None:
    network = make(ToyMLP)
    task = PruningTask(network, Unread(), Unread(), Unread(), Unread(), example_input=images(network.shape, 1))
    groups = find_groups(task.network, task.example)
    for group in groups:
        sequence = merge_sequence(merge_problem(task.network, group))
        count = max(1, cut_off(sequence.saliency))
        plan = PruningPlan({group.name: sorted(set(range(group.width)) - set(sequence.removed[:count].tolist()))})
        smaller: Any = apply_plan(task.network, groups, plan)
        compensate(smaller, task.network, groups, plan, None, "data_free")
        reader = group.consumers[0].module
        assert smaller.get_submodule(reader).in_features == group.width - count
    assert task.test.readings == ()


def test_five_hundred_neurons_take_less_than_a_second() -> None:
    network = make(lambda: nn.Sequential(nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10)))
    problem = merge_problem(network, find_groups(network, images((800,)))[0])
    start = time.perf_counter()
    sequence = merge_sequence(problem)
    assert time.perf_counter() - start < 1.0
    assert len(sequence.removed) == 499


def test_merges_of_five_hundred_stay_exact() -> None:
    rng = np.random.default_rng(0)
    distance = rng.random((60, 60))
    distance = distance + distance.T
    np.fill_diagonal(distance, np.inf)
    outgoing = rng.normal(size=(60, 4))
    sequence = merge_sequence(MergeProblem(distance, outgoing @ outgoing.T, np.full(60, np.inf)))
    present = list(range(60))
    for step in range(59):
        entries = {(i, j): (outgoing[j] ** 2).sum() * distance[i, j] for i in present for j in present if i != j}
        i, j = min(entries, key=lambda pair: entries[pair])
        assert (sequence.kept_into[step], sequence.removed[step]) == (i, j)
        np.testing.assert_allclose(sequence.saliency[step], entries[i, j], rtol=1e-7)
        outgoing[i] += outgoing[j]
        present.remove(j)


class TestCutOff:
    def test_mode_of_a_bell_with_outliers(self) -> None:
        rng = np.random.default_rng(0)
        bell = np.exp(rng.normal(-7, 0.6, 2000))
        bell.sort()
        count = cut_off(bell)
        assert abs(math.log(bell[count]) + 7) < 0.2  # about half: the bell is symmetric in the logarithm
        spoiled = np.concatenate([bell, np.full(80, 1e6), np.full(20, np.inf)])
        assert abs(cut_off(spoiled) - count) < 0.1 * count
        assert cut_off(np.concatenate([np.zeros(50), bell])) >= count  # what costs nothing always leaves

    def test_by_hand(self) -> None:
        assert cut_off([]) == 0
        assert cut_off([np.inf, np.inf]) == 0
        assert cut_off([0.0, 0.0, 0.0]) == 3
        assert cut_off(np.full(8, 2.0)) == 8
        logarithms = [-3, -2, -1, -1, -1, 0, 0, 0, 0, 0, 1, 1, 1, 2, 3]
        # without the outlier five bins of width 1.2 (Sturges' 1.22 is below Freedman's 1.62): 2, 3, 5, 3, 2 around 1
        assert cut_off([*np.exp(logarithms), 1e30]) == 10

    def test_share(self) -> None:
        values = np.exp(np.random.default_rng(1).normal(0, 1, 500))
        whole = cut_off(values)
        assert [cut_off(values, share) for share in (0.25, 0.5, 0.75)] == [int(s * whole) for s in (0.25, 0.5, 0.75)]

    def test_errors(self) -> None:
        with pytest.raises(UserError, match=r"share must be in \(0, 1\], but got share=1.5"):
            cut_off([1.0], 1.5)
        with pytest.raises(UserError, match="saliencies must be 0 or more, but some are negative or NaN"):
            cut_off([1.0, math.nan])


def test_errors() -> None:
    network = make(ToyMLP)
    problem = merge_problem(network, find_groups(network, images(network.shape))[0])
    with pytest.raises(UserError, match=r"allowed must be channels in \[0, 6\), but got \[2, 6\]"):
        merge_sequence(problem, allowed=[6, 2])
    with pytest.raises(UserError, match=r"steps must be in \[0, 2\], but got steps=3"):
        merge_sequence(problem, allowed=[0, 1], steps=3)
    with pytest.raises(UserError, match=r"steps must be in \[0, 5\], but got steps=6"):
        merge_sequence(problem, steps=6)
