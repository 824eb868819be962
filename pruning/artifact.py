"""A pruned network on disk, without pickle: its tensors, the plan that cut it, and a manifest that protects both.

Nothing is traced to read it back: the original network is built by its name (or passed in), its tensors are exchanged
for the smaller ones of the file, and the layers are told their new sizes.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from .channel_counts import channel_counts, counts_fit_tensors, set_channel_count
from .copying import copy_network
from .errors import UserError
from .manifest import (
    COPY_AGAIN,
    DTYPES,
    MANIFEST,
    OTHER_FORMAT,
    PLAN,
    WEIGHTS,
    Manifest,
    NetworkSource,
    current_versions,
    parse_json,
    source_of,
)
from .networks import build_network
from .plan import PruningPlan
from .surgery import named_tensors
from .user_code import locate_function


def save_pruned(
    folder: str | Path,
    network: nn.Module,
    plan: PruningPlan,
    *,
    example_shape: tuple[int, ...],
    source: Mapping[str, Any],
) -> None:
    """Write a pruned network as `pruned.safetensors`, `plan.json` and `manifest.json`.

    Each file is complete or absent, and the manifest, which holds the digests of the others, is written last.

    Args:
        folder: Created where missing.
        network: The pruned network, of any floating-point type.
        plan: What stays of the original network.
        example_shape: (1, C, H, W) shape of one input.
        source: `network`, `network_arguments`, `classes`, `image_shape`, `data`, `mean` and `std`, as `prepare_task`
            records them, and `started_in`, the folder in which `network` was typed (by default the working directory);
            empty for a network that was passed in as an object, which must be passed to `load_pruned`
            too.

    Raises:
        UserError: The folder cannot be written, or the network or its arguments cannot be saved without pickle.
    """
    tensors = named_tensors(network)
    dtype = _dtype(tensors)
    foreign = [name for name in network.state_dict() if name not in tensors]
    if foreign:
        raise UserError(f"a saved network holds tensors only, but {foreign[0]!r} keeps other state; it cannot be saved")
    files = {
        WEIGHTS: _to_bytes(tensors),
        PLAN: (json.dumps({"keep": plan.to_dict()}) + "\n").encode(),
    }
    folder = Path(folder)
    built_by, data = source_of(source, folder)
    manifest = Manifest(
        network=built_by,
        data=data,
        example_shape=tuple(int(size) for size in example_shape),
        dtype=dtype,
        widths=plan.counts,
        counts={name: counts for name, module in network.named_modules() if (counts := channel_counts(module))},
        versions=current_versions(),
        sha256={name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
    )
    files[MANIFEST] = manifest.to_bytes()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_together({folder / name: content for name, content in files.items()})
    except OSError as error:
        raise UserError(f"a network needs a folder to be saved in, but {folder}: {error.strerror or error}") from error


def load_pruned(folder: str | Path, network: nn.Module | None = None) -> nn.Module:
    """Read what `save_pruned` wrote.

    A network of the user's own that was given by name (`module:function`) is imported by that name, which runs the
    user's module: the one in the working directory, else the one in the folder where the name was typed. Pass the
    network, and nothing is imported.

    Args:
        folder: The folder.
        network: The original architecture (any weights, any floating-point type), needed only for networks that
            have no name. It is left untouched.

    Returns:
        The pruned network in evaluation mode, with the types of the saved one, on the CPU or the device of `network`.

    Raises:
        UserError: A file is missing, cut off, altered, or does not fit the network; the file is named.
    """
    return load_for(folder, network, "load_pruned(folder, network)")


def load_for(folder: str | Path, network: nn.Module | None, call: str) -> nn.Module:
    """Do the work of `load_pruned`; `call` is what an error advises where the network has to be passed in."""
    folder = Path(folder)
    manifest = read_manifest(folder)
    contents = {name: _read(folder / name) for name in (WEIGHTS, PLAN)}
    for name, content in contents.items():
        if hashlib.sha256(content).hexdigest() != manifest.sha256[name]:
            raise UserError(f"{folder / name} must be the file that was saved, but its SHA-256 differs; {COPY_AGAIN}")
    plan = _parse_plan(contents[PLAN], folder / PLAN, manifest)
    path = folder / WEIGHTS
    try:
        tensors = load(contents[WEIGHTS])
    except SafetensorError as error:
        raise UserError(f"{path} must be a safetensors file, but is not ({error}); {COPY_AGAIN}") from error
    if network is not None:
        todo = "pass the architecture that it was cut from"
    elif manifest.network is None:
        raise UserError(f"the network in {folder} has no name to build it by; pass the original: {call}")
    else:
        network = _build(manifest.network, folder / MANIFEST, call)
        made = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
        todo = f"{manifest.network.name!r} or the folder has changed since it was saved (by {made})"
    _check_indices(network, plan, folder / PLAN, todo)
    smaller = _exchanged(network, tensors, path, todo)
    _set_counts(network, smaller, manifest, folder / MANIFEST, todo)
    if _dtype(named_tensors(smaller)) != manifest.dtype:
        raise UserError(f"{path} must hold {manifest.dtype} as its manifest says, but does not; {COPY_AGAIN}")
    return smaller.eval()


def read_manifest(folder: str | Path) -> Manifest:
    """Read and check the manifest of a saved network, without reading its tensors.

    Raises:
        UserError: There is no such folder or file, or it is damaged, altered or of another format.
    """
    path = Path(folder) / MANIFEST
    if not path.parent.is_dir():
        raise UserError(f"a pruned network is a folder, but there is none at {path.parent}; check the path")
    old = path.with_name("pruned.json")
    if not path.exists() and old.exists():
        raise UserError(f"a pruned network needs {MANIFEST}, but {path.parent} holds {old.name}; {OTHER_FORMAT}")
    return Manifest.from_bytes(_read(path), path)


def weight_bytes(network: nn.Module) -> bytes:
    """Return the network's parameters and buffers in the safetensors format."""
    return _to_bytes(network.state_dict())


def weights_digest(network: nn.Module) -> str:
    """Return what tells two networks with other weights apart, in hexadecimal."""
    return hashlib.sha256(weight_bytes(network)).hexdigest()


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that it is either complete or absent."""
    _write_together({path: data})


def _write_together(files: Mapping[Path, bytes]) -> None:
    """Write several files completely before any of them takes the place of an older one."""
    drafts = {path: path.with_name(f".{path.name}.{os.getpid()}.part") for path in files}
    try:
        for path, data in files.items():
            drafts[path].write_bytes(data)
        for path, draft in drafts.items():
            draft.replace(path)
    finally:
        for draft in drafts.values():
            draft.unlink(missing_ok=True)


def _to_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """Copy, since the format refuses tensors that share memory."""
    return save({name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()})


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(
            f"a pruned network needs {WEIGHTS}, {PLAN} and {MANIFEST}, but {path} is not there; copy the whole folder"
        ) from error
    except OSError as error:
        raise UserError(f"{path} must be readable, but is not: {error.strerror}; check its permissions") from error


def _parse_plan(data: bytes, path: Path, manifest: Manifest) -> PruningPlan:
    content = parse_json(data, path)
    try:
        plan = PruningPlan.from_dict(content.get("keep") if isinstance(content, dict) else None)
    except UserError as error:
        raise UserError(f"{path} must hold a plan, but: {error}; {COPY_AGAIN}") from error
    if plan.counts != manifest.widths:
        raise UserError(f"{path} must leave the widths that {MANIFEST} names, but does not; {COPY_AGAIN}")
    return plan


def _check_indices(network: nn.Module, plan: PruningPlan, path: Path, todo: str) -> None:
    """Refuse a network whose layers do not have the channels that the plan keeps: it is not the original."""
    modules = dict(network.named_modules(remove_duplicate=False))
    for name, keep in plan.items():
        counts = channel_counts(modules[name]) if name in modules else {}
        width = counts.get("out_channels", counts.get("out_features"))
        if width is not None and keep[-1] >= width:
            raise UserError(
                f"{path} must fit the network, but keeps channel {keep[-1]} of {name!r}, which has {width} channels; "
                f"{todo}"
            )


def _build(source: NetworkSource, path: Path, call: str) -> nn.Module:
    """Build the original network by its name."""
    shape = source.image_shape
    try:
        return build_network(
            locate_function(source.name, None if source.started_in is None else path.parent / source.started_in),
            classes=source.classes,
            in_channels=None if shape is None else shape[0],
            image_size=None if shape is None else shape[-1],
            arguments=source.arguments,
            seed=0,
        )
    except Exception as error:
        text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        raise UserError(f"the network named in {path} cannot be built: {text}; pass the original: {call}") from error


def _exchanged(network: nn.Module, tensors: Mapping[str, Tensor], path: Path, todo: str) -> nn.Module:
    """Return a copy of `network` with the tensors of the file; what was shared stays shared, nothing else is copied."""
    own = named_tensors(network)
    for names, others, problem in ((own, tensors, "lacks"), (tensors, own, "has a tensor too many,")):
        strange = [name for name in names if name not in others]
        if strange:
            raise UserError(f"{path} must fit the network, but it {problem} {strange[0]!r}; {todo}")
    memo: dict[int, Any] = {}
    for name, old in own.items():
        value = tensors[name]
        if value.dim() != old.dim() or any(size > whole for size, whole in zip(value.shape, old.shape, strict=True)):
            raise UserError(
                f"{path} must fit the network, but {name!r} has shape {tuple(value.shape)} there and "
                f"{tuple(old.shape)} in the uncut network; {todo}"
            )
        if value.dtype != old.dtype and not (value.is_floating_point() and old.is_floating_point()):
            raise UserError(
                f"{path} must fit the network, but {name!r} is {value.dtype} there and {old.dtype} in the network; "
                f"{todo}"
            )
        value = value.to(old.device)
        if id(old) not in memo:
            is_parameter = isinstance(old, nn.Parameter)
            memo[id(old)] = nn.Parameter(value, requires_grad=old.requires_grad) if is_parameter else value
        elif not torch.equal(memo[id(old)], value):
            raise UserError(f"{path} must fit the network, but {name!r}, which is shared, differs there; {todo}")
    return copy_network(network, memo)


def _set_counts(network: nn.Module, smaller: nn.Module, manifest: Manifest, path: Path, todo: str) -> None:
    """Tell the layers of `smaller` their sizes, and check that their tensors have them."""
    modules = dict(smaller.named_modules(remove_duplicate=False))
    for name, counts in manifest.counts.items():
        known = channel_counts(modules[name]) if name in modules else {}
        for attribute, value in counts.items():
            if value > known.get(attribute, 0):
                raise UserError(
                    f"{path} must fit the network, but {name}.{attribute} is {value} there and "
                    f"{known.get(attribute, 'absent')} in the uncut network; {todo}"
                )
            set_channel_count(modules[name], attribute, value)
    originals = dict(network.named_modules(remove_duplicate=False))
    for name, module in modules.items():
        # A layer of the user's own may keep its weights in another layout, before and after the cut.
        if counts_fit_tensors(originals[name]) and not counts_fit_tensors(module):
            raise UserError(f"{path} must give {name!r} the sizes of its tensors, but does not; {todo}")


def _dtype(tensors: Mapping[str, Tensor]) -> str:
    """Name the type of the first floating-point tensor."""
    found = next(
        (str(value.dtype).removeprefix("torch.") for value in tensors.values() if value.is_floating_point()), "none"
    )
    if found not in DTYPES:
        raise UserError(f"a network to save must be of {', '.join(DTYPES)}, but is of {found}; convert it first")
    return found
