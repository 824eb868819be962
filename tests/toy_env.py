"""An environment with the protocol of TrimEnv whose best actions are known."""

from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
from prunegym.envs import TrimSettings


class WalkEnv(gym.Env):
    """The reward is minus the mean squared distance of an episode's actions from the optimum, rounded to 1 / grain.

    A round's plan holds, by group, one number that stands for the rounded action; rounds have the same optimum.
    """

    observation_space = gym.spaces.Box(0.0, 1.0, (1,), np.float32)
    action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def __init__(self, optimum: list[float], *, rounds: int = 1, grain: int = 1000, budget: float = 0.5) -> None:
        self.optimum, self.grain = optimum, grain
        self.settings = TrimSettings(budget=budget, rounds=rounds)
        self.trimmer = SimpleNamespace(groups=[f"g{place}" for place in range(len(optimum))])
        self.played: list[list[float]] = []  # the actions of each episode

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.budget = (options or {}).get("budget", self.settings.budget)
        self.played.append([])
        return np.zeros(1, np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        actions, groups = self.played[-1], len(self.optimum)
        actions.append(float(action[0]))
        info: dict[str, Any] = {}
        rounds, rest = divmod(len(actions), groups)
        ended = rounds == self.settings.rounds and not rest
        labels = [round(value * self.grain) for value in actions]
        plans = [
            {f"g{place}": [self.grain + label] for place, label in enumerate(labels[start : start + groups])}
            for start in range(0, rounds * groups, groups)
        ]
        cost = float(np.mean((np.array(labels) / self.grain - (self.optimum * (rounds + 1))[: len(labels)]) ** 2))
        if not rest:
            info = {"accuracy": 1 - cost, "loss": cost, "kept": 0.3, "params": 1, "macs": 1, "plan": plans[-1]}
        if ended:
            info |= {"plans": plans, "budget": self.budget}
        return np.zeros(1, np.float32), -cost if ended else 0.0, ended, False, info
