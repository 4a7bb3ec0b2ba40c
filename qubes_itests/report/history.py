"""The history of tests: results of runs, kept in the cache from one run to the next.

While a run goes on, its results are appended to a separate file, which takes no lock
and survives a kill. When it ends, and when anybody asks, the files of runs that have
ended go into an SQLite database, each in one transaction, and are removed after it. So
what could not be written today is there tomorrow: a database that is locked, on a full
disk, or of a newer program costs nothing but the delay, and a damaged one is put aside.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import itertools
import json
import logging
import os
import sqlite3
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from qubes_itests.report.result_file import (
    HistoryError,
    Log,
    Run,
    read_runs,
    write_run,
)
from qubes_itests.report.results import TestResult

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["History", "TestHistory", "times_in"]

log = logging.getLogger("qubes_itests.history")

_VERSION = 1
_SCHEMA = """
CREATE TABLE runs (id TEXT PRIMARY KEY, suite TEXT NOT NULL, machine TEXT NOT NULL,
    started REAL NOT NULL, duration REAL, outcome TEXT NOT NULL);
CREATE TABLE tests (id INTEGER PRIMARY KEY, suite TEXT NOT NULL, name TEXT NOT NULL,
    UNIQUE (suite, name));
CREATE TABLE results (test INTEGER NOT NULL REFERENCES tests,
    run TEXT NOT NULL REFERENCES runs ON DELETE CASCADE,
    outcome TEXT NOT NULL, duration REAL NOT NULL, started REAL NOT NULL,
    attempts INTEGER NOT NULL, failed INTEGER NOT NULL, cause TEXT NOT NULL,
    place TEXT NOT NULL, worker TEXT NOT NULL, phases TEXT NOT NULL,
    PRIMARY KEY (test, run)) WITHOUT ROWID;
CREATE INDEX results_of_runs ON results (run);
CREATE INDEX runs_by_time ON runs (started);
"""
#: Results that are kept: about 30 MB. Beyond it the oldest runs go.
_MOST_RESULTS = 100_000
#: Files of runs that could not go into the database yet; about 40 MB in all.
_MOST_PENDING = 200
#: Seconds to wait for another process that writes.
_PATIENCE = 10.0
#: Of how many results of a test its usual time is taken.
_RECENT = 10
#: And so many of its outcomes are shown with a run.
_SHOWN = 20
#: Of the outcomes those whose time says how long a test takes.
_TELLING = ("passed", "flaky", "xfailed")


@dataclass(frozen=True, slots=True)
class TestHistory:
    """The results of a test.

    :param suite: see `Run`.
    :param test: its id.
    :param results: the newest last; none was skipped in all runs.
    """

    __test__ = False

    suite: str
    test: str
    results: tuple[TestResult, ...]

    @property
    def counted(self) -> list[TestResult]:
        """The results that say something: the test was not skipped."""
        return [r for r in self.results if r.outcome != "skipped"]

    @property
    def pass_rate(self) -> float | None:
        """The part of all attempts that passed, from 0 to 1; None without any."""
        attempts = sum(r.attempts for r in self.counted)
        failed = sum(r.failed for r in self.counted)
        return (attempts - failed) / attempts if attempts else None

    @property
    def flakiness(self) -> float:
        """How often the outcome was another one than before: from 0 to 1.

        A run in which the test failed and passed counts as such a change.
        """
        counted = self.counted
        pairs = itertools.pairwise(counted)
        flips = sum(new.outcome == "flaky" or old.bad != new.bad for old, new in pairs)
        flips += bool(counted) and counted[0].outcome == "flaky"
        return flips / len(counted) if counted else 0.0

    @property
    def duration(self) -> float | None:
        """Seconds that it takes as a rule: the median."""
        times = [r.duration for r in self.counted]
        return statistics.median(times) if times else None

    @property
    def last_failure(self) -> TestResult | None:
        """The newest result that was not good."""
        return next((r for r in reversed(self.results) if r.bad), None)


class History:
    """The results of all runs.

    :param root: of the cache.
    """

    def __init__(self, root: Path) -> None:
        self._directory = root / "history"
        self._file = self._directory / "results.sqlite"
        self._pending = self._directory / "pending"
        #: What went wrong with the file, for people.
        self.problems: list[str] = []

    def begin(self, run: Run) -> Log:
        """Begin with the results of a run.

        :raise OSError: nothing can be written there.
        """
        return Log(self._pending / f"{run.id}.jsonl", run)

    def collect(self) -> None:
        """Put the results of runs that have ended into the database. Blocking.

        What cannot be put there stays for the next time, and is told in `problems`.
        """
        paths = sorted(self._pending.glob("*.jsonl"), key=_age)
        for path in paths[:-_MOST_PENDING]:
            path.unlink(missing_ok=True)
        for path in paths[-_MOST_PENDING:]:
            with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue  # its run goes on
                try:
                    # one that was killed before its first word has an empty file
                    empty = not os.fstat(file.fileno()).st_size
                    runs = [] if empty else list(read_runs(file, path.name))
                except HistoryError as error:
                    aside = path.replace(self._directory / "unreadable.jsonl")
                    self._note(f"a run is not kept, but as {aside}: {error}")
                    continue
                try:
                    self.add(runs)
                except (OSError, sqlite3.Error, HistoryError) as error:
                    self._note(f"results wait in {path}, which cannot be kept: {error}")
                else:
                    path.unlink(missing_ok=True)

    def add(self, runs: Iterable[tuple[Run, list[TestResult]]]) -> int:
        """Add runs that are not there yet, all or none, and return how many it were.

        :raise sqlite3.Error: the database cannot be written.
        :raise HistoryError: a newer program has written it.
        """
        new = 0
        with self._connected() as database, database:
            database.execute("BEGIN IMMEDIATE")
            for run, results in runs:
                row = (run.id, run.suite, run.machine, run.started)
                done = database.execute(
                    "INSERT OR IGNORE INTO runs VALUES (?, ?, ?, ?, ?, ?)",
                    (*row, run.duration, run.outcome),
                )
                if done.rowcount:
                    new += 1
                    _insert(database, run, results)
            _shrink(database)
        return new

    def times(self, suite: str) -> dict[str, float]:
        """Return the seconds that tests of a suite took as a rule.

        Of a suite that is new here those of others: it may be a clone of one of them.

        :return: by id; empty where the history cannot be read, which is in `problems`.
        """
        if not self._file.exists():
            return {}
        recent: dict[str, list[float]] = {}
        try:
            with self._connected() as database:
                for own in (True, False):
                    for name, seconds in database.execute(
                        "SELECT name, duration FROM (SELECT name, duration,"
                        " row_number() OVER (PARTITION BY test"
                        " ORDER BY results.started DESC) AS nth"
                        " FROM results JOIN tests ON tests.id = test"
                        " WHERE (suite = ?) = ? AND outcome IN (?, ?, ?))"
                        " WHERE nth <= ?",
                        (suite, own, *_TELLING, _RECENT),
                    ):
                        recent.setdefault(name, []).append(seconds)
                    if recent:
                        break
        except (sqlite3.Error, HistoryError) as error:
            self._note(f"the times of earlier runs cannot be read: {error}")
        return {name: statistics.median(times) for name, times in recent.items()}

    def recent(self, suite: str, but: str) -> dict[str, list[str]]:
        """Return what the last runs of the tests of a suite came to.

        :param but: the id of a run that is not meant.
        :return: outcomes by id, at most 20, the newest last; empty where the history
            cannot be read, which is in `problems`.
        """
        if not self._file.exists():
            return {}
        recent: dict[str, list[str]] = {}
        try:
            with self._connected() as database:
                for name, outcome in database.execute(
                    "SELECT name, outcome FROM (SELECT name, outcome, started,"
                    " row_number() OVER (PARTITION BY test ORDER BY started DESC)"
                    " AS nth FROM results JOIN tests ON tests.id = test"
                    " WHERE suite = ? AND run != ?) WHERE nth <= ? ORDER BY started",
                    (suite, but, _SHOWN),
                ):
                    recent.setdefault(name, []).append(outcome)
        except (sqlite3.Error, HistoryError) as error:
            self._note(f"the results of earlier runs cannot be read: {error}")
        return recent

    def tests(self, beginning: str = "") -> list[TestHistory]:
        """Return the histories of tests, by suite and id.

        :param beginning: of their ids.
        :raise sqlite3.Error: the database cannot be read.
        :raise HistoryError: a newer program has written it.
        """
        if not self._file.exists():
            return []
        found: dict[tuple[str, str], list[TestResult]] = {}
        with self._connected() as database:
            for suite, name, *values in database.execute(
                "SELECT suite, name, outcome, duration, started, attempts, failed,"
                " cause, place, worker, phases"
                " FROM results JOIN tests ON tests.id = test"
                " WHERE substr(name, 1, ?) = ? ORDER BY suite, name, started",
                (len(beginning), beginning),
            ):
                found.setdefault((suite, name), []).append(_result(name, values))
        return [TestHistory(*key, tuple(rows)) for key, rows in found.items()]

    def runs(self) -> Iterator[tuple[Run, list[TestResult]]]:
        """Yield all runs with their results, the oldest first.

        :raise sqlite3.Error: the database cannot be read.
        :raise HistoryError: a newer program has written it.
        """
        if not self._file.exists():
            return
        with self._connected() as database:
            for row in database.execute(
                "SELECT id, suite, machine, started, duration, outcome FROM runs"
                " ORDER BY started"
            ).fetchall():
                run = Run(**dict(zip(_names(Run), row, strict=True)))
                results = database.execute(
                    "SELECT name, outcome, duration, results.started, attempts, failed,"
                    " cause, place, worker, phases FROM results"
                    " JOIN tests ON tests.id = test WHERE run = ?"
                    " ORDER BY results.started",
                    (run.id,),
                )
                yield run, [_result(name, values) for name, *values in results]

    def write(self, file: IO[bytes]) -> int:
        """Write all runs for `read_runs` elsewhere, and return how many they are."""
        number = 0
        for run, results in self.runs():
            number += 1
            write_run(file, run, results)
        return number

    @contextlib.contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            database = self._open()
        except sqlite3.DatabaseError as error:
            if not _is_damage(error):
                raise
            self._put_aside()
            database = self._open()
        with contextlib.closing(database):
            try:
                yield database
            except sqlite3.DatabaseError as error:
                if _is_damage(error):
                    self._put_aside()
                raise

    def _open(self) -> sqlite3.Connection:
        database = sqlite3.connect(self._file, timeout=_PATIENCE, isolation_level=None)
        try:
            database.execute("PRAGMA foreign_keys = ON")
            (version,) = database.execute("PRAGMA user_version").fetchone()
            if version == 0:
                with database:
                    # another process may be doing the same
                    database.execute("BEGIN IMMEDIATE")
                    if database.execute("PRAGMA user_version").fetchone() == (0,):
                        for statement in _SCHEMA.split(";"):
                            database.execute(statement)
                        database.execute(f"PRAGMA user_version = {_VERSION}")
            elif version > _VERSION:
                raise HistoryError(  # noqa: TRY301 - it closes as others do
                    f"{self._file} is of a newer program (format {version}, expected"
                    f" {_VERSION}): it is left alone"
                )
        except BaseException:
            database.close()
            raise
        return database

    def _put_aside(self) -> None:
        with (self._directory / ".lock").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            # another process may have done it, and the file may be whole
            try:
                with contextlib.closing(self._open()) as database:
                    if database.execute("PRAGMA quick_check(1)").fetchone() == ("ok",):
                        return
            except sqlite3.DatabaseError as error:
                if not _is_damage(error):
                    raise
            aside = self._file.with_name("damaged.sqlite")
            self._note(f"the history was damaged and is now {aside}; a new one begins")
            for end in ("", "-journal"):
                with contextlib.suppress(FileNotFoundError):
                    Path(f"{self._file}{end}").replace(f"{aside}{end}")

    def _note(self, problem: str) -> None:
        log.warning("%s", problem)
        self.problems.append(problem)


def times_in(
    runs: Iterable[tuple[Run, list[TestResult]]], suite: str
) -> dict[str, float]:
    """Return the seconds that tests of a suite took as a rule, by id."""
    found: dict[str, list[float]] = {}
    for run, results in sorted(runs, key=lambda pair: pair[0].started):
        for result in results if run.suite == suite else ():
            if result.outcome in _TELLING:
                found.setdefault(result.test, []).append(result.duration)
    return {test: statistics.median(t[-_RECENT:]) for test, t in found.items()}


def _names(cls: type[Run]) -> list[str]:
    return [field.name for field in dataclasses.fields(cls)]


def _insert(
    database: sqlite3.Connection, run: Run, results: Iterable[TestResult]
) -> None:
    for result in results:
        key = (run.suite, result.test)
        database.execute("INSERT OR IGNORE INTO tests (suite, name) VALUES (?, ?)", key)
        values = (result.outcome, result.duration, result.started, result.attempts)
        more = (result.failed, result.cause, result.where, result.worker)
        # of one that ran more than once, as with a plugin that repeats it, the last
        database.execute(
            "INSERT OR REPLACE INTO results SELECT id, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?"
            " FROM tests WHERE suite = ? AND name = ?",
            (run.id, *values, *more, json.dumps(dict(result.phases)), *key),
        )


def _shrink(database: sqlite3.Connection) -> None:
    (number,) = database.execute("SELECT count(*) FROM results").fetchone()
    if number <= _MOST_RESULTS:
        return
    # the newest runs that have so many together; and the newest in any case
    database.execute(
        "DELETE FROM runs WHERE id IN (SELECT id FROM (SELECT runs.id AS id,"
        " row_number() OVER (ORDER BY runs.started DESC) AS nth,"
        " sum(count(results.run)) OVER (ORDER BY runs.started DESC) AS total"
        " FROM runs LEFT JOIN results ON results.run = runs.id GROUP BY runs.id)"
        " WHERE total > ? AND nth > 1)",
        (_MOST_RESULTS,),
    )
    database.execute(
        "DELETE FROM tests WHERE NOT EXISTS"
        " (SELECT 1 FROM results WHERE results.test = tests.id)"
    )


def _result(name: str, values: list[object]) -> TestResult:
    fields = ("outcome", "duration", "started", "attempts", "failed", "cause", "where")
    row = dict(zip((*fields, "worker", "phases"), values, strict=True))
    return TestResult(test=name, **row | {"phases": json.loads(str(row["phases"]))})  # type: ignore[arg-type]


def _age(path: Path) -> float:
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_mtime
    return 0.0


def _is_damage(error: sqlite3.Error) -> bool:
    code = getattr(error, "sqlite_errorcode", None)
    return code is not None and code & 0xFF in (
        sqlite3.SQLITE_CORRUPT,
        sqlite3.SQLITE_NOTADB,
    )
