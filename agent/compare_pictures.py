"""The two pictures of a comparison: accuracy against cost, and the course of the searches."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from .compare import Comparison
from .compare_report import UNIT_WORDS, label, searches, title
from .compare_settings import AGENT, POOL, UNIFORM

COLOURS = {AGENT: "#2f6db3", UNIFORM: "#8a8f98", POOL: "#222222"}
OTHERS = ("#d1762a", "#3a9d6e", "#8757a8", "#c2405b", "#e3b23c", "#4fb3bf", "#7a5230", "#b07aa1")
MARKERS = "osD^vP*Xh<>p"


def write_pictures(folder: Path, made: Comparison) -> None:
    """Write `pareto.png` and, where a search took part, `search.png`."""
    pareto(made).savefig(folder / "pareto.png")
    if searches(made):
        search_courses(made).savefig(folder / "search.png")


def pareto(made: Comparison) -> Figure:
    """Draw accuracy on the selection split against the share of the cost kept, before and after retraining."""
    stages = {"before": "right after the cut", "after": "after equal retraining"}
    methods, smallest = made.config.compare.rows, min(made.config.compare.budgets)
    unit = UNIT_WORDS[made.config.search.trim.budget_unit]
    figure = Figure(figsize=(11.0, 4.6), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    lines: dict[str, Artist] = {}
    for axes, (stage, words) in zip(figure.subplots(1, 2), stages.items(), strict=True):
        axes.axhline(100 * made.original[stage], color="#bbbbbb", ls=":", lw=1)
        for place, method in enumerate(methods):
            points = sorted(
                (100 * fmean(cell.at(budget).kept for cell in made.cells_of(method)), figures)
                for budget in made.config.compare.budgets
                if (figures := made.figures(method, budget, stage)) is not None
            )
            if not points:
                continue
            lines[label(method)] = axes.errorbar(
                [share + _aside(place, len(methods), smallest) for share, _ in points],
                [fmean(figures) for _, figures in points],
                yerr=[_deviation(figures) for _, figures in points],
                marker=MARKERS[place % len(MARKERS)], ms=7 if method == AGENT else 5, lw=2 if method == AGENT else 1,
                capsize=2, color=colour(method, methods), label=label(method), zorder=3 if method == AGENT else 2,
            )  # fmt: skip
        _plain(axes)
        axes.set_xlabel(f"{unit} kept, % of the original")
        axes.set_ylabel("accuracy on the selection split, %")
        axes.set_title(words, fontsize=10)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:g}"))
    figure.legend(list(lines.values()), list(lines), loc="outside lower center", ncols=5, fontsize=8)
    figure.suptitle(f"{title(made)}\nmean over seeds, bars: ± one standard deviation", fontsize=9)
    return figure


def search_courses(made: Comparison) -> Figure:
    """Draw, for each budget, the reward of the best plan so far against evaluations, mean over seeds."""
    budgets, methods = made.config.compare.budgets, searches(made)
    figure = Figure(figsize=(max(5.5, 4.2 * len(budgets)), 4.0), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(1, len(budgets), squeeze=False)[0]
    for axes, budget in zip(grid, budgets, strict=True):
        ends, starts = [], []
        for method in methods:
            course = mean_course([cell.at(budget).rewards for cell in made.cells_of(method)])
            axes.plot(
                range(1, len(course) + 1), course, lw=2 if method == AGENT else 1.4,
                color=colour(method, made.config.compare.rows), label=label(method),
            )  # fmt: skip
            known = [value for value in course if value == value]
            ends += known[-1:]
            starts += known[len(known) // 10 : len(known) // 10 + 1]
        if ends:  # the first plans, which are poor, must not flatten the picture
            room = (max(ends) - min(starts)) or abs(max(ends)) or 1.0
            axes.set_ylim(min(starts) - 0.1 * room, max(ends) + 0.2 * room)
        _plain(axes)
        axes.set_xlabel("evaluations (distinct plans scored)")
        axes.set_ylabel("best reward so far")
        axes.set_title(f"budget {budget:g}", fontsize=10)
    grid[-1].legend(fontsize=8, loc="lower right")
    figure.suptitle(f"Searches, mean over seeds: {made.task}", fontsize=9)
    return figure


def mean_course(courses: Sequence[Sequence[float | None]]) -> list[float]:
    """Return the mean of several courses; one that ended earlier keeps its last value.

    NaN stands where a course has no finished plan yet.
    """
    length = max(map(len, courses), default=0)
    result = []
    for place in range(length):
        values = [course[min(place, len(course) - 1)] for course in courses if course]
        known = [value for value in values if value is not None]
        result.append(fmean(known) if len(known) == len(values) else float("nan"))
    return result


def colour(method: str, methods: Sequence[str]) -> str:
    """Return the same colour for a method in both pictures."""
    others = [name for name in methods if name not in COLOURS]
    return COLOURS.get(method) or OTHERS[others.index(method) % len(OTHERS)]


def _deviation(figures: Sequence[float]) -> float:
    return stdev(figures) if len(figures) > 1 else 0.0


def _aside(place: int, count: int, smallest: float) -> float:
    """Return by how much a method's points are moved sideways, in points of the axis, so that bars do not overlap.

    Neighbours are 0.4 % of the smallest budget apart, which no one takes for another cost.
    """
    return 0.4 * smallest * (place - (count - 1) / 2)


def _plain(axes: Axes) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
