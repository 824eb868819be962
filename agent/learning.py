"""A search's learning phase: an agent spends the evaluations it is allowed; what it tries is kept in a history.

Two ways: `StepwiseSearch` lets a Stable-Baselines3 algorithm learn from scored episodes alone; `PlannedSearch` has it
practise on imagined ones in between, see `planner`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.logger import configure
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv

from ..envs.trim import ActionError, TrimEnv
from ..pruning.errors import UserError
from ..pruning.task import PruningTask
from ..pruning.trimmer import Trimmer
from .history import ROWS_PER_EVALUATION, History, SearchCallback, limit_reached
from .learner import LinearFall, imagines, make_learner, noise_setter
from .planner import STALE, Planner, Proposal
from .progress import Progress
from .randomness import derive_seed
from .resume import Standing
from .run_folder import RunFolder
from .settings import LearnerSettings, SearchSettings
from .workers import make_environments


def learn(
    task: PruningTask,
    settings: SearchSettings,
    trimmer: Trimmer,
    environment: TrimEnv,
    history: History,
    run_folder: RunFolder | None,
    progress: Progress,
    standing: Standing | None = None,
    budgets: Sequence[float] = (),
) -> tuple[BaseAlgorithm, str]:
    """Train the policy within the limits, then let it act once without noise.

    Args:
        task: Network and data.
        settings: Of the search.
        trimmer: Of the task, with the settings' repair and groups.
        environment: The same as the workers'.
        history: Where evaluations go.
        run_folder: For TensorBoard's files.
        progress: Live display.
        standing: Keeps the learner's state and may hold one to go on from; by default nothing is kept.
        budgets: That the agent serves, each with the same share of the evaluations; by default those of the settings'
            range, or the one budget.

    Returns:
        The algorithm, and what ended its learning: "max_evaluations", "max_minutes", "repeats" or "interrupt".

    Raises:
        UserError: The agent diverged, or a process that plays episodes was lost.
    """
    standing = standing or Standing(history=history)
    trim, seed = settings.trim, derive_seed(settings.seed, "learner")
    planned = planned_budgets(settings, budgets)
    own = len(planned) or trim.rounds  # kept for the policy without noise
    own = own if settings.max_evaluations > 2 * own else 0
    workers = None
    interrupted = False
    try:
        workers = make_environments(task, trim, trimmer, workers=settings.learner.workers, seed=seed, budgets=planned)
        with progress.evaluations("search", settings.max_evaluations) as show:
            callback = SearchCallback(
                history,
                max_evaluations=settings.max_evaluations - own,
                max_seconds=60 * settings.max_minutes,
                report=show,
            )
            tell = run_folder.path / "tensorboard" if run_folder else None
            way = make_way(settings, environment, workers, callback, standing, planned, tell)
            if standing.stopped_by:
                standing.restore_learned(way.learner)
                return way.learner, standing.stopped_by
            try:
                way.run()
                if own and callback.stopped_by != "max_minutes":
                    way.finish()
                way.keep(callback.stopped_by or "max_evaluations")
            except KeyboardInterrupt:
                interrupted = True
            except (ActionError, ValueError) as error:  # the latter from a distribution whose mean is not finite
                if not isinstance(error, ActionError) and is_finite(way.learner):
                    raise
                raise UserError(
                    f"the actions of an agent must stay finite, but {settings.learner.algorithm} diverged; lower "
                    f"learning_rate, which is {settings.learner.learning_rate:g}"
                ) from error
    except (EOFError, BrokenPipeError, ConnectionResetError) as error:
        raise UserError(
            f"a process that plays episodes must live as long as the search, but one ended: {error}"
        ) from error
    finally:
        if workers is not None:
            with suppress(EOFError, BrokenPipeError, ConnectionResetError):  # a worker that died already
                workers.close()
    if interrupted:
        progress.say("interrupted: the best plan so far is built (interrupt again to stop at once)")
    return way.learner, "interrupt" if interrupted else callback.stopped_by or "max_evaluations"


class Way(Protocol):
    """How an agent spends its evaluations."""

    @property
    def learner(self) -> BaseAlgorithm:
        """What learns."""

    def run(self) -> None:
        """Learn until a limit is reached."""

    def finish(self) -> None:
        """Play the policy's own episodes, without noise."""

    def keep(self, stopped_by: str) -> None:
        """Write a checkpoint, once learning has ended."""


def planned_budgets(settings: SearchSettings, budgets: Sequence[float] = ()) -> tuple[float, ...]:
    """Return what a search that plans serves, `budgets` or those of the settings; none where it does not plan."""
    return (tuple(budgets) or settings.trim.served) if imagines(settings.learner, settings.trim) else ()


def make_way(
    settings: SearchSettings,
    environment: TrimEnv,
    workers: VecEnv,
    callback: SearchCallback,
    standing: Standing,
    budgets: Sequence[float],
    log_folder: Path | None,
) -> Way:
    """Return a `PlannedSearch` for `budgets` or, without any, a `StepwiseSearch`; arguments as there."""
    seed = derive_seed(settings.seed, "learner")
    if budgets:
        return PlannedSearch(settings.learner, environment, workers, callback, standing, budgets, seed, log_folder)
    return StepwiseSearch(settings.learner, environment, workers, callback, standing, seed, log_folder)


class StepwiseSearch:
    """Learns from scored episodes alone.

    Args:
        settings: The learner's.
        environment: In which the policy plays its own episode at the end.
        workers: In which it learns.
        callback: Keeps the history and knows the limits.
        standing: Keeps checkpoints.
        seed: Of all that is drawn.
        log_folder: For TensorBoard, or None.
    """

    def __init__(
        self,
        settings: LearnerSettings,
        environment: TrimEnv,
        workers: VecEnv,
        callback: SearchCallback,
        standing: Standing,
        seed: int,
        log_folder: Path | None,
    ) -> None:
        self.environment, self.callback, self.standing = environment, callback, standing
        self._seed = seed
        groups = len(environment.trimmer.groups)
        steps = groups * environment.settings.rounds
        self.learner = make_learner(settings, workers, steps_per_episode=steps, seed=seed, log_folder=log_folder)
        self._most_steps = ROWS_PER_EVALUATION * callback.max_evaluations * groups
        self._noise = noise_setter(self.learner, settings)
        callback.set_noise = self._move_on

    def run(self) -> None:
        """Learn until a limit is reached."""
        self.learner.learn(
            self._most_steps,
            callback=[self.standing.borders(self.callback, self._noise), self.callback],
            tb_log_name="learner",
            reset_num_timesteps=self.standing.checkpoint is None,  # else its log goes on, too
        )

    def finish(self) -> None:
        """Play an episode without noise, at the settings' budget or, where there is only a range, at one of it."""
        self.callback.record_alone(*play_alone(self.learner, self.environment, self._seed))

    def keep(self, stopped_by: str) -> None:
        """Write a checkpoint, once learning has ended."""
        self.standing.keep(self.learner, self.callback, self._noise, stopped_by)

    def _move_on(self, spent: float) -> None:
        move_on(self.learner, self._noise, spent)


class PlannedSearch:
    """Has proposals of a `Planner` played, and lets it learn from them.

    Args:
        settings: The learner's.
        environment: That the planner looks at; it is not scored.
        workers: Environments that play the proposals, side by side.
        callback: Keeps the history and knows the limits; its `max_evaluations` leave out one for each budget, which the
            policy without noise gets at the end.
        standing: Keeps checkpoints.
        budgets: That the search serves.
        seed: Of all that is drawn.
        log_folder: For TensorBoard, or None.
    """

    def __init__(
        self,
        settings: LearnerSettings,
        environment: TrimEnv,
        workers: VecEnv,
        callback: SearchCallback,
        standing: Standing,
        budgets: Sequence[float],
        seed: int,
        log_folder: Path | None,
    ) -> None:
        self.settings, self.workers, self.callback, self.standing = settings, workers, callback, standing

        def make(walks: VecEnv, steps: int) -> OnPolicyAlgorithm:
            made = make_learner(settings, walks, steps_per_episode=steps, seed=seed, log_folder=None, imagined=True)
            assert isinstance(made, OnPolicyAlgorithm)  # held by `learner.imagines`
            return made

        reach = float(np.exp(settings.noise_start))
        self.planner = Planner(settings.imagination, environment, budgets, reach, make, seed)
        self.learner: OnPolicyAlgorithm = self.planner.learner
        self._noise = noise_setter(self.learner, settings)
        folder = None if log_folder is None else str(log_folder / "learner_1")
        self.learner.set_logger(configure(folder, ["tensorboard"] if folder else []))
        callback.init_callback(self.learner)

    def run(self) -> None:
        """Search until a limit is reached, or nothing new is proposed any more."""
        callback, history = self.callback, self.callback.history
        self.standing.resume_planner(self.planner, self.learner, callback)
        callback.begin()
        while self.planner.stale < STALE:
            callback.stopped_by = limit_reached(history, callback.max_evaluations) or callback.out_of_time()
            if callback.stopped_by:
                return
            if self.planner.updates:
                self.standing.keep(self.learner, callback, None, planner=self.planner.state())
            move_on(self.learner, self._noise, history.spent / callback.max_evaluations)
            count = min(self.settings.episodes_per_update, callback.max_evaluations - history.spent)
            proposals = self.planner.propose(history, count)
            if proposals:
                self._score(proposals)
                self.planner.learn_from(history)
        callback.stopped_by = "repeats"

    def finish(self) -> None:
        """Play the policy's own plan, without noise, at each budget."""
        self._score([self.planner.own(budget) for budget in self.planner.budgets])

    def keep(self, stopped_by: str) -> None:
        """Write a checkpoint, once learning has ended."""
        self.standing.keep(self.learner, self.callback, None, stopped_by, self.planner.state())

    def _score(self, proposals: Sequence[Proposal]) -> None:
        for proposal, info, reward in play(self.workers, proposals):
            # real steps, as where episodes are learned from; those of the learner are imagined
            self.callback.num_timesteps = self.planner.walks.groups * (len(self.callback.history.rows) + 1)
            self.callback.record_alone([{**info, "budget": proposal.budget}], reward)


def play(workers: VecEnv, proposals: Sequence[Proposal]) -> Iterator[tuple[Proposal, dict[str, Any], float]]:
    """Play one-round episodes, as many at a time as there are environments; yields proposal, last info and reward.

    Where the last ones are fewer than the environments, the others play the last proposal along, without effect.
    """
    size = workers.num_envs
    for start in range(0, len(proposals), size):
        batch = list(proposals[start : start + size])
        played = batch + [batch[-1]] * (size - len(batch))
        workers.set_options([{"budget": proposal.budget} for proposal in played])
        workers.reset()
        for actions in np.stack([proposal.actions for proposal in played], 1):  # (groups, environments)
            _, rewards, _, infos = workers.step(actions[:, None])
        for place, proposal in enumerate(batch):
            yield proposal, infos[place], float(rewards[place])


def play_alone(learner: BaseAlgorithm, environment: TrimEnv, seed: int) -> tuple[list[dict[str, Any]], float]:
    """Play an episode without noise, at the environment's budget or, where it has only a range, at one of it.

    Returns:
        The `info` of each round's end, and the reward.
    """
    budget = environment.settings.budget
    observation, _ = environment.reset(seed=seed, options=None if budget is None else {"budget": budget})
    state: Any = None
    start = np.ones(1, dtype=bool)
    infos, reward, done = [], 0.0, False
    while not done:
        action, state = learner.predict(observation, state, start, deterministic=True)
        observation, reward, done, _, info = environment.step(action)
        start = np.zeros(1, dtype=bool)
        if "accuracy" in info:
            infos.append(info)
    return infos, reward


def is_finite(learner: BaseAlgorithm) -> bool:
    """Return whether no weight of the policy is infinite or not a number."""
    return all(bool(torch.isfinite(weight).all()) for weight in learner.policy.parameters())


def move_on(learner: BaseAlgorithm, set_noise: Callable[[float], None] | None, spent: float) -> None:
    """Set learning rate and noise for the share of the search that is spent; steps do not tell, as repeats are free.

    Args:
        learner: Its rate falls, if it is a `LinearFall`.
        set_noise: From `learner.noise_setter`.
        spent: In [0, 1].
    """
    if set_noise:
        set_noise(spent)
    if isinstance(learner.learning_rate, LinearFall):
        learner.learning_rate.left = 1.0 - spent
