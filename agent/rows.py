"""One scored network, as a line of JSON that reads back exactly and as a row of a table; and files that keep them."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..pruning.artifact import write_atomically
from ..pruning.errors import UserError

COLUMNS = (
    "evaluation", "episode", "round", "accuracy", "loss", "kept", "params", "macs", "reward", "best_reward", "budget",
    "repeated", "widths",
)  # fmt: skip


@dataclass(frozen=True)
class Evaluation:
    """One scored network.

    Attributes:
        evaluation: Row number, counted from 1 over the whole search.
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
        budget: Share of the cost that the episode might keep, in (0, 1]; None where there was none, or where it was
            not told before the episode's last round.
        repeated: Only in an episode's last row: the same plans were scored before in this search, so that the episode
            costs nothing.
        cached: The score came from a store of scores. It changes seconds only, so that rows that differ in nothing
            else are equal.
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
    budget: float | None = None
    repeated: bool = False
    cached: bool = field(default=False, compare=False)


# ---- as text ---------------------------------------------------------------------------------------------------------
def to_line(row: Evaluation) -> str:
    """Return one line of JSON, with its end."""
    return json.dumps(asdict(row)) + "\n"


def from_line(line: bytes) -> Evaluation:
    """Return the row of a line of JSON.

    Raises:
        ValueError: The line is torn or is no row.
    """
    if not line.endswith(b"\n"):
        raise ValueError("torn")
    try:
        entry = json.loads(line)
        return Evaluation(**{**entry, "plans": tuple(entry["plans"])})
    except (TypeError, KeyError, RecursionError) as error:
        raise ValueError("no row") from error


def table_head() -> str:
    """Return the line with the names of the columns."""
    return _csv(COLUMNS)


def table_row(row: Evaluation, best: Evaluation | None) -> str:
    """Return the line of a row; `best` is the best finished one up to it."""
    return _csv(
        [
            row.evaluation, row.episode, row.round, repr(row.accuracy), repr(row.loss), repr(row.kept),
            row.params, row.macs, "" if row.reward is None else repr(row.reward),
            "" if best is None else repr(best.reward), "" if row.budget is None else repr(row.budget),
            int(row.repeated), " ".join(map(str, row.widths.values())),
        ]
    )  # fmt: skip


def _csv(values: Sequence[Any]) -> str:
    text = io.StringIO(newline="")
    csv.writer(text).writerow(values)
    return text.getvalue()


# ---- on disk ---------------------------------------------------------------------------------------------------------
def append_text(path: Path, text: str, *, fresh: bool) -> None:
    """Write at the end of a file, which must not exist yet where `fresh`.

    Raises:
        UserError: It exists, or cannot be written.
    """
    try:
        with path.open("x" if fresh else "a", encoding="utf-8", newline="") as file:
            file.write(text)
    except FileExistsError as error:
        raise UserError(
            f"a new history needs a file of its own, but {path} exists; History.restore goes on with it"
        ) from error
    except OSError as error:
        raise _unwritable(path, error) from error


def read_lines(path: Path) -> list[bytes]:
    """Return the lines of a file, with their ends.

    Raises:
        UserError: It cannot be read.
    """
    try:
        return path.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise UserError(
            f"a history is restored from {path}, but it cannot be read ({error.strerror or error}); start the search "
            "anew"
        ) from error


def replace_file(path: Path, data: bytes) -> None:
    """Let a file hold `data`, in one piece or not at all.

    Raises:
        UserError: It cannot be written.
    """
    try:
        if not path.exists() or path.read_bytes() != data:
            write_atomically(path, data)
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"every evaluation must be kept on disk, but {path} cannot be written ({error.strerror or error}); make room, "
        "or the folder writable, and go on with the search"
    )
