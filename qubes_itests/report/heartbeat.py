"""A sign of life while a test runs: what it is, for how long, what is waited for."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from typing import TYPE_CHECKING, TextIO

from qubes_itests.report.names import one_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Heartbeat", "LastWords", "duration"]

#: Seconds between two lines where there is no terminal.
_PLAIN_INTERVAL = 30.0
_TERMINAL_INTERVAL = 0.25
_WIDEST = 400
_LOGS = ("qubes_itests", "qubes")


class LastWords(logging.Handler):
    """Remembers what the harness last logged: that is what it is doing."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        """Take a record's message, as one short line of printable characters."""
        self.text = one_line(record.getMessage(), _WIDEST)

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Hear what the harness and its core log, whatever level is set for them."""
        logs = [logging.getLogger(name) for name in _LOGS]
        levels = [log.level for log in logs]
        for log in logs:
            log.addHandler(self)
            log.setLevel(min(log.level, logging.INFO) or logging.INFO)
        try:
            yield
        finally:
            for log, level in zip(logs, levels, strict=True):
                log.removeHandler(self)
                log.setLevel(level)


class Heartbeat:
    """Shows a line about each thing that runs, from its own thread.

    On a terminal the lines are drawn at the bottom and vanish; elsewhere all of them
    are printed as one, half a minute after what was shown last.

    :param output: a text stream that goes where people look, whatever is captured.
    :param doing: returns what is being waited for, or an empty string.
    """

    def __init__(self, output: TextIO, doing: Callable[[], str]) -> None:
        self._output = output
        self._doing = doing
        self._live = output.isatty() and os.environ.get("TERM") != "dumb"
        self._running: dict[str, float] = {}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, what: str) -> None:
        """Begin to show that something runs, beside what else does."""
        with self.silent():
            self._running[what] = time.monotonic()

    def end(self, what: str) -> None:
        """Show no longer that something runs."""
        with self.silent():
            self._running.pop(what, None)

    def stop(self) -> None:
        """Show nothing any more; the terminal's line is free when this returns."""
        with self.silent():
            self._running.clear()

    @contextlib.contextmanager
    def silent(self) -> Iterator[None]:
        """Show nothing meanwhile, so that there is room for a line of others."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        yield
        if self._running:
            self._stop = threading.Event()
            target = self._draw if self._live else self._print
            self._thread = threading.Thread(
                target=target, args=(self._stop,), daemon=True, name="heartbeat"
            )
            self._thread.start()

    def _lines(self) -> list[str]:
        now = time.monotonic()
        running = [f"{what}  {duration(now - t)}" for what, t in self._running.items()]
        return [*running[:-1], f"{running[-1]}  {self._doing()}".rstrip()]

    def _print(self, stop: threading.Event) -> None:
        while not stop.wait(_PLAIN_INTERVAL):
            said = ", ".join(self._lines())
            print(f"  … running: {said}", file=self._output, flush=True)

    def _draw(self, stop: threading.Event) -> None:
        from rich.console import Console  # noqa: PLC0415 - 50 ms that a CI run saves
        from rich.live import Live  # noqa: PLC0415
        from rich.spinner import Spinner  # noqa: PLC0415
        from rich.text import Text  # noqa: PLC0415

        console = Console(file=self._output, force_terminal=True, highlight=False)
        spinner = Spinner("dots", style="status.spinner")
        # sys.stdout is pytest's, which replaces it to capture: what is put there from
        # this thread meanwhile would stay when pytest believes to have its own back.
        with Live(
            spinner,
            console=console,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        ):
            while not stop.wait(_TERMINAL_INTERVAL):
                said = "\n".join(self._lines())
                spinner.update(text=Text(said, no_wrap=True, overflow="ellipsis"))


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
