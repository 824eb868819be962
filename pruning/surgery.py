"""Cut a network to a plan: a copy whose tensors are `index_select`ed by the groups' index maps.

The copy is made by `copy.deepcopy` with a memo that already holds the smaller tensors, so that the large ones
are never copied, and a tensor that two modules share is cut once and stays shared.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .channel_counts import channel_counts, counts_fit_tensors, set_channel_count
from .comparing import ConsumerWatch, check_repeatable, largest_difference
from .copying import copy_network
from .errors import UserError
from .groups import ChannelGroup, IndexArray
from .indexing import select
from .layers import output_dim
from .plan import PruningPlan
from .tracing import evaluation_mode, tensors_in

CONSUMER_FACTOR = 10.0
"""How much more a layer inside may differ than the output: it is not evened out by the layers behind."""


class SurgeryError(RuntimeError):
    """The cut network does not compute what the masked original computes; the text names the layer."""


def apply_plan(
    network: nn.Module, groups: Sequence[ChannelGroup], plan: PruningPlan, *, verify: Tensor | None = None
) -> nn.Module:
    """Return a new, smaller, dense network; `network` is left untouched.

    Args:
        network: The network that `groups` were found in.
        groups: From `find_groups` (or `shrink_groups` for a second round).
        plan: Channels that stay.
        verify: An input batch. When given, the cut network's output is compared with the masked original's.

    Returns:
        A copy of `network` with the channels removed and every count attribute updated, in the memory format of
        the original. Nothing is repaired.

    Raises:
        UserError: The plan does not fit the groups, the groups do not fit the network, or it cannot be copied.
        SurgeryError: Verification failed.
    """
    plan = plan.completed(groups)
    tensors = named_tensors(network)
    entries = kept_entries(groups, plan, tensors)
    _check_shared(network, entries)
    memo: dict[int, Any] = {}
    for name, kept in entries.items():
        old = tensors[name]
        if id(old) in memo:
            continue
        value = select(old.detach(), kept)
        if isinstance(old, nn.Parameter):
            value = nn.Parameter(value, requires_grad=old.requires_grad)
        memo[id(old)] = value
    smaller = copy_network(network, memo)
    modules = dict(smaller.named_modules(remove_duplicate=False))
    for group in groups:
        gone = group.width - len(plan[group.name])
        for cut in group.attributes:
            left = channel_counts(modules[cut.module])[cut.attribute] - cut.per_channel * gone
            set_channel_count(modules[cut.module], cut.attribute, left)
    if verify is not None:
        verify_cut(network, smaller, groups, plan, verify)
    return smaller


def named_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and buffer by each of its names."""
    tensors = dict(network.named_parameters(remove_duplicate=False))
    return {**tensors, **dict(network.named_buffers(remove_duplicate=False))}


def kept_entries(
    groups: Sequence[ChannelGroup], plan: Mapping[str, Sequence[int]], tensors: Mapping[str, Tensor]
) -> dict[str, dict[int, Tensor]]:
    """Compile a plan to the entries that stay, per tensor and dimension.

    Args:
        groups: Channel groups.
        plan: Channels that stay; every group named.
        tensors: The network's parameters and buffers by name.

    Returns:
        tensor name -> dimension -> (n,) int64 positions that stay, ascending. Only dimensions that shrink.

    Raises:
        UserError: A tensor of the groups is missing or has another size than the groups say.
    """
    gone: dict[tuple[str, int], list[IndexArray]] = {}
    for group in groups:
        leaves = group.leaving(plan[group.name])
        if not leaves.any():
            continue
        for piece in group.slices:
            gone.setdefault((piece.tensor, piece.dim), []).append(piece.index[leaves[piece.channel]])
    result: dict[str, dict[int, Tensor]] = {}
    for (name, dim), indices in gone.items():
        if name not in tensors:
            raise UserError(f"the groups must come from this network, but it has no tensor {name!r}")
        stays = np.ones(tensors[name].shape[dim], dtype=bool)
        removed = np.concatenate(indices)
        if removed.size and removed.max() >= len(stays):
            raise UserError(
                f"the groups must fit the network, but {name!r} has {len(stays)} entries along dimension {dim} "
                f"and entry {removed.max()} was to leave; call find_groups again or shrink_groups after a cut"
            )
        stays[removed] = False
        if not stays.any():
            raise UserError(f"a cut must leave something of every layer, but {name!r} would be empty")
        result.setdefault(name, {})[dim] = torch.from_numpy(np.flatnonzero(stays))
    return result


def _check_shared(network: nn.Module, entries: Mapping[str, Mapping[int, Tensor]]) -> None:
    """Refuse a plan under which a tensor that two modules share would need two shapes or contents."""
    first_name: dict[int, str] = {}
    for name, tensor in _own_tensors(network):
        first = first_name.setdefault(id(tensor), name)
        if first == name:
            continue
        one, other = entries.get(first, {}), entries.get(name, {})
        if one.keys() != other.keys() or any(not torch.equal(one[dim], other[dim]) for dim in one):
            raise UserError(
                f"a tensor shared by {first!r} and {name!r} must be cut alike in both, but the plan cuts them "
                "differently; keep these groups whole or untie the weights"
            )


def _own_tensors(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield each module's own parameters and buffers, a module under several names only once."""
    for prefix, module in network.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                yield f"{prefix}.{name}" if prefix else name, tensor


def masked_copy(network: nn.Module, groups: Sequence[ChannelGroup], plan: PruningPlan) -> nn.Module:
    """Return a full-size copy in which the removed channels reach no consumer: their input weights are zero.

    This is what the cut network must equal; it uses only the consumers' input maps, none of the other slices.
    """
    plan = plan.completed(groups)
    masked = copy_network(network)
    modules = dict(masked.named_modules(remove_duplicate=False))
    with torch.no_grad():
        for group in groups:
            leaves = group.leaving(plan[group.name])
            for consumer in group.consumers:
                layer = modules[consumer.module]
                weight: Any = layer.weight
                dim = 0 if getattr(layer, "transposed", False) else 1
                gone = torch.from_numpy(consumer.index[leaves[consumer.channel]]).to(weight.device)
                weight.index_fill_(dim, gone, 0.0)
    return masked


def verify_cut(
    network: nn.Module,
    smaller: nn.Module,
    groups: Sequence[ChannelGroup],
    plan: PruningPlan,
    inputs: Tensor,
    tolerance: float | None = None,
) -> float:
    """Compare a cut (not yet repaired) network with the masked original.

    Args:
        network: The original.
        smaller: What `apply_plan` made of it.
        groups: The groups of `network`.
        plan: The plan that was applied.
        inputs: A batch of inputs.
        tolerance: Largest accepted difference relative to the output's largest magnitude;
            1e-5 in float32 and 1e-10 in float64 by default. What each layer that reads cut channels puts out may
            differ by `CONSUMER_FACTOR` times as much, relative to its own magnitude.

    Returns:
        The relative difference found in the output.

    Raises:
        SurgeryError: A difference is larger, or a layer's counts do not fit its tensors; the layer is named.
        UserError: The network returns no tensor, or does not give the same output twice.
    """
    for name, module in smaller.named_modules():
        if not counts_fit_tensors(module):
            raise SurgeryError(f"layer {name!r} says {channel_counts(module)}, but its tensors have other sizes")
    masked = masked_copy(network, groups, plan)
    exact = torch.backends.cudnn.flags(allow_tf32=False)
    with evaluation_mode(masked), evaluation_mode(smaller), torch.no_grad(), exact:
        watch = ConsumerWatch(_rows_of_consumers(masked, groups, plan.completed(groups)))
        with _KeptLayerNorm(masked, groups, plan.completed(groups)), watch.recording(masked):
            expected = list(tensors_in(masked(inputs.clone())))
        try:
            with watch.comparing(smaller):
                got = list(tensors_in(smaller(inputs.clone())))
        except RuntimeError as error:
            raise SurgeryError(f"the cut network does not run: {error}") from error
        if not expected:
            raise UserError("a network must return a tensor, or tuples, lists or dicts of tensors, but none was found")
        limit = tolerance or (1e-10 if expected[0].dtype == torch.float64 else 1e-5)
        difference = max(largest_difference(one, other) for one, other in zip(expected, got, strict=True))
        worst = max(watch.differences.values(), default=0.0)
        if not (difference <= limit and worst <= CONSUMER_FACTOR * limit):
            check_repeatable(network, inputs, limit)
            layer = next((name for name, value in watch.differences.items() if not value <= limit), "the output")
            raise SurgeryError(
                f"the cut network must equal the masked one to {limit:g}, "
                f"but differs by {difference if difference > limit else worst:.3g}, first at {layer!r}"
            )
    return difference


def _rows_of_consumers(
    masked: nn.Module, groups: Sequence[ChannelGroup], plan: PruningPlan
) -> dict[str, Tensor | None]:
    """Return, by consumer, (n,) which of its outputs stay; None for all of them."""
    tensors = named_tensors(masked)
    kept: dict[int, dict[int, Tensor]] = {}  # by identity: the groups may call a shared weight by another name
    for name, dims in kept_entries(groups, plan, tensors).items():
        kept.setdefault(id(tensors[name]), {}).update(dims)
    modules: dict[str, Any] = dict(masked.named_modules(remove_duplicate=False))
    names = dict.fromkeys(consumer.module for group in groups for consumer in group.consumers)
    return {name: kept.get(id(modules[name].weight), {}).get(output_dim(modules[name])) for name in names}


class _KeptLayerNorm(TorchFunctionMode):
    """Makes the masked network's layer norms normalise over the channels that stay, as the cut network's do."""

    def __init__(self, masked: nn.Module, groups: Sequence[ChannelGroup], plan: PruningPlan) -> None:
        super().__init__()
        tensors = named_tensors(masked)
        norms = {f"{name}.weight" for name, module in masked.named_modules() if isinstance(module, nn.LayerNorm)}
        self.kept = {
            id(tensors[name]): dims[0]
            for name, dims in kept_entries(groups, plan, tensors).items()
            if name in norms and 0 in dims
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        weight = kwargs.get("weight", args[2] if len(args) > 2 else None)
        if func is not F.layer_norm or id(weight) not in self.kept:
            return func(*args, **kwargs)
        bias = kwargs.get("bias", args[3] if len(args) > 3 else None)
        eps = kwargs.get("eps", args[4] if len(args) > 4 else 1e-5)
        kept = self.kept[id(weight)].to(weight.device)
        inner = args[0].index_select(-1, kept)
        bias = None if bias is None else bias.index_select(0, kept)
        normal = F.layer_norm(inner, (len(kept),), weight.index_select(0, kept), bias, eps)
        return torch.zeros_like(args[0]).index_copy(-1, kept, normal)
