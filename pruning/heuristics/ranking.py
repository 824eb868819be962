"""Rank every channel by one criterion and let the weakest go: at once, in rounds, or a few at a time.

The rankings everybody knows (magnitude, mean activation, Taylor), one code for all. Interleaved with updates and a few
channels a step this is the procedure of Molchanov, Tyree, Karras, Aila, Kautz, "Pruning Convolutional Neural Networks
for Resource Efficient Inference" (2017, arXiv 1611.06440): remove the least important channels, train a little, repeat;
with criterion "taylor_2019" that of Molchanov, Mallya, Tyree, Frosio, Kautz (2019, arXiv 1906.10771).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..budget import solve_counts
from ..checks import check_types
from ..cost import CostModel
from ..criteria import CRITERIA, NORMS, get_criterion, normalised_scores
from ..errors import UserError, closest
from ..groups import ChannelGroup
from ..retraining import RetrainSettings
from ..subject import Subject
from ..trimmer import Trimmer
from .cuts import FLOOR_ROUNDS, Candidate, floors, next_share, weakest_leave
from .plans import Goal, Pruned
from .rounds import Decision, Pace, decision_of, prune_in_rounds

SCOPES = ("uniform", "global", "local")


@dataclass(frozen=True)
class RankingSettings:
    """How a ranking is turned into plans.

    Attributes:
        scope: "uniform": the same share of every group stays. "global": one ranking over all groups. "local": every
            group has a threshold of its own, the same multiple of its mean score.
        norm: What makes scores of different groups comparable under "global": "l2", the Euclidean norm of their layer
            (Molchanov 2017), "mean", their layer's mean, or "none"; "own" = "l2", but "none" for "taylor_2019", which
            was published so.
        channels_per_round: Channels that leave in a round ("global" and "local"); 0 = as many as the budget and
            `rounds` ask for.
        rounds: Cuts on the way to the budget, each by the same factor, where `channels_per_round` is 0. With an
            accuracy floor each cut takes a tenth of what can still be cut instead.
        updates_between: Optimizer steps after every round but the last, as long as there are any left; -1 = an equal
            share of those for early rounds.
        final_share: Share of all updates, in [0, 1], that is kept for the training after the last round; of no account
            where `updates_between` is given.
        narrowest: Least share of its original channels that a group keeps, in [0, 1].
        mac_regulariser: λ of Θ − λ · Θ_flops, at least 0, Θ_flops being the millions of MACs that leave with one
            channel (Molchanov 2017, there 1e-3); 0 = none. Scopes "global" and "local".
    """

    scope: str = "uniform"
    norm: str = "own"
    channels_per_round: int = 0
    rounds: int = 1
    updates_between: int = -1
    final_share: float = 0.5
    narrowest: float = 0.0
    mac_regulariser: float = 0.0

    def __post_init__(self) -> None:
        """Refuse values of other types or outside their ranges."""
        check_types(self)
        if self.scope not in SCOPES:
            raise UserError(f"scope must be a known name, but got {self.scope!r}{closest(self.scope, SCOPES)}")
        if self.norm not in ("own", *NORMS):
            raise UserError(f"norm must be one of own, {', '.join(NORMS)}, but got {self.norm!r}")
        if self.rounds < 1 or self.channels_per_round < 0 or self.updates_between < -1:
            raise UserError(
                "a ranking needs rounds >= 1, channels_per_round >= 0 and updates_between >= -1, but got "
                f"{self.rounds}, {self.channels_per_round} and {self.updates_between}"
            )
        if not 0 <= self.final_share <= 1 or not 0 <= self.narrowest <= 1 or self.mac_regulariser < 0:
            raise UserError(
                "a ranking needs final_share and narrowest in [0, 1] and mac_regulariser >= 0, but got "
                f"{self.final_share}, {self.narrowest} and {self.mac_regulariser}"
            )
        if self.scope == "uniform" and (self.channels_per_round or self.mac_regulariser or self.narrowest):
            raise UserError(
                "scope 'uniform' decides how much of each group stays, so channels_per_round, mac_regulariser and "
                f"narrowest must be 0, but got {self.channels_per_round}, {self.mac_regulariser} and {self.narrowest}; "
                "use scope 'global' or 'local'"
            )


def rank_and_cut(
    trimmer: Trimmer,
    goal: Goal,
    settings: RankingSettings | None = None,
    *,
    criterion: str,
    method: str | None = None,
    retraining: RetrainSettings,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Pruned:
    """Let the channels of lowest score leave until the goal is met, scores measured anew after every round.

    Args:
        trimmer: Task and settings; its criterion is replaced.
        goal: Budget, met from below within one allowed width, or accuracy floor.
        settings: See `RankingSettings`.
        criterion: Name from `criteria.CRITERIA`.
        method: Name for provenance; the criterion's by default.
        retraining: `updates` is the total over all rounds, see `prune_in_rounds`.
        seed: Of the retraining, in [0, 2**63).
        progress: Called with the number of optimizer steps done so far.

    Raises:
        UserError: The network cannot serve the criterion (no ReLU for APoZ, no batch norm for its scale), an
            unreachable budget, or a first round that loses more than accepted.
    """
    settings = settings or RankingSettings()
    check_serves(trimmer.groups, criterion)
    trimmer = trimmer.with_settings(replace(trimmer.settings, criterion=criterion))
    check_floor(trimmer.cost_model, goal, settings)
    rule, pace = _Rule(trimmer, goal, settings), _pace(trimmer.cost_model, goal, settings)
    return prune_in_rounds(
        trimmer, rule, goal, pace, method=method or criterion, retraining=retraining, seed=seed, progress=progress
    )


def check_floor(model: CostModel, goal: Goal, settings: RankingSettings) -> None:
    """Refuse a budget below what the narrowest allowed groups cost.

    Raises:
        UserError: Names what they cost.
    """
    if goal.budget is None:
        return
    model.check_budget(goal.budget, goal.unit)
    least = model.share(floors(model, settings.narrowest), goal.unit)
    if least > goal.budget:
        raise UserError(
            f"the budget must be reachable, but with narrowest {settings.narrowest} every group at its narrowest still "
            f"costs {least:.4f} of the {goal.unit}; the budget is {goal.budget}; lower narrowest, or raise the budget"
        )


def check_serves(groups: Sequence[ChannelGroup], criterion: str) -> None:
    """Refuse a criterion that is undefined for one of the groups, and name those that are not.

    Raises:
        UserError: Names the groups and the alternatives.
    """
    record = get_criterion(criterion)
    lacking = [group.name for group in groups if record.needs_relu and not group.rectified]
    needed = "a ReLU"
    if record.needs_norm:
        needed = "a batch norm with weights"
        lacking = [group.name for group in groups if not _normed(group)]
    if lacking:
        some = ", ".join(lacking[:3]) + (f" and {len(lacking) - 3} more" if len(lacking) > 3 else "")
        others = [name for name, other in CRITERIA.items() if not other.needs_relu and not other.needs_norm]
        others.remove("data_free")  # which has demands of its own
        raise UserError(
            f"method {criterion!r} needs {needed} behind every channel group, but none follows {some}; "
            f"leave these whole (groups.ignore), or use {', '.join(others)}"
        )


def _normed(group: ChannelGroup) -> bool:
    names = {piece.tensor for piece in group.slices}
    return any(name.removesuffix("running_mean") + "weight" in names for name in names if "running_mean" in name)


def _pace(model: CostModel, goal: Goal, settings: RankingSettings) -> Pace:
    between = None if settings.updates_between < 0 else settings.updates_between
    if settings.channels_per_round:
        most = math.ceil(int(model.widths.sum()) / settings.channels_per_round) + 1
    elif goal.accepted_drop is None:
        most = settings.rounds
    else:
        most = FLOOR_ROUNDS
    return Pace(most, between, settings.final_share)


class _Rule:
    """The channels of lowest score leave; see `RankingSettings.scope`."""

    def __init__(self, trimmer: Trimmer, goal: Goal, settings: RankingSettings) -> None:
        self.model, self.goal, self.settings = trimmer.cost_model, goal, settings
        self.criterion = trimmer.settings.criterion
        self.floor = floors(self.model, settings.narrowest)

    def __call__(self, subject: Subject, place: int, last: bool) -> Decision | None:
        goal = self._goal(subject, place)
        present = np.array([group.width for group in subject.groups], dtype=np.int64)
        if self.settings.scope == "uniform":
            assert goal.budget is not None  # `_goal` sets one where no number of channels is given
            counts = solve_counts(self.model, np.zeros(len(present)), goal.budget, goal.unit, widths=present)
            keep = {
                group.name: np.isin(np.arange(group.width), subject.orders[group.name][:count])
                for group, count in zip(subject.groups, counts.tolist(), strict=True)
            }
        else:
            keep = weakest_leave(
                self.model, subject, self._candidates(subject, present), self.floor, goal,
                at_most=self.settings.channels_per_round or None,
            )  # fmt: skip
        return decision_of(keep, subject, self.goal, self.model)

    def _goal(self, subject: Subject, place: int) -> Goal:
        """Return the goal of one round."""
        if self.settings.channels_per_round:
            return self.goal
        if self.goal.accepted_drop is None:
            assert self.goal.budget is not None  # held by `Goal`
            return replace(self.goal, budget=self.goal.budget ** ((place + 1) / self.settings.rounds))
        return replace(self.goal, budget=next_share(self.model, subject.plan.counts, self.floor, self.goal))

    def _candidates(self, subject: Subject, present: NDArray[np.int64]) -> list[Candidate]:
        norm = "mean" if self.settings.scope == "local" else self.settings.norm
        if norm == "own":
            norm = "none" if self.criterion == "taylor_2019" else "l2"
        scores = normalised_scores(self.criterion, subject.groups, subject.context, norm)
        saved = self._saved_macs(present) if self.settings.mac_regulariser else np.zeros(len(present))
        return [
            (self.settings.mac_regulariser * float(macs) - float(score), group.name, channel)
            for group, macs in zip(subject.groups, saved, strict=True)
            for channel, score in enumerate(scores[group.name])
        ]

    def _saved_macs(self, present: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return (groups,) the millions of MACs that leave with one more channel of each group."""
        whole = self.model.cost(present).macs
        fewer = present - np.eye(len(present), dtype=np.int64)
        return np.array([(whole - self.model.cost(counts).macs) / 1e6 for counts in fewer])
