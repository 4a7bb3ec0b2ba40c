"""Agent of a running guest, as the host sees it."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import struct
import time
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from qubes_itests.exc import DeadlineError
from qubes_itests.guest.exc import (
    GuestGoneError,
    GuestRefusedError,
    ProtocolViolation,
)
from qubes_itests.guest.link.connection import AgentConnection, AgentLog
from qubes_itests.guest.link.frames import FrameType, pack_strings
from qubes_itests.guest.link.process import GuestProcess, GuestTerminal
from qubes_itests.hypervisor.console import console_tail
from qubes_itests.untrusted_text import safe_text

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping
    from pathlib import Path

    from qubes_itests.guest.link.calls import CallHandler
    from qubes_itests.hypervisor.contract import Domain

__all__ = ["GuestAgent", "Identity"]

_logger = logging.getLogger("qubes_itests.guest")

_NO_ENVIRONMENT: Final[Mapping[str, str]] = MappingProxyType({})
#: An entry by which an agent tells of block devices, and the characters of its value.
_BLOCK_ENTRY: Final = re.compile(
    r"/qubes-block-devices(/[a-z0-9-]{1,63}/(desc|size|mode|parent))?"
)
_LONGEST_VALUE: Final = 255
#: So many entries are kept until somebody wants to be told.
_MOST_ENTRIES: Final = 1000
_CLOCK: Final = struct.Struct("<Q")
#: What a guest is asked about disks, in words.
_STATES: Final = {"there": "there", "gone": "gone"}
#: Seconds between two looks at a disk, which most often is as it should be at once.
_FIRST_PAUSE: Final = 0.01
_LONGEST_PAUSE: Final = 0.3
_POWER_OFF: Final = b"\0"
_REBOOT: Final = b"\1"
_SEED_BYTES: Final = 64
#: Of the time for a second stage what its disks have to appear.
_DISKS_PART: Final = 0.75


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Who a VM is.

    :param name: the VM's name and host name.
    :param root: the disk that becomes ``/``, as in "xvda".
    :param private: the disk that becomes ``/rw``, an ext4 filesystem; None for none.
    :param volatile: the disk that becomes swap; None for none.
    :param root_mode: ``rw`` or ``ro``.
    :param default_user: who runs commands that name nobody.
    :param db: entries of its qubesdb by path.
    :param services: names of the enabled services, /run/qubes-service/NAME.
    :param init: who is process 1 when commands run: ``agent``, or ``systemd``, if the
        root has that.
    :param machine_id: 32 hexadecimal digits for /etc/machine-id, if the root has that.
    """

    name: str
    root: str
    private: str | None = None
    volatile: str | None = None
    root_mode: str = "rw"
    default_user: str = "user"
    db: Mapping[str, str] = field(default_factory=dict)
    services: tuple[str, ...] = ()
    init: str = "agent"
    machine_id: str | None = None

    @property
    def disks(self) -> tuple[str, ...]:
        """Names of the disks it needs."""
        return tuple(d for d in (self.root, self.private, self.volatile) if d)

    def payload(self, deadline: float) -> bytes:
        """Return the payload of ENTER, with the time of now and a fresh random seed.

        :param deadline: seconds that the disks may take to appear.
        :raise ValueError: when a value cannot be sent.
        """
        pairs = {
            "name": self.name,
            "root": self.root,
            "private": self.private,
            "volatile": self.volatile,
            "root-mode": self.root_mode,
            "default-user": self.default_user,
            "init": self.init,
            "machine-id": self.machine_id,
            "deadline": str(max(1, int(deadline))),
            **{f"db:{path}": value for path, value in self.db.items()},
            **{f"service:{name}": "1" for name in self.services},
            "seed": secrets.token_hex(_SEED_BYTES),
            "time": str(time.time_ns()),
        }
        return pack_strings(f"{k}={v}" for k, v in pairs.items() if v is not None)


class GuestAgent:
    """The connection to the agent of one guest; get it from `connect`.

    When the connection ends, whatever is pending on this VM raises the error that ended
    it, and so does every later call: `GuestGoneError`, or `ProtocolViolation` when the
    guest broke the protocol.
    """

    def __init__(self, domain: Domain, connection: AgentConnection) -> None:
        self.domain = domain
        self.vm = domain.spec.name
        self._connection = connection
        #: What it has said in its qubesdb while nobody was told.
        self._entries: dict[str, str] = {}
        self._note: Callable[[str, str | None], None] | None = None
        connection.on_db_change = self._on_db_change

    @classmethod
    async def connect(
        cls,
        domain: Domain,
        *,
        timeout: float,
        on_call: CallHandler | None = None,
        log: Path | None = None,
    ) -> GuestAgent:
        """Open the channel of a running domain and wait for its agent.

        :param domain: its guest may still be booting.
        :param timeout: seconds.
        :param on_call: run as a task for each call of the guest; None refuses them.
        :param log: file for what the agent has to tell.
        :raise DeadlineError: the agent did not answer in time.
        :raise GuestGoneError: the guest stopped, or broke the protocol.
        """
        agent_log = AgentLog(log)
        connection = AgentConnection(domain.spec.name, on_call, agent_log)
        agent = cls(domain, connection)
        # What ends this early, cancellation included, ends the connection: QEMU serves
        # one at a time, and the next would wait for it.
        try:
            async with asyncio.timeout(timeout):
                await domain.open_channel(lambda: connection, timeout=timeout)
                await connection.hello()
        except BaseException as error:
            await agent.close()
            agent_log.close()
            if isinstance(error, TimeoutError) and not isinstance(error, DeadlineError):
                raise agent._late("answer of the agent", timeout) from None
            raise
        return agent

    async def enter(
        self,
        identity: Identity,
        *,
        timeout: float,
        unchanged: Collection[str] = (),
    ) -> None:
        """Let the guest become this VM: stage two of its start.

        What it says meanwhile is a warning: it goes on without something, as with a
        filesystem that does not grow.

        :param identity: who it is.
        :param timeout: seconds; the guest waits for its disks for a part of that.
        :param unchanged: disks of which it knows already how large they are, and that
            they can be written.
        :raise GuestRefusedError: the guest could not, with its reason.
        :raise DeadlineError: it did not answer in time.
        """
        # For less than we wait for its answer, or that would come too late: of a disk
        # that is missing nobody would be told.
        payload = identity.payload(_DISKS_PART * timeout)
        if unchanged:
            payload += pack_strings([f"unchanged={' '.join(unchanged)}"])
        await self._enter(payload, timeout)
        self.domain.end_channel_with_agent()

    async def prepare(
        self, identity: Identity, *, named: bool = False, timeout: float
    ) -> None:
        """Let a guest in stage one go as far as that needs no identity.

        It mounts its root, to which nothing is written, and with systemd starts that.
        `enter` is what it then waits for.

        :param identity: whose root and init count.
        :param named: whether systemd finds its names already; not where a state is
            saved, for any VM.
        :param timeout: as for `enter`; so are the errors.
        """
        deadline = max(1, int(_DISKS_PART * timeout))
        entries = [f"init={identity.init}", f"root={identity.root}"]
        entries.append(f"deadline={deadline}")
        if named:
            entries.append(f"host-name={identity.name}")
            if identity.machine_id is not None:
                entries.append(f"machine-id={identity.machine_id}")
        await self._enter(pack_strings(entries), timeout)

    async def rehearse(self, identity: Identity, *, timeout: float) -> None:
        """Have a guest in its waiting root do, and undo, what it can of stage two.

        All of its disks but the root are written to.

        :param identity: whose disks they are; the guest is told nothing else of it.
        :param timeout: as for `enter`; so are the errors.
        """
        unknown = replace(identity, name="", db={}, services=(), machine_id=None)
        payload = unknown.payload(_DISKS_PART * timeout)
        await self._enter(payload + pack_strings(["rehearse=1"]), timeout)

    async def _enter(self, payload: bytes, timeout: float) -> None:
        # Only during stage two: later LOG lines are the agent's everyday remarks.
        self._connection.log.listener = self._warn
        try:
            async with asyncio.timeout(timeout):
                await self._connection.request(FrameType.ENTER, payload, "enter")
        except TimeoutError:
            raise self._late("answer to ENTER", timeout) from None
        finally:
            self._connection.log.listener = None

    async def spawn(
        self,
        command: str,
        *,
        user: str | None = None,
        environment: Mapping[str, str] = _NO_ENVIRONMENT,
    ) -> GuestProcess:
        """Start a command; returns at once.

        :param command: as for ``sh -c``.
        :param user: who runs it; None for the VM's default user.
        :param environment: added to that of the user.
        :raise GuestError: too many run at once.
        :raise ValueError: a string cannot be sent, for its length or a NUL.
        """
        settings = (f"{name}={value}" for name, value in environment.items())
        return self._connection.spawn(
            GuestProcess, "command", user or "", command, "", *settings
        )

    async def open_terminal(
        self,
        command: str = "",
        *,
        columns: int,
        rows: int,
        user: str | None = None,
        environment: Mapping[str, str] = _NO_ENVIRONMENT,
    ) -> GuestTerminal:
        """Start a command on a new terminal; returns at once.

        :param command: as for ``sh -c``; by default it is the user's shell, as a login.
        :param columns: of the terminal, from 1 to 65,535.
        :param rows: likewise.
        :param user: who runs it; None for the VM's default user.
        :param environment: added to that of the user; TERM belongs there.
        :raise GuestError: too many run at once.
        :raise ValueError: a string cannot be sent, for its length or a NUL.
        """
        settings = (f"{name}={value}" for name, value in environment.items())
        size = f"{columns}x{rows}"
        return self._connection.spawn(
            GuestTerminal, "terminal", user or "", command, size, *settings
        )

    async def spawn_service(
        self, service: str, *, source: str, user: str | None = None
    ) -> GuestProcess:
        """Start a qrexec service; returns at once.

        :param service: ``SERVICE`` or ``SERVICE+ARGUMENT``.
        :param source: name of the domain that calls.
        :param user: who runs it; None leaves it to the service's configuration.
        :raise GuestError: too many run at once.
        """
        return self._connection.spawn(
            GuestProcess, "service", user or "", service, source
        )

    async def write_db(self, path: str, value: str) -> None:
        """Set an entry of the guest's qubesdb."""
        payload = pack_strings((path, value))
        await self._connection.request(FrameType.DB_WRITE, payload, f"write {path}")

    async def remove_db(self, path: str) -> None:
        """Remove an entry of the guest's qubesdb."""
        payload = pack_strings((path,))
        await self._connection.request(FrameType.DB_REMOVE, payload, f"remove {path}")

    def on_db_change(self, note: Callable[[str, str | None], None]) -> None:
        """Have what the agent itself says in the guest's qubesdb told.

        What it has said already, of devices that were there before, is told at once.

        It says there what block devices other VMs may have; all else is passed over.

        :param note: called on the event loop with a path below
            ``/qubes-block-devices``, and with the value, None for an entry that was
            removed: the guest's words, of up to 255 characters.
        """
        self._note, entries, self._entries = note, self._entries, {}
        for path, value in entries.items():
            note(path, value)

    def _on_db_change(self, path: str, value: str | None) -> None:
        if not _BLOCK_ENTRY.fullmatch(path) or len(value or "") > _LONGEST_VALUE:
            return
        if self._note is not None:
            self._note(path, value)
            return
        # the latest last, as what is watched is: that there was a change
        self._entries.pop(path, None)
        if value is not None and len(self._entries) < _MOST_ENTRIES:
            self._entries[path] = value

    async def set_clock(self, nanoseconds: int, *, timeout: float) -> None:
        """Set the guest's clock.

        :param nanoseconds: since the epoch.
        :param timeout: seconds.
        :raise GuestRefusedError: the guest did not.
        :raise DeadlineError: it did not answer in time.
        """
        payload = _CLOCK.pack(nanoseconds)
        try:
            async with asyncio.timeout(timeout):
                await self._connection.request(
                    FrameType.CLOCK, payload, "set its clock"
                )
        except TimeoutError:
            raise self._late("answer to CLOCK", timeout) from None

    async def leave_running(self, *, leave: bool, timeout: float) -> None:
        """Say what becomes of commands when the connection ends or begins anew.

        :param leave: at the next end they stay as they are, and so does what they wait
            for; else they are killed, as ever.
        :param timeout: seconds.
        :raise DeadlineError: the guest did not answer in time.
        """
        try:
            async with asyncio.timeout(timeout):
                payload = bytes([leave])
                await self._connection.request(FrameType.LEAVE, payload, "leave them")
        except TimeoutError:
            raise self._late("answer to LEAVE", timeout) from None

    async def wait_for_disk(self, name: str, state: str, *, timeout: float) -> None:
        """Wait until the guest has a disk as the host has it: it learns of it later.

        :param name: ``xvda`` …
        :param state: ``there``, ``gone``, or the least size in bytes.
        :param timeout: seconds.
        :raise DeadlineError: it was not so in time; says what was the case instead.
        """
        payload = pack_strings((name, state))
        said, pause = "", _FIRST_PAUSE
        try:
            async with asyncio.timeout(timeout):
                while True:
                    # Asked again and again. The agent answers at once with what is: one
                    # that waited could answer nothing else meanwhile.
                    try:
                        await self._connection.request(FrameType.DISK, payload, "look")
                    except GuestRefusedError as error:
                        said = error.reason
                    else:
                        return
                    await asyncio.sleep(pause)
                    pause = min(2 * pause, _LONGEST_PAUSE)
        except TimeoutError:
            what = f"disk {name} of VM {self.vm} to be {_STATES.get(state, 'resized')}"
            raise DeadlineError(what, timeout, said or "no answer") from None

    async def power_off(self) -> None:
        """Ask the guest to end everything and power off; returns at once."""
        self._connection.power_off(_POWER_OFF)

    async def reboot(self) -> None:
        """Ask the guest to end everything and reboot; returns at once."""
        self._connection.power_off(_REBOOT)

    async def close(self) -> None:
        """End the connection; what is pending fails. A second call does nothing."""
        self._connection.abort(GuestGoneError(self.vm, "the host closed it"))
        # who has one of its processes still does not hold the VM by this
        self._connection.on_db_change = None
        await self._connection.tasks_done()

    async def wait_closed(self) -> Exception | None:
        """Wait until the connection has ended.

        :return: the breach of protocol that ended it, if one did.
        """
        # shielded: several may wait for it, and one that is cancelled must not take it
        error = await asyncio.shield(self._connection.closed)
        return error if isinstance(error, ProtocolViolation) else None

    def _warn(self, line: str) -> None:
        _logger.warning("VM %s starts with a problem: %s", self.vm, safe_text(line))

    def _late(self, what: str, timeout: float) -> DeadlineError:
        tail = console_tail(self.domain)
        return DeadlineError(f"{what} of VM {self.vm}", timeout, tail)
