"""Pruning plans as data: constructors, composition, files and their errors."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prunegym.pruning.errors import UserError
from prunegym.pruning.grouping import find_groups
from prunegym.pruning.groups import ChannelGroup
from prunegym.pruning.plan import PruningPlan
from toys import ToyConv, images, make, random_plan


@pytest.fixture(scope="module")
def groups() -> tuple[ChannelGroup, ...]:
    network = make(ToyConv)  # conv1: 4, conv2: 6, fc1: 8
    return find_groups(network, images(network.shape))


def test_full_keeps_every_channel(groups: Any) -> None:
    assert PruningPlan.full(groups).to_dict() == {
        "conv1": [0, 1, 2, 3],
        "conv2": [0, 1, 2, 3, 4, 5],
        "fc1": [0, 1, 2, 3, 4, 5, 6, 7],
    }


@pytest.mark.parametrize(
    ("keep", "counts"),
    [(1.0, (4, 6, 8)), (0.625, (3, 4, 5)), (0.5, (2, 3, 4)), (0.3, (1, 2, 2)), (0.25, (1, 2, 2)), (1e-9, (1, 1, 1))],
)
def test_uniform_rounds_half_up_and_leaves_one(groups: Any, keep: float, counts: tuple[int, ...]) -> None:
    assert PruningPlan.uniform(groups, keep).counts == dict(zip(ToyConv.widths, counts, strict=True))


@pytest.mark.parametrize("keep", [0, -0.1, 1.01, float("nan"), "half"])
def test_uniform_refuses_what_is_no_share(groups: Any, keep: Any) -> None:
    with pytest.raises(UserError, match=r"keep must be in \(0, 1\], but got keep="):
        PruningPlan.uniform(groups, keep)


def test_from_counts_takes_the_first_of_each_order(groups: Any) -> None:
    orders = {"conv1": [3, 1, 0, 2], "conv2": np.array([5, 0, 4, 1, 3, 2]), "fc1": range(8)}
    plan = PruningPlan.from_counts(groups, {"conv1": 2, "conv2": 3}, orders)
    assert plan.to_dict() == {"conv1": [1, 3], "conv2": [0, 4, 5], "fc1": list(range(8))}
    assert all(type(index) is int for keep in plan.values() for index in keep)  # JSON takes no numpy integers
    assert PruningPlan.uniform(groups, 0.5, orders)["conv1"] == (1, 3)


@pytest.mark.parametrize("count", [0, 5, -1])
def test_from_counts_refuses_a_count_out_of_range(groups: Any, count: int) -> None:
    with pytest.raises(UserError, match=f"'conv1' has 4 channels, but {count} were to be kept"):
        PruningPlan.from_counts(groups, {"conv1": count})


def test_then_numbers_by_what_is_left() -> None:
    first = PruningPlan({"a": [1, 3, 5, 7], "b": [0, 2]})
    later = PruningPlan({"a": [0, 3], "c": [4]})
    assert first.then(later).to_dict() == {"a": [1, 7], "b": [0, 2], "c": [4]}
    with pytest.raises(UserError, match=r"'b' has 2 channels left, but the later plan keeps channel 2"):
        first.then(PruningPlan({"b": [0, 2]}))


@pytest.mark.parametrize("seed", range(20))
def test_relative_to_undoes_then(groups: Any, seed: int) -> None:
    first = random_plan(groups, seed)
    rng = np.random.default_rng(seed)
    later = PruningPlan({name: rng.permutation(n)[: rng.integers(1, n + 1)] for name, n in first.counts.items()})
    composed = first.then(later)
    assert composed.relative_to(first) == later
    for name in composed:
        assert set(composed[name]) <= set(first[name])
        assert [first[name][index] for index in later[name]] == list(composed[name])


def test_relative_to_refuses_a_channel_that_is_gone() -> None:
    with pytest.raises(UserError, match=r"only keep channels the earlier one kept, but 'a' wants \[2\] back"):
        PruningPlan({"a": [1, 2]}).relative_to(PruningPlan({"a": [0, 1]}))
    assert PruningPlan({"b": [5]}).relative_to(PruningPlan({"a": [0]})).to_dict() == {"b": [5]}


def test_equality_hash_and_fingerprint() -> None:
    plan = PruningPlan({"a": [2, 0], "b": np.array([1])})
    same = PruningPlan({"b": [1.0], "a": (0, 2)})  # other order, other types
    other = PruningPlan({"a": [0, 1], "b": [1]})
    assert plan == same
    assert hash(plan) == hash(same)
    assert plan.fingerprint == same.fingerprint
    assert len({plan, same, other}) == 2
    assert plan != other
    assert plan.fingerprint != other.fingerprint
    assert plan != {"a": (0, 2), "b": (1,)}
    assert len(plan.fingerprint) == 64
    assert repr(plan) == "PruningPlan(a: 2, b: 1)"


def test_completed_names_every_group(groups: Any) -> None:
    plan = PruningPlan({"conv2": [5, 1]}).completed(groups)
    assert plan.to_dict() == {"conv1": [0, 1, 2, 3], "conv2": [1, 5], "fc1": list(range(8))}
    with pytest.raises(UserError, match=r"but got 'fc2'; did you mean 'fc1'\?"):
        PruningPlan({"fc2": [0]}).completed(groups)


@pytest.mark.parametrize(
    "indices", ["012", [0.5], [True], ["1"], [None], 3, None, [[0]], [float("nan")], [float("inf")], [2**70]]
)
def test_indices_must_be_integers(indices: Any) -> None:
    with pytest.raises(UserError, match="a plan needs a list of channel indices per group, but got a: "):
        PruningPlan({"a": indices})


@pytest.mark.parametrize("indices", [[-1], [0, 0], [1, 2, 1]])
def test_indices_must_be_distinct_and_not_negative(indices: list[int]) -> None:
    with pytest.raises(UserError, match="a plan needs distinct indices from 0, but 'a' keeps"):
        PruningPlan({"a": indices})


def test_file_round_trip(groups: Any, tmp_path: Path) -> None:
    plan = random_plan(groups, 3)
    path = tmp_path / "plan.json"
    plan.save(path)
    assert json.loads(path.read_text()) == {"keep": {name: list(keep) for name, keep in plan.items()}}
    loaded = PruningPlan.load(path)
    assert loaded == plan
    assert loaded.fingerprint == plan.fingerprint


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "a plan file must be JSON, but .*plan.json is not"),
        ("", "a plan file must be JSON"),
        ("[1, 2]", "a plan file needs the key 'keep', but .*plan.json has none"),
        ('{"widths": {}}', "a plan file needs the key 'keep'"),
        ('{"keep": [0, 1]}', "a plan must map group names to lists of channels, but got list"),
        ('{"keep": {"a": 3}}', "a plan needs a list of channel indices per group, but got a: 3"),
        ('{"keep": {"a": [NaN]}}', "a plan needs a list of channel indices per group"),
        ('{"keep": {"a": []}}', "at least one channel in each group, but 'a' keeps none"),
    ],
)
def test_broken_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        PruningPlan.load(path)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"must be readable, but .*none.json is not: No such file"):
        PruningPlan.load(tmp_path / "none.json")
    with pytest.raises(UserError, match=r"must be readable, but .* is not: Is a directory"):
        PruningPlan.load(tmp_path)
    path = tmp_path / "binary.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="must be JSON"):
        PruningPlan.load(path)
