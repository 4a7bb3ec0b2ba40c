"""A root shell in a VM of a run: what ``qvm-console`` and ``attach`` give."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from qubes_itests.guest.exc import GuestGoneError
from qubes_itests.host import sandbox
from qubes_itests.portal import Portal
from qubes_itests.serve.wire import (
    EXIT,
    HEADER,
    RESIZE,
    STDERR,
    STDIN,
    TERMINAL,
    connectable,
    frame,
    read_header,
)
from qubes_itests.shell import WAY_OUT, open_session, require_terminal
from qubes_itests.untrusted_text import safe_text

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["open_console"]


def open_console(socket: Path, vm: str, what: str) -> int:
    """Let the person at the terminal use a root shell in a running VM.

    :param socket: that of the VM's `CallServer`.
    :param vm: the name of the VM.
    :param what: the command that opens the shell.
    :return: the exit status, as `open_session` has it.
    :raise UsageError: when nobody sits at one.
    """
    require_terminal(what)
    print(f"A root shell in {vm}. {WAY_OUT}.", flush=True)  # noqa: T201

    async def opened(columns: int, rows: int, name: str) -> _ServedTerminal:
        path = connectable(str(socket))
        terminal = _ServedTerminal(vm, *await asyncio.open_unix_connection(path))
        terminal.send(TERMINAL, f"{vm}\0{columns}x{rows}\0{name}".encode())
        return terminal

    # This process is in no sandbox, where a signal would end it as it is.
    with sandbox.interruptible(), Portal() as portal:
        return open_session(portal, opened)


class _ServedTerminal:
    """Stands for a `GuestTerminal`: its keys, its output and its end come as frames."""

    def __init__(
        self, vm: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.failure = ""
        self.stdin = self.stdout = self
        self._vm = vm
        self._reader = reader
        self._writer = writer
        self._status: int | None = None

    def send(self, kind: int, data: bytes) -> None:
        """Send a frame."""
        self._writer.write(frame(kind, data))

    @property
    def backlog(self) -> int:
        """How many bytes wait to be taken by the server."""
        return self._writer.transport.get_write_buffer_size()

    def write(self, data: bytes) -> None:
        """Send keys; none of them is no frame, for that would be their end."""
        if data:
            self.send(STDIN, data)

    async def read(self, _size: int) -> bytes:
        """Return output; nothing when the shell has ended.

        :raise GuestGoneError: the server has.
        """
        while self._status is None:
            try:
                header = await self._reader.readexactly(HEADER.size)
                kind, length = read_header(header)
                data = await self._reader.readexactly(length)
                if kind == EXIT:
                    self._status = int(data)
            except (EOFError, ConnectionError):
                raise GuestGoneError(self._vm, "the run has ended") from None
            except ValueError as error:
                reason = f"the run does not answer as runs do: {error}"
                raise GuestGoneError(self._vm, reason) from None
            if kind == EXIT:
                break
            if kind == STDERR:
                self.failure += safe_text(data.decode(errors="replace").strip())
            else:
                return data
        return b""

    async def wait(self) -> int:
        """Return the exit status."""
        while await self.read(0):
            pass
        assert self._status is not None  # noqa: S101 - set before the end
        return self._status

    def resize(self, columns: int, rows: int) -> None:
        """Give the terminal another size."""
        self.send(RESIZE, f"{columns}x{rows}".encode())

    def leave(self) -> None:
        """Have the server end what runs there: it notices that nobody listens."""
        self._writer.transport.abort()
