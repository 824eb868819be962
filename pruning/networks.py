"""Networks by name: five small ones built here, torchvision's classifiers, and the user's own.

`build_network` makes one with random weights and `load_weights` fills it from a file. Every activation is a
module of its own and none works in place, so that a hook sees each map as the network computed it.
"""

import importlib
import importlib.util
import inspect
import pickle
import sys
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from .errors import UserError, closest
from .torchvision_compat import torchvision


class LeNet(nn.Module):
    """Caffe's LeNet-5: two 5x5 convolutions without padding and two linear layers.

    A ReLU follows conv1, conv2 and fc1, as in Network Trimming (Hu et al. 2016, arXiv 1607.03250); Caffe's
    own has only the last of the three. With the default widths and 1x28x28 images: 431,080 parameters.

    Args:
        classes: Number of outputs, 1 or more.
        in_channels: Channels of an image.
        image_size: Height and width of an image in pixels, 16 or more.
        widths: Outputs of conv1, conv2 and fc1.

    Raises:
        UserError: `widths` is not three positive numbers, or the image is too small.
    """

    def __init__(
        self,
        classes: int = 10,
        in_channels: int = 1,
        image_size: int = 28,
        widths: Sequence[int] = (20, 50, 500),
    ) -> None:
        """Lay out the layers."""
        super().__init__()
        if len(widths) != 3 or min(widths) < 1:
            raise UserError(f"widths must be three positive numbers (conv1, conv2, fc1), but got {widths}")
        if image_size < 16:
            raise UserError(f"LeNet needs images of 16x16 or more, but got {image_size=}; enlarge the images")
        first, second, hidden = widths
        side = ((image_size - 4) // 2 - 4) // 2  # each 5x5 convolution takes 4 pixels, each pool halves
        self.conv1 = nn.Conv2d(in_channels, first, 5)
        self.relu1 = nn.ReLU()
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(first, second, 5)
        self.relu2 = nn.ReLU()
        self.pool2 = nn.MaxPool2d(2)
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(second * side * side, hidden)
        self.relu3 = nn.ReLU()
        self.fc2 = nn.Linear(hidden, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (N, classes) of images (N, C, H, W)."""
        maps = self.pool1(self.relu1(self.conv1(images)))
        maps = self.pool2(self.relu2(self.conv2(maps)))
        return self.fc2(self.relu3(self.fc1(self.flatten(maps))))  # (N, C, H, W) -> (N, C*H*W) -> logits


class LeNet300(nn.Module):
    """LeNet-300-100: three linear layers on the flattened image (266,610 parameters on 1x28x28).

    Args:
        classes: Number of outputs.
        in_channels: Channels of an image.
        image_size: Height and width of an image in pixels.
        widths: Outputs of fc1 and fc2.

    Raises:
        UserError: `widths` is not two positive numbers.
    """

    def __init__(
        self,
        classes: int = 10,
        in_channels: int = 1,
        image_size: int = 28,
        widths: Sequence[int] = (300, 100),
    ) -> None:
        """Lay out the layers."""
        super().__init__()
        if len(widths) != 2 or min(widths) < 1:
            raise UserError(f"widths must be two positive numbers (fc1, fc2), but got {widths}")
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(in_channels * image_size * image_size, widths[0])
        self.relu1 = nn.ReLU()
        self.fc2 = nn.Linear(widths[0], widths[1])
        self.relu2 = nn.ReLU()
        self.fc3 = nn.Linear(widths[1], classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (N, classes) of images (N, C, H, W)."""
        hidden = self.relu1(self.fc1(self.flatten(images)))  # (N, C, H, W) -> (N, C*H*W) -> (N, 300)
        return self.fc3(self.relu2(self.fc2(hidden)))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        """Lay out the layers."""
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU()
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(outputs))

    def forward(self, maps: Tensor) -> Tensor:
        """Map (N, inputs, H, W) to (N, outputs, H / stride, W / stride)."""
        inner = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(maps)))))
        return self.relu2(inner + self.downsample(maps))


class CifarResNet(nn.Module):
    """The CIFAR ResNet of He et al. (2016, arXiv 1512.03385, section 4.2), with 1x1 shortcuts.

    Args:
        blocks: Basic blocks in each of the three stages; the depth is 6 * blocks + 2.
        classes: Number of outputs.
        in_channels: Channels of an image, which may have any size from 4x4 on.
        widths: Channels of the three stages; the stem has those of the first.

    Raises:
        UserError: `widths` is not three positive numbers.
    """

    def __init__(
        self, blocks: int, classes: int = 10, in_channels: int = 3, widths: Sequence[int] = (16, 32, 64)
    ) -> None:
        """Lay out the layers."""
        super().__init__()
        if len(widths) != 3 or min(widths) < 1:
            raise UserError(f"widths must be three positive numbers, one for each stage, but got {widths}")
        first, second, third = widths
        self.conv1 = nn.Conv2d(in_channels, first, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.relu = nn.ReLU()
        self.layer1 = _stage(first, first, blocks, stride=1)
        self.layer2 = _stage(first, second, blocks, stride=2)
        self.layer3 = _stage(second, third, blocks, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(third, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (N, classes) of images (N, C, H, W)."""
        maps = self.relu(self.bn1(self.conv1(images)))
        maps = self.layer3(self.layer2(self.layer1(maps)))
        return self.fc(self.flatten(self.avgpool(maps)))  # (N, C, H, W) -> (N, C) -> logits


def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
    """Chain `blocks` basic blocks, the first of which changes width and resolution."""
    rest = [BasicBlock(outputs, outputs, 1) for _ in range(blocks - 1)]
    return nn.Sequential(BasicBlock(inputs, outputs, stride), *rest)


class CifarVgg16(nn.Module):
    """VGG-16 for small images: 13 convolutions with batch norm and one linear layer.

    The convolutions have no bias, as the batch norm behind each would absorb it. They are called
    `features.conv1_1` to `features.conv5_3`, the last layer `classifier`.

    Args:
        classes: Number of outputs.
        in_channels: Channels of an image, which may have any size from 32x32 on.
        widths: Outputs of the 13 convolutions.

    Raises:
        UserError: `widths` is not 13 positive numbers.
    """

    def __init__(
        self,
        classes: int = 10,
        in_channels: int = 3,
        widths: Sequence[int] = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512),
    ) -> None:
        """Lay out the layers."""
        super().__init__()
        if len(widths) != 13 or min(widths) < 1:
            raise UserError(f"widths must be 13 positive numbers, one for each convolution, but got {widths}")
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        outputs = iter(widths)
        inputs = in_channels
        for stage, depth in enumerate((2, 2, 3, 3, 3), start=1):
            for place in range(1, depth + 1):
                width = next(outputs)
                layers[f"conv{stage}_{place}"] = nn.Conv2d(inputs, width, 3, 1, 1, bias=False)
                layers[f"bn{stage}_{place}"] = nn.BatchNorm2d(width)
                layers[f"relu{stage}_{place}"] = nn.ReLU()
                inputs = width
            layers[f"pool{stage}"] = nn.MaxPool2d(2)
        self.features = nn.Sequential(layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(inputs, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (N, classes) of images (N, C, H, W)."""
        return self.classifier(self.flatten(self.avgpool(self.features(images))))


@dataclass(frozen=True)
class NetworkRecord:
    """What is known of a network by its name.

    Args:
        name: The name users type.
        build: Makes the network; takes `classes` and what `shape_arguments` names as keywords.
        description: One sentence for the list shown to users.
        image_shape: Channels, height and width of the images it is meant for.
        classes: Number of outputs where none is asked for.
        shape_arguments: Which of `in_channels` and `image_size` `build` takes.
    """

    name: str
    build: Callable[..., nn.Module]
    description: str
    image_shape: tuple[int, int, int]
    classes: int
    shape_arguments: tuple[str, ...] = ()


def _build_torchvision(name: str, classes: int, image_size: int | None = None, **arguments: Any) -> nn.Module:
    """Make one of torchvision's classifiers without weights; `arguments` go to its own class."""
    if "weights" in arguments:
        raise UserError(f"{name!r} is built without weights, but got the argument 'weights'; load them from a file")
    if "num_classes" in arguments:
        raise UserError(f"{name!r} takes its number of outputs as 'classes', but got 'num_classes'")
    if name in ("googlenet", "inception_v3"):
        # Their auxiliary heads make training mode return a tuple, which no criterion or loss here expects.
        arguments = {"aux_logits": False, "init_weights": True} | arguments
    if image_size is not None and name.startswith("vit_"):
        arguments = {"image_size": image_size} | arguments
    if image_size is not None and name == "maxvit_t":
        arguments = {"input_size": (image_size, image_size)} | arguments
    try:
        return torchvision.models.get_model(name, weights=None, num_classes=classes, **arguments)
    except TypeError as problem:
        # The builders pass unknown keywords on, so that only the class behind them says which it takes.
        taken = str(problem).partition(".__init__() got an unexpected keyword argument")
        module = sys.modules[torchvision.models.get_model_builder(name).__module__]
        if not taken[1] or not hasattr(module, taken[0]):
            raise
        accepted = ", ".join(inspect.signature(getattr(module, taken[0])).parameters)
        raise UserError(
            f"{name!r} cannot be built: {problem}; its arguments are: classes, image_size, {accepted}"
        ) from problem


def _records() -> dict[str, NetworkRecord]:
    """List the networks built here, then torchvision's."""
    grey, small = (1, 28, 28), (3, 32, 32)
    both, channels = ("in_channels", "image_size"), ("in_channels",)
    own = [
        NetworkRecord("lenet5_caffe", LeNet, "Caffe's LeNet-5 (20-50-500), a ReLU after each layer but the "
                      "last; 431,080 parameters.", grey, 10, both),
        NetworkRecord("lenet_small", partial(LeNet, widths=(8, 16, 64)), "A small LeNet (8-16-64) for quick "
                      "trials.", grey, 10, both),
        NetworkRecord("lenet300_100", LeNet300, "LeNet-300-100: three linear layers; 266,610 parameters.",
                      grey, 10, both),
        NetworkRecord("cifar_resnet20", partial(CifarResNet, blocks=3), "ResNet-20 for 32x32 images; "
                      "40.8 M MACs.", small, 10, channels),
        NetworkRecord("cifar_resnet56", partial(CifarResNet, blocks=9), "ResNet-56 for 32x32 images.", small,
                      10, channels),
        NetworkRecord("cifar_vgg16_bn", CifarVgg16, "VGG-16 with batch norm and one linear layer for 32x32 "
                      "images.", small, 10, channels),
    ]  # fmt: skip
    for name in torchvision.models.list_models(module=torchvision.models):
        side = 299 if name == "inception_v3" else 224
        build = partial(_build_torchvision, name)
        text = f"torchvision's {name}, with random weights."
        own.append(NetworkRecord(name, build, text, (3, side, side), 1000, ("image_size",)))
    return {record.name: record for record in own}


NETWORKS: dict[str, NetworkRecord] = _records()


def network_names() -> list[str]:
    """Return every name `build_network` knows, the ones built here first."""
    return list(NETWORKS)


def build_network(
    name: str,
    *,
    classes: int | None = None,
    in_channels: int | None = None,
    image_size: int | None = None,
    arguments: Mapping[str, Any] | None = None,
    seed: int | None = None,
) -> nn.Module:
    """Make a network with random weights, on the CPU and in training mode.

    A name of the registry gets `classes`, and of `in_channels` and `image_size` what matters to it: LeNets
    take both, the CIFAR networks only `in_channels` (they pool whatever size comes), of torchvision's
    networks ViT and MaxViT take `image_size`. `module:function` and `path/to/file.py:function` call the
    user's own function with `arguments` only; its folder (for a module: the working directory) is put on
    the import path and stays there, so that worker processes can import it too.

    Args:
        name: One of `network_names()`, `module:function` or `path/to/file.py:function`.
        classes: Number of outputs; the record's own number where None.
        in_channels: Channels of an image; torchvision's networks accept only 3.
        image_size: Height and width of an image in pixels.
        arguments: Further keyword arguments, such as `{"widths": (8, 16, 64)}` for a LeNet.
        seed: Seed of the weights, drawn without touching torch's global random state. None draws them from
            that state, as building any module does.

    Returns:
        The network.

    Raises:
        UserError: The name is unknown, an argument is not accepted, or the user's function is not there or
            returns something else than a module.
    """
    given = dict(arguments or {})
    if ":" in name:
        build = _user_function(name)
    elif name in NETWORKS:
        record = NETWORKS[name]
        build = record.build
        given = _shape_arguments(record, classes, in_channels, image_size) | given
    else:
        hint = "; add ':function' to name the function in it" if name.endswith(".py") else closest(name, NETWORKS)
        raise UserError(f"network must be a known name or module:function, but got {name!r}{hint}")
    _check_arguments(name, build, given)
    with nullcontext() if seed is None else torch.random.fork_rng(devices=[]):
        if seed is not None:
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the GPUs as well
        network = build(**given)
    if not isinstance(network, nn.Module):
        kind = type(network).__name__
        raise UserError(f"{name!r} must return a torch.nn.Module, but returned {kind}; return the network")
    return network


def _shape_arguments(
    record: NetworkRecord, classes: int | None, in_channels: int | None, image_size: int | None
) -> dict[str, Any]:
    """Choose what a registered network is told of its images and classes."""
    if classes is not None and classes < 1:
        raise UserError(f"classes must be 1 or more, but got {classes=}")
    expected = record.image_shape[0]
    if in_channels not in (None, expected) and "in_channels" not in record.shape_arguments:
        raise UserError(
            f"{record.name!r} takes images of {expected} channels, but got {in_channels=}; choose another network"
        )
    offered = {"in_channels": in_channels, "image_size": image_size}
    chosen = {key: offered[key] for key in record.shape_arguments if offered[key] is not None}
    return {"classes": record.classes if classes is None else classes, **chosen}


def _check_arguments(name: str, build: Callable[..., Any], given: Mapping[str, Any]) -> None:
    """Refuse keyword arguments that `build` does not take or lacks, before any of its code runs."""
    signature = inspect.signature(build)
    try:
        signature.bind(**given)
    except TypeError as problem:
        accepted = ", ".join(signature.parameters) or "none"
        raise UserError(f"{name!r} cannot be built: {problem}; its arguments are: {accepted}") from problem


def _user_function(name: str) -> Callable[..., Any]:
    """Import the function that `module:function` or `path/to/file.py:function` names."""
    place, function = name.rsplit(":", 1)
    if not place.endswith(".py") and not all(part.isidentifier() for part in place.split(".")):
        raise UserError(f"a network of your own must be module:function or path/to/file.py:function, but got {name!r}")
    module = _import_file(Path(place)) if place.endswith(".py") else _import_module(place)
    found = getattr(module, function, None)
    if not callable(found):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        hint = closest(function, known) if known else "; define it there"
        raise UserError(f"{place!r} must have the function named after the colon, but got {function!r}{hint}")
    return found


def _import_module(name: str) -> ModuleType:
    """Import a module as `python -m` would, from the working directory first."""
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as problem:
        if problem.name is None or not f"{name}.".startswith(f"{problem.name}."):
            raise  # something that the user's module imports is missing, which its own traceback says best
        raise UserError(
            f"a network of your own is module:function, but there is no module {name!r} in {folder} or "
            "among the installed packages; check the name or give path/to/file.py:function"
        ) from problem


def _import_file(path: Path) -> ModuleType:
    """Import a Python file by its path, under its own name unless another module has that already."""
    if not path.is_file():
        raise UserError(f"a network of your own is path/to/file.py:function, but there is no file {str(path)!r}")
    path = path.resolve()
    name = path.stem
    loaded = sys.modules.get(name)
    if loaded is not None:
        if getattr(loaded, "__file__", None) == str(path):
            return loaded
        name = f"{name}_{zlib.crc32(str(path).encode()):08x}"
        if name in sys.modules:
            return sys.modules[name]
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"a network of your own must be Python source, but got {str(path)!r}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before running it, as classes look up their module while they are made
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def load_weights(network: nn.Module, path: str | Path) -> None:
    """Fill a network with the weights in a file; on an error the network is left as it was.

    Args:
        network: The network, on any device.
        path: A state dict, or a dict with one under `state_dict`, saved by `torch.save` (.pt, .pth), or a
            .safetensors file. The prefix `module.` of data-parallel training is dropped.

    Raises:
        UserError: The file is missing or not of these kinds, its names or shapes do not match the network's,
            or it holds a value that is not finite.
    """
    weights = _read_weights(Path(path))
    if weights and all(key.startswith("module.") for key in weights):
        weights = {key.removeprefix("module."): value for key, value in weights.items()}
    own = network.state_dict()
    start = f"the weights in {str(path)!r} must match the network, but"
    # Files older than torch 0.4.1 lack the batch norm's counter, which nothing here reads.
    missing = [key for key in own if key not in weights and not key.endswith("num_batches_tracked")]
    if missing:
        raise UserError(f"{start} they lack {_some(missing)}; check the network's name and arguments")
    unknown = [key for key in weights if key not in own]
    if unknown:
        raise UserError(f"{start} it has no {_some(unknown)}; check the network's name and arguments")
    other = [
        f"{key} (file {tuple(value.shape)}, network {tuple(own[key].shape)})"
        for key, value in weights.items()
        if value.shape != own[key].shape
    ]
    if other:
        raise UserError(f"{start} shapes differ at {_some(other)}; check classes, in_channels and image_size")
    broken = [key for key, value in weights.items() if not torch.isfinite(value).all()]
    if broken:
        raise UserError(f"weights must be finite, but {str(path)!r} has NaN or infinity in {_some(broken)}")
    network.load_state_dict(weights, strict=False)


def _read_weights(path: Path) -> dict[str, Tensor]:
    """Read the state dict in a file without running any code it may hold."""
    if not path.is_file():
        raise UserError(f"weights must be a file, but there is none at {str(path)!r}; check the path")
    if path.suffix not in (".pt", ".pth", ".safetensors"):
        raise UserError(f"weights must be a .pt, .pth or .safetensors file, but got {str(path)!r}")
    content: Any
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as problem:
        raise UserError(
            f"weights must be tensors by name, but {str(path)!r} is damaged or holds other objects; "
            "save network.state_dict()"
        ) from problem
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(
            f"weights must be tensors by name, but {str(path)!r} holds something else; save network.state_dict()"
        )
    return dict(content)


def _some(names: Sequence[str], shown: int = 3) -> str:
    """Join the first few names and count the rest."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
