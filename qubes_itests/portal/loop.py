"""An event loop that runs in one thread and may be used from all.

In its own thread it is a plain selector loop.  In any other it looks like a loop that
stands still and runs for as long as `run_until_complete` lasts, which is what
synchronous test code expects: what such a thread schedules with `call_soon`, the first
step of its tasks included, is held back until that thread waits.  (Were it begun at
once, `asyncio.gather` would lose results that come before it has finished its set-up.)
One object serves both sides, so a future made in a test's thread can be awaited by a
coroutine, and the other way round.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import functools
import inspect
import threading
import weakref
from asyncio import Handle, isfuture  # by their names here: see `waiting`
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar

from qubes_itests.timeline import called_here

from .exc import PortalError
from .waiting import wait_in_thread

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

__all__ = ["PortalLoop"]

_T = TypeVar("_T")

_OWN_THREAD: Final = (
    "was called on the event loop's own thread, where waiting for it would stop the"
    " loop for ever; await the coroutine instead, or call from another thread"
    " (asyncio.to_thread)"
)
_CLOSED: Final = (
    "was called while the portal's event loop does not run; use it inside"
    " `with Portal()`"
)
_SHARED: Final = (
    "cannot work here: the event loop runs in another thread and is shared with"
    " the virtual machines;"
)

_in_background: Final = contextvars.ContextVar("in_background", default=False)

#: Seconds that a call handed over to the loop's thread may take; it only schedules.
_HANDOVER_TIMEOUT = 60.0


class PortalLoop(asyncio.SelectorEventLoop):
    """The loop of a :class:`Portal`; see the module's text.

    `thread_id` is the thread that runs it, None while none does.
    """

    # of the class too: asyncio asks before our constructor comes to it
    thread_id: int | None = None

    def __init__(self) -> None:
        super().__init__()
        # By thread. Without a lock: a thread adds to its own list only, and the loop's
        # thread takes a list away while the one that filled it waits in `hand_over`.
        self._held: dict[int, list[Callable[[], object]]] = {}
        self._made_elsewhere: set[asyncio.Task[Any]] = set()
        #: The tasks that `in_background` made, and those that they made.
        self.background: weakref.WeakSet[asyncio.Task[Any]] = weakref.WeakSet()
        self.failures: list[dict[str, Any]] = []

    # -- what thread am I in -------------------------------------------------

    def in_own_thread(self) -> bool:
        """Return whether the caller's thread is the one that runs the loop."""
        return self.thread_id == threading.get_ident()

    def is_running(self) -> bool:
        """Return False in any other thread, whose code can only see it stand still."""
        # Test code and asyncio's helpers refuse to wait when a loop "is running", and
        # mean: in this thread.
        return self.in_own_thread() and super().is_running()

    def _foreign(self) -> bool:
        return self.thread_id is not None and not self.in_own_thread()

    def hand_over(self, function: Callable[[], _T], call: str) -> _T:
        """Call `function` in the loop's thread and return what it returns.

        :param call: what the caller of this called, for errors.
        :raise PortalError: when the loop does not run.
        """
        if self.in_own_thread():
            return function()
        if self.thread_id is None:
            raise PortalError(call, _CLOSED)
        # Not `call_soon`, which would hold it back until this thread waits: it does
        # that here, in a way the loop knows nothing of.
        outcome: concurrent.futures.Future[_T] = concurrent.futures.Future()
        super().call_soon_threadsafe(_settle, outcome, function)
        return outcome.result(_HANDOVER_TIMEOUT)

    # -- running -------------------------------------------------------------

    def run_until_complete(self, future: Awaitable[_T]) -> _T:  # type: ignore[override]
        """Let the loop's thread finish `future`; return its result, or raise its error.

        :raise PortalError: in the loop's own thread.
        :raise TypeError: for what cannot be awaited.
        :raise ValueError: for a future of another loop.
        """
        return self.wait_for(future, None, "loop.run_until_complete()")

    def wait_for(
        self, awaitable: Awaitable[_T], timeout: float | None, call: str
    ) -> _T:
        """As `run_until_complete`, within `timeout` seconds (None: no limit)."""
        if not inspect.isawaitable(awaitable):
            raise TypeError(f"{call} needs a coroutine or a future, not {awaitable!r}")
        if self.in_own_thread():
            _dispose(awaitable)
            raise PortalError(call, _OWN_THREAD)
        if self.thread_id is None:
            _dispose(awaitable)
            raise PortalError(call, _CLOSED)
        if isfuture(awaitable) and awaitable.get_loop() is not self:
            raise ValueError(f"{awaitable!r} belongs to another event loop")
        return wait_in_thread(self, awaitable, timeout)

    def run_forever(self) -> None:
        """Run in the portal's thread; refused in any other."""
        if self._foreign():
            self._refuse("loop.run_forever()", "wait with run_until_complete()")
        super().run_forever()

    def stop(self) -> None:
        """Stop, when the portal does it; refused in any other thread."""
        if self._foreign():
            self._refuse("loop.stop()", "leave the portal's context instead")
        super().stop()

    def close(self) -> None:
        """Close, once the portal has stopped it; refused before."""
        if self.thread_id is not None:
            self._refuse("loop.close()", "leave the portal's context instead")
        super().close()

    def _refuse(self, call: str, advice: str) -> NoReturn:
        raise PortalError(call, f"{_SHARED} {advice}")

    # -- scheduling ----------------------------------------------------------

    def create_task(  # type: ignore[override]
        self, coro: Coroutine[Any, Any, _T], **options: Any
    ) -> asyncio.Task[_T]:
        """Make a task; in another thread, one that begins when that thread waits."""
        if not self._foreign():
            task: asyncio.Task[_T] = super().create_task(coro, **options)
            if _in_background.get():
                self.background.add(task)
            return task
        with called_here():
            task = super().create_task(coro, **options)
        # Python 3.14 lists tasks by the thread that made them, and shows a running
        # loop only its own: `asyncio.all_tasks` would miss these.
        self._made_elsewhere.add(task)
        task.add_done_callback(self._made_elsewhere.discard)
        return task

    def in_background(self, coro: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Make a task that goes on beside all tests; in the loop's thread."""
        context = contextvars.copy_context()
        context.run(_in_background.set, True)
        return context.run(self.create_task, coro)

    def all_tasks(self) -> set[asyncio.Task[Any]]:
        """Return the tasks that are not done, whichever threads have made them."""
        elsewhere = tuple(self._made_elsewhere)
        return asyncio.all_tasks(self) | {task for task in elsewhere if not task.done()}

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: Any = None
    ) -> Handle:
        """Schedule a callback; in another thread, for when that thread waits."""
        if not self._foreign():
            return super().call_soon(callback, *args, context=context)
        handle = Handle(callback, args, self, context)
        schedule = functools.partial(
            super().call_soon,
            _unless_cancelled,
            handle,
            callback,
            *args,
            context=context,
        )
        self._held.setdefault(threading.get_ident(), []).append(schedule)
        return handle

    def release(self, *threads: int) -> None:
        """Let go what these threads, or all, have scheduled; in the loop's thread."""
        for thread in threads or tuple(self._held):
            for schedule in self._held.pop(thread, ()):
                schedule()

    def call_at(  # type: ignore[override]
        self,
        when: float,
        callback: Callable[..., object],
        *args: Any,
        context: Any = None,
    ) -> asyncio.TimerHandle:
        """Schedule a callback at `when` of the loop's clock, from any thread."""
        schedule = super().call_at
        if not self._foreign():
            return schedule(when, callback, *args, context=context)
        return self.hand_over(
            lambda: schedule(when, callback, *args, context=context), "loop.call_at()"
        )

    def run_in_executor(  # type: ignore[override]
        self,
        executor: concurrent.futures.Executor | None,
        func: Callable[..., _T],
        *args: Any,
    ) -> asyncio.Future[_T]:
        """Start `func` in a thread of the pool, from any thread."""
        start = super().run_in_executor
        return self.hand_over(
            lambda: start(executor, func, *args), "loop.run_in_executor()"
        )

    def add_signal_handler(  # type: ignore[override]
        self, sig: int, callback: Callable[..., object], *args: Any
    ) -> None:
        """Refuse: signals are for the main thread, which the loop is not in."""
        del sig, callback, args
        self._refuse("loop.add_signal_handler()", "use signal.signal()")

    # -- failures ------------------------------------------------------------

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Record the failure of a callback or of a task that nobody waits for."""
        self.failures.append(context)
        super().call_exception_handler(context)


def _unless_cancelled(
    handle: Handle, callback: Callable[..., object], *args: object
) -> None:
    if not handle.cancelled():
        callback(*args)


def _settle(outcome: concurrent.futures.Future[_T], function: Callable[[], _T]) -> None:
    try:
        outcome.set_result(function())
    except BaseException as error:  # noqa: BLE001 - it is raised in the other thread
        outcome.set_exception(error)


def _dispose(awaitable: object) -> None:
    """Close a refused coroutine, lest it complains later that nobody awaited it."""
    if inspect.iscoroutine(awaitable):
        awaitable.close()
