"""What `prunegym prune` is asked for: its own three options, and the configuration that a search would read."""

from collections.abc import Sequence
from dataclasses import dataclass

from jsonargparse import ArgumentParser

from ..pruning.errors import UserError
from .configuration import parse, read_config
from .methods import METHODS, PruneSettings, get_method
from .settings import SearchConfig

OWN = ("--method", "--compensation", "--accepted_drop")


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
    only_accuracy = options.accepted_drop is not None and not any(word.startswith("--budget") for word in rest)
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
