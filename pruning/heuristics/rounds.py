"""The loop all iterative methods share: decide, cut, repair, train a little, measure anew, until the goal is met.

    subject --rule--> decision -> trimmed -> (trained) -> kept, or refused -> subject of the next round

A method is a rule, `(subject, place, last) -> Decision`; everything else is the same for all, so that they are
compared on the same ground at the same cost.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import nn

from ..checks import check_seed, check_types
from ..cost import UNITS, CostModel
from ..errors import UserError
from ..plan import PruningPlan
from ..retraining import RetrainSettings
from ..schedule import BuiltRound, Round, Schedule, build, round_seed, round_training
from ..trimmer import Subject, Trimmed, Trimmer

Masks = dict[str, NDArray[np.bool_]]
Candidate = tuple[float, str, int]
"""How urgently a channel should leave (higher = sooner), its group, its number."""

FLOOR_STEP = 0.9
"""Share of the present cost that a round leaves where an accuracy floor ends the rounds."""


@dataclass(frozen=True)
class Goal:
    """Where pruning ends: at a budget, at an accuracy floor, or at whichever comes first.

    Attributes:
        budget: Share of the whole network's cost to keep, in (0, 1]; None = only the accuracy counts.
        unit: "macs" or "params".
        accepted_drop: Accuracy on the reward images, in [0, 1], that a round may end below the original's; the first
            round that ends lower is undone, and pruning ends. None = only the budget counts.
    """

    budget: float | None = None
    unit: str = "params"
    accepted_drop: float | None = None

    def __post_init__(self) -> None:
        """Refuse values outside their ranges, and a goal that is none."""
        check_types(self)
        if self.unit not in UNITS:
            raise UserError(f"budget_unit must be one of {', '.join(UNITS)}, but got {self.unit!r}")
        if self.budget is None and self.accepted_drop is None:
            raise UserError("pruning needs a budget, an accepted drop of accuracy, or both, but got neither")
        if self.budget is not None and not 0 < self.budget <= 1:
            raise UserError(f"budget must be in (0, 1], but got budget={self.budget}; it is the share to keep")
        if self.accepted_drop is not None and not 0 <= self.accepted_drop <= 1:
            raise UserError(f"accepted_drop must be in [0, 1], but got {self.accepted_drop}; 0.01 is one point")

    def met(self, model: CostModel, counts: Mapping[str, int] | NDArray[np.int64]) -> bool:
        """Return whether `counts` channels are within the budget; never, where there is none."""
        return self.budget is not None and model.share(counts, self.unit) <= self.budget


@dataclass(frozen=True)
class Pace:
    """How rounds follow each other.

    Attributes:
        max_rounds: Most rounds.
        updates_between: Optimizer steps after each round but the last; None = an equal share for each round that the
            first one lets expect.
        final_share: Share of all updates, in [0, 1], that is kept for the training after the last round.
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


class Rule(Protocol):
    """How a method decides."""

    def __call__(self, subject: Subject, place: int, last: bool) -> Decision | None:
        """Decide round `place`, from 0; None where nothing more can leave. `last`: no round will follow."""


@dataclass(frozen=True)
class Provenance:
    """Where a plan comes from.

    Attributes:
        method: Name of the method.
        round: Counted from 1.
        criterion: Which channels leave.
        compensation: Repair after the cut.
        retrain_updates: Optimizer steps asked for after the cut.
        seed: Of the whole run.
        forced: Whether the method's own rule gave way, to meet the budget.
    """

    method: str
    round: int
    criterion: str
    compensation: str
    retrain_updates: int
    seed: int
    forced: bool = False


@dataclass(frozen=True, eq=False)
class PlanRecord:
    """A plan and what is known of it.

    Attributes:
        plan: What stays of the *original* network after the round.
        provenance: Where the plan comes from.
        built: Scores on the reward images, cost and training of the round.
    """

    plan: PruningPlan
    provenance: Provenance
    built: BuiltRound


@dataclass(frozen=True, eq=False)
class Pruned(Sequence[PlanRecord]):
    """What a method made: the list of its plans, one for each round, and the network of the last.

    Attributes:
        network: Pruned and retrained, in evaluation mode.
        schedule: The rounds; `schedule.build` replays them on the original weights.
        records: One for each round.
        widths: Channels of the original network, by group.
        mean_apoz: By round (0 = before the first) the mean APoZ of the groups that were watched; empty if none were.
        stopped_by: "budget", "accuracy" (the next round would have lost more than accepted), "rounds" (all that were
            allowed were made) or "rule" (nothing more could leave).
    """

    network: nn.Module
    schedule: Schedule
    records: tuple[PlanRecord, ...]
    widths: dict[str, int]
    mean_apoz: tuple[dict[str, float], ...] = ()
    stopped_by: str = "budget"

    def __getitem__(self, place):  # type: ignore[no-untyped-def]
        """Return the plan of a round, from 0, with its provenance."""
        return self.records[place]

    def __len__(self) -> int:
        """Return the number of rounds."""
        return len(self.records)

    def __iter__(self) -> Iterator[PlanRecord]:
        """Iterate over the rounds."""
        return iter(self.records)

    @property
    def rounds(self) -> tuple[BuiltRound, ...]:
        """Scores, cost and training of each round."""
        return tuple(record.built for record in self.records)

    @property
    def forced(self) -> bool:
        """Whether the method's own rule gave way in the last round, to meet the budget."""
        return self.records[-1].provenance.forced


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
    early = int(retraining.updates * (1 - pace.final_share))  # updates for the rounds before the last
    per_round = pace.updates_between
    subject, spent, stopped_by, finished = trimmer.pristine, 0, "rounds", False
    trimmed: Trimmed | None = None
    records: list[PlanRecord] = []
    apoz = [mean_apoz(subject, watched)]
    for place in range(pace.max_rounds):
        last = place + 1 == pace.max_rounds
        decision = rule(subject, place, last)
        if decision is None:
            stopped_by = "rule"
            break
        share = trimmer.cost_model.share(subject.plan.then(decision.plan.completed(subject.groups)).counts, goal.unit)
        met = goal.budget is not None and share <= goal.budget
        if per_round is None:
            per_round = early // max(1, _rounds_ahead(share, goal.budget, pace.max_rounds) - 1)
        final = met or last
        updates = retraining.updates - spent if final else max(0, min(per_round, early - spent))
        candidate = trimmer.trim(decision.plan, subject)
        after_trim = candidate.score
        if updates:
            tell = (lambda done, before=spent: progress(before + done)) if progress else None
            candidate = trimmer.retrain(
                candidate, round_training(retraining, updates, last=final), seed=round_seed(seed, place), progress=tell
            )
        if goal.accepted_drop is not None:
            drop = trimmer.baseline.accuracy - candidate.score.accuracy
            if drop > goal.accepted_drop and trimmed is None:
                raise UserError(
                    f"{method} lost {100 * drop:.2f} points in its first round, more than the accepted "
                    f"{100 * goal.accepted_drop:g}; accept more, trim less in a round, or allow more retraining updates"
                )
            if drop > goal.accepted_drop:
                stopped_by = "accuracy"
                break
        spent += updates
        trimmed, finished = candidate, final
        provenance = Provenance(
            method, place + 1, trimmer.settings.criterion, trimmer.settings.compensation, updates, seed, decision.forced
        )
        records.append(PlanRecord(candidate.plan, provenance, BuiltRound.of(candidate, after_trim, updates)))
        if watched or not final:
            subject = trimmer.examine_trimmed(candidate)
            apoz.append(mean_apoz(subject, watched))
        if met:
            stopped_by = "budget"
            break
    if trimmed is None:
        raise UserError(f"{method} found no channel that may leave; allow narrower widths, or more groups")
    schedule = Schedule(
        rounds=tuple(Round(record.plan, record.provenance.retrain_updates) for record in records),
        repair=trimmer.settings, retraining=replace(retraining, updates=0), seed=seed, made_by=method,
    )  # fmt: skip
    network, watching = trimmed.network, tuple(apoz) if watched else ()
    if not finished and retraining.updates > spent:  # the last round that stays gets what is left
        rest = retraining.updates - spent
        closing = replace(schedule.rounds[-1], retrain_updates=schedule.rounds[-1].retrain_updates + rest)
        schedule = replace(schedule, rounds=(*schedule.rounds[:-1], closing))
        built = build(trimmer, schedule, progress=progress)
        network = built.network
        records = [
            replace(
                record, built=done, provenance=replace(record.provenance, retrain_updates=entry.retrain_updates)
            )
            for record, done, entry in zip(records, built.rounds, schedule.rounds, strict=True)
        ]  # fmt: skip
    widths = {group.name: group.width for group in trimmer.groups}
    return Pruned(network, schedule, tuple(records), widths, watching, stopped_by)


def weakest_leave(
    model: CostModel,
    subject: Subject,
    candidates: Sequence[Candidate],
    floor: Mapping[str, int],
    goal: Goal,
    *,
    at_most: int | None = None,
) -> Masks:
    """Let candidates go, the most urgent first, until the budget is met; returns what stays, by group.

    A channel waits until enough of its group have come together for the next narrower allowed width.

    Args:
        model: Cost model of the pristine network.
        subject: What is cut.
        candidates: In any order; of equal ones the first by group name and number leaves first.
        floor: By group, the fewest channels to leave; groups that are not named stay whole.
        goal: The budget, if there is one.
        at_most: Channels that may leave; a narrower allowed width may take a few more.
    """
    present = np.array([group.width for group in subject.groups], dtype=np.int64)
    keep: Masks = {group.name: np.ones(group.width, dtype=bool) for group in subject.groups}
    places = {name: place for place, name in enumerate(keep)}
    counts, below = present.copy(), present.copy()  # `below` counts without the channels that wait
    waiting: dict[str, list[int]] = {name: [] for name in floor}
    gone = 0
    for _, name, channel in sorted(candidates, key=lambda item: (-item[0], item[1], item[2])):
        if goal.met(model, counts) or (at_most is not None and gone >= at_most):
            break
        place = places[name]
        if name in floor and below[place] > floor[name]:
            waiting[name].append(channel)
            below[place] -= 1
            if model.allowed.not_below(below, present)[place] == below[place]:
                keep[name][waiting[name]] = False
                gone += len(waiting[name])
                waiting[name], counts[place] = [], below[place]
    return keep


def plan_of(keep: Masks) -> PruningPlan:
    """Return the plan that keeps what the masks say."""
    return PruningPlan({name: np.flatnonzero(mask).tolist() for name, mask in keep.items()})


def floors(model: CostModel, narrowest: float) -> dict[str, int]:
    """Return, by group, the fewest channels that leave at least the share `narrowest` of the original ones."""
    shares = [max(1, round(narrowest * width)) for width in model.widths.tolist()]
    found = model.allowed.not_below(np.array(shares, dtype=np.int64), model.widths)
    return dict(zip(model.names, found.tolist(), strict=True))


def mean_apoz(subject: Subject, names: Sequence[str]) -> dict[str, float]:
    """Return the mean APoZ of groups with a ReLU behind them."""
    found = {name: subject.statistics.groups[name].apoz for name in names}
    return {name: float(apoz.mean()) for name, apoz in found.items() if apoz is not None}


def _rounds_ahead(first: float, budget: float | None, most: int) -> int:
    """Estimate the number of rounds to the budget if each cuts by the same factor as the first, at most `most`."""
    if budget is None or first >= 1:
        return most
    if first <= budget:
        return 1
    return min(most, math.ceil(math.log(budget) / math.log(first)))
