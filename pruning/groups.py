"""Which channels must leave together, as plain data.

Torch-Pruning's dependency graph finds the coupling between layers once; `find_groups` compiles its answer to
index maps. From then on a cut is only `index_select`: no graph is walked again, neither for another plan nor
for a second round on a network that was already cut (`shrink_groups`).

Source of the coupling rules: Fang et al., "DepGraph: Towards Any Structural Pruning" (CVPR 2023), as
implemented by the package torch-pruning.
"""

import copy
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch_pruning
from numpy.typing import NDArray
from torch import Tensor, nn

from .errors import UserError
from .tracing import ActivationCall, Trace, trace_forward

IndexArray = NDArray[np.int64]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
CHANNEL_LAST = (nn.Linear, nn.LayerNorm)


@dataclass(frozen=True, eq=False)
class TensorSlice:
    """The entries along one dimension of one tensor that belong to the channels of a group.

    Attributes:
        tensor: Qualified name of a parameter or buffer, e.g. `"fc1.weight"`.
        dim: The dimension that shrinks.
        channel: (n,) channel of the group that owns entry `index[i]`.
        index: (n,) position along `dim`.
    """

    tensor: str
    dim: int
    channel: IndexArray
    index: IndexArray


@dataclass(frozen=True)
class AttributeCut:
    """An integer attribute of a module that counts channels, e.g. `conv1.out_channels`.

    Attributes:
        module: Qualified name of the module.
        attribute: Name of the attribute; `normalized_shape` means its last entry.
        per_channel: How much it falls with each channel that leaves.
    """

    module: str
    attribute: str
    per_channel: int


@dataclass(frozen=True, eq=False)
class Consumer:
    """A layer that reads the channels of a group.

    Attributes:
        module: Qualified name of a convolution or linear layer.
        channel: (n,) channel of the group behind input feature `index[i]`.
        index: (n,) input feature of the layer; a linear layer after a flatten owns H·W features a channel.
        norm: The batch norm that directly normalises the layer's output, if any: a constant added to the
            output of a layer without bias can be kept in its running mean.
    """

    module: str
    channel: IndexArray
    index: IndexArray
    norm: str | None = None


@dataclass(frozen=True, eq=False)
class ActivationSite:
    """Where the activations of a group's channels are observed.

    Attributes:
        module: The layer whose output, after the activation function, is meant.
        call: Ordinal of the activation function's call within one forward pass, or None where no activation
            function follows and the output of `module` itself is observed.
        dim: Channel dimension of the observed tensor (1 for maps, -1 for features).
        channel: (n,) channel of the group behind slot `index[i]`.
        index: (n,) slot along `dim`.
        rectified: Whether the function is a ReLU, so that an exact zero means "inactive" (APoZ is defined).
    """

    module: str
    call: int | None
    dim: int
    channel: IndexArray
    index: IndexArray
    rectified: bool


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Channels of one or more layers that can only leave together.

    Attributes:
        name: The first layer, in order of execution, that produces the channels.
        width: Number of channels present.
        producers: Layers whose output channels these are (several where a residual sum ties them).
        consumers: Layers that read the channels.
        slices: Every entry of every parameter and buffer that belongs to the channels.
        attributes: Integer attributes that count them.
        sites: Where their activations are observed.
        kernel: Largest kernel extent of the producers (1 for linear layers).
        stride: Largest stride of the producers (1 for linear layers).
    """

    name: str
    width: int
    producers: tuple[str, ...]
    consumers: tuple[Consumer, ...]
    slices: tuple[TensorSlice, ...]
    attributes: tuple[AttributeCut, ...]
    sites: tuple[ActivationSite, ...]
    kernel: int = 1
    stride: int = 1

    @property
    def rectified(self) -> bool:
        """Whether a ReLU follows, so that APoZ is defined for the group."""
        return any(site.rectified for site in self.sites)


@dataclass(frozen=True)
class RefusedGroup:
    """Channels that are left alone, and why."""

    name: str
    width: int
    reason: str


@dataclass(frozen=True)
class GroupSurvey:
    """Everything found in a network: what can be cut, and what cannot with its reason."""

    groups: tuple[ChannelGroup, ...]
    refused: tuple[RefusedGroup, ...]


def find_groups(network: nn.Module, example_input: Tensor) -> tuple[ChannelGroup, ...]:
    """Find the prunable channel groups of a network, from input to output.

    Args:
        network: Any traceable network; it is examined on a copy and comes back untouched.
        example_input: (N, C, H, W) or whatever `network` takes; values do not matter.

    Returns:
        The groups that can be cut, in order of execution. The output layer is never among them;
        `survey_groups` tells what was refused and why.

    Raises:
        UserError: The network cannot be run or traced, or nothing in it can be cut.
    """
    survey = survey_groups(network, example_input)
    if not survey.groups:
        reasons = "; ".join(f"{item.name}: {item.reason}" for item in survey.refused) or "no layer with channels"
        raise UserError(f"a network needs at least one prunable channel group, but none was found ({reasons})")
    return survey.groups


def survey_groups(network: nn.Module, example_input: Tensor) -> GroupSurvey:
    """Find every channel group, prunable or not. Arguments as for `find_groups`."""
    work = copy.deepcopy(network).eval()
    work.requires_grad_(True)
    example_input = example_input.detach().clone()  # a network may begin with an in-place operation
    trace = trace_forward(work, example_input.clone())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = torch_pruning.DependencyGraph().build_dependency(work, example_inputs=example_input)
    except Exception as error:
        raise UserError(
            f"the network must be traceable by its dependency graph, but that failed: {type(error).__name__}: {error}"
        ) from error
    names = {module: name for name, module in work.named_modules()}
    parameter_names = {id(parameter): name for name, parameter in work.named_parameters()}
    found: list[tuple[int, ChannelGroup | RefusedGroup]] = []
    roots = (*CONVOLUTIONS, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)
    for raw in graph.get_all_groups(root_module_types=roots):
        draft = _Draft(names, parameter_names, trace)
        for item in raw:
            draft.add(item)
        found.append((draft.position, draft.finish()))
    found.sort(key=lambda pair: pair[0])
    return GroupSurvey(
        groups=tuple(group for _, group in found if isinstance(group, ChannelGroup)),
        refused=tuple(group for _, group in found if isinstance(group, RefusedGroup)),
    )


def shrink_groups(groups: Sequence[ChannelGroup], keep: Mapping[str, Sequence[int]]) -> tuple[ChannelGroup, ...]:
    """Renumber groups for the network that is left after a cut, without tracing it again.

    Args:
        groups: The groups before the cut.
        keep: Channels that stay, by group name; a group that is not named stays whole.

    Returns:
        Groups of the cut network, in the same order, with channels numbered from 0.
    """
    stays = {group.name: _mask(group.width, keep.get(group.name)) for group in groups}
    tensor_gone: dict[tuple[str, int], list[IndexArray]] = {}
    feature_gone: dict[str, list[IndexArray]] = {}
    slot_gone: dict[tuple[str, int | None], list[IndexArray]] = {}
    for group in groups:
        mask = stays[group.name]
        for piece in group.slices:
            tensor_gone.setdefault((piece.tensor, piece.dim), []).append(piece.index[~mask[piece.channel]])
        for consumer in group.consumers:
            feature_gone.setdefault(consumer.module, []).append(consumer.index[~mask[consumer.channel]])
        for site in group.sites:
            slot_gone.setdefault((site.module, site.call), []).append(site.index[~mask[site.channel]])
    result = []
    for group in groups:
        mask = stays[group.name]
        renumber = np.cumsum(mask) - 1

        def moved(part: Any, gone: list[IndexArray], mask: Any = mask, renumber: Any = renumber) -> Any:
            present = mask[part.channel]
            index = part.index[present]
            removed = np.unique(np.concatenate(gone))
            return replace(
                part,
                channel=renumber[part.channel[present]].astype(np.int64),
                index=index - np.searchsorted(removed, index),
            )

        result.append(
            replace(
                group,
                width=int(mask.sum()),
                slices=tuple(moved(piece, tensor_gone[piece.tensor, piece.dim]) for piece in group.slices),
                consumers=tuple(moved(consumer, feature_gone[consumer.module]) for consumer in group.consumers),
                sites=tuple(moved(site, slot_gone[site.module, site.call]) for site in group.sites),
            )
        )
    return tuple(result)


def _mask(width: int, keep: Iterable[int] | None) -> NDArray[np.bool_]:
    mask = np.zeros(width, dtype=bool)
    mask[slice(None) if keep is None else np.asarray(list(keep), dtype=np.int64)] = True
    return mask


class _Draft:
    """Collects what Torch-Pruning says of one group and turns it into index maps."""

    def __init__(self, names: dict[nn.Module, str], parameter_names: dict[int, str], trace: Trace) -> None:
        self.names = names
        self.parameter_names = parameter_names
        self.trace = trace
        self.name = ""
        self.width = 0
        self.problem: str | None = None
        self.producers: dict[str, nn.Module] = {}
        self.consumers: list[Consumer] = []
        self.slices: list[TensorSlice] = []
        self.attributes: list[AttributeCut] = []
        self.outputs: dict[str, tuple[nn.Module, IndexArray, IndexArray]] = {}

    @property
    def position(self) -> int:
        """Order of execution of the first producer; what never ran comes last."""
        return min((self.trace.order.get(name, 10**9) for name in self.producers), default=10**9)

    def add(self, item: Any) -> None:
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
                self.slices.append(TensorSlice(name, int(dim), channel, index))
            return
        if module not in self.names:
            return  # an operation without parameters: sum, flatten, concatenation, activation
        name = self.names[module]
        if not self.width and "out" in handler:
            self.width = len(np.unique(channel))
        if isinstance(module, (*CONVOLUTIONS, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
            self._convolution(name, module, handler, channel, index)
        elif isinstance(module, nn.Linear):
            self._linear(name, module, handler, channel, index)
        elif isinstance(module, (*BATCH_NORMS, nn.modules.instancenorm._InstanceNorm)):
            self._tensors(name, module, ("weight", "bias", "running_mean", "running_var"), 0, channel, index)
            self._attribute(name, "num_features", index)
            self.outputs[name] = (module, channel, index)
        elif isinstance(module, nn.LayerNorm):
            self._tensors(name, module, ("weight", "bias"), -1, channel, index)
            self._attribute(name, "normalized_shape", index)
            self.outputs[name] = (module, channel, index)
        elif isinstance(module, nn.PReLU):
            if module.num_parameters > 1:
                self._tensors(name, module, ("weight",), 0, channel, index)
                self._attribute(name, "num_parameters", index)
        elif list(module.parameters(recurse=False)):
            self.refuse(f"{type(module).__name__} {name!r} is not a layer type that can be cut")

    def refuse(self, reason: str) -> None:
        self.problem = self.problem or reason

    def _convolution(self, name: str, module: Any, handler: str, channel: IndexArray, index: IndexArray) -> None:
        transposed = module.transposed
        depthwise = module.groups > 1 and module.groups == module.in_channels == module.out_channels
        if module.groups > 1 and not depthwise:
            self.refuse(f"grouped convolution {name!r} ({module.groups} groups)")
        if depthwise:
            if "out" in handler or name not in self.outputs:
                self._tensors(name, module, ("weight", "bias"), 0, channel, index)
                for attribute in ("in_channels", "out_channels", "groups"):
                    self._attribute(name, attribute, index)
                self.outputs[name] = (module, channel, index)
        elif "out" in handler:
            self.producers[name] = module
            self._tensors(name, module, ("weight",), 1 if transposed else 0, channel, index)
            self._tensors(name, module, ("bias",), 0, channel, index)
            self._attribute(name, "out_channels", index)
            self.outputs[name] = (module, channel, index)
        else:
            self._tensors(name, module, ("weight",), 0 if transposed else 1, channel, index)
            self._attribute(name, "in_channels", index)
            self.consumers.append(Consumer(name, channel, index, self.trace.norm_after.get(name)))

    def _linear(self, name: str, module: nn.Linear, handler: str, channel: IndexArray, index: IndexArray) -> None:
        if "out" in handler:
            self.producers[name] = module
            self._tensors(name, module, ("weight", "bias"), 0, channel, index)
            self._attribute(name, "out_features", index)
            self.outputs[name] = (module, channel, index)
        else:
            self._tensors(name, module, ("weight",), 1, channel, index)
            self._attribute(name, "in_features", index)
            self.consumers.append(Consumer(name, channel, index, self.trace.norm_after.get(name)))

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

    def _attribute(self, name: str, attribute: str, index: IndexArray) -> None:
        per_channel = len(index) // max(self.width, 1)
        if per_channel * self.width != len(index):
            self.refuse(f"{name!r} sees only part of the channels")
        self.attributes.append(AttributeCut(name, attribute, per_channel))

    def finish(self) -> ChannelGroup | RefusedGroup:
        ordered = sorted(self.producers, key=lambda name: self.trace.order.get(name, 10**9))
        name = ordered[0] if ordered else "?"
        if not self.consumers:
            self.refuse("its channels are the network's outputs")
        if ordered and name not in self.trace.order:
            self.refuse("it did not run in the forward pass")
        if self.problem:
            return RefusedGroup(name, self.width, self.problem)
        modules = [self.producers[producer] for producer in ordered]
        return ChannelGroup(
            name=name,
            width=self.width,
            producers=tuple(ordered),
            consumers=tuple(self.consumers),
            slices=tuple(self.slices),
            attributes=tuple(self.attributes),
            sites=self._sites(ordered),
            kernel=max(max(getattr(module, "kernel_size", (1,))) for module in modules),
            stride=max(max(getattr(module, "stride", (1,))) for module in modules),
        )

    def _sites(self, producers: Sequence[str]) -> tuple[ActivationSite, ...]:
        sites = []
        for call in self.trace.calls:
            site = self._site(call)
            if site is not None:
                sites.append(site)
        if any(site.rectified for site in sites):
            return tuple(site for site in sites if site.rectified)
        if sites:
            return tuple(sites)
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
