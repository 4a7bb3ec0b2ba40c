"""The deadline of each test: it fails, shows where it hangs, and the run goes on."""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import math
import os
import signal
import sys
import threading
import time
import traceback
from typing import TYPE_CHECKING, Any

import pytest

from qubes_itests import timeline
from qubes_itests.exit_codes import ExitCode
from qubes_itests.host.sandbox import last_words
from qubes_itests.program import NAME
from qubes_itests.timeline import line_of
from qubes_itests.timeline.words import waited_for

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator
    from types import FrameType

__all__ = ["Deadline", "stacks"]

#: Seconds for a signal to reach Python code before the process counts as stuck.
_GRACE = 30.0
#: Seconds at least until a deadline that was put off is looked at again.
_LOOK_AGAIN = 0.5
#: Threads that have nothing to do with what hangs.
_OURS = ("deadline", "heartbeat")
#: Functions in which threads wait for work: executors, loops, console readers.
_IDLE = ("_worker", "select", "_run_once", "poll", "_collect")


class Deadline:
    """A pytest plugin that limits the time of every test.

    Set-up and test share one limit; the tear-down has its own, so that a test
    that hung is still cleaned up.

    :param limit: returns the limit of a test, in seconds; 0 for none.
    :param expired: is called with a test whose time is over, before it fails.
    """

    def __init__(
        self,
        limit: Callable[[pytest.Item], float],
        expired: Callable[[str], None],
    ) -> None:
        self._limit = limit
        self._seconds = 0.0
        self._expired = expired
        self._test = ""
        self._end = 0.0
        # One for all tests: to start a thread for each of the three parts of a test
        # took longer than all else that is done about it here.
        self._watcher: threading.Thread | None = None
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._people = 0
        self._stopped_at: float | None = None
        self._stood = 0.0

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Stop the clock while a person looks at a test; in any thread, and nested."""
        with self._lock:
            self._people += 1
            if self._people == 1:
                self._stopped_at = time.monotonic()
        try:
            yield
        finally:
            with self._lock:
                self._people -= 1
                if not self._people and self._stopped_at is not None:
                    # In this order: the signal handler, which may come in between, can
                    # take no lock, and finds a clock that is slow but not fast.
                    self._stood += time.monotonic() - self._stopped_at
                    self._stopped_at = None

    @property
    def is_stopped(self) -> bool:
        """Whether somebody looks."""
        return self._stopped_at is not None

    def _now(self) -> float:
        """Return the seconds of a clock that stands still while somebody looks."""
        stopped_at = self._stopped_at
        now = time.monotonic() if stopped_at is None else stopped_at
        return now - self._stood

    def end_in(self, seconds: float) -> None:
        """Have the time of the test that runs be over in so many seconds."""
        self._end = self._now() + seconds
        signal.setitimer(signal.ITIMER_REAL, seconds)

    def pytest_enter_pdb(self) -> None:
        """Stop the clock for good: somebody goes through the test by hand.

        Their last `continue` may lead to a breakpoint that pytest does not tell of.
        """
        signal.setitimer(signal.ITIMER_REAL, 0)
        self._seconds, self._end = 0.0, math.inf

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Generator[None]:
        """Begin a test's time."""
        self._seconds = self._limit(item)
        self._end = self._now() + self._seconds
        with self._limited(item):
            return (yield)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None]:
        """Go on with it."""
        with self._limited(item):
            return (yield)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None]:
        """Begin the time of the tear-down."""
        self._end = self._now() + self._seconds
        with self._limited(item):
            return (yield)

    @contextlib.contextmanager
    def _limited(self, item: pytest.Item) -> Iterator[None]:
        if not self._seconds:
            yield
            return
        if self._watcher is None:
            self._watcher = threading.Thread(
                target=self._watch, daemon=True, name="deadline"
            )
            self._watcher.start()
        # before the signal can come
        self._test = item.nodeid
        previous = signal.signal(signal.SIGALRM, self._expire)
        signal.setitimer(signal.ITIMER_REAL, max(self._end - self._now(), 0.001))
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)
            self._test = ""

    def pytest_unconfigure(self) -> None:
        """End the thread that watches, if there is one."""
        self._over.set()
        if self._watcher is not None:
            self._watcher.join()

    def _expire(self, _number: int, frame: FrameType | None) -> None:
        __tracebackhide__ = True
        if (left := self._end - self._now()) > 0:  # somebody looks, or has looked
            signal.setitimer(signal.ITIMER_REAL, max(left, _LOOK_AGAIN))
            return
        # A TestCase goes on with its tearDown, which may hang as well.
        self.end_in(self._seconds)
        self._expired(self._test)
        recorder = timeline.current()
        what = waited_for(recorder.open() if recorder else [], line_of(frame))
        pytest.fail(f"no end within {self._seconds:g} s (--timeout): {what}")

    def _watch(self) -> None:
        while not self._over.wait(1.0):
            nodeid = self._test
            if not nodeid or self._now() < self._end + _GRACE:
                continue
            # Nothing can be raised in a thread that never comes back to Python.
            faulthandler.dump_traceback(sys.__stderr__ or 2)
            text = f"\n{NAME}: {nodeid} hangs outside Python; the run ends here\n"
            os.write(2, text.encode())
            last_words("")
            os._exit(ExitCode.INTERNAL_ERROR)


def stacks(loop: asyncio.AbstractEventLoop | None) -> str:
    """Return what the other threads and the tasks of a loop are doing, for people."""
    parts = [
        f"Thread {thread.name}:\n" + "".join(traceback.format_list(stack[-6:]))
        for thread, stack in _other_threads()
        if stack and stack[-1].name not in _IDLE
    ]
    if loop is not None and not loop.is_closed():
        parts += [_describe(task) for task in _tasks(loop)]
    return "\n".join(parts)


def _other_threads() -> list[tuple[threading.Thread, traceback.StackSummary]]:
    frames = sys._current_frames()  # noqa: SLF001 - there is no other way
    me = threading.get_ident()
    return [
        (thread, traceback.extract_stack(frames[thread.ident]))
        for thread in threading.enumerate()
        if thread.ident in frames and thread.ident != me and thread.name not in _OURS
    ]


def _tasks(loop: asyncio.AbstractEventLoop) -> list[asyncio.Task[Any]]:
    with contextlib.suppress(RuntimeError):  # the set changed while it was copied
        return sorted(asyncio.all_tasks(loop), key=lambda task: task.get_name())
    return []


def _describe(task: asyncio.Task[Any]) -> str:
    lines = [f"Task {task.get_name()}:"]
    awaited: Any = task.get_coro()
    while awaited is not None and (frame := getattr(awaited, "cr_frame", None)):
        code = frame.f_code
        lines.append(f"  {code.co_filename}:{frame.f_lineno} in {code.co_qualname}")
        awaited = awaited.cr_await
    return "\n".join(lines) + "\n"
