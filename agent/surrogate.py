"""What a search has learned of its reward so far: a Gaussian process from widths and budget to the reward.

A few hundred scored plans are all a search ever sees. A policy gradient from eight of them at a time is noisy; the same
eight added to all earlier ones tell a regression nearly everything there is to know near them. The agent therefore
trains on rewards that the process predicts, and spends its evaluations where it is worth being corrected (Dyna, Sutton
1991; model-based policy optimisation, Janner et al. 2019).

Source: Rasmussen, Williams, "Gaussian Processes for Machine Learning" (2006), equations 2.25 and 2.26; the regression
is scikit-learn's.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Kernel, Matern, WhiteKernel

FloatArray = NDArray[np.float64]
FITTED_ON = 400
"""Most plans from which the length scales are estimated; all of them decide the prediction."""
OUTLIER_SPREADS = 3.0
"""Rewards more than so many interquartile ranges below the median are taken to be just so far below."""


class RewardModel:
    """Predicts the reward of plans that were not scored.

    Inputs are the logarithms of the kept shares of the groups and of the budget; the kernel is Matérn 5/2 with a length
    scale for each, plus noise. Rewards far below the rest are clipped, for nobody needs to know how bad a bad plan is;
    one that is not finite counts as just so far below. The length scales are estimated again whenever the number of
    plans has grown by half.

    Args:
        inputs: Number of inputs, i.e. groups (× rounds) and one for the budget.
    """

    def __init__(self, inputs: int) -> None:
        self.inputs = inputs
        self._theta: FloatArray | None = None  # logarithms of what the kernel was estimated to have
        self._estimated_with = 0
        self._process: GaussianProcessRegressor | None = None

    @property
    def fitted(self) -> bool:
        """Whether it has seen any plan."""
        return self._process is not None

    @staticmethod
    def features(kept: FloatArray, budget: FloatArray) -> FloatArray:
        """Return (plans, groups + 1) inputs for (plans, groups) kept shares in (0, 1] and (plans,) budgets."""
        return np.column_stack((np.log(kept), np.log(budget)))

    def fit(self, features: FloatArray, rewards: Sequence[float]) -> None:
        """Learn from (plans, inputs) features and (plans,) rewards; what was learned before is replaced.

        The result depends on the arguments of this and of the earlier calls alone.
        """
        values = _clipped(np.asarray(rewards, dtype=np.float64))
        if self._theta is None or len(values) >= 1.5 * self._estimated_with:
            self._theta = self._estimate(features, values)
            self._estimated_with = len(values)
        kernel = self._start().clone_with_theta(self._theta)
        self._process = GaussianProcessRegressor(kernel, optimizer=None, normalize_y=True).fit(features, values)

    def _estimate(self, features: FloatArray, values: FloatArray) -> FloatArray:
        if len(values) > FITTED_ON:  # the best and the last decide where the search is
            best = np.argsort(-values, kind="stable")[: FITTED_ON // 2]
            rest = np.setdiff1d(np.arange(len(values)), best)[-(FITTED_ON - len(best)) :]
            features, values = features[np.r_[best, rest]], values[np.r_[best, rest]]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # a length scale at its bound: an input without effect
            process = GaussianProcessRegressor(self._start(), normalize_y=True).fit(features, values)
        return np.array(process.kernel_.theta, dtype=np.float64)

    def _start(self) -> Kernel:
        wide = ConstantKernel(1.0, (1e-2, 1e2)) * Matern(np.ones(self.inputs), (0.05, 50.0), nu=2.5)
        return wide + WhiteKernel(1e-2, (1e-5, 1.0))

    def mean(self, features: FloatArray) -> FloatArray:
        """Return (plans,) the expected rewards."""
        return np.asarray(self._fitted().predict(features), dtype=np.float64)

    def draws(self, features: FloatArray, count: int, seed: int) -> FloatArray:
        """Return (plans, count) rewards drawn jointly from what is believed, each column one possible truth.

        The noise is in it: what sets a plan apart from its neighbours is part of its reward.
        """
        return np.asarray(self._fitted().sample_y(features, count, random_state=seed), dtype=np.float64)

    def state(self) -> dict[str, Any]:
        """Return the length scales and with how many plans they were estimated; `restore` and `fit` need no more."""
        theta = None if self._theta is None else torch.from_numpy(self._theta.copy())
        return {"theta": theta, "estimated_with": self._estimated_with}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` gave; the next `fit` goes on from there."""
        theta = state["theta"]
        self._theta = None if theta is None else theta.numpy().copy()
        self._estimated_with = state["estimated_with"]

    def _fitted(self) -> GaussianProcessRegressor:
        assert self._process is not None, "fit first"
        return self._process


def _clipped(values: FloatArray) -> FloatArray:
    """Return the rewards, none further below the median than `OUTLIER_SPREADS` says; 0 where none is finite."""
    finite = np.isfinite(values)
    if not finite.any():
        return np.zeros(len(values))
    low, middle, high = np.percentile(values[finite], (25, 50, 75))
    floor = middle - OUTLIER_SPREADS * max(high - low, 1e-6)
    return np.where(finite, np.maximum(values, floor), floor)
