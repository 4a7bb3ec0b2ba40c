"""Errors of memory balancing.

::

    HarnessError
     +-- MemoryRefusedError       there is not enough memory for a VM
     +-- DomainGoneError          a domain ended while it was dealt with
     +-- TimelineError            a file is no timeline
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qubes_itests.exc import HarnessError
from qubes_itests.qmemman.sizes import mib

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = [
    "DomainGoneError",
    "MemoryRefusedError",
    "TimelineError",
    "too_small",
]

_MOST_HOLDERS = 10


class MemoryRefusedError(HarnessError):
    """There is not enough memory for a VM.

    :param asked: what it asked for, bytes.
    :param obtainable: what could have been had: free memory and what others can
        spare, bytes; None when the daemon did not tell.
    :param holders: what is held, in bytes, by the domains' names.
    """

    def __init__(
        self, asked: int, obtainable: int | None, holders: Mapping[str, int]
    ) -> None:
        largest = sorted(holders.items(), key=lambda item: -item[1])
        shown = [f"{name} {mib(held)}" for name, held in largest[:_MOST_HOLDERS]]
        if len(largest) > _MOST_HOLDERS:
            shown.append(f"{len(largest) - _MOST_HOLDERS} more")
        message = f"not enough memory: {mib(asked)} asked"
        if obtainable is not None:
            message += f", {mib(obtainable)} obtainable"
        if shown:
            message += f"; held by {', '.join(shown)}"
        super().__init__(f"{message}. Shut a VM down, or give this one less memory.")
        self.asked = asked
        self.obtainable = obtainable
        self.holders = dict(holders)


class DomainGoneError(HarnessError):
    """A domain ended while it was dealt with.

    :param domid: its number.
    """

    def __init__(self, domid: str) -> None:
        super().__init__(f"domain {domid} is gone")
        self.domid = domid


class TimelineError(HarnessError):
    """A file is not a timeline of memory.

    :param path: the file.
    :param problem: what is wrong with it.
    """

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"{path} is not a timeline of memory: {problem}")
        self.path = path
        self.problem = problem


def too_small(total: int, dom0: int, dom0_used: int = 0) -> HarnessError:
    """Return the error for a machine whose memory does not even hold dom0.

    :param total: memory of the machine, bytes.
    :param dom0: what dom0 holds, bytes.
    :param dom0_used: what dom0 uses, bytes, if that is what is wrong.
    """
    if 0 <= dom0_used <= dom0:
        return HarnessError(
            f"a machine of {mib(total)} cannot hold a dom0 of {mib(dom0)}: give it more"
            " memory, or a smaller dom0"
        )
    return HarnessError(
        f"a dom0 of {mib(dom0)} cannot use {mib(dom0_used)}: give it more memory, or"
        " have it use less"
    )
