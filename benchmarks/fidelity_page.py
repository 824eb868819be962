"""The page of `benchmarks/fidelity.py`: rank correlations of scores with the truth, what they say, and the picture."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from prunegym.agent.report import markdown_table

SCALES = (0.2, 0.5, 1.0)
"""Actions of a random plan are uniform in [-scale, scale]; those of a narrow draw stay near the uniform plan."""
ITEMS = {
    "delete": "cut",
    "recalibration": "cut, batch norm recalibrated",
    "least_squares": "least squares, recalibrated",
}
"""What is scored without training, and how the page calls it."""
TRUTH, AGAIN = "truth", "truth again"
REFERENCE = ("least_squares", "accuracy")
"""The score that the others are compared with."""
MEASURES = {"accuracy": 1, "loss": -1, "divergence": -1, "params": 1, "selection": 1}
"""Figure of an item -> 1 where more of it is better, else -1."""
WORDS = {"accuracy": "accuracy", "loss": "loss", "divergence": "divergence from the original"}
COLOURS = ("#2f6db3", "#d1762a", "#8a8f98")
RESAMPLES = 1000

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Line:
    """One item of one plan.

    Attributes:
        plan: Number; 0 is the uniform plan, -1 the original network.
        item: A name from `ITEMS`, a number of updates, `TRUTH`, or `AGAIN` (with another seed).
        accuracy: On the reward images, in [0, 1].
        loss: On the reward images, in nats.
        divergence: Mean KL divergence of the outputs from the original's on the reward images, in nats.
        seconds: Processor time of the cut, repair, training and scoring.
        selection: Accuracy on the selection split, in [0, 1]; None where that was not asked for.
        widths: Channels that stay in each group.
        params: Parameters of the cut network.
    """

    plan: int
    item: str
    accuracy: float
    loss: float
    divergence: float
    seconds: float
    selection: float | None = None
    widths: tuple[int, ...] = ()
    params: int = 0


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """For people."""
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True)
class Agreement:
    """How well one score ranks plans as the truth does.

    Attributes:
        item: What is scored.
        measure: Which figure of it.
        plans: Number of plans.
        spearman: Rank correlation.
        kendall: Tau-b.
        better_half: Spearman within the plans whose truth is at least the median.
        gain: Spearman minus that of `REFERENCE`, over the same plans.
        regret: Truth of the best plan minus that of the one ranked first, in [0, 1].
        seconds: Median time of one evaluation.
    """

    item: str
    measure: str
    plans: int
    spearman: Estimate
    kendall: Estimate
    better_half: Estimate
    gain: Estimate
    regret: float
    seconds: float


@dataclass(frozen=True)
class Noise:
    """How well the truth repeats itself with another seed.

    Attributes:
        pairs: Plans that were retrained twice.
        spearman: Between the two.
        deviation: Standard deviation of one truth, as accuracy.
        ceiling: Pearson's correlation with the truth that a score without error would have, as far as the seed of
            the training is concerned; the luck of the images is not in it.
        ceiling_of_better_half: The same within the better half.
    """

    pairs: int
    spearman: Estimate
    deviation: float
    ceiling: float
    ceiling_of_better_half: float


@dataclass(frozen=True)
class Study:
    """All that the page says; accuracies in [0, 1].

    Attributes:
        agreements: One for each score.
        noise: Of the truth; None where fewer than three plans were retrained twice.
        truth: Of each plan.
        uniform: Truth of the uniform plan.
        original: Accuracy of the original network on the selection split.
    """

    agreements: list[Agreement]
    noise: Noise | None
    truth: list[float]
    uniform: float
    original: float


def spearman(one: Values, other: Values) -> float:
    """Return the rank correlation of (n,) values; nan where one of them is constant."""
    return _cosine(_order(one).sum(1), _order(other).sum(1))  # sums over pairs are ranks, centred, of ties the mean


def kendall(one: Values, other: Values) -> float:
    """Return Kendall's tau-b of (n,) values; nan where one of them is constant."""
    return _cosine(_order(one).ravel(), _order(other).ravel())


def _order(values: Values) -> Values:
    """Return (n, n) which of two values is greater, as -1, 0 or 1; SciPy takes too long for thousands of resamples."""
    return np.sign(values[:, None] - values)


def _cosine(one: Values, other: Values) -> float:
    norm = math.sqrt(float(one @ one) * float(other @ other))
    return float(one @ other) / norm if norm else math.nan


def bootstrap(statistic: Callable[[NDArray[np.int64]], float], count: int) -> Estimate:
    """Estimate a statistic of plans with a percentile interval; equal counts give equal resamples.

    Args:
        statistic: Of the plans at the given places, which may repeat; nan is left out.
        count: Number of plans.
    """
    generator = np.random.default_rng(0)
    found = np.array([statistic(generator.integers(count, size=count)) for _ in range(RESAMPLES)])
    found = found[np.isfinite(found)]
    low, high = np.percentile(found, (2.5, 97.5)) if len(found) else (math.nan, math.nan)
    return Estimate(statistic(np.arange(count)), float(low), float(high))


def correlated(measure: Callable[[Values, Values], float], one: Values, truth: Values) -> Estimate:
    """Estimate a rank correlation over plans, see `bootstrap`."""
    return bootstrap(lambda places: measure(one[places], truth[places]), len(truth))


def difference(one: Values, other: Values, truth: Values) -> Estimate:
    """Estimate by how much one score's Spearman correlation with the truth exceeds another's, over the same plans."""
    return bootstrap(
        lambda places: spearman(one[places], truth[places]) - spearman(other[places], truth[places]), len(truth)
    )


def regret(values: Values, truth: Values) -> float:
    """Return how much worse than the best plan the one is that a score ranks first; of equal ones the mean."""
    return float(truth.max() - truth[values == values.max()].mean())


def read(lines: Sequence[Line], item: str, measure: str) -> dict[int, float]:
    """Return plan -> a score of which more is better, for the plans that have it."""
    return {
        line.plan: MEASURES[measure] * float(getattr(line, measure))
        for line in lines
        if line.item == item and getattr(line, measure) is not None
    }


def paired(one: Mapping[int, float], *others: Mapping[int, float]) -> list[Values]:
    """Return the values of the plans that are in all, in the same order."""
    plans = sorted(set(one).intersection(*others))
    return [np.array([values[plan] for plan in plans]) for values in (one, *others)]


def study(lines: Sequence[Line], short: Sequence[int]) -> Study:
    """Compare all scores with the truth.

    Args:
        lines: All figures; a score that fewer than four plans have is left out.
        short: Updates of the short trainings.
    """
    truth = read(lines, TRUTH, "selection")
    reference = read(lines, *REFERENCE)
    agreements = []
    for item in (*ITEMS, *map(str, short), TRUTH):
        for measure in ("accuracy", "loss", "divergence", *(["params"] if item == REFERENCE[0] else [])):
            scores = read(lines, item, measure)
            values, others, targets = paired(scores, reference, truth)
            if len(values) < 4:
                continue
            better = targets >= np.median(targets)
            seconds = [line.seconds for line in lines if line.item == item]
            agreements.append(
                Agreement(
                    item=item,
                    measure=measure,
                    plans=len(values),
                    spearman=correlated(spearman, values, targets),
                    kendall=correlated(kendall, values, targets),
                    better_half=correlated(spearman, values[better], targets[better]),
                    gain=difference(values, others, targets),
                    regret=regret(values, targets),
                    seconds=0.0 if measure == "params" else float(np.median(seconds)),
                )
            )
    first, second = paired(truth, read(lines, AGAIN, "selection"))
    accuracies = np.array(list(truth.values()))
    original = next((line for line in lines if line.item == "original"), None)
    return Study(
        agreements=agreements,
        noise=noise(first, second, accuracies) if len(first) > 2 else None,
        truth=accuracies.tolist(),
        uniform=truth.get(0, math.nan),
        original=math.nan if original is None or original.selection is None else original.selection,
    )


def noise(first: Values, second: Values, truth: Values) -> Noise:
    """Say how well the truth repeats itself.

    A common shift between the seeds does no harm to ranks: the noise is the spread of the differences. Of the
    variance of the truth, the share that is no noise is its reliability; a score that knew each plan's expected
    accuracy would correlate with the truth by its square root.

    Args:
        first: (pairs,) accuracy with one seed.
        second: (pairs,) with another.
        truth: (plans,) of all plans, one seed.
    """
    variance = float(np.var(first - second, ddof=1) / 2)
    better = truth[truth >= np.median(truth)]
    shares = [max(0.0, 1 - variance / max(float(np.var(part, ddof=1)), 1e-12)) for part in (truth, better)]
    return Noise(
        pairs=len(first),
        spearman=correlated(spearman, first, second),
        deviation=math.sqrt(variance),
        ceiling=math.sqrt(shares[0]),
        ceiling_of_better_half=math.sqrt(shares[1]),
    )


def recommended(lines: Sequence[Line], rows: Sequence[Agreement]) -> tuple[Agreement, Agreement]:
    """Return the score that correlates best, and the cheapest that is not worse than it beyond chance."""
    best = max(rows, key=lambda row: row.spearman.value)
    truth, leading = read(lines, TRUTH, "selection"), read(lines, best.item, best.measure)
    for row in sorted(rows, key=lambda row: (row.seconds, -row.spearman.value)):
        values, others, targets = paired(read(lines, row.item, row.measure), leading, truth)
        if difference(values, others, targets).high >= 0:
            return best, row
    return best, best


def called(item: str, measure: str) -> str:
    """Return what the page calls a score."""
    if measure == "params":
        return "number of parameters (no data)"
    if item == TRUTH:
        return f"full retraining, {WORDS[measure]} on reward images"
    done = ITEMS.get(item) or f"least squares, {item} updates"
    return f"{done}: {WORDS[measure]}"


def page(found: Study, lines: Sequence[Line], header: Mapping[str, Any]) -> list[str]:
    """Return the page's text, without the command."""
    rows = [row for row in found.agreements if _is_shown(row)]
    cells = [
        (
            called(row.item, row.measure), str(row.plans), str(row.spearman), str(row.kendall), str(row.better_half),
            f"{100 * row.regret:.1f}", f"{row.seconds:.1f}",
        )
        for row in rows
    ]  # fmt: skip
    others: dict[str, dict[str, str]] = {}
    for row in found.agreements:
        if row.measure in WORDS and row.item != TRUTH:
            others.setdefault(row.item, {})[row.measure] = f"{row.spearman.value:.2f}"
    truth = 100 * np.array(found.truth)
    unit = "MACs" if header["unit"] == "macs" else "parameters"
    length = f"{header['updates']} updates" if header["updates"] else f"{header['epochs']:g} epochs"
    return [
        f"# Which score ranks plans as full retraining does: {header['name']}",
        "",
        f"{len(truth)} plans at {header['budget']:.0%} of the {unit}: the uniform one, and random ones by the score "
        f"action with actions uniform in ±{', ±'.join(f'{scale:g}' for scale in SCALES)}; channels by the criterion "
        "least_squares. Truth: accuracy on the selection split after least squares, recalibration and "
        f"{length} of retraining (batch {header['batch_size']}, rate {header['learning_rate']:g}, distillation "
        f"{header['distillation']:g}), one seed. It lies between {truth.min():.1f} and {truth.max():.1f} % "
        f"(mean {truth.mean():.1f}, standard deviation {truth.std(ddof=1):.2f} points); the uniform plan has "
        f"{100 * found.uniform:.1f}, the original network {100 * found.original:.1f}. Scores are taken on the reward "
        "images in bfloat16, the truth in float32; the test split is not touched.",
        "",
        "Brackets: 95 % bootstrap intervals over plans. *Better half*: Spearman within the half of the plans with the "
        "higher truth, where a search ends. *Regret*: truth of the best plan minus that of the plan the score ranks "
        f"first, in points; a plan drawn blindly has {truth.max() - truth.mean():.1f}. *Seconds*: processor time of "
        "one evaluation on one thread, the median; short trainings without the original's outputs, which were worked "
        "out once for all plans.",
        "",
        "![scores against the truth](fidelity.png)",
        "",
        *markdown_table(("score", "plans", "Spearman", "Kendall", "better half", "regret", "seconds"), cells),
        "",
        "Spearman of every figure that one scoring gives:",
        "",
        *markdown_table(
            ("after", *(WORDS[measure] for measure in WORDS)),
            [
                (ITEMS.get(item) or f"least squares, {item} updates", *(known.get(measure, "") for measure in WORDS))
                for item, known in others.items()
            ],
        ),
        "",
        "What the figures say:",
        "",
        *(f"- {sentence}" for sentence in sentences(found, lines)),
        "",
    ]


def sentences(found: Study, lines: Sequence[Line]) -> Iterator[str]:
    """Yield what the figures say, one sentence or two at a time."""
    rows = {(row.item, row.measure): row for row in found.agreements}
    searched = [row for row in found.agreements if row.item != TRUTH and row.measure in WORDS]
    untrained = [row for row in searched if row.item in ITEMS]
    best, cheapest = recommended(lines, searched)
    reference = rows.get(REFERENCE)
    if reference:
        yield (
            f"The search's own score ({called(*REFERENCE)}) ranks with {reference.spearman}, its first plan is "
            f"{100 * reference.regret:.1f} points below the best."
        )
    leader = max(untrained, key=lambda row: row.spearman.value)
    yield (
        f"Without training {called(leader.item, leader.measure)} ranks best, {leader.spearman}"
        f"{_beside_reference(leader)}."
    )
    for row in found.agreements:
        if row.item.isdigit() and row.measure == "accuracy":
            times = row.seconds / max(reference.seconds if reference else row.seconds, 1e-9)
            yield f"{row.item} updates: {row.spearman}{_beside_reference(row)}, at {times:.0f} times its time."
    yield (
        f"Highest of all: {called(best.item, best.measure)}, {best.spearman}. The cheapest that is not worse beyond "
        f"chance: {called(cheapest.item, cheapest.measure)}, {cheapest.spearman}, {cheapest.seconds:.1f} s."
    )
    if found.noise:
        yield (
            f"Noise ceiling: {found.noise.pairs} plans retrained with a second seed rank with {found.noise.spearman} "
            f"among themselves. The truth of one seed deviates by {100 * found.noise.deviation:.2f} points (standard "
            f"deviation); by that alone a score without error would correlate with it (Pearson) to "
            f"{found.noise.ceiling:.2f} over all plans, {found.noise.ceiling_of_better_half:.2f} in the better half. "
            "The luck of the selection images, which is larger, comes on top; a plan far off the others raises the "
            "first figure."
        )
    same = rows.get((TRUTH, "accuracy"))
    if same:
        yield f"The same retrained networks on the reward images instead of the selection split: {same.spearman}."
    yield (
        f"{len(found.truth)} random plans of one network at one budget, fewer updates than a long retraining: a "
        "difference whose interval holds 0 says nothing."
    )


def _beside_reference(row: Agreement) -> str:
    """Return how a score's correlation differs from the reference's, to be put behind its own; "" for itself."""
    if (row.item, row.measure) == REFERENCE:
        return ", the search's own"
    beyond = "beyond chance" if row.gain.low > 0 or row.gain.high < 0 else "not beyond chance"
    return f" ({row.gain.value:+.2f} against the search's own, {row.gain.low:+.2f} to {row.gain.high:+.2f}: {beyond})"


def _is_shown(row: Agreement) -> bool:
    return row.measure in ("accuracy", "params") or row.item == REFERENCE[0]


def picture(found: Study, lines: Sequence[Line]) -> Figure:
    """Draw every score of the first table against the truth; colours say how wide plans were drawn."""
    rows = [row for row in found.agreements if _is_shown(row) and row.item != TRUTH and row.measure in WORDS]
    columns = 4
    height = -(-len(rows) // columns)
    figure = Figure(figsize=(3.2 * columns, 3.0 * height), layout="constrained")
    FigureCanvasAgg(figure)
    truth = read(lines, TRUTH, "selection")
    for place, row in enumerate(rows):
        axes = figure.add_subplot(height, columns, place + 1)
        scores, factor = read(lines, row.item, row.measure), 100 if row.measure == "accuracy" else MEASURES[row.measure]
        plans = sorted(set(scores) & set(truth))
        for scale, colour in zip(SCALES, COLOURS, strict=True):
            chosen = [plan for plan in plans if plan and SCALES[plan % len(SCALES)] == scale]
            axes.plot(
                [factor * scores[plan] for plan in chosen], [100 * truth[plan] for plan in chosen], "o",
                color=colour, markersize=4, label=f"actions in ±{scale:g}",
            )  # fmt: skip
        if 0 in plans:
            axes.plot(factor * scores[0], 100 * truth[0], "*", color="#222222", markersize=9, label="uniform")
        if row.measure != "accuracy":
            axes.invert_xaxis()
        axes.set_title(f"{called(row.item, row.measure)}\nSpearman {row.spearman.value:.2f}", fontsize=8)
        axes.set_xlabel({"accuracy": "%"}.get(row.measure, "nats, less is better"), fontsize=8)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
        if place % columns == 0:
            axes.set_ylabel("after full retraining, selection, %", fontsize=8)
        axes.locator_params(axis="x", nbins=5)
    if rows:
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure
