"""Accuracy and loss of a network on labelled data, with its modes restored."""

import math
from collections.abc import Generator, Iterable
from contextlib import closing
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import UserError, closest
from .precision import autocast, check_precision
from .tracing import evaluation_mode

METRICS = {"accuracy": 1, "top5_accuracy": 5}
"""Metric name -> how many of the highest outputs may contain the label."""


@dataclass(frozen=True)
class Score:
    """How well a network does.

    Attributes:
        accuracy: Share of examples that count as right, in [0, 1] (top-1 or top-5, by the metric).
        loss: Mean cross-entropy in nats.
        examples: Number of examples.
        divergence: Mean Kullback-Leibler divergence KL(original || network) of the outputs, in nats, from 0; nan
            where it was not measured.
    """

    accuracy: float
    loss: float
    examples: int
    divergence: float = math.nan

    def __eq__(self, other: object) -> bool:
        """Two scores are equal when all their numbers are; what is nan in both counts as equal."""
        return isinstance(other, Score) and self._comparable() == other._comparable()

    def __hash__(self) -> int:
        """Hash over all numbers."""
        return hash(self._comparable())

    def _comparable(self) -> tuple[float | None, ...]:
        numbers = (self.accuracy, self.loss, self.examples, self.divergence)
        return tuple(None if math.isnan(number) else number for number in numbers)


def evaluate(
    network: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    metric: str = "accuracy",
    *,
    precision: str = "float32",
    original: Iterable[Tensor] | None = None,
) -> Score:
    """Score a network in evaluation mode.

    Args:
        network: Comes back as it was.
        batches: Pairs of inputs (N, …), which are not changed, and class indices (N,).
        metric: Name from `METRICS`.
        precision: Of the forward passes, a name from `precision.PRECISIONS`; sums are taken in float32 or wider.
        original: Log-probabilities (N, classes) of the original for each batch, see `log_probabilities`; with them
            the divergence is measured.

    Raises:
        UserError: Unknown metric or precision, or no data.
    """
    if metric not in METRICS:
        raise UserError(f"metric must be a known name, but got {metric!r}{closest(metric, METRICS)}")
    right, loss, divergence, examples = 0, 0.0, 0.0, 0
    expected = None if original is None else iter(original)
    with closing(_outputs(network, batches, precision)) as outputs:  # at once, also where something here stops
        for logits, labels in outputs:
            right += int(right_answers(logits, labels, metric).sum())
            loss += float(F.cross_entropy(logits.float(), labels, reduction="sum"))
            if expected is not None:
                divergence += _divergence(next(expected), F.log_softmax(logits.float(), 1))
            examples += len(labels)
    if not examples:
        raise UserError("scoring needs at least one example, but the split is empty")
    return Score(right / examples, loss / examples, examples, math.nan if expected is None else divergence / examples)


def log_probabilities(
    network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], *, precision: str = "float32"
) -> tuple[Tensor, ...]:
    """Return the logarithms of a classifier's probabilities, float32 (N, classes) for each batch.

    Args:
        network: Comes back as it was.
        batches: Pairs of inputs (N, …), which are not changed, and labels, which are not read.
        precision: As for `evaluate`.
    """
    return tuple(F.log_softmax(logits.float(), 1) for logits, _ in _outputs(network, batches, precision))


def _outputs(
    network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], precision: str
) -> Generator[tuple[Tensor, Tensor], None, None]:
    """Yield a network's outputs (N, classes) with the labels (N,), in evaluation mode."""
    check_precision(precision)
    with evaluation_mode(network), torch.inference_mode():
        for inputs, labels in batches:
            with autocast(precision, inputs.device):
                logits = network(inputs.clone())  # a network may begin in place, and batches are read again
            yield logits, labels


def _divergence(expected: Tensor, got: Tensor) -> float:
    """Return the sum over examples of KL(expected || got), from log-probabilities (N, classes) each."""
    difference = expected.double() - got.double()
    total = float((expected.double().exp() * difference).sum())
    return 0.0 if total < 0 else total  # rounding may put equal distributions below zero


def right_answers(logits: Tensor, labels: Tensor, metric: str) -> Tensor:
    """Return (N,) bool: whether the label is among the outputs that the metric lets count; logits (N, classes)."""
    best = logits.topk(min(METRICS[metric], logits.shape[1]), dim=1).indices  # (N, k)
    return (best == labels[:, None]).any(1)
