"""Try-and-learn: layer by layer, a policy looks at the filters' weights and learns by trying which of them can go.

Source: Huang, Zhou, You, Neumann, "Learning to Prune Filters in Convolutional Neural Networks" (WACV 2018, arXiv
1801.07365): from the lowest layer to the highest, a policy network of its own for each reads the layer's raw filter
weights and keeps or drops every filter; the network is cut, fine-tuned a little and scored, the reward is ψ · φ (see
`SelectFiltersEnv`); REINFORCE with five samples an update and normalised returns; then the layer is cut, the network is
fine-tuned, and the next layer follows. Ours are the policy that treats all filters alike (`filterwise`), the weight of
its entropy, that the best action of all tried is taken, that a layer stays whole where nothing tried pays, and the
whole rule by which a budget is met: the published method knows only the accepted drop.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from stable_baselines3 import A2C
from stable_baselines3.common.callbacks import BaseCallback

from ..envs.select import SelectFiltersEnv, SelectSettings, filter_rows
from ..pruning.budget import solve_counts
from ..pruning.checks import check_kind, check_seed
from ..pruning.cost import CostModel
from ..pruning.errors import UserError, closest
from ..pruning.groups import ChannelGroup
from ..pruning.heuristics.plans import Goal, Pruned
from ..pruning.heuristics.rounds import Decision, Pace, prune_in_rounds
from ..pruning.plan import PruningPlan
from ..pruning.retraining import RetrainSettings
from ..pruning.subject import Subject
from ..pruning.trimmer import Trimmer
from .filterwise import DivergedError, FilterwisePolicy, NormalisedReturns
from .randomness import derive_seed, random_state_kept
from .settings import TryAndLearnSettings

RESERVE = 0.75
"""Of the widths that the uniform plan would leave the later layers, an earlier layer leaves them this share."""

FIXED = 1000.0
"""A score so high that a layer that is not to be decided stays as it is, whatever the budget."""


@dataclass(frozen=True)
class LayerTrial:
    """What was tried on one layer, and what came of it.

    Attributes:
        group: Its name.
        width: Filters before.
        kept: Filters that stay.
        chosen: Where they come from: "tried" (the best sample), "policy" (its own choice, each filter that is more
            likely kept than not) or "whole" (nothing paid more than keeping all, which pays 0).
        rewards: In the order of trying, the policy's own choice last.
        accuracies: Of the same networks on the reward images, in [0, 1].
        widths: Filters that they kept.
        probabilities: Of each filter before the cut, to be kept, in [0, 1], after all updates.
        forced: Whether more filters left than were chosen, to meet the budget.
    """

    group: str
    width: int
    kept: int
    chosen: Literal["tried", "policy", "whole"]
    rewards: tuple[float, ...]
    accuracies: tuple[float, ...]
    widths: tuple[int, ...]
    probabilities: tuple[float, ...]
    forced: bool = False


@dataclass(frozen=True, eq=False)
class TryAndLearnResult(Pruned):
    """What try-and-learn made: one plan a layer, and beside it what was tried.

    Attributes:
        layers: One for each layer that was decided; one more than there are plans where the last was undone.
    """

    layers: tuple[LayerTrial, ...] = ()


def try_and_learn(
    trimmer: Trimmer,
    goal: Goal,
    settings: TryAndLearnSettings | None = None,
    *,
    retraining: RetrainSettings,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
    evaluated: Callable[[int], None] | None = None,
) -> TryAndLearnResult:
    """Learn for each layer, from the lowest to the highest, which filters can go; cut, train, go on.

    Args:
        trimmer: Task and settings; its criterion is of no account. The published repair is none ("delete").
        goal: With a budget, pruning ends at the layer that meets it: that layer keeps just as many filters as the
            budget allows, those that were chosen and the likeliest of the others. No layer keeps so many that the
            budget would leave the later ones less than three quarters of their widths in the uniform plan of the
            layers that are still to be decided. With an accepted drop, it ends before the first layer after whose
            training more is lost. `Goal(accepted_drop=1.0)`, with b in the settings, goes through all layers as
            published.
        settings: See `TryAndLearnSettings`.
        retraining: `updates` (or epochs) is the total over all layers; the other values hold for each, but only the
            training after the last one looks at the selection split (`check_every`, `patience`).
        seed: Of the policies and the retraining, in [0, 2**63).
        progress: Called with the number of optimizer steps of retraining done so far.
        evaluated: Called with the number of networks tried so far, over all layers.

    Raises:
        UserError: Settings of another kind, a pattern that matches no layer, layers that cannot reach the budget (what
            they reach is named), a policy that diverges, or a first layer that already loses more than accepted.
    """
    check_seed(seed)
    settings = check_kind(TryAndLearnSettings() if settings is None else settings, TryAndLearnSettings, "try_and_learn")
    settings = replace(settings, accepted_drop=settings.drop_for(goal))
    retraining = retraining.resolved(len(trimmer.task.train))
    order = check_layers(trimmer.cost_model, trimmer.groups, goal, settings)
    rule = _LayerByLayer(trimmer, order, goal, settings, retraining, seed, evaluated)
    early = int(retraining.updates * (1 - settings.final_share))
    between = early // max(1, len(order) - 1) if settings.updates_between < 0 else settings.updates_between
    pace = Pace(max_rounds=len(order), updates_between=between, final_share=settings.final_share)
    made = prune_in_rounds(
        trimmer, rule, goal, pace, method="try_and_learn", retraining=retraining, seed=seed, progress=progress
    )
    records = tuple(
        replace(record, provenance=replace(record.provenance, criterion="policy")) for record in made.records
    )
    parts: dict[str, Any] = {item.name: getattr(made, item.name) for item in fields(made)}
    return TryAndLearnResult(**{**parts, "records": records, "layers": tuple(rule.trials)})


class _Tries(BaseCallback):
    """Keeps what was tried, and stops at `most`."""

    def __init__(self, most: int, tell: Callable[[], None]) -> None:
        super().__init__()
        self.infos: list[dict[str, Any]] = []
        self._most, self._tell = most, tell

    def _on_step(self) -> bool:
        self.infos += self.locals["infos"]
        self._tell()
        return len(self.infos) < self._most


class _LayerByLayer:
    """The rule: round `place` decides layer `order[place]`."""

    def __init__(
        self,
        trimmer: Trimmer,
        order: list[str],
        goal: Goal,
        settings: TryAndLearnSettings,
        retraining: RetrainSettings,
        seed: int,
        evaluated: Callable[[int], None] | None,
    ) -> None:
        self.trials: list[LayerTrial] = []
        self._trimmer, self._order, self._goal, self._settings = trimmer, order, goal, settings
        self._retraining, self._seed, self._evaluated = retraining, seed, evaluated
        self._count = 0

    def __call__(self, subject: Subject, place: int, last: bool) -> Decision:
        """Learn on one layer, choose, and bring the choice within the budget."""
        name = self._order[place]
        group = next(group for group in subject.groups if group.name == name)
        try:
            with random_state_kept():
                tries, probabilities = self._learn(subject, group, derive_seed(self._seed, f"layer{place}"))
        except DivergedError as error:
            raise UserError(
                f"the policy of layer {name} must stay finite, but it diverged; lower learning_rate, which is "
                f"{self._settings.learning_rate:g}, or entropy, which is {self._settings.entropy:g}"
            ) from error
        best = max(tries, key=lambda info: (_reward(info), -info["loss"]))
        chosen: Literal["tried", "policy", "whole"] = "policy" if best is tries[-1] else "tried"
        keep = best["executed"]
        if _reward(best) <= 0:
            chosen, keep = "whole", list(range(group.width))
        fitting = self._fit(subject, group, keep, probabilities, self._order[place + 1 :])
        forced = len(fitting) < len(keep)
        self.trials.append(
            LayerTrial(
                group=name,
                width=group.width,
                kept=len(fitting),
                chosen=chosen,
                rewards=tuple(_reward(info) for info in tries),
                accuracies=tuple(info["accuracy"] for info in tries),
                widths=tuple(len(info["executed"]) for info in tries),
                probabilities=tuple(probabilities.tolist()),
                forced=forced,
            )
        )
        return Decision(PruningPlan({name: fitting}), forced)

    def _learn(
        self, subject: Subject, group: ChannelGroup, seed: int
    ) -> tuple[list[dict[str, Any]], NDArray[np.float64]]:
        """Return the info of every network tried, the policy's own choice last, and (width,) keep probabilities."""
        settings = self._settings
        environment = SelectFiltersEnv(
            settings=SelectSettings(
                group=group.name,
                accepted_drop=settings.drop_for(self._goal),
                fine_tune=settings.fine_tune if self._retraining.updates else 0,
                retraining=self._retraining,
                repair=self._trimmer.settings,
                groups=self._trimmer.group_settings,
                max_filters=group.width,
                entries=filter_rows(subject.network, group).shape[1],
            ),
            trimmer=self._trimmer,
            subject=subject,
        )
        tries = _Tries(settings.evaluations - 1, self._tell)
        learner = A2C(
            FilterwisePolicy,
            environment,
            learning_rate=lambda left: settings.learning_rate * (0.1 + 0.9 * left),
            n_steps=settings.episodes_per_update,
            gamma=1.0,
            gae_lambda=1.0,
            ent_coef=settings.entropy,
            vf_coef=0.0,  # see `NormalisedReturns`
            max_grad_norm=math.inf,  # Adam does not mind the gradient's size
            use_rms_prop=False,
            rollout_buffer_class=NormalisedReturns,
            policy_kwargs={"hidden": settings.hidden, "initial_keep": settings.initial_keep},
            seed=seed,
            device="cpu",
        )
        learner.learn(settings.evaluations - 1, callback=tries)
        observation, _ = environment.reset()
        policy: Any = learner.policy
        probabilities = policy.keep_probabilities(observation).double().numpy()
        *_, info = environment.step((probabilities > 0.5).astype(np.int8))
        self._tell()
        return [*tries.infos, info], probabilities

    def _tell(self) -> None:
        self._count += 1
        if self._evaluated:
            self._evaluated(self._count)

    def _fit(
        self,
        subject: Subject,
        group: ChannelGroup,
        keep: list[int],
        probabilities: NDArray[np.float64],
        later: list[str],
    ) -> list[int]:
        """Return what stays: what was chosen, fewer where too little would be left for the later layers, more where
        the budget is met with filters to spare.
        """
        if self._goal.budget is None:
            return keep
        model = self._trimmer.cost_model
        present = np.array([each.width for each in subject.groups], dtype=np.int64)
        place = model.names.index(group.name)
        most = self._widest(place, self._reserved(place, present, later), present)
        stays, likely = set(keep), [int(channel) for channel in np.argsort(-probabilities, kind="stable")]
        if len(keep) > most:
            return sorted([channel for channel in likely if channel in stays][:most])
        spare = self._widest(place, present, present) - len(keep)
        others = [channel for channel in likely if channel not in stays]
        return sorted([*keep, *others[: max(0, spare)]])

    def _reserved(self, place: int, present: NDArray[np.int64], later: list[str]) -> NDArray[np.int64]:
        """Return (groups,) widths: of the later layers what is left for them, of all others what they have.

        The uniform plan shares what the budget has left between group `place` and the later layers; with these at
        `RESERVE` of it, that group can always be as wide as there.
        """
        model, goal = self._trimmer.cost_model, self._goal
        still = np.array([name in later for name in model.names])
        undecided = still.copy()
        undecided[place] = True
        scores = np.where(undecided, 0.0, FIXED)
        uniform = solve_counts(model, scores, goal.budget or 1.0, goal.unit, widths=present)
        reserve = model.allowed.not_above((RESERVE * uniform).astype(np.int64), present)
        return np.where(still, reserve, present)

    def _widest(self, place: int, counts: NDArray[np.int64], present: NDArray[np.int64]) -> int:
        """Return the most filters of group `place` with which `counts` meet the budget, or the fewest allowed."""
        model, counts = self._trimmer.cost_model, counts.copy()
        while not self._goal.met(model, counts):
            before = counts[place]
            counts[place] -= 1
            counts[place] = model.allowed.not_above(counts, present)[place]
            if counts[place] >= before:
                break
        return int(counts[place])


def _reward(info: dict[str, Any]) -> float:
    return float(info["reward_terms"]["psi_phi"])


def _layers(groups: Sequence[ChannelGroup], patterns: tuple[str, ...]) -> list[str]:
    """Return the names of the groups to decide, from the lowest layer to the highest."""
    known = [layer for group in groups for layer in group.producers]
    for pattern in patterns:
        if not any(fnmatchcase(layer, pattern) for layer in known):
            raise UserError(
                f"layers must match layers that may be cut, but {pattern!r} matches none{closest(pattern, known)}"
            )
    return [
        group.name
        for group in groups
        if not patterns or any(fnmatchcase(layer, pattern) for layer in group.producers for pattern in patterns)
    ]


def check_layers(
    model: CostModel,
    groups: Sequence[ChannelGroup],
    goal: Goal,
    settings: TryAndLearnSettings,
) -> list[str]:
    """Return the names of the groups to decide, low to high; refuse a budget that they cannot reach.

    Raises:
        UserError: A pattern matches nothing, or the budget is out of reach; what the layers reach is named.
    """
    order = _layers(groups, settings.layers)
    if goal.budget is None:
        return order
    model.check_budget(goal.budget, goal.unit)
    smallest = model.allowed.smallest(model.widths)
    least = {name: int(count) for name, count in zip(model.names, smallest, strict=True) if name in order}
    reached = model.share(least, goal.unit)
    if reached > goal.budget:
        wording = model.allowed.settings
        raise UserError(
            f"the budget must be reachable by the layers, but {wording.narrowest} in each still costs {reached:.4f} of "
            f"the {goal.unit}{wording.limits}; the budget is {goal.budget}"
        )
    return order
