"""A shell's session: a person's terminal here, one of the agent in the guest."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from typing import TYPE_CHECKING, Protocol

from qubes_itests.guest.exc import GuestGoneError
from qubes_itests.guest.link.descriptors import OutputDescriptor
from qubes_itests.shell.terminal import raw_terminal, size

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from qubes_itests.guest.link.agent import GuestAgent
    from qubes_itests.guest.link.descriptors import Readable
    from qubes_itests.portal import Portal
    from qubes_itests.shell.terminal import RawTerminal

__all__ = ["WAY_OUT", "Keyboard", "Keys", "Terminal", "open_session", "open_shell"]

#: The way out of a shell, as the end of a sentence.
WAY_OUT = "~. at the beginning of a line leaves it if it is stuck"
#: Exit status of a shell that did not come to its own end.
_LOST = 255
_TILDE, _FULL_STOP = b"~."
_CHUNK = 4096
#: Bytes of keys that wait for a guest. Beyond that they are dropped: to leave them in
#: the terminal would be to leave there, too, the keys that end the session.
_BACKLOG = 1 << 20


class Keyboard(Protocol):
    """Where keys go."""

    @property
    def backlog(self) -> int:
        """How many bytes wait to be taken by the guest."""

    def write(self, data: bytes, /) -> None:
        """Send bytes, now or as the guest takes them."""


class Terminal(Protocol):
    """What a session needs of a terminal in a guest, as `GuestTerminal` has it."""

    @property
    def stdin(self) -> Keyboard:
        """Where keys go."""

    @property
    def stdout(self) -> Readable:
        """What is shown."""

    @property
    def failure(self) -> str:
        """Why nothing was started, if that is so."""

    async def wait(self) -> int:
        """Return the exit status when the shell has ended and all was read."""

    def resize(self, columns: int, rows: int) -> None:
        """Give it another size."""

    def leave(self) -> None:
        """End what runs on it, if it has not ended."""


def open_shell(portal: Portal, agent: GuestAgent) -> int:
    """Let the person at the terminal use a root shell in a VM; see `open_session`.

    :param portal: runs the agent's loop.
    :param agent: of a running VM.
    """

    def opened(columns: int, rows: int, name: str) -> Awaitable[Terminal]:
        environment = {"TERM": name}
        return agent.open_terminal(
            columns=columns, rows=rows, user="root", environment=environment
        )

    return open_session(portal, opened)


def open_session(
    portal: Portal, opened: Callable[[int, int, str], Awaitable[Terminal]]
) -> int:
    """Let the person at the terminal use one of a guest. In the main thread.

    The guest's bytes go to the terminal as they are, as those of any shell do.

    :param portal: runs the loop.
    :param opened: opens the guest's; given columns, rows, and the terminal's type.
    :return: the shell's exit status, 128 + N when signal N killed it; 255 when it was
        left, or the guest went away.
    :raise OSError: the terminal has gone.
    """
    session = _Session(portal)
    try:
        with raw_terminal(session.resized) as terminal:
            status = portal.run(session.run(opened, terminal))
    except GuestGoneError as error:
        status, session.said = _LOST, str(error)
    if session.said:
        print(f"\n{session.said}", flush=True)  # noqa: T201
    return status if status >= 0 else 128 - status


class Keys:
    """Finds among what is typed the keys that leave a session: as of ssh, ``~.``.

    At the beginning of a line only; ``~~`` is one tilde there.
    """

    def __init__(self) -> None:
        self._at_start = True
        self._after_tilde = False

    def take(self, data: bytes) -> tuple[bytes, bool]:
        """Return what goes to the guest, and whether the session is to be left."""
        passed = bytearray()
        for key in data:
            if self._after_tilde:
                self._after_tilde = False
                if key == _FULL_STOP:
                    return bytes(passed), True
                if key != _TILDE:
                    passed.append(_TILDE)
            elif self._at_start and key == _TILDE:
                self._after_tilde = True
                continue
            passed.append(key)
            self._at_start = key in b"\r\n"
        return bytes(passed), False


class _Session:
    def __init__(self, portal: Portal) -> None:
        #: What to tell about its end.
        self.said = ""
        self._portal = portal
        self._keys = Keys()
        self._guest: Terminal | None = None

    def resized(self) -> None:
        """Pass the terminal's new size on. From a signal handler."""
        # The handler interrupts the main thread anywhere, locks in hand; this call
        # takes none that it could have. What is sent is sent by the loop's thread.
        self._portal.loop.call_soon_threadsafe(self._resize)

    def _resize(self) -> None:
        if self._guest is not None:
            self._guest.resize(*size())

    async def run(
        self,
        opened: Callable[[int, int, str], Awaitable[Terminal]],
        terminal: RawTerminal,
    ) -> int:
        """Return the shell's exit status when it has ended, or was left."""
        kind = os.environ.get("TERM", "")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,40}", kind):
            kind = "linux"
        guest = self._guest = await opened(*size(), kind)
        loop = asyncio.get_running_loop()
        left: asyncio.Future[int] = loop.create_future()
        ended = loop.create_task(_show(guest, terminal))
        # Not before the shell is there: what is typed meanwhile waits in the terminal.
        loop.add_reader(terminal.input, self._typed, guest, terminal, left)
        try:
            await asyncio.wait({ended, left}, return_when=asyncio.FIRST_COMPLETED)
            if left.done():
                return left.result()
            self.said = guest.failure
            return ended.result()
        finally:
            # Before the descriptor is closed: the loop would watch the next one of its
            # number.
            loop.remove_reader(terminal.input)
            guest.leave()
            # Nothing of it may be shown when the terminal is no longer raw.
            ended.cancel()
            await asyncio.gather(ended, return_exceptions=True)

    def _typed(
        self,
        guest: Terminal,
        terminal: RawTerminal,
        left: asyncio.Future[int],
    ) -> None:
        try:
            data = os.read(terminal.input, _CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        keys, leave = self._keys.take(data)
        if left.done():
            # the reader stays until `run` has its turn
            return
        if leave or not data:
            self.said = "The shell was left." if leave else "The terminal has gone."
            left.set_result(_LOST)
        elif guest.stdin.backlog + len(keys) <= _BACKLOG:
            guest.stdin.write(keys)
        else:
            with contextlib.suppress(OSError):
                os.write(terminal.output, b"\a")


async def _show(guest: Terminal, terminal: RawTerminal) -> int:
    await OutputDescriptor(terminal.output).take(guest.stdout)
    return await guest.wait()
