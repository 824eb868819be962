"""Channel groups by Torch-Pruning's dependency graph, which is asked once and compiled to plain index maps.

Source of the coupling rules: Fang et al., "DepGraph: Towards Any Structural Pruning" (CVPR 2023), as implemented by
the package torch-pruning. Ours is the treatment of grouped convolutions: a unit is a whole convolution group, input
and output together.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch_pruning
from torch import Tensor, nn

from .drafts import CONVOLUTIONS, TRANSPOSED, Draft
from .groups import Consumer, IndexArray, TensorSlice
from .tracing import Trace

NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)


def graph_drafts(network: nn.Module, example_input: Tensor, trace: Trace) -> list[Draft]:
    """Ask the dependency graph for every group of a network.

    Args:
        network: In evaluation mode, every parameter requiring gradients.
        example_input: What `network` takes.
        trace: From `trace_forward` on the same network.

    Returns:
        One draft per group, in no particular order.

    Raises:
        Exception: Whatever the dependency graph stumbles over; it promises nothing.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = torch_pruning.DependencyGraph().build_dependency(network, example_inputs=example_input)
        raw_groups = list(graph.get_all_groups(root_module_types=(*CONVOLUTIONS, nn.Linear)))
    names = {module: name for name, module in network.named_modules()}
    parameter_names = {id(parameter): name for name, parameter in network.named_parameters()}
    drafts = []
    for raw in raw_groups:
        draft = _GraphDraft(names, parameter_names, trace)
        for item in raw:
            draft.add(item)
        drafts.append(draft)
    return list(_joined(drafts))


def _joined(drafts: Sequence["_GraphDraft"]) -> list["_GraphDraft"]:
    """Join drafts that lie on the two sides of a grouped convolution, and count channels by whole groups there."""
    sets: list[list[_GraphDraft]] = []
    for draft in drafts:
        touching = [other for other in sets if any(set(draft.grouped) & set(member.grouped) for member in other)]
        merged = [draft, *(member for other in touching for member in other)]
        sets = [other for other in sets if all(other is not taken for taken in touching)]
        sets.append(merged)
    result = []
    for members in sets:
        first = min(members, key=lambda member: member.position)
        if not any(member.grouped for member in members):
            result.append(first)
            continue
        units = math.gcd(*(module.groups for member in members for module, *_ in member.grouped.values()))
        for member in members:
            member.regroup(units)
        for member in members:
            if member is not first:
                first.absorb(member)
        first.close_grouped(units)
        result.append(first)
    return result


class _GraphDraft(Draft):
    """Reads what Torch-Pruning says of one group."""

    def __init__(self, names: dict[nn.Module, str], parameter_names: dict[int, str], trace: Trace) -> None:
        super().__init__(trace)
        self.names = names
        self.parameter_names = parameter_names
        # grouped convolutions -> (module, channel and input index, channel and output index); either pair may be empty
        self.grouped: dict[str, tuple[Any, IndexArray, IndexArray, IndexArray, IndexArray]] = {}

    # ---- what Torch-Pruning says ----------------------------------------------------------------------------------
    def add(self, item: Any) -> None:
        """Take in one dependency: a module, the side that shrinks, and its indices."""
        module = item.dep.target.module
        handler = item.dep.handler.__name__.removeprefix("_")
        index = np.asarray(item.idxs, dtype=np.int64)
        channel = np.asarray(item.root_idxs, dtype=np.int64)
        order = np.argsort(index, kind="stable")
        index, channel = index[order], channel[order]
        if isinstance(module, nn.Parameter):
            name = self.parameter_names.get(id(module), "")
            dim = getattr(item.dep.target, "pruning_dim", None)
            if not name or dim is None:
                self.refuse("a parameter outside the known layer types depends on its channels")
            else:
                self.slices.append(TensorSlice(name, int(dim) % module.dim(), channel, index))
            return
        if module not in self.names:
            return  # an operation without parameters: sum, flatten, concatenation, activation
        name = self.names[module]
        if not self.width and "out" in handler:
            self.width = len(np.unique(channel))
        if isinstance(module, CONVOLUTIONS) and module.groups > 1:
            self._grouped_convolution(name, module, handler, channel, index)
        elif isinstance(module, CONVOLUTIONS):
            transposed = isinstance(module, TRANSPOSED)
            dims, attributes = ((1, 0) if transposed else (0, 1)), ("out_channels", "in_channels")
            self._layer(name, module, handler, dims, attributes, channel, index)
        elif isinstance(module, nn.Linear):
            self._layer(name, module, handler, (0, 1), ("out_features", "in_features"), channel, index)
        elif isinstance(module, NORMS):
            self.add_tensors(name, module, ("weight", "bias", "running_mean", "running_var"), 0, channel, index)
            self.counts.append((name, "num_features", len(index)))
            self.outputs[name] = (module, channel, index)
        elif isinstance(module, nn.LayerNorm):
            if module.weight is None or len(module.normalized_shape) != 1:
                self.refuse(f"layer norm {name!r} has no weights, or normalises over more than the channels")
            self.add_tensors(name, module, ("weight", "bias"), -1, channel, index)
            self.counts.append((name, "normalized_shape", len(index)))
            self.outputs[name] = (module, channel, index)
        elif isinstance(module, nn.PReLU):
            if module.num_parameters > 1:
                self.add_tensors(name, module, ("weight",), 0, channel, index)
                self.counts.append((name, "num_parameters", len(index)))
        elif isinstance(module, nn.MultiheadAttention):
            self.refuse(f"attention {name!r} reads it, whose queries, keys and values stay whole")
        elif list(module.parameters(recurse=False)):
            self.refuse(f"{type(module).__name__} {name!r} is not a layer type that can be cut")

    def _layer(
        self,
        name: str,
        module: Any,
        handler: str,
        dims: tuple[int, int],
        attributes: tuple[str, str],
        channel: IndexArray,
        index: IndexArray,
    ) -> None:
        if "out" in handler:
            self.producers[name] = module
            self.add_tensors(name, module, ("weight",), dims[0], channel, index)
            self.add_tensors(name, module, ("bias",), 0, channel, index)
            self.counts.append((name, attributes[0], len(index)))
            self.outputs[name] = (module, channel, index)
        else:
            self.add_tensors(name, module, ("weight",), dims[1], channel, index)
            self.counts.append((name, attributes[1], len(index)))
            positions = max(1, len(index) // max(self.width, 1))
            self.consumers.append(Consumer(name, channel, index, positions, self.trace.norm_after.get(name)))

    def _grouped_convolution(
        self, name: str, module: Any, handler: str, channel: IndexArray, index: IndexArray
    ) -> None:
        """Note a side of a grouped convolution; `_joined` brings the sides together."""
        none = np.empty(0, dtype=np.int64)
        _, in_channel, in_index, out_channel, out_index = self.grouped.get(name, (module, none, none, none, none))
        if "out" in handler or "depthwise" in handler:
            out_channel, out_index = channel, index
            self.outputs[name] = (module, channel, index)
        if "in_channels" in handler or "depthwise" in handler:
            in_channel, in_index = channel, index
        self.grouped[name] = (module, in_channel, in_index, out_channel, out_index)
        self.through = list(self.grouped)

    # ---- grouped convolutions -------------------------------------------------------------------------------------
    def regroup(self, units: int) -> None:
        """Count channels by units: unit u holds the u-th part of every grouped convolution's groups."""
        unit_of = np.full(self.width, -1, dtype=np.int64)
        for name, (module, in_channel, in_index, out_channel, out_index) in self.grouped.items():
            sides = ((in_channel, in_index, module.in_channels), (out_channel, out_index, module.out_channels))
            for channel, index, size in sides:
                unit = index // (size // units)
                seen = unit_of[channel]
                if ((seen >= 0) & (seen != unit)).any() or (len(index) and len(index) != size):
                    self.refuse(f"grouped convolution {name!r} mixes its channels with others'")
                unit_of[channel] = unit
        if (unit_of < 0).any():
            self.refuse("its grouped convolutions see only part of the channels")
            unit_of = np.maximum(unit_of, 0)
        self.slices = [replace(piece, channel=unit_of[piece.channel]) for piece in self.slices]
        self.consumers = [replace(consumer, channel=unit_of[consumer.channel]) for consumer in self.consumers]
        self.outputs = {name: (m, unit_of[channel], index) for name, (m, channel, index) in self.outputs.items()}
        self.grouped = {
            name: (m, unit_of[a] if len(a) else a, b, unit_of[c] if len(c) else c, d)
            for name, (m, a, b, c, d) in self.grouped.items()
        }
        self.whole, self.width = self.width, units

    def absorb(self, other: "_GraphDraft") -> None:
        """Take over what lies on the other side of a grouped convolution."""
        if other.problem:
            self.refuse(other.problem)
        self.producers.update(other.producers)
        self.consumers += other.consumers
        self.slices += other.slices
        self.counts += other.counts
        self.outputs.update(other.outputs)
        for name, (module, *sides) in other.grouped.items():
            mine = self.grouped.get(name, (module, *sides))
            joined = [theirs if not len(own) else own for own, theirs in zip(mine[1:], sides, strict=True)]
            self.grouped[name] = (module, *joined)
        self.through = list(self.grouped)

    def close_grouped(self, units: int) -> None:
        """Add the grouped convolutions themselves: whole groups leave, with their inputs and outputs."""
        if units < 2:
            self.refuse("its grouped convolutions have no groups in common that could leave")
        for name, (module, _, in_index, channel, index) in self.grouped.items():
            if len(index) != module.out_channels or (not len(in_index) and module.groups != module.in_channels):
                self.refuse(f"grouped convolution {name!r} is not wholly between its channels")
                continue
            if isinstance(module, TRANSPOSED):
                self.refuse(f"{name!r} is a grouped transposed convolution")
                continue
            self.add_tensors(name, module, ("weight", "bias"), 0, channel, index)
            self.counts += [(name, "in_channels", module.in_channels), (name, "out_channels", module.out_channels)]
            self.counts.append((name, "groups", module.groups))
