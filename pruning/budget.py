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
    allowed_widths = model.allowed
    present = model.widths if widths is None else np.asarray(widths, dtype=np.int64)
    scores = np.asarray(scores, dtype=np.float64)
    if scores.shape != present.shape or not np.isfinite(scores).all():
        raise UserError(f"a budget needs one finite score per group ({len(present)}), but got {scores.tolist()}")
    limit = math.floor(budget * model.full.of(unit) * (1 + 1e-12))  # a share computed as cost / whole still fits

    def fits(counts: CountArray) -> bool:
        return model.cost(counts).of(unit) <= limit

    if fits(present):
        return present.copy()
    if not fits(allowed_widths.smallest(present)):
        model.check_budget(budget, unit)

    def wanted(shift: float) -> NDArray[np.float64]:
        return present / (1.0 + np.exp(-np.clip(scores + shift, -60, 60)))

    def whole(shift: float) -> CountArray:
        return allowed_widths.nearest(np.floor(wanted(shift) + 1e-9).astype(np.int64), present)

    low, high = -60.0 - float(scores.max()), 60.0 - float(scores.min())
    for _ in range(80):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if fits(whole(middle)) else (low, middle)
    counts = whole(low)
    # rounding leaves room: widen where most of the step is wanted, each group at most once, while it fits
    before = counts.copy()
    step = allowed_widths.wider(before, present) - before
    missing = wanted(low) - before
    widened = (missing < -1e-6) & (step > 1)  # by rounding, or held up by the smallest allowed width
    for place in np.argsort(-missing / np.maximum(step, 1), kind="stable"):
        if step[place] and not widened[place]:
            counts[place] += step[place]
            if not fits(counts):
                counts[place] = before[place]
    return counts
