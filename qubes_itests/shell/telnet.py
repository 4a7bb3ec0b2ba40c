"""As much of the telnet protocol (RFC 854, 855, 1073) as a terminal session takes.

The guest's busybox has a telnetd that serves one session over its stdio: with it come
a pseudo-terminal, job control and the window's size.
"""

from __future__ import annotations

import struct

__all__ = ["TelnetClient"]

_IAC, _DONT, _DO, _WONT, _WILL, _SB, _SE = 255, 254, 253, 252, 251, 250, 240
_ECHO, _SUPPRESS_GO_AHEAD, _WINDOW_SIZE = 1, 3, 31
#: What the server may do, and what we do when we are asked.
_ALLOWED = (_ECHO, _SUPPRESS_GO_AHEAD)


class TelnetClient:
    """Translates between a terminal and a telnet server.

    The server is a guest: whatever it sends, little is kept and nothing fails.

    :param columns: of the terminal.
    :param rows: of the terminal.
    """

    def __init__(self, columns: int, rows: int) -> None:
        self._size = (columns, rows)
        self._pending = b""
        self._answered: set[tuple[int, int]] = set()
        self._sizes_wanted = False

    def receive(self, data: bytes) -> tuple[bytes, bytes]:
        """Return what to show, and what to answer.

        :param data: bytes from the server, cut anywhere.
        """
        data = self._pending + data
        shown, answer = bytearray(), bytearray()
        position = 0
        while position < len(data):
            if data[position] != _IAC:
                end = data.find(_IAC, position)
                end = len(data) if end < 0 else end
                shown += data[position:end]
                position = end
                continue
            length = _command_length(data, position)
            if length == 0:
                break
            command = data[position : position + length]
            if command == bytes((_IAC, _IAC)):
                shown.append(_IAC)
            answer += self._answer(command)
            position += length
        self._pending = data[position:]
        return bytes(shown), bytes(answer)

    def typed(self, data: bytes) -> bytes:
        """Return what to send for bytes from the keyboard."""
        return data.replace(b"\xff", b"\xff\xff")

    def resized(self, columns: int, rows: int) -> bytes:
        """Return what to send when the terminal has a new size."""
        self._size = (columns, rows)
        return self._window_size() if self._sizes_wanted else b""

    def _answer(self, command: bytes) -> bytes:
        if len(command) != 3:  # noqa: PLR2004 - IAC, verb, option
            return b""
        _, verb, option = command
        # To answer an answer would go on for ever.
        if verb not in (_DO, _WILL) or (verb, option) in self._answered:
            return b""
        self._answered.add((verb, option))
        if verb == _DO and option == _WINDOW_SIZE:
            self._sizes_wanted = True
            return bytes((_IAC, _WILL, option)) + self._window_size()
        if verb == _DO:
            return bytes((_IAC, _WONT, option))
        return bytes((_IAC, _DO if option in _ALLOWED else _DONT, option))

    def _window_size(self) -> bytes:
        columns, rows = (min(max(n, 1), 0xFFFF) for n in self._size)
        size = self.typed(struct.pack(">HH", columns, rows))
        return bytes((_IAC, _SB, _WINDOW_SIZE)) + size + bytes((_IAC, _SE))


def _command_length(data: bytes, start: int) -> int:
    """Return the length of the command at `start`, 0 if its end has not come yet."""
    if len(data) < start + 2:
        return 0
    verb = data[start + 1]
    if verb == _SB:
        # Nothing that we offered has one; a server that never ends it shows nothing.
        end = data.find(bytes((_IAC, _SE)), start)
        return 0 if end < 0 and len(data) - start < 1024 else max(end + 2 - start, 2)  # noqa: PLR2004
    length = 3 if verb in (_DO, _DONT, _WILL, _WONT) else 2
    return length if len(data) >= start + length else 0
