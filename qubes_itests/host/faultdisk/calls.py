"""Failing one system call of this process: what a full disk does to a program.

A disk that fails answers late, and the filesystem above it gives up.  A full one says
so to the very call that needs space.  So this fails calls, one at a time, where Python
makes them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["CallFault", "failing_call"]

#: Calls that may need space, and which of their arguments tells where.
_CALLS: dict[str, tuple[Any, int]] = {
    "open": (os, 0),
    "mkdir": (os, 0),
    "link": (os, 1),
    "rename": (os, 1),
    "replace": (os, 1),
    "unlink": (os, 0),
    "remove": (os, 0),
    "truncate": (os, 0),
    "ftruncate": (os, 0),
    "write": (os, 0),
    "pwrite": (os, 0),
    "sendfile": (os, 0),
    "copy_file_range": (os, 1),
    "posix_fallocate": (os, 0),
    "fsync": (os, 0),
    "fdatasync": (os, 0),
    "ioctl": (fcntl, 0),
}


@dataclass
class CallFault:
    """What became of a fault.

    :param hit: the call that failed, as in "os.link(/a, /b)"; None if none did.
    """

    nth: int
    hit: str | None = None
    _left: int = field(default=0, repr=False)


@contextlib.contextmanager
def failing_call(
    directory: Path, nth: int, error: int = errno.ENOSPC
) -> Iterator[CallFault]:
    """Have one call fail that would change something below a directory.

    Those of all threads count that go through `os` and `fcntl`: open (to create),
    mkdir, link, rename, unlink, truncate, write, sendfile, copy_file_range, fsync,
    ioctl.

    :param directory: calls that concern other places are let through and not counted.
    :param nth: which of them fails, 1 being the first.
    :param error: how, as a number of `errno`.
    """
    fault = CallFault(nth, _left=nth)
    lock = threading.Lock()

    def wrap(name: str, call: Callable[..., Any], position: int) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            if _concerns(directory, name, arguments, position):
                with lock:
                    fault._left -= 1  # noqa: SLF001
                    strikes = fault._left == 0  # noqa: SLF001
                if strikes:
                    fault.hit = f"{name}({', '.join(map(str, arguments))})"
                    raise OSError(error, os.strerror(error))
            return call(*arguments, **options)

        return wrapper

    with contextlib.ExitStack() as patches:
        for name, (module, position) in _CALLS.items():
            wrapper = wrap(name, getattr(module, name), position)
            patches.enter_context(mock.patch.object(module, name, wrapper))
        yield fault


def _concerns(
    directory: Path, name: str, arguments: tuple[Any, ...], position: int
) -> bool:
    if len(arguments) <= position:
        return False
    if name == "open" and not _creates(arguments):
        return False
    return directory in Path(_where(arguments[position])).parents


def _creates(arguments: tuple[Any, ...]) -> bool:
    return len(arguments) > 1 and bool(arguments[1] & os.O_CREAT)


def _where(target: Any) -> str:
    if isinstance(target, int):
        with contextlib.suppress(OSError):
            return os.readlink(f"/proc/self/fd/{target}")  # noqa: PTH115
        return ""
    if hasattr(target, "fileno"):
        return _where(target.fileno())
    return os.fsdecode(target)
