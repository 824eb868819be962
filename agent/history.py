"""The record of a search: one row per scored network, and the callback that writes it while SB3 learns."""

import csv
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback

COLUMNS = (
    "evaluation", "episode", "round", "accuracy", "loss", "kept", "params", "macs", "reward", "best_reward", "widths",
)  # fmt: skip


@dataclass(frozen=True)
class Evaluation:
    """One scored network.

    Attributes:
        evaluation: Counted from 1 over the whole search.
        episode: Counted from 1.
        round: Of its episode, from 1.
        accuracy: On the reward images.
        loss: Cross-entropy there, in nats.
        kept: Share of the original cost, in the budget's unit.
        params: Parameters.
        macs: Multiply-accumulates of one example.
        reward: Of the episode, None before its last round.
        widths: Channels that stay, by group.
        plans: For an episode's last round, the plan of each round.
    """

    evaluation: int
    episode: int
    round: int
    accuracy: float
    loss: float
    kept: float
    params: int
    macs: int
    reward: float | None
    widths: dict[str, int]
    plans: tuple[dict[str, list[int]], ...] = ()


@dataclass
class History:
    """All evaluations of a search, kept on disk as they come.

    Args:
        path: CSV file, or None to keep them in memory only.
    """

    path: Path | None = None
    rows: list[Evaluation] = field(default_factory=list)
    best: Evaluation | None = None  # the finished evaluation of highest reward; lower loss decides between equals

    @property
    def finished(self) -> list[Evaluation]:
        """Evaluations that ended an episode."""
        return [row for row in self.rows if row.reward is not None]

    def ranked(self) -> list[Evaluation]:
        """Return finished evaluations, best first, each distinct schedule once."""
        seen: set[str] = set()
        result = []
        for row in sorted(self.finished, key=_rank):
            key = json.dumps(row.plans, sort_keys=True)
            if key not in seen:
                seen.add(key)
                result.append(row)
        return result

    def add(self, row: Evaluation) -> None:
        """Append a row and write it at once."""
        self.rows.append(row)
        if row.reward is not None and (self.best is None or _rank(row) < _rank(self.best)):
            self.best = row
        if self.path is None:
            return
        best = self.best
        with self.path.open("a", newline="") as file:
            writer = csv.writer(file)
            if len(self.rows) == 1:
                writer.writerow(COLUMNS)
            writer.writerow(
                [
                    row.evaluation, row.episode, row.round, repr(row.accuracy), repr(row.loss), repr(row.kept),
                    row.params, row.macs, "" if row.reward is None else repr(row.reward),
                    "" if best is None else repr(best.reward), " ".join(map(str, row.widths.values())),
                ]
            )  # fmt: skip


def _rank(row: Evaluation) -> tuple[float, float, int]:
    return (-(row.reward or 0.0), row.loss, row.evaluation)


class SearchCallback(BaseCallback):
    """Counts evaluations, turns the noise down, stops at the limits, and keeps the history.

    Args:
        history: Where evaluations go.
        max_evaluations: After so many, learning stops.
        max_seconds: Learning stops after so long; 0 = no limit.
        set_noise: Called with the share of evaluations spent, in [0, 1], before each rollout.
        report: Called with the history after each evaluation (progress bar).
    """

    def __init__(
        self,
        history: History,
        *,
        max_evaluations: int,
        max_seconds: float = 0.0,
        set_noise: Callable[[float], None] | None = None,
        report: Callable[[History], None] | None = None,
    ) -> None:
        super().__init__()
        self.history = history
        self.max_evaluations = max_evaluations
        self.max_seconds = max_seconds
        self.stopped_by = ""
        self._set_noise = set_noise
        self._report = report
        self._started = time.monotonic()
        self._episodes = 0
        self._rounds: dict[int, int] = {}

    def _on_training_start(self) -> None:
        self._started = time.monotonic()

    def _on_rollout_start(self) -> None:
        if self._set_noise:
            self._set_noise(min(1.0, len(self.history.rows) / self.max_evaluations))

    def _on_step(self) -> bool:
        rewards: Sequence[float] = self.locals["rewards"]
        dones: Sequence[bool] = self.locals["dones"]
        for worker, info in enumerate(self.locals["infos"]):
            if "accuracy" in info and len(self.history.rows) < self.max_evaluations:
                self._record(worker, info, float(rewards[worker]), bool(dones[worker]))
        if len(self.history.rows) >= self.max_evaluations:
            self.stopped_by = "max_evaluations"
            return False
        if self.max_seconds and time.monotonic() - self._started >= self.max_seconds:
            self.stopped_by = "max_minutes"
            return False
        return True

    def record_alone(self, infos: Sequence[dict[str, Any]], reward: float) -> None:
        """Take in an episode that was played outside of learning."""
        for place, info in enumerate(infos):
            self._record(-1, info, reward, place + 1 == len(infos))
        self.logger.dump(self.num_timesteps)

    def _on_training_end(self) -> None:
        self.logger.dump(self.num_timesteps)  # the last rollout, which no update follows

    def _record(self, worker: int, info: dict[str, Any], reward: float, done: bool) -> None:
        place = self._rounds.get(worker, 0) + 1
        self._rounds[worker] = 0 if done else place
        self._episodes += done
        plans = info.get("plans", ())
        row = Evaluation(
            evaluation=len(self.history.rows) + 1,
            episode=self._episodes + (not done),
            round=place,
            accuracy=info["accuracy"],
            loss=info["loss"],
            kept=info["kept"],
            params=info["params"],
            macs=info["macs"],
            reward=reward if done else None,
            widths={name: len(keep) for name, keep in info["plan"].items()},
            plans=tuple(plans),
        )
        self.history.add(row)
        self.logger.record_mean("prune/accuracy", row.accuracy)
        self.logger.record_mean("prune/kept", row.kept)
        best = self.history.best
        if best is not None:
            self.logger.record("prune/best_accuracy", best.accuracy)
            self.logger.record("prune/best_reward", best.reward)
        self.logger.record("prune/evaluations", len(self.history.rows))
        for name, value in info.get("reward_terms", {}).items():
            self.logger.record_mean(f"prune/term_{name}", value)
        if self._report:
            self._report(self.history)
