"""Event loop whose time passes only where all tasks wait.

``asyncio.sleep`` and timeouts take no time in it, sockets between tasks of one process
work, and every run of the same program goes the same way.
"""

from __future__ import annotations

import asyncio
import selectors
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Coroutine

__all__ = ["VirtualTimeLoop", "run"]

_T = TypeVar("_T")


class _JumpingSelector(selectors.DefaultSelector):
    """Reports what is ready; instead of waiting it lets virtual time jump."""

    now = 0.0
    #: What runs in real time, in threads or processes: it must not jump meanwhile.
    jobs = 0

    def select(
        self, timeout: float | None = None
    ) -> list[tuple[selectors.SelectorKey, int]]:
        # Sockets first, without waiting: time may jump only when all that was sent in
        # this process has arrived, or the order of events would depend on the machine.
        ready = super().select(0)
        if ready or timeout == 0:
            return ready
        if self.jobs or timeout is None:
            # the end of a job wakes the loop by a socket, as what a process says does
            return super().select(timeout)
        self.now += timeout
        return ready


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """The loop; `time` starts at 0."""

    def __init__(self) -> None:
        self._virtual = _JumpingSelector()
        super().__init__(self._virtual)

    def time(self) -> float:
        """Return virtual seconds."""
        return self._virtual.now

    def stand_still(self) -> None:
        """Have time stand still, until `go_on` has been called as often."""
        self._virtual.jobs += 1

    def go_on(self) -> None:
        """Let time pass again."""
        self._virtual.jobs -= 1

    def run_in_executor(  # type: ignore[override]
        self, executor: Any, func: Any, *args: Any
    ) -> asyncio.Future[Any]:
        """Run a job in a thread; time stands still until it is done."""
        self.stand_still()
        future = super().run_in_executor(executor, func, *args)
        future.add_done_callback(lambda _future: self.go_on())
        return future

    async def shutdown_default_executor(self, _timeout: float | None = None) -> None:
        """Wait for the threads, however long.

        From Python 3.12 on there is a time-out. It would be over at once: the threads
        that are joined then end in real time, and nothing else holds this loop's.
        """
        await super().shutdown_default_executor()


def run(program: Coroutine[Any, Any, _T]) -> _T:
    """Run a coroutine in virtual time, and return its result."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(program)
