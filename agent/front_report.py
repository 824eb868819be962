"""A front told to people and programs: the table, `pareto.json`, `pareto.png`, and a schedule file for each budget."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter
from rich import box
from rich.table import Table
from rich.text import Text

from ..pruning.artifact import write_atomically
from .front import DIGITS, Front, FrontPoint
from .pictures import COLOURS
from .pool import AGENT, LABELS, UNIFORM, Candidate, best_of, best_of_each
from .report import markdown_table

SCHEDULES = "schedules"
UNITS = {"macs": "MACs", "params": "parameters"}
LINES = {"apoz": "#d1762a", "taylor_2019": "#3a9d6e", "l1": "#8757a8", **COLOURS}
MARKERS = {AGENT: "o", UNIFORM: "D", "apoz": "^", "taylor_2019": "v", "l1": "s"}


def headers(front: Front) -> list[str]:
    """Return the headers of `table_rows`."""
    retrained = ["best, retrained", "uniform, retrained"] if front.retrain_updates else []
    makers = [LABELS.get(maker, maker) for maker in front.makers]
    return ["budget", f"{UNITS[front.unit]} kept", "best", "plan by", *makers, *retrained]


def table_rows(front: Front) -> list[list[str]]:
    """Return one row per budget, as text; accuracies on the selection split in percent."""
    rows = []
    for point in front.points:
        found = point.taken
        row = [f"{point.budget:.4g}", f"{point.kept:.1%}", _percent(found.selection.accuracy), maker(point)]
        row += [
            _percent(point.makers[name].selection.accuracy) if name in point.makers else "–" for name in front.makers
        ]
        if front.retrain_updates:
            row += [_percent(point.trained[name].accuracy) for name in ("front", UNIFORM)]
        rows.append(row)
    return rows


def maker(point: FrontPoint) -> str:
    """Say whose plan is taken, and for which budget it was made if for a smaller one."""
    earlier = point.taken.budget
    return point.taken.label + (f" ({earlier:.4g})" if earlier is not None and earlier != point.budget else "")


def notes(front: Front) -> list[str]:
    """Return what the figures mean, as sentences."""
    after = "right after the cut and its repair"
    if front.inside:
        after = f"after an episode's cuts and its {front.inside:,} updates"
    lines = [
        f"Accuracies in percent on the {front.images:,} selection images, {after}; the original has "
        f"{_percent(front.original.accuracy)}. The test split was not read.",
        "Each column holds the best plan for this budget and the smaller ones of the table, so that none falls; in "
        "brackets the smaller budget that a plan was made for.",
        "The best were picked on the same images, so their figures are a little too high.",
    ]
    if front.retrain_updates:
        lines.append(
            f"Retrained: the best and the uniform plans after {front.retrain_updates:,} updates each, same images."
        )
    return lines


def election(candidates: Sequence[Candidate]) -> str:
    """Say whose plan is taken of some for one budget, and what the best of the others have."""
    best = best_of(candidates)
    figures = best_of_each((one.label, one) for one in candidates)
    told = ", ".join(f"{label} {_percent(one.selection.accuracy)} %" for label, one in figures.items())
    return f"Taken: a plan by {best.label}; the best of each on the selection split, right after the cut: {told}."


def console_table(front: Front) -> Table:
    """Return the front for the terminal."""
    table = Table(title=Text("Pareto front"), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for header in headers(front):
        table.add_column(header, justify="left" if header == "plan by" else "right")  # many: headers wrap
    for row in table_rows(front):
        table.add_row(*row)
    return table


def schedule_name(budget: float) -> str:
    """Return the file of a budget's schedule, relative to the front's folder."""
    return f"{SCHEDULES}/budget_{budget:.{DIGITS}f}.json"


def write_front(folder: Path, front: Front, title: str, run: str) -> None:
    """Write `pareto.json`, `pareto.png`, `pareto.md` and the schedules.

    Args:
        folder: It exists.
        front: What to write.
        title: Of picture and text.
        run: Folder of the search, as a user would type it.
    """
    (folder / SCHEDULES).mkdir()
    for point in front.points:
        point.schedule.save(folder / schedule_name(point.budget))
    picture(front, title).savefig(folder / "pareto.png")
    example = folder / schedule_name(front.points[-1].budget)
    lines = [
        f"# Pareto front: {title}", "", *markdown_table(headers(front), table_rows(front)), "",
        *(f"- {line}" for line in notes(front)), "", "![front](pareto.png)", "",
        f"Build one: `prunegym apply {run} --schedule {example}`.", "",
    ]  # fmt: skip
    write_atomically(folder / "pareto.md", "\n".join(lines).encode())
    write_atomically(folder / "pareto.json", (json.dumps(figures(front), indent=1) + "\n").encode())


def figures(front: Front) -> dict[str, Any]:
    """Return the front as plain data; accuracies in [0, 1]."""
    return {
        "unit": front.unit,
        "selection_images": front.images,
        "original_accuracy": front.original.accuracy,
        "retrain_updates": front.retrain_updates,
        "test_split_readings": [],
        "points": [
            {
                "budget": point.budget,
                "kept": point.kept,
                "params": point.taken.cost.params,
                "macs": point.taken.cost.macs,
                "made_by": point.taken.made_by,
                "made_for_budget": point.taken.budget,
                "accuracy": point.taken.selection.accuracy,
                "loss": point.taken.selection.loss,
                "makers": {name: one.selection.accuracy for name, one in point.makers.items()},
                "retrained": {name: score.accuracy for name, score in point.trained.items()},
                "widths": point.schedule.plan.counts,
                "schedule": schedule_name(point.budget),
            }
            for point in front.points
        ],
    }


def picture(front: Front, title: str) -> Figure:
    """Draw accuracy on the selection split against the budget, one line for each maker and the front above them."""
    figure = Figure(figsize=(7.0, 4.4), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.axhline(100 * front.original.accuracy, color="#bbbbbb", ls=":", lw=1, label="original")
    for name in front.makers:
        points = [(100 * point.budget, point.makers[name]) for point in front.points if name in point.makers]
        axes.plot(
            [share for share, _ in points], [100 * one.selection.accuracy for _, one in points],
            color=LINES.get(name, "#555555"), marker=MARKERS.get(name, "x"), ms=4, lw=1.2, alpha=0.85,
            label=LABELS.get(name, name),
        )  # fmt: skip
    shares = [100 * point.budget for point in front.points]
    best = [100 * point.taken.selection.accuracy for point in front.points]
    axes.plot(shares, best, color="#222222", lw=4, alpha=0.25, label="best", zorder=1, solid_capstyle="round")
    if front.retrain_updates:
        for name, colour, style in (("front", "#222222", "-"), (UNIFORM, COLOURS[UNIFORM], "--")):
            values = [100 * point.trained[name].accuracy for point in front.points]
            label = "best, retrained" if name == "front" else "uniform, retrained"
            axes.plot(shares, values, style, color=colour, marker="*", ms=7, lw=1.2, label=label)
    axes.set_xscale("log")
    axes.set_xticks(shares if len(shares) <= 8 else shares[:: -(-len(shares) // 8)])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:.3g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(f"{UNITS[front.unit]} that may be kept, % of the original")
    axes.set_ylabel("accuracy on the selection split, %")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, loc="lower right")
    return figure


def _percent(value: float) -> str:
    return f"{100 * value:.2f}"
