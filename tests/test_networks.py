"""Networks against parameter counts worked out by hand, and the wording of what can go wrong."""

import multiprocessing
import pickle
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from prunegym.pruning.errors import UserError
from prunegym.pruning.networks import NETWORKS, build_network, network_names
from prunegym.pruning.weights import load_weights
from safetensors.torch import save_file
from torch import nn

OWN = ["lenet5_caffe", "lenet_small", "lenet300_100", "cifar_resnet20", "cifar_resnet56", "cifar_vgg16_bn"]
TORCHVISION = ["squeezenet1_1", "mobilenet_v3_small", "resnet18"]
SHARED = Path(__file__).resolve().parents[2] / "shared"


def count(network: nn.Module) -> int:
    return sum(weight.numel() for weight in network.parameters())


def resnet_parameters(blocks: int) -> int:
    """Sum convolutions, batch norms (2 each), 1x1 shortcuts and the last layer."""
    total = 3 * 16 * 9 + 2 * 16
    for inputs, outputs in ((16, 16), (16, 32), (32, 64)):
        total += inputs * outputs * 9 + (2 * blocks - 1) * outputs * outputs * 9 + 2 * blocks * 2 * outputs
        total += inputs * outputs + 2 * outputs if inputs != outputs else 0
    return total + 64 * 10 + 10


def vgg_parameters() -> int:
    """Sum bias-free convolutions, batch norms and the last layer."""
    widths = [3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    pairs = pairwise(widths)
    return sum(9 * a * b + 2 * b for a, b in pairs) + 512 * 10 + 10


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("lenet5_caffe", (25 + 1) * 20 + (500 + 1) * 50 + (800 + 1) * 500 + (500 + 1) * 10),
        ("lenet_small", (25 + 1) * 8 + (200 + 1) * 16 + (256 + 1) * 64 + (64 + 1) * 10),
        ("lenet300_100", 785 * 300 + 301 * 100 + 101 * 10),
        ("cifar_resnet20", resnet_parameters(3)),
        ("cifar_resnet56", resnet_parameters(9)),
        ("cifar_vgg16_bn", vgg_parameters()),
        ("resnet18", 11_689_512),
    ],
)
def test_parameter_counts(name: str, parameters: int) -> None:
    assert count(build_network(name)) == parameters


def test_published_count_of_lenet5() -> None:
    assert count(build_network("lenet5_caffe")) == 431_080
    assert resnet_parameters(3) == 272_474


@pytest.mark.parametrize("name", OWN + TORCHVISION)
def test_forward_gives_logits_and_leaves_no_nan(name: str) -> None:
    record = NETWORKS[name]
    network = build_network(name, classes=7, seed=0).eval()
    logits = network(torch.randn(2, *record.image_shape, generator=torch.Generator().manual_seed(0)))
    assert logits.shape == (2, 7)
    assert torch.isfinite(logits).all()
    assert record.name == name
    assert record.description.endswith(".")


@pytest.mark.parametrize("name", OWN)
def test_own_networks_pickle_and_have_no_inplace_activation(name: str) -> None:
    network = pickle.loads(pickle.dumps(build_network(name)))
    assert not any(getattr(module, "inplace", False) for module in network.modules())


def test_lenet_follows_the_image() -> None:
    network = build_network("lenet5_caffe", in_channels=3, image_size=32, arguments={"widths": [4, 6, 10]})
    assert [name for name, module in network.named_modules() if hasattr(module, "weight")] == [
        "conv1",
        "conv2",
        "fc1",
        "fc2",
    ]
    assert network.fc1.in_features == 6 * 5 * 5  # 32 -> 28 -> 14 -> 10 -> 5
    assert network(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def test_every_torchvision_classifier_is_listed() -> None:
    names = network_names()
    assert names[:6] == ["lenet5_caffe", "lenet_small", "lenet300_100", *OWN[3:]]
    assert {"vgg16", "densenet121", "efficientnet_b0", "convnext_tiny", "vit_b_16"} <= set(names)
    assert not {"fcn_resnet50", "fasterrcnn_resnet50_fpn", "raft_small", "r3d_18"} & set(names)


def test_seed_fixes_the_weights_and_spares_the_global_state() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second = (build_network("lenet_small", seed=3).state_dict() for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[key], second[key]) for key in first)
    other = build_network("lenet_small", seed=4).state_dict()
    assert not torch.equal(first["fc1.weight"], other["fc1.weight"])


@pytest.mark.parametrize(
    ("name", "keywords", "wording"),
    [
        ("lenet5_cafe", {}, "did you mean 'lenet5_caffe'"),
        ("resnet18", {"in_channels": 1}, "takes images of 3 channels, but got in_channels=1"),
        ("resnet18", {"arguments": {"weights": "DEFAULT"}}, "without weights"),
        ("resnet18", {"arguments": {"num_classes": 3}}, "as 'classes'"),
        ("resnet18", {"arguments": {"widht": 3}}, "'widht'.*width_per_group"),
        ("lenet5_caffe", {"arguments": {"widht": 3}}, "'widht'; its arguments are: .*widths"),
        ("lenet5_caffe", {"arguments": {"widths": [1, 2]}}, "three positive numbers"),
        ("lenet5_caffe", {"image_size": 8}, "16x16 or more, but got image_size=8"),
        ("lenet5_caffe", {"classes": 0}, "classes must be 1 or more"),
        ("nowhere.py:build", {}, "there is no file 'nowhere.py'"),
        ("nowhere.py", {}, "add ':function'"),
        (":build", {}, "must be module:function or path"),
        ("models/mine:build", {}, "must be module:function or path"),
        ("no_such_module:build", {}, "there is no module 'no_such_module'"),
    ],
)
def test_wrong_requests_are_explained(name: str, keywords: dict, wording: str) -> None:
    with pytest.raises(UserError, match=wording):
        build_network(name, **keywords)


SOURCE = """
from torch import nn
from helper_of_{stem} import WIDTH

def make(outputs=2):
    return nn.Linear(WIDTH, outputs)

def text():
    return "no network"

class Doubled(nn.Linear):
    def forward(self, inputs):
        return 2 * super().forward(inputs)

def own_class():
    return Doubled(WIDTH, 2)
"""


def outputs_for_ones(network: nn.Module) -> list[list[float]]:
    with torch.no_grad():
        return network(torch.ones(1, 3)).tolist()


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    stem = f"own_{request.node.name}".replace("[", "_").replace("]", "")
    (tmp_path / f"{stem}.py").write_text(SOURCE.format(stem=stem))
    (tmp_path / f"helper_of_{stem}.py").write_text("WIDTH = 3\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    return stem


def test_user_module(own_module: str) -> None:
    network = build_network(f"{own_module}:make", classes=10, arguments={"outputs": 5})
    assert (network.in_features, network.out_features) == (3, 5)


@pytest.mark.parametrize("form", ["{stem}:own_class", "{folder}/{stem}.py:own_class"], ids=["module", "file"])
def test_user_network_reaches_a_spawned_process(own_module: str, tmp_path: Path, form: str) -> None:
    network = build_network(form.format(stem=own_module, folder=tmp_path), seed=0)
    assert type(network).__module__ == own_module
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(outputs_for_ones, (network,)) == outputs_for_ones(network)


def test_user_file(own_module: str, tmp_path: Path) -> None:
    network = build_network(f"{tmp_path / own_module}.py:make")
    assert network.out_features == 2
    with pytest.raises(UserError, match=r"must return a torch\.nn\.Module, but returned str"):
        build_network(f"{own_module}.py:text")
    with pytest.raises(UserError, match="did you mean 'make'"):
        build_network(f"{own_module}.py:mak")
    with pytest.raises(UserError, match="its arguments are: outputs"):
        build_network(f"{own_module}.py:make", arguments={"inputs": 1})


def test_user_file_named_like_a_loaded_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", sys.path.copy())
    json = sys.modules["json"]
    (tmp_path / "json.py").write_text("from torch import nn\n\ndef make():\n    return nn.ReLU()\n")
    assert isinstance(build_network(f"{tmp_path / 'json.py'}:make"), nn.ReLU)
    assert sys.modules["json"] is json


def test_errors_inside_the_users_code_are_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", sys.path.copy())
    (tmp_path / "lacking.py").write_text("import no_such_library\n")
    with pytest.raises(
        UserError, match=r"lacking\.py stops at .*lacking\.py:1: ModuleNotFoundError: .*no_such_library"
    ):
        build_network(f"{tmp_path / 'lacking.py'}:make")
    assert "lacking" not in sys.modules


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
def test_weights_come_back(suffix: str, tmp_path: Path) -> None:
    source, target = build_network("lenet_small", seed=0), build_network("lenet_small", seed=1)
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(source.state_dict(), path)
    elif suffix == ".pth":
        torch.save({"state_dict": {f"module.{k}": v for k, v in source.state_dict().items()}, "epoch": 1}, path)
    else:
        torch.save(source.state_dict(), path)
    load_weights(target, path)
    expected = source.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in target.state_dict().items())


@pytest.mark.parametrize(
    ("change", "wording"),
    [
        (lambda weights: weights.pop("fc1.bias"), r"lack fc1\.bias; check"),
        (lambda weights: weights.update(extra=torch.zeros(1)), "it has no extra"),
        (lambda weights: weights.update({"fc2.bias": torch.zeros(9)}), r"fc2\.bias \(file \(9,\), network \(10,\)\)"),
        (lambda weights: weights["conv1.weight"].fill_(float("nan")), r"NaN or infinity in conv1\.weight"),
        (lambda weights: weights.update({"fc2.bias": 3}), "holds something else"),
        (lambda weights: weights.clear(), r"lack conv1\.weight, conv1\.bias, conv2\.weight and 5 more"),
    ],
)
def test_wrong_weights_are_explained_and_change_nothing(change, wording: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    network = build_network("lenet_small", seed=1)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    weights = build_network("lenet_small", seed=0).state_dict()
    change(weights)
    torch.save(dict(weights), tmp_path / "weights.pt")
    with pytest.raises(UserError, match=wording):
        load_weights(network, tmp_path / "weights.pt")
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_damaged_and_missing_weights(suffix: str, tmp_path: Path) -> None:
    network = build_network("lenet_small")
    with pytest.raises(UserError, match="there is none at"):
        load_weights(network, tmp_path / "nothing.pt")
    (tmp_path / "weights.txt").write_text("1")
    with pytest.raises(UserError, match=r"must be a \.pt, \.pth or \.safetensors file"):
        load_weights(network, tmp_path / "weights.txt")
    path = tmp_path / f"weights{suffix}"
    for content in (b"", b"not a checkpoint at all"):
        path.write_bytes(content)
        with pytest.raises(UserError, match="is damaged or holds other objects"):
            load_weights(network, path)


def test_whole_pickled_network_is_refused(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "network.pt")
    with pytest.raises(UserError, match="holds other objects"):
        load_weights(nn.Linear(2, 2), tmp_path / "network.pt")


def test_trained_resnet20_loads_strictly() -> None:
    path = SHARED / "checkpoints" / "resnet20_cifar10.pt"
    if not path.is_file():
        pytest.skip("the trained ResNet-20 lies in ../shared/checkpoints, which is not here")
    network = build_network("cifar_resnet20")
    result = network.load_state_dict(torch.load(path, weights_only=True), strict=True)
    assert not result.missing_keys
    assert not result.unexpected_keys
    load_weights(network, path)


def test_torchvision_imports_once_in_a_fresh_process() -> None:
    code = (
        "from prunegym.pruning.torchvision_compat import declare_missing_operators, torchvision as ours\n"
        "import torchvision, torchvision.transforms.v2\n"
        "assert torchvision is ours and ours.datasets.ImageFolder and ours.transforms.v2.Resize\n"
        "assert declare_missing_operators() == []\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
