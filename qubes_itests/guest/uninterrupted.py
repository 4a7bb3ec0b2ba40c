"""Bring to its end what must not be left half done, whoever gives up meanwhile."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Coroutine

__all__ = ["to_its_end"]

_T = TypeVar("_T")


async def to_its_end(work: Coroutine[object, object, _T]) -> _T:
    """Await a coroutine; if that is cancelled, see the end of it first.

    :return: what it returns.
    :raise asyncio.CancelledError: when the caller was cancelled, after its end.
    """
    working = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(working)
    except asyncio.CancelledError:
        while not working.done():
            await asyncio.wait([working])
        if not working.cancelled():
            working.exception()  # seen, or asyncio would complain that nobody did
        raise
