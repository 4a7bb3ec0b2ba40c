"""Telling loop devices that the file under them has grown."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["update_loop_devices"]

_LOOP_SET_CAPACITY = 0x4C07


def update_loop_devices(image: Path) -> None:
    """Have every loop device over `image` take up the file's present size.

    :raise OSError: when a device refuses.
    """
    for device in _loop_devices(image):
        fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.ioctl(fd, _LOOP_SET_CAPACITY)
        finally:
            os.close(fd)


def _loop_devices(image: Path) -> Iterator[Path]:
    for entry in Path("/sys/block").glob("loop*/loop/backing_file"):
        # A device may go away while we look.
        with contextlib.suppress(OSError):
            if entry.read_text().rstrip("\n") == str(image.resolve()):
                yield Path("/dev") / entry.parts[3]
