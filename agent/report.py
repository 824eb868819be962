"""A search told to people: the table, the verdict, three pictures, and what the figures mean."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich import box
from rich.table import Table
from rich.text import Text

from .finalists import verdict_sentence
from .pictures import accuracy_against_cost, learning_curve, title, widths
from .pool import LABELS, range_sentence

if TYPE_CHECKING:
    from .search import SearchResult


def headers(result: "SearchResult") -> tuple[str, ...]:
    """Return the headers of `table_rows`."""
    timed = (f"ms, batch {latency.batch}" for latency in result.finalists[0].latencies)
    return (
        "network", "parameters", "fewer", "MACs", "fewer", *timed, "retraining", "after the cut", "selection", "test",
    )  # fmt: skip


def table_rows(result: "SearchResult") -> list[tuple[str, ...]]:
    """Return the comparison, one row per network, as text; accuracies in percent."""
    whole = result.finalists[0].cost
    return [
        (
            finalist.label,
            f"{finalist.cost.params:,}",
            f"{whole.params / finalist.cost.params:.2f}×",
            f"{finalist.cost.macs:,}",
            f"{whole.macs / finalist.cost.macs:.2f}×",
            *(f"{latency.median_ms:.3g}" for latency in finalist.latencies),
            f"{finalist.updates_taken:,}" if finalist.schedule else "–",
            _percent(finalist.after_trim),
            _percent(finalist.selection.accuracy),
            _percent(finalist.test),
        )
        for finalist in result.finalists
    ]


def console_table(result: "SearchResult") -> Table:
    """Return the comparison for the terminal, at most 80 columns wide."""
    table = Table(
        title=Text(title(result)), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False
    )
    whole = result.finalists[0].cost
    table.add_column("network", no_wrap=True)
    for header in ("params", "MACs", "cut", "select", "test"):
        table.add_column(header, justify="right", no_wrap=True)
    for finalist in result.finalists:
        cost = finalist.cost
        table.add_row(
            finalist.label,
            f"{short_count(cost.params)} {whole.params / cost.params:5.1f}×",
            f"{short_count(cost.macs)} {whole.macs / cost.macs:5.1f}×",
            _percent(finalist.after_trim),
            _percent(finalist.selection.accuracy),
            _percent(finalist.test),
            style="bold" if finalist is result.finalists[-1] else None,
        )
    return table


def verdict_lines(result: "SearchResult") -> list[str]:
    """Return one sentence per heuristic."""
    labels = {finalist.name: finalist.label for finalist in result.finalists}
    lines = [verdict_sentence(verdict, labels) for verdict in result.verdicts]
    return [line[0].upper() + line[1:] for line in lines]


def updates_line(result: "SearchResult") -> str:
    """Say whether all pruned networks got the same number of retraining updates."""
    pruned = [finalist for finalist in result.finalists if finalist.schedule]
    where = f"on {len(result.task.train):,} training images"
    if len({finalist.updates_taken for finalist in pruned}) == 1:
        return f"Every pruned network got the same number of retraining updates (column *retraining*), {where}."
    asked = {finalist.schedule.retrain_updates for finalist in pruned if finalist.schedule}
    allowed = f", though all were allowed {asked.pop():,}" if len(asked) == 1 else ""
    return (
        f"The pruned networks did not take the same number of retraining updates{allowed}; the column *retraining* "
        f"counts those taken, {where}."
    )


def training_lines(result: "SearchResult") -> list[str]:
    """Return one sentence for each training that did not simply run to its end and keep its last weights."""
    lines = []
    for finalist in result.finalists:
        for place, entry in enumerate(finalist.rounds):
            done, asked = entry.training, entry.retrain_updates
            if done is None:
                continue
            label = finalist.label if len(finalist.rounds) == 1 else f"{finalist.label}, round {place + 1}"
            kept = f"the weights of update {done.best_update:,} were kept" + (
                "" if math.isnan(done.best_accuracy) else f" ({_percent(done.best_accuracy)} % on the selection images)"
            )
            if finalist.schedule and done.learning_rate < finalist.schedule.retraining.learning_rate:
                lines.append(
                    f"{label}: training diverged and began again at the learning rate {done.learning_rate:g}, "
                    f"{done.updates:,} updates in all where {asked:,} were asked for; {kept}."
                )
            elif done.stopped_early:
                lines.append(f"{label}: training stopped early, after {done.updates:,} of {asked:,} updates; {kept}.")
            elif done.best_update < asked:
                lines.append(f"{label}: training ran for all {asked:,} updates; {kept}.")
    return lines


def note_lines(result: "SearchResult") -> list[str]:
    """Return the remarks on single networks, as sentences."""
    return [f"{finalist.label}: {finalist.note}." for finalist in result.finalists if finalist.note]


def choice_lines(result: "SearchResult") -> list[str]:
    """Say whose plan was built, and what the best of the others had; for a range of budgets, which one was built."""
    trim, lines = result.settings.trim, []
    if trim.budget_range is not None:
        lines.append(range_sentence(trim))
    own = max((score.accuracy for _, score in result.candidates), default=None)
    theirs = {one.label: one.selection.accuracy for one in result.rivals}
    figures = [f"the agent's best {_percent(own)} %"] if own is not None else []
    figures += [f"{label}'s {_percent(accuracy)} %" for label, accuracy in theirs.items()]
    if theirs:
        whose = LABELS.get(result.schedule.made_by, result.schedule.made_by)
        who = "the agent's" if whose == "agent" else f"{whose}'s"
        level = [own, *theirs.values()].count(max([own or 0.0, *theirs.values()])) > 1
        lines.append(
            f"The plan that was built is {who}: on the selection split, right after the cut, {_and(figures)}"
            + (" (of equals the one of lower loss)." if level else ".")
        )
    elif own is not None:
        lines.append(
            f"The best of the agent's plans on the selection split was built: {_percent(own)} % after the cut."
        )
    return lines


def latency_lines(result: "SearchResult") -> list[str]:
    """Return one sentence on the measured time of a forward pass, beside the MACs; none if nothing was timed."""
    original, agent = result.finalists[0], result.finalists[-1]
    passes = [
        f"{before.median_ms:.3g} → {after.median_ms:.3g} ms ({before.median_ms / after.median_ms:.1f}×) at batch "
        f"{before.batch}"
        for before, after in zip(original.latencies, agent.latencies, strict=True)
    ]
    if not passes:
        return []
    device, threads = next(agent.network.parameters()).device.type, torch.get_num_threads()
    fewer = original.cost.macs / agent.cost.macs
    whose = "agent's" if agent.name == "agent" else "pruned"
    return [
        f"Forward pass of the {whose} network against the original's, median on this machine ({device}, {threads} "
        f"thread{'s' * (threads > 1)}): {', '.join(passes)}, with {fewer:.1f}× fewer MACs."
    ]


def write_report(folder: Path, result: "SearchResult") -> None:
    """Write `report.md` and its pictures into `folder`."""
    learning_curve(result).savefig(folder / "learning_curve.png")
    widths(result).savefig(folder / "widths.png")
    accuracy_against_cost(result).savefig(folder / "accuracy_cost.png")
    (folder / "report.md").write_text(markdown(result))


def markdown(result: "SearchResult") -> str:
    """Return the report's text."""
    task, trim = result.task, result.settings.trim
    rows = table_rows(result)
    evaluations = result.history.spent
    choice = (
        f"{len(result.candidates)} of its best plans were scored again on the selection split."
        if result.candidates
        else "no plan of its was scored before it ended, so a heuristic's is built."
    )
    replay = (
        "Replay: `prunegym apply <this folder>` rebuilds the network from `schedule.json` (edit it, and it builds what "
        "you wrote). Load: `prunegym.load_pruned(<this folder>)`."
        if result.task.source
        else "Load: `prunegym.load_pruned(<this folder>, network)`, where `network` is the original architecture."
    )
    lines = [
        f"# {title(result)}",
        "",
        *markdown_table(headers(result), rows),
        "",
        *verdict_lines(result),
        "",
        *(f"- {line}" for line in latency_lines(result)),
        f"- *after the cut*: accuracy on {_reward_images(result):,} reward images after the last cut and its repair, "
        "before the training that follows it.",
        f"- *selection*: accuracy on {len(task.selection):,} selection images after all retraining.",
        f"- *test*: accuracy on {len(task.test):,} test images, read {_times(len(task.test.readings))}, "
        "after everything else was decided.",
        f"- {updates_line(result)}",
        *(f"- {line}" for line in training_lines(result)),
        f"- The agent spent {evaluations} of {result.settings.max_evaluations} evaluations (stopped by "
        f"{result.stopped_by}); " + choice,
        *(f"- {line}" for line in choice_lines(result)),
        f"- Repair inside the search: {trim.repair.compensation}; criterion: {trim.repair.criterion}; "
        f"seed {result.settings.seed}. *Network Trimming (NT)* is the published method, without repair; "
        "*NT, repaired* is the same with the agent's repair after each cut.",
        "- One run has one seed: the test in the verdicts covers the choice of test images, not training noise, and is "
        "not corrected for several comparisons.",
        *(f"- {line}" for line in note_lines(result)),
        "",
        "![learning curve](learning_curve.png)",
        "",
        "![widths](widths.png)",
        "",
        "![accuracy against cost](accuracy_cost.png)",
        "",
        replay,
        "",
    ]
    return "\n".join(lines)


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a Markdown table, numbers to the right."""
    return [
        "| " + " | ".join(headers) + " |",
        "|" + "|".join("---" if place == 0 else "--:" for place in range(len(headers))) + "|",
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def _reward_images(result: "SearchResult") -> int:
    return min(result.settings.trim.repair.reward_images or len(result.task.reward), len(result.task.reward))


def short_count(count: float) -> str:
    """Write a count with three or four digits and its magnitude, e.g. "25.40k"."""
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.{1 if count >= 100 * size else 2}f}{unit}"
    return f"{count:.0f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f}"


def _and(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
