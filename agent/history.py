"""The record of a search: one row per scored network, kept on disk as it comes, and the callback that fills it.

Every searcher, learned or not, counts through the same `Recorder`, so that equal evaluations mean the same for all.
"""

import heapq
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback

from ..pruning.errors import UserError
from .rows import COLUMNS as COLUMNS
from .rows import Evaluation, append_text, from_line, read_lines, replace_file, table_head, table_row, to_line

ROWS_PER_EVALUATION = 10
"""A search ends after so many rows for each allowed evaluation: one that only repeats itself spends nothing."""

_INSTEAD = "take the file from a copy, or start the search anew"


@dataclass
class History:
    """All evaluations of a search, kept on disk as they come.

    Args:
        path: CSV file, for people, or None to keep the evaluations in memory only. Beside it, with the ending
            ".jsonl", stands what `restore` reads: one JSON object a row, with the plans.
        rows: Evaluations made before.
    """

    path: Path | None = None
    rows: list[Evaluation] = field(default_factory=list)
    best: Evaluation | None = field(default=None, init=False)
    """The finished evaluation of highest reward; lower loss decides between equals."""
    spent: int = field(default=0, init=False)
    """Evaluations that count: all rows but those of repeated episodes."""
    _rounds: dict[int, int] = field(default_factory=dict, init=False, repr=False)  # of unfinished episodes
    _scored: set[str] = field(default_factory=set, init=False, repr=False)
    _begun: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        """Count what was made before."""
        given, self.rows = self.rows, []
        for row in given:
            self._take(row)

    @classmethod
    def restore(cls, path: str | Path, *, rows: int | None = None) -> "History":
        """Read a history back, to go on with it.

        A torn last line is dropped. Both files are left as if nothing beyond the rows kept had ever been written;
        each changes in one piece or not at all.

        Args:
            path: The CSV file, as it was given when the history was made.
            rows: Keep so many of the first rows, at least 0; None = all.

        Raises:
            UserError: There are no such rows, or they cannot be read or written.
        """
        path = Path(path)
        source = _lines_path(path)
        history, lines = cls(path), read_lines(source)
        for number, line in enumerate(lines[:rows], 1):
            try:
                row: Evaluation | None = from_line(line)
            except ValueError:
                row = None
            if row is not None and row.evaluation == number:
                history._take(row)
            elif number < len(lines):
                raise UserError(
                    f"{source} must hold one evaluation a line, in order, but line {number} is none; {_INSTEAD}"
                )
        kept = len(history.rows)
        if rows is not None and kept < rows:
            raise UserError(f"{source} must hold at least {rows} evaluations, but has {kept}; {_INSTEAD}")
        replace_file(source, b"".join(lines[:kept]))
        replace_file(path, history._table().encode())
        history._begun = True
        return history

    @property
    def finished(self) -> list[Evaluation]:
        """Evaluations that ended an episode."""
        return [row for row in self.rows if row.reward is not None]

    def best_at(self, budget: float | None) -> Evaluation | None:
        """Return the finished evaluation of highest reward under a budget, or None."""
        return min((row for row in self.finished if row.budget == budget), key=_rank, default=None)

    def leading(self, budget: float, count: int) -> list[Evaluation]:
        """Return the first finished evaluations under a budget, at most `count`, best first; repeats are left out."""
        rows = (row for row in self.finished if row.budget == budget and not row.repeated)
        return heapq.nsmallest(count, rows, key=_rank)

    def ranked(self, budget: float | None = None) -> list[Evaluation]:
        """Return finished evaluations, best first, each distinct schedule once.

        Args:
            budget: Only those under this budget; None = all. Rewards under different budgets compare only where the
                reward's terms do.
        """
        seen: set[str] = set()
        result = []
        for row in sorted(self.finished, key=_rank):
            key = _key(row.plans)
            if key not in seen and (budget is None or row.budget == budget):
                seen.add(key)
                result.append(row)
        return result

    def has_scored(self, plans: Sequence[Mapping[str, Sequence[int]]]) -> bool:
        """Return whether a finished episode made just these plans, in this order."""
        return _key(plans) in self._scored

    def add(self, row: Evaluation) -> None:
        """Append a row and write it at once.

        Raises:
            UserError: It cannot be written, or the file holds the history of another search.
        """
        self._take(row)
        if self.path is None:
            return
        fresh, self._begun = not self._begun, True
        if fresh:  # with rows made before, too
            append_text(_lines_path(self.path), "".join(map(to_line, self.rows)), fresh=True)
            append_text(self.path, self._table(), fresh=True)
        else:  # the JSON line first: it is what a search goes on from
            append_text(_lines_path(self.path), to_line(row), fresh=False)
            append_text(self.path, table_row(row, self.best), fresh=False)

    def _take(self, row: Evaluation) -> None:
        self.rows.append(row)
        self.spent += 1
        self._rounds[row.episode] = self._rounds.get(row.episode, 0) + 1
        if row.reward is None:
            return
        rounds = self._rounds.pop(row.episode)
        self.spent -= rounds * row.repeated
        self._scored.add(_key(row.plans))
        if self.best is None or _rank(row) < _rank(self.best):
            self.best = row

    def _table(self) -> str:
        replayed, lines = History(), [table_head()]
        for row in self.rows:
            replayed._take(row)
            lines.append(table_row(row, replayed.best))
        return "".join(lines)


def _rank(row: Evaluation) -> tuple[float, float, int]:
    reward, loss = row.reward or 0.0, row.loss  # what is not a number ranks last: it compares with nothing
    return (math.inf if math.isnan(reward) else -reward, math.inf if math.isnan(loss) else loss, row.evaluation)


def _key(plans: Sequence[Mapping[str, Sequence[int]]]) -> str:
    return json.dumps(plans, sort_keys=True)


def _lines_path(path: Path) -> Path:
    return path.with_suffix(".jsonl")


# ---- who fills it ----------------------------------------------------------------------------------------------------
class Recorder:
    """Turns what environments tell into rows of a history: counts episodes, rounds and repeats.

    Args:
        history: Where evaluations go; it may hold some already.
        budget: Of the episodes that do not tell theirs.
    """

    def __init__(self, history: History, budget: float | None = None) -> None:
        self.history = history
        self.budget = budget
        self._episodes = max((row.episode for row in history.rows), default=0)
        self._places: dict[int, tuple[int, int]] = {}  # worker -> number of its unfinished episode, rounds of it so far

    def record(self, info: Mapping[str, Any], reward: float, *, done: bool, worker: int = 0) -> Evaluation:
        """Take in a scored network, i.e. a step whose `info` holds an accuracy.

        Args:
            info: Of the step, see `TrimEnv`.
            reward: Of the step; kept for an episode's last one.
            done: Whether the episode ended with it.
            worker: Which of several environments made the step.

        Returns:
            The row that was added.
        """
        if worker not in self._places:
            self._episodes += 1
        episode, rounds = self._places.pop(worker, (self._episodes, 0))
        if not done:
            self._places[worker] = (episode, rounds + 1)
        plans = tuple(info.get("plans", ()))
        row = Evaluation(
            evaluation=len(self.history.rows) + 1,
            episode=episode,
            round=rounds + 1,
            accuracy=info["accuracy"],
            loss=info["loss"],
            kept=info["kept"],
            params=info["params"],
            macs=info["macs"],
            reward=reward if done else None,
            widths={name: len(keep) for name, keep in info["plan"].items()},
            plans=plans,
            budget=info.get("budget", self.budget),
            repeated=done and bool(plans) and self.history.has_scored(plans),
            cached=bool(info.get("cached", False)),
        )
        self.history.add(row)
        return row


class SearchCallback(BaseCallback):
    """Counts evaluations, turns the noise down, stops at the limits, and keeps the history.

    Args:
        history: Where evaluations go.
        max_evaluations: After so many, learning stops; repeated plans do not count, but ten times as many rows end it,
            too.
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
        self.recorder = Recorder(history)
        self.max_evaluations = max_evaluations
        self.max_seconds = max_seconds
        self.stopped_by = ""
        self.set_noise = set_noise
        self._report = report
        self.seconds_before = 0.0
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        """How long the search has learned; `seconds_before` is what it took before it was resumed."""
        return self.seconds_before + time.monotonic() - self._started

    def begin(self) -> None:
        """Start the clock."""
        self._started = time.monotonic()

    def out_of_time(self) -> str:
        """Return "max_minutes" when the time is over, else ""."""
        return "max_minutes" if self.max_seconds and self.seconds >= self.max_seconds else ""

    def _on_training_start(self) -> None:
        self.begin()
        if self.training_env.has_attr("settings"):
            self.recorder.budget = getattr(self.training_env.get_attr("settings", 0)[0], "budget", None)

    def _on_rollout_start(self) -> None:
        if self.set_noise:
            self.set_noise(min(1.0, self.history.spent / self.max_evaluations))

    def _on_step(self) -> bool:
        rewards: Sequence[float] = self.locals["rewards"]
        dones: Sequence[bool] = self.locals["dones"]
        for worker, info in enumerate(self.locals["infos"]):
            if "accuracy" in info and not limit_reached(self.history, self.max_evaluations):
                self._record(worker, info, float(rewards[worker]), bool(dones[worker]))
        if limit := limit_reached(self.history, self.max_evaluations):
            self.stopped_by = limit
            return False
        self.stopped_by = self.out_of_time()
        return not self.stopped_by

    def record_alone(self, infos: Sequence[dict[str, Any]], reward: float) -> None:
        """Take in an episode that was played outside of learning."""
        for place, info in enumerate(infos):
            self._record(-1, info, reward, place + 1 == len(infos))
        self.logger.dump(self.num_timesteps)

    def _on_training_end(self) -> None:
        self.logger.dump(self.num_timesteps)  # the last rollout, which no update follows

    def _record(self, worker: int, info: dict[str, Any], reward: float, done: bool) -> None:
        row = self.recorder.record(info, reward, done=done, worker=worker)
        self.logger.record_mean("prune/accuracy", row.accuracy)
        self.logger.record_mean("prune/kept", row.kept)
        best = self.history.best
        if best is not None:
            self.logger.record("prune/best_accuracy", best.accuracy)
            self.logger.record("prune/best_reward", best.reward)
        self.logger.record("prune/evaluations", self.history.spent)
        for name, value in info.get("reward_terms", {}).items():
            self.logger.record_mean(f"prune/term_{name}", value)
        if self._report:
            self._report(self.history)


def limit_reached(history: History, max_evaluations: int, *, spent: int = 0, rows: int = 0, ahead: int = 1) -> str:
    """Return "max_evaluations" or "repeats", what ends a search, or "" while it may go on.

    Args:
        history: Of the search.
        max_evaluations: Evaluations that it may spend, and a tenth of the rows that it may fill.
        spent: Evaluations that the history had spent before the search.
        rows: Rows that it had before.
        ahead: Evaluations of the next step, from 1; all must fit.
    """
    if history.spent - spent + ahead > max_evaluations:
        return "max_evaluations"
    return "repeats" if len(history.rows) - rows >= ROWS_PER_EVALUATION * max_evaluations else ""
