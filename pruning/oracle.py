"""What a network really loses with one channel, and how well a criterion foresees it (Molchanov et al. 2017).

The oracle removes each channel alone, repairs nothing, and notes the change of the loss. A criterion is as good as the
ranking it gives agrees with the oracle's, by Spearman's rank correlation; the paper ranks the absolute change.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor, nn

from .copying import copy_network
from .errors import UserError, closest
from .groups import ChannelGroup
from .layers import FloatArray, output_dim
from .plan import PruningPlan
from .surgery import apply_plan
from .tracing import evaluation_mode

Batches = Sequence[tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class OracleLoss:
    """What the channels of one group are worth.

    Attributes:
        change: (width,) float64 mean cross-entropy in nats without the channel minus that of the whole network, below
            zero where the network is better off without it; nan where it was not asked for, and where the channel is
            the only one of its group, which cannot leave.
    """

    change: FloatArray

    @property
    def magnitude(self) -> FloatArray:
        """(width,) absolute change, which the paper ranks; nan where the change is."""
        return np.abs(self.change)


def oracle(
    network: nn.Module,
    groups: Sequence[ChannelGroup],
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    channels: Mapping[str, Sequence[int]] | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, OracleLoss]:
    """Measure how the mean loss changes when one channel alone is removed and nothing is repaired.

    A channel is removed by zeroing the weights by which other layers read it, which equals the cut of `apply_plan`;
    where a layer norm normalises over the channels it does not, and the network is cut. What runs before the first of
    these layers runs once a batch. Costs one pass of the rest for each channel, and the memory of two copies of the
    network and of one batch of activations.

    Args:
        network: Comes back as it was; a copy in evaluation mode is measured.
        groups: Its channel groups.
        batches: Pairs of inputs (N, …), which are not changed, and class indices (N,), held all at once.
        channels: Group name -> channels to measure; groups that are not named are left out. All by default.
        progress: Called with the number of channels done, after each group.

    Returns:
        group name -> change of the loss, for every group.

    Raises:
        UserError: No batch came, `channels` names what there is not, or the loss of the whole network is not finite.
    """
    asked = _asked(groups, channels)
    data = [(inputs, labels) for inputs, labels in batches]
    examples = sum(len(labels) for _, labels in data)
    if not examples:
        raise UserError("the oracle needs at least one batch of data, but none came")
    copy = copy_network(network)
    changes, done = {}, 0
    exact = torch.backends.cudnn.flags(allow_tf32=False)  # single channels change a loss by little
    with evaluation_mode(copy), torch.no_grad(), exact:
        whole = sum(_loss_sum(copy, batch) for batch in data)
        if not math.isfinite(whole):
            raise UserError(f"the loss of the whole network must be finite, but it is {whole}; do the inputs hold NaN?")
        replay = _Replay(copy)
        for group in groups:
            wanted = asked[group.name]
            if _layer_norm_over(group, copy):
                sums = _cut_one_by_one(network, groups, group, wanted, data)
            else:
                sums = _zeroed_one_by_one(replay, group, wanted, data)
            change = np.full(group.width, np.nan)
            change[wanted] = (sums - whole) / examples
            changes[group.name] = OracleLoss(change)
            done += len(wanted)
            if progress is not None and wanted:
                progress(done)
    return changes


def _asked(groups: Sequence[ChannelGroup], channels: Mapping[str, Sequence[int]] | None) -> dict[str, list[int]]:
    """Return, by group, the channels to measure, ascending; those that cannot leave are left out."""
    widths = {group.name: group.width for group in groups}
    chosen = {name: range(width) for name, width in widths.items()} if channels is None else channels
    for name, wanted in chosen.items():
        if name not in widths:
            raise UserError(f"channels must name known groups, but got {name!r}{closest(name, widths)}")
        strange = [channel for channel in wanted if not 0 <= channel < widths[name]]
        if strange:
            raise UserError(
                f"channels of group {name!r} must be from 0 to {widths[name] - 1}, but got {strange[0]}; "
                "they are numbered as in the group"
            )
    return {name: sorted(set(chosen.get(name, ()))) if width > 1 else [] for name, width in widths.items()}


def _layer_norm_over(group: ChannelGroup, network: nn.Module) -> bool:
    """Whether a layer norm takes the mean over the channels, so that a zero is not the same as one less."""
    return any(isinstance(network.get_submodule(cut.module), nn.LayerNorm) for cut in group.attributes)


def _cut_one_by_one(
    network: nn.Module, groups: Sequence[ChannelGroup], group: ChannelGroup, wanted: list[int], data: Batches
) -> FloatArray:
    """Return (wanted,) the summed loss of the network that is cut by each of some channels."""
    sums = np.zeros(len(wanted))
    for place, channel in enumerate(wanted):
        rest = [other for other in range(group.width) if other != channel]
        smaller = apply_plan(network, groups, PruningPlan({group.name: rest}))
        with evaluation_mode(smaller):
            sums[place] = sum(_loss_sum(smaller, batch) for batch in data)
    return sums


def _zeroed_one_by_one(replay: "_Replay", group: ChannelGroup, wanted: list[int], data: Batches) -> FloatArray:
    """Return (wanted,) the summed loss of the network in which nothing reads each of some channels."""
    sums = np.zeros(len(wanted))
    readers = _Readers(replay.network, group)
    trusted = len(wanted) > 2 and replay.holds(readers, data[0][0])  # or the proof costs more than it saves
    for batch in data if wanted else ():
        if trusted:
            replay.record(readers.modules, batch[0])
        for place, channel in enumerate(wanted):
            with readers.without([channel]), replay.replaying(trusted):
                sums[place] += _loss_sum(replay.network, batch)
    return sums


def _loss_sum(network: nn.Module, batch: tuple[Tensor, Tensor]) -> float:
    """Return the cross-entropy of a batch, summed over its examples."""
    inputs, labels = batch
    return float(F.cross_entropy(network(inputs.clone()).double(), labels, reduction="sum"))


class _Readers:
    """The layers that read the channels of a group, and the weights they do it by.

    Args:
        network: Their weights are changed in place, and put back.
        group: One of its groups.
    """

    def __init__(self, network: nn.Module, group: ChannelGroup) -> None:
        layers: dict[str, Any] = dict(network.named_modules(remove_duplicate=False))
        self.group = group
        self.modules = {layers[consumer.module] for consumer in group.consumers}
        self._parts = [
            (layers[consumer.module].weight, 1 - output_dim(layers[consumer.module]), consumer)
            for consumer in group.consumers
        ]

    @contextmanager
    def without(self, channels: Sequence[int]) -> Iterator[None]:
        """While it is entered, some channels have zero weights wherever they are read."""
        saved = []
        for weight, dim, consumer in self._parts:  # all are saved before any is zeroed: layers may share a weight
            index = torch.from_numpy(consumer.index[np.isin(consumer.channel, channels)]).to(weight.device)
            saved.append((weight, dim, index, weight.index_select(dim, index)))
        try:
            for weight, dim, index, _ in saved:
                weight.index_fill_(dim, index, 0.0)
            yield
        finally:
            for weight, dim, index, values in saved:
                weight.index_copy_(dim, index, values)


class _Replay:
    """Runs a network from the middle: what ended before some layers began is given out again.

    Modules are taken whole where they can be. What stands between them, in functions, runs each time.

    Args:
        network: The `forward` of its modules is replaced for good.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self._kept: list[tuple[nn.Module, Tensor]] = []  # in the order of the calls
        self._next = math.inf  # place of the next call to answer
        self._ends: set[nn.Module] = set()
        self._recording = False
        for module in network.modules():
            vars(module)["forward"] = partial(self._run, module, module.forward)

    def record(self, ends: set[nn.Module], inputs: Tensor) -> None:
        """Run the network, and keep what modules put out until the first of `ends` begins."""
        self._kept, self._ends, self._recording = [], ends, True
        try:
            self.network(inputs.clone())
        finally:
            self._recording = False

    @contextmanager
    def replaying(self, really: bool = True) -> Iterator[None]:
        """While it is entered, one run on the inputs recorded last begins where the recording ended."""
        self._next = 0 if really else math.inf
        try:
            yield
        finally:
            self._next = math.inf

    def holds(self, readers: _Readers, inputs: Tensor) -> bool:
        """Whether a run from the middle gives, bit for bit, what a whole run gives when nothing reads the group.

        It may not: modules can pass values on behind the network's back, or use the weights of another one.
        """
        self.record(readers.modules, inputs)
        with readers.without(range(readers.group.width)):
            expected = self.network(inputs.clone())
            try:
                with self.replaying():
                    return torch.equal(self.network(inputs.clone()), expected)
            except Exception:  # anything may be raised by a network of which a part did not run
                return False

    def _run(self, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._next < len(self._kept) and self._kept[int(self._next)][0] is module:
            self._next += 1
            return self._kept[int(self._next) - 1][1].clone()  # what comes next may work in place
        self._recording = self._recording and module not in self._ends
        if not self._recording:
            return forward(*args, **kwargs)
        first = len(self._kept)
        output = forward(*args, **kwargs)
        if self._recording and isinstance(output, Tensor):
            self._kept[first:] = [(module, output.clone())]  # in place of what ran inside
        else:
            self._recording = False  # only a tensor can be given out again
        return output


@dataclass(frozen=True)
class Correlation:
    """Agreement of a criterion with the oracle: Spearman's rank correlations in [-1, 1].

    Attributes:
        all: Over all channels of all groups together, for which the scores must be comparable across groups.
        by_group: Within each group. nan where fewer than two channels were measured, or where either ranking is
            constant.
        mean: Of those by group that are not nan; nan where all are.
    """

    all: float
    by_group: dict[str, float]
    mean: float


def rank_correlation(scores: Mapping[str, FloatArray], truth: Mapping[str, OracleLoss]) -> Correlation:
    """Compare a criterion's scores with the absolute changes of the loss; ties share their mean rank.

    Args:
        scores: Group name -> (width,) scores, high = important. Channels with nan are left out.
        truth: From `oracle`, of the same groups. Channels with nan are left out.

    Raises:
        UserError: The groups or their widths are not the same.
    """
    if scores.keys() != truth.keys():
        lone = sorted(scores.keys() ^ truth.keys())
        raise UserError(f"scores and oracle must be of the same groups, but only one of them has {', '.join(lone)}")
    for name, score in scores.items():
        if np.shape(score) != truth[name].change.shape:
            raise UserError(
                f"scores must have one number a channel, but group {name!r} has {len(truth[name].change)} channels "
                f"and scores of shape {np.shape(score)}"
            )
    by_group = {name: _spearman(np.asarray(score), truth[name].magnitude) for name, score in scores.items()}
    numbers = [value for value in by_group.values() if not math.isnan(value)]
    return Correlation(
        all=_spearman(
            np.concatenate([np.zeros(0), *(np.asarray(score) for score in scores.values())]),
            np.concatenate([np.zeros(0), *(truth[name].magnitude for name in scores)]),
        ),
        by_group=by_group,
        mean=sum(numbers) / len(numbers) if numbers else math.nan,
    )


def _spearman(one: FloatArray, other: FloatArray) -> float:
    both = ~(np.isnan(one) | np.isnan(other))
    one, other = one[both], other[both]
    if len(one) < 2 or np.ptp(one) == 0 or np.ptp(other) == 0:
        return math.nan
    return float(spearmanr(one, other).statistic)
