"""Allowed widths against enumeration and hand-worked cases; include and ignore from the command line to the replay."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prunegym.agent.cli import main
from prunegym.envs import TrimSettings
from prunegym.envs.trim_settings import check_request
from prunegym.pruning import (
    AllowedWidths,
    CostModel,
    GroupSettings,
    PruningPlan,
    UserError,
    apply_plan,
    find_groups,
    solve_counts,
)
from prunegym.pruning.groups import AttributeCut, ChannelGroup
from prunegym.pruning.networks import build_network
from safetensors.torch import load_file
from torch import nn
from toys import tiny_task


def group(width: int, *units: int) -> ChannelGroup:
    """Make a group of `width` whose layers make `units` channels for each of its own."""
    counts = tuple(AttributeCut(f"conv{place}", "out_channels", unit) for place, unit in enumerate(units))
    return ChannelGroup(str(width), width, ("conv0",), (), (), counts, ())


def ints(*values: int) -> Any:
    return np.array(values, dtype=np.int64)


def enumerated(width: int, units: Sequence[int], multiple: int, minimum: int, present: int) -> list[int]:
    """List the allowed widths up to `present`, by the definition."""
    return [
        count
        for count in range(1, present + 1)
        if count in (width, present) or all(count * u % multiple == 0 and count * u >= minimum for u in units)
    ]


# ---- the rule --------------------------------------------------------------------------------------------------------
def test_widths_by_hand() -> None:
    groups = [group(20, 1), group(64, 1), group(6, 1)]
    present = ints(20, 64, 6)
    by_eight = AllowedWidths(groups, GroupSettings(channel_multiple=8))  # 8 16 20 | 8 16 ... 64 | 6
    assert by_eight.smallest(present).tolist() == [8, 8, 6]
    assert by_eight.wider(ints(8, 56, 6), present).tolist() == [16, 64, 6]
    assert by_eight.wider(ints(16, 64, 6), present).tolist() == [20, 64, 6]
    assert by_eight.nearest(ints(13, 20, 1), present).tolist() == [16, 16, 6]  # 20 is as far from 16 as from 24
    assert by_eight.nearest(ints(19, 21, 3), present).tolist() == [20, 24, 6]
    assert by_eight.not_below(ints(17, 17, 1), present).tolist() == [20, 24, 6]
    assert by_eight.not_above(ints(19, 17, 5), present).tolist() == [16, 16, 6]
    assert by_eight.smallest(ints(16, 24, 6)).tolist() == [8, 8, 6]
    wide = AllowedWidths(groups, GroupSettings(channel_multiple=8, minimum_width=18))  # 20 | 24 ... 64 | 6
    assert wide.smallest(present).tolist() == [20, 24, 6]


def test_units_of_grouped_convolutions_count_real_channels_by_hand() -> None:
    # 32 units of 4 and 6 channels: multiples of 8 are every 2nd and every 4th unit, so every 4th; 20 needs 5, so 8
    allowed = AllowedWidths([group(32, 4, 6)], GroupSettings(channel_multiple=8, minimum_width=20))
    assert allowed.smallest(ints(32)).tolist() == [8]
    assert allowed.wider(ints(8), ints(32)).tolist() == [12]
    assert AllowedWidths([group(32, 16)], GroupSettings(channel_multiple=8)).smallest(ints(32)).tolist() == [1]


@pytest.mark.parametrize("multiple", [1, 2, 3, 8, 12, 10**30])
@pytest.mark.parametrize("minimum", [1, 5, 16, 10**30])
def test_every_question_agrees_with_enumeration(multiple: int, minimum: int) -> None:
    rng = np.random.default_rng(0)
    for _ in range(12):
        width, units = int(rng.integers(1, 40)), [int(u) for u in rng.choice([1, 2, 4, 6, 16], rng.integers(1, 3))]
        rule = AllowedWidths([group(width, *units)], GroupSettings((), (), multiple, minimum))
        whole = enumerated(width, units, multiple, minimum, width)
        for present in {width, int(rng.choice(whole))}:
            known = enumerated(width, units, multiple, minimum, present)
            assert rule.smallest(ints(present))[0] == known[0]
            for count in range(present + 1):
                up, down = [k for k in known if k >= count], [k for k in known if k <= count]
                assert rule.not_below(ints(count), ints(present))[0] == up[0]
                assert rule.not_above(ints(count), ints(present))[0] == (down or known)[-1 if down else 0]
                nearest = min(known, key=lambda k: (abs(k - count), k))
                assert rule.nearest(ints(count), ints(present))[0] == nearest
            for one, following in zip(known, [*known[1:], present], strict=True):
                assert rule.wider(ints(one), ints(present))[0] == following


@pytest.mark.parametrize("name", ["channel_multiple", "minimum_width"])
@pytest.mark.parametrize("value", [0, -3, 1.5, "8", True, None])
def test_settings_that_are_no_counts_are_refused(name: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"{name} must be a whole number from 1, but got {value!r}; it counts"):
        GroupSettings(**{name: value})


def test_patterns_come_as_a_list_or_as_text() -> None:
    assert GroupSettings(include="layer3.*, conv1,").include == ("layer3.*", "conv1")
    listed: Any = ["layer3.*", "conv1"]
    assert GroupSettings(include=listed) == GroupSettings(include="layer3.*,conv1")
    wrong: Any = 3
    with pytest.raises(UserError, match="ignore must be a list of patterns such as 'layer3"):
        GroupSettings(ignore=wrong)


# ---- in networks -----------------------------------------------------------------------------------------------------
def test_a_grouped_convolution_is_cut_to_multiples_of_real_channels() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 24, 1),
        nn.Conv2d(24, 48, 3, padding=1, groups=12),  # units: 2 channels before, 4 after
        nn.ReLU(),
        nn.Conv2d(48, 20, 1),
        nn.ReLU(),
        nn.Conv2d(20, 5, 1),
    )
    example = torch.randn(1, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    groups = find_groups(network, example)
    assert [group.width for group in groups] == [12, 20]
    model = CostModel(network, groups, example, GroupSettings(channel_multiple=8, minimum_width=10))
    rng, seen = np.random.default_rng(0), set()
    for _ in range(60):
        budget = float(rng.uniform(model.smallest_share("macs"), 1))
        counts = solve_counts(model, rng.normal(0, 2, 2), budget, "macs")
        plan = PruningPlan.from_counts(groups, dict(zip(model.names, counts.tolist(), strict=True)))
        cut: Any = apply_plan(network, groups, plan, verify=example)
        seen.add((cut[0].out_channels, cut[1].out_channels, cut[3].out_channels))
    # multiples of 8 channels before the grouped convolution, from 16 on for both sides' sake; 16 or whole behind it
    assert seen <= {(first, 2 * first, last) for first in (16, 24) for last in (16, 20)}
    assert {(16, 32, 16), (24, 48, 16), (16, 32, 20)} <= seen


def test_an_ignored_group_costs_what_it_costs() -> None:
    network, example = build_network("lenet5_caffe", seed=0), torch.zeros(1, 1, 28, 28)
    settings = TrimSettings(budget=0.0002, budget_unit="params", groups=GroupSettings(ignore="fc1", minimum_width=4))
    # conv1 at 4: 104, conv2 at 4: 404, the first linear layer reads 4 x 16 of it: 500 x 65, the last 10 x 501
    assert math.ceil((104 + 404 + 32_500 + 5_010) / 431_080 * 1e6) == 88_193
    with pytest.raises(UserError, match="smallest reachable budget with minimum_width 4, ignore fc1") as caught:
        check_request(network, example, settings)
    assert "the narrowest allowed width per group already costs 0.088193 of the params" in str(caught.value)
    only = TrimSettings(budget=0.0002, budget_unit="params", groups=GroupSettings(include="conv1"))
    with pytest.raises(UserError, match=r"one channel per group already costs .* budget with include conv1"):
        check_request(network, example, only)
    with pytest.raises(UserError, match=r"'conv9' matches none; did you mean 'conv[12]'"):
        check_request(network, example, TrimSettings(groups=GroupSettings(include="conv9")))


# ---- from the command line to the replay -----------------------------------------------------------------------------
TINY = (
    tiny_task()
    + """search:
  max_evaluations: 4
  candidates: 1
  learner: {episodes_per_update: 2, hidden: [8]}
  trim:
    budget: 0.35
    budget_unit: params
    rounds: 2
    groups: {ignore: ["conv1"], channel_multiple: 8}
    retraining: {updates: 4, batch_size: 32, learning_rate: 0.01}
"""
)


@pytest.mark.parametrize("compensation", ["least_squares", "merge"])
def test_a_search_keeps_to_the_groups_and_its_replay_gives_the_same_bits(
    compensation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    (tmp_path / "tiny.yaml").write_text(TINY)
    run, again, wider = (str(tmp_path / name) for name in ("run", "again", "wider"))
    try:
        chosen = ["--search.trim.repair.compensation", compensation]
        assert main(["search", "tiny.yaml", *chosen, "--output", run]) == 0
        first = load_file(f"{run}/pruned.safetensors")
        assert first["conv1.weight"].shape[0] == 8
        assert first["conv2.weight"].shape[0] in (8, 16)
        assert first["fc1.weight"].shape[0] in range(8, 65, 8)
        assert first["conv2.weight"].numel() + first["fc1.weight"].numel() < 8 * 16 * 25 + 16 * 16 * 64
        for finalist in json.loads((tmp_path / "run" / "results.json").read_text())["finalists"]:
            for entry in finalist.get("rounds", []):
                assert all(width % 8 == 0 for width in entry["widths"].values()), finalist["name"]
        assert main(["apply", run, "--output", again]) == 0
        second = load_file(f"{again}/pruned.safetensors")
        assert list(first) == list(second)
        assert all(torch.equal(first[name], second[name]) for name in first)
        schedule = json.loads((tmp_path / "run" / "schedule.json").read_text())
        for entry in schedule["rounds"]:
            assert set(entry["keep"]) == {"conv2", "fc1"}
            entry["keep"]["conv1"] = [0, 2, 5]
        (tmp_path / "mine.json").write_text(json.dumps(schedule))
        assert main(["apply", run, "--schedule", "mine.json", "--output", wider]) == 0  # the schedule decides
        assert load_file(f"{wider}/pruned.safetensors")["conv1.weight"].shape[0] == 3
        capsys.readouterr()
        assert main(["search", "tiny.yaml", "--search.trim.groups.ignore", "conv9", "--output", "none"]) == 2
        assert "'conv9' matches none" in capsys.readouterr().err
        assert not (tmp_path / "none").exists()
    finally:
        torch.set_num_threads(threads)  # the configuration sets it
