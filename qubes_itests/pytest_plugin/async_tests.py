"""``async def`` tests that use our fixtures: on the loop of the run, like the core."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

import pytest

from qubes_itests.fixtures.session import CONTEXT

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["pytest_pyfunc_call"]

#: With one of them a test has to do with the loop of the run.
_FIXTURES = frozenset(("portal", "testbed", "qubes_app"))
#: Plugins run tests with such a mark on loops of their own.
_OF_OTHERS = ("asyncio", "anyio", "trio")


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run such a test; the thread of the tests waits for it, and its deadline holds."""
    function = pyfuncitem.obj
    if not inspect.iscoroutinefunction(function) or _is_of_others(pyfuncitem):
        return None
    if _FIXTURES.isdisjoint(pyfuncitem.fixturenames):
        return None
    names: Iterable[str] = pyfuncitem._fixtureinfo.argnames  # noqa: SLF001 - as pytest's
    arguments = {name: pyfuncitem.funcargs[name] for name in names}
    pyfuncitem.config.stash[CONTEXT].portal.run(function(**arguments))
    return True


def _is_of_others(item: pytest.Item) -> bool:
    return any(item.get_closest_marker(name) for name in _OF_OTHERS)
