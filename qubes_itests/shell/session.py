"""A shell's session: a person's terminal here, one of the agent in the guest."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from typing import TYPE_CHECKING

from qubes_itests.guest.exc import GuestGoneError
from qubes_itests.guest.link.descriptors import OutputDescriptor
from qubes_itests.shell.terminal import raw_terminal, size

if TYPE_CHECKING:
    from qubes_itests.guest.link.agent import GuestAgent
    from qubes_itests.guest.link.process import GuestTerminal
    from qubes_itests.portal import Portal
    from qubes_itests.shell.terminal import RawTerminal

__all__ = ["WAY_OUT", "Keys", "open_shell"]

#: What to tell whoever gets a shell, in words that go on a sentence.
WAY_OUT = "~. at the beginning of a line leaves it if it is stuck"
#: Exit status of a shell that did not come to its own end.
_LOST = 255
_TILDE, _FULL_STOP = b"~."
_CHUNK = 4096
#: Bytes of keys that wait for a guest. Beyond that they are dropped: to leave them in
#: the terminal would be to leave there, too, the keys that end the session.
_BACKLOG = 1 << 20


def open_shell(portal: Portal, agent: GuestAgent) -> int:
    """Let the person at the terminal use a root shell in a VM. In the main thread.

    The guest's bytes go to the terminal as they are, as those of any shell do.

    :param portal: runs the agent's loop.
    :param agent: of a running VM.
    :return: the shell's exit status, 128 + N when signal N killed it; 255 when it was
        left, or the guest went away.
    :raise OSError: the terminal has gone.
    """
    session = _Session(portal)
    try:
        with raw_terminal(session.resized) as terminal:
            status = portal.run(session.run(agent, terminal))
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
        self._process: GuestTerminal | None = None

    def resized(self) -> None:
        """Pass the terminal's new size on. From a signal handler."""
        self._portal.loop.call_soon_threadsafe(self._resize)

    def _resize(self) -> None:
        if self._process is not None:
            self._process.resize(*size())

    async def run(self, agent: GuestAgent, terminal: RawTerminal) -> int:
        """Return the shell's exit status when it has ended, or was left."""
        columns, rows = size()
        environment = {"TERM": _terminal_type()}
        process = await agent.open_terminal(
            columns=columns, rows=rows, user="root", environment=environment
        )
        self._process = process
        loop = asyncio.get_running_loop()
        left: asyncio.Future[int] = loop.create_future()
        ended = loop.create_task(_show(process, terminal))
        loop.add_reader(terminal.input, self._typed, process, terminal, left)
        try:
            await asyncio.wait({ended, left}, return_when=asyncio.FIRST_COMPLETED)
            if left.done():
                return left.result()
            self.said = process.failure
            return ended.result()
        finally:
            loop.remove_reader(terminal.input)
            if process.returncode is None:
                # in this order: a terminal that is hung up has no foreground to kill
                process.kill()
                process.hang_up()
            # Nothing of it may be shown when the terminal is no longer raw.
            ended.cancel()
            await asyncio.gather(ended, return_exceptions=True)

    def _typed(
        self,
        process: GuestTerminal,
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
            return
        if leave or not data:
            self.said = "The shell was left." if leave else "The terminal has gone."
            left.set_result(_LOST)
        elif process.stdin.backlog + len(keys) <= _BACKLOG:
            process.stdin.write(keys)
        else:
            with contextlib.suppress(OSError):
                os.write(terminal.output, b"\a")


async def _show(process: GuestTerminal, terminal: RawTerminal) -> int:
    await OutputDescriptor(terminal.output).take(process.stdout)
    return await process.wait()


def _terminal_type() -> str:
    name = os.environ.get("TERM", "")
    return name if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,40}", name) else "linux"
