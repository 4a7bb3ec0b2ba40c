"""Errors of disks that fail on purpose.

::

    HarnessError
     +-- FaultDiskError       the process behind a disk does not obey
     +-- CrashStateError      something does not survive a power cut
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qubes_itests.exc import HarnessError

if TYPE_CHECKING:
    from qubes_itests.faultdisk.crash import CrashState

__all__ = ["CrashStateError", "FaultDiskError"]


class FaultDiskError(HarnessError):
    """The process behind a disk does not obey an order.

    :param reason: what was asked of it, and what became of that.
    :param log: the end of what the process wrote to its standard error.
    """

    def __init__(self, reason: str, log: str = "") -> None:
        super().__init__(f"{reason}: {log or '(its process was silent)'}")
        self.reason = reason
        self.log = log


class CrashStateError(HarnessError):
    """Something does not survive a power cut.

    :param state: what the disk holds after it.
    :param step: what failed: "mount", "check" or the name of the checking program.
    :param reason: the error's own words.
    :param checked: how many states were examined, this one included.
    :param replay: the command that examines just this state again; may be empty.
    """

    def __init__(
        self,
        state: CrashState,
        step: str,
        reason: str,
        *,
        checked: int = 1,
        replay: str = "",
    ) -> None:
        again = f"\nexamine it again with: {replay}" if replay else ""
        super().__init__(
            f"{step} fails after a power cut ({state}; state {checked} of those"
            f" examined): {reason}{again}"
        )
        self.state = state
        self.step = step
        self.reason = reason
        self.checked = checked
        self.replay = replay
