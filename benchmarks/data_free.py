r"""Neurons of one linear layer removed without retraining: data-free pruning against its rivals (Srinivas & Babu 2015).

    python benchmarks/data_free.py configs/lenet_mnist.yaml --table docs/results/data_free.md --data_root DATA \
        --threads 1

Test error and scaled saliency against the number of neurons removed, beside a figure of both. All networks are built
first; then the test split is opened once and all are scored on it. What had to be chosen was chosen on the selection
split.
"""

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from prunegym.agent.configuration import read_config
from prunegym.agent.loading import load_task
from prunegym.agent.progress import Progress
from prunegym.pruning import ChannelGroup, PruningPlan, PruningTask, apply_plan, compensate, find_groups
from prunegym.pruning.copying import copy_network
from prunegym.pruning.data import Split
from prunegym.pruning.data_free import data_free_substitutions
from prunegym.pruning.saliency import NOBODY, MergeSequence, cut_off, merge_problem, merge_sequence, serves_published
from prunegym.pruning.second_order import brain_damage, brain_surgeon, outgoing_fisher
from prunegym.pruning.statistics import weight_norms
from prunegym.pruning.tracing import evaluation_mode, hooked
from torch import Tensor, nn

DAMPINGS = (1e-4, 1e-3, 1e-2, 1e-1)
RANDOM_DRAWS = 3
STEP = 10
DATA_FREE, WEIGHTS_ONLY = "data-free", "data-free, weights only"
NO_SURGERY, WEIGHTS_NO_SURGERY = "data-free, no surgery", "weights only, no surgery"
STYLES = {
    DATA_FREE: ("#2f6db3", "-"),
    NO_SURGERY: ("#2f6db3", ":"),
    WEIGHTS_ONLY: ("#3a8f5c", "-"),
    WEIGHTS_NO_SURGERY: ("#3a8f5c", ":"),
    "magnitude": ("#d1762a", "-"),
    "random": ("#8a8f98", "-"),
    "OBD": ("#a04a8a", "-"),
    "OBS": ("#222222", "-"),
}


@dataclass(eq=False)
class Line:
    """One method: its networks by number of neurons removed, several where it draws, and what they score."""

    networks: dict[int, list[Any]]
    note: str = ""
    error: dict[str, dict[int, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Found:
    """All that the page shows.

    Attributes:
        lines: By name.
        merges: Of the two data-free methods with surgery.
        safe: Their automatic cut-offs.
        seconds: By what took them.
        tried: OBS by damping, scored on the selection split.
        most: Neurons removed in the second half of the table.
        splits: Names of the selection and the test split.
    """

    lines: dict[str, Line]
    merges: dict[str, MergeSequence]
    safe: dict[str, int]
    seconds: dict[str, float]
    tried: dict[str, Line]
    most: int
    splits: tuple[str, str]

    def test_error(self, name: str, count: int) -> float:
        """Return a method's error on the test split, in percent."""
        return self.lines[name].error[self.splits[1]][count]


class Bench:
    """One task and one layer of its network: builds networks, and scores them from what the layer reads.

    Args:
        task: The task.
        layer: A linear layer with a ReLU behind whose only reader gives the network's output.
        images: Training images for the curvature.
    """

    def __init__(self, task: PruningTask, layer: str, images: int) -> None:
        self.task, self.network = task, task.network
        self.groups = [group for group in find_groups(task.network, task.example) if group.name == layer]
        if not self.groups or not serves_published(self.network, self.group) or len(self.group.consumers) != 1:
            raise SystemExit(f"{layer!r} must be a linear layer with a ReLU behind that one linear layer reads")
        self.reader = self.group.consumers[0].module
        self.counts = list(range(0, self.group.width - 5, STEP))
        self.train = task.train.subset(images, torch.Generator().manual_seed(0))
        self.whole = sum(parameter.numel() for parameter in self.network.parameters())
        image = self.task.example
        read = self.read([(image, torch.zeros(1, dtype=torch.int64))])[0]
        with evaluation_mode(self.network), torch.no_grad():
            torch.testing.assert_close(self.head(self.network, read), self.network(image))

    @property
    def group(self) -> ChannelGroup:
        """The group of the layer's neurons."""
        return self.groups[0]

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """Return the training images for the curvature."""
        return [(batch.images, batch.labels) for batch in self.train.batches(500)]

    def read(self, batches: Any) -> tuple[Tensor, Tensor]:
        """Return what the layer reads, (N, inputs), and the labels (N,); all in front of it stays as it is."""
        rows: list[Tensor] = []
        layer = self.network.get_submodule(self.group.name)
        handle = layer.register_forward_pre_hook(lambda _m, inputs: rows.append(inputs[0]))
        labels = []
        with hooked([handle]), evaluation_mode(self.network), torch.no_grad():
            for images, own in batches:
                self.network(images)
                labels.append(own)
        return torch.cat(rows), torch.cat(labels)

    def head(self, network: Any, read: Tensor) -> Tensor:
        """Return the logits (N, classes) from what the layer reads."""
        return network.get_submodule(self.reader)(torch.relu(network.get_submodule(self.group.name)(read)))

    def score(self, lines: dict[str, Line], split: Split) -> None:
        """Add the error in percent of every network that has none for this split."""
        read, labels = self.read((batch.images, batch.labels) for batch in split.batches(500))
        with torch.no_grad():
            for line in lines.values():
                line.error[split.name] = {
                    count: float(np.mean([self.error(network, read, labels) for network in networks]))
                    for count, networks in line.networks.items()
                }

    def error(self, network: Any, read: Tensor, labels: Tensor) -> float:
        """Return the share of wrong answers in percent."""
        return 100 * float((self.head(network, read).argmax(1) != labels).double().mean())

    def plan(self, removed: Sequence[int]) -> PruningPlan:
        """Keep all neurons but these."""
        return PruningPlan({self.group.name: np.setdiff1d(np.arange(self.group.width), removed).tolist()})

    def cut(self, order: Sequence[int], repair: Callable[[Any, PruningPlan], None] | None = None) -> dict[int, Any]:
        """Remove the first n of `order` for every n, and repair each."""
        found = {}
        for count in self.counts:
            plan = self.plan(order[:count])
            smaller = apply_plan(self.network, self.groups, plan)
            if repair is not None and count:
                repair(smaller, plan)
            found[count] = [smaller.eval()]
        return found

    def published(self, smaller: Any, plan: PruningPlan) -> None:
        """Merge as published."""
        compensate(smaller, self.network, self.groups, plan, None, "data_free")

    def weights_only(self, smaller: Any, plan: PruningPlan) -> None:
        """Merge in the order that biases do not influence."""
        (item,) = data_free_substitutions(self.network, self.groups, plan, bias=False)[self.reader]
        outgoing = self.network.get_submodule(self.reader).weight.detach()
        place = torch.from_numpy(np.searchsorted(np.asarray(plan[self.group.name]), item.source))
        gained = outgoing[:, torch.from_numpy(item.feature)] * torch.from_numpy(item.ratio).to(outgoing)
        with torch.no_grad():
            smaller.get_submodule(self.reader).weight.index_add_(1, place, gained)

    def surgeon(self, fisher: Tensor, damping: float) -> Line:
        """Let optimal brain surgeon remove neurons."""
        reader: Any = self.network.get_submodule(self.reader)
        found: dict[int, Any] = {0: [copy_network(self.network).eval()]}
        removed: list[int] = []
        for step in brain_surgeon(reader.weight.T, fisher, steps=self.counts[-1], damping=damping):
            removed.append(step.neuron)
            if len(removed) in self.counts:
                plan = self.plan(removed)
                smaller: Any = apply_plan(self.network, self.groups, plan)
                with torch.no_grad():
                    smaller.get_submodule(self.reader).weight.copy_(step.weight[list(plan[self.group.name])].T)
                found[len(removed)] = [smaller.eval()]
        return Line(found, f"{damping:g}")

    def fewer(self, network: nn.Module) -> float:
        """Return the share of all parameters that left, in percent."""
        return 100 * (1 - sum(parameter.numel() for parameter in network.parameters()) / self.whole)


def main() -> int:
    """Build all networks, score them, print and perhaps write the page and its figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--table", help="Markdown file to write; the figure goes beside it as PNG")
    parser.add_argument("--layer", default="fc1")
    parser.add_argument("--images", type=int, default=5000, help="training images for the curvature")
    parser.add_argument("--removed", type=int, default=450, help="neurons removed in the second half of the table")
    options, rest = parser.parse_known_args()
    config = read_config([options.config, *rest])
    bench = Bench(load_task(config, Progress()), options.layer, options.images)
    task, group, network = bench.task, bench.group, bench.network

    seconds: dict[str, float] = {}
    started = time.perf_counter()
    merges = {DATA_FREE: merge_sequence(merge_problem(network, group))}
    seconds["data-free"] = time.perf_counter() - started
    merges[WEIGHTS_ONLY] = merge_sequence(merge_problem(network, group, bias=False))
    safe = {name: cut_off(sequence.saliency) for name, sequence in merges.items()}
    bench.counts = sorted({*bench.counts, *safe.values(), options.removed})
    smallest_first = np.argsort(weight_norms(network, [group])[group.name][1], kind="stable")
    draws = [bench.cut(np.random.default_rng(seed).permutation(group.width)) for seed in range(RANDOM_DRAWS)]
    lines = {
        DATA_FREE: Line(bench.cut(merges[DATA_FREE].removed, bench.published)),
        NO_SURGERY: Line(bench.cut(merges[DATA_FREE].removed)),
        WEIGHTS_ONLY: Line(bench.cut(merges[WEIGHTS_ONLY].removed, bench.weights_only)),
        WEIGHTS_NO_SURGERY: Line(bench.cut(merges[WEIGHTS_ONLY].removed)),
        "magnitude": Line(bench.cut(smallest_first)),
        "random": Line({count: [draw[count][0] for draw in draws] for count in bench.counts}),
    }
    started = time.perf_counter()
    lines["OBD"] = Line(bench.cut(np.argsort(brain_damage(network, group, bench.batches()), kind="stable")))
    seconds["OBD"] = time.perf_counter() - started
    started = time.perf_counter()
    fisher = outgoing_fisher(network, bench.reader, bench.batches())
    seconds["Fisher matrix"] = time.perf_counter() - started
    tried: dict[str, Line] = {}
    for damping in DAMPINGS:
        started = time.perf_counter()
        tried[f"{damping:g}"] = bench.surgeon(fisher, damping)
        seconds["removals"] = time.perf_counter() - started
    bench.score(tried, task.selection)
    lines["OBS"] = min(tried.values(), key=lambda line: line.error[task.selection.name][options.removed])

    bench.score(lines, task.selection)
    test = task.test.open("the figure of data-free pruning")
    bench.score(lines, test)
    found = Found(lines, merges, safe, seconds, tried, options.removed, (task.selection.name, test.name))
    command = shlex.join(["python", "benchmarks/data_free.py", *sys.argv[1:]])
    text = "\n".join([*tables(bench, found), *words(bench, found), *times(bench, found), f"Command: `{command}`", ""])
    print(text)
    if options.table:
        Path(options.table).write_text(text)
        draw(found, Path(options.table).with_suffix(".png"))
    return 0


def tables(bench: Bench, found: Found) -> list[str]:
    """Return the heading and a table for the cut-off and one for the most neurons."""
    base = [found.lines[DATA_FREE].error[split][0] for split in found.splits]
    text = [
        "# Data-free pruning against its rivals",
        "",
        f"{bench.task.name}: neurons of `{bench.group.name}` ({bench.group.width}) leave, nothing is retrained. Error "
        f"of the whole network: {base[0]:.2f} % on {len(bench.task.selection):,} selection images, {base[1]:.2f} % on "
        f"{len(bench.task.test):,} test images. The test split was opened once, after all networks had been built.",
        "",
        "![error against neurons removed](data_free.png)",
        "",
    ]
    cut = found.safe[DATA_FREE]
    for title, count in (("At the automatic cut-off", cut), ("Far beyond", found.most)):
        fewer = bench.fewer(found.lines[DATA_FREE].networks[count][0])
        text += [
            f"## {title}: {count} of {bench.group.width} neurons, {fewer:.1f} % of all parameters fewer",
            "",
            "| method | needs data | selection error, % | test error, % | test, beside the whole network, points |",
            "|---|---|--:|--:|--:|",
        ]
        for name, line in found.lines.items():
            data = "labelled" if name in ("OBD", "OBS") else "no"
            errors = [line.error[split][count] for split in found.splits]
            text.append(f"| {name} | {data} | {errors[0]:.2f} | {errors[1]:.2f} | {errors[1] - base[1]:+.2f} |")
        if count == found.most:
            text.append("| published (Srinivas & Babu 2015), up to 85 % fewer | no | – | – | little loss |")
        text.append("")
    return text


def words(bench: Bench, found: Found) -> list[str]:
    """Return what the names mean, and how the figures differ from the published ones."""
    most, own = found.most, found.safe[WEIGHTS_ONLY]
    error = {name: f"{found.test_error(name, most):.2f} %" for name in found.lines}
    layer: Any = bench.network.get_submodule(bench.group.name)
    weight, bias = layer.weight.detach(), layer.bias.detach()
    ratio = float((bias.abs() / weight.norm(dim=1)).median())
    unit = torch.nn.functional.normalize(weight, dim=1)
    alike = {}
    for name, merges in found.merges.items():
        gone, into = (torch.from_numpy(part[:most]) for part in (merges.removed, merges.kept_into))
        alike[name] = float((unit[gone] * unit[into])[into != NOBODY].sum(1).median())
    dampings = ", ".join(f"{name} ({line.error[found.splits[0]][most]:.2f} %)" for name, line in found.tried.items())
    return [
        "## What is what",
        "",
        f"- *{DATA_FREE}*: criterion and compensation `data_free`, whose distance counts biases. *{WEIGHTS_ONLY}*: the "
        f"same with `bias=False`, the distance of incoming weights alone; its own cut-off is {own} neurons "
        f"({found.test_error(WEIGHTS_ONLY, own):.2f} % test error). *no surgery*: the same neurons leave, none merges.",
        f"- *magnitude*: smallest ‖w‖ of incoming weights first. *random*: mean of {RANDOM_DRAWS} draws.",
        "- *OBD*: ½ Σ F w² over incoming and outgoing weights, ranked once. *OBS*: a neuron's outgoing weights as a "
        f"block, the others corrected; of the dampings {dampings} the one with the lowest selection error at {most} "
        f"neurons, {found.lines['OBS'].note}. Both saw {len(bench.train):,} training images.",
        "- Cut-off: as many neurons as merges have a saliency of at most the mode of the histogram of log s, taken up "
        "to the 95th percentile. No example is read for it.",
        "- Scaled saliency: divided by the largest up to the 95th percentile.",
        "",
        "## Beside the published figures",
        "",
        f"- *Up to 85 % of the parameters with little loss*: {error[WEIGHTS_ONLY]} test error by the weights alone, "
        f"{error[DATA_FREE]} by the distance that counts biases (known to us second hand). Here the median of "
        f"|b| / ‖w‖ is {ratio:.3f}; the ratio |b̂_i − b̂_j| / |b̂_i + b̂_j| of such small numbers weighs as much as the "
        f"weights, so that less similar neurons merge: the median cosine of the pairs is {alike[DATA_FREE]:.2f}, by "
        f"the weights alone {alike[WEIGHTS_ONLY]:.2f}.",
        f"- *Without the surgery the method breaks down*: at {most} neurons {error[WEIGHTS_NO_SURGERY]} without and "
        f"{error[WEIGHTS_ONLY]} with it by the weights alone, {error[NO_SURGERY]} and {error[DATA_FREE]} with biases, "
        "for the same reason.",
        f"- *More weights than OBD and OBS at equal error*: OBD {error['OBD']}, OBS {error['OBS']}; this OBS removes "
        "neurons, not single weights, with the whole Fisher matrix of a layer's outgoing weights, and reads labels.",
        "- The network is not theirs: a ReLU follows every layer, it was trained here, and this is one network of one "
        "seed.",
        "",
    ]


def times(bench: Bench, found: Found) -> list[str]:
    """Return the table of seconds."""
    seconds, threads = found.seconds, torch.get_num_threads()
    surgeon = seconds["Fisher matrix"] + seconds["removals"]
    return [
        f"## Time, {threads} thread{'s' if threads > 1 else ''}",
        "",
        "| method | seconds |",
        "|---|--:|",
        f"| data-free: matrix and {bench.group.width - 1} merges | {seconds['data-free']:.2f} |",
        f"| OBD: diagonal of the Fisher matrix, and the cuts | {seconds['OBD']:.1f} |",
        f"| OBS: Fisher matrix {seconds['Fisher matrix']:.1f}; inverse, {bench.counts[-1]} removals and the cuts "
        f"{seconds['removals']:.1f} | {surgeon:.1f} ({surgeon / seconds['data-free']:,.0f} times data-free) |",
        "",
    ]


def draw(found: Found, path: Path) -> None:
    """Write the figure: all methods' errors, and the data-free ones with their scaled saliency."""
    split = found.splits[1]
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for name, line in found.lines.items():
        colour, style = STYLES[name]
        counts = sorted(line.error[split])
        left.plot(counts, [line.error[split][c] for c in counts], style, color=colour, label=name, linewidth=1.6)
    left.set(xlabel="neurons removed", ylabel="test error, %", yscale="log", title="Error without retraining")
    left.set_yticks([1, 2, 5, 10, 20, 50, 90], ["1", "2", "5", "10", "20", "50", "90"])
    left.minorticks_off()
    left.legend(frameon=False, fontsize=8)
    scaled = right.twinx()
    for name, merges in found.merges.items():
        colour, _ = STYLES[name]
        errors = found.lines[name].error[split]
        right.plot(sorted(errors), [errors[c] for c in sorted(errors)], color=colour, label=f"{name}: error")
        right.axvline(found.safe[name], color=colour, linestyle="--", linewidth=1, label=f"cut-off {found.safe[name]}")
        top = np.percentile(merges.saliency, 95)
        share = merges.saliency / merges.saliency[merges.saliency <= top].max()
        scaled.plot(np.arange(1, len(share) + 1), share, ".", color=colour, markersize=3, alpha=0.4)
    right.set(xlabel="neurons removed", ylabel="test error, %", ylim=(0, 20), title="Data-free: error and saliency")
    scaled.set(ylabel="scaled saliency (dots)", ylim=(0, 1))
    right.legend(frameon=False, fontsize=8, loc="upper left")
    for axis in (left, right, scaled):
        axis.spines["top"].set_visible(False)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    sys.exit(main())
