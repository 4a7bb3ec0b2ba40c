"""The end of what a guest printed on its console, for errors."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from qubes_itests.untrusted_text import safe_text

if TYPE_CHECKING:
    from qubes_itests.hypervisor.contract import Domain

__all__ = ["console_tail"]

_BYTES: Final = 16384
_LINES: Final = 20
#: What Linux prints when it gives up; registers and stacks follow.
_PANIC: Final = "Kernel panic - not syncing"


def console_tail(domain: Domain) -> str:
    """Return the last lines of a domain's console log; empty when there is none.

    After a kernel panic those are the lines around its beginning.
    """
    try:
        with domain.console_log().open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _BYTES))
            data = file.read(_BYTES)
    except OSError:
        return ""
    text = safe_text(data, lines=True, limit=None)
    lines = text.splitlines()
    begin = last = max(0, len(lines) - _LINES)
    if domain.panicked:
        panics = (number for number, line in enumerate(lines) if _PANIC in line)
        begin = min(max(0, next(panics, last) - _LINES // 2), last)
    return "\n".join(lines[begin : begin + _LINES]).strip()
