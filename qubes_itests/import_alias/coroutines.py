"""Results that are there at once, or when they were awaited; as drivers please."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["coro_maybe", "void_coros_maybe"]


async def coro_maybe(value: Any) -> Any:
    """Return what a coroutine returns, and anything else as it is."""
    return await value if asyncio.iscoroutine(value) else value


async def void_coros_maybe(values: Iterable[Any]) -> None:
    """Run the coroutines among some values at once, all of them to their ends.

    :raise Exception: what the first of them raised that did.
    """
    running = [value for value in values if asyncio.iscoroutine(value)]
    for result in await asyncio.gather(*running, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result
