"""Commands that open the folder of a search again: `prunegym apply RUN`, `prunegym pareto RUN`."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from jsonargparse import ArgumentParser
from rich.console import Console

from ..pruning.errors import UserError
from ..pruning.schedule import Built, Schedule, build
from ..pruning.trimmer import Trimmer
from .configuration import parse, resolve, stored_config
from .front import TrainedAgent, candidates_at, find_front, finished
from .front_report import console_table, election, notes, write_front
from .loading import load_task
from .pool import best_of
from .progress import Progress
from .run_folder import RunFolder
from .settings import SearchConfig


def apply_command(arguments: list[str]) -> int:
    """`prunegym apply RUN [--schedule FILE | --budget SHARE] [--output FOLDER]`."""
    parser = _replay_parser("apply", "Rebuild a network from a schedule, or build one for another budget.")
    parser.add_argument("--schedule", type=str, default=None, help="another schedule than the run's schedule.json")
    parser.add_argument("--budget", type=float, default=None, help="share of the cost to keep, in (0, 1]")
    options = parse(parser, arguments)
    if options.schedule is not None and options.budget is not None:
        raise UserError("a schedule says what it keeps, but got --schedule and --budget; give one of them")
    progress = Progress(enabled=True)
    source, config, text = _reopened(options)
    if options.budget is not None:
        _check_agent(source, [options.budget])
    schedule = Schedule.load(options.schedule or source.path / "schedule.json")
    task = load_task(config, progress, source.started_in)
    if options.budget is None:
        trimmer = Trimmer(task, schedule.repair, config.search.trim.groups)
    else:
        trimmer = Trimmer(task, config.search.trim.repair, config.search.trim.groups)
        schedule = _for_budget(TrainedAgent.load(source, trimmer, config.search), options.budget, progress)
    if not {name for entry in schedule.rounds for name in entry.plan} <= {group.name for group in trimmer.groups}:
        trimmer = Trimmer(task, schedule.repair)  # edited to cut what the run left whole: the schedule decides
    schedule.plan.completed(trimmer.groups)
    run = RunFolder.create(options.output) if options.output else RunFolder.next_free("apply")
    try:
        command = ["prunegym", "apply", *arguments]
        run.write_start(text, command, {"root": config.search.seed}, started_in=source.started_in)
        with progress.updates("rebuild", max(1, schedule.retrain_updates)) as show:
            built = build(trimmer, schedule, progress=show)
    except (Exception, KeyboardInterrupt):
        run.discard()
        raise
    if source.base:
        shutil.copyfile(source.base, run.path / source.base.name)
    run.write_built(task, built, budget=options.budget, budget_unit=config.search.trim.budget_unit)
    whole = trimmer.cost_model.full
    selection = trimmer.score_selection(built.network)
    progress.say(
        f"{built.cost.params:,} parameters ({whole.params / built.cost.params:.2f}× fewer), {built.cost.macs:,} MACs "
        f"({whole.macs / built.cost.macs:.2f}× fewer); selection accuracy {100 * selection.accuracy:.2f} % "
        f"(original {100 * trimmer.score_selection(task.network).accuracy:.2f} %); "
        f"{built.updates_taken:,} retraining updates{_asked(built)}; written to {run.path}"
    )
    return 0


def pareto_command(arguments: list[str]) -> int:
    """`prunegym pareto RUN [--budgets SHARE ...] [--retrain_updates N] [--output FOLDER]`."""
    parser = _replay_parser("pareto", "The best plan for each budget, of the agent's and the heuristics'.")
    parser.add_argument("--budgets", type=float, nargs="+", default=[], help="shares to keep; the run's by default")
    parser.add_argument("--retrain_updates", type=int, default=0, help="train the best and the uniform plans, too")
    options = parse(parser, arguments)
    if options.retrain_updates < 0:
        raise UserError(f"retrain_updates must be at least 0, but got {options.retrain_updates}")
    progress = Progress(enabled=True)
    source, config, text = _reopened(options)
    _check_agent(source, options.budgets)
    task = load_task(config, progress, source.started_in)
    agent = TrainedAgent.load(
        source, Trimmer(task, config.search.trim.repair, config.search.trim.groups), config.search
    )
    run = RunFolder.create(options.output) if options.output else RunFolder.next_free("pareto")
    try:
        command = ["prunegym", "pareto", *arguments]
        run.write_start(text, command, {"root": config.search.seed}, started_in=source.started_in)
        front = find_front(agent, options.budgets, retrain_updates=options.retrain_updates, progress=progress)
    except (Exception, KeyboardInterrupt):
        run.discard()
        raise
    write_front(run.path, front, task.name, options.run)
    console = Console(highlight=False)
    console.width = max(120, console.width)
    console.print(console_table(front))
    for line in [*notes(front), f"\nwritten to {run.path} (pareto.md, pareto.json, pareto.png, schedules/)"]:
        console.print(line, soft_wrap=True, markup=False)
    return 0


def _replay_parser(command: str, description: str) -> ArgumentParser:
    """Return the parser of a command that opens the folder of a search again."""
    parser = ArgumentParser(
        prog=f"prunegym {command}", exit_on_error=False, allow_abbrev=False, description=description
    )
    parser.add_argument("run", type=str, help="run folder of a search")
    parser.add_argument("--data_root", type=str, default=None, help="folder that holds the data, if it moved")
    parser.add_argument("--device", type=str, default=None, help="auto, cpu or cuda; the run's by default")
    where = f"folder for the result; runs/{command}-<number> by default"
    parser.add_argument("--output", type=str, default=None, help=where)
    return parser


def _reopened(options: Any) -> tuple[RunFolder, SearchConfig, str]:
    """Return a run's folder, its configuration with the options of `_replay_parser`, and that as it was written."""
    source = RunFolder.existing(options.run)
    config, text = stored_config(source.path / "config.yaml")
    config = replace(
        config,
        data_root=options.data_root or config.data_root,
        device=options.device or config.device,
        task=replace(config.task, weights=str(source.base) if source.base else config.task.weights),
    )
    return source, resolve(config), text


def _check_agent(source: RunFolder, budgets: Sequence[float]) -> None:
    """Refuse, before anything is loaded, a folder without an agent, and budgets that are none."""
    source.check_policy()
    for budget in budgets:
        if not 0 < budget <= 1:
            raise UserError(f"budget must be in (0, 1], but got budget={budget}; it is the share to keep")


def _for_budget(agent: TrainedAgent, budget: float, progress: Progress) -> Schedule:
    """Return the schedule of the best plan for a budget, and say whose it is."""
    if warning := agent.outside(budget):
        progress.say(warning)
    candidates = candidates_at(agent, budget)
    best = best_of(candidates)
    progress.say(election(candidates))
    return finished(agent, best)


def _asked(built: Built) -> str:
    asked = built.schedule.retrain_updates
    return "" if built.updates_taken == asked else f" ({asked:,} asked for)"
