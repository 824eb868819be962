"""What `prunegym prune` is asked for: its own three options, and the configuration that a search would read."""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from jsonargparse import ArgumentParser

from ..pruning.errors import UserError
from .configuration import parse, read_config
from .methods import METHODS, get_method
from .prune import PruneSettings
from .settings import SearchConfig

OWN = ("--method", "--compensation", "--accepted_drop")

IDLE = {
    "--search.trim.repair.compensation": "use --compensation",
    "--search.trim.repair.criterion": "the method decides which channels leave",
    "--max_evaluations": "use --search.methods.amc.evaluations or --search.methods.try_and_learn.evaluations",
    "--search.max_evaluations": "use --search.methods.amc.evaluations or --search.methods.try_and_learn.evaluations",
    "--max_minutes": "methods have no time limit",
    "--search.max_minutes": "methods have no time limit",
    "--search.candidates": "use --search.methods.amc.candidates",
    "--search.learner": "methods have agents of their own, see --search.methods",
    "--search.trim.action": "methods decide in their own way, see --search.methods",
    "--search.trim.observation": "methods decide in their own way, see --search.methods",
    "--search.trim.reward": "methods decide in their own way, see --search.methods",
    "--search.trim.rounds": "methods decide in their own way, see --search.methods",
    "--search.trim.retrain_updates": "the updates of all rounds are --search.trim.retraining.updates",
}
"""Options of a search that no method reads, and what to use."""


@dataclass(frozen=True)
class PruneOptions:
    """What is asked for.

    Attributes:
        config: As `search` reads it: task, budget, repair, retraining, groups and the settings of the methods.
        settings: What the method gets.
    """

    config: SearchConfig
    settings: PruneSettings


def read_options(arguments: Sequence[str]) -> PruneOptions:
    """Read the arguments of `prunegym prune`.

    With `--accepted_drop` and without `--budget` only the accuracy counts: the file's budget is that of a search.

    Raises:
        UserError: No method, an unknown one, or a mistake in the configuration; the nearest name is given.
    """
    own, rest = _split(arguments)
    _check_options(own, rest)
    if "--help" in rest or "-h" in rest:
        read_config(rest, "prune")
    parser = ArgumentParser(prog="prunegym prune", exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--method", type=str, default=None)
    parser.add_argument("--compensation", type=str, default=None)
    parser.add_argument("--accepted_drop", type=float, default=None)
    options = parse(parser, own)
    if options.method is None:
        raise UserError(
            f"prune needs a method, one of {', '.join(METHODS)}: prunegym prune --method NAME CONFIG; "
            "`prunegym methods` describes them"
        )
    get_method(options.method)
    config = read_config(rest, "prune")
    trim = config.search.trim
    only_accuracy = options.accepted_drop is not None and not any(
        word.partition("=")[0] in ("--budget", "--search.trim.budget") for word in rest
    )
    settings = PruneSettings(
        method=options.method,
        budget=None if only_accuracy else trim.budget,
        budget_unit=trim.budget_unit,
        accepted_drop=options.accepted_drop,
        compensation=options.compensation,
        repair=trim.repair,
        retraining=trim.retraining,
        groups=trim.groups,
        methods=config.search.methods,
        seed=config.search.seed,
    )
    return PruneOptions(config, settings)


def _check_options(own: Sequence[str], rest: Sequence[str]) -> None:
    """Refuse own options that are mistyped or given twice, and options of a search that would do nothing."""
    names = [word.partition("=")[0] for word in own]
    for name in OWN:
        if names.count(name) > 1:
            raise UserError(f"{name} may be given once, but it is there {names.count(name)} times")
    for word in rest:
        name = word.partition("=")[0]
        meant = get_close_matches(name, OWN, n=1, cutoff=0.85)
        if meant:
            raise UserError(f"unknown option {name}; did you mean {meant[0]}?")
        for idle, instead in IDLE.items():
            if name == idle or name.startswith(f"{idle}."):
                raise UserError(f"{name} is an option of a search that prune does not read; {instead}")


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Take the command's own options, with their values, out of the others."""
    own: list[str] = []
    rest: list[str] = []
    place = 0
    while place < len(arguments):
        word = arguments[place]
        name, equals, _ = word.partition("=")
        taken = 1 if equals or name not in OWN else 2
        (own if name in OWN else rest).extend(arguments[place : place + taken])
        place += taken
    return own, rest
