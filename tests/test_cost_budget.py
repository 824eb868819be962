"""Costs against hand counts, and budgets that hold by construction."""

import itertools
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from prunegym.pruning.budget import solve_counts, solve_each
from prunegym.pruning.cost import CostModel, count_cost
from prunegym.pruning.errors import UserError
from prunegym.pruning.grouping import find_groups
from prunegym.pruning.networks import build_network
from prunegym.pruning.surgery import apply_plan
from prunegym.pruning.widths import GroupSettings
from torch import Tensor, nn
from toys import TOYS, ToyConv, ToyMLP, images, make, random_plan


def model_of(network: nn.Module, shape: tuple[int, ...]) -> tuple[CostModel, Any]:
    example = images(shape, 1)
    groups = find_groups(network, example)
    return CostModel(network, groups, example), groups


@pytest.fixture(scope="module")
def lenet() -> tuple[CostModel, Any]:
    return model_of(build_network("lenet5_caffe", seed=0), (1, 28, 28))


@pytest.fixture(scope="module")
def resnet() -> tuple[CostModel, Any]:
    return model_of(build_network("cifar_resnet20", seed=0), (3, 32, 32))


@pytest.mark.parametrize("toy", TOYS)
def test_toys_cost_what_they_say(toy: Callable[[], Any]) -> None:
    network = make(toy)
    cost = count_cost(network, images(network.shape, 5))  # only one of the five examples counts
    assert (cost.params, cost.macs) == (network.params, network.macs)


def test_lenet_by_hand() -> None:
    params = 20 * 25 + 20 + 50 * 20 * 25 + 50 + 500 * 800 + 500 + 10 * 500 + 10
    macs = 24 * 24 * 20 * 25 + 8 * 8 * 50 * 20 * 25 + 500 * 800 + 10 * 500
    assert (params, macs) == (431_080, 2_293_000)
    cost = count_cost(build_network("lenet5_caffe", seed=0), torch.zeros(1, 1, 28, 28))
    assert (cost.params, cost.macs) == (params, macs)
    assert cost.uncounted == ("MaxPool2d", "ReLU")
    assert (cost.of("params"), cost.of("macs")) == (params, macs)


def test_resnet20_by_hand() -> None:
    macs = 32 * 32 * 16 * 3 * 9
    for stage, (side, width) in enumerate([(32, 16), (16, 32), (8, 64)]):
        inputs = width if stage == 0 else width // 2
        macs += side * side * width * 9 * (inputs + 5 * width)
        macs += side * side * width * inputs if stage else 0  # 1x1 shortcut
    macs += 10 * 64
    assert round(macs / 1e6, 1) == 40.8
    assert count_cost(build_network("cifar_resnet20", seed=0), torch.zeros(1, 3, 32, 32)).macs == macs


def test_counting_leaves_modes_and_hooks() -> None:
    network = make(ToyConv).train()
    network.conv2.eval()
    flags = [module.training for module in network.modules()]
    count_cost(network, images(network.shape, 1))
    assert [module.training for module in network.modules()] == flags
    assert not any(module._forward_hooks for module in network.modules())


class Folded(ToyConv):
    """Cuts each image into four tiles before the convolutions: layers see four examples for one."""

    shape = (2, 16, 16)

    def forward(self, images: Tensor) -> Tensor:
        tiles = images.unflatten(3, (2, 8)).unflatten(2, (2, 8)).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
        return super().forward(tiles).unflatten(0, (-1, 4)).mean(1)


@pytest.mark.parametrize("toy", [*TOYS, Folded])
def test_model_predicts_cut_toys(toy: Callable[[], Any]) -> None:
    network = make(toy)
    model, groups = model_of(network, network.shape)
    for seed in range(20):
        plan = random_plan(groups, seed)
        cut = count_cost(apply_plan(network, groups, plan), images(network.shape, 1))
        predicted = model.cost(plan.counts)
        assert (predicted.params, predicted.macs) == (cut.params, cut.macs)
        assert cut.params < network.params


def unusual() -> nn.Module:
    """Put depthwise, strided and transposed convolutions with a norm each into one network."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2),
        nn.BatchNorm2d(6),
        nn.Conv2d(6, 6, 3, padding=1, groups=6),
        nn.ReLU(),
        nn.ConvTranspose2d(6, 5, 3, stride=2),
        nn.ReLU(),
        nn.Conv2d(5, 4, 3),
        nn.Flatten(),
        nn.Linear(4 * 49, 2),
    )


@pytest.mark.parametrize("kind", ["resnet", "unusual"])
def test_model_predicts_cut_networks(kind: str) -> None:
    network = build_network("cifar_resnet20", seed=0) if kind == "resnet" else unusual()
    shape = (3, 16, 16) if kind == "resnet" else (3, 9, 9)
    model, groups = model_of(network, shape)
    assert len(groups) == (12 if kind == "resnet" else 3)
    for seed in range(6):
        plan = random_plan(groups, seed)
        cut = count_cost(apply_plan(network, groups, plan), images(shape, 1))
        predicted = model.cost(np.array([plan.counts[group.name] for group in groups]))
        assert (predicted.params, predicted.macs) == (cut.params, cut.macs)


class TiedWeights(nn.Module):
    """Two convolutions on maps of two sizes share a weight; takes (N, 3, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.i, self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), *(nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))
        self.b.weight = self.a.weight
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        maps = torch.relu(self.a(torch.relu(self.i(x))))
        return self.fc(torch.relu(self.b(maps[..., ::2, ::2])).mean((2, 3)))


def test_a_shared_weight_counts_each_time_it_multiplies_and_once_as_a_parameter() -> None:
    network = TiedWeights()
    model, groups = model_of(network, (3, 8, 8))
    assert model.full.params == (8 * 27 + 8) + (8 * 72 + 8) + 8 + (5 * 8 + 5)
    assert model.full.macs == 64 * 8 * 27 + (64 + 16) * 8 * 72 + 5 * 8
    for seed in range(8):
        plan = random_plan(groups, seed)
        smaller = apply_plan(network, groups, plan)
        cut, predicted = count_cost(smaller, images((3, 8, 8), 1)), model.cost(plan.counts)
        assert (predicted.params, predicted.macs) == (cut.params, cut.macs)
        width = plan.counts[groups[0].name]
        assert predicted.macs == 64 * width * 27 + (64 + 16) * width * 9 * width + 5 * width


def test_counting_leaves_the_example_of_a_network_that_begins_in_place() -> None:
    class Begins(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.mul_(2.0))

    network, example = Begins(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), images((4,), 1)
    before = example.clone()
    groups = find_groups(network, example)
    assert CostModel(network, groups, example).full == count_cost(network, example)
    assert torch.equal(example, before)


def test_group_shares_by_hand(lenet: Any) -> None:
    model, _ = lenet
    conv1 = 24 * 24 * 20 * 25 + 8 * 8 * 50 * 20 * 25  # without conv1's outputs, conv2 multiplies nothing either
    conv2 = 8 * 8 * 50 * 20 * 25 + 500 * 800
    fc1 = 500 * 800 + 10 * 500
    np.testing.assert_allclose(model.group_share("macs"), np.array([conv1, conv2, fc1]) / 2_293_000, rtol=1e-12)


def test_unnamed_groups_stay_whole(lenet: Any) -> None:
    model, _ = lenet
    assert model.cost({}).params == 431_080
    assert model.cost({"fc1": 1}).params == 431_080 - 499 * 801 - 499 * 10
    assert model.share({}, "macs") == 1.0


def check_budget_kept(model: CostModel, scores: Any, budget: float, unit: str, widths: Any = None) -> np.ndarray:
    counts = solve_counts(model, scores, budget, unit, widths=widths)
    present = model.widths if widths is None else widths
    allowed = budget * model.full.of(unit) * (1 + 1e-9)
    assert (counts >= 1).all()
    assert (counts <= present).all()
    assert model.cost(counts).of(unit) <= allowed
    full = [place for place in range(len(counts)) if counts[place] < present[place]]
    one_more = [model.cost(counts + np.eye(len(counts), dtype=np.int64)[place]).of(unit) for place in full]
    assert not full or max(one_more) > allowed
    return counts


def test_budgets_hold_for_random_scores(lenet: Any, resnet: Any) -> None:
    rng = np.random.default_rng(0)
    binding = 0
    for trial in range(300):
        model, _ = (lenet, resnet)[trial % 2]
        unit = ("macs", "params")[trial // 2 % 2]
        least = model.smallest_share(unit)
        budget = float(rng.uniform(least, 1.0))
        scores = rng.normal(0, rng.choice([0.3, 2.0, 20.0]), len(model.widths))
        counts = check_budget_kept(model, scores, budget, unit)
        binding += bool((counts < model.widths).any())
    assert binding > 290


def test_budgets_hold_in_a_tiny_network() -> None:
    model, _ = model_of(make(ToyMLP), ToyMLP.shape)  # 66 MACs: half a MAC of rounding would show
    rng = np.random.default_rng(1)
    for _ in range(100):
        check_budget_kept(model, rng.normal(size=2), float(rng.uniform(model.smallest_share("macs"), 1)), "macs")


def test_what_the_floor_leaves_is_used() -> None:
    model, _ = model_of(make(ToyMLP), ToyMLP.shape)  # a-b wide costs 5a + ab + 3b; half of 66 is 33
    # with one share s for both, floor(6s)-floor(4s) is 3-2 (27 MACs) below s = 2/3 and 4-2 (34) from there on;
    # the larger fraction is a's, but 4-2 does not fit, while 3-3 costs exactly 33
    assert solve_counts(model, [0.0, 0.0], 0.5, "macs").tolist() == [3, 3]


def test_budgets_hold_in_a_second_round(resnet: Any) -> None:
    model, _ = resnet
    rng = np.random.default_rng(2)
    for _ in range(60):
        widths = rng.integers(1, model.widths + 1)
        share = model.share(widths, "macs")
        budget = float(rng.uniform(model.smallest_share("macs"), 1.0))
        counts = check_budget_kept(model, rng.normal(size=len(widths)), budget, "macs", widths)
        if share <= budget:
            assert (counts == widths).all()


@pytest.mark.parametrize("budget", [0.1, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("level", [-50.0, 0.0, 3.0])
def test_equal_scores_keep_equal_shares(resnet: Any, budget: float, level: float) -> None:
    model, _ = resnet
    counts = solve_counts(model, np.full(12, level), budget, "macs")
    # one common share s explains all: floor(s w) <= count <= floor(s w) + 1
    low, high = np.max((counts - 1) / model.widths), np.min((counts + 1) / model.widths)
    assert low <= high
    np.testing.assert_array_equal(counts, solve_counts(model, np.zeros(12), budget, "macs"))
    floors = (np.maximum(1, np.floor(share * model.widths)).astype(int) for share in np.linspace(0.01, 1, 400))
    shares = [model.share(floor, "macs") for floor in floors]
    assert model.share(counts, "macs") >= max(share for share in shares if share <= budget)


def test_scores_order_the_shares(resnet: Any) -> None:
    model, _ = resnet
    rng = np.random.default_rng(3)
    for _ in range(30):
        scores = rng.normal(0, 2, 12)
        counts = solve_counts(model, scores, 0.4, "macs")
        for a in range(12):
            for b in range(12):
                if model.widths[a] == model.widths[b] and scores[a] > scores[b]:
                    assert counts[a] >= counts[b]
    # the log-odds of two shares differ by the difference of their scores
    wide = model_of(make(lambda: nn.Sequential(nn.Linear(4, 5000), nn.Linear(5000, 5000), nn.Linear(5000, 2))), (4,))[0]
    counts = solve_counts(wide, [0.0, 1.5], 0.3, "macs")
    odds = np.log(counts / (wide.widths - counts))
    assert odds[1] - odds[0] == pytest.approx(1.5, abs=0.01)


def test_whole_budget_keeps_everything(lenet: Any) -> None:
    model, _ = lenet
    assert solve_counts(model, [-5.0, 0.0, 5.0], 1.0, "macs").tolist() == [20, 50, 500]


def test_unreachable_budget_names_the_smallest(lenet: Any) -> None:
    model, _ = lenet
    one = 24 * 24 * 25 + 8 * 8 * 25 + 16 + 10  # MACs of 1-1-1-10
    with pytest.raises(UserError, match=r"budget must be reachable, but got budget=0.001") as caught:
        solve_counts(model, np.zeros(3), 0.001, "macs")
    named = float(re.findall(r"costs ([0-9.]+) of the macs, the smallest reachable budget", str(caught.value))[0])
    assert named == pytest.approx(one / 2_293_000, abs=1e-6)
    assert solve_counts(model, np.zeros(3), named, "macs").tolist() == [1, 1, 1]  # what is named can be typed in
    model.check_budget(named, "macs")


@pytest.mark.parametrize("unit", ["macs", "params"])
def test_the_smallest_reachable_budget_is_reachable(lenet: Any, resnet: Any, unit: str) -> None:
    for model, _ in (lenet, resnet):
        least = model.smallest_share(unit)
        assert (solve_counts(model, np.zeros(len(model.widths)), least, unit) == 1).all()
        with pytest.raises(UserError, match="budget must be reachable"):
            solve_counts(model, np.zeros(len(model.widths)), least * 0.999, unit)


def test_refusals(lenet: Any) -> None:
    model, _ = lenet
    with pytest.raises(UserError, match=r"one finite score per group \(3\), but got \[0.0, 0.0\]"):
        solve_counts(model, [0, 0], 0.5, "macs")
    with pytest.raises(UserError, match="one finite score per group"):
        solve_counts(model, [0, np.nan, 0], 0.5, "macs")
    with pytest.raises(UserError, match="budget_unit must be one of macs, params, but got 'flops'"):
        model.check_budget(0.5, "flops")
    for budget in (0.0, 1.5, float("nan")):
        with pytest.raises(UserError, match=r"budget must be in \(0, 1\], but got budget="):
            model.check_budget(budget, "macs")


# ---- not every width allowed -----------------------------------------------------------------------------------------
def limited(kind: str, multiple: int, minimum: int) -> CostModel:
    network, shape = {
        "lenet": (build_network("lenet5_caffe", seed=0), (1, 28, 28)),
        "resnet": (build_network("cifar_resnet20", seed=0), (3, 32, 32)),
        "conv": (make(ToyConv), ToyConv.shape),
    }[kind]
    example = images(shape, 1)
    settings = GroupSettings(channel_multiple=multiple, minimum_width=minimum)
    return CostModel(network, find_groups(network, example), example, settings)


def widths_allowed(model: CostModel, multiple: int, minimum: int, present: Any = None) -> list[list[int]]:
    """List each group's allowed widths by the definition: multiples, and what is there."""
    present = model.widths if present is None else present
    return [
        [c for c in range(1, there + 1) if c == there or (c % multiple == 0 and c >= minimum)]
        for there in present.tolist()
    ]


@pytest.mark.parametrize(("multiple", "minimum"), [(1, 4), (2, 1), (3, 5), (8, 1), (16, 20)])
@pytest.mark.parametrize("kind", ["lenet", "resnet", "conv"])
def test_budgets_hold_in_allowed_widths(kind: str, multiple: int, minimum: int) -> None:
    model = limited(kind, multiple, minimum)
    whole = widths_allowed(model, multiple, minimum)
    least = np.array([known[0] for known in whole])
    rng = np.random.default_rng(0)
    for trial in range(40):
        unit = ("macs", "params")[trial % 2]
        assert model.smallest_share(unit) == model.share(least, unit)
        present = np.array([rng.choice(known) for known in whole]) if trial % 3 == 0 else model.widths
        known = widths_allowed(model, multiple, minimum, present)
        budget = float(rng.uniform(model.smallest_share(unit), 1))
        scores = rng.normal(0, rng.choice([0.0, 0.3, 2.0, 20.0]), len(present))
        counts = solve_counts(model, scores, budget, unit, widths=present)
        limit = budget * model.full.of(unit) * (1 + 1e-9)
        assert all(count in each for count, each in zip(counts, known, strict=True))
        assert model.cost(counts).of(unit) <= limit
        costs = []
        for place, each in enumerate(known):
            if counts[place] < present[place]:
                wider = counts.copy()
                wider[place] = each[each.index(counts[place]) + 1]
                costs.append(model.cost(wider).of(unit))
        assert not costs or max(costs) > limit


@pytest.mark.parametrize("multiple", [2, 8, 16])
def test_equal_scores_against_brute_force(multiple: int) -> None:
    """One share for all, each width rounded to the nearest allowed one; then the room that is left, once a group."""
    model = limited("lenet", multiple, 1)
    known = widths_allowed(model, multiple, 1)
    breaks = sorted(
        {n / width for width in model.widths.tolist() for n in range(width + 1)}
    )  # where a whole channel comes

    def nearest(share: float) -> list[int]:
        wanted = np.floor(share * model.widths + 1e-9)
        return [min(each, key=lambda c: (abs(c - want), c)) for each, want in zip(known, wanted, strict=True)]

    tried = 0
    for unit, budget in itertools.product(("macs", "params"), (0.08, 0.2, 0.5, 0.7, 0.9)):
        if budget < model.smallest_share(unit):
            continue
        limit = next(share for share in breaks if model.share(np.array(nearest(share)), unit) > budget)
        counts = nearest(limit - 1e-9)
        missing = limit * model.widths - counts
        steps = [each[min(each.index(c) + 1, len(each) - 1)] - c for each, c in zip(known, counts, strict=True)]
        for place in sorted(range(3), key=lambda p: -missing[p] / max(steps[p], 1)):
            wider = [count + steps[p] * (p == place) for p, count in enumerate(counts)]
            held_up = missing[place] < -1e-3 and steps[place] > 1
            if not held_up and model.share(np.array(wider), unit) <= budget:
                counts = wider
        assert solve_counts(model, np.zeros(3), budget, unit).tolist() == counts
        tried += 1
    assert tried >= 7


def test_multiples_of_eight_by_hand() -> None:
    model = limited("lenet", 8, 1)  # 20-50-500; 8 16 20 | 8 16 24 32 40 48 50 | 8 16 ... 496 500
    least = 8 * 26 + 8 * (8 * 25 + 1) + 8 * (8 * 16 + 1) + 10 * 9
    assert model.smallest_share("params") == least / 431_080
    with pytest.raises(UserError, match="the narrowest allowed width per group already costs") as caught:
        model.check_budget(0.005, "params")
    assert "0.006816 of the params" in str(caught.value)  # 2938 of 431,080
    assert str(caught.value).endswith("of the params, the smallest reachable budget with channel_multiple 8")
    assert solve_counts(model, np.zeros(3), model.smallest_budget("params"), "params").tolist() == [8, 8, 8]
    # up to a share of 0.74, where conv2's 37 channels would round to 40 (256,034 parameters are too many): 16-32-368 of
    # 14.8-37-370 wanted, 205,722 parameters; the room of 9818 lets fc1 have 8 more for 523 each, conv1 is wide enough
    assert solve_counts(model, np.zeros(3), 0.5, "params").tolist() == [16, 32, 376]


def test_a_multiple_wider_than_every_group_leaves_everything_whole() -> None:
    model = limited("conv", 16, 1)
    assert solve_counts(model, np.zeros(3), 1.0, "macs").tolist() == [4, 6, 8]
    with pytest.raises(UserError, match=r"already costs 1\.000000 of the macs, .* with channel_multiple 16"):
        solve_counts(model, np.zeros(3), 0.99, "macs")


# ---- many plans at once ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("unit", ["macs", "params"])
def test_costs_of_many_plans_are_those_of_the_networks_they_leave(unit: str) -> None:
    network = make(ToyConv)
    model, groups = model_of(network, network.shape)
    plans = [random_plan(groups, seed) for seed in range(12)]
    counts = np.array([[plan.counts[group.name] for group in groups] for plan in plans])
    cut = [count_cost(apply_plan(network, groups, plan), images(network.shape, 1)).of(unit) for plan in plans]
    assert len(set(cut)) > 8
    assert model.costs(counts, unit).tolist() == cut
    assert model.costs(counts[:0], unit).shape == (0,)


def step_by_step(
    model: CostModel, scores: Any, budget: float, unit: str, multiple: int, minimum: int, present: Any
) -> list[int]:
    """Solve by the definition: b passes every place where some group wants one whole channel more, upwards."""
    limit, groups = budget * model.full.of(unit) * (1 + 1e-12), range(len(present))
    if model.cost(present).of(unit) <= limit:
        return present.tolist()
    known = widths_allowed(model, multiple, minimum, present)

    def wanted(shift: float) -> Any:
        return present / (1 + np.exp(-(scores + shift)))

    def nearest(shift: float) -> list[int]:
        whole = np.floor(wanted(shift) + 1e-9)
        return [min(each, key=lambda c: (abs(c - want), c)) for each, want in zip(known, whole, strict=True)]

    # n of w channels are wanted from logit(n / w) - score on; all of them where a billionth of one is missing
    shares = [(p, n / present[p]) for p in groups for n in [*range(1, present[p]), present[p] - 0.9999e-9]]
    places = sorted(math.log(share / (1 - share)) - scores[p] for p, share in shares)
    first = next(i for i, shift in enumerate(places) if model.cost(np.array(nearest(shift))).of(unit) > limit)
    counts = nearest((places[first - 1] + places[first]) / 2) if first else nearest(places[0] - 1)
    missing = wanted(places[first]) - counts
    steps = [each[min(each.index(c) + 1, len(each) - 1)] - c for each, c in zip(known, counts, strict=True)]
    for place in sorted(groups, key=lambda p: -missing[p] / max(steps[p], 1)):
        wider = [count + steps[p] * (p == place) for p, count in enumerate(counts)]
        held_up = missing[place] < -1e-6 and steps[place] > 1
        if not held_up and model.cost(np.array(wider)).of(unit) <= limit:
            counts = wider
    return counts


@pytest.mark.parametrize(("multiple", "minimum"), [(1, 1), (2, 1), (3, 5), (8, 1)])
@pytest.mark.parametrize("kind", ["lenet", "resnet", "conv"])
@pytest.mark.parametrize("later", [False, True])
def test_plans_solved_together_are_each_as_by_definition(kind: str, multiple: int, minimum: int, later: bool) -> None:
    model = limited(kind, multiple, minimum)
    rng = np.random.default_rng(multiple)
    known = widths_allowed(model, multiple, minimum)
    present = np.array([rng.choice(each) for each in known]) if later else model.widths
    for unit in ("macs", "params"):
        least = model.share(np.array([each[0] for each in known]), unit)
        budgets = np.append(rng.uniform(least, 1.0, 7), 1.0)  # each plan has its own
        scores = rng.normal(0, rng.choice([0.2, 1.0, 3.0], (8, 1)), (8, len(present)))
        together = solve_each(model, scores, budgets, unit, widths=present if later else None)
        for row, budget, found in zip(scores, budgets, together, strict=True):
            assert found.tolist() == step_by_step(model, row, budget, unit, multiple, minimum, present)
            alone = solve_counts(model, row, float(budget), unit, widths=present if later else None)
            assert found.tolist() == alone.tolist()
        order = rng.permutation(8)  # nothing depends on what stands beside it
        again = solve_each(model, scores[order], budgets[order], unit, widths=present if later else None)
        np.testing.assert_array_equal(again, together[order])


def test_extreme_scores_are_solved_together_too(resnet: Any) -> None:
    model, _ = resnet
    scores = np.array([np.full(12, -1e6), np.full(12, 1e6), np.zeros(12), np.where(np.arange(12) % 2, 50.0, -50.0)])
    together = solve_each(model, scores, [0.3] * 4, "macs")
    np.testing.assert_array_equal(together[0], together[2])
    np.testing.assert_array_equal(together[1], together[2])
    np.testing.assert_array_equal(together[3][1::2], model.widths[1::2])  # whole before the others get anything
    assert (together[3][::2] < model.widths[::2]).all()
    assert (model.costs(together, "macs") <= 0.3 * model.full.macs).all()


def test_one_unreachable_budget_among_many_is_named(lenet: Any) -> None:
    model, _ = lenet
    with pytest.raises(UserError, match=r"budget must be reachable, but got budget=0.001; one channel"):
        solve_each(model, np.zeros((3, 3)), [0.5, 0.001, 0.9], "macs")
    least = model.smallest_share("macs")
    assert solve_each(model, np.zeros((2, 3)), [least, 1.0], "macs").tolist() == [[1, 1, 1], [20, 50, 500]]
    model = limited("conv", 16, 1)  # nothing may leave
    with pytest.raises(UserError, match=r"already costs 1\.000000 of the macs, .* with channel_multiple 16"):
        solve_each(model, np.zeros((2, 3)), [1.0, 0.99], "macs")


def test_refusals_of_many_plans(lenet: Any) -> None:
    model, _ = lenet
    scores = np.zeros((200, 3))
    scores[150, 1] = np.nan
    with pytest.raises(UserError, match=r"one finite score per group \(3\), but got \[0\.0, nan, 0\.0\]$"):
        solve_each(model, scores, [0.5] * 200, "macs")
    for shape in ((2, 2), (3,)):
        with pytest.raises(UserError, match=re.escape(f"one finite score per group (3), but got an array {shape}")):
            solve_each(model, np.zeros(shape), [0.5] * 2, "macs")
    assert solve_each(model, np.zeros((0, 3)), [], "macs").shape == (0, 3)
