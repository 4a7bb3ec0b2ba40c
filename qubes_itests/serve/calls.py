"""Commands, services and imports that the programs of the client tools ask for.

The other end of a connection is dom0's, and may still be anything: what it sends is
bounded and checked.  When it goes, what it asked for ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import traceback
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

from qubes_itests.admin.dispatch import EXPECTED_ERRORS
from qubes_itests.admin.hangups import Hangups
from qubes_itests.core.exc import QubesVMNotRunningError
from qubes_itests.guest.exc import GuestGoneError
from qubes_itests.guest.link.frames import GONE, REFUSED
from qubes_itests.guest.link.process import GuestTerminal
from qubes_itests.serve.exc import BadCallError
from qubes_itests.serve.imports import import_volume
from qubes_itests.serve.wire import (
    CALL,
    EXIT,
    HEADER,
    IMPORT,
    LONGEST,
    RESIZE,
    STDERR,
    STDIN,
    STDOUT,
    TERMINAL,
    frame,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from qubes_itests.core.app import Qubes
    from qubes_itests.guest.link.agent import GuestAgent
    from qubes_itests.guest.link.process import GuestProcess

__all__ = ["CallServer"]

log = logging.getLogger("qubes_itests.serve")

#: Who may connect: owner and group.
_MODE: Final = 0o660
#: Seconds until a program has said what it wants.
_REQUEST_TIMEOUT: Final = 30.0
#: Seconds that a command has to end when nobody listens to it any more.
_END_TIMEOUT: Final = 5.0
#: Calls at once, lest they take the descriptors of all else.
_MOST_CALLS: Final = 512
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

        :raise BadCallError: when it is neither.
        """
        match = _COMMAND.fullmatch(text)
        if match is None:
            raise BadCallError(f"{text!r} is not USER:COMMAND")
        user = None if match["user"] in {"", "DEFAULT"} else match["user"]
        service = _SERVICE.fullmatch(match["rest"])
        if service is None:
            if match["rest"].startswith("QUBESRPC"):
                reason = f"expected QUBESRPC SERVICE VM, got {match['rest']!r}"
                raise BadCallError(reason)
            return cls(user, command=match["rest"])
        return cls(user, service=service["service"])


class CallServer:
    """An async context manager that serves calls on a socket.

    :param app: whose VMs are called.
    :param path: of the socket; its parent is there, and nobody else's.
    """

    def __init__(self, app: Qubes, path: Path) -> None:
        self.app = app
        self.path = path
        self._hangups: Hangups
        self._tasks: set[asyncio.Task[None]] = set()
        self._exit = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with contextlib.AsyncExitStack() as stack:
            self._hangups = Hangups()
            stack.callback(self._hangups.close)
            stack.push_async_callback(self._end_calls)
            server = await asyncio.start_unix_server(
                self._connected, self.path, limit=LONGEST
            )
            stack.callback(server.close)
            self.path.chmod(_MODE)
            self._exit = stack.pop_all()
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self._exit.aclose()
        self.path.unlink(missing_ok=True)

    async def _end_calls(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connected(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - a coroutine runs in one
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        descriptor = writer.get_extra_info("socket").fileno()
        answer = Answer(self.app, reader, writer)
        try:
            with self._hangups.watched(descriptor, lambda: _cancel(task)):
                if len(self._tasks) > _MOST_CALLS:
                    await answer.refuse(f"{_MOST_CALLS} calls are under way already")
                else:
                    await answer.give()
        except asyncio.CancelledError:
            pass  # the program is gone, or the server ends
        except ConnectionError as error:
            log.info("a program went: %s", str(error))
        finally:
            # what is unsent is for nobody when the program is gone
            (writer.transport.abort if task.cancelling() else writer.close)()


def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()


class Answer:
    """What one program gets.

    :param app: whose VMs are called.
    :param reader: where its frames come from.
    :param writer: where ours go.
    """

    def __init__(
        self, app: Qubes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._app = app
        self._reader = reader
        self._writer = writer

    async def give(self) -> None:
        """Do what it asks for, and send how that ended."""
        try:
            status = await self._do()
        except (BadCallError, ValueError) as error:
            status = await self._say(str(error), REFUSED)
        except EXPECTED_ERRORS as error:
            status = await self._say(str(error), GONE)
        except ConnectionError:
            raise
        except Exception:  # noqa: BLE001 - logged, and the program told
            log.error("a call failed:\n%s", traceback.format_exc())  # noqa: TRY400
            reason = "the call failed unexpectedly; the server's log says more"
            status = await self._say(reason, GONE)
        await self._send(EXIT, str(status).encode())

    async def refuse(self, reason: str) -> None:
        """Do nothing, and send why."""
        status = await self._say(reason, REFUSED)
        await self._send(EXIT, str(status).encode())

    async def _do(self) -> int:
        try:
            async with asyncio.timeout(_REQUEST_TIMEOUT):
                kind, data = await self._frame()
        except TimeoutError:
            reason = f"no request within {_REQUEST_TIMEOUT:g} seconds"
            raise BadCallError(reason) from None
        fields = data.decode(errors="replace").split("\0")
        if kind == CALL and len(fields) == 3:  # noqa: PLR2004 - as `wire` says
            return await self._call(*fields)
        if kind == IMPORT and len(fields) == 3:  # noqa: PLR2004
            vm, volume, method = fields
            reply = await import_volume(self._app, vm, volume, method, self._stdin())
            await self._send(STDOUT, reply)
            return 0
        if kind == TERMINAL and len(fields) == 3:  # noqa: PLR2004
            return await self._terminal(*fields)
        raise BadCallError("neither a call, nor an import, nor a terminal")

    def _running(self, name: str) -> GuestAgent:
        vm = self._app.domains.get(_key(name))
        if not hasattr(vm, "running_agent"):
            raise BadCallError(f"there is no VM {name!r} that runs commands")
        if not vm.is_running():
            raise QubesVMNotRunningError(vm)
        agent: GuestAgent = vm.running_agent()
        return agent

    async def _terminal(self, name: str, size: str, kind: str) -> int:
        columns, rows = _size(size)
        terminal = await self._running(name).open_terminal(
            columns=columns, rows=rows, user="root", environment={"TERM": kind}
        )
        return await self._relay(terminal)

    async def _call(self, name: str, text: str, flags: str) -> int:
        wanted = Wanted.parse(text)
        process = await _spawn(self._running(name), wanted)
        words = flags.split()
        if "detach" in words:
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
            if not process.stdin.is_closing():
                process.stdin.write_eof()

    async def _pass_on(self, reader: asyncio.StreamReader, kind: int) -> None:
        while data := await reader.read(LONGEST):
            await self._send(kind, data)

    async def _stdin(self, process: GuestProcess | None = None) -> AsyncIterator[bytes]:
        while True:
            kind, data = await self._frame()
            if kind == RESIZE and isinstance(process, GuestTerminal):
                process.resize(*_size(data.decode(errors="replace")))
                continue
            if kind != STDIN:
                raise BadCallError(f"a frame of kind {kind} where input was expected")
            if not data:
                return
            yield data

    async def _frame(self) -> tuple[int, bytes]:
        try:
            kind, length = HEADER.unpack(await self._reader.readexactly(HEADER.size))
            if length > LONGEST:
                raise BadCallError(f"a frame of {length} bytes: {LONGEST} at most")
            return kind, await self._reader.readexactly(length)
        except asyncio.IncompleteReadError:
            raise ConnectionResetError("it did not say how its input ends") from None

    async def _send(self, kind: int, data: bytes) -> None:
        self._writer.write(frame(kind, data))
        await self._writer.drain()

    async def _say(self, text: str, status: int) -> int:
        await self._send(STDERR, f"qrexec-client: {text}\n".encode()[:LONGEST])
        return status


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

    :raise BadCallError: when it is not that.
    """
    match = re.fullmatch("([0-9]{1,5})x([0-9]{1,5})", text)
    if match is None:
        raise BadCallError(f"expected a size such as 80x24, got {text!r}")
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
    process.hang_up()
    with contextlib.suppress(ProcessLookupError, GuestGoneError):
        process.terminate()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_END_TIMEOUT):
                await process.wait()
                return
        process.kill()
