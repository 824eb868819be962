"""What ties a running search to its run folder: when its state is kept, and where a resumed search goes on."""

import dataclasses
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback

from ..pruning.errors import UserError
from ..pruning.fingerprint import digest
from ..pruning.score_cache import ScoreCache
from ..pruning.trimmer import Trimmer
from .checkpoint import Checkpoint, capture, read_checkpoint, remove_checkpoints, restore, restore_weights
from .history import History, SearchCallback
from .planner import Planner
from .settings import SearchSettings

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

HISTORY = "history.csv"
SCORES = "scores.sqlite"
LOCK = ".lock"

Noise = Callable[[float], None]


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep other processes from working in a run folder meanwhile; the system ends that when the process ends.

    Raises:
        UserError: Another process works there.
    """
    with (folder / LOCK).open("a") as file:
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"only one process may work in a folder at a time, but another one is at work in {folder}; let it end"
            ) from None
        except OSError:  # a file system without locks
            pass
        yield


class EpisodeBorders(BaseCallback):
    """Calls a function wherever learning is between two rollouts and every environment begins an episode.

    Args:
        reached: Called with the learner there, before the rollout.
        begin: Called instead, once, before the first rollout; a resumed learner is restored by it, after all that
            `learn` does at its start.
    """

    def __init__(
        self, reached: Callable[[BaseAlgorithm], None], begin: Callable[[BaseAlgorithm], None] | None = None
    ) -> None:
        super().__init__()
        self._reached, self._begin = reached, begin
        self._ended = False  # whether the last step ended the episode of every environment

    def _on_rollout_start(self) -> None:
        if self._begin is not None:
            self._begin(self.model)
            self._begin = None
        elif self._ended:
            self._reached(self.model)
        self._ended = False

    def _on_step(self) -> bool:
        dones: Any = self.locals["dones"]
        self._ended = bool(all(dones))
        return True


@dataclass
class Standing:
    """Where a search stands, kept in its run folder or, without one, nowhere.

    Args:
        folder: The run's; None = nothing is kept.
        made_by: From `origin`.
        history: Cut back to the checkpoint.
        checkpoint: To go on from; None = from the start.
    """

    folder: Path | None = None
    made_by: str = ""
    history: History = field(default_factory=History)
    checkpoint: Checkpoint | None = None

    @property
    def stopped_by(self) -> str:
        """Why learning ended before the search was resumed; "" where it did not."""
        return self.checkpoint.stopped_by if self.checkpoint else ""

    def borders(self, callback: SearchCallback, set_noise: Noise | None) -> EpisodeBorders:
        """Return the callback that keeps the search's state at the borders of episodes, and restores it at the first.

        Args:
            callback: Of the search; it must come after this one.
            set_noise: From `learner.noise_setter`.
        """
        checkpoint = self.checkpoint

        def begin(learner: BaseAlgorithm) -> None:
            assert checkpoint is not None
            restore(learner, checkpoint.learner)
            callback.seconds_before = checkpoint.seconds
            if set_noise is not None and hasattr(set_noise, "warm"):
                set_noise.warm = checkpoint.noise_from

        return EpisodeBorders(
            lambda learner: self.keep(learner, callback, set_noise), begin if checkpoint is not None else None
        )

    def keep(
        self,
        learner: BaseAlgorithm,
        callback: SearchCallback,
        set_noise: Noise | None,
        stopped_by: str = "",
        planner: dict[str, Any] | None = None,
    ) -> None:
        """Write a checkpoint, if there is a folder for it; `planner` is the state of one, see `planner.Planner`."""
        if self.folder is not None:
            Checkpoint(
                learner=capture(learner),
                rows=len(self.history.rows),
                seconds=callback.seconds,
                made_by=self.made_by,
                noise_from=getattr(set_noise, "warm", None),
                stopped_by=stopped_by,
                planner=planner or {},
            ).write(self.folder)

    def resume_planner(self, planner: Planner, learner: BaseAlgorithm, callback: SearchCallback) -> None:
        """Make a new planner and its learner stand where the checkpoint was taken, if there is one."""
        if self.checkpoint is not None:
            restore(learner, self.checkpoint.learner)
            planner.restore(self.checkpoint.planner, self.history)
            callback.seconds_before = self.checkpoint.seconds

    def restore_learned(self, learner: BaseAlgorithm) -> None:
        """Give a new learner what it had learned when its learning ended."""
        assert self.checkpoint is not None
        restore_weights(learner, self.checkpoint.learner)


def origin(trimmer: Trimmer, settings: SearchSettings) -> str:
    """Return the digest of all that decides a search: task, repair, versions, settings; not of limits and reports."""
    lasting = replace(settings, max_minutes=0.0, scores=None, latency_batches=(), noise_check="off")
    return digest(trimmer.fingerprint, dataclasses.asdict(lasting))


def score_store(folder: Path | None, settings: SearchSettings) -> ScoreCache | None:
    """Return where a search keeps its scores: the file that the settings name, else one in its folder."""
    if settings.scores is not None:
        return ScoreCache(settings.scores)
    return None if folder is None else ScoreCache(folder / SCORES)


def take_up(folder: Path, made_by: str, say: Callable[[str], None]) -> Standing:
    """Return where the search in a run folder goes on: at its last good checkpoint, or at the start.

    Rows of the history beyond the checkpoint are dropped; they are played again, with scores from the store.

    Args:
        folder: The run's.
        made_by: From `origin`.
        say: Is told, in sentences, where the search goes on and of what could not be used.

    Raises:
        UserError: The run was made by other settings, on another task or by other versions; or the history cannot be
            written.
    """
    path = folder / HISTORY
    try:
        known = len(History.restore(path).rows) if path.with_suffix(".jsonl").exists() else 0
    except UserError as error:
        if isinstance(error.__cause__, OSError):
            raise
        say(f"the history cannot be used: {error}")
        known = 0
    checkpoint = read_checkpoint(folder, lambda one: one.rows <= known, say)
    if checkpoint is None:
        for each in (path, path.with_suffix(".jsonl")):
            each.unlink(missing_ok=True)
        remove_checkpoints(folder)
        say("there is no checkpoint to go on from: the search starts anew, with the scores that are known")
        return Standing(folder, made_by, History(path))
    if checkpoint.made_by != made_by:
        raise UserError(
            f"a search must go on with what it began with, but the network, the data, the settings or the versions of "
            f"prunegym or PyTorch are not those that {folder} was started with; bring them back, or start a new search"
        )
    if checkpoint.stopped_by:
        say(f"resumed after its {checkpoint.rows} evaluations, at the final comparison")
    else:
        again = known - checkpoint.rows
        say(f"resumed after {checkpoint.rows} evaluations" + (f"; {again} more are played again" if again else ""))
    return Standing(folder, made_by, History.restore(path, rows=checkpoint.rows), checkpoint)


def from_outside(error: BaseException) -> bool:
    """Return whether an error came from the machine (a full disk, a lost process), not from what was asked for."""
    cause = error.__cause__
    return isinstance(cause, (OSError, EOFError, sqlite3.Error)) or bool(getattr(error, "__notes__", ()))
