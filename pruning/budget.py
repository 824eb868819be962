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

CountArray = NDArray[np.int64]


def solve_counts(
    model: CostModel,
    scores: Sequence[float] | NDArray[np.float64],
    budget: float,
    unit: str,
    *,
    widths: Sequence[int] | CountArray | None = None,
) -> CountArray:
    """Return how many channels stay in each group so that the cost meets the budget from below.

    The result costs at most `budget` and lies within one channel of the exact shares; one more channel, in at least
    one group that is not yet whole, would exceed the budget. Every group keeps at least one channel. In a network of
    few channels a share of the budget may stay unspent: filling it up would no longer be the plan that was asked for.

    Args:
        model: Cost model of the network.
        scores: (groups,) higher = wider.
        budget: Share of the whole network's cost to keep, in (0, 1].
        unit: `"macs"` or `"params"`.
        widths: (groups,) present widths that the shares refer to (after an earlier round); the model's by default.

    Raises:
        UserError: The budget cannot be reached with one channel per group.
    """
    present = model.widths if widths is None else np.asarray(widths, dtype=np.int64)
    scores = np.asarray(scores, dtype=np.float64)
    if scores.shape != present.shape or not np.isfinite(scores).all():
        raise UserError(f"a budget needs one finite score per group ({len(present)}), but got {scores.tolist()}")
    allowed = math.floor(budget * model.full.of(unit) * (1 + 1e-12))  # a share computed as cost / whole still fits

    def fits(counts: CountArray) -> bool:
        return model.cost(counts).of(unit) <= allowed

    if fits(present):
        return present.copy()
    if not fits(np.ones_like(present)):
        model.check_budget(budget, unit)

    def wanted(shift: float) -> NDArray[np.float64]:
        return present / (1.0 + np.exp(-np.clip(scores + shift, -60, 60)))

    def whole(shift: float) -> CountArray:
        return np.clip(np.floor(wanted(shift) + 1e-9), 1, present).astype(np.int64)

    low, high = -60.0 - float(scores.max()), 60.0 - float(scores.min())
    for _ in range(80):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if fits(whole(middle)) else (low, middle)
    counts = whole(low)
    # the floor leaves room: round up where the fraction is largest, each group at most once, while it fits
    fraction = wanted(low) - counts
    for place in np.argsort(-fraction, kind="stable"):
        if counts[place] < present[place]:
            counts[place] += 1
            if not fits(counts):
                counts[place] -= 1
    return counts
