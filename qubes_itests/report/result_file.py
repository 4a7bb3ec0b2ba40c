"""Results of runs as JSON: a line for the run, and one for each of its tests.

A run appends to such a file while it goes on, which takes no lock and survives a kill.
It is also how results leave the machine and come to it, so what is read may be
anybody's.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import os
import re
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, Self

from qubes_itests.exc import HarnessError
from qubes_itests.exit_codes import ExitCode
from qubes_itests.report.results import OUTCOMES, TestResult
from qubes_itests.untrusted_text import safe_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path
    from types import TracebackType

__all__ = [
    "HistoryError",
    "Log",
    "Run",
    "read_result",
    "read_run",
    "read_runs",
    "write_run",
]

_FORMAT, _VERSION = "qubes_itests-history", 1
#: Of a file.
_MOST_BYTES = 64 << 20
#: Characters of a test's id, of a cause and of other texts.
_LONGEST = {"test": 1000, "cause": 500, "where": 500, "worker": 50, "outcome": 20}
#: Of seconds, since the epoch until the year 2242, and of counts: what is larger is no
#: time of a calendar, or not even a float.
_LARGEST = 1 << 33
_ID = re.compile(r"[0-9a-f]{32}")


class HistoryError(HarnessError):
    """The history cannot be read or written, or a file has none."""

    exit_code = ExitCode.USAGE_ERROR


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A run of tests.

    :param id: 32 hexadecimal digits, unlike those of any other.
    :param suite: whose ids of tests they are: empty for those of plugins, which
        are the same everywhere; else the name of the directory with the tests.
    :param machine: the name of the host.
    :param started: seconds since the epoch.
    :param duration: seconds; None for one that was killed.
    :param outcome: passed, failed, interrupted, or killed.
    """

    id: str
    suite: str = ""
    machine: str = ""
    started: float = 0.0
    duration: float | None = None
    outcome: str = "killed"


class Log:
    """The file of a run under way. A context manager; leaving it ends the run.

    :param path: of the file, which must not exist.
    :param run: whose results it gets.
    :raise OSError: it cannot be made.
    """

    def __init__(self, path: Path, run: Run) -> None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        while True:
            # Unbuffered: what is written is safe from the death of this process.
            self._file: IO[bytes] = path.open("xb", buffering=0)
            # Held until it is closed: while it is, nobody takes the run for ended.
            fcntl.flock(self._file, fcntl.LOCK_EX)
            # Until then it was an empty file of nobody, which another run may remove.
            if os.fstat(self._file.fileno()).st_nlink:
                break
            self._file.close()
        self._run = run
        self._write({"format": _FORMAT, "version": _VERSION, **_plain(run)})

    def add(self, result: TestResult) -> None:
        """Append the result of a test.

        :raise OSError: it cannot be written.
        """
        self._write(_plain(result))

    def end(self, duration: float, outcome: str) -> None:
        """Tell how the run ended.

        :param duration: seconds.
        :raise OSError: it cannot be written.
        """
        self._write({"duration": duration, "outcome": outcome})

    def close(self) -> None:
        """Let others take the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _write(self, row: object) -> None:
        line = json.dumps(row).encode() + b"\n"
        if self._file.write(line) != len(line):
            # What follows would be part of that line.
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def write_run(file: IO[bytes], run: Run, results: Iterable[TestResult]) -> None:
    """Append a run that has ended, for `read_runs` elsewhere.

    :raise OSError: it cannot be written.
    """
    rows = [{"format": _FORMAT, "version": _VERSION, **_plain(run)}]
    rows += map(_plain, results)
    file.writelines(json.dumps(row).encode() + b"\n" for row in rows)


def read_runs(file: IO[bytes], source: str) -> Iterator[tuple[Run, list[TestResult]]]:
    """Yield the runs in a file that `Log` or `write_run` have made.

    A last line that was cut by a crash is left out. The file may be anybody's: texts
    are bounded and made safe, and what is no result is refused.

    :param file: it, at its beginning.
    :param source: its name, for errors.
    :raise HistoryError: it has no results, or those of a newer program.
    """
    run: Run | None = None
    results: list[TestResult] = []
    size = 0
    # a line may be as long as a file
    lines = iter(lambda: file.readline(_MOST_BYTES + 1 - size), b"")
    for number, line in enumerate(lines, 1):
        size += len(line)
        if size > _MOST_BYTES:
            raise HistoryError(f"{source}: it has more than {_MOST_BYTES >> 20} MiB")
        if not line.endswith(b"\n"):
            break
        try:
            row = json.loads(line)
            match row:
                case {"format": _}:
                    if run:
                        yield run, results
                    run, results = read_run(row, _FORMAT), []
                case {"test": _} if run:
                    results.append(read_result(row))
                case {"outcome": outcome, "duration": seconds} if run:
                    outcome = _text(outcome, _LONGEST["outcome"])
                    run = dataclasses.replace(
                        run, duration=_number(seconds), outcome=outcome
                    )
                case _:
                    raise ValueError(row)  # noqa: TRY301 - as what reads it does
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise HistoryError(
                f"{source}, line {number}: expected results of tests, as"
                f" `history --export` writes them, got {safe_text(line[:60])}"
            ) from error
    if run is None:
        raise HistoryError(f"{source}: it has no results of tests")
    yield run, results


def read_run(row: dict[str, Any], name: str) -> Run:
    """Return a run from a row of JSON.

    :param name: of its format.
    :raise ValueError: it is none; so are KeyError and TypeError.
    """
    if row["format"] != name or row["version"] != _VERSION:
        raise ValueError("it is of another format or version")
    if not isinstance(row["id"], str) or not _ID.fullmatch(row["id"]):
        raise ValueError(row["id"])
    duration = row.get("duration")
    return Run(
        id=row["id"],
        suite=_text(row["suite"], 200),
        machine=_text(row["machine"], 200),
        started=_number(row["started"]),
        duration=None if duration is None else _number(duration),
        outcome=_text(row["outcome"], _LONGEST["outcome"]),
    )


def read_result(row: dict[str, object]) -> TestResult:
    """Return a result from a row of JSON.

    :raise ValueError: it is none; so are KeyError and TypeError.
    """
    texts = {name: _text(row.get(name) or "", most) for name, most in _LONGEST.items()}
    if texts["outcome"] not in OUTCOMES:
        raise ValueError(texts["outcome"])
    attempts, failed = int(_number(row["attempts"])), int(_number(row["failed"]))
    if not 0 <= failed <= attempts < 1 << 31:
        raise ValueError(attempts)
    phases = row.get("phases") or {}
    if not isinstance(phases, dict):
        raise TypeError(phases)
    return TestResult(
        test=texts["test"],
        outcome=texts["outcome"],
        duration=_number(row["duration"]),
        started=_number(row["started"]),
        attempts=attempts,
        failed=failed,
        cause=texts["cause"],
        where=texts["where"],
        worker=texts["worker"],
        phases={_text(k, 50): _number(v) for k, v in list(phases.items())[:20]},
    )


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(value)
    if not 0 <= value <= _LARGEST:
        raise ValueError(value)
    return float(value)


def _text(value: object, most: int) -> str:
    if not isinstance(value, str):
        raise TypeError(value)
    return safe_text(value, limit=most)


def _plain(row: Run | TestResult) -> dict[str, object]:
    return dataclasses.asdict(row)
