"""The loop all iterative methods share: decide, cut, repair, train a little, measure anew, until the goal is met.

    subject --rule--> decision -> trimmed -> (trained) -> kept, or refused -> subject of the next round

A method is a rule, `(subject, place, last) -> Decision`; everything else is the same for all, so that they are
compared on the same ground at the same cost.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from ..checks import check_seed
from ..cost import CostModel
from ..errors import UserError
from ..evaluation import Score
from ..groups import shrink_groups
from ..plan import PruningPlan
from ..retraining import RetrainSettings
from ..schedule import BuiltRound, Round, Schedule, build, round_seed, round_training
from ..subject import Subject
from ..trimmed import Trimmed
from ..trimmer import Trimmer
from .cuts import Masks, nothing_leaves, plan_of
from .plans import Goal, PlanRecord, Provenance, Pruned

OPEN_END = 8
"""Where nobody knows how many rounds follow, each gets this part of the updates that are left for early ones."""


@dataclass(frozen=True)
class Pace:
    """How rounds follow each other.

    Attributes:
        max_rounds: Most rounds.
        updates_between: Optimizer steps after each round but the last, as long as there are any left; None = an equal
            share for each round that the first one lets expect, and without a budget an eighth of what is left for
            early rounds.
        final_share: Share of all updates, in [0, 1], that is kept for the training after the last round; of no account
            where `updates_between` is given.
    """

    max_rounds: int
    updates_between: int | None = None
    final_share: float = 0.5


@dataclass(frozen=True)
class Decision:
    """What a round cuts.

    Attributes:
        plan: What stays of the round's subject, in its numbering.
        forced: Whether the method's own rule gave way, to meet the budget.
    """

    plan: PruningPlan
    forced: bool = False


def decision_of(
    keep: Masks, subject: Subject, goal: Goal, model: CostModel, *, forced: bool = False
) -> Decision | None:
    """Return the decision to keep what the masks say; None where nothing leaves though the budget is not met."""
    if nothing_leaves(keep) and not goal.met(model, subject.plan.counts):
        return None
    return Decision(plan_of(keep), forced)


class Rule(Protocol):
    """How a method decides."""

    def __call__(self, subject: Subject, place: int, last: bool) -> Decision | None:
        """Decide round `place`, from 0; None where nothing more can leave. `last`: no round will follow."""


def prune_in_rounds(
    trimmer: Trimmer,
    rule: Rule,
    goal: Goal,
    pace: Pace,
    *,
    method: str,
    retraining: RetrainSettings,
    seed: int = 0,
    watched: Sequence[str] = (),
    progress: Callable[[int], None] | None = None,
) -> Pruned:
    """Cut, repair and train, round after round, until the goal is met.

    Args:
        trimmer: Task and settings; its criterion and compensation are the method's.
        rule: Decides each round.
        goal: Where to end. A rule keeps to the budget itself: it must not go below it by more than it needs.
        pace: Number of rounds and their share of the updates.
        method: Name, for provenance and messages.
        retraining: `updates` (or epochs) is the total over all rounds; the other values hold for each round, but only
            the training after the last one looks at the selection split (`check_every`, `patience`).
        seed: Of the retraining, in [0, 2**63).
        watched: Groups whose mean APoZ is recorded; each must have a ReLU behind it.
        progress: Called with the number of optimizer steps done so far.

    Raises:
        UserError: Nothing can leave, or the first round already loses more than accepted.
    """
    check_seed(seed)
    retraining = retraining.resolved(len(trimmer.task.train))
    if goal.budget is not None:
        trimmer.cost_model.check_budget(goal.budget, goal.unit)
    walk = _Walk(trimmer, goal, pace, method, retraining, seed, watched, progress)
    for place in range(pace.max_rounds):
        decision = rule(walk.subject, place, place + 1 == pace.max_rounds)
        if decision is None:
            walk.stopped_by = "rule"
            break
        if not walk.take(decision, place):
            break
    return walk.finish()


class _Walk:
    """From round to round: what is left, what was spent, what was recorded."""

    def __init__(
        self,
        trimmer: Trimmer,
        goal: Goal,
        pace: Pace,
        method: str,
        retraining: RetrainSettings,
        seed: int,
        watched: Sequence[str],
        progress: Callable[[int], None] | None,
    ) -> None:
        self.trimmer, self.goal, self.pace, self.method = trimmer, goal, pace, method
        self.retraining, self.seed, self.watched, self.progress = retraining, seed, watched, progress
        self.subject = trimmer.pristine
        self.stopped_by = "rounds"
        self.records: list[PlanRecord] = []
        self.apoz = [mean_apoz(self.subject, watched)]
        self.trimmed: Trimmed | None = None
        self.spent = 0
        self.share = 1.0  # of the cost, that the first round left
        self.told = 0
        self.finished = False  # whether the last round that was kept was trained as the last one

    def take(self, decision: Decision, place: int) -> bool:
        """Cut, train and keep a round, or refuse it; returns whether another may follow."""
        counts = self.subject.plan.then(decision.plan.completed(self.subject.groups)).counts
        met = self.goal.met(self.trimmer.cost_model, counts)
        if not place:
            self.share = self.trimmer.cost_model.share(counts, self.goal.unit)
        left = self.retraining.updates - self.spent
        final = met or place + 1 == self.pace.max_rounds
        updates = left if final else self._between(left)
        candidate, after_trim = self._make(decision, place, updates, final)
        if self._lost_too_much(candidate) and updates < left:  # all that is left may bring it back
            updates, final, met = left, True, False
            candidate, after_trim = self._make(decision, place, updates, final)
        if self._lost_too_much(candidate):
            if self.trimmed is None:
                drop = self.trimmer.baseline.accuracy - candidate.score.accuracy
                raise UserError(
                    f"{self.method} lost {100 * drop:.2f} points in its first round, more than the accepted "
                    f"{100 * (self.goal.accepted_drop or 0):g}; accept more, trim less in a round, or allow more "
                    "retraining updates"
                )
            self.stopped_by = "accuracy"
            return False
        self.spent += updates
        self.trimmed, self.finished = candidate, final
        trimming = self.trimmer.settings
        provenance = Provenance(
            self.method, place + 1, trimming.criterion, trimming.compensation, updates, self.seed, decision.forced
        )
        self.records.append(PlanRecord(candidate.plan, provenance, BuiltRound.of(candidate, after_trim, updates)))
        if self.watched or not final:
            self.subject = self.trimmer.examine_trimmed(candidate)
            self.apoz.append(mean_apoz(self.subject, self.watched))
        if met:
            self.stopped_by = "budget"
        elif final and place + 1 < self.pace.max_rounds:
            self.stopped_by = "accuracy"
        return not final

    def finish(self) -> Pruned:
        """Give what is left of the updates to the last round that was kept, and put everything together."""
        if self.trimmed is None:
            raise UserError(f"{self.method} found no channel that may leave; allow narrower widths, or more groups")
        network, records = self.trimmed.network, self.records
        schedule = Schedule(
            rounds=tuple(Round(record.plan, record.provenance.retrain_updates) for record in records),
            repair=self.trimmer.settings, retraining=replace(self.retraining, updates=0), seed=self.seed,
            made_by=self.method,
        )  # fmt: skip
        rest = self.retraining.updates - self.spent
        if not self.finished:
            schedule = replace(schedule, retraining=schedule.retraining.without_checks())
        if not self.finished and (rest or self.retraining.check_every):
            closing = replace(schedule.rounds[-1], retrain_updates=schedule.rounds[-1].retrain_updates + rest)
            longer = replace(
                schedule, rounds=(*schedule.rounds[:-1], closing), retraining=replace(self.retraining, updates=0)
            )
            built = build(self.trimmer, longer, progress=self._tell(0))
            lost = self.trimmer.baseline.accuracy - built.rounds[-1].after_retraining.accuracy
            if self.goal.accepted_drop is None or lost <= self.goal.accepted_drop:
                network, schedule = built.network, longer
                records = [
                    replace(
                        record, built=done, provenance=replace(record.provenance, retrain_updates=each.retrain_updates)
                    )
                    for record, done, each in zip(records, built.rounds, longer.rounds, strict=True)
                ]
                if self.watched:
                    plan = records[-1].plan
                    subject = self.trimmer.examine(network, shrink_groups(self.trimmer.groups, plan), plan)
                    self.apoz[-1] = mean_apoz(subject, self.watched)
        widths = {group.name: group.width for group in self.trimmer.groups}
        return Pruned(
            network, schedule, tuple(records), widths, tuple(self.apoz) if self.watched else (), self.stopped_by
        )

    def _make(self, decision: Decision, place: int, updates: int, final: bool) -> tuple[Trimmed, Score]:
        """Cut, repair and train; also returns the score before the training."""
        candidate = self.trimmer.trim(decision.plan, self.subject)
        after_trim = candidate.score
        if updates:
            candidate = self.trimmer.retrain(
                candidate,
                round_training(self.retraining, updates, last=final),
                seed=round_seed(self.seed, place),
                progress=self._tell(self.spent),
            )
        return candidate, after_trim

    def _between(self, left: int) -> int:
        """Return the optimizer steps after a round that is not the last."""
        if self.pace.updates_between is not None:
            return min(self.pace.updates_between, left)
        early = int(self.retraining.updates * (1 - self.pace.final_share))
        if self.goal.budget is None:  # nobody knows how many rounds follow
            return max(0, early - self.spent) // OPEN_END
        ahead = _rounds_ahead(self.share, self.goal.budget, self.pace.max_rounds)
        return max(0, min(early // max(1, ahead - 1), early - self.spent))

    def _lost_too_much(self, candidate: Trimmed) -> bool:
        allowed = self.goal.accepted_drop
        return allowed is not None and self.trimmer.baseline.accuracy - candidate.score.accuracy > allowed

    def _tell(self, before: int) -> Callable[[int], None] | None:
        """Return what a training reports to; what was told once is not told again."""
        if self.progress is None:
            return None
        tell = self.progress

        def show(done: int) -> None:
            if before + done > self.told:
                self.told = before + done
                tell(self.told)

        return show


def mean_apoz(subject: Subject, names: Sequence[str]) -> dict[str, float]:
    """Return the mean APoZ of groups with a ReLU behind them."""
    found = {name: subject.statistics.groups[name].apoz for name in names}
    return {name: float(apoz.mean()) for name, apoz in found.items() if apoz is not None}


def _rounds_ahead(first: float, budget: float, most: int) -> int:
    """Estimate the number of rounds to the budget if each cuts by the same factor as the first, at most `most`."""
    if first >= 1:
        return most
    if first <= budget:
        return 1
    return min(most, math.ceil(math.log(budget) / math.log(first)))
