"""Each channel of a group as the affine function of its input that its weights make it, f_k(x) = u_k·x + b_k.

Batch norm is folded in where it directly follows the layer. What compares channels without data reads these.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .groups import ChannelGroup, Consumer, IndexArray
from .layers import input_width, output_dim

CHUNK = 65536
"""Columns of a weight matrix that are in float64 at once."""

EQUAL = 1e-14
"""Directions whose cosine is as near to 1 as this are equal: what remains is rounding."""


@dataclass(frozen=True, eq=False)
class Stage:
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


def activation_of(group: ChannelGroup) -> str:
    """Return what follows the channels: "relu", "identity" where no function does, or else "smooth"."""
    if group.rectified:
        return "relu"
    return "identity" if all(site.call is None for site in group.sites) else "smooth"


def stages_of(
    network: nn.Module, group: ChannelGroup, norm_of: Mapping[str, str | None]
) -> tuple[list[Stage], tuple[str, ...]]:
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
            stages.append(Stage(rows, torch.cat([part.bias for part in found], 1)))
    return stages, tuple(name for name in norms if name not in folded.values())


def _layer_stage(modules: Mapping[str, Any], group: ChannelGroup, name: str, norm_name: str | None) -> Stage | None:
    layer = modules[name]
    pieces = [p for p in group.slices if p.tensor == f"{name}.weight" and p.dim == output_dim(layer)]
    index = by_channel(pieces[0].channel, pieces[0].index, group.width) if len(pieces) == 1 else None
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
        return Stage([rows], bias[where])
    return Stage([rows], bias[where], mean[where[:, 0]], deviation[where[:, 0]])


def norm_stage(network: nn.Module, group: ChannelGroup, norms: Sequence[str]) -> Stage:
    """View batch norms apart from their producers (pre-activation, concatenation) as one weight a channel."""
    rows, biases = [], []
    for name in norms:
        scale, shift = _affine(network.get_submodule(name))
        piece = next(piece for piece in group.slices if piece.tensor == f"{name}.running_mean")
        index = by_channel(piece.channel, piece.index, group.width)
        if index is not None:
            rows.append(scale[torch.from_numpy(index)])
            biases.append(shift[torch.from_numpy(index)])
    empty = torch.ones(group.width, 1, dtype=torch.float64)
    return Stage(rows or [empty], torch.cat(biases, 1) if biases else 0 * empty)


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


def norms_behind(network: nn.Module, groups: Sequence[ChannelGroup]) -> dict[str, str | None]:
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


def norms_before(network: nn.Module, consumer: Consumer, group: ChannelGroup, loose: Sequence[str]) -> tuple[str, ...]:
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


def by_channel(channel: IndexArray, index: IndexArray, width: int) -> IndexArray | None:
    """Return (width, n) the positions each channel owns, ascending; None where they own unequal numbers."""
    counts = np.bincount(channel, minlength=width)
    if not counts[0] or (counts != counts[0]).any():
        return None
    return index[np.lexsort((index, channel))].reshape(width, -1)


@dataclass(frozen=True, eq=False)
class Pairs:
    """How the channels of a group compare.

    Attributes:
        alpha: (width,) α, the product over the stages.
        cosine: (width, width) of the incoming weights, mean over the stages.
        distance: (width, width) ‖ε‖ >= 0.
        still: (width,) whether the last stage has no weights, so that the channel is constant.
    """

    alpha: Tensor
    cosine: Tensor
    distance: Tensor
    still: Tensor


def compare(stages: Sequence[Stage], width: int, *, bias: bool = True) -> Pairs:
    """Compare all channels of a group.

    Args:
        stages: From `stages_of`, perhaps with a `norm_stage` behind; without any, all are infinitely far apart.
        width: Number of channels.
        bias: Whether biases count in the distance.
    """
    alpha = torch.ones(width, dtype=torch.float64)
    cosine = torch.zeros(width, width, dtype=torch.float64)
    distance = torch.zeros_like(cosine) if stages else torch.full_like(cosine, math.inf)
    still = torch.zeros(width, dtype=torch.bool)
    for stage in stages:
        products = torch.zeros_like(cosine)
        for rows in stage.rows:
            products += gram(rows)
        length = products.diagonal().sqrt()
        alike = (products / nonzero(length[:, None] * length[None, :])).clamp(-1, 1)
        cosine += alike / len(stages)
        apart = 1 - alike
        apart[apart < EQUAL] = 0.0
        distance += (apart / (1 + alike)).sqrt()  # ‖ŵ_i − ŵ_j‖ / ‖ŵ_i + ŵ_j‖ of unit vectors
        alpha = alpha * length
        if bias:
            distance += _bias_distance(stage.bias / nonzero(alpha)[:, None])
        still = length == 0
    return Pairs(alpha, cosine, distance, still)


def _bias_distance(bias: Tensor) -> Tensor:
    """Return (width, width) ‖b̂_i − b̂_j‖ / ‖b̂_i + b̂_j‖ of biases (width, n); 0 / 0 is 0."""
    unlike, like = (torch.cdist(bias, other, compute_mode="donot_use_mm_for_euclid_dist") for other in (bias, -bias))
    return torch.where(unlike == 0, 0.0, unlike / like)


def gram(rows: Tensor) -> Tensor:
    """Return (n, n) float64 products of the rows (n, d), on the CPU."""
    found = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows.device)
    for part in rows.split(CHUNK, 1):
        part = part.double()
        found.addmm_(part, part.T)
    return found.cpu()


def nonzero(values: Tensor) -> Tensor:
    """Return `values` with 1 in the place of 0, to divide by."""
    return torch.where(values == 0, torch.ones_like(values), values)
