"""What is collected about one channel group until it is either a `ChannelGroup` or refused with its reason.

Two finders fill drafts: `depgraph` from Torch-Pruning's dependency graph, `labels` by following channels through one
forward pass.
"""

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor, nn

from .groups import (
    ActivationSite,
    AttributeCut,
    ChannelGroup,
    Consumer,
    IndexArray,
    RefusedGroup,
    TensorSlice,
)
from .tracing import ActivationCall, Trace

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
CHANNEL_LAST = (nn.Linear, nn.LayerNorm)
NEVER = 10**9  # order of execution of what did not run


class Draft:
    """Collects index maps of one group; `finish` turns them into the group."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.width = 0
        self.whole = 0  # channels before units were formed
        self.problem: str | None = None
        self.producers: dict[str, nn.Module] = {}
        self.consumers: list[Consumer] = []
        self.slices: list[TensorSlice] = []
        self.counts: list[tuple[str, str, int]] = []  # module, attribute, how much of it the whole group makes up
        self.outputs: dict[str, tuple[nn.Module, IndexArray, IndexArray]] = {}
        self.through: list[str] = []  # grouped convolutions between the group's channels
        self.hidden: set[int] = set()  # ordinals of activation calls that are not observed

    @property
    def layers(self) -> tuple[str, ...]:
        """Layers by which a pattern may name the group: what produces its channels, grouped convolutions too."""
        return (*self.producers, *self.through)

    @property
    def position(self) -> int:
        """Order of execution of the first producer; what never ran comes last."""
        return min((self.trace.order.get(name, NEVER) for name in self.producers), default=NEVER)

    def refuse(self, reason: str) -> None:
        """Leave the group alone; the first reason is the one that is told."""
        self.problem = self.problem or reason

    def add_tensors(
        self,
        name: str,
        module: nn.Module,
        tensors: Sequence[str],
        dim: int,
        channel: IndexArray,
        index: IndexArray,
    ) -> None:
        """Note that `index` along `dim` of a module's tensors belongs to the channels `channel`."""
        for tensor in tensors:
            value = getattr(module, tensor, None)
            if value is None:
                continue
            if not isinstance(value, Tensor) or tensor not in {**module._parameters, **module._buffers}:
                self.refuse(f"{name}.{tensor} is computed, not stored (a parametrization or weight norm)")
                continue
            self.slices.append(TensorSlice(f"{name}.{tensor}", dim % value.dim(), channel, index))

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
        found = (self._site(call) for call in self.trace.calls if call.ordinal not in self.hidden)
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
        """Return where a call shows the group's channels, each in one slot; None where it does not, or otherwise."""
        slots = self.trace.slots.get(call.ordinal)
        if slots is None or not call.sources or not self.channel_of.keys() <= slots.known:
            return None
        index = np.flatnonzero(np.isin(slots.roots, list(self.channel_of)))
        channel = np.array([self.channel_of[root] for root in slots.roots[index].tolist()], dtype=np.int64)
        shown = np.bincount(channel, minlength=self.width)
        if not len(index) or shown.min() != shown.max():
            return None
        name = next((name for name in call.sources if name in self.outputs), call.sources[0])
        produced = len(self.outputs[name][2]) // self.width if name in self.outputs else 1
        positions = 1
        if shown[0] > produced:
            positions = int(shown[0]) // produced
            blocks = index.reshape(-1, positions) if shown[0] == produced * positions else index[:0]
            whole = len(blocks) and len(slots.roots) % positions == 0 and not (blocks[:, 0] % positions).any()
            merged = slots.dims < self.trace.dims.get(name, 0)  # a flatten, not the same channels twice
            if not (whole and merged and (channel.reshape(blocks.shape) == channel[::positions, None]).all()):
                return None
            index, channel = blocks[:, 0] // positions, channel[::positions]
        return ActivationSite(name, call.ordinal, slots.dim, channel, index, call.rectified, positions)

    @cached_property
    def channel_of(self) -> dict[int, int]:
        """Class of labels -> channel of the group; nothing where the labels see other groups than the draft."""
        found: dict[int, int] = {}
        for name in self.producers:
            _, channel, index = self.outputs[name]
            roots = self.trace.roots.get(name)
            if roots is None or (len(index) and index.max() >= len(roots)):
                return {}
            for root, number in zip(roots[index].tolist(), channel.tolist(), strict=True):
                if found.setdefault(root, number) != number:
                    return {}
        return found if len(found) == self.width else {}


def finish_all(drafts: Sequence[Draft], trace: Trace) -> list[ChannelGroup | RefusedGroup]:
    """Finish drafts; an activation call is observed by every group with channels in it, in the same slots, or by none.

    After a cut, the slots of one group move with what left of the others.
    """
    while True:
        found = [draft.finish() for draft in drafts]
        owners: dict[int, int] = {}  # class of labels -> place of its draft
        observed: dict[int, dict[int, int]] = {}  # call -> place of a draft -> positions that make up a slot
        for place, (draft, group) in enumerate(zip(drafts, found, strict=True)):
            if isinstance(group, ChannelGroup):
                owners.update(dict.fromkeys(draft.channel_of, place))
                for site in group.sites:
                    if site.call is not None:
                        observed.setdefault(site.call, {})[place] = site.positions
        hidden = {
            call
            for call, positions in observed.items()
            if len(set(positions.values())) > 1
            or {owners[root] for root in trace.slots[call].known if root in owners} != positions.keys()
        }
        if not hidden:
            return found
        for draft in drafts:
            draft.hidden |= hidden
