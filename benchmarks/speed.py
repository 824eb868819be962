"""What cutting, measuring and repairing cost, each against something that does the same work, in one run.

    python benchmarks/speed.py --table docs/results/speed.md

- One plan (half of every group, by L1) applied, against `step()` of Torch-Pruning's pruner with L1 at ratio 0.5.
- `measure` with everything, against a plain forward and backward pass over the same batches.
- Least squares in all layers of ResNet-50, half of every group cut.
- Latency of cut networks beside their MACs.

One thread. Every pair is timed alternately, so that a ratio survives a machine that others use too.
"""

import argparse
import copy
import os
import shlex
import statistics as numbers
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torch_pruning
from prunegym.pruning import PruningPlan, apply_plan, build_network, compensate, count_cost, find_groups, measure
from prunegym.pruning.latency import measure_latency
from prunegym.pruning.statistics import weight_norms
from torch import Tensor, nn

APPLIED = ("vgg16", "alexnet", "densenet121", "resnet50")
MEASURED = (("cifar_resnet20", 32, 128, 4), ("vgg16", 224, 16, 1))  # network, side, batch, batches
TIMED = (("cifar_resnet20", 32), ("resnet18", 224), ("vgg16", 224), ("mobilenet_v2", 224))
BATCHES = (1, 64)


def main() -> int:
    """Run all parts, print and perhaps write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="of every timing; the median counts")
    parser.add_argument("--table", help="Markdown file to write")
    options = parser.parse_args()
    torch.set_num_threads(1)
    parts = [applied(options.repeats), measured(options.repeats), repaired(options.repeats), latencies()]
    versions = f"torch {torch.__version__}, torch-pruning {version('torch-pruning')}"
    command = shlex.join(["python", "benchmarks/speed.py", *sys.argv[1:]])
    heading = ["# Speed", "", f"One thread, {versions}; medians of {options.repeats}, random weights.", ""]
    page = "\n".join([*heading, *("\n".join(part) + "\n" for part in parts), f"Command: `{command}`", ""])
    print(page)
    if options.table:
        Path(options.table).write_text(page)
    return 0


def applied(repeats: int) -> list[str]:
    """Cut half of every group, against Torch-Pruning."""
    lines = [
        "## One plan applied, half of every group",
        "",
        "Torch-Pruning's `step()` ranks by L1 and cuts; so does the second column. The graph (Torch-Pruning) and the "
        "groups (here) are built beforehand; once for all plans here, once for each `step()` there.",
        "",
        "| network | apply a plan, s | rank by L1 and apply, s | Torch-Pruning `step()`, s | ratio to apply "
        "| ratio to rank and apply | find groups, s | build graph, s |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name in APPLIED:
        network, example = build(name, 224)
        groups, finding = timed(lambda: find_groups(network, example))  # noqa: B023  (called at once)
        ours, ranked, theirs, building = [], [], [], []
        for _ in range(repeats):
            plan, ranking = timed(lambda: by_l1(network, groups))  # noqa: B023
            _, seconds = timed(lambda: apply_plan(network, groups, plan))  # noqa: B023
            pruner, built = timed(lambda: torch_pruner(copy.deepcopy(network), example))  # noqa: B023
            _, stepping = timed(pruner.step)
            ours.append(seconds)
            ranked.append(ranking + seconds)
            theirs.append(stepping)
            building.append(built)
        fast, both, slow = numbers.median(ours), numbers.median(ranked), numbers.median(theirs)
        lines.append(
            f"| {name} | {fast:.3f} | {both:.3f} | {slow:.3f} | {slow / fast:.1f}× | {slow / both:.1f}× | "
            f"{finding:.2f} | {numbers.median(building):.2f} |"
        )
    return lines


def measured(repeats: int) -> list[str]:
    """Gather every statistic, against a plain forward and backward pass."""
    lines = [
        "## Everything measured in one pass",
        "",
        "APoZ, mean activation, Taylor 2017 and 2019, weight norms and second moments, against forward + backward of "
        "the same batches.",
        "",
        "| network | images | forward + backward, s | measure, s | ratio |",
        "|---|--:|--:|--:|--:|",
    ]
    for name, side, batch, batches in MEASURED:
        network, example = build(name, side)
        groups = find_groups(network, example)
        generator = torch.Generator().manual_seed(0)
        data = [
            (torch.randn(batch, 3, side, side, generator=generator), torch.arange(batch) % 10) for _ in range(batches)
        ]
        plain(network, data[:1])
        measure(network, groups, data[:1])
        pairs = [
            (timed(lambda: plain(network, data))[1], timed(lambda: measure(network, groups, data))[1])  # noqa: B023
            for _ in range(repeats)
        ]
        slow, ours = (numbers.median(column) for column in zip(*pairs, strict=True))
        lines.append(f"| {name} | {batch * batches} | {slow:.2f} | {ours:.2f} | {ours / slow:.2f}× |")
    return lines


def repaired(repeats: int) -> list[str]:
    """Solve least squares in every layer of ResNet-50 that lost inputs."""
    network, example = build("resnet50", 224)
    groups = find_groups(network, example)
    inputs = torch.randn(32, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    known = measure(network, groups, [(part, torch.zeros(len(part), dtype=torch.int64)) for part in inputs.split(16)])
    plan = by_l1(network, groups)
    seconds = []
    for _ in range(repeats):
        smaller = apply_plan(network, groups, plan)
        seconds.append(timed(lambda: compensate(smaller, network, groups, plan, known, "least_squares"))[1])  # noqa: B023
    readers = len({consumer.module for group in groups for consumer in group.consumers})
    return [
        "## Least squares",
        "",
        f"ResNet-50, half of every group cut, {readers} layers solved once the moments are there: "
        f"{numbers.median(seconds):.2f} s.",
    ]


def latencies() -> list[str]:
    """Time cut networks, beside their MACs."""
    lines = [
        "## Latency, measured",
        "",
        "Half of every group cut; median of warm forward passes (at least 5, for at least half a second), one thread.",
        "",
        "| network | MACs | batch | original, ms | cut, ms | MACs fewer | faster |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, side in TIMED:
        network, example = build(name, side)
        groups = find_groups(network, example)
        smaller = apply_plan(network, groups, by_l1(network, groups))
        before, after = count_cost(network, example).macs, count_cost(smaller, example).macs
        for batch in BATCHES:
            slow, fast = (measure_latency(each, example, batch).median_ms for each in (network, smaller))
            lines.append(
                f"| {name} | {before / 1e6:,.0f} M | {batch} | {slow:,.1f} | {fast:,.1f} | {before / after:.2f}× | "
                f"{slow / fast:.2f}× |"
            )
    return lines


def build(name: str, side: int) -> tuple[nn.Module, Tensor]:
    """Return a network with random weights, and one input."""
    network = build_network(name, classes=10 if name.startswith("cifar") else 1000, seed=0).eval()
    return network, torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))


def by_l1(network: nn.Module, groups: Any) -> PruningPlan:
    """Keep the half of every group with the largest L1 norms."""
    norms = weight_norms(network, groups)
    return PruningPlan({g.name: np.argsort(-norms[g.name][0])[: max(1, g.width // 2)].tolist() for g in groups})


def torch_pruner(network: nn.Module, example: Tensor) -> Any:
    """Return Torch-Pruning's pruner with the same task: half of everything but the output layer, by L1."""
    last = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
    return torch_pruning.pruner.MagnitudePruner(
        network,
        example,
        importance=torch_pruning.importance.MagnitudeImportance(p=1),
        pruning_ratio=0.5,
        ignored_layers=[last],
    )


def plain(network: nn.Module, data: list[tuple[Tensor, Tensor]]) -> None:
    """Run forward and backward."""
    for inputs, labels in data:
        F.cross_entropy(network(inputs), labels).backward()
    network.zero_grad()


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """Return the result and the seconds it took."""
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
