"""One cell of a comparison is run: a method's plans are made, and measured alike for every method.

    search or ranking -> plan -> cut and repaired -> selection split -> retrained -> selection split -> kept on disk

The pick among a search's plans is made on the reward images, so the selection split is unbiased for every method.
"""

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..envs.trim import TrimEnv
from ..pruning.artifact import save_pruned
from ..pruning.errors import UserError
from ..pruning.heuristics import Goal, uniform
from ..pruning.plan import PruningPlan
from ..pruning.schedule import Built, Schedule, build
from ..pruning.score_cache import ScoreCache
from ..pruning.task import PruningTask
from ..pruning.trimmer import Trimmer
from .amc import as_search
from .compare_cell import CELLS, SCORES, Cell, Found, Ground, network_folder
from .compare_settings import (
    AGENT,
    CONTROL_NAMES,
    POOL,
    SURROGATE,
    UNIFORM,
    feeds_pool,
    is_ranking,
    is_search,
    search_settings,
)
from .controls import run_control
from .history import Evaluation, History
from .learner import imagines
from .learning import learn
from .methods import METHODS, Request
from .pool import Plans, judge, schedule_of
from .progress import Progress
from .randomness import derive_seed, random_state_kept
from .settings import SearchSettings


def run_cell(ground: Ground, method: str, seed: int, digest: str, others: Mapping[str, Cell] | None = None) -> Cell:
    """Run a method at one seed for all budgets, keep its networks, and write the cell.

    Args:
        ground: What all cells share.
        method: Name, or "pool".
        seed: Root of the random numbers.
        digest: Of everything that decides the cell.
        others: For the pool, the finished cells of the same seed by method.

    Raises:
        UserError: The method cannot do what is asked.
        KeyboardInterrupt: The user interrupted it; nothing of the cell is written.
    """
    with random_state_kept():
        if method == POOL:
            cell = _pool_cell(ground, seed, digest, others or {})
        elif is_search(method):
            cell = _search_cell(ground, method, seed, digest)
        else:
            cell = _heuristic_cell(ground, method, seed, digest)
    cell.save(ground.folder)
    return cell


# ---- searches --------------------------------------------------------------------------------------------------------
def run_agent(
    task: PruningTask, settings: Sequence[SearchSettings], trimmer: Trimmer, history: History, progress: Progress
) -> None:
    """Let the agent search for all budgets, and record every evaluation with its budget.

    An agent that plans (see `planner`) serves all budgets with one training; others are trained for each.

    Args:
        task: Network and data.
        settings: Those of each budget, which differ in `trim.budget` only.
        trimmer: Shared by all of them.
        history: Where evaluations go; at most the sum of `max_evaluations` may count.
        progress: Live display.

    Raises:
        KeyboardInterrupt: The user interrupted the search.
    """
    first = settings[0]
    if imagines(first.learner, first.trim):
        ends = [each.trim.budget or 1.0 for each in settings]
        trim = replace(first.trim, budget=None, budget_range=(min(ends), max(ends)))
        whole = replace(first, trim=trim, max_evaluations=first.max_evaluations * len(settings))
        environment = TrimEnv(task, trim, trimmer=trimmer)
        _, stopped_by = learn(task, whole, trimmer, environment, history, None, progress, budgets=ends)
        if stopped_by == "interrupt":
            raise KeyboardInterrupt
        return
    for each in settings:
        own, episodes = History(), max((row.episode for row in history.rows), default=0)
        environment = TrimEnv(task, each.trim, trimmer=trimmer)
        _, stopped_by = learn(task, each, trimmer, environment, own, None, progress)
        for row in own.rows:
            episode = episodes + row.episode
            history.add(replace(row, evaluation=len(history.rows) + 1, episode=episode, budget=each.trim.budget))
        if stopped_by == "interrupt":
            raise KeyboardInterrupt


def winner(history: History, budget: float, tolerance: float) -> Evaluation:
    """Return the plan that a search stands by: of highest reward within the budget, lower loss between equals.

    Plans that stay too far below the budget are taken only where no other is there.

    Raises:
        UserError: No plan keeps to the budget.
    """
    return _ranked(history, budget, tolerance)[0]


def _ranked(history: History, budget: float, tolerance: float) -> list[Evaluation]:
    rows = [row for row in history.ranked(budget) if row.kept <= budget * (1 + 1e-9)]
    if not rows:
        raise UserError(
            f"no plan that was scored keeps to the budget {budget}; allow more evaluations, or a larger budget"
        )
    near = [row for row in rows if row.kept >= budget * (1 - tolerance)]
    return near or rows


def _search_cell(ground: Ground, method: str, seed: int, digest: str) -> Cell:
    compare, task = ground.compare, ground.task
    settings = [search_settings(ground.search, compare, seed, budget) for budget in compare.budgets]
    store = ScoreCache(ground.search.scores or ground.folder / SCORES)
    trimmer = Trimmer(task, settings[0].trim.repair, ground.search.trim.groups, scores=store)
    if method == "amc":
        trimmer = trimmer.with_settings(replace(trimmer.settings, criterion="l1"), lean=True)
        settings = [_amc_settings(trimmer, each) for each in settings]
    if method == SURROGATE:
        settings = [_without_policy(each) for each in settings]
    folder = ground.folder / CELLS / f"{method}-seed{seed}"
    shutil.rmtree(folder, ignore_errors=True)  # of an interrupted run; its scores are in the store
    folder.mkdir(parents=True)
    history = History(folder / "history.csv")
    started = time.monotonic()
    if method in CONTROL_NAMES:
        run_control(
            CONTROL_NAMES[method], TrimEnv(task, settings[0].trim, trimmer=trimmer),
            evaluations=compare.evaluations * len(compare.budgets), budgets=list(compare.budgets),
            seed=derive_seed(seed, method), history=history, settings=compare.controls,
        )  # fmt: skip
    else:
        run_agent(task, settings, trimmer, history, Progress())
    seconds = time.monotonic() - started
    found = []
    for budget, each in zip(compare.budgets, settings, strict=True):
        row = winner(history, budget, compare.budget_tolerance)
        schedule = _schedule(trimmer, each, row.plans, method)
        one = _measured(ground, trimmer, schedule, method, seed, budget)
        best = _ranked(history, budget, compare.budget_tolerance)[: each.candidates]
        candidates = tuple(other.plans for other in best) if method == AGENT else ()
        course = best_so_far(history, budget)
        found.append(
            replace(
                one, candidates=candidates, curve=tuple(row.accuracy if row else None for row in course),
                rewards=tuple(row.reward if row else None for row in course),
            )
        )  # fmt: skip
    store.close()
    repeated = sum(row.repeated for row in history.rows)
    cached = sum(row.cached and not row.repeated for row in history.rows)
    return Cell(method, seed, digest, tuple(found), history.spent, repeated, cached, seconds)


def _amc_settings(trimmer: Trimmer, settings: SearchSettings) -> SearchSettings:
    """Return AMC as published, at the budget, evaluations and retraining of the comparison."""
    trim = settings.trim
    return as_search(trimmer, Goal(trim.budget, trim.budget_unit), settings.methods.amc, trim.retraining, settings.seed)


def _without_policy(settings: SearchSettings) -> SearchSettings:
    imagination = replace(settings.learner.imagination, practise=False)
    return replace(settings, learner=replace(settings.learner, imagination=imagination))


def best_so_far(history: History, budget: float) -> list[Evaluation | None]:
    """Return, after each evaluation that counts at a budget, the finished plan of highest reward so far."""
    course: list[Evaluation | None] = []
    own = History()
    for row in history.rows:
        if row.budget == budget and not row.repeated:
            own.add(row)
            course.append(own.best)
    return course


# ---- methods without a search ----------------------------------------------------------------------------------------
def _heuristic_cell(ground: Ground, method: str, seed: int, digest: str) -> Cell:
    found, seconds, scored = [], 0.0, 0
    for budget in ground.compare.budgets:
        settings = search_settings(ground.search, ground.compare, seed, budget)
        trim = settings.trim
        trimmer = Trimmer(ground.task, trim.repair, trim.groups, lean=True)
        tried: list[int] = []
        started = time.monotonic()
        if method == UNIFORM:
            schedule = uniform(
                trimmer, budget=budget, unit=trim.budget_unit, retraining=trim.retraining, seed=trim.repair.seed
            )
            seconds += time.monotonic() - started
            found.append(_measured(ground, trimmer, schedule, method, seed, budget))
            continue
        at_once = is_ranking(method)  # then it is trained below, like a search's plan
        retraining = replace(trim.retraining, updates=0) if at_once else trim.retraining
        goal = Goal(budget, trim.budget_unit)
        request = Request(trimmer, goal, settings.methods, retraining, trim.repair.seed, None, tried.append)
        made = METHODS[method].run(request)
        seconds += time.monotonic() - started
        scored += max(tried, default=0)
        trimmer = trimmer.with_settings(made.schedule.repair)
        if at_once:
            schedule = _schedule(trimmer, settings, [made.schedule.plan.to_dict()], method)
            found.append(_measured(ground, trimmer, schedule, method, seed, budget))
        else:
            built = Built(made.network, made.schedule, made.rounds)
            found.append(_kept(ground, trimmer, built, method, seed, budget))
    return Cell(method, seed, digest, tuple(found), scored, 0, 0, seconds)


# ---- the pool --------------------------------------------------------------------------------------------------------
def _pool_cell(ground: Ground, seed: int, digest: str, others: Mapping[str, Cell]) -> Cell:
    """Take the best of the heuristics' plans and of the agent's, on the selection split right after the cut."""
    found, started = [], time.monotonic()
    for budget in ground.compare.budgets:
        settings = search_settings(ground.search, ground.compare, seed, budget)
        trimmer = Trimmer(ground.task, settings.trim.repair, settings.trim.groups)
        scored: list[tuple[float, str, Schedule | None]] = []  # without a schedule: what the other cell stands by
        for name, cell in others.items():
            before = cell.at(budget).before
            if feeds_pool(name) and before is not None:
                scored.append((before, name, None))
        for plans in others[AGENT].at(budget).candidates[1:] if AGENT in others else ():
            judged = judge(trimmer, settings.trim, _plans(plans), AGENT)
            scored.append((judged.selection.accuracy, AGENT, _schedule(trimmer, settings, plans, AGENT)))
        _, name, chosen = max(scored, key=lambda entry: entry[0])
        if chosen is None:
            shutil.copytree(
                network_folder(ground.folder, name, seed, budget),
                network_folder(ground.folder, POOL, seed, budget),
                dirs_exist_ok=True,
            )
            found.append(replace(others[name].at(budget), made_by=name, candidates=(), curve=(), rewards=()))
        else:
            found.append(_measured(ground, trimmer, chosen, POOL, seed, budget))
    return Cell(POOL, seed, digest, tuple(found), 0, 0, 0, time.monotonic() - started)


# ---- one measure for all ---------------------------------------------------------------------------------------------
def _schedule(trimmer: Trimmer, settings: SearchSettings, plans: Sequence[Mapping[str, Any]], made_by: str) -> Schedule:
    """Return the schedule of some plans as they are kept in files; no training is inside the episodes."""
    return schedule_of(trimmer, settings.trim, _plans(plans), made_by, final=True)


def _plans(kept: Sequence[Mapping[str, Any]]) -> Plans:
    return tuple(PruningPlan.from_dict(plan) for plan in kept)


def _cut_only(schedule: Schedule) -> Schedule:
    return replace(schedule, rounds=tuple(replace(entry, retrain_updates=0) for entry in schedule.rounds))


def _measured(ground: Ground, trimmer: Trimmer, schedule: Schedule, method: str, seed: int, budget: float) -> Found:
    """Build a schedule, and measure and keep the network."""
    return _kept(ground, trimmer, build(trimmer, schedule, verify=False), method, seed, budget)


def _kept(ground: Ground, trimmer: Trimmer, built: Built, method: str, seed: int, budget: float) -> Found:
    """Measure a finished network on the selection split, the same cut without retraining too, and keep it."""
    schedule, task = built.schedule, ground.task
    after = trimmer.score_selection(built.network).accuracy
    before = reward_accuracy = None
    if not any(entry.retrain_updates for entry in schedule.rounds[:-1]):
        bare = built if not schedule.retrain_updates else build(trimmer, _cut_only(schedule), verify=False)
        before = trimmer.score_selection(bare.network).accuracy
        reward_accuracy = bare.rounds[-1].after_trim.accuracy
    unit, whole = ground.search.trim.budget_unit, trimmer.cost_model.full
    kept = built.cost.of(unit) / whole.of(unit)
    save_pruned(
        network_folder(ground.folder, method, seed, budget), built.network, schedule.plan,
        example_shape=tuple(task.example.shape), source=task.source,
    )  # fmt: skip
    return Found(
        budget=budget, plans=tuple(entry.plan.to_dict() for entry in schedule.rounds),
        reward_accuracy=reward_accuracy, before=before, after=after, params=built.cost.params, macs=built.cost.macs,
        kept=kept, within=budget * (1 - ground.compare.budget_tolerance) <= kept <= budget * (1 + 1e-9),
        updates=built.updates_taken, made_by=schedule.made_by,
    )  # fmt: skip
