"""Latency is wall-clock time: a network that sleeps is measured by its sleep."""

import time

import pytest
import torch
from prunegym.pruning.errors import UserError
from prunegym.pruning.latency import FEWEST, WARM_UP, measure_latency
from torch import Tensor, nn


class Sleeper(nn.Module):
    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        self.seen: list[tuple[int, ...]] = []

    def forward(self, x: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        assert not self.training
        self.seen.append(tuple(x.shape))
        time.sleep(self.seconds)
        return x


def test_median_of_warm_passes() -> None:
    network = Sleeper(0.02).train()
    found = measure_latency(network, torch.zeros(3, 2, 4), batch=5, seconds=0.0)
    assert 20 <= found.median_ms < 60
    assert (found.batch, found.repeats) == (5, FEWEST)
    assert network.seen == [(5, 2, 4)] * (FEWEST + WARM_UP)
    assert network.training


def test_short_passes_are_repeated_for_the_time_given() -> None:
    found = measure_latency(Sleeper(0.001), torch.zeros(1, 2), seconds=0.1)
    assert found.repeats > 3 * FEWEST
    assert found.repeats * found.median_ms <= 2 * 100


def test_batch_below_one() -> None:
    with pytest.raises(UserError, match="batch must be at least 1, but got 0"):
        measure_latency(Sleeper(0.0), torch.zeros(1, 2), batch=0)
