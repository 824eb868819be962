"""A learner that proposes plans, has the promising ones scored, and practises on what it expects of the others.

    policy -> many plans, drawn -> a few that may be the best -> scored for real -> model of the reward
      ^                                                                                   |
      +---------------- policy gradient on imagined episodes, paid by the model ----------+

A search may score a few hundred plans; a policy gradient alone needs thousands. The policy is Stable-Baselines3's, sees
what `TrimEnv` shows, and starts at the uniform plan. Which of its proposals, and of steps away from the uniform plan
and from the best plans so far, are scored is decided by draws from the model's belief (Thompson sampling): where much
is unknown much is tried, where all is known the best is.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv

from ..envs.trim import TrimEnv
from ..pruning.widths import CountArray
from .history import Evaluation, History
from .imagined import ImaginedWalks, act, seen_on_the_way
from .settings import ImaginationSettings
from .surrogate import RewardModel

FloatArray = NDArray[np.float64]
NEVER = 2**31
"""Iterations between two lines of Stable-Baselines3's own log, which here tells of imagined episodes."""
STALE = 25
"""Updates in a row without a plan that was not scored yet, after which there is nothing left to try."""
BEST = 5
"""Scored plans of a budget, those of highest reward, whose neighbours are considered; of other budgets the best one."""
STEP_WHEN_STALE = 0.1
"""Standard deviation, in actions, that each of them adds to the noise of what is drawn."""


@dataclass(frozen=True, eq=False)
class Proposal:
    """A plan that is worth an evaluation.

    Attributes:
        actions: (groups,) in [-1, 1].
        counts: (groups,) channels that it leaves.
        budget: Of its episode.
    """

    actions: FloatArray
    counts: CountArray
    budget: float

    @property
    def key(self) -> tuple[float, tuple[int, ...]]:
        """What makes it distinct."""
        return self.budget, tuple(self.counts.tolist())


class Planner:
    """Proposes plans and learns from their scores.

    Args:
        imagination: How much it practises.
        environment: One round, rule "score", "full" observation; its episodes are never finished here.
        budgets: That episodes are played at; each gets the same number of evaluations.
        reach: Standard deviation, in actions, up to which proposals that are not the policy's stray from the uniform
            plan or from the best plans so far. Late in a search the policy's own noise is small: alone it would stay
            where it first found something good.
        make: Makes the policy-gradient algorithm on imagined episodes: called with these and the number of steps of an
            episode. Its means are set to 0, so that the search begins at the uniform plan.
        seed: Of all that is drawn here.
    """

    def __init__(
        self,
        imagination: ImaginationSettings,
        environment: TrimEnv,
        budgets: Sequence[float],
        reach: float,
        make: Callable[[VecEnv, int], OnPolicyAlgorithm],
        seed: int,
    ) -> None:
        self.environment = environment
        self.budgets = tuple(budgets)
        self.reach = reach
        self.imagination = imagination
        self.random = np.random.default_rng(seed)
        self.updates = 0
        self.stale = 0  # proposals in a row that held nothing new
        self._order: list[float] = []
        self._proposed: dict[tuple[float, tuple[int, ...]], FloatArray] = {}  # key -> its actions
        self._originals = environment.trimmer.cost_model.widths.astype(np.float64)
        self._rows = {budget: seen_on_the_way(environment, budget) for budget in self.budgets}
        self.model = RewardModel(len(self._originals) + 1)
        self.walks = ImaginedWalks(
            self._rows, environment.observation_space, walks=self.imagination.walks, predict=self._predict, seed=seed
        )
        self.learner = make(self.walks, self.walks.groups)
        _start_at_zero(self.learner)

    # ---- one update ----------------------------------------------------------------------------------------------
    def propose(self, history: History, count: int) -> list[Proposal]:
        """Return up to `count` plans at the next budget that the history does not hold, the policy's own first.

        Each time in a row that nothing new is found, plans are drawn from further around.
        """
        budget = self._next_budget()
        taken = {key_of(row) for row in history.finished}
        drawn = self._proposals(self._tried(budget, history), budget)
        chosen: list[Proposal] = []

        def take(proposal: Proposal) -> bool:
            if proposal.key in taken:
                return False
            taken.add(proposal.key)
            chosen.append(proposal)
            return True

        take(self.own(budget))
        for ranking in self._rankings(drawn, count - len(chosen)):
            any(take(drawn[place]) for place in ranking)
        self.stale = 0 if chosen else self.stale + 1
        self._proposed.update({proposal.key: proposal.actions for proposal in chosen[:count]})
        return chosen[:count]

    def own(self, budget: float) -> Proposal:
        """Return the policy's plan without noise."""
        return self._proposals(self.act(budget, 1, deterministic=True), budget)[0]

    def learn_from(self, history: History) -> None:
        """Fit the model to all scored plans, then practise."""
        self._fit(history)
        if not self.model.fitted:
            return
        if self.imagination.practise:
            steps = self.imagination.updates * self.walks.groups * self.walks.num_envs
            self.learner.learn(steps, reset_num_timesteps=False, log_interval=NEVER)
        self.updates += 1

    def _fit(self, history: History) -> None:
        rows = list({key_of(row): row for row in history.finished}.values())  # a plan is repeated at another budget
        if len(rows) < 2:
            return
        counts = np.array([list(row.widths.values()) for row in rows], dtype=np.float64)
        budgets = np.array([row.budget for row in rows], dtype=np.float64)
        self.model.fit(self._features(counts, budgets), [row.reward or 0.0 for row in rows])

    def act(self, budget: float, count: int, *, deterministic: bool = False) -> FloatArray:
        """Return (count, groups) actions of `count` episodes at a budget; nothing is scored."""
        if budget not in self._rows:
            self._rows[budget] = seen_on_the_way(self.environment, budget)
        rows, space = self._rows[budget], self.environment.observation_space
        return act(self.learner, rows, space, count, deterministic=deterministic)

    # ---- its parts -----------------------------------------------------------------------------------------------
    def _next_budget(self) -> float:
        if not self._order:
            self._order = [float(budget) for budget in self.random.permutation(self.budgets)]
        return self._order.pop()

    def _tried(self, budget: float, history: History) -> FloatArray:
        """Return (proposals, groups) actions: a quarter as the policy draws them, a quarter a step from the best plans
        so far in some of the groups, half a step from the uniform plan; when stale all with a further step.
        """
        actions = self.act(budget, self.imagination.proposals)
        groups = actions.shape[1]
        steps = self.random.uniform(0.0, self.reach, (len(actions), 1)) * self.random.standard_normal(actions.shape)
        actions[::2] = steps[::2]  # 0 is the uniform plan
        best = self._best(budget, history)
        if len(best):
            near = steps[1::4]
            share = self.random.uniform(min(1.0, 1.5 / groups), 1.0, (len(near), 1))  # of the groups that move
            near *= self.random.random(near.shape) < share
            actions[1::4] = best[self.random.integers(len(best), size=len(near))] + near
        actions += STEP_WHEN_STALE * self.stale * self.random.standard_normal(actions.shape)
        return np.clip(actions, -1.0, 1.0)

    def _best(self, budget: float, history: History) -> FloatArray:
        """Return (plans, groups) actions of the best plans at a budget, and of the best one at each other budget."""
        counts = {level: BEST if level == budget else 1 for level in self.budgets}
        keys = [key_of(row) for level, count in counts.items() for row in history.leading(level, count)]
        found = [self._proposed[key] for key in keys if key in self._proposed]
        return np.stack(found) if found else np.zeros((0, len(self._originals)))

    def _proposals(self, actions: FloatArray, budget: float) -> list[Proposal]:
        widths = self.environment.widths_after(actions, np.full(len(actions), budget))
        return [Proposal(row, counts, budget) for row, counts in zip(actions, widths, strict=True)]

    def _rankings(self, drawn: Sequence[Proposal], count: int) -> Iterator[NDArray[np.int64]]:
        """Yield `count` orders of the drawn plans, each by one draw from what is believed of them."""
        if not self.model.fitted:
            for _ in range(count):
                yield np.arange(len(drawn))
            return
        budgets = np.array([proposal.budget for proposal in drawn])
        features = self._features(np.array([proposal.counts for proposal in drawn], dtype=np.float64), budgets)
        seed = int(self.random.integers(2**31))
        for column in self.model.draws(features, max(1, count), seed).T[:count]:
            yield np.argsort(-column, kind="stable")

    def _features(self, counts: FloatArray, budgets: FloatArray) -> FloatArray:
        return RewardModel.features(counts / self._originals, budgets)

    def _predict(self, actions: FloatArray, budgets: FloatArray) -> FloatArray:
        counts = self.environment.widths_after(actions, budgets).astype(np.float64)
        return self.model.mean(self._features(counts, budgets))

    # ---- checkpoints ---------------------------------------------------------------------------------------------
    def state(self) -> dict[str, Any]:
        """Return what `restore` needs besides the learner and the history: plain data and tensors."""
        plain = {
            "random": self.random.bit_generator.state,
            "updates": self.updates,
            "order": self._order,
            "stale": self.stale,
        }
        actions = torch.from_numpy(np.array([*self._proposed.values()], dtype=np.float64))
        budgets = torch.tensor([budget for budget, _ in self._proposed], dtype=torch.float64)
        return {
            "plain": json.dumps(plain),
            "model": self.model.state(),
            "proposed": {"actions": actions, "budgets": budgets},
        }

    def restore(self, state: dict[str, Any], history: History) -> None:
        """Stand where `state` was taken, with that history; the learner is restored apart from this."""
        plain = json.loads(state["plain"])
        self.random.bit_generator.state = plain["random"]
        self.updates, self._order, self.stale = plain["updates"], plain["order"], plain["stale"]
        self.model.restore(state["model"])
        actions, budgets = (state["proposed"][name].numpy() for name in ("actions", "budgets"))
        widths = self.environment.widths_after(actions, budgets) if len(actions) else ()
        made = (Proposal(*each) for each in zip(actions, widths, budgets.tolist(), strict=True))
        self._proposed = {proposal.key: proposal.actions for proposal in made}
        self._fit(history)


def key_of(row: Evaluation) -> tuple[float, tuple[int, ...]]:
    """Return what makes a one-round plan distinct, as `Proposal.key` does."""
    return float(row.budget or 0.0), tuple(row.widths.values())


def _start_at_zero(learner: OnPolicyAlgorithm) -> None:
    """Make every mean action 0, which is the uniform plan: the search begins at the heuristic."""
    final = learner.policy.action_net
    with torch.no_grad():
        for parameter in final.parameters():
            parameter.zero_()
