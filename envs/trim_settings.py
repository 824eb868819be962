"""Settings of `TrimEnv`, and whether a network can meet them."""

from dataclasses import dataclass, field

import numpy as np
from torch import Tensor, nn

from ..pruning.checks import check_types
from ..pruning.cost import UNITS, CostModel
from ..pruning.errors import UserError
from ..pruning.grouping import find_groups
from ..pruning.repair_settings import RepairSettings
from ..pruning.retraining import RetrainSettings
from ..pruning.widths import GroupSettings
from .action import ActionRule, make_action_rule
from .observation import check_observation
from .reward import Reward, RewardSettings


@dataclass(frozen=True)
class TrimSettings:
    """Settings of `TrimEnv`.

    Attributes:
        budget: Share of the original cost to keep, in (0, 1]; None only with objective "accuracy_floor", or with a
            `budget_range`.
        budget_unit: "macs" or "params".
        budget_range: Lowest and highest budget, both in (0, 1]; each episode draws one, and `budget`, if there is one,
            must lie between. None = each episode has `budget`.
        budget_levels: How many budgets of that range are drawn, 2 or more, evenly spaced on a logarithmic scale from
            the lowest to the highest. The uniform plan is scored once for each of them.
        rounds: Walks over the groups in one episode; the budget is approached geometrically.
        action: "score", "ratio" or "threshold", see `envs.action`.
        observation: "full" (29 features) or "amc" (the eleven of AMC), see `envs.observation`.
        score_scale: Log-odds of staying at action 1 (rule "score").
        largest_trim: Largest share that one action may trim (rule "ratio").
        retrain_updates: Training updates after each round's cut, inside the episode.
        retraining: How networks are trained after a cut, inside the episode (`retrain_updates` steps a round) and
            when the finished network is built (`retraining.updates` steps, over and above). `check_every` and
            `patience` hold for the finished network only: no reward depends on the selection split.
        groups: Which groups may be cut, and to which widths.
        repair: Criterion, compensation, calibration and scoring.
        reward: Objective and weights.
    """

    budget: float | None = 0.3
    budget_unit: str = "macs"
    budget_range: tuple[float, float] | None = None
    budget_levels: int = 16
    rounds: int = 1
    action: str = "score"
    observation: str = "full"
    score_scale: float = 3.0
    largest_trim: float = 0.95
    retrain_updates: int = 0
    retraining: RetrainSettings = field(default_factory=RetrainSettings)
    groups: GroupSettings = field(default_factory=GroupSettings)
    repair: RepairSettings = field(default_factory=RepairSettings)
    reward: RewardSettings = field(default_factory=RewardSettings)

    def __post_init__(self) -> None:
        """Refuse values of other types or outside their ranges, and combinations without meaning."""
        check_types(self)
        if self.budget_unit not in UNITS:
            raise UserError(f"budget_unit must be one of {', '.join(UNITS)}, but got {self.budget_unit!r}")
        if self.budget is not None and not 0 < self.budget <= 1:
            raise UserError(
                f"budget must be in (0, 1], but got budget={self.budget}; it is the share of {self.budget_unit} to keep"
            )
        self._check_range()
        check_observation(self.observation)
        if self.rounds < 1 or self.retrain_updates < 0:
            raise UserError(
                f"rounds must be at least 1 and retrain_updates at least 0, but got {self.rounds} and "
                f"{self.retrain_updates}"
            )
        if not self.score_scale > 0 or not 0 < self.largest_trim < 1:
            raise UserError(
                f"score_scale must be positive and largest_trim in (0, 1), but got {self.score_scale} and "
                f"{self.largest_trim}"
            )
        if self.action == "threshold" and self.repair.criterion != "apoz":
            raise UserError(
                f"action 'threshold' is a threshold on APoZ, so criterion must be 'apoz', "
                f"but got {self.repair.criterion!r}"
            )
        if self.budget is None and self.budget_range is None and Reward(self.reward).needs_reference:
            raise UserError("objective 'budget' needs a budget; set one, or use objective 'accuracy_floor'")

    @property
    def budgets(self) -> tuple[float, ...]:
        """The budgets that episodes draw from, ascending; none without a range."""
        if self.budget_range is None:
            return ()
        low, high = self.budget_range
        between = np.geomspace(low, high, self.budget_levels)[1:-1].tolist()
        return (low, *between, high) if low < high else (low,)

    @property
    def served(self) -> tuple[float, ...]:
        """The budgets that episodes may have: those of the range or, without one, the one budget, if there is one."""
        return self.budgets or (() if self.budget is None else (self.budget,))

    def _check_range(self) -> None:
        if self.budget_levels < 2:
            raise UserError(f"budget_levels must be at least 2, but got {self.budget_levels}")
        if self.budget_range is None:
            return
        if len(self.budget_range) != 2 or not 0 < self.budget_range[0] <= self.budget_range[1] <= 1:
            raise UserError(
                "budget_range must be the lowest and the highest budget, both in (0, 1], but got "
                f"{list(self.budget_range)}; give two shares such as [0.2, 0.6]"
            )
        low, high = (float(end) for end in self.budget_range)
        object.__setattr__(self, "budget_range", (low, high))  # a list from a file, whole numbers from a person
        if self.budget is not None and not low <= self.budget <= high:
            raise UserError(
                f"budget must lie in budget_range, from {low:g} to {high:g}, but got budget={self.budget:g}; "
                "widen the range, or set budget to null, in Python None, to have none of its own; by default it is 0.3"
            )


def checked_rule(model: CostModel, settings: TrimSettings) -> ActionRule:
    """Return the rule that `settings` ask for; refuse a budget, or a range of budgets, that it cannot meet.

    Raises:
        UserError: Unknown rule or unit, or an unreachable budget; the smallest reachable one is named.
    """
    rule = make_action_rule(
        settings.action, model, score_scale=settings.score_scale, largest_trim=settings.largest_trim
    )
    if settings.budget is not None or not settings.budgets:
        rule.check(settings.budget, settings.budget_unit)
    if settings.budgets:
        rule.check(settings.budgets[0], settings.budget_unit)
    return rule


def check_request(network: nn.Module, example_input: Tensor, settings: TrimSettings) -> None:
    """Refuse impossible settings for a network that need not be trained yet; errors as in `checked_rule`."""
    groups = find_groups(network, example_input, include=settings.groups.include, ignore=settings.groups.ignore)
    checked_rule(CostModel(network, groups, example_input, settings.groups), settings)
