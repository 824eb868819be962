"""What a finished plan is paid: named terms × weights of the same names."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from ..pruning.checks import check_types
from ..pruning.cost import Cost
from ..pruning.errors import UserError, closest
from ..pruning.evaluation import Score


class Measured(NamedTuple):
    """How a trimmed network does on the reward images, and what it costs."""

    score: Score
    cost: Cost


@dataclass(frozen=True)
class Outcome:
    """What a reward may look at.

    Attributes:
        plan: The finished plan's network.
        baseline: Accuracy of the original network on the same images, in [0, 1].
        kept: Share of the original cost that is left, in (0, 1], in the budget's unit.
        uniform: The network of the uniform plan at the same budget; None where no term asks for it.
    """

    plan: Measured
    baseline: float
    kept: float
    uniform: Measured | None = None

    @property
    def reference(self) -> Measured:
        """The uniform plan's network, where there is one."""
        assert self.uniform is not None, "a term of RELATIVE needs the uniform plan"
        return self.uniform


@dataclass(frozen=True)
class RewardSettings:
    """How plans are paid.

    Attributes:
        objective: "budget": accuracy relative to the uniform plan at the same budget.
            "accuracy_floor": ψ · φ of try-and-learn (Huang et al. 2018): ψ = (b − (p* − p̂)) / b, φ = ln(N / C).
        accepted_drop: b, the accepted drop of accuracy, in (0, 1].
        weights: Weight of each term, replacing the objective's own: "gain_over_uniform" (accuracy, a share),
            "loss_gain" (cross-entropy below the uniform plan's, in nats), "divergence_gain" (mean KL divergence from
            the original's outputs below the uniform plan's, in nats: agreement with the original, for which labels do
            not count), "parameters_gain" (logarithm of the number of parameters over the uniform plan's: of networks
            with equal MACs the one with more parameters gains more by retraining), "psi_phi", "accuracy", "saving";
            "negative_error" (accuracy - 1) and "error_log_macs" (-(1 - accuracy) · ln MACs) are the rewards of AMC
            (He et al. 2018), the one where a budget is enforced, the other where none is.
    """

    objective: str = "budget"
    accepted_drop: float = 0.02
    weights: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse values of other types, unknown names and an accepted drop outside (0, 1]."""
        check_types(self)
        if self.objective not in OBJECTIVES:
            hint = closest(self.objective, OBJECTIVES)
            raise UserError(f"objective must be a known name, but got {self.objective!r}{hint}")
        if not 0 < self.accepted_drop <= 1:
            raise UserError(f"accepted_drop must be in (0, 1], but got {self.accepted_drop}; 0.01 is one point")
        for name in self.weights:
            if name not in TERMS:
                raise UserError(f"a reward term must be a known name, but got {name!r}{closest(str(name), TERMS)}")


Term = Callable[[Outcome, RewardSettings], float]


def _gain(outcome: Outcome, settings: RewardSettings) -> float:
    return outcome.plan.score.accuracy - outcome.reference.score.accuracy


def _loss_gain(outcome: Outcome, settings: RewardSettings) -> float:
    return outcome.reference.score.loss - outcome.plan.score.loss


def _divergence_gain(outcome: Outcome, settings: RewardSettings) -> float:
    return outcome.reference.score.divergence - outcome.plan.score.divergence


def _parameters_gain(outcome: Outcome, settings: RewardSettings) -> float:
    return math.log(outcome.plan.cost.params / outcome.reference.cost.params)


def _psi_phi(outcome: Outcome, settings: RewardSettings) -> float:
    lost = outcome.baseline - outcome.plan.score.accuracy
    psi = (settings.accepted_drop - lost) / settings.accepted_drop
    return psi * math.log(1.0 / outcome.kept)


def _accuracy(outcome: Outcome, settings: RewardSettings) -> float:
    return outcome.plan.score.accuracy


def _saving(outcome: Outcome, settings: RewardSettings) -> float:
    return 1.0 - outcome.kept


def _negative_error(outcome: Outcome, settings: RewardSettings) -> float:
    return outcome.plan.score.accuracy - 1.0


def _error_log_macs(outcome: Outcome, settings: RewardSettings) -> float:
    return -(1.0 - outcome.plan.score.accuracy) * math.log(outcome.plan.cost.macs)


RELATIVE: dict[str, Term] = {
    "gain_over_uniform": _gain,
    "loss_gain": _loss_gain,
    "divergence_gain": _divergence_gain,
    "parameters_gain": _parameters_gain,
}
"""Terms beside the uniform plan at the same budget."""

TERMS: dict[str, Term] = {
    **RELATIVE,
    "psi_phi": _psi_phi,
    "accuracy": _accuracy,
    "saving": _saving,
    "negative_error": _negative_error,
    "error_log_macs": _error_log_macs,
}

OBJECTIVES: Mapping[str, dict[str, float]] = {
    "budget": {"gain_over_uniform": 10.0},
    "accuracy_floor": {"psi_phi": 1.0},
}


class Reward:
    """Weighs the terms of one objective."""

    def __init__(self, settings: RewardSettings) -> None:
        self.settings = settings
        self.weights = dict(settings.weights) or dict(OBJECTIVES[settings.objective])

    @property
    def needs_reference(self) -> bool:
        """Whether the uniform plan has to be scored."""
        return bool(RELATIVE.keys() & self.weights.keys())

    def terms(self, outcome: Outcome) -> dict[str, float]:
        """Return every weighted term by name."""
        return {name: TERMS[name](outcome, self.settings) for name in self.weights}

    def total(self, terms: Mapping[str, float]) -> float:
        """Return the sum of terms × weights."""
        return float(sum(self.weights[name] * value for name, value in terms.items()))
