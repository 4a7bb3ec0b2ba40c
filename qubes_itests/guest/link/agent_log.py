"""The agent log: what a guest's agent has to tell, in a file of bounded size."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import IO, TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["AgentLog"]

#: Bytes after which a log takes no more: a guest must not fill the host's disk.
LIMIT: Final = 1 << 20


class AgentLog:
    """A file of lines with their time, that stops growing at 1 MiB.

    :param path: the file, made or appended to; None keeps nothing.
    """

    #: Is told each line that is kept, too.
    listener: Callable[[str], None] | None = None

    def __init__(self, path: Path | None) -> None:
        self._file: IO[str] | None = None
        self._room = 0
        if path is not None:
            self._file = path.open("a", encoding="utf-8", buffering=1)
            self._room = LIMIT - path.stat().st_size

    def write(self, line: str) -> None:
        """Add a line; dropped when the log is full or closed."""
        if self._file is None or self._room <= 0:
            return
        time = datetime.now(UTC).isoformat(sep=" ", timespec="milliseconds")
        entry = f"{time[:-6]} {line}\n"
        self._room -= len(entry.encode())
        self._file.write(entry)
        if self.listener is not None:
            self.listener(line)
        if self._room <= 0:
            self._file.write("the log is full; what follows is dropped\n")

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._file is not None:
            self._file.close()
            self._file = None
