"""What a method is asked for and what it gives: a goal in, a list of plans with provenance out."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
from numpy.typing import NDArray
from torch import nn

from ..checks import check_types
from ..cost import UNITS, CostModel
from ..errors import UserError
from ..plan import PruningPlan
from ..schedule import BuiltRound, Schedule


@dataclass(frozen=True)
class Goal:
    """Where pruning ends: at a budget, at an accuracy floor, or at whichever comes first.

    Attributes:
        budget: Share of the whole network's cost to keep, in (0, 1]; None = only the accuracy counts.
        unit: "macs" or "params".
        accepted_drop: Accuracy on the reward images, in [0, 1], that may be lost. A round that ends lower is trained
            again with all updates that are left; if that does not help it is undone, and pruning ends either way. None
            = only the budget counts.
    """

    budget: float | None = None
    unit: str = "params"
    accepted_drop: float | None = None

    def __post_init__(self) -> None:
        """Refuse values outside their ranges, and a goal that is none."""
        check_types(self)
        if self.unit not in UNITS:
            raise UserError(f"budget_unit must be one of {', '.join(UNITS)}, but got {self.unit!r}")
        if self.budget is None and self.accepted_drop is None:
            raise UserError("pruning needs a budget, an accepted drop of accuracy, or both, but got neither")
        if self.budget is not None and not 0 < self.budget <= 1:
            raise UserError(f"budget must be in (0, 1], but got budget={self.budget}; it is the share to keep")
        if self.accepted_drop is not None and not 0 <= self.accepted_drop <= 1:
            raise UserError(f"accepted_drop must be in [0, 1], but got {self.accepted_drop}; 0.01 is one point")

    def met(self, model: CostModel, counts: Mapping[str, int] | NDArray[np.int64]) -> bool:
        """Return whether `counts` channels are within the budget; never, where there is none."""
        return self.budget is not None and model.share(counts, self.unit) <= self.budget


@dataclass(frozen=True)
class Provenance:
    """Where a plan comes from.

    Attributes:
        method: Name of the method.
        round: Counted from 1.
        criterion: Which channels leave.
        compensation: Repair after the cut.
        retrain_updates: Optimizer steps asked for after the cut.
        seed: Of the whole run.
        forced: Whether the method's own rule gave way, to meet the budget.
    """

    method: str
    round: int
    criterion: str
    compensation: str
    retrain_updates: int
    seed: int
    forced: bool = False


@dataclass(frozen=True, eq=False)
class PlanRecord:
    """A plan and what is known of it.

    Attributes:
        plan: What stays of the *original* network after the round.
        provenance: Where the plan comes from.
        built: Scores on the reward images, cost and training of the round.
    """

    plan: PruningPlan
    provenance: Provenance
    built: BuiltRound


@dataclass(frozen=True, eq=False)
class Pruned(Sequence[PlanRecord]):
    """What a method made: the list of its plans, one for each round, and the network of the last.

    Attributes:
        network: Pruned and retrained, in evaluation mode.
        schedule: The rounds; `schedule.build` replays them on the original weights.
        records: One for each round.
        widths: Channels of the original network, by group.
        mean_apoz: By round (0 = before the first) the mean APoZ of the groups that were watched; empty if none were.
        stopped_by: "budget", "accuracy" (another round would lose more than accepted), "rounds" (all that were allowed
            were made), "rule" (nothing more could leave) or "search" (a learner's evaluations are spent).
    """

    network: nn.Module
    schedule: Schedule
    records: tuple[PlanRecord, ...]
    widths: dict[str, int]
    mean_apoz: tuple[dict[str, float], ...] = ()
    stopped_by: str = "budget"

    @overload
    def __getitem__(self, place: int) -> PlanRecord: ...

    @overload
    def __getitem__(self, place: slice) -> Sequence[PlanRecord]: ...

    def __getitem__(self, place: int | slice) -> PlanRecord | Sequence[PlanRecord]:
        """Return the plan of a round, from 0, with its provenance."""
        return self.records[place]

    def __len__(self) -> int:
        """Return the number of rounds."""
        return len(self.records)

    def __iter__(self) -> Iterator[PlanRecord]:
        """Iterate over the rounds."""
        return iter(self.records)

    @property
    def rounds(self) -> tuple[BuiltRound, ...]:
        """Scores, cost and training of each round."""
        return tuple(record.built for record in self.records)

    @property
    def forced(self) -> bool:
        """Whether the method's own rule gave way in the last round, to meet the budget."""
        return self.records[-1].provenance.forced
