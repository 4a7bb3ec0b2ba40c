"""The errors of the portal.

::

    HarnessError
     +-- PortalError
          +-- LoopThreadError         a synchronous call from the loop's own thread
          +-- PortalClosedError       a call before the start or after the end
          +-- RefusedLoopCallError    what a loop shared with others cannot do
"""

from __future__ import annotations

from qubes_itests.exc import HarnessError

__all__ = [
    "LoopThreadError",
    "PortalClosedError",
    "PortalError",
    "RefusedLoopCallError",
]


class PortalError(HarnessError, RuntimeError):
    """The base of the portal's errors; a RuntimeError, as asyncio's own are."""


class LoopThreadError(PortalError):
    """A synchronous call was made on the event loop's own thread.

    :param call: what was called.
    """

    def __init__(self, call: str) -> None:
        super().__init__(
            f"{call} was called on the event loop's own thread, where waiting for it"
            " would stop the loop for ever; await the coroutine instead, or call from"
            " another thread (asyncio.to_thread)"
        )
        self.call = call


class PortalClosedError(PortalError):
    """The portal's loop does not run.

    :param call: what was called.
    """

    def __init__(self, call: str) -> None:
        super().__init__(
            f"{call} was called while the portal's event loop does not run;"
            " use it inside `with Portal()`"
        )
        self.call = call


class RefusedLoopCallError(PortalError):
    """Something was asked of the loop that would break it for everybody else.

    :param call: what was called.
    :param advice: what to do instead.
    """

    def __init__(self, call: str, advice: str) -> None:
        super().__init__(
            f"{call} cannot work here: the event loop runs in a thread of its own and"
            f" is shared with the virtual machines; {advice}"
        )
        self.call = call
        self.advice = advice
