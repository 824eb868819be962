"""Settings of a search, one dataclass per concern; the YAML files and the command line mirror them."""

from dataclasses import dataclass, field
from typing import Any

from ..envs.select import SelectSettings
from ..envs.trim_settings import TrimSettings
from ..pruning.checks import check_seed, check_types
from ..pruning.errors import UserError, closest
from ..pruning.heuristics import DataFreeSettings, Goal, NetworkTrimmingSettings, RankingSettings
from ..pruning.prepare import TaskSettings

NOISE_CHECKS = ("refuse", "warn", "off")


@dataclass(frozen=True)
class ImaginationSettings:
    """How a learner practises on predicted rewards between its evaluations, see `planner`.

    Attributes:
        updates: Policy updates on imagined episodes after each update of the model; 0 = the policy learns from scored
            episodes alone. Only for on-policy algorithms without an `n_steps` of their own, one round, the rule "score"
            and the "full" observation; otherwise, too, scored episodes alone are learned from.
        walks: Imagined episodes of each policy update.
        proposals: Plans that are considered at a time, of which the promising ones are scored.
        practise: Whether the policy learns. Without, it stays at the uniform plan and the model decides alone: a
            control, which tells what the policy gradient is worth.
    """

    updates: int = 8
    walks: int = 64
    proposals: int = 192
    practise: bool = True

    def __post_init__(self) -> None:
        """Refuse values of other types or outside their ranges."""
        check_types(self)
        if self.updates < 0 or self.walks < 2 or self.proposals < 1:
            raise UserError(
                "imagination needs updates of at least 0, walks of at least 2 and proposals of at least 1, but got "
                f"{self.updates}, {self.walks} and {self.proposals}"
            )


@dataclass(frozen=True)
class LearnerSettings:
    """How the agent learns.

    Attributes:
        algorithm: PPO, A2C or another Stable-Baselines3 / sb3-contrib algorithm for continuous actions, by name.
        workers: Environments; more than one run in processes of their own.
        episodes_per_update: Episodes that each worker plays between two updates (on-policy algorithms); with
            imagination, plans that are scored between two updates, by all workers together.
        warmup_episodes: Episodes of uniformly random actions before anything is learned (off-policy algorithms);
            None = episodes_per_update.
        learning_rate: At the start; it falls linearly to a tenth.
        noise_start: Log standard deviation of the actions at the start: of a Gaussian policy, or of the noise added to
            the deterministic actions of DDPG and TD3 once their warm-up is over. A learner that plans also lets half of
            its proposals stray by up to this, from the policy and from the best plans, all along.
        noise_end: The same when all evaluations are spent; the logarithm falls linearly.
        hidden: Units of each hidden layer of policy and value function.
        imagination: Practice on predicted rewards.
        arguments: Further keyword arguments of the algorithm's constructor, e.g. buffer_size, tau, gradient_steps; for
            DDPG and TD3 n_steps, the steps a return looks ahead, is the whole episode by default.
    """

    algorithm: str = "PPO"
    workers: int = 1
    episodes_per_update: int = 8
    warmup_episodes: int | None = None
    learning_rate: float = 2e-3
    noise_start: float = -0.7
    noise_end: float = -2.5
    hidden: list[int] = field(default_factory=lambda: [64, 64])
    imagination: ImaginationSettings = field(default_factory=ImaginationSettings)
    arguments: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse values of other types or outside their ranges."""
        check_types(self)
        if self.workers < 1 or self.episodes_per_update < 1:
            raise UserError(
                f"workers and episodes_per_update must be at least 1, but got {self.workers} and "
                f"{self.episodes_per_update}"
            )
        if self.warmup_episodes is not None and self.warmup_episodes < 0:
            raise UserError(f"warmup_episodes must be at least 0, but got {self.warmup_episodes}")
        if not self.learning_rate > 0:
            raise UserError(f"learning_rate must be positive, but got {self.learning_rate}")


@dataclass(frozen=True)
class AmcSettings:
    """How AMC proceeds; its environment and agent are fixed, see `amc`.

    Attributes:
        evaluations: Scored networks.
        warmup_episodes: Of these, with random actions before anything is learned; the paper: 100 of 800.
        learning_rate: At the start; it falls linearly to a tenth.
        noise_start: Log standard deviation of the noise on actions in [-1, 1] after the warm-up; the paper: 0, which is
            0.5 on shares in [0, 1].
        noise_end: The same when all evaluations are spent.
        hidden: Units of each hidden layer of actor and critic.
        largest_trim: Largest share of a layer that leaves; the paper: 0.8.
        candidates: Best plans that are scored again, on the selection split; the best there wins.
    """

    evaluations: int = 300
    warmup_episodes: int = 60
    learning_rate: float = 1e-3
    noise_start: float = 0.0
    noise_end: float = -3.5
    hidden: tuple[int, ...] = (300, 300)
    largest_trim: float = 0.8
    candidates: int = 5

    def __post_init__(self) -> None:
        """Refuse values of other types or outside their ranges."""
        check_types(self)
        if not 0 <= self.warmup_episodes < self.evaluations or self.candidates < 1:
            raise UserError(
                "AMC needs evaluations > warmup_episodes >= 0 and candidates >= 1, but got "
                f"{self.evaluations}, {self.warmup_episodes} and {self.candidates}"
            )
        if not self.learning_rate > 0 or not 0 < self.largest_trim < 1 or any(units < 1 for units in self.hidden):
            raise UserError(
                "AMC needs learning_rate > 0, largest_trim in (0, 1) and hidden layers of at least one unit, but got "
                f"{self.learning_rate}, {self.largest_trim} and {list(self.hidden)}"
            )


@dataclass(frozen=True)
class TryAndLearnSettings:
    """How try-and-learn proceeds.

    Attributes:
        accepted_drop: b of the reward, in (0, 1]: the accepted drop below the original's accuracy; 0.02 is two points.
            None = that of the goal, or 0.02 where it has none, or one of 0: ψ divides by it.
        evaluations: Networks that are cut, fine-tuned and scored for each layer; the last is the policy's own choice.
        episodes_per_update: Of these, samples of one REINFORCE update, at least 2.
        learning_rate: Of the policy (Adam), at the start of each layer; it falls linearly to a tenth.
        entropy: Weight, at least 0, of the policy's entropy beside its rewards: without any, choices settle before the
            last useless filters are found. The published method names none (0).
        initial_keep: Probability, in (0, 1), with which an untrained policy keeps a filter.
        hidden: Units of each layer of the policy, from 1.
        fine_tune: Training updates inside an episode, before a network is scored; none where the retraining has no
            updates either, so that what is tried is what is built.
        updates_between: Optimizer steps after every layer but the last; -1 = an equal share of those for early rounds.
        final_share: Share of all updates, in [0, 1], that is kept for the training after the last layer; of no account
            where `updates_between` is given.
        layers: Patterns such as "layer3.*"; only groups with a producer that matches one are decided, from the lowest
            to the highest. Empty = all that may be cut.
    """

    accepted_drop: float | None = None
    evaluations: int = 200
    episodes_per_update: int = 5
    learning_rate: float = 0.01
    entropy: float = 0.03
    initial_keep: float = 0.9
    hidden: int = 128
    fine_tune: int = 10
    updates_between: int = -1
    final_share: float = 0.5
    layers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse values of other types or outside their ranges."""
        check_types(self)
        SelectSettings(accepted_drop=self.drop_for(None), fine_tune=self.fine_tune)  # which know their ranges
        if self.episodes_per_update < 2 or self.evaluations <= self.episodes_per_update:
            raise UserError(
                "episodes_per_update must be at least 2 and evaluations larger, but got "
                f"{self.episodes_per_update} and {self.evaluations}; returns are normalised over one update"
            )
        if not self.learning_rate > 0 or not 0 < self.initial_keep < 1 or self.hidden < 1:
            raise UserError(
                "learning_rate must be positive, initial_keep in (0, 1) and hidden at least 1, but got "
                f"{self.learning_rate}, {self.initial_keep} and {self.hidden}"
            )
        if self.entropy < 0 or self.updates_between < -1 or not 0 <= self.final_share <= 1:
            raise UserError(
                "entropy must be at least 0, updates_between at least -1 and final_share in [0, 1], but got "
                f"{self.entropy}, {self.updates_between} and {self.final_share}"
            )

    def drop_for(self, goal: Goal | None) -> float:
        """Return b: the settings' own, else the goal's, else 0.02; a goal of no drop at all has none to divide by."""
        if self.accepted_drop is not None:
            return self.accepted_drop
        return (goal.accepted_drop if goal else None) or 0.02


@dataclass(frozen=True)
class MethodSettings:
    """How the methods that a search is compared with proceed.

    Attributes:
        network_trimming: Iterative removal by APoZ.
        data_free: Merging of nearly equal neurons.
        taylor: "taylor_2017" and "taylor_2019": a few channels a round, updates in between.
        try_and_learn: A policy for each layer that looks at its filters.
        amc: DDPG on layer after layer.
        ranking: Every other ranking, e.g. "l1" or "mean_activation".
    """

    network_trimming: NetworkTrimmingSettings = field(default_factory=NetworkTrimmingSettings)
    data_free: DataFreeSettings = field(default_factory=DataFreeSettings)
    try_and_learn: TryAndLearnSettings = field(default_factory=TryAndLearnSettings)
    amc: AmcSettings = field(default_factory=AmcSettings)
    taylor: RankingSettings = field(default_factory=lambda: RankingSettings(scope="global", channels_per_round=16))
    ranking: RankingSettings = field(default_factory=RankingSettings)


@dataclass(frozen=True)
class SearchSettings:
    """How a search proceeds.

    Attributes:
        trim: Budget, action, repair, reward and retraining.
        learner: The agent.
        methods: The methods that the agent is compared with, and that `prunegym prune` runs.
        max_evaluations: Scored networks that the agent may spend (the final comparison is not counted).
        max_minutes: Wall-clock limit of the learning phase; 0 = none. The best plan so far is then used.
        candidates: Best plans of the search that are scored again, on the selection split; the best there wins.
        pool: Whether the heuristics' plans at the budget (uniform, APoZ, Taylor, L1, right after the same repair) are
            candidates, too: what is built is then never worse than they on the selection split right after the cut.
        compare: Whether the heuristics are run to the same budget and are allowed the same retraining updates.
        latency_batches: Batch sizes for which the finished networks' forward pass is timed; empty = not timed.
        noise_check: What happens before the search where the reward images cannot tell plans apart: "refuse", "warn",
            or "off" (not measured), see `noise_meter`.
        scores: File of scores that runs share, so that a plan that any of them scored is not scored again; None = one
            of the run's own, in its folder.
        seed: Root of all random numbers, in [0, 2**63).
    """

    trim: TrimSettings = field(default_factory=TrimSettings)
    learner: LearnerSettings = field(default_factory=LearnerSettings)
    methods: MethodSettings = field(default_factory=MethodSettings)
    max_evaluations: int = 300
    max_minutes: float = 0.0
    candidates: int = 5
    pool: bool = True
    compare: bool = True
    latency_batches: tuple[int, ...] = (1, 64)
    noise_check: str = "refuse"
    scores: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse values of other types or outside their ranges."""
        check_types(self)
        check_seed(self.seed)
        if self.max_evaluations < 1 or self.candidates < 1 or self.max_minutes < 0:
            raise UserError(
                "max_evaluations and candidates must be at least 1 and max_minutes at least 0, but got "
                f"{self.max_evaluations}, {self.candidates} and {self.max_minutes}"
            )
        if any(batch < 1 for batch in self.latency_batches):
            raise UserError(f"latency_batches must hold sizes from 1, but got {list(self.latency_batches)}")
        if self.noise_check not in NOISE_CHECKS:
            hint = closest(self.noise_check, NOISE_CHECKS)
            raise UserError(f"noise_check must be one of {', '.join(NOISE_CHECKS)}, but got {self.noise_check!r}{hint}")


@dataclass(frozen=True)
class SearchConfig:
    """Everything `prunegym search` needs.

    Attributes:
        task: Network and data.
        search: The search.
        data_root: Folder that holds the data; replaces `task.data_root`.
        budget: Share of the cost to keep, in (0, 1]; replaces `search.trim.budget`.
        max_evaluations: Replaces `search.max_evaluations`.
        max_minutes: Replaces `search.max_minutes`.
        seed: Root seed; replaces `search.seed`.
        device: "auto", "cpu" or "cuda".
        threads: Threads that PyTorch may use; 0 = its own choice.
        output: Run folder; None = `runs/<name>-<number>`.
        name: Name of the run.
    """

    task: TaskSettings = field(default_factory=TaskSettings)
    search: SearchSettings = field(default_factory=SearchSettings)
    data_root: str | None = None
    budget: float | None = None
    max_evaluations: int | None = None
    max_minutes: float | None = None
    seed: int | None = None
    device: str = "auto"
    threads: int = 0
    output: str | None = None
    name: str = "search"

    def __post_init__(self) -> None:
        """Refuse values of other types or outside their ranges."""
        check_types(self)
        if self.budget is not None and not 0 < self.budget <= 1:
            raise UserError(f"budget must be in (0, 1], but got budget={self.budget}; it is the share to keep")
        if self.threads < 0:
            raise UserError(f"threads must be at least 0, but got {self.threads}; 0 leaves the choice to PyTorch")
        if self.seed is not None:
            check_seed(self.seed)
