"""Mean and second moment (Gram matrix) of what each layer reads, gathered while a network runs.

Memory: F × F float64 numbers for a layer of F features (`layers`), F <= `PATCH_LIMIT` for patches and `GRAM_LIMIT`
behind a flatten, else its input channels; and the rows of one batch, at most `POSITIONS` for an example.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .groups import Consumer
from .layers import FloatArray, drawn, input_width, patches, taps

PATCH_LIMIT = 2304
"""Most features (input channels × kernel taps) of a convolution whose taps get features of their own."""

GRAM_LIMIT = 4096
"""Most input features for which a linear layer behind a flatten gets a Gram over channel × position."""

POSITIONS = 16
"""Positions of an example that are taken, at random; all where there are fewer."""

SAME_POSITIONS = 16
"""Examples that share a draw of positions."""


@dataclass(frozen=True, eq=False)
class ConsumerStatistics:
    """First and second moment of the features of one layer that reads channels.

    Attributes:
        mean: (F,) E[x].
        covariance: (F, F) E[x xᵀ] − E[x] E[x]ᵀ.
        rows: Number of examples × positions seen.
    """

    mean: FloatArray
    covariance: FloatArray
    rows: int

    @cached_property
    def second_moment(self) -> FloatArray:
        """(F, F) E[x xᵀ], not centred."""
        return self.covariance + np.outer(self.mean, self.mean)


def feature_count(layer: Any, consumer: Consumer) -> int:
    """Return how many features a layer's input is seen as."""
    width = input_width(layer)
    if isinstance(layer, nn.Linear):
        return width // consumer.positions if width > GRAM_LIMIT else width
    return width if layer.transposed or width * taps(layer) > PATCH_LIMIT else width * taps(layer)


class MomentSums:
    """Sums of x and x xᵀ over the rows that one layer reads.

    Args:
        layer: Convolution or linear layer; `hook` is its forward pre-hook.
        size: Number of features, see `feature_count`.
        positions: Most positions of an example that are taken.
    """

    def __init__(self, layer: nn.Module, size: int, positions: int) -> None:
        self._layer: Any = layer
        self._size = size
        self._positions = positions
        self._generator = torch.Generator().manual_seed(0)
        self._shift: Any = None  # near the mean, so that float32 products keep the digits of the covariance
        self._mean: Any = 0.0
        self._moment: Any = 0.0
        self._count = 0

    def hook(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Take in a batch."""
        rows = torch.cat([self._rows(part) for part in inputs[0].detach().split(SAME_POSITIONS)])
        if self._shift is None:
            self._shift = rows.mean(0)
        rows -= self._shift
        self._count += len(rows)
        self._mean = self._mean + rows.sum(0).double()
        self._moment = (rows.T @ rows).double().add_(self._moment)

    def _rows(self, x: Tensor) -> Tensor:
        """(N, …) -> (examples × positions, features)."""
        if not isinstance(self._layer, nn.Linear):
            if not self._layer.transposed and self._size == x.shape[1] * taps(self._layer):
                return patches(self._layer, x, self._positions, self._generator)
            return self._some(x.flatten(2).transpose(1, 2))
        if self._size < x.shape[-1]:  # (N, C·P) -> (N, P, C)
            return self._some(x.reshape(-1, self._size, x.shape[-1] // self._size).transpose(1, 2))
        return self._some(x.reshape(len(x), -1, x.shape[-1]))

    def _some(self, x: Tensor) -> Tensor:
        """(N, positions, F) -> (N × some positions, F)."""
        chosen = drawn(x.shape[1], self._positions, self._generator)
        return x[:, chosen.to(x.device)].reshape(-1, x.shape[2])

    def result(self) -> ConsumerStatistics:
        """Return the moments of what was seen."""
        if self._shift is None:  # the layer never ran
            return ConsumerStatistics(np.zeros(self._size), np.zeros((self._size, self._size)), 0)
        mean = self._mean / self._count
        covariance = (self._moment / self._count).addr_(mean, mean, alpha=-1)
        return ConsumerStatistics((mean + self._shift).cpu().numpy(), covariance.cpu().numpy(), self._count)
