"""Episodes per minute with one worker and with two, what an episode's time goes into, and what a GPU would take.

    python benchmarks/throughput.py --table docs/results/throughput.md \
        "configs/lenet_mnist.yaml --data_root DATA --task.training.updates 1" \
        "configs/resnet20_cifar10.yaml --data_root DATA/cifar10 --task.weights WEIGHTS --task.splits.heldout UNSEEN" \
        "configs/resnet20_cifar10.yaml --data_root DATA/cifar10 --task.network cifar_resnet56 --task.training.updates 1"

Each argument is a configuration with its options, in quotes. A network trained by one update will do: the time of an
episode depends on its widths and images, not on its accuracy. No score is taken from a store. Nothing else should run
on the machine; each process uses one thread.
"""

import argparse
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from prunegym.agent.configuration import read_config
from prunegym.agent.history import History, SearchCallback
from prunegym.agent.learning import make_way, planned_budgets
from prunegym.agent.loading import load_task
from prunegym.agent.planner import Planner
from prunegym.agent.progress import Progress
from prunegym.agent.resume import Standing
from prunegym.agent.settings import SearchConfig
from prunegym.agent.workers import make_environments
from prunegym.envs import TrimEnv
from prunegym.pruning import Trimmer, build_network, count_cost
from prunegym.pruning import trimmer as trimmer_module

WORKERS = (1, 2)
FORWARD = ("batch norm recalibrated", "scored")
PARTS: tuple[tuple[str, Any, str], ...] = (
    (FORWARD[0], Trimmer, "recalibrate"),
    (FORWARD[1], Trimmer, "score"),
    ("cut", trimmer_module, "apply_plan"),
    ("compensated", trimmer_module, "compensate"),
    ("cost counted", Trimmer, "cost_of"),
    ("channels chosen", Trimmer, "plan"),
    ("observed", TrimEnv, "_observe"),
    ("rest of the environment: widths, reward", TrimEnv, "step"),
    ("practice on imagined episodes", Planner, "learn_from"),
    ("plans proposed", Planner, "propose"),
)
"""What an episode consists of: label, and the function whose time it is, less that of the others it calls."""
POLICY = "rest of the search"
IMAGENET = 224  # pixels


@dataclass(frozen=True)
class Measured:
    """One configuration on this machine.

    Attributes:
        title: Network and data.
        macs: Of the original, one image.
        images: That an episode's forward passes read: recalibration, then scoring.
        groups: Decisions of an episode.
        start_s: Workers -> seconds until the first episode can begin, with tracing and measuring.
        rates: Workers -> episodes per minute, one for each repeat.
        profile: Part of an episode -> its seconds, mean over the episodes played with one worker.
    """

    title: str
    macs: int
    images: tuple[int, int]
    groups: int
    start_s: dict[int, float]
    rates: dict[int, list[float]]
    profile: dict[str, float]


def main() -> int:
    """Measure every configuration, print and perhaps write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="*", help="a configuration with its options, in quotes")
    parser.add_argument("--episodes", type=int, default=40, help="of each repeat")
    parser.add_argument("--repeats", type=int, default=3, help="of each number of workers; the median counts")
    parser.add_argument(
        "--gpu_rate",
        default="1e13",
        help="MACs a second that a GPU does in forward passes; 'measure' = of this machine's",
    )
    parser.add_argument("--gpu_images", type=int, nargs=2, default=(512, 5000), help="recalibration, scoring")
    parser.add_argument("--gpu_kept", type=float, default=0.5, help="share of the MACs that a plan keeps")
    parser.add_argument("--table", help="Markdown file to write")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = [measured(shlex.split(given), options.episodes, options.repeats) for given in options.configs]
    command = shlex.join(["python", "benchmarks/throughput.py", *sys.argv[1:]])
    page = "\n".join(
        [
            *heading(found, options.episodes, options.repeats),
            *(profiles(found) if found else ()),
            *gpu(options.gpu_rate, options.gpu_images, options.gpu_kept),
            f"Command: `{command}`",
            "",
        ]
    )
    print(page)
    if options.table:
        Path(options.table).write_text(page)
    return 0


# ---- measuring -------------------------------------------------------------------------------------------------------
def measured(arguments: list[str], episodes: int, repeats: int) -> Measured:
    """Play `repeats` times `episodes` episodes with each number of workers, learning as a search does."""
    config = read_config([*arguments, "--threads", "1"])
    task = load_task(config, Progress())
    start_s: dict[int, float] = {}
    rates: dict[int, list[float]] = {}
    seconds: dict[str, float] = {}
    played = 0
    for workers in WORKERS:
        trimmer = Trimmer(task, config.search.trim.repair, config.search.trim.groups)
        began = time.perf_counter()
        environments = make_environments(task, config.search.trim, trimmer, workers=workers, seed=0)
        try:
            warm_up(environments, len(trimmer.groups) * config.search.trim.rounds)
            start_s[workers] = time.perf_counter() - began
            for _ in range(repeats):
                with timed_parts() as parts:
                    done, wall_s = play(config, trimmer, environments, episodes)
                rates.setdefault(workers, []).append(60 * done / wall_s)
                if workers == 1:
                    played += done
                    parts[POLICY] = wall_s - sum(parts.values())
                    seconds = {label: seconds.get(label, 0.0) + spent for label, spent in parts.items()}
        finally:
            environments.close()
    pristine, trim = trimmer.cost_model.full, config.search.trim
    share = "no budget" if trim.budget is None else f"{trim.budget:.0%}"
    norms = any(isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in task.network.modules())
    return Measured(
        title=f"{config.task.network} on {config.task.data}, {share} of the {trim.budget_unit}",
        macs=pristine.macs,
        images=(trim.rounds * len(trimmer.recalibration) if norms else 0, trim.rounds * len(trimmer.reward)),
        groups=len(trimmer.groups),
        start_s=start_s,
        rates=rates,
        profile={label: spent / played for label, spent in seconds.items()},
    )


def warm_up(environments: Any, steps: int) -> None:
    """Play one episode, which also scores what all later ones are compared with."""
    environments.reset()
    for _ in range(steps):
        environments.step(np.zeros((environments.num_envs, 1), dtype=np.float32))


def play(config: SearchConfig, trimmer: Trimmer, environments: Any, episodes: int) -> tuple[int, float]:
    """Let a new agent search for about `episodes` evaluations; returns how many episodes it played, and the seconds."""
    trim, history = config.search.trim, History()
    environment = TrimEnv(trimmer.task, trim, trimmer=trimmer)
    callback = SearchCallback(history, max_evaluations=episodes)
    budgets, standing = planned_budgets(config.search), Standing(history=history)
    way = make_way(config.search, environment, environments, callback, standing, budgets, None)
    began = time.perf_counter()
    way.run()
    return len(history.rows) // trim.rounds, time.perf_counter() - began


@contextmanager
def timed_parts() -> Iterator[dict[str, float]]:
    """Time the functions of `PARTS` in this process; the dictionary fills with seconds, each second counted once."""
    spent = {label: 0.0 for label, _, _ in PARTS}
    inner: list[float] = []  # seconds of the timed functions that each running one has called

    def clocked(label: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **keywords: Any) -> Any:
            inner.append(0.0)
            began = time.perf_counter()
            try:
                return original(*arguments, **keywords)
            finally:
                whole = time.perf_counter() - began
                spent[label] += whole - inner.pop()
                if inner:
                    inner[-1] += whole

        return run

    originals = [(owner, name, getattr(owner, name), label) for label, owner, name in PARTS]
    try:
        for owner, name, original, label in originals:
            setattr(owner, name, clocked(label, original))
        yield spent
    finally:
        for owner, name, original, _ in originals:
            setattr(owner, name, original)


# ---- the page --------------------------------------------------------------------------------------------------------
def heading(found: list[Measured], episodes: int, repeats: int) -> list[str]:
    """Return title and the table of rates."""
    lines = [
        "# Episodes per minute",
        "",
        f"torch {torch.__version__} on the CPU, one thread a process; each repeat is a search of its own. Medians of "
        f"{repeats} repeats of {episodes} episodes, the range in brackets. The start holds tracing, measuring and "
        "starting the processes, and is not in the rates.",
        "",
        "| task | decisions | MACs | images an episode | workers | episodes per minute | faster | start, s |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for one in found:
        alone = statistics.median(one.rates[WORKERS[0]])
        for workers, rates in one.rates.items():
            rate = statistics.median(rates)
            lines.append(
                f"| {one.title} | {one.groups} | {one.macs / 1e6:,.2f} M | {one.images[0]:,} + {one.images[1]:,} | "
                f"{workers} | {rate:,.1f} [{min(rates):,.1f}, {max(rates):,.1f}] | {rate / alone:.2f}× | "
                f"{one.start_s[workers]:.1f} |"
            )
    return [*lines, ""]


def profiles(found: list[Measured]) -> list[str]:
    """Return what an episode's time goes into."""
    lines = [
        "## Where the time of an episode goes",
        "",
        "One worker, mean over all its episodes, in milliseconds and percent. Forward passes are those of batch-norm "
        "recalibration and of scoring.",
        "",
        "| part | " + " | ".join(one.title for one in found) + " |",
        "|---|" + "--:|" * len(found),
    ]
    totals = [sum(one.profile.values()) for one in found]
    shares = [sum(one.profile[part] for part in FORWARD) / total for one, total in zip(found, totals, strict=True)]
    for part in (*(label for label, _, _ in PARTS), POLICY):
        cells = [
            f"{1e3 * one.profile[part]:,.1f} ({one.profile[part] / total:.1%})"
            for one, total in zip(found, totals, strict=True)
        ]
        lines.append(f"| {part} | " + " | ".join(cells) + " |")
    lines.append("| whole episode | " + " | ".join(f"{1e3 * total:,.1f}" for total in totals) + " |")
    lines.append("| of it in forward passes | " + " | ".join(f"{share:.1%}" for share in shares) + " |")
    return [*lines, ""]


def gpu(given: str, images: tuple[int, int], kept: float) -> list[str]:
    """Return what ResNet-50 on ImageNet would take on one GPU, by arithmetic."""
    network = build_network("resnet50", classes=1000, seed=0).eval()
    macs = count_cost(network, torch.zeros(1, 3, IMAGENET, IMAGENET)).macs
    if given == "measure":
        device = torch.device("cuda")
        rate = macs * images_per_second(network.to(device), device)
        how = f"measured here, {torch.cuda.get_device_name(device)}, float32"
    else:
        rate, how = float(given), "assumed, **not measured**"
    seconds = sum(images) * kept * macs / rate
    return [
        "## ResNet-50 on ImageNet, one GPU",
        "",
        "By arithmetic, nothing was run: an episode's forward passes take "
        "t = (recalibration images + scoring images) · kept share · MACs / rate.",
        "",
        "| input | value |",
        "|---|--:|",
        f"| MACs of ResNet-50, one image of {IMAGENET} × {IMAGENET}, counted | {macs / 1e9:.2f} G |",
        f"| recalibration + scoring images | {images[0]:,} + {images[1]:,} |",
        f"| share of the MACs that a plan keeps | {kept:.0%} |",
        f"| rate of the GPU in forward passes, {how} | {rate:.3g} MACs / s |",
        f"| t, forward passes of an episode | {seconds:.2f} s |",
        f"| forward passes of 300 evaluations | {300 * seconds / 60:,.1f} min |",
        "",
        "Not in it: cutting, the least-squares repair, reading the images (they are taken to lie in memory), training "
        "after a cut, and the start.",
        "",
    ]


def images_per_second(network: torch.nn.Module, device: torch.device, batch: int = 256, repeats: int = 20) -> float:
    """Return how many ImageNet-sized images a second pass forward through a network on `device`."""
    images = torch.zeros(batch, 3, IMAGENET, IMAGENET, device=device)
    began = 0.0
    with torch.inference_mode():
        for place in range(repeats + 3):
            if place == 3:  # the first ones choose kernels and take memory
                float(network(images).sum())  # waits until the device is done
                began = time.perf_counter()
            last = network(images)
        float(last.sum())
    return batch * repeats / (time.perf_counter() - began)


if __name__ == "__main__":
    sys.exit(main())
