"""Tracebacks of failed tests without the frames of what runs them.

What is left are the lines of the tests' authors. pytest's ``--full-trace`` shows all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qubes_itests.timeline import is_machinery

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

    import pytest

__all__ = ["hide_below_tests", "hide_machinery"]

#: pytest leaves out frames whose module has this name, if its function says so.
_FRAMES = "__tracebackhide__"
#: The attribute of errors whose tracebacks have lines of a test, or led to such ones.
_MARK = "itests_from_a_test"


def hide_machinery(error: BaseException) -> None:
    """Have pytest leave out the frames of modules that are none of a test's author.

    An error with no line of a test in it is the harness's, and shown as it is.
    """
    chain = list(_chain(error))
    frames = [frame for one in chain for frame in _frames(one)]
    if all(map(is_machinery, frames)):
        return
    for one in chain:
        vars(one)[_MARK] = True
    for frame in filter(is_machinery, frames):
        frame.f_globals[_FRAMES] = _is_marked


def hide_below_tests(error: BaseException) -> None:
    """Have pytest's debugger begin at the last line of a test in an error's traceback.

    What the test had is there; `down` goes to what it called.
    """
    frames = list(_frames(error))
    if all(map(is_machinery, frames)):
        return
    while is_machinery(frame := frames.pop()):
        # the debugger looks at variables of functions alone, not of their modules
        frame.f_locals[_FRAMES] = True


def _is_marked(excinfo: pytest.ExceptionInfo[BaseException]) -> bool:
    return _MARK in vars(excinfo.value)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and those that led to it."""
    seen: set[int] = set()
    found: list[BaseException | None] = [error]
    while found:
        one = found.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        found += [one.__cause__, one.__context__]
        if isinstance(one, BaseExceptionGroup):
            found += one.exceptions


def _frames(error: BaseException) -> Iterator[FrameType]:
    traceback = error.__traceback__
    while traceback is not None:
        yield traceback.tb_frame
        traceback = traceback.tb_next
