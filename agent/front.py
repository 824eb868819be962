"""One trained agent, every budget: its plans for a budget it is asked for, and the best of them over a range.

    policy and history of a search -> plans for a budget -\\
    heuristics' plans for it ------------------------------> judged on the selection split -> the best is kept
    what was best at smaller budgets ---------------------/

What is best at a smaller budget keeps to every larger one, so accuracy on the selection split never falls along
a front. The test split is not read.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from ..envs.trim import TrimEnv
from ..envs.trim_settings import TrimSettings
from ..pruning.errors import UserError
from ..pruning.evaluation import Score
from ..pruning.plan import PruningPlan
from ..pruning.schedule import Schedule, build
from ..pruning.trimmer import Trimmer
from .history import History
from .imagined import ImaginedWalks, act, seen_on_the_way
from .learner import imagines, make_learner
from .learning import play_alone
from .pool import (
    AGENT,
    UNIFORM,
    Candidate,
    Plans,
    best_of,
    best_of_each,
    judge,
    judge_heuristics,
    neighbours,
    plans_of,
    reshaped,
    rows_within,
    schedule_of,
)  # fmt: skip
from .progress import Progress
from .randomness import derive_seed, random_state_kept
from .run_folder import RunFolder
from .settings import SearchSettings

DIGITS = 4
"""Decimals by which budgets of a front must differ, as its files are named by them."""


# ---- what an agent has for a budget ----------------------------------------------------------------------------------
@dataclass(eq=False)
class TrainedAgent:
    """What a search left of its agent, and what its plans are judged with.

    Attributes:
        trimmer: Of the task, with the search's repair and groups; not lean.
        settings: Of the search.
        policy: Trained.
        history: What it scored.
    """

    trimmer: Trimmer
    settings: SearchSettings
    policy: BaseAlgorithm
    history: History

    @classmethod
    def load(cls, run: RunFolder, trimmer: Trimmer, settings: SearchSettings) -> "TrainedAgent":
        """Read the policy and the history of a run folder.

        Args:
            run: Of a search.
            trimmer: Of its task, with its repair and groups; not lean.
            settings: Of the search, resolved.

        Raises:
            UserError: The folder holds no policy or no history, or they are not of these settings.
        """
        with random_state_kept():
            policy = _untrained(trimmer, settings)
        run.read_policy(policy)
        return cls(trimmer, settings, policy, run.read_history())

    def outside(self, budget: float) -> str:
        """Return a sentence where the agent was not trained for a budget, else ""."""
        trim = self.settings.trim
        low, high = trim.budget_range or (trim.budget, trim.budget)
        if low is None or high is None or low <= budget <= high:
            return ""
        known = f"{low:.4g}" if low == high else f"from {low:.4g} to {high:.4g}"
        return (
            f"WARNING: the agent was trained for budgets {known} of the {trim.budget_unit}; at {budget:.4g} its own "
            "plans are guesses (heuristics' plans are candidates, too)"
        )

    def plans(self, budget: float) -> list[Plans]:
        """Return its plans for a budget, each once: the policy's without noise, then the best of the history.

        The best of the nearest budgets below and above are reshaped for it: one of each, or more where the search
        scored none under just this budget.

        Raises:
            UserError: The budget is out of reach.
        """
        trim, count = self.settings.trim, self.settings.candidates
        found = [self._own(budget)]
        rows = rows_within(self.history, budget, count)
        found += [plans_of(row) for row in rows]
        if trim.rounds == 1:
            near = neighbours(self.history, budget)
            known = any(row.budget == budget for row in rows)
            for level in near:
                for row in self.history.ranked(level)[: 1 if known else -(-count // len(near))]:
                    found.append((reshaped(self.trimmer, plans_of(row)[-1], budget, trim.budget_unit),))
        return list(dict.fromkeys(found))

    def _own(self, budget: float) -> Plans:
        trim = at_budget(self.settings.trim, budget)
        environment = TrimEnv(self.trimmer.task, trim, trimmer=self.trimmer)
        if not imagines(self.settings.learner, trim):
            infos, _ = play_alone(self.policy, environment, derive_seed(self.settings.seed, "learner"))
            return tuple(PruningPlan.from_dict(plan) for plan in infos[-1]["plans"])
        seen = seen_on_the_way(environment, budget)
        actions = act(self.policy, seen, environment.observation_space, 1, deterministic=True)
        return (self.trimmer.plan(environment.widths_after(actions, np.array([budget]))[0]),)


def at_budget(trim: TrimSettings, budget: float) -> TrimSettings:
    """Return the settings with one budget, which need not lie in their range."""
    return replace(trim, budget=budget, budget_range=None)


def _untrained(trimmer: Trimmer, settings: SearchSettings) -> BaseAlgorithm:
    """Return an algorithm of the search's kind and sizes, with weights still to be given."""
    trim = settings.trim
    environment = TrimEnv(trimmer.task, trim, trimmer=trimmer)
    imagined = imagines(settings.learner, trim)
    groups = len(trimmer.groups)
    workers: VecEnv = DummyVecEnv([lambda: environment])
    if imagined:
        blank = {0.0: np.zeros((groups, *environment.observation_space.shape), np.float32)}
        workers = ImaginedWalks(
            blank, environment.observation_space, walks=2, predict=lambda actions, _: np.zeros(len(actions)), seed=0
        )
    return make_learner(
        settings.learner, workers, steps_per_episode=groups * trim.rounds, seed=0, log_folder=None, imagined=imagined
    )


# ---- one budget ------------------------------------------------------------------------------------------------------
def candidates_at(agent: TrainedAgent, budget: float) -> list[Candidate]:
    """Judge everything there is for a budget: the agent's plans first, then the heuristics'.

    Raises:
        UserError: The budget is out of reach.
    """
    trim = at_budget(agent.settings.trim, budget)
    with random_state_kept():
        own = [judge(agent.trimmer, trim, plans, AGENT) for plans in agent.plans(budget)]
        return own + judge_heuristics(agent.trimmer, trim, budget)


def finished(agent: TrainedAgent, candidate: Candidate, updates: int | None = None) -> Schedule:
    """Return the schedule of a candidate with the final retraining: the run's, or of so many updates."""
    trim = agent.settings.trim
    retraining = trim.retraining.resolved(len(agent.trimmer.task.train))
    if updates is not None:
        retraining = replace(retraining, updates=updates)
    trim = replace(trim, retraining=retraining)
    return schedule_of(agent.trimmer, trim, candidate.plans, candidate.made_by, final=True)


# ---- all budgets -----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class FrontPoint:
    """What there is at one budget.

    Attributes:
        budget: Share of the cost that may be kept, in (0, 1].
        taken: The best on the selection split; made for a smaller budget where nothing better was found since.
        kept: Share of the cost that it keeps.
        makers: By maker, the best of its plans for this budget and the smaller ones of the front.
        schedule: Of what was taken, with the final retraining.
        trained: Scores on the selection split after retraining, of "front" and of "uniform"; empty without retraining.
    """

    budget: float
    taken: Candidate
    kept: float
    makers: dict[str, Candidate]
    schedule: Schedule
    trained: dict[str, Score]


@dataclass(frozen=True)
class Front:
    """The plans of a trained agent and of the heuristics, from the smallest budget to the largest.

    Attributes:
        points: One for each budget, ascending.
        unit: "macs" or "params".
        original: Score of the original network on the selection split.
        images: In the selection split.
        retrain_updates: Optimizer steps after the cut, of the column "retrained".
        inside: Optimizer steps of an episode, which every figure is after.
    """

    points: tuple[FrontPoint, ...]
    unit: str
    original: Score
    images: int
    retrain_updates: int
    inside: int = 0

    @property
    def makers(self) -> list[str]:
        """Who has a plan anywhere, the agent first."""
        return list(dict.fromkeys(maker for point in self.points for maker in point.makers))


def find_front(
    agent: TrainedAgent, budgets: Sequence[float] = (), *, retrain_updates: int = 0, progress: Progress | None = None
) -> Front:
    """Take, for each budget, the best plan of all that keep to it.

    Args:
        agent: From a search.
        budgets: In (0, 1], in any order; by default the levels of the search's range, or its one budget.
        retrain_updates: Optimizer steps that the plans taken, and the uniform ones, are trained for; 0 = none are.
        progress: Live display; silent by default.

    Raises:
        UserError: A budget is no share, is out of reach or is given twice; or there is none.
    """
    trim, trimmer, progress = agent.settings.trim, agent.trimmer, progress or Progress()
    levels = _checked(budgets or trim.served)
    for budget in levels:
        trimmer.cost_model.check_budget(budget, trim.budget_unit)
        if warning := agent.outside(budget):
            progress.say(warning)
    whole = trimmer.cost_model.full.of(trim.budget_unit)
    makers: dict[str, Candidate] = {}
    points: list[FrontPoint] = []
    with progress.updates("front", len(levels), "budget") as show:
        for place, budget in enumerate(levels, 1):
            new = ((one.made_by, one) for one in candidates_at(agent, budget))
            makers = best_of_each([*makers.items(), *new])
            taken = best_of(list(makers.values()))
            kept = taken.cost.of(trim.budget_unit) / whole
            schedule = finished(agent, taken, retrain_updates or None)
            points.append(FrontPoint(budget, taken, kept, makers, schedule, {}))
            show(place)
    if retrain_updates:
        points = _trained(agent, points, retrain_updates, progress)
    original = trimmer.score_selection(trimmer.task.network)
    inside = trim.rounds * trim.retrain_updates
    return Front(tuple(points), trim.budget_unit, original, len(trimmer.task.selection), retrain_updates, inside)


def _checked(budgets: Sequence[float]) -> list[float]:
    if not budgets:
        raise UserError("a front needs budgets, but the search had none; name some with --budgets, such as 0.2 0.4")
    if any(not 0 < budget <= 1 for budget in budgets):
        raise UserError(f"budgets must be in (0, 1], but got {list(budgets)}; they are shares of the cost to keep")
    if len({round(budget, DIGITS) for budget in budgets}) < len(budgets):
        raise UserError(f"budgets must differ within {DIGITS} decimals, but got {list(budgets)}; name each once")
    return sorted(float(budget) for budget in budgets)


def _trained(agent: TrainedAgent, points: Sequence[FrontPoint], updates: int, progress: Progress) -> list[FrontPoint]:
    """Train what was taken and the uniform plans; a network that stands at several budgets is trained once."""
    done: dict[Plans, Score] = {}
    result = []
    for point in points:
        scores = {}
        for name, one in (("front", point.taken), (UNIFORM, point.makers[UNIFORM])):
            if one.plans not in done:
                with progress.updates(f"{one.label} at {point.budget:.4g}", updates) as show:
                    built = build(agent.trimmer, finished(agent, one, updates), progress=show)
                done[one.plans] = agent.trimmer.score_selection(built.network)
            scores[name] = done[one.plans]
        result.append(replace(point, trained=scores))
    return result
