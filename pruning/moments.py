"""Mean and second moment (Gram matrix) of what each layer reads, gathered while a network runs.

Memory: F × F float64 numbers for a layer of F features (`layers`): F <= `PATCH_LIMIT` for a convolution whose taps have
features of their own, else its input channels; F <= `GRAM_LIMIT` for a linear layer, else one for each channel before
the flatten. Beside it the rows of one batch, no activation of an earlier one.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .errors import UserError
from .groups import Consumer
from .layers import FloatArray, drawn, full_size, input_width, patches

PATCH_LIMIT = 2304
"""Most features (input channels × kernel taps) of a convolution whose taps get features of their own."""

GRAM_LIMIT = 4096
"""Most input features for which a linear layer behind a flatten gets a Gram over channel × position."""

POSITIONS = 16
"""Output positions of an example that are taken, at random; all where there are fewer."""

ROWS = 2
"""More positions are taken where a batch would otherwise give fewer rows than this times the features."""

SAME_POSITIONS = 16
"""Examples that share a draw of positions."""


@dataclass(frozen=True, eq=False)
class ConsumerStatistics:
    """First and second moment of what one layer reads, over examples and output positions.

    Attributes:
        mean: (D,) E[x] of every feature, none shared.
        variance: (D,) E[x²] − E[x]².
        covariance: (F, F) E[x xᵀ] − E[x] E[x]ᵀ; where D / F neighbours share a feature, its average over them. Empty
            where sharing is impossible (an uneven flatten of more than `GRAM_LIMIT` features).
        rows: Number of examples × positions seen.
    """

    mean: FloatArray
    variance: FloatArray
    covariance: FloatArray
    rows: int

    @property
    def size(self) -> int:
        """F, the number of features; 0 where there is no covariance."""
        return len(self.covariance)

    @cached_property
    def second_moment(self) -> FloatArray:
        """(F, F) E[x xᵀ], not centred; the average where features are shared."""
        means = self.mean.reshape(self.size, -1)
        return self.covariance + means @ means.T / means.shape[1]


def feature_count(layer: Any, consumer: Consumer) -> int:
    """Return how many features a layer's input is seen as; 0 = too many, and no way to share them."""
    width, whole = input_width(layer), full_size(layer)
    if not isinstance(layer, nn.Linear):
        return whole if whole <= PATCH_LIMIT else width
    if width <= GRAM_LIMIT:
        return width
    channels = width // consumer.positions
    in_order = np.array_equal(np.sort(consumer.index), np.arange(width))
    owner = consumer.channel[np.argsort(consumer.index)]
    even = in_order and np.array_equal(owner, np.arange(width) // consumer.positions)
    return channels if even and channels <= GRAM_LIMIT else 0


class MomentSums:
    """Sums of x and x xᵀ over the rows that one layer reads.

    Args:
        name: Of the layer, for errors.
        layer: Convolution or linear layer; `hook` is its forward pre-hook.
        size: Number of features, see `feature_count`.
        positions: Output positions of an example that are taken at least.
    """

    def __init__(self, name: str, layer: nn.Module, size: int, positions: int) -> None:
        self._name = name
        self._layer: Any = layer
        self._size = size
        self._positions = positions
        self._generator = torch.Generator().manual_seed(0)
        self._shift: Any = None  # near the mean, so that float32 products keep the digits of the covariance
        self._mean: Any = 0.0
        self._square: Any = 0.0
        self._moment: Any = 0.0
        self._count = 0

    def hook(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Take in a batch."""
        x = inputs[0].detach()
        most = max(self._positions, -(-ROWS * self._size // max(1, len(x))))
        rows = torch.cat([self._rows(part, most) for part in x.split(SAME_POSITIONS)])  # (rows, D)
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        if self._shift is None:
            self._shift = rows.mean(0)
        rows -= self._shift
        self._count += len(rows)
        self._mean = self._mean + rows.sum(0).double()
        self._square = self._square + torch.linalg.vector_norm(rows, dim=0).double().square()
        if self._size:
            shared = rows.shape[1] // self._size
            if shared > 1:  # -> (rows·shared, F)
                rows = rows.unflatten(1, (self._size, shared)).transpose(1, 2).flatten(0, 1)
            self._moment = (rows.T @ rows).double().add_(self._moment)

    def _rows(self, x: Tensor, most: int) -> Tensor:
        """(N, …) -> (N × some positions, D)."""
        if not isinstance(self._layer, nn.Linear):
            return patches(self._layer, x, most, self._generator)
        x = x.reshape(len(x), -1, x.shape[-1])
        chosen = drawn(x.shape[1], most, self._generator)
        return x[:, chosen.to(x.device)].flatten(0, 1)

    def result(self) -> ConsumerStatistics:
        """Return the moments of what was seen.

        Raises:
            UserError: They are not finite.
        """
        whole = full_size(self._layer)
        if self._shift is None:  # the layer never ran
            none = np.zeros(whole)
            return ConsumerStatistics(none, none, np.zeros((self._size, self._size)), 0)
        mean = self._mean / self._count
        covariance = torch.zeros(0, 0, dtype=torch.float64)
        if self._size:
            means = mean.reshape(self._size, -1)
            covariance = self._moment / (self._count * means.shape[1])
            covariance.addmm_(means, means.T, alpha=-1 / means.shape[1])
        if not bool(torch.isfinite(covariance).all() and torch.isfinite(self._square).all()):
            raise UserError(
                f"the second moments of what layer {self._name!r} reads must be finite, but are not; do the images "
                "hold NaN, or do the activations overflow?"
            )
        variance = self._square / self._count - mean.square()
        return ConsumerStatistics(
            mean=(mean + self._shift).cpu().numpy(),
            variance=variance.clamp(min=0).cpu().numpy(),
            covariance=covariance.cpu().numpy(),
            rows=self._count,
        )
