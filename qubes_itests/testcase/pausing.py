"""A pause for the person at the terminal, before what a failed test has is removed."""

from __future__ import annotations

import functools
import os
import traceback
import unittest
from typing import TYPE_CHECKING, ParamSpec, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["wait_on_fail"]

P = ParamSpec("P")
R = TypeVar("R")


def wait_on_fail(func: Callable[P, R]) -> Callable[P, R]:
    """Decorate a test that, when it fails, shows why and waits for the return key.

    Meanwhile its VMs are there to be looked at. It is read from the terminal of the
    run; where there is none, nobody is waited for. The time of the test goes on:
    `--timeout 0` gives it all that it takes.
    """

    @functools.wraps(func)
    def waiting(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return func(*args, **kwargs)
        except unittest.SkipTest:
            raise
        except BaseException:
            _show_and_wait(traceback.format_exc())
            raise

    return waiting


def _show_and_wait(text: str) -> None:
    try:
        # not stdin, which pytest captures
        terminal = os.open("/dev/tty", os.O_RDWR)
    except OSError:
        return
    try:
        os.write(terminal, f"\n{text}\nPress return to go on: ".encode())
        os.read(terminal, 1024)
    finally:
        os.close(terminal)
