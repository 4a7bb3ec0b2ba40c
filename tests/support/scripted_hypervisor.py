"""A hypervisor whose guests do what a script says, behind the real contracts.

Its guests speak the agent protocol over a socket to the real `GuestAgent`; what takes
time takes a random number of turns of the event loop, and no time.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import TYPE_CHECKING, Any

from qubes_itests.guest.link.frames import HEADER, ExitKind, FrameType, encode
from qubes_itests.hypervisor.contract import (
    Domain,
    DomainSpec,
    DomainState,
    Hypervisor,
    LifecycleEvent,
    MemoryStatistics,
)
from qubes_itests.hypervisor.exc import HypervisorError, StateError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from random import Random

_STOPPED = (DomainState.HALTED, DomainState.CRASHED)


class ScriptedDomain(Domain):
    """A domain whose guest is a task of this loop."""

    def __init__(self, hypervisor: ScriptedHypervisor, spec: DomainSpec) -> None:
        self.spec = spec
        self.hypervisor = hypervisor
        self.present = DomainState.HALTED
        self._stopped = asyncio.Event()
        self._stopped.set()
        self._guest: asyncio.Task[None] | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def state(self) -> DomainState:
        return self.present

    async def start(
        self,
        *,
        saved_state: Path | None = None,
        saved_disks: tuple[str, ...] = (),
        to_save: Path | None = None,
    ) -> None:
        assert (saved_state, saved_disks, to_save) == (None, (), None)
        await self.hypervisor.pace()
        self.hypervisor.fail_perhaps(self, "start")
        if self.present not in _STOPPED:
            raise StateError(self.spec.name, "start", f"it is {self.present.value}")
        self.present = DomainState.RUNNING
        self._stopped.clear()
        self.hypervisor.publish(self, LifecycleEvent.STARTED)

    def end(self, state: DomainState = DomainState.HALTED) -> None:
        """Stop it, as its guest or the host may at any time."""
        if self.present in _STOPPED:
            return
        self.present = state
        if self._writer is not None:
            self._writer.close()
        if self._guest is not None:
            self._guest.cancel()
        self._stopped.set()
        crashed = state is DomainState.CRASHED
        event = LifecycleEvent.CRASHED if crashed else LifecycleEvent.STOPPED
        self.hypervisor.publish(self, event)

    async def destroy(self) -> None:
        await self.hypervisor.pace()
        self.end()

    async def undefine(self) -> None:
        await self.destroy()
        if self in self.hypervisor.defined:
            self.hypervisor.defined.remove(self)

    def _require_running(self, action: str) -> None:
        if self.present in _STOPPED:
            raise StateError(self.spec.name, action, "it is not running")

    async def pause(self) -> None:
        await self.hypervisor.pace()
        self._require_running("pause")
        self.present = DomainState.PAUSED
        self.hypervisor.publish(self, LifecycleEvent.PAUSED)

    async def resume(self) -> None:
        await self.hypervisor.pace()
        self._require_running("resume")
        self.present = DomainState.RUNNING
        self.hypervisor.publish(self, LifecycleEvent.RESUMED)

    async def wait_stopped(self, timeout: float | None = None) -> DomainState:
        await asyncio.wait_for(self._stopped.wait(), timeout)
        return self.present

    async def open_channel(
        self, protocol: Callable[[], asyncio.BaseProtocol], *, timeout: float = 10.0
    ) -> Any:
        assert timeout > 0
        await self.hypervisor.pace()
        self._require_running("open the channel of")
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        theirs.setblocking(False)
        self._guest = asyncio.ensure_future(self._serve(theirs))
        loop = asyncio.get_running_loop()
        return await loop.create_unix_connection(protocol, sock=ours)

    async def _serve(self, end: socket.socket) -> None:
        reader, self._writer = await asyncio.open_unix_connection(sock=end)
        try:
            while True:
                kind, _, length, stream = HEADER.unpack(
                    await reader.readexactly(HEADER.size)
                )
                payload = await reader.readexactly(length)
                await self._answer(FrameType(kind), stream, payload)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self._writer.close()
            with contextlib.suppress(ConnectionError):
                await self._writer.wait_closed()

    async def _answer(self, kind: FrameType, stream: int, payload: bytes) -> None:
        assert self._writer is not None
        await self.hypervisor.pace()
        if kind is FrameType.HELLO:
            self._writer.write(encode(FrameType.READY, payload=payload))
            for entry in self.hypervisor.entries.items():
                changed = "".join(f"{text}\0" for text in entry).encode()
                self._writer.write(encode(FrameType.DB_CHANGED, payload=changed))
        elif kind is FrameType.ENTER:
            self.hypervisor.fail_perhaps(self, "enter")
            self._writer.write(encode(FrameType.DONE))
        elif kind in _TAKEN:
            self._writer.write(encode(FrameType.DONE))
        elif kind is FrameType.SPAWN:
            status = bytes([ExitKind.EXITED, 0])
            self._writer.write(encode(FrameType.EXIT, stream, payload=status))
        elif kind is FrameType.POWER_OFF and not self.hypervisor.deaf:
            await self.hypervisor.pace()
            self.end()

    def console_log(self) -> Path:
        return self.spec.directory / "console.log"

    def definition(self) -> str:
        return f"<domain>{self.spec.name}</domain>"

    async def memory_statistics(self) -> MemoryStatistics:
        return MemoryStatistics(actual=self.spec.memory << 20)


#: Requests that a guest of a script does nothing about, and says that it did.
_TAKEN = {
    *(FrameType.DB_WRITE, FrameType.DB_REMOVE, FrameType.CLOCK, FrameType.DISK),
}

# What its scripts never come to is left out.
ScriptedDomain.__abstractmethods__ = frozenset()


class ScriptedHypervisor(Hypervisor):
    """Takes a random number of turns for everything.

    :param random: decides; its seed gives the same interleaving again.
    :param turns: the most turns of the loop that one step takes.
    """

    name = "scripted"
    networked = False

    def __init__(self, random: Random, turns: int = 6) -> None:
        self.random = random
        self.turns = turns
        self.defined: list[ScriptedDomain] = []
        #: Steps that fail, by name: "start", "enter".
        self.failing: set[str] = set()
        #: What agents have to tell of their databases, by paths.
        self.entries: dict[str, str] = {}
        #: Whether guests ignore being asked to power off.
        self.deaf = False
        self._handlers: list[Callable[[Domain, LifecycleEvent], None]] = []

    async def pace(self) -> None:
        """Let others run for a while."""
        for _ in range(self.random.randrange(self.turns)):
            await asyncio.sleep(0)

    def fail_perhaps(self, domain: ScriptedDomain, step: str) -> None:
        """Fail here if the script says so."""
        if step in self.failing:
            domain.end(DomainState.CRASHED)
            raise HypervisorError(domain.spec.name, step, "the script says so")

    def publish(self, domain: Domain, event: LifecycleEvent) -> None:
        for handler in list(self._handlers):
            handler(domain, event)

    async def close(self) -> None:
        for domain in list(self.defined):
            await domain.undefine()

    async def define(self, spec: DomainSpec) -> Domain:
        await self.pace()
        if any(d.spec.name == spec.name for d in self.defined):
            raise HypervisorError(spec.name, "define", "there is one of that name")
        # what it lacks nobody calls: see below
        domain = ScriptedDomain(self, spec)  # type: ignore[abstract]
        self.defined.append(domain)
        return domain

    def domains(self, *, spare: bool = False) -> tuple[Domain, ...]:
        return () if spare else tuple(self.defined)

    def subscribe(
        self, handler: Callable[[Domain, LifecycleEvent], None]
    ) -> Callable[[], None]:
        self._handlers.append(handler)
        return lambda: self._handlers.remove(handler)

    async def state_key(
        self, spec: DomainSpec, *, saved_disks: tuple[str, ...] = ()
    ) -> str | None:
        del spec, saved_disks
        return None
