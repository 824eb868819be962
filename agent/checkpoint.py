"""Where a learner stands between two episodes, on disk, so that it goes on after any end as if there had been none.

A checkpoint is taken where every environment has just begun an episode: then nothing but the learner, the random
states and the draws of the reset decide what follows. Its file holds plain tensors and JSON, no pickled objects.
"""

import dataclasses
import hashlib
import io
import json
import os
import random
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.noise import ActionNoise, VectorizedActionNoise
from stable_baselines3.common.vec_env import VecNormalize

from ..pruning.errors import UserError

FILE = "search.checkpoint"
BEFORE = "search.checkpoint.before"
MAGIC = b"prunegym checkpoint 1\n"

COUNTERS = ("num_timesteps", "_n_updates", "_episode_num", "_current_progress_remaining")
LAST = ("_last_obs", "_last_original_obs", "_last_episode_starts")
STATISTICS = ("obs_rms", "ret_rms")

SEEN_TOLERANCE = 1e-3
"""How far the first observation of a resumed episode may lie from the one seen: other threads, or a GPU that adds up in
no fixed order, change last digits; other data or another network change more."""


# ---- an environment's part -------------------------------------------------------------------------------------------
class EpisodeStart(gym.Wrapper[Any, Any, Any, Any]):
    """Remembers the random state that each episode began with, so that the episode can begin again elsewhere.

    It is for environments whose reset depends on nothing but their random state.
    """

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        self._start: dict[str, Any] = {}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Remember the random state, then reset."""
        state = None if seed is not None else self.unwrapped.np_random.bit_generator.state
        self._start = {"seed": seed, "state": state, "options": options}
        return self.env.reset(seed=seed, options=options)

    def episode_start(self) -> dict[str, Any]:
        """Return what the present episode began with, as plain data."""
        return self._start

    def begin_again(self, start: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Begin the episode that `episode_start` described; returns what `reset` gave then."""
        if start["state"] is not None:
            self.unwrapped.np_random.bit_generator.state = start["state"]
        return self.reset(seed=start["seed"], options=start["options"])


# ---- a learner's part ------------------------------------------------------------------------------------------------
def capture(learner: BaseAlgorithm) -> dict[str, Any]:
    """Return everything that decides how a learner goes on, where all its environments have just begun an episode.

    Args:
        learner: On environments that are wrapped in `EpisodeStart`.

    Returns:
        Plain dictionaries, lists, numbers, texts and tensors (copies); `restore` takes them.
    """
    assert learner.env is not None
    environments: list[dict[str, Any]] = learner.env.env_method("episode_start")
    names, variables = learner._get_torch_save_params()
    plain = {
        "counters": {name: getattr(learner, name) for name in COUNTERS},
        "episodes": [_plain(info) for info in learner.ep_info_buffer or ()],
        "successes": [_plain(value) for value in learner.ep_success_buffer or ()],
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),  # noqa: NPY002  (Stable-Baselines3 draws from it)
        "actions": learner.action_space.np_random.bit_generator.state,
        "environments": environments,
    }
    return {
        "plain": json.dumps(plain, default=_plain),
        "states": {name: _copied(attrgetter(name)(learner).state_dict()) for name in names},
        "variables": {name: attrgetter(name)(learner).detach().clone() for name in variables},
        "exploration": [_copied(vars_of(one, torch.Tensor)) for one in _explorations(learner)],
        "last": {name: _tensor(getattr(learner, name)) for name in LAST if getattr(learner, name) is not None},
        "torch": torch.get_rng_state(),
        "replay": _replay(getattr(learner, "replay_buffer", None)),
        "noise": [_tensors(vars_of(noise, np.ndarray)) for noise in _noises(learner)],
        "normalizer": _normalizer(learner.get_vec_normalize_env()),
    }


def restore(learner: BaseAlgorithm, state: Mapping[str, Any]) -> None:
    """Make a new learner, with the same settings and environments, stand where `capture` found the other one.

    Raises:
        UserError: An environment does not begin its episode as it did: data or network are others.
    """
    assert learner.env is not None
    restore_weights(learner, state)
    plain = json.loads(state["plain"])
    learner.ep_info_buffer = deque(plain["episodes"], maxlen=learner._stats_window_size)
    learner.ep_success_buffer = deque(plain["successes"], maxlen=learner._stats_window_size)
    for one, values in zip(_explorations(learner), state["exploration"], strict=True):
        vars(one).update(_copied(values))
    for name, value in state["last"].items():
        setattr(learner, name, value.numpy().copy())
    _restore_replay(getattr(learner, "replay_buffer", None), state["replay"])
    for noise, values in zip(_noises(learner), state["noise"], strict=True):
        vars(noise).update({name: value.numpy().copy() for name, value in values.items()})
    for place, start in enumerate(plain["environments"]):
        observation, _ = learner.env.env_method("begin_again", start, indices=place)[0]
        seen = state["last"]["_last_obs"][place]
        if not state["normalizer"] and not np.allclose(observation, seen.numpy(), rtol=0, atol=SEEN_TOLERANCE):
            raise UserError(
                "a search must go on with the data and the network that it began with, but its environment begins its "
                "episode otherwise; bring them back, or start a new search"
            )
    _restore_normalizer(learner.get_vec_normalize_env(), state["normalizer"])
    learner.action_space.np_random.bit_generator.state = plain["actions"]
    version, numbers, gauss = plain["python"]
    random.setstate((version, tuple(numbers), gauss))
    np.random.set_state(plain["numpy"])  # noqa: NPY002
    torch.set_rng_state(state["torch"])


def restore_weights(learner: BaseAlgorithm, state: Mapping[str, Any]) -> None:
    """Give a new learner the weights, the optimizers' states and the counters of the captured one, and no more."""
    for name, value in json.loads(state["plain"])["counters"].items():
        setattr(learner, name, value)
    for name, values in state["states"].items():
        attrgetter(name)(learner).load_state_dict(_copied(values))
    with torch.no_grad():
        for name, value in state["variables"].items():
            attrgetter(name)(learner).copy_(value)


def vars_of(thing: Any, kind: type) -> dict[str, Any]:
    """Return the attributes of `thing` that are of one kind."""
    return {name: value for name, value in vars(thing).items() if isinstance(value, kind)}


def _explorations(learner: BaseAlgorithm) -> list[Any]:
    """Return the distributions that keep a drawn matrix over several steps (state-dependent exploration)."""
    found = [vars(module).get("action_dist") for module in learner.policy.modules()]
    return [one for one in found if hasattr(one, "exploration_mat")]


def _noises(learner: BaseAlgorithm) -> list[ActionNoise]:
    noise = learner.action_noise
    if noise is None:
        return []
    return list(noise.noises) if isinstance(noise, VectorizedActionNoise) else [noise]


def _replay(buffer: ReplayBuffer | None) -> dict[str, Any]:
    if buffer is None:
        return {}
    filled = buffer.buffer_size if buffer.full else buffer.pos
    reach = min(buffer.buffer_size, filled + 1) if buffer.optimize_memory_usage else filled  # the next one lies there
    arrays = {name: _tensor(value[:reach]) for name, value in vars_of(buffer, np.ndarray).items()}
    return {"pos": buffer.pos, "full": buffer.full, "arrays": arrays}


def _restore_replay(buffer: ReplayBuffer | None, state: Mapping[str, Any]) -> None:
    if buffer is None:
        return
    buffer.pos, buffer.full = state["pos"], state["full"]
    for name, values in state["arrays"].items():
        getattr(buffer, name)[: len(values)] = values.numpy()


def _normalizer(normalizer: VecNormalize | None) -> dict[str, Any]:
    if normalizer is None:
        return {}
    made = {name: _tensors(vars(getattr(normalizer, name))) for name in STATISTICS if hasattr(normalizer, name)}
    return {**made, "returns": _tensor(normalizer.returns)}


def _restore_normalizer(normalizer: VecNormalize | None, state: Mapping[str, Any]) -> None:
    if normalizer is None:
        return
    for name in STATISTICS:
        for part, value in state.get(name, {}).items():
            setattr(getattr(normalizer, name), part, value.numpy().copy())
    normalizer.returns = state["returns"].numpy().copy()


def _tensors(values: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {name: _tensor(value) for name, value in values.items()}


def _tensor(value: Any) -> torch.Tensor:
    """Copy numbers into a tensor of the same type."""
    return torch.from_numpy(np.array(value))


def _copied(value: Any) -> Any:
    """Copy nested dictionaries and sequences, so that what is captured does not change with the learner."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {name: _copied(one) for name, one in value.items()}
    return type(value)(_copied(one) for one in value) if isinstance(value, (list, tuple)) else value


def _plain(value: Any) -> Any:
    """Turn NumPy's numbers and arrays into Python's."""
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    array: NDArray[Any] = np.asarray(value)
    return array.tolist()


# ---- on disk ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Where a search stands.

    Attributes:
        learner: From `capture`.
        rows: Evaluations that were recorded.
        seconds: How long it has learned.
        made_by: Digest of the settings that decide the search.
        noise_from: Share of the evaluations after which noise on a deterministic policy set in; None = not yet.
        stopped_by: Why learning ended; "" while it goes on.
        planner: From `planner.Planner.state`; empty where the learner does not plan.
    """

    learner: dict[str, Any]
    rows: int
    seconds: float
    made_by: str
    noise_from: float | None = None
    stopped_by: str = ""
    planner: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write the checkpoint; the one before it is kept beside it.

        Raises:
            UserError: It cannot be written; what was there stays as it was.
        """
        buffer = io.BytesIO()
        torch.save({each.name: getattr(self, each.name) for each in dataclasses.fields(self)}, buffer)
        content = buffer.getvalue()
        path, draft = folder / FILE, folder / f".{FILE}.{os.getpid()}.part"
        try:
            with draft.open("wb") as file:
                file.write(MAGIC + hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
                file.flush()
                os.fsync(file.fileno())
            if path.exists():
                path.replace(folder / BEFORE)
            draft.replace(path)
        except OSError as error:
            raise UserError(
                f"a search must be able to write {path}, but: {error.strerror or error}; make room there"
            ) from error
        finally:
            draft.unlink(missing_ok=True)


def read_checkpoint(
    folder: Path, accepted: Callable[[Checkpoint], bool] = lambda _: True, say: Callable[[str], None] = lambda _: None
) -> Checkpoint | None:
    """Return the last good checkpoint of a run, or None.

    Args:
        folder: The run's.
        accepted: Whether a whole checkpoint can be used.
        say: Is told, in a sentence, of each one that cannot be used.
    """
    for name in (FILE, BEFORE):
        path = folder / name
        if not path.exists():
            continue
        checkpoint = _parse(path)
        if checkpoint is not None and accepted(checkpoint):
            return checkpoint
        then = "the one before it is used" if name == FILE and (folder / BEFORE).exists() else "there is no other"
        why = "is cut off or altered" if checkpoint is None else "is ahead of the history"
        say(f"the checkpoint {path} {why}; {then}")
    return None


def has_checkpoint(folder: Path) -> bool:
    """Return whether a run folder holds a checkpoint, good or not; that of a finished run holds none."""
    return any((folder / name).exists() for name in (FILE, BEFORE))


def remove_checkpoints(folder: Path) -> None:
    """Remove a run's checkpoints, whole and half-written; the last one goes last."""
    for path in (*folder.glob(f".{FILE}.*.part"), folder / BEFORE, folder / FILE):
        path.unlink(missing_ok=True)


def _parse(path: Path) -> Checkpoint | None:
    """Read one file; None where it is not what was written."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    start = len(MAGIC) + 65
    content = data[start:]
    if data[:start] != MAGIC + hashlib.sha256(content).hexdigest().encode() + b"\n":
        return None
    return Checkpoint(**torch.load(io.BytesIO(content), weights_only=True))
