"""Scores in a file that several processes and several runs share.

One SQLite database with one row per score; `Trimmer(..., scores=ScoreCache(path))` uses it. A row is found by the
digest of all that decided the score (`Trimmer.evaluate`): another network, other images, another repair or another
version of this package find nothing. A file only grows.
"""

import os
import sqlite3
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from .errors import UserError
from .evaluation import Score

WAIT_SECONDS = 60.0
"""How long a process waits for another one that writes."""

TABLE = "scores_1"
"""Named by the format of its rows, so that later formats can stand beside it."""

ADVICE = {
    sqlite3.SQLITE_FULL: "make room on the disk, or name a file on another one",
    sqlite3.SQLITE_IOERR: "look whether the disk is full or failing, or name a file on another one",
    sqlite3.SQLITE_READONLY: "make the file and its folder writable, or name a file elsewhere",
    sqlite3.SQLITE_CANTOPEN: "make its folder, with the right to write into it, or name a file elsewhere",
    sqlite3.SQLITE_NOTADB: "name another file; this one is left as it is",
    sqlite3.SQLITE_CORRUPT: "delete it, its scores are worked out again, or name another file",
    sqlite3.SQLITE_BUSY: f"another process has held it for {WAIT_SECONDS:.0f} s; end that one, or name another file",
}


class ScoreCache:
    """Keeps scores in a file, for `Trimmer.evaluate`.

    The file is made when it is first used, by whichever process comes first. Any number of processes may read and write
    it at once; of several scores for one key the first is kept. What is pickled is the path alone: each process opens
    the file for itself.

    Args:
        path: The file; its folder must exist.

    Attributes:
        path: As given.
        hits: Scores found so far by this object.
        misses: Keys that this object did not find.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.hits = 0
        self.misses = 0
        self._connection: sqlite3.Connection | None = None
        self._owner = os.getpid()
        self._inherited: list[sqlite3.Connection] = []

    def get(self, key: str) -> Score | None:
        """Return the score kept under a key, with the very numbers that were put, or None.

        Raises:
            UserError: The file cannot be read, or is no file of scores.
        """
        try:
            found = self._open().execute(
                f"SELECT accuracy, loss, divergence, examples FROM {TABLE} WHERE key = ?", (key,)
            )
            row = found.fetchone()
        except sqlite3.Error as error:
            self._refuse(error)
        if row is None:
            self.misses += 1
            return None
        self.hits += 1
        return self._score(row)

    def put(self, key: str, score: Score) -> None:
        """Keep a score, unless there is one under the key already; it is on the disk when this returns.

        Raises:
            UserError: The file cannot be written, or is no file of scores.
        """
        row = (key, *(float(value).hex() for value in (score.accuracy, score.loss, score.divergence)), score.examples)
        try:
            self._open().execute(
                f"INSERT OR IGNORE INTO {TABLE} (key, accuracy, loss, divergence, examples) VALUES (?, ?, ?, ?, ?)",
                row,
            )
        except sqlite3.Error as error:
            self._refuse(error)

    def __len__(self) -> int:
        """Return the number of scores in the file."""
        try:
            return int(self._open().execute(f"SELECT COUNT(*) FROM {TABLE}").fetchone()[0])
        except sqlite3.Error as error:
            self._refuse(error)

    def __bool__(self) -> bool:
        """Return True: an empty store is a store."""
        return True

    def close(self) -> None:
        """Close the file; it is opened again when it is needed."""
        if self._connection is not None and self._owner == os.getpid():
            self._connection.close()
        self._connection = None

    def __getstate__(self) -> Path:
        """Return what is pickled."""
        return self.path

    def __setstate__(self, path: Path) -> None:
        """Begin anew in another process."""
        ScoreCache.__init__(self, path)

    def _open(self) -> sqlite3.Connection:
        """Return this process's connection; the table is there."""
        if self._connection is not None and self._owner != os.getpid():
            self._inherited.append(self._connection)  # of the parent: closing it here would drop the parent's locks
            self._connection = None
        if self._connection is None:
            # autocommit, as each statement is a whole transaction; a search may run in another thread than its maker
            connection = sqlite3.connect(self.path, timeout=WAIT_SECONDS, isolation_level=None, check_same_thread=False)
            try:
                self._prepare(connection)
            except BaseException:
                connection.close()
                raise
            self._connection, self._owner = connection, os.getpid()
        return self._connection

    def _prepare(self, connection: sqlite3.Connection) -> None:
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if tables and not any(name.startswith("scores_") for name in tables):
            raise UserError(
                f"a file of scores must hold scores only, but {self.path} is a database of something else "
                f"(table {min(tables)!r}); name another file"
            )
        with suppress(sqlite3.OperationalError):  # a busy file, or a disk without shared memory: slower, not wrong
            connection.execute("PRAGMA journal_mode = WAL")
        connection.execute(
            f"CREATE TABLE IF NOT EXISTS {TABLE} (key TEXT PRIMARY KEY, accuracy TEXT NOT NULL, loss TEXT NOT NULL, "
            "divergence TEXT NOT NULL, examples INTEGER NOT NULL) WITHOUT ROWID"
        )

    def _score(self, row: tuple[str, str, str, int]) -> Score:
        try:
            accuracy, loss, divergence = (float.fromhex(text) for text in row[:3])
            score = Score(accuracy, loss, int(row[3]), divergence)
        except (TypeError, ValueError) as error:
            raise self._broken(f"a row is no score: {row!r:.80}", ADVICE[sqlite3.SQLITE_CORRUPT]) from error
        if not 0 <= accuracy <= 1 or score.examples < 1:
            raise self._broken(f"a row is no score: {row!r:.80}", ADVICE[sqlite3.SQLITE_CORRUPT])
        return score

    def _refuse(self, error: sqlite3.Error) -> NoReturn:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the rest of the number tells details
        raise self._broken(str(error), ADVICE.get(code, "delete it, or name another file")) from error

    def _broken(self, problem: str, advice: str) -> UserError:
        return UserError(f"a file of scores must be readable and writable, but {self.path} is not: {problem}; {advice}")
