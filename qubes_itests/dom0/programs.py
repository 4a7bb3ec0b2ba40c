"""The programs of dom0 that a core starts: qubesdb, qrexec, xl, systemctl.

Each is `client.py`, which hands its streams over. What it has to do is done here, on
the event loop, and its exit status is the answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from qubes_itests.dom0 import libvirt_module
from qubes_itests.dom0.place import UNITS, WANTED_UNITS
from qubes_itests.dom0.snapshots import create_snapshot, destroy_snapshot
from qubes_itests.dom0.stores import QubesDB
from qubes_itests.exc import HarnessError
from qubes_itests.guest.link.descriptors import OutputDescriptor
from qubes_itests.guest.link.frames import Channel
from qubes_itests.guest.start.boot import time_here

if TYPE_CHECKING:
    from collections.abc import Coroutine, Mapping, Sequence

    from qubes_itests.dom0.machine import Guest, Machine

__all__ = ["PROGRAMS", "QREXEC_SOCKETS", "SYSTEM", "Programs"]

log = logging.getLogger("qubes_itests.dom0")

#: Where they are.
PROGRAMS: Final = Path(__file__).with_name("bin")
_CLIENT: Final = Path(__file__).with_name("client.py")
#: As dom0 has them, before what a user has put there: a python3 that is a script which
#: looks for one is too slow for tests that call a service which they have just started.
SYSTEM: Final = ("/usr/sbin", "/usr/bin")
#: Where a core sees whether the qrexec of a VM is there.
QREXEC_SOCKETS: Final = Path("/run/qubes")
#: Bytes of the arguments and the variables of one call.
_LONGEST: Final = 1 << 17
#: Seconds for a program to say what it wants, once it has connected.
_TIMEOUT: Final = 10.0
#: What qrexec-daemon says with its exit status: no agent in time.
_NO_AGENT: Final = 3
#: Seconds for the agent, if the core says nothing.
_STARTUP: Final = 60.0
#: Seconds that no start in Qubes OS keeps to: a core that gives a VM fewer wants it to
#: fail. Here its guest may go on from a saved state, and be there at once.
_TOO_SHORT: Final = 5.0
#: Of a VM that starts with dom0.
_UNIT: Final = re.compile(r"qubes-vm@[^/]+\.service")
_USAGE: Final = 2
_GONE: Final = 255


class Programs:
    """Serves the programs of one machine; an asynchronous context manager.

    :param machine: that they work on.
    """

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._path = machine.directory / "programs.sock"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._accepting: asyncio.Task[None] | None = None
        self._calls: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> None:
        self._socket.setblocking(False)
        self._socket.bind(os.fspath(self._path))
        self._socket.listen(128)
        self._accepting = asyncio.ensure_future(self._accept())

    async def __aexit__(self, *_exc: object) -> None:
        tasks = [*filter(None, [self._accepting]), *self._calls]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._socket.close()

    def variables(self) -> dict[str, str]:
        """Return what the environment of the programs has to have."""
        path = [os.fspath(PROGRAMS), *SYSTEM, os.environ["PATH"]]
        return {
            "QUBES_ITESTS_PYTHON": sys.executable,
            # not by their own paths: some are links from where dom0 has them
            "QUBES_ITESTS_CLIENT": os.fspath(_CLIENT),
            "QUBES_ITESTS_DOM0": os.fspath(self._path),
            "PATH": os.pathsep.join(path),
        }

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            connection, _ = await loop.sock_accept(self._socket)
            call = loop.create_task(self._answer(connection))
            self._calls.add(call)
            call.add_done_callback(self._calls.discard)

    async def _answer(self, connection: socket.socket) -> None:
        #: What is in here is closed at the end; what is not needed so long, before.
        fds: list[int] = []
        with connection, contextlib.ExitStack() as streams:
            streams.callback(_close, fds)
            connection.settimeout(_TIMEOUT)
            try:
                # recvmsg is one that asyncio has not
                data, received, _, _ = await asyncio.to_thread(
                    socket.recv_fds, connection, _LONGEST, 3
                )
                fds += received
                words, environment = json.loads(data)
            except (OSError, ValueError) as error:
                log.warning(
                    "a program of dom0 called without arguments: %s", str(error)
                )
                return
            connection.setblocking(False)
            doing = self._carry_out(words, environment, fds)
            status = await self._while_connected(connection, doing)
            # before it ends: who reads to the end of its streams waits for that
            streams.close()
            with contextlib.suppress(OSError):
                connection.send(str(status).encode())

    async def _carry_out(
        self, words: Sequence[str], environment: Mapping[str, str], fds: list[int]
    ) -> int:
        """Return the status; what is wrong is said on standard error."""
        try:
            return await _PROGRAMS[words[0]](self, words[1:], environment, fds)
        except (HarnessError, OSError, ValueError) as error:
            await _say(fds, f"{words[0]}: {error}")
            return _USAGE if isinstance(error, ValueError) else 1

    async def _while_connected(
        self, connection: socket.socket, doing: Coroutine[Any, Any, int]
    ) -> int:
        """Return the status, unless the program is killed before it has one."""
        loop = asyncio.get_running_loop()
        work = loop.create_task(doing)
        gone = loop.create_task(loop.sock_recv(connection, 1))
        try:
            await asyncio.wait([work, gone], return_when=asyncio.FIRST_COMPLETED)
            return await work if work.done() else _GONE
        finally:
            for task in (work, gone):
                task.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)

    async def _qubesdb_daemon(
        self, words: Sequence[str], _environment: Mapping[str, str], _fds: Sequence[int]
    ) -> int:
        _xid, name, *others = words
        if others:
            raise ValueError(f"expected XID NAME, got {words}")
        self._guest(name)
        self._machine.databases[name] = QubesDB()
        return 0

    async def _qrexec_daemon(
        self, words: Sequence[str], environment: Mapping[str, str], fds: Sequence[int]
    ) -> int:
        # -q, then -u UUID and -- which cores before 4.3 do not say
        said = words[words.index("--") + 1 :] if "--" in words else words[1:]
        _xid, name, *_user = said
        guest = self._guest(name)
        if "QREXEC_STARTUP_NOWAIT" not in environment:
            limit = float(environment.get("QREXEC_STARTUP_TIMEOUT", _STARTUP))
            may_start = limit >= _TOO_SHORT
            if may_start:
                limit = time_here(limit, self._machine.hypervisor)
            try:
                async with asyncio.timeout(limit):
                    await guest.agent()
                    if not may_start:
                        await asyncio.Future()
            except HarnessError as error:
                await _say(fds, str(error))
                return _NO_AGENT
            except TimeoutError:
                await _say(fds, f"no agent within {limit:g} s")
                return _NO_AGENT
        QREXEC_SOCKETS.mkdir(exist_ok=True)
        there = QREXEC_SOCKETS / f"qrexec.{name}"
        there.touch()
        guest.undo.callback(there.unlink, missing_ok=True)
        return 0

    async def _qrexec_client(
        self, words: Sequence[str], _environment: Mapping[str, str], fds: list[int]
    ) -> int:
        #: The VM, what the command reads first, and a time that does not count here.
        given = {"-d": "", "-p": "", "-w": ""}
        command, rest = "", iter(words)
        for word in rest:
            if word in given:
                given[word] = next(rest, "")
            elif word in ("-t", "-T", "-e"):
                continue  # what is escaped in a terminal
            elif word.startswith("-"):
                raise ValueError(f"the option {word} is none that core-admin uses")
            else:
                command = word
        user, colon, line = command.partition(":")
        if not given["-d"] or not colon:
            raise ValueError(f"expected -d VM USER:COMMAND, got {words}")
        guest = self._guest(given["-d"])
        agent = await guest.agent()
        name = None if user == "DEFAULT" else user
        if line.startswith("QUBESRPC "):
            _, service, source = line.split(" ", 2)
            # one of them enlarges a filesystem
            await guest.follow_sizes()
            process = await agent.spawn_service(service, source=source, user=name)
        else:
            process = await agent.spawn(line.removeprefix("nogui:"), user=name)
        process.stdin.write(given["-p"].encode())
        process.read_from(fds[0])
        process.pass_on(Channel.STDOUT, fds[1])
        process.pass_on(Channel.STDERR, fds[2])
        # They have descriptors of their own. Who reads an output that the command has
        # closed waits for as long as somebody has it open.
        _close(fds)
        try:
            status = await process.wait()
        except HarnessError:
            return _GONE
        except asyncio.CancelledError:
            process.hang_up()
            raise
        return status if status >= 0 else 128 - status

    async def _xl(
        self, words: Sequence[str], _environment: Mapping[str, str], _fds: Sequence[int]
    ) -> int:
        if words[:1] != ["shutdown"]:
            raise ValueError(f"expected `xl shutdown`, got {words}")
        await self._guest(words[-1]).shutdown()
        return 0

    async def _create_snapshot(
        self, words: Sequence[str], _environment: Mapping[str, str], _fds: Sequence[int]
    ) -> int:
        name, *files = words
        if len(files) not in (2, 3):
            raise ValueError(f"expected NAME IMAGE COW [COW], got {words}")
        await asyncio.to_thread(create_snapshot, name, *map(Path, files))
        return 0

    async def _destroy_snapshot(
        self, words: Sequence[str], _environment: Mapping[str, str], _fds: Sequence[int]
    ) -> int:
        destroy_snapshot(Path(*words))
        return 0

    async def _dmsetup(
        self, words: Sequence[str], _environment: Mapping[str, str], _fds: Sequence[int]
    ) -> int:
        match words:
            case ["create", name, "--table", table]:
                await asyncio.to_thread(self._machine.mapper.create, name, table)
            case ["remove", name]:
                await asyncio.to_thread(self._machine.mapper.remove, name)
            case _:
                raise ValueError(f"expected create or remove, got {words}")
        return 0

    async def _udevadm(
        self, words: Sequence[str], _environment: Mapping[str, str], _fds: Sequence[int]
    ) -> int:
        if words != ["settle"]:
            raise ValueError(f"expected `udevadm settle`, got {words}")
        await asyncio.to_thread(self._machine.mapper.settle)
        return 0

    async def _systemctl(
        self, words: Sequence[str], _environment: Mapping[str, str], _fds: Sequence[int]
    ) -> int:
        match words:
            case ["restart", "virtxend"]:
                libvirt_module.restart()
            case ["enable", unit] if _UNIT.fullmatch(unit):
                link = WANTED_UNITS / unit
                link.unlink(missing_ok=True)
                link.symlink_to(UNITS / "qubes-vm@.service")
            case ["disable", unit] if _UNIT.fullmatch(unit):
                (WANTED_UNITS / unit).unlink(missing_ok=True)
            case _:
                raise ValueError(f"there is no systemd here for {' '.join(words)!r}")
        return 0

    def _guest(self, name: str) -> Guest:
        guest = self._machine.find(name)
        if guest is None or not guest.is_active:
            raise ValueError(f"there is no domain {name!r}")
        return guest


async def _say(fds: Sequence[int], line: str) -> None:
    """Write to standard error, which may be a pipe that is full: until it is not."""
    reader = asyncio.StreamReader()
    reader.feed_data(f"{line}\n".encode())
    reader.feed_eof()
    await OutputDescriptor(fds[2]).take(reader)


def _close(fds: list[int]) -> None:
    while fds:
        os.close(fds.pop())


_PROGRAMS: Final = {
    "create-snapshot": Programs._create_snapshot,  # noqa: SLF001
    "destroy-snapshot": Programs._destroy_snapshot,  # noqa: SLF001
    "dmsetup": Programs._dmsetup,  # noqa: SLF001
    "qrexec-client": Programs._qrexec_client,  # noqa: SLF001
    "qrexec-daemon": Programs._qrexec_daemon,  # noqa: SLF001
    "qubesdb-daemon": Programs._qubesdb_daemon,  # noqa: SLF001
    "systemctl": Programs._systemctl,  # noqa: SLF001
    "udevadm": Programs._udevadm,  # noqa: SLF001
    "xl": Programs._xl,  # noqa: SLF001
}
