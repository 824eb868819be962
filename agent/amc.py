"""AMC: a DDPG agent walks the layers and says how much of each stays; a comparator on the same environment.

Source: He, Lin, Liu, Wang, Li, Han, "AMC: AutoML for Model Compression and Acceleration on Mobile Devices" (ECCV 2018,
arXiv 1802.03494): eleven-feature state, share to keep as action, clipped only when the budget could no longer be met,
magnitude and a least-squares refit inside the environment, reward -error with a budget, -error · ln(MACs) without.
Ours is the choice at the end: the best plans are scored again on the selection split.
"""

from collections.abc import Callable
from dataclasses import replace

from ..envs.action import make_action_rule
from ..envs.reward import RewardSettings
from ..envs.trim import TrimEnv
from ..envs.trim_settings import TrimSettings
from ..pruning.checks import check_kind, check_seed
from ..pruning.cost import Cost, CostModel
from ..pruning.errors import UserError
from ..pruning.heuristics import Goal, PlanRecord, Provenance, Pruned
from ..pruning.plan import PruningPlan
from ..pruning.retraining import RetrainSettings
from ..pruning.schedule import Round, Schedule, build
from ..pruning.trimmer import Trimmer
from .history import Evaluation, History
from .learning import learn
from .pool import choose
from .progress import Progress
from .randomness import random_state_kept
from .settings import AmcSettings, LearnerSettings, SearchSettings


@random_state_kept()
def amc(
    trimmer: Trimmer,
    goal: Goal,
    settings: AmcSettings | None = None,
    *,
    retraining: RetrainSettings,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
    evaluated: Callable[[int], None] | None = None,
) -> Pruned:
    """Let DDPG find widths, build the best plan, and train it.

    Without a budget the plan is built that costs least, in the goal's unit, of those whose accuracy, right after the
    cut, is within the accepted drop. The global random state stays as it was.

    Args:
        trimmer: Task and settings; the criterion is replaced by "l1". The published repair is "least_squares".
        goal: Budget, met by the clipped actions, or accuracy floor; with both the budget decides and the finished
            network must not have lost more than accepted.
        settings: See `AmcSettings`.
        retraining: After the cut.
        seed: Of agent and retraining, in [0, 2**63).
        progress: Called with the number of optimizer steps of retraining done so far.
        evaluated: Called with the number of networks scored so far.

    Returns:
        One plan with its provenance and scores.

    Raises:
        UserError: The budget is out of reach of the largest trim, nothing tried keeps to the accepted drop, the
            finished network does not, or the agent diverged.
    """
    check_kind(trimmer, Trimmer, "amc")
    check_kind(goal, Goal, "amc")
    check_kind(retraining, RetrainSettings, "amc")
    check_seed(seed)
    settings = AmcSettings() if settings is None else check_kind(settings, AmcSettings, "amc")
    retraining = retraining.resolved(len(trimmer.task.train))
    check_amc(trimmer.cost_model, goal, settings)
    trimmer = trimmer.with_settings(replace(trimmer.settings, criterion="l1"))
    search = as_search(trimmer, goal, settings, retraining, seed)
    history = _Counting(evaluated)
    environment = TrimEnv(trimmer.task, search.trim, trimmer=trimmer)
    learn(trimmer.task, search, trimmer, environment, history, None, Progress())
    if goal.budget is None:
        schedule = _cheapest(trimmer, goal, history, retraining)
    else:
        schedule = choose(trimmer, search, history, None, Progress()).schedule
    schedule = replace(schedule, made_by="amc", seed=seed)
    built = build(trimmer, schedule, progress=progress)
    drop = trimmer.baseline.accuracy - built.rounds[-1].after_retraining.accuracy
    if goal.accepted_drop is not None and drop > goal.accepted_drop:
        raise UserError(
            f"amc lost {100 * drop:.2f} points, more than the accepted {100 * goal.accepted_drop:g}; accept more, "
            "raise the budget, or allow more evaluations or retraining updates"
        )
    records = tuple(
        PlanRecord(
            entry.plan,
            Provenance(
                "amc", place + 1, trimmer.settings.criterion, trimmer.settings.compensation, entry.retrain_updates, seed
            ),
            done,
        )
        for place, (entry, done) in enumerate(zip(schedule.rounds, built.rounds, strict=True))
    )
    widths = {group.name: group.width for group in trimmer.groups}
    return Pruned(
        built.network, schedule, records, widths, stopped_by="search" if goal.budget is None else "budget"
    )  # fmt: skip


def check_amc(model: CostModel, goal: Goal, settings: AmcSettings) -> None:
    """Refuse a network with nothing to cut, and a budget that the largest trim cannot reach.

    Raises:
        UserError: Says what the largest trim leaves.
    """
    if (model.allowed.smallest(model.widths) == model.widths).all():
        raise UserError("amc found no channel that may leave; allow narrower widths, or more groups")
    rule = make_action_rule("ratio", model, score_scale=1.0, largest_trim=settings.largest_trim)
    rule.check(goal.budget, goal.unit)


def as_search(
    trimmer: Trimmer, goal: Goal, settings: AmcSettings, retraining: RetrainSettings, seed: int
) -> SearchSettings:
    """Return AMC as the settings of a search: the same environment, another configuration."""
    reward = "negative_error" if goal.budget is not None else "error_log_macs"
    return SearchSettings(
        trim=TrimSettings(
            budget=goal.budget,
            budget_unit=goal.unit,
            action="ratio",
            observation="amc",
            largest_trim=settings.largest_trim,
            retraining=retraining,
            groups=trimmer.group_settings,
            repair=trimmer.settings,
            reward=RewardSettings(weights={reward: 1.0}),
        ),
        learner=LearnerSettings(
            algorithm="DDPG",
            warmup_episodes=settings.warmup_episodes,
            learning_rate=settings.learning_rate,
            noise_start=settings.noise_start,
            noise_end=settings.noise_end,
            hidden=list(settings.hidden),
            arguments={
                "buffer_size": 100 * len(trimmer.groups), "batch_size": 64, "tau": 0.01, "gradient_steps": 1,
            },
        ),
        max_evaluations=settings.evaluations,
        candidates=settings.candidates,
        seed=seed,
    )  # fmt: skip


class _Counting(History):
    """A history that tells how many networks were scored."""

    def __init__(self, evaluated: Callable[[int], None] | None) -> None:
        super().__init__()
        self._evaluated = evaluated

    def add(self, row: Evaluation) -> None:
        """Take a row in, and tell."""
        super().add(row)
        if self._evaluated:
            self._evaluated(len(self.rows))


def _cheapest(trimmer: Trimmer, goal: Goal, history: History, retraining: RetrainSettings) -> Schedule:
    """Return the schedule of the plan that costs least, in the goal's unit, and keeps to the accepted drop.

    The loss on the reward images decides between equals.

    Raises:
        UserError: No plan keeps to it; the best accuracy is named.
    """
    assert goal.accepted_drop is not None  # held by `Goal`
    least = trimmer.baseline.accuracy - goal.accepted_drop
    good = [row for row in history.finished if row.accuracy >= least]
    if not good:
        best = max((row.accuracy for row in history.finished), default=0.0)
        raise UserError(
            f"amc found no plan within {100 * goal.accepted_drop:g} points of the original's "
            f"{100 * trimmer.baseline.accuracy:.2f} %; its best has {100 * best:.2f} %; accept more, or allow more "
            "evaluations"
        )
    chosen = min(good, key=lambda row: (Cost(row.params, row.macs).of(goal.unit), row.loss))
    plan = PruningPlan.from_dict(chosen.plans[-1])
    return Schedule((Round(plan, retraining.updates),), trimmer.settings, replace(retraining, updates=0))
