"""Operations on the volumes of a pool, and jobs that nobody waits for.

An operation blocks, so it has a thread; its order is: the volume's turn (among the
tasks of this event loop), the background held up, the volume's lock (among all threads
and processes), then perhaps the lock of its source.

Jobs in the background remove what was given up and prepare clones, one after another in
a thread that ends when there is nothing left to do.  None is ever needed: a process may
die in the middle of one, and the next does it again.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import logging
import math
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeAlias, TypeVar

from qubes_storage.exc import InvalidSizeError, VolumeError, system_reason
from qubes_storage.locks import LOCK_TIMEOUT, hold
from qubes_storage.uninterrupted import to_its_end

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator
    from pathlib import Path

    from qubes_storage.image_volume import ImageVolume
    from qubes_storage.volume import Volume

__all__ = ["IDLE", "Background", "Operations", "operation", "typed_errors"]

log = logging.getLogger(__name__)

Result = TypeVar("Result")
_ImageVolume = TypeVar("_ImageVolume", bound="ImageVolume")
_Arguments = ParamSpec("_Arguments")


def _unwatched(
    _volume: Volume, _action: str
) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


#: Entered around each operation, called with the volume and a verb. A program that
#: wants to know puts something quick in its place.
watch: Callable[[Volume, str], contextlib.AbstractContextManager[object]] = _unwatched


class Operations:
    """Runs the operations on the volumes of one pool.

    Two operations that touch the same volume never overlap, in this process or in
    another; others do not wait for each other.

    :param directory: the directory of the pool.
    :param background: the pool's other work, which waits for operations.
    :param lock_timeout: seconds that another process may work on a volume.
    """

    def __init__(
        self,
        directory: Path,
        background: Background,
        lock_timeout: float = LOCK_TIMEOUT,
    ) -> None:
        self._directory = directory
        self._background = background
        self.lock_timeout = lock_timeout
        #: Weak: a turn that nobody has or waits for is forgotten.
        self._turns: weakref.WeakValueDictionary[str, asyncio.Lock]
        self._turns = weakref.WeakValueDictionary()

    async def run(
        self, volume: Volume, action: str, function: Callable[[], Result]
    ) -> Result:
        """Run a blocking `function` that works on `volume`.

        Once begun it is brought to its end: a cancellation counts only afterwards.

        :param action: a verb for the error, as in "start".
        :raise VolumeError: as `function` does, or in place of its OSError.
        """
        # The file lock alone would do; this spares threads that only wait.
        turn = self._turns.setdefault(volume.vid, asyncio.Lock())
        with watch(volume, action):
            async with turn:
                # A thread cannot be cancelled, and what follows relies on its work.
                return await to_its_end(self._in_thread(volume, action, function))

    async def _in_thread(
        self, volume: Volume, action: str, function: Callable[[], Result]
    ) -> Result:
        def work() -> Result:
            with self._background.operation(), typed_errors(volume, action):
                # Not made here: it may be on a disk that is not mounted.
                if not self._directory.is_dir():
                    reason = "the pool's directory is absent"
                    raise FileNotFoundError(errno.ENOENT, reason, str(self._directory))
                with hold(self._directory, volume.vid, timeout=self.lock_timeout):
                    return function()

        # The event loop's own threads are few: long operations would delay others.
        executor = ThreadPoolExecutor(1, "qubes_storage_operation")
        try:
            return await asyncio.get_running_loop().run_in_executor(executor, work)
        finally:
            executor.shutdown(wait=False)

    def reading(self, volume: Volume) -> contextlib.AbstractContextManager[None]:
        """Keep others from changing a volume; for as short a time as possible.

        :raise TimeoutError: when somebody works on it and does not come to an end.
        """
        return hold(self._directory, volume.vid, shared=True, timeout=self.lock_timeout)


def operation(
    action: str, *, changes: bool = True
) -> Callable[
    [Callable[Concatenate[_ImageVolume, _Arguments], Result]],
    Callable[Concatenate[_ImageVolume, _Arguments], Coroutine[Any, Any, Result]],
]:
    """Make a coroutine of a method that blocks and needs the volume's lock.

    :param action: a verb for errors, as in "start".
    :param changes: whether it is refused while another process has the volume started,
        or imports into it.
    """

    def decorate(
        method: Callable[Concatenate[_ImageVolume, _Arguments], Result],
    ) -> Callable[Concatenate[_ImageVolume, _Arguments], Coroutine[Any, Any, Result]]:
        @functools.wraps(method)
        async def coroutine(
            volume: _ImageVolume, /, *args: _Arguments.args, **kwargs: _Arguments.kwargs
        ) -> Result:
            def work() -> Result:
                if changes:
                    volume.use.refuse_if_used_elsewhere(action)
                result = method(volume, *args, **kwargs)
                if changes:
                    volume.clean_up()
                return result

            return await volume.pool.operations.run(volume, action, work)

        return coroutine

    return decorate


@contextlib.contextmanager
def typed_errors(volume: Volume, action: str) -> Iterator[None]:
    """Turn an error of the operating system into one of ours, and be its cause."""
    try:
        yield
    except TimeoutError as error:
        reason = "another process works on it and does not come to an end"
        raise VolumeError(volume.pool.name, volume.vid, action, reason) from error
    except OSError as error:
        kind = InvalidSizeError if error.errno == errno.EFBIG else VolumeError
        raise kind(
            volume.pool.name, volume.vid, action, system_reason(error)
        ) from error


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
        # Counted, not locked: operations on other volumes go on beside each other, and
        # jobs yield to all of them. A job is asked between two slices only (`_go_on`),
        # so this never waits for one.
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
            # Until it is closed no job may be added: the present one could, and would
            # then work on a directory that its caller is about to remove.
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
        # Not alive: this process is a fork of the one that had it. fork(2) copies the
        # calling thread only.
        return self._thread is not None and self._thread.is_alive()

    def _work(self) -> None:
        while job := self._next():
            try:
                job(self._go_on)
            except Exception as error:  # noqa: BLE001 - the next job may do better
                log.info("left for later: %s", str(error))

    def _next(self) -> Job | None:
        with self._changed:
            while self._jobs:
                key = min(self._jobs, key=self._due)
                wait = self._due(key) - time.monotonic()
                if wait <= 0 or self._settling:
                    return self._jobs.pop(key).job
                self._changed.wait(None if self._operations else wait)
            # Under the condition, in which `_add` looks: a job that is added from here
            # on finds no thread and begins another, so none is ever forgotten.
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
