"""`prunegym …` on the command line. Mistakes of the user are one sentence and exit code 2, without a traceback."""

import dataclasses
import sys
from argparse import ArgumentError
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from jsonargparse import ArgumentParser
from rich.console import Console

from ..pruning.errors import UserError, closest
from ..pruning.export import export_pruned
from ..pruning.schedule import Built
from ..pruning.splits import SealedSplitError
from ..pruning.task import PruningTask
from ..pruning.trimmer import Trimmer
from . import prune_report
from .compare import compare
from .compare_folder import begin, write_comparison
from .compare_report import console_tables, reading
from .compare_settings import check_compare, read_compare
from .configuration import parse, read_config, resolve, shipped_configs, stored_config
from .finalists import read_test_split
from .inspection import InspectSettings, inspect_network
from .learner import find_algorithm
from .loading import load_task
from .methods import METHODS, get_method
from .noise_meter import noise_for
from .pool import with_own_budget
from .progress import Progress
from .prune import check_method, prune
from .prune_options import read_options
from .randomness import derive_seed
from .replay import apply_command, pareto_command
from .report import choice_lines, console_table, latency_lines, note_lines, training_lines, verdict_lines
from .run_folder import RunFolder, config_text
from .search import finalist, original, search
from .settings import SearchConfig

USAGE = """usage: prunegym COMMAND ...

  search CONFIG.yaml [--option value ...]   learn a schedule, build the network, compare it with the APoZ heuristic
  search --resume RUN                       go on with a search that was ended, as if it had not been
  compare CONFIG.yaml [--option value ...]  the agent against other methods at equal cost, over several seeds
  prune --method NAME CONFIG.yaml [...]     prune by a published method, with the same repair, retraining and table
  methods                                   list the methods, a sentence and the paper each
  noise CONFIG.yaml [--option value ...]    measure whether a search's reward images can tell plans apart
  apply RUN [--schedule FILE]               rebuild the network of a run from its (perhaps edited) schedule.json
  apply RUN --budget SHARE                  build the best plan of a run's agent, or of a heuristic, for another budget
  pareto RUN [--budgets SHARE ...]          the best plan for each budget of a run's range, beside the heuristics'
  export RUN [--format onnx|torch]          write the pruned network of a run as one file, checked against PyTorch
  inspect NETWORK [--data NAME]             list what can be cut, what not and why, and the reachable budgets

`prunegym COMMAND --help` lists the options of a command. CONFIG may also be the name of a shipped one
({configs}).
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for a user's mistake, 130 when interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    commands = {
        "search": search_command, "compare": compare_command, "prune": prune_command, "methods": methods_command,
        "apply": apply_command, "pareto": pareto_command, "noise": noise_command,
        "export": export_command, "inspect": inspect_command,
    }  # fmt: skip
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            print(USAGE.format(configs=", ".join(shipped_configs())))  # noqa: T201  (a command line talks)
            return 0 if arguments else 2
        if arguments[0] not in commands:
            hint = closest(arguments[0], commands)
            raise UserError(f"the command must be one of {', '.join(commands)}, but got {arguments[0]!r}{hint}")
        return commands[arguments[0]](arguments[1:])
    except (UserError, ArgumentError, SealedSplitError) as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"prunegym: {error}", markup=False)
        return 2
    except KeyboardInterrupt:
        Console(stderr=True).print("prunegym: interrupted")
        return 130


def search_command(arguments: list[str]) -> int:
    """`prunegym search CONFIG [--option value ...]`, or `prunegym search --resume RUN`."""
    resume = any(argument.partition("=")[0] == "--resume" for argument in arguments)
    progress = Progress(enabled=True)
    config, run, task = _resumed(arguments, progress) if resume else _begun(arguments, progress)
    run.write_base(task)
    progress.say(f"run folder: {run.path}")
    try:
        result = search(task, settings=config.search, run_folder=run, progress=progress, resume=resume)
    except KeyboardInterrupt:
        if (run.path / "schedule.json").is_file():
            progress.say(f"interrupted; the best schedule is kept: prunegym apply {run.path}")
        progress.say(f"interrupted; the search goes on with: prunegym search --resume {run.path}")
        raise
    console = Console(highlight=False)
    console.width = max(80, console.width)
    console.print()
    console.print(console_table(result))
    said = [*choice_lines(result), *verdict_lines(result), *latency_lines(result), *training_lines(result)]
    for line in [*said, *note_lines(result)]:
        console.print(line, soft_wrap=True, markup=False)
    line = f"\nrun folder: {run.path} (report.md, schedule.json, pruned.safetensors, …)"
    console.print(line, soft_wrap=True, markup=False)
    return 130 if result.stopped_by == "interrupt" else 0


def compare_command(arguments: list[str]) -> int:
    """`prunegym compare CONFIG [--option value ...]`, or `prunegym compare --resume RUN`."""
    config = read_compare(arguments)
    begun = begin(config, ["prunegym", "compare", *arguments])
    run, config, progress = begun.run, begun.config, Progress(enabled=True)
    fair = partial(check_compare, search=config.search, compare=config.compare)
    try:
        task = load_task(config, progress, run.started_in, check=fair)
    except (Exception, KeyboardInterrupt):
        begun.discard()
        raise
    run.write_base(task)
    progress.say(f"run folder: {run.path}")
    try:
        made = compare(task, config, run.path, progress)
    except KeyboardInterrupt:
        progress.say(f"interrupted; go on with: prunegym compare --resume {run.path}")
        raise
    write_comparison(begun, made)
    console = Console(highlight=False)
    console.width = max(120, console.width)
    for part in [*console_tables(made), *reading(made)]:
        console.print(part, soft_wrap=True, markup=False) if isinstance(part, str) else console.print(part)
    line = f"\nrun folder: {run.path} (comparison.md, results.json, pareto.png, …)"
    console.print(line, soft_wrap=True, markup=False)
    return 0


def prune_command(arguments: list[str]) -> int:
    """`prunegym prune --method NAME CONFIG [--compensation NAME] [--accepted_drop SHARE] [--option value ...]`."""
    options = read_options(arguments)
    config, settings = options.config, options.settings
    method = get_method(settings.method)
    progress = Progress(enabled=True)
    run = RunFolder.create(config.output) if config.output else RunFolder.next_free(f"{config.name}-{method.name}")
    root = config.search.seed
    seeds = {"root": root, **{each: derive_seed(root, each) for each in ("task", "repair")}}
    try:
        run.write_start(config_text(dataclasses.asdict(config)), ["prunegym", "prune", *arguments], seeds)
        task = load_task(config, progress, check=lambda network, one: check_method(network, one, settings))
        progress.say(f"run folder: {run.path}")
        updates = max(1, settings.retraining.resolved(len(task.train)).updates)
        with progress.updates(method.name, updates) as show, progress.updates(method.name, None, "eval") as tell:
            made = prune(task, settings, progress=show, evaluated=tell)
    except (Exception, KeyboardInterrupt):
        run.discard()
        raise
    built = Built(made.network, made.schedule, made.rounds)
    run.write_base(task)
    run.write_built(task, built, budget=settings.budget, budget_unit=settings.budget_unit)
    try:
        trimmer = Trimmer(task, made.schedule.repair, settings.groups)
        finalists = [original(trimmer), finalist(trimmer, built, method.name, method.name)]
        read_test_split(trimmer, finalists)
        told = (task, method, settings, made, finalists)
        run.write_figures(prune_report.results(*told), prune_report.markdown(*told))
    except KeyboardInterrupt:
        progress.say(f"interrupted before the report; the network is kept: prunegym apply {run.path}")
        raise
    console = Console(highlight=False)
    console.width = max(80, console.width)
    console.print()
    heading = prune_report.title(task, settings, made.schedule.repair.compensation)
    console.print(heading, style="bold", soft_wrap=True, markup=False)
    console.print(prune_report.console_table(made, finalists[0].cost))
    whole = finalists[0].cost
    for line in [prune_report.ending(made, settings, whole), *prune_report.finish_lines(finalists)]:
        console.print(line, soft_wrap=True, markup=False)
    line = f"\nrun folder: {run.path} (report.md, schedule.json, pruned.safetensors, …)"
    console.print(line, soft_wrap=True, markup=False)
    return 0


def methods_command(arguments: list[str]) -> int:
    """`prunegym methods`."""
    parse(ArgumentParser(prog="prunegym methods", exit_on_error=False, description="List the methods."), arguments)
    console = Console(highlight=False, soft_wrap=True)
    for method in METHODS.values():
        console.print(f"{method.name:<18}{method.description}", markup=False)
        console.print(f"{'':<18}{method.source}; repair as published: {method.compensation}", markup=False)
    return 0


def noise_command(arguments: list[str]) -> int:
    """`prunegym noise CONFIG [--option value ...]`, with the options of a search."""
    config = read_config(arguments, "noise")
    task = load_task(config, Progress(enabled=True))
    trimmer = Trimmer(task, config.search.trim.repair, config.search.trim.groups, lean=True)
    report = noise_for(trimmer, replace(config.search, trim=with_own_budget(config.search.trim)))
    console = Console(highlight=False)
    console.width = max(80, console.width)
    console.print(report.table())
    for line in [report.finding(), *report.remarks, report.advice()]:
        console.print(line, soft_wrap=True, markup=False)
    return 0


def export_command(arguments: list[str]) -> int:
    """`prunegym export RUN [--format onnx|torch] [--output FILE]`."""
    parser = ArgumentParser(
        prog="prunegym export", exit_on_error=False, allow_abbrev=False,
        description="Write a pruned network as one file, and check it.",
    )  # fmt: skip
    parser.add_argument("run", type=str, help="folder of a search or of apply")
    parser.add_argument("--format", type=str, default="onnx", help="onnx, or torch for torch.export.load")
    parser.add_argument("--output", type=str, default=None, help="the file; RUN/pruned.onnx or RUN/pruned.pt2")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="accepted difference, relative to the output")
    options = parse(parser, arguments)
    made = export_pruned(options.run, format=options.format, output=options.output, tolerance=options.tolerance)
    opset = "" if made.opset is None else f", opset {made.opset}"
    Console(highlight=False).print(
        f"{made.path}: {made.size:,} bytes{opset}; differs from PyTorch by at most {made.difference:.1e} of the "
        "largest output",
        soft_wrap=True,
        markup=False,
    )
    return 0


def inspect_command(arguments: list[str]) -> int:
    """`prunegym inspect NETWORK [--option value ...]`."""
    parser = ArgumentParser(
        prog="prunegym inspect", exit_on_error=False, allow_abbrev=False, description="List what can be cut."
    )
    parser.add_class_arguments(InspectSettings, as_positional=True)
    found = inspect_network(InspectSettings(**vars(parser.instantiate(parse(parser, arguments)))))
    console = Console(highlight=False)
    console.width = max(100, console.width)
    console.print(found.table())
    for line in [*found.tied(), *found.refused(), *found.budgets()]:
        console.print(line, soft_wrap=True, markup=False)
    return 0


def _begun(arguments: list[str], progress: Progress) -> tuple[SearchConfig, RunFolder, PruningTask]:
    """Make the run folder of a new search, and load its task."""
    config = read_config(arguments)
    find_algorithm(config.search.learner)
    run = RunFolder.create(config.output) if config.output else RunFolder.next_free(config.name)
    seeds = {name: derive_seed(config.search.seed, name) for name in ("task", "repair", "learner")}
    command = ["prunegym", "search", *arguments]
    run.write_start(config_text(dataclasses.asdict(config)), command, {"root": config.search.seed, **seeds})
    try:
        return config, run, load_task(config, progress)
    except (Exception, KeyboardInterrupt):
        run.discard()  # nothing was computed yet
        raise


def _resumed(arguments: list[str], progress: Progress) -> tuple[SearchConfig, RunFolder, PruningTask]:
    """Open the run folder of a search that was ended, and load its task with the weights that it began with."""
    parser = ArgumentParser(
        prog="prunegym search", exit_on_error=False, allow_abbrev=False, description="Go on with a search."
    )
    parser.add_argument("--resume", type=str, required=True, help="its run folder")
    parser.add_argument("--max_minutes", type=float, default=None, help="another limit, of all its learning together")
    parser.add_argument("--data_root", type=str, default=None, help="folder that holds the data, if it moved")
    try:
        options = parse(parser, arguments)
    except UserError as error:
        raise UserError(
            f"a search is resumed with the settings in its folder, beside them only --max_minutes and --data_root may "
            f"be given, but: {error}"
        ) from error
    run = RunFolder.unfinished(options.resume)
    config, _ = stored_config(run.path / "config.yaml")
    shared = config.search.scores
    if shared is not None and run.started_in is not None:
        shared = str(run.started_in / shared)
    config = resolve(
        replace(
            config,
            search=replace(config.search, scores=shared),
            data_root=options.data_root or config.data_root,
            max_minutes=config.max_minutes if options.max_minutes is None else options.max_minutes,
            task=replace(config.task, weights=str(run.base) if run.base else config.task.weights),
        )
    )
    task = load_task(config, progress, run.started_in)
    if run.base:
        task.source = {**task.source, "weights": None}  # trained here, as in the run that goes on
    if changed := run.write_resumed(["prunegym", "search", *arguments]):
        progress.say(f"not as when the run was started ({changed}): the last bits of its numbers may differ")
    return config, run, task


if __name__ == "__main__":
    sys.exit(main())
