"""Weights from a file into a network, without running any code the file may hold."""

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from .errors import UserError


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
