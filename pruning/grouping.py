"""Find the channel groups of a network.

Torch-Pruning's dependency graph finds the coupling between layers once; its answer is compiled to the plain index maps
of `groups`. Source of the coupling rules: Fang et al., "DepGraph: Towards Any Structural Pruning" (CVPR 2023), as
implemented by the package torch-pruning. Ours are the treatment of grouped convolutions (a unit is a whole convolution
group, input and output together) and the places where activations are observed.
"""

import copy
import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
import torch_pruning
from torch import Tensor, nn

from .errors import UserError
from .groups import (
    ActivationSite,
    AttributeCut,
    ChannelGroup,
    Consumer,
    GroupSurvey,
    IndexArray,
    RefusedGroup,
    TensorSlice,
)
from .plan import PruningPlan
from .surgery import SurgeryError, apply_plan, verify_cut
from .tracing import ActivationCall, Trace, evaluation_mode, trace_forward

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
CHANNEL_LAST = (nn.Linear, nn.LayerNorm)
TRIAL_TOLERANCE = 1e-3  # a wrong index map changes outputs by far more, rounding by far less
NEVER = 10**9  # order of execution of what did not run


def find_groups(
    network: nn.Module, example_input: Tensor, *, include: Sequence[str] = (), ignore: Sequence[str] = ()
) -> tuple[ChannelGroup, ...]:
    """Find the prunable channel groups of a network, from input to output.

    Args:
        network: Any traceable network; it is examined on a copy and comes back untouched.
        example_input: (N, C, H, W) or whatever `network` takes; values do not matter.
        include: Patterns such as "layer3.*"; only groups with a producer that matches one are cut. Empty = all.
        ignore: Patterns; a group with a producer that matches one is left whole.

    Returns:
        The groups that can be cut, in order of execution. The output layer is never among them;
        `survey_groups` tells what was refused and why.

    Raises:
        UserError: The network cannot be run or traced, nothing in it can be cut, or a pattern matches nothing.
    """
    survey = survey_groups(network, example_input, include=include, ignore=ignore)
    if not survey.groups:
        reasons = "; ".join(f"{item.name}: {item.reason}" for item in survey.refused) or "no layer with channels"
        raise UserError(f"a network needs at least one prunable channel group, but none was found ({reasons})")
    return survey.groups


def survey_groups(
    network: nn.Module, example_input: Tensor, *, include: Sequence[str] = (), ignore: Sequence[str] = ()
) -> GroupSurvey:
    """Find every channel group, prunable or not. Arguments as for `find_groups`."""
    work = copy.deepcopy(network).eval()
    work.requires_grad_(True)
    example_input = example_input.detach().clone()  # a network may begin with an in-place operation
    trace = trace_forward(work, example_input.clone())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = torch_pruning.DependencyGraph().build_dependency(work, example_inputs=example_input)
            raw_groups = list(graph.get_all_groups(root_module_types=(*CONVOLUTIONS, nn.Linear)))
    except Exception as error:
        raise UserError(
            f"the network must be traceable by its dependency graph, but that failed: {type(error).__name__}: {error}"
        ) from error
    names = {module: name for name, module in work.named_modules()}
    parameter_names = {id(parameter): name for name, parameter in work.named_parameters()}
    drafts = []
    for raw in raw_groups:
        draft = _Draft(names, parameter_names, trace)
        for item in raw:
            draft.add(item)
        drafts.append(draft)
    drafts = _joined(drafts)
    _select(drafts, include, ignore)
    drafts.sort(key=lambda draft: draft.position)
    found = _proved(work, [draft.finish() for draft in drafts], example_input)
    return GroupSurvey(
        groups=tuple(group for group in found if isinstance(group, ChannelGroup)),
        refused=tuple(group for group in found if isinstance(group, RefusedGroup)),
    )


def _proved(
    network: nn.Module, found: Sequence[ChannelGroup | RefusedGroup], example_input: Tensor
) -> list[ChannelGroup | RefusedGroup]:
    """Refuse groups whose index maps are wrong: half of every group is cut, on trial, and compared with the mask.

    Only where that fails are the groups tried one by one (a shuffle between grouped convolutions, an input that is
    also an output, arithmetic on shapes in the network's own code).
    """
    groups = [group for group in found if isinstance(group, ChannelGroup)]
    inputs = example_input
    if example_input.is_floating_point():
        inputs = torch.randn(example_input.shape, generator=torch.Generator().manual_seed(0)).to(example_input)

    def wrong(trial: Sequence[ChannelGroup]) -> str:
        rng = np.random.default_rng(0)
        plan = PruningPlan({g.name: rng.permutation(g.width)[: max(1, g.width // 2)].tolist() for g in trial})
        try:
            smaller = apply_plan(network, trial, plan)
            verify_cut(network, smaller, trial, plan, inputs, tolerance=TRIAL_TOLERANCE)
        except (SurgeryError, UserError, RuntimeError, IndexError, ValueError) as error:
            return str(error).split("\n")[0]
        return ""

    with evaluation_mode(network), torch.no_grad():
        if not groups or not bool(torch.isfinite(network(inputs.clone())).all()) or not wrong(groups):
            return list(found)
    result: list[ChannelGroup | RefusedGroup] = []
    for group in found:
        problem = wrong([group]) if isinstance(group, ChannelGroup) else ""
        if problem:
            group = RefusedGroup(group.name, group.width, f"a trial cut went wrong: {problem}")
        result.append(group)
    left = [group for group in result if isinstance(group, ChannelGroup)]
    if left and (problem := wrong(left)):
        raise UserError(f"the groups of this network can only be cut one by one, which is not supported: {problem}")
    return result


def _select(drafts: Sequence["_Draft"], include: Sequence[str], ignore: Sequence[str]) -> None:
    """Refuse what the user's patterns leave out; a pattern that matches no producer is an error."""
    known = [name for draft in drafts for name in draft.layers]
    for pattern in (*include, *ignore):
        if not any(fnmatchcase(name, pattern) for name in known):
            raise UserError(f"include and ignore must match a layer with channels, but {pattern!r} matches none")
    for draft in drafts:
        hit = next((p for p in ignore if any(fnmatchcase(name, p) for name in draft.layers)), None)
        if hit is not None:
            draft.refuse(f"left alone: matches ignore pattern {hit!r}")
        elif include and not any(fnmatchcase(name, p) for name in draft.layers for p in include):
            draft.refuse("left alone: matches no include pattern")


def _joined(drafts: Sequence["_Draft"]) -> list["_Draft"]:
    """Join drafts that lie on the two sides of a grouped convolution, and count channels by whole groups there."""
    sets: list[list[_Draft]] = []
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


class _Draft:
    """Collects what Torch-Pruning says of one group and turns it into index maps."""

    def __init__(self, names: dict[nn.Module, str], parameter_names: dict[int, str], trace: Trace) -> None:
        self.names = names
        self.parameter_names = parameter_names
        self.trace = trace
        self.width = 0
        self.whole = 0  # channels before units were formed
        self.problem: str | None = None
        self.producers: dict[str, nn.Module] = {}
        self.consumers: list[Consumer] = []
        self.slices: list[TensorSlice] = []
        self.counts: list[tuple[str, str, int]] = []  # module, attribute, how much of it the whole group makes up
        self.outputs: dict[str, tuple[nn.Module, IndexArray, IndexArray]] = {}
        # grouped convolutions -> (module, channel and input index, channel and output index); either pair may be empty
        self.grouped: dict[str, tuple[Any, IndexArray, IndexArray, IndexArray, IndexArray]] = {}

    @property
    def layers(self) -> tuple[str, ...]:
        """Layers by which a pattern may name the group: what produces its channels, grouped convolutions too."""
        return (*self.producers, *self.grouped)

    @property
    def position(self) -> int:
        """Order of execution of the first producer; what never ran comes last."""
        return min((self.trace.order.get(name, NEVER) for name in self.producers), default=NEVER)

    def refuse(self, reason: str) -> None:
        """Leave the group alone; the first reason is the one that is told."""
        self.problem = self.problem or reason

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
            self._tensors(name, module, ("weight", "bias", "running_mean", "running_var"), 0, channel, index)
            self.counts.append((name, "num_features", len(index)))
            self.outputs[name] = (module, channel, index)
        elif isinstance(module, nn.LayerNorm):
            if module.weight is None or len(module.normalized_shape) != 1:
                self.refuse(f"layer norm {name!r} has no weights, or normalises over more than the channels")
            self._tensors(name, module, ("weight", "bias"), -1, channel, index)
            self.counts.append((name, "normalized_shape", len(index)))
            self.outputs[name] = (module, channel, index)
        elif isinstance(module, nn.PReLU):
            if module.num_parameters > 1:
                self._tensors(name, module, ("weight",), 0, channel, index)
                self.counts.append((name, "num_parameters", len(index)))
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
            self._tensors(name, module, ("weight",), dims[0], channel, index)
            self._tensors(name, module, ("bias",), 0, channel, index)
            self.counts.append((name, attributes[0], len(index)))
            self.outputs[name] = (module, channel, index)
        else:
            self._tensors(name, module, ("weight",), dims[1], channel, index)
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

    def _tensors(
        self,
        name: str,
        module: nn.Module,
        tensors: Sequence[str],
        dim: int,
        channel: IndexArray,
        index: IndexArray,
    ) -> None:
        for tensor in tensors:
            value = getattr(module, tensor, None)
            if value is None:
                continue
            if not isinstance(value, Tensor) or tensor not in {**module._parameters, **module._buffers}:
                self.refuse(f"{name}.{tensor} is computed, not stored (a parametrization or weight norm)")
                continue
            self.slices.append(TensorSlice(f"{name}.{tensor}", dim % value.dim(), channel, index))

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

    def absorb(self, other: "_Draft") -> None:
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
            self._tensors(name, module, ("weight", "bias"), 0, channel, index)
            self.counts += [(name, "in_channels", module.in_channels), (name, "out_channels", module.out_channels)]
            self.counts.append((name, "groups", module.groups))

    # ---- the result -----------------------------------------------------------------------------------------------
    def finish(self) -> ChannelGroup | RefusedGroup:
        """Return the group, or why it is left alone."""
        ordered = sorted(self.producers, key=lambda name: self.trace.order.get(name, NEVER))
        name = ordered[0] if ordered else "?"
        if not self.producers:
            self.refuse("its channels are the network's inputs")
        if not self.consumers:
            self.refuse("its channels are the network's outputs")
        if ordered and name not in self.trace.order:
            self.refuse("it did not run in the forward pass")
        attributes = []
        for module, attribute, amount in self.counts:
            if amount % max(self.width, 1):
                self.refuse(f"{module!r} sees only part of the channels")
            attributes.append(AttributeCut(module, attribute, amount // max(self.width, 1)))
        if self.problem:
            return RefusedGroup(name, self.whole or self.width, self.problem)
        modules: list[Any] = [self.producers[producer] for producer in ordered]
        return ChannelGroup(
            name=name,
            width=self.width,
            producers=tuple(ordered),
            consumers=tuple(self.consumers),
            slices=tuple(self.slices),
            attributes=tuple(attributes),
            sites=self._sites(ordered),
            kernel=max(max(getattr(module, "kernel_size", (1,))) for module in modules),
            stride=max(max(getattr(module, "stride", (1,))) for module in modules),
        )

    def _sites(self, producers: Iterable[str]) -> tuple[ActivationSite, ...]:
        found = (self._site(call) for call in self.trace.calls)
        sites = tuple(site for site in found if site is not None)
        if any(site.rectified for site in sites):
            return tuple(site for site in sites if site.rectified)
        if sites:
            return sites
        return tuple(
            ActivationSite(name, None, -1 if isinstance(module, CHANNEL_LAST) else 1, channel, index, False)
            for name, (module, channel, index) in self.outputs.items()
            if name in producers
        )

    def _site(self, call: ActivationCall) -> ActivationSite | None:
        for name in call.sources:
            if name not in self.outputs:
                continue
            module, channel, index = self.outputs[name]
            dim = -1 if isinstance(module, CHANNEL_LAST) else 1
            if len(call.shape) > abs(dim) and call.shape[dim] == self.trace.widths.get(name):
                return ActivationSite(name, call.ordinal, dim, channel, index, call.rectified)
        return None
