"""Work of a pool that nobody waits for: removing what was given up, preparing clones.

Jobs run one after another in a thread that ends when there is nothing left to do.  None
is ever needed: a process may die in the middle of one, and the next does it again.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["IDLE", "Background"]

log = logging.getLogger(__name__)

#: Seconds without any operation after which a pool counts as idle.
IDLE = 1.0

Job: TypeAlias = "Callable[[Callable[[], bool]], object]"


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A job, since when it waits, and whether it waits until the pool is idle."""

    job: Job
    since: float
    idle: bool


class Background:
    """The background jobs of one pool.

    A job is called with a function that tells whether to go on; a job that takes long
    asks it now and then, and is held up in it while an operation is under way.

    :param idle: seconds without operations that `when_idle` waits for.
    """

    def __init__(self, idle: float = IDLE) -> None:
        self.idle = idle
        self._changed = threading.Condition()
        self._jobs: dict[str, _Waiting] = {}
        self._thread: threading.Thread | None = None
        self._operations = 0
        self._last_operation = 0.0
        self._settling = 0
        self._closing = False

    @contextlib.contextmanager
    def operation(self) -> Iterator[None]:
        """Hold up the jobs for the duration of an operation."""
        with self._changed:
            self._operations += 1
        try:
            yield
        finally:
            with self._changed:
                self._operations -= 1
                self._last_operation = time.monotonic()
                self._changed.notify_all()

    def soon(self, key: str, job: Job) -> None:
        """Run a job next, instead of one of the same key that still waits."""
        self._add(key, _Waiting(job, time.monotonic(), idle=False))

    def when_idle(self, key: str, job: Job) -> None:
        """Run a job when the pool has been idle for a while."""
        self._add(key, _Waiting(job, time.monotonic(), idle=True))

    def cancel(self, key: str) -> None:
        """Drop a job that still waits."""
        with self._changed:
            self._jobs.pop(key, None)
            self._changed.notify_all()

    def settle(self) -> None:
        """Wait until all jobs are done, idle or not."""
        with self._changed:
            self._settling += 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._is_working())
            self._settling -= 1

    def close(self) -> None:
        """Drop all jobs; wait for the present one to give up."""
        with self._changed:
            self._jobs.clear()
            self._closing = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._is_working())
            self._closing = False

    def _add(self, key: str, waiting: _Waiting) -> None:
        with self._changed:
            if self._closing:
                return
            self._jobs[key] = waiting
            if not self._is_working():
                self._thread = threading.Thread(
                    target=self._work, name="qubes_storage", daemon=True
                )
                self._thread.start()
            self._changed.notify_all()

    def _is_working(self) -> bool:
        # Not alive: this process is a fork of the one that had it.
        return self._thread is not None and self._thread.is_alive()

    def _work(self) -> None:
        while job := self._next():
            try:
                job(self._go_on)
            except Exception as error:  # noqa: BLE001 - the next job may do better
                log.info("left for later: %s", error)

    def _next(self) -> Job | None:
        with self._changed:
            while self._jobs:
                key = min(self._jobs, key=self._due)
                wait = self._due(key) - time.monotonic()
                if wait <= 0 or self._settling:
                    return self._jobs.pop(key).job
                self._changed.wait(None if self._operations else wait)
            self._thread = None
            self._changed.notify_all()
            return None

    def _due(self, key: str) -> float:
        waiting = self._jobs[key]
        if not waiting.idle:
            return waiting.since
        if self._operations:
            return math.inf
        return max(waiting.since, self._last_operation) + self.idle

    def _go_on(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._closing or not self._operations)
            return not self._closing
