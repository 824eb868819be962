"""Every statistic recomputed by hand: one example at a time, explicit forward passes, plain autograd, numpy."""

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import prunegym.pruning.moments
import pytest
import torch
import torch.nn.functional as F
from prunegym.pruning.errors import UserError
from prunegym.pruning.grouping import find_groups
from prunegym.pruning.layers import patches, weight_matrix
from prunegym.pruning.statistics import Statistics, measure
from torch import Tensor, nn
from toys import TOYS, ToyConv, ToyMLP, ToyResidual, ToyTurned, Wired, images, labelled, make

Maps = dict[str, list[Tensor]]


def forward_conv(net: Any, x: Tensor) -> tuple[Tensor, Maps, dict[str, Tensor]]:
    """Return logits, what each group's ReLUs show, and what each reader reads."""
    first = F.relu(net.conv1(x))
    pooled = F.max_pool2d(first, 2)
    second = F.relu(net.conv2(pooled))
    hidden = F.relu(net.fc1(second.flatten(1)))
    read = {"conv2": pooled, "fc1": second.flatten(1), "fc2": hidden}
    return net.fc2(hidden), {"conv1": [first], "conv2": [second], "fc1": [hidden]}, read


def forward_mlp(net: Any, x: Tensor) -> tuple[Tensor, Maps, dict[str, Tensor]]:
    first = F.relu(net.fc1(x))
    second = F.relu(net.fc2(first))
    return net.fc3(second), {"fc1": [first], "fc2": [second]}, {"fc2": first, "fc3": second}


def forward_residual(net: Any, x: Tensor) -> tuple[Tensor, Maps, dict[str, Tensor]]:
    first = F.relu(net.stem_bn(net.stem(x)))
    inner = F.relu(net.bn1(net.conv1(first)))
    summed = F.relu(net.bn2(net.conv2(inner)) + first)
    last = F.relu(net.down_bn(net.down(summed)))
    pooled = last.mean((2, 3))
    read = {"conv1": first, "conv2": inner, "down": summed, "fc": pooled}
    return net.fc(pooled), {"stem": [first, summed], "conv1": [inner], "down": [last]}, read


FORWARDS: list[tuple[Callable[[], Any], Callable[..., Any]]] = [
    (ToyConv, forward_conv),
    (ToyMLP, forward_mlp),
    (ToyResidual, forward_residual),
]


def by_hand(net: Any, forward: Callable[..., Any], x: Tensor, y: Tensor) -> dict[str, dict[str, np.ndarray]]:
    """Compute the group statistics example by example, without Taylor 2019."""
    result: dict[str, dict[str, Any]] = {}
    for n in range(len(x)):
        logits, maps, _ = forward(net, x[n : n + 1])
        loss = F.cross_entropy(logits, y[n : n + 1])
        for group, shown in maps.items():
            sums = result.setdefault(group, dict.fromkeys(("apoz", "mean", "t17", "batch"), 0.0))
            for z, g in zip(shown, torch.autograd.grad(loss, shown, retain_graph=True), strict=True):
                values = z.detach().numpy().reshape(z.shape[1], -1)
                product = (g * z).detach().numpy().reshape(z.shape[1], -1)
                share = 1 / len(x)
                sums["apoz"] += share * (values == 0).mean(1) / len(shown)
                sums["mean"] += share * values.mean(1) / len(shown)
                sums["t17"] += share * np.abs(product.mean(1))
                sums["batch"] += share * product.mean(1)  # its absolute value is what Taylor 2017 is not
    return result


def gates(net: Any, forward: Callable[..., Any], x: Tensor, y: Tensor) -> dict[str, np.ndarray]:
    """Return the squared gradient of a minibatch's mean loss by a number that multiplies each channel."""
    logits, maps, _ = forward(net, x)
    loss = F.cross_entropy(logits, y)
    result: dict[str, np.ndarray] = {}
    for group, shown in maps.items():
        for z, g in zip(shown, torch.autograd.grad(loss, shown, retain_graph=True), strict=True):
            gate = (g * z).detach().transpose(0, 1).flatten(1).sum(1).numpy()
            result[group] = result.get(group, 0.0) + gate**2
    return result


def measured(
    toy: Callable[[], Any], batch: int, n: int = 12, **arguments: Any
) -> tuple[Any, Statistics, list[tuple[Tensor, Tensor]]]:
    network = make(toy, dtype=torch.float64)
    batches = labelled(network, n, batch, dtype=torch.float64)
    return network, measure(network, find_groups(network, batches[0][0]), batches, **arguments), batches


@pytest.mark.parametrize("batch", [12, 5, 1])
@pytest.mark.parametrize(("toy", "forward"), FORWARDS)
def test_group_statistics_by_hand(toy: Callable[[], Any], forward: Callable[..., Any], batch: int) -> None:
    network, statistics, batches = measured(toy, batch)
    x, y = (torch.cat(part) for part in zip(*batches, strict=True))
    expected = by_hand(network, forward, x, y)
    assert set(statistics.groups) == set(expected) == set(network.widths)
    for name, hand in expected.items():
        ours = statistics.groups[name]
        np.testing.assert_allclose(ours.apoz, hand["apoz"], rtol=1e-10)
        np.testing.assert_allclose(ours.mean_activation, hand["mean"], rtol=1e-10)
        np.testing.assert_allclose(ours.taylor_2017, hand["t17"], rtol=1e-8, atol=1e-14)
        each = [(len(inputs) / 12) * gates(network, forward, inputs, labels)[name] for inputs, labels in batches]
        np.testing.assert_allclose(ours.taylor_2019, sum(each), rtol=1e-8, atol=1e-14)
        assert 0 < hand["apoz"].mean() < 1
        assert hand["t17"].max() > 1e-4
    assert statistics.examples == 12
    assert statistics.loss == pytest.approx(F.cross_entropy(network(x), y).item(), rel=1e-10)


def test_taylor_2017_is_not_one_absolute_value_over_the_batch() -> None:
    network, statistics, batches = measured(ToyConv, 12)
    hand = by_hand(network, forward_conv, *batches[0])
    for name in network.widths:
        ours, wrong = statistics.groups[name].taylor_2017, np.abs(hand[name]["batch"])
        assert ours is not None
        assert (ours >= wrong - 1e-15).all()  # the triangle inequality
        assert ours.max() > 1.2 * wrong.max()  # and examples do cancel here


def unfolded(layer: Any, tensor: Tensor) -> np.ndarray:
    """Return the patches a convolution reads, by PyTorch's own unfold: (examples × positions, channels × taps)."""
    if isinstance(layer, nn.Linear):
        return tensor.detach().numpy()
    patches = F.unfold(tensor.detach(), layer.kernel_size, padding=layer.padding, stride=layer.stride)
    return patches.transpose(1, 2).flatten(0, 1).numpy()


@pytest.mark.parametrize("batch", [12, 5, 1])
@pytest.mark.parametrize(("toy", "forward"), FORWARDS)
def test_moments_by_hand(toy: Callable[[], Any], forward: Callable[..., Any], batch: int) -> None:
    network, statistics, batches = measured(toy, batch, positions=36)
    _, _, read = forward(network, torch.cat([x for x, _ in batches]))
    assert set(statistics.consumers) == set(read)
    for name, tensor in read.items():
        rows = unfolded(network.get_submodule(name), tensor)
        ours = statistics.consumers[name]
        assert ours.rows == len(rows)
        np.testing.assert_allclose(ours.mean, rows.mean(0), rtol=1e-10)
        np.testing.assert_allclose(ours.second_moment, rows.T @ rows / len(rows), rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)),
        nn.Conv2d(3, 4, 3, padding="same", padding_mode="reflect"),
        nn.Conv2d(3, 4, (1, 5), padding="same"),
        nn.Conv1d(3, 4, 5, padding=2, padding_mode="circular"),
        nn.Conv3d(3, 4, 2, padding=1, stride=2),
    ],
)
def test_patches_are_what_the_convolution_reads(layer: Any) -> None:
    shape = {nn.Conv1d: (9,), nn.Conv2d: (7, 6), nn.Conv3d: (4, 5, 3)}[type(layer)]
    x = images((3, *shape), 4)
    read = patches(layer, x, 10**6, torch.Generator())
    expected = layer(x).flatten(2).transpose(1, 2).flatten(0, 1)  # (N·positions, out)
    torch.testing.assert_close(read @ layer.weight.flatten(1).T + layer.bias, expected, rtol=1e-4, atol=1e-5)
    some = patches(layer, x, 3, torch.Generator().manual_seed(0))
    assert some.shape == (4 * 3, read.shape[1])
    whole = {tuple(row.tolist()) for row in read}
    assert {tuple(row.tolist()) for row in some} <= whole


def test_few_positions_estimate_the_moments_of_all() -> None:
    network = make(ToyResidual)
    batches = labelled(network, 400, 100)
    groups = find_groups(network, batches[0][0])
    exact, some = (measure(network, groups, batches, positions=most).consumers["conv2"] for most in (36, 9))
    assert (exact.rows, some.rows) == (400 * 36, 400 * 9)
    difference = np.linalg.norm(some.second_moment - exact.second_moment) / np.linalg.norm(exact.second_moment)
    assert 0 < difference < 0.1
    again = measure(network, groups, batches, positions=9).consumers["conv2"]
    np.testing.assert_array_equal(again.second_moment, some.second_moment)


def within(parts: np.ndarray) -> np.ndarray:
    """Average the parts' covariances; parts: (parts, rows, C)."""
    return np.mean([np.cov(part.T, bias=True) for part in parts], axis=0)


def test_a_convolution_of_many_features_shares_them_between_taps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prunegym.pruning.moments, "PATCH_LIMIT", 35)  # conv2 of the toy reads 4 x 9 features
    network, statistics, batches = measured(ToyConv, 5)
    _, _, read = forward_conv(network, torch.cat([x for x, _ in batches]))
    rows = unfolded(network.conv2, read["conv2"])  # (examples × positions, 36)
    ours = statistics.consumers["conv2"]
    assert ours.rows == len(rows)
    np.testing.assert_allclose(ours.mean, rows.mean(0), rtol=1e-10)
    np.testing.assert_allclose(ours.variance, rows.var(0), rtol=1e-10, atol=1e-15)
    taps = np.moveaxis(rows.reshape(-1, 4, 9), 2, 0)
    np.testing.assert_allclose(ours.covariance, within(taps), rtol=1e-10, atol=1e-15)
    plain = np.mean([tap.T @ tap / len(tap) for tap in taps], axis=0)
    np.testing.assert_allclose(ours.second_moment, plain, rtol=1e-10, atol=1e-15)


def test_a_wide_flatten_shares_features_between_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prunegym.pruning.moments, "GRAM_LIMIT", 10)  # fc1 of the toy reads 24 features
    network, statistics, batches = measured(ToyConv, 5)
    _, maps, _ = forward_conv(network, torch.cat([x for x, _ in batches]))
    rows = maps["conv2"][0].detach().flatten(1).numpy()  # (N, 6·4)
    ours = statistics.consumers["fc1"]
    assert ours.rows == 12
    np.testing.assert_allclose(ours.mean, rows.mean(0), rtol=1e-10)
    positions = np.moveaxis(rows.reshape(12, 6, 4), 2, 0)
    np.testing.assert_allclose(ours.covariance, within(positions), rtol=1e-10, atol=1e-15)


def test_an_uneven_flatten_has_no_covariance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prunegym.pruning.moments, "GRAM_LIMIT", 10)

    network, statistics, batches = measured(ToyTurned, 5)
    ours = statistics.consumers["fc1"]
    assert ours.covariance.shape == (0, 0)
    _, maps, _ = forward_conv(network, torch.cat([x for x, _ in batches]))
    rows = maps["conv2"][0].detach().permute(0, 2, 3, 1).flatten(1).numpy()
    np.testing.assert_allclose(ours.mean, rows.mean(0), rtol=1e-10)
    np.testing.assert_allclose(ours.variance, rows.var(0), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize(
    "layer",
    [
        nn.ConvTranspose2d(3, 4, 2, stride=2),
        nn.ConvTranspose2d(3, 4, (4, 3), stride=(2, 3), padding=(1, 2), output_padding=(1, 0), dilation=(1, 2)),
        nn.ConvTranspose2d(3, 4, 2, padding=1),
        nn.ConvTranspose1d(3, 4, 5, stride=3, padding=1, output_padding=2),
        nn.ConvTranspose3d(3, 4, 2, stride=2, padding=1),
    ],
)
def test_patches_of_a_transposed_convolution(layer: Any) -> None:
    shape = {nn.ConvTranspose1d: (7,), nn.ConvTranspose2d: (4, 5), nn.ConvTranspose3d: (3, 2, 4)}[type(layer)]
    x = images((3, *shape), 2)
    read = patches(layer, x, 10**6, torch.Generator())
    expected = layer(x).flatten(2).transpose(1, 2).flatten(0, 1)
    matrix = torch.from_numpy(weight_matrix(layer, layer.weight, read.shape[1])).float()
    torch.testing.assert_close(read @ matrix + layer.bias, expected, rtol=1e-4, atol=1e-5)


def test_half_precision_sums_do_not_overflow() -> None:
    network = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
    x, y = 30 * images((12,), 4000), torch.zeros(4000, dtype=torch.int64)
    groups = find_groups(network, x[:1])
    exact = measure(network, groups, [(x, y)], gradients=False).consumers["2"]
    some = measure(network.half(), groups, [(x.half(), y)], gradients=False).consumers["2"]
    np.testing.assert_allclose(some.second_moment, exact.second_moment, rtol=0.05, atol=1e-3 * exact.variance.max())


def test_moments_that_are_not_finite_name_the_layer() -> None:
    network = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3), nn.Softmax(1))
    x = images((5,), 6)
    groups = find_groups(network, x)
    with torch.no_grad():
        network[0].weight[0] = 1e30
    with pytest.raises(UserError, match="what layer '2' reads must be finite, but are not"):
        measure(network, groups, [(x, torch.zeros(6, dtype=torch.int64))], gradients=False)


def test_weight_norms_by_hand() -> None:
    network, statistics, _ = measured(ToyResidual, 12)
    stem, second = network.stem.weight.detach().numpy(), network.conv2.weight.detach().numpy()
    for channel in range(6):  # the residual sum's channels have two producers
        weights = np.concatenate([stem[channel].ravel(), second[channel].ravel()])
        assert statistics.groups["stem"].l1[channel] == pytest.approx(np.abs(weights).sum())
        assert statistics.groups["stem"].l2[channel] == pytest.approx(np.sqrt((weights**2).sum()))
    inner = network.conv1.weight.detach().numpy().reshape(5, -1)
    np.testing.assert_allclose(statistics.groups["conv1"].l1, np.abs(inner).sum(1))
    np.testing.assert_allclose(statistics.groups["conv1"].l2, np.linalg.norm(inner, axis=1))


def test_transposed_convolution_norms_and_moments() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(nn.ConvTranspose2d(2, 3, 2, stride=2), nn.ReLU(), nn.ConvTranspose2d(3, 4, 2))
        network = network.append(nn.ReLU()).append(nn.Conv2d(4, 3, 7)).append(nn.Flatten()).double()
    x, y = images((2, 3, 3), 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    statistics = measure(network, find_groups(network, x), [(x, y)], positions=100)
    weight: Any = network[0].weight
    np.testing.assert_allclose(statistics.groups["0"].l1, weight.detach().abs().sum((0, 2, 3)).numpy())
    np.testing.assert_allclose(statistics.groups["0"].l2, weight.detach().square().sum((0, 2, 3)).sqrt().numpy())
    ours, weight = statistics.consumers["2"], network[2].weight
    expected = network[2](F.relu(network[0](x))).detach()  # its mean and variance follow from the moments
    matrix = weight_matrix(network[2], weight, len(ours.mean))
    bias: Any = network[2].bias
    np.testing.assert_allclose(ours.mean @ matrix + bias.detach().numpy(), expected.mean((0, 2, 3)), rtol=1e-10)
    variance = np.einsum("fo,fg,go->o", matrix, ours.covariance, matrix)
    np.testing.assert_allclose(variance, expected.var((0, 2, 3), unbiased=False), rtol=1e-9)


def test_group_without_activation_is_watched_at_its_layer() -> None:
    network = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)).double()
    x, y = images((5,), 6, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])
    statistics = measure(network, find_groups(network, x), [(x[:4], y[:4]), (x[4:], y[4:])])
    hidden = network[0](x)
    (gradient,) = torch.autograd.grad(F.cross_entropy(network[1](hidden), y, reduction="sum"), hidden)
    ours = statistics.groups["0"]
    assert ours.apoz is None
    np.testing.assert_allclose(ours.mean_activation, hidden.detach().mean(0), rtol=1e-10)
    np.testing.assert_allclose(ours.taylor_2017, (gradient * hidden).detach().abs().mean(0), rtol=1e-10)


def test_parts_that_were_not_asked_for() -> None:
    _, statistics, _ = measured(ToyConv, 6, gradients=False, grams=False)
    assert statistics.consumers == {}
    assert np.isnan(statistics.loss)
    for group in statistics.groups.values():
        assert group.taylor_2017 is None
        assert group.taylor_2019 is None
        assert group.apoz is not None
    _, full, _ = measured(ToyConv, 6)
    for name, group in statistics.groups.items():
        np.testing.assert_array_equal(group.apoz, full.groups[name].apoz)


def test_float32_and_a_network_under_no_grad() -> None:
    network = make(ToyResidual)
    _, exact, batches = measured(ToyResidual, 5)
    batches = [(x.float(), y) for x, y in batches]
    groups = find_groups(network, batches[0][0])
    with torch.no_grad():
        statistics = measure(network, groups, batches)
    for name in network.widths:
        np.testing.assert_allclose(statistics.groups[name].taylor_2017, exact.groups[name].taylor_2017, rtol=1e-3)


def failing(batches: list[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    yield batches[0]
    raise RuntimeError("the disk is gone")


@pytest.mark.parametrize("end", ["done", "data fails", "label out of range", "no data"])
@pytest.mark.parametrize("toy", TOYS)
def test_network_comes_back_as_it_was(toy: Callable[[], Any], end: str) -> None:
    network = make(toy).train()
    children = list(network.children())
    children[1].eval()
    parameters = list(network.parameters())
    parameters[0].requires_grad_(False)
    parameters[1].grad = torch.ones_like(parameters[1])
    state = {key: value.clone() for key, value in network.state_dict().items()}
    flags = [module.training for module in network.modules()]
    batches = labelled(network)
    groups = find_groups(network, batches[0][0])
    if end == "done":
        measure(network, groups, batches)
    elif end == "data fails":
        with pytest.raises(RuntimeError, match="the disk is gone"):
            measure(network, groups, failing(batches))
    elif end == "label out of range":
        with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
            measure(network, groups, [(x, y + 7) for x, y in batches])
    else:
        with pytest.raises(UserError, match="statistics need at least one batch of data, but none came"):
            measure(network, groups, [])
    assert [module.training for module in network.modules()] == flags
    assert [parameter.requires_grad for parameter in parameters] == [False] + [True] * (len(parameters) - 1)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
    assert [parameter.grad is None for parameter in parameters[:3]] == [True, False, True]
    assert bool((parameters[1].grad == 1).all())
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    assert not any(x.requires_grad for x, _ in batches)


@pytest.mark.parametrize("end", ["done", "data fails"])
def test_no_activation_outlives_its_batch(end: str) -> None:
    network = make(ToyConv)
    groups = find_groups(network, images(network.shape, 1))
    alive: list[list[weakref.ref[Tensor]]] = []
    network.relu.register_forward_hook(lambda _m, _i, output: alive[-1].append(weakref.ref(output)))

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in labelled(network, 15, 5):
            assert not any(reference() is not None for earlier in alive[:-1] for reference in earlier)
            alive.append([])
            yield batch
        if end != "done":
            raise RuntimeError("the disk is gone")

    gc.disable()  # nothing may wait for the collector of cycles
    try:
        if end == "done":
            measure(network, groups, batches())
        else:
            with pytest.raises(RuntimeError, match="the disk is gone"):
                measure(network, groups, batches())
        assert [len(seen) for seen in alive] == [3, 3, 3]
        assert not any(reference() is not None for seen in alive for reference in seen)
    finally:
        gc.enable()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_outputs_that_are_not_finite(value: float) -> None:
    network = make(ToyMLP)
    batches = labelled(network)
    groups = find_groups(network, batches[0][0])
    with torch.no_grad():
        network.fc3.bias[0] = value
    with pytest.raises(UserError, match="the network's outputs must be finite, but some are NaN or infinite"):
        measure(network, groups, batches)
    assert not any(module._forward_pre_hooks for module in network.modules())


class Overwriting(nn.Module):
    """Changes an activation in place after it was observed, or leaves it and changes a copy."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        self.first, self.second, self.last = nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        start = self.first(x)
        maps = F.gelu(self.second(start))
        maps = maps.add_(start).mul_(2.0) if self.in_place else (maps + start) * 2.0
        return self.last(maps)


def test_an_activation_may_be_overwritten_after_it_was_observed() -> None:
    network = make(lambda: Overwriting(True), dtype=torch.float64)
    copied = make(lambda: Overwriting(False), dtype=torch.float64)
    x, y = images((5,), 6, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])
    ours, expected = (measure(net, find_groups(net, x), [(x, y)]).groups for net in (network, copied))
    assert list(ours) == list(expected)
    for name, group in expected.items():
        np.testing.assert_allclose(ours[name].taylor_2017, group.taylor_2017, rtol=1e-10)
        np.testing.assert_allclose(ours[name].mean_activation, group.mean_activation, rtol=1e-10)
        assert group.taylor_2017 is not None
        assert group.taylor_2017.max() > 0


def interleaved(maps: Tensor) -> Tensor:
    return maps.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)


CONV, POINT = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 1)
# the network before its last layer, its layers, and the ReLU's result by hand with channels in front
SITES: dict[str, tuple[Callable[[Any, Tensor], Tensor], dict[str, nn.Module], Callable[[Any, Tensor], Tensor]]] = {
    "turned round": (
        lambda net, x: net.b(F.relu(net.a(x).flip(1))).mean((2, 3)), {"a": CONV, "b": POINT},
        lambda net, x: F.relu(net.a(x)).transpose(0, 1),
    ),
    "channels last, as many rows as channels": (
        lambda net, x: net.b(F.relu(net.a(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)).mean((2, 3)),
        {"a": CONV, "b": POINT}, lambda net, x: F.relu(net.a(x)).transpose(0, 1),
    ),
    "as many tokens as channels": (
        lambda net, x: net.b(F.relu(net.a(x).flatten(2).transpose(1, 2))).mean(1),
        {"a": nn.Conv2d(3, 16, 2, stride=2), "b": nn.Linear(16, 6)}, lambda net, x: F.relu(net.a(x)).transpose(0, 1),
    ),
    "a shuffle": (  # a unit is channels c and c + 4; both places show it
        lambda net, x: net.b(F.relu(interleaved(net.a(x)))).mean((2, 3)), {"a": CONV, "b": POINT},
        lambda net, x: F.relu(net.a(x)).unflatten(1, (2, 4)).transpose(1, 2).transpose(0, 1),
    ),
    "a flatten": (
        lambda net, x: net.b(F.relu(net.a(x).flatten(1))), {"a": nn.Conv2d(3, 4, 3), "b": nn.Linear(144, 6)},
        lambda net, x: F.relu(net.a(x)).transpose(0, 1),
    ),
    "a concatenation": (
        lambda net, x: net.b(F.relu(torch.cat([net.c(x), net.a(x)], 1))).mean((2, 3)),
        {"c": nn.Conv2d(3, 3, 1), "a": nn.Conv2d(3, 5, 1), "b": POINT},
        lambda net, x: F.relu(net.a(x)).transpose(0, 1),
    ),
    "windows": (
        lambda net, x: net.b(
            F.relu(net.a(x).unflatten(3, (2, 4)).permute(0, 3, 2, 4, 1).flatten(0, 1)).unflatten(0, (-1, 2))
        ).mean((1, 2, 3)),
        {"a": CONV, "b": nn.Linear(8, 6)}, lambda net, x: F.relu(net.a(x)).transpose(0, 1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SITES)
def test_activations_are_seen_where_their_channels_lie(name: str) -> None:
    run, layers, shown = SITES[name]
    network: Any = Wired(lambda net, x: net.fc(F.relu(run(net, x))), **layers, fc=nn.Linear(6, 3)).double()
    with torch.no_grad():  # one channel is dead, the next one never, so that a wrong place is seen
        network.a.bias.copy_(torch.linspace(-1, 1, len(network.a.bias)))
        network.a.bias[:2] = torch.tensor([-9.0, 9.0])
    x, y = images((3, 8, 8), 6, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])
    groups = find_groups(network, x[:2])
    group = next(group for group in groups if group.name == "a")
    (site,) = group.sites
    assert site.rectified
    ours = measure(network, groups, [(x[:4], y[:4]), (x[4:], y[4:])]).groups["a"]
    values = shown(network, x).detach()  # (width, N, …)
    assert len(values) == group.width
    assert ours.apoz is not None
    np.testing.assert_allclose(ours.apoz, (values == 0).double().flatten(1).mean(1), rtol=1e-10)
    np.testing.assert_allclose(ours.mean_activation, values.flatten(1).mean(1), rtol=1e-10)
    assert len(set(ours.apoz.tolist())) > 1
    if name == "a shuffle":
        return  # its units have two places each
    expected = torch.zeros(group.width, dtype=torch.float64)
    for n in range(6):  # the gradient by a factor of a channel is the sum of gradient × activation
        scale = torch.ones(group.width, dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(F.cross_entropy(scaled(network, x[n : n + 1], scale), y[n : n + 1]), scale)
        expected += gradient.abs() / 6 / values[0, 0].numel()
    np.testing.assert_allclose(ours.taylor_2017, expected, rtol=1e-8, atol=1e-14)


def scaled(network: Any, x: Tensor, scale: Tensor) -> Tensor:
    """Run a network with the output of `a` multiplied: a ReLU passes a factor on."""
    handle = network.a.register_forward_hook(lambda _m, _i, output: output * scale[:, None, None])
    try:
        return network(x)
    finally:
        handle.remove()


def test_each_run_of_a_layer_counts_by_its_own_positions() -> None:
    def two_scales(net: Any, x: Tensor) -> Tensor:
        return net.fc(net.a(x).mean((2, 3)) + net.a(F.avg_pool2d(x, 2)).mean((2, 3)))

    network: Any = Wired(two_scales, a=nn.Conv2d(3, 5, 3, padding=1), fc=nn.Linear(5, 3)).double()
    x, y = images((3, 8, 8), 6, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])
    ours = measure(network, find_groups(network, x[:1]), [(x, y)]).groups["a"]
    large, small = network.a(x), network.a(F.avg_pool2d(x, 2))
    expected = (large.mean((0, 2, 3)) + small.mean((0, 2, 3))) / 2
    np.testing.assert_allclose(ours.mean_activation, expected.detach(), rtol=1e-10)
    loss = F.cross_entropy(network.fc(large.mean((2, 3)) + small.mean((2, 3))), y, reduction="sum")
    gradients = torch.autograd.grad(loss, (large, small))
    parts = [(g * z).mean((2, 3)).abs().mean(0) for g, z in zip(gradients, (large, small), strict=True)]
    np.testing.assert_allclose(ours.taylor_2017, sum(parts).detach(), rtol=1e-10)  # type: ignore[union-attr]


@pytest.mark.parametrize("gradients", [True, False])
def test_a_network_that_begins_in_place_leaves_the_data(gradients: bool) -> None:
    network = Wired(lambda net, x: net.b(F.relu(net.a(x.sub_(0.5)))), a=nn.Linear(5, 4), b=nn.Linear(4, 3))
    x, y = images((5,), 6), torch.tensor([0, 1, 2, 0, 1, 2])
    before = x.clone()
    ours = measure(network, find_groups(network, x), [(x, y)], gradients=gradients).groups["a"]
    assert torch.equal(x, before)
    hidden = F.relu(network.get_submodule("a")(x - 0.5))
    np.testing.assert_allclose(ours.mean_activation, hidden.mean(0).detach(), rtol=1e-5)


def test_gradients_that_cannot_be_had_and_outputs_that_are_no_tensor() -> None:
    y = torch.tensor([0, 1, 2, 0])
    words = Wired(lambda net, x: net.b(F.relu(net.a(net.table(x).mean(1)))), table=nn.Embedding(9, 5),
                  a=nn.Linear(5, 4), b=nn.Linear(4, 3))  # fmt: skip
    tokens = torch.arange(12).reshape(4, 3) % 9
    groups = find_groups(words, tokens)
    with pytest.raises(UserError, match=r"inputs of floating-point numbers, but got torch.int64; .* gradients=False"):
        measure(words, groups, [(tokens, y)])
    assert measure(words, groups, [(tokens, y)], gradients=False).groups["a"].apoz is not None

    def frozen(net: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            hidden = F.relu(net.a(x))
        return net.b(hidden)

    x = images((5,))
    stem = Wired(frozen, a=nn.Linear(5, 4), b=nn.Linear(4, 3))
    groups = find_groups(stem, x)
    with pytest.raises(UserError, match=r"none reaches an activation .* runs under torch.no_grad"):
        measure(stem, groups, [(x, y)])
    assert np.isfinite(measure(stem, groups, [(x, y)], gradients=False).groups["a"].mean_activation).all()
    cut_off = Wired(lambda net, x: net.b(F.relu(net.a(x.detach()))), a=nn.Linear(5, 4), b=nn.Linear(4, 3))
    with pytest.raises(UserError, match=r"gradients must flow .* none reaches its output"):
        measure(cut_off, find_groups(cut_off, x), [(x, y)])
    several = Wired(lambda net, x: {"logits": net.b(F.relu(net.a(x)))}, a=nn.Linear(5, 4), b=nn.Linear(4, 3))
    with pytest.raises(UserError, match=r"must return a tensor of logits \(N, classes\), but it returns a dict"):
        measure(several, find_groups(several, x), [(x, y)])
