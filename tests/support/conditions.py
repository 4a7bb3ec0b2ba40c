"""Waiting for what other processes do."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def deadlines(first: float) -> Iterator[float]:
    """Yield deadlines, each four times the one before.

    For what only its deadline ends, and of which a test wants to know how it is told
    when it has come to some point: on a slow machine it has in one of the later ones.

    :param first: seconds, enough on an ordinary machine.
    """
    return (first * 4**number for number in range(5))


def wait_until(
    condition: Callable[[], object], what: str, timeout: float = 300
) -> None:
    """Return when a condition holds.

    :param what: a noun phrase for the failure.
    :param timeout: seconds.
    """
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, f"no {what} within {timeout} s"
        time.sleep(0.02)
