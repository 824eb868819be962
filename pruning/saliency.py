"""Which channels are nearly equal, and in what order they may be merged, from the weights alone.

Srinivas & Babu 2015 (arXiv 1507.06149). Channel k computes h_k = ReLU(w_k·x + b_k); with α_k = ‖w_k‖, ŵ = w/α and
b̂ = b/α, and a_k its outgoing weights, what the next layer may lose when j leaves and i takes over its weights is

    s_ij = ⟨(α_j a_j)²⟩_n ‖ε_ij‖²,   ‖ε_ij‖ = ‖ŵ_i − ŵ_j‖ / ‖ŵ_i + ŵ_j‖ + |b̂_i − b̂_j| / |b̂_i + b̂_j|

averaged over the outputs n that read the group. Merging adds α_j/α_i · a_j to a_i, so that α_i a_i grows by α_j a_j and
the distances stay: after a merge only column i changes, and what several merges in a chain did is one factor,
α_j/α of the channel at its end.

Published for one linear layer that linear layers read through a ReLU (`serves_published`). Ours, for the rest: batch
norm is folded into w and b; the squares of a kernel's taps, and of the positions behind a flatten, are summed; layers
whose outputs are summed count as one with their weights side by side, biases with the Euclidean norm; depthwise
convolutions and batch norms in front of the readers are further factors of α with a distance that adds to ε.
Where batch norm tells the mean, a constant keeps it (see `merging`); without batch norm there is none, as published.

A channel without incoming weights (α_j = 0) is constant: it leaves alone, and none may merge into it. That costs
nothing where its value is 0 or goes into the readers' biases, else its squared effect ⟨a_j²⟩ value².
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .affine import Stage, activation_of, by_channel, compare, gram, norm_stage, norms_behind, stages_of
from .errors import UserError
from .groups import ChannelGroup, IndexArray
from .layers import FloatArray, output_dim

NOBODY = -1
"""Stands for the channel that takes over where none does."""


@dataclass(frozen=True, eq=False)
class MergeProblem:
    """All that the order of merges depends on, for one group.

    Attributes:
        distance2: (width, width) ‖ε_ij‖² >= 0 between the one that stays (row) and the one that leaves (column);
            infinite where i cannot stand in for j, and on the diagonal.
        outgoing: (width, width) ⟨α_i a_i α_j a_j⟩_n, whose diagonal are the mean squares.
        alone: (width,) what it costs that j leaves without a stand-in, infinite where that is not known.
    """

    distance2: FloatArray
    outgoing: FloatArray
    alone: FloatArray

    @property
    def width(self) -> int:
        """Number of channels."""
        return len(self.alone)

    def matrix(self) -> FloatArray:
        """Return (width, width) s_ij >= 0 with an infinite diagonal."""
        found = np.where(
            np.isfinite(self.alone), self.alone[None, :], _times(np.diag(self.outgoing)[None, :], self.distance2)
        )
        np.fill_diagonal(found, np.inf)
        return found


@dataclass(frozen=True, eq=False)
class MergeSequence:
    """Which channels leave, one after another.

    Attributes:
        removed: (n,) channels, the first to leave first.
        kept_into: (n,) the channel that takes over from each, present at that step; `NOBODY` where none does.
        saliency: (n,) s_ij of each step, >= 0; infinite where no step of finite saliency was left.
    """

    removed: IndexArray
    kept_into: IndexArray
    saliency: FloatArray

    def ends(self) -> IndexArray:
        """Return (n,) for each that left the channel at the end of its chain, which stays, or `NOBODY`."""
        end: dict[int, int] = {}
        for gone, into in zip(self.removed[::-1].tolist(), self.kept_into[::-1].tolist(), strict=True):
            end[gone] = end.get(into, into)
        return np.array([end[gone] for gone in self.removed.tolist()], dtype=np.int64)


def merge_problem(network: nn.Module, group: ChannelGroup, *, bias: bool = True) -> MergeProblem:
    """Work out distances and outgoing weights of one group; no data is read.

    Args:
        network: The network, not changed.
        group: One of its groups.
        bias: Whether biases count in ‖ε‖, as published. Where they are small beside the weights, their ratio is noise.
    """
    stages, loose = stages_of(network, group, norms_behind(network, [group]))
    if loose:
        stages = [*stages, norm_stage(network, group, loose)]
    pairs = compare(stages, group.width, bias=bias)
    raw = _outgoing(network, group)
    alpha = pairs.alpha
    distance = pairs.distance.masked_fill((alpha == 0)[:, None] | (alpha == 0)[None, :], math.inf)
    distance.fill_diagonal_(math.inf)
    alone = torch.full_like(alpha, math.inf)
    constant = alpha == 0
    alone[constant] = (raw.diagonal() * _values(network, group, stages).square())[constant]
    outgoing = raw * alpha[:, None] * alpha[None, :]
    return MergeProblem(distance.square().numpy(), outgoing.numpy(), alone.numpy())


def saliency_matrix(network: nn.Module, group: ChannelGroup) -> FloatArray:
    """Return (width, width) s_ij >= 0, what may be lost when j leaves and i stays; infinite on the diagonal.

    Args:
        network: The network, not changed.
        group: One of its groups.
    """
    return merge_problem(network, group).matrix()


def merge_sequence(
    problem: MergeProblem, *, allowed: Sequence[int] | IndexArray | None = None, steps: int | None = None
) -> MergeSequence:
    """Merge the two channels of smallest saliency, again and again; one channel always stays.

    Of equal entries the lowest j leaves, into the lowest i. Where no entry is finite, the channel with the smallest
    outgoing weights leaves without a stand-in.

    Args:
        problem: From `merge_problem`.
        allowed: The only channels that may leave; None = any.
        steps: How many leave, in [0, how many may]; None = all that may, but one where all may.

    Raises:
        UserError: `allowed` or `steps` are out of range.
    """
    width = problem.width
    candidates = np.arange(width) if allowed is None else np.unique(np.asarray(allowed, dtype=np.int64))
    if len(candidates) and not 0 <= candidates[0] <= candidates[-1] < width:
        raise UserError(f"allowed must be channels in [0, {width}), but got {candidates.tolist()}")
    most = min(len(candidates), width - 1)
    steps = most if steps is None else steps
    if not 0 <= steps <= most:
        raise UserError(
            f"steps must be in [0, {most}], but got {steps=}; one channel stays, of those allowed any leave"
        )
    near = problem.distance2.T.copy()  # (leaves, stays): the candidates to take over from j lie side by side
    outgoing = problem.outgoing.copy()
    nearest = near.argmin(1)
    least = near[np.arange(width), nearest]
    present = np.zeros(width, dtype=bool)
    present[candidates] = True
    removed, kept_into = np.empty(steps, np.int64), np.empty(steps, np.int64)
    saliency = np.empty(steps)
    for step in range(steps):
        square = outgoing.diagonal().clip(min=0.0)
        cost = np.where(np.isfinite(problem.alone), problem.alone, _times(square, least))
        cost[~present] = np.inf
        gone = int(cost.argmin())
        if not np.isfinite(cost[gone]):
            gone = int(np.where(present, square, np.inf).argmin())
        into = int(nearest[gone]) if np.isfinite(least[gone]) else NOBODY
        removed[step], kept_into[step], saliency[step] = gone, into, cost[gone]
        present[gone] = False
        near[:, gone] = np.inf
        orphans = np.flatnonzero(nearest == gone)
        nearest[orphans] = near[orphans].argmin(1)
        least[orphans] = near[orphans, nearest[orphans]]
        if into != NOBODY:  # α_i a_i grows by α_j a_j, so do its products with all others
            outgoing[into] += outgoing[gone]
            outgoing[:, into] += outgoing[:, gone]
    return MergeSequence(removed, kept_into, saliency)


def _times(square: FloatArray, distance2: FloatArray) -> FloatArray:
    """Multiply; what nothing reads costs nothing, however far it is."""
    with np.errstate(invalid="ignore"):
        return np.where(square <= 0, 0.0, square * distance2)


def cut_off(saliencies: Sequence[float] | FloatArray, share: float = 1.0) -> int:
    """Say how many channels may leave, without data: those whose saliency is at most the most frequent one.

    The most frequent is the middle of the highest bin in a histogram of log s, up to the 95th percentile of s; NumPy's
    rule "auto" chooses the bins. On a linear scale the few large ones would leave all others to the first bin, even
    without the last 5 %, and the bin's width would decide; on this one the histogram has the shape of a bell.

    Args:
        saliencies: (n,) of successive merges, see `merge_sequence`; >= 0, those not finite never count as small.
        share: Of that number, in (0, 1]; Srinivas & Babu take 0.25, 0.5 or 0.75 for large networks.

    Returns:
        A number of merges in [0, n], rounded down.

    Raises:
        UserError: `share` is out of range, or a saliency is negative or NaN.
    """
    if not 0 < share <= 1:
        raise UserError(f"share must be in (0, 1], but got {share=}; it is the part of the safe merges to make")
    values = np.asarray(saliencies, dtype=np.float64)
    if not (values >= 0).all():
        raise UserError("saliencies must be 0 or more, but some are negative or NaN; take those of merge_sequence")
    finite = values[np.isfinite(values)]
    if not len(finite):
        return 0
    usual = finite[(finite <= np.percentile(finite, 95)) & (finite > 0)]
    mode = 0.0
    if len(usual):
        counts, edges = np.histogram(np.log(usual), bins="auto")
        highest = int(counts.argmax())
        mode = float(np.exp((edges[highest] + edges[highest + 1]) / 2))
    return int(share * int((finite <= mode * (1 + 1e-9)).sum()))  # where all are equal, all count


def serves_published(network: nn.Module, group: ChannelGroup) -> bool:
    """Return whether the published case is at hand: linear layer, ReLU, linear layers, each channel one feature.

    What lies in front of the first layer, such as convolutions and a flatten, does not matter.
    """
    layers = {piece.tensor.rpartition(".")[0] for piece in group.slices}
    return (
        len(group.producers) == 1
        and bool(group.sites)
        and all(site.rectified for site in group.sites)
        and all(consumer.positions == 1 for consumer in group.consumers)
        and all(isinstance(network.get_submodule(name), nn.Linear) for name in layers)
        and layers == {*group.producers, *(consumer.module for consumer in group.consumers)}
    )


def _outgoing(network: nn.Module, group: ChannelGroup) -> Tensor:
    """Return (width, width) float64 ⟨a_i a_j⟩ over the outputs of all readers, summed over taps and positions."""
    found = torch.zeros(group.width, group.width, dtype=torch.float64)
    outputs = 0
    for consumer in group.consumers:
        layer: Any = network.get_submodule(consumer.module)
        weight: Tensor = layer.weight.detach().transpose(0, 1 - output_dim(layer))  # -> (inputs, …)
        outputs += layer.weight.shape[output_dim(layer)]
        features = by_channel(consumer.channel, consumer.index, group.width)
        if features is None:  # channels of unequal extent: no products, each its own squares
            square = weight.double().flatten(1).square().sum(1).cpu()[torch.from_numpy(consumer.index)]
            found.diagonal().index_add_(0, torch.from_numpy(consumer.channel), square)
            continue
        rows = weight[torch.from_numpy(features).to(weight.device)]  # (width, positions, outputs, …)
        found += gram(rows.flatten(1))
    return found / max(1, outputs)


def _values(network: nn.Module, group: ChannelGroup, stages: Sequence[Stage]) -> Tensor:
    """Return (width,) what a constant channel leaves behind that no reader's bias takes up."""
    if not stages:
        return torch.full((group.width,), math.inf, dtype=torch.float64)
    activation, bias = activation_of(group), stages[-1].bias
    value = (bias.clamp(min=0) if activation == "relu" else bias.abs()).sum(1)
    layers = [(network.get_submodule(consumer.module), consumer.norm) for consumer in group.consumers]
    taken = all(layer.bias is not None or norm is not None for layer, norm in layers)
    if taken and activation != "smooth" and bias.shape[1] == 1:
        value[compare(stages, group.width).still] = 0.0
    return value
