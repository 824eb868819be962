"""Paired differences over seeds: a bootstrap interval of their mean, Student's t, and the verdict that both allow."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import DegenerateDataWarning, bootstrap, ttest_1samp

from ..pruning.errors import UserError

ENOUGH = 5
"""Fewer differences give no verdict, and no bootstrap interval: their resamples have too few values."""

BETTER, WORSE, UNDECIDED, TOO_FEW = "better", "worse", "not distinguishable", "too few seeds"


@dataclass(frozen=True)
class Interval:
    """A confidence interval of the mean of some differences.

    Attributes:
        mean: Of the differences, in their unit.
        low: Lower end; None where there are fewer than two differences.
        high: Upper end; likewise.
        method: "BCa" (bias-corrected and accelerated bootstrap, Efron 1987), "percentile", "range" (fewer than five:
            lowest and highest difference, no confidence interval), "equal" (all differences are the same, so is every
            resample) or "none" (a single difference).
        count: Number of differences.
        positive: How many are above zero.
        negative: How many are below.
        p_value: Two-sided, of Student's t that the mean is zero; None where there are fewer than two differences.
        level: 1 - confidence: a p-value from here on is no difference.
    """

    mean: float
    low: float | None
    high: float | None
    method: str
    count: int
    positive: int
    negative: int
    p_value: float | None = None
    level: float = 0.05

    @property
    def verdict(self) -> str:
        """What is known of the first of the two: "better", "worse" or "not distinguishable".

        A difference needs both the interval beyond zero and a p-value below the level: of five normal differences a
        bootstrap interval of 95 % misses the mean in about 15 of 100 cases, Student's t in 5. "too few seeds" stands
        for fewer than five, whatever they are.
        """
        if self.count < ENOUGH or self.low is None or self.high is None or self.p_value is None:
            return TOO_FEW
        if self.low <= 0 <= self.high or self.p_value >= self.level:
            return UNDECIDED
        return BETTER if self.low > 0 else WORSE


def paired_interval(
    first: Sequence[float],
    second: Sequence[float],
    *,
    confidence: float = 0.95,
    resamples: int = 9999,
    seed: int = 0,
) -> Interval:
    """Return a bootstrap interval of the mean of `first - second`, pairs resampled together.

    The interval is BCa from five pairs on, by percentiles where that is not defined; of fewer pairs lowest and highest
    difference are given instead. With few pairs it is narrower than it ought to be: five resampled values spread less
    than the population they came from.

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
        p_value=_p_value(differences, method), level=round(1 - confidence, 12),
    )  # fmt: skip


def _p_value(differences: NDArray[np.float64], method: str) -> float | None:
    """Return Student's; where all differences are equal, 1 if they are zero, else 0."""
    if len(differences) < 2:
        return None
    if method == "equal":
        return float(not differences.any())
    return float(ttest_1samp(differences, 0.0).pvalue)


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
    if len(differences) < ENOUGH:
        return float(differences.min()), float(differences.max()), "range"
    for method in ("BCa", "percentile"):
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
