"""How long a forward pass takes on this machine: measured, never estimated."""

import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from .errors import UserError
from .tracing import evaluation_mode

WARM_UP = 2
FEWEST = 5


@dataclass(frozen=True)
class Latency:
    """Wall-clock time of one forward pass without gradients.

    Attributes:
        batch: Examples a pass.
        median_ms: Median over the repeats, in milliseconds.
        spread_ms: Distance between the quartiles, in milliseconds.
        repeats: Passes timed, after `WARM_UP` that were not.
    """

    batch: int
    median_ms: float
    spread_ms: float
    repeats: int


def measure_latency(network: nn.Module, example: Tensor, batch: int = 1, *, seconds: float = 0.5) -> Latency:
    """Time forward passes in evaluation mode, with the threads and the device that PyTorch uses now.

    Args:
        network: Comes back as it was.
        example: (N, …) its first entry is repeated to a batch.
        batch: Examples a pass.
        seconds: Passes are repeated for about that long, at least `FEWEST` times.

    Raises:
        UserError: `batch` is below 1.
    """
    if batch < 1:
        raise UserError(f"batch must be at least 1, but got {batch}; it counts the examples of a forward pass")
    inputs = example[:1].expand(batch, *example.shape[1:]).contiguous()
    times: list[float] = []
    with evaluation_mode(network), torch.no_grad():
        for _ in range(WARM_UP):
            _timed(network, inputs)
        while len(times) < FEWEST or sum(times) < seconds:
            times.append(_timed(network, inputs))
    low, median, high = np.percentile(np.array(times) * 1e3, (25, 50, 75))
    return Latency(batch, float(median), float(high - low), len(times))


def _timed(network: nn.Module, inputs: Tensor) -> float:
    _wait(inputs)
    start = time.perf_counter()
    network(inputs)
    _wait(inputs)
    return time.perf_counter() - start


def _wait(tensor: Tensor) -> None:
    """Let a GPU finish what it was given."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
