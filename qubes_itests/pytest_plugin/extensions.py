"""Extensions of plugins: loaded before a plugin's first test, gone after its last."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from qubes_itests.pytest_plugin.collection import PluginNode

if TYPE_CHECKING:
    from collections.abc import Generator

    from qubes_itests.discovery.extensions import PluginExtensions

__all__ = ["ExtensionSwitch"]


class ExtensionSwitch:
    """A pytest plugin: at most one distribution's extensions are there at a time."""

    def __init__(self) -> None:
        self._present: PluginExtensions | None = None

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Generator[None]:
        """Load those of the test's plugin; what they raise is an error of the test."""
        wanted = _of(item)
        if wanted is not self._present:
            self._leave()
            if wanted is not None:
                self._present = wanted
                try:
                    wanted.enter()
                except BaseException:
                    self._leave()  # the next test tries, and fails, again
                    raise
        return (yield)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self, nextitem: pytest.Item | None) -> Generator[None]:
        """Have them go when all of the plugin's tests and fixtures are done."""
        try:
            return (yield)
        finally:
            if nextitem is None or _of(nextitem) is not self._present:
                self._leave()

    def _leave(self) -> None:
        present, self._present = self._present, None
        if present is not None:
            present.leave()


def _of(item: pytest.Item) -> PluginExtensions | None:
    node = item.getparent(PluginNode)
    return None if node is None else node.plugin.extensions
