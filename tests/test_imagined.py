"""Imagined episodes against real ones, and advantages by budget against arithmetic."""

from typing import Any

import numpy as np
import pytest
import torch
from prunegym.agent.imagined import BudgetAdvantages, ImaginedWalks, budget_advantages, seen_on_the_way
from prunegym.envs import FEATURES, TrimEnv, TrimSettings
from prunegym.envs.default_task import default_task
from prunegym.envs.trim import ActionError
from prunegym.pruning import Trimmer
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.callbacks import BaseCallback

NAMES = [feature.name for feature in FEATURES]
TARGET, POSITION = NAMES.index("target"), NAMES.index("position")
GROUPS = 3


@pytest.fixture(scope="module")
def env() -> TrimEnv:
    settings = TrimSettings(budget=None, budget_range=(0.2, 0.6), budget_levels=3)
    return TrimEnv(default_task(), settings, trimmer=Trimmer(default_task()))


def nearness(actions: np.ndarray, budgets: np.ndarray) -> np.ndarray:
    """Reward walks for actions near 0.5, more of it at higher budgets."""
    return 10 * budgets - ((actions - 0.5) ** 2).sum(1)


def walks(space: Any, *budgets: float, walks: int = 8, predict: Any = nearness, seed: int = 0) -> ImaginedWalks:
    """Make walks that see budget and place alone."""
    rows = {}
    for budget in budgets:
        rows[budget] = np.zeros((GROUPS, len(FEATURES)), np.float32)
        rows[budget][:, TARGET] = budget
        rows[budget][:, POSITION] = np.arange(GROUPS) / GROUPS
    return ImaginedWalks(rows, space, walks=walks, predict=predict, seed=seed)


# ---- advantages ------------------------------------------------------------------------------------------------------
def test_advantages_by_hand() -> None:
    # budget 0.2: mean 2, deviations -1, 1 and standard deviation 1; 0.4: mean 4, deviations -3, 0, 3, std sqrt(6)
    found = budget_advantages([1.0, 1.0, 4.0, 3.0, 7.0], [0.2, 0.4, 0.4, 0.2, 0.4])
    np.testing.assert_allclose(found, [-1.0, -3 / 6**0.5, 0.0, 1.0, 3 / 6**0.5])


def test_where_all_episodes_earn_the_same_there_is_no_advantage() -> None:
    assert budget_advantages([0.1 + 0.2, 0.3, 5.0], [0.2, 0.2, 0.4]).tolist() == [0.0, 0.0, 0.0]
    assert budget_advantages([], []).shape == (0,)


class Rollouts(BaseCallback):
    """Copies each rollout when it is complete."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[dict[str, np.ndarray]] = []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        buffer: Any = self.locals["rollout_buffer"]
        names = ("observations", "actions", "rewards", "returns", "advantages", "episode_starts")
        self.kept.append({name: getattr(buffer, name).copy() for name in names})


@pytest.mark.parametrize("kind", [PPO, A2C])
def test_advantages_in_rollouts_of_an_algorithm(env: TrimEnv, kind: Any) -> None:
    imagined = walks(env.observation_space, 0.2, 0.5, walks=6)
    keywords: dict[str, Any] = {"batch_size": 9} if kind is PPO else {}
    learner = kind(
        "MlpPolicy", imagined, n_steps=GROUPS, rollout_buffer_class=BudgetAdvantages, seed=0, device="cpu",
        gamma=1.0, gae_lambda=1.0, policy_kwargs={"log_std_init": 0.0, "net_arch": [8]}, **keywords,
    )  # fmt: skip
    seen = Rollouts()
    for _ in range(2):  # the second call goes on where the first one ended
        learner.learn(2 * GROUPS * 6, callback=seen, reset_num_timesteps=False)
    assert len(seen.kept) == 4
    for rollout in seen.kept:
        assert rollout["episode_starts"].tolist() == [[1.0] * 6, [0.0] * 6, [0.0] * 6]
        np.testing.assert_allclose(rollout["observations"][:, :, POSITION], np.repeat([[0], [1 / 3], [2 / 3]], 6, 1))
        budgets = rollout["observations"][0, :, TARGET]
        assert sorted(budgets.tolist()) == pytest.approx([0.2] * 3 + [0.5] * 3)
        actions = rollout["actions"][:, :, 0]  # as drawn: what is beyond the bounds counts as the bound
        assert np.abs(actions).max() > 1.0
        for walk in range(6):
            rewards = {
                other: 10 * budgets[other] - sum((np.clip(actions[step, other], -1, 1) - 0.5) ** 2 for step in range(3))
                for other in range(6)
                if budgets[other] == budgets[walk]
            }
            reward, all_rewards = rewards[walk], np.array(list(rewards.values()))
            advantage = (reward - all_rewards.mean()) / all_rewards.std()
            np.testing.assert_allclose(rollout["rewards"][:, walk], [0, 0, reward], rtol=1e-5)
            np.testing.assert_allclose(rollout["returns"][:, walk], [reward] * 3, rtol=1e-5)
            np.testing.assert_allclose(rollout["advantages"][:, walk], [advantage] * 3, atol=1e-4)
    assert learner.num_timesteps == 4 * GROUPS * 6


def test_batches_pair_each_action_with_its_own_advantage(env: TrimEnv) -> None:
    imagined = walks(env.observation_space, 0.2, 0.5)
    learner = PPO("MlpPolicy", imagined, n_steps=GROUPS, batch_size=12, rollout_buffer_class=BudgetAdvantages, seed=0)
    learner.learn(GROUPS * 8)
    buffer = learner.rollout_buffer
    known: dict[tuple[float, float], float] = {}  # reward and budget of an episode -> advantage
    for batch in buffer.get(5):
        targets = batch.observations[:, TARGET].tolist()
        for reward, target, advantage in zip(batch.returns.tolist(), targets, batch.advantages.tolist(), strict=True):
            known.setdefault((reward, target), advantage)
            assert known[reward, target] == advantage
    assert len(known) == 8
    rewards, targets = zip(*known, strict=True)
    np.testing.assert_allclose(list(known.values()), budget_advantages(rewards, targets), atol=1e-4)


def test_a_policy_learns_what_imagined_episodes_pay(env: TrimEnv) -> None:
    imagined = walks(env.observation_space, 0.2, 0.5, walks=32)
    learner = PPO(
        "MlpPolicy", imagined, n_steps=GROUPS, batch_size=48, n_epochs=5, learning_rate=3e-3, gamma=1.0, gae_lambda=1.0,
        rollout_buffer_class=BudgetAdvantages, seed=1, device="cpu", policy_kwargs={"log_std_init": -1.0},
    )  # fmt: skip
    learner.learn(40 * GROUPS * 32)
    action, _ = learner.predict(imagined.reset(), deterministic=True)
    np.testing.assert_allclose(action, 0.5, atol=0.15)


# ---- as in the real environment --------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(3))
def test_imagined_episodes_show_what_real_ones_show(env: TrimEnv, seed: int) -> None:
    budgets = (0.2, 0.35, 0.6)
    rows = {budget: seen_on_the_way(env, budget) for budget in budgets}
    paid: list[Any] = []

    def predict(actions: np.ndarray, levels: np.ndarray) -> np.ndarray:
        paid.append((actions.copy(), levels.copy()))
        return np.arange(len(actions), dtype=np.float64)

    imagined = ImaginedWalks(rows, env.observation_space, walks=6, predict=predict, seed=seed)
    actions = np.random.default_rng(seed).uniform(-1.6, 1.6, (GROUPS, 6, 1)).astype(np.float32)
    seen = [imagined.reset()]
    for step in range(GROUPS):
        observed, rewards, dones, infos = imagined.step(actions[step])
        seen.append(observed)
        assert dones.tolist() == [step + 1 == GROUPS] * 6
        assert rewards.tolist() == ([0.0] * 6 if step + 1 < GROUPS else list(range(6)))
    ((played, levels),) = paid
    widths = env.widths_after(played, levels)
    targets = []
    for walk in range(6):
        observation, _ = env.reset(options={"budget": float(levels[walk])})
        for step in range(GROUPS):
            np.testing.assert_array_equal(seen[step][walk], observation)
            observation, _, ended, _, info = env.step(actions[step, walk])
        assert ended
        assert [len(keep) for keep in info["plan"].values()] == widths[walk].tolist()
        assert infos[walk]["terminal_observation"].shape == observation.shape
        targets.append(info["budget"])
    assert sorted(targets) == sorted([*budgets, *budgets])
    assert len({tuple(row) for row in widths.tolist()}) > 3
    new = seen[-1]  # the episodes after these have begun
    assert (new[:, NAMES.index("previous_action")] == 0).all()
    assert (new[:, POSITION] == seen[0][:, POSITION]).all()


def test_looking_ahead_scores_nothing(env: TrimEnv, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("trim", "evaluate", "score"):
        monkeypatch.setattr(Trimmer, name, lambda *_, **__: pytest.fail("a network was scored"))
    assert seen_on_the_way(env, 0.3).shape == (GROUPS, len(FEATURES))
    assert seen_on_the_way(env, 0.3)[:, TARGET].tolist() == [np.float32(0.3)] * GROUPS
    env.widths_after(np.zeros((2, GROUPS)), np.array([0.3, 0.5]))


def test_actions_that_are_not_finite_are_refused(env: TrimEnv) -> None:
    imagined = walks(env.observation_space, 0.3, walks=2)
    imagined.reset()
    with pytest.raises(ActionError, match=r"one finite number in \[-1, 1\], but got \[0\.0, nan\]"):
        imagined.step(np.array([[0.0], [np.nan]], np.float32))


# ---- which budgets ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("budgets", "count", "shares"),
    [(4, 8, [2, 2, 2, 2]), (3, 8, [2, 3, 3]), (1, 5, [5]), (16, 8, [2, 2, 2, 2]), (5, 3, [3]), (2, 1, [1])],
)
def test_no_episode_is_alone_at_its_budget(env: TrimEnv, budgets: int, count: int, shares: list[int]) -> None:
    levels = np.linspace(0.2, 0.8, budgets).tolist()
    imagined = walks(env.observation_space, *levels, walks=count)
    drawn: dict[float, int] = {}
    for _ in range(400):
        found, amounts = np.unique(imagined.reset()[:, TARGET], return_counts=True)
        assert sorted(amounts.tolist()) == shares
        for level, amount in zip(found.tolist(), amounts.tolist(), strict=True):
            drawn[level] = drawn.get(level, 0) + amount
    assert len(drawn) == budgets
    mean = 400 * count / budgets
    assert max(abs(amount - mean) for amount in drawn.values()) < 0.3 * mean


def test_an_episode_begins_again_elsewhere(env: TrimEnv) -> None:
    first = walks(env.observation_space, 0.2, 0.3, 0.4, walks=6, seed=1)
    for _ in range(3):
        first.reset()
    second = walks(env.observation_space, 0.2, 0.3, 0.4, walks=6, seed=2)
    seen = first.reset()
    for walk, start in enumerate(first.env_method("episode_start")):
        observation, _ = second.env_method("begin_again", start, indices=walk)[0]
        np.testing.assert_array_equal(observation, seen[walk])
    actions = torch.rand(GROUPS, 6, 1, generator=torch.Generator().manual_seed(0)).numpy()
    for _ in range(4):
        for action in actions:
            for one, other in zip(first.step(action)[:3], second.step(action)[:3], strict=True):
                np.testing.assert_array_equal(one, other)
