"""A prompt of pytest's debugger at a failure: alone on the terminal, all still there.

With ``--pdb`` pytest puts `tearDown` off until the prompt is left, so that one finds
what the test had.  unittest's clean-ups belong behind `tearDown`, and one finds little
after them; pytest has them where they were.
"""

from __future__ import annotations

import contextlib
import unittest
from typing import TYPE_CHECKING, Any

import pytest

from qubes_itests.pytest_plugin.tracebacks import hide_below_tests

if TYPE_CHECKING:
    from collections.abc import Generator

    from qubes_itests.report.progress import Progress

__all__ = ["FailurePrompt"]


class FailurePrompt:
    """A pytest plugin for runs with ``--pdb``."""

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, Any, Any]:
        """Have the clean-ups wait for `tearDown`."""
        case = getattr(item, "instance", None)
        # The clean-ups of an asynchronous one need its loop, which ends with its run.
        if isinstance(case, unittest.TestCase) and not isinstance(
            case, unittest.IsolatedAsyncioTestCase
        ):
            _postpone(case)
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_exception_interact(
        self, node: pytest.Collector | pytest.Item, call: pytest.CallInfo[Any]
    ) -> Generator[None, Any, Any]:
        """Have the prompt at the test's own line, and the terminal for it alone."""
        assert call.excinfo is not None  # noqa: S101 - else this hook is not called
        hide_below_tests(call.excinfo.value)
        plugins = node.config.pluginmanager
        progress: Progress | None = plugins.get_plugin("qubes_itests-progress")
        # from here on: the traceback comes before the prompt is told of
        with progress.silent() if progress else contextlib.nullcontext():
            return (yield)


def _postpone(case: unittest.TestCase) -> None:
    # As attributes of the instance: pytest, too, replaces its `tearDown`, and calls at
    # last what it found there.
    set_up, tear_down = case.setUp, case.tearDown
    is_set_up = False

    def noted_set_up() -> None:
        nonlocal is_set_up
        set_up()
        is_set_up = True

    def delayed_tear_down() -> None:
        try:
            # pytest does not ask, but unittest leaves it out where `setUp` failed
            if is_set_up:
                tear_down()
        finally:
            _clean_up(case)

    case.setUp = noted_set_up  # type: ignore[method-assign]
    case.tearDown = delayed_tear_down  # type: ignore[method-assign]
    case.doCleanups = lambda: None  # type: ignore[method-assign]


def _clean_up(case: unittest.TestCase) -> None:
    # All of them, whatever fails. In a loop that forgets each before the next, which
    # looks for what still holds VMs. `doCleanups` itself keeps errors for a result, of
    # which there is none any more.
    errors: list[BaseException] = []
    cleanups = case._cleanups  # type: ignore[attr-defined]  # noqa: SLF001
    while cleanups:
        function, arguments, options = cleanups.pop()
        try:
            function(*arguments, **options)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001 - those of pytest.fail and others
            errors.append(error)
    if len(errors) > 1:
        raise BaseExceptionGroup("errors in clean-ups", errors)
    if errors:
        raise errors[0]
