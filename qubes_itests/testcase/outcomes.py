"""What a test has reported so far, for its clean-ups."""

from __future__ import annotations

from typing import Any, Final

__all__ = ["Outcomes"]

_BAD: Final = ("addError", "addFailure", "addSkip", "addExpectedFailure")


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
        elif name == "addSubTest":
            return self._add_sub_test
        return getattr(self._result, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("_result", "passed"):
            super().__setattr__(name, value)
        else:
            setattr(self._result, name, value)

    def _add_sub_test(self, test: Any, subtest: Any, error: Any) -> None:
        self.passed = self.passed and error is None
        self._result.addSubTest(test, subtest, error)
