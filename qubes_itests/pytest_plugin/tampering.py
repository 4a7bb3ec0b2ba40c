"""A test that replaces loaded modules fails; the next one finds them as they were."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

from qubes_itests.discovery.modules import ModuleWatch

if TYPE_CHECKING:
    from collections.abc import Generator

__all__ = ["ModuleGuard"]


class ModuleGuard:
    """A pytest plugin that compares `sys.modules` before and after every test."""

    def __init__(self) -> None:
        self._watch = ModuleWatch()

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_setup(self) -> Generator[None]:
        """Remember what is loaded."""
        self._watch = ModuleWatch()
        return (yield)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_call(self) -> Generator[None]:
        """Check; what the test itself did wrong comes first."""
        try:
            return (yield)
        finally:
            self._check(fail=sys.exc_info()[0] is None)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self) -> Generator[None]:
        """Check again: fixtures and class clean-ups can do it too."""
        result = yield
        self._check(fail=True)
        return result

    def _check(self, *, fail: bool) -> None:
        __tracebackhide__ = True
        changed = self._watch.restore()
        if changed and fail:
            pytest.fail(
                "the test replaced or removed modules that others use:"
                f" {', '.join(changed)}; they were put back."
                " unittest.mock.patch.dict(sys.modules) does that within a test",
                pytrace=False,
            )
