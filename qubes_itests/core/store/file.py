"""The file of a store: read whole, replaced whole, by one writer at a time.

A new state is written beside the old one, brought to the disk, and renamed: whatever
interrupts that, the file is the old state or the new one.  Writers exclude each other
with a lock file, and each refuses to replace a file that is not what it knows; readers
need no lock.
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

from qubes_itests.core.store.durable import fsync_directory, write_durably
from qubes_itests.core.store.journal import Journal
from qubes_itests.core.store.store_errors import (
    StoreChangedError,
    StoreLockedError,
    StoreMissingError,
)

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["LOCK_TIMEOUT", "StoreFile"]

log = logging.getLogger("qubes.store")

#: Seconds to wait for a writer; one takes milliseconds unless it keeps the lock.
LOCK_TIMEOUT: Final = 2.0
_POLL_INTERVAL: Final = 0.02
_PID_LENGTH: Final = 20


class StoreFile:
    """The file of a store, as one app knows it.

    :param path: the file; ``.lock`` and ``.new`` are appended to its name for those
        that belong to it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).absolute()
        #: What is being done to VMs, for who comes after a crash.
        self.journal = Journal(self.path)
        self._known = b""
        self._release: Callable[[], object] | None = None
        self._writing = threading.Lock()
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
        :raise StoreMissingError: when there is no file.
        :raise StoreLockedError: when another writer has kept the lock for 2 seconds.
        """
        if lock:
            self._acquire()
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            self.release()
            raise StoreMissingError(self.path) from None
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
        :raise StoreChangedError: when somebody else has changed the file, or has made
            one where this app knew of none.
        :raise StoreLockedError: when another writer has kept the lock for 2 seconds.
        :raise OSError: as the operating system says; the file is as it was, or new.
        """
        with self._writing:
            if version < self._written:
                return
            was_locked = self.is_locked
            self._acquire()
            try:
                self._refuse_if_changed()
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
            # an app that is dropped without being closed must not hold it for ever
            self._release = weakref.finalize(self, os.close, fd)

    def _refuse_if_changed(self) -> None:
        try:
            found = _digest(self.path.read_bytes())
        except FileNotFoundError:
            found = b""
        if found != self._known:
            raise StoreChangedError(self.path)

    def _replace(self, data: bytes) -> None:
        new = _beside(self.path, ".new")
        # the lock is ours, so this is what an interrupted write has left
        new.unlink(missing_ok=True)
        try:
            write_durably(new, data)
            new.replace(self.path)
        except BaseException:
            with contextlib.suppress(OSError):
                new.unlink(missing_ok=True)
            raise
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
                raise StoreLockedError(path, _holder(fd)) from None
        else:
            return
        time.sleep(_POLL_INTERVAL)


def _holder(fd: int) -> int:
    said = os.pread(fd, _PID_LENGTH, 0).strip()
    return int(said) if said.isdigit() else 0
