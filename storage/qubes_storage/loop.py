"""Loop devices over an image: which there are, and that they take up its new size."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

__all__ = ["loop_devices_over", "update_loop_devices"]

_LOOP_SET_CAPACITY = 0x4C07


def loop_devices_over(image: Path) -> tuple[Path, ...]:
    """Return the loop devices of this machine that are over a file.

    :param image: the file; it may have been deleted since.
    """
    found = []
    for device in sorted(Path("/sys/block").glob("loop*")):
        # Without a file there is no such attribute, and it may go away meanwhile.
        with contextlib.suppress(OSError):
            name = (device / "loop" / "backing_file").read_text().rstrip("\n")
            if name.removesuffix(" (deleted)") == str(image.resolve()):
                found.append(Path("/dev") / device.name)
    return tuple(found)


def update_loop_devices(image: Path) -> None:
    """Have every loop device over `image` take up the file's present size.

    :raise OSError: when a device refuses.
    """
    for device in loop_devices_over(image):
        fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.ioctl(fd, _LOOP_SET_CAPACITY)
        finally:
            os.close(fd)
