"""What a method made, told to people: a row for each round, the finished network beside the original; and for JSON."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from ..pruning.cost import Cost
from ..pruning.heuristics import PlanRecord, Pruned
from ..pruning.task import PruningTask
from .finalists import Finalist
from .methods import Method
from .prune import PruneSettings, published_repair
from .report import markdown_table, short_count

MOST_ROWS = 24
"""Rounds shown on a terminal; of more, some evenly spaced ones."""


def console_table(made: Pruned, whole: Cost) -> Table:
    """Return the rounds for the terminal, at most 80 columns wide."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for header in ("round", "params", "MACs", "cut", "updates", "trained"):
        table.add_column(header, justify="right", no_wrap=True)
    shown = np.unique(np.linspace(0, len(made) - 1, min(len(made), MOST_ROWS)).round().astype(int))
    for place in shown.tolist():
        entry = made[place].built
        table.add_row(
            str(place + 1),
            f"{short_count(entry.cost.params)} {whole.params / entry.cost.params:5.1f}×",
            f"{short_count(entry.cost.macs)} {whole.macs / entry.cost.macs:5.1f}×",
            _percent(entry.after_trim.accuracy),
            f"{entry.updates_taken:,}",
            _percent(entry.after_retraining.accuracy),
        )
    return table


def title(task: PruningTask, settings: PruneSettings, compensation: str) -> str:
    """Name method, task and goal."""
    goals = []
    if settings.budget is not None:
        goals.append(f"budget {100 * settings.budget:.3g} % of the {settings.budget_unit}")
    if settings.accepted_drop is not None:
        goals.append(f"at most {100 * settings.accepted_drop:g} points accepted")
    published = "as published" if compensation == published_repair(settings) else "not the published one"
    return f"{settings.method} on {task.name}, {', '.join(goals)}; repair {compensation} ({published})"


def ending(made: Pruned, settings: PruneSettings, whole: Cost) -> str:
    """Say in one sentence why the method ended, and where a budget was not met."""
    reason = {
        "budget": "the budget is met",
        "accuracy": "another round would have lost more than accepted",
        "rounds": "all rounds that were allowed are made",
        "rule": "no further channel may leave",
        "search": "the learner's evaluations are spent",
    }[made.stopped_by]
    forced = "; in the last round the method's own rule gave way, to reach the budget" if made.forced else ""
    unit = settings.budget_unit
    share = made[-1].built.cost.of(unit) / whole.of(unit)
    missed = ""
    if settings.budget is not None and share > settings.budget:
        missed = (
            f"; the budget is NOT met: {100 * share:.3g} % of the {unit} are left instead of "
            f"{100 * settings.budget:.3g} %"
        )
    return f"{len(made)} round{'s' * (len(made) > 1)}: {reason}{forced}{missed}."


def finish_lines(finalists: Sequence[Finalist]) -> list[str]:
    """Return one sentence for the finished network and one for the original."""
    original, pruned = finalists[0], finalists[-1]
    fewer = f"{original.cost.params / pruned.cost.params:.2f}× fewer parameters"
    macs = f"{original.cost.macs / pruned.cost.macs:.2f}× fewer MACs"
    return [
        f"Finished network: {pruned.cost.params:,} parameters ({fewer}), {pruned.cost.macs:,} MACs ({macs}); selection "
        f"{_percent(pruned.selection.accuracy)} %, test {_percent(pruned.test)} %.",
        f"Original: {original.cost.params:,} parameters, {original.cost.macs:,} MACs; selection "
        f"{_percent(original.selection.accuracy)} %, test {_percent(original.test)} %.",
    ]


def markdown(
    task: PruningTask, method: Method, settings: PruneSettings, made: Pruned, finalists: Sequence[Finalist]
) -> str:
    """Return the report's text."""
    compensation = made.schedule.repair.compensation
    headers, rows = round_rows(made, finalists[0].cost)
    return "\n".join(
        [
            f"# {title(task, settings, compensation)}",
            "",
            f"{method.name}: {method.description} ({method.source}).",
            "",
            *markdown_table(headers, rows),
            "",
            ending(made, settings, finalists[0].cost),
            *finish_lines(finalists),
            "",
            f"- *after the cut*, *after training*: accuracy on the reward images, in percent ({len(task.reward):,} in "
            "the split), before and after the training that follows the cut.",
            f"- *selection*: {len(task.selection):,} images; *test*: {len(task.test):,} images, read once, after "
            "everything was decided.",
            f"- Replay: `prunegym apply <this folder>`; seed {settings.seed}.",
            "",
        ]
    )


def round_rows(made: Pruned, whole: Cost) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return headers and one row of text for each round; widths of the groups that were cut, mean APoZ if watched."""
    cut = [name for name, width in made.schedule.plan.counts.items() if width < made.widths[name]]
    shown = cut if len(cut) <= 6 else []
    watched = tuple(made.mean_apoz[0]) if made.mean_apoz else ()
    headers = (
        "round", *(("widths " + ", ".join(shown),) if shown else ()), "parameters", "fewer", "MACs", "fewer",
        "after the cut", "updates", "after training",
        *(f"APoZ {name}, before → after" for name in watched),
    )  # fmt: skip
    rows = []
    for place, record in enumerate(made):
        entry = record.built
        rows.append(
            (
                str(place + 1),
                *(("-".join(str(entry.widths[name]) for name in shown),) if shown else ()),
                f"{entry.cost.params:,}", f"{whole.params / entry.cost.params:.2f}×",
                f"{entry.cost.macs:,}", f"{whole.macs / entry.cost.macs:.2f}×",
                _percent(entry.after_trim.accuracy), f"{entry.updates_taken:,}",
                _percent(entry.after_retraining.accuracy),
                *(f"{made.mean_apoz[place][name]:.3f} → {made.mean_apoz[place + 1][name]:.3f}" for name in watched),
            )
        )  # fmt: skip
    return headers, rows


def results(
    task: PruningTask, method: Method, settings: PruneSettings, made: Pruned, finalists: Sequence[Finalist]
) -> dict[str, Any]:
    """Return everything as plain data."""
    return {
        "task": task.name,
        "method": method.name,
        "source": method.source,
        "budget": settings.budget,
        "budget_unit": settings.budget_unit,
        "accepted_drop": settings.accepted_drop,
        "seed": settings.seed,
        "settings": dataclasses.asdict(settings),
        "stopped_by": made.stopped_by,
        "plans": [_plain(record) for record in made],
        "mean_apoz": list(made.mean_apoz),
        "test_split_readings": list(task.test.readings),
        "finalists": [finalist.to_dict(finalists[0].cost) for finalist in finalists],
    }


def _plain(record: PlanRecord) -> dict[str, Any]:
    return {
        "provenance": dataclasses.asdict(record.provenance),
        "widths": record.plan.counts,
        "params": record.built.cost.params,
        "macs": record.built.cost.macs,
        "accuracy_after_trim": record.built.after_trim.accuracy,
        "accuracy_after_retraining": record.built.after_retraining.accuracy,
    }


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f}"
