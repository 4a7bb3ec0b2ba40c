"""``history``: how tests went in earlier runs, and the results as a file."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import sqlite3
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from qubes_itests.exit_codes import ExitCode
from qubes_itests.host.cache import Cache
from qubes_itests.report.heartbeat import duration
from qubes_itests.report.history import History
from qubes_itests.report.merge import read_results
from qubes_itests.report.result_file import HistoryError
from qubes_itests.whole_file import write_output

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from qubes_itests.cli.arguments import Command
    from qubes_itests.report.history import TestHistory
    from qubes_itests.run.settings import Settings

__all__ = ["execute"]

#: More tests than these are a table, unless they are named.
_IN_FULL = 5
#: Results of a test that are drawn.
_DRAWN = 60
_MARKS = {
    "passed": ".",
    "failed": "F",
    "error": "E",
    "flaky": "~",
    "skipped": "s",
    "xfailed": "x",
    "xpassed": "X",
}
_LEGEND = "  ".join(f"{mark} {outcome}" for outcome, mark in _MARKS.items())


def execute(command: Command, _settings: Settings) -> int:
    """Show it, or write or read results."""
    history = History(Cache().root)
    try:
        history.collect()
        for problem in history.problems:
            print(f"history: {problem}", file=sys.stderr)
        if command.export:
            return _export(history, Path(command.export))
        if command.add:
            return _add(history, command.add)
        return _show(history, command)
    except BrokenPipeError:
        raise  # no fault of the history: the reader of our output has gone
    except (OSError, sqlite3.Error) as error:
        raise HistoryError(f"the history cannot be used: {error}") from error


def _export(history: History, path: Path) -> int:
    data = io.BytesIO()
    number = history.write(data)
    try:
        write_output(path, data.getvalue())
    except OSError as error:
        raise HistoryError(f"{path}: {error.strerror}") from error
    print(f"Wrote {number} runs to {path}.")
    return ExitCode.OK


def _add(history: History, names: Sequence[str]) -> int:
    for name in names:
        new = history.add(read_results(Path(name)))
        print(f"{name}: {new} new runs.")
    return ExitCode.OK


def _show(history: History, command: Command) -> int:
    named = command.words or ("",)
    lists = (history.tests(word) for word in named)
    # whole names first, as for a run: `test_1` shall not show test_10
    chosen = [
        [t for t in tests if t.test == word] or tests
        for word, tests in zip(named, lists, strict=True)
    ]
    found = list({(t.suite, t.test): t for tests in chosen for t in tests}.values())
    if command.json:
        print(json.dumps({"tests": list(map(_row, found))}, indent=2))
    elif not found:
        word = " ".join(command.words)
        what = f"no test whose id begins with {word!r}" if word else "no test"
        print(f"The history has {what}.")
    elif command.words and len(found) <= _IN_FULL:
        print("\n\n".join("\n".join(_details(test)) for test in found))
        print(f"\n{_LEGEND}")
    else:
        print("\n".join(_table(found)))
    return ExitCode.OK if found else ExitCode.NO_TESTS_COLLECTED


def _row(test: TestHistory) -> dict[str, object]:
    return {
        "suite": test.suite,
        "test": test.test,
        "pass_rate": test.pass_rate,
        "flakiness": test.flakiness,
        "duration": test.duration,
        "results": [dataclasses.asdict(result) for result in test.results],
    }


def _table(tests: Sequence[TestHistory]) -> Iterator[str]:
    yield f"{'passed':>7} {'runs':>5} {'flaky':>6} {'takes':>13}  {'last':8} test"
    for suite, members in itertools.groupby(tests, key=lambda test: test.suite):
        if suite:
            yield f"# {suite}"
        for test in members:
            flaky = f"{test.flakiness:.0%}" if test.flakiness else ""
            last = test.results[-1].outcome
            yield (
                f"{_rate(test):>7} {len(test.results):5} {flaky:>6}"
                f" {_takes(test):>13}  {last:8} {test.test}"
            )


def _details(test: TestHistory) -> Iterator[str]:
    results, counted = test.results, test.counted
    yield f"{test.suite}: {test.test}" if test.suite else test.test
    yield f"  passed      {_rate(test)} of {_count(sum(r.attempts for r in counted))}"
    times = sorted(r.duration for r in counted)
    if times:
        spread = f"{duration(times[0])} to {duration(times[-1])}"
        yield f"  takes       {_takes(test)} as a rule, {spread}"
    drawn = "".join(_MARKS[r.outcome] for r in results[-_DRAWN:])
    yield f"  results     {drawn}  (the newest on the right)"
    if test.flakiness:
        mixed = sum(r.outcome == "flaky" for r in counted)
        runs = f"; it failed and passed within {mixed} of them" if mixed else ""
        changes = "of its results differ from the one before"
        yield f"  flaky       {test.flakiness:.0%}: {changes}{runs}"
    else:
        yield "  flaky       never: no result differs from the one before"
    if last := test.last_failure:
        ago = len(results) - 1 - results.index(last)
        run = {0: "in its last run", 1: "1 run ago"}.get(ago, f"{ago} runs ago")
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(last.started))
        yield f"  last failed {when}, {run}: {last.cause}"
        if last.where:
            yield f"              {last.where}"


def _count(attempts: int) -> str:
    return "1 time" if attempts == 1 else f"{attempts} times"


def _rate(test: TestHistory) -> str:
    rate = test.pass_rate
    # 99.9 % is not all
    return "-" if rate is None else f"{int(rate * 100)} %"


def _takes(test: TestHistory) -> str:
    return "-" if test.duration is None else duration(test.duration)
