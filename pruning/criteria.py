"""Rank the channels of a group from its statistics. High score = keep.

One signature for all: `(group, context) -> (width,) scores`; the registry's one-sentence descriptions are the
documentation users see.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import nn

from .errors import UserError, closest
from .groups import ChannelGroup
from .layers import FloatArray
from .least_squares import ConsumerProblem, GreedyChoice, choose_greedily, consumer_problems, eliminate
from .saliency import merge_problem, merge_sequence
from .statistics import GroupStatistics, Statistics


@dataclass(frozen=True, eq=False)
class RankingContext:
    """What a criterion may look at.

    Attributes:
        network: The network the statistics were measured on.
        statistics: From `measure`.
        seed: For criteria that draw random numbers.
    """

    network: nn.Module
    statistics: Statistics
    seed: int = 0
    _choices: dict[str, GreedyChoice] = field(default_factory=dict, init=False, repr=False)

    def of(self, group: ChannelGroup) -> GroupStatistics:
        """Return the statistics of one group."""
        return self.statistics.groups[group.name]

    def problems(self, group: ChannelGroup) -> list[ConsumerProblem]:
        """Return the least-squares problem of every layer that reads the group."""
        return consumer_problems(self.network, group, self.statistics)

    def greedy_choice(self, group: ChannelGroup) -> GreedyChoice:
        """Return the order of the criterion "least_squares" and what each width loses; worked out once."""
        if group.name not in self._choices:
            self._choices[group.name] = choose_greedily(self.problems(group))
        return self._choices[group.name]


Score = Callable[[ChannelGroup, RankingContext], FloatArray]


@dataclass(frozen=True)
class Criterion:
    """A way to rank channels.

    Attributes:
        name: As typed by users.
        score: (group, context) -> (width,) scores, high = keep.
        description: One sentence with its source.
        needs_relu: Whether it is undefined where no ReLU follows.
        needs_norm: Whether it is undefined where no batch norm with weights follows.
        needs_gradients: Whether it reads statistics that only a backward pass tells.
        needs_moments: Whether it reads the second moments of the layers' inputs.
    """

    name: str
    score: Score
    description: str
    needs_relu: bool = False
    needs_norm: bool = False
    needs_gradients: bool = False
    needs_moments: bool = False


def _apoz(group: ChannelGroup, context: RankingContext) -> FloatArray:
    """1 − APoZ_c, with APoZ_c = Σ_n Σ_m 1[z_ncm = 0] / (N · M) over N examples and M positions (Hu et al. 2016)."""
    apoz = context.of(group).apoz
    if apoz is None:
        raise UserError(
            f"criterion 'apoz' needs a ReLU behind each group, but none follows {group.name!r}; "
            "use 'taylor_2017', 'l2' or 'least_squares'"
        )
    return 1.0 - apoz


def _mean_activation(group: ChannelGroup, context: RankingContext) -> FloatArray:
    """Σ_n Σ_m z_ncm / (N · M), the mean activation (as compared in Molchanov et al. 2017)."""
    return context.of(group).mean_activation


def _taylor_2017(group: ChannelGroup, context: RankingContext) -> FloatArray:
    """Θ_c = mean over examples of |Σ_m ∂loss/∂z_cm z_cm / M| (Molchanov et al. 2017).

    The paper divides by the layer's Euclidean norm to compare layers, see `normalised_scores`.
    """
    return _measured(context.of(group).taylor_2017)


def _taylor_2019(group: ChannelGroup, context: RankingContext) -> FloatArray:
    """Mean over minibatches of (∂L/∂gate_c)², the gate being one number that multiplies channel c (Molchanov 2019).

    ∂L/∂gate_c = Σ_n Σ_m ∂L/∂z_ncm z_ncm, of the mean loss L of a minibatch; not normalised by layer.
    """
    return _measured(context.of(group).taylor_2019)


def _l1(group: ChannelGroup, context: RankingContext) -> FloatArray:
    """Σ |w| over the weights that produce the channel (Li et al. 2017)."""
    return context.of(group).l1


def _l2(group: ChannelGroup, context: RankingContext) -> FloatArray:
    """√(Σ w²) over the weights that produce the channel."""
    return context.of(group).l2


def _bn_scale(group: ChannelGroup, context: RankingContext) -> FloatArray:
    """Σ |γ_c| over the batch norms that scale the channel, one in a plain chain (Liu et al. 2017)."""
    modules = dict(context.network.named_modules(remove_duplicate=False))
    scores, found = np.zeros(group.width), False
    for piece in group.slices:
        name, _, tensor = piece.tensor.rpartition(".")
        norm = modules.get(name)
        if tensor == "weight" and isinstance(norm, nn.modules.batchnorm._BatchNorm):
            found = True
            np.add.at(scores, piece.channel, norm.weight.detach().double().abs().cpu().numpy()[piece.index])
    if not found:
        raise UserError(
            "criterion 'bn_scale' needs a batch norm with weights behind each group, but none follows "
            f"{group.name!r}; use 'l2', 'taylor_2017' or 'least_squares'"
        )
    return scores


def _least_squares(group: ChannelGroup, context: RankingContext) -> FloatArray:
    """Place in a greedy choice, in (0, 1], 1 for the channel chosen first (ours).

    Each next channel lowers Σ tr(W_Sᵀ Σ_S|K W_S) most, summed over the layers that read the group: the squared error
    that the best affine repair from the kept inputs K leaves of the others S.
    """
    order = context.greedy_choice(group).order
    scores = np.empty(group.width)
    scores[order] = np.arange(group.width, 0, -1) / group.width
    return scores


def _data_free(group: ChannelGroup, context: RankingContext) -> FloatArray:
    """Place in the order of merges, in (0, 1], the smallest for the channel that leaves first (Srinivas & Babu 2015).

    Only weights are read. With the compensation "data_free" any number of channels leaves as published.
    """
    scores = np.ones(group.width)
    removed = merge_sequence(merge_problem(context.network, group)).removed
    scores[removed] = np.arange(1, len(removed) + 1) / group.width
    return scores


def _random(group: ChannelGroup, context: RankingContext) -> FloatArray:
    """Uniform in [0, 1), from the seed and the group's name."""
    digest = int.from_bytes(hashlib.sha256(group.name.encode()).digest()[:8], "little")
    return np.random.default_rng([context.seed, digest]).random(group.width)


def _measured(scores: FloatArray | None) -> FloatArray:
    if scores is None:
        raise UserError("a Taylor criterion needs statistics with gradients; call measure(..., gradients=True)")
    return scores


CRITERIA: dict[str, Criterion] = {
    record.name: record
    for record in (
        Criterion("apoz", _apoz, "fewest zeros after the ReLU stay (Hu et al. 2016, APoZ)", needs_relu=True),
        Criterion("mean_activation", _mean_activation, "largest mean activation stays (Molchanov et al. 2017)"),
        Criterion(
            "taylor_2017",
            _taylor_2017,
            "largest |mean gradient × activation| stays (Molchanov et al. 2017)",
            needs_gradients=True,
        ),
        Criterion(
            "taylor_2019",
            _taylor_2019,
            "largest squared gradient × activation stays (Molchanov et al. 2019)",
            needs_gradients=True,
        ),
        Criterion("l1", _l1, "largest sum of absolute weights stays (Li et al. 2017)"),
        Criterion("l2", _l2, "largest Euclidean weight norm stays"),
        Criterion(
            "bn_scale", _bn_scale, "largest |γ| of the batch norm behind stays (Liu et al. 2017)", needs_norm=True
        ),
        Criterion(
            "least_squares",
            _least_squares,
            "greedy choice by what the next layers lose after repair (ours)",
            needs_moments=True,
        ),
        Criterion(
            "data_free", _data_free, "one of two nearly equal channels leaves, needs no data (Srinivas & Babu 2015)"
        ),
        Criterion("random", _random, "a random choice that depends on the seed and the group's name only"),
    )
}


def get_criterion(name: str) -> Criterion:
    """Return the criterion called `name`.

    Raises:
        UserError: Unknown name; the nearest one is named.
    """
    if name not in CRITERIA:
        raise UserError(f"criterion must be a known name, but got {name!r}{closest(name, CRITERIA)}")
    return CRITERIA[name]


def rank_channels(
    criterion: str, groups: Sequence[ChannelGroup], context: RankingContext
) -> dict[str, NDArray[np.int64]]:
    """Order every group's channels from most to least important.

    Args:
        criterion: Name from `CRITERIA`.
        groups: Channel groups.
        context: Network and statistics.

    Returns:
        group name -> (width,) int64 channels, most important first; ties keep the lower index first.
    """
    orders = {}
    for group in groups:
        orders[group.name] = np.argsort(-_finite_scores(criterion, group, context), kind="stable")
    return orders


def _finite_scores(criterion: str, group: ChannelGroup, context: RankingContext) -> FloatArray:
    scores = get_criterion(criterion).score(group, context)
    if not np.isfinite(scores).all():
        raise UserError(f"scores must be finite, but criterion {criterion!r} gave NaN for group {group.name!r}")
    return scores


NORMS = ("l2", "mean", "none")


def normalised_scores(
    criterion: str, groups: Sequence[ChannelGroup], context: RankingContext, norm: str = "l2"
) -> dict[str, FloatArray]:
    """Score every channel so that groups can be compared with each other.

    Args:
        criterion: Name from `CRITERIA`.
        groups: Channel groups.
        context: Network and statistics.
        norm: What a group's scores are divided by: "l2", their Euclidean norm (Molchanov et al. 2017, the layer-wise
            norm); "mean", their mean absolute value; "none" leaves what the criterion gives.

    Returns:
        group name -> (width,) scores, high = keep; a group whose scores are all 0 keeps them.

    Raises:
        UserError: Unknown criterion or norm, or scores that are not finite.
    """
    if norm not in NORMS:
        raise UserError(f"norm must be a known name, but got {norm!r}{closest(norm, NORMS)}")
    result = {}
    for group in groups:
        scores = _finite_scores(criterion, group, context)
        size = {"l2": np.linalg.norm(scores), "mean": np.abs(scores).mean(), "none": 1.0}[norm]
        result[group.name] = scores / (size or 1.0)
    return result


def residual_curve(group: ChannelGroup, context: RankingContext, order: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the relative least-squares residual at the group's consumers when the first n of `order` stay.

    Args:
        group: The group.
        context: Network and statistics with second moments.
        order: (width,) channels, most important first.

    Returns:
        (width + 1,) values in [0, 1], from 1 (nothing stays) down to 0 (everything stays): the share of the
        consumers' input-dependent output that the best linear repair cannot bring back.
    """
    return eliminate(context.problems(group), order)
