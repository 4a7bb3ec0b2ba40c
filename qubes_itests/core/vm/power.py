"""The life cycle of a VM: start, shutdown, pause, and what follows from each."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import time
from typing import TYPE_CHECKING, Any, Final, Self

from qubes_itests.core import qrexec
from qubes_itests.core.exc import (
    QubesVMError,
    QubesVMNotFoundError,
)
from qubes_itests.core.properties import stateless_property
from qubes_itests.core.vm.ending import STARTS, EndMixin
from qubes_itests.core.vm.pausing import STARTED
from qubes_itests.core.vm.step import Step
from qubes_itests.guest.start.boot import boot
from qubes_itests.hypervisor.contract import DomainState

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from qubes_itests.guest.image.template import Template
    from qubes_itests.guest.link.agent import GuestAgent
    from qubes_itests.guest.start.identity import Identity
    from qubes_itests.hypervisor.contract import Domain, DomainSpec

__all__ = ["PowerMixin"]

log = logging.getLogger("qubes.vm")

_PROHIBIT: Final = "prohibit-start"
#: How many times longer a start may take at most because the CPUs are busy.
_BUSIEST: Final = 4.0

_ENDED: Final = (DomainState.HALTED, DomainState.CRASHED)

#: The numbers of domains.
_XIDS: Final = itertools.count(1)


class PowerMixin(EndMixin):
    """What a VM class needs to have a life cycle.

    One run of a VM is: `domain-pre-start`, storage, boot, `domain-spawn`,
    `domain-start`; and, however it ends, once: storage stopped, `domain-stopped`,
    `domain-shutdown`.  A start that fails ends with `domain-start-failed` instead, once
    too.  The next run begins after that.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._power = "Halted"
        self._xid = -1
        self._starting: asyncio.Task[None] | None = None
        self._begun = self._aborted = False
        self._ending: asyncio.Task[None] | None = None
        #: Held while what follows from the end of a run is done.
        self._domain_stopped_lock = asyncio.Lock()
        #: The domain of the present or the last run.
        self.domain: Domain | None = None
        #: The agent of the present run.
        self.agent: GuestAgent | None = None
        #: Seconds since the epoch of the last start, None before the first.
        self.started_at: float | None = None
        super().__init__(*args, **kwargs)

    # what the other parts of a VM provide

    def boot_files(self) -> Template | None:
        """Return kernel and initramfs; None to boot from its disk.

        :raise QubesVMError: when it has no kernel and cannot do without.
        """
        raise NotImplementedError

    def domain_spec(self, directory: Path, files: Template | None) -> DomainSpec:
        """Return what the hypervisor has to know."""
        raise NotImplementedError

    def identity(self) -> Identity:
        """Return what the guest has to know."""
        raise NotImplementedError

    def start_memory(self) -> int:
        """Return what a start asks of qmemman, in bytes."""
        raise NotImplementedError

    # state

    @stateless_property
    def xid(self) -> int:
        """Return the number of its domain, new in each run; -1 when it is halted."""
        return self._xid if self.is_running() else -1

    @property
    def libvirt_domain(self) -> object | None:
        """The object of libvirt for its domain; None while libvirt knows of none."""
        return None if self.domain is None else self.domain.native

    def get_power_state(self) -> str:
        """Return the state as `qvm-ls` shows it.

        ``Halted``, ``Transient`` (starting), ``Running``, ``Paused``, ``Suspended`` or
        ``Halting``.
        """
        return self._power

    def is_running(self) -> bool:
        """Tell whether there is a domain: starting, running, paused or halting."""
        return self._power != "Halted"

    def is_halted(self) -> bool:
        """Tell whether there is none."""
        return self._power == "Halted"

    def is_starting(self) -> bool:
        """Tell whether a start is under way, other than the one that asks."""
        return self._starting is not None and self._starting not in STARTS.get()

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
        :raise QubesVMError: when it may not be started; what handlers of
            `domain-pre-start` raise.
        """
        del notify_function
        if self._starting is None and self._power in STARTED:
            domain = self.running_domain()
            # It may have ended just now, and the event not be here yet.
            ended = await domain.state() in _ENDED and domain is self.domain
            if not ended and self._starting is None:
                return self
        if self._starting is None:
            if self._ending is not None and asyncio.current_task() is self._ending:
                raise QubesVMError(
                    self,
                    f"VM {self} cannot be started by a handler of the end of its run,"
                    " which the start would wait for; start it in a task of its own",
                )
            self._begun = self._aborted = False
            self._starting = asyncio.ensure_future(
                self._start(start_guid=start_guid, memory=mem_required)
            )
            self._starting.add_done_callback(self._start_done)
        elif self._starting in STARTS.get():
            # a handler of this very start: it is as far as it is
            return self
        await asyncio.shield(self._starting)
        return self

    def _start_done(self, task: asyncio.Task[None]) -> None:
        self._starting = None
        if not task.cancelled():
            # every caller may have gone; then nobody else asks for it
            task.exception()

    async def _start(self, *, start_guid: bool, memory: int | None) -> None:
        this = asyncio.current_task()
        STARTS.set(STARTS.get() | {this})  # type: ignore[arg-type]
        self._begun = True
        try:
            if self._aborted:
                raise asyncio.CancelledError  # noqa: TRY301 - it was killed as early
            if self._ending is not None:
                await asyncio.wait([self._ending])
            self.check_startable()
            await self._begin(start_guid=start_guid, memory=memory)
        except asyncio.CancelledError:
            await self.start_failed()
            raise QubesVMError(self, f"VM {self} was killed before its start") from None
        except BaseException:
            await self.start_failed()
            raise

    def check_startable(self) -> None:
        """Raise when it must not be started."""
        if self not in self.app.domains:
            raise QubesVMNotFoundError(self.name)
        self.check_whole()  # type: ignore[attr-defined]
        if reason := self.features.get(_PROHIBIT):  # type: ignore[attr-defined]
            raise QubesVMError(
                self,
                f"VM {self} must not be started: {reason} (feature {_PROHIBIT!r})",
            )

    async def start_failed(self) -> None:
        """Act on a start that failed, after all of it is undone; for subclasses."""

    async def _begin(self, *, start_guid: bool, memory: int | None) -> None:
        step, began = Step(self), time.monotonic()
        async with contextlib.AsyncExitStack() as undo:
            undo.push_async_exit(step.failed)
            with self._uninterrupted_undoing():
                await self.fire_event_async(
                    "domain-pre-start",
                    pre_event=True,
                    start_guid=start_guid,
                    mem_required=memory,
                )
                async with contextlib.AsyncExitStack() as reservation:
                    await self._reserve_memory(step, reservation, memory)
                    await self._run_steps(
                        step, undo, reservation, start_guid=start_guid
                    )
            undo.pop_all()
        took = time.monotonic() - began
        # Reports take the figures from the record, which outlives the test: no objects.
        started = {"vm_started": (self.name, took)}
        log.info("VM %s started in %.2f s", self.name, took, extra=started)

    @contextlib.contextmanager
    def _uninterrupted_undoing(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            # Too late to be killed: that would leave the undoing half done.
            self._aborted = True
            raise

    def halted_by_failure(self) -> None:
        """Take note that a start failed and is undone."""
        self.agent = None
        self._power = "Halted"

    def start_deadline(self) -> float:
        """Return the seconds that a start may take.

        It is the `qrexec_timeout` that somebody has set: for the VM, its template or
        the app. The default one is for guests with hardware virtualisation on an idle
        machine; emulated ones get more, and all do where others keep the CPUs busy.
        """
        vm: Any = self
        seconds = float(vm.qrexec_timeout)
        while vm is not None:
            if not vm.property_is_default("qrexec_timeout"):
                return seconds
            vm = getattr(vm, "template", None)
        if not self.app.property_is_default("default_qrexec_timeout"):
            return seconds
        return seconds * self.app.hypervisor.slowness * _business()

    async def _reserve_memory(
        self, step: Step, reservation: contextlib.AsyncExitStack, amount: int | None
    ) -> None:
        """Ask qmemman, if it runs, and keep its promise until the stack closes."""
        self._power = "Transient"
        self._xid = next(_XIDS)
        if self.app.qmemman is None:
            return
        await self._prepare_warm_start(step)
        with step("have its memory"):
            asked = self.start_memory() if amount is None else amount
            await reservation.enter_async_context(self.app.qmemman.memory(asked))

    async def _prepare_warm_start(self, step: Step) -> None:
        """Have the saved state made now: with memory reserved nobody else gets any."""
        if self.app.warm_starts is None:
            return
        with step("find its kernel"):
            files = self.boot_files()
        if files is None:
            return
        with step("find a saved state"):
            spec = self.domain_spec(self.app.directory, files)
            await self.app.warm_starts.state_for(spec, self.start_deadline())

    async def _run_steps(
        self,
        step: Step,
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
                timeout=self.start_deadline(),
                warm=self.app.warm_starts,
                on_call=lambda call: qrexec.handle_call(self, call),
                log=self.directory / "agent.log",
                # From then on the domain itself holds its memory.
                on_domain_start=reservation.aclose,
            )
            undo.push_async_callback(self.domain.undefine)
            if self.agent is not None:
                undo.push_async_callback(self.agent.close)
        with step("announce itself"):
            await self.fire_event_async("domain-spawn", start_guid=start_guid)
            self._power = "Running"
            self.started_at = time.time()
            await self.tell_run_changed()
            await self.fire_event_async("domain-start", start_guid=start_guid)
        self._run_began(self.domain, self.agent)


def _business() -> float:
    """Return how many processes want each CPU, within reason: 1 to 4."""
    each = os.getloadavg()[0] / len(os.sched_getaffinity(0))
    return min(max(1.0, each), _BUSIEST)
