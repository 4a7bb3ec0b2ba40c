"""What the domains of every libvirt driver have in common."""

# ruff: noqa: D102 - the contract documents its methods
from __future__ import annotations

import abc
import asyncio
from typing import TYPE_CHECKING, Any

import libvirt

from qubes_itests.exc import DeadlineError
from qubes_itests.hypervisor.contract import (
    Domain,
    DomainSpec,
    DomainState,
    LifecycleEvent,
    MemoryStatistics,
)
from qubes_itests.hypervisor.exc import HypervisorError, StateError
from qubes_itests.hypervisor.lifecycle import lifecycle_state

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from qubes_itests.hypervisor.connection import Connection

__all__ = ["LibvirtDomain"]

#: Seconds in which libvirt must tell that a domain it has stopped is stopped.
_STOP_EVENT = 10.0

_KIB = 1024


class LibvirtDomain(Domain):
    """A transient libvirt domain: libvirt knows it while it runs.

    :param forget: called when the domain is undefined.
    """

    def __init__(
        self, connection: Connection, spec: DomainSpec, forget: Callable[[], None]
    ) -> None:
        self.spec = spec
        self._connection = connection
        self._forget = forget
        self._native: Any = None
        self._changing = asyncio.Lock()
        self._stopped = asyncio.Event()
        self._stopped.set()
        self._last = DomainState.HALTED
        self._undefined = False

    @abc.abstractmethod
    async def _create(self, saved_state: Path | None) -> Any:
        """Bring the domain to life; return libvirt's handle."""

    async def _cleanup(self) -> None:
        """Take away what a run of the domain leaves on the host."""

    def handle_event(self, event: LifecycleEvent) -> None:
        """Take note of an event; call it on the event loop."""
        if event in (LifecycleEvent.STOPPED, LifecycleEvent.CRASHED):
            crashed = event is LifecycleEvent.CRASHED
            self._last = DomainState.CRASHED if crashed else DomainState.HALTED
            self._stopped.set()

    async def _call(self, action: str, function: Callable[..., Any], *args: Any) -> Any:
        return await self._connection.call(self.spec.name, action, function, *args)

    def _running(self, action: str) -> Any:
        if self._native is None or self._stopped.is_set():
            raise StateError(self.spec.name, action, "it is not running")
        return self._native

    async def state(self) -> DomainState:
        if self._native is None or self._stopped.is_set():
            return self._last
        try:
            state, _reason = await self._call("ask", self._native.state)
        except StateError:
            return self._last
        return lifecycle_state(state)

    async def start(self, *, saved_state: Path | None = None) -> None:
        async with self._changing:
            await self._require_startable()
            self._stopped.clear()
            self._last = DomainState.HALTED
            try:
                self._native = await self._create(saved_state)
            except BaseException:
                self._native = None
                self._stopped.set()
                await asyncio.shield(self._cleanup())
                raise

    async def _require_startable(self) -> None:
        if self._undefined:
            raise StateError(self.spec.name, "start", "it is not defined any more")
        if self._native is None:
            return
        state = await self.state()
        if state not in (DomainState.HALTED, DomainState.CRASHED):
            raise StateError(self.spec.name, "start", f"it is {state.value}")
        await self._settle()

    async def _settle(self) -> None:
        """Wait until the event of a stop is in, then clean up after the run."""
        try:
            await asyncio.wait_for(self._stopped.wait(), _STOP_EVENT)
        except TimeoutError:
            self.handle_event(LifecycleEvent.STOPPED)
        self._native = None
        await self._cleanup()

    async def destroy(self) -> None:
        async with self._changing:
            if self._native is None:
                return
            await self._stop_native()
            await self._settle()

    async def _stop_native(self) -> None:
        try:
            await self._call("destroy", self._native.destroy)
        except StateError:
            return  # it went by itself meanwhile

    async def undefine(self) -> None:
        await self.destroy()
        if not self._undefined:
            self._undefined = True
            self._forget()

    async def pause(self) -> None:
        native = self._running("pause")
        if await self.state() is not DomainState.PAUSED:
            await self._call("pause", native.suspend)

    async def resume(self) -> None:
        native = self._running("resume")
        if await self.state() is DomainState.PAUSED:
            await self._call("resume", native.resume)

    async def wait_stopped(self, timeout: float | None = None) -> DomainState:
        try:
            await asyncio.wait_for(self._stopped.wait(), timeout)
        except TimeoutError:
            state = (await self.state()).value
            raise DeadlineError(
                f"stop of domain {self.spec.name!r}", timeout or 0, f"it is {state}"
            ) from None
        async with self._changing:
            if self._stopped.is_set():
                self._native = None
                await self._cleanup()
        return self._last

    def definition(self) -> str:
        native = self._native
        if native is not None:
            try:
                return str(native.XMLDesc())
            except libvirt.libvirtError:
                pass  # it has stopped: show what it would be started from
        return self._describe()

    @abc.abstractmethod
    def _describe(self) -> str:
        """Return the definition that a cold start uses."""

    async def set_memory_target(self, target: int) -> None:
        native = self._running("set the memory of")
        if not 0 < target <= self.spec.max_memory << 20:
            raise HypervisorError(
                self.spec.name,
                "set the memory of",
                f"{target} bytes is not within 1 and {self.spec.max_memory} MiB",
            )
        await self._call("set the memory of", native.setMemory, target // _KIB)

    async def memory_statistics(self) -> MemoryStatistics:
        native = self._running("read the memory of")
        kib = await self._call("read the memory of", native.memoryStats)

        def size(key: str) -> int | None:
            return kib[key] * _KIB if key in kib else None

        return MemoryStatistics(
            actual=kib["actual"] * _KIB,
            total=size("available"),
            unused=size("unused"),
            available=size("usable"),
            cached=size("disk_caches"),
            swapped_in=size("swap_in"),
            swapped_out=size("swap_out"),
        )
