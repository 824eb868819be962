"""`prunegym inspect` and the patterns behind it, on networks whose answers are known by hand."""

from pathlib import Path

import pytest
import torch
from prunegym.agent.cli import main
from prunegym.agent.inspection import InspectSettings, inspect_network
from prunegym.pruning import UserError, apply_plan, build_network, find_groups, solve_counts, survey_groups
from prunegym.pruning.plan import PruningPlan
from prunegym.pruning.torchvision_compat import torchvision


def test_lenet_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "lenet5_caffe", "--data", "digits"]) == 0
    lines = capsys.readouterr().out.split("\n")
    rows = {line.split()[0]: line.split() for line in lines if line.startswith(" ") and line.split()}
    # conv2: 25,050 of its own and 400,000 of fc1's 431,080 parameters; 1,600,000 + 400,000 of 2,293,000 MACs
    assert rows["conv2"][1:8] == ["50", "1", "1", "425.1k", "98.6%", "2.00M", "87.2%"]
    assert rows["fc1"][1] == "500"
    assert any(
        line.startswith("left whole: fc2 (10 channels): its channels are the network's outputs") for line in lines
    )
    # one channel per group: conv1 26, conv2 26, fc1 17, fc2 20 = 89 parameters of 431,080
    found = inspect_network(InspectSettings("lenet5_caffe"))
    assert found.model is not None
    assert found.model.smallest_share("params") == pytest.approx(89 / 431_080)


def test_ignored_layers_stay_whole() -> None:
    network, images = build_network("cifar_resnet20", seed=0), torch.zeros(1, 3, 32, 32)
    survey = survey_groups(network, images, ignore=["layer2.*"])
    names = [group.name for group in survey.groups]
    assert names == [group.name for group in find_groups(network, images) if not group.name.startswith("layer2")]
    reasons = {item.name: item.reason for item in survey.refused}
    assert reasons["layer2.0.conv1"] == "left alone: matches ignore pattern 'layer2.*'"
    assert reasons["layer2.0.conv2"] == "left alone: matches ignore pattern 'layer2.*'"  # the whole residual stream
    only = find_groups(network, images, include=["layer3.1.conv1", "conv1"])
    assert [group.name for group in only] == ["conv1", "layer3.1.conv1"]
    smaller = apply_plan(network, only, PruningPlan.uniform(only, 0.5), verify=torch.randn(2, 3, 32, 32))
    assert smaller.layer2[0].conv1.out_channels == 32


def test_a_pattern_that_matches_nothing_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(
        UserError, match=r"include and ignore must match a layer with channels, but 'layr1.\*' matches none"
    ):
        find_groups(build_network("cifar_resnet20", seed=0), torch.zeros(1, 3, 32, 32), ignore=["layr1.*"])
    assert main(["inspect", "lenet5_caffe", "--ignore", "conv9"]) == 2
    assert "'conv9' matches none" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["resnext50_32x4d", "regnet_y_400mf", "efficientnet_b0", "convnext_tiny", "googlenet"])
def test_hard_architectures_are_cut_exactly(name: str) -> None:
    """Grouped convolutions, squeeze-and-excitation, layer norm with layer scale, concatenation."""
    assert name in torchvision.models.list_models(module=torchvision.models)
    network = build_network(name, classes=10, seed=0).eval()
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    survey = survey_groups(network, images)
    assert [item.reason for item in survey.refused] == ["its channels are the network's outputs"]
    generator = torch.Generator().manual_seed(1)
    keep = {
        g.name: torch.randperm(g.width, generator=generator)[: max(1, g.width // 2)].tolist() for g in survey.groups
    }
    smaller = apply_plan(network, survey.groups, PruningPlan(keep), verify=images)
    before, after = (sum(p.numel() for p in net.parameters()) for net in (network, smaller))
    assert after < 0.45 * before
    for module in smaller.modules():
        if isinstance(module, torch.nn.Conv2d):
            assert module.weight.shape[:2] == (module.out_channels, module.in_channels // module.groups)


# ---- everything that is told -----------------------------------------------------------------------------------------
def test_tied_layers_units_and_narrowest_widths(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "cifar_resnet20", "--channel_multiple", "8", "--minimum_width", "20"]) == 0
    lines = capsys.readouterr().out.split("\n")
    rows = {line.split()[0]: line.split() for line in lines if line.startswith(" ") and line.split()}
    assert [rows[name][1:3] for name in ("conv1", "layer2.0.conv1", "layer3.0.conv2")] == [
        ["16", "16"], ["32", "24"], ["64", "24"],
    ]  # fmt: skip
    assert "tied: conv1, layer1.0.conv2, layer1.1.conv2, layer1.2.conv2" in lines
    assert "tied: layer3.0.conv2, layer3.0.downsample.0, layer3.1.conv2, layer3.2.conv2" in lines
    sizes = "channel_multiple 8, minimum_width 20"
    stuck = [line for line in lines if line.startswith("left whole: ") and "narrower" in line]
    assert stuck == [
        f"left whole: {name} (16 channels): no narrower width is allowed with {sizes}"
        for name in ("conv1", "layer1.0.conv1", "layer1.1.conv1", "layer1.2.conv1")
    ]
    assert any(line.endswith(f"to 1 are reachable with {sizes}") for line in lines)


def test_layers_of_units_are_told_with_their_channels() -> None:
    found = inspect_network(InspectSettings("resnext50_32x4d", image_size=32, channel_multiple=8))
    assert "tied: layer1.0.conv1 (4 channels a unit), layer1.0.conv2 (4 channels a unit)" in found.tied()
    assert found.model is not None
    smallest = dict(zip(found.model.names, found.model.allowed.smallest(found.model.widths), strict=True))
    assert [smallest[f"layer{stage}.0.conv1"] for stage in (1, 2, 3)] == [2, 1, 1]  # units of 4, 8 and 16


def test_the_named_range_of_budgets_is_reachable() -> None:
    found = inspect_network(InspectSettings("lenet5_caffe", ignore="conv2", channel_multiple=16))
    assert found.model is not None
    for line, unit in zip(found.budgets(), ("macs", "params"), strict=False):
        least = float(line.split("from ")[1].split()[0])
        assert line.endswith("to 1 are reachable with channel_multiple 16, ignore conv2")
        assert solve_counts(found.model, [0.0, 0.0], least, unit).tolist() == [16, 16]
        with pytest.raises(UserError, match="smallest reachable budget with channel_multiple 16, ignore conv2"):
            solve_counts(found.model, [0.0, 0.0], least - 2e-6, unit)
    # conv1 at 16, conv2 whole, fc1 at 16: 416 + 50 (16 · 25 + 1) + 16 (800 + 1) + 10 (16 + 1)
    assert found.model.smallest_share("params") == (416 + 50 * 401 + 16 * 801 + 170) / 431_080


@pytest.mark.parametrize("option", ["--channel_multiple", "--minimum_width"])
@pytest.mark.parametrize("value", ["0", "-3", "1.5", "eight"])
def test_a_wrong_width_is_one_clear_sentence(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (
        ["inspect", "lenet5_caffe", option],
        ["search", "quickstart", f"--search.trim.groups.{option[2:]}"],
    ):
        assert main([*command, value]) == 2
        said = capsys.readouterr().err.strip().split("\n")
        assert len(said) == 1
        assert option[2:] in said[0]
        assert value in said[0]
        assert "whole number" in said[0]


@pytest.mark.parametrize("option", ["--image_size", "--channels", "--images"])
@pytest.mark.parametrize("value", ["0", "-5"])
def test_sizes_begin_at_one(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "resnet18", option, value]) == 2
    assert capsys.readouterr().err == f"prunegym: {option[2:]} must be at least 1, but got {value}\n"


def test_names_are_no_markup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = "from torch import nn\ndef make():\n    net = nn.Sequential()\n"
    code += "    for name, size in (('[bold]a', (5, 4)), ('[/red]b', (4, 3))):\n"
    code += "        net.add_module(name, nn.Linear(*size))\n"
    code += "    return nn.Sequential(nn.Flatten(), net)\n"
    (tmp_path / "marked_network.py").write_text(code)
    arguments = ["--channels", "5", "--image_size", "1"]
    assert main(["inspect", f"{tmp_path / 'marked_network.py'}:make", *arguments]) == 0
    said = capsys.readouterr().out
    assert "1.[bold]a" in said
    assert "left whole: 1.[/red]b" in said
