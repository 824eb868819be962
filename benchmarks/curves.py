"""Accuracy against MACs while channels leave a few at a time, with updates in between: one curve for each criterion.

    python benchmarks/curves.py configs/resnet20_cifar10.yaml --table docs/results/curves.md --data_root DATA \
        --task.weights WEIGHTS --task.splits.heldout UNSEEN --threads 1

The procedure of Molchanov et al. 2017 for every criterion alike: one ranking over all layers, scores divided by their
layer's Euclidean norm (Taylor 2019 as it is), k channels a step, a few updates, again. No test image is read.
"""

import argparse
import json
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from prunegym.agent.configuration import read_config
from prunegym.agent.loading import load_task
from prunegym.agent.progress import Progress
from prunegym.agent.prune import PruneSettings, prune
from prunegym.agent.report import markdown_table
from prunegym.agent.settings import MethodSettings
from prunegym.pruning import PruningTask, RepairSettings, Trimmer
from prunegym.pruning.heuristics import Pruned, RankingSettings

CURVES = (
    ("taylor_2017", "delete"), ("taylor_2019", "delete"), ("apoz", "delete"), ("mean_activation", "delete"),
    ("l1", "delete"), ("l2", "delete"), ("random", "delete"), ("taylor_2017", "least_squares"), ("l1", "least_squares"),
)  # fmt: skip
COLOURS = {
    "taylor_2017": "#2f6db3", "taylor_2019": "#5aa9e6", "apoz": "#d1762a", "mean_activation": "#4a9d5b",
    "l1": "#9a4f96", "l2": "#c98bc4", "random": "#8a8f98",
}  # fmt: skip
MARKS = (0.8, 0.6, 0.5, 0.4, 0.3)
"""Shares of the MACs at which the curves are read."""


@dataclass(frozen=True)
class Curve:
    """One criterion's way down.

    Attributes:
        criterion: Which channels left.
        compensation: How the next layers were repaired.
        macs: After each step, share of the original's.
        cut: Accuracy on the reward images before the step's updates, in [0, 1].
        trained: The same after them.
    """

    criterion: str
    compensation: str
    macs: list[float]
    cut: list[float]
    trained: list[float]

    @property
    def label(self) -> str:
        """For people."""
        return self.criterion if self.compensation == "delete" else f"{self.criterion}, {self.compensation}"


def main() -> int:
    """Walk all curves, print and perhaps write page, picture and JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--table", help="Markdown file to write; the picture and the figures go beside it")
    parser.add_argument("--channels", type=int, default=16, help="that leave in a step")
    parser.add_argument("--updates", type=int, default=20, help="between two steps")
    parser.add_argument("--images", type=int, default=1000, help="reward images of each score")
    parser.add_argument("--lowest", type=float, default=0.25, help="share of the MACs at which the curves end")
    options, rest = parser.parse_known_args()
    config = read_config([options.config, *rest])
    task = load_task(config, Progress(sys.stderr.isatty()))
    ranking = RankingSettings(
        "global", channels_per_round=options.channels, updates_between=options.updates, final_share=0.0
    )
    trim, total = config.search.trim, sum(group.width for group in Trimmer(task).groups)
    settings = PruneSettings(
        budget=options.lowest, budget_unit="macs", seed=config.search.seed,
        repair=RepairSettings(calibration_images=256, recalibration_images=256, reward_images=options.images),
        retraining=replace(
            trim.retraining, updates=options.updates * (total // options.channels), epochs=0.0, distillation=0.0,
            learning_rate=0.01, schedule="constant",
        ),
        methods=MethodSettings(taylor=ranking, ranking=ranking),
    )  # fmt: skip
    curves = []
    for name, repair in CURVES:
        curves.append(walk(task, replace(settings, method=name, compensation=repair)))
        print(f"{curves[-1].label}: {len(curves[-1].macs)} steps", file=sys.stderr)
    base = Trimmer(task, settings.repair).baseline.accuracy
    command = shlex.join(["python", "benchmarks/curves.py", *sys.argv[1:]])
    lines = page(task, curves, base, settings, options.channels, options.updates)
    text = "\n".join([*lines, f"Command: `{command}`", ""])
    print(text)
    if options.table:
        path = Path(options.table)
        path.write_text(text)
        picture(curves, base).savefig(path.with_suffix(".png"))
        path.with_suffix(".json").write_text(json.dumps([vars(curve) for curve in curves], indent=1) + "\n")
    return 0


def walk(task: PruningTask, settings: PruneSettings) -> Curve:
    """Prune step by step; the last step, which gets all updates that are left, is not part of the curve."""
    made: Pruned = prune(task, settings)
    whole = Trimmer(task, made.schedule.repair).cost_model.full.macs
    rounds = made.rounds[:-1]
    return Curve(
        settings.method, str(settings.compensation),
        [entry.cost.macs / whole for entry in rounds],
        [entry.after_trim.accuracy for entry in rounds],
        [entry.after_retraining.accuracy for entry in rounds],
    )  # fmt: skip


def at(curve: Curve, share: float, base: float) -> float:
    """Read a curve at a share of the MACs, linearly between steps."""
    macs, accuracy = [1.0, *curve.macs], [base, *curve.trained]
    return float(np.interp(share, macs[::-1], accuracy[::-1])) if share >= macs[-1] else float("nan")


def page(
    task: PruningTask, curves: list[Curve], base: float, settings: PruneSettings, channels: int, updates: int
) -> list[str]:
    """Return the page's text."""
    rows = [
        (curve.label, *(f"{100 * at(curve, share, base):.1f}" for share in MARKS), str(len(curve.macs)))
        for curve in curves
    ]
    plain = {curve.criterion: curve for curve in curves if curve.compensation == "delete"}
    order = sorted(plain, key=lambda name: -at(plain[name], 0.4, base))
    return [
        f"# Interleaved pruning: {task.name}",
        "",
        f"{channels} channels leave in a step, then {updates} updates (batch {settings.retraining.batch_size}, "
        f"learning rate {settings.retraining.learning_rate:g}, constant); scores measured anew each time on "
        f"{settings.repair.calibration_images} training images, batch norm recalibrated. Accuracy on "
        f"{settings.repair.reward_images:,} reward images after the updates, in percent, at shares of the MACs; the "
        f"original has {100 * base:.1f}. Seed {settings.seed}; the test split is not touched.",
        "",
        "![accuracy against MACs](curves.png)",
        "",
        *markdown_table(("criterion", *(f"{share:.0%}" for share in MARKS), "steps"), rows),
        "",
        f"Order at 40 % without repair: {', '.join(order)}.",
        "",
        "Published (Molchanov et al. 2017): Taylor above mean activation, weight norm and random choice, on VGG-16 and "
        "AlexNet with transfer to small data sets. Ours differs in the network (residual, with batch norm), in k, and "
        "in the few updates a step; one seed, and a thousand images leave a standard error of about 1.2 points.",
        "",
    ]


def picture(curves: list[Curve], base: float) -> Figure:
    """Draw accuracy against MACs, after the updates."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for curve in curves:
        style: dict[str, Any] = {"linestyle": "-" if curve.compensation == "delete" else "--"}
        shares, accuracy = [100.0, *(100 * share for share in curve.macs)], [base, *curve.trained]
        axes.plot(
            shares, [100 * value for value in accuracy], label=curve.label, color=COLOURS[curve.criterion], **style
        )
    axes.invert_xaxis()
    axes.set_xlabel("MACs kept, %")
    axes.set_ylabel("accuracy on reward images, %")
    axes.set_title("A few channels at a time, with updates in between")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    sys.exit(main())
