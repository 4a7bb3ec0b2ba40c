"""How long the parts of a test took."""

from __future__ import annotations

import itertools
import time
import unittest
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["TimedTestCase"]

_PHASES: Final = ("setUp", "test", "tearDown")


class TimedTestCase(unittest.TestCase):
    """A test that knows how long its parts took."""

    #: Seconds of ``setUp``, the test, and ``tearDown`` with the clean-ups; empty if the
    #: test did not come to its second part.
    phases: Mapping[str, float] = MappingProxyType({})

    def run(
        self, result: unittest.TestResult | None = None
    ) -> unittest.TestResult | None:
        """Run the test."""
        self._times = [time.monotonic()]
        try:
            return super().run(result)
        finally:
            self._times.append(time.monotonic())
            if len(self._times) > len(_PHASES):
                spans = (
                    after - before for before, after in itertools.pairwise(self._times)
                )
                self.phases = dict(zip(_PHASES, spans, strict=True))

    def _callTestMethod(self, method: Callable[[], object]) -> None:  # noqa: N802
        # unittest calls it for the test alone; its stubs do not say so
        self._times.append(time.monotonic())
        try:
            super()._callTestMethod(method)  # type: ignore[misc]
        finally:
            self._times.append(time.monotonic())
