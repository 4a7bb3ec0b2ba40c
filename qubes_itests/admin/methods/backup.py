"""Methods on backups: there are none here, and each says so."""

from __future__ import annotations

from qubes_itests.admin.dispatch import Call, Destination, method
from qubes_itests.admin.validation import printable
from qubes_itests.core.exc import QubesNotImplementedError

__all__: list[str] = []


@method(
    "admin.backup.Cancel",
    "admin.backup.Execute",
    "admin.backup.Info",
    destination=Destination.DOM0,
    argument=lambda call: call.raw_argument,
    payload=printable,
)
def refuse(call: Call) -> None:
    """Say that backups are not available."""
    call.permit()
    raise QubesNotImplementedError(
        f"{call.method} is not available: this system makes no backups"
    )
