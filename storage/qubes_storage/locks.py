"""Locks and claims on volumes, between threads and between processes.

A *lock* is held for one operation (`hold`); a *claim* between operations, as long as a
volume is started, imported into or exported (`Claims`).  All those of a pool are on one
file in its directory, in which each subject has a byte, chosen by a hash.

Both are open file description locks (``F_OFD_SETLK``, fcntl(2)).  They belong to what
open(2) has made, so two threads, or two pools over one directory, exclude each other
as two processes do; and the kernel drops them when the last descriptor is closed, so
none outlives its process.  Neither is so with the record locks of POSIX (``F_SETLK``):
those are the process's, whichever thread takes them, and close(2) of *any* descriptor
of the file drops all of them.  flock(2) knows no bytes: it would take a file for each
volume, which nobody could ever remove safely.

fork(2) copies the descriptors, and with them the locks.  A child that does not exec
(``O_CLOEXEC``) keeps what its parent has claimed until it ends, too.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import struct
import threading
import time
from typing import TYPE_CHECKING

from qubes_storage import files
from qubes_storage.exc import VolumeError, VolumeStateError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = [
    "LOCK_FILE",
    "LOCK_TIMEOUT",
    "Claims",
    "VolumeUse",
    "hold",
    "is_marked",
    "mark_if_empty",
]

#: Name of the lock file in the directory of a pool.
LOCK_FILE = ".lock"

#: Seconds that another process may work on a volume while we wait.
LOCK_TIMEOUT = 300.0

_POLL_INTERVAL = 0.02

#: What the lock file holds in a directory that was empty when a pool got it.
_MARK = b"All files here were made by qubes_storage.\n"


@contextlib.contextmanager
def hold(
    directory: Path, vid: str, *, shared: bool = False, timeout: float = LOCK_TIMEOUT
) -> Iterator[None]:
    """Hold the lock of a volume of the pool in `directory`.

    The start of a snapshot waits for the lock of its source while it holds its own, and
    nothing waits the other way round.  Sources form no circle, so no deadlock either.

    :param vid: id of the volume.
    :param shared: whether others may read it meanwhile; else nobody does anything.
    :param timeout: seconds to wait.
    :raise TimeoutError: when somebody else held it for that long.
    """
    deadline = time.monotonic() + timeout
    fd = _open_lock_file(directory)
    try:
        # Polled: F_OFD_SETLKW has no time-out, and a thread cannot be called off it.
        while not _set_lock(fd, vid, fcntl.F_RDLCK if shared else fcntl.F_WRLCK):
            if time.monotonic() >= deadline:
                raise TimeoutError
            time.sleep(_POLL_INTERVAL)
        yield
    finally:
        os.close(fd)


def mark_if_empty(directory: Path) -> bool:
    """Make the lock file of an empty directory, and say in it that all there is ours.

    :return: whether that was done.
    :raise OSError: when it cannot be made.
    """
    if any(directory.iterdir()):
        return False
    path = directory / LOCK_FILE
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        fd = os.open(path, flags, 0o600)
    except FileExistsError:
        # Never replaced, nor removed while it may be in use: locks are on the file and
        # not on its name, so two files would be two sets of locks.
        return False
    try:
        os.write(fd, _MARK)
        # The name may be lost in a power cut: then nothing is taken for ours.
        os.fsync(fd)
    finally:
        os.close(fd)
    return True


def is_marked(directory: Path) -> bool:
    """Tell whether all files in a pool's directory are ours; see `mark_if_empty`."""
    try:
        with files.open_image(directory / LOCK_FILE) as fd:
            return os.pread(fd, len(_MARK), 0) == _MARK
    except FileNotFoundError:
        return False


def _open_lock_file(directory: Path) -> int:
    path = directory / LOCK_FILE
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def _request(subject: str, kind: int) -> bytes:
    digest = hashlib.blake2b(subject.encode(), digest_size=8).digest()
    byte = int.from_bytes(digest, "big") >> 2  # an offset must stay below 2**63
    # struct flock: type, whence, start, length, pid (zero for this kind of lock).
    return struct.pack("hhqqi4x", kind, os.SEEK_SET, byte, 1, 0)


def _set_lock(fd: int, subject: str, kind: int) -> bool:
    """Lock a subject's byte, or unlock it; False when another's lock is in the way."""
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _request(subject, kind))
    except OSError as error:
        if error.errno in {errno.EAGAIN, errno.EACCES}:
            return False
        raise
    return True


class Claims:
    """The claims of one pool object; for use by several threads.

    :param directory: the directory of the pool.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._mutex = threading.Lock()
        #: How often each subject was taken: the kernel counts no locks.
        self._held: dict[str, int] = {}
        self._fd: int | None = None

    def __del__(self) -> None:
        self.close()

    def take(self, subject: str, *, shared: bool = False) -> bool:
        """Claim something, or claim it once more.

        :param subject: what; any text.
        :param shared: whether others may share the claim.
        :return: False when somebody else's claim is in the way.
        :raise OSError: when the lock file cannot be opened.
        """
        # The kernel does not keep our own threads apart, which share one open file:
        # without the mutex two could take a subject at once, and be counted as one.
        with self._mutex, self._lock_file() as fd:
            kind = fcntl.F_RDLCK if shared else fcntl.F_WRLCK
            if subject not in self._held and not _set_lock(fd, subject, kind):
                return False
            self._held[subject] = self._held.get(subject, 0) + 1
            return True

    def drop(self, subject: str) -> None:
        """Undo one `take`; no error when there was none."""
        with self._mutex:
            count = self._held.pop(subject, 0)
            # One unlock undoes any number of locks of a byte, so only the last may.
            if count > 1:
                self._held[subject] = count - 1
            elif count:
                with self._lock_file() as fd:
                    _set_lock(fd, subject, fcntl.F_UNLCK)

    def is_held(self, subject: str) -> bool:
        """Tell whether this object has the claim."""
        return subject in self._held

    def is_elsewhere(self, subject: str) -> bool:
        """Tell whether somebody else has a claim, shared or not.

        :raise OSError: when the lock file cannot be opened.
        """
        with self._mutex, self._lock_file() as fd:
            # Our own claims are on the same open file, and in no one's way here.
            answer = fcntl.fcntl(
                fd, fcntl.F_OFD_GETLK, _request(subject, fcntl.F_WRLCK)
            )
            (kind,) = struct.unpack_from("h", answer)
            return bool(kind != fcntl.F_UNLCK)

    def close(self) -> None:
        """Drop all claims."""
        with self._mutex:
            # the kernel drops them with the descriptor
            self._held.clear()
            self._close_if_idle()

    @contextlib.contextmanager
    def _lock_file(self) -> Iterator[int]:
        if self._fd is None:
            self._fd = _open_lock_file(self._directory)
        try:
            yield self._fd
        finally:
            self._close_if_idle()

    def _close_if_idle(self) -> None:
        # An open file would keep the pool's filesystem from being unmounted.
        if not self._held and self._fd is not None:
            with contextlib.suppress(OSError):
                os.close(self._fd)
            self._fd = None


class VolumeUse:
    """Whether a volume is started, importing, exporting; known across processes.

    It is what a volume's files do not tell.

    :param pool: name of the pool, for the errors.
    :param vid: id of the volume.
    :param claims: the claims of the pool.
    """

    def __init__(self, pool: str, vid: str, claims: Claims) -> None:
        self.pool = pool
        self.vid = vid
        self.started = False
        self.import_size: int | None = None
        self._claims = claims
        self._exported = f"{vid} exported"
        self._in_use = f"{vid} in use"
        self._exports = 0
        self._loss: str | None = None

    def begin(self, action: str) -> None:
        """Claim the volume for this process, to start it or to import into it.

        :raise VolumeStateError: when another process has it started, or imports.
        """
        # It is held still after a stop that has lost something. Taken once more then,
        # it would outlast the `end`, and no other process could start the volume.
        if not self._claims.is_held(self._in_use) and not self._claims.take(
            self._in_use
        ):
            self._refuse_other(action)

    def end(self) -> None:
        """Undo `begin`: it is not started any more, and no import is under way."""
        self.started = False
        self.import_size = None
        self._loss = None
        self._claims.drop(self._in_use)

    def begin_export(self) -> None:
        """Note a reader of the committed image."""
        # It cannot fail: nobody takes this one for himself alone, `is_elsewhere` asks.
        self._claims.take(self._exported, shared=True)
        self._exports += 1

    def end_export(self) -> None:
        """Note that a reader is done; no error when there is none."""
        if self._exports:
            self._exports -= 1
            self._claims.drop(self._exported)

    def is_exported(self) -> bool:
        """Tell whether anybody reads the committed image, in whatever process."""
        return bool(self._exports) or self._claims.is_elsewhere(self._exported)

    def lose(self, reason: str) -> None:
        """Note that what a VM wrote may not have reached the disk."""
        self.started = False
        self._loss = reason

    def refuse_if_lost(self, action: str) -> None:
        """Raise when what a VM wrote may be lost: a second fsync would not tell.

        :raise VolumeError: until it is started again, or removed.
        """
        if self._loss is not None:
            reason = (
                f"what its VM wrote may be lost ({self._loss}); start it again to go on"
                " with what is there, or remove it"
            )
            raise VolumeError(self.pool, self.vid, action, reason)

    def go_on(self) -> None:
        """Note that the volume is started."""
        self.started = True
        self._loss = None

    def refuse_if_started(self, action: str) -> None:
        """Raise when this process has started the volume."""
        if self.started:
            self._refuse(action, "it is started already; stop it first")

    def refuse_if_importing(self, action: str) -> None:
        """Raise when this process imports into the volume."""
        if self.import_size is not None:
            self._refuse(action, "an import is under way")

    def is_used(self) -> bool:
        """Tell whether it is started, or being imported into, in whatever process."""
        held = self._claims.is_held(self._in_use)
        return held or self._claims.is_elsewhere(self._in_use)

    def refuse_if_used_elsewhere(self, action: str) -> None:
        """Raise when another process has it started, or imports into it."""
        if not self._claims.is_held(self._in_use) and self.is_used():
            self._refuse_other(action)

    def _refuse_other(self, action: str) -> None:
        self._refuse(action, "another process has it started, or imports into it")

    def _refuse(self, action: str, reason: str) -> None:
        raise VolumeStateError(self.pool, self.vid, action, reason)
