"""Meet a budget by construction: one scalar is solved so that the widths cost what they may.

Keep shares are sigmoid(score + b). Equal scores give the uniform plan; the difference of two scores is the
difference of their log-odds of staying. Only b depends on the budget.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .cost import CostModel
from .errors import UserError
from .widths import CountArray


def solve_counts(
    model: CostModel,
    scores: Sequence[float] | NDArray[np.float64],
    budget: float,
    unit: str,
    *,
    widths: Sequence[int] | CountArray | None = None,
) -> CountArray:
    """Return how many channels stay in each group so that the cost meets the budget from below.

    The result costs at most `budget`, and each width is among the allowed ones of the model, within one of the exact
    share (one channel where every width is allowed). The next wider allowed width, in at least one group that is not
    yet whole, would exceed the budget. Every group keeps at least one channel. In a network of few channels, or few
    allowed widths, a share of the budget may stay unspent: filling it up would no longer be the plan asked for.

    Args:
        model: Cost model of the network; it knows the allowed widths.
        scores: (groups,) higher = wider.
        budget: Share of the whole network's cost to keep, in (0, 1].
        unit: `"macs"` or `"params"`.
        widths: (groups,) present widths that the shares refer to (after an earlier round); the model's by default.

    Raises:
        UserError: The budget cannot be reached with the narrowest allowed widths.
    """
    present = model.widths if widths is None else np.asarray(widths, dtype=np.int64)
    rows = np.asarray(scores, dtype=np.float64)
    if rows.shape != present.shape:
        raise UserError(f"a budget needs one finite score per group ({len(present)}), but got {rows.tolist()}")
    return solve_each(model, rows[None], [budget], unit, widths=present)[0]


def solve_each(
    model: CostModel,
    scores: NDArray[np.float64],
    budgets: Sequence[float] | NDArray[np.float64],
    unit: str,
    *,
    widths: CountArray | None = None,
) -> CountArray:
    """Return (plans, groups) what `solve_counts` gives for each plan; many are solved in little more time than one.

    Args:
        model: As there.
        scores: (plans, groups) higher = wider.
        budgets: (plans,) shares of the whole network's cost to keep, in (0, 1].
        unit: As there.
        widths: (groups,) as there.

    Raises:
        UserError: A budget cannot be reached with the narrowest allowed widths.
    """
    allowed = model.allowed
    present = model.widths if widths is None else widths
    if scores.ndim != 2 or scores.shape[1] != len(present):
        raise UserError(f"a budget needs one finite score per group ({len(present)}), but got an array {scores.shape}")
    for row in scores[~np.isfinite(scores).all(1)][:1]:
        raise UserError(f"a budget needs one finite score per group ({len(present)}), but got {row.tolist()}")
    whole = model.full.of(unit)
    limits = np.array([math.floor(budget * whole * (1 + 1e-12)) for budget in budgets])  # a share computed still fits
    if model.costs(allowed.smallest(present)[None], unit)[0] > limits.min(initial=whole):
        model.check_budget(float(min(budgets)), unit)

    def fits(counts: CountArray) -> NDArray[np.bool_]:
        return model.costs(counts, unit) <= limits

    def wanted(shift: NDArray[np.float64]) -> NDArray[np.float64]:
        return present / (1.0 + np.exp(-np.clip(scores + shift[:, None], -60, 60)))

    def floored(shift: NDArray[np.float64]) -> CountArray:
        return allowed.nearest(np.floor(wanted(shift) + 1e-9).astype(np.int64), present)

    low, high = -60.0 - scores.max(1), 60.0 - scores.min(1)
    for _ in range(80):
        middle = 0.5 * (low + high)
        enough = fits(floored(middle))
        low, high = np.where(enough, middle, low), np.where(enough, high, middle)
    counts = floored(low)
    # rounding leaves room: widen where most of the step is wanted, each group at most once, while it fits
    before = counts.copy()
    step = allowed.wider(before, present) - before
    missing = wanted(low) - before
    widened = (missing < -1e-6) & (step > 1)  # by rounding, or held up by the smallest allowed width
    order = np.argsort(-missing / np.maximum(step, 1), kind="stable", axis=1)
    plans = np.arange(len(counts))
    for place in order.T:  # (plans,) the next group of each plan
        tried = counts.copy()
        tried[plans, place] += np.where(widened[plans, place], 0, step[plans, place])
        counts = np.where(fits(tried)[:, None], tried, counts)
    untouched = model.costs(present[None], unit)[0] <= limits
    return np.where(untouched[:, None], present, counts)
