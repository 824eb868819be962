"""The rankings everybody knows, beside each other: magnitude and mean activation, uniform, local and global.

    python benchmarks/rankings.py configs/resnet20_cifar10.yaml --table docs/results/rankings.md --data_root DATA \
        --task.weights WEIGHTS --task.splits.heldout UNSEEN --threads 1

One cut to the budget, as published (no repair) and with least squares; then the same retraining for all. The test split
is opened once, after all networks were built.
"""

import argparse
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from prunegym.agent.configuration import read_config
from prunegym.agent.finalists import right_examples
from prunegym.agent.loading import load_task
from prunegym.agent.progress import Progress
from prunegym.agent.prune import PruneSettings, prune
from prunegym.agent.report import markdown_table
from prunegym.agent.settings import MethodSettings
from prunegym.pruning import PruningTask, RepairSettings, Trimmer
from prunegym.pruning.heuristics import Pruned, RankingSettings

CRITERIA = ("l1", "l2", "mean_activation")
SCOPES = (("uniform", "own"), ("local", "own"), ("global", "l2"), ("global", "none"))
ALSO = (("random", "uniform", "own"), ("least_squares", "uniform", "own"))
"""Controls: by chance, and the criterion that the learned search uses."""


@dataclass(frozen=True)
class Row:
    """One method's result; accuracies in [0, 1]."""

    criterion: str
    scope: str
    compensation: str
    made: Pruned
    selection: float


def main() -> int:
    """Build all, read the test split once, print and perhaps write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--table", help="Markdown file to write")
    parser.add_argument("--updates", type=int, default=80, help="of retraining, for every network")
    parser.add_argument("--keep", type=float, default=0.5, help="share of the MACs")
    options, rest = parser.parse_known_args()
    config = read_config([options.config, *rest])
    task = load_task(config, Progress(sys.stderr.isatty()))
    trim = config.search.trim
    settings = PruneSettings(
        budget=options.keep, budget_unit="macs", seed=config.search.seed, repair=RepairSettings(),
        retraining=replace(trim.retraining, updates=options.updates, epochs=0.0, distillation=0.0),
    )  # fmt: skip
    kinds = [(name, *scope) for name in CRITERIA for scope in SCOPES] + list(ALSO)
    rows = []
    for name, scope, norm in kinds:
        methods = MethodSettings(ranking=RankingSettings(scope, norm=norm))
        for compensation in ("delete", "least_squares"):
            made = prune(task, replace(settings, method=name, methods=methods, compensation=compensation))
            shown = f"{scope}, raw scores" if norm == "none" else scope
            score = Trimmer(task, made.schedule.repair).score_selection(made.network)
            rows.append(Row(name, shown, compensation, made, score.accuracy))
    tests = read_test(task, rows)
    command = shlex.join(["python", "benchmarks/rankings.py", *sys.argv[1:]])
    text = "\n".join([*page(task, rows, tests, settings, options.updates), f"Command: `{command}`", ""])
    print(text)
    if options.table:
        Path(options.table).write_text(text)
    return 0


def read_test(task: PruningTask, rows: list[Row]) -> list[float]:
    """Open the test split once and score the original and every network."""
    split = task.test.open("rankings")
    networks = [task.network, *(row.made.network for row in rows)]
    return [float(right_examples(network, split, 500, task.metric).mean()) for network in networks]


def page(task: PruningTask, rows: list[Row], tests: list[float], settings: PruneSettings, updates: int) -> list[str]:
    """Return the page's text."""
    base = Trimmer(task, settings.repair).score_selection(task.network).accuracy
    cells = []
    for row, test in zip(rows, tests[1:], strict=True):
        entry, widths = row.made.rounds[-1], row.made.schedule.plan.counts
        least = min(widths, key=lambda name: widths[name] / row.made.widths[name])
        cells.append(
            (
                row.criterion, row.scope, row.compensation, f"{entry.cost.params:,}", f"{entry.cost.macs / 1e6:.2f} M",
                f"{widths[least]} of {row.made.widths[least]} ({least})", f"{100 * entry.after_trim.accuracy:.1f}",
                f"{100 * row.selection:.1f}", f"{100 * test:.1f}",
            )
        )  # fmt: skip
    headers = (
        "channels by", "scope", "repair", "parameters", "MACs", "narrowest layer", "after the cut", "selection", "test",
    )  # fmt: skip
    ordered = sorted(rows, key=lambda row: -row.selection)
    plain = [row for row in ordered if row.compensation == "delete" and row.criterion in CRITERIA]
    return [
        f"# Rankings everybody knows: {task.name}",
        "",
        f"One cut to {settings.budget:.0%} of the MACs, batch norm recalibrated, then {updates} updates of the same "
        f"retraining for all (batch {settings.retraining.batch_size}, distillation "
        f"{settings.retraining.distillation:g}). Accuracy in percent: *after the cut* on {len(task.reward):,} reward "
        f"images, *selection* on {len(task.selection):,} images after retraining, *test* read once for all. Original: "
        f"selection {100 * base:.1f}, test {100 * tests[0]:.1f}. Seed {settings.seed}.",
        "",
        "*uniform*: the same share of every group stays. *local*: every group has the same multiple of its mean score "
        "as threshold. *global*: one ranking over all groups, scores divided by their layer's Euclidean norm, or raw.",
        "",
        *markdown_table(headers, cells),
        "",
        f"Best on the selection split without repair: {plain[0].criterion}, {plain[0].scope}; with any repair: "
        f"{ordered[0].criterion}, {ordered[0].scope}, {ordered[0].compensation}. One seed: differences of a point or "
        "less say nothing.",
        "",
        "Published figures for these rankings (Li et al. 2017 on ResNet-56 and VGG-16, Molchanov et al. 2017 on "
        "VGG-16) are for other networks and much longer retraining; none is comparable number by number.",
        "",
    ]


if __name__ == "__main__":
    sys.exit(main())
