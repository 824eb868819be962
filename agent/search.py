"""The one public verb: a task in, the best plan out, with the policy, the history and an honest comparison."""

import math
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3.common.base_class import BaseAlgorithm
from torch import nn

from ..envs.trim import ActionError, TrimEnv, TrimSettings
from ..pruning.checks import check_kind
from ..pruning.errors import UserError
from ..pruning.evaluation import Score
from ..pruning.heuristics import Goal, network_trimming, uniform
from ..pruning.plan import PruningPlan
from ..pruning.retraining import RetrainSettings
from ..pruning.schedule import Built, Round, Schedule, build
from ..pruning.task import PruningTask
from ..pruning.trimmer import Trimmer
from .finalists import Finalist, Verdict, compare_pair, read_test_split, time_networks
from .history import Evaluation, History, SearchCallback
from .learner import make_environments, make_learner, noise_setter
from .progress import Progress
from .randomness import derive_seed, random_state_kept
from .run_folder import RunFolder
from .settings import SearchSettings

DEFAULT_RETRAIN_UPDATES = 300


@dataclass(eq=False)
class SearchResult:
    """What a search found.

    Attributes:
        schedule: The best schedule, with the final retraining.
        network: Built from it on the pristine weights, retrained.
        policy: The Stable-Baselines3 algorithm, trained.
        history: Every evaluation.
        finalists: The networks of the final comparison, the agent's last.
        verdicts: The agent against each heuristic.
        candidates: The best evaluations of the search, scored on the selection split.
        stopped_by: "max_evaluations", "max_minutes" or "interrupt".
        task: What was pruned.
        settings: As resolved.
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
) -> SearchResult:
    """Learn a pruning schedule for a task, build the network, and compare it with the heuristics.

    Args:
        task: Network and data.
        budget: Share of the cost to keep, in (0, 1]; the settings' by default.
        max_evaluations: Scored networks that the agent may spend.
        budget_unit: "macs" or "params".
        retrain_updates: Training updates of each finished network (300 when no settings are given).
        settings: Everything else.
        seed: Root of all random numbers of the search.
        run_folder: Where records are written as they come; nothing is written by default.
        progress: Live display; silent by default.

    Returns:
        The result; `result.save(folder)` writes it.

    Raises:
        UserError: The request cannot be met, e.g. the budget is below what the narrowest allowed widths cost.
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
    with random_state_kept():
        return _search(task, settings, run_folder, progress or Progress())


def _search(
    task: PruningTask, settings: SearchSettings, run_folder: RunFolder | None, progress: Progress
) -> SearchResult:
    trimmer = Trimmer(task, settings.trim.repair, settings.trim.groups)
    history = History(run_folder.path / "history.csv" if run_folder else None)
    environment = TrimEnv(task, settings.trim, trimmer=trimmer)  # refuses impossible settings before any work
    policy, stopped_by = learn(task, settings, trimmer, environment, history, run_folder, progress)
    schedule, candidates = choose(trimmer, settings, history, run_folder, progress)
    if run_folder:
        run_folder.write_schedule(schedule)
        run_folder.write_policy(policy)
    agent = _build(trimmer, schedule, "agent", "agent", progress)
    finalists = [original(trimmer)]
    if settings.compare:
        finalists += _heuristics(trimmer, settings, agent, progress)
    finalists.append(agent)
    read_test_split(trimmer, finalists)
    time_networks(trimmer, finalists, settings.latency_batches)
    verdicts = [compare_pair(agent, other) for other in finalists[1:-1]]
    needs = settings.trim.budget is not None and settings.trim.reward.objective == "budget"
    result = SearchResult(
        schedule=schedule,
        network=agent.network,
        policy=policy,
        history=history,
        finalists=finalists,
        verdicts=verdicts,
        candidates=candidates,
        stopped_by=stopped_by,
        task=task,
        settings=settings,
        reference_accuracy=environment.reference(settings.trim.budget).accuracy if needs else math.nan,
        original_widths={group.name: group.width for group in trimmer.groups},
    )
    if run_folder:
        run_folder.write_result(result)
    return result


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


def learn(
    task: PruningTask,
    settings: SearchSettings,
    trimmer: Trimmer,
    environment: TrimEnv,
    history: History,
    run_folder: RunFolder | None,
    progress: Progress,
) -> tuple[BaseAlgorithm, str]:
    """Train the policy within the limits, then let it act once without noise."""
    trim, seed = settings.trim, derive_seed(settings.seed, "learner")
    groups = len(trimmer.groups)
    own = trim.rounds if settings.max_evaluations > 2 * trim.rounds else 0  # kept for the policy without noise
    allowed = settings.max_evaluations - own
    workers = make_environments(task, trim, trimmer, workers=settings.learner.workers, seed=seed)
    interrupted = False
    try:
        learner = make_learner(
            settings.learner,
            workers,
            steps_per_episode=groups * trim.rounds,
            seed=seed,
            log_folder=run_folder.path / "tensorboard" if run_folder else None,
        )
        with progress.evaluations("search", settings.max_evaluations) as show:
            callback = SearchCallback(
                history,
                max_evaluations=allowed,
                max_seconds=60 * settings.max_minutes,
                set_noise=noise_setter(learner, settings.learner),
                report=show,
            )
            try:
                learner.learn(allowed * groups, callback=callback, tb_log_name="learner")
                if own and callback.stopped_by != "max_minutes":
                    callback.record_alone(*_play(learner, environment))
                    show(history)
            except KeyboardInterrupt:
                interrupted = True
            except ActionError as error:
                raise UserError(
                    f"the actions of an agent must stay finite, but {settings.learner.algorithm} diverged; lower "
                    f"learning_rate, which is {settings.learner.learning_rate:g}"
                ) from error
    finally:
        with suppress(EOFError, BrokenPipeError, ConnectionResetError):  # a worker that died already
            workers.close()
    if interrupted:
        progress.say("interrupted: the best plan so far is built (interrupt again to stop at once)")
    return learner, "interrupt" if interrupted else callback.stopped_by or "max_evaluations"


def _play(learner: BaseAlgorithm, environment: TrimEnv) -> tuple[list[dict[str, Any]], float]:
    """Play one episode without noise; returns the infos of its scored steps and its reward."""
    observation, _ = environment.reset()
    state: Any = None
    start = np.ones(1, dtype=bool)
    infos, reward, done = [], 0.0, False
    while not done:
        action, state = learner.predict(observation, state, start, deterministic=True)
        observation, reward, done, _, info = environment.step(action)
        start = np.zeros(1, dtype=bool)
        if "accuracy" in info:
            infos.append(info)
    return infos, reward


def choose(
    trimmer: Trimmer, settings: SearchSettings, history: History, run_folder: RunFolder | None, progress: Progress
) -> tuple[Schedule, list[tuple[Evaluation, Score]]]:
    """Score the best distinct schedules again, on the selection split, and take the best there."""
    trim = settings.trim
    best_yet = history.best
    if run_folder and best_yet is not None:  # so that an interrupt from here on leaves something to replay
        run_folder.write_schedule(_schedule(trimmer, trim, _plans(best_yet), final=True))
    scored = []
    for row in history.ranked()[: settings.candidates]:
        schedule = _schedule(trimmer, trim, _plans(row), final=False)
        built = build(trimmer, schedule, verify=False)
        scored.append((row, trimmer.score_selection(built.network)))
    if not scored:
        if trim.budget is None:
            raise UserError("the search ended before its first plan was scored; allow more evaluations or minutes")
        progress.say("no plan was scored before the search ended: the uniform plan is built instead")
        start = uniform(
            trimmer, budget=trim.budget, unit=trim.budget_unit, retraining=trim.retraining, seed=trim.repair.seed
        )
        return start, []
    best, _ = max(scored, key=lambda pair: (pair[1].accuracy, -pair[1].loss))
    return _schedule(trimmer, trim, _plans(best), final=True), scored


def _plans(row: Evaluation) -> list[PruningPlan]:
    return [PruningPlan.from_dict(plan) for plan in row.plans]


def _schedule(trimmer: Trimmer, trim: TrimSettings, plans: list[PruningPlan], *, final: bool) -> Schedule:
    updates = [trim.retrain_updates] * len(plans)
    if final:
        updates[-1] += trim.retraining.updates
    return Schedule(
        rounds=tuple(Round(plan, count) for plan, count in zip(plans, updates, strict=True)),
        repair=trimmer.settings,
        retraining=replace(trim.retraining if final else trim.retraining.without_checks(), updates=0),
        seed=trim.repair.seed,
        made_by="agent",
    )


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
