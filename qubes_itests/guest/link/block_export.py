"""A block device of a guest, for QEMU of another one: NBD on a socket of the host."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shlex
import socket
from typing import TYPE_CHECKING, Final

from qubes_itests.guest.exc import GuestError
from qubes_itests.guest.link.frames import Channel
from qubes_itests.limited_log import LimitedLog
from qubes_itests.untrusted_text import safe_text

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from qubes_itests.guest.link.agent import GuestAgent

__all__ = ["BlockExport", "giving_up"]

_limited = LimitedLog(logging.getLogger("qubes_itests.guest"))

_PROGRAM: Final = "/usr/lib/qubes/agent serve-block"
#: Bytes of what the program says about its troubles.
_SAID: Final = 1000
#: Seconds that QEMU waits for a guest: fewer than libvirt waits for QEMU, since who has
#: been told that it does not answer cannot know what it does afterwards.
_ANSWER: Final = 25.0


class BlockExport:
    """What the guest serves, on a socket, until `close`; for one client at a time.

    The agent's program in the guest speaks NBD over its input and output; the host
    passes bytes on and looks at none. When the guest ends, so does the connection.

    :param agent: of the guest that has the device.
    :param device: its path there.
    :param path: of the socket, which is made.
    :param read_only: whether clients may not write.
    :raise OSError: the socket cannot be made.
    """

    def __init__(
        self, agent: GuestAgent, device: str, path: Path, *, read_only: bool
    ) -> None:
        self.path = path
        self._agent = agent
        self._mode = "r" if read_only else "w"
        self._device = device
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.setblocking(False)
        self._socket.bind(os.fspath(path))
        self._socket.listen(1)
        self._accepting = asyncio.ensure_future(self._accept())
        # Not in `close`: the loop still watches the number then, which may be that of
        # another file at once.
        self._accepting.add_done_callback(lambda _done: self._socket.close())

    def close(self) -> None:
        """End the connection and remove the socket; a second call does nothing."""
        self._accepting.cancel()
        self.path.unlink(missing_ok=True)

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            connection, _ = await loop.sock_accept(self._socket)
            with connection:
                try:
                    await self._serve(connection)
                except GuestError as error:
                    _limited.info(self._agent.vm, "%s", str(error))

    async def _serve(self, connection: socket.socket) -> None:
        command = f"exec {_PROGRAM} {self._mode} {shlex.quote(self._device)}"
        process = await self._agent.spawn(command, user="root")
        try:
            process.read_from(connection.fileno())
            process.pass_on(Channel.STDOUT, connection.fileno())
            said = await process.stderr.read(_SAID)
            if said:
                name = self._agent.vm
                text = safe_text(said)
                _limited.warning(name, "%s of VM %s: %s", self._device, name, text)
                process.drop(Channel.STDERR)
            await process.wait()
        finally:
            process.hang_up()


@contextlib.contextmanager
def giving_up(export: BlockExport | None) -> Iterator[None]:
    """Have a disk come or go though the guest that serves it may not answer.

    QEMU of the VM that has it would wait for ever, and so would libvirt; when nobody
    serves any more, they go on.

    :param export: what is behind the disk; None if the host has that itself.
    """
    if export is None:
        yield
        return
    closing = asyncio.get_running_loop().call_later(_ANSWER, export.close)
    try:
        yield
    finally:
        closing.cancel()
