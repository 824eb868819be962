"""Networks by name: this package's own, torchvision's classifiers, and the user's; all with random weights."""

import inspect
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .architecture import Architecture, is_architecture
from .architectures import CifarResNet, CifarVgg16, LeNet, LeNet300
from .errors import UserError, closest
from .narrowing import GROUP_WIDTHS, narrow
from .torchvision_compat import torchvision
from .user_code import user_function


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
    the import path and stays there, so that worker processes can import it too. `path/to/architecture.yaml`
    builds what `build_architecture` does.

    Args:
        name: One of `network_names()`, `module:function`, `path/to/file.py:function` or an architecture file.
        classes: Number of outputs; the record's own number where None.
        in_channels: Channels of an image; torchvision's networks accept only 3.
        image_size: Height and width of an image in pixels.
        arguments: Further keyword arguments, such as `{"widths": (8, 16, 64)}` for a LeNet. Any network takes
            `group_widths`, channels by channel group, and is made narrower, see `narrowing.narrow`.
        seed: Seed of the weights, drawn without touching torch's global random state. None draws them from
            that state, as building any module does.

    Returns:
        The network.

    Raises:
        UserError: The name is unknown, an argument is not accepted, or the user's function is not there or
            returns something else than a module.
    """
    if is_architecture(name):
        named = Architecture.load(name)
        return _from_architecture(named, classes, in_channels, image_size, arguments or {}, seed, name)
    given = dict(arguments or {})
    widths = given.pop(GROUP_WIDTHS, None)
    whole: tuple[int | None, ...] = (None, None, None)
    if ":" in name:
        build = user_function(name)
    elif name in NETWORKS:
        record = NETWORKS[name]
        build = record.build
        whole = record.image_shape
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
        if widths is None:
            return network
        channels, side = in_channels or whole[0], image_size or whole[1]
        if channels is None or side is None:
            raise UserError(
                f"{GROUP_WIDTHS} of {name!r} need the shape of an image, but got {in_channels=} and {image_size=}; "
                "give both"
            )
        # only a network that is made here is known to bring no trained weights
        return narrow(network, widths, (channels, side, side), drawn=":" not in name)


def build_architecture(
    source: Architecture | Mapping[str, Any] | str | Path,
    *,
    network: nn.Module | None = None,
    classes: int | None = None,
    in_channels: int | None = None,
    image_size: int | None = None,
    seed: int | None = None,
) -> nn.Module:
    """Build a pruned architecture with random weights, on the CPU and in training mode.

    The named network is built and narrowed to the widths of its channel groups, which are found anew on a copy. Its
    weights have the scale that its own constructor gives layers of that width; see `narrowing.narrow`.

    Args:
        source: What `Architecture.load` read, the content of such a file, or its path.
        network: The network of full width, for an architecture without a name; left untouched, its weights not used.
        classes: Number of outputs; the architecture's where None.
        in_channels: Channels of an image; the architecture's where None.
        image_size: Height and width of an image in pixels; the architecture's where None.
        seed: As for `build_network`.

    Raises:
        UserError: The file is missing or no architecture, a group is unknown or cannot be cut, a width is beyond the
            group's, or as `build_network`.
    """
    where = str(source) if isinstance(source, (str, Path)) else "the architecture"
    if isinstance(source, (str, Path)):
        source = Architecture.load(source)
    elif not isinstance(source, Architecture):
        source = Architecture.from_dict(source)
    if network is None:
        return _from_architecture(source, classes, in_channels, image_size, {}, seed, where)
    with nullcontext() if seed is None else torch.random.fork_rng(devices=[]):
        if seed is not None:
            torch.default_generator.manual_seed(seed)
        return narrow(network, source.widths, source.input_shape, drawn=False).cpu().train()


def _from_architecture(
    found: Architecture,
    classes: int | None,
    in_channels: int | None,
    image_size: int | None,
    arguments: Mapping[str, Any],
    seed: int | None,
    where: str,
) -> nn.Module:
    """Build the network that an architecture names; what is given comes before what it says."""
    name, known = found.build_arguments(where)
    shape = found.input_shape
    try:
        return build_network(
            name,
            classes=found.classes if classes is None else classes,
            in_channels=shape[0] if in_channels is None else in_channels,
            image_size=shape[-1] if image_size is None else image_size,
            arguments={**known, **arguments},
            seed=seed,
        )
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


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
