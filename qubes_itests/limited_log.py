"""Limited logs, for records that guests and clients can provoke at will."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Final

__all__ = ["LimitedLog"]

#: Records of one source that are logged within the time below.
_BURST: Final = 30
#: Seconds.
_INTERVAL: Final = 10.0
#: Sources that are remembered; names of disposable VMs come and go.
_MOST_SOURCES: Final = 1024


@dataclass(slots=True)
class _Window:
    begin: float
    records: int = 0


class LimitedLog:
    """Passes records on to a log, of each source so many within some seconds.

    Where it leaves out some, a record says so, and the next one how many there were.

    :param log: gets them.
    """

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._windows: dict[str, _Window] = {}

    def info(self, source: str, message: str, *args: object) -> None:
        """Log what a source is the reason of.

        :param source: name of a VM, say; each is counted by itself.
        """
        self._pass_on(logging.INFO, source, message, args)

    def warning(self, source: str, message: str, *args: object) -> None:
        """Do the same as `info`, with more weight."""
        self._pass_on(logging.WARNING, source, message, args)

    def _pass_on(
        self, level: int, source: str, message: str, args: tuple[object, ...]
    ) -> None:
        now = time.monotonic()
        window = self._windows.get(source)
        if window is None or now - window.begin >= _INTERVAL:
            if window is not None and (dropped := window.records - _BURST) > 0:
                self._log.log(
                    level, "%d records about %s were left out", dropped, _name(source)
                )
            window = self._begin(source, now)
        window.records += 1
        if window.records <= _BURST:
            self._log.log(level, message, *args, stacklevel=3)
        elif window.records == _BURST + 1:
            self._log.log(
                level,
                "more than %d records about %s within %g s: others are left out",
                _BURST,
                _name(source),
                _INTERVAL,
            )

    def _begin(self, source: str, now: float) -> _Window:
        if len(self._windows) >= _MOST_SOURCES:
            self._windows = {
                name: window
                for name, window in self._windows.items()
                if now - window.begin < _INTERVAL
            }
        window = self._windows[source] = _Window(now)
        return window


def _name(source: str) -> str:
    return source or "all"
