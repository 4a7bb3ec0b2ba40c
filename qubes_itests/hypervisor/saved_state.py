"""Saved states: a domain's memory and devices in a file, and back.

libvirt's own save and restore insist on one UUID.  A state is written here by QEMU's
migration to a file, which other domains of the same machine can load.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
from typing import TYPE_CHECKING, Any, Self

import libvirt_qemu

from qubes_itests.exc import DeadlineError
from qubes_itests.hypervisor.exc import HypervisorError, SavedStateError

if TYPE_CHECKING:
    from pathlib import Path

    from qubes_itests.hypervisor.connection import Connection

__all__ = ["SavedState", "save_state"]

#: Seconds for one direction; a small guest takes one or two under emulation.
_DEADLINE = 60.0
_POLL = 0.01
_FD_NAME = "qubes_itests-state"


class _Monitor:
    """QEMU's own protocol, through libvirt."""

    def __init__(self, connection: Connection, domain: str, native: Any) -> None:
        self._connection = connection
        self.domain = domain
        self.native = native

    async def execute(self, action: str, command: str, **arguments: Any) -> Any:
        text = json.dumps({"execute": command, "arguments": arguments})
        answer = await self._connection.call(
            self.domain, action, libvirt_qemu.qemuMonitorCommand, self.native, text, 0
        )
        return self._result(action, answer)

    async def pass_file(self, action: str, fd: int) -> None:
        text = json.dumps({"execute": "getfd", "arguments": {"fdname": _FD_NAME}})
        answer = await self._connection.call(
            self.domain,
            action,
            libvirt_qemu.qemuMonitorCommandWithFiles,
            self.native,
            text,
            [fd],
            0,
        )
        self._result(action, answer[0] if isinstance(answer, tuple) else answer)

    def _result(self, action: str, answer: str) -> Any:
        parsed = json.loads(answer)
        if "error" in parsed:
            raise HypervisorError(self.domain, action, parsed["error"]["desc"])
        return parsed["return"]


async def save_state(
    connection: Connection, domain: str, native: Any, path: Path
) -> None:
    """Write a domain's state to `path`; its virtual CPUs stay stopped.

    :raise HypervisorError: it did not work; there is no file then.
    """
    monitor = _Monitor(connection, domain, native)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        # stopped first, or the guest dirties pages as fast as they are written
        await connection.call(domain, "save", native.suspend)
        # All of the memory, whatever file it lies in.
        await monitor.execute(
            "save",
            "migrate-set-capabilities",
            capabilities=[{"capability": "x-ignore-shared", "state": False}],
        )
        # QEMU's default is a network's speed, which would make the save take seconds
        await monitor.execute(
            "save", "migrate-set-parameters", **{"max-bandwidth": 1 << 40}
        )
        await monitor.pass_file("save", fd)
        await monitor.execute("save", "migrate", uri=f"fd:{_FD_NAME}")
        await _wait_migrated(monitor, "save")
        # On disk before it has its name: the name is what later runs trust, and after
        # a power cut it could be that of a file with holes, from which guests crash.
        await asyncio.to_thread(os.fsync, fd)
        temporary.replace(path)
    finally:
        os.close(fd)
        temporary.unlink(missing_ok=True)


async def _wait_migrated(monitor: _Monitor, action: str) -> None:
    loop = asyncio.get_running_loop()
    deadline = loop.time() + _DEADLINE
    while True:
        progress = await monitor.execute(action, "query-migrate")
        status = progress.get("status")
        if status == "completed":
            return
        if status in ("failed", "cancelled"):
            reason = progress.get("error-desc", f"migration {status}")
            raise HypervisorError(monitor.domain, action, reason)
        if loop.time() > deadline:
            raise DeadlineError(
                f"end of {action} of domain {monitor.domain!r}", _DEADLINE, str(status)
            )
        await asyncio.sleep(_POLL)


class SavedState:
    """A saved state that is about to be loaded; a context manager.

    :param domain: name of the domain that it is loaded into.
    :param path: what `save_state` wrote.
    :raise SavedStateError: there is no such file.
    """

    def __init__(self, domain: str, path: Path) -> None:
        self._domain = domain
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise self._error(error) from error

    def _error(self, reason: object) -> SavedStateError:
        words = f"its saved state did not load: {reason}"
        return SavedStateError(self._domain, "start", words)

    async def load(self, connection: Connection, native: Any, *, run: bool) -> None:
        """Load into a domain that waits for it.

        :param run: whether its virtual CPUs run from then on.
        :raise SavedStateError: it did not load; the domain is of no use then.
        """
        monitor = _Monitor(connection, self._domain, native)
        try:
            await monitor.pass_file("start", self._fd)
            await monitor.execute("start", "migrate-incoming", uri=f"fd:{_FD_NAME}")
            await _wait_migrated(monitor, "start")
            if run:
                await connection.call(self._domain, "start", native.resume)
        except (HypervisorError, DeadlineError) as error:
            raise self._error(error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        os.close(self._fd)
