"""The linear algebra behind repair and greedy choice.

A layer computes Y = X_K W_K + X_S W_S + b. With K kept and S removed, the best linear stand-in for X_S given X_K
is X_S ≈ X_K B + c with B = Σ_KK⁻¹ Σ_KS, c = μ_S − μ_K B, and what is lost at the output is tr(W_Sᵀ Σ_S|K W_S),
Σ_S|K = Σ_SS − Σ_SK Σ_KK⁻¹ Σ_KS. All of it follows from the input's mean and second moment. X holds features (see
`layers`), so that a convolution's taps are fitted one by one.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .groups import ChannelGroup, IndexArray
from .layers import FloatArray, features_of, full_size, weight_matrix
from .moments import ConsumerStatistics
from .statistics import Statistics

RIDGE = 1e-4
"""Added to the diagonal of the correlation matrix of X_K: makes dead and duplicate channels harmless."""

SHRINKAGE = 0.05
"""Added likewise, times features / rows: what few rows say of many features is not believed."""

GREEDY_STEPS = 64
"""Most selection steps for one group: a wider group takes several channels a step, those of highest gain."""


@dataclass(frozen=True, eq=False)
class ConsumerProblem:
    """One layer that reads a group, seen as a least-squares problem.

    Attributes:
        moment: (F, F) covariance of the layer's features (second moment where a constant cannot be absorbed).
        weight: (F, F) M = W Wᵀ over the columns of W: how much each direction of the input matters.
        features: For each channel of the group, its features.
    """

    moment: FloatArray
    weight: FloatArray
    features: tuple[IndexArray, ...]


def consumer_problems(network: nn.Module, group: ChannelGroup, statistics: Statistics) -> list[ConsumerProblem]:
    """Set up the problem of every layer that reads `group`."""
    problems = []
    for consumer in group.consumers:
        layer: Any = network.get_submodule(consumer.module)
        stats = statistics.consumers[consumer.module]
        inputs = [consumer.index[consumer.channel == channel] for channel in range(group.width)]
        if not stats.size:
            problems.append(_uncorrelated(layer, stats, inputs))
            continue
        matrix = torch.from_numpy(weight_matrix(layer, layer.weight, stats.size))
        features = tuple(features_of(layer, own, stats.size) for own in inputs)
        constant = layer.bias is not None or consumer.norm is not None
        problems.append(ConsumerProblem(covariance(stats, constant), (matrix @ matrix.T).numpy(), features))
    return problems


def _uncorrelated(layer: Any, stats: ConsumerStatistics, inputs: Sequence[IndexArray]) -> ConsumerProblem:
    """Stand in for a problem without covariance: each channel loses its own variance times its squared weights."""
    size = full_size(layer)
    lost = stats.variance * np.square(weight_matrix(layer, layer.weight, size)).sum(1)
    own = np.diag([float(lost[features_of(layer, each, size)].sum()) for each in inputs])
    return ConsumerProblem(np.eye(len(inputs)), own, tuple(np.array([channel]) for channel in range(len(inputs))))


def covariance(stats: ConsumerStatistics, constant: bool) -> FloatArray:
    """Return Σ where the layer can absorb a constant, else the plain second moment (then c = 0 is optimal)."""
    return stats.covariance if constant else stats.second_moment


def solve_mixing(
    moment: FloatArray,
    kept: IndexArray,
    removed: IndexArray,
    weight: FloatArray | None = None,
    *,
    rows: int | None = None,
) -> FloatArray:
    """Return B = (Σ_KK + ridge)⁻¹ Σ_KS; falls back to a pseudo-inverse with a warning.

    The ridge is `RIDGE` + `SHRINKAGE` · features / rows, in units of each feature's own variance: scaling a feature and
    its weights changes nothing.

    Args:
        moment: (F, F) Σ.
        kept: K.
        removed: S.
        weight: (removed, columns) W_S; when given, B W_S (kept, columns) is returned instead of B.
        rows: Number of rows that Σ was estimated from; None = Σ is exact.
    """
    # in torch throughout: numpy's own BLAS threads, spinning beside PyTorch's, made this 20 times slower
    moments, keep, gone = torch.from_numpy(moment), torch.from_numpy(kept), torch.from_numpy(removed)
    lines = moments.index_select(0, keep)
    block, right = lines.index_select(1, keep), lines.index_select(1, gone)
    scale = block.diagonal().clamp(min=0).sqrt()
    scale = torch.where(scale > 0, 1 / scale, 0.0)[:, None]  # a dead feature takes no part
    block *= scale
    block *= scale.T
    late = weight is not None and weight.shape[1] > len(removed)  # fewer right-hand sides: multiply afterwards
    if weight is not None and not late:
        right = right @ torch.from_numpy(weight)
    block.diagonal().add_(RIDGE + (SHRINKAGE * len(kept) / max(rows, 1) if rows is not None else 0.0))
    factor, failed = torch.linalg.cholesky_ex(block)
    if int(failed):
        warnings.warn(
            f"the least-squares system of {len(kept)} features is singular; its pseudo-inverse is used", stacklevel=2
        )
        solution = torch.linalg.pinv(block, hermitian=True) @ (scale * right)
    else:
        solution = torch.cholesky_solve(scale * right, factor)
    solution *= scale
    return (solution @ torch.from_numpy(weight) if late and weight is not None else solution).numpy()


@dataclass(frozen=True, eq=False)
class GreedyChoice:
    """An order of a group's channels, and what is lost when only the first of them stay.

    Attributes:
        order: (width,) channels, first chosen first.
        residual: (width + 1,) the share of the consumers' input-dependent output, averaged over them, that the best
            linear repair cannot bring back when the first n of `order` stay: from 1 (n = 0) down to 0. Linear
            between the steps where several channels were chosen at once.
    """

    order: IndexArray
    residual: FloatArray


def choose_greedily(problems: Sequence[ConsumerProblem]) -> GreedyChoice:
    """Order channels so that each next one reduces the summed residual of all consumers most.

    Forward selection by a pivoted block Cholesky factorisation: R is the covariance that the channels chosen so far
    cannot explain; choosing channel j lowers tr(M R) by tr(R_jj⁻¹ (R M R)_jj), and R falls by a low-rank update.
    Groups of more than `GREEDY_STEPS` channels choose ceil(width / GREEDY_STEPS) channels a step.
    """
    width = len(problems[0].features)
    states = [_Elimination(problem) for problem in problems]
    at_once = -(-width // GREEDY_STEPS)
    order: list[int] = []
    reached, shares = [0], [1.0]
    while len(order) < width:
        gain = torch.stack([state.gains() for state in states]).sum(0)  # (channels left,)
        left = states[0].channels
        best = left[torch.argsort(gain, descending=True, stable=True)[:at_once].sort().values].tolist()
        best.sort(key=lambda channel: -float(gain[left == channel]))
        order += best
        for state in states:
            state.keep(best)
        reached.append(len(order))
        shares.append(_mean_share(states))
    curve = np.interp(np.arange(width + 1), reached, np.minimum.accumulate(shares))
    return GreedyChoice(np.array(order, dtype=np.int64), curve)


def residual_when(problems: Sequence[ConsumerProblem], kept: Sequence[int] | IndexArray) -> float:
    """Return the relative residual, averaged over consumers, when the channels `kept` stay; in [0, 1].

    Solved directly: tr(M_SS Σ_S|K) / tr(M Σ) over the features of the group.
    """
    shares = []
    for problem in problems:
        own = np.concatenate(problem.features)
        stays = np.isin(own, np.concatenate([problem.features[int(channel)] for channel in kept]))
        moment, weight = problem.moment[np.ix_(own, own)], problem.weight[np.ix_(own, own)]
        whole = float((moment * weight).sum())
        keep, gone = np.flatnonzero(stays), np.flatnonzero(~stays)
        cross = torch.from_numpy(moment[np.ix_(gone, keep)])
        left = torch.from_numpy(moment[np.ix_(gone, gone)]) - cross @ torch.from_numpy(solve_mixing(moment, keep, gone))
        shares.append(float((left * torch.from_numpy(weight[np.ix_(gone, gone)])).sum()) / max(whole, 1e-30))
    return float(np.clip(np.mean(shares), 0.0, 1.0))


def eliminate(problems: Sequence[ConsumerProblem], order: Sequence[int] | IndexArray) -> FloatArray:
    """Return (width + 1,) the residual of `GreedyChoice`, as channels join one by one in the given order."""
    states = [_Elimination(problem) for problem in problems]
    curve = [1.0]
    for channel in order:
        for state in states:
            state.keep([int(channel)])
        curve.append(_mean_share(states))
    return np.minimum.accumulate(curve)


class _Elimination:
    """The part of one consumer's input that the kept channels cannot explain, over the channels not yet kept.

    Other groups' features (a concatenation) are left out, as if they could not stand in for this group's.
    """

    def __init__(self, problem: ConsumerProblem) -> None:
        self.each = max(len(features) for features in problem.features)
        own = np.full((len(problem.features), self.each), -1)  # -1: a feature that is always zero
        for channel, features in enumerate(problem.features):
            own[channel, : len(features)] = features
        flat = torch.from_numpy(own.ravel())
        absent = flat < 0
        self.unexplained = _chosen(torch.from_numpy(problem.moment), flat, absent)  # R
        self.weighted = self.unexplained @ _chosen(torch.from_numpy(problem.weight), flat, absent)  # R M
        self.channels = torch.arange(len(problem.features))
        self.floor = 1e-9 * max(float(self.unexplained.diagonal().max()), 1e-30)
        self.whole = max(float(self.weighted.trace()), 1e-30)

    def residual(self) -> float:
        """Return tr(M R) as a share of what it was at first."""
        return float(self.weighted.trace()) / self.whole

    def gains(self) -> Tensor:
        """Return (channels left,) how much tr(M R) falls when one is kept: tr(R_jj⁻¹ (R M R)_jj)."""
        count, each = len(self.channels), self.each
        if each == 1:
            lowered = (self.weighted * self.unexplained).sum(1)
            return lowered / (self.unexplained.diagonal() + self.floor)
        rows = self.unexplained.reshape(count, each, -1)
        lowered = self.weighted.reshape(count, each, -1) @ rows.transpose(1, 2)  # (count, each, each)
        own = rows.reshape(count, each, count, each).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        own = own + self.floor * torch.eye(each, dtype=own.dtype)
        return torch.linalg.solve(own, lowered).diagonal(dim1=1, dim2=2).sum(1)

    def keep(self, channels: Sequence[int]) -> None:
        """Take what the channels explain out of R and R M, and forget them: a block step of the factorisation."""
        kept = torch.isin(self.channels, torch.tensor(channels))
        features = kept.repeat_interleave(self.each)
        self.channels = self.channels[~kept]
        columns = self.unexplained[:, features]  # (F, S)
        own = columns[features]
        stay = (~features).nonzero().squeeze(1)
        rest = self.unexplained.index_select(0, stay).index_select(1, stay)
        weighted = self.weighted.index_select(0, stay).index_select(1, stay)
        if float(own.trace()) > self.floor:
            own.diagonal().add_(self.floor)
            columns = columns[~features]
            factor, failed = torch.linalg.cholesky_ex(own)
            inverse = torch.linalg.pinv(own, hermitian=True) if int(failed) else torch.cholesky_inverse(factor)
            explained = columns @ inverse  # (F, S)
            rest.addmm_(explained, columns.T, alpha=-1)
            weighted.addmm_(explained, self.weighted[features][:, stay], alpha=-1)
        self.unexplained, self.weighted = rest, weighted


def _chosen(matrix: Tensor, index: Tensor, absent: Tensor) -> Tensor:
    """Return the rows and columns `index` of a matrix, zero where absent; float64."""
    value = matrix.index_select(0, index.clamp(min=0)).index_select(1, index.clamp(min=0))
    value[absent] = 0.0
    value[:, absent] = 0.0
    return value


def _mean_share(states: Sequence[_Elimination]) -> float:
    return float(np.clip(np.mean([state.residual() for state in states]), 0.0, 1.0))
