"""Loop devices: whether there are any, attaching one, and which are over a file."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import struct
import sys
from pathlib import Path
from typing import Self

from qubes_itests.exc import EnvironmentNotReadyError
from qubes_itests.exit_codes import ExitCode
from qubes_itests.host import sandbox
from qubes_itests.host.sandbox_init import unescaped
from qubes_storage.loop import loop_devices_over

__all__ = [
    "LoopDevice",
    "detach_loop_devices",
    "loop_devices_over",
    "no_loop_device",
    "require_loop_devices",
]

_CONTROL = Path("/dev/loop-control")
#: Of the sandbox's own.
_OWN_NODES = Path("/dev/shm")  # noqa: S108
_LOOP_MAJOR = 7
_LOOP_CTL_GET_FREE = 0x4C82
_LOOP_CONFIGURE = 0x4C0A
_LOOP_CLR_FD = 0x4C01
_LOOP_GET_STATUS64 = 0x4C05
_LO_FLAGS_AUTOCLEAR = 4
#: struct loop_info64, which begins with the number of the filesystem.
_LOOP_INFO_SIZE = 232
#: struct loop_config: the file, the block size, then struct loop_info64.
_LOOP_CONFIG = struct.Struct("=II QQQQQIIII 64s 64s 32s QQ 64x")
_ATTEMPTS = 100


def require_loop_devices() -> None:
    """Check that the machine would hand out a loop device.

    :raise EnvironmentNotReadyError: with what was tried, when it would not.
    """
    _free_number()


def no_loop_device(reason: str) -> EnvironmentNotReadyError:
    """Return the error for a machine that hands out no loop device.

    :param reason: what was tried and how it failed.
    """
    return EnvironmentNotReadyError(
        f"There is no usable loop device ({reason}).",
        "Load the driver with: modprobe loop; a container must be given"
        " /dev/loop-control and the right to use it.",
        ExitCode.NO_LOOP_DEVICES,
    )


def detach_loop_devices(place: Path) -> None:
    """Detach the loop devices over files below a directory, lost ones too. Blocking.

    :param place: the directory; files on what is mounted below it count as well.
    """
    # Paths alone do not tell: a process that sees another root has the same ones.
    filesystems = {place.stat().st_dev}
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mounted = Path(unescaped(line.split(" ")[4]))
        if mounted.is_relative_to(place):
            with contextlib.suppress(OSError):
                filesystems.add(mounted.stat().st_dev)
    for device in Path("/sys/block").glob("loop*"):
        # Without a file there is no such attribute, and it may go away meanwhile.
        with contextlib.suppress(OSError):
            shown = (device / "loop" / "backing_file").read_text()
            if not shown.startswith(f"{place}/"):
                continue
            fd = os.open(Path("/dev") / device.name, os.O_RDONLY | os.O_CLOEXEC)
            try:
                info = bytearray(_LOOP_INFO_SIZE)
                fcntl.ioctl(fd, _LOOP_GET_STATUS64, info)
                if int.from_bytes(info[:8], sys.byteorder) in filesystems:
                    fcntl.ioctl(fd, _LOOP_CLR_FD)
            finally:
                os.close(fd)


def _free_number() -> int:
    try:
        control = os.open(_CONTROL, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise no_loop_device(f"{_CONTROL}: {error.strerror}") from error
    try:
        return fcntl.ioctl(control, _LOOP_CTL_GET_FREE)
    except OSError as error:
        reason = f"none is free: {errno.errorcode.get(error.errno or 0, error)}"
        raise no_loop_device(reason) from error
    finally:
        os.close(control)


def _node(number: int) -> Path:
    """Return the node of a device, made if this machine's /dev has none.

    A container may have a separate /dev, where no node appears by itself. Ours goes
    with the sandbox.
    """
    path = Path(f"/dev/loop{number}")
    if path.exists():
        return path
    if not sandbox.active():
        raise no_loop_device(f"{path} does not appear")
    path = _OWN_NODES / path.name
    try:
        with contextlib.suppress(FileExistsError):
            os.mknod(path, stat.S_IFBLK | 0o600, os.makedev(_LOOP_MAJOR, number))
    except OSError as error:
        reason = f"/dev/{path.name} does not appear, and cannot be made"
        raise no_loop_device(f"{reason}: {error.strerror}") from error
    return path


class LoopDevice:
    """A loop device over a file, while the context lasts.

    It detaches itself when nothing has it open any more: a mount may outlast the
    context, and the death of this process leaves none behind.

    :param image: the file.
    :param offset: where the device begins in it, bytes.
    :param size: of the device, bytes; 0 for all that follows.
    """

    def __init__(self, image: Path, *, offset: int = 0, size: int = 0) -> None:
        self.image = image
        self._part = offset, size
        self._fd = -1
        self._path = Path()

    @property
    def path(self) -> Path:
        """The block device."""
        return self._path

    def __enter__(self) -> Self:
        # The device keeps the file open by itself.
        with self.image.open("r+b") as image:
            for _ in range(_ATTEMPTS):
                if self._attach(image.fileno()):
                    return self
        raise no_loop_device("others took every one that was free")

    def __exit__(self, *_exc: object) -> None:
        # A mount has it open, too; without one the kernel detaches it now.
        os.close(self._fd)

    def _attach(self, image: int) -> bool:
        # The number is no more than a proposal: who asks at the same time gets the
        # same one. It is decided by LOOP_CONFIGURE, which only one of them can do.
        self._path = _node(_free_number())
        try:
            self._fd = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise no_loop_device(f"{self._path}: {error.strerror}") from error
        info = (0, 0, 0, *self._part, 0, 0, 0, _LO_FLAGS_AUTOCLEAR, b"", b"", b"", 0, 0)
        try:
            fcntl.ioctl(self._fd, _LOOP_CONFIGURE, _LOOP_CONFIG.pack(image, 0, *info))
        except OSError as error:
            os.close(self._fd)
            if error.errno == errno.EBUSY:  # somebody else was faster
                return False
            raise no_loop_device(f"{self._path}: {error.strerror}") from error
        return True
