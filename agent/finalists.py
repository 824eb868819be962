"""The networks that are compared at the end, each built from a schedule, and the verdict between them.

The test split is opened once, for all of them together.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import binomtest
from torch import nn

from ..pruning.cost import Cost
from ..pruning.data import Split
from ..pruning.evaluation import Score, right_answers
from ..pruning.latency import Latency, measure_latency
from ..pruning.schedule import BuiltRound, Schedule
from ..pruning.tracing import evaluation_mode
from ..pruning.trimmer import Trimmer

LATENCY_SECONDS = 0.2
"""Forward passes of one network and batch size are repeated for about that long."""


@dataclass(eq=False)
class Finalist:
    """A finished network and its scores.

    Attributes:
        name: "original", "uniform", "network_trimming", … or "agent".
        label: For people.
        network: The network.
        cost: Parameters and MACs.
        schedule: How it came about; None for the original.
        rounds: Scores of each round on the reward images.
        selection: Score on the selection split.
        test: Share of test examples that are right; None before the test split was opened.
        right: (examples,) which test examples are right.
        note: A remark for the report.
        latencies: Time of a forward pass on this machine, for each batch size that was asked for.
    """

    name: str
    label: str
    network: nn.Module
    cost: Cost
    schedule: Schedule | None
    rounds: tuple[BuiltRound, ...]
    selection: Score
    test: float | None = None
    right: NDArray[np.bool_] | None = None
    note: str = ""
    latencies: tuple[Latency, ...] = ()

    @property
    def after_trim(self) -> float | None:
        """Accuracy on the reward images after the last cut, before the training that follows it."""
        return self.rounds[-1].after_trim.accuracy if self.rounds else None

    @property
    def updates_taken(self) -> int:
        """Optimizer steps of retraining that were taken, over all rounds."""
        return sum(entry.updates_taken for entry in self.rounds)

    def to_dict(self, whole: Cost) -> dict[str, Any]:
        """Return plain data for JSON; `whole` is the original's cost."""
        return {
            "name": self.name,
            "label": self.label,
            "params": self.cost.params,
            "macs": self.cost.macs,
            "params_kept": self.cost.params / whole.params,
            "macs_kept": self.cost.macs / whole.macs,
            "retrain_updates": self.updates_taken,
            "retrain_updates_asked": self.schedule.retrain_updates if self.schedule else 0,
            "stopped_early": any(r.stopped_early for r in self.rounds),
            "accuracy_after_trim_reward_split": self.after_trim,
            "accuracy_selection_split": self.selection.accuracy,
            "accuracy_test_split": self.test,
            "widths": self.schedule.plan.counts if self.schedule else None,
            "rounds": [
                {
                    "widths": r.widths,
                    "accuracy_after_trim": r.after_trim.accuracy,
                    "accuracy_after_retraining": r.after_retraining.accuracy,
                    "params": r.cost.params,
                    "macs": r.cost.macs,
                    "retrain_updates": r.updates_taken,
                    "retrain_updates_asked": r.retrain_updates,
                    "stopped_early": r.stopped_early,
                    "best_update": r.training.best_update if r.training else 0,
                    "best_accuracy_selection_split": _known(r.training.best_accuracy) if r.training else None,
                }
                for r in self.rounds
            ],
            "note": self.note,
            "latency_ms": {str(latency.batch): latency.median_ms for latency in self.latencies},
        }


@dataclass(frozen=True)
class Verdict:
    """A paired comparison on the same test examples.

    Attributes:
        first: Name of one finalist.
        second: Name of the other.
        points: Accuracy of the first minus the second's, in percentage points.
        only_first: Examples that only the first gets right.
        only_second: Examples that only the second gets right.
        p_value: Exact two-sided sign test over these (McNemar); training noise between seeds is not in it.
        outcome: "better", "worse" or "not distinguishable" (p >= 0.05).
    """

    first: str
    second: str
    points: float
    only_first: int
    only_second: int
    p_value: float
    outcome: str


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def read_test_split(trimmer: Trimmer, finalists: Sequence[Finalist]) -> None:
    """Open the test split once and score every finalist on it."""
    split = trimmer.task.test.open("final comparison of " + ", ".join(finalist.name for finalist in finalists))
    device = next(trimmer.task.network.parameters()).device
    split = split.to(device)
    for finalist in finalists:
        finalist.right = right_examples(finalist.network, split, trimmer.settings.batch_size, trimmer.task.metric)
        finalist.test = float(finalist.right.mean())


def time_networks(trimmer: Trimmer, finalists: Sequence[Finalist], batches: Sequence[int]) -> None:
    """Measure every finalist's latency, batch size by batch size, so that neighbours in time are compared."""
    found: dict[str, list[Latency]] = {finalist.name: [] for finalist in finalists}
    for batch in batches:
        for finalist in finalists:
            timing = measure_latency(finalist.network, trimmer.task.example, batch, seconds=LATENCY_SECONDS)
            found[finalist.name].append(timing)
    for finalist in finalists:
        finalist.latencies = tuple(found[finalist.name])


def right_examples(network: nn.Module, split: Split, batch_size: int, metric: str) -> NDArray[np.bool_]:
    """Return (examples,) whether each example counts as right."""
    parts = []
    with evaluation_mode(network), torch.inference_mode():
        for images, labels in split.batches(batch_size):
            parts.append(right_answers(network(images), labels, metric).cpu().numpy())
    return np.concatenate(parts)


def compare_pair(first: Finalist, second: Finalist) -> Verdict:
    """Compare two finalists on the test examples they were both scored on."""
    assert first.right is not None
    assert second.right is not None
    only_first = int((first.right & ~second.right).sum())
    only_second = int((~first.right & second.right).sum())
    differ = only_first + only_second
    p_value = float(binomtest(only_first, differ).pvalue) if differ else 1.0
    outcome = "not distinguishable" if p_value >= 0.05 else ("better" if only_first > only_second else "worse")
    points = 100.0 * (only_first - only_second) / len(first.right)
    return Verdict(first.name, second.name, points, only_first, only_second, p_value, outcome)


def verdict_sentence(verdict: Verdict, labels: Mapping[str, str]) -> str:
    """Say the verdict in one sentence."""
    first, second = labels[verdict.first], labels[verdict.second]
    difference = f"{verdict.points:+.2f} points on the test split"
    chance = f"p = {verdict.p_value:.2g}" if verdict.p_value > 1e-99 else "p < 1e-99"
    differing = verdict.only_first + verdict.only_second
    evidence = f"exact McNemar test on {differing} differing examples, {chance}"
    if verdict.outcome == "not distinguishable":
        return f"{first} is not distinguishable from {second} in this run ({difference}; {evidence})."
    return f"{first} is {verdict.outcome} than {second} in this run ({difference}; {evidence})."
