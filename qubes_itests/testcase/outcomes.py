"""Outcome and times of one test, for its clean-ups and for reports."""

from __future__ import annotations

import itertools
import time
import unittest
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from qubes_itests import timeline

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["Outcomes", "TimedTestCase"]

_BAD: Final = ("addError", "addFailure", "addSkip", "addExpectedFailure")
_PHASES: Final = ("setUp", "test", "tearDown")


class Outcomes:
    """A test result that passes everything on, and remembers whether all went well.

    unittest tells a test itself only about the part of it that runs at the moment.

    :param result: a `unittest.TestResult`, or what a runner has instead.
    """

    def __init__(self, result: Any) -> None:
        self._result = result
        self.passed = True

    def __getattr__(self, name: str) -> Any:
        if name in _BAD:
            self.passed = False
        return getattr(self._result, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("_result", "passed"):
            super().__setattr__(name, value)
        else:
            setattr(self._result, name, value)

    def addSubTest(self, test: Any, subtest: Any, error: Any) -> None:
        """Pass on how a part of a test has ended."""
        self.passed = self.passed and error is None
        self._result.addSubTest(test, subtest, error)


class TimedTestCase(unittest.TestCase):
    """A test that knows how long its parts took."""

    #: Seconds of ``setUp``, the test, and ``tearDown`` with the clean-ups; empty if the
    #: test did not come to its second part.
    phases: Mapping[str, float] = MappingProxyType({})
    #: Is called after a test that has passed, before its ``tearDown``, and may fail it.
    check: Callable[[], object] | None = None

    def run(
        self, result: unittest.TestResult | None = None
    ) -> unittest.TestResult | None:
        """Run the test."""
        self._times = [time.monotonic()]
        self._phase = timeline.begin("phase", name=_PHASES[0])
        try:
            return super().run(result)
        finally:
            self._phase.end()
            self._times.append(time.monotonic())
            if len(self._times) > len(_PHASES):
                spans = (
                    after - before for before, after in itertools.pairwise(self._times)
                )
                self.phases = dict(zip(_PHASES, spans, strict=True))

    def _callTestMethod(self, method: Callable[[], object]) -> None:
        # unittest calls it for the test alone; its stubs do not say so
        self._next_phase()
        try:
            super()._callTestMethod(method)  # type: ignore[misc]
            if self.check is not None:
                self.check()
        finally:
            self._next_phase()

    def _next_phase(self) -> None:
        self._phase.end()
        self._phase = timeline.begin("phase", name=_PHASES[len(self._times)])
        self._times.append(time.monotonic())
