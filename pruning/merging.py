"""Find a stand-in for each channel that leaves, from the weights alone.

The compensation `merge` compares what feeds the channels: the affine function f_j(x) = u_j·x + b_j before the
activation, with the batch norm behind the layer folded in (u = w γ/σ, b = β + (b_w − μ) γ/σ), and α_j = ‖u_j‖. Channel
j's stand-in is the kept i nearest in ‖u_j/α_j − u_i/α_i‖² + (b_j/α_j − b_i/α_i)², so that f_j ≈ r f_i + δ with
δ = b_j − r b_i. A ReLU lets a positive factor through, not δ; hence X_j ≈ r X_i + c with

- no batch norm: r = α_j/α_i, c = 0 (Srinivas & Babu 2015); without an activation function c = δ;
- batch norm: it tells, without data, that f_i ~ N(β_i, γ_i²). r = cos(u_j, u_i) α_j/α_i fits u_j best (Kim et al. 2020
  take the cosine for likeness), and c = E[X_j] − r E[X_i] in closed form. The share cos² of f_j that i explains is
  distributed as r f_i + δ, the rest as N(β_j, γ_j²): a scaled duplicate gets c = 0, an unlike channel its own mean.

Layers whose outputs are summed count as one with their weights put side by side, and depthwise convolutions in the
group as further factors of α; there a factor common to all of them is exact as well.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from .affine import Stage, activation_of, by_channel, nonzero, norm_stage, norms_before, norms_behind, stages_of
from .groups import ChannelGroup, IndexArray
from .layers import FloatArray


@dataclass(frozen=True, eq=False)
class Substitution:
    """One feature for each that leaves: X_j ≈ ratio · X_source + constant.

    Attributes:
        feature: (n,) input features of a layer that leave.
        source: (n,) input features that stay; without meaning where the ratio is 0.
        ratio: (n,) >= 0; 0 where no kept feature resembles the one that leaves.
        constant: (n,) c.
    """

    feature: IndexArray
    source: IndexArray
    ratio: FloatArray
    constant: FloatArray


def find_substitutions(
    network: nn.Module, groups: Sequence[ChannelGroup], plan: Mapping[str, Sequence[int]]
) -> dict[str, list[Substitution]]:
    """Choose for every channel that leaves the kept channel of its group with the most similar incoming weights.

    Args:
        network: The network before the cut.
        groups: Its groups.
        plan: Channels that stay; every group named.

    Returns:
        layer that lost inputs -> one substitution for each group it read.
    """
    norm_of = norms_behind(network, groups)
    result: dict[str, list[Substitution]] = {}
    for group in groups:
        kept = np.asarray(sorted(plan[group.name]), dtype=np.int64)
        removed = np.setdiff1d(np.arange(group.width), kept)
        if not len(removed):
            continue
        choose = partial(_stand_ins, activation=activation_of(group), removed=removed, kept=kept)
        for reader, substitution in for_readers(network, group, norm_of, removed, choose):
            result.setdefault(reader, []).append(substitution)
    return result


StandIns = tuple[IndexArray, FloatArray, FloatArray]
"""For each channel that leaves: the channel that stands in, its factor, the constant."""


def for_readers(
    network: nn.Module,
    group: ChannelGroup,
    norm_of: Mapping[str, str | None],
    removed: IndexArray,
    choose: Callable[[Sequence[Stage]], StandIns],
) -> Iterator[tuple[str, Substitution]]:
    """Yield each reader of a group, and what stands in for the channels that leave in terms of its features.

    A channel behind a flatten owns several features: position by position. A reader whose channels own unequal numbers
    gets none.

    Args:
        network: The network before the cut.
        group: One of its groups.
        norm_of: See `norms_behind`.
        removed: (m,) channels that leave.
        choose: Chooses from the affine stages that a reader sees; called once for readers that see the same.
    """
    stages, loose = stages_of(network, group, norm_of)
    found: dict[tuple[str, ...], StandIns] = {}
    for consumer in group.consumers:
        features = by_channel(consumer.channel, consumer.index, group.width)
        if features is None:
            continue
        norms = norms_before(network, consumer, group, loose)
        if norms not in found:
            extra = [norm_stage(network, group, norms)] if norms else []
            found[norms] = choose([*stages, *extra])
        source, ratio, constant = found[norms]
        each = features.shape[1]
        yield (
            consumer.module,
            Substitution(
                features[removed].ravel(), features[source].ravel(), ratio.repeat(each), constant.repeat(each)
            ),
        )


def _stand_ins(stages: Sequence[Stage], activation: str, removed: IndexArray, kept: IndexArray) -> StandIns:
    """Return (removed,) channel that stands in, ratio r, constant c; see the module's docstring."""
    if not stages:
        return np.full(len(removed), kept[0]), np.zeros(len(removed)), np.zeros(len(removed))
    gone, stay = torch.from_numpy(removed), torch.from_numpy(kept)
    cosine = torch.zeros(len(removed), len(kept), dtype=torch.float64)
    apart = torch.zeros_like(cosine)
    size = torch.ones(len(removed) + len(kept), dtype=torch.float64)  # α, the product over the stages
    both = torch.cat([gone, stay])
    for stage in stages:
        gram, square = torch.zeros_like(cosine), torch.zeros_like(size)
        for rows in stage.rows:
            left, right = rows[gone.to(rows.device)], rows[stay.to(rows.device)]
            gram += (left @ right.T).double().cpu()
            square += torch.cat([left.square().sum(1), right.square().sum(1)]).double().cpu()
        length = square.sqrt()
        cosine += gram / nonzero(length[: len(gone), None] * length[len(gone) :]) / len(stages)
        size = size * length
        bias = stage.bias[both] / nonzero(size)[:, None]
        apart += torch.cdist(bias[: len(gone)], bias[len(gone) :], compute_mode="donot_use_mm_for_euclid_dist").square()
    alpha_gone, alpha_stay = size[: len(gone)], size[len(gone) :]
    distance = (2 - 2 * cosine + apart).masked_fill((alpha_stay == 0) | (cosine <= 0), math.inf)
    nearest = distance.argmin(1)
    likeness = cosine.gather(1, nearest[:, None]).squeeze(1).clamp(max=1)
    likeness[distance.gather(1, nearest[:, None]).squeeze(1).isinf() | (alpha_gone == 0)] = 0.0
    ratio = torch.where(likeness > 0, alpha_gone / nonzero(alpha_stay[nearest]), 0.0)
    last = stages[-1]
    if last.mean is not None:
        ratio = ratio * likeness  # the constant makes up for the mean that a smaller ratio loses
    still = length[: len(gone)] == 0  # no weights in the last layer: the channel is constant
    constant = constants(last, activation, gone, stay[nearest], ratio, likeness, still)
    return kept[nearest.numpy()], ratio.numpy(), constant.numpy()


def constants(
    stage: Stage, activation: str, gone: Tensor, source: Tensor, ratio: Tensor, likeness: Tensor, still: Tensor
) -> Tensor:
    """Return (removed,) c = E[X_j] − r E[X_i] as far as the last layers' batch norm or biases tell it, else 0."""
    none = torch.zeros_like(ratio)
    if stage.bias.shape[1] != 1 or activation == "smooth":
        return none
    expected = _mean_relu if activation == "relu" else _mean_identity
    bias = stage.bias[:, 0]
    own = expected(bias[gone], none)
    if stage.mean is None or stage.deviation is None:
        if activation == "identity":
            return own - ratio * bias[source]
        return torch.where(still, own, none)
    mean, deviation, alike = stage.mean, stage.deviation, likeness.square()
    explained = ratio * mean[source] + bias[gone] - ratio * bias[source]
    centre = alike * explained + (1 - alike) * mean[gone]
    variance = alike * (ratio * deviation[source]).square() + (1 - alike) * deviation[gone].square()
    found = expected(centre, variance.sqrt()) - ratio * expected(mean[source], deviation[source])
    return torch.where(still, own, found)


def _mean_identity(mean: Tensor, deviation: Tensor) -> Tensor:
    return mean


def _mean_relu(mean: Tensor, deviation: Tensor) -> Tensor:
    """E[max(0, f)] of f ~ N(mean, deviation²)."""
    z = mean / nonzero(deviation)
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    return torch.where(deviation > 0, deviation * density + mean * torch.special.ndtr(z), mean.clamp(min=0))
