"""The end of what a guest printed on its console, for errors."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from qubes_itests.guest.frames import printable

if TYPE_CHECKING:
    from pathlib import Path

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
    return printable("\n".join(_telling(text.splitlines()))).strip()


def _telling(lines: list[str]) -> list[str]:
    panics = (number for number, line in enumerate(lines) if _PANIC in line)
    begin = next(panics, len(lines)) - _LINES // 2
    last = max(0, len(lines) - _LINES)
    begin = min(max(0, begin), last)
    return lines[begin : begin + _LINES]
