"""The life cycle of a VM: start, shutdown, pause, and what follows from each."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import TYPE_CHECKING, Any, Final, Self

from qubes_itests.core import qrexec
from qubes_itests.core.exc import (
    QubesVMError,
    QubesVMNotRunningError,
    QubesVMShutdownTimeoutError,
    QubesVMStartError,
)
from qubes_itests.guest.boot import boot
from qubes_itests.guest.exc import BootError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from qubes_itests.core.app import Qubes
    from qubes_itests.core.storage import Storage
    from qubes_itests.guest.agent import GuestAgent
    from qubes_itests.guest.identity import Identity
    from qubes_itests.guest.template import Template
    from qubes_itests.hypervisor.contract import Domain, DomainSpec

__all__ = ["PowerMixin"]

log = logging.getLogger("qubes.vm")

_PROHIBIT: Final = "prohibit-start"


class PowerMixin:
    """What a VM class needs to have a life cycle.

    One run of a VM is: `domain-pre-start`, storage, boot, `domain-spawn`,
    `domain-start`; and, however it ends, once: storage stopped, `domain-stopped`,
    `domain-shutdown`.  The next run begins after that.
    """

    app: Qubes
    name: str
    storage: Storage

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._power = "Halted"
        self._starting: asyncio.Task[None] | None = None
        self._ending: asyncio.Task[None] | None = None
        #: The domain of the present or the last run.
        self.domain: Domain | None = None
        #: The agent of the present run.
        self.agent: GuestAgent | None = None
        #: Seconds since the epoch of the last start, None before the first.
        self.start_time: float | None = None
        super().__init__(*args, **kwargs)

    # what the other parts of a VM provide

    def boot_files(self) -> Template:
        """Return kernel and initramfs; QubesVMError when the VM has none."""
        raise NotImplementedError

    def domain_spec(self, directory: Path, files: Template) -> DomainSpec:
        """Return what the hypervisor has to know."""
        raise NotImplementedError

    def identity(self) -> Identity:
        """Return what the guest has to know."""
        raise NotImplementedError

    def start_memory(self) -> int:
        """Return what a start asks of qmemman, in bytes."""
        raise NotImplementedError

    async def fire_event_async(
        self, event: str, *, pre_event: bool = False, **kwargs: Any
    ) -> list[Any]:
        """Fire an event; see `qubes_itests.core.events.Emitter`."""
        return await super().fire_event_async(  # type: ignore[misc, no-any-return]
            event, pre_event=pre_event, **kwargs
        )

    # state

    def get_power_state(self) -> str:
        """Return ``Halted``, ``Transient``, ``Running``, ``Paused`` or ``Halting``."""
        return self._power

    def is_running(self) -> bool:
        """Tell whether there is a domain: starting, running, paused or halting."""
        return self._power != "Halted"

    def is_halted(self) -> bool:
        """Tell whether there is none."""
        return self._power == "Halted"

    def is_paused(self) -> bool:
        """Tell whether its virtual CPUs are stopped."""
        return self._power == "Paused"

    @property
    def directory(self) -> Path:
        """Where this VM's console log, sockets and agent log are."""
        return self.app.directory / "vms" / self.name

    # start

    async def start(
        self,
        start_guid: bool = True,  # noqa: FBT001, FBT002 - as in Qubes OS
        notify_function: object = None,
        mem_required: int | None = None,
    ) -> Self:
        """Start the VM; any number of calls at once are one start.

        :param start_guid: passed on in the events; there is no GUI here.
        :param notify_function: accepted for callers of Qubes OS, and not called.
        :param mem_required: bytes to ask of qmemman, if it runs; by default what
            `memory` and the hypervisor's overhead come to.
        :return: the VM.
        :raise QubesVMStartError: names the step that failed; all is undone.
        """
        del notify_function
        if self._starting is None:
            if self._power in ("Running", "Paused"):
                return self
            self._starting = asyncio.ensure_future(
                self._start(start_guid=start_guid, memory=mem_required)
            )
            self._starting.add_done_callback(self._start_done)
        await asyncio.shield(self._starting)
        return self

    def _start_done(self, task: asyncio.Task[None]) -> None:
        self._starting = None
        if not task.cancelled():
            # every caller may have gone; then nobody else asks for it
            task.exception()

    async def _start(self, *, start_guid: bool, memory: int | None) -> None:
        if self._ending is not None:
            await asyncio.shield(self._ending)
        if self.features.get(_PROHIBIT):  # type: ignore[attr-defined]
            raise QubesVMError(
                self,
                f"VM {self} must not be started:"
                f" {self.features[_PROHIBIT]} (feature {_PROHIBIT!r})",  # type: ignore[attr-defined]
            )
        await self.fire_event_async(
            "domain-pre-start", pre_event=True, start_guid=start_guid
        )
        step, began = _Step(self), time.monotonic()
        async with contextlib.AsyncExitStack() as undo:
            undo.push_async_exit(step.failed)
            async with contextlib.AsyncExitStack() as reservation:
                with step("have its memory"):
                    await self._reserve_memory(reservation, memory)
                await self._run_steps(step, undo, reservation, start_guid=start_guid)
            undo.pop_all()
        took = time.monotonic() - began
        # Reports take the figures from the record, which outlives the test: no objects.
        started = {"vm_started": (self.name, took)}
        log.info("VM %s started in %.2f s", self.name, took, extra=started)

    async def _reserve_memory(
        self, reservation: contextlib.AsyncExitStack, amount: int | None
    ) -> None:
        """Ask qmemman, if it runs, and keep its promise until the stack closes."""
        self._power = "Transient"
        if self.app.qmemman is not None:
            asked = self.start_memory() if amount is None else amount
            await reservation.enter_async_context(self.app.qmemman.memory(asked))

    async def _run_steps(
        self,
        step: _Step,
        undo: contextlib.AsyncExitStack,
        reservation: contextlib.AsyncExitStack,
        *,
        start_guid: bool,
    ) -> None:
        with step("find its kernel"):
            files = self.boot_files()
        with step("start its storage"):
            await self.storage.start()
            undo.push_async_callback(self.storage.stop)
        with step("boot"):
            self.directory.mkdir(parents=True, exist_ok=True)
            self.domain, self.agent = await boot(
                self.app.hypervisor,
                self.domain_spec(self.directory, files),
                self.identity(),
                timeout=self.qrexec_timeout,  # type: ignore[attr-defined]
                warm=self.app.warm_starts,
                on_call=lambda call: qrexec.handle_call(self, call),
                log=self.directory / "agent.log",
                # From then on the domain itself holds its memory.
                on_domain_start=reservation.aclose,
            )
            undo.push_async_callback(self.domain.undefine)
            undo.push_async_callback(self.agent.close)
        with step("announce itself"):
            await self.fire_event_async("domain-spawn", start_guid=start_guid)
            self._power = "Running"
            self.start_time = time.time()
            await self.fire_event_async("domain-start", start_guid=start_guid)
        self._ending = asyncio.ensure_future(self._end_of_run(self.domain, self.agent))
        self._ending.add_done_callback(self._ending_done)

    # the end of a run

    async def _end_of_run(self, domain: Domain, agent: GuestAgent) -> None:
        await domain.wait_stopped()
        self._power = "Halting"
        try:
            await agent.close()
            await domain.undefine()
            await self.storage.stop()
        finally:
            self.agent = None
            self._power = "Halted"
        await self.fire_event_async("domain-stopped")
        await self.fire_event_async("domain-shutdown")

    def _ending_done(self, task: asyncio.Task[None]) -> None:
        if self._ending is task:
            self._ending = None
        if not task.cancelled() and task.exception() is not None:
            log.error("the end of VM %s failed: %s", self.name, str(task.exception()))
            self.app.problems.append(f"VM {self}: {task.exception()}")

    async def wait_ended(self, timeout: float) -> None:
        """Wait until the end of the present run is dealt with; at once if halted.

        :param timeout: seconds; then TimeoutError.
        """
        if self._ending is not None:
            async with asyncio.timeout(timeout):
                await asyncio.shield(self._ending)

    async def shutdown(
        self,
        force: bool = False,  # noqa: FBT001, FBT002 - as in Qubes OS
        wait: bool = False,  # noqa: FBT001, FBT002
        timeout: float | None = None,
    ) -> Self:
        """Ask the guest to power off.

        :param force: do it even if handlers of `domain-pre-shutdown` object.
        :param wait: return when all of the run has ended.
        :param timeout: seconds to wait; by default the VM's `shutdown_timeout`.
        :raise QubesVMNotStartedError: when it is halted.
        :raise QubesVMShutdownTimeoutError: when it runs still; it goes on running.
        """
        agent = self._running_agent()
        await self.fire_event_async("domain-pre-shutdown", pre_event=True, force=force)
        if self._power == "Paused":
            await self.unpause()
        await agent.power_off()
        if not wait:
            return self
        limit = float(timeout or self.shutdown_timeout)  # type: ignore[attr-defined]
        try:
            await self.wait_ended(limit)
        except TimeoutError:
            raise QubesVMShutdownTimeoutError(self, limit) from None
        return self

    async def kill(self) -> None:
        """Stop the VM at once, as pulling the plug does.

        :raise QubesVMNotStartedError: when it is halted.
        """
        if self._starting is not None:
            starting = self._starting
            starting.cancel()
            await asyncio.wait([starting])
            return
        await self._running_domain().destroy()
        await self.wait_ended(float(self.shutdown_timeout))  # type: ignore[attr-defined]

    def _running_agent(self) -> GuestAgent:
        if self.agent is None or self._power in ("Halted", "Transient"):
            raise QubesVMNotRunningError(self)
        return self.agent

    def _running_domain(self) -> Domain:
        self._running_agent()
        if self.domain is None:
            raise QubesVMNotRunningError(self)
        return self.domain

    async def pause(self) -> None:
        """Stop its virtual CPUs; QubesVMNotStartedError when it is halted."""
        domain = self._running_domain()
        await self.fire_event_async("domain-pre-paused", pre_event=True)
        await domain.pause()
        self._power = "Paused"
        await self.fire_event_async("domain-paused")

    async def unpause(self) -> None:
        """Let its virtual CPUs run; QubesVMNotStartedError when it is halted."""
        domain = self._running_domain()
        await self.fire_event_async("domain-pre-unpaused", pre_event=True)
        await domain.resume()
        self._power = "Running"
        await self.fire_event_async("domain-unpaused")


class _Step:
    """Remembers which step of a start is under way, for the error that names it."""

    def __init__(self, vm: PowerMixin) -> None:
        self.vm = vm
        self.name = "begin"

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.name = name
        log.info("VM %s starts: %s", self.vm.name, name)
        yield

    async def failed(self, _cls: object, error: object, _traceback: object) -> None:
        """Set the VM back to halted and raise an error that names the step."""
        if not isinstance(error, BaseException):
            return
        self.vm.agent = None
        self.vm._power = "Halted"  # noqa: SLF001 - a part of the class above
        await self.vm.fire_event_async("domain-start-failed", reason=str(error))
        if isinstance(error, Exception):
            step, reason = self.name, str(error)
            if isinstance(error, BootError):
                # the steps of a boot say more than that it was one
                step, reason = error.step, error.told
            raise QubesVMStartError(self.vm, step, reason) from error
