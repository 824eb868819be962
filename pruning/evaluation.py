"""Accuracy and loss of a network on labelled data, with its modes restored."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import UserError, closest
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
    """

    accuracy: float
    loss: float
    examples: int


def evaluate(network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], metric: str = "accuracy") -> Score:
    """Score a network in evaluation mode.

    Args:
        network: Comes back as it was.
        batches: Pairs of inputs (N, …) and class indices (N,).
        metric: Name from `METRICS`.

    Raises:
        UserError: Unknown metric, or no data.
    """
    if metric not in METRICS:
        raise UserError(f"metric must be a known name, but got {metric!r}{closest(metric, METRICS)}")
    right, loss, examples = 0, 0.0, 0
    with evaluation_mode(network), torch.inference_mode():
        for inputs, labels in batches:
            logits = network(inputs)
            right += int(right_answers(logits, labels, metric).sum())
            loss += float(F.cross_entropy(logits.float(), labels, reduction="sum"))
            examples += len(labels)
    if not examples:
        raise UserError("scoring needs at least one example, but the split is empty")
    return Score(right / examples, loss / examples, examples)


def right_answers(logits: Tensor, labels: Tensor, metric: str) -> Tensor:
    """Return (N,) bool: whether the label is among the outputs that the metric lets count; logits (N, classes)."""
    best = logits.topk(min(METRICS[metric], logits.shape[1]), dim=1).indices  # (N, k)
    return (best == labels[:, None]).any(1)
