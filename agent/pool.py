"""Plans that stand for election: the agent's beside the heuristics', all judged alike on the selection split.

    plan -> cut, repaired, batch norm recalibrated -> selection split -> the best is taken, of equals the agent's

A plan that a heuristic makes in a moment is never left out, so what is taken is never worse than it there.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from ..envs.trim_settings import TrimSettings
from ..pruning.budget import solve_counts
from ..pruning.cost import Cost
from ..pruning.criteria import rank_channels
from ..pruning.errors import UserError
from ..pruning.evaluation import Score
from ..pruning.heuristics import check_serves, uniform
from ..pruning.plan import PruningPlan
from ..pruning.schedule import Round, Schedule, build
from ..pruning.trimmer import Trimmer
from .history import Evaluation, History
from .progress import Progress
from .settings import SearchSettings

if TYPE_CHECKING:
    from .run_folder import RunFolder

AGENT, UNIFORM = "agent", "uniform"
LABELS = {AGENT: "agent", UNIFORM: "uniform", "apoz": "APoZ", "taylor_2019": "Taylor 2019", "l1": "L1"}
"""Makers of plans, and how people call them."""

Plans = tuple[PruningPlan, ...]
"""One for each round, each of them in the pristine numbering."""


@dataclass(frozen=True)
class Candidate:
    """Plans of one maker, judged.

    Attributes:
        made_by: "agent", "uniform" or the criterion that ranked the channels.
        budget: That they were made for; None where there is none.
        plans: One for each round.
        selection: Score on the selection split right after the cut, with the training inside episodes if there is any.
        cost: Parameters and MACs.
        row: What the search knows of them; None where they are no plans of its history.
    """

    made_by: str
    budget: float | None
    plans: Plans
    selection: Score
    cost: Cost
    row: Evaluation | None = field(default=None, compare=False)

    @property
    def rank(self) -> tuple[float, float]:
        """Higher is better: accuracy, then loss."""
        return self.selection.accuracy, -self.selection.loss

    @property
    def label(self) -> str:
        """The maker, for people."""
        return LABELS.get(self.made_by, self.made_by)


def best_of(candidates: Sequence[Candidate]) -> Candidate:
    """Return the best on the selection split; of equals the first."""
    return max(candidates, key=lambda one: one.rank)


def best_of_each(candidates: Iterable[tuple[str, Candidate]]) -> dict[str, Candidate]:
    """Return the best under each name, in the order in which the names came first."""
    found: dict[str, Candidate] = {}
    for name, one in candidates:
        found[name] = best_of([found[name], one]) if name in found else one
    return found


# ---- who makes plans -------------------------------------------------------------------------------------------------
def heuristics_plans(trimmer: Trimmer, budget: float, unit: str) -> dict[str, PruningPlan]:
    """Return the plans, by maker, that keep the same share of every group; rankings say which channels stay.

    "uniform" ranks by the trimmer's own criterion. Criteria that the network cannot serve, such as APoZ without a ReLU
    behind every group, are left out.

    Args:
        trimmer: Task and settings; not lean, as Taylor criteria need gradients.
        budget: Share of the whole network's cost to keep, in (0, 1].
        unit: "macs" or "params".

    Raises:
        UserError: The budget is out of reach.
    """
    subject = trimmer.pristine
    counts = solve_counts(trimmer.cost_model, np.zeros(len(trimmer.groups)), budget, unit)
    chosen = dict(zip(trimmer.cost_model.names, counts.tolist(), strict=True))
    found = {UNIFORM: trimmer.plan(counts)}
    for criterion in LABELS:
        if criterion in (AGENT, UNIFORM):
            continue
        try:
            check_serves(trimmer.groups, criterion)
        except UserError:
            continue
        orders = rank_channels(criterion, subject.groups, subject.context)
        found[criterion] = PruningPlan.from_counts(subject.groups, chosen, orders)
    return found


def rows_within(history: History, budget: float, count: int) -> list[Evaluation]:
    """Return the rows of a search that stand for election at a budget.

    These are its `count` best under just this budget, and the most accurate plan found under another one that keeps to
    it, if that is more accurate than them all (or there are none).
    """
    rows = history.ranked(budget)[:count]
    others = [row for row in history.ranked() if row.budget != budget and row.kept <= budget * (1 + 1e-9)]
    most = max(others, key=lambda row: (row.accuracy, -row.loss), default=None)
    if most is not None and all(most.accuracy > row.accuracy for row in rows):
        rows.append(most)
    return rows


def reshaped(trimmer: Trimmer, plan: PruningPlan, budget: float, unit: str) -> PruningPlan:
    """Return a plan for another budget: the shares of the groups keep the differences of their log-odds of staying.

    Raises:
        UserError: The budget is out of reach.
    """
    widths = trimmer.cost_model.widths
    counts = np.array([plan.counts.get(group.name, group.width) for group in trimmer.groups])
    shares = np.clip(counts / widths, 0.5 / widths, 1 - 0.25 / widths)  # whole groups have no finite log-odds
    return trimmer.plan(solve_counts(trimmer.cost_model, np.log(shares / (1 - shares)), budget, unit))


def neighbours(history: History, budget: float) -> list[float]:
    """Return the nearest budget below and the nearest above, of those that the history holds plans for."""
    known = {row.budget for row in history.finished if row.budget is not None and row.budget != budget}
    below, above = [one for one in known if one < budget], [one for one in known if one > budget]
    return ([max(below)] if below else []) + ([min(above)] if above else [])


# ---- how they are judged ---------------------------------------------------------------------------------------------
def judge(trimmer: Trimmer, trim: TrimSettings, plans: Plans, made_by: str, row: Evaluation | None = None) -> Candidate:
    """Build the plans as an episode of the search would, and score them on the selection split."""
    built = build(trimmer, schedule_of(trimmer, trim, plans, made_by, final=False), verify=False)
    return Candidate(made_by, trim.budget, plans, trimmer.score_selection(built.network), built.cost, row)


def judge_heuristics(trimmer: Trimmer, trim: TrimSettings, budget: float) -> list[Candidate]:
    """Judge the heuristics' plans for a budget; one that several of them make is built once."""
    found: dict[PruningPlan, Candidate] = {}
    result = []
    for name, plan in heuristics_plans(trimmer, budget, trim.budget_unit).items():
        if plan not in found:
            found[plan] = judge(trimmer, trim, (plan,), name)
        result.append(replace(found[plan], made_by=name))
    return result


def schedule_of(
    trimmer: Trimmer, trim: TrimSettings, plans: Sequence[PruningPlan], made_by: str, *, final: bool
) -> Schedule:
    """Return the schedule of some plans, with the training inside episodes spread evenly over their rounds.

    Args:
        trimmer: Its settings are the schedule's.
        trim: Settings of the search.
        plans: One for each round.
        made_by: The maker.
        final: Whether the training of the finished network follows the last round.
    """
    inside = trim.retrain_updates * trim.rounds
    updates = [inside // len(plans) + (place < inside % len(plans)) for place in range(len(plans))]
    if final:
        updates[-1] += trim.retraining.updates
    return Schedule(
        rounds=tuple(Round(plan, count) for plan, count in zip(plans, updates, strict=True)),
        repair=trimmer.settings,
        retraining=replace(trim.retraining if final else trim.retraining.without_checks(), updates=0),
        seed=trim.repair.seed,
        made_by=made_by,
    )


def plans_of(row: Evaluation) -> Plans:
    """Return the plans of an episode's last row."""
    return tuple(PruningPlan.from_dict(plan) for plan in row.plans)


# ---- one budget out of a range ---------------------------------------------------------------------------------------
def own_budget(trim: TrimSettings) -> float | None:
    """Return the budget of the network that a search builds itself: the settings', else one from the middle of a range.

    That is the level nearest to the geometric mean of the range, of two the smaller; None where there is neither.
    """
    if trim.budget is not None or trim.budget_range is None:
        return trim.budget
    middle = math.sqrt(trim.budget_range[0] * trim.budget_range[1])
    return min(trim.budgets, key=lambda level: (round(abs(math.log(level / middle)), 9), level))


def with_own_budget(trim: TrimSettings) -> TrimSettings:
    """Return the settings with `own_budget`."""
    return replace(trim, budget=own_budget(trim))


# ---- what a search stands by -----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Choice:
    """What a search stands by.

    Attributes:
        schedule: With the final retraining.
        candidates: The agent's, judged; none where no plan was scored.
        rivals: The heuristics', judged.
    """

    schedule: Schedule
    candidates: list[Candidate]
    rivals: list[Candidate]

    @property
    def taken(self) -> Candidate:
        """The best on the selection split; of equals the agent's."""
        return best_of([*self.candidates, *self.rivals])

    @property
    def taken_from_rivals(self) -> bool:
        """Whether a heuristic's plan was taken."""
        return bool(self.rivals) and self.taken.made_by != AGENT


def choose(
    trimmer: Trimmer,
    settings: SearchSettings,
    history: History,
    run_folder: "RunFolder | None",
    progress: Progress,
    *,
    pool: bool = False,
) -> Choice:
    """Score the best distinct schedules again, on the selection split, and take the best there.

    Args:
        trimmer: Of the search.
        settings: Of the search; where they have a budget, plans that keep to it are candidates.
        history: Of the search.
        run_folder: Gets a schedule at once, so that an interrupt from here on leaves something to replay.
        progress: Told where there is no plan of the agent's.
        pool: Whether the heuristics' plans for the budget are candidates, too.

    Raises:
        UserError: The search ended before its first plan was scored, and there is no budget for another one.
    """
    trim, budget = settings.trim, settings.trim.budget
    rows = history.ranked()[: settings.candidates]
    if budget is not None:
        rows = rows_within(history, budget, settings.candidates)
    if run_folder and rows:
        run_folder.write_schedule(schedule_of(trimmer, trim, plans_of(rows[0]), AGENT, final=True))
    own = [judge(trimmer, trim, plans_of(row), AGENT, row) for row in rows]
    if not own and budget is None:
        raise UserError("the search ended before its first plan was scored; allow more evaluations or minutes")
    rivals = judge_heuristics(trimmer, trim, budget) if pool and budget is not None else []
    if not own and budget is not None and not rivals:
        progress.say("no plan was scored before the search ended: the uniform plan is built instead")
        start = uniform(
            trimmer, budget=budget, unit=trim.budget_unit, retraining=trim.retraining, seed=trim.repair.seed
        )
        return Choice(start, [], [])
    if not own:
        progress.say("no plan was scored before the search ended: the best of the heuristics' plans is built instead")
    best = best_of([*own, *rivals])
    return Choice(schedule_of(trimmer, trim, best.plans, best.made_by, final=True), own, rivals)


def range_sentence(trim: TrimSettings) -> str:
    """Say what a range of budgets means for the network that is built."""
    assert trim.budget_range is not None
    low, high = trim.budget_range
    return (
        f"The agent learned for budgets from {low:.4g} to {high:.4g} of the {trim.budget_unit}; the network built here "
        f"keeps {trim.budget:.4g}. `prunegym apply RUN --budget SHARE` builds another, `prunegym pareto RUN` shows all."
    )
