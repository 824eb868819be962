"""The linear algebra behind repair and greedy choice.

A layer computes Y = X_K W_K + X_S W_S + b. With K kept and S removed, the best linear stand-in for X_S given X_K
is X_S ≈ X_K B + c with B = Σ_KK⁻¹ Σ_KS, c = μ_S − μ_K B, and what is lost at the output is tr(W_Sᵀ Σ_S|K W_S),
Σ_S|K = Σ_SS − Σ_SK Σ_KK⁻¹ Σ_KS. All of it follows from the input's mean and second moment.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .groups import ChannelGroup
from .statistics import ConsumerStatistics, FloatArray, Statistics

RELATIVE_RIDGE = 1e-3
"""Added to the diagonal of Σ_KK, as a share of its mean: makes dead and duplicate channels harmless."""


@dataclass(frozen=True, eq=False)
class ConsumerProblem:
    """One layer that reads a group, seen as a least-squares problem.

    Attributes:
        moment: (F, F) covariance of the layer's input (second moment where a constant cannot be absorbed).
        weight: (F, F) M = W Wᵀ over the layer's outputs and taps: how much each direction of the input matters.
        features: For each channel of the group, its Gram features.
    """

    moment: FloatArray
    weight: FloatArray
    features: tuple[NDArray[np.int64], ...]


def weight_matrix(layer: Any, weight: Tensor, features: int) -> FloatArray:
    """View a layer's weight as (features, outputs × taps or shared positions) float64.

    Args:
        layer: Convolution (not grouped) or linear layer.
        weight: Its weight (or one of the same layout with fewer outputs or inputs).
        features: Number of Gram features: input channels, or fewer than the input features when positions share.
    """
    value = weight.detach().double().cpu()
    if isinstance(layer, nn.Linear):
        matrix = value.reshape(value.shape[0], features, -1)  # (out, C·P) -> (out, C, P)
        return matrix.transpose(0, 1).reshape(features, -1).numpy()
    if not layer.transposed:
        value = value.transpose(0, 1)  # (out, in, …) -> (in, out, …)
    return value.reshape(features, -1).numpy()


def consumer_problems(network: nn.Module, group: ChannelGroup, statistics: Statistics) -> list[ConsumerProblem]:
    """Set up the problem of every layer that reads `group`."""
    problems = []
    for consumer in group.consumers:
        layer: Any = network.get_submodule(consumer.module)
        stats = statistics.consumers[consumer.module]
        size = len(stats.mean)
        matrix = weight_matrix(layer, layer.weight, size)
        shared = input_width(layer) // size
        features = _features_by_channel(consumer.channel, consumer.index // shared, group.width)
        constant = layer.bias is not None or consumer.norm is not None
        problems.append(ConsumerProblem(covariance(stats, constant), matrix @ matrix.T, features))
    return problems


def covariance(stats: ConsumerStatistics, constant: bool) -> FloatArray:
    """Return Σ where the layer can absorb a constant, else the plain second moment (then c = 0 is optimal)."""
    return stats.covariance if constant else stats.second_moment


def input_width(layer: Any) -> int:
    """Return the number of input features or channels of a layer."""
    return int(layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels)


def output_dim(layer: Any) -> int:
    """Return the dimension of a layer's weight that counts its outputs."""
    return 1 if getattr(layer, "transposed", False) else 0


def solve_mixing(
    moment: FloatArray,
    kept: NDArray[np.int64],
    removed: NDArray[np.int64],
    weight: FloatArray | None = None,
) -> FloatArray:
    """Return B = (Σ_KK + ridge)⁻¹ Σ_KS; falls back to a pseudo-inverse with a warning.

    Args:
        moment: (F, F) Σ.
        kept: K.
        removed: S.
        weight: (removed, columns) W_S; when given, B W_S (kept, columns) is returned instead of B.
    """
    # in torch throughout: numpy's own BLAS threads, spinning beside PyTorch's, made this 20 times slower
    moments, keep, gone = torch.from_numpy(moment), torch.from_numpy(kept), torch.from_numpy(removed)
    rows = moments.index_select(0, keep)
    block, right = rows.index_select(1, keep), rows.index_select(1, gone)
    late = weight is not None and weight.shape[1] > len(removed)  # fewer right-hand sides: multiply afterwards
    if weight is not None and not late:
        right = right @ torch.from_numpy(weight)
    ridge = RELATIVE_RIDGE * max(float(block.trace()) / len(kept), 1e-30)
    block.diagonal().add_(ridge)
    factor, failed = torch.linalg.cholesky_ex(block)
    if int(failed):
        warnings.warn(
            f"the least-squares system of {len(kept)} features is singular; its pseudo-inverse is used", stacklevel=2
        )
        solution = torch.linalg.pinv(block, hermitian=True) @ right
    else:
        solution = torch.cholesky_solve(right, factor)
    return (solution @ torch.from_numpy(weight) if late and weight is not None else solution).numpy()


GREEDY_STEPS = 512
"""Most selection steps for one group: a wider group takes several channels a step, those of highest gain."""


def greedy_order(problems: Sequence[ConsumerProblem]) -> NDArray[np.int64]:
    """Order channels so that each next one reduces the summed residual of all consumers most.

    Forward selection by a pivoted block Cholesky factorisation: R is the covariance that the channels chosen so far
    cannot explain; choosing channel j lowers tr(M R) by tr(R_jj⁻¹ (R M R)_jj), and R falls by a low-rank update.
    Groups of more than `GREEDY_STEPS` channels choose ceil(width / GREEDY_STEPS) channels a step.

    Returns:
        (width,) channels, first chosen first.
    """
    width = len(problems[0].features)
    states = [_Elimination(problem) for problem in problems]
    left = np.ones(width, dtype=bool)
    order: list[int] = []
    at_once = -(-width // GREEDY_STEPS)
    while len(order) < width:
        gain = np.sum([state.gains() for state in states], axis=0)
        gain[~left] = -np.inf
        best = [int(channel) for channel in np.argsort(-gain, kind="stable")[:at_once] if left[channel]]
        left[best] = False
        order += best
        for state in states:
            state.keep(best)
    return np.array(order, dtype=np.int64)


def residual_when(problems: Sequence[ConsumerProblem], kept: Sequence[int] | NDArray[np.int64]) -> float:
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
        mixing = solve_mixing(moment, keep, gone)
        left = moment[np.ix_(gone, gone)] - moment[np.ix_(gone, keep)] @ mixing
        shares.append(float((left * weight[np.ix_(gone, gone)]).sum()) / max(whole, 1e-30))
    return float(np.clip(np.mean(shares), 0.0, 1.0))


def eliminate(problems: Sequence[ConsumerProblem], order: Sequence[int] | NDArray[np.int64]) -> FloatArray:
    """Return (width + 1,) the relative residual, summed over consumers, as channels join in the given order."""
    states = [_Elimination(problem) for problem in problems]
    total = [max(state.residual(), 1e-30) for state in states]
    curve = np.empty(len(order) + 1)
    curve[0] = 1.0
    for place, channel in enumerate(order):
        for state in states:
            state.keep([int(channel)])
        shares = [state.residual() / whole for state, whole in zip(states, total, strict=True)]
        curve[place + 1] = float(np.clip(np.mean(shares), 0.0, 1.0))
    return np.minimum.accumulate(curve)


class _Elimination:
    """The part of one consumer's input that the kept channels cannot explain.

    Other groups' features (a concatenation) count as kept: the question is what this group's removal loses.
    """

    def __init__(self, problem: ConsumerProblem) -> None:
        self.features = problem.features
        own = np.concatenate(problem.features)
        place = np.full(len(problem.moment), -1)
        place[own] = np.arange(len(own))
        self.local = [place[features] for features in problem.features]
        self.remaining = problem.moment[np.ix_(own, own)].copy()
        self.weight = problem.weight[np.ix_(own, own)]
        self.floor = 1e-9 * max(float(np.diag(self.remaining).max(initial=0.0)), 1e-30)
        self.product = self.weight @ self.remaining  # M R

    def residual(self) -> float:
        return float(np.trace(self.product))

    def gains(self) -> FloatArray:
        """Return, per channel, how much tr(M R) falls when it is kept: tr(R_jj⁻¹ (R M R)_jj) over its features."""
        if any(len(local) != len(self.local[0]) for local in self.local):
            return np.array([self._block_gains(local[None])[0] for local in self.local])
        return self._block_gains(np.stack(self.local))

    def _block_gains(self, local: NDArray[np.int64]) -> FloatArray:
        """Gains of equally large blocks; local: (blocks, T) features."""
        if local.shape[1] == 1:
            diagonal = np.diagonal(self.remaining)[local[:, 0]]
            weighted = np.einsum("fb,fb->b", self.remaining, self.product)[local[:, 0]]
            return np.where(diagonal > self.floor, weighted / np.maximum(diagonal, self.floor), 0.0)
        rows = self.remaining[local]  # (blocks, T, F)
        weighted = np.einsum("btf,bfs->bts", rows, self.product.T[local].transpose(0, 2, 1), optimize=True)
        own = np.take_along_axis(rows, local[:, None, :].repeat(local.shape[1], 1), axis=2)  # (blocks, T, T)
        return np.einsum("bts,bst->b", np.linalg.pinv(own, rcond=1e-9, hermitian=True), weighted)

    def keep(self, channels: Sequence[int]) -> None:
        """Take what the channels explain out of R and M R: a block step of the Cholesky factorisation."""
        local = np.concatenate([self.local[channel] for channel in channels])
        columns = self.remaining[:, local]  # (F, T)
        own = columns[local]
        if float(np.trace(own)) <= self.floor:
            return
        explained = np.linalg.pinv(own, rcond=1e-9, hermitian=True) @ columns.T  # (T, F)
        self.product -= self.product[:, local] @ explained
        self.remaining -= columns @ explained


def _features_by_channel(
    channel: NDArray[np.int64], feature: NDArray[np.int64], width: int
) -> tuple[NDArray[np.int64], ...]:
    return tuple(np.unique(feature[channel == place]) for place in range(width))
