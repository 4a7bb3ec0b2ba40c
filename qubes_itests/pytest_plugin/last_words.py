"""What is said of a run whose process a test has ended."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from qubes_itests.host.sandbox import last_words
from qubes_itests.untrusted_text import safe_text

if TYPE_CHECKING:
    from collections.abc import Generator

__all__ = ["LastWords"]


class LastWords:
    """A pytest plugin that says where the run was, in case that its process ends.

    Workers have a controller, which sees that they have crashed, and goes on.
    """

    def __init__(self) -> None:
        # of the session that this one is within: a test may call pytest.main
        self._before = last_words("before the first test: no test ran")

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, Any, Any]:
        """Name the test."""
        test = safe_text(item.nodeid)
        last_words(
            f"in {test}: it ended the process of the run, and no test after it ran"
            " (with -n 1 they do)"
        )
        try:
            return (yield)
        finally:
            last_words(f"after {test}: something ended the process of the run")

    @pytest.hookimpl(tryfirst=True)
    def pytest_unconfigure(self) -> None:
        """Say nothing more: the run has come to its end."""
        last_words(self._before)
