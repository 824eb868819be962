"""What a `Trimmer` cuts: a network with all that is known of it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from torch import nn

from .criteria import RankingContext, rank_channels
from .groups import ChannelGroup
from .least_squares import residual_when
from .optimizer_state import OptimizerState
from .plan import PruningPlan
from .statistics import Statistics


@dataclass(frozen=True, eq=False)
class Subject:
    """A network with all that is known of it: the pristine one, or what an earlier round left.

    Attributes:
        network: Never changed.
        groups: Its channel groups.
        measured: Measures it; called when its statistics are first needed, so that a method without data reads none.
        plan: How it came from the pristine network, in the pristine numbering.
        criterion: Name of the criterion that ranks its channels.
        seed: Of a criterion that draws random numbers.
        state: What the optimizer of the last training remembers of it, or None.
        lineage: Digest of each cut and training that made it out of the pristine network, first to last; None where
            they are not known.
    """

    network: nn.Module
    groups: tuple[ChannelGroup, ...]
    measured: Callable[[], Statistics]
    plan: PruningPlan
    criterion: str
    seed: int = 0
    state: OptimizerState | None = None
    lineage: tuple[str, ...] | None = None

    @cached_property
    def statistics(self) -> Statistics:
        """APoZ, Taylor, norms and moments."""
        return self.measured()

    @cached_property
    def context(self) -> RankingContext:
        """What a criterion may look at."""
        return RankingContext(self.network, self.statistics, self.seed)

    @cached_property
    def orders(self) -> dict[str, NDArray[np.int64]]:
        """Group name -> (width,) channels from most to least important; ranked when first needed."""
        return rank_channels(self.criterion, self.groups, self.context)

    @cached_property
    def residuals(self) -> dict[str, NDArray[np.float64]]:
        """Group name -> (3,) least-squares residual when 75, 50 and 25 % stay by `orders`; when first needed."""
        result = {}
        for group in self.groups:
            counts = [max(1, round(share * group.width)) for share in (0.75, 0.5, 0.25)]
            if self.criterion == "least_squares":  # its choice tells the residual of every width
                result[group.name] = self.context.greedy_choice(group).residual[counts]
                continue
            problems, order = self.context.problems(group), self.orders[group.name]
            result[group.name] = np.array([residual_when(problems, order[:count]) for count in counts])
        return result
