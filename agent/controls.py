"""Searches that learn no policy: what the agent has to beat with the same actions and the same evaluations.

A control draws one number in [-1, 1] for each group and round, plays them through `TrimEnv` as the agent does, and is
told the reward. 0 everywhere is, under the rule "score", the uniform plan.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..envs.trim import TrimEnv
from ..pruning.checks import check_kind, check_seed, check_types
from ..pruning.errors import UserError, closest
from .history import History, Recorder, limit_reached
from .randomness import derive_seed, random_state_kept

Actions = NDArray[np.float64]


@dataclass(frozen=True)
class ControlSettings:
    """How the controls proceed.

    Attributes:
        population: Episodes of one generation of the cross-entropy method, at least 2.
        elites: Share of them, in (0, 1], that the next generation is fitted to; at least one episode.
        smoothing: Weight, in (0, 1], of the elites' mean and standard deviation against those before.
        start_std: Standard deviation of the first generation, positive; its mean is 0.
        least_std: Standard deviations never fall below, in [0, start_std].
        sigma: Step size of CMA-ES at the start, positive.
        cma_population: Episodes of one generation of CMA-ES, at least 4; 0 = 4 + 3 ln(actions), rounded down.
    """

    population: int = 20
    elites: float = 0.2
    smoothing: float = 0.7
    start_std: float = 0.5
    least_std: float = 0.05
    sigma: float = 0.4
    cma_population: int = 0

    def __post_init__(self) -> None:
        """Refuse values of other types or outside their ranges."""
        check_types(self)
        if self.population < 2 or not 0 < self.elites <= 1:
            raise UserError(
                f"population must be at least 2 and elites in (0, 1], but got {self.population} and {self.elites}"
            )
        if not 0 < self.smoothing <= 1:
            raise UserError(f"smoothing must be in (0, 1], but got {self.smoothing}; 1 forgets what was before")
        if not self.start_std > 0 or not 0 <= self.least_std <= self.start_std:
            raise UserError(
                "start_std must be positive and least_std in [0, start_std], but got "
                f"{self.start_std} and {self.least_std}"
            )
        if not self.sigma > 0 or (self.cma_population and self.cma_population < 4):
            raise UserError(
                "sigma must be positive and cma_population at least 4, or 0 for the library's own, but got "
                f"{self.sigma} and {self.cma_population}"
            )


class Control(Protocol):
    """A search that proposes actions and is told what they earned."""

    def ask(self) -> Actions:
        """Return (k, n) the actions, in [-1, 1], of the next k episodes."""

    def tell(self, actions: Actions, rewards: NDArray[np.float64]) -> None:
        """Take in the (k,) rewards of the (k, n) actions that `ask` returned last."""


class RandomSearch:
    """Every action is uniform in [-1, 1]."""

    def __init__(self, size: int, settings: ControlSettings, rng: np.random.Generator) -> None:
        self._size, self._rng = size, rng

    def ask(self) -> Actions:
        """Return (1, n) uniform actions."""
        return self._rng.uniform(-1.0, 1.0, (1, self._size))

    def tell(self, actions: Actions, rewards: NDArray[np.float64]) -> None:
        """Learn nothing."""


class CrossEntropy:
    """A Gaussian with independent actions, fitted again and again to the best of what it drew.

    Samples are clipped to [-1, 1] and the fit is to the clipped ones, since these are what was scored.
    """

    def __init__(self, size: int, settings: ControlSettings, rng: np.random.Generator) -> None:
        self._settings, self._rng = settings, rng
        self.mean = np.zeros(size)
        self.std = np.full(size, settings.start_std)

    def ask(self) -> Actions:
        """Return (population, n) draws."""
        draws = self._rng.standard_normal((self._settings.population, len(self.mean)))
        return np.clip(self.mean + self.std * draws, -1.0, 1.0)

    def tell(self, actions: Actions, rewards: NDArray[np.float64]) -> None:
        """Move mean and standard deviation (maximum likelihood) towards the elites'; the first of equals counts."""
        settings = self._settings
        best = np.argsort(-rewards, kind="stable")[: max(1, round(settings.elites * len(rewards)))]
        elites = actions[best]  # (population, n) -> (elites, n)
        weight = settings.smoothing
        self.mean = weight * elites.mean(axis=0) + (1 - weight) * self.mean
        self.std = np.maximum(weight * elites.std(axis=0) + (1 - weight) * self.std, settings.least_std)


class CovarianceAdaptation:
    """CMA-ES as the library pycma does it, with its own transformation at the bounds."""

    def __init__(self, size: int, settings: ControlSettings, rng: np.random.Generator) -> None:
        import cma  # with pyplot and scipy.stats in tow: seconds that only who asks for CMA-ES should wait

        options: dict[str, Any] = {
            "bounds": [-1.0, 1.0],
            "randn": lambda *shape: rng.standard_normal(shape),
            "seed": math.nan,  # else the library seeds NumPy's global generator
            "verbose": -9,
        }
        if settings.cma_population:
            options["popsize"] = settings.cma_population
        self._size = size
        # it needs two dimensions; with one action the other is a spare that no reward depends on
        self._evolution = cma.CMAEvolutionStrategy(np.zeros(max(2, size)), settings.sigma, options)
        self._asked: list[NDArray[np.float64]] = []

    def ask(self) -> Actions:
        """Return (population, n) draws."""
        self._asked = self._evolution.ask()
        return np.clip(np.array(self._asked)[:, : self._size], -1.0, 1.0)  # the library may overstep by a rounding

    def tell(self, actions: Actions, rewards: NDArray[np.float64]) -> None:
        """Adapt mean, step size and covariance; the library minimises."""
        self._evolution.tell(self._asked, (-rewards).tolist())


@dataclass(frozen=True)
class ControlRecord:
    """A control as users see it.

    Attributes:
        name: As typed.
        description: One sentence.
        source: The paper.
        make: From the number of actions, settings and a generator.
    """

    name: str
    description: str
    source: str
    make: Callable[[int, ControlSettings, np.random.Generator], Control]


CONTROLS = {
    record.name: record
    for record in (
        ControlRecord(
            "random",
            "Every action is drawn uniformly from [-1, 1].",
            "Bergstra, Bengio, JMLR 2012",
            RandomSearch,
        ),
        ControlRecord(
            "cem",
            "Cross-entropy method: a Gaussian around the uniform plan is fitted, generation by generation, to its best "
            "draws.",
            "Rubinstein, 1999; De Boer, Kroese, Mannor, Rubinstein, Annals of Operations Research 2005",
            CrossEntropy,
        ),
        ControlRecord(
            "cma_es",
            "CMA-ES: a Gaussian around the uniform plan whose step size and full covariance follow the steps that "
            "paid.",
            "Hansen, Ostermeier, Evolutionary Computation 2001",
            CovarianceAdaptation,
        ),
    )
}


@random_state_kept()
def run_control(
    name: str,
    environment: TrimEnv,
    *,
    evaluations: int,
    budgets: Sequence[float | None],
    seed: int,
    history: History,
    settings: ControlSettings | None = None,
    report: Callable[[History], None] | None = None,
    max_seconds: float = 0.0,
) -> str:
    """Search for good plans without a policy; equal seeds give equal histories.

    Every budget gets an independent search with an equal share of evaluations and seconds; the first ones get one
    evaluation more where the division leaves a rest. Only whole episodes are played. Plans that the history holds
    already cost nothing.

    Args:
        name: One of `CONTROLS`.
        environment: Where the plans are scored.
        evaluations: That may be spent, over all budgets; each budget's share must hold an episode's rounds.
        budgets: Distinct shares of the cost to keep, each in (0, 1]; None stands for the environment's own setting.
        seed: In [0, 2**63).
        history: Where evaluations go.
        settings: See `ControlSettings`.
        report: Called with the history after each evaluation.
        max_seconds: Limit for all budgets together; 0 = none.

    Returns:
        "max_evaluations", or what ended one of the searches before: "repeats" (ten rows for each evaluation allowed)
        or "max_minutes".

    Raises:
        UserError: Unknown name, or a value outside its range.
    """
    record = find_control(name)
    check_kind(history, History, "run_control", "History() makes one")
    settings = ControlSettings() if settings is None else check_kind(settings, ControlSettings, "run_control")
    check_seed(seed)
    rounds = environment.settings.rounds
    _check_amounts(evaluations, budgets, rounds, max_seconds)
    started, ends = time.monotonic(), []
    for place, budget in enumerate(budgets):
        own = derive_seed(seed, f"{name} at {budget}")
        size = len(environment.trimmer.groups) * rounds
        control = record.make(size, settings, np.random.default_rng(own))
        limits = _Limits(
            history=history,
            evaluations=evaluations // len(budgets) + (place < evaluations % len(budgets)),
            rounds=rounds,
            spent=history.spent,
            rows=len(history.rows),
            until=started + max_seconds * (place + 1) / len(budgets) if max_seconds else math.inf,
        )
        episodes = _Episodes(environment, Recorder(history, _budget_of(environment, budget)), budget, own, report)
        ends.append(_search(control, episodes, limits))
    return next((end for end in ends if end != "max_evaluations"), "max_evaluations")


def find_control(name: str) -> ControlRecord:
    """Return the control of a name.

    Raises:
        UserError: Unknown name; the closest known one is named.
    """
    if name not in CONTROLS:
        raise UserError(f"a control must be a known name, but got {name!r}{closest(str(name), CONTROLS)}")
    return CONTROLS[name]


def _check_amounts(evaluations: int, budgets: Sequence[float | None], rounds: int, max_seconds: float) -> None:
    if not budgets or len(set(budgets)) < len(budgets):
        raise UserError(f"budgets must be distinct and at least one, but got {list(budgets)}; name each budget once")
    if evaluations < rounds * len(budgets):
        raise UserError(
            f"evaluations must be at least rounds x budgets = {rounds} x {len(budgets)}, but got {evaluations}; allow "
            "more, or name fewer budgets"
        )
    if not max_seconds >= 0:
        raise UserError(f"max_seconds must be at least 0, but got {max_seconds}; 0 is no limit")


def _budget_of(environment: TrimEnv, budget: float | None) -> float | None:
    return environment.settings.budget if budget is None else budget


@dataclass(frozen=True)
class _Limits:
    """Where one search ends; `spent` and `rows` are what the history held when it began."""

    history: History
    evaluations: int
    rounds: int
    spent: int
    rows: int
    until: float

    def reached(self) -> str:
        """Return what ends the search now, or ""."""
        if time.monotonic() >= self.until:
            return "max_minutes"
        return limit_reached(self.history, self.evaluations, spent=self.spent, rows=self.rows, ahead=self.rounds)


@dataclass
class _Episodes:
    """Plays actions under one budget and records what comes; `seed` is that of the environment's own draws."""

    environment: TrimEnv
    recorder: Recorder
    budget: float | None
    seed: int | None
    report: Callable[[History], None] | None

    def play(self, actions: Actions) -> float:
        """Return the reward of one episode."""
        options = None if self.budget is None else {"budget": self.budget}
        self.environment.reset(seed=self.seed, options=options)
        self.seed = None
        reward = 0.0
        for action in actions:
            _, reward, terminated, truncated, info = self.environment.step(np.array([action], np.float32))
            if "accuracy" in info:
                self.recorder.record(info, float(reward), done=terminated or truncated)
                if self.report:
                    self.report(self.recorder.history)
        return float(reward)


def _search(control: Control, episodes: _Episodes, limits: _Limits) -> str:
    while True:
        actions, rewards = control.ask(), []
        for one in actions:
            if end := limits.reached():
                return end
            rewards.append(episodes.play(one))
        control.tell(actions, np.array(rewards))
