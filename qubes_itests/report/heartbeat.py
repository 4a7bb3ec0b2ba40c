"""A sign of life: a line about what goes on, drawn or printed now and then."""

from __future__ import annotations

import contextlib
import os
import queue
import sys
import threading
from typing import TYPE_CHECKING, TextIO

from qubes_itests.timeline.words import cut

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Heartbeat", "duration", "real_stdout"]

#: Seconds between two lines where there is no terminal.
_PLAIN_INTERVAL = 30.0
_TERMINAL_INTERVAL = 0.25
_USUAL_COLUMNS = 80
#: Lines that wait for a terminal that is stopped (Ctrl-S); more are dropped.
_MOST_LINES = 1000
#: To the beginning of the line, and drop what is on it.
_ERASE = "\r\x1b[K"


class Heartbeat:
    """Shows a line about what goes on, from its own thread.

    On a terminal it is drawn at the bottom, as wide as that is, and vanishes; elsewhere
    it is printed, half a minute after what was shown last. Nobody but its thread
    writes: what a terminal blocks that is stopped must not be the event loop.

    :param output: a text stream that goes where people look, whatever is captured.
    :param text: returns the line; nothing is shown for an empty one.
    """

    def __init__(self, output: TextIO, text: Callable[[], str]) -> None:
        self._output = output
        self._text = text
        self._live = output.isatty() and os.environ.get("TERM") != "dumb"
        self._drawn = False
        self._silent = 0
        #: Lines of others; None ends the thread. It takes no lock that a signal's
        #: handler, which reports as well, could find taken in its own thread.
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to show it."""
        if self._thread is None and not self._silent:
            self._thread = threading.Thread(
                target=self._show, daemon=True, name="heartbeat"
            )
            self._thread.start()

    def stop(self) -> None:
        """Show nothing any more; the terminal's line is free when this returns."""
        if self._thread is not None:
            thread, self._thread = self._thread, None
            self._lines.put(None)
            thread.join()

    @contextlib.contextmanager
    def silent(self) -> Iterator[None]:
        """Show nothing meanwhile, so that there is room for others."""
        was_shown = self._thread is not None
        self.stop()
        self._silent += 1
        try:
            yield
        finally:
            self._silent -= 1
            if was_shown:
                self.start()

    def write(self, line: str) -> None:
        """Have a separate line shown soon, from any thread; none while it is silent."""
        if self._thread is not None and self._lines.qsize() < _MOST_LINES:
            self._lines.put(line)

    def _show(self) -> None:
        interval = _TERMINAL_INTERVAL if self._live else _PLAIN_INTERVAL
        while True:
            try:
                line = self._lines.get(timeout=interval)
            except queue.Empty:
                line = ""
            # a terminal or a reader that has gone: pytest will find it out
            with contextlib.suppress(OSError):
                if line == "":
                    self._draw()
                else:
                    self._erase()
                    if line is not None:
                        print(line, file=self._output, flush=True)
            if line is None:
                return

    def _draw(self) -> None:
        text = self._text()
        if not text:
            self._erase()
        elif self._live:
            # asked each time: people resize their terminals
            self._output.write(f"{_ERASE}{cut(text, _columns(self._output) - 1)}")
            self._output.flush()
            self._drawn = True
        else:
            print(f"  … {text}", file=self._output, flush=True)

    def _erase(self) -> None:
        if self._drawn:
            self._output.write(_ERASE)
            self._output.flush()
            self._drawn = False


def _columns(output: TextIO) -> int:
    try:
        return os.get_terminal_size(output.fileno()).columns or _USUAL_COLUMNS
    except (OSError, ValueError):
        return _USUAL_COLUMNS


def duration(seconds: float) -> str:
    """Return a time as people read it: ``0.4 s``, ``12 s``, ``3 min 05 s``."""
    if seconds < 10:  # noqa: PLR2004
        return f"{seconds:.1f} s"
    if seconds < 60:  # noqa: PLR2004
        return f"{seconds:.0f} s"
    return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"


def real_stdout() -> TextIO:
    """Return a stream to this process's present output that captures do not move."""
    sys.stdout.flush()
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return os.fdopen(os.dup(1), "w", encoding=encoding, errors="replace")
