"""Common part of the domains of libvirt's drivers, and libvirt's words for them."""

# ruff: noqa: D102 - the contract documents its methods
from __future__ import annotations

import abc
import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import libvirt

from qubes_itests.exc import DeadlineError
from qubes_itests.host import memory
from qubes_itests.hypervisor.contract import (
    Domain,
    DomainSpec,
    DomainState,
    LifecycleEvent,
    MemoryStatistics,
)
from qubes_itests.hypervisor.exc import HypervisorError, StateError
from qubes_storage.uninterrupted import to_its_end

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from qubes_itests.hypervisor.connection import Connection

__all__ = ["LibvirtDomain", "is_panic", "lifecycle_event", "lifecycle_state"]

#: Seconds in which libvirt must tell that a domain it has stopped is stopped.
_STOP_EVENT = 10.0

_EVENTS = {
    libvirt.VIR_DOMAIN_EVENT_STARTED: LifecycleEvent.STARTED,
    libvirt.VIR_DOMAIN_EVENT_SUSPENDED: LifecycleEvent.PAUSED,
    libvirt.VIR_DOMAIN_EVENT_RESUMED: LifecycleEvent.RESUMED,
    libvirt.VIR_DOMAIN_EVENT_STOPPED: LifecycleEvent.STOPPED,
}

#: How a domain stops that nobody stopped: its guest panicked, or its process died.
_CRASHES = {
    libvirt.VIR_DOMAIN_EVENT_STOPPED_CRASHED,
    libvirt.VIR_DOMAIN_EVENT_STOPPED_FAILED,
}

_PANICS = {
    (libvirt.VIR_DOMAIN_EVENT_CRASHED, libvirt.VIR_DOMAIN_EVENT_CRASHED_PANICKED),
    (libvirt.VIR_DOMAIN_EVENT_STOPPED, libvirt.VIR_DOMAIN_EVENT_STOPPED_CRASHED),
}

_STATES = {
    libvirt.VIR_DOMAIN_RUNNING: DomainState.RUNNING,
    libvirt.VIR_DOMAIN_BLOCKED: DomainState.RUNNING,
    libvirt.VIR_DOMAIN_PAUSED: DomainState.PAUSED,
    libvirt.VIR_DOMAIN_SHUTDOWN: DomainState.DYING,
    libvirt.VIR_DOMAIN_SHUTOFF: DomainState.HALTED,
    libvirt.VIR_DOMAIN_CRASHED: DomainState.CRASHED,
    libvirt.VIR_DOMAIN_PMSUSPENDED: DomainState.SUSPENDED,
}

_KIB = 1024
_NANOSECONDS = 1_000_000_000


class LibvirtDomain(Domain):
    """A transient libvirt domain: libvirt knows it while it runs.

    :param publish: called on the event loop with every event of the domain.
    :param forget: called when the domain is undefined.
    """

    def __init__(
        self,
        connection: Connection,
        spec: DomainSpec,
        publish: Callable[[LibvirtDomain, LifecycleEvent], None],
        forget: Callable[[Domain], None],
    ) -> None:
        self.spec = spec
        #: What libvirt calls it in its present run: another domain may have begun that.
        self.libvirt_name, self.libvirt_uuid = spec.name, spec.uuid
        self._connection = connection
        self._publish = publish
        self._forget = forget
        self._native: Any = None
        # Held while a run begins or ends, so that there is one run at a time. Not held
        # for what a running domain is asked: it must be possible to destroy a domain
        # whose QEMU hangs in a call.
        self._changing = asyncio.Lock()
        self._stopped = asyncio.Event()
        self._stopped.set()
        self._last = DomainState.HALTED
        self._announced: LifecycleEvent | None = None
        self._ending: asyncio.Future[None] | None = None
        self._loading = self._destroying = self._undefined = False
        #: What `memory.kills` was when its run began.
        self.kills = 0

    @abc.abstractmethod
    async def _create(
        self,
        saved_state: Path | None,
        saved_disks: tuple[str, ...],
        to_save: Path | None,
    ) -> None:
        """Bring the domain to life; set libvirt's handle as soon as there is one."""

    async def _cleanup(self) -> None:
        """Take away what a run of the domain leaves on the host."""

    async def _pull_plug(self) -> None:
        """Stop the domain in a quicker way than libvirt's, if there is one."""

    def _showed_panic(self) -> bool:
        """Tell whether its console shows a panic; asked after the clean-up."""
        return False

    def memory_held(self) -> int:
        """Return how much of this machine's memory it has for itself, MiB."""
        return self.spec.memory

    def handle_event(self, event: LifecycleEvent) -> None:
        """Take note of one of libvirt's events; call it on the event loop."""
        # libvirt says more than once how a domain ended (its QEMU panicked, then went).
        # The first counts; what comes later must not end the domain's next run.
        if self._stopped.is_set() or self._ending is not None:
            return
        if event in (LifecycleEvent.STOPPED, LifecycleEvent.CRASHED):
            self._ending = asyncio.ensure_future(self._end(event))
        elif self._is_news(event):
            self._announced = event
            self._publish(self, event)

    def _is_news(self, event: LifecycleEvent) -> bool:
        # libvirt tells of the steps of a start too: a domain is resumed before it is
        # started, and one that loads a state is paused meanwhile.
        if event is LifecycleEvent.STARTED:
            return self._announced is None
        if self._announced is None or self._loading:
            self._loading &= event is not LifecycleEvent.RESUMED
            return False
        paused = self._announced is LifecycleEvent.PAUSED
        return paused is (event is LifecycleEvent.RESUMED)

    async def _end(self, event: LifecycleEvent) -> None:
        """Clean up after a run, then say that it is over, and how."""
        try:
            await self._cleanup()
        finally:
            self.panicked |= self._showed_panic()
            if self.panicked and not self._destroying:
                event = LifecycleEvent.CRASHED
            if self._destroying or self._loading:
                # QEMU's failure to load a state is none of a guest's
                event = LifecycleEvent.STOPPED
            crashed = event is LifecycleEvent.CRASHED
            self._last = DomainState.CRASHED if crashed else DomainState.HALTED
            self._native = self._ending = None
            # After the clean-up, for a start that waits for this makes the same pipes
            # and sockets anew; and all that is asked for from here on must be settled,
            # since those who wait look at it. Published last: a handler may start it.
            self._stopped.set()
            self._publish(self, event)

    async def _call(self, action: str, function: Callable[..., Any], *args: Any) -> Any:
        return await self._connection.call(self.spec.name, action, function, *args)

    def _running(self, action: str) -> Any:
        if self._native is None or self._stopped.is_set():
            raise StateError(self.spec.name, action, "it is not running")
        return self._native

    @property
    def native(self) -> object | None:
        native: object = self._native
        return native

    async def state(self) -> DomainState:
        if self._native is None or self._stopped.is_set():
            return self._last
        # it may go between the look and the answer, and libvirt forgets it at once
        try:
            state, _reason = await self._call("ask", self._native.state)
        except StateError:
            return self._last
        return lifecycle_state(state)

    async def start(
        self,
        *,
        saved_state: Path | None = None,
        saved_disks: tuple[str, ...] = (),
        to_save: Path | None = None,
    ) -> None:
        await self._begin(
            lambda: self._create(saved_state, saved_disks, to_save),
            loading=saved_state is not None,
        )

    async def _begin(
        self, create: Callable[[], Awaitable[None]], *, loading: bool
    ) -> None:
        """Begin a run; what a `create` that fails has made is undone."""
        async with self._changing:
            if self._undefined:
                raise StateError(self.spec.name, "start", "it is not defined any more")
            state = await self.state()
            if state not in (DomainState.HALTED, DomainState.CRASHED):
                raise StateError(self.spec.name, "start", f"it is {state.value}")
            # libvirt says that it is off before we have its event; that event, and the
            # clean-up which it causes, would hit the run that begins here
            await self._settle()
            self._stopped.clear()
            self.libvirt_name, self.libvirt_uuid = self.spec.name, self.spec.uuid
            self._last = DomainState.HALTED
            self._announced = None
            self._destroying = self.panicked = False
            self.kills = memory.kills()
            self._loading = loading
            try:
                await create()
            except BaseException:
                # also when cancelled: a QEMU that nobody has a handle of would stay
                await to_its_end(self._undo_start())
                raise

    async def hand_over(self, heir: LibvirtDomain) -> Any:
        """Let go of a paused run, which goes on as the heir's; return libvirt's object.

        :raise StateError: it is not paused.
        """
        async with self._changing:
            state, native = await self.state(), self._running("adopt")
            # Else its end would be that of this domain still.
            if state is not DomainState.PAUSED or self._ending is not None:
                raise StateError(self.spec.name, "adopt", f"it is {state.value}")
            # In one step of the loop, in which no event can come in: each is told to
            # the one whose UUID it is.
            heir.libvirt_name, heir.libvirt_uuid = self.libvirt_name, self.libvirt_uuid
            self._native = None
            self._undefined = True
            self._stopped.set()
            self._connection.forget(self.spec.name)
            self._forget(self)
            return native

    def _announce_paused(self) -> None:
        """Tell of a run that has begun with a state, and is paused."""
        # libvirt's events may be on their way still, and are no news then
        if self._announced is None:
            self._publish(self, LifecycleEvent.STARTED)
        self._loading = False
        self._announced = LifecycleEvent.PAUSED
        self._publish(self, LifecycleEvent.PAUSED)

    async def _undo_start(self) -> None:
        if self._native is not None:
            await self._stop()
            return
        # libvirt has made nothing, and so will tell of no end
        self._stopped.set()
        await self._cleanup()

    async def _settle(self) -> None:
        """Wait until the event of a stop is in; should it get lost, go on without."""
        try:
            async with asyncio.timeout(_STOP_EVENT):
                await self._stopped.wait()
        except TimeoutError:
            self.handle_event(LifecycleEvent.STOPPED)
            await self._stopped.wait()

    async def destroy(self) -> None:
        async with self._changing:
            await self._stop()

    async def _stop(self) -> None:
        native = self._native
        if native is None:
            return
        # before the plug is pulled: libvirt calls the death of QEMU a crash
        self._destroying = True
        await self._pull_plug()
        with contextlib.suppress(StateError):  # it may go by itself meanwhile
            await self._call("destroy", native.destroy)
        await self._settle()

    async def undefine(self) -> None:
        await self.destroy()
        if not self._undefined:
            self._undefined = True
            self._connection.forget(self.spec.name)
            self._forget(self)

    async def press_power_button(self) -> None:
        native = self._running("press the power button of")
        await self._call("press the power button of", native.shutdown)

    async def pause(self) -> None:
        native = self._running("pause")
        try:
            # Not asked first: who pauses several wants them to stop at one moment.
            await self._call("pause", native.suspend)
        except HypervisorError:
            if await self.state() is not DomainState.PAUSED:
                raise

    async def resume(self) -> None:
        native = self._running("resume")
        if await self.state() is DomainState.PAUSED:
            await self._call("resume", native.resume)

    async def wait_stopped(self, timeout: float | None = None) -> DomainState:
        try:
            async with asyncio.timeout(timeout):
                await self._stopped.wait()
        except TimeoutError:
            state = (await self.state()).value
            raise DeadlineError(
                f"stop of domain {self.spec.name!r}", timeout or 0, f"it is {state}"
            ) from None
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
                f"expected 1 byte to {self.spec.max_memory} MiB, got {target} bytes",
            )
        await self._call("set the memory of", native.setMemory, target // _KIB)

    async def cpu_time(self) -> float:
        native = self._running("read the CPU time of")
        info = await self._call("read the CPU time of", native.info)
        return float(info[4]) / _NANOSECONDS

    async def memory_statistics(self) -> MemoryStatistics:
        native = self._running("read the memory of")
        kib = await self._call("read the memory of", native.memoryStats)
        if "actual" not in kib:  # the test driver's are of the guest alone
            kib["actual"] = (await self._call("ask", native.info))[2]

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
            updated=kib.get("last_update"),
        )


def lifecycle_event(event: int, detail: int) -> LifecycleEvent | None:
    """Return the contract's event for one of libvirt's, None if it has none."""
    if event == libvirt.VIR_DOMAIN_EVENT_STOPPED and detail in _CRASHES:
        return LifecycleEvent.CRASHED
    return _EVENTS.get(event)


def is_panic(event: int, detail: int) -> bool:
    """Tell whether libvirt says that the guest's kernel panicked.

    It learns that from QEMU's pvpanic device, and stops the domain then, which is an
    event of its own. Of a QEMU that dies it says that it failed.
    """
    return (event, detail) in _PANICS


def lifecycle_state(state: int) -> DomainState:
    """Return the contract's state for one of libvirt's."""
    return _STATES.get(state, DomainState.HALTED)
