"""Which line of a test asked for what happens now."""

from __future__ import annotations

import contextlib
import contextvars
import linecache
import os
import sys
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager
    from types import FrameType

__all__ = [
    "START",
    "called_by_guest",
    "called_here",
    "caller",
    "is_machinery",
    "line_of",
    "raised_at",
    "source",
]

#: Of a task that synchronous code has made, or waits for: the line that does; empty if
#: a guest is the reason for it. As text, for contexts outlive tests, and a frame would
#: hold all that the test had.
_CALLER: Final[contextvars.ContextVar[str | None]] = contextvars.ContextVar(
    "caller", default=None
)
#: What tests are run by; what else calls is the tests' authors'.
_MACHINERY: Final = sys.stdlib_module_names | {
    *("qubes_itests", "qubes_storage", "_pytest", "pytest", "pluggy", "pytest_asyncio"),
    *("xdist", "execnet", "importlib", "__main__"),
}
_LONGEST_SOURCE: Final = 200
#: The directory that the process began in, which a test may leave: people are there.
START: Final = os.path.realpath("/proc/self/cwd")


def caller() -> str | None:
    """Return the line of the test that asked: ``tests/test_x.py:12``, None if none."""
    known = _CALLER.get()
    return line_of(sys._getframe(1)) if known is None else known or None  # noqa: SLF001


def called_here() -> AbstractContextManager[None]:
    """Have tasks that are made, or handed over, in here know the line that calls."""
    return _called_by(line_of(sys._getframe(1)))  # noqa: SLF001


def called_by_guest() -> AbstractContextManager[None]:
    """Have tasks that are made in here know that no line of the test asked for them."""
    return _called_by("")


@contextlib.contextmanager
def _called_by(line: str | None) -> Iterator[None]:
    token = _CALLER.set(line)
    try:
        yield
    finally:
        _CALLER.reset(token)


def raised_at(error: BaseException) -> str | None:
    """Return the last line of a test in an error's traceback, None if none is in it."""
    where, traceback = None, error.__traceback__
    while traceback is not None:
        frame = traceback.tb_frame
        if not is_machinery(frame):
            where = _shown(frame, traceback.tb_lineno)
        traceback = traceback.tb_next
    return where


def source(where: str) -> str:
    """Return the text of a line that `caller` has named, at most 200 characters."""
    path, _, number = where.rpartition(":")
    text = linecache.getline(str(Path(START, path)), int(number))
    return text.strip()[:_LONGEST_SOURCE]


def line_of(frame: FrameType | None) -> str | None:
    """Return the innermost line of a test from a frame on, None if there is none."""
    while frame is not None:
        if not is_machinery(frame):
            return _shown(frame, frame.f_lineno)
        frame = frame.f_back
    return None


def is_machinery(frame: FrameType) -> bool:
    """Return whether a frame is of what runs tests, not of a test's author."""
    name = frame.f_globals.get("__name__") or ""
    return str(name).partition(".")[0] in _MACHINERY


def _shown(frame: FrameType, line: int | None) -> str:
    # instructions that the compiler has added are of no line
    return f"{_path(frame.f_code.co_filename)}:{line or frame.f_code.co_firstlineno}"


@lru_cache(maxsize=1024)
def _path(path: str) -> str:
    """Return a path as it is found from `START`, if that is shorter."""
    try:
        return min(os.path.relpath(path, START), path, key=len)
    except (OSError, ValueError):
        return path
