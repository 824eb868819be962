"""Iterative pruning as an episode: several rounds with training in between, against one round at equal cost.

    python benchmarks/rounds.py configs/quickstart.yaml --budget 0.03 --table docs/results/rounds.md
    python benchmarks/rounds.py configs/lenet_mnist.yaml --data_root DATA --budget 0.02 --inside 50 --final 1100

Every way gets the same number of scored networks (an episode of two rounds scores two), the same optimizer steps in the
schedule that wins, the same budget, seeds, images and repair. The plans of highest reward win; they are built on the
original weights, trained, and judged on the selection split; the test split is opened once, for all of them.
"""

import argparse
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from prunegym.agent.configuration import read_config
from prunegym.agent.finalists import Finalist, read_test_split
from prunegym.agent.history import History
from prunegym.agent.intervals import Interval, paired_interval
from prunegym.agent.learning import learn
from prunegym.agent.loading import load_task
from prunegym.agent.pool import AGENT, UNIFORM, Plans, plans_of, schedule_of
from prunegym.agent.progress import Progress
from prunegym.agent.randomness import random_state_kept
from prunegym.agent.report import markdown_table
from prunegym.agent.search import finalist, resolve_settings
from prunegym.agent.settings import SearchSettings
from prunegym.envs import TrimEnv
from prunegym.pruning import PruningPlan, PruningTask, Score, Trimmer, UserError
from prunegym.pruning.schedule import build


@dataclass(frozen=True)
class Way:
    """One way to spend the evaluations and the updates.

    Attributes:
        name: Short.
        label: For people.
        rounds: Cuts of an episode.
        inside: Updates after each cut, inside the episode.
        final: Updates of the winner beyond these.
        searched: Whether an agent searches; else the uniform plan is taken.
        planned: Whether the agent practises on imagined episodes, too.
    """

    name: str
    label: str
    rounds: int
    inside: int
    final: int
    searched: bool = True
    planned: bool = False

    @property
    def updates(self) -> int:
        """Optimizer steps of the winning schedule."""
        return self.rounds * self.inside + self.final


class Scores(dict[str, Score]):
    """Scores kept in memory, so that a plan that comes again is not trained again; a repeat is no evaluation."""

    def put(self, key: str, score: Score) -> None:
        """Keep a score."""
        self[key] = score


@dataclass(frozen=True, eq=False)
class Outcome:
    """What one way came to at one seed.

    Attributes:
        seen: Accuracy on the reward images that the search saw of its winner.
        finished: The winner, built and trained.
        evaluations: Networks that were scored.
        updates: Optimizer steps of the whole search, without those of the uniform plan that rewards refer to.
        seconds: Of the search.
    """

    seen: float
    finished: Finalist
    evaluations: int
    updates: int
    seconds: float


def main() -> int:
    """Run all ways and seeds, print and perhaps write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("config")
    parser.add_argument("--rounds", type=int, default=2, help="cuts of an episode, at least 2")
    parser.add_argument("--inside", type=int, default=20, help="updates after each of these cuts, in the episode")
    parser.add_argument("--final", type=int, default=60, help="updates of the winner beyond these")
    parser.add_argument("--evaluations", type=int, default=120, help="networks that each way may score")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds, from 0")
    parser.add_argument("--table", help="Markdown file to write")
    options, rest = parser.parse_known_args()
    if options.rounds < 2 or options.inside < 1 or options.final < 0 or options.evaluations < options.rounds:
        raise UserError(
            "rounds must be at least 2, inside at least 1, final at least 0 and evaluations at least the rounds, but "
            f"got {options.rounds}, {options.inside}, {options.final} and {options.evaluations}"
        )
    config = read_config([options.config, *rest])
    task = load_task(config, Progress(sys.stderr.isatty()))
    ways, seeds = ways_of(options.rounds, options.inside, options.final), range(options.seeds)
    found: dict[str, list[Outcome]] = {way.name: [] for way in ways}
    for seed in seeds:
        for way in ways:
            outcome = played(way, task, config.search, seed, options.evaluations)
            found[way.name].append(outcome)
            accuracy = outcome.finished.selection.accuracy
            print(f"seed {seed}, {way.label}: {accuracy:.4f}, {outcome.seconds:.0f} s", file=sys.stderr)
    read_tests(task, config.search, found)
    command = shlex.join(["python", "benchmarks/rounds.py", *sys.argv[1:]])
    lines = page(task, config.search, ways, found, options.evaluations)
    text = "\n".join([*lines, f"torch {torch.__version__}. Command: `{command}`", ""])
    print(text)
    if options.table:
        Path(options.table).write_text(text)
    return 0


def ways_of(rounds: int, inside: int, final: int) -> list[Way]:
    """Return the ways, all with the same updates in the schedule that wins; the first is compared with the others."""
    all_inside = rounds * inside
    return [
        Way("rounds", f"agent, {rounds} rounds", rounds, inside, final),
        Way("trained", "agent, 1 round, trained before it is scored", 1, all_inside, final),
        Way("cut", "agent, 1 round, scored right after the cut", 1, 0, final + all_inside),
        Way("planned", "agent that plans (the default), 1 round", 1, 0, final + all_inside, planned=True),
        Way("uniform_rounds", f"uniform, {rounds} rounds", rounds, inside, final, searched=False),
        Way("uniform", "uniform, 1 round", 1, 0, final + all_inside, searched=False),
    ]


# ---- one way at one seed ---------------------------------------------------------------------------------------------
def settings_of(way: Way, search: SearchSettings, seed: int, evaluations: int, examples: int) -> SearchSettings:
    """Return the settings of one way; apart from rounds, updates and the learner's practice they are the same for all.

    Raises:
        UserError: There is no budget.
    """
    if search.trim.budget is None:
        raise UserError("rounds are compared at a budget, but got none; give --budget, a share of the cost to keep")
    retraining = search.trim.retraining.resolved(examples).without_checks()  # the selection split judges
    retraining = replace(retraining, updates=way.final)
    trim = replace(search.trim, budget_range=None, rounds=way.rounds, retrain_updates=way.inside, retraining=retraining)
    imagination = search.learner.imagination if way.planned else replace(search.learner.imagination, updates=0)
    learner = replace(search.learner, imagination=imagination)
    return resolve_settings(replace(search, trim=trim, learner=learner, max_evaluations=evaluations, seed=seed))


def played(way: Way, task: PruningTask, search: SearchSettings, seed: int, evaluations: int) -> Outcome:
    """Search one way, and build what won."""
    settings = settings_of(way, search, seed, evaluations, len(task.train))
    trim = settings.trim
    trimmer = Trimmer(task, trim.repair, trim.groups, scores=Scores())
    environment = TrimEnv(task, trim, trimmer=trimmer)
    history, began = History(), time.monotonic()
    if way.searched:
        with random_state_kept():
            learn(task, settings, trimmer, environment, history, None, Progress())
        winner = history.ranked(trim.budget)[0]
        plans, seen = plans_of(winner), winner.accuracy
    else:
        plans, seen = uniform_rounds(environment)
    seconds = time.monotonic() - began
    schedule = schedule_of(trimmer, trim, plans, AGENT if way.searched else UNIFORM, final=True)
    finished = finalist(trimmer, build(trimmer, schedule, verify=False), f"{way.name} at seed {seed}", way.label)
    trained = sum(not row.cached for row in history.rows)
    return Outcome(seen, finished, history.spent, trained * way.inside, seconds)


def uniform_rounds(environment: TrimEnv) -> tuple[Plans, float]:
    """Return the plans of uniform rounds to the budget, and the accuracy on the reward images after the last."""
    environment.reset()
    ended, info = False, {}
    while not ended:
        _, _, ended, _, info = environment.step(np.zeros(1, np.float32))
    return tuple(PruningPlan.from_dict(plan) for plan in info["plans"]), info["accuracy"]


def read_tests(task: PruningTask, search: SearchSettings, found: dict[str, list[Outcome]]) -> None:
    """Open the test split once, for the winners of all ways and seeds."""
    trimmer = Trimmer(task, search.trim.repair, search.trim.groups)
    read_test_split(trimmer, [outcome.finished for outcomes in found.values() for outcome in outcomes])


# ---- the page --------------------------------------------------------------------------------------------------------
def page(
    task: PruningTask, search: SearchSettings, ways: Sequence[Way], found: dict[str, list[Outcome]], evaluations: int
) -> list[str]:
    """Return the page's text, without the command."""
    first, trim = ways[0], search.trim
    trimmer = Trimmer(task, trim.repair, trim.groups)
    original = trimmer.score_selection(task.network).accuracy
    rows = []
    for way in ways:
        outcomes = found[way.name]
        finished = [outcome.finished for outcome in outcomes]
        rows.append(
            (
                way.label, f"{way.rounds} × {way.inside} + {way.final}",
                f"{statistics.mean(one.evaluations for one in outcomes):.0f}",
                f"{statistics.mean(one.updates for one in outcomes):,.0f}",
                spread([one.seen for one in outcomes]),
                spread([one.selection.accuracy for one in finished]), spread([one.test or 0.0 for one in finished]),
            )
        )  # fmt: skip
    heads = (
        "way", "updates of the winner", "networks scored", "updates in the search", "seen by the search", "selection",
        "test",
    )  # fmt: skip
    pairs = [(way, *intervals(found[first.name], found[way.name])) for way in ways[1:]]
    compared = [
        (way.label, shown(selection), selection.verdict, shown(test), test.verdict) for way, selection, test in pairs
    ]
    by_seed = [
        (str(seed), *(f"{100 * (found[way.name][seed].finished.selection.accuracy):.2f}" for way in ways))
        for seed in range(len(found[first.name]))
    ]
    return [
        f"# {first.rounds} rounds against one: {task.name}",
        "",
        f"{trim.budget:.1%} of the {trim.budget_unit}, approached geometrically where there are rounds. Every search "
        f"may score {evaluations} networks, an episode of {first.rounds} rounds {first.rounds}; winners are trained "
        f"for {first.updates} updates (rounds × those inside an episode + those after it). They are the plans of "
        f"highest reward. Accuracies in percent, mean ± standard deviation over {len(by_seed)} seeds of search, "
        f"repair and retraining; the original network is the same (selection {100 * original:.2f}). "
        f"{len(task.reward):,} reward, {len(task.selection):,} selection and {len(task.test):,} test images; the test "
        f"split was opened once, for all. Training: batch {trim.retraining.batch_size}, learning rate "
        f"{trim.retraining.learning_rate:g}, distillation {trim.retraining.distillation:g}; what holds for so many "
        "updates need not hold for many more.",
        "",
        *markdown_table(heads, rows),
        "",
        "*Seen by the search*: accuracy of the winner on the reward images when it was paid, after different training: "
        "not to be compared between rows.",
        "",
        f"## {first.label} minus the others",
        "",
        "Points, mean over seeds with a 95 % bootstrap interval of paired differences.",
        "",
        *markdown_table(("way", "selection", "verdict", "test", "verdict"), compared),
        "",
        *said(first, pairs),
        "## Selection split by seed",
        "",
        *markdown_table(("seed", *(way.label for way in ways)), by_seed),
        "",
    ]


def intervals(first: Sequence[Outcome], second: Sequence[Outcome]) -> tuple[Interval, Interval]:
    """Return the differences in points on the selection and on the test split, paired by seed."""
    both = (first, second)
    selections = [[100 * one.finished.selection.accuracy for one in outcomes] for outcomes in both]
    tests = [[100 * (one.finished.test or 0.0) for one in outcomes] for outcomes in both]
    return paired_interval(*selections), paired_interval(*tests)


def said(first: Way, pairs: Sequence[tuple[Way, Interval, Interval]]) -> list[str]:
    """Return the verdicts on the selection split as a sentence each."""
    lines = []
    for way, selection, _ in pairs:
        if selection.verdict in ("better", "worse"):
            text = f"**{first.label}** is {selection.verdict} than **{way.label}** on the selection split."
        elif selection.verdict == "not distinguishable":
            text = f"**{first.label}** is not distinguishable from **{way.label}** on the selection split."
        else:
            text = f"**{first.label}** against **{way.label}**: {selection.verdict} for a verdict."
        lines.append(f"- {text}")
    return [*lines, ""]


def spread(shares: Sequence[float]) -> str:
    """Return mean ± standard deviation in percent."""
    error = statistics.stdev(shares) if len(shares) > 1 else 0.0
    return f"{100 * statistics.mean(shares):.2f} ± {100 * error:.2f}"


def shown(interval: Interval) -> str:
    """Return a mean difference with its interval."""
    if interval.low is None or interval.high is None:
        return f"{interval.mean:+.2f}"
    return f"{interval.mean:+.2f} [{interval.low:+.2f}, {interval.high:+.2f}]"


if __name__ == "__main__":
    sys.exit(main())
