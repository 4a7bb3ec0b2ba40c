"""What can be wrong with serving, and with calling who serves.

::

    HarnessError
     +-- ServeError      serving, or a call of who serves, cannot be done as asked
     +-- BadCallError    a program of the client tools asks for what cannot be
"""

from __future__ import annotations

from qubes_itests.exc import HarnessError
from qubes_itests.exit_codes import ExitCode

__all__ = ["BadCallError", "ServeError"]


class ServeError(HarnessError):
    """Serving, or a call of who serves, cannot be done as asked; it says why."""

    exit_code = ExitCode.USAGE_ERROR


class BadCallError(HarnessError):
    """A program of the client tools asks for what cannot be."""
