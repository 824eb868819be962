"""Network Trimming: iterative removal of channels with a high Average Percentage of Zeros.

Source: Hu, Peng, Tai, Tang, "Network Trimming: A Data-Driven Neuron Pruning Approach towards Efficient Deep
Architectures" (2016, arXiv 1607.03250): measure APoZ, remove what lies more than one standard deviation above its
layer's mean, keep the surviving weights, retrain, repeat. The paper trims a few layers: those of highest mean APoZ
that hold most parameters, then their neighbours. Ours are the automatic choice of these layers, the exact stop at a
budget, the sharing of a fixed number of updates between the rounds, and the rounding where not every width is allowed:
of the channels above the threshold, the best stay up to the next allowed width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..budget import solve_counts
from ..checks import check_types
from ..cost import CostModel
from ..errors import UserError, closest
from ..groups import ChannelGroup
from ..retraining import RetrainSettings
from ..subject import Subject
from ..trimmer import Trimmer
from .cuts import Candidate, Masks, floors, nothing_leaves, weakest_leave
from .plans import Goal, Pruned
from .rounds import Decision, Pace, decision_of, mean_apoz, prune_in_rounds


@dataclass(frozen=True)
class NetworkTrimmingSettings:
    """How Network Trimming proceeds.

    Attributes:
        sigmas: A channel leaves when its APoZ exceeds its layer's mean by this many standard deviations.
        max_rounds: Most rounds. In the last one, or when too few channels lie above the threshold for any group to
            become narrower, the threshold gives way if the budget is not met yet.
        targets: Names of the groups to trim; empty = chosen automatically.
        target_share: The automatic choice takes the fewest groups with which the budget can be met while each keeps
            this share of its original channels; all where that is impossible.
        narrowest: The threshold leaves every target at least this share of its original channels.
        final_share: Share of all updates that is kept for the training after the last round.
    """

    sigmas: float = 1.0
    max_rounds: int = 20
    targets: tuple[str, ...] = ()
    target_share: float = 0.4
    narrowest: float = 0.15
    final_share: float = 0.5

    def __post_init__(self) -> None:
        """Refuse values of other types or outside their ranges."""
        check_types(self)
        if (
            self.max_rounds < 1
            or not 0 <= self.final_share <= 1
            or not (0 < self.narrowest <= 1 and 0 < self.target_share <= 1)
        ):
            raise UserError(
                "Network Trimming needs max_rounds >= 1, final_share in [0, 1], narrowest and target_share in (0, 1]; "
                f"got {self.max_rounds}, {self.final_share}, {self.narrowest} and {self.target_share}"
            )


def network_trimming(
    trimmer: Trimmer,
    goal: Goal,
    settings: NetworkTrimmingSettings | None = None,
    *,
    retraining: RetrainSettings,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Pruned:
    """Trim by APoZ, round after round, until the goal is met.

    Args:
        trimmer: Task and settings; its criterion is replaced by "apoz". The published method repairs nothing
            (compensation "delete").
        goal: Budget, met from below within one allowed width, or accuracy floor. Without a budget the layers are
            chosen as if half of the cost had to go.
        settings: See `NetworkTrimmingSettings`.
        retraining: `updates` is the total over all rounds, see `prune_in_rounds`.
        seed: Of the retraining, in [0, 2**63).
        progress: Called with the number of optimizer steps done so far.

    Returns:
        One plan for each round; `mean_apoz` is that of the layers that were trimmed.

    Raises:
        UserError: No group has a ReLU behind it, an unknown target, or a budget the targets cannot reach.
    """
    settings = settings or NetworkTrimmingSettings()
    check_rectified(trimmer.groups)
    if goal.budget is not None:
        trimmer.cost_model.check_budget(goal.budget, goal.unit)
    trimmer = trimmer.with_settings(replace(trimmer.settings, criterion="apoz"))
    targets = choose_targets(trimmer, goal, settings)
    least = {name: floors(trimmer.cost_model, settings.narrowest)[name] for name in targets}

    def rule(subject: Subject, place: int, last: bool) -> Decision | None:
        keep, gave_way = _one_round(trimmer, subject, least, goal, settings.sigmas, last)
        if not last and nothing_leaves(keep):  # too little is left above the threshold
            keep, gave_way = _one_round(trimmer, subject, least, goal, settings.sigmas, True)
        return decision_of(keep, subject, goal, trimmer.cost_model, forced=gave_way)

    return prune_in_rounds(
        trimmer, rule, goal, Pace(settings.max_rounds, None, settings.final_share), method="network_trimming",
        retraining=retraining, seed=seed, watched=targets, progress=progress,
    )  # fmt: skip


def check_rectified(groups: Sequence[ChannelGroup]) -> None:
    """Refuse a network without any group that has a ReLU behind it.

    Raises:
        UserError: Names the alternatives.
    """
    if not any(group.rectified for group in groups):
        raise UserError(
            "Network Trimming needs a ReLU behind at least one channel group, but this network has none; "
            "use method 'taylor_2017', 'l2' or 'least_squares' instead"
        )


def choose_targets(trimmer: Trimmer, goal: Goal, settings: NetworkTrimmingSettings) -> tuple[str, ...]:
    """Choose the groups to trim: highest mean APoZ × share of the cost first, then their neighbours.

    The neighbours of the groups chosen so far come before all others, the better of them first. As few groups are taken
    as the budget needs; half of the cost, where there is no budget.

    Args:
        trimmer: Task and settings; the statistics must hold APoZ.
        goal: The budget and its unit.
        settings: Targets that were given, and the narrowest width.
    """
    model, unit = trimmer.cost_model, goal.unit
    rectified = [group.name for group in trimmer.groups if group.rectified]
    budget = 0.5 if goal.budget is None else goal.budget
    check_targets(model, trimmer.groups, goal, settings)
    if settings.targets:
        return tuple(name for name in model.names if name in settings.targets)
    shares = dict(zip(model.names, model.group_share(unit), strict=True))
    means = mean_apoz(trimmer.pristine, rectified)
    worth = {name: means[name] * shares[name] for name in rectified}
    floor = floors(model, settings.target_share)
    taken: list[str] = []
    while len(taken) < len(rectified):
        near = {rectified[spot] for name in taken for spot in _beside(rectified, name)}
        open_ones = [name for name in rectified if name not in taken and (name in near or not near - set(taken))]
        taken.append(max(open_ones, key=lambda name: worth[name]))
        if model.share({name: floor[name] for name in taken}, unit) <= budget:
            break
    return tuple(name for name in model.names if name in taken)


def check_targets(
    model: CostModel, groups: Sequence[ChannelGroup], goal: Goal, settings: NetworkTrimmingSettings
) -> None:
    """Refuse targets that do not exist or have no ReLU behind them, and a budget that is out of their reach.

    Raises:
        UserError: Names the nearest target, or what the narrowest targets cost.
    """
    rectified = [group.name for group in groups if group.rectified]
    for name in settings.targets:
        if name not in rectified:
            raise UserError(f"targets must be groups with a ReLU, but got {name!r}{closest(name, rectified)}")
    if goal.budget is None:
        return
    narrowest = dict(zip(model.names, model.allowed.smallest(model.widths).tolist(), strict=True))
    least = model.share({name: narrowest[name] for name in settings.targets or rectified}, goal.unit)
    wording = model.allowed.settings
    costs = f"still costs {least:.4f} of the {goal.unit}{wording.limits}; the budget is {goal.budget}"
    if least > goal.budget and settings.targets:
        raise UserError(f"the budget must be reachable by the targets, but {wording.narrowest} in each {costs}")
    if least > goal.budget:
        raise UserError(
            f"Network Trimming can only cut groups with a ReLU behind them, and {wording.narrowest} in each {costs}"
        )


def _beside(names: list[str], name: str) -> list[int]:
    place = names.index(name)
    return [spot for spot in (place - 1, place + 1) if 0 <= spot < len(names)]


def _one_round(
    trimmer: Trimmer, subject: Subject, floor: dict[str, int], goal: Goal, sigmas: float, last: bool
) -> tuple[Masks, bool]:
    """Decide what stays of `subject`: masks by group, and whether the threshold gave way.

    Channels of the targets (the keys of `floor`) above the threshold leave, weakest first, until the budget is met or
    the target is down to its `floor`. If the budget is not met in the last round, the same share of every target's
    survivors leaves as well, those of highest APoZ first.
    """
    model = trimmer.cost_model
    candidates: list[Candidate] = []
    for name in floor:
        apoz = _apoz(subject, name)
        z = (apoz - apoz.mean()) / max(float(apoz.std()), 1e-12)
        candidates += [(float(score), name, channel) for channel, score in enumerate(z) if score > sigmas]
    keep = weakest_leave(model, subject, candidates, floor, goal)
    counts = np.array([int(mask.sum()) for mask in keep.values()], dtype=np.int64)
    if not last or goal.budget is None or goal.met(model, counts):
        return keep, False
    whole = [0.0 if name in floor else 60.0 for name in keep]  # log-odds: what is no target stays
    solved = solve_counts(model, whole, goal.budget, goal.unit, widths=counts)
    for name, count in zip(keep, solved.tolist(), strict=True):
        surplus = np.flatnonzero(keep[name])
        if len(surplus) > count:
            order = np.argsort(_apoz(subject, name)[surplus], kind="stable")
            keep[name][surplus[order[count:]]] = False
    return keep, True


def _apoz(subject: Subject, name: str) -> NDArray[np.float64]:
    apoz = subject.statistics.groups[name].apoz
    assert apoz is not None  # targets have a ReLU
    return apoz
