"""What `prunegym compare` is asked for: methods, seeds and budgets, and what each of them may spend."""

import dataclasses
import hashlib
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..envs.trim_settings import check_request
from ..pruning.checks import check_seed, check_types
from ..pruning.cost import CostModel
from ..pruning.criteria import CRITERIA
from ..pruning.errors import UserError, closest
from ..pruning.grouping import find_groups
from ..pruning.heuristics import Goal, RankingSettings
from ..pruning.prepare import TaskSettings
from .configuration import read_values, resolve_device
from .controls import CONTROLS, ControlSettings
from .learner import imagines
from .methods import METHODS, Prospect
from .search import resolve_settings
from .settings import MethodSettings, SearchSettings

AGENT, UNIFORM, POOL = "agent", "uniform", "pool"

SURROGATE = "surrogate"
"""The agent without its policy gradient: the same model, proposals and evaluations, a policy that never learns."""

SEARCHES_AT_RANDOM = "random_search"
"""Random *search*; "random" is the ranking at random, a method of `prunegym prune`."""

CONTROL_NAMES = {SEARCHES_AT_RANDOM if name == "random" else name: name for name in CONTROLS}
"""Name in a comparison -> name in `CONTROLS`."""

KNOWN = (AGENT, SURROGATE, UNIFORM, *CONTROL_NAMES, *METHODS)

ENOUGH_SEEDS = 5
"""Fewer give no verdict."""

FEWEST_RESAMPLES = 100
"""With fewer the ends of an interval are luck; a single one would make any difference certain."""


def is_search(method: str) -> bool:
    """Return whether a method spends evaluations on whole plans: the agent, its model alone, AMC and the controls."""
    return method in (AGENT, SURROGATE, "amc") or method in CONTROL_NAMES


def is_ranking(method: str) -> bool:
    """Return whether a method ranks the channels by one criterion and cuts at once."""
    return method in METHODS and method in CRITERIA and method != "data_free"


def feeds_pool(method: str) -> bool:
    """Return whether the pool may take a method's plans: the agent's and those of heuristics that cut at once."""
    return method in (AGENT, UNIFORM) or is_ranking(method)


@dataclass(frozen=True)
class CompareSettings:
    """What is compared, and what each method may spend.

    Attributes:
        methods: "agent", "uniform", a control search ("random_search", "cem", …, "surrogate": the agent without its
            policy gradient) or a name of `METHODS`, where "random" is a ranking at random.
        seeds: Roots of the random numbers, at least 5 for a verdict. A seed decides the images drawn for calibration,
            recalibration and reward, the search and the retraining; network and splits are the same for all.
        budgets: Shares of the cost to keep, in (0, 1].
        evaluations: Distinct plans that a search may score for each budget; one that serves all budgets with one
            training may spend the sum.
        retrain_updates: Optimizer steps of each finished network, over all rounds.
        budget_tolerance: Share of the budget, in [0, 1), by which a plan may stay below it; above it none may be.
        ranking_scope: How much of each group a ranking keeps, see `RankingSettings.scope`: "uniform" compares criteria
            at the same widths; "global", at once and without training in between, may nearly empty layers.
        pool: Whether a row is added that takes, on the selection split right after the cut, the best of the
            heuristics' plans and the agent's `candidates` best; only where at least two methods have such plans.
        controls: How the control searches proceed.
        confidence: Of the intervals, in (0, 1).
        resamples: Of the bootstrap, at least 100.
    """

    methods: tuple[str, ...] = (AGENT, UNIFORM, "apoz", "taylor_2019", "l1", SEARCHES_AT_RANDOM, "cem")
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    budgets: tuple[float, ...] = (0.3,)
    evaluations: int = 300
    retrain_updates: int = 300
    budget_tolerance: float = 0.03
    ranking_scope: str = "uniform"
    pool: bool = True
    controls: ControlSettings = field(default_factory=ControlSettings)
    confidence: float = 0.95
    resamples: int = 9999

    def __post_init__(self) -> None:
        """Refuse unknown names, doubles and values outside their ranges."""
        check_types(self)
        for name in ("methods", "seeds", "budgets"):
            values = getattr(self, name)
            object.__setattr__(self, name, tuple(values))
            if not values:
                raise UserError(f"{name} must hold at least one, but the list is empty; leave it out for the default")
            twice = next((value for place, value in enumerate(values) if value in values[:place]), None)
            if twice is not None:
                raise UserError(f"{name} must differ from each other, but got {twice!r} twice in {list(values)}")
        for name in self.methods:
            if name not in KNOWN:
                raise UserError(f"methods must hold known names, but got {name!r}{closest(name, KNOWN)}")
        for seed in self.seeds:
            check_seed(seed, "each of seeds")
        for budget in self.budgets:
            if not 0 < budget <= 1:
                raise UserError(f"budgets must be in (0, 1], but got {budget}; each is the share of the cost to keep")
        if len({f"{budget:g}" for budget in self.budgets}) < len(self.budgets):
            raise UserError(
                f"budgets must differ within six digits, but got {list(self.budgets)}; networks are filed by them"
            )
        if self.evaluations < 1 or self.retrain_updates < 0:
            raise UserError(
                "evaluations must be at least 1 and retrain_updates at least 0, but got "
                f"{self.evaluations} and {self.retrain_updates}"
            )
        if self.resamples < FEWEST_RESAMPLES:
            raise UserError(
                f"resamples must be at least {FEWEST_RESAMPLES}, but got {self.resamples}; 9999 are usual, and quick"
            )
        one_shot(RankingSettings(), self.ranking_scope)  # which knows the scopes
        if not 0 <= self.budget_tolerance < 1 or not 0 < self.confidence < 1:
            raise UserError(
                "budget_tolerance must be in [0, 1) and confidence in (0, 1), but got "
                f"{self.budget_tolerance} and {self.confidence}"
            )

    @property
    def rows(self) -> tuple[str, ...]:
        """The methods in order, and the pool where there is one."""
        pooled = self.pool and sum(map(feeds_pool, self.methods)) > 1
        return (*self.methods, POOL) if pooled else self.methods

    @property
    def subject(self) -> str:
        """The method that the others are compared with: the agent, or the first where it does not take part."""
        return AGENT if AGENT in self.methods else self.methods[0]


@dataclass(frozen=True)
class CompareConfig:
    """Everything `prunegym compare` needs.

    Attributes:
        task: Network and data.
        search: The agent, the environment and the methods' own settings. Budgets, evaluations and number of retraining
            updates are those of `compare`; `seed` decides the network where it is trained here.
        compare: Methods, seeds, budgets and what they may spend.
        data_root: Folder that holds the data; replaces `task.data_root`.
        device: "auto", "cpu" or "cuda".
        threads: Threads that PyTorch may use in each process; 0 = its own choice, or 1 where `jobs` is above 1.
        jobs: Cells that run at the same time, each in a process of its own.
        output: Run folder, new or one that this comparison left unfinished; None = `runs/<name>-<number>`.
        resume: Run folder to go on with.
        name: Name of the run.
    """

    task: TaskSettings = field(default_factory=TaskSettings)
    search: SearchSettings = field(default_factory=SearchSettings)
    compare: CompareSettings = field(default_factory=CompareSettings)
    data_root: str | None = None
    device: str = "auto"
    threads: int = 0
    jobs: int = 1
    output: str | None = None
    resume: str | None = None
    name: str = "compare"

    def __post_init__(self) -> None:
        """Refuse values of other types or outside their ranges, and settings that would favour a method."""
        check_types(self)
        if self.threads < 0 or self.jobs < 1:
            raise UserError(f"threads must be at least 0 and jobs at least 1, but got {self.threads} and {self.jobs}")
        if self.output is not None and self.resume is not None:
            raise UserError("a comparison has one run folder, but got --output and --resume; give one of them")
        if self.compare.evaluations < self.search.trim.rounds:
            raise UserError(
                "compare.evaluations must hold one episode, search.trim.rounds, but got "
                f"{self.compare.evaluations} and {self.search.trim.rounds}; allow more, or take fewer rounds"
            )
        check_fair(self.search)


def check_fair(search: SearchSettings) -> None:
    """Refuse what would make a comparison at equal cost uneven.

    Raises:
        UserError: Training inside episodes, a time limit, or weights that are chosen on the selection split.
    """
    trim = search.trim
    if trim.retrain_updates:
        raise UserError(
            f"plans are compared before and after retraining, so search.trim.retrain_updates must be 0, but got "
            f"{trim.retrain_updates}"
        )
    if trim.reward.objective != "budget":
        raise UserError(
            f"plans are compared at equal budgets, so search.trim.reward.objective must be 'budget', but got "
            f"{trim.reward.objective!r}"
        )
    if search.max_minutes:
        raise UserError(
            f"searches are compared at equal evaluations, so search.max_minutes must be 0, but got {search.max_minutes}"
        )
    if trim.retraining.check_every:
        raise UserError(
            "networks are compared on the selection split, so it must not choose their weights: "
            f"search.trim.retraining.check_every must be 0, but got {trim.retraining.check_every}"
        )


def read_compare(arguments: Sequence[str]) -> CompareConfig:
    """Return what `prunegym compare` is asked for, resolved.

    With `--resume RUN` and no CONFIG the configuration is the run's own.

    Raises:
        UserError: No configuration, an unknown key or a value of the wrong type; the nearest key is named.
    """
    stored = _stored_in(arguments)
    if stored is not None:
        arguments = ["--config", str(stored), *arguments]
    return resolve_compare(CompareConfig(**read_values(arguments, "compare", CompareConfig)))


def resolve_compare(config: CompareConfig) -> CompareConfig:
    """Move the shortcuts to where they belong."""
    task = replace(config.task, data_root=config.data_root or config.task.data_root)
    search = resolve_settings(config.search)
    return replace(config, task=task, search=search, data_root=None, device=resolve_device(config.device))


def _stored_in(arguments: Sequence[str]) -> Path | None:
    """Return the configuration of the run that `--resume` names, where no other is given."""
    words = [word.partition("=") for word in arguments]
    if any(word == "--config" for word, _, _ in words) or (arguments and not arguments[0].startswith("-")):
        return None
    for place, (word, equals, value) in enumerate(words):
        if word == "--resume" and (equals or place + 1 < len(arguments)):
            path = Path(value if equals else arguments[place + 1]) / "config.yaml"
            if not path.is_file():
                raise UserError(f"--resume needs the run folder of a comparison, but there is no {path}")
            check_comparison(path.parent)
            return path
    return None


def check_comparison(folder: Path) -> None:
    """Refuse the run folder of another command.

    Raises:
        UserError: It says that another command made it.
    """
    path = folder / "command.txt"
    words = shlex.split(path.read_text(encoding="utf-8")) if path.is_file() else []
    if words[:1] == ["prunegym"] and words[1:2] != ["compare"]:
        raise UserError(
            f"only a comparison can go on in its folder, but {folder} was made by: {shlex.join(words[:2])}; give the "
            "folder of a comparison, or another --output"
        )


# ---- what one cell gets ----------------------------------------------------------------------------------------------
def search_settings(search: SearchSettings, compare: CompareSettings, seed: int, budget: float) -> SearchSettings:
    """Return the settings of one method at one seed and budget; the seed decides images, search and retraining."""
    retraining = replace(search.trim.retraining, updates=compare.retrain_updates, epochs=0.0).without_checks()
    trim = replace(search.trim, budget=budget, budget_range=None, retraining=retraining)
    methods = replace(
        search.methods,
        taylor=one_shot(search.methods.taylor, compare.ranking_scope),
        ranking=one_shot(search.methods.ranking, compare.ranking_scope),
        amc=_shortened(search.methods, compare.evaluations),
    )
    changed = replace(search, trim=trim, methods=methods, max_evaluations=compare.evaluations, seed=seed)
    return resolve_settings(changed)


def one_shot(settings: RankingSettings, scope: str) -> RankingSettings:
    """Return how a ranking cuts at once: the same norm, one round; `scope` says how much of each group stays."""
    changed = replace(settings, rounds=1, channels_per_round=0, updates_between=-1, narrowest=0.0, mac_regulariser=0.0)
    return replace(changed, scope=scope)


def _shortened(methods: MethodSettings, evaluations: int) -> Any:
    """Return AMC's settings with another number of evaluations, and the same share of them for its warm-up."""
    own = methods.amc
    warmup = min(evaluations - 1, round(own.warmup_episodes / own.evaluations * evaluations))
    return replace(own, evaluations=evaluations, warmup_episodes=warmup)


def check_compare(network: nn.Module, example: Tensor, search: SearchSettings, compare: CompareSettings) -> None:
    """Refuse, before anything is trained or measured, what a method cannot do with a network.

    Args:
        network: Its weights do not matter.
        example: (1, …) one input.
        search: Environment and methods.
        compare: Methods and budgets.

    Raises:
        UserError: A budget out of reach, or a method that cannot serve this network; it is named.
    """
    chosen, unit = search.trim.groups, search.trim.budget_unit
    for budget in compare.budgets:
        check_request(network, example, replace(search.trim, budget=budget, budget_range=None))
    if SURROGATE in compare.methods and not imagines(search.learner, search.trim):
        raise UserError(
            f"{SURROGATE!r} is the agent's model alone, but this agent has none; it needs one round, the rule "
            '"score", the "full" observation and search.learner.imagination.updates, or take '
            f"{SURROGATE!r} out of compare.methods"
        )
    groups = find_groups(network, example, include=chosen.include, ignore=chosen.ignore)
    model = CostModel(network, groups, example, chosen)
    for name in compare.methods:
        if name not in METHODS:
            continue
        for budget in compare.budgets:
            methods = search_settings(search, compare, 0, budget).methods
            try:
                METHODS[name].check(Prospect(network, groups, model, Goal(budget, unit), methods))
            except UserError as error:
                raise UserError(f"{error} (budget {budget}; or take {name!r} out of compare.methods)") from error


def cell_digest(config: CompareConfig, method: str, seed: int, base: str) -> str:
    """Return a digest of everything that decides a cell.

    Other methods, other seeds and where the data lies are not in it, so a comparison may be enlarged.

    Args:
        config: Resolved.
        method: Of the cell.
        seed: Of the cell.
        base: Digest of what all cells stand on: weights, data, device, versions.
    """
    task = dataclasses.asdict(config.task)
    for elsewhere in ("data_root", "in_memory", "workers", "weights", "training"):
        task.pop(elsewhere)
    compare = dataclasses.asdict(config.compare)
    for others in ("methods", "seeds", "confidence", "resamples", "pool"):
        compare.pop(others)
    search = dataclasses.asdict(config.search)
    for replaced in ("max_evaluations", "seed", "compare", "latency_batches", "scores", "noise_check", "pool"):
        search.pop(replaced, None)
    if method not in CONTROL_NAMES:
        compare.pop("controls")
    if method not in (AGENT, SURROGATE, POOL):
        search.pop("learner")
    parts = {"task": task, "search": search, "compare": compare, "method": method, "seed": seed, "base": base}
    if method == POOL:
        parts["methods"] = list(config.compare.methods)
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]
