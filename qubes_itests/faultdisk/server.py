"""Process behind a disk: it serves one file through FUSE and records what happens.

It is started by `FaultDisk`, takes orders as lines of JSON on a socket, and ends when
the other end of that is closed, however that comes about.
"""

# ruff: noqa: ARG002 - FUSE passes what its calls have
from __future__ import annotations

import ctypes
import errno
import json
import os
import socket
import stat
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mfusepy

from qubes_itests.faultdisk.operations import Kind, Operation

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["FILE_NAME", "Disk", "main"]

#: Name of the one file there is.
FILE_NAME = "disk"

_MNT_DETACH = 2
_KEEP_SIZE, _PUNCH_HOLE, _ZERO_RANGE = 1, 2, 16
_DIRECTORY = {"st_mode": stat.S_IFDIR | 0o700, "st_nlink": 2}


@dataclass
class _Fault:
    """An operation that fails: `left` more are let through, then `times` fail."""

    operation: str
    left: int
    times: int | None
    error: int

    def strikes(self, operation: str) -> bool:
        if self.operation not in {operation, "any"} or self.times == 0:
            return False
        if self.left:
            self.left -= 1
            return False
        if self.times is not None:
            self.times -= 1
        return True


class Disk:
    """What is on the disk, what is recorded of it, and which faults it has.

    :param image: the file with the content, opened for reading and writing.
    :param journal: where operations are recorded.
    """

    def __init__(self, image: int, journal: Path) -> None:
        self._image = image
        self._journal = journal.open("wb", buffering=0)
        # FUSE has one thread, orders have another. What is done and what is recorded of
        # it must be one: a note between the two would promise what a cut takes away.
        self._lock = threading.Lock()
        self._faults: list[_Fault] = []
        self._lying = False
        self._power = True
        self._counts = {"read": 0, "write": 0, "flush": 0, "failed": 0}

    @property
    def size(self) -> int:
        """Bytes."""
        return os.fstat(self._image).st_size

    def read(self, length: int, offset: int) -> bytes:
        """Return what is there; fails as ordered."""
        with self._lock:
            self._pass("read")
            return os.pread(self._image, length, offset)

    def write(self, operation: Operation) -> None:
        """Write or zero, and record it; fails as ordered."""
        with self._lock:
            self._pass("write")
            if operation.kind is Kind.ZERO:
                libc = ctypes.CDLL(None, use_errno=True)
                mode = _KEEP_SIZE | _PUNCH_HOLE
                hole = map(ctypes.c_int64, (operation.offset, operation.length))
                if libc.fallocate(self._image, mode, *hole):
                    raise OSError(ctypes.get_errno(), "fallocate")
            else:
                os.pwrite(self._image, operation.data, operation.offset)
            self._journal.write(operation.encode())

    def flush(self) -> None:
        """Record a flush, or a lie; fails as ordered."""
        with self._lock:
            self._pass("flush")
            kind = Kind.LIE if self._lying else Kind.FLUSH
            self._journal.write(Operation(kind).encode())

    def obey(self, order: dict[str, Any]) -> dict[str, Any]:
        """Carry out an order of `FaultDisk` and return the answer."""
        with self._lock:
            match order.pop("order"):
                case "note":
                    if self._power:
                        text: str = order["text"]
                        self._journal.write(Operation.note(text.encode()).encode())
                case "fail":
                    self._faults.append(_Fault(**order))
                case "mend":
                    self._faults.clear()
                    self._lying = False
                case "lie":
                    self._lying = True
                case "cut":
                    self._power = False
                case "counts":
                    return dict(self._counts)
                case unknown:
                    raise ValueError(f"there is no order {unknown!r}")
        return {}

    def _pass(self, operation: str) -> None:
        self._counts[operation] += 1
        # All of them: each counts what happens from when it was asked for.
        struck = [fault for fault in self._faults if fault.strikes(operation)]
        if struck or not self._power:
            self._counts["failed"] += 1
            code = struck[0].error if self._power else errno.EIO
            raise OSError(code, os.strerror(code))


class _Files(mfusepy.Operations):  # type: ignore[misc]
    """One directory with one file."""

    use_ns = True

    def __init__(self, disk: Disk, ready: Callable[[], None]) -> None:
        self._disk = disk
        self._ready = ready

    def init(self, path: str) -> None:
        self._ready()

    def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
        if path == "/":
            return dict(_DIRECTORY)
        if path != f"/{FILE_NAME}":
            raise OSError(errno.ENOENT, path)
        mode = stat.S_IFREG | 0o600
        return {"st_mode": mode, "st_nlink": 1, "st_size": self._disk.size}

    def open(self, path: str, flags: int) -> int:
        return 0

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        return self._disk.read(size, offset)

    def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
        self._disk.write(Operation.write(offset, bytes(data)))
        return len(data)

    def fsync(self, path: str, datasync: int, fh: int) -> int:
        self._disk.flush()
        return 0

    def fallocate(
        self,
        path: str,
        mode: int,
        offset: int,
        size: int,
        fh: int,
    ) -> int:
        if not mode & (_PUNCH_HOLE | _ZERO_RANGE):
            raise OSError(errno.EOPNOTSUPP, "fallocate")
        self._disk.write(Operation(Kind.ZERO, offset, size))
        return 0


def main(argv: list[str]) -> None:
    """Serve until the socket is closed.

    :param argv: mount point, image, journal, number of the socket's descriptor.
    """
    mount_point, image, journal, control = argv
    disk = Disk(os.open(image, os.O_RDWR | os.O_CLOEXEC), Path(journal))
    channel = socket.socket(fileno=int(control))
    listener = threading.Thread(target=_listen, args=(channel, disk, mount_point))
    listener.daemon = True

    def ready() -> None:
        channel.sendall(b"{}\n")
        listener.start()

    mfusepy.FUSE(
        _Files(disk, ready),
        mount_point,
        foreground=True,
        nothreads=True,
        # Nothing may stay in the page cache: what the loop device sends is recorded.
        direct_io=True,
        fsname="qubes-itests-faultdisk",
    )


def _listen(channel: socket.socket, disk: Disk, mount_point: str) -> None:
    with channel.makefile("rb") as orders:
        for line in orders:
            try:
                answer = disk.obey(json.loads(line))
            except Exception as error:  # noqa: BLE001 - it is the answer
                answer = {"error": repr(error)}
            channel.sendall(json.dumps(answer).encode() + b"\n")
    # Nobody is left who could give orders: the test or the whole run is over. Lazily,
    # for a loop device may still have the file open; and without waiting for the other
    # thread, which may be in a call of the kernel for as long as it is mounted.
    ctypes.CDLL(None).umount2(os.fsencode(mount_point), _MNT_DETACH)
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
