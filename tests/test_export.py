"""An exported file computes what PyTorch computes for any batch, in another runtime; otherwise it gets no name."""

import copy
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from prunegym.agent.cli import main
from prunegym.pruning import PruningPlan, UserError, apply_plan, build_network, export, find_groups
from prunegym.pruning.artifact import load_pruned, save_pruned
from prunegym.pruning.export import export_network, export_pruned
from torch import Tensor, nn
from toys import ToyConv, images, make, random_plan, randomise_norms

SHAPES = {"lenet_small": (1, 28, 28), "cifar_resnet20": (3, 16, 16)}
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def save_cut(folder: Path, name: str) -> nn.Module:
    """Cut a named network at random, save it with its data's statistics, and return it."""
    shape = SHAPES[name]
    network = build_network(name, classes=10, in_channels=shape[0], image_size=shape[-1], seed=4).eval()
    randomise_norms(network, 4)
    groups = find_groups(network, images(shape, 1))
    plan = random_plan(groups, 4)
    smaller = apply_plan(network, groups, plan).eval()
    source = {
        "network": name, "network_arguments": {}, "classes": 10, "image_shape": shape,
        "data": "pictures", "mean": MEAN[: shape[0]], "std": STD[: shape[0]],
    }  # fmt: skip
    save_pruned(folder, smaller, plan, example_shape=(1, *shape), source=source)
    return smaller


def relative(expected: Tensor, got: Any) -> float:
    return float(np.abs(expected.numpy() - np.asarray(got)).max() / np.abs(expected.numpy()).max())


@pytest.mark.parametrize("name", list(SHAPES))
def test_an_onnx_file_computes_the_same(name: str, tmp_path: Path) -> None:
    network = save_cut(tmp_path, name)
    made = export_pruned(tmp_path)
    assert made.path == tmp_path / "pruned.onnx"
    model = onnx.load(made.path, load_external_data=False)
    onnx.checker.check_model(model, full_check=True)
    assert (made.format, made.size, made.opset) == ("onnx", made.path.stat().st_size, model.opset_import[0].version)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "manifest.json", "plan.json", "pruned.onnx", "pruned.safetensors",
    ]  # fmt: skip
    described = {entry.key: entry.value for entry in model.metadata_props}
    assert (described["network"], described["data"]) == (name, "pictures")
    assert json.loads(described["mean"]) == list(MEAN[: SHAPES[name][0]])
    assert json.loads(described["std"]) == list(STD[: SHAPES[name][0]])
    session = onnxruntime.InferenceSession(str(made.path), providers=["CPUExecutionProvider"])
    (taken,), (given,) = session.get_inputs(), session.get_outputs()
    assert (taken.name, taken.shape) == ("images", ["batch", *SHAPES[name]])
    assert (given.name, given.shape) == ("logits", ["batch", 10])
    for batch in (1, 3, 8):
        x = images(SHAPES[name], batch, seed=batch)
        with torch.inference_mode():
            assert relative(network(x), session.run(None, {"images": x.numpy()})[0]) < 1e-4
    assert 0 <= made.difference <= 1e-4


def test_a_torch_file_computes_the_same(tmp_path: Path) -> None:
    network = save_cut(tmp_path, "cifar_resnet20")
    made = export_pruned(tmp_path, format="torch")
    assert (made.path, made.format, made.opset) == (tmp_path / "pruned.pt2", "torch", None)
    kept = {"metadata.json": ""}
    program = torch.export.load(made.path, extra_files=kept).module()
    assert json.loads(json.loads(kept["metadata.json"])["mean"]) == list(MEAN)
    for batch in (1, 7):
        x = images(SHAPES["cifar_resnet20"], batch)
        with torch.inference_mode():
            assert relative(network(x), program(x)) < 1e-6


def test_the_network_is_left_as_it_was_and_nothing_is_said(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    network = make(ToyConv).train()
    before = copy.deepcopy(network.state_dict())
    state = torch.get_rng_state()
    made = export_network(network, images(ToyConv.shape, 1), tmp_path / "new" / "toy.onnx")
    assert made.path.is_file()
    assert network.training
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert tuple(capfd.readouterr()) == ("", "")
    assert not recwarn.list


class Squeezing(nn.Module):
    """A depthwise convolution whose channels are weighted by squeeze and excite; takes (N, 3, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Conv2d(3, 8, 1)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.squeeze = nn.Conv2d(8, 4, 1)
        self.excite = nn.Conv2d(4, 8, 1)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.depthwise(nn.functional.hardswish(self.norm(self.expand(x))))
        weight = self.excite(torch.relu(self.squeeze(nn.functional.adaptive_avg_pool2d(maps, 1))))
        return self.fc((maps * nn.functional.hardsigmoid(weight)).mean((2, 3)))


def test_grouped_convolutions_and_squeeze_and_excite(tmp_path: Path) -> None:
    network = make(Squeezing)
    smaller = apply_plan(
        network, find_groups(network, images((3, 8, 8), 1)), PruningPlan({"expand": [0, 2, 3, 7], "squeeze": [1, 3]})
    )
    made = export_network(smaller.eval(), images((3, 8, 8), 1), tmp_path / "x.onnx")
    session, x = onnxruntime.InferenceSession(str(made.path)), images((3, 8, 8), 6)
    with torch.inference_mode():
        assert relative(smaller(x), session.run(None, {"images": x.numpy()})[0]) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_types_of_numbers(dtype: torch.dtype, tmp_path: Path) -> None:
    network, example = make(ToyConv, dtype=dtype), images(ToyConv.shape, 1, dtype=dtype)
    export_network(network, example, tmp_path / "toy.pt2", "torch")
    if dtype == torch.float64:  # onnxruntime convolves no doubles
        with pytest.raises(UserError, match=r"must run in onnxruntime, but cannot: .*make it float32"):
            export_network(network, example, tmp_path / "toy.onnx")
        assert [path.name for path in tmp_path.iterdir()] == ["toy.pt2"]
    else:
        assert export_network(network, example, tmp_path / "toy.onnx", tolerance=0.01).difference > 0


# ---- what is refused -------------------------------------------------------------------------------------------------
class Counting(nn.Linear):
    """Gives something else at each call."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * self.calls


class Rolling(nn.Linear):
    """Draws random numbers in evaluation mode, too."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), 0.5, training=True)


class Traced(nn.Linear):
    """Gives something else while it is traced."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2.0 if torch.compiler.is_compiling() else 1.0)


class Pair(nn.Linear):
    """Takes two inputs only."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.reshape(2, 5))


class Looking(nn.Linear):
    """Decides by the values of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 0 else -x)


class Several(nn.Linear):
    """Returns two tensors."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x), x


def broken() -> nn.Module:
    network = nn.Linear(5, 3)
    network.bias.data.fill_(float("nan"))
    return network


@pytest.mark.parametrize("format", ["onnx", "torch"])
@pytest.mark.parametrize(
    ("network", "message"),
    [
        (Counting(5, 3), r"must compute the same from the same input, but two passes .* differ; .*random numbers"),
        (Rolling(5, 3), r"must compute the same from the same input, but two passes .* differ; .*random numbers"),
        (Traced(5, 3), r"must compute the network's outputs to 0.0001 of their largest, but differs by \d"),
        (broken(), "but differs by inf"),
        (Pair(5, 3), r"any number of inputs .*, but torch\.export refused it: .*Constraints violated"),
        (Looking(5, 3), r"without looking at their values, but torch\.export refused it"),
        (Several(5, 3), r"must return one tensor \(N, \.\.\.\), but returns tuple"),
    ],
)
def test_a_network_that_no_file_can_stand_for(network: nn.Module, message: str, format: str, tmp_path: Path) -> None:
    path = tmp_path / {"onnx": "old.onnx", "torch": "old.pt2"}[format]
    path.write_text("older")
    with pytest.raises(UserError, match=message):
        export_network(network, torch.zeros(1, 5), path, format)
    assert path.read_text() == "older"
    assert list(tmp_path.iterdir()) == [path]


def test_a_difference_beyond_the_tolerance_leaves_no_file(tmp_path: Path) -> None:
    network, example = make(ToyConv), images(ToyConv.shape, 1)
    with pytest.raises(
        UserError,
        match=r"to 1e-12 of their largest, but differs by [^;]*; raise the tolerance or use the format 'torch'$",
    ):
        export_network(network, example, tmp_path / "toy.onnx", tolerance=1e-12)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "onx"}, "format must be one of onnx, torch, but got 'onx'; did you mean 'onnx'"),
        ({"path": "x.pt2"}, r"a file of format 'onnx' must end in \.onnx, but got 'x\.pt2'"),
        ({"tolerance": 0.0}, "tolerance must be above 0"),
        ({"tolerance": float("nan")}, "tolerance must be above 0"),
        ({"example": torch.zeros(1, 5, dtype=torch.int64)}, r"example must be one input .* torch\.int64 \(1, 5\)"),
        ({"example": torch.zeros(5)}, r"example must be one input .* \(5,\)"),
        ({"example": "x"}, r"example must be one input \(1, \.\.\.\) as a tensor, but got 'x'"),
        ({"network": "lenet"}, "network must be a torch.nn.Module, but got str"),
    ],
)
def test_a_wrong_request_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    request = {"network": nn.Linear(5, 3), "example": torch.zeros(1, 5), "path": tmp_path / "x.onnx", **changes}
    with pytest.raises(UserError, match=message):
        export_network(**request)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"needs the package '{package}'.*pip install 'prunegym\[export\]'"):
        export_network(nn.Linear(5, 3), torch.zeros(1, 5), tmp_path / "x.onnx")
    assert export_network(nn.Linear(5, 3), torch.zeros(1, 5), tmp_path / "x.pt2", "torch").difference == 0


def test_a_network_beyond_one_onnx_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "LARGEST_ONNX", 4 * (5 * 3 + 3) - 1)
    with pytest.raises(UserError, match=r"holds at most 2 GiB.*use the format 'torch'"):
        export_network(nn.Linear(5, 3), torch.zeros(1, 5), tmp_path / "x.onnx")
    monkeypatch.setattr(export, "LARGEST_ONNX", 4 * (5 * 3 + 3))
    export_network(nn.Linear(5, 3), torch.zeros(1, 5), tmp_path / "x.onnx")


@pytest.mark.parametrize("name", ["x.onnx", "x.pt2"])
def test_a_place_that_cannot_be_written_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=rf"file/{name} must be writable, but is not"):
        export_network(
            nn.Linear(5, 3), torch.zeros(1, 5), tmp_path / "file" / name, "torch" if name == "x.pt2" else "onnx"
        )


# ---- the command -----------------------------------------------------------------------------------------------------
def test_a_half_precision_network_is_told_of_float32(tmp_path: Path) -> None:
    network, example = make(ToyConv, dtype=torch.float16), images(ToyConv.shape, 1, dtype=torch.float16)
    with pytest.raises(UserError, match=r"; export a float32 network or raise the tolerance or use the format 'torch'"):
        export_network(network, example, tmp_path / "toy.onnx", tolerance=1e-9)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    save_cut(run, "lenet_small")
    assert main(["export", str(run), "--format", "torch", "--output", str(tmp_path / "mine.pt2")]) == 0
    size = (tmp_path / "mine.pt2").stat().st_size
    assert capsys.readouterr().out.startswith(f"{tmp_path}/mine.pt2: {size:,} bytes; differs from PyTorch by at most 0")
    assert main(["export", str(run)]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{run}/pruned.onnx: ")
    assert "opset " in said
    assert same_outputs(run)


def same_outputs(run: Path) -> bool:
    x = images(SHAPES["lenet_small"], 4)
    session = onnxruntime.InferenceSession(str(run / "pruned.onnx"))
    with torch.inference_mode():
        return relative(load_pruned(run)(x), session.run(None, {"images": x.numpy()})[0]) < 1e-4


def test_mistakes_at_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_pruned(tmp_path, nn.Linear(5, 3), PruningPlan({}), example_shape=(1, 5), source={})
    for arguments, words in (
        ([str(tmp_path), "--format", "onx"], "did you mean 'onnx'"),
        ([str(tmp_path), "--formt", "onnx"], "did you mean 'format'"),
        ([str(tmp_path / "absent")], "there is none at"),
        (
            [str(tmp_path)],
            "has no name to build it by; pass the original: in Python, prunegym.pruning.export.export_pr",
        ),
        ([str(tmp_path), "extra"], "unexpected argument 'extra'; `prunegym export --help`"),
        ([str(tmp_path), "--tolerance", "small"], "--tolerance must be a number, but got small"),
    ):
        assert main(["export", *arguments]) == 2
        assert words in capsys.readouterr().err
