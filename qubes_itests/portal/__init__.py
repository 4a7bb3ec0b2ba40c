"""The event loop in a separate thread, for synchronous code that may block.

::

    with Portal() as portal:
        portal.run(coroutine(), timeout=10)   # from any thread but the loop's own
        portal.facade                         # for code that wants an event loop
"""

from __future__ import annotations

from .exc import PortalError
from .thread import BackgroundFailure, Portal

__all__ = [
    "BackgroundFailure",
    "Portal",
    "PortalError",
]
