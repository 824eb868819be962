"""Paired differences over seeds: a bootstrap interval of their mean, and the verdict that it allows."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import DegenerateDataWarning, bootstrap

from ..pruning.errors import UserError

ENOUGH = 5
"""Fewer differences give no verdict: their bootstrap distribution has too few values."""

BETTER, WORSE, UNDECIDED, TOO_FEW = "better", "worse", "not distinguishable", "too few seeds"


@dataclass(frozen=True)
class Interval:
    """A confidence interval of the mean of some differences.

    Attributes:
        mean: Of the differences, in their unit.
        low: Lower end; None where there are fewer than two differences.
        high: Upper end; likewise.
        method: "BCa" (bias-corrected and accelerated bootstrap, Efron 1987), "percentile", "equal" (all differences
            are the same, so is every resample) or "none" (a single difference).
        count: Number of differences.
        positive: How many are above zero.
        negative: How many are below.
    """

    mean: float
    low: float | None
    high: float | None
    method: str
    count: int
    positive: int
    negative: int

    @property
    def verdict(self) -> str:
        """What the interval says of the first of the two: "better", "worse" or "not distinguishable".

        "too few seeds" stands for fewer than five, whatever the interval is.
        """
        if self.count < ENOUGH or self.low is None or self.high is None:
            return TOO_FEW
        if self.low > 0:
            return BETTER
        return WORSE if self.high < 0 else UNDECIDED


def paired_interval(
    first: Sequence[float],
    second: Sequence[float],
    *,
    confidence: float = 0.95,
    resamples: int = 9999,
    seed: int = 0,
) -> Interval:
    """Return a bootstrap interval of the mean of `first - second`, pairs resampled together.

    The interval is BCa from five pairs on, as far as it is defined, and by percentiles otherwise. With few pairs both
    are narrower than they ought to be: five resampled values spread less than the population they came from.

    Args:
        first: One figure for each seed.
        second: The other method's figures, in the same order of seeds.
        confidence: In (0, 1).
        resamples: Bootstrap resamples, at least 1.
        seed: Of the resampling, in [0, 2**63).

    Raises:
        UserError: No pair, lists of different length, or figures that are not finite.
    """
    if len(first) != len(second) or not len(first):
        raise UserError(
            f"paired figures need the same number of at least one seed each, but got {len(first)} and {len(second)}"
        )
    differences = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    if not np.isfinite(differences).all():
        raise UserError(f"paired figures must be finite, but their differences are {differences.tolist()}")
    low, high, method = _ends(differences, confidence, resamples, seed)
    return Interval(
        mean=float(differences.mean()), low=low, high=high, method=method, count=len(differences),
        positive=int((differences > 0).sum()), negative=int((differences < 0).sum()),
    )  # fmt: skip


def _ends(
    differences: NDArray[np.float64], confidence: float, resamples: int, seed: int
) -> tuple[float | None, float | None, str]:
    """Return both ends of the interval and how they were found."""
    if len(differences) == 1:
        return None, None, "none"
    scale = float(np.abs(differences).max())
    if np.ptp(differences) <= 1e-12 * scale:  # differences of equal figures differ by rounding only
        same = float(differences.mean())
        return same, same, "equal"
    for method in ("BCa", "percentile") if len(differences) >= ENOUGH else ("percentile",):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DegenerateDataWarning)
            warnings.simplefilter("ignore", RuntimeWarning)
            found = bootstrap(
                (differences,), np.mean, confidence_level=confidence, n_resamples=resamples, method=method,
                vectorized=True, random_state=np.random.default_rng(seed),
            ).confidence_interval  # fmt: skip
        low, high = float(found.low), float(found.high)
        if math.isfinite(low) and math.isfinite(high):
            return low, high, method
    return None, None, "none"
