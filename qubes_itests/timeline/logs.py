"""What the harness and its core log, as a part of the timeline."""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, Final

from qubes_itests.timeline.recorder import note

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["recording_logs"]

_LOGS: Final = ("qubes_itests", "qubes")


class _Handler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = record.getMessage()
        except Exception as error:  # noqa: BLE001 - as logging has it: a bad format
            line = f"{record.msg!r}: {error}"
        note("log", level=record.levelname, logger=record.name, line=line)


@contextlib.contextmanager
def recording_logs() -> Iterator[None]:
    """Report what the harness and its core log, at the levels that are set for them."""
    handler = _Handler()
    logs = [logging.getLogger(name) for name in _LOGS]
    for log in logs:
        log.addHandler(handler)
    try:
        yield
    finally:
        for log in logs:
            log.removeHandler(handler)
