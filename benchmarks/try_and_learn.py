"""Try-and-learn on LeNet and on three layers of ResNet-20, beside L1 and a random choice of as many filters.

    python benchmarks/try_and_learn.py --mnist DATA --cifar DATA/cifar10 --weights WEIGHTS --heldout UNSEEN \
        --table docs/results/try_and_learn.md

For every accepted drop: the layers are learned from low to high, each is cut and trained. The others keep as many
filters of each layer, cut in the same order, with the same updates and the same seeds; nothing else differs. The test
split of each data set is read once, at the end, for all networks together.
"""

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from prunegym.agent.cli import load_task, read_config
from prunegym.agent.finalists import Finalist, compare_pair, read_test_split, verdict_sentence
from prunegym.agent.progress import Progress
from prunegym.agent.settings import TryAndLearnSettings
from prunegym.agent.try_and_learn import TryAndLearnResult, try_and_learn
from prunegym.pruning import RepairSettings, RetrainSettings, Subject, Trimmer
from prunegym.pruning.heuristics import Goal, Pruned, prune_in_rounds
from prunegym.pruning.heuristics.rounds import Decision, Pace

SEED = 0
UNREPAIRED = RepairSettings(compensation="delete")
ALL_LAYERS = Goal(accepted_drop=1.0)
CONTROLS = {"l1": "L1, as many filters", "random": "random, as many filters"}


@dataclass(frozen=True)
class Case:
    """One network and what is asked of it.

    Attributes:
        arguments: Of `read_config`.
        drops: Accepted drops, as shares.
        settings: Of try-and-learn; the drop is replaced.
        repair: Nothing is repaired; images for scoring and batch norm.
        retraining: Of episodes and layers.
    """

    arguments: list[str]
    drops: tuple[float, ...]
    settings: TryAndLearnSettings
    repair: RepairSettings
    retraining: RetrainSettings


def main() -> int:
    """Run both networks, print and perhaps write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", required=True, help="folder that holds MNIST/raw")
    parser.add_argument("--cifar", required=True, help="folder with train/ and test/, one folder per class")
    parser.add_argument("--weights", required=True, help="trained weights of the CIFAR ResNet-20")
    parser.add_argument("--heldout", required=True, help="the images that these weights have not seen")
    parser.add_argument("--share", type=float, default=1.0, help="share of the evaluations, for a quick look")
    parser.add_argument("--table", help="Markdown file to write")
    options = parser.parse_args()
    page = [
        "# Try-and-learn",
        "",
        "Layer by layer, from low to high, a policy for each layer learns which filters can go (Huang et al. 2018, "
        "b = accepted drop of accuracy; no repair). Beside it as many filters of each layer by their L1 norm and at "
        f"random, with the same order, updates and seeds. Seed {SEED}. The reward images chose the filters of "
        "try-and-learn: their column favours it, the selection and test columns do not.",
        "",
        "Published: VGG-16 on CIFAR-10 loses 1.9 points, L1 at the same ratios 2.4 (second hand; another network, "
        "another number of evaluations).",
        "",
    ]
    for case in cases(options):
        page += [*run_case(case), ""]
    page += [
        f"Took {time.process_time() / 60:.0f} minutes of one core.",
        "",
        f"Command: `{shlex.join(['python', 'benchmarks/try_and_learn.py', *sys.argv[1:]])}`",
        "",
    ]
    print("\n".join(page))
    if options.table:
        Path(options.table).write_text("\n".join(page))
    return 0


def cases(options: argparse.Namespace) -> list[Case]:
    """Return LeNet with three accepted drops, and one layer of each stage of ResNet-20 with one."""

    def tries(count: int) -> int:
        return max(6, round(options.share * count))

    resnet = ["configs/resnet20_cifar10.yaml", "--data_root", options.cifar, "--task.weights", options.weights]
    return [
        Case(
            arguments=["configs/lenet_mnist.yaml", "--data_root", options.mnist, "--threads", "1"],
            drops=(0.005, 0.01, 0.02),
            settings=TryAndLearnSettings(evaluations=tries(240), learning_rate=0.02, fine_tune=5),
            repair=replace(
                UNREPAIRED, calibration_images=256, reward_images=2000, recalibration_images=0, batch_size=500
            ),
            retraining=RetrainSettings(updates=600, batch_size=64, learning_rate=0.01),
        ),
        Case(
            arguments=[*resnet, "--task.splits.heldout", options.heldout, "--threads", "1"],
            drops=(0.02,),
            settings=TryAndLearnSettings(
                evaluations=tries(70),
                learning_rate=0.02,
                fine_tune=3,
                layers=("layer1.1.conv1", "layer2.1.conv1", "layer3.1.conv1"),
            ),
            repair=replace(UNREPAIRED, calibration_images=128, reward_images=1000, recalibration_images=128),
            retraining=RetrainSettings(updates=120, batch_size=64, learning_rate=0.002, crop_padding=4, flip=True),
        ),
    ]


def run_case(case: Case) -> list[str]:
    """Return the part of the page on one network."""
    task = load_task(read_config(case.arguments), Progress())
    trimmer = Trimmer(task, case.repair)
    whole = trimmer.cost_model.full
    selection = trimmer.score_selection(task.network)
    finalists = [Finalist("original", "original", task.network, whole, None, (), selection)]
    learned = {}
    for drop in case.drops:
        began = time.process_time()
        settings = replace(case.settings, accepted_drop=drop)
        made = try_and_learn(trimmer, ALL_LAYERS, settings, retraining=case.retraining, seed=SEED)
        name = f"{100 * drop:g}"
        learned[name] = made
        finalists.append(finalist(trimmer, made, f"try_and_learn {name}", "try-and-learn"))
        for criterion, label in CONTROLS.items():
            other = as_many(trimmer, made, criterion, case)
            finalists.append(finalist(trimmer, other, f"{criterion} {name}", label))
        print(f"{task.name}, b = {name} points: {(time.process_time() - began) / 60:.1f} minutes", file=sys.stderr)
    read_test_split(trimmer, finalists)
    return report(trimmer, case, learned, finalists)


def as_many(trimmer: Trimmer, made: TryAndLearnResult, criterion: str, case: Case) -> Pruned:
    """Cut the same layers to the same widths with the same training, the filters chosen by a criterion."""
    other = trimmer.with_settings(replace(trimmer.settings, criterion=criterion))

    def rule(subject: Subject, place: int, last: bool) -> Decision:
        return Decision(other.plan(list(made[place].plan.counts.values()), subject))

    pace = Pace(len(made), made[0].provenance.retrain_updates, case.settings.final_share)
    return prune_in_rounds(other, rule, ALL_LAYERS, pace, method=criterion, retraining=case.retraining, seed=SEED)


def finalist(trimmer: Trimmer, made: Pruned, name: str, label: str) -> Finalist:
    """Score a finished network on the selection split."""
    selection = trimmer.score_selection(made.network)
    return Finalist(name, label, made.network, made.rounds[-1].cost, made.schedule, made.rounds, selection)


def report(
    trimmer: Trimmer, case: Case, learned: dict[str, TryAndLearnResult], finalists: Sequence[Finalist]
) -> list[str]:
    """Return tables: the networks, the layers, and the comparison with L1."""
    task, whole, settings = trimmer.task, trimmer.cost_model.full, case.settings
    original, layers = finalists[0], [layer.group for made in learned.values() for layer in made.layers]
    names = list(dict.fromkeys(layers))
    lines = [
        f"## {task.name}",
        "",
        f"{settings.evaluations} evaluations a layer, {settings.fine_tune} updates in each, "
        f"{case.retraining.updates} updates of retraining in all (batches of {case.retraining.batch_size}). Splits: "
        f"{len(task.train):,} train, {trimmer.settings.reward_images:,} of {len(task.reward):,} reward, "
        f"{len(task.selection):,} selection, {len(original.right if original.right is not None else ()):,} test "
        "(read once, at the end, for all networks). "
        f"Original: reward {100 * trimmer.baseline.accuracy:.2f} %, selection {100 * original.selection.accuracy:.2f} "
        f"%, test {100 * (original.test or 0.0):.2f} %.",
        "",
        f"| b, points | filters of | {' - '.join(names)} | parameters fewer | MACs fewer "
        "| after the last cut (reward), % | after retraining (selection), % | test, % |",
        "|--:|---|---|--:|--:|--:|--:|--:|",
    ]
    for entry in finalists[1:]:
        assert entry.schedule is not None
        widths = " - ".join(str(entry.schedule.plan.counts[name]) for name in names)
        lines.append(
            f"| {entry.name.split()[-1]} | {entry.label} | {widths} | {whole.params / entry.cost.params:.2f}× | "
            f"{whole.macs / entry.cost.macs:.2f}× | {100 * (entry.after_trim or 0.0):.2f} | "
            f"{100 * entry.selection.accuracy:.2f} | {100 * (entry.test or 0.0):.2f} |"
        )
    lines += [
        "",
        "What the policies tried:",
        "",
        "| b, points | layer | filters | kept | taken | best reward | reward, first quarter | reward, last quarter | "
        "accuracy of the choice (reward), % |",
        "|--:|---|--:|--:|---|--:|--:|--:|--:|",
    ]
    for name, made in learned.items():
        for layer in made.layers:
            quarter = max(1, len(layer.rewards) // 4)
            best = max(range(len(layer.rewards)), key=layer.rewards.__getitem__)
            lines.append(
                f"| {name} | {layer.group} | {layer.width} | {layer.kept} | {layer.chosen} | "
                f"{layer.rewards[best]:.3f} | {sum(layer.rewards[:quarter]) / quarter:.3f} | "
                f"{sum(layer.rewards[-quarter:]) / quarter:.3f} | {100 * layer.accuracies[best]:.2f} |"
            )
    lines += ["", "Beside the same widths:", ""]
    labels = {entry.name: f"{entry.label} (b = {entry.name.split()[-1]} points)" for entry in finalists}
    found = {entry.name: entry for entry in finalists}
    for name in learned:
        for criterion in CONTROLS:
            verdict = compare_pair(found[f"try_and_learn {name}"], found[f"{criterion} {name}"])
            lines.append(f"- {verdict_sentence(verdict, labels)}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
