"""From settings to a Stable-Baselines3 algorithm on a vectorised environment."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import stable_baselines3
import torch
from stable_baselines3 import TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.noise import NormalActionNoise, VectorizedActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv

from ..envs.trim_settings import TrimSettings
from ..pruning.errors import UserError, closest
from .imagined import BudgetAdvantages
from .settings import LearnerSettings

try:
    import sb3_contrib
except ImportError:  # an optional package: its algorithms are then not offered
    sb3_contrib = None  # type: ignore[assignment]


def algorithms() -> dict[str, type[BaseAlgorithm]]:
    """Return every algorithm that can be asked for, by name."""
    found: dict[str, type[BaseAlgorithm]] = {}
    for package in (stable_baselines3, sb3_contrib):
        for name in getattr(package, "__all__", ()) if package else ():
            kind = getattr(package, name)
            if inspect.isclass(kind) and issubclass(kind, BaseAlgorithm):
                found[name] = kind
    return found


def make_learner(
    settings: LearnerSettings,
    environment: VecEnv,
    *,
    steps_per_episode: int,
    seed: int,
    log_folder: Path | None,
    imagined: bool = False,
) -> BaseAlgorithm:
    """Return the algorithm, untrained; the policy runs on the CPU.

    Args:
        settings: What to make.
        environment: From `workers.make_environments`.
        steps_per_episode: Groups × rounds; an update of an on-policy algorithm sees whole episodes only.
        seed: Of its weights and its noise.
        log_folder: Folder for TensorBoard, or None.
        imagined: Whether the episodes are imagined ones, see `planner`: then an update sees one of each environment.

    Raises:
        UserError: Unknown algorithm, one without continuous actions, an argument it does not take, or a warm-up for an
            algorithm that has none.
    """
    kind = find_algorithm(settings)
    accepted = set(inspect.signature(kind.__init__).parameters)
    rate = settings.learning_rate
    keywords: dict[str, Any] = {
        "gamma": 1.0,
        "learning_rate": LinearFall(rate),
        "seed": seed,
        "device": "cpu",
        "tensorboard_log": str(log_folder) if log_folder else None,
    }
    rollout = steps_per_episode * settings.episodes_per_update
    if issubclass(kind, OnPolicyAlgorithm):
        keywords.update(n_steps=rollout, gae_lambda=1.0)
        if "batch_size" in accepted:
            keywords["batch_size"] = rollout * environment.num_envs
        if "ent_coef" in accepted:
            keywords["ent_coef"] = 0.0
        if "n_epochs" in accepted:
            keywords["n_epochs"] = 10
        keywords["policy_kwargs"] = {"log_std_init": settings.noise_start}
        if imagined:
            keywords.update(n_steps=steps_per_episode, n_epochs=5, rollout_buffer_class=BudgetAdvantages)
            keywords["batch_size"] = max(2, steps_per_episode * environment.num_envs // 2)
    elif "learning_starts" in accepted:
        warmup = settings.episodes_per_update if settings.warmup_episodes is None else settings.warmup_episodes
        keywords.update(learning_starts=steps_per_episode * warmup, batch_size=64)
        if issubclass(kind, TD3):  # DDPG too; their policies are deterministic
            keywords["action_noise"] = FallingNoise(settings.noise_start)
            # the reward comes with the last step: one step at a time it would take a target network's delay for each
            # group to reach the first
            keywords["n_steps"] = steps_per_episode
    keywords["policy_kwargs"] = {**keywords.get("policy_kwargs", {}), "net_arch": list(settings.hidden)}
    keywords = {name: value for name, value in keywords.items() if name in accepted}
    keywords.update(settings.arguments)
    policy = "MlpLstmPolicy" if "Recurrent" in settings.algorithm else "MlpPolicy"
    try:
        learner = kind(policy, environment, **keywords)
    except (AssertionError, TypeError, ValueError) as error:
        raise UserError(
            f"{settings.algorithm} must work with one continuous action in [-1, 1], but: {error}"
        ) from error
    return learner


def imagines(settings: LearnerSettings, trim: TrimSettings) -> bool:
    """Return whether a learner practises on imagined episodes: where it is asked to and able to, see `planner`.

    It is not with arguments that decide what an update sees, which is there one whole episode of each walk.
    """
    able = trim.rounds == 1 and trim.action == "score" and trim.observation == "full"
    accepted = inspect.signature(find_algorithm(settings).__init__).parameters
    free = not {"n_steps", "rollout_buffer_class"} & set(settings.arguments)
    return settings.imagination.updates > 0 and able and "rollout_buffer_class" in accepted and free


def find_algorithm(settings: LearnerSettings) -> type[BaseAlgorithm]:
    """Return the class that `settings.algorithm` names, and check `settings.arguments` against it.

    Raises:
        UserError: Unknown algorithm, one that learns otherwise than step by step, an argument it does not take, or a
            warm-up for an algorithm that has none.
    """
    known = algorithms()
    if settings.algorithm not in known:
        hint = closest(settings.algorithm, known)
        if sb3_contrib is None:
            hint += "; sb3-contrib is not installed (pip install 'prunegym[contrib]')"
        raise UserError(f"algorithm must be a known name, but got {settings.algorithm!r}{hint}")
    kind = known[settings.algorithm]
    if not issubclass(kind, (OnPolicyAlgorithm, OffPolicyAlgorithm)):
        raise UserError(
            f"algorithm must learn step by step, on or off policy, but {settings.algorithm} does not; use PPO"
        )
    if settings.warmup_episodes is not None and issubclass(kind, OnPolicyAlgorithm):
        raise UserError(
            f"warmup_episodes is for algorithms that learn off policy, but {settings.algorithm} learns from its first "
            f"episode, and got {settings.warmup_episodes}; set it to null"
        )
    accepted = set(inspect.signature(kind.__init__).parameters) - {"self", "policy", "env"}
    for name in settings.arguments:
        if name not in accepted:
            hint = closest(name, accepted)
            raise UserError(f"{settings.algorithm} must take each of learner.arguments, but got {name!r}{hint}")
    return kind


class LinearFall:
    """A learning rate that falls linearly from `start` to a tenth of it; picklable.

    Attributes:
        left: Share of the search that is left, where something else than the number of steps tells it.
    """

    def __init__(self, start: float) -> None:
        self.start = start
        self.left: float | None = None

    def __call__(self, remaining: float) -> float:
        """Return the rate when the share `remaining` of the steps is left."""
        remaining = remaining if self.left is None else self.left
        return self.start * (0.1 + 0.9 * max(0.0, remaining))


class FallingNoise(NormalActionNoise):
    """Gaussian noise on one action, whose standard deviation is set from outside.

    Args:
        log_std: Logarithm of the standard deviation at the start.
    """

    def __init__(self, log_std: float) -> None:
        super().__init__(np.zeros(1), np.full(1, np.exp(log_std)))

    @property
    def std(self) -> float:
        """Standard deviation; 0 = no noise."""
        return float(self._sigma[0])

    @std.setter
    def std(self, value: float) -> None:
        self._sigma = np.full(1, value)


def noise_setter(learner: BaseAlgorithm, settings: LearnerSettings) -> Callable[[float], None] | None:
    """Return a function that sets the policy's noise for a share of the search, or None where it has none.

    A learned standard deviation moves too slowly within a few hundred episodes, and a constant one keeps the best
    plans from being tried; so the noise follows a schedule and, where the algorithm allows, is not trained. Noise that
    is added to a deterministic policy is nil during the warm-up, whose actions are random already, and falls from its
    end on.
    """
    if isinstance(learner, OffPolicyAlgorithm) and isinstance(learner.action_noise, FallingNoise):
        return _AddedNoise(learner, settings)
    log_std = getattr(learner.policy, "log_std", None)
    if not isinstance(log_std, torch.nn.Parameter):
        return None
    if type(learner).__name__ != "TRPO":  # which needs the gradient of every parameter
        log_std.requires_grad_(False)

    def set_noise(spent: float) -> None:
        with torch.no_grad():
            log_std.fill_(settings.noise_start + (settings.noise_end - settings.noise_start) * spent)

    return set_noise


class _AddedNoise:
    """Sets the noise that is added to a deterministic policy's actions.

    Attributes:
        warm: Share of the search that the warm-up took, once it is over.
    """

    def __init__(self, learner: OffPolicyAlgorithm, settings: LearnerSettings) -> None:
        self.learner, self.settings = learner, settings
        self.warm: float | None = None

    def __call__(self, spent: float) -> None:
        """Set the noise for a share of the search, in [0, 1]."""
        start, end = self.settings.noise_start, self.settings.noise_end
        if self.learner.num_timesteps < self.learner.learning_starts:
            std = 0.0
        else:
            if self.warm is None:
                self.warm = spent
            fallen = (spent - self.warm) / (1.0 - self.warm) if self.warm < 1.0 else 1.0
            std = float(np.exp(start + (end - start) * fallen))
        noise = self.learner.action_noise  # one for each worker, once learning has begun
        for one in noise.noises if isinstance(noise, VectorizedActionNoise) else [noise]:
            if isinstance(one, FallingNoise):
                one.std = std
