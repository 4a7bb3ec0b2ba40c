"""QEMU's own protocol (QMP), for what libvirt has no call for."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import libvirt_qemu

from qubes_itests.hypervisor.exc import HypervisorError

if TYPE_CHECKING:
    from qubes_itests.hypervisor.connection import Connection

__all__ = ["Monitor"]


class Monitor:
    """QEMU's own protocol, through libvirt."""

    def __init__(self, connection: Connection, domain: str, native: Any) -> None:
        self._connection = connection
        self.domain = domain
        self.native = native

    async def execute(self, action: str, command: str, **arguments: Any) -> Any:
        """Have a command carried out, and return its answer.

        :param action: what is tried, for the error.
        :raise HypervisorError: QEMU refuses it.
        """
        text = json.dumps({"execute": command, "arguments": arguments})
        answer = await self._connection.call(
            self.domain, action, libvirt_qemu.qemuMonitorCommand, self.native, text, 0
        )
        return self._result(action, answer)

    async def pass_file(self, action: str, name: str, fd: int) -> None:
        """Give QEMU a descriptor, which it knows by that name.

        :param action: as for `execute`.
        """
        text = json.dumps({"execute": "getfd", "arguments": {"fdname": name}})
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
