"""Waiting in one thread for a coroutine that runs in the loop's thread."""

from __future__ import annotations

import concurrent.futures
import contextlib
import io
import threading

# By their names here: a test may replace those in the module asyncio, and still waits.
from asyncio import CancelledError, Task, ensure_future
from typing import TYPE_CHECKING, Any, TypeVar

from qubes_itests.exc import DeadlineError
from qubes_itests.timeline import called_here

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Awaitable

    from .loop import PortalLoop

__all__ = ["wait_in_thread"]

_T = TypeVar("_T")

#: Seconds that a cancelled coroutine has to clean up before it is given up.
CANCEL_GRACE = 5.0


def wait_in_thread(
    loop: PortalLoop, awaitable: Awaitable[_T], timeout: float | None
) -> _T:
    """Have `loop` finish `awaitable`, which the caller's thread waits for.

    :raise DeadlineError: after `timeout` seconds; it is cancelled then, as it is when
        the waiting is interrupted (Ctrl-C).
    """
    name = _name(awaitable)
    outcome: concurrent.futures.Future[_T] = concurrent.futures.Future()
    started: list[asyncio.Future[_T]] = []
    caller = threading.get_ident()

    # In one call in the loop's thread, and in this order: what the caller has scheduled
    # before runs before what it waits for, as if the loop had run in its own thread.
    def start() -> None:
        loop.release(caller)
        started.append(_start(loop, awaitable, outcome))

    try:
        with called_here():
            loop.hand_over(start, name)
        done, _ = concurrent.futures.wait([outcome], timeout)
    except BaseException:
        _cancel(loop, started, outcome)
        raise
    if not done and timeout is not None:
        evidence = _stack(started[0])
        _cancel(loop, started, outcome)
        raise DeadlineError(f"end of {name}", timeout, evidence)
    return outcome.result()


def _start(
    loop: PortalLoop,
    awaitable: Awaitable[_T],
    outcome: concurrent.futures.Future[_T],
) -> asyncio.Future[_T]:
    future = ensure_future(awaitable, loop=loop)
    future.add_done_callback(lambda future: _copy(future, outcome))
    return future


def _copy(future: asyncio.Future[_T], outcome: concurrent.futures.Future[_T]) -> None:
    # `set_exception` with the error of asyncio, and no `cancel`: that would raise the
    # other CancelledError, of concurrent.futures, which callers do not expect.
    if future.cancelled():
        outcome.set_exception(CancelledError())
    elif error := future.exception():
        outcome.set_exception(error)
    else:
        outcome.set_result(future.result())


def _cancel(
    loop: PortalLoop,
    started: list[asyncio.Future[_T]],
    outcome: concurrent.futures.Future[_T],
) -> None:
    # in the loop's thread, so after `start`, wherever the interrupt came
    loop.call_soon_threadsafe(lambda: [future.cancel() for future in started])
    # Its clean-up is waited for: the caller goes on to take away what that still uses.
    concurrent.futures.wait([outcome], CANCEL_GRACE)
    with contextlib.suppress(concurrent.futures.TimeoutError):
        outcome.exception(0)  # seen: it gives way to what the caller raises


def _stack(future: asyncio.Future[Any]) -> str:
    """Return where a task stands, as far as another thread can tell."""
    if not isinstance(future, Task):
        return repr(future)
    text = io.StringIO()
    with contextlib.suppress(RuntimeError):  # it went on while we looked
        future.print_stack(limit=8, file=text)
    return text.getvalue()


def _name(awaitable: object) -> str:
    coroutine = awaitable
    if isinstance(awaitable, Task):
        coroutine = awaitable.get_coro()
    return str(getattr(coroutine, "__qualname__", None) or repr(awaitable))
