"""Which channels must leave together, as plain data: index maps of every tensor that belongs to a channel.

`grouping.find_groups` makes them once. From then on a cut is only `index_select`: no graph is walked again, neither
for another plan nor for a second round on a network that was already cut (`shrink_groups`).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

IndexArray = NDArray[np.int64]


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
        positions: Features of a linear layer that one channel owns behind a flatten (H·W), else 1.
        norm: The batch norm that directly normalises the layer's output, if any: a constant added to the
            output of a layer without bias can be kept in its running mean.
    """

    module: str
    channel: IndexArray
    index: IndexArray
    positions: int = 1
    norm: str | None = None


@dataclass(frozen=True, eq=False)
class ActivationSite:
    """Where the activations of a group's channels are observed.

    Attributes:
        module: The layer whose output, after the activation function, is meant.
        call: Ordinal of the activation function's call within one forward pass, or None where no activation
            function follows and the output of `module` itself is observed.
        dim: Channel dimension of the observed tensor (1 for maps, -1 for features); examples lie along dimension 0.
        channel: (n,) channel of the group behind slot `index[i]`.
        index: (n,) slot along `dim`.
        rectified: Whether the function is a ReLU, so that an exact zero means "inactive" (APoZ is defined).
        positions: Neighbours along `dim` that make up one slot: the positions of a channel behind a flatten, else 1.
    """

    module: str
    call: int | None
    dim: int
    channel: IndexArray
    index: IndexArray
    rectified: bool
    positions: int = 1


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Channels of one or more layers that can only leave together.

    Where grouped convolutions read or write them, a *channel* here is a unit of several: those of a whole convolution
    group leave together, so that a grouped convolution stays one.

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

    def leaving(self, keep: Iterable[int] | None) -> NDArray[np.bool_]:
        """Return (width,) which channels leave when `keep` stay; None = all stay."""
        leaves = np.full(self.width, keep is not None)
        if keep is not None:
            leaves[list(keep)] = False
        return leaves

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


def shrink_groups(groups: Sequence[ChannelGroup], keep: Mapping[str, Sequence[int]]) -> tuple[ChannelGroup, ...]:
    """Renumber groups for the network that is left after a cut, without tracing it again.

    Args:
        groups: The groups before the cut.
        keep: Channels that stay, by group name; a group that is not named stays whole.

    Returns:
        Groups of the cut network, in the same order, with channels numbered from 0.
    """
    stays = {group.name: ~group.leaving(keep.get(group.name)) for group in groups}
    tensor_gone: dict[tuple[str, int], list[IndexArray]] = {}
    feature_gone: dict[str, list[IndexArray]] = {}
    slot_gone: dict[str | int, list[IndexArray]] = {}
    for group in groups:
        mask = stays[group.name]
        for piece in group.slices:
            tensor_gone.setdefault((piece.tensor, piece.dim), []).append(piece.index[~mask[piece.channel]])
        for consumer in group.consumers:
            feature_gone.setdefault(consumer.module, []).append(consumer.index[~mask[consumer.channel]])
        for site in group.sites:
            slot_gone.setdefault(_shown_at(site), []).append(site.index[~mask[site.channel]])
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
                sites=tuple(moved(site, slot_gone[_shown_at(site)]) for site in group.sites),
            )
        )
    return tuple(result)


def _shown_at(site: ActivationSite) -> str | int:
    """Return what names the tensor observed: several groups may share one, and each call has but one."""
    return site.module if site.call is None else site.call
