"""``async def`` tests and fixtures that use ours: on the loop of the run.

They become plain functions before other plugins see them: in its mode `auto`,
pytest-asyncio takes all that are asynchronous for its own.
"""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any

import pytest

from qubes_itests.fixtures.session import CONTEXT

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Generator, Iterable

    from qubes_itests.portal import Portal

__all__ = ["pytest_fixture_setup", "pytest_pycollect_makeitem"]

#: With one of them a test has to do with the loop of the run.
_FIXTURES = frozenset(("portal", "testbed", "qubes_app"))
#: Plugins run tests with such a mark on loops of their own.
_OF_OTHERS = ("asyncio", "anyio", "trio")
_END = object()


# the innermost: behind it pytest-asyncio gives a test its mark
@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_pycollect_makeitem(collector: pytest.Collector) -> Generator[None, Any, Any]:
    """Have such a test run there; its thread waits for it, and its deadline holds."""
    made = yield
    for node in made if isinstance(made, list) else [made]:
        if not isinstance(node, pytest.Function):
            continue
        ours = _is_ours(node, node.fixturenames)
        if ours and inspect.iscoroutinefunction(node.obj):
            node.obj = _plain(node.obj, collector.config)
    return made


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_fixture_setup(
    fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest
) -> Generator[None, Any, Any]:
    """Have a fixture of such a test run there, too."""
    function = fixturedef.func
    asynchronous = inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(
        function
    )
    # as of pytest_asyncio.fixture, which is a mark as well
    of_others = getattr(function, "_force_asyncio_fixture", False)
    item = request._pyfuncitem  # noqa: SLF001 - for all scopes; pytest-asyncio does so
    if not asynchronous or of_others or not _is_ours(item, request.fixturenames):
        return (yield)
    if inspect.ismethod(function) and request.instance is not None:
        function = function.__func__.__get__(request.instance)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fixturedef, "func", _plain(function, request.config))
        return (yield)


def _is_ours(item: pytest.Item, fixtures: Iterable[str]) -> bool:
    return not _FIXTURES.isdisjoint(fixtures) and not any(
        item.get_closest_marker(name) for name in _OF_OTHERS
    )


def _plain(function: Callable[..., Any], config: pytest.Config) -> Callable[..., Any]:
    """Return a function without await that has the run's loop call another."""

    def portal() -> Portal:
        return config.stash[CONTEXT].portal

    if not inspect.isasyncgenfunction(function):
        return functools.wraps(function)(
            lambda *words, **named: portal().run(function(*words, **named))
        )

    @functools.wraps(function)
    def generate(*words: Any, **named: Any) -> Generator[Any]:
        values: AsyncGenerator[Any] = function(*words, **named)
        value = portal().run(anext(values, _END))
        if value is not _END:
            yield value
            if portal().run(anext(values, _END)) is _END:
                return
        pytest.fail("expected a fixture that yields once", pytrace=False)

    return generate
