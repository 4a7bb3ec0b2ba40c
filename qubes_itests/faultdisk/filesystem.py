"""Mounted filesystem on a disk that records and fails."""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Self

from qubes_itests.faultdisk import sparse
from qubes_itests.faultdisk.disk import FaultDisk
from qubes_itests.faultdisk.recording import Recording
from qubes_itests.host.command import run
from qubes_itests.host.filesystem import (
    FilesystemType,
    is_mounted,
    make_filesystem,
    unmount,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["FaultFilesystem", "mount_device", "unmounted_afterwards"]

_BTRFS_IOC_START_SYNC = 0x80089418
_BTRFS_IOC_WAIT_SYNC = 0x40089416
_PAUSE = 0.002


class FaultFilesystem:
    """A new filesystem on a `FaultDisk`, mounted while the context lasts.

    :param directory: where to put image and mount point.
    :param kind: which filesystem.
    :param size: bytes; the smallest it can have unless given.
    """

    def __init__(
        self, directory: Path, kind: FilesystemType, *, size: int | None = None
    ) -> None:
        self.kind = kind
        self._directory = directory
        self._size = kind.minimum_size if size is None else size
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as undo:
            place = tempfile.TemporaryDirectory(dir=self._directory)
            self._place = Path(undo.enter_context(place))
            image = self._place / "image"
            make_filesystem(image, self.kind, self._size)
            sparse.dig_holes(image)
            sparse.copy_sparse(image, self.base)
            self.mount_point.mkdir(mode=0o700)
            self.disk = undo.enter_context(FaultDisk(image, self._place))
            undo.enter_context(unmounted_afterwards(self.mount_point))
            self.mount()
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._undo.close()

    @property
    def mount_point(self) -> Path:
        """The root directory of the filesystem."""
        return self._place / "fs"

    @property
    def base(self) -> Path:
        """An image of the disk from before it was first mounted."""
        return self._place / "base.img"

    def mount(self) -> None:
        """Mount it again after `unmount`.

        :raise CommandError: when what is on the disk cannot be mounted.
        """
        mount_device(self.disk.device, self.mount_point, self.kind)

    def unmount(self) -> None:
        """Unmount it, also after the disk has failed.

        :raise CommandError: when it is in use.
        """
        unmount(self.mount_point)

    @contextlib.contextmanager
    def neighbour(self) -> Iterator[None]:
        """Have somebody else fsync a file of theirs all the time.

        A filesystem then brings the names of all files to the disk, but not what is
        in them: a program that relies on the order of the two is found out.
        """
        stop = threading.Event()
        thread = threading.Thread(target=self._fsync_until, args=(stop,))
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def recording(self) -> Recording:
        """Return what happened to the disk so far; to be used within the context."""
        return Recording(self.kind, self.base, self.disk.operations())

    def _fsync_until(self, stop: threading.Event) -> None:
        fd = os.open(self.mount_point / ".neighbour", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            while not stop.wait(_PAUSE):
                os.pwrite(fd, os.urandom(16), 0)
                os.fsync(fd)
                if self.kind is FilesystemType.BTRFS:
                    # There an fsync concerns one file only; a commit of all comes
                    # every 30 seconds otherwise.
                    transaction = bytearray(struct.calcsize("<Q"))
                    fcntl.ioctl(fd, _BTRFS_IOC_START_SYNC, transaction)
                    fcntl.ioctl(fd, _BTRFS_IOC_WAIT_SYNC, transaction)
        finally:
            os.close(fd)


@contextlib.contextmanager
def unmounted_afterwards(directory: Path) -> Iterator[None]:
    """Unmount a directory in the end, if something is mounted there.

    What is in use after a failure goes out of sight, and is freed when it no longer is.

    :raise CommandError: when it is in use, though nothing had failed.
    """
    try:
        yield
        if is_mounted(directory):
            unmount(directory)
    except BaseException:
        # A check that failed may have left files open; its error is the one to tell.
        if is_mounted(directory):
            run(["umount", "--lazy", directory])
        raise


def mount_device(device: Path, directory: Path, kind: FilesystemType) -> None:
    """Mount a block device without access times, which would be writes of their own.

    :raise CommandError: when mount fails.
    """
    options = "noatime,nouuid" if kind.value == "xfs" else "noatime"
    run(["mount", "-t", kind.value, "-o", options, device, directory])
