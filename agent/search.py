"""The one public verb: a task in, the best plan out, with the policy, the history and an honest comparison."""

import math
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from stable_baselines3.common.base_class import BaseAlgorithm
from torch import nn

from ..envs.trim import TrimEnv
from ..envs.trim_settings import TrimSettings
from ..pruning.checks import check_kind
from ..pruning.errors import UserError
from ..pruning.evaluation import Score
from ..pruning.heuristics import Goal, network_trimming, uniform
from ..pruning.plan import PruningPlan
from ..pruning.retraining import RetrainSettings
from ..pruning.schedule import Built, Schedule, build
from ..pruning.task import PruningTask
from ..pruning.trimmer import Trimmer
from .checkpoint import remove_checkpoints
from .finalists import Finalist, Verdict, compare_pair, read_test_split, time_networks
from .history import Evaluation, History
from .learning import learn
from .noise_meter import check_noise
from .pool import AGENT, Candidate, choose, with_own_budget
from .progress import Progress
from .randomness import derive_seed, random_state_kept
from .resume import HISTORY, Standing, alone, from_outside, origin, score_store, take_up
from .run_folder import RunFolder
from .settings import SearchSettings

DEFAULT_RETRAIN_UPDATES = 300
POOLED = "pool"
"""Name of the finished network where a heuristic's plan was taken."""


@dataclass(eq=False)
class SearchResult:
    """What a search found.

    Attributes:
        schedule: The best schedule, with the final retraining.
        network: Built from it on the pristine weights, retrained.
        policy: The Stable-Baselines3 algorithm, trained.
        history: Every evaluation.
        finalists: The networks of the final comparison, the one that was searched for last.
        verdicts: That one against each heuristic.
        candidates: The best evaluations of the search, scored on the selection split.
        rivals: The heuristics' plans that stood for election beside them; none without a budget or a pool.
        stopped_by: "max_evaluations", "max_minutes", "repeats" or "interrupt".
        task: What was pruned.
        settings: As resolved; with a range of budgets, `trim.budget` is that of the network built here.
        reference_accuracy: Of the uniform plan on the reward images inside the search, or nan.
        original_widths: Channels of the original network, by group.
    """

    schedule: Schedule
    network: nn.Module
    policy: BaseAlgorithm
    history: History
    finalists: list[Finalist]
    verdicts: list[Verdict]
    candidates: list[tuple[Evaluation, Score]]
    rivals: list[Candidate]
    stopped_by: str
    task: PruningTask
    settings: SearchSettings
    reference_accuracy: float
    original_widths: dict[str, int]

    @property
    def plan(self) -> PruningPlan:
        """What stays of the original network."""
        return self.schedule.plan

    def save(self, folder: str | Path) -> Path:
        """Write a run folder: schedule, weights without pickle, policy, history, results, report with pictures."""
        run = RunFolder.create(folder)
        run.write_result(self)
        return run.path


def search(
    task: PruningTask,
    budget: float | None = None,
    max_evaluations: int | None = None,
    *,
    budget_unit: str | None = None,
    retrain_updates: int | None = None,
    settings: SearchSettings | None = None,
    seed: int | None = None,
    run_folder: RunFolder | None = None,
    progress: Progress | None = None,
    resume: bool = False,
) -> SearchResult:
    """Learn a pruning schedule for a task, build the network, and compare it with the heuristics.

    Args:
        task: Network and data.
        budget: Share of the cost to keep, in (0, 1]; the settings' by default. With a `budget_range` in the settings
            the agent learns for all of it, and the network is built at this budget, or one from its middle.
        max_evaluations: Scored networks that the agent may spend.
        budget_unit: "macs" or "params".
        retrain_updates: Training updates of each finished network (300 when no settings are given).
        settings: Everything else.
        seed: Root of all random numbers of the search.
        run_folder: Where records are written as they come; nothing is written by default.
        progress: Live display; silent by default.
        resume: Whether the search in `run_folder`, which something ended, goes on; with the same task and settings it
            ends with the history, the schedule and the weights that it would have had without the end.

    Returns:
        The result; `result.save(folder)` writes it.

    Raises:
        UserError: The request cannot be met, e.g. the budget is below what the narrowest allowed widths cost; or a
            full disk or a lost worker ended the search, and the folder can be resumed.
    """
    check_kind(task, PruningTask, "search")
    if settings is not None:
        check_kind(settings, SearchSettings, "search")
    if run_folder is not None:
        check_kind(run_folder, RunFolder, "search", "RunFolder.create(path) makes one")
    if progress is not None:
        check_kind(progress, Progress, "search", "Progress(True) shows bars")
    settings = _resolve(settings, budget, max_evaluations, budget_unit, retrain_updates, seed)
    settings = _without_epochs(settings, len(task.train))
    if resume and run_folder is None:
        raise UserError(
            "a search is resumed in its run folder, but got none; pass run_folder=RunFolder.unfinished(path)"
        )
    try:
        with random_state_kept(), alone(run_folder.path) if run_folder else nullcontext():
            return _search(task, settings, run_folder, progress or Progress(), resume)
    except (OSError, UserError) as error:
        if run_folder is None or (isinstance(error, UserError) and not from_outside(error)):
            raise
        said = error if isinstance(error, UserError) else f"the search could not go on: {error}"
        raise UserError(f"{said}; resume with: prunegym search --resume {run_folder.path}") from error


def _search(
    task: PruningTask, settings: SearchSettings, run_folder: RunFolder | None, progress: Progress, resume: bool
) -> SearchResult:
    scores = score_store(run_folder.path if run_folder else None, settings)
    trimmer = Trimmer(task, settings.trim.repair, settings.trim.groups, scores=scores)
    environment = TrimEnv(task, settings.trim, trimmer=trimmer)  # refuses impossible settings before any work
    standing = _standing(trimmer, settings, run_folder, progress, resume)
    if standing.checkpoint is None:
        check_noise(trimmer, replace(settings, trim=with_own_budget(settings.trim)), progress)
    history = standing.history
    served = sorted({*settings.trim.budgets, *([settings.trim.budget] if settings.trim.budget else [])})
    policy, stopped_by = learn(
        task, settings, trimmer, environment, history, run_folder, progress, standing, budgets=served
    )
    if settings.trim.budget_range is not None:
        settings = replace(settings, trim=with_own_budget(settings.trim))
    needs = settings.trim.budget is not None and settings.trim.reward.objective == "budget"
    reference = environment.uniform(settings.trim.budget).score.accuracy if needs else math.nan
    choice = choose(trimmer, settings, history, run_folder, progress, pool=settings.pool)
    schedule = choice.schedule
    if run_folder:
        run_folder.write_schedule(schedule)
        run_folder.write_policy(policy)
    name, label = (POOLED, f"pool: {choice.taken.label}") if choice.taken_from_rivals else (AGENT, AGENT)
    agent = _build(trimmer, schedule, name, label, progress)
    finalists = [original(trimmer)]
    if settings.compare:
        finalists += _heuristics(trimmer, settings, agent, progress)
    finalists.append(agent)
    read_test_split(trimmer, finalists)
    time_networks(trimmer, finalists, settings.latency_batches)
    verdicts = [compare_pair(agent, other) for other in finalists[1:-1]]
    result = SearchResult(
        schedule=schedule,
        network=agent.network,
        policy=policy,
        history=history,
        finalists=finalists,
        verdicts=verdicts,
        candidates=[(one.row, one.selection) for one in choice.candidates if one.row],
        rivals=choice.rivals,
        stopped_by=stopped_by,
        task=task,
        settings=settings,
        reference_accuracy=reference,
        original_widths={group.name: group.width for group in trimmer.groups},
    )
    if run_folder:
        run_folder.write_result(result)
        remove_checkpoints(run_folder.path)
    if scores is not None:
        scores.close()
    return result


def _standing(
    trimmer: Trimmer, settings: SearchSettings, run_folder: RunFolder | None, progress: Progress, resume: bool
) -> Standing:
    if run_folder is None:
        return Standing()
    made_by = origin(trimmer, settings)
    if resume:
        return take_up(run_folder.path, made_by, progress.say)
    return Standing(run_folder.path, made_by, History(run_folder.path / HISTORY))


def _resolve(
    settings: SearchSettings | None,
    budget: float | None,
    max_evaluations: int | None,
    budget_unit: str | None,
    retrain_updates: int | None,
    seed: int | None,
) -> SearchSettings:
    if settings is None:
        default = RetrainSettings(updates=DEFAULT_RETRAIN_UPDATES)
        settings = SearchSettings(trim=TrimSettings(retraining=default))
    trim = settings.trim
    retraining = trim.retraining
    if retrain_updates is not None:
        retraining = replace(retraining, updates=retrain_updates, epochs=0.0)
    trim = replace(
        trim,
        budget=trim.budget if budget is None else budget,
        budget_unit=trim.budget_unit if budget_unit is None else budget_unit,
        retraining=retraining,
    )
    seed = settings.seed if seed is None else seed
    evaluations = settings.max_evaluations if max_evaluations is None else max_evaluations
    return resolve_settings(replace(settings, trim=trim, seed=seed, max_evaluations=evaluations))


def _without_epochs(settings: SearchSettings, examples: int) -> SearchSettings:
    """Turn the epochs of the final retraining into updates, which is what rounds and heuristics count."""
    trim = settings.trim
    return replace(settings, trim=replace(trim, retraining=trim.retraining.resolved(examples)))


def resolve_settings(settings: SearchSettings) -> SearchSettings:
    """Derive the seed of calibration, scoring and retraining from the root seed."""
    repair = replace(settings.trim.repair, seed=derive_seed(settings.seed, "repair"))
    return replace(settings, trim=replace(settings.trim, repair=repair))


def original(trimmer: Trimmer) -> Finalist:
    """Return the network as it came, scored on the selection split."""
    network = trimmer.task.network
    selection = trimmer.score_selection(network)
    return Finalist("original", "original", network, trimmer.cost_model.full, None, (), selection)


def _build(trimmer: Trimmer, schedule: Schedule, name: str, label: str, progress: Progress) -> Finalist:
    with progress.updates(label, max(1, schedule.retrain_updates)) as show:
        built = build(trimmer, schedule, progress=show)
    return finalist(trimmer, built, name, label)


def finalist(trimmer: Trimmer, built: Built, name: str, label: str, note: str = "") -> Finalist:
    """Return a finished network, scored on the selection split."""
    selection = trimmer.score_selection(built.network)
    return Finalist(name, label, built.network, built.cost, built.schedule, built.rounds, selection, note=note)


def _heuristics(trimmer: Trimmer, settings: SearchSettings, agent: Finalist, progress: Progress) -> list[Finalist]:
    """Run the heuristics to the agent's budget with the agent's number of retraining updates."""
    trim = settings.trim
    assert agent.schedule is not None
    unit = trim.budget_unit
    budget = trim.budget or agent.cost.of(unit) / trimmer.cost_model.full.of(unit)
    retraining = replace(trim.retraining, updates=agent.schedule.retrain_updates)
    start = uniform(trimmer, budget=budget, unit=unit, retraining=retraining, seed=trim.repair.seed)
    result = [_build(trimmer, start, "uniform", "uniform", progress)]
    if not any(group.rectified for group in trimmer.groups):
        progress.say("Network Trimming is left out: no ReLU follows any channel group")
        return result
    variants = [("network_trimming", "Network Trimming (NT)", "delete")]
    if trim.repair.compensation != "delete":
        variants.append(("network_trimming_repaired", "NT, repaired", trim.repair.compensation))
    for name, label, compensation in variants:
        each = trimmer.with_settings(replace(trimmer.settings, criterion="apoz", compensation=compensation), lean=True)
        with progress.updates(label, max(1, retraining.updates)) as show:
            made = network_trimming(
                each, Goal(budget, unit), settings.methods.network_trimming,
                retraining=retraining, seed=trim.repair.seed, progress=show,
            )  # fmt: skip
        note = f"the APoZ threshold gave way in round {len(made)}, to reach the budget" if made.forced else ""
        built = Built(made.network, made.schedule, made.rounds)
        result.append(finalist(trimmer, built, name, label, note))
    return result
