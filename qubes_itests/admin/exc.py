"""The errors of the Admin API's server.

::

    HarnessError
     +-- FramingError            what a client sent is no request; nobody is answered
     +-- ProtocolError           a field that cannot be     (`qubes_itests.core.exc`)
     +-- PermissionDenied        a request that may not be  (`qubes_itests.core.exc`)
"""

from __future__ import annotations

from qubes_itests.core.exc import PermissionDenied, ProtocolError
from qubes_itests.exc import HarnessError

__all__ = ["FramingError", "PermissionDenied", "ProtocolError"]


class FramingError(HarnessError):
    """What a client sent is no request: the connection is closed.

    :param reason: what is wrong with it.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(f"no request of the Admin API: {reason}")
        self.reason = reason
