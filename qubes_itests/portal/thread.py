"""The portal: the thread that runs the event loop, and the way into it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, TypeVar

from qubes_itests.exc import DeadlineError

from .loop import PortalLoop

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

__all__ = ["BackgroundFailure", "Portal"]

_T = TypeVar("_T")

#: Seconds for the thread to start, and for cancelled tasks to end.
_START_TIMEOUT = 10.0
_STOP_TIMEOUT = 10.0


@dataclass(frozen=True, slots=True)
class BackgroundFailure:
    """An error of a task or callback that nobody waited for.

    :param message: asyncio's sentence.
    :param exception: what was raised, if anything was.
    """

    message: str
    exception: BaseException | None

    def __str__(self) -> str:
        if self.exception is None:
            return self.message
        return f"{self.message}: {self.exception!r}"


class Portal:
    """An event loop in a separate thread; a context manager.

    :param name: of the thread.
    """

    def __init__(self, name: str = "itests event loop") -> None:
        self.loop = PortalLoop()
        self._ready = threading.Event()
        # A daemon: a callback that blocks for ever must not keep the process from
        # ending.
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)

    @property
    def facade(self) -> asyncio.AbstractEventLoop:
        """The loop as synchronous code may use it: see :class:`.loop.PortalLoop`."""
        return self.loop

    def __enter__(self) -> Self:
        self._thread.start()
        if not self._ready.wait(_START_TIMEOUT):
            raise DeadlineError("event loop in its thread", _START_TIMEOUT)
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def run(self, coro: Awaitable[_T], timeout: float | None = None) -> _T:
        """Run a coroutine in the loop and return its result, or raise its error.

        An interrupt (Ctrl-C) while waiting cancels the coroutine.

        :param timeout: seconds after which it is cancelled; None for no limit.
        :raise DeadlineError: when it was not done in time.
        :raise PortalError: on the loop's own thread, or outside the context.
        """
        return self.loop.wait_for(coro, timeout, "portal.run()")

    def call(self, function: Callable[[], _T]) -> _T:
        """Call a function in the loop's thread and return what it returns."""
        return self.loop.hand_over(function, "portal.call()")

    def take_failures(self) -> list[BackgroundFailure]:
        """Return the failures recorded since the last call, and forget them."""
        taken: list[dict[str, Any]]
        taken, self.loop.failures = self.loop.failures, []
        return [
            BackgroundFailure(
                context.get("message", "an error in the event loop"),
                context.get("exception"),
            )
            for context in taken
        ]

    @contextlib.contextmanager
    def as_current_loop(self) -> Iterator[asyncio.AbstractEventLoop]:
        """Make `asyncio.get_event_loop()` of this thread return the facade."""
        asyncio.set_event_loop(self.facade)
        try:
            yield self.facade
        finally:
            asyncio.set_event_loop(None)

    def close(self) -> None:
        """Cancel what runs, stop the loop and end its thread; idempotent.

        :raise DeadlineError: when the thread does not end, which is a blocked loop.
        """
        if self._thread.is_alive():
            with contextlib.suppress(RuntimeError):  # it has just ended by itself
                self.loop.call_soon_threadsafe(self._stop_when_idle)
            self._thread.join(2 * _STOP_TIMEOUT)
        if self._thread.is_alive():
            raise DeadlineError("end of the event loop's thread", 2 * _STOP_TIMEOUT)
        self.loop.close()

    def _main(self) -> None:
        # Before the first callback and until after the last: by this each call decides
        # whether it is in the loop's thread, has to be handed over, or is refused, as
        # nothing would ever answer it.
        self.loop.thread_id = threading.get_ident()
        asyncio.set_event_loop(self.loop)
        self.loop.call_soon(self._ready.set)
        try:
            self.loop.run_forever()
        finally:
            self.loop.thread_id = None
            asyncio.set_event_loop(None)

    def _stop_when_idle(self) -> None:
        # What other threads hold back comes first, so that its tasks are there to be
        # cancelled: asyncio complains of those that are destroyed while they wait.
        self.loop.release()
        task = self.loop.create_task(self._cancel_all())
        task.add_done_callback(lambda _: self.loop.stop())

    async def _cancel_all(self) -> None:
        tasks = self.loop.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        if tasks:
            # `wait` and not `gather`: one that ignores its cancellation is given up,
            # and what the others raise is nobody's any more
            await asyncio.wait(tasks, timeout=_STOP_TIMEOUT)
        # generators and threads last, for the tasks' clean-ups may use them
        await self.loop.shutdown_asyncgens()
        await self.loop.shutdown_default_executor()
