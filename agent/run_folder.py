"""A run's folder: config, command, versions and seeds beside every result."""

import dataclasses
import importlib.metadata
import json
import os
import pickle
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.save_util import load_from_zip_file
from torch import nn

from ..pruning.architecture import FILE as ARCHITECTURE
from ..pruning.architecture import Architecture, Origin
from ..pruning.artifact import save_pruned, weight_bytes, write_atomically
from ..pruning.cost import count_cost
from ..pruning.errors import UserError
from ..pruning.manifest import relative_folder
from ..pruning.plan import PruningPlan
from ..pruning.schedule import Built, Schedule
from ..pruning.task import PruningTask
from .checkpoint import has_checkpoint
from .history import History
from .report import write_report
from .rows import from_line, read_lines

if TYPE_CHECKING:
    from .search import SearchResult

PACKAGES = (
    "prunegym", "torch", "torchvision", "torch-pruning", "gymnasium", "stable-baselines3", "sb3-contrib", "numpy",
    "scipy", "scikit-learn", "safetensors",
)  # fmt: skip

BASE = "base.safetensors"
POLICY = "policy.zip"
HISTORY = "history.csv"
STARTED_IN = "working_directory"
STARTED = ("config.yaml", "command.txt", "versions.json", "seeds.json")


@dataclass(frozen=True)
class RunFolder:
    """Where one run keeps its files.

    Attributes:
        path: The folder; it exists.
        made_here: Whether it was not there before.
    """

    path: Path
    made_here: bool = True

    @classmethod
    def create(cls, path: str | Path) -> "RunFolder":
        """Make a new, empty run folder.

        Raises:
            UserError: The folder holds files already, or cannot be made.
        """
        folder = Path(path)
        if "\0" in str(path):
            raise UserError(f"a run folder's name may not hold a zero byte, but got {str(path)!r}")
        there = folder.is_dir()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if any(folder.iterdir()):
                raise UserError(f"a run needs an empty folder, but {folder} holds files; choose another --output")
        except OSError as error:
            raise UserError(f"the run folder {folder} cannot be made: {error.strerror}") from error
        return cls(folder, not there)

    @classmethod
    def next_free(cls, name: str, root: str | Path = "runs") -> "RunFolder":
        """Make `root/name-1`, or the first number that is free."""
        number = 1
        while (folder := Path(root) / f"{name}-{number}").exists():
            number += 1
        return cls.create(folder)

    @classmethod
    def existing(cls, path: str | Path) -> "RunFolder":
        """Open a finished run.

        Raises:
            UserError: No `schedule.json` or `config.yaml` there.
        """
        folder = Path(path)
        for name in ("schedule.json", "config.yaml"):
            if not (folder / name).is_file():
                raise UserError(f"a run folder holds {name}, but {folder} has none")
        return cls(folder)

    @classmethod
    def unfinished(cls, path: str | Path) -> "RunFolder":
        """Open the folder of a search that something ended.

        Raises:
            UserError: There is no search in it, or a finished one.
        """
        folder = Path(path)
        if not (folder / "config.yaml").is_file():
            raise UserError(f"the folder of a search holds config.yaml, but {folder} has none; name a run folder")
        if (folder / "report.md").is_file() and not has_checkpoint(folder):
            raise UserError(
                f"only a search that was ended can be resumed, but the one in {folder} is finished (report.md); "
                f"`prunegym apply {folder}` rebuilds its network"
            )
        words = shlex.split(_text(folder / "command.txt"))
        if words[:1] == ["prunegym"] and words[1:2] != ["search"]:
            raise UserError(f"only a search can be resumed, but {folder} was made by: {shlex.join(words[:2])}")
        return cls(folder, made_here=False)

    def write_resumed(self, command: Sequence[str]) -> str:
        """Add a command to those that made the run; returns what differs from the machine it was started on, or ""."""
        self._write("command.txt", _text(self.path / "command.txt") + shlex.join(command) + "\n")
        try:
            before = json.loads(_text(self.path / "versions.json"))
        except ValueError:
            return ""
        pairs = [(name, before.get(name, now), now) for name, now in versions().items()] if before else []
        return ", ".join(f"{name} {then} -> {now}" for name, then, now in pairs if then != now)

    def discard(self) -> None:
        """Remove what `write_start` wrote, and the folder if it was made here and is empty then."""
        for name in STARTED:
            (self.path / name).unlink(missing_ok=True)
        if self.made_here and not any(self.path.iterdir()):
            self.path.rmdir()

    def write_start(
        self, config: str, command: Sequence[str], seeds: Mapping[str, int], started_in: Path | None = None
    ) -> None:
        """Write what decides the run: resolved config (YAML), command, versions with the folder it started in, seeds.

        Args:
            config: As YAML; its paths stay as they were typed.
            command: Program and arguments.
            seeds: By purpose.
            started_in: Folder that relative paths of `config` belong to; the working directory by default. It is
                written relative to the run folder, so that both may move together.
        """
        self._write("config.yaml", config)
        self._write("command.txt", shlex.join(command) + "\n")
        place = {STARTED_IN: relative_folder(started_in or Path.cwd(), self.path)}
        self._write("versions.json", json.dumps({**versions(), **place}, indent=1) + "\n")
        self._write("seeds.json", json.dumps(dict(seeds), indent=1) + "\n")

    @property
    def started_in(self) -> Path | None:
        """The folder the run was started in; None where that was not written or is not there."""
        try:
            written = json.loads((self.path / "versions.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        place = written.get(STARTED_IN) if isinstance(written, dict) else None
        folder = self.path / place if isinstance(place, str) and "\0" not in place else None
        return folder.resolve() if folder is not None and folder.is_dir() else None

    def write_base(self, task: PruningTask) -> None:
        """Keep the weights of a network that was trained here, so that a replay starts from the same ones."""
        if task.source and task.source.get("weights") is None:
            write_atomically(self.path / BASE, weight_bytes(task.network))

    @property
    def base(self) -> Path | None:
        """The kept weights of the original network, if there are any."""
        return self.path / BASE if (self.path / BASE).is_file() else None

    def write_schedule(self, schedule: Schedule) -> None:
        """Write `schedule.json`."""
        schedule.save(self.path / "schedule.json")

    def write_policy(self, policy: BaseAlgorithm) -> None:
        """Write `policy.zip`, in Stable-Baselines3's own format."""
        policy.save(self.path / POLICY)

    def read_policy(self, learner: BaseAlgorithm) -> None:
        """Give a new learner the weights of the policy in `policy.zip`; nothing that was pickled is read.

        Raises:
            UserError: There is none, or it is not the policy of such a learner.
        """
        self.check_policy()
        path = self.path / POLICY
        try:
            _, states, _ = load_from_zip_file(path, load_data=False, device="cpu")
            weights: Any = states["policy"]
            learner.policy.load_state_dict(weights)
        except (KeyError, ValueError, RuntimeError, OSError, pickle.UnpicklingError) as error:
            raise UserError(
                f"{path} must hold the policy that {self.path / 'config.yaml'} describes, but it does not fit: "
                f"{' '.join(str(error).split())[:200]}; take both from the same run"
            ) from error

    def check_policy(self) -> None:
        """Refuse a folder without an agent.

        Raises:
            UserError: There is no `policy.zip`, or no history.
        """
        for name in (POLICY, Path(HISTORY).with_suffix(".jsonl").name):
            if not (self.path / name).is_file():
                raise UserError(f"an agent is read from {name}, but {self.path} has none; name the folder of a search")

    def read_history(self) -> History:
        """Return what the search of this folder scored, without a file behind it; torn lines are left out.

        Raises:
            UserError: It cannot be read.
        """
        rows = []
        for line in read_lines((self.path / HISTORY).with_suffix(".jsonl")):
            with suppress(ValueError):
                rows.append(from_line(line))
        return History(rows=rows)

    def write_result(self, result: "SearchResult") -> None:
        """Write everything that a finished search gives."""
        self.write_schedule(result.schedule)
        if not (self.path / POLICY).exists():
            self.write_policy(result.policy)
        if not (self.path / HISTORY).exists():
            history = History(self.path / HISTORY)
            for row in result.history.rows:
                history.add(row)
        if not (self.path / "versions.json").exists():
            settings = {"search": dataclasses.asdict(result.settings)}  # without a task: it was given as objects
            self.write_start(
                config_text(settings),
                [sys.executable, *sys.argv],
                {"seed": result.settings.seed},
            )
        save_pruned(
            self.path,
            result.network,
            result.plan,
            example_shape=tuple(result.task.example.shape),
            source=result.task.source,
        )
        trim, made_by = result.settings.trim, result.schedule.made_by
        self._write_architecture(
            result.task, result.network, result.plan, made_by, budget=trim.budget, budget_unit=trim.budget_unit
        )
        self._write("results.json", json.dumps(results(result), indent=1) + "\n")
        write_report(self.path, result)

    def write_figures(self, results: Mapping[str, Any], report: str) -> None:
        """Write `results.json` and `report.md`."""
        self._write("results.json", json.dumps(results, indent=1) + "\n")
        self._write("report.md", report)

    def write_built(
        self, task: PruningTask, built: Built, *, budget: float | None = None, budget_unit: str = "macs"
    ) -> None:
        """Write a network that was built from a schedule.

        Args:
            task: What was pruned.
            built: The network, and its schedule.
            budget: Share of the cost that was to be kept, in (0, 1]; None where another goal decided.
            budget_unit: "macs" or "params".
        """
        self.write_schedule(built.schedule)
        save_pruned(
            self.path,
            built.network,
            built.schedule.plan,
            example_shape=tuple(task.example.shape),
            source=task.source,
        )
        made_by = built.schedule.made_by
        self._write_architecture(
            task, built.network, built.schedule.plan, made_by, budget=budget, budget_unit=budget_unit
        )

    def _write_architecture(
        self,
        task: PruningTask,
        network: nn.Module,
        plan: PruningPlan,
        made_by: str,
        *,
        budget: float | None,
        budget_unit: str,
    ) -> None:
        """Write `architecture.yaml`: what the plan leaves, without weights."""
        cost, whole = (count_cost(one, task.example) for one in (network, task.network))
        found_by = Origin.of(made_by, cost, whole, budget, budget_unit)
        shape = tuple(task.example.shape[1:])
        self._write(ARCHITECTURE, Architecture.of(task.source, plan, shape, self.path, found_by).to_yaml())

    def _write(self, name: str, text: str) -> None:
        write_atomically(self.path / name, text.encode())


def _text(path: Path) -> str:
    """Return what a file holds, "" where it is missing."""
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def config_text(settings: Mapping[str, Any]) -> str:
    """Return settings as YAML."""
    return yaml.safe_dump(json.loads(json.dumps(settings)), sort_keys=False)


def results(result: "SearchResult") -> dict[str, Any]:
    """Return the figures of a search as plain data."""
    whole = result.finalists[0].cost
    trim = result.settings.trim
    return {
        "task": result.task.name,
        "budget": trim.budget,
        "budget_range": list(trim.budget_range) if trim.budget_range else None,
        "budget_unit": trim.budget_unit,
        "seed": result.settings.seed,
        "evaluations": result.history.spent,
        "max_evaluations": result.settings.max_evaluations,
        "stopped_by": result.stopped_by,
        "uniform_accuracy_in_search": _finite(result.reference_accuracy),
        "candidates": [
            {"evaluation": row.evaluation, "reward": row.reward, "accuracy_reward_split": row.accuracy,
             "accuracy_selection_split": score.accuracy}
            for row, score in result.candidates
        ],
        "made_by": result.schedule.made_by,
        "pool": [{"made_by": one.made_by, "accuracy_selection_split": one.selection.accuracy} for one in result.rivals],
        "examples": {
            "train": len(result.task.train),
            "reward": len(result.task.reward),
            "selection": len(result.task.selection),
            "test": len(result.task.test),
        },
        "test_split_readings": list(result.task.test.readings),
        "finalists": [finalist.to_dict(whole) for finalist in result.finalists],
        "verdicts": [dataclasses.asdict(verdict) for verdict in result.verdicts],
    }  # fmt: skip


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide a result, and the machine's threads."""
    found = {"python": platform.python_version(), "platform": platform.system() + " " + platform.machine()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    found["threads"] = str(torch.get_num_threads())
    found["cpus"] = str(os.cpu_count())
    return found


def _finite(value: float) -> float | None:
    return None if value != value else value
