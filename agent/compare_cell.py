"""One cell of a comparison, a method at one seed for all budgets, as data and as files of the run folder."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ..pruning.artifact import WEIGHTS, load_pruned, write_atomically
from ..pruning.errors import UserError
from ..pruning.task import PruningTask
from .compare_settings import CompareSettings
from .settings import SearchSettings

CELLS, NETWORKS, SCORES = "cells", "networks", "scores.sqlite"


def rounding(reward: float) -> float:
    """Return how near another reward is equal: a vectorised environment hands them on in single precision."""
    return 1e-6 * max(1.0, abs(reward))


@dataclass(frozen=True, eq=False)
class Ground:
    """What all cells share; it can be pickled.

    Attributes:
        task: Network and data.
        search: Environment, agent and the methods' own settings.
        compare: What may be spent.
        folder: The run folder.
    """

    task: PruningTask
    search: SearchSettings
    compare: CompareSettings
    folder: Path


@dataclass(frozen=True)
class Found:
    """What a method found at one seed and budget. Accuracies are shares.

    Attributes:
        budget: Share of the cost that was allowed.
        plans: Channels that stay of the original network after each round, by group.
        reward_accuracy: On the reward images right after the cut; None where training came between the cuts.
        before: On the selection split right after the cut; None likewise.
        after: On the selection split after all retraining.
        params: Parameters.
        macs: Multiply-accumulates of one example.
        kept: Share of the original cost, in the budget's unit.
        within: Whether that meets the budget within the tolerance.
        updates: Optimizer steps that were taken.
        made_by: The method; for the pool, whose plan it took.
        candidates: For an agent, its best plans, best first (each: one plan a round), for the pool to choose from.
        curve: For a search, the accuracy on the reward images of the plan of highest reward so far, after each
            evaluation at this budget.
        rewards: Its reward.
    """

    budget: float
    plans: tuple[dict[str, list[int]], ...]
    reward_accuracy: float | None
    before: float | None
    after: float
    params: int
    macs: int
    kept: float
    within: bool
    updates: int
    made_by: str
    candidates: tuple[tuple[dict[str, list[int]], ...], ...] = ()
    curve: tuple[float | None, ...] = ()
    rewards: tuple[float | None, ...] = ()

    def reached(self, reward: float) -> int | None:
        """Return after how many evaluations the best reward so far was at least `reward`; None = never."""
        least = reward - rounding(reward)
        places = (place for place, best in enumerate(self.rewards, 1) if best is not None and best >= least)
        return next(places, None)


@dataclass(frozen=True)
class Cell:
    """One method at one seed.

    Attributes:
        method: Its name.
        seed: Root of its random numbers.
        digest: Of everything that decides the cell.
        found: One for each budget.
        evaluations: Distinct plans scored, over all budgets; 0 for a method that scores none.
        repeated: Plans that came again, which cost nothing.
        cached: Evaluations whose score lay in the store already; they took no time, but count.
        seconds: Of the search or ranking, without the final retraining where that comes last.
    """

    method: str
    seed: int
    digest: str
    found: tuple[Found, ...]
    evaluations: int
    repeated: int
    cached: int
    seconds: float

    @property
    def name(self) -> str:
        """How its files are called."""
        return f"{self.method}-seed{self.seed}"

    def at(self, budget: float) -> Found:
        """Return what was found at a budget."""
        return next(found for found in self.found if found.budget == budget)

    def save(self, folder: Path) -> None:
        """Write the cell below a run folder; the file is complete or absent."""
        path = cell_path(folder, self.method, self.seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps(dataclasses.asdict(self), indent=1) + "\n").encode())

    @classmethod
    def load(cls, path: Path) -> "Cell":
        """Read a cell.

        Raises:
            UserError: The file is no cell; delete it, and the cell runs again.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            found = tuple(
                Found(**{**each, **{name: tuple(each[name]) for name in ("plans", "curve", "rewards")},
                         "candidates": tuple(tuple(plans) for plans in each["candidates"])})
                for each in data.pop("found")
            )  # fmt: skip
            return cls(**data, found=found)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(
                f"a cell of a comparison must be what `prunegym compare` wrote, but {path} is not ({error}); delete "
                "it, and the cell runs again"
            ) from error


def cell_path(folder: Path, method: str, seed: int) -> Path:
    """Return the file of a cell."""
    return folder / CELLS / f"{method}-seed{seed}.json"


def network_folder(folder: Path, method: str, seed: int, budget: float) -> Path:
    """Return where the retrained network of a cell lies."""
    return folder / NETWORKS / f"{method}-seed{seed}-{budget:g}"


def network_digest(folder: Path, method: str, seed: int, budget: float) -> str:
    """Return a digest of a finished cell's weights, as they lie on disk.

    Raises:
        UserError: They are not there.
    """
    path = network_folder(folder, method, seed, budget) / WEIGHTS
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:32]
    except OSError as error:
        raise UserError(
            f"a finished cell must have its networks, but {path} cannot be read ({error}); delete "
            f"{cell_path(folder, method, seed)}, and the cell runs again"
        ) from error


def load_network(ground: Ground, method: str, seed: int, budget: float) -> nn.Module:
    """Return the retrained network of a finished cell, on the task's device."""
    return load_pruned(network_folder(ground.folder, method, seed, budget), ground.task.network)
