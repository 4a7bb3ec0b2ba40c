"""System calls of this process that fail: what a full disk does to a program.

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
from pathlib import Path
from typing import TYPE_CHECKING, Any

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


class CallFault:
    """One call that is to fail, and what became of it.

    :param directory: calls that concern other places are let through and not counted.
    :param nth: which of the others fails, 1 being the first.
    :param error: how, as a number of `errno`.
    """

    def __init__(self, directory: Path, nth: int, error: int) -> None:
        #: The call that failed, as in "link(/a, /b)"; None if none did.
        self.hit: str | None = None
        self._directory = directory
        self._left = nth
        self._error = error
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.hit or 'not hit'}>"

    def wrap(self, name: str) -> Callable[..., Any]:
        """Return a function to be called instead of a call of that name."""
        module, position = _CALLS[name]
        call = getattr(module, name)

        def wrapper(*arguments: Any, **options: Any) -> Any:
            # an open(2) counts when it may create
            counts = len(arguments) > position and (
                name != "open" or (len(arguments) > 1 and arguments[1] & os.O_CREAT)
            )
            if counts and self._directory in Path(_where(arguments[position])).parents:
                self._count(name, arguments)
            return call(*arguments, **options)

        return wrapper

    def _count(self, name: str, arguments: tuple[Any, ...]) -> None:
        # Calls come from all threads of the process; exactly one of them is the n-th.
        with self._lock:
            self._left -= 1
            if self._left:
                return
            self.hit = f"{name}({', '.join(map(str, arguments))})"
        raise OSError(self._error, os.strerror(self._error))


@contextlib.contextmanager
def failing_call(
    directory: Path, nth: int, error: int = errno.ENOSPC
) -> Iterator[CallFault]:
    """Have one call fail that would change something below a directory.

    Those of all threads count that go through `os` and `fcntl`: open (to create),
    mkdir, link, rename, unlink, truncate, write, sendfile, copy_file_range, fsync,
    ioctl.

    :param directory: calls that concern other places are let through and not counted.
    :param nth: which of the others fails, 1 being the first.
    :param error: how, as a number of `errno`.
    """
    fault = CallFault(directory, nth, error)
    with contextlib.ExitStack() as patches:
        for name, (module, _) in _CALLS.items():
            patches.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, fault.wrap(name))
        yield fault


def _where(target: Any) -> str:
    if isinstance(target, int):
        with contextlib.suppress(OSError):
            return os.readlink(f"/proc/self/fd/{target}")  # noqa: PTH115
        return ""
    if hasattr(target, "fileno"):
        return _where(target.fileno())
    return os.fsdecode(target)
