"""Convolutions and linear layers seen as matrices over the features of their input.

A *feature* is what one column of a layer's input matrix holds, one row for each output position. A linear layer has one
for each input, a convolution one for each input channel and kernel tap. Where that would be too many for a matrix of
their moments, neighbours share one: the taps of a channel, or its positions behind a flatten.
"""

import math
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

FloatArray = NDArray[np.float64]


def input_width(layer: Any) -> int:
    """Return the number of input features or channels of a layer."""
    return int(layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels)


def output_dim(layer: Any) -> int:
    """Return the dimension of a layer's weight that counts its outputs."""
    return 1 if getattr(layer, "transposed", False) else 0


def taps(layer: Any) -> int:
    """Return the number of kernel taps, 1 for a linear layer."""
    return 1 if isinstance(layer, nn.Linear) else math.prod(layer.kernel_size)


def full_size(layer: Any) -> int:
    """Return the number of features of a layer when none is shared."""
    return input_width(layer) * taps(layer)


def features_of(layer: Any, inputs: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """Return (n,) the features, ascending, that belong to some of a layer's inputs.

    Args:
        layer: Convolution or linear layer.
        inputs: Input channels or features.
        size: Number of features of the whole layer.
    """
    width = input_width(layer)
    if size < width:
        return np.unique(inputs // (width // size))
    each = size // width
    return (np.unique(inputs)[:, None] * each + np.arange(each)).ravel()


def weight_matrix(layer: Any, weight: Tensor, size: int) -> FloatArray:
    """View a layer's weight as (size, columns) float64; columns = outputs × whatever shares a feature.

    Args:
        layer: Convolution (not grouped) or linear layer.
        weight: Its weight, or one of the same layout with fewer outputs.
        size: Number of features.
    """
    value = weight.detach().double().cpu()
    if output_dim(layer) == 0:
        value = value.transpose(0, 1)  # (out, in, …) -> (in, out, …)
    if size < len(value):
        value = value.unflatten(0, (size, -1)).transpose(1, 2)  # (C·P, out) -> (C, out, P)
    elif size > len(value):
        value = value.flatten(2).transpose(1, 2)  # (in, out, taps) -> (in, taps, out)
    return value.reshape(size, -1).numpy()


def as_weight(layer: Any, matrix: Tensor, like: Tensor) -> Tensor:
    """Undo `weight_matrix`: (features, columns) -> the layout of `like`, whose inputs are those of the matrix."""
    outputs, inputs = like.shape[output_dim(layer)], like.shape[1 - output_dim(layer)]
    if len(matrix) < inputs:
        value = matrix.reshape(len(matrix), outputs, -1).transpose(1, 2)  # (C, out·P) -> (C, P, out)
    elif len(matrix) > inputs:
        value = matrix.reshape(inputs, -1, outputs).transpose(1, 2)  # (in·taps, out) -> (in, out, taps)
    else:
        value = matrix
    value = value.reshape(inputs, outputs, *like.shape[2:])
    return value if output_dim(layer) else value.transpose(0, 1)


def patches(layer: Any, x: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Return what some output positions of a convolution read, (N·positions, in_channels·taps).

    A transposed convolution is read as the convolution it equals: zeros between the inputs, taps reversed.

    Args:
        layer: Convolution.
        x: (N, in_channels, …) its input.
        most: Output positions taken, the same for each example, drawn at random where there are more.
        generator: Of that draw.
    """
    stride, kernel, dilation = layer.stride, layer.kernel_size, layer.dilation
    if layer.transposed:
        x = _spread(layer, x)
        stride = (1,) * len(kernel)
    else:
        padding = layer._reversed_padding_repeated_twice  # the only place that resolves "same"
        if not isinstance(layer.padding, str):
            padding = [side for extent in reversed(layer.padding) for side in (extent, extent)]
        if any(padding):
            mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
            x = nn.functional.pad(x, padding, mode=mode)
    corners, offsets = _geometry(tuple(x.shape[2:]), kernel, stride, dilation)
    if layer.transposed:
        offsets = offsets.flip(0)
    chosen = corners[drawn(len(corners), most, generator)]
    index = (chosen[:, None] + offsets).flatten().to(x.device)
    values = x.flatten(2).index_select(2, index)  # -> (N, C, positions·taps)
    values = values.unflatten(2, (len(chosen), len(offsets))).transpose(1, 2)  # -> (N, positions, C, taps)
    return values.reshape(-1, x.shape[1] * len(offsets))


def _spread(layer: Any, x: Tensor) -> Tensor:
    """Return the input of the stride-1 convolution that a transposed convolution equals."""
    extents = [(size - 1) * step + 1 for size, step in zip(x.shape[2:], layer.stride, strict=True)]
    wide = x.new_zeros(*x.shape[:2], *extents)
    places: Any = (..., *(slice(None, None, step) for step in layer.stride))
    wide[places] = x
    sides = []
    for axis in reversed(range(len(extents))):
        first = layer.dilation[axis] * (layer.kernel_size[axis] - 1) - layer.padding[axis]
        sides += [first, first + layer.output_padding[axis]]
    return nn.functional.pad(wide, sides)


@lru_cache(maxsize=256)
def _geometry(
    extents: tuple[int, ...], kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Return, in a flattened padded input, the first tap of every output position and the taps' distances from it."""
    corners, offsets = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    for axis, extent in enumerate(extents):
        step = math.prod(extents[axis + 1 :])
        count = (extent - dilation[axis] * (kernel[axis] - 1) - 1) // stride[axis] + 1
        corners = (corners[:, None] + torch.arange(count) * stride[axis] * step).flatten()
        offsets = (offsets[:, None] + torch.arange(kernel[axis]) * dilation[axis] * step).flatten()
    return corners, offsets


def drawn(count: int, most: int, generator: torch.Generator) -> Tensor:
    """Return (min(count, most),) int64 places out of `count`, ascending; all, or drawn without replacement."""
    if count <= most:
        return torch.arange(count)
    return torch.randperm(count, generator=generator)[:most].sort().values
