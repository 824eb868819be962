"""The plan everybody starts with: the same share of every group stays."""

from dataclasses import replace

import numpy as np

from ..budget import solve_counts
from ..retraining import RetrainSettings
from ..schedule import Round, Schedule
from ..trimmer import Trimmer


def uniform(trimmer: Trimmer, *, budget: float, unit: str, retraining: RetrainSettings, seed: int = 0) -> Schedule:
    """Return the one-round schedule that keeps the same share of every group, within the budget.

    Args:
        trimmer: Task and settings; which channels stay is its criterion's choice.
        budget: Share of the whole network's cost to keep, in (0, 1].
        unit: "macs" or "params".
        retraining: Training after the cut.
        seed: Of that training.
    """
    retraining = retraining.resolved(len(trimmer.task.train))
    counts = solve_counts(trimmer.cost_model, np.zeros(len(trimmer.groups)), budget, unit)
    return Schedule(
        rounds=(Round(trimmer.plan(counts), retraining.updates),),
        repair=trimmer.settings,
        retraining=replace(retraining, updates=0),
        seed=seed,
        made_by="uniform",
    )
