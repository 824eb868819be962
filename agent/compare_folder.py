"""The run folder of a comparison: begun, gone on with, and the report written into it."""

import dataclasses
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..pruning.artifact import write_atomically
from ..pruning.errors import UserError
from .compare import Comparison, results
from .compare_pictures import write_pictures
from .compare_report import markdown
from .compare_settings import CompareConfig, check_comparison
from .run_folder import RunFolder, config_text, versions


@dataclass(frozen=True)
class Begun:
    """A run folder that a comparison may use.

    Attributes:
        run: The folder.
        resumed: Whether an earlier run began it.
        config: As given, with the original's weights of the earlier run where that trained them.
        given: As given.
        command: Program and arguments; where `--resume RUN` stands for a configuration, those that began the run, and
            the options that were added.
    """

    run: RunFolder
    resumed: bool
    config: CompareConfig
    given: CompareConfig
    command: tuple[str, ...]

    def write_start(self) -> None:
        """Write what decides the run; a comparison that was enlarged is kept as it was enlarged."""
        stored = replace(self.given, output=None, resume=None)
        seeds = {f"seed {seed}": seed for seed in stored.compare.seeds}
        self.run.write_start(
            config_text(dataclasses.asdict(stored)), self.command, {"task": stored.search.seed, **seeds},
            started_in=self.run.started_in,
        )  # fmt: skip

    def discard(self) -> None:
        """Remove what was written, unless an earlier run began the folder."""
        if not self.resumed:
            self.run.discard()


def begin(config: CompareConfig, command: Sequence[str]) -> Begun:
    """Open the run folder that a configuration means: a new one, or the one of an unfinished comparison.

    Args:
        config: Resolved.
        command: Program and arguments, kept for the report.

    Raises:
        UserError: `resume` names no run of a comparison, or `output` that of another command or a folder with other
            files.
    """
    there, given = config.resume or config.output, config
    if there is not None and (Path(there) / "config.yaml").is_file():
        check_comparison(Path(there))
        run = RunFolder(Path(there), made_here=False)
        if run.base is not None:
            config = replace(config, task=replace(config.task, weights=str(run.base)))
        return Begun(run, True, config, given, tuple(_whole_command(run, command)))
    if config.resume is not None:
        raise UserError(f"--resume needs the run folder of a comparison, but there is no {there}/config.yaml")
    run = RunFolder.create(config.output) if config.output else RunFolder.next_free(config.name)
    begun = Begun(run, False, config, given, tuple(command))
    begun.write_start()
    return begun


def _whole_command(run: RunFolder, command: Sequence[str]) -> list[str]:
    """Return a command that needs no run folder: what `--resume RUN` leaves out is what began the run."""
    words = [word.partition("=")[0] for word in command]
    if "--resume" not in words or "--config" in words or not words[2].startswith("-"):
        return list(command)
    place = words.index("--resume")
    added = [*command[2:place], *command[place + (1 if "=" in command[place] else 2) :]]
    return [*shlex.split((run.path / "command.txt").read_text(encoding="utf-8")), *added]


def write_comparison(begun: Begun, made: Comparison) -> None:
    """Write `results.json`, `comparison.md` and the pictures."""
    run = begun.run
    if begun.resumed and begun.command != tuple(shlex.split((run.path / "command.txt").read_text(encoding="utf-8"))):
        begun.write_start()  # methods or seeds may have been added
    write_pictures(run.path, made)
    write_atomically(run.path / "results.json", (json.dumps(results(made), indent=1) + "\n").encode())
    write_atomically(run.path / "comparison.md", markdown(made, begun.command, versions()).encode())
