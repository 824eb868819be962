"""Repair without training: against numpy's least squares, exact cases, and a contract for every method."""

import copy
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import prunegym.pruning.least_squares
import prunegym.pruning.moments
import pytest
import torch
import torch.nn.functional as F
from prunegym.pruning.compensation import COMPENSATIONS, compensate, get_compensation
from prunegym.pruning.errors import UserError
from prunegym.pruning.grouping import find_groups
from prunegym.pruning.plan import PruningPlan
from prunegym.pruning.recalibration import recalibrate
from prunegym.pruning.statistics import measure
from prunegym.pruning.surgery import apply_plan
from torch import Tensor, nn
from toys import TOYS, ToyConv, ToyMLP, ToyResidual, ToyTurned, images, labelled, make, random_plan

DOUBLE = torch.float64


def repaired(network: Any, plan: Any, method: str, x: Tensor) -> Any:
    groups = find_groups(network, x[:1])
    labels = torch.zeros(len(x), dtype=torch.int64)
    statistics = measure(network, groups, zip(x.split(16), labels.split(16), strict=True), positions=1000)
    smaller = apply_plan(network, groups, PruningPlan(plan))
    compensate(smaller, network, groups, PruningPlan(plan), statistics, method)
    return smaller


def without_ridge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prunegym.pruning.least_squares, "RIDGE", 1e-12)
    monkeypatch.setattr(prunegym.pruning.least_squares, "SHRINKAGE", 0.0)


def affine_fit(kept: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Regress target on kept inputs and a constant; return slope (K, out) and intercept (out,)."""
    solution = np.linalg.lstsq(np.hstack([kept, np.ones((len(kept), 1))]), target, rcond=None)[0]
    return solution[:-1], solution[-1]


def test_linear_layer_is_the_best_fit_of_its_own_output(monkeypatch: pytest.MonkeyPatch) -> None:
    without_ridge(monkeypatch)
    network = make(ToyMLP, 3, DOUBLE)
    x = images((5,), 64, dtype=DOUBLE)
    smaller = repaired(network, {"fc1": [0, 2, 3, 5]}, "least_squares", x)
    read = F.relu(network.fc1(x)).detach()
    slope, intercept = affine_fit(read[:, [0, 2, 3, 5]].numpy(), network.fc2(read).detach().numpy())
    fitted = read[:, [0, 2, 3, 5]].numpy() @ slope + intercept
    np.testing.assert_allclose(smaller.fc2(read[:, [0, 2, 3, 5]]).detach().numpy(), fitted, atol=1e-7)
    assert np.abs(fitted - network.fc2(read).detach().numpy()).max() > 1e-3  # the fit is not perfect


def test_linear_layer_behind_a_flatten(monkeypatch: pytest.MonkeyPatch) -> None:
    without_ridge(monkeypatch)
    network = make(ToyConv, 0, DOUBLE)
    x = images(network.shape, 160, dtype=DOUBLE)
    smaller = repaired(network, {"conv2": [0, 1, 3, 4]}, "least_squares", x)
    maps = F.relu(network.conv2(F.max_pool2d(F.relu(network.conv1(x)), 2))).detach()
    read, kept = maps.flatten(1), maps[:, [0, 1, 3, 4]].flatten(1)
    slope, intercept = affine_fit(kept.numpy(), network.fc1(read).detach().numpy())
    np.testing.assert_allclose(smaller.fc1(kept).detach().numpy(), kept.numpy() @ slope + intercept, atol=1e-6)


def fitted_convolution(layer: Any, maps: Tensor, kept: list[int]) -> Tensor:
    """Regress a convolution's output on the kept channels of every tap, and a constant, by numpy; (N, out, P)."""
    read = F.unfold(maps, layer.kernel_size, padding=layer.padding, stride=layer.stride)  # (N, C·taps, P)
    taps = layer.kernel_size[0] * layer.kernel_size[1]
    rows = read.unflatten(1, (-1, taps))[:, kept].flatten(1, 2).transpose(1, 2).flatten(0, 1).numpy()
    target = layer(maps).detach().flatten(2).transpose(1, 2)
    slope, intercept = affine_fit(rows, target.flatten(0, 1).numpy())
    return torch.from_numpy(rows @ slope + intercept).reshape(target.shape).transpose(1, 2)


@pytest.mark.parametrize("padding", [0, 1])
def test_convolution_is_the_best_fit_of_its_own_output(padding: int, monkeypatch: pytest.MonkeyPatch) -> None:
    without_ridge(monkeypatch)
    network = make(ToyConv, 1, DOUBLE)
    network.conv2.padding = (padding, padding)
    network.fc1 = nn.Linear(6 * (2 + 2 * padding) ** 2, 8).double()
    x = images(network.shape, 32, dtype=DOUBLE)
    smaller = repaired(network, {"conv1": [1, 3]}, "least_squares", x)
    maps = F.max_pool2d(F.relu(network.conv1(x)), 2).detach()
    fitted = fitted_convolution(network.conv2, maps, [1, 3])
    torch.testing.assert_close(smaller.conv2(maps[:, [1, 3]]).detach().flatten(2), fitted, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("padding", [0, 1])  # at the border the taps read zeros: the fit knows
def test_batch_norm_takes_the_constant_of_a_layer_without_bias(padding: int, monkeypatch: pytest.MonkeyPatch) -> None:
    without_ridge(monkeypatch)
    network = make(ToyResidual, 2, DOUBLE)
    network.conv2.padding = (padding, padding)
    network.conv1.padding = (2 - padding, 2 - padding)
    x = images(network.shape, 32, dtype=DOUBLE)
    smaller = repaired(network, {"conv1": [0, 2, 3]}, "least_squares", x)
    maps = F.relu(network.bn1(network.conv1(F.relu(network.stem_bn(network.stem(x)))))).detach()
    fitted = fitted_convolution(network.conv2, maps, [0, 2, 3])
    expected = network.bn2(fitted.unflatten(2, (6, 6)))
    got = smaller.bn2(smaller.conv2(maps[:, [0, 2, 3]]))
    torch.testing.assert_close(got, expected, atol=1e-7, rtol=1e-7)
    assert smaller.conv2.bias is None
    assert not torch.equal(smaller.bn2.running_mean, network.bn2.running_mean)
    assert torch.equal(smaller.bn2.running_var, network.bn2.running_var)


def shared_fit(parts: np.ndarray, kept: list[int], gone: list[int]) -> np.ndarray:
    """Regress all parts (parts, rows, C) at once: removed channels on kept ones, both around the part's mean."""
    centred = parts - parts.mean(1, keepdims=True)
    rows = centred.reshape(-1, parts.shape[2])
    return np.linalg.lstsq(rows[:, kept], rows[:, gone], rcond=None)[0]


@pytest.mark.parametrize("padding", [0, 1])
def test_taps_share_one_fit_where_a_convolution_has_many(padding: int, monkeypatch: pytest.MonkeyPatch) -> None:
    without_ridge(monkeypatch)
    monkeypatch.setattr(prunegym.pruning.moments, "PATCH_LIMIT", 10)
    network = make(ToyConv, 1, DOUBLE)
    network.conv2.padding = (padding, padding)
    network.fc1 = nn.Linear(6 * (2 + 2 * padding) ** 2, 8).double()
    x = images(network.shape, 32, dtype=DOUBLE)
    smaller = repaired(network, {"conv1": [1, 3]}, "least_squares", x)
    maps = F.max_pool2d(F.relu(network.conv1(x)), 2).detach()
    read = F.unfold(maps, 3, padding=padding).unflatten(1, (4, 9))  # (N, C, taps, P)
    slope = torch.from_numpy(shared_fit(read.permute(2, 0, 3, 1).flatten(1, 2).numpy(), [1, 3], [0, 2]))
    weight = network.conv2.weight.detach()
    expected = weight[:, [1, 3]] + torch.einsum("oshw,ks->okhw", weight[:, [0, 2]], slope)
    torch.testing.assert_close(smaller.conv2.weight.detach(), expected, atol=1e-8, rtol=1e-8)
    means = [layer(value).mean((0, 2, 3)) for layer, value in ((network.conv2, maps), (smaller.conv2, maps[:, [1, 3]]))]
    torch.testing.assert_close(means[1], means[0], atol=1e-8, rtol=1e-8)  # at the border, too


def test_layer_that_cannot_hold_a_constant_gets_the_best_fit_through_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    without_ridge(monkeypatch)
    network = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3, bias=False)).double()
    x = images((5,), 64, dtype=DOUBLE)
    smaller = repaired(network, {"0": [0, 3]}, "least_squares", x)
    read = network[1](network[0](x)).detach()
    slope = np.linalg.lstsq(read[:, [0, 3]].numpy(), network[2](read).detach().numpy(), rcond=None)[0]
    np.testing.assert_allclose(smaller[2].weight.detach().numpy().T, slope, atol=1e-8)


def test_wide_flatten_mixes_channels_not_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    without_ridge(monkeypatch)
    monkeypatch.setattr(prunegym.pruning.moments, "GRAM_LIMIT", 10)
    network = make(ToyConv, 0, DOUBLE)
    x = images(network.shape, 40, dtype=DOUBLE)
    smaller = repaired(network, {"conv2": [0, 2, 5]}, "least_squares", x)
    maps = F.relu(network.conv2(F.max_pool2d(F.relu(network.conv1(x)), 2))).detach()
    slope = shared_fit(maps.flatten(2).permute(2, 0, 1).numpy(), [0, 2, 5], [1, 3, 4])
    weight = network.fc1.weight.detach().unflatten(1, (6, 4))
    expected = weight[:, [0, 2, 5]] + torch.einsum("osp,ks->okp", weight[:, [1, 3, 4]], torch.from_numpy(slope))
    torch.testing.assert_close(smaller.fc1.weight.detach(), expected.flatten(1), atol=1e-8, rtol=1e-8)
    means = [network.fc1(maps.flatten(1)).mean(0), smaller.fc1(maps[:, [0, 2, 5]].flatten(1)).mean(0)]
    torch.testing.assert_close(means[1], means[0], atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("method", COMPENSATIONS)
@pytest.mark.parametrize("toy", TOYS)
class TestEveryMethod:
    def test_keeping_everything_changes_nothing(self, toy: Callable[[], Any], method: str) -> None:
        network = make(toy)
        smaller = repaired(network, {}, method, images(network.shape, 32))
        for key, value in network.state_dict().items():
            assert torch.equal(smaller.state_dict()[key], value), key

    def test_original_is_untouched_and_shapes_fit(self, toy: Callable[[], Any], method: str) -> None:
        network = make(toy)
        before = copy.deepcopy(network.state_dict())
        x = images(network.shape, 32)
        plan = random_plan(find_groups(network, x[:1]), 1)
        smaller = repaired(network, plan, method, x)
        assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
        assert smaller(x).shape == (32, 3)
        assert torch.isfinite(smaller(x)).all()
        changed = any(
            not torch.equal(a, b)
            for a, b in zip(
                smaller.state_dict().values(),
                apply_plan(network, find_groups(network, x), plan).state_dict().values(),
                strict=True,
            )
        )
        assert changed == (method != "delete")

    def test_dead_channels_leave_without_a_trace(self, toy: Callable[[], Any], method: str) -> None:
        network = make(toy, dtype=DOUBLE)
        silence(network, value=0.0)
        x = images(network.shape, 64, dtype=DOUBLE)
        smaller = repaired(network, {LONE[toy]: [0, 1, 3]}, method, x)
        torch.testing.assert_close(smaller(x), network(x), rtol=1e-9, atol=1e-9)


LONE: dict[Any, str] = {ToyConv: "conv1", ToyMLP: "fc2", ToyResidual: "conv1"}
"""A group of each toy whose channels from 0 to 3 (ToyResidual: and 4) are easy to silence."""


def silence(network: Any, value: float) -> None:
    """Make channel 2 (ToyResidual: and 4) of the toy's lone group constant."""
    with torch.no_grad():
        if isinstance(network, ToyResidual):
            network.bn1.weight[[2, 4]] = 0.0
            network.bn1.bias[[2, 4]] = value
        else:
            layer: Any = network.conv1 if isinstance(network, ToyConv) else network.fc2
            layer.weight[2] = 0.0
            layer.bias[2] = value


@pytest.mark.parametrize("method", ["fold_mean", "least_squares"])
@pytest.mark.parametrize("toy", TOYS)
def test_constant_channels_leave_without_a_trace(toy: Callable[[], Any], method: str) -> None:
    network = make(toy, dtype=DOUBLE)
    silence(network, value=0.7)
    if isinstance(network, ToyResidual):
        network.conv1.padding, network.conv2.padding = (2, 2), (0, 0)
    x = images(network.shape, 64, dtype=DOUBLE)
    smaller = repaired(network, {LONE[toy]: [0, 1, 3]}, method, x)
    torch.testing.assert_close(smaller(x), network(x), rtol=1e-9, atol=1e-9)
    deleted = repaired(network, {LONE[toy]: [0, 1, 3]}, "delete", x)
    assert float((deleted(x) - network(x)).detach().abs().max()) > 1e-3


@pytest.mark.parametrize("toy", TOYS)
def test_least_squares_merges_a_duplicate(toy: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    network = make(toy, 4, DOUBLE)
    layers: list[Any] = {
        ToyConv: lambda: [network.conv1],
        ToyMLP: lambda: [network.fc1],
        ToyResidual: lambda: [network.conv1, network.bn1],
    }[toy]()
    with torch.no_grad():
        for layer in layers:
            for tensor in (*layer.parameters(), *layer.buffers()):
                if tensor.dim():
                    tensor[2] = tensor[0]
    group = "fc1" if toy is ToyMLP else "conv1"
    plan = {group: [channel for channel in range(network.widths[group]) if channel != 2]}
    x = images(network.shape, 64, dtype=DOUBLE)
    expected = network(x)
    deleted = (repaired(network, plan, "delete", x)(x) - expected).abs().max().item()
    close = (repaired(network, plan, "least_squares", x)(x) - expected).abs().max().item()
    assert deleted > 1e-3
    assert close < 0.05 * deleted  # the ridge keeps it from being exact
    without_ridge(monkeypatch)
    assert (repaired(network, plan, "least_squares", x)(x) - expected).abs().max().item() < 1e-7 * max(1, deleted)


def output_error(network: Any, plan: dict[str, list[int]], method: str, x: Tensor, where: str) -> float:
    """Mean squared change of a reader's output (or its batch norm's) when nothing before it changed."""
    outputs = []
    for net in (network, repaired(network, plan, method, x)):
        handle = net.get_submodule(where).register_forward_hook(lambda _m, _i, out: outputs.append(out.detach()))
        net(x)
        handle.remove()
    return float((outputs[0] - outputs[1]).square().mean())


READERS: list[tuple[Callable[[], Any], str, str]] = [
    (ToyMLP, "fc1", "fc2"),
    (ToyMLP, "fc2", "fc3"),
    (ToyConv, "conv1", "conv2"),  # 3 x 3
    (ToyConv, "conv2", "fc1"),  # behind a flatten
    (ToyConv, "fc1", "fc2"),
    (ToyResidual, "stem", "bn1"),  # 3 x 3, padded, the constant goes to the batch norm
    (ToyResidual, "conv1", "bn2"),
    (ToyResidual, "down", "fc"),
]


class ToyDecoder(nn.Module):
    """Transposed convolutions of three shapes, one with a batch norm instead of a bias; takes (N, 2, 4, 4)."""

    widths: ClassVar[dict[str, int]] = {"a": 6, "up": 5, "wide": 4}
    shape = (2, 4, 4)

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(2, 6, 3, padding=1)
        self.up = nn.ConvTranspose2d(6, 5, 2, stride=2)
        self.wide = nn.ConvTranspose2d(5, 4, 4, stride=2, padding=1, output_padding=1, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.last = nn.ConvTranspose2d(4, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        maps = torch.relu(self.up(torch.relu(self.a(x))))
        return self.last(torch.relu(self.bn(self.wide(maps)) + 0.5)).mean((2, 3))


READERS += [(ToyDecoder, "a", "up"), (ToyDecoder, "up", "bn"), (ToyDecoder, "wide", "last")]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("toy", "group", "where"), READERS)
def test_least_squares_is_never_worse_on_the_calibration_data(
    toy: Callable[[], Any], group: str, where: str, seed: int
) -> None:
    network = make(toy, seed, DOUBLE)
    x = images(network.shape, 96, seed, DOUBLE)
    rng = np.random.default_rng(seed)
    plan = {group: sorted(rng.permutation(network.widths[group])[: network.widths[group] // 2].tolist())}
    errors = {method: output_error(network, plan, method, x, where) for method in COMPENSATIONS}
    assert errors["delete"] > 0
    for method, error in errors.items():
        assert errors["least_squares"] <= error * (1 + 1e-9), method
    assert errors["fold_mean"] <= errors["delete"] * (1 + 1e-9)


class Between(nn.Module):
    """A layer of `width` channels between two others, on maps of `side`."""

    def __init__(self, width: int, side: int) -> None:
        super().__init__()
        self.shape = (3, side, side)
        self.a, self.b = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 8, 3, padding=1)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.b(torch.relu(self.a(x)))).mean((2, 3)))


@pytest.mark.parametrize("side", [1, 2, 4])
def test_shared_taps_know_how_little_of_a_small_map_they_see(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prunegym.pruning.moments, "PATCH_LIMIT", 100)
    network = make(lambda: Between(32, side), 0, DOUBLE)
    x = images(network.shape, 128, dtype=DOUBLE)
    plan = {"a": list(range(0, 32, 2))}
    errors = {method: output_error(network, plan, method, x, "b") for method in COMPENSATIONS}
    assert errors["least_squares"] < errors["fold_mean"] < errors["delete"]
    assert errors["least_squares"] < 0.5 * errors["delete"]


@pytest.mark.parametrize("count", [6, 8, 10, 16])
def test_few_images_do_not_make_the_fit_explode(count: int) -> None:
    network = make(lambda: Between(32, 16), 0)
    x = images(network.shape, count)
    plan = {"a": list(range(16))}
    groups = find_groups(network, x[:1])
    statistics = measure(network, groups, [(x, torch.zeros(count, dtype=torch.int64))])
    assert statistics.consumers["b"].rows >= 2 * 32 * 9
    errors = {}
    for method in ("fold_mean", "least_squares"):
        smaller = apply_plan(network, groups, PruningPlan(plan))
        compensate(smaller, network, groups, PruningPlan(plan), statistics, method)
        maps = torch.relu(network.a(images(network.shape, 64, seed=9)))  # images that were not seen
        errors[method] = float((smaller.b(maps[:, :16]) - network.b(maps)).detach().square().mean())
    assert errors["least_squares"] < errors["fold_mean"]


@pytest.mark.parametrize("scale", [1.0, 0.1, 1e-3, 1e3])
def test_the_scale_of_a_channel_does_not_matter(scale: float) -> None:
    network = make(ToyMLP, 0, DOUBLE)
    with torch.no_grad():  # the same function: channels 2 to 5 scaled, their readers' weights scaled back; 4, 5 = 2, 3
        for tensor in (network.fc1.weight, network.fc1.bias):
            tensor[4:] = tensor[2:4]
            tensor[2:] *= scale
        network.fc2.weight[:, 2:] /= scale
    x = images((5,), 200, dtype=DOUBLE)
    errors = {
        method: output_error(network, {"fc1": [0, 1, 2, 3]}, method, x, "fc2") for method in ("delete", "least_squares")
    }
    assert errors["least_squares"] < 1e-5 * errors["delete"]


class Tied(nn.Module):
    """Two layers with one weight, and one bias or each its own, read the same channels."""

    shape = (5,)

    def __init__(self, one_bias: bool) -> None:
        super().__init__()
        self.e, self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.b.weight = self.a.weight
        if one_bias:
            self.b.bias = self.a.bias
        self.f, self.g = nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.e(x))
        return self.f(torch.tanh(self.a(hidden))) + self.g(torch.tanh(self.b(0.5 * hidden)))


@pytest.mark.parametrize("method", ["fold_mean", "least_squares"])
def test_layers_that_share_a_weight_are_repaired_once(method: str) -> None:
    network = make(lambda: Tied(False), 0, DOUBLE)
    x = images((5,), 64, dtype=DOUBLE)
    smaller = repaired(network, {"e": [0, 1, 2, 3]}, method, x)
    hidden = torch.relu(network.e(x))
    for name, scale in (("a", 1.0), ("b", 0.5)):
        before = network.get_submodule(name)(scale * hidden).mean(0)
        after = smaller.get_submodule(name)(scale * hidden[:, :4]).mean(0)
        torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-9)
    assert smaller.a.weight is smaller.b.weight
    one = repaired(make(lambda: Tied(True), 0, DOUBLE), {"e": [0, 1, 2, 3]}, method, x)
    middle = (smaller.a.bias - network.a.bias + smaller.b.bias - network.b.bias) / 2
    torch.testing.assert_close(one.a.bias - network.a.bias, middle, rtol=1e-9, atol=1e-9)


def test_an_uneven_flatten_keeps_the_means_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prunegym.pruning.moments, "GRAM_LIMIT", 10)

    network = make(ToyTurned, 0, DOUBLE)
    x = images(network.shape, 40, dtype=DOUBLE)
    with pytest.warns(UserWarning, match="reads 24 features, too many for least squares, and its positions are not"):
        smaller = repaired(network, {"conv2": [0, 2, 5]}, "least_squares", x)
    folded = repaired(network, {"conv2": [0, 2, 5]}, "fold_mean", x)
    assert torch.equal(smaller(x), folded(x))


@pytest.mark.parametrize("method", ["fold_mean", "least_squares"])
def test_second_moments_must_have_been_measured(method: str) -> None:
    network = make(ToyMLP)
    batches = labelled(network)
    groups = find_groups(network, batches[0][0])
    plan = PruningPlan({"fc1": [0]})
    smaller = apply_plan(network, groups, plan)
    statistics = measure(network, groups, batches, grams=False)
    with pytest.raises(UserError, match=rf"'{method}' needs second moments; call measure\(..., grams=True\)"):
        compensate(smaller, network, groups, plan, statistics, method)


def test_unknown_method_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"but got 'leastsquares'; did you mean 'least_squares'\?"):
        get_compensation("leastsquares")


def test_recalibrate_is_the_average_of_batch_moments() -> None:
    network = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 4), nn.BatchNorm1d(4))
    network = network.double().eval()
    batches = list(images((2, 4, 4), 48, dtype=DOUBLE).split(16))
    means, variances, later = [], [], []
    for batch in batches:
        maps = network[0](batch).detach()  # (16, 3, 2, 2)
        means.append(maps.mean((0, 2, 3)))
        variances.append(maps.var((0, 2, 3), unbiased=True))
        normal = (maps - means[-1][:, None, None]) / (maps.var((0, 2, 3), unbiased=False)[:, None, None] + 1e-5).sqrt()
        later.append(network[3](normal.flatten(1)).detach().mean(0))  # the layers behind see the batch normalised
    assert recalibrate(network, batches) == 2
    torch.testing.assert_close(network[1].running_mean, torch.stack(means).mean(0), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(network[1].running_var, torch.stack(variances).mean(0), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(network[4].running_mean, torch.stack(later).mean(0), rtol=1e-10, atol=1e-12)


def test_recalibrate_changes_statistics_only() -> None:
    network = make(ToyResidual).train()
    network.bn1.eval()
    network.bn2.momentum = 0.3
    before = copy.deepcopy(network.state_dict())
    flags = [module.training for module in network.modules()]
    assert recalibrate(network, labelled(network, 40, 20)) == 4
    assert [module.training for module in network.modules()] == flags
    assert [n.momentum for n in (network.stem_bn, network.bn1, network.bn2, network.down_bn)] == [0.1, 0.1, 0.3, 0.1]
    for key, value in network.state_dict().items():
        assert torch.equal(value, before[key]) == ("running" not in key and "tracked" not in key), key


@pytest.mark.parametrize("count", [0, 1, 31])
def test_recalibrate_refuses_few_examples_and_leaves_the_network(count: int) -> None:
    network = make(ToyResidual).train()
    before = copy.deepcopy(network.state_dict())
    batches = [images(network.shape, count)] if count else []
    with pytest.raises(UserError, match=f"at least 32 examples to be recalibrated, but got {count}; give more"):
        recalibrate(network, batches)
    assert network.training
    assert network.bn1.momentum == 0.1
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_recalibrate_uses_a_short_batch_where_examples_are_few() -> None:
    network = make(ToyResidual)
    x = images(network.shape, 44)
    assert recalibrate(network, [x[:30], x[30:]]) == 4
    means = [network.stem(part).detach().mean((0, 2, 3)) for part in (x[:30], x[30:])]
    torch.testing.assert_close(network.stem_bn.running_mean, torch.stack(means).mean(0), rtol=1e-4, atol=1e-5)


def test_recalibrate_without_batch_norm_reads_no_data() -> None:
    def never() -> Any:
        raise AssertionError("no data should be read")
        yield

    assert recalibrate(make(ToyConv), never()) == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_recalibrate_refuses_images_that_are_not_finite_and_leaves_the_network(value: float) -> None:
    network = make(ToyResidual)
    before = copy.deepcopy(network.state_dict())
    batches = list(images(network.shape, 64).split(32))
    batches[1][3, 0, 0, 0] = value
    with pytest.raises(UserError, match="recalibrated on finite images, but some are NaN or infinite"):
        recalibrate(network, batches)
    assert all(torch.equal(now, before[key]) for key, now in network.state_dict().items())


def test_recalibrate_refuses_activations_that_are_not_finite() -> None:
    network = make(ToyResidual)
    with torch.no_grad():
        network.stem.weight[0] = 1e38
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(UserError, match="activations must be finite for batch norm to be recalibrated"):
        recalibrate(network, [images(network.shape, 64)])
    assert all(torch.equal(now, before[key]) for key, now in network.state_dict().items())


def test_recalibrate_leaves_the_data_of_a_network_that_begins_in_place() -> None:
    class Begins(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.mul_(2.0))

    network, x = Begins(nn.BatchNorm1d(4)), images((4,), 64)
    before = x.clone()
    recalibrate(network, [x])
    assert torch.equal(x, before)
    torch.testing.assert_close(network[0].running_mean, 2 * before.mean(0))
