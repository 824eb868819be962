"""What each repair saves without training, and whether least squares keeps its promise.

    python benchmarks/repair.py configs/resnet20_cifar10.yaml --table docs/results/repair.md --data_root DATA \
        --task.weights WEIGHTS --task.splits.heldout UNSEEN

- Accuracy on the reward split after a uniform cut, by criterion and compensation, before and after recalibration.
- Group by group: the change of every reader's output on the calibration images when only that group is cut, by
  compensation. Least squares is meant never to be the worse one.
- A cut and repaired network, saved, loaded again and scored.
"""

import argparse
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from prunegym.agent.configuration import read_config
from prunegym.agent.loading import load_task
from prunegym.agent.progress import Progress
from prunegym.pruning import COMPENSATIONS, PruningPlan, RepairSettings, Trimmer, apply_plan, compensate
from prunegym.pruning.artifact import load_pruned, save_pruned
from prunegym.pruning.groups import Consumer
from prunegym.pruning.tracing import evaluation_mode, hooked

CRITERIA = ("apoz", "l1", "taylor_2017", "least_squares")
KEEPS = (0.75, 0.5)


def main() -> int:
    """Run all parts, print and perhaps write the page; exit code 1 if a reloaded network differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--table", help="Markdown file to write")
    options, rest = parser.parse_known_args()
    config = read_config([options.config, *rest])
    trimmer = Trimmer(load_task(config, Progress()), RepairSettings())
    task = trimmer.task
    heading = [
        "# Repair without training",
        "",
        f"{task.name}, accuracy of the original on {len(task.reward):,} reward images "
        f"{100 * trimmer.baseline.accuracy:.2f} %. Moments and recalibration: 512 training images; seed 0. Nothing is "
        "retrained, the test split is not touched.",
        "",
    ]
    reloaded, same = saved(trimmer)
    parts = [accuracies(trimmer), promises(trimmer), reloaded]
    command = shlex.join(["python", "benchmarks/repair.py", *sys.argv[1:]])
    page = "\n".join([*heading, *("\n".join(part) + "\n" for part in parts), f"Command: `{command}`", ""])
    print(page)
    if options.table:
        Path(options.table).write_text(page)
    return 0 if same else 1


def accuracies(trimmer: Trimmer) -> list[str]:
    """Cut uniformly; score with and without recalibration."""
    lines = [
        "## Accuracy after a uniform cut, %",
        "",
        "Each cell: without / with recalibrated batch norm.",
        "",
        "| channels kept | criterion | " + " | ".join(COMPENSATIONS) + " |",
        "|--:|---|" + "--:|" * len(COMPENSATIONS),
    ]
    for keep in KEEPS:
        for criterion in CRITERIA:
            cells = []
            for name in COMPENSATIONS:
                pair = []
                for images in (0, 512):
                    settings = RepairSettings(criterion=criterion, compensation=name, recalibration_images=images)
                    other = trimmer.with_settings(settings)
                    other.pristine = other.examine(trimmer.task.network, trimmer.groups, trimmer.pristine.plan)
                    counts = [max(1, round(keep * group.width)) for group in trimmer.groups]
                    pair.append(100 * other.trim(other.plan(counts)).score.accuracy)
                cells.append(f"{pair[0]:.1f} / {pair[1]:.1f}")
            lines.append(f"| {keep:.0%} | {criterion} | " + " | ".join(cells) + " |")
    return lines


def promises(trimmer: Trimmer) -> list[str]:
    """Cut one group at a time to half, at random, and compare what the layers that read it put out."""
    network, groups = trimmer.task.network, trimmer.groups
    read = inputs_of(trimmer, network, [consumer.module for group in groups for consumer in group.consumers])
    errors: dict[str, list[float]] = {name: [] for name in COMPENSATIONS}
    for group in groups:
        chosen = np.random.default_rng(0).permutation(group.width)[: max(1, group.width // 2)]
        plan = PruningPlan({group.name: chosen.tolist()})
        for name in COMPENSATIONS:
            smaller = apply_plan(network, groups, plan)
            compensate(smaller, network, groups, plan, trimmer.pristine.statistics, name)
            for consumer in group.consumers:
                gone = consumer.index[group.leaving(plan[group.name])[consumer.channel]]
                errors[name].append(change(network, smaller, consumer, gone, read[consumer.module]))
    least = np.array(errors["least_squares"])
    lines = [
        "## Change of the readers' outputs, one group cut to a random half at a time",
        "",
        "Squared change over the variance of the output (behind the batch norm, if one follows), on all positions of "
        "the calibration images; the moments saw 16 positions of each image.",
        "",
        "| compensation | median | worst | least squares is at least as good in |",
        "|---|--:|--:|--:|",
    ]
    for name, values in errors.items():
        better = int((least <= np.array(values) * (1 + 1e-9)).sum())
        lines.append(f"| {name} | {np.median(values):.3f} | {max(values):.3f} | {better} of {len(values)} layers |")
    return lines


def change(network: Any, smaller: Any, consumer: Consumer, gone: np.ndarray, read: torch.Tensor) -> float:
    """Return the squared change of one layer's output, given what it reads in the original, over its variance."""
    dim = -1 if isinstance(network.get_submodule(consumer.module), torch.nn.Linear) else 1
    kept = torch.from_numpy(np.setdiff1d(np.arange(read.shape[dim]), gone))
    found = []
    with evaluation_mode(network), evaluation_mode(smaller), torch.no_grad():
        for model, value in ((network, read), (smaller, read.index_select(dim, kept))):
            output = model.get_submodule(consumer.module)(value)
            found.append((model.get_submodule(consumer.norm)(output) if consumer.norm else output).double())
    rows = found[0].movedim(dim, -1).flatten(0, -2)
    return float((found[0] - found[1]).square().sum() / (rows - rows.mean(0)).square().sum())


def inputs_of(trimmer: Trimmer, network: Any, layers: list[str]) -> dict[str, torch.Tensor]:
    """Return what layers read on the calibration images."""
    found: dict[str, list[torch.Tensor]] = {layer: [] for layer in layers}
    handles = [
        network.get_submodule(layer).register_forward_pre_hook(
            lambda _m, inputs, layer=layer: found[layer].append(inputs[0].clone())
        )
        for layer in found
    ]
    with hooked(handles), evaluation_mode(network), torch.no_grad():
        for batch in trimmer.calibration.batches(256):
            network(batch.images)
    return {layer: torch.cat(parts) for layer, parts in found.items()}


def saved(trimmer: Trimmer) -> tuple[list[str], bool]:
    """Save a cut and repaired network, load it again and score both."""
    task = trimmer.task
    trimmed = trimmer.trim(trimmer.plan([max(1, group.width // 2) for group in trimmer.groups]), verify=True)
    with tempfile.TemporaryDirectory() as folder:
        shape = tuple(task.example.shape)
        save_pruned(folder, trimmed.network, trimmed.plan, example_shape=shape, source=task.source)
        loaded = load_pruned(folder)
    same = all(
        torch.equal(trimmed.network(batch.images), loaded(batch.images)) for batch in trimmer.reward.batches(256)
    )
    first, second = trimmer.score(trimmed.network), trimmer.score(loaded)
    return [
        "## Saved and loaded again",
        "",
        "Half of every group cut (equal to the masked network to 1e-5), repaired, saved, loaded from the folder alone: "
        f"outputs on {len(trimmer.reward):,} images {'identical bit for bit' if same else 'DIFFERENT'}, accuracy "
        f"{100 * first.accuracy:.2f} % and {100 * second.accuracy:.2f} %.",
    ], same and first == second


if __name__ == "__main__":
    sys.exit(main())
