"""Episodes whose reward is predicted: the walk of `TrimEnv`, many at a time, without a network."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from ..envs.observation import FEATURES
from ..envs.trim import ActionError, TrimEnv

FloatArray = NDArray[np.float64]
Predict = Callable[[FloatArray, FloatArray], FloatArray]

NAMES = [feature.name for feature in FEATURES]
TARGET, PREVIOUS = NAMES.index("target"), NAMES.index("previous_action")


def seen_on_the_way(environment: TrimEnv, budget: float) -> NDArray[np.float32]:
    """Return (groups, features) what an agent sees before each group's action, where every previous action is 0.

    Under the rule "score" nothing else depends on the actions: widths are decided when all scores are known. No network
    is cut or scored.

    Args:
        environment: With the "full" observation, the rule "score" and one round.
        budget: Of the episode.
    """
    observation, _ = environment.reset(options={"budget": budget})
    rows = [observation]
    for _ in environment.trimmer.groups[1:]:
        observation, *_ = environment.step(np.zeros(1, np.float32))
        rows.append(observation)
    return np.stack(rows)


def act(
    learner: BaseAlgorithm, observations: NDArray[np.float32], space: gym.spaces.Box, count: int, *, deterministic: bool
) -> FloatArray:
    """Return (count, groups) actions in [-1, 1] of as many episodes at one budget; nothing is scored.

    Args:
        learner: Its policy acts.
        observations: (groups, features) from `seen_on_the_way`.
        space: Of one observation.
        count: Episodes.
        deterministic: Whether the policy acts without noise.
    """
    walks = ImaginedWalks({0.0: observations}, space, walks=count, predict=_nothing, seed=0)
    observed: Any = walks.reset()
    actions = []
    for _ in range(walks.groups):
        action, _ = learner.predict(observed, deterministic=deterministic)
        actions.append(np.clip(action[:, 0].astype(np.float64), -1.0, 1.0))
        observed, *_ = walks.step(action)
    return np.stack(actions, 1)


class ImaginedWalks(VecEnv):
    """`walks` episodes side by side, each over all groups, each with its own budget.

    An episode ends after (groups,) actions, all of them at once; the reward is what `predict` says of the actions.

    Args:
        observations: Budget -> (groups, features) from `seen_on_the_way`.
        space: Of one observation.
        walks: Episodes at a time.
        predict: Gives (walks,) rewards for (walks, groups) actions in [-1, 1] and (walks,) budgets.
        seed: Decides which budgets come first where the walks cannot be shared out equally.
    """

    def __init__(
        self,
        observations: Mapping[float, NDArray[np.float32]],
        space: gym.spaces.Box,
        *,
        walks: int,
        predict: Predict,
        seed: int,
    ) -> None:
        self.render_mode = None
        super().__init__(walks, space, gym.spaces.Box(-1.0, 1.0, (1,), np.float32))
        self.predict = predict
        self.random = np.random.default_rng(seed)
        self.budgets = np.array(list(observations), dtype=np.float64)
        self._rows = np.stack([observations[budget] for budget in observations])  # (budgets, groups, features)
        self._chosen = np.zeros(walks, dtype=np.int64)
        self._actions: FloatArray = np.zeros((walks, 0))

    @property
    def groups(self) -> int:
        """Steps of an episode."""
        return self._rows.shape[1]

    def reset(self) -> NDArray[np.float32]:
        """Begin new episodes; equally many for each budget, as far as that goes.

        Where there are not two for each budget, some budgets wait: an episode alone at its budget teaches nothing.
        """
        order = self.random.permutation(len(self.budgets))[: max(1, self.num_envs // 2)]
        self._chosen = order[np.arange(self.num_envs) % len(order)]
        self._actions = np.zeros((self.num_envs, 0))
        return self._observe()

    def step_async(self, actions: NDArray[np.float32]) -> None:
        """Take (walks, 1) actions.

        Raises:
            ActionError: One is not finite: the policy has diverged.
        """
        if not np.isfinite(actions).all():
            raise ActionError(f"an action must be one finite number in [-1, 1], but got {actions[:, 0].tolist()}")
        self._actions = np.column_stack((self._actions, np.clip(actions[:, 0].astype(np.float64), -1.0, 1.0)))

    def step_wait(self) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_], list[dict[str, Any]]]:
        """Return what follows; all walks end together."""
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        if self._actions.shape[1] < self.groups:
            return self._observe(), np.zeros(self.num_envs, np.float32), np.zeros(self.num_envs, dtype=bool), infos
        rewards = self.predict(self._actions, self.budgets[self._chosen]).astype(np.float32)
        for info, observation in zip(infos, self._rows[self._chosen, -1], strict=True):
            info["terminal_observation"] = observation
        return self.reset(), rewards, np.ones(self.num_envs, dtype=bool), infos

    def _observe(self) -> NDArray[np.float32]:
        observed = self._rows[self._chosen, self._actions.shape[1]].copy()
        if self._actions.shape[1]:
            observed[:, PREVIOUS] = self._actions[:, -1]
        return observed

    # ---- for checkpoints, see `checkpoint.EpisodeStart` ----------------------------------------------------------
    def episode_start(self, walk: int) -> dict[str, Any]:
        """Return what the present episode of a walk began with, as plain data."""
        return {"level": int(self._chosen[walk]), "state": self.random.bit_generator.state}

    def begin_again(self, walk: int, start: Mapping[str, Any]) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Begin the episode that `episode_start` described; returns what the walk sees."""
        self.random.bit_generator.state = start["state"]
        self._chosen[walk] = start["level"]
        self._actions = np.zeros((self.num_envs, 0))
        return self._observe()[walk], {}

    # ---- the rest of a vectorised environment --------------------------------------------------------------------
    def close(self) -> None:
        """Nothing is open."""

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """Return an attribute, the same for each walk."""
        return [getattr(self, attr_name) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Set an attribute of all walks."""
        setattr(self, attr_name, value)

    def env_method(self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any) -> list[Any]:
        """Call a method for each walk, with its place as first argument."""
        return [getattr(self, method_name)(walk, *method_args, **method_kwargs) for walk in self._get_indices(indices)]

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper[Any, Any, Any, Any]], indices: Any = None) -> list[bool]:
        """Return that no walk is wrapped."""
        return [False for _ in self._get_indices(indices)]


def _nothing(actions: FloatArray, budgets: FloatArray) -> FloatArray:
    return np.zeros(len(actions))


class BudgetAdvantages(RolloutBuffer):
    """Rollouts of whole episodes whose advantage is the reward above the mean of the same budget.

    A critic has to learn first how much a plan can earn at each budget; episodes of the same budget, side by side, tell
    it at once. Every step of an episode gets its episode's advantage, in units of the spread at its budget.
    """

    def compute_returns_and_advantage(self, last_values: Tensor, dones: NDArray[np.bool_]) -> None:
        """Work out returns (for the critic, which is not used otherwise) and advantages by budget."""
        super().compute_returns_and_advantage(last_values, dones)
        rewards = self.rewards.sum(0)  # (steps, walks) -> (walks,), one episode each
        advantage = budget_advantages(rewards, self.observations[0, :, TARGET].tolist())
        self.returns = np.broadcast_to(rewards, self.returns.shape).astype(np.float32).copy()
        self.advantages = np.broadcast_to(advantage, self.advantages.shape).astype(np.float32).copy()


def budget_advantages(rewards: Sequence[float] | NDArray[Any], budgets: Sequence[float]) -> FloatArray:
    """Return (episodes,) (reward - mean) / standard deviation among those of the same budget; 0 where all agree."""
    values, levels = np.asarray(rewards, dtype=np.float64), np.asarray(budgets)
    advantages = np.zeros(len(values))
    for level in np.unique(levels):
        own = levels == level
        spread = values[own].std()
        if spread > 1e-8:
            advantages[own] = (values[own] - values[own].mean()) / spread
    return advantages
