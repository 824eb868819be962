"""The record of a search: what counts, what is read back, and what a torn or full disk does to it."""

import csv
import errno
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prunegym.agent.history import COLUMNS, Evaluation, History, Recorder, SearchCallback, limit_reached
from prunegym.pruning import UserError
from stable_baselines3 import PPO
from toy_env import WalkEnv


def told(channels: int, *, accuracy: float = 0.5, loss: float = 1.0, **more: Any) -> dict[str, Any]:
    """Return the info of a scored network with one group that keeps its first `channels`."""
    plan = {"conv": list(range(channels))}
    return {
        "accuracy": accuracy, "loss": loss, "kept": channels / 10, "params": 7 * channels, "macs": 90 * channels,
        "plan": plan, **more,
    }  # fmt: skip


def ended(*channels: int, **more: Any) -> dict[str, Any]:
    """Return the info of an episode's last round; `channels` that stay, round by round."""
    return told(channels[-1], plans=[{"conv": list(range(count))} for count in channels], **more)


def small(path: Path | None = None) -> History:
    """Five episodes: 4 channels, 6, 4 again, 5 at another budget, and 6 again there."""
    history = History(path)
    recorder = Recorder(history, budget=0.5)
    rewards = [1.0, 0.1 + 0.2, 1.0, -2.0, 0.3]
    for place, channels in enumerate((4, 6, 4, 5, 6)):
        more = {"budget": 0.7} if place > 2 else {}
        recorder.record(ended(channels, loss=1 / 3, cached=place == 2, **more), rewards[place], done=True)
    return history


# ---- what counts -----------------------------------------------------------------------------------------------------
def test_repeated_plans_cost_nothing() -> None:
    history = small()
    assert [row.repeated for row in history.rows] == [False, False, True, False, True]
    assert history.spent == 3
    assert [row.evaluation for row in history.rows] == [1, 2, 3, 4, 5]
    assert [row.cached for row in history.rows] == [False, False, True, False, False]


def test_a_reward_that_is_no_number_ranks_last() -> None:
    history = History()
    recorder = Recorder(history)
    for channels, reward, loss in ((4, math.nan, 1.0), (5, -3.0, math.nan), (6, -3.0, 2.0), (7, math.nan, 0.5)):
        recorder.record(ended(channels, loss=loss), reward, done=True)
    assert history.best is not None
    assert history.best.evaluation == 3
    assert [row.evaluation for row in history.ranked()] == [3, 2, 4, 1]


def test_rounds_of_a_repeated_episode_cost_nothing() -> None:
    """Plans count as a whole: the same last round after another first one is another schedule."""
    history, spent = History(), []
    recorder = Recorder(history)
    for first, last in ((8, 4), (7, 4), (8, 4), (8, 5)):
        recorder.record(told(first), 0.0, done=False)
        spent.append(history.spent)
        recorder.record(ended(first, last), 1.0, done=True)
        spent.append(history.spent)
    assert spent == [1, 2, 3, 4, 5, 4, 5, 6]
    assert [row.repeated for row in history.rows] == [False] * 5 + [True] + [False] * 2
    assert [row.episode for row in history.rows] == [1, 1, 2, 2, 3, 3, 4, 4]


def test_workers_have_episodes_of_their_own() -> None:
    history = History()
    recorder = Recorder(history)
    for worker, channels in ((0, 8), (1, 7)):
        recorder.record(told(channels), 0.0, done=False, worker=worker)
    for worker, channels in ((1, 7), (0, 8)):
        recorder.record(ended(channels, 3), 1.0, done=True, worker=worker)
    assert [(row.episode, row.round) for row in history.rows] == [(1, 1), (2, 1), (2, 2), (1, 2)]
    assert history.spent == 4


def test_an_episode_without_plans_is_never_a_repeat() -> None:
    history = History()
    for _ in range(2):
        Recorder(history).record(told(4), 1.0, done=True)
    assert (history.spent, [row.episode for row in history.rows]) == (2, [1, 2])


def test_the_limit_is_on_what_was_spent_and_on_rows() -> None:
    history = History()
    recorder = Recorder(history)
    for channels in (1, 2, 2):
        recorder.record(ended(channels), 1.0, done=True)
    assert [limit_reached(history, limit) for limit in (2, 3)] == ["max_evaluations", ""]
    assert limit_reached(history, 3, ahead=2) == "max_evaluations"
    assert limit_reached(history, 3, spent=1, ahead=2) == ""
    for _ in range(27):
        recorder.record(ended(2), 1.0, done=True)
    assert limit_reached(history, 3) == "repeats"
    assert limit_reached(history, 3, rows=1) == ""


def test_best_and_ranking_by_budget() -> None:
    history = small()
    assert history.best is history.rows[0]
    assert history.best_at(0.5) is history.rows[0]
    assert history.best_at(0.7) is history.rows[4]
    assert history.best_at(0.6) is None
    assert history.ranked() == [history.rows[place] for place in (0, 1, 3)]
    assert history.ranked(0.7) == [history.rows[place] for place in (4, 3)]


def test_where_a_score_came_from_is_not_what_was_found() -> None:
    row = small().rows[0]
    assert replace(row, cached=True) == row
    assert replace(row, repeated=True) != row


@pytest.mark.parametrize(
    ("grain", "stopped_by", "spent", "rows"), [(1000, "max_evaluations", 6, 6), (1, "repeats", 1, 60)]
)
def test_learning_ends_by_either_limit(grain: int, stopped_by: str, spent: int, rows: int) -> None:
    """With grain 1 an action is one of three plans, and with next to no noise it is always the middle one."""
    env = WalkEnv([0.2], grain=grain, budget=0.4)
    learner = PPO("MlpPolicy", env, n_steps=4, batch_size=4, seed=0, device="cpu", policy_kwargs={"log_std_init": -3.0})
    history, shares = History(), []
    callback = SearchCallback(history, max_evaluations=6, set_noise=shares.append)
    learner.learn(10_000, callback=callback)
    assert callback.stopped_by == stopped_by
    assert (history.spent, len(history.rows)) == (spent, rows)
    assert {row.budget for row in history.rows} == {0.4}
    assert shares == [0.0, *[min(4, spent) / 6] * (len(shares) - 1)]


# ---- on disk ---------------------------------------------------------------------------------------------------------
def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "history.csv"
    written = small(path)
    recorder = Recorder(written)
    recorder.record(told(9, loss=math.inf), 0.0, done=False)
    before = path.read_bytes(), path.with_suffix(".jsonl").read_bytes()
    restored = History.restore(path)
    assert restored == written
    assert [row.cached for row in restored.rows] == [row.cached for row in written.rows]
    assert restored.spent == 4
    assert (path.read_bytes(), path.with_suffix(".jsonl").read_bytes()) == before
    for history in (written, restored):
        assert history.has_scored([{"conv": [0, 1, 2, 3]}])
        assert not history.has_scored([{"conv": [0, 1, 2]}])


def test_a_restored_history_goes_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    whole, halved = tmp_path / "whole.csv", tmp_path / "halved.csv"
    small(whole)
    small(halved)
    history = History.restore(halved, rows=2)
    recorder = Recorder(history, budget=0.5)
    for row in small().rows[2:]:
        info = ended(len(row.plans[0]["conv"]), loss=row.loss, cached=row.cached, budget=row.budget)
        recorder.record(info, row.reward or 0.0, done=True)
    assert halved.read_bytes() == whole.read_bytes()
    assert halved.with_suffix(".jsonl").read_bytes() == whole.with_suffix(".jsonl").read_bytes()


def test_the_table_is_for_people(tmp_path: Path) -> None:
    path = tmp_path / "history.csv"
    history = small(path)
    with path.open(newline="") as file:
        table = list(csv.DictReader(file))
    assert tuple(table[0]) == COLUMNS
    assert [float(line["reward"]) for line in table] == [row.reward for row in history.rows]
    assert [line["best_reward"] for line in table] == ["1.0"] * 5
    assert [line["budget"] for line in table] == ["0.5", "0.5", "0.5", "0.7", "0.7"]
    assert [line["repeated"] for line in table] == ["0", "0", "1", "0", "1"]
    assert [line["widths"] for line in table] == ["4", "6", "4", "5", "6"]


@pytest.mark.parametrize("lost", [1, 2, 40])
def test_a_torn_last_line_is_dropped(lost: int, tmp_path: Path) -> None:
    """Without its last byte, the line's end, the row reads well but what follows would join it."""
    path, reference = tmp_path / "history.csv", tmp_path / "reference.csv"
    written = small(path)
    lines = path.with_suffix(".jsonl")
    lines.write_bytes(lines.read_bytes()[:-lost])
    restored = History.restore(path)
    assert restored.rows == written.rows[:-1]
    shorter = History(reference)
    for row in written.rows[:-1]:
        shorter.add(row)
    assert path.read_bytes() == reference.read_bytes()
    assert lines.read_bytes() == reference.with_suffix(".jsonl").read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "history.csv", "history.jsonl", "reference.csv", "reference.jsonl",
    ]  # fmt: skip


@pytest.mark.parametrize("line", ["{", "[]", "3", '{"evaluation": 2}', "\x00", "[" * 5000])
def test_a_bad_line_within_is_refused(line: str, tmp_path: Path) -> None:
    path = tmp_path / "history.csv"
    small(path)
    lines = path.with_suffix(".jsonl").read_text().splitlines()
    lines[1] = line
    path.with_suffix(".jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(
        UserError, match=r"history\.jsonl must hold one evaluation a line, in order, but line 2 is none"
    ):
        History.restore(path)


def test_rows_out_of_order_missing_rows_and_no_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "history.csv"
    with pytest.raises(UserError, match=r"history is restored from .*history\.jsonl, but it cannot be read \(No such"):
        History.restore(path)
    small(path)
    with pytest.raises(UserError, match=r"must hold at least 6 evaluations, but has 5"):
        History.restore(path, rows=6)
    lines = path.with_suffix(".jsonl").read_text().splitlines(keepends=True)
    path.with_suffix(".jsonl").write_text("".join(lines[::-1]))
    with pytest.raises(UserError, match=r"in order, but line 1 is none"):
        History.restore(path)


def test_nothing_is_left_to_restore_but_the_head(tmp_path: Path) -> None:
    path = tmp_path / "history.csv"
    small(path)
    history = History.restore(path, rows=0)
    assert (history.rows, history.spent, history.best) == ([], 0, None)
    assert path.read_text().splitlines() == [",".join(COLUMNS)]
    Recorder(history, budget=0.5).record(ended(4, loss=1 / 3), 1.0, done=True)
    assert History.restore(path).rows == small().rows[:1]


def test_another_searchs_file_is_not_written_to(tmp_path: Path) -> None:
    path = tmp_path / "history.csv"
    small(path)
    with pytest.raises(UserError, match=r"a new history needs a file of its own, but .*history\.jsonl exists"):
        small(path)


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "history.csv"
    history = small(path)
    inner = Path.open

    def full(self: Path, mode: str = "r", **more: Any) -> Any:
        if mode == "a":
            raise OSError(errno.ENOSPC, "No space left on device")
        return inner(self, mode, **more)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(UserError, match=r"history\.jsonl cannot be written \(No space left on device\); make room"):
        Recorder(history).record(ended(3), 1.0, done=True)
    monkeypatch.undo()
    assert History.restore(path).rows == small().rows


def test_every_field_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "history.csv"
    history = small(path)
    entry = json.loads(path.with_suffix(".jsonl").read_text().splitlines()[1])
    row = history.rows[1]
    assert set(entry) == set(Evaluation.__dataclass_fields__)
    assert (entry["reward"], entry["plans"], entry["loss"]) == (row.reward, list(row.plans), row.loss)
