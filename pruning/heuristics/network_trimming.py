"""Network Trimming: iterative removal of channels with a high Average Percentage of Zeros.

Source: Hu, Peng, Tai, Tang, "Network Trimming: A Data-Driven Neuron Pruning Approach towards Efficient Deep
Architectures" (2016, arXiv 1607.03250): measure APoZ, remove what lies more than one standard deviation above its
layer's mean, keep the surviving weights, retrain, repeat. The paper trims a few layers: those of highest mean APoZ
that hold most parameters, then their neighbours. Ours are the automatic choice of these layers, the exact stop at a
budget, the sharing of a fixed number of updates between the rounds, and the rounding where not every width is allowed:
of the channels above the threshold, the best stay up to the next allowed width.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from torch import nn

from ..budget import solve_counts
from ..checks import check_seed, check_types
from ..cost import CostModel
from ..errors import UserError, closest
from ..plan import PruningPlan
from ..retraining import RetrainSettings
from ..schedule import BuiltRound, Round, Schedule, build, round_seed, round_training
from ..trimmer import Subject, Trimmed, Trimmer

Masks = dict[str, NDArray[np.bool_]]


@dataclass(frozen=True)
class NetworkTrimmingSettings:
    """How Network Trimming proceeds.

    Attributes:
        sigmas: A channel leaves when its APoZ exceeds its layer's mean by this many standard deviations.
        max_rounds: Most rounds. In the last one, or when too few channels lie above the threshold for any group to
            become narrower, the threshold gives way if the budget is not met yet.
        targets: Names of the groups to trim; empty = chosen automatically.
        narrowest: The threshold leaves every target at least this share of its original channels. The automatic
            choice takes the fewest groups with which the budget can be met so; all where that is impossible.
        final_share: Share of all updates that is kept for the training after the last round.
        accepted_drop: Stop before a round whose retrained accuracy on the reward images lies more than this
            below the original's, in [0, 1]; None = only the budget counts.
        compensation: Repair after each cut; the published method has none ("delete").
    """

    sigmas: float = 1.0
    max_rounds: int = 20
    targets: tuple[str, ...] = ()
    narrowest: float = 0.15
    final_share: float = 0.5
    accepted_drop: float | None = None
    compensation: str = "delete"

    def __post_init__(self) -> None:
        """Refuse values of other types or outside their ranges."""
        check_types(self)
        if self.max_rounds < 1 or not 0 <= self.final_share <= 1 or not 0 < self.narrowest <= 1:
            raise UserError(
                "Network Trimming needs max_rounds >= 1, final_share in [0, 1] and narrowest in (0, 1], but got "
                f"{self.max_rounds}, {self.final_share} and {self.narrowest}"
            )


@dataclass(frozen=True, eq=False)
class NetworkTrimmingResult:
    """What Network Trimming made.

    Attributes:
        network: The trimmed, retrained network.
        schedule: Its rounds, replayable.
        rounds: Scores and widths of each.
        targets: The groups that were trimmed.
        mean_apoz: By round (0 = before the first) the mean APoZ of each target.
        forced: Whether the threshold had to give way in the last round to meet the budget.
    """

    network: nn.Module
    schedule: Schedule
    rounds: tuple[BuiltRound, ...]
    targets: tuple[str, ...]
    mean_apoz: tuple[dict[str, float], ...]
    forced: bool


def network_trimming(
    trimmer: Trimmer,
    *,
    budget: float,
    unit: str = "params",
    retraining: RetrainSettings,
    seed: int = 0,
    settings: NetworkTrimmingSettings | None = None,
    progress: Callable[[int], None] | None = None,
) -> NetworkTrimmingResult:
    """Trim by APoZ, round after round, until the budget is met.

    Args:
        trimmer: Task and settings; its criterion is replaced by "apoz", its compensation by the settings'.
        budget: Share of the whole network's cost to keep, in (0, 1]. Met from below, within one allowed width.
        unit: "macs" or "params".
        retraining: `updates` is the total over all rounds; the other values hold for each round, but only the
            training after the last one looks at the selection split (`check_every`, `patience`).
        seed: Of the retraining, in [0, 2**63).
        settings: See `NetworkTrimmingSettings`.
        progress: Called with the number of optimizer steps done so far.

    Raises:
        UserError: No group has a ReLU behind it, an unknown target, or a budget the targets cannot reach.
    """
    settings = settings or NetworkTrimmingSettings()
    check_seed(seed)
    retraining = retraining.resolved(len(trimmer.task.train))
    repair = replace(trimmer.settings, criterion="apoz", compensation=settings.compensation)
    rectified = [group.name for group in trimmer.groups if group.rectified]
    if not rectified:
        raise UserError(
            "Network Trimming needs a ReLU behind at least one channel group, but this network has none; "
            "use criterion 'taylor_2017', 'l2' or 'least_squares' instead"
        )
    trimmer.cost_model.check_budget(budget, unit)
    trimmer = trimmer.with_settings(repair)
    targets = _targets(trimmer, rectified, budget, unit, settings)
    floor = {name: count for name, count in _floors(trimmer.cost_model, settings).items() if name in targets}
    early = int(retraining.updates * (1 - settings.final_share))  # updates for the rounds before the last
    per_round = early

    subject, entries, records, spent = trimmer.pristine, [], [], 0
    forced = finished = False
    trimmed: Trimmed | None = None
    apoz = [_mean_apoz(subject, targets)]
    for place in range(settings.max_rounds):
        last = place == settings.max_rounds - 1
        keep, gave_way = _one_round(trimmer, subject, floor, budget, unit, settings.sigmas, last)
        if not last and all(mask.all() for mask in keep.values()):  # too little is left above the threshold
            keep, gave_way = _one_round(trimmer, subject, floor, budget, unit, settings.sigmas, True)
        met = trimmer.cost_model.share({name: int(mask.sum()) for name, mask in keep.items()}, unit) <= budget
        plan = PruningPlan({name: np.flatnonzero(mask).tolist() for name, mask in keep.items()})
        if place == 0:
            per_round = early // max(1, _rounds_ahead(trimmer, keep, budget, unit, settings.max_rounds) - 1)
        final = met or last
        updates = retraining.updates - spent if final else min(per_round, early - spent)
        candidate = trimmer.trim(plan, subject)
        after_trim = candidate.score
        if updates:
            tell = (lambda done, before=spent: progress(before + done)) if progress else None
            candidate = trimmer.retrain(
                candidate, round_training(retraining, updates, last=final), seed=round_seed(seed, place), progress=tell
            )
        if settings.accepted_drop is not None:
            drop = trimmer.baseline.accuracy - candidate.score.accuracy
            if drop > settings.accepted_drop and trimmed is None:
                raise UserError(
                    f"Network Trimming lost {100 * drop:.2f} points in its first round, more than the accepted "
                    f"{100 * settings.accepted_drop:g}; accept more, or allow more retraining updates"
                )
            if drop > settings.accepted_drop:
                break
        spent += updates
        forced, finished = gave_way, final
        trimmed = candidate
        entries.append(Round(candidate.plan, updates))
        records.append(BuiltRound.of(candidate, after_trim, updates))
        subject = trimmer.examine_trimmed(candidate)
        apoz.append(_mean_apoz(subject, targets))
        if met:
            break
    schedule = Schedule(
        rounds=tuple(entries), repair=repair, retraining=replace(retraining, updates=0), seed=seed,
        made_by="network_trimming",
    )  # fmt: skip
    if not finished and retraining.updates:  # the accepted drop: the last round that stays gets what is left
        closing = replace(entries[-1], retrain_updates=entries[-1].retrain_updates + retraining.updates - spent)
        schedule = replace(schedule, rounds=(*schedule.rounds[:-1], closing))
        built = build(trimmer, schedule, progress=progress)
        return NetworkTrimmingResult(built.network, schedule, built.rounds, targets, tuple(apoz), forced)
    assert trimmed is not None  # at least one round ran
    return NetworkTrimmingResult(trimmed.network, schedule, tuple(records), targets, tuple(apoz), forced)


def _rounds_ahead(trimmer: Trimmer, keep: Masks, budget: float, unit: str, most: int) -> int:
    """Estimate the number of rounds to the budget if each cuts by the same factor as the first, at most `most`."""
    first = trimmer.cost_model.share({name: int(mask.sum()) for name, mask in keep.items()}, unit)
    if first <= budget or first >= 1:
        return 1 if first <= budget else most
    return min(most, math.ceil(math.log(budget) / math.log(first)))


def _targets(
    trimmer: Trimmer, rectified: list[str], budget: float, unit: str, settings: NetworkTrimmingSettings
) -> tuple[str, ...]:
    """Choose the groups to trim: highest mean APoZ × share of the cost first, as few as the budget needs."""
    model = trimmer.cost_model
    narrowest = dict(zip(model.names, model.allowed.smallest(model.widths).tolist(), strict=True))
    wording = model.allowed.settings
    if settings.targets:
        for name in settings.targets:
            if name not in rectified:
                raise UserError(f"targets must be groups with a ReLU, but got {name!r}{closest(name, rectified)}")
        chosen = set(settings.targets)
        smallest = {name: narrowest[name] for name in chosen}
        if model.share(smallest, unit) > budget:
            raise UserError(
                f"the budget must be reachable by the targets, but {wording.narrowest} in each still costs "
                f"{model.share(smallest, unit):.4f} of the {unit}{wording.limits}; the budget is {budget}"
            )
        return tuple(name for name in model.names if name in chosen)
    shares = dict(zip(model.names, model.group_share(unit), strict=True))
    means = _mean_apoz(trimmer.pristine, tuple(rectified))
    floors = _floors(model, settings)
    order = sorted(rectified, key=lambda name: -means[name] * shares[name])
    for count in range(1, len(order) + 1):
        smallest = {name: floors[name] for name in order[:count]}
        if model.share(smallest, unit) <= budget:
            return tuple(name for name in model.names if name in smallest)
    least = model.share({name: narrowest[name] for name in order}, unit)
    if least > budget:
        raise UserError(
            f"Network Trimming can only cut groups with a ReLU behind them, and {wording.narrowest} in each still "
            f"costs {least:.4f} of the {unit}{wording.limits}; the budget is {budget}"
        )
    return tuple(name for name in model.names if name in order)


def _floors(model: CostModel, settings: NetworkTrimmingSettings) -> dict[str, int]:
    """Return, by group, the fewest channels that the threshold leaves."""
    shares = [max(1, round(settings.narrowest * width)) for width in model.widths.tolist()]
    floors = model.allowed.not_below(np.array(shares, dtype=np.int64), model.widths)
    return dict(zip(model.names, floors.tolist(), strict=True))


def _one_round(
    trimmer: Trimmer,
    subject: Subject,
    floor: dict[str, int],
    budget: float,
    unit: str,
    sigmas: float,
    last: bool,
) -> tuple[Masks, bool]:
    """Decide what stays of `subject`: masks by group, and whether the threshold gave way.

    Channels of the targets (the keys of `floor`) above the threshold leave, weakest first, until the budget is met or
    the target is down to its `floor`; some wait until enough have come together for the next narrower allowed width.
    If the budget is not met in the last round, the same share of every target's survivors leaves as well, those of
    highest APoZ first.
    """
    model = trimmer.cost_model
    present = np.array([group.width for group in subject.groups], dtype=np.int64)
    keep: Masks = {group.name: np.ones(group.width, dtype=bool) for group in subject.groups}
    candidates: list[tuple[float, str, int]] = []
    for name in floor:
        apoz = _apoz(subject, name)
        z = (apoz - apoz.mean()) / max(float(apoz.std()), 1e-12)
        candidates += [(float(score), name, channel) for channel, score in enumerate(z) if score > sigmas]
    candidates.sort(key=lambda item: (-item[0], item[1], item[2]))  # weakest first
    places = {name: place for place, name in enumerate(keep)}
    counts, below = present.copy(), present.copy()  # `below` counts without the channels that wait
    waiting: dict[str, list[int]] = {name: [] for name in floor}
    for _, name, channel in candidates:
        if model.share(counts, unit) <= budget:
            break
        place = places[name]
        if below[place] > floor[name]:
            waiting[name].append(channel)
            below[place] -= 1
            if model.allowed.not_below(below, present)[place] == below[place]:
                keep[name][waiting[name]] = False
                waiting[name], counts[place] = [], below[place]
    if not last or model.share(counts, unit) <= budget:
        return keep, False
    whole = [0.0 if name in floor else 60.0 for name in keep]  # log-odds: what is no target stays
    solved = solve_counts(model, whole, budget, unit, widths=counts)
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


def _mean_apoz(subject: Subject, names: tuple[str, ...]) -> dict[str, float]:
    return {name: float(_apoz(subject, name).mean()) for name in names}
