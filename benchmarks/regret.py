"""How much of the best plan each search misses, on a landscape that is known completely (see `landscape.py`).

    python benchmarks/regret.py --table docs/results/regret.md

Every search plays the same episodes in the same environment; scores come from the table, so that seconds are its own.
An agent's noise and learning rate fall over the evaluations it is allowed: it searches anew for each number of them.
The other searches take no notice of it, and are read off on the way. The same command goes on where it was stopped.
"""

import argparse
import itertools
import json
import math
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from landscape import BUDGET, TRIM, Landscape, TableTrimmer, landscape_task, table_environment
from lines import whole_lines
from prunegym.agent.controls import run_control
from prunegym.agent.history import History
from prunegym.agent.learning import learn
from prunegym.agent.progress import Progress
from prunegym.agent.randomness import random_state_kept
from prunegym.agent.report import markdown_table
from prunegym.agent.settings import ImaginationSettings, LearnerSettings, SearchSettings

EVALUATIONS = (20, 40, 60, 100)
AGENTS = {
    "agent (PPO that plans)": LearnerSettings(),
    "the agent's model alone": LearnerSettings(imagination=ImaginationSettings(practise=False)),
    "PPO from scored episodes alone": LearnerSettings(imagination=ImaginationSettings(updates=0)),
}
CONTROL_NAMES = {"random search": "random", "cross-entropy method": "cem", "CMA-ES": "cma_es"}
CLOSE, EXACT = 0.05, 0.02
"""Regrets up to which one of the two best plans, and the very best one, was found; see the page."""


@dataclass(frozen=True)
class Line:
    """One search with one number of evaluations.

    Attributes:
        label: Of the search.
        evaluations: That it was allowed.
        seed: Its own.
        regret: Share of the span.
        seconds: Of the processor; of a search that was read off on the way those of the whole.
    """

    label: str
    evaluations: int
    seed: int
    regret: float
    seconds: float


def agent_search(settings: LearnerSettings, trimmer: TableTrimmer, evaluations: int, seed: int) -> History:
    """Let an agent search the table."""
    history, environment = History(), table_environment(trimmer)
    search = SearchSettings(trim=TRIM, learner=settings, max_evaluations=evaluations, seed=seed)
    with random_state_kept():
        learn(trimmer.task, search, trimmer, environment, history, None, Progress())
    return history


def control_search(name: str, trimmer: TableTrimmer, evaluations: int, seed: int) -> History:
    """Let a search without a policy search the table."""
    history = History()
    run_control(name, table_environment(trimmer), evaluations=evaluations, budgets=[BUDGET], seed=seed, history=history)
    return history


def best_after(history: History, evaluations: int) -> float:
    """Return the best reward of the first evaluations; repeated plans are none."""
    rewards = [row.reward or 0.0 for row in history.finished if not row.repeated]
    return max(rewards[:evaluations])


def measured(landscape: Landscape, trimmer: TableTrimmer, label: str, seed: int, allowed: Sequence[int]) -> list[Line]:
    """Return what one search misses with each number of evaluations; an agent searches once for each."""

    def line(history: History, evaluations: int, began: float) -> Line:
        regret = landscape.regret(best_after(history, evaluations))
        return Line(label, evaluations, seed, round(regret, 6), round(time.process_time() - began, 2))

    began, lines = time.process_time(), []
    history = None if label in AGENTS else control_search(CONTROL_NAMES[label], trimmer, max(allowed), seed)
    for evaluations in allowed:
        lines.append(line(history or agent_search(AGENTS[label], trimmer, evaluations, seed), evaluations, began))
        began = began if history else time.process_time()
    return lines


def read_lines(path: Path) -> list[Line]:
    """Return what was measured before; a last line that was torn is left out of the file. Delete it for a new agent."""
    return [Line(**json.loads(text)) for text in whole_lines(path)]


def page(landscape: Landscape, lines: Sequence[Line], command: str) -> str:
    """Return the page's text."""
    seeds = sorted({line.seed for line in lines})
    regrets = {
        (label, evaluations): [line.regret for line in lines if (line.label, line.evaluations) == (label, evaluations)]
        for label in (*AGENTS, *CONTROL_NAMES)
        for evaluations in EVALUATIONS
    }

    def table(show: Callable[[list[float]], str]) -> list[str]:
        def cell(values: list[float]) -> str:
            few = f" ({len(values)} seeds)" if len(values) < len(seeds) else ""
            return show(values) + few if values else "–"

        rows = [
            (label, *(cell(regrets[label, evaluations]) for evaluations in EVALUATIONS))
            for label in (*AGENTS, *CONTROL_NAMES)
        ]
        return markdown_table(("search", *map(str, EVALUATIONS)), rows)

    def percent(values: list[float]) -> str:
        error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else math.nan
        return f"{100 * statistics.mean(values):.1f} ± {100 * error:.1f}"

    def within(limit: float) -> Callable[[list[float]], str]:
        return lambda values: f"{statistics.mean(value <= limit for value in values):.0%}"

    last = max(EVALUATIONS)
    spent = {label: [line.seconds for line in lines if (line.label, line.evaluations) == (label, last)] for label in
             (*AGENTS, *CONTROL_NAMES)}  # fmt: skip
    seconds = (f"{label} {statistics.mean(each):.1f}" for label, each in spent.items() if each)
    uniform, best = landscape.scores[landscape.uniform], landscape.scores[landscape.best]
    second, third = landscape.ranked()[1:3]
    missed = [landscape.regret(landscape.value(plan) - landscape.value(landscape.uniform)) for plan in (second, third)]
    return "\n".join(
        [
            "# What a search misses of the best plan",
            "",
            f"A landscape that is known completely: a ResNet of eight layers (widths 8, 12, 16) on 8x8 digits, "
            f"{len(landscape.best)} groups, multiples of two channels, {BUDGET:.0%} of the MACs: "
            f"{len(landscape.scores):,} plans, each cut, repaired by least squares and scored on {best.examples} "
            "images. "
            "A plan's value is accuracy (a share) less loss (nats). *Regret*: (value of the best plan that actions can "
            "reach − value of the best that was found) / (the former − the uniform plan's value); 100 % = nothing "
            f"better than the uniform plan. {len(seeds)} seeds.",
            "",
            f"- Uniform plan, widths {list(landscape.uniform)}: accuracy {uniform.accuracy:.2%}, loss "
            f"{uniform.loss:.3f}.",
            f"- Best plan, widths {list(landscape.best)}: accuracy {best.accuracy:.2%}, loss {best.loss:.3f}.",
            f"- The next two, widths {list(second)} and {list(third)}, are far from it: regrets {missed[0]:.1%} and "
            f"{missed[1]:.1%}.",
            "",
            "*The agent's model alone* is the agent without its policy gradient: the same Gaussian process, proposals "
            "and evaluations, a policy that never learns.",
            "",
            "One small network: these figures tell whether a search works and which of two is quicker here, not how "
            "good an agent is on a large network.",
            "",
            "## Mean regret after so many evaluations, percent (± standard error)",
            "",
            *table(percent),
            "",
            f"## Share of seeds with a regret of at most {CLOSE:.0%}: one of the two best plans",
            "",
            *table(within(CLOSE)),
            "",
            f"## Share of seeds with a regret of at most {EXACT:.0%}: the very best plan",
            "",
            *table(within(EXACT)),
            "",
            "## Mean regret in points of value (accuracy less loss)",
            "",
            *table(lambda values: f"{statistics.mean(values) * landscape.span:.3f}"),
            "",
            "Evaluations are distinct plans; the uniform plan, to which rewards are relative, is known to all. An "
            "agent is run anew for each number of them, the other searches once.",
            "",
            *(
                ["Where fewer seeds are named, or none, the rest is not measured yet; the same command goes on.", ""]
                if any(len(each) < len(seeds) for each in regrets.values())
                else []
            ),
            f"Seconds of processor time of one search of {last}, mean, one thread, scores looked up: "
            f"{', '.join(seconds)}.",
            "",
            f"Seeds {seeds[0]} to {seeds[-1]}. torch {torch.__version__}. Command: `{command}`",
            "",
        ]
    )


def main() -> int:
    """Run all searches, print and perhaps write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20, help="number of seeds, from 0")
    parser.add_argument("--lines", default="runs/regret.jsonl", help="where figures go as they come, and are kept")
    parser.add_argument(
        "--searches", nargs="*", default=[*AGENTS, *CONTROL_NAMES], help="only these, by label; none = page only"
    )
    parser.add_argument("--table", help="Markdown file to write")
    options = parser.parse_args()
    torch.set_num_threads(1)
    landscape, path = Landscape.load(), Path(options.lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    done = {(line.label, line.evaluations, line.seed) for line in read_lines(path)}
    trimmer = TableTrimmer(landscape_task(), landscape)
    for label in options.searches:
        together = [(evaluations,) for evaluations in EVALUATIONS] if label in AGENTS else [EVALUATIONS]
        for allowed, seed in itertools.product(together, range(options.seeds)):
            if (label, allowed[-1], seed) not in done:
                found = measured(landscape, trimmer, label, seed, allowed)
                with path.open("a") as file:
                    file.write("".join(json.dumps(asdict(line)) + "\n" for line in found))
    if options.table:
        kept = [line for line in read_lines(path) if line.seed < options.seeds]
        text = page(landscape, kept, shlex.join(["python", "benchmarks/regret.py", *sys.argv[1:]]))
        print(text)
        Path(options.table).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
