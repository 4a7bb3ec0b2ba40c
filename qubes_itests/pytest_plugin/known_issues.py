"""Known issues: tests that are known to fail, each with where to read about it.

A file has a line for each: a test's id, or a pattern of ids as the shell has them, and
after it the reference. A test that fails is then expected to; one that passes is told.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import pytest

from qubes_itests.untrusted_text import safe_text

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable
    from pathlib import Path

__all__ = ["KnownIssue", "KnownIssues", "read"]

_REASON = "known issue: "
_MOST_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class KnownIssue:
    """Tests that are known to fail.

    :param pattern: of their ids.
    :param reference: where that is told, as an address or a number.
    :param place: the ``FILE:LINE`` that says so.
    """

    pattern: str
    reference: str
    place: str

    def of(self, test: str) -> bool:
        """Return whether it is about a test."""
        # brackets are part of many ids, and of patterns
        return test == self.pattern or fnmatch.fnmatchcase(test, self.pattern)


def read(path: Path) -> list[KnownIssue]:
    """Return the known issues in a file.

    :raise OSError: it cannot be read.
    :raise ValueError: a line has no reference, or the file is no text.
    """
    if path.stat().st_size > _MOST_BYTES:
        raise ValueError(f"{path}: it has more than {_MOST_BYTES >> 20} MiB")
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        pattern, *reference = line.split(maxsplit=1)
        place = f"{path}:{number}"
        if not reference:
            raise ValueError(
                f"{place}: expected a pattern of tests and a reference, got"
                f" {safe_text(line)!r}"
            )
        found.append(KnownIssue(pattern, safe_text(reference[0].strip()), place))
    return found


class KnownIssues:
    """A pytest plugin that expects tests to fail.

    :param issues: which ones.
    """

    def __init__(self, issues: Iterable[KnownIssue]) -> None:
        self._issues = tuple(issues)
        self._seen: dict[str, str] = {}
        self._passed: dict[str, str] = {}

    @classmethod
    def of_files(cls, paths: Iterable[Path]) -> Self:
        """Return those in files.

        :raise pytest.UsageError: one of them cannot be read.
        """
        try:
            return cls([issue for path in paths for issue in read(path)])
        except OSError as error:
            raise pytest.UsageError(
                f"known issues: {error.filename}: {error.strerror}"
            ) from None
        except ValueError as error:
            raise pytest.UsageError(f"known issues: {error}") from None

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Generator[None, Any, Any]:
        """Have a failure be an expected one, and a pass an unexpected one."""
        report: Any = yield
        issue = next((i for i in self._issues if i.of(item.nodeid)), None)
        if issue is None or hasattr(report, "wasxfail"):
            return report
        if report.failed and report.when != "teardown":
            report.outcome = "skipped"
            report.wasxfail = f"{_REASON}{issue.reference}"
        elif report.passed and report.when == "call":
            report.wasxfail = f"{_REASON}{issue.reference} ({issue.place})"
        return report

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Note what to tell at the end, of workers too."""
        reason = str(vars(report).get("wasxfail", ""))
        if reason.startswith(_REASON):
            found = self._seen if report.skipped else self._passed
            found[report.nodeid] = reason.removeprefix(_REASON)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Show the known issues that were met, and those that seem to be gone."""
        for title, found in (
            ("known issues", self._seen),
            ("passed, though there is a known issue: remove it there", self._passed),
        ):
            if found:
                terminalreporter.section(title)
            for test, reference in found.items():
                terminalreporter.line(f"{test}: {reference}")
