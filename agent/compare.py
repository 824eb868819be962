"""Methods × seeds × budgets at equal cost: runs the cells that are missing, reads the test split, gives the verdicts.

A run folder holds a file for each finished cell, so that an interrupted comparison goes on where it stopped.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..pruning.artifact import weights_digest, write_atomically
from ..pruning.checks import check_kind
from ..pruning.cost import Cost, count_cost
from ..pruning.errors import UserError
from ..pruning.fingerprint import digest, split_digest, versions
from ..pruning.task import PruningTask
from ..pruning.trimmer import Trimmer
from .compare_cell import Cell, Ground, cell_path, load_network, network_digest
from .compare_jobs import run_cells
from .compare_settings import POOL, CompareConfig, cell_digest, check_compare
from .finalists import right_examples
from .intervals import Interval, paired_interval
from .progress import Progress
from .resume import alone

TEST = "test.json"

STAGES = {
    "before": "selection split, after the cut, without retraining",
    "after": "selection split, after equal retraining",
    "test": "test split, after equal retraining",
}
"""Where methods are compared, in words."""


@dataclass(frozen=True)
class Pair:
    """The compared method minus another, over all seeds.

    Attributes:
        first: The compared method, e.g. "agent".
        second: The other.
        budget: Share of the cost to keep.
        stage: "before", "after" or "test", see `STAGES`.
        interval: Of the mean difference, in percentage points.
    """

    first: str
    second: str
    budget: float
    stage: str
    interval: Interval


@dataclass(frozen=True)
class Comparison:
    """What a comparison found.

    Attributes:
        config: As resolved.
        task: Name of network and data.
        examples: Number of images by split.
        whole: Cost of the original network.
        original: Its accuracy by stage; "before" and "after" are the same figure.
        cells: All of them, in the order of methods and seeds, the pool's last.
        test: (method, seed, budget) -> accuracy on the test split.
        pairs: The compared method against each other one.
        readings: How often the test split was read in this run folder.
    """

    config: CompareConfig
    task: str
    examples: dict[str, int]
    whole: Cost
    original: dict[str, float]
    cells: tuple[Cell, ...]
    test: dict[tuple[str, int, float], float]
    pairs: tuple[Pair, ...]
    readings: int

    def cells_of(self, method: str) -> list[Cell]:
        """Return a method's cells in the order of seeds."""
        return [cell for cell in self.cells if cell.method == method]

    def figures(self, method: str, budget: float, stage: str) -> list[float] | None:
        """Return accuracies by seed, in percent; None where the method has none at this stage."""
        return _figures(self.cells_of(method), self.test, budget, stage)


def compare(task: PruningTask, config: CompareConfig, folder: Path, progress: Progress | None = None) -> Comparison:
    """Run what is missing of a comparison, read the test split once for all networks, and work out the verdicts.

    Args:
        task: Network and data; the network is not changed.
        config: Resolved.
        folder: Run folder; finished cells in it are taken as they are.
        progress: Says which cells are done; silent by default.

    Raises:
        UserError: A method cannot do what is asked, a cell in the folder was made with other settings, or another
            process works in the folder.
        KeyboardInterrupt: Interrupted; the finished cells stay.
    """
    check_kind(task, PruningTask, "compare")
    check_kind(config, CompareConfig, "compare")
    progress = progress or Progress()
    ground = Ground(task, config.search, config.compare, folder)
    check_compare(task.network, task.example, config.search, config.compare)
    base = base_digest(task, config.device)
    digests = {
        (method, seed): cell_digest(config, method, seed, base)
        for method in config.compare.rows
        for seed in config.compare.seeds
    }
    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder):
        done = _finished(folder, digests)
        if done:
            progress.say(f"{len(done)} of {len(digests)} cells are finished already")
        for cell in run_cells(ground, digests, done, config):
            done[cell.method, cell.seed] = cell
            progress.say(f"[{len(done)}/{len(digests)}] {_line(cell)}")
        cells = tuple(done[key] for key in digests)
        trimmer = Trimmer(task, config.search.trim.repair, config.search.trim.groups, lean=True)
        selection = trimmer.score_selection(task.network).accuracy
        test, original, readings = _read_test(ground, trimmer, cells)
    return Comparison(
        config=config,
        task=task.name,
        examples={name: len(getattr(task, name)) for name in ("train", "reward", "selection", "test")},
        whole=count_cost(task.network, task.example),
        original={"before": selection, "after": selection, "test": original},
        cells=cells,
        test=test,
        pairs=tuple(_pairs(config, cells, test)),
        readings=readings,
    )


def base_digest(task: PruningTask, device: str) -> str:
    """Return a digest of what all cells stand on: weights, images, kind of device, versions; not the test split."""
    splits = (split_digest(split) for split in (task.train, task.reward, task.selection))
    return digest(weights_digest(task.network), torch.device(device).type, *versions(), *splits)


def _finished(folder: Path, digests: Mapping[tuple[str, int], str]) -> dict[tuple[str, int], Cell]:
    """Return the cells that need not run again.

    Raises:
        UserError: One was made with other settings.
    """
    found = {}
    for (method, seed), own in digests.items():
        path = cell_path(folder, method, seed)
        if not path.is_file():
            continue
        cell = Cell.load(path)
        if cell.digest != own:
            if method == POOL:  # cheap, and other methods may have joined
                continue
            raise UserError(
                f"a comparison goes on with the settings, data, device and versions it began with, but {path} was made "
                "with others; give what it began with, or another --output"
            )
        found[method, seed] = cell
    return found


def _line(cell: Cell) -> str:
    figures = ", ".join(
        f"{found.budget:g}: {'–' if found.before is None else f'{100 * found.before:.2f}'} → {100 * found.after:.2f} %"
        for found in cell.found
    )
    spent = f", {cell.evaluations} evaluations" if cell.evaluations else ""
    return f"{cell.method}, seed {cell.seed}: {figures}{spent}, {cell.seconds:.0f} s"


# ---- the test split --------------------------------------------------------------------------------------------------
def _read_test(
    ground: Ground, trimmer: Trimmer, cells: tuple[Cell, ...]
) -> tuple[dict[tuple[str, int, float], float], float, int]:
    """Score every retrained network on the test split, which is opened once.

    What an earlier run of the same folder read is taken from its file; cells that were added since need another
    reading, and the number of readings is kept.
    """
    path = ground.folder / TEST
    known = _known_readings(path)
    accuracies: dict[str, float] = known["accuracies"]
    names = {
        (cell.method, cell.seed, found.budget): f"{cell.name}-{found.budget:g}-"
        + network_digest(ground.folder, cell.method, cell.seed, found.budget)
        for cell in cells
        for found in cell.found
    }
    missing = [key for key, name in names.items() if name not in accuracies]
    if missing or known["original"] is None:
        known["readings"] += 1
        _write_readings(path, known)  # it counts, whatever happens now
        split = ground.task.test.open(f"comparison of {len(names)} networks")
        split = split.to(next(ground.task.network.parameters()).device)
        size, metric = trimmer.settings.batch_size, ground.task.metric
        known["original"] = float(right_examples(ground.task.network, split, size, metric).mean())
        for key in missing:
            network = load_network(ground, *key)
            accuracies[names[key]] = float(right_examples(network, split, size, metric).mean())
        _write_readings(path, known)
    return {key: accuracies[name] for key, name in names.items()}, known["original"], known["readings"]


def _known_readings(path: Path) -> dict[str, Any]:
    """Return what earlier runs of a folder read of the test split.

    Raises:
        UserError: The file is not what a comparison wrote.
    """
    nothing: dict[str, Any] = {"readings": 0, "original": None, "accuracies": {}}
    if not path.is_file():
        return nothing
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        return {name: known[name] for name in nothing}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} must be what `prunegym compare` wrote, but is not; delete it") from error


def _write_readings(path: Path, known: dict[str, Any]) -> None:
    write_atomically(path, (json.dumps(known, indent=1) + "\n").encode())


# ---- verdicts --------------------------------------------------------------------------------------------------------
def _figures(
    cells: list[Cell], test: Mapping[tuple[str, int, float], float], budget: float, stage: str
) -> list[float] | None:
    take: dict[str, Callable[[Cell], float | None]] = {
        "before": lambda cell: cell.at(budget).before,
        "after": lambda cell: cell.at(budget).after,
        "test": lambda cell: test[cell.method, cell.seed, budget],
    }
    found = [take[stage](cell) for cell in cells]
    known = [100 * value for value in found if value is not None]
    return known if len(known) == len(found) and known else None


def _pairs(
    config: CompareConfig, cells: tuple[Cell, ...], test: Mapping[tuple[str, int, float], float]
) -> Iterator[Pair]:
    compare = config.compare
    by_method = {method: [cell for cell in cells if cell.method == method] for method in compare.methods}
    for budget in compare.budgets:
        for stage in STAGES:
            first = _figures(by_method[compare.subject], test, budget, stage)
            for other in compare.methods:
                second = _figures(by_method[other], test, budget, stage)
                if other == compare.subject or first is None or second is None:
                    continue
                interval = paired_interval(first, second, confidence=compare.confidence, resamples=compare.resamples)
                yield Pair(compare.subject, other, budget, stage, interval)


def results(made: Comparison) -> dict[str, Any]:
    """Return the figures of a comparison as plain data; accuracies are shares, differences are points."""
    return {
        "task": made.task,
        "compare": asdict(made.config.compare),
        "budget_unit": made.config.search.trim.budget_unit,
        "examples": made.examples,
        "original": {**made.original, "params": made.whole.params, "macs": made.whole.macs},
        "test_split_readings": made.readings,
        "cells": [
            {
                "method": cell.method, "seed": cell.seed, "evaluations": cell.evaluations, "repeated": cell.repeated,
                "cached": cell.cached, "seconds": cell.seconds,
                "found": [
                    {
                        "budget": found.budget, "reward_accuracy": found.reward_accuracy, "before": found.before,
                        "after": found.after, "test": made.test[cell.method, cell.seed, found.budget],
                        "params": found.params, "macs": found.macs, "kept": found.kept, "within": found.within,
                        "retrain_updates": found.updates, "made_by": found.made_by,
                        "widths": {name: len(keep) for name, keep in found.plans[-1].items()},
                        "best_so_far": list(found.curve), "best_reward_so_far": list(found.rewards),
                    }
                    for found in cell.found
                ],
            }
            for cell in made.cells
        ],
        "pairs": [{**asdict(pair), "verdict": pair.interval.verdict} for pair in made.pairs],
    }  # fmt: skip
