"""A program on a pseudo-terminal, and somebody who types and reads there."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import termios
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


class TerminalUser:
    """A program whose controlling terminal is a new one, and what it shows there.

    :param command: the program and its arguments.
    :param directory: where it is started.
    :param environment: its variables.
    :param timeout: seconds that any of what is waited for may take.
    :param size: columns and rows.
    """

    def __init__(
        self,
        command: list[str],
        directory: Path,
        environment: Mapping[str, str],
        timeout: float = 600.0,
        size: tuple[int, int] = (100, 30),
    ) -> None:
        self._timeout = timeout
        self._status: int | None = None
        #: All that was shown.
        self.shown = b""
        self._seen = 0
        self.pid, self._terminal = pty.fork()
        if self.pid == 0:
            try:
                os.chdir(directory)
                os.execve(command[0], command, {**environment, "TERM": "vt220"})  # noqa: S606
            finally:
                os._exit(127)
        self.resize(*size)
        #: What `stty` would say before the program changed anything.
        self.modes = self.present_modes()

    def signal(self, number: int) -> None:
        """Send the program a signal."""
        os.kill(self.pid, number)

    def close(self) -> None:
        """Kill the program if it has not ended, and close the terminal."""
        if self._status is None:
            self.signal(signal.SIGKILL)
            os.waitpid(self.pid, 0)
        self.hang_up()

    def present_modes(self) -> list[object]:
        """Return the modes of the terminal."""
        return termios.tcgetattr(self._terminal)

    def resize(self, columns: int, rows: int) -> None:
        """Have the window be of another size."""
        fcntl.ioctl(
            self._terminal, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0)
        )

    def type(self, keys: str) -> None:
        """Press keys, one after the other."""
        data = keys.encode()
        while data:
            data = data[os.write(self._terminal, data) :]

    def read_until(self, text: str) -> str:
        """Return what is shown from where this was last called, up to that text."""
        end = time.monotonic() + self._timeout
        while (found := self.shown.find(text.encode(), self._seen)) < 0:
            ready = select.select([self._terminal], [], [], end - time.monotonic())
            assert ready[0], f"no {text!r} at the end of {self.shown[-2000:]!r}"
            assert self._read(), f"the end, and no {text!r} in {self.shown!r}"
        before, self._seen = self._seen, found + len(text.encode())
        return self.shown[before : self._seen].decode(errors="replace")

    def finish(self) -> int:
        """Return the exit status when the program has ended."""
        end = time.monotonic() + self._timeout
        while self._status is None:
            # What nobody reads would hold it up.
            if self._terminal < 0:
                time.sleep(0.02)
            elif select.select([self._terminal], [], [], 0.02)[0]:
                self._read()
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._status = os.waitstatus_to_exitcode(status)
            assert time.monotonic() < end, f"no end after {self.shown[-2000:]!r}"
        while self._terminal >= 0 and self._read():
            pass
        return self._status

    def hang_up(self) -> None:
        """Close the window."""
        if self._terminal >= 0:
            os.close(self._terminal)
            self._terminal = -1

    def _read(self) -> bytes:
        try:
            data = os.read(self._terminal, 65536)
        except OSError:  # EIO: nobody has it open
            data = b""
        self.shown += data
        return data
