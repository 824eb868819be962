"""A pruned network beside its own architecture trained from scratch (Liu et al. 2019, arXiv 1810.05270).

    python benchmarks/architecture.py RUN configs/lenet_mnist.yaml --table docs/results/architecture.md \
        --data_root DATA --seeds 0 1

RUN is a finished run of `prunegym search`, `prune` or `apply`: its schedule is built again with each seed, and its
`architecture.yaml` trained from random weights with the recipe that trains the original (the configuration's
`task.training`, no distillation). An architecture file in place of RUN gives the trained ones only. The test split is
opened once, after all networks are finished.
"""

import argparse
import shlex
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from prunegym.agent.configuration import read_config
from prunegym.agent.finalists import right_examples
from prunegym.agent.loading import load_task
from prunegym.agent.progress import Progress
from prunegym.agent.run_folder import ARCHITECTURE, RunFolder
from prunegym.agent.settings import SearchConfig
from prunegym.pruning import Cost, PruningTask, RetrainSettings, Schedule, Trimmer, UserError, build, count_cost
from prunegym.pruning.architecture import Architecture
from prunegym.pruning.networks import build_architecture
from prunegym.pruning.retraining import retrain
from torch import nn

ORIGINAL, TUNED = "original network", "pruned, fine-tuned"


@dataclass(eq=False)
class Made:
    """One finished network.

    Attributes:
        row: The row of the table it belongs to.
        seed: Of its training, and of its weights where they were random.
        updates: Optimizer steps taken, without the original's training.
        network: The network.
        cost: Parameters and MACs.
        selection: Accuracy on the selection split, in [0, 1].
        test: Accuracy on the test split, in [0, 1]; NaN before it is opened.
    """

    row: str
    seed: int
    updates: int
    network: nn.Module
    cost: Cost
    selection: float
    test: float = float("nan")


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and score everything, print and perhaps write the page."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="RUN_OR_ARCHITECTURE")
    parser.add_argument("config")
    parser.add_argument("--table", help="Markdown file to write")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--double", action="store_true", help="also twice the updates of the original's training")
    options, rest = parser.parse_known_args(arguments)
    if len(set(options.seeds)) < 2:
        raise UserError(f"one seed shows no spread, so --seeds must name two or more, but got {options.seeds}")
    config = read_config([options.config, *rest])
    run = None if Path(options.source).is_file() else RunFolder.existing(options.source)
    file = run.path / ARCHITECTURE if run else Path(options.source)
    architecture = Architecture.load(file)
    if run and run.base:
        config = replace(config, task=replace(config.task, weights=str(run.base)))
    task = load_task(config, Progress())
    schedule = Schedule.load(run.path / "schedule.json") if run else None
    made = finish(task, config, architecture, schedule, options.seeds, options.double)
    split = task.test.open("from scratch: " + ", ".join(dict.fromkeys(one.row for one in made)))
    split = split.to(task.example.device)
    for one in made:
        one.test = float(right_examples(one.network, split, 500, task.metric).mean())
    page = report(task.name, architecture, made, shlex.join(["python", "benchmarks/architecture.py", *arguments]))
    print(page)
    if options.table:
        Path(options.table).parent.mkdir(parents=True, exist_ok=True)
        Path(options.table).write_text(page)
    return 0


def finish(
    task: PruningTask,
    config: SearchConfig,
    architecture: Architecture,
    schedule: Schedule | None,
    seeds: Sequence[int],
    double: bool,
) -> list[Made]:
    """Build the schedule with each seed, and train the architecture from scratch for each length."""
    trimmer = Trimmer(task, schedule.repair if schedule else None, config.search.trim.groups)
    training = config.task.training.resolved(len(task.train)).without_checks()  # the selection split judges
    if schedule:
        schedule = replace(schedule, retraining=schedule.retraining.without_checks())
    if not training.updates:
        raise UserError(
            "training from scratch needs the original's recipe, but its updates are 0; "
            "give --task.training.updates or --task.training.epochs"
        )
    lengths = {"from scratch, the original's updates": training.updates}
    if schedule:
        lengths = {"from scratch, the retraining's updates": schedule.retrain_updates, **lengths}
    if double:
        lengths["from scratch, twice the original's updates"] = 2 * training.updates
    whole = count_cost(task.network, task.example)
    made = [Made(ORIGINAL, 0, 0, task.network, whole, trimmer.score_selection(task.network).accuracy)]
    for seed in seeds:
        if schedule:
            built = build(trimmer, replace(schedule, seed=seed), verify=False)
            accuracy = trimmer.score_selection(built.network).accuracy
            made.append(Made(TUNED, seed, built.updates_taken, built.network, built.cost, accuracy))
        for row, updates in lengths.items():
            network, taken = from_scratch(task, architecture, replace(training, updates=updates, epochs=0.0), seed)
            accuracy = trimmer.score_selection(network).accuracy
            made.append(Made(row, seed, taken, network, count_cost(network, task.example), accuracy))
    return made


def from_scratch(
    task: PruningTask, architecture: Architecture, training: RetrainSettings, seed: int
) -> tuple[nn.Module, int]:
    """Return the architecture, trained from random weights, and the optimizer steps taken."""
    image = task.example.shape
    network = build_architecture(
        architecture, classes=task.classes, in_channels=image[1], image_size=image[-1], seed=seed
    ).to(task.example.device)
    done = retrain(network, task.train, replace(training, distillation=0.0), seed=seed, metric=task.metric)
    return network, done.updates


def report(name: str, architecture: Architecture, made: Sequence[Made], command: str) -> str:
    """Return the page."""
    rows: dict[str, list[Made]] = {}
    for one in made:
        rows.setdefault(one.row, []).append(one)
    seeds = list(dict.fromkeys(one.seed for one in made if one.row != ORIGINAL))
    widths = ", ".join(f"{group} {width}" for group, width in architecture.widths.items())
    lines = [
        f"# Does {name} need its inherited weights?",
        "",
        f"Architecture: {widths}. Accuracies in percent, mean ± standard deviation over the seeds "
        f"{', '.join(map(str, seeds))}; *updates* without the original's own training, which fine-tuning needs and "
        "training from scratch does not. Control of Liu et al. 2019 (arXiv 1810.05270).",
        "",
        "| network | parameters | MACs | updates | selection | test |",
        "|---|--:|--:|--:|--:|--:|",
        *(
            f"| {row} | {entries[0].cost.params:,} | {entries[0].cost.macs:,} | "
            f"{statistics.mean(one.updates for one in entries):,.0f} | {_spread([one.selection for one in entries])} | "
            f"{_spread([one.test for one in entries])} |"
            for row, entries in rows.items()
        ),
        "",
    ]
    if TUNED in rows:
        lines += ["From scratch minus fine-tuned on the test split, paired by seed, in percentage points:", ""]
        for row, entries in rows.items():
            if row not in (ORIGINAL, TUNED):
                gaps = [100 * (one.test - tuned.test) for one, tuned in zip(entries, rows[TUNED], strict=True)]
                each = ", ".join(f"{gap:+.2f}" for gap in gaps)
                lines.append(f"- {row}: {statistics.mean(gaps):+.2f} ({each})")
        lines.append("")
    return "\n".join([*lines, "The test split was opened once, after all networks were finished.", "",
                      f"Command: `{command}`", ""])  # fmt: skip


def _spread(values: Sequence[float]) -> str:
    percent = [100 * value for value in values]
    return (
        f"{percent[0]:.2f}"
        if len(percent) == 1
        else f"{statistics.mean(percent):.2f} ± {statistics.stdev(percent):.2f}"
    )


if __name__ == "__main__":
    sys.exit(main())
