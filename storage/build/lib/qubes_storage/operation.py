"""One blocking operation on a volume: in a thread, locked, with typed errors."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from qubes_storage import lock
from qubes_storage.exc import (
    ImageTypeError,
    InvalidSizeError,
    OutOfSpaceError,
    VolumeBusyError,
    VolumeError,
    VolumeIOError,
    system_reason,
)
from qubes_storage.uninterrupted import to_its_end

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from qubes_storage.background import Background
    from qubes_storage.volume import Volume

__all__ = ["Operations", "typed_errors"]

Result = TypeVar("Result")

_ERRORS: dict[int | None, type[VolumeError]] = {
    errno.ENOSPC: OutOfSpaceError,
    errno.EDQUOT: OutOfSpaceError,
    errno.EFBIG: InvalidSizeError,
    errno.ELOOP: ImageTypeError,
    errno.EMEDIUMTYPE: ImageTypeError,
}


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
        lock_timeout: float = lock.LOCK_TIMEOUT,
    ) -> None:
        self._directory = directory
        self._background = background
        self.lock_timeout = lock_timeout
        self._turns: weakref.WeakValueDictionary[str, asyncio.Lock]
        self._turns = weakref.WeakValueDictionary()

    async def run(
        self, volume: Volume, action: str, function: Callable[[], Result]
    ) -> Result:
        """Run a blocking `function` that works on `volume`.

        Once begun it is brought to its end: a cancellation counts only afterwards.

        :param action: a verb for the error, as in "start".
        :raise VolumeError: of the class that tells what went wrong.
        """
        # The file lock alone would do; this spares threads that only wait.
        turn = self._turns.setdefault(volume.vid, asyncio.Lock())
        async with turn:
            # The thread goes on, and who comes next must find its work complete.
            return await to_its_end(
                _in_thread(lambda: self._run(volume, action, function))
            )

    @contextlib.contextmanager
    def reading(self, volume: Volume) -> Iterator[None]:
        """Keep others from changing a volume; for as short a time as possible.

        :raise TimeoutError: when somebody works on it and does not come to an end.
        """
        with lock.hold(self._directory, read=[volume.vid], timeout=self.lock_timeout):
            yield

    def _run(
        self, volume: Volume, action: str, function: Callable[[], Result]
    ) -> Result:
        with self._background.operation(), typed_errors(volume, action):
            self._check_directory()
            with lock.hold(
                self._directory, write=[volume.vid], timeout=self.lock_timeout
            ):
                return function()

    def _check_directory(self) -> None:
        # Not made here: it may be on a disk that is not mounted.
        if not self._directory.is_dir():
            reason = "the pool's directory is absent"
            raise FileNotFoundError(errno.ENOENT, reason, str(self._directory))


async def _in_thread(function: Callable[[], Result]) -> Result:
    # The event loop's own threads are few: long operations would delay others.
    executor = ThreadPoolExecutor(1, "qubes_storage_operation")
    try:
        return await asyncio.get_running_loop().run_in_executor(executor, function)
    finally:
        executor.shutdown(wait=False)


@contextlib.contextmanager
def typed_errors(volume: Volume, action: str) -> Iterator[None]:
    """Turn an operating system's error into one of ours."""
    try:
        yield
    except TimeoutError as error:
        reason = "another process works on it and does not come to an end"
        raise VolumeBusyError(volume.pool.name, volume.vid, action, reason) from error
    except OSError as error:
        kind = _ERRORS.get(error.errno, VolumeIOError)
        raise kind(
            volume.pool.name, volume.vid, action, system_reason(error)
        ) from error
