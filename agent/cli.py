"""`prunegym …` on the command line. Mistakes of the user are one sentence and exit code 2, without a traceback."""

import dataclasses
import os
import re
import shutil
import sys
from argparse import ArgumentError
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentParser
from rich.console import Console
from threadpoolctl import threadpool_limits

from .. import configs
from ..envs.trim import check_request
from ..pruning.errors import UserError, closest
from ..pruning.export import export_pruned
from ..pruning.prepare import prepare_task
from ..pruning.schedule import Schedule, build
from ..pruning.splits import SealedSplitError
from ..pruning.task import PruningTask
from ..pruning.trimmer import Trimmer
from .inspection import InspectSettings, inspect_network
from .learner import find_algorithm
from .progress import Progress
from .report import console_table, latency_lines, note_lines, verdict_lines
from .run_folder import RunFolder, config_text
from .search import derive_seed, resolve_settings, search
from .settings import SearchConfig

USAGE = """usage: prunegym COMMAND ...

  search CONFIG.yaml [--option value ...]   learn a schedule, build the network, compare it with the APoZ heuristic
  apply RUN [--schedule FILE]               rebuild the network of a run from its (perhaps edited) schedule.json
  export RUN [--format onnx|torch]          write the pruned network of a run as one file, checked against PyTorch
  inspect NETWORK [--data NAME]             list what can be cut, what not and why, and the reachable budgets

`prunegym COMMAND --help` lists the options of a command. CONFIG may also be the name of a shipped one
({configs}).
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for a user's mistake, 130 when interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    commands = {"search": search_command, "apply": apply_command, "export": export_command, "inspect": inspect_command}
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
    """`prunegym search CONFIG [--option value ...]`."""
    config = read_config(arguments)
    find_algorithm(config.search.learner)
    progress = Progress(enabled=True)
    run = RunFolder.create(config.output) if config.output else RunFolder.next_free(config.name)
    seeds = {name: derive_seed(config.search.seed, name) for name in ("task", "repair", "learner")}
    command = ["prunegym", "search", *arguments]
    run.write_start(config_text(dataclasses.asdict(config)), command, {"root": config.search.seed, **seeds})
    try:
        task = load_task(config, progress)
    except (Exception, KeyboardInterrupt):
        run.discard()  # nothing was computed yet
        raise
    run.write_base(task)
    progress.say(f"run folder: {run.path}")
    try:
        result = search(task, settings=config.search, run_folder=run, progress=progress)
    except KeyboardInterrupt:
        if (run.path / "schedule.json").is_file():
            progress.say(f"interrupted; the best schedule is kept: prunegym apply {run.path}")
        raise
    console = Console(highlight=False)
    console.width = max(80, console.width)
    console.print()
    console.print(console_table(result))
    for line in [*verdict_lines(result), *latency_lines(result), *note_lines(result)]:
        console.print(line, soft_wrap=True)
    console.print(f"\nrun folder: {run.path} (report.md, schedule.json, pruned.safetensors, …)", soft_wrap=True)
    return 130 if result.stopped_by == "interrupt" else 0


def read_config(arguments: list[str]) -> SearchConfig:
    """Return what `search` is asked for: a configuration and the options that replace its values.

    Raises:
        UserError: No configuration, an unknown key or a value of the wrong type; the nearest key is named.
    """
    parser = ArgumentParser(prog="prunegym search CONFIG", exit_on_error=False, description="Learn a pruning schedule.")
    parser.add_argument("--config", action="config", help="YAML file; options given after it replace its values")
    parser.add_class_arguments(SearchConfig)
    if not arguments:
        raise UserError(f"search needs a configuration: a YAML file, or one of {', '.join(shipped_configs())}")
    given = vars(parser.instantiate(_parse(parser, _with_config(arguments))))
    return resolve(SearchConfig(**{key: value for key, value in given.items() if key != "config"}))


def apply_command(arguments: list[str]) -> int:
    """`prunegym apply RUN [--schedule FILE] [--output FOLDER]`."""
    parser = ArgumentParser(
        prog="prunegym apply", exit_on_error=False, description="Rebuild a network from a schedule."
    )
    parser.add_argument("run", type=str, help="run folder of a search")
    parser.add_argument("--schedule", type=str, default=None, help="another schedule than the run's schedule.json")
    parser.add_argument("--data_root", type=str, default=None, help="folder that holds the data, if it moved")
    parser.add_argument("--device", type=str, default=None, help="auto, cpu or cuda; the run's by default")
    parser.add_argument(
        "--output", type=str, default=None, help="folder for the result; runs/apply-<number> by default"
    )
    options = _parse(parser, arguments)
    source = RunFolder.existing(options.run)
    text = _read(source.path / "config.yaml")
    if "task" not in (yaml.safe_load(text) or {}):
        raise UserError(
            f"{source.path} holds a network that was given as an object; rebuild it in Python: "
            f"prunegym.load_pruned({str(source.path)!r}, network)"
        )
    config_parser = ArgumentParser(exit_on_error=False)
    config_parser.add_class_arguments(SearchConfig)
    config = SearchConfig(**vars(config_parser.instantiate(_parse_text(config_parser, text))))
    config = replace(
        config,
        data_root=options.data_root or config.data_root,
        device=options.device or config.device,
        task=replace(config.task, weights=str(source.base) if source.base else config.task.weights),
    )
    config = resolve(config)
    schedule = Schedule.load(options.schedule or source.path / "schedule.json")
    progress = Progress(enabled=True)
    task = load_task(config, progress)
    trimmer = Trimmer(task, schedule.repair, config.search.trim.groups)
    if not {name for entry in schedule.rounds for name in entry.plan} <= {group.name for group in trimmer.groups}:
        trimmer = Trimmer(task, schedule.repair)  # edited to cut what the run left whole: the schedule decides
    schedule.plan.completed(trimmer.groups)
    run = RunFolder.create(options.output) if options.output else RunFolder.next_free("apply")
    with progress.updates("rebuild", max(1, schedule.retrain_updates)) as show:
        built = build(trimmer, schedule, progress=show)
    run.write_start(text, ["prunegym", "apply", *arguments], {"root": config.search.seed})
    if source.base:
        shutil.copyfile(source.base, run.path / source.base.name)
    run.write_built(task, built)
    whole = trimmer.cost_model.full
    selection = trimmer.score_selection(built.network)
    progress.say(
        f"{built.cost.params:,} parameters ({whole.params / built.cost.params:.2f}× fewer), {built.cost.macs:,} MACs "
        f"({whole.macs / built.cost.macs:.2f}× fewer); selection accuracy {100 * selection.accuracy:.2f} % "
        f"(original {100 * trimmer.score_selection(task.network).accuracy:.2f} %); written to {run.path}"
    )
    return 0


def export_command(arguments: list[str]) -> int:
    """`prunegym export RUN [--format onnx|torch] [--output FILE]`."""
    parser = ArgumentParser(
        prog="prunegym export", exit_on_error=False, description="Write a pruned network as one file, and check it."
    )
    parser.add_argument("run", type=str, help="folder of a search or of apply")
    parser.add_argument("--format", type=str, default="onnx", help="onnx, or torch for torch.export.load")
    parser.add_argument("--output", type=str, default=None, help="the file; RUN/pruned.onnx or RUN/pruned.pt2")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="accepted difference, relative to the output")
    options = _parse(parser, arguments)
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
    parser = ArgumentParser(prog="prunegym inspect", exit_on_error=False, description="List what can be cut.")
    parser.add_class_arguments(InspectSettings, as_positional=True)
    found = inspect_network(InspectSettings(**vars(parser.instantiate(_parse(parser, arguments)))))
    console = Console(highlight=False)
    console.width = max(100, console.width)
    console.print(found.table())
    for line in [*found.tied(), *found.refused(), *found.budgets()]:
        console.print(line, soft_wrap=True, markup=False)
    return 0


def resolve(config: SearchConfig) -> SearchConfig:
    """Move the shortcuts (`data_root`, `budget`, …) to where they belong."""
    device = config.device
    if device not in ("auto", "cpu") and not re.fullmatch(r"cuda(:\d+)?", device):
        raise UserError(f"device must be auto, cpu or cuda, but got {device!r}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("device 'cuda' needs a GPU that PyTorch can use, but there is none; use --device cpu")
    trim = config.search.trim
    search_settings = replace(
        config.search,
        trim=replace(trim, budget=trim.budget if config.budget is None else config.budget),
        max_evaluations=_either(config.max_evaluations, config.search.max_evaluations),
        max_minutes=_either(config.max_minutes, config.search.max_minutes),
        seed=_either(config.seed, config.search.seed),
    )
    search_settings = resolve_settings(search_settings)
    task = replace(config.task, data_root=config.data_root or config.task.data_root)
    shortcuts: dict[str, Any] = dict.fromkeys(("data_root", "budget", "max_evaluations", "max_minutes", "seed"))
    return replace(config, task=task, search=search_settings, device=device, **shortcuts)


def _either(given: Any, otherwise: Any) -> Any:
    """Return what was given as a shortcut, or the value it would replace."""
    return otherwise if given is None else given


def shipped_configs() -> list[str]:
    """Return the names of the configurations that come with the package."""
    return sorted(path.stem for path in _config_folder().glob("*.yaml"))


def _config_folder() -> Path:
    return Path(configs.__file__).parent


def load_task(config: SearchConfig, progress: Progress) -> PruningTask:
    """Load data and network as a resolved configuration says, with its number of threads; train what has no weights."""
    if config.threads:
        torch.set_num_threads(config.threads)
        threadpool_limits(config.threads, user_api="blas")  # NumPy's own threads
    training = config.task.training
    with progress.updates("train network", None if training.epochs else max(1, training.updates)) as show:
        return prepare_task(
            config.task,
            seed=derive_seed(config.search.seed, "task"),
            device=config.device,
            progress=show,
            check=lambda network, example: check_request(network, example, config.search.trim),
        )


def _with_config(arguments: list[str]) -> list[str]:
    """Turn a first positional CONFIG (a file, or the name of a shipped one) into `--config FILE`."""
    if not arguments or arguments[0].startswith("-"):
        return arguments
    path = Path(arguments[0])
    if not path.is_file():
        shipped = _config_folder() / f"{path.stem}.yaml"
        if os.sep in arguments[0] or not shipped.is_file():
            hint = closest(path.stem, shipped_configs())
            raise UserError(f"the configuration file {arguments[0]} does not exist{hint}")
        path = shipped
    _read(path)
    return ["--config", str(path), *arguments[1:]]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"a configuration must be a readable text file, but {path} is not: {error}") from error


def _parse(parser: ArgumentParser, arguments: list[str]) -> Any:
    try:
        return parser.parse_args(arguments)
    except ArgumentError as error:
        where = arguments[1] if arguments[:1] == ["--config"] else ""
        raise UserError(_explain(str(error), parser, where)) from error


def _parse_text(parser: ArgumentParser, text: str) -> Any:
    try:
        return parser.parse_string(text)
    except ArgumentError as error:
        raise UserError(_explain(str(error), parser)) from error


def _explain(message: str, parser: ArgumentParser, where: str = "") -> str:
    """Add the nearest known option to what the parser says of an unknown one."""
    known = [action.dest for action in parser._actions]
    message = " ".join(message.split()).replace('"<unicode string>"', where or "the configuration")
    unknown = re.search(r"unrecognized arguments: -*([\w.]+)", message)
    if unknown:
        return f"unknown option --{unknown[1]}{_near(unknown[1], known)}"
    group = re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message)
    if group:
        name = f"{group[1]}.{group[2]}"
        return f"unknown key {name!r} in the configuration{_near(name, known)}"
    key = re.search(r"(?:[Kk]ey|[Oo]ption) '?([\w.]+)'? is not (?:expected|accepted)", message)
    if key:
        return f"unknown key {key[1]!r} in the configuration{_near(key[1], known)}"
    return message


def _near(name: str, known: list[str]) -> str:
    """Name the nearest option: by the last part of the name first, then by the whole."""
    first, _, rest = name.partition(".")
    sections = {option.partition(".")[0] for option in known}
    if rest and first not in sections:
        return closest(first, sections)
    folder, _, last = name.rpartition(".")
    beside = [option.rpartition(".")[2] for option in known if option.rpartition(".")[0] == folder]
    hint = closest(last, beside) if beside else ""
    if "did you mean" in hint and folder:
        return re.sub(r"'(.*)'", rf"'{folder}.\1'", hint)
    return hint or closest(name, known)


if __name__ == "__main__":
    sys.exit(main())
