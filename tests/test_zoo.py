"""Every classification network of torchvision is cut and verified, or has its place among larger ones of the same code.

The smallest network of each family is examined here, within the limit of parameters and seconds a test suite bears;
`benchmarks/zoo.py` examines all of them by the same code.
"""

import pytest
from prunegym.pruning.networks import NETWORKS
from prunegym.pruning.torchvision_compat import torchvision
from toys import benchmark

ZOO = benchmark("zoo")
LARGEST = 135.0  # million parameters: the smallest VGG has 133

# network that is examined -> groups it must have, and the larger networks of the same code
FAMILIES: dict[str, tuple[int, str]] = {
    "alexnet": (7, ""),
    "convnext_tiny": (22, "convnext_small convnext_base convnext_large"),
    "densenet121": (120, "densenet161 densenet169 densenet201"),
    "efficientnet_b0": (
        40, "efficientnet_b1 efficientnet_b2 efficientnet_b3 efficientnet_b4 efficientnet_b5 efficientnet_b6 "
        "efficientnet_b7",
    ),
    "efficientnet_v2_s": (75, "efficientnet_v2_m efficientnet_v2_l"),
    "googlenet": (57, ""),
    "inception_v3": (94, ""),
    "maxvit_t": (47, ""),
    "mnasnet0_5": (25, "mnasnet0_75 mnasnet1_0 mnasnet1_3"),
    "mobilenet_v2": (25, ""),
    "mobilenet_v3_small": (27, "mobilenet_v3_large"),
    "regnet_x_400mf": (
        27, "regnet_x_800mf regnet_x_1_6gf regnet_x_3_2gf regnet_x_8gf regnet_x_16gf regnet_x_32gf",
    ),
    "regnet_y_400mf": (
        37, "regnet_y_800mf regnet_y_1_6gf regnet_y_3_2gf regnet_y_8gf regnet_y_16gf regnet_y_32gf regnet_y_128gf",
    ),
    "resnet18": (12, "resnet34"),
    "resnet50": (37, "resnet101 resnet152 wide_resnet50_2 wide_resnet101_2"),
    "resnext50_32x4d": (21, "resnext101_32x8d resnext101_64x4d"),
    "shufflenet_v2_x0_5": (20, ""),
    "shufflenet_v2_x1_0": (19, "shufflenet_v2_x1_5 shufflenet_v2_x2_0"),
    "squeezenet1_0": (25, ""),
    "squeezenet1_1": (25, ""),
    "swin_t": (12, "swin_s swin_b"),
    "swin_v2_t": (24, "swin_v2_s swin_v2_b"),
    "vgg11_bn": (10, "vgg11 vgg13 vgg13_bn vgg16 vgg16_bn vgg19 vgg19_bn"),
    "vit_b_32": (12, "vit_b_16 vit_l_16 vit_l_32 vit_h_14"),
}  # fmt: skip
WHOLE = {  # what families leave whole beside the output layer, in the words of the table
    "maxvit_t": {"part of attention", "fixed to other sizes by the network's code"},
    "shufflenet_v2_x0_5": {"tied together by shuffles"},
    "shufflenet_v2_x1_0": {"tied together by shuffles"},
    "swin_t": {"read by attention", "layer not called as a module"},
    "swin_v2_t": {"read by attention", "layer not called as a module", "part of attention"},
    "vit_b_32": {"part of attention", "layer not called as a module"},
}


def test_every_network_has_its_place() -> None:
    placed = [name for smallest, (_, larger) in FAMILIES.items() for name in (smallest, *larger.split())]
    assert len(placed) == len(set(placed))
    assert set(placed) == set(torchvision.models.list_models(module=torchvision.models)) == set(ZOO.classifiers())
    assert set(placed) <= set(NETWORKS)


@pytest.mark.parametrize("name", FAMILIES)
def test_cut_networks_equal_the_masked_ones(name: str) -> None:
    row = ZOO.examine(name, LARGEST)
    assert row.verdict == "equal to the masked network"
    assert row.groups == FAMILIES[name][0]
    assert {reason for reason, _ in row.refused} == {"output layer protected"} | WHOLE.get(name, set())
    assert row.prunable > (0.6 if name in WHOLE else 0.99)
