"""What a `Trimmer` gives, and where it keeps scores."""

from dataclasses import dataclass
from typing import Protocol

from torch import nn

from .cost import Cost
from .evaluation import Score
from .optimizer_state import OptimizerState
from .plan import PruningPlan
from .retrain_settings import RetrainResult


@dataclass(frozen=True, eq=False)
class Trimmed:
    """What a trim gives.

    Attributes:
        network: The smaller network, in evaluation mode.
        plan: What stays of the pristine network.
        score: On the reward split.
        cost: Parameters and MACs.
        retraining: What training did, or None.
        state: Where the optimizer of the next training goes on: what the last one left, or what was left before the
            cut, sliced with it. None = at rest.
        lineage: As of `Subject`.
    """

    network: nn.Module
    plan: PruningPlan
    score: Score
    cost: Cost
    retraining: RetrainResult | None = None
    state: OptimizerState | None = None
    lineage: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Evaluated:
    """What a plan is worth.

    Attributes:
        score: On the reward split.
        cost: Parameters and MACs.
        plan: What stays of the pristine network.
        cached: Whether the score came from the store.
    """

    score: Score
    cost: Cost
    plan: PruningPlan
    cached: bool = False


class ScoreStore(Protocol):
    """Where scores are kept by what decided them, such as `score_cache.ScoreCache`."""

    def get(self, key: str) -> Score | None:
        """Return the score of a key, or None."""

    def put(self, key: str, score: Score) -> None:
        """Keep a score."""
