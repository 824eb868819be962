"""A policy trained on one network, applied to others without training, beside plans that anybody can make there.

    python benchmarks/transfer.py RUN \
        "configs/resnet20_cifar10.yaml --data_root DATA --task.network cifar_resnet56 --task.weights RESNET56" \
        "configs/resnet20_cifar10.yaml --data_root DATA --task.network cifar_vgg16_bn --task.weights VGG" \
        --budgets 0.3 0.4 0.5 --table docs/results/transfer.md

RUN is the folder of a finished search of one round with action "score"; each further argument is a configuration with
its options, in quotes. Repair, groups and unit of the budget are the target's. The test split is not read: on the
selection split nothing was chosen.
"""

import argparse
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from prunegym.agent.configuration import read_config, stored_config
from prunegym.agent.finalists import Finalist, compare_pair, right_examples
from prunegym.agent.front import TrainedAgent
from prunegym.agent.history import History
from prunegym.agent.loading import load_task
from prunegym.agent.pool import LABELS, heuristics_plans
from prunegym.agent.progress import Progress
from prunegym.agent.randomness import random_state_kept
from prunegym.agent.report import markdown_table
from prunegym.agent.run_folder import RunFolder
from prunegym.agent.settings import SearchConfig, SearchSettings
from prunegym.envs import TrimEnv, TrimSettings
from prunegym.envs.reward import Measured, Outcome, Reward
from prunegym.pruning import PruningPlan, PruningTask, Score, Trimmer, UserError
from prunegym.pruning.schedule import round_training
from prunegym.pruning.trimmed import Trimmed

TRANSFERRED, BY_CHANCE = "transferred", "random"
CERTAIN = 0.05
"""A smaller p-value of McNemar's test is called a difference."""


@dataclass(frozen=True, eq=False)
class Cell:
    """One target at one budget.

    Attributes:
        budget: Share of the cost that may be kept.
        cut: Networks right after the cut, the transferred policy's first; `right` is about the selection images.
        trained: The same networks after retraining; empty without it.
        kept: By name, share of the cost that is kept.
        distance: By name, mean over the groups of |share that stays - the same of the uniform plan|.
        chances: Accuracies of the random plans on the selection split.
    """

    budget: float
    cut: tuple[Finalist, ...]
    trained: tuple[Finalist, ...]
    kept: dict[str, float]
    distance: dict[str, float]
    chances: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Target:
    """What was measured on one network; `original` is its accuracy on the selection split."""

    task: PruningTask
    unit: str
    groups: int
    original: float
    cells: tuple[Cell, ...]


def main() -> int:
    """Measure every target, print and perhaps write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("run", help="folder of the search that trained the policy")
    parser.add_argument("targets", nargs="+", help="a configuration with its options, in quotes")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.3, 0.4, 0.5], help="shares of the cost to keep")
    parser.add_argument("--random", type=int, default=20, help="random plans, each scored")
    parser.add_argument("--seed", type=int, default=0, help="of the random plans")
    parser.add_argument("--retrain_updates", type=int, default=0, help="after the cut; 0 = no network is trained")
    parser.add_argument("--table", help="Markdown file to write")
    options = parser.parse_args()
    if options.random < 1 or options.retrain_updates < 0:
        raise UserError(
            "random must be at least 1 and retrain_updates at least 0, but got "
            f"{options.random} and {options.retrain_updates}"
        )
    run = RunFolder.existing(options.run)
    source, _ = stored_config(run.path / "config.yaml")
    command = shlex.join(["python", "benchmarks/transfer.py", *sys.argv[1:]])
    found: list[Target] = []
    text = ""
    for given in options.targets:
        config = read_config(shlex.split(given))
        found.append(measured(run, source, config, options))
        text = "\n".join([*page(source, found, options), f"torch {torch.__version__}. Command: `{command}`", ""])
        if options.table:
            Path(options.table).write_text(text)
    print(text)
    return 0


# ---- measuring -------------------------------------------------------------------------------------------------------
def measured(run: RunFolder, source: SearchConfig, config: SearchConfig, options: argparse.Namespace) -> Target:
    """Make and judge all plans for one target."""
    task = load_task(config, Progress(sys.stderr.isatty()))
    search = borrowed(source.search, config.search, options.budgets[0])
    trimmer = Trimmer(task, search.trim.repair, search.trim.groups)
    for budget in options.budgets:
        trimmer.cost_model.check_budget(budget, search.trim.budget_unit)
    agent = replace(TrainedAgent.load(run, trimmer, search), history=History())  # its plans were for another network
    cells = []
    for budget in options.budgets:
        cells.append(cell(agent, budget, options))
        accuracies = ", ".join(f"{one.name} {one.selection.accuracy:.4f}" for one in cells[-1].cut)
        print(f"{task.name} at {budget:g}: {accuracies}", file=sys.stderr)
    original = trimmer.score_selection(task.network).accuracy
    return Target(task, search.trim.budget_unit, len(trimmer.groups), original, tuple(cells))


def borrowed(source: SearchSettings, target: SearchSettings, budget: float) -> SearchSettings:
    """Return the settings under which the source's policy acts on the target: one cut, and no training in episodes.

    Raises:
        UserError: The source's plans cannot be made without scoring.
    """
    own = source.trim
    if own.action != "score" or own.rounds != 1:
        raise UserError(
            f"a policy is transferred from a search with action 'score' and one round, but got {own.action!r} and "
            f"{own.rounds}; name another run"
        )
    trim = replace(
        target.trim, budget=budget, budget_range=None, rounds=1, retrain_updates=0, action=own.action,
        observation=own.observation, score_scale=own.score_scale,
    )  # fmt: skip
    return replace(source, trim=trim)


def cell(agent: TrainedAgent, budget: float, options: argparse.Namespace) -> Cell:
    """Judge the transferred policy's plan, the heuristics' and the random ones."""
    trimmer, trim = agent.trimmer, replace(agent.settings.trim, budget=budget)
    plans = {TRANSFERRED: agent.plans(budget)[0][0], **heuristics_plans(trimmer, budget, trim.budget_unit)}
    made = {name: trimmer.trim(plan) for name, plan in plans.items()}
    uniform = Measured(made["uniform"].score, made["uniform"].cost)
    made[BY_CHANCE], chances = random_search(trimmer, trim, uniform, options.random, options.seed)
    trained: tuple[Finalist, ...] = ()
    cut = tuple(judged(trimmer, name, one) for name, one in made.items())
    if options.retrain_updates:  # trains in place, what was judged above
        training = round_training(trim.retraining, options.retrain_updates, last=False)
        trained = tuple(
            judged(trimmer, name, trimmer.retrain(one, training, seed=trim.repair.seed)) for name, one in made.items()
        )
    whole = trimmer.cost_model.full.of(trim.budget_unit)
    kept = {name: one.cost.of(trim.budget_unit) / whole for name, one in made.items()}
    shares = {name: shares_of(trimmer, one.plan) for name, one in made.items()}
    distance = {name: float(np.abs(each - shares["uniform"]).mean()) for name, each in shares.items()}
    return Cell(budget, cut, trained, kept, distance, chances)


def random_search(
    trimmer: Trimmer, trim: TrimSettings, uniform: Measured, count: int, seed: int
) -> tuple[Trimmed, tuple[float, ...]]:
    """Score distinct random plans; returns the one of highest reward, and the selection accuracies of all.

    Args:
        trimmer: Of the target.
        trim: With the budget.
        uniform: The uniform plan, for the reward.
        count: Plans; fewer only where ten times as many draws hold no more distinct ones.
        seed: Of the actions, which are uniform in [-1, 1].
    """
    random, budget = np.random.default_rng(seed), trim.budget
    assert budget is not None  # set by `borrowed`
    actions = random.uniform(-1.0, 1.0, (10 * count, len(trimmer.groups)))
    environment = TrimEnv(trimmer.task, trim, trimmer=trimmer)
    widths = environment.widths_after(actions, np.full(len(actions), budget))
    distinct = list(dict.fromkeys(map(tuple, widths.tolist())))[:count]
    reward, whole = Reward(trim.reward), trimmer.cost_model.full.of(trim.budget_unit)
    best: Trimmed | None = None
    highest, accuracies = (-np.inf, -np.inf), []
    for counts in distinct:
        made = trimmer.trim(trimmer.plan(counts))
        accuracies.append(trimmer.score_selection(made.network).accuracy)
        outcome = Outcome(
            plan=Measured(made.score, made.cost), baseline=trimmer.baseline.accuracy,
            kept=made.cost.of(trim.budget_unit) / whole, uniform=uniform,
        )  # fmt: skip
        paid = (reward.total(reward.terms(outcome)), -made.score.loss)
        if best is None or paid > highest:
            best, highest = made, paid
    assert best is not None
    return best, tuple(accuracies)


def judged(trimmer: Trimmer, name: str, made: Trimmed) -> Finalist:
    """Return a network with the selection images that it gets right."""
    right = right_examples(made.network, trimmer.task.selection, trimmer.settings.batch_size, trimmer.task.metric)
    score = Score(float(right.mean()), float("nan"), len(right))
    return Finalist(name, label(name), made.network, made.cost, None, (), score, right=right)


def shares_of(trimmer: Trimmer, plan: PruningPlan) -> np.ndarray:
    """Return (groups,) the share of each group that stays."""
    counts = plan.completed(trimmer.groups).counts
    return np.array([counts[group.name] / group.width for group in trimmer.groups])


def label(name: str) -> str:
    """Return what people call a plan."""
    own = {TRANSFERRED: "transferred policy", BY_CHANCE: "random search, best by reward"}
    return own.get(name) or LABELS[name]


# ---- the page --------------------------------------------------------------------------------------------------------
def page(source: SearchConfig, found: list[Target], options: argparse.Namespace) -> list[str]:
    """Return the page's text, without the command."""
    trim = source.search.trim
    low, high = trained_budgets(trim)
    known = f"{low:.0%}" if low == high else f"{low:.0%} to {high:.0%}"
    lines = [
        f"# A policy of {source.task.network} on {source.task.data}, applied to other networks",
        "",
        f"The policy ({source.search.learner.algorithm}) was trained for {known} of the {trim.budget_unit} with "
        f"{source.search.max_evaluations} evaluations, and acts without noise. On the networks below it was not "
        "trained, and none of its plans was scored before. All plans: one cut, the same repair; the target's criterion "
        "says which channels stay, unless a ranking is named. Rankings keep the same share of every group.",
        "",
        f"Accuracies in percent on the selection split. *Random search* scores {options.random} distinct plans on the "
        "reward images and takes the one of highest reward.",
        "",
    ]
    for target in found:
        lines += section(target, trim, options)
    return lines


def section(target: Target, trim: TrimSettings, options: argparse.Namespace) -> list[str]:
    """Return what there is to say of one target."""
    low, high = trained_budgets(trim)
    images = len(target.task.selection)
    heads = [f"{one.budget:.0%}" + ("" if low <= one.budget <= high else " †") for one in target.cells]
    first = target.cells[0]
    lines = [
        f"## {target.task.name}",
        "",
        f"{target.groups} groups, budgets in {target.unit}; {images:,} selection and {len(target.task.reward):,} "
        f"reward images; original: {100 * target.original:.2f}.",
        "",
        "### Right after the cut",
        "",
    ]
    rows = [
        (one.label, str(len(first.chances)) if one.name == BY_CHANCE else "0", *accuracies(target, one.name, "cut"))
        for one in first.cut
    ]
    spread = [
        f"{100 * np.mean(cell.chances):.2f} ({100 * min(cell.chances):.2f} to {100 * max(cell.chances):.2f})"
        for cell in target.cells
    ]
    rows.append(("random plans, mean (range)", "", *spread))
    lines += [*markdown_table(("plan", "networks scored", *heads), rows), "", *verdicts(target, "cut", heads)]
    if first.trained:
        rows = [(one.label, *accuracies(target, one.name, "trained")) for one in first.trained]
        lines += [f"### After {options.retrain_updates:,} updates", "", *markdown_table(("plan", *heads), rows), ""]
        lines += verdicts(target, "trained", heads)
    lines += ["### How far from the uniform plan", ""]
    lines += ["Mean over the groups of |share that stays − the uniform plan's|, and the share of the cost kept:", ""]
    rows = [
        (label(name), *(f"{100 * cell.distance[name]:.1f} ({cell.kept[name]:.2%})" for cell in target.cells))
        for name in (TRANSFERRED, "uniform", BY_CHANCE)
    ]
    lines += [*markdown_table(("plan", *heads), rows), ""]
    if any(head.endswith("†") for head in heads):
        lines += ["† outside the budgets that the policy was trained for.", ""]
    return lines


def accuracies(target: Target, name: str, when: str) -> list[str]:
    """Return one plan's accuracies, budget by budget; `when` is "cut" or "trained"."""
    return [
        f"{100 * one.selection.accuracy:.2f}"
        for cell in target.cells
        for one in getattr(cell, when)
        if one.name == name
    ]


def verdicts(target: Target, when: str, heads: list[str]) -> list[str]:
    """Return the transferred policy against every other plan, with McNemar's test on the selection images."""
    rows, outcomes = [], {"better": 0, "worse": 0, "not distinguishable": 0}
    for place, other in enumerate(getattr(target.cells[0], when)[1:], 1):
        texts = []
        for cell in target.cells:
            networks = getattr(cell, when)
            verdict = compare_pair(networks[0], networks[place])
            outcomes[verdict.outcome] += 1
            texts.append(f"{verdict.points:+.2f} (p = {verdict.p_value:.2g})")
        rows.append((other.label, *texts))
    counted = ", ".join(f"{name} in {count}" for name, count in outcomes.items())
    return [
        *markdown_table(("transferred policy minus", *heads), rows),
        "",
        f"Points; p: exact McNemar test on the same images, not corrected for the number of pairs. Below {CERTAIN:g} "
        f"counts as a difference: the transferred policy is {counted} of {sum(outcomes.values())} pairs.",
        "",
    ]


def trained_budgets(trim: TrimSettings) -> tuple[float, float]:
    """Return the lowest and the highest budget that a policy was trained for."""
    levels = [*trim.budgets, *([trim.budget] if trim.budget is not None else [])]
    return (min(levels), max(levels)) if levels else (0.0, 1.0)


if __name__ == "__main__":
    with random_state_kept():
        sys.exit(main())
