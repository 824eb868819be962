"""Repair a cut network without training.

All methods in one form (see `least_squares`): the removed inputs are replaced by X_S ≈ X_K B + c, so that
W_K ← W_K + B W_S and b ← b + c W_S, in every layer that read a removed channel. A layer without bias keeps the
constant in the running mean of the batch norm behind it, where there is one.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .data_free import data_free_substitutions
from .errors import UserError, closest
from .groups import ChannelGroup, IndexArray
from .layers import FloatArray, as_weight, features_of, full_size, input_width, output_dim, taps, weight_matrix
from .least_squares import covariance, solve_mixing
from .merging import Substitution, find_substitutions
from .moments import ConsumerStatistics
from .plan import PruningPlan
from .statistics import Statistics
from .surgery import kept_entries, named_tensors


@dataclass(frozen=True, eq=False)
class Repair:
    """What a layer gains for the inputs it lost.

    Attributes:
        weight: (kept, columns) B W_S, added to the weights of the kept inputs; None for zero.
        constant: (removed inputs,) c, what each input that leaves is on average beyond its stand-in. None: the
            measured means tell it, where there are any.
    """

    weight: FloatArray | None
    constant: FloatArray | None = None


@dataclass(frozen=True, eq=False)
class Loss:
    """What a layer lost.

    Attributes:
        kept: Features (see `layers`) that stay; input features where the method reads no statistics.
        removed: Features that leave.
        weight: (removed, columns) W_S; columns = outputs × whatever shares a feature.
        constant: Whether the layer can absorb a constant.
        moments: Of the layer's whole input; None for a method that needs no data.
        substitutions: From the weights, one for each group with channels the layer read; only for such a method.
    """

    kept: IndexArray
    removed: IndexArray
    weight: FloatArray
    constant: bool
    moments: ConsumerStatistics | None = None
    substitutions: Sequence[Substitution] = ()

    @property
    def statistics(self) -> ConsumerStatistics:
        """Moments of the layer's whole input, for methods that need data."""
        if self.moments is None:
            raise RuntimeError("this repair reads statistics: register it with needs_data=True")
        return self.moments


Substitute = Callable[[nn.Module, Sequence[ChannelGroup], Mapping[str, Sequence[int]]], dict[str, list[Substitution]]]


@dataclass(frozen=True)
class Compensation:
    """A repair method.

    Attributes:
        name: As typed by users.
        repair: What a layer gains for what it lost; None leaves the cut as it is.
        description: One sentence.
        needs_data: Whether `Loss.statistics` is read, else `Loss.substitutions`. Such a method keeps the mean of
            every output, too.
        substitutions: (network, groups, plan) -> what `Loss.substitutions` holds, by layer; for a method without data.
    """

    name: str
    repair: Callable[[Loss], Repair] | None
    description: str
    needs_data: bool = True
    substitutions: Substitute = find_substitutions


def _fold_mean(loss: Loss) -> Repair:
    return Repair(None)


def _least_squares(loss: Loss) -> Repair:
    stats = loss.statistics
    if not stats.size:
        warnings.warn(
            f"a layer reads {len(stats.mean)} features, too many for least squares, and its positions are not even: "
            "only the means are kept",
            stacklevel=2,
        )
        return Repair(None)
    moment = covariance(stats, loss.constant)
    return Repair(solve_mixing(moment, loss.kept, loss.removed, loss.weight, rows=stats.rows))


def _merge(loss: Loss) -> Repair:
    weight, constant = np.zeros((len(loss.kept), loss.weight.shape[1])), np.zeros(len(loss.removed))
    for item in loss.substitutions:
        row, used = np.searchsorted(loss.removed, item.feature), item.ratio > 0
        constant[row] = item.constant
        source = np.searchsorted(loss.kept, item.source[used])
        np.add.at(weight, source, item.ratio[used, None] * loss.weight[row[used]])
    return Repair(weight, constant)


COMPENSATIONS: dict[str, Compensation] = {
    record.name: record
    for record in (
        Compensation(
            "delete", None, "remove and repair nothing (the published variant of most methods)", needs_data=False
        ),
        Compensation("fold_mean", _fold_mean, "put the removed channels' mean into the next layer's bias"),
        Compensation(
            "merge",
            _merge,
            "most similar channel that stays stands in, scaled; needs no data (Srinivas & Babu 2015, Kim et al. 2020)",
            needs_data=False,
        ),
        Compensation(
            "data_free",
            _merge,
            "merge in the order of saliency, chain into channels that stay; needs no data (Srinivas & Babu 2015)",
            needs_data=False,
            substitutions=data_free_substitutions,
        ),
        Compensation(
            "data_free_weights",
            _merge,
            "the same by the distance of weights alone, for layers whose biases are small (ours); needs no data",
            needs_data=False,
            substitutions=partial(data_free_substitutions, bias=False),
        ),
        Compensation("least_squares", _least_squares, "best linear stand-in from the channels that stay"),
    )
}


def get_compensation(name: str) -> Compensation:
    """Return the compensation called `name`; an unknown name is a `UserError` naming the nearest."""
    if name not in COMPENSATIONS:
        raise UserError(f"compensation must be a known name, but got {name!r}{closest(name, COMPENSATIONS)}")
    return COMPENSATIONS[name]


def compensate(
    smaller: nn.Module,
    network: nn.Module,
    groups: Sequence[ChannelGroup],
    plan: PruningPlan,
    statistics: Statistics | None,
    method: str = "least_squares",
) -> None:
    """Repair `smaller` in place.

    Args:
        smaller: What `apply_plan(network, groups, plan)` returned.
        network: The network before the cut, untouched.
        groups: Its groups.
        plan: The plan that was applied.
        statistics: `measure` of `network`, with second moments; None will do where the method needs no data.
        method: Name from `COMPENSATIONS`.
    """
    record = get_compensation(method)
    repair = record.repair
    if repair is None:
        return
    plan = plan.completed(groups)
    tensors = named_tensors(network)
    entries = kept_entries(groups, plan, tensors)
    before = dict(network.named_modules(remove_duplicate=False))
    after = dict(smaller.named_modules(remove_duplicate=False))
    measured = statistics.consumers if record.needs_data and statistics is not None else {}
    substitutions = {} if record.needs_data else record.substitutions(network, groups, plan)
    refitted: set[int] = set()
    losses: list[_Lost] = []
    for name, removed_inputs, norm in _shortened(groups, plan):
        if record.needs_data and name not in measured:
            raise UserError(f"compensation {method!r} needs second moments; call measure(..., grams=True)")
        outputs = entries.get(f"{name}.weight", {}).get(output_dim(before[name]))
        lost = _Lost(before[name], after[name], removed_inputs, outputs, norm and after[norm], measured.get(name))
        losses.append(lost)
        lost.refit(
            repair, substitutions.get(name, ()), write=id(lost.new.weight) not in refitted
        )  # a weight of two layers has one fit, the first's
        refitted.add(id(lost.new.weight))
    _restore_means(losses)


def _shortened(groups: Sequence[ChannelGroup], plan: PruningPlan) -> Iterable[tuple[str, IndexArray, str | None]]:
    """Yield (layer, removed input features, norm behind it) of every layer that lost inputs, over all groups."""
    removed: dict[str, list[IndexArray]] = {}
    norms: dict[str, str | None] = {}
    for group in groups:
        leaves = group.leaving(plan[group.name])
        if not leaves.any():
            continue
        for consumer in group.consumers:
            removed.setdefault(consumer.module, []).append(consumer.index[leaves[consumer.channel]])
            norms[consumer.module] = consumer.norm
    for name, parts in removed.items():
        yield name, np.unique(np.concatenate(parts)), norms[name]


class _Lost:
    """One layer that lost inputs.

    Args:
        old: The layer before the cut.
        new: The layer after it.
        removed_inputs: (n,) inputs that left.
        outputs: (m,) outputs that stay; None = all.
        norm: The batch norm that can hold a constant, if any.
        moments: Of its input; None for a method that needs no data.
    """

    def __init__(
        self,
        old: Any,
        new: Any,
        removed_inputs: IndexArray,
        outputs: Tensor | None,
        norm: Any,
        moments: ConsumerStatistics | None,
    ) -> None:
        self.old, self.new, self.removed_inputs, self.moments = old, new, removed_inputs, moments
        self.weight = old.weight
        if outputs is not None:
            self.weight = old.weight.index_select(output_dim(old), outputs.to(old.weight.device))
        running = None if norm is None else getattr(norm, "running_mean", None)
        self.target: Tensor | None = running if new.bias is None else new.bias  # where a constant goes
        self.sign = -1.0 if new.bias is None else 1.0
        self._constant: FloatArray | None = None

    def refit(self, repair: Callable[[Loss], Repair], substitutions: Sequence[Substitution], *, write: bool) -> None:
        """Write what the weights gain."""
        moments = self.moments
        size = (moments.size if moments is not None else 0) or input_width(self.old)
        removed = features_of(self.old, self.removed_inputs, size)
        kept = np.setdiff1d(np.arange(size), removed)
        matrix = weight_matrix(self.old, self.weight, size)  # (features, columns)
        constant = self.target is not None
        gained = repair(Loss(kept, removed, matrix[removed], constant, moments, substitutions))
        self._constant = gained.constant
        if gained.weight is not None and write:
            with torch.no_grad():
                value = torch.from_numpy(matrix[kept] + gained.weight)
                self.new.weight.copy_(as_weight(self.old, value, self.new.weight))

    def shift(self) -> Tensor:
        """Return (outputs,) the constant that the outputs miss, given the weights as they are now."""
        if self.moments is None:
            return _constants_lost(self.old, self.weight, self._constant, self.removed_inputs)
        return _mean_lost(self.old, self.weight, self.new, self.moments, self.removed_inputs)


def _restore_means(losses: Sequence[_Lost]) -> None:
    """Add the constants that the layers miss; a bias that several layers share gets their mean."""
    shifts: dict[int, tuple[Tensor, list[Tensor]]] = {}
    for lost in losses:
        if lost.target is not None:
            shifts.setdefault(id(lost.target), (lost.target, []))[1].append(lost.sign * lost.shift())
    with torch.no_grad():
        for target, several in shifts.values():
            target.add_(torch.stack(several).mean(0).to(target))


def _mean_lost(old: Any, weight: Tensor, new: Any, moments: ConsumerStatistics, removed_inputs: IndexArray) -> Tensor:
    """Return (outputs,) how much of every output's mean the new weights miss, tap by tap and position by position."""
    before, after = (
        torch.from_numpy(weight_matrix(old, value, full_size(layer)))
        for value, layer in ((weight, old), (new.weight, new))
    )
    mean = torch.from_numpy(moments.mean)
    kept = np.setdiff1d(np.arange(len(mean)), features_of(old, removed_inputs, len(mean)))
    return mean @ before - mean[torch.from_numpy(kept)] @ after


def _constants_lost(old: Any, weight: Tensor, constant: FloatArray | None, removed_inputs: IndexArray) -> Tensor:
    """Return (outputs,) what constants at the removed inputs put out, away from the border of a map."""
    matrix = torch.from_numpy(weight_matrix(old, weight, full_size(old)))
    if constant is None:
        return matrix.new_zeros(matrix.shape[1])
    each = taps(old)
    rows = torch.from_numpy(features_of(old, removed_inputs, len(matrix)))
    values = torch.from_numpy(constant.repeat(each))
    meeting = math.prod(old.stride) if getattr(old, "transposed", False) else 1  # only every so many-th tap of an input
    return values @ matrix[rows] / meeting
