"""The error of the portal."""

from __future__ import annotations

from qubes_itests.exc import HarnessError

__all__ = ["PortalError"]


class PortalError(HarnessError, RuntimeError):
    """A call that cannot work; a RuntimeError, as those of asyncio's own loops are.

    :param call: what was called.
    :param reason: why it cannot work, and what to do instead.
    """

    def __init__(self, call: str, reason: str) -> None:
        super().__init__(f"{call} {reason}")
        self.call = call
