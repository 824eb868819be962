"""A search's three pictures: its course, the widths that each method keeps, accuracy against cost."""

import math
from typing import TYPE_CHECKING, Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from .finalists import Finalist

if TYPE_CHECKING:
    from .search import SearchResult

COLOURS = {
    "original": "#222222",
    "uniform": "#8a8f98",
    "network_trimming": "#d1762a",
    "network_trimming_repaired": "#e3b23c",
    "agent": "#2f6db3",
    "pool": "#6a4fa3",
}


def title(result: "SearchResult") -> str:
    """Name the task and the budget."""
    trim = result.settings.trim
    if trim.budget is None:
        return f"{result.task.name}, at most {100 * trim.reward.accepted_drop:g} points accepted"
    return f"{result.task.name}, budget {trim.budget:.1%} of the {trim.budget_unit}"


def learning_curve(result: "SearchResult") -> Figure:
    """Draw accuracy on the reward images against evaluations, the best so far and the uniform plan."""
    figure, axes = _figure()
    rows = result.history.finished
    if result.settings.trim.budget_range is not None:  # others were paid against other uniform plans
        rows = [row for row in rows if row.budget == result.settings.trim.budget]
    axes.plot(
        [row.evaluation for row in rows],
        [100 * row.accuracy for row in rows],
        ".",
        color="#9db7d5",
        label="plan tried",
        ms=4,
    )
    best, course = float("-inf"), []
    accuracy = 0.0
    for row in rows:
        if (row.reward or 0.0) > best:
            best, accuracy = row.reward or 0.0, row.accuracy
        course.append(100 * accuracy)
    axes.plot([row.evaluation for row in rows], course, color=COLOURS["agent"], label="best so far", lw=2)
    reference = 100 * result.reference_accuracy
    if math.isfinite(reference):
        axes.axhline(reference, color=COLOURS["uniform"], ls="--", label="uniform plan")
    axes.set_xlabel("evaluations (networks cut, repaired and scored)")
    axes.set_ylabel("accuracy on the reward images, %")
    axes.set_title(f"Learning curve: {title(result)}", fontsize=10)
    if course:  # failed plans of the first episodes must not flatten the picture
        floor = min(course[0], reference) if math.isfinite(reference) else course[0]
        axes.set_ylim(bottom=max(0.0, floor - max(5.0, 1.5 * (max(course) - floor))))
    axes.legend(loc="lower right", fontsize=8)
    return figure


def widths(result: "SearchResult") -> Figure:
    """Draw the share of channels that each method keeps, by group."""
    pruned = [finalist for finalist in result.finalists if finalist.schedule]
    names = list(result.schedule.plan.counts)
    whole = result.original_widths
    figure, axes = _figure(width=max(6.4, 0.6 * len(names) + 2))
    thickness = 0.8 / max(1, len(pruned))
    for place, finalist in enumerate(pruned):
        assert finalist.schedule is not None
        counts = finalist.schedule.plan.counts
        shares = [100 * counts.get(name, whole[name]) / whole[name] for name in names]
        offsets = [x - 0.4 + thickness * (place + 0.5) for x in range(len(names))]
        axes.bar(offsets, shares, thickness, color=COLOURS.get(finalist.name, "#555555"), label=finalist.label)
        if len(names) <= 6:
            for x, share, name in zip(offsets, shares, names, strict=True):
                axes.text(x, share + 1, str(counts.get(name, whole[name])), ha="center", fontsize=7)
    axes.set_xticks(range(len(names)), [f"{name}\n({whole[name]})" for name in names], fontsize=8,
                    rotation=0 if len(names) <= 8 else 60)  # fmt: skip
    axes.set_ylabel("channels kept, %")
    axes.set_ylim(0, 112)
    axes.set_title(f"Widths: {title(result)}", fontsize=10)
    axes.legend(fontsize=8, ncols=2)
    return figure


def accuracy_against_cost(result: "SearchResult") -> Figure:
    """Draw test accuracy against MACs of the finished networks."""
    figure, axes = _figure()
    whole = result.finalists[0].cost
    unit = result.settings.trim.budget_unit
    for finalist in result.finalists:
        if finalist.test is None:
            continue
        share = 100 * finalist.cost.of(unit) / whole.of(unit)
        style: dict[str, Any] = {
            "marker": _marker(finalist),
            "color": COLOURS.get(finalist.name, "#555555"),
            "ls": "none",
        }
        axes.plot(share, 100 * finalist.test, ms=9, label=f"{finalist.label}, test", **style)
        if finalist.after_trim is not None:
            axes.plot(share, 100 * finalist.after_trim, ms=7, mfc="none", **style)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:g}"))
    axes.set_xlabel(f"{unit} kept, % of the original")
    axes.set_ylabel("accuracy, %")
    axes.set_title(
        f"Filled: test, after retraining. Hollow: reward images, after the last cut.\n{title(result)}", fontsize=9
    )
    axes.legend(fontsize=8, loc="lower right")
    return figure


def _figure(width: float = 6.4) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, 4.0), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _marker(finalist: Finalist) -> str:
    return {"original": "s", "agent": "o", "pool": "*", "uniform": "D"}.get(finalist.name, "^")
