"""The file of a store: read whole, replaced whole, by one writer at a time.

A new state is written beside the old one, brought to the disk, and renamed: whatever
interrupts that, the file is the old state or the new one.  Writers exclude each other
with a lock file, and each refuses to replace a file that is not what it knows; readers
need no lock.

::

    QubesException
     +-- StoreError               has `path`
          +-- StoreFormatError    has `line` and `column`
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import threading
import time
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qubes_itests.core.exc import QubesException

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "LOCK_TIMEOUT",
    "StoreError",
    "StoreFile",
    "StoreFormatError",
    "fsync_directory",
    "write_durably",
]

log = logging.getLogger("qubes.store")

#: Seconds to wait for a writer; one takes milliseconds unless it keeps the lock.
LOCK_TIMEOUT: Final = 2.0
_POLL_INTERVAL: Final = 0.02
_PID_LENGTH: Final = 20


class StoreError(QubesException):
    """A store cannot be read or written.

    :param path: the file.
    :param message: what is wrong, and what to do.
    """

    def __init__(self, path: Path, message: str) -> None:
        super().__init__(message)
        self.path = path


class StoreFormatError(StoreError):
    """The contents of the file are not valid; none of them was loaded.

    :param path: the file.
    :param line: where, from 1 on.
    :param column: where in the line, from 1 on.
    :param reason: what is wrong there.
    """

    def __init__(self, path: Path, line: int, column: int, reason: str) -> None:
        super().__init__(path, f"{path}:{line}:{column}: {reason}")
        self.line = line
        self.column = column
        self.reason = reason


def write_durably(path: Path, data: bytes) -> None:
    """Make a file that is on the disk when this returns; FileExistsError if it is."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    with os.fdopen(os.open(path, flags, 0o600), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def fsync_directory(path: Path) -> None:
    """Bring the names in a directory to the disk."""
    # The fsync of a file says nothing about its name: after a power cut a file that was
    # made or renamed may be missing, unless its directory has been synced as well.
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class StoreFile:
    """The file of a store, as one app knows it.

    :param path: the file; ``.lock`` and ``.new`` are appended to its name for those
        that belong to it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).absolute()
        #: Digest of what this app has read or written last; empty if there was no file.
        self._known = b""
        #: Closes the descriptor that holds the lock; None while others may write.
        self._release: Callable[[], object] | None = None
        # Saves write in threads of their own.  A flock belongs to an open file, which
        # all threads share, so it excludes other processes but not other threads.
        self._writing = threading.Lock()
        # The event loop takes states in order, and the threads may write them in any.
        self._issued = self._written = 0

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)

    @property
    def is_locked(self) -> bool:
        """Whether this app keeps other writers out."""
        return self._release is not None

    def read(self, *, lock: bool = False) -> bytes:
        """Return what the file holds.

        :param lock: whether to keep other writers out until `release`.
        :raise StoreError: when there is no file, or another writer has kept the lock
            for 2 seconds.
        """
        if lock:
            self._acquire()
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            self.release()
            raise StoreError(
                self.path,
                f"there is no {self.path}: the first save of Qubes(store, load=False)"
                " makes one",
            ) from None
        self._known = _digest(data)
        return data

    def next_version(self) -> int:
        """Return a number for a state that is about to be written."""
        self._issued += 1
        return self._issued

    def write(self, data: bytes, version: int, *, lock: bool = True) -> None:
        """Replace the file; when this returns, it survives a power cut.

        :param data: all that it will hold.
        :param version: from `next_version`, taken when the state was: one that is older
            than what another thread has written meanwhile is passed over.
        :param lock: whether to keep other writers out from now on, until `release`.
        :raise StoreError: when another writer has changed the file, or has made one
            where this app knew of none, or has kept the lock for 2 seconds.
        :raise OSError: as the operating system says; the file is as it was, or new.
        """
        with self._writing:
            if version < self._written:
                return
            was_locked = self.is_locked
            self._acquire()
            try:
                self._replace(data)
                self._written = version
            except BaseException:
                lock = was_locked
                raise
            finally:
                if not lock:
                    self.release()

    def release(self) -> None:
        """Let other writers in; no error when they were not kept out."""
        if self._release is not None:
            self._release()
            self._release = None

    def _acquire(self) -> None:
        if self._release is None:
            fd = _locked(self.path)
            # An app that is dropped without being closed must not hold it for ever.
            self._release = weakref.finalize(self, os.close, fd)

    def _replace(self, data: bytes) -> None:
        try:
            found = _digest(self.path.read_bytes())
        except FileNotFoundError:
            found = b""
        if found != self._known:
            raise StoreError(
                self.path,
                f"{self.path} was changed by another process since this app"
                " loaded it: load it again, and repeat your changes",
            )
        new = _beside(self.path, ".new")
        # the lock is ours, so this is what an interrupted write has left
        new.unlink(missing_ok=True)
        try:
            # The contents have to be on the disk before they get the name: filesystems
            # may write a rename first, and a power cut then leaves an empty file.
            write_durably(new, data)
            new.replace(self.path)
        except BaseException:
            with contextlib.suppress(OSError):
                new.unlink(missing_ok=True)
            raise
        # Before the sync of the directory, which may fail: readers see the new file
        # already, and the next save must not take it for that of another writer.
        self._known = _digest(data)
        fsync_directory(self.path.parent)
        log.debug("saved %s", self.path)


def _digest(data: bytes) -> bytes:
    # never empty, which stands for no file
    return hashlib.sha256(data).digest()


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _locked(path: Path) -> int:
    """Return a descriptor of the lock file; the lock is ours until it is closed."""
    # The file stays when the lock is released: one process could lock a name that was
    # just removed while another makes it anew, and both would be writers.
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(_beside(path, ".lock"), flags, 0o600)
    try:
        _lock(fd, path)
        os.ftruncate(fd, 0)
        os.pwrite(fd, b"%d\n" % os.getpid(), 0)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _lock(fd: int, path: Path) -> None:
    deadline = time.monotonic() + LOCK_TIMEOUT
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                said = os.pread(fd, _PID_LENGTH, 0).strip().decode("ascii", "replace")
                who = f"process {said}" if said.isdigit() else "another process"
                raise StoreError(
                    path, f"{path} is in use by {who}: end that one first"
                ) from None
        else:
            return
        time.sleep(_POLL_INTERVAL)
