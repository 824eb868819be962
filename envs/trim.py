"""`prunegym/Trim-v0`: walk over the channel groups of a network and say how much of each to trim."""

from dataclasses import replace
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from ..pruning.checks import check_keys, check_kind
from ..pruning.errors import UserError
from ..pruning.plan import PruningPlan
from ..pruning.schedule import round_seed, round_training
from ..pruning.subject import Subject
from ..pruning.task import PruningTask
from ..pruning.trimmed import Evaluated, Trimmed
from ..pruning.trimmer import Trimmer
from ..pruning.widths import CountArray
from .action import RoundTarget, make_action_rule
from .arguments import make_trimmer
from .observation import Progress, make_observation
from .render import widths_image, widths_text
from .reward import Measured, Outcome, Reward
from .trim_settings import TrimSettings, checked_rule


class TrimEnv(gym.Env[NDArray[np.float32], NDArray[np.float32]]):
    """Prune a trained network, one channel group a step.

    ## Description
    An episode makes one pruning schedule. It walks over the channel groups, input to output, `rounds` times; each
    action says how much of the group to trim. At the end of each walk the widths are projected onto the budget, the
    network is cut for real, repaired, its batch norm recalibrated, optionally retrained, and scored on the reward
    images; the next walk sees statistics measured anew on what is left. `reset` starts from the pristine weights,
    which are never changed. The classifier's outputs are never cut and no group ever empties; `TrimSettings.groups`
    names groups that stay whole, and the multiples and the minimum that every cut width keeps to.

    ## Observation
    `TrimSettings.observation` chooses; float32, of the group that the *next* action trims.

    "full", `Box` of shape (29,), in order (see `observation.FEATURES`):

    | index | name | min | max | meaning |
    |---|---|---|---|---|
    | 0–1 | position, round | 0 | 1 | place in the walk; rounds finished / rounds |
    | 2–8 | log_width, params_share, macs_share, kernel, stride, producers, consumers | 0 | 1 | geometry |
    | 9 | has_relu | 0 | 1 | whether APoZ is defined |
    | 10–15 | apoz mean, std (× 2), p10, p50, p90, share above mean + 1σ | 0 | 1 | APoZ |
    | 16–19 | taylor share of the network; share of the weakest 25, 50, 75 % | 0 | 1 | Taylor 2017 |
    | 20–22 | residual when 75, 50, 25 % stay | 0 | 1 | relative least-squares residual at the consumers |
    | 23 | width_ratio | 0 | 1 | channels present / original |
    | 24–26 | target, spent, reachable | 0 | 1 | budget; cost decided so far; least cost still reachable |
    | 27 | previous_action | -1 | 1 | action of the step before |
    | 28 | accuracy_drop | -1 | 1 | original accuracy − last scored accuracy |

    "amc", `Box` of shape (11,), the state of AMC (He et al. 2018), in order (see `observation.AMC_FEATURES`):

    | index | name | min | max | meaning |
    |---|---|---|---|---|
    | 0 | index | 0 | 1 | place in the walk |
    | 1–2 | channels_out, channels_in | 0 | 1 | of the first producer / the most in the walk |
    | 3–4 | height, width | 0 | 1 | of the maps it reads (1 for linear layers) / the largest in the walk |
    | 5–6 | stride, kernel | 0 | 1 | of the first producer / the largest in the walk |
    | 7 | macs | 0 | 1 | MACs of the producers / MACs of the pristine network, whatever the budget's unit |
    | 8 | reduced | 0 | 1 | MACs that the widths decided so far take away, the same unit |
    | 9 | rest | 0 | 1 | MACs of the producers of the groups still to come, the same unit |
    | 10 | previous_action | 0 | 1 | (action of the step before + 1) / 2, 0.5 at the start |

    ## Action
    `Box(-1, 1, (1,))`; the meaning is `TrimSettings.action`: "score" (keep = sigmoid(scale · a + b), one b solved so
    that the budget is met), "ratio" (share to trim, clipped only when the budget could no longer be met),
    "threshold" (APoZ above mean + z·σ leaves, z = 1 + 2a; a constant 0 is Network Trimming). Which channels leave is
    the criterion's choice.

    ## Reward
    0 until the last step of an episode; then the sum of named terms × weights. Objective "budget":
    10 × (accuracy − accuracy of the uniform plan at the same budget, same repair, same retraining). Objective
    "accuracy_floor": ψ · φ with the accepted drop b. `RewardSettings.weights` names other terms, such as
    "divergence_gain", agreement with the original's outputs beyond the uniform plan's, and "parameters_gain".

    ## Start, end
    With `TrimSettings.budget_range` each episode draws its budget from that range, by the environment's own random
    numbers (`reset(seed=…)`); else it is `TrimSettings.budget`. `reset(options={"budget": 0.4})` names the budget of
    one episode, in the range where there is one; other keys are refused. Episodes terminate after groups × rounds
    steps and are never truncated.

    ## Info
    Each step: `group` (the group just decided). At the end of each round also `requested` and `executed` (share of
    the original channels, by group), `accuracy`, `loss`, `divergence` (mean KL divergence from the original's outputs,
    in nats), `params`, `macs`, `kept` (share of the budget's unit), `plan` (channels that stay, by group), `cached`
    (whether the score was taken from the trimmer's store; only that of a last round can be). At the end of an episode
    also `budget` (None = there was none), `reward_terms`, `reference_accuracy` and `plans` (one per round). No
    wall-clock times.

    ## Arguments
    `task`: a `PruningTask`, by default embedded digits with a small LeNet; `settings`: `TrimSettings`;
    `render_mode`: "ansi" or "rgb_array" (bars of the widths kept); `trimmer`: share the measurements of another
    environment in the same process, of the same task.

    ## Version history
    v0: first version.
    """

    metadata = {"render_modes": ["ansi", "rgb_array"], "render_fps": 4}  # noqa: RUF012  (the type gymnasium declares)

    def __init__(
        self,
        task: PruningTask | None = None,
        settings: TrimSettings | None = None,
        render_mode: str | None = None,
        trimmer: Trimmer | None = None,
    ) -> None:
        if render_mode is not None and render_mode not in self.metadata["render_modes"]:
            raise UserError(f"render_mode must be one of {self.metadata['render_modes']}, but got {render_mode!r}")
        where = type(self).__name__
        self.settings = TrimSettings() if settings is None else check_kind(settings, TrimSettings, where)
        self.render_mode = render_mode
        self.trimmer = make_trimmer(task, trimmer, self.settings.repair, self.settings.groups, where)
        if self.trimmer.lean and self.settings.observation == "full":
            raise UserError('a shared trimmer must measure everything for observation "full", but it is lean')
        model = self.trimmer.cost_model
        self._rule = checked_rule(model, self.settings)
        self._observation = make_observation(self.settings.observation, model, self.trimmer.task.example)
        self._reward = Reward(self.settings.reward)
        self.observation_space: gym.spaces.Box = self._observation.space()  # type: ignore[assignment]
        self.action_space: gym.spaces.Box = self._rule.space()  # type: ignore[assignment]
        self._budgets = self.settings.budgets
        self._uniform: dict[float | None, Measured] = {}
        self._budget = self.settings.budget
        self._subject: Subject | None = None
        self._actions: list[float] = []
        self._previous = 0.0
        self._plans: list[PruningPlan] = []
        self._score: Trimmed | Evaluated | None = None
        self._seed = self.settings.repair.seed

    # ---- the three verbs ------------------------------------------------------------------------------------------
    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Start from the pristine network; `options={"budget": share}` sets the budget of this episode."""
        super().reset(seed=seed)
        chosen = check_keys(options, {"budget": "0.4"}, "options")
        budget = replace(self.settings, **chosen).budget if chosen else None  # the settings know what it may be
        if budget is None and self._budgets:
            budget = self._budgets[self.np_random.integers(len(self._budgets))]
        elif not chosen:
            budget = self.settings.budget
        self._rule.check(budget, self.settings.budget_unit)
        self._budget = budget
        self._subject = self.trimmer.pristine
        self._actions, self._plans, self._score, self._previous = [], [], None, 0.0
        return self._observe(), {"group": self._subject.groups[0].name}

    def step(self, action: NDArray[np.float32]) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Decide the present group; at the end of a walk cut, repair and score."""
        if self._subject is None:
            raise gym.error.ResetNeeded("call reset() before step()")
        if len(self._plans) == self.settings.rounds:
            raise gym.error.ResetNeeded("the episode has ended; call reset()")
        self._previous = _scalar(action)
        self._actions.append(self._previous)
        info: dict[str, Any] = {"group": self._subject.groups[len(self._actions) - 1].name}
        reward, terminated = 0.0, False
        if len(self._actions) == len(self._subject.groups):
            info.update(self._finish_round())
            terminated = len(self._plans) == self.settings.rounds
            if terminated:
                reward, report = self._pay()
                info.update(report)
        return self._observe(), reward, terminated, False, info

    def render(self) -> Any:
        """Return the widths kept so far, as text ("ansi") or as an (H, W, 3) uint8 picture ("rgb_array")."""
        if self.render_mode is None:
            gym.logger.warn("render() needs a render_mode, 'ansi' or 'rgb_array', given when the environment is made")
            return None
        groups = self.trimmer.groups
        kept = list(self._plans[-1].counts.values()) if self._plans else [group.width for group in groups]
        names, before = [group.name for group in groups], [group.width for group in groups]
        title = f"round {len(self._plans)}/{self.settings.rounds}"
        if self._score is not None:
            share = self._kept(self._score)
            title += f", accuracy {self._score.score.accuracy:.4f}, {share:.1%} of the {self.settings.budget_unit}"
        if self.render_mode == "ansi":
            return widths_text(names, before, kept, title)
        return widths_image(names, before, kept, title)

    # ---- an episode's nouns ---------------------------------------------------------------------------------------
    def _finish_round(self) -> dict[str, Any]:
        assert self._subject is not None
        subject, actions = self._subject, np.array(self._actions)
        counts = self._rule.resolve(actions, subject, self._target(len(self._plans)))
        last = len(self._plans) + 1 == self.settings.rounds
        scored = self._score_counts(subject, counts, len(self._plans), last=last)
        originals = self.trimmer.cost_model.widths
        present = np.array([group.width for group in subject.groups])
        requested = self._rule.requested(actions, subject) * present / originals
        self._plans.append(scored.plan)
        self._score = scored
        self._actions = []
        if isinstance(scored, Trimmed):
            self._subject = self.trimmer.examine_trimmed(scored)
        names = [group.name for group in subject.groups]
        return {
            "requested": dict(zip(names, requested.tolist(), strict=True)),
            "executed": dict(zip(names, (counts / originals).tolist(), strict=True)),
            "accuracy": scored.score.accuracy,
            "loss": scored.score.loss,
            "divergence": scored.score.divergence,
            "params": scored.cost.params,
            "macs": scored.cost.macs,
            "kept": self._kept(scored),
            "plan": scored.plan.to_dict(),
            "cached": isinstance(scored, Evaluated) and scored.cached,
        }

    def _pay(self) -> tuple[float, dict[str, Any]]:
        assert self._score is not None
        uniform = self.uniform(self._budget) if self._reward.needs_reference else None
        outcome = Outcome(
            plan=Measured(self._score.score, self._score.cost),
            baseline=self.trimmer.baseline.accuracy,
            kept=self._kept(self._score),
            uniform=uniform,
        )
        terms = self._reward.terms(outcome)
        plans = [plan.to_dict() for plan in self._plans]
        report: dict[str, Any] = {"budget": self._budget, "reward_terms": terms, "plans": plans}
        if uniform is not None:
            report["reference_accuracy"] = uniform.score.accuracy
        return self._reward.total(terms), report

    def widths_after(self, actions: NDArray[np.float64], budgets: NDArray[np.float64]) -> CountArray:
        """Return (plans, groups) the channels that plans of one round leave; nothing is cut or scored.

        Args:
            actions: (plans, groups) in [-1, 1].
            budgets: (plans,) of their episodes.
        """
        return self._rule.resolve_each(actions, self.trimmer.pristine, budgets, self.settings.budget_unit)

    def uniform(self, budget: float | None) -> Measured:
        """Return score, on the reward images, and cost of uniform rounds to the budget; measured once per budget."""
        if budget not in self._uniform:
            rule = make_action_rule("score", self.trimmer.cost_model, score_scale=1.0, largest_trim=0.5)
            rule.check(budget, self.settings.budget_unit)
            subject = self.trimmer.pristine
            for place in range(self.settings.rounds):
                target = RoundTarget(self._share(budget, place), self.settings.budget_unit, True)
                counts = rule.resolve(np.zeros(len(subject.groups)), subject, target)
                scored = self._score_counts(subject, counts, place, last=place + 1 == self.settings.rounds)
                if isinstance(scored, Trimmed):
                    subject = self.trimmer.examine_trimmed(scored)
            self._uniform[budget] = Measured(scored.score, scored.cost)
        return self._uniform[budget]

    def _score_counts(
        self, subject: Subject, counts: NDArray[np.int64], place: int, *, last: bool
    ) -> Trimmed | Evaluated:
        """Score round `place`; of the last one nothing is left to cut, so that a stored score will do."""
        retraining = round_training(self.settings.retraining, self.settings.retrain_updates, last=False)
        plan, seed = self.trimmer.plan(counts, subject), round_seed(self._seed, place)
        if last:
            return self.trimmer.evaluate(plan, subject, retraining=retraining, seed=seed)
        return self.trimmer.trim(plan, subject, retraining=retraining, seed=seed)

    def _observe(self) -> NDArray[np.float32]:
        assert self._subject is not None
        ended = len(self._plans) == self.settings.rounds
        subject = self._subject
        place = len(subject.groups) - 1 if ended else len(self._actions)
        model, unit = self.trimmer.cost_model, self.settings.budget_unit
        target = self._target(min(len(self._plans), self.settings.rounds - 1))
        actions = np.array(self._actions)
        if ended:
            counts = np.array(list(self._plans[-1].counts.values()))
            least = counts
        else:
            counts = self._rule.decided(actions, subject, target)
            least = self._rule.smallest(subject)
            if self.settings.action != "score":
                least = np.concatenate((counts[: len(actions)], least[len(actions) :]))
        drop = 0.0 if self._score is None else self.trimmer.baseline.accuracy - self._score.score.accuracy
        return self._observation.observe(
            subject,
            Progress(
                position=place,
                round=len(self._plans),
                rounds=self.settings.rounds,
                target=target.share or 0.0,
                spent=model.share(counts, unit),
                reachable=model.share(least, unit),
                macs=model.share(counts, "macs"),
                previous_action=self._previous,
                accuracy_drop=drop,
            ),
        )

    def _target(self, place: int) -> RoundTarget:
        last = place == self.settings.rounds - 1
        return RoundTarget(self._share(self._budget, place), self.settings.budget_unit, last)

    def _share(self, budget: float | None, place: int) -> float | None:
        """Return what may be left after round `place`: the budget is approached geometrically."""
        return None if budget is None else budget ** ((place + 1) / self.settings.rounds)

    def _kept(self, scored: Trimmed | Evaluated) -> float:
        unit = self.settings.budget_unit
        return scored.cost.of(unit) / self.trimmer.cost_model.full.of(unit)


class ActionError(UserError):
    """An action that cannot be taken; where a policy chose it, the policy has diverged."""


def _scalar(action: Any) -> float:
    value = np.asarray(action, dtype=np.float64).reshape(-1)
    if value.size != 1 or not np.isfinite(value[0]):
        raise ActionError(f"an action must be one finite number in [-1, 1], but got {action!r}")
    return float(np.clip(value[0], -1.0, 1.0))
