"""Data-free pruning: nearly equal neurons are merged, in an order that the weights alone decide.

Source: Srinivas & Babu, "Data-free parameter pruning for Deep Neural Networks" (BMVC 2015, arXiv 1507.06149), for
linear layers; see `saliency` for the formulas and for our extension to convolutions and batch norm. Ours is also how
several layers share a budget: the next merge is the one of smallest saliency, each layer's scaled by its own safe one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import nn

from ..checks import check_types
from ..cost import CostModel
from ..errors import UserError, closest
from ..groups import ChannelGroup
from ..retraining import RetrainSettings
from ..saliency import MergeSequence, cut_off, merge_problem, merge_sequence, serves_published
from ..subject import Subject
from ..trimmer import Trimmer
from .cuts import FLOOR_ROUNDS, Candidate, floors, next_share, weakest_leave
from .plans import Goal, Pruned
from .rounds import Decision, Pace, decision_of, prune_in_rounds

LAYERS = ("linear", "all")
STOPS = ("goal", "mode")


@dataclass(frozen=True)
class DataFreeSettings:
    """How data-free pruning proceeds.

    Attributes:
        layers: "linear": as published, linear layers that linear layers read through a ReLU; "all": with our extension
            to convolutions and batch norm.
        stop: "goal": until the budget or the accuracy floor; "mode": also not beyond the mode of each layer's histogram
            of saliencies, which is how the paper stops without data.
        bias: Whether biases count in the distance of two neurons, as published (second hand); where they are small
            beside the weights, their ratio is noise, and the distance of the weights alone merges better. Without them
            the published repair is the compensation "data_free_weights".
        share: With "mode", the part of that number of merges to make, in (0, 1]; the paper's 0.25, 0.5 and 0.75 for
            large networks.
    """

    layers: str = "linear"
    stop: str = "goal"
    bias: bool = True
    share: float = 1.0

    def __post_init__(self) -> None:
        """Refuse values of other types or outside their ranges."""
        check_types(self)
        for name, value, known in (("layers", self.layers, LAYERS), ("stop", self.stop, STOPS)):
            if value not in known:
                raise UserError(f"{name} must be one of {', '.join(known)}, but got {value!r}{closest(value, known)}")
        if not 0 < self.share <= 1:
            raise UserError(f"share must be in (0, 1], but got {self.share}; it is the part of the safe merges to make")


def data_free(
    trimmer: Trimmer,
    goal: Goal,
    settings: DataFreeSettings | None = None,
    *,
    retraining: RetrainSettings,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Pruned:
    """Merge neurons until the goal is met; one layer a round, input to output, as published.

    With an accuracy floor every round takes a tenth of what can still be cut from all layers instead. Data are read for
    the scores, and by retraining or another compensation where these are asked for, never for a plan.

    Args:
        trimmer: Task and settings. The published repair is the compensation "data_free".
        goal: Budget, met from below within one allowed width, or accuracy floor.
        settings: See `DataFreeSettings`.
        retraining: `updates` is the total over all rounds, see `prune_in_rounds`; the paper has none.
        seed: Of the retraining, in [0, 2**63).
        progress: Called with the number of optimizer steps done so far.

    Raises:
        UserError: The network has no layer to merge in, or the budget is out of reach.
    """
    settings = settings or DataFreeSettings()
    check_mergeable(trimmer.task.network, trimmer.groups, settings)
    check_reach(trimmer.cost_model, trimmer.task.network, trimmer.groups, goal, settings)
    names = mergeable(trimmer.task.network, trimmer.groups, settings)
    trimmer = trimmer.with_settings(
        replace(trimmer.settings, criterion="data_free", compensation=merging_repair(trimmer, settings))
    )
    least = floors(trimmer.cost_model, 0.0)
    rule = _Rule(trimmer, goal, settings, {name: least[name] for name in names})
    return prune_in_rounds(
        trimmer, rule, goal, Pace(rule.most_rounds), method="data_free",
        retraining=retraining, seed=seed, progress=progress,
    )  # fmt: skip


def merging_repair(trimmer: Trimmer, settings: DataFreeSettings) -> str:
    """Return the compensation: the trimmer's, and of the published one the variant that fits `settings.bias`."""
    asked = trimmer.settings.compensation
    return published_merges(settings) if asked == "data_free" else asked


def published_merges(settings: DataFreeSettings) -> str:
    """Return the compensation that merges by the same distance as the plans."""
    return "data_free" if settings.bias else "data_free_weights"


def check_reach(
    model: CostModel, network: nn.Module, groups: Sequence[ChannelGroup], goal: Goal, settings: DataFreeSettings
) -> None:
    """Refuse a budget that merging cannot reach, where it is the goal.

    Raises:
        UserError: Names what one channel in each layer costs.
    """
    if goal.budget is None or settings.stop != "goal":
        return
    model.check_budget(goal.budget, goal.unit)
    names, least = mergeable(network, groups, settings), floors(model, 0.0)
    smallest, wording = model.share({name: least[name] for name in names}, goal.unit), model.allowed.settings
    if smallest > goal.budget:
        raise UserError(
            f"the budget must be reachable by merging in {', '.join(names)}, but {wording.narrowest} in each still "
            f"costs {smallest:.4f} of the {goal.unit}{wording.limits}; the budget is {goal.budget}; raise it, or set "
            "methods.data_free.layers to 'all'"
        )


def mergeable(network: nn.Module, groups: Sequence[ChannelGroup], settings: DataFreeSettings) -> list[str]:
    """Return the names of the groups in which channels may be merged."""
    return [group.name for group in groups if settings.layers == "all" or serves_published(network, group)]


def check_mergeable(network: nn.Module, groups: Sequence[ChannelGroup], settings: DataFreeSettings) -> None:
    """Refuse a network in which nothing can be merged.

    Raises:
        UserError: Names the alternatives.
    """
    if not mergeable(network, groups, settings):
        raise UserError(
            "data-free pruning, as published, merges neurons of linear layers that linear layers read through a ReLU, "
            "but this network has none; set methods.data_free.layers to 'all' for the extension to convolutions and "
            "batch norm, or use l1, l2 or least_squares"
        )


class _Rule:
    """Merges in the order of saliency; which layer is next is decided by saliency over the layer's safe one."""

    def __init__(self, trimmer: Trimmer, goal: Goal, settings: DataFreeSettings, floor: dict[str, int]) -> None:
        self.model, self.goal, self.settings, self.floor = trimmer.cost_model, goal, settings, floor
        self.scales: dict[str, float] = {}
        self.wanted: dict[str, int] = {}
        self.by_layer = goal.accepted_drop is None
        self.known: tuple[Subject | None, dict[str, MergeSequence]] = (None, {})  # of the round's subject
        self.most_rounds = len(floor) if self.by_layer else FLOOR_ROUNDS

    def __call__(self, subject: Subject, place: int, last: bool) -> Decision | None:
        """Decide one round."""
        if not self.scales:
            self._look(subject)
        if not self.by_layer:
            share = next_share(self.model, subject.plan.counts, self.floor, self.goal)
            return self._decision(subject, self._counts(subject, replace(self.goal, budget=share)))
        if not place:
            self.wanted = self._counts(subject, self.goal)
        for group in subject.groups:
            if self.wanted[group.name] < group.width:
                return self._decision(subject, {group.name: self.wanted[group.name]})
        return self._decision(subject, {})

    def _look(self, subject: Subject) -> None:
        """Learn from the original weights how far each layer may go, and which of its saliencies is the safe one."""
        for group, sequence in self._sequences(subject):
            safe = cut_off(sequence.saliency, self.settings.share)
            if self.settings.stop == "mode":
                self.floor[group.name] = max(self.floor[group.name], group.width - safe)
            usual = sequence.saliency[max(0, cut_off(sequence.saliency) - 1)] if len(sequence.saliency) else 0.0
            self.scales[group.name] = float(usual) if np.isfinite(usual) and usual > 0 else 1.0

    def _sequences(self, subject: Subject) -> list[tuple[ChannelGroup, MergeSequence]]:
        return [(group, self._sequence(subject, group)) for group in subject.groups if group.name in self.floor]

    def _sequence(self, subject: Subject, group: ChannelGroup) -> MergeSequence:
        """Return all merges of a group, worked out once for each subject."""
        if self.known[0] is not subject:
            self.known = (subject, {})
        found = self.known[1]
        if group.name not in found:
            found[group.name] = merge_sequence(merge_problem(subject.network, group, bias=self.settings.bias))
        return found[group.name]

    def _counts(self, subject: Subject, goal: Goal) -> dict[str, int]:
        """Return, by group, how many channels the next merges up to the goal leave."""
        order: list[Candidate] = []
        for group, sequence in self._sequences(subject):
            scaled = np.maximum.accumulate(sequence.saliency / self.scales[group.name])
            order += [
                (float(value), group.name, channel) for value, channel in zip(scaled, sequence.removed, strict=True)
            ]
        order.sort(key=lambda item: item[0])  # stable: within a layer in the order of the merges
        candidates = [(float(-place), name, int(channel)) for place, (_, name, channel) in enumerate(order)]
        keep = weakest_leave(self.model, subject, candidates, self.floor, goal)
        return {name: int(mask.sum()) for name, mask in keep.items()}

    def _decision(self, subject: Subject, counts: dict[str, int]) -> Decision | None:
        keep = {group.name: np.ones(group.width, dtype=bool) for group in subject.groups}
        for group in subject.groups:
            gone = group.width - counts.get(group.name, group.width)
            if gone:
                keep[group.name][self._sequence(subject, group).removed[:gone]] = False
        return decision_of(keep, subject, self.goal, self.model)
