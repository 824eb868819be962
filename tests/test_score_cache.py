"""The file of scores: exact numbers, many processes at once, and a clear word about every file that cannot serve."""

import math
import multiprocessing
import pickle
import sqlite3
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prunegym.pruning.errors import UserError
from prunegym.pruning.evaluation import Score
from prunegym.pruning.score_cache import ScoreCache

SOME = Score(0.5, 1.25, 10, 0.125)


def bits(score: Score) -> bytes:
    return struct.pack("<3dq", score.accuracy, score.loss, score.divergence, score.examples)


@pytest.mark.parametrize("number", [0.1 + 0.2, 1 / 3, 5e-324, 1.7e308, 0.0, -0.0, math.inf, math.nan])
def test_every_bit_comes_back(number: float, tmp_path: Path) -> None:
    cache, score = ScoreCache(tmp_path / "scores.sqlite"), Score(2 / 3, number, 3, number)
    cache.put("a", score)
    cache.close()
    got = ScoreCache(cache.path).get("a")
    assert got is not None
    assert bits(got) == bits(score)


def test_the_first_score_of_a_key_is_kept_and_look_ups_are_counted(tmp_path: Path) -> None:
    cache = ScoreCache(str(tmp_path / "scores.sqlite"))
    assert bool(cache)
    assert not cache.path.exists()
    assert cache.get("a") is None
    cache.put("a", SOME)
    cache.put("a", Score(0.1, 0.2, 3))
    cache.put("b", Score(0.1, 0.2, 3))
    assert (cache.get("a"), cache.get("b"), cache.get("c")) == (SOME, Score(0.1, 0.2, 3), None)
    assert (len(cache), cache.hits, cache.misses) == (2, 2, 2)


def test_a_pickle_holds_the_path_only(tmp_path: Path) -> None:
    cache = ScoreCache(tmp_path / "scores.sqlite")
    cache.put("a", SOME)
    assert cache.get("a") == SOME
    copy = pickle.loads(pickle.dumps(cache))
    assert (copy.path, copy.hits) == (cache.path, 0)
    assert copy.get("a") == SOME


# ---- processes -------------------------------------------------------------------------------------------------------
ROWS = 60


def write(cache: ScoreCache, writer: int, barrier: Any) -> None:
    """Write keys that the others write too, and keys of one's own, all at once."""
    barrier.wait(120)
    for row in range(ROWS):
        cache.put(f"shared {row}", Score(row / ROWS, float(writer), 1 + writer, float(writer)))
        cache.put(f"own {writer} {row}", Score(row / ROWS, float(writer), 1))
        assert cache.get(f"own {writer} {row}") == Score(row / ROWS, float(writer), 1)


def test_processes_write_at_once(tmp_path: Path) -> None:
    """Two children and this one open the same new file at one moment; nothing is lost, no row mixes two writers."""
    context = multiprocessing.get_context("spawn")
    cache, barrier = ScoreCache(tmp_path / "scores.sqlite"), context.Barrier(3)
    children = [context.Process(target=write, args=(cache, writer, barrier)) for writer in (1, 2)]
    for child in children:
        child.start()
    write(cache, 0, barrier)
    for child in children:
        child.join(180)
    assert [child.exitcode for child in children] == [0, 0]
    assert len(cache) == ROWS + 3 * ROWS
    for row in range(ROWS):
        shared = cache.get(f"shared {row}")
        assert shared is not None
        assert shared in [Score(row / ROWS, float(writer), 1 + writer, float(writer)) for writer in range(3)]
        assert all(cache.get(f"own {writer} {row}") == Score(row / ROWS, float(writer), 1) for writer in range(3))


def put_one(cache: ScoreCache, key: str) -> None:
    cache.put(key, SOME)


def test_a_forked_child_opens_the_file_for_itself(tmp_path: Path) -> None:
    cache = ScoreCache(tmp_path / "scores.sqlite")
    cache.put("parent", SOME)
    child = multiprocessing.get_context("fork").Process(target=put_one, args=(cache, "child"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of later Pythons, about threads and fork
        child.start()
    child.join(60)
    assert child.exitcode == 0
    cache.put("after", SOME)
    assert (len(cache), cache.get("child")) == (3, SOME)


# ---- files that cannot serve -----------------------------------------------------------------------------------------
def text(path: Path) -> ScoreCache:
    path.write_text("accuracy,loss\n" * 200)
    return ScoreCache(path)


def fill(cache: ScoreCache) -> None:
    for row in range(200):
        cache.put(f"{row:060}", SOME)


def torn(path: Path) -> ScoreCache:
    whole = ScoreCache(path)
    fill(whole)
    whole.close()
    path.write_bytes(path.read_bytes()[:9000])
    return ScoreCache(path)


def without_folder(path: Path) -> ScoreCache:
    return ScoreCache(path / "none" / "scores.sqlite")


def folder(path: Path) -> ScoreCache:
    path.mkdir()
    return ScoreCache(path)


def other_database(path: Path) -> ScoreCache:
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE customers (name TEXT)")
    connection.close()
    return ScoreCache(path)


def full(path: Path) -> ScoreCache:
    cache = ScoreCache(path)
    cache._open().execute("PRAGMA max_page_count = 1")  # the database's own word for a full disk
    return cache


def read_only(path: Path) -> ScoreCache:
    cache = ScoreCache(path)
    cache._open().execute("PRAGMA query_only = 1")
    return cache


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (text, r"broken\.sqlite is not: file is not a database; name another file; this one is left as it is"),
        (torn, "malformed; delete it, its scores are worked out again, or name another file"),
        (without_folder, "unable to open database file; make its folder"),
        (folder, "unable to open database file; make its folder, with the right to write into it"),
        (other_database, r"is a database of something else \(table 'customers'\); name another file"),
        (full, "database or disk is full; make room on the disk"),
        (read_only, "readonly database; make the file and its folder writable"),
    ],
)
def test_a_broken_file_is_a_clear_word(make: Callable[[Path], ScoreCache], message: str, tmp_path: Path) -> None:
    cache = make(tmp_path / "broken.sqlite")
    with pytest.raises(UserError, match=message):
        fill(cache)


def test_a_foreign_file_is_left_as_it_is(tmp_path: Path) -> None:
    for make in (text, other_database):
        path = tmp_path / make.__name__
        cache = make(path)
        before = path.read_bytes()
        for use in (lambda cache=cache: cache.get("a"), lambda cache=cache: len(cache)):
            with pytest.raises(UserError, match="file of scores"):
                use()
        assert path.read_bytes() == before


@pytest.mark.parametrize(
    "row", [("much", "0x1p-1", "nan", 3), ("0x1p+3", "0x1p-1", "nan", 3), ("0x1p-1", "", "nan", 3)]
)
def test_a_row_that_is_no_score_is_refused(row: tuple[Any, ...], tmp_path: Path) -> None:
    cache = ScoreCache(tmp_path / "scores.sqlite")
    cache.put("a", SOME)
    with sqlite3.connect(cache.path) as connection:
        connection.execute("INSERT INTO scores_1 VALUES (?, ?, ?, ?, ?)", ("b", *row))
    connection.close()
    assert cache.get("a") == SOME
    with pytest.raises(UserError, match=r"a row is no score.*delete it, its scores are worked out again"):
        cache.get("b")
