"""``merge``: the results of the machines that have shared a run, as those of one."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING

from qubes_itests.exc import HarnessError
from qubes_itests.exit_codes import ExitCode
from qubes_itests.host.cache import Cache
from qubes_itests.html_report.page import write_report
from qubes_itests.program import COMMAND
from qubes_itests.report import ci, failures
from qubes_itests.report.failures import Failure
from qubes_itests.report.history import History
from qubes_itests.report.merge import merge, problems, read_part
from qubes_itests.report.names import file_name
from qubes_itests.report.result_file import HistoryError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qubes_itests.cli.arguments import Command
    from qubes_itests.report.results import TestResult
    from qubes_itests.run.settings import Settings

__all__ = ["execute"]


def execute(command: Command, settings: Settings) -> int:
    """Put them together, show the failures, and end as the run would have ended."""
    parts = [read_part(Path(word)) for word in command.words]
    wrong = list(problems(parts))
    target = settings.artifacts
    try:
        results = merge(parts, target)
        seconds = max(part.run.duration or 0.0 for part in parts)
        lines = ci.write(results, settings.app, seconds, target, settings.summary)
        write_report(target)
    except OSError as error:
        raise HistoryError(f"{error.filename}: {error.strerror}") from error
    try:
        # each machine's run on its own, as it was
        History(Cache().root).add([(part.run, list(part.results)) for part in parts])
    except (sqlite3.Error, OSError, HarnessError) as error:
        print(f"history: the results are not kept: {error}")
    failures.show([_failure(r, target) for r in results if r.bad], COMMAND, print)
    print(f"\nMerged {len(results)} tests of {len(parts)} machines into {target}.")
    print(*lines, *wrong, sep="\n")
    return _status(results, wrong)


def _failure(result: TestResult, target: Path) -> Failure:
    directory = target / file_name(result.test)
    files = sorted(path.name for path in directory.glob("*"))
    return Failure(
        result.test, result.cause, str(directory) if files else "", tuple(files)
    )


def _status(results: Sequence[TestResult], wrong: Sequence[str]) -> ExitCode:
    if wrong:
        return ExitCode.USAGE_ERROR
    outcomes = {result.outcome for result in results if result.bad}
    if outcomes == {"flaky"}:
        return ExitCode.FLAKY
    return ExitCode.TESTS_FAILED if outcomes else ExitCode.OK
