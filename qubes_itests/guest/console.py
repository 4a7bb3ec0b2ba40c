"""The end of what a guest printed on its console, for errors."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from qubes_itests.guest.frames import printable

if TYPE_CHECKING:
    from pathlib import Path

    from qubes_itests.hypervisor.contract import Domain

__all__ = ["console_tail"]

_BYTES: Final = 4096
_LINES: Final = 20


def console_tail(domain: Domain) -> str:
    """Return the last lines of a domain's console log; empty when there is none."""
    return _tail(domain.console_log())


def _tail(path: Path) -> str:
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _BYTES))
            data = file.read(_BYTES)
    except OSError:
        return ""
    text = data.decode(errors="replace").replace("\r\n", "\n")
    return printable("\n".join(text.splitlines()[-_LINES:])).strip()
