"""Services of dom0: programs and sockets in a folder, as the services of VMs are.

The folder is the sandbox's own, and empty until a test puts something there: who may
write there is who may run programs anyway. The VM that calls is not trusted; its policy
was asked before.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from qubes_itests.guest.exc import GuestGoneError
from qubes_itests.host import sandbox
from qubes_itests.limited_log import LimitedLog
from qubes_itests.untrusted_text import safe_text

if TYPE_CHECKING:
    from qubes_itests.guest.link.calls import ServiceCall

__all__ = ["PLACE", "serve", "serve_by_socket", "start"]

_limited = LimitedLog(logging.getLogger("qubes.qrexec"))

#: Where they are; see `sandbox_init.have_services`.
PLACE: Final = Path("/etc/qubes-rpc")
_CHUNK: Final = 65_536
#: Seconds that output may take to come which a program has written before it ended;
#: what it left running may hold its output for ever.
_REST: Final = 2.0
#: Seconds until a service that takes nothing is asked whether it still reads.
_RETRY: Final = 1.0
#: Of a program's stderr so many bytes are logged.
_LOGGED: Final = 4096


async def serve(call: ServiceCall) -> int | None:
    """Serve a call by what is there for it.

    :param call: allowed by policy.
    :return: the exit status, 0 for a socket; None when there is no such service.
    :raise OSError: the program cannot be executed, or nothing listens on the socket.
    """
    full_name = _full_name(call.service)
    path = _found(full_name)
    if path is None:
        return None
    if path.is_socket():
        return await serve_by_socket(call, path)
    return await _serve_by_program(call, path, full_name)


async def start(
    service: str, source: str, user: str | None = None, **streams: Any
) -> asyncio.subprocess.Process:
    """Start a program that is a service, for a caller in dom0 who names the source.

    :param service: ``SERVICE`` or ``SERVICE+ARGUMENT``.
    :param source: name of the VM that calls.
    :param user: that runs it; by default the user of the run.
    :param streams: as for `asyncio.create_subprocess_exec`.
    :return: the process; it ends with 127 when there is no such program.
    :raise OSError: the program cannot be executed.
    """
    full_name = _full_name(service)
    path = _found(full_name)
    command = [] if user is None else ["runuser", "-u", user, "--"]
    if path is None or path.is_socket():
        script = 'echo "dom0 has no program $0" >&2; exit 127'
        command += ["sh", "-c", script, str(PLACE / full_name)]
    else:
        command += _command(path, full_name)
    settings = _settings(full_name, source, ("name", "dom0"))
    return await asyncio.create_subprocess_exec(*command, env=settings, **streams)


def _full_name(service: str) -> str:
    """Return the service with its argument, and the + that also an empty one has."""
    return service if "+" in service else f"{service}+"


def _found(full_name: str) -> Path | None:
    if not sandbox.active():
        # Outside a sandbox the folder is the machine's, whose programs no test may run.
        return None
    for name in (full_name, full_name.partition("+")[0]):
        path = PLACE / name
        if path.is_socket() or path.is_file():
            return path
    return None


def _command(path: Path, full_name: str) -> list[str]:
    argument = full_name.partition("+")[2]
    return [str(path), *([argument] if argument else [])]


def _settings(full_name: str, source: str, target: tuple[str, str]) -> dict[str, str]:
    """Return the environment of a program.

    :param target: how the caller named dom0; see `_target`.
    """
    kind, name = target
    return {
        **os.environ,
        "QREXEC_REMOTE_DOMAIN": source,
        "QREXEC_REQUESTED_TARGET_TYPE": kind,
        f"QREXEC_REQUESTED_TARGET{'_KEYWORD' * (kind == 'keyword')}": name,
        "QREXEC_SERVICE_FULL_NAME": full_name,
        "QREXEC_SERVICE_ARGUMENT": full_name.partition("+")[2],
    }


def _target(call: ServiceCall) -> tuple[str, str]:
    """Return how the caller named dom0: ``name`` or ``keyword``, and which."""
    is_keyword = call.target.startswith("@")
    return ("keyword" if is_keyword else "name", call.target.removeprefix("@"))


async def serve_by_socket(call: ServiceCall, path: Path) -> int:
    """Serve a call by who listens on a socket.

    :param call: allowed by policy.
    :param path: of the socket.
    :return: the exit status, 0.
    :raise OSError: nobody listens on it.
    """
    words = (_full_name(call.service), call.vm, *_target(call))
    with socket.socket(socket.AF_UNIX) as ours:
        ours.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(ours, str(path))
        except OSError as error:
            error.filename = str(path)
            raise
        async with asyncio.TaskGroup() as group:
            group.create_task(_pass_input(call, ours, " ".join(words).encode() + b"\0"))
            group.create_task(_pass_output(call, ours))
    return 0


async def _serve_by_program(call: ServiceCall, path: Path, full_name: str) -> int:
    with contextlib.ExitStack() as ours:
        # Their ends are closed here as soon as the program has them: while this process
        # holds one, we would never read the end of the program's output.
        with contextlib.ExitStack() as theirs:
            input_, stdin = _connected_pair(ours, theirs)
            output, stdout = _connected_pair(ours, theirs)
            process = await asyncio.create_subprocess_exec(
                *_command(path, full_name),
                stdin=stdin.fileno(),
                stdout=stdout.fileno(),
                stderr=asyncio.subprocess.PIPE,
                cwd="/",
                env=_settings(full_name, call.vm, _target(call)),
                start_new_session=True,
            )
        tasks = [
            asyncio.ensure_future(_pass_input(call, input_)),
            asyncio.ensure_future(_pass_output(call, output)),
            asyncio.ensure_future(_log_stderr(call, process)),
        ]
        try:
            status = await process.wait()
            # Nobody reads the input any more: without this the guest would go on to
            # send, until its credit is used up, and its program would hang.
            call.stdin.stop()
            # Children of the program may keep its output open for ever.
            await asyncio.wait(tasks[1:], timeout=_REST)
        finally:
            # Before the sockets are closed below: the loop must not watch a descriptor
            # that is closed, whose number another file may get.
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            await _end(process)
        return status


def _connected_pair(
    ours: contextlib.ExitStack, theirs: contextlib.ExitStack
) -> tuple[socket.socket, socket.socket]:
    """Return our end, for the loop, and that of the program."""
    pair = socket.socketpair()
    ours.enter_context(pair[0]).setblocking(False)
    return pair[0], theirs.enter_context(pair[1])


async def _end(process: asyncio.subprocess.Process) -> None:
    """End what a program has left running, itself included."""
    # It has its own session, so its group is its number; the group lives on with
    # children that it has left.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()


async def _pass_input(
    call: ServiceCall, service: socket.socket, first: bytes = b""
) -> None:
    try:
        await _send(service, first)
        while data := await call.stdin.read(_CHUNK):
            await _send(service, data)
        # Half of it: the service reads the end of its input, and may still answer.
        service.shutdown(socket.SHUT_WR)
    except (GuestGoneError, OSError):
        call.stdin.stop()


async def _send(service: socket.socket, data: bytes) -> None:
    loop, rest = asyncio.get_running_loop(), memoryview(data)
    while rest:
        try:
            rest = rest[service.send(rest) :]
        except BlockingIOError:
            has_room = asyncio.Event()
            loop.add_writer(service, has_room.set)
            try:
                # Not as `sock_sendall`, for ever: of a peer that shuts its reading half
                # while it has unread data, poll(2) reports nothing, and send(2) alone
                # has the EPIPE (unix_poll() of Linux).
                async with asyncio.timeout(_RETRY):
                    await has_room.wait()
            except TimeoutError:
                continue
            finally:
                loop.remove_writer(service)


async def _pass_output(call: ServiceCall, service: socket.socket) -> None:
    try:
        while data := await _received(service):
            call.stdout.write(data)
            await call.stdout.drain()
        call.stdout.write_eof()
    except (ConnectionError, GuestGoneError, RuntimeError):
        # The guest reads no more: the service gets EPIPE in place of blocking for ever.
        service.shutdown(socket.SHUT_RD)


async def _received(service: socket.socket) -> bytes:
    # Not by a StreamReader, which drops what has arrived when the connection is reset.
    # A service that ends before it has read all its input causes a reset, after the
    # last byte that it has sent.
    try:
        return await asyncio.get_running_loop().sock_recv(service, _CHUNK)
    except ConnectionResetError:
        return b""


async def _log_stderr(call: ServiceCall, process: asyncio.subprocess.Process) -> None:
    assert process.stderr is not None  # noqa: S101 - it was asked for
    room = _LOGGED
    while data := await process.stderr.read(_CHUNK):
        if room > 0:
            text = safe_text(data[:room])
            _limited.info(call.vm, "stderr of %s of dom0: %s", call.service, text)
            room -= len(data)
