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
        note("log", level=record.levelname, logger=record.name, line=_message(record))


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except Exception as error:  # noqa: BLE001 - as logging itself has it: a bad format
        return f"{record.msg!r}: {error}"


@contextlib.contextmanager
def recording_logs() -> Iterator[None]:
    """Report what is logged, whatever level is set for it, from INFO on."""
    handler = _Handler(logging.INFO)
    logs = [logging.getLogger(name) for name in _LOGS]
    levels = [log.level for log in logs]
    for log in logs:
        log.addHandler(handler)
        log.setLevel(min(log.level, logging.INFO) or logging.INFO)
    try:
        yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.removeHandler(handler)
            log.setLevel(level)
