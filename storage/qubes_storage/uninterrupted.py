"""Work brought to its end, even if its caller is cancelled meanwhile."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

__all__ = ["to_its_end"]

log = logging.getLogger(__name__)

_T = TypeVar("_T")


async def to_its_end(
    work: Awaitable[_T], *, undo: Callable[[_T], Awaitable[object]] | None = None
) -> _T:
    """Await something; if that is cancelled, however often, see the end of it first.

    :param work: a coroutine; it runs in a task of its own, which is never cancelled.
    :param undo: called with the result and awaited when the caller was cancelled
        meanwhile: for what is acquired, as nobody else gets to know of it then.
    :return: what it returns.
    :raise asyncio.CancelledError: when the caller was cancelled, after its end.
    """
    working = asyncio.ensure_future(work)
    cancelled = None
    while not working.done():
        try:
            await asyncio.wait([working])
        except asyncio.CancelledError as error:
            # A second one must not get through either: a server that ends cancels
            # those whom a client that hung up has cancelled before.
            cancelled = error
    if cancelled is None:
        return working.result()
    try:
        acquired = not working.cancelled() and working.exception() is None
        if undo is not None and acquired:
            try:
                await to_its_end(undo(working.result()))
            except Exception:
                # the cancelled caller is to learn of that, and of nothing else
                log.exception("what was acquired could not be given back")
        raise cancelled
    finally:
        # its traceback has this frame, and so all that the callers hold
        del cancelled
