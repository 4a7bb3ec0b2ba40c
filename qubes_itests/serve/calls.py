"""Commands, services and imports that the programs of the client tools ask for.

The other end of a connection is dom0's, and may still be anything: what it sends is
bounded and checked.  When it goes, what it asked for ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import traceback
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

from qubes_itests.admin.dispatch import EXPECTED_ERRORS
from qubes_itests.core.exc import QubesVMNotRunningError
from qubes_itests.core.vm.qubesvm import QubesVM
from qubes_itests.exc import UsageError
from qubes_itests.guest.exc import GuestGoneError
from qubes_itests.guest.link.frames import GONE, REFUSED
from qubes_itests.guest.link.process import GuestTerminal
from qubes_itests.hypervisor.exc import HypervisorError
from qubes_itests.serve.imports import import_volume
from qubes_itests.serve.wire import (
    CALL,
    EXIT,
    HEADER,
    IMPORT,
    LONGEST,
    RESIZE,
    STATUS,
    STDERR,
    STDIN,
    STDOUT,
    TERMINAL,
    frame,
    read_header,
)
from qubes_itests.unix_server import UnixServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from qubes_itests.core.app import Qubes
    from qubes_itests.guest.link.agent import GuestAgent
    from qubes_itests.guest.link.process import GuestProcess
    from qubes_itests.unix_server import Client

__all__ = ["CallServer"]

log = logging.getLogger("qubes_itests.serve")

#: Seconds that a command has to end when nobody listens to it any more.
_END_TIMEOUT: Final = 5.0
#: Seconds that a hypervisor has to tell how much memory a VM holds.
_MEMORY_TIMEOUT: Final = 2.0
_COMMAND: Final = re.compile(r"(?P<user>[^:]*):(?:nogui:)?(?P<rest>.+)", re.DOTALL)
_SERVICE: Final = re.compile(r"QUBESRPC (?P<service>[!-~]+)(?: (?P<source>[!-~]+))?")


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to run in a VM.

    :param user: who runs it; None for the one that the VM takes by default.
    :param command: a command line; empty for a service.
    :param service: with its argument.
    """

    user: str | None
    command: str = ""
    service: str = ""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``USER:COMMAND`` or ``USER:QUBESRPC SERVICE SOURCE``.

        :raise UsageError: when it is neither.
        """
        match = _COMMAND.fullmatch(text)
        if match is None:
            raise UsageError(f"expected USER:COMMAND, got {text!r}")
        user = None if match["user"] in {"", "DEFAULT"} else match["user"]
        service = _SERVICE.fullmatch(match["rest"])
        if service is None:
            if match["rest"].startswith("QUBESRPC"):
                reason = f"expected QUBESRPC SERVICE VM, got {match['rest']!r}"
                raise UsageError(reason)
            return cls(user, command=match["rest"])
        return cls(user, service=service["service"])


class CallServer(UnixServer):
    """An async context manager that serves calls on a socket.

    :param apps: returns those whose VMs are called.
    :param path: of the socket, in a directory that only its owner writes to.
    :param doing: returns what is told with the VMs of what goes on, as JSON has it.
    :param visit: returns a context that is entered while somebody uses a terminal.
    """

    most = 512
    limit = LONGEST

    def __init__(
        self,
        apps: Callable[[], Sequence[Qubes]],
        path: Path,
        doing: Callable[[], Mapping[str, object]] = dict,
        visit: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        super().__init__(path)
        self.apps = apps
        self.doing = doing
        self.visit = visit
        self.farewell = _refusal("too many calls are under way already", REFUSED)

    async def converse(self, client: Client) -> None:
        """Do what a program asks for; it is ended when the program goes."""
        # What was asked for is of use to nobody else.  The program has half-closed, or
        # sends nothing: only its hang-up says that it went.
        with client.watched(client.task.cancel):
            await Answer(self, client).give()


def _refusal(text: str, status: int) -> bytes:
    """Return the last frames of a call that failed."""
    said = f"qrexec-client: {text}\n".encode()[:LONGEST]
    return frame(STDERR, said) + frame(EXIT, str(status).encode())


class Answer:
    """What one program gets.

    :param server: whose client it is.
    :param client: the program.
    """

    def __init__(self, server: CallServer, client: Client) -> None:
        self._server = server
        self._client = client
        self._reader = client.reader
        self._writer = client.writer

    async def give(self) -> None:
        """Do what it asks for, and send how that ended."""
        try:
            last = frame(EXIT, str(await self._do()).encode())
        except (UsageError, ValueError) as error:
            last = _refusal(str(error), REFUSED)
        except EXPECTED_ERRORS as error:
            last = _refusal(str(error), GONE)
        except ConnectionError:
            raise
        except Exception:  # noqa: BLE001 - logged, and the program told
            log.error("a call failed:\n%s", traceback.format_exc())  # noqa: TRY400
            reason = "the call failed unexpectedly; the server's log says more"
            last = _refusal(reason, GONE)
        # no deadline: a terminal that is stopped reads on when somebody continues it
        self._writer.write(last)
        await self._writer.drain()

    async def _do(self) -> int:
        try:
            async with self._client.request():
                kind, data = await self._frame()
        except TimeoutError:
            raise UsageError("no request came in time") from None
        fields = data.decode(errors="replace").split("\0")
        if kind == CALL and len(fields) == 3:  # noqa: PLR2004 - as `wire` says
            return await self._call(*fields)
        if kind == IMPORT and len(fields) == 3:  # noqa: PLR2004
            vm, volume, method = fields
            app = self._app_of(vm)
            reply = await import_volume(app, vm, volume, method, self._stdin())
            await self._send(STDOUT, reply)
            return 0
        if kind == TERMINAL and len(fields) == 3:  # noqa: PLR2004
            return await self._terminal(*fields)
        if kind == STATUS:
            status = {**self._server.doing(), "vms": await self._vms()}
            text = json.dumps(status).encode()
            for start in range(0, len(text), LONGEST):
                await self._send(STDOUT, text[start : start + LONGEST])
            return 0
        raise UsageError(
            "expected a call, an import or a terminal, of three fields, got a frame of"
            f" kind {kind} with {len(fields)}"
        )

    def _app_of(self, name: str) -> Qubes:
        """Return the app with that VM; any if none has it.

        :raise UsageError: when there is no app, as between two tests.
        """
        if not (apps := self._server.apps()):
            raise UsageError(f"there is no VM {name!r}, as no test has any now")
        return next((app for app in apps if _key(name) in app.domains), apps[0])

    async def _vms(self) -> list[dict[str, object]]:
        """Return the VMs that have a domain: name, state, MiB that they hold."""
        vms = [
            vm
            for app in self._server.apps()
            for vm in app.domains.startable()
            if vm.is_running()
        ]
        memory = await asyncio.gather(*map(_memory, vms))
        return [
            {"name": vm.name, "state": vm.get_power_state(), "memory": held}
            for vm, held in zip(vms, memory, strict=True)
        ]

    def _running(self, name: str) -> GuestAgent:
        vm = self._app_of(name).domains.get(_key(name))
        if not isinstance(vm, QubesVM):
            raise UsageError(f"there is no VM {name!r} that runs commands")
        if not vm.is_running():
            raise QubesVMNotRunningError(vm)
        return vm.running_agent()

    async def _terminal(self, name: str, size: str, kind: str) -> int:
        columns, rows = _size(size)
        terminal = await self._running(name).open_terminal(
            columns=columns, rows=rows, user="root", environment={"TERM": kind}
        )
        with self._server.visit():
            return await self._relay(terminal)

    async def _call(self, name: str, text: str, flags: str) -> int:
        wanted = Wanted.parse(text)
        process = await _spawn(self._running(name), wanted)
        words = flags.split()
        if "detach" in words:
            # its streams are given up; the command itself goes on
            process.hang_up()
            return 0
        status = await self._relay(process)
        return 0 if "no-exit-code" in words else status

    async def _relay(self, process: GuestProcess) -> int:
        feeding = asyncio.ensure_future(self._feed(process))
        outputs = asyncio.gather(
            self._pass_on(process.stdout, STDOUT), self._pass_on(process.stderr, STDERR)
        )
        try:
            await outputs
            status = await process.wait()
        except BaseException:
            await _end(process)
            raise
        finally:
            # The input may never end, whatever became of the command; what is left of
            # the outputs is for a program that has gone.
            for task in (feeding, outputs):
                task.cancel()
            await asyncio.gather(feeding, outputs, return_exceptions=True)
        return status if status >= 0 else 128 - status

    async def _feed(self, process: GuestProcess) -> None:
        try:
            async for data in self._stdin(process):
                process.stdin.write(data)
                await process.stdin.drain()
        except (BrokenPipeError, GuestGoneError):
            pass  # it reads no more
        finally:
            # also when the program broke off: a command that reads to the end of its
            # input would wait for ever
            if not process.stdin.is_closing():
                process.stdin.write_eof()

    async def _pass_on(self, reader: asyncio.StreamReader, kind: int) -> None:
        # One frame at a time: a guest that writes faster than the program reads is held
        # up by the credit that reading gives it, and nothing piles up here.
        while data := await reader.read(LONGEST):
            await self._send(kind, data)

    async def _stdin(self, process: GuestProcess | None = None) -> AsyncIterator[bytes]:
        while True:
            kind, data = await self._frame()
            if kind == RESIZE and isinstance(process, GuestTerminal):
                process.resize(*_size(data.decode(errors="replace")))
                continue
            if kind != STDIN:
                raise UsageError(f"expected input, got a frame of kind {kind}")
            if not data:
                return
            yield data

    async def _frame(self) -> tuple[int, bytes]:
        try:
            kind, length = read_header(await self._reader.readexactly(HEADER.size))
            return kind, await self._reader.readexactly(length)
        except asyncio.IncompleteReadError:
            # The end of the stream is not the end of the input, which is an empty
            # frame: else what a killed program had sent would pass for a whole file.
            raise ConnectionResetError("it did not say how its input ends") from None

    async def _send(self, kind: int, data: bytes) -> None:
        self._writer.write(frame(kind, data))
        await self._writer.drain()


async def _memory(vm: QubesVM) -> int | None:
    """Return the MiB that a VM holds; None when nobody can tell."""
    if vm.domain is None:
        return None
    try:
        async with asyncio.timeout(_MEMORY_TIMEOUT):
            return (await vm.domain.memory_statistics()).actual >> 20
    except (HypervisorError, TimeoutError):
        return None  # it ends, or the hypervisor is stuck


def _key(name: str) -> str | uuid.UUID:
    """Return what finds a VM: its name, or what follows ``uuid:``."""
    if not name.startswith("uuid:"):
        return name
    try:
        return uuid.UUID(name.removeprefix("uuid:"))
    except ValueError:
        return name


def _size(text: str) -> tuple[int, int]:
    """Read ``COLUMNSxROWS``.

    :raise UsageError: when it is not that.
    """
    match = re.fullmatch("([0-9]{1,5})x([0-9]{1,5})", text)
    if match is None:
        raise UsageError(f"expected a size such as 80x24, got {text!r}")
    return int(match[1]), int(match[2])


async def _spawn(agent: GuestAgent, wanted: Wanted) -> GuestProcess:
    if wanted.service:
        return await agent.spawn_service(
            wanted.service, source="dom0", user=wanted.user
        )
    return await agent.spawn(wanted.command, user=wanted.user)


async def _end(process: GuestProcess) -> None:
    """End a process that nobody listens to, as a terminal that goes away does."""
    if isinstance(process, GuestTerminal):
        process.leave()
        return
    # Its streams first: it may be stuck in a write, which fails then.
    process.hang_up()
    with contextlib.suppress(ProcessLookupError, GuestGoneError):
        process.terminate()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_END_TIMEOUT):
                await process.wait()
                return
        process.kill()
