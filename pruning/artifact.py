"""A pruned network on disk, without pickle: weights as safetensors, and a manifest that says how to rebuild it."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn

from .errors import UserError
from .grouping import find_groups
from .networks import build_network
from .plan import PruningPlan
from .surgery import apply_plan

WEIGHTS = "pruned.safetensors"
MANIFEST = "pruned.json"


def save_pruned(
    folder: str | Path,
    network: nn.Module,
    plan: PruningPlan,
    *,
    example_shape: tuple[int, ...],
    source: Mapping[str, Any],
) -> None:
    """Write a pruned network; each file is complete or absent.

    Args:
        folder: Created where missing.
        network: The pruned network.
        plan: What stays of the original network.
        example_shape: (1, C, H, W) shape of one input.
        source: `network`, `network_arguments`, `classes` and `image_shape`, as `prepare_task` records them; empty
            for a network that was passed in as an object, which must be passed to `load_pruned` too.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    data = weight_bytes(network)
    manifest = {
        "format": 1,
        "weights": WEIGHTS,
        "sha256": hashlib.sha256(data).hexdigest(),
        "example_shape": list(example_shape),
        "source": {
            key: source[key] for key in ("network", "network_arguments", "classes", "image_shape") if key in source
        },
        "torch": torch.__version__,
        "keep": plan.to_dict(),
    }
    write_atomically(folder / WEIGHTS, data)
    write_atomically(folder / MANIFEST, (json.dumps(manifest) + "\n").encode())


def load_pruned(folder: str | Path, network: nn.Module | None = None) -> nn.Module:
    """Read what `save_pruned` wrote.

    Args:
        folder: The folder.
        network: The original architecture (any weights), needed only for networks that have no name here.

    Returns:
        The pruned network in evaluation mode.

    Raises:
        UserError: A file is missing, cut off, altered, or does not fit the network; the file is named.
    """
    folder = Path(folder)
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        data = (folder / WEIGHTS).read_bytes()
    except OSError as error:
        raise UserError(
            f"a pruned network needs {MANIFEST} and {WEIGHTS}, but {error.filename} is not there"
        ) from error
    except ValueError as error:
        raise UserError(f"{folder / MANIFEST} must be JSON, but is not: {error}") from error
    for key in ("sha256", "example_shape", "keep"):
        if not isinstance(manifest, dict) or key not in manifest:
            raise UserError(f"{folder / MANIFEST} must hold {key!r}, but does not; it was altered or is another file")
    if hashlib.sha256(data).hexdigest() != manifest.get("sha256"):
        raise UserError(
            f"{folder / WEIGHTS} must be the file that was saved, but its SHA-256 differs; it was altered or cut off"
        )
    source = manifest.get("source", {})
    if network is None:
        if "network" not in source:
            raise UserError(
                f"the network in {folder} has no name to build it by; pass the original: load_pruned(folder, network)"
            )
        network = build_network(
            source["network"],
            classes=source["classes"],
            in_channels=source["image_shape"][0],
            image_size=source["image_shape"][-1],
            arguments=source.get("network_arguments") or {},
            seed=0,
        )
    example = torch.zeros(manifest["example_shape"], dtype=next(network.parameters()).dtype)
    smaller = apply_plan(network, find_groups(network, example), PruningPlan.from_dict(manifest["keep"]))
    try:
        smaller.load_state_dict(load(data))
    except (RuntimeError, SafetensorError) as error:
        raise UserError(
            f"{folder / WEIGHTS} must fit the network cut to the plan, but: {str(error).splitlines()[0]}"
        ) from error
    return smaller.eval()


def weight_bytes(network: nn.Module) -> bytes:
    """Return the network's parameters and buffers in the safetensors format."""
    state = network.state_dict().items()
    return save({name: value.detach().cpu().contiguous().clone() for name, value in state})


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that it is either complete or absent."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        draft.write_bytes(data)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
