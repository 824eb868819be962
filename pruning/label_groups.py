"""Channel groups from labels: classes of labels that one layer produces are the channels of one group."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from torch import Tensor, nn

from .drafts import CONVOLUTIONS, Draft
from .following import follow_channels
from .groups import Consumer, IndexArray, TensorSlice
from .labelling import Following
from .labels import Labels, compact, varies
from .tracing import Slots, Trace


def label_drafts(network: nn.Module, example_input: Tensor, trace: Trace) -> list[Draft]:
    """Find every group of a network by labels.

    Args:
        network: In evaluation mode; it is run once.
        example_input: What `network` takes.
        trace: From `trace_forward` on the same network; is told which channels its activation calls show.

    Returns:
        One draft per group, and one more per layer some or all of whose channels never leave.
    """
    found = follow_channels(network, example_input)
    trace.slots, trace.bare = _slots(found), found.bare
    trace.roots = {name: found.labels.roots(labels) for name, labels in found.outputs.items()}
    modules = dict(network.named_modules())
    producers = {
        name: found.labels.roots(labels)
        for name, labels in found.outputs.items()
        if isinstance(modules[name], (*CONVOLUTIONS, nn.Linear)) and name not in found.through
    }
    refused = []
    for name, roots in producers.items():
        reasons = [reason for root in roots.tolist() if (reason := found.labels.reason(root))]
        if reasons:
            draft = Draft(trace)
            draft.producers[name] = modules[name]
            draft.width = len(reasons)
            draft.refuse(reasons[0])
            refused.append(draft)
    bundles = _bundles(found.labels, producers.values())
    drafts = [Draft(trace) for _ in bundles]
    for draft, units in zip(drafts, bundles, strict=True):
        draft.width = len(units)
    _fill(drafts, _Places(found.labels, bundles), found, producers, modules)
    for draft in drafts:
        if draft.width < 2 and any(len(draft.outputs[name][2]) > 1 for name in draft.producers):
            draft.refuse("all its channels are tied together, by a shuffle, a split or grouped layers")
    return [*drafts, *refused]


def _slots(found: Following) -> dict[int, Slots]:
    """Return, by ordinal, the channels that activation calls show along one dimension."""
    result = {}
    for ordinal, (labels, shape) in enumerate(found.calls):
        if labels is None or len(shape) < 2:
            continue
        labels = compact(found.labels.root_tensor(labels))
        along = varies(labels)
        if not along:  # one channel
            along = [next((dim for dim in range(1, len(shape)) if shape[dim] == 1), len(shape) - 1)]
        if len(along) == 1 and along[0] > 0:
            dim, dims = along[0], len(shape)
            roots = labels.reshape(-1).expand(shape[dim]).numpy()
            result[ordinal] = Slots(-1 if dim == dims - 1 else dim, dims, roots)
    return result


def _bundles(labels: Labels, produced: Iterable[IndexArray]) -> list[list[int]]:
    """Return classes that can leave, in order, together where a layer produces them side by side."""
    bundle_of: dict[int, list[int]] = {}
    for roots in produced:
        free = [root for root in dict.fromkeys(roots.tolist()) if labels.reason(root) is None]
        touched = {id(bundle_of[root]): bundle_of[root] for root in free if root in bundle_of}
        old = [root for bundle in touched.values() for root in bundle]
        whole = [*old, *(root for root in free if root not in bundle_of)]
        bundle_of.update(dict.fromkeys(whole, whole))
    return list({id(bundle): bundle for bundle in bundle_of.values()}.values())


class _Places:
    """Tells which entries of a labelled vector belong to which group."""

    def __init__(self, labels: Labels, bundles: list[list[int]]) -> None:
        self._labels = labels
        self._place = {root: (number, unit) for number, units in enumerate(bundles) for unit, root in enumerate(units)}

    def of(self, labels: Tensor | IndexArray) -> Iterator[tuple[int, IndexArray, IndexArray]]:
        """Yield number of the group, (n,) channel and (n,) index of its entries, for each group with any."""
        places = [self._place.get(root, (-1, -1)) for root in self._labels.roots(labels).tolist()]
        number, unit = np.array(places, dtype=np.int64).reshape(-1, 2).T
        for group in np.unique(number[number >= 0]).tolist():
            index = np.flatnonzero(number == group)
            yield group, unit[index], index


def _fill(
    drafts: list[Draft],
    places: _Places,
    found: Following,
    producers: dict[str, IndexArray],
    modules: dict[str, nn.Module],
) -> None:
    """Give each draft every tensor, layer and count that holds some of its units."""
    for (_, dim), claim in found.claims.items():
        for group, channel, index in places.of(claim.labels):
            drafts[group].slices += [TensorSlice(name, dim, channel, index) for name in claim.names]
    for name, labels in found.outputs.items():
        module: Any = modules[name]
        for group, channel, index in places.of(labels):
            drafts[group].outputs[name] = (module, channel, index)
            if name in producers:
                drafts[group].producers[name] = module
            elif name in found.through:
                drafts[group].through.append(name)
    for name, labels in found.inputs.items():
        positions = len(labels) // len(np.unique(labels)) if isinstance(modules[name], nn.Linear) else 1
        for group, channel, index in places.of(labels):
            norm = drafts[group].trace.norm_after.get(name)
            drafts[group].consumers.append(Consumer(name, channel, index, positions, norm))
    for (name, attribute), labels in found.counts.items():
        for group, channel, index in places.of(labels):
            draft = drafts[group]
            draft.counts.append((name, attribute, len(index)))
            if len(set(np.bincount(channel, minlength=draft.width).tolist())) > 1:
                draft.refuse(f"{name!r} would lose unequal numbers of channels with its units")
