"""Loop devices: whether there are any, and which are over a file."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from pathlib import Path

from qubes_itests.host.exc import NoLoopDevicesError

__all__ = ["loop_devices_over", "require_loop_devices"]

_CONTROL = Path("/dev/loop-control")
_LOOP_CTL_GET_FREE = 0x4C82


def require_loop_devices() -> None:
    """Check that the machine would hand out a loop device.

    :raise NoLoopDevicesError: with what was tried, when it would not.
    """
    try:
        control = os.open(_CONTROL, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise NoLoopDevicesError(f"{_CONTROL}: {error.strerror}") from error
    try:
        number = fcntl.ioctl(control, _LOOP_CTL_GET_FREE)
    except OSError as error:
        reason = f"none is free: {errno.errorcode.get(error.errno or 0, error)}"
        raise NoLoopDevicesError(reason) from error
    finally:
        os.close(control)
    if not Path(f"/dev/loop{number}").exists():
        raise NoLoopDevicesError(f"/dev/loop{number} does not appear")


def loop_devices_over(image: Path) -> tuple[Path, ...]:
    """Return the loop devices of this machine that are over a file.

    :param image: the file; it may have been deleted since.
    """
    return tuple(
        Path("/dev") / device.name
        for device in sorted(Path("/sys/block").glob("loop*"))
        if _backing_file(device) == str(image.resolve())
    )


def _backing_file(device: Path) -> str | None:
    # Without a file there is no such attribute, and the device may go away meanwhile.
    with contextlib.suppress(OSError):
        name = (device / "loop" / "backing_file").read_text().rstrip("\n")
        return name.removesuffix(" (deleted)")
    return None
