"""What an action means. Each rule owns its space and turns a round's actions into channel counts.

Actions are numbers in [-1, 1], one per group. 1 keeps most (score, ratio) or trims least (threshold).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from ..pruning.budget import solve_counts, solve_each
from ..pruning.cost import CostModel
from ..pruning.errors import UserError, closest
from ..pruning.subject import Subject
from ..pruning.widths import CountArray


@dataclass(frozen=True)
class RoundTarget:
    """What a round has to meet.

    Attributes:
        share: Share of the pristine network's cost that may be left after the round; None = free.
        unit: "macs" or "params".
        last: Whether it is the episode's last round.
    """

    share: float | None
    unit: str
    last: bool


class ActionRule(ABC):
    """Meaning of the actions; `model` is the pristine network's cost model, whose allowed widths all counts keep to."""

    def __init__(self, model: CostModel) -> None:
        self.model = model

    def space(self) -> gym.spaces.Box:
        """Return the action space of one step, Box(-1, 1, (1,))."""
        return gym.spaces.Box(-1.0, 1.0, (1,), np.float32)

    @abstractmethod
    def requested(self, actions: NDArray[np.float64], subject: Subject) -> NDArray[np.float64]:
        """Return (t,) the shares of the present channels that the first t actions ask to keep, in [0, 1]."""

    @abstractmethod
    def decided(self, actions: NDArray[np.float64], subject: Subject, target: RoundTarget) -> CountArray:
        """Return (groups,) counts known after t <= groups actions; an undecided group shows its present width."""

    def resolve(self, actions: NDArray[np.float64], subject: Subject, target: RoundTarget) -> CountArray:
        """Return (groups,) the counts that are executed at the end of the round."""
        return self.decided(actions, subject, target)

    def resolve_each(
        self, actions: NDArray[np.float64], subject: Subject, shares: NDArray[np.float64], unit: str
    ) -> CountArray:
        """Return (plans, groups) what `resolve` gives for (plans, groups) actions of an only round.

        Args:
            actions: In [-1, 1].
            subject: What is cut.
            shares: (plans,) of the pristine network's cost that may be left.
            unit: "macs" or "params".
        """
        targets = [RoundTarget(float(share), unit, last=True) for share in shares]
        return np.array([self.resolve(row, subject, target) for row, target in zip(actions, targets, strict=True)])

    def smallest(self, subject: Subject) -> CountArray:
        """Return (groups,) the fewest channels an action can leave."""
        return self.model.allowed.smallest(_widths(subject))

    def check(self, budget: float | None, unit: str) -> None:
        """Refuse a budget that the rule cannot meet, or an unknown unit, before anything runs."""
        self.model.check_budget(1.0 if budget is None else budget, unit)


class ScoreAction(ActionRule):
    """A score per group; at the end of the round one scalar b is solved: keep = sigmoid(scale · action + b).

    The budget is met by construction, within one allowed width. Equal actions are the uniform plan.
    """

    def __init__(self, model: CostModel, scale: float = 3.0) -> None:
        super().__init__(model)
        self.scale = scale

    def requested(self, actions: NDArray[np.float64], subject: Subject) -> NDArray[np.float64]:
        """Return sigmoid(scale · action), what would stay if b were 0."""
        return 1.0 / (1.0 + np.exp(-self.scale * actions))

    def decided(self, actions: NDArray[np.float64], subject: Subject, target: RoundTarget) -> CountArray:
        """Return the present widths: nothing is decided before all scores are known."""
        return _widths(subject)

    def resolve(self, actions: NDArray[np.float64], subject: Subject, target: RoundTarget) -> CountArray:
        """Solve for b."""
        assert target.share is not None  # held by `check`
        return solve_counts(self.model, self.scale * actions, target.share, target.unit, widths=_widths(subject))

    def resolve_each(
        self, actions: NDArray[np.float64], subject: Subject, shares: NDArray[np.float64], unit: str
    ) -> CountArray:
        """Solve for all of them at once."""
        return solve_each(self.model, self.scale * actions, shares, unit, widths=_widths(subject))

    def check(self, budget: float | None, unit: str) -> None:
        """Scores mean something only under a budget."""
        if budget is None:
            raise UserError("action 'score' needs a budget; set one, or use action 'ratio' or 'threshold'")
        super().check(budget, unit)


class RatioAction(ActionRule):
    """A share to trim per group, from 0 (action 1) to `largest_trim` (action -1).

    Clipped only when even the largest trim of all later groups could no longer meet the budget (He et al. 2018, AMC).
    """

    def __init__(self, model: CostModel, largest_trim: float = 0.95) -> None:
        super().__init__(model)
        self.largest_trim = largest_trim

    def requested(self, actions: NDArray[np.float64], subject: Subject) -> NDArray[np.float64]:
        """Return the shares to keep."""
        return 1.0 - self.largest_trim * (1.0 - actions) / 2.0

    def decided(self, actions: NDArray[np.float64], subject: Subject, target: RoundTarget) -> CountArray:
        """Round to the nearest allowed widths, then clip group by group."""
        present = _widths(subject)
        counts = self.smallest(subject)
        asked, keep = present.copy(), self.requested(actions, subject)
        asked[: len(keep)] = _whole(keep * present[: len(keep)])
        asked = self.model.allowed.nearest(asked, present)
        for place in range(len(keep)):
            counts[place] = asked[place]
            if target.share is not None:
                counts[place] = self._clip(counts, place, present, target)
        counts[len(keep) :] = present[len(keep) :]
        return counts

    def smallest(self, subject: Subject) -> CountArray:
        """Return what the largest trim leaves, rounded to the nearest allowed widths."""
        return self._least(_widths(subject))

    def _least(self, present: CountArray) -> CountArray:
        return self.model.allowed.nearest(_whole((1 - self.largest_trim) * present), present)

    def _clip(self, counts: CountArray, place: int, present: CountArray, target: RoundTarget) -> int:
        """Return the widest allowed width, up to that asked for, with which the rest could still meet the budget."""
        assert target.share is not None
        trial, allowed = counts.copy(), self.model.allowed
        low, high = int(allowed.smallest(present)[place]), int(counts[place])
        while low < high:
            middle = (low + high + 1) // 2
            trial[place] = middle
            low, high = (middle, high) if self.model.share(trial, target.unit) <= target.share else (low, middle - 1)
        trial[place] = low
        return int(allowed.not_above(trial, present)[place])

    def check(self, budget: float | None, unit: str) -> None:
        """Also refuse what the largest trim cannot reach."""
        super().check(budget, unit)
        least = self.model.share(self._least(self.model.widths), unit)
        if budget is not None and least > budget:
            raise UserError(
                f"budget must be reachable by trimming {self.largest_trim:.0%} of each group, which leaves {least:.6f} "
                f"of the {unit}{self.model.allowed.settings.limits}, but got {budget=}; raise largest_trim or the "
                "budget"
            )


class ThresholdAction(ActionRule):
    """A threshold per group: channels with APoZ above mean + z·σ leave, z = 1 + 2 · action in [-1, 3].

    Action 0 is the rule of Network Trimming (Hu et al. 2016). Where not every width is allowed, the best of those above
    the threshold stay, up to the next allowed width. A budget, if any, is enforced at the last round: what the
    thresholds leave is shrunk uniformly.
    """

    def requested(self, actions: NDArray[np.float64], subject: Subject) -> NDArray[np.float64]:
        """Return the shares that lie below the thresholds."""
        shares = np.empty(len(actions))
        for place, action in enumerate(actions):
            apoz = subject.statistics.groups[subject.groups[place].name].apoz
            shares[place] = 1.0 if apoz is None else float((apoz <= apoz.mean() + (1 + 2 * action) * apoz.std()).mean())
        return shares

    def decided(self, actions: NDArray[np.float64], subject: Subject, target: RoundTarget) -> CountArray:
        """Count the channels below the thresholds, up to the next allowed width, at least one."""
        present = _widths(subject)
        counts, shares = present.copy(), self.requested(actions, subject)
        counts[: len(shares)] = np.maximum(1, np.rint(shares * counts[: len(shares)])).astype(np.int64)
        return self.model.allowed.not_below(counts, present)

    def resolve(self, actions: NDArray[np.float64], subject: Subject, target: RoundTarget) -> CountArray:
        """Enforce the budget at the last round."""
        counts = self.decided(actions, subject, target)
        if target.share is None or not target.last or self.model.share(counts, target.unit) <= target.share:
            return counts
        return solve_counts(self.model, np.zeros(len(counts)), target.share, target.unit, widths=counts)


def make_action_rule(name: str, model: CostModel, *, score_scale: float, largest_trim: float) -> ActionRule:
    """Return the rule called `name`: "score", "ratio" or "threshold"."""
    if name == "score":
        return ScoreAction(model, score_scale)
    if name == "ratio":
        return RatioAction(model, largest_trim)
    if name == "threshold":
        return ThresholdAction(model)
    raise UserError(f"action must be a known name, but got {name!r}{closest(name, ('score', 'ratio', 'threshold'))}")


def _whole(channels: Any) -> Any:
    """Round to whole channels, halves up, at least one; a number or an array."""
    return np.maximum(1, np.floor(channels + 0.5)).astype(np.int64)


def _widths(subject: Subject) -> CountArray:
    return np.array([group.width for group in subject.groups], dtype=np.int64)
