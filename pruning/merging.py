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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .groups import ChannelGroup, Consumer, IndexArray
from .layers import FloatArray, input_width, output_dim


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
    norm_of = _norms_behind(network, groups)
    result: dict[str, list[Substitution]] = {}
    for group in groups:
        kept = np.asarray(sorted(plan[group.name]), dtype=np.int64)
        removed = np.setdiff1d(np.arange(group.width), kept)
        if not len(removed):
            continue
        stages, loose = _stages(network, group, norm_of)
        found: dict[tuple[str, ...], tuple[IndexArray, FloatArray, FloatArray]] = {}
        for consumer in group.consumers:
            features = _by_channel(consumer.channel, consumer.index, group.width)
            if features is None:
                continue
            norms = _norms_before(network, consumer, group, loose)
            if norms not in found:
                extra = [_norm_stage(network, group, norms)] if norms else []
                found[norms] = _stand_ins([*stages, *extra], _activation(group), removed, kept)
            source, ratio, constant = found[norms]
            each = features.shape[1]  # a channel behind a flatten owns several features: position by position
            result.setdefault(consumer.module, []).append(
                Substitution(
                    features[removed].ravel(), features[source].ravel(), ratio.repeat(each), constant.repeat(each)
                )
            )
    return result


@dataclass(frozen=True, eq=False)
class _Stage:
    """Affine functions, one for each channel, with the batch norm behind them folded in.

    Attributes:
        rows: Each (width, d): weights u of the layers that are summed, side by side.
        bias: (width, n) float64 b.
        mean: (width,) float64 mean of f where a batch norm tells it, else None.
        deviation: (width,) float64 standard deviation of f, likewise.
    """

    rows: list[Tensor]
    bias: Tensor
    mean: Tensor | None = None
    deviation: Tensor | None = None


def _activation(group: ChannelGroup) -> str:
    if group.rectified:
        return "relu"
    return "identity" if all(site.call is None for site in group.sites) else "smooth"


def _stand_ins(
    stages: Sequence[_Stage], activation: str, removed: IndexArray, kept: IndexArray
) -> tuple[IndexArray, FloatArray, FloatArray]:
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
        cosine += gram / _nonzero(length[: len(gone), None] * length[len(gone) :]) / len(stages)
        size = size * length
        bias = stage.bias[both] / _nonzero(size)[:, None]
        apart += torch.cdist(bias[: len(gone)], bias[len(gone) :], compute_mode="donot_use_mm_for_euclid_dist").square()
    alpha_gone, alpha_stay = size[: len(gone)], size[len(gone) :]
    distance = (2 - 2 * cosine + apart).masked_fill((alpha_stay == 0) | (cosine <= 0), math.inf)
    nearest = distance.argmin(1)
    likeness = cosine.gather(1, nearest[:, None]).squeeze(1).clamp(max=1)
    likeness[distance.gather(1, nearest[:, None]).squeeze(1).isinf() | (alpha_gone == 0)] = 0.0
    ratio = torch.where(likeness > 0, alpha_gone / _nonzero(alpha_stay[nearest]), 0.0)
    last = stages[-1]
    if last.mean is not None:
        ratio = ratio * likeness  # the constant makes up for the mean that a smaller ratio loses
    still = length[: len(gone)] == 0  # no weights in the last layer: the channel is constant
    constant = _constants(last, activation, gone, stay[nearest], ratio, likeness, still)
    return kept[nearest.numpy()], ratio.numpy(), constant.numpy()


def _constants(
    stage: _Stage, activation: str, gone: Tensor, source: Tensor, ratio: Tensor, likeness: Tensor, still: Tensor
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
    z = mean / _nonzero(deviation)
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    return torch.where(deviation > 0, deviation * density + mean * torch.special.ndtr(z), mean.clamp(min=0))


def _nonzero(values: Tensor) -> Tensor:
    return torch.where(values == 0, torch.ones_like(values), values)


def _stages(
    network: nn.Module, group: ChannelGroup, norm_of: Mapping[str, str | None]
) -> tuple[list[_Stage], tuple[str, ...]]:
    """Return the group's producers as one stage, each grouped convolution as one, and the norms not yet folded in."""
    modules = dict(network.named_modules(remove_duplicate=False))
    norms = _norms_in(modules, group)
    layers = {piece.tensor.rpartition(".")[0]: None for piece in group.slices if piece.tensor.endswith(".weight")}
    grouped = [name for name in layers if getattr(modules.get(name), "groups", 1) > 1 and name not in group.producers]
    grouped.sort(key=list(modules).index)
    folded = {name: norm for name in (*group.producers, *grouped) if (norm := norm_of.get(name)) in norms}
    if len(group.producers) == 1 and not grouped and len(norms) == 1:
        folded[group.producers[0]] = norms[0]
    stages = []
    for names in (group.producers, *((name,) for name in grouped)):
        parts = [_layer_stage(modules, group, name, folded.get(name)) for name in names]
        found = [part for part in parts if part is not None]
        if len(found) == 1:
            stages += found
        elif found:
            rows = [row for part in found for row in part.rows]
            stages.append(_Stage(rows, torch.cat([part.bias for part in found], 1)))
    return stages, tuple(name for name in norms if name not in folded.values())


def _layer_stage(modules: Mapping[str, Any], group: ChannelGroup, name: str, norm_name: str | None) -> _Stage | None:
    layer = modules[name]
    pieces = [p for p in group.slices if p.tensor == f"{name}.weight" and p.dim == output_dim(layer)]
    index = _by_channel(pieces[0].channel, pieces[0].index, group.width) if len(pieces) == 1 else None
    if index is None:
        return None
    weight = layer.weight.detach().transpose(0, output_dim(layer)).flatten(1)  # -> (outputs, d)
    if weight.dtype not in (torch.float32, torch.float64):
        weight = weight.float()
    bias = torch.zeros(len(weight), dtype=torch.float64) if layer.bias is None else layer.bias.detach().double().cpu()
    mean = deviation = None
    norm = modules[norm_name] if norm_name else None
    if norm is not None and norm.num_features == len(weight):
        scale, shift = _affine(norm)
        weight, bias = weight * scale.to(weight)[:, None], bias * scale + shift
        if index.shape[1] == 1 and norm.affine:
            mean, deviation = norm.bias.detach().double().cpu(), norm.weight.detach().double().abs().cpu()
        elif index.shape[1] == 1:
            mean, deviation = torch.zeros_like(bias), torch.ones_like(bias)
    where = torch.from_numpy(index)  # (width, rows a channel owns)
    rows = weight[where.to(weight.device)].flatten(1)
    if mean is None or deviation is None:
        return _Stage([rows], bias[where])
    return _Stage([rows], bias[where], mean[where[:, 0]], deviation[where[:, 0]])


def _norm_stage(network: nn.Module, group: ChannelGroup, norms: Sequence[str]) -> _Stage:
    """View batch norms apart from their producers (pre-activation, concatenation) as one weight a channel."""
    rows, biases = [], []
    for name in norms:
        scale, shift = _affine(network.get_submodule(name))
        piece = next(piece for piece in group.slices if piece.tensor == f"{name}.running_mean")
        index = _by_channel(piece.channel, piece.index, group.width)
        if index is not None:
            rows.append(scale[torch.from_numpy(index)])
            biases.append(shift[torch.from_numpy(index)])
    empty = torch.ones(group.width, 1, dtype=torch.float64)
    return _Stage(rows or [empty], torch.cat(biases, 1) if biases else 0 * empty)


def _affine(norm: Any) -> tuple[Tensor, Tensor]:
    """Return a batch norm in evaluation mode as x · scale + shift, float64 on the CPU."""
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    scale = scale * norm.weight.detach().double() if norm.affine else scale
    shift = -norm.running_mean.double() * scale
    return scale.cpu(), (shift + norm.bias.detach().double() if norm.affine else shift).cpu()


def _norms_in(modules: Mapping[str, Any], group: ChannelGroup) -> list[str]:
    """Return the batch norms with running statistics that the group's channels pass."""
    names = dict.fromkeys(p.tensor.rpartition(".")[0] for p in group.slices if p.tensor.endswith(".running_mean"))
    return [name for name in names if isinstance(modules.get(name), nn.modules.batchnorm._BatchNorm)]


def _norms_behind(network: nn.Module, groups: Sequence[ChannelGroup]) -> dict[str, str | None]:
    """Return layer -> the batch norm that takes its output.

    Known from the groups where a layer reads one; for others (the first layer, depthwise convolutions) it is the
    batch norm registered next after the layer. A wrong guess makes a worse choice, never a wrong network.
    """
    result: dict[str, str | None] = {}
    layer = ""
    for name, module in network.named_modules(remove_duplicate=False):
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if layer:
                result[layer] = name
            layer = ""
        elif isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
            layer = name
    return {**result, **{consumer.module: consumer.norm for group in groups for consumer in group.consumers}}


def _norms_before(network: nn.Module, consumer: Consumer, group: ChannelGroup, loose: Sequence[str]) -> tuple[str, ...]:
    """Return the norms not yet folded in that a layer may read through: those laid out like its input, or all."""
    width = input_width(network.get_submodule(consumer.module))
    fitting = []
    for name in loose:
        piece = next(piece for piece in group.slices if piece.tensor == f"{name}.running_mean")
        norm: Any = network.get_submodule(name)
        own, read = (sorted(zip(p.index.tolist(), p.channel.tolist(), strict=True)) for p in (piece, consumer))
        if norm.num_features == width and own == read:
            fitting.append(name)
    return tuple(fitting or loose)


def _by_channel(channel: IndexArray, index: IndexArray, width: int) -> IndexArray | None:
    """Return (width, n) the positions each channel owns, ascending; None where they own unequal numbers."""
    counts = np.bincount(channel, minlength=width)
    if not counts[0] or (counts != counts[0]).any():
        return None
    return index[np.lexsort((index, channel))].reshape(width, -1)
