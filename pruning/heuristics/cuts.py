"""How much leaves in a round, and which channels: shared by the rules of all methods."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ..cost import CostModel
from ..plan import PruningPlan
from ..subject import Subject
from .plans import Goal

Masks = dict[str, NDArray[np.bool_]]
Candidate = tuple[float, str, int]
"""How urgently a channel should leave (higher = sooner), its group, its number."""

FLOOR_STEP = 0.9
"""Share of what can still be cut that a round leaves where an accuracy floor ends the rounds."""

FLOOR_ROUNDS = 80
"""Most such rounds; the last would leave 0.02 % of what can be cut."""


def weakest_leave(
    model: CostModel,
    subject: Subject,
    candidates: Sequence[Candidate],
    floor: Mapping[str, int],
    goal: Goal,
    *,
    at_most: int | None = None,
) -> Masks:
    """Let candidates go, the most urgent first, until the budget is met; returns what stays, by group.

    A channel waits until enough of its group have come together for the next narrower allowed width.

    Args:
        model: Cost model of the pristine network.
        subject: What is cut.
        candidates: In any order; of equal ones the first by group name and number leaves first.
        floor: By group, the fewest channels to leave; groups that are not named stay whole.
        goal: The budget, if there is one.
        at_most: Channels that may leave; a narrower allowed width may take a few more.
    """
    present = np.array([group.width for group in subject.groups], dtype=np.int64)
    keep: Masks = {group.name: np.ones(group.width, dtype=bool) for group in subject.groups}
    places = {name: place for place, name in enumerate(keep)}
    counts, below = present.copy(), present.copy()  # `below` counts without the channels that wait
    waiting: dict[str, list[int]] = {name: [] for name in floor}
    gone = 0
    for _, name, channel in sorted(candidates, key=lambda item: (-item[0], item[1], item[2])):
        if goal.met(model, counts) or (at_most is not None and gone >= at_most):
            break
        place = places[name]
        if name in floor and below[place] > floor[name]:
            waiting[name].append(channel)
            below[place] -= 1
            if model.allowed.not_below(below, present)[place] == below[place]:
                keep[name][waiting[name]] = False
                gone += len(waiting[name])
                waiting[name], counts[place] = [], below[place]
    return keep


def plan_of(keep: Masks) -> PruningPlan:
    """Return the plan that keeps what the masks say."""
    return PruningPlan({name: np.flatnonzero(mask).tolist() for name, mask in keep.items()})


def nothing_leaves(keep: Masks) -> bool:
    """Return whether every channel stays."""
    return all(bool(mask.all()) for mask in keep.values())


def floors(model: CostModel, narrowest: float) -> dict[str, int]:
    """Return, by group, the fewest channels that leave at least the share `narrowest` of the original ones."""
    shares = [max(1, round(narrowest * width)) for width in model.widths.tolist()]
    found = model.allowed.not_below(np.array(shares, dtype=np.int64), model.widths)
    return dict(zip(model.names, found.tolist(), strict=True))


def next_share(model: CostModel, counts: Mapping[str, int], floor: Mapping[str, int], goal: Goal) -> float:
    """Return the share of the cost that a round may leave on the way to an accuracy floor, and not below the budget.

    Args:
        model: Cost model of the pristine network.
        counts: Channels present, by group.
        floor: Fewest channels, for each group that may be cut.
        goal: Its unit and budget.
    """
    least = model.share({**counts, **{name: min(count, counts[name]) for name, count in floor.items()}}, goal.unit)
    present = model.share(counts, goal.unit)
    return max(least + FLOOR_STEP * (present - least), goal.budget or 0.0)
