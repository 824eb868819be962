"""A comparison told to people: a table for each budget, the verdicts, and their reading in sentences, losses first."""

import shlex
from collections.abc import Sequence
from statistics import fmean, stdev

from rich import box
from rich.table import Table
from rich.text import Text

from ..pruning.cost import UNITS
from .compare import STAGES, Comparison, Pair
from .compare_cell import rounding
from .compare_settings import (
    AGENT,
    ENOUGH_SEEDS,
    POOL,
    SEARCHES_AT_RANDOM,
    SURROGATE,
    UNIFORM,
    feeds_pool,
    is_search,
)
from .intervals import BETTER, TOO_FEW, UNDECIDED, WORSE, Interval
from .report import markdown_table

LABELS = {
    AGENT: "agent", SURROGATE: "the agent's model alone", UNIFORM: "uniform",
    "network_trimming": "Network Trimming (APoZ rounds)", "apoz": "APoZ", "taylor_2017": "Taylor 2017",
    "taylor_2019": "Taylor 2019", "l1": "magnitude (L1)", "l2": "magnitude (L2)",
    "random": "ranking at random", SEARCHES_AT_RANDOM: "random search", "cem": "CEM", "cma_es": "CMA-ES", "amc": "AMC",
    POOL: "pool with a floor",
}  # fmt: skip

HEADERS = (
    "method", "selection, cut only", "selection, retrained", "test, retrained", "params kept", "MACs kept",
    "evaluations", "seconds", "retraining updates",
)  # fmt: skip

SHORT = {"before": "cut only", "after": "retrained", "test": "test"}


def label(method: str) -> str:
    """Return a method's name for people."""
    return LABELS.get(method, method)


def title(made: Comparison) -> str:
    """Name the task, the budgets and the seeds."""
    compare, unit = made.config.compare, made.config.search.trim.budget_unit
    budgets = _listed([f"{budget:.0%}" if budget >= 0.1 else f"{budget:.1%}" for budget in compare.budgets])
    return f"{made.task}: {len(compare.methods)} methods at {budgets} of the {UNIT_WORDS[unit]}, {_seeds(made)}"


UNIT_WORDS = {unit: {"macs": "MACs", "params": "parameters"}.get(unit, unit) for unit in UNITS}


# ---- tables ----------------------------------------------------------------------------------------------------------
def table_rows(made: Comparison, budget: float) -> list[tuple[str, ...]]:
    """Return the table of a budget as text: the original first, then one row per method; accuracies in percent."""
    first = ("original", *(f"{100 * made.original[stage]:.2f}" for stage in STAGES), "100 %", "100 %", "–", "–", "–")
    return [first, *(_row(made, method, budget) for method in made.config.compare.rows)]


def _row(made: Comparison, method: str, budget: float) -> tuple[str, ...]:
    cells = made.cells_of(method)
    found = [cell.at(budget) for cell in cells]
    params = fmean(one.params for one in found) / made.whole.params
    macs = fmean(one.macs for one in found) / made.whole.macs
    missed = "" if all(one.within for one in found) else " *"
    budgets = len(made.config.compare.budgets)
    paid = (
        [cell for one in (POOL, *filter(feeds_pool, made.config.compare.methods)) for cell in made.cells_of(one)]
        if method == POOL
        else cells
    )
    evaluations = sum(cell.evaluations for cell in paid) / len(cells) / budgets
    seconds = sum(cell.seconds for cell in paid) / len(cells) / budgets
    return (
        label(method),
        *(spread(made.figures(method, budget, stage)) for stage in STAGES),
        f"{params:.1%}".replace("%", " %") + (missed if _unit(made) == "params" else ""),
        f"{macs:.1%}".replace("%", " %") + (missed if _unit(made) == "macs" else ""),
        f"{evaluations:.0f}" if evaluations else "–",
        f"{seconds:.1f}",
        f"{fmean(one.updates for one in found):.0f}",
    )


def spread(figures: Sequence[float] | None) -> str:
    """Write a mean and, over at least two seeds, its sample standard deviation; "–" where there is no figure."""
    if not figures:
        return "–"
    return f"{fmean(figures):.2f} ± {stdev(figures):.2f}" if len(figures) > 1 else f"{figures[0]:.2f}"


def pair_rows(made: Comparison, budget: float) -> list[tuple[str, ...]]:
    """Return, for each other method, the mean difference in points, its interval and the verdict, by stage."""
    rows = []
    for other in made.config.compare.methods:
        pairs = {pair.stage: pair for pair in made.pairs if pair.second == other and pair.budget == budget}
        if pairs:
            stages = (_cell_text(pairs[stage].interval) if stage in pairs else "–" for stage in STAGES)
            rows.append((f"{label(made.config.compare.subject)} − {label(other)}", *stages))
    return rows


def _cell_text(interval: Interval) -> str:
    return f"{_difference(interval)}: {interval.verdict}"


def _difference(interval: Interval) -> str:
    ends = (
        "" if interval.low is None or interval.high is None else f" [{_signed(interval.low)}, {_signed(interval.high)}]"
    )
    return f"{_signed(interval.mean)}{ends}"


def _signed(points: float) -> str:
    return f"{round(points, 2) + 0.0:+.2f}"  # + 0.0: no minus before a nought


def console_tables(made: Comparison) -> list[Table]:
    """Return the tables for the terminal, two for each budget."""
    tables = []
    unit = UNIT_WORDS[_unit(made)]
    for budget in made.config.compare.budgets:
        shown = _table(f"{made.task}, {budget:.1%} of the {unit}: accuracy, % (mean ± std over {_seeds(made)})")
        for header in ("method", "cut only", "retrained", "test", "params", "MACs", "evals", "s", "updates"):
            name = header == "method"  # gives way where the terminal is narrow; figures must not be cut off
            shown.add_column(header, justify="left" if name else "right", no_wrap=not name)
        for row, method in zip(table_rows(made, budget), ("", *made.config.compare.rows), strict=True):
            shown.add_row(*row, style="bold" if method == made.config.compare.subject else None)
        verdicts = _table("Differences in points, interval, verdict")
        for header in ("pair", *SHORT.values()):
            verdicts.add_column(header)
        for row in pair_rows(made, budget):
            verdicts.add_row(*row)
        tables += [shown, verdicts] if pair_rows(made, budget) else [shown]
    return tables


def _table(heading: str) -> Table:
    return Table(title=Text(heading), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)


# ---- sentences -------------------------------------------------------------------------------------------------------
def reading(made: Comparison) -> list[str]:
    """Return what the verdicts say, one sentence for each budget, stage and verdict; losses first."""
    lines = []
    subject = label(made.config.compare.subject)
    for budget in made.config.compare.budgets:
        for stage, where in STAGES.items():
            pairs = [pair for pair in made.pairs if pair.budget == budget and pair.stage == stage]
            for verdict in (WORSE, BETTER, UNDECIDED, TOO_FEW):
                named = [pair for pair in pairs if pair.interval.verdict == verdict]
                if named:
                    lines.append(f"At {budget:g} ({where}) the {subject} {_said(verdict, named)}.")
    return [*lines, *_outside_lines(made), *_floor_lines(made)]


def _said(verdict: str, pairs: Sequence[Pair]) -> str:
    others = _listed([f"{label(pair.second)} ({_difference(pair.interval)} points)" for pair in pairs])
    if verdict == TOO_FEW:
        seeds = pairs[0].interval.count
        return f"was compared over {seeds} seed{'s' * (seeds != 1)} only, too few for a verdict, with {others}"
    return f"is {verdict} {'from' if verdict == UNDECIDED else 'than'} {others}"


def _outside_lines(made: Comparison) -> list[str]:
    """Name the methods that stay further below a budget than the tolerance, or are above it."""
    lines, compare = [], made.config.compare
    for budget in compare.budgets:
        kept = {method: [cell.at(budget) for cell in made.cells_of(method)] for method in compare.methods}
        named = {method: f"{label(method)} ({fmean(one.kept for one in found):.1%})" for method, found in kept.items()}
        above = [method for method, found in kept.items() if any(one.kept > budget * (1 + 1e-9) for one in found)]
        missed = [method for method, found in kept.items() if not all(one.within for one in found)]
        below = [method for method in missed if method not in above]
        for methods, where in ((below, "below the tolerance"), (above, "above the budget")):
            if methods:
                outside = _listed([named[method].replace("%", " %") for method in methods])
                lines.append(
                    f"At {budget:g} the cost kept by {outside} lies {where} for at least one seed; differences to "
                    "others there are not at equal cost."
                )
    return lines


def _floor_lines(made: Comparison) -> list[str]:
    """Say whether the pool kept what it promises, and whose plans it took."""
    compare = made.config.compare
    if POOL not in compare.rows:
        return []
    lines = []
    for budget in compare.budgets:
        taken: dict[str, int] = {}
        below = 0
        for cell in made.cells_of(POOL):
            one = cell.at(budget)
            taken[one.made_by] = taken.get(one.made_by, 0) + 1
            rivals = [
                other.at(budget).before or 0.0
                for other in made.cells
                if other.seed == cell.seed and feeds_pool(other.method)
            ]
            below += (one.before or 0.0) < max(rivals)
        whose = _listed([f"{label(name)} {count}×" for name, count in sorted(taken.items(), key=lambda item: -item[1])])
        seeds = len(compare.seeds)
        kept = "for every seed" if not below else f"for {seeds - below} of {seeds} seeds only"
        lines.append(
            f"At {budget:g} the pool is, cut only on the selection split, at least as good as each of its members "
            f"{kept}; it took the plan of {whose}."
        )
    return lines


def method_lines(made: Comparison) -> list[str]:
    """Say how each kind of method proceeded."""
    compare, trim = made.config.compare, made.config.search.trim
    lines = [
        f"Every plan is repaired alike (compensation {trim.repair.compensation}, "
        f"{trim.repair.calibration_images:,} calibration images), keeps at most its budget and at least "
        f"{1 - compare.budget_tolerance:.0%} of it (marked * where not), and is retrained for "
        f"{compare.retrain_updates:,} updates in all.",
        f"Searches score at most {compare.evaluations:,} distinct plans for each budget; a plan that comes again costs "
        "nothing, one whose score another run left in the store counts all the same, but takes no time. The winner is "
        f"the plan of best reward on the reward images.{_shared_lines(made)}",
        f"Rankings cut at once, each with its own criterion, scope {compare.ranking_scope!r}; *uniform* uses the "
        f"agent's criterion ({trim.repair.criterion}) at the same share of every group.",
        "A seed decides the images drawn for calibration, recalibration and reward, the search and the retraining; "
        "network and splits are the same for all. So an interval holds the luck of those draws, not that of the "
        "network nor of the images in a split.",
        f"{_interval_line(made)} A verdict asks Student's t of the paired differences, too; neither is corrected for "
        "several comparisons.",
        f"The test split was read {_times(made.readings)}, after everything else was decided"
        + (" for the cells that were there." if made.readings > 1 else "."),
    ]
    if POOL in compare.rows:
        lines.append(
            "*pool with a floor* takes, on the selection split right after the cut, the best plan of the heuristics "
            "and the agent; it was chosen by its first figure, so that this, and a little the second, flatter; the "
            "test figure does not. Its evaluations and seconds are those of all its members and of the choice."
        )
    between = [
        method
        for method in compare.methods
        if any(made.figures(method, budget, "before") is None for budget in compare.budgets)
    ]
    if between:
        lines.append(
            f"{_listed([label(m) for m in between])}: trained between cuts, so there is no figure without it, and the "
            "seconds hold that training."
        )
    if "random" in compare.methods and SEARCHES_AT_RANDOM in compare.methods:
        lines.append("*ranking at random* removes channels at random once; *random search* tries random widths.")
    jobs = made.config.jobs
    several = f"; {jobs} ran at the same time" if jobs > 1 else ""
    lines.append(f"Seconds are those of searching or ranking for one budget, without the final retraining{several}.")
    cached = sum(cell.cached for cell in made.cells)
    if cached:
        lines.append(f"{cached:,} scores came from the store, so the seconds of their searches are understated.")
    return lines


def _interval_line(made: Comparison) -> str:
    compare = made.config.compare
    if len(compare.seeds) < ENOUGH_SEEDS:
        return (
            "In brackets: lowest and highest of the paired differences; fewer than "
            f"{ENOUGH_SEEDS} seeds give no interval and no verdict."
        )
    return (
        f"In brackets: {compare.confidence:.0%} bootstrap interval of the mean paired difference over seeds (BCa where "
        "it is defined, else by percentiles); over few seeds it is narrower than it ought to be."
    )


def _shared_lines(made: Comparison) -> str:
    """Say where a search pays for several budgets together; a sentence with a space before it, or nothing."""
    compare = made.config.compare
    if AGENT not in compare.methods or len(compare.budgets) == 1:
        return ""
    return (
        f" An agent that serves the {len(compare.budgets)} budgets with one training may spend the sum, and a little "
        "more on one budget than on another; the table shows its mean."
    )


def markdown(made: Comparison, command: Sequence[str], versions: dict[str, str]) -> str:
    """Return the report's text.

    Args:
        made: What was found.
        command: Program and arguments.
        versions: By package.
    """
    config = made.config
    unit = UNIT_WORDS[_unit(made)]
    lines = [f"# {title(made)}", "", _compared(made), "", "## Reading", ""]
    lines += [f"- {line}" for line in reading(made)]
    for budget in config.compare.budgets:
        lines += ["", f"## {budget:.1%} of the {unit}".replace("%", " %", 1), ""]
        lines += ["Accuracy in percent, mean ± standard deviation over the seeds.", ""]
        lines += markdown_table(HEADERS, table_rows(made, budget))
        if pair_rows(made, budget):
            lines += ["", "Differences in percentage points, with interval and verdict.", ""]
            lines += markdown_table(("pair", *SHORT.values()), pair_rows(made, budget))
    lines += ["", "![accuracy against cost](pareto.png)", ""]
    if searches(made):
        lines += ["## Inside the searches", "", *inside(made), "![search](search.png)", ""]
    lines += ["## How it was compared", "", *(f"- {line}" for line in method_lines(made)), ""]
    splits = ", ".join(f"{name} {count:,}" for name, count in made.examples.items())
    lines += [
        "## To run it again", "", "```", shlex.join(command), "```", "",
        f"Seeds {', '.join(map(str, config.compare.seeds))}; images: {splits} (split seed {config.task.splits.seed}).",
        "", "Versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()) + ".", "",
    ]  # fmt: skip
    return "\n".join(lines)


def _compared(made: Comparison) -> str:
    names = _listed([label(method) for method in made.config.compare.methods])
    return (
        f"Compared: {names}. The original network has {made.whole.params:,} parameters, {made.whole.macs:,} MACs and "
        f"{100 * made.original['test']:.2f} % on the test split."
    )


def searches(made: Comparison) -> list[str]:
    """Return the methods that have a course to draw: the agent, AMC and the controls."""
    return [
        method
        for method in made.config.compare.methods
        if is_search(method) and all(cell.found[0].rewards for cell in made.cells_of(method))
    ]


def inside(made: Comparison) -> list[str]:
    """Return how soon the compared search has the reward that each other one ends with: sentences and a table."""
    subject = made.config.compare.subject
    others = [name for name in searches(made) if name != subject]
    terms = made.config.search.trim.reward
    paid = ", ".join(terms.weights) or f"objective {terms.objective!r}"
    lines = [f"Plans are paid on the reward images ({paid}).", ""]
    if subject not in searches(made) or not others:
        return lines
    rows = []
    for budget in made.config.compare.budgets:
        for other in others:
            pairs = [(own.at(budget), theirs.at(budget))
                     for own, theirs in zip(made.cells_of(subject), made.cells_of(other), strict=True)]  # fmt: skip
            ends = [(own.rewards[-1] or 0.0, theirs.rewards[-1] or 0.0) for own, theirs in pairs]
            after = [own.reached(end) for (own, _), (_, end) in zip(pairs, ends, strict=True)]
            above = sum(own > theirs + rounding(theirs) for own, theirs in ends)
            rows.append(
                (
                    f"{budget:g}", label(other), _mean_of([own for own, _ in ends]), _mean_of([end for _, end in ends]),
                    f"{above} of {len(ends)}", ", ".join("never" if one is None else str(one) for one in after),
                )
            )  # fmt: skip
    name = label(subject)
    headers = ("budget", "other", f"reward of {name}, at the end", "of the other", f"{name} above, seeds",
               f"{name} has the other's after evaluations, by seed")  # fmt: skip
    return [*lines, *markdown_table(headers, rows), ""]


def _mean_of(rewards: Sequence[float]) -> str:
    return f"{fmean(rewards):.4g}"


def _unit(made: Comparison) -> str:
    return made.config.search.trim.budget_unit


def _seeds(made: Comparison) -> str:
    count = len(made.config.compare.seeds)
    return f"{count} seed{'s' * (count != 1)}"


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
