"""One way to every method: a task and settings in, a list of plans with provenance out.

All use the same surgery, repair, retraining and scores.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from ..pruning.checks import check_kind, check_seed, check_types
from ..pruning.compensation import get_compensation
from ..pruning.cost import CostModel
from ..pruning.grouping import find_groups
from ..pruning.heuristics import Goal, Pruned
from ..pruning.heuristics.data_free import published_merges
from ..pruning.repair_settings import RepairSettings
from ..pruning.retraining import RetrainSettings
from ..pruning.task import PruningTask
from ..pruning.trimmer import Trimmer
from ..pruning.widths import GroupSettings
from .methods import Prospect, Request, get_method
from .randomness import derive_seed, random_state_kept
from .settings import MethodSettings


@dataclass(frozen=True)
class PruneSettings:
    """What a method is asked for.

    Attributes:
        method: Name from `METHODS`.
        budget: Share of the cost to keep, in (0, 1]; None with `accepted_drop` = only the accuracy counts.
        budget_unit: "macs" or "params".
        accepted_drop: Accuracy on the reward images, in [0, 1], that may be lost; None = only the budget counts.
        compensation: Repair after each cut, see `compensation.COMPENSATIONS`, "none" = "delete"; None = as the method
            was published.
        repair: Calibration, recalibration and scoring; which channels leave is the method's choice.
        retraining: Training over all rounds: `updates` (or epochs) is the total.
        groups: Which groups may be cut, and to which widths.
        methods: How each method proceeds.
        seed: Root of all random numbers, in [0, 2**63).
    """

    method: str = "network_trimming"
    budget: float | None = 0.3
    budget_unit: str = "macs"
    accepted_drop: float | None = None
    compensation: str | None = None
    repair: RepairSettings = field(default_factory=RepairSettings)
    retraining: RetrainSettings = field(default_factory=RetrainSettings)
    groups: GroupSettings = field(default_factory=GroupSettings)
    methods: MethodSettings = field(default_factory=MethodSettings)
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse values of other types, unknown names and a goal that is none."""
        check_types(self)
        check_seed(self.seed)
        get_method(self.method)
        if self.compensation == "none":
            object.__setattr__(self, "compensation", "delete")
        if self.compensation is not None:
            get_compensation(self.compensation)
        Goal(self.budget, self.budget_unit, self.accepted_drop)

    @property
    def goal(self) -> Goal:
        """Where pruning ends."""
        return Goal(self.budget, self.budget_unit, self.accepted_drop)


def prune(
    task: PruningTask,
    settings: PruneSettings,
    *,
    progress: Callable[[int], None] | None = None,
    evaluated: Callable[[int], None] | None = None,
) -> Pruned:
    """Prune a task by one method, without or with learning, as `settings` say.

    Args:
        task: Network and data; the network is not changed.
        settings: Method, goal and everything else.
        progress: Called with the number of retraining updates done so far.
        evaluated: Called with the number of networks that a learning method has scored so far.

    Returns:
        The list of plans, one for each round, each with its provenance and scores; also the schedule that replays
        them, and the pruned network.

    Raises:
        UserError: The method cannot serve this network (the alternatives are named), or the goal cannot be reached.
    """
    check_kind(task, PruningTask, "prune")
    check_kind(settings, PruneSettings, "prune")
    method = get_method(settings.method)
    repair = replace(
        settings.repair,
        compensation=settings.compensation or method.compensation,
        seed=derive_seed(settings.seed, "repair"),
    )
    if not method.needs_data and not get_compensation(repair.compensation).needs_data:
        repair = replace(repair, recalibration_images=0)
    retraining = settings.retraining.resolved(len(task.train))
    trimmer = Trimmer(task, repair, settings.groups, lean=True)
    method.check(Prospect(task.network, trimmer.groups, trimmer.cost_model, settings.goal, settings.methods))
    with random_state_kept():
        made = method.run(
            Request(trimmer, settings.goal, settings.methods, retraining, repair.seed, progress, evaluated)
        )
    records = tuple(replace(item, provenance=replace(item.provenance, seed=settings.seed)) for item in made.records)
    return replace(made, records=records)


def check_method(network: nn.Module, example: Tensor, settings: PruneSettings) -> None:
    """Refuse what a method cannot do with a network, before that is trained or measured.

    Args:
        network: Its weights do not matter.
        example: (1, …) one input.
        settings: What is asked for.

    Raises:
        UserError: No channel group, a budget below the narrowest allowed widths, or a method that cannot serve.
    """
    chosen = settings.groups
    groups = find_groups(network, example, include=chosen.include, ignore=chosen.ignore)
    model = CostModel(network, groups, example, chosen)
    if settings.budget is not None:
        model.check_budget(settings.budget, settings.budget_unit)
    get_method(settings.method).check(Prospect(network, groups, model, settings.goal, settings.methods))


def published_repair(settings: PruneSettings) -> str:
    """Return the compensation that a method was published with."""
    if settings.method == "data_free":
        return published_merges(settings.methods.data_free)
    return get_method(settings.method).compensation
