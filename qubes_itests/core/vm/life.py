"""The life of a VM: one state machine, in which runs follow one another.

A run is `domain-pre-start`, storage, boot, `domain-spawn`, `domain-start`; and, however
it ends, once: storage stopped, `domain-stopped`, `domain-shutdown`.  A start that fails
ends with `domain-start-failed` instead, once too.  The next run begins after that.

::

    HALTED -> TRANSIENT -> RUNNING <-> PAUSED, SUSPENDED
      ^           |           |              |
      |         fails         +-- it ends ---+
      |           |                  |
      +-----------+---- HALTING <----+
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import enum
import itertools
import logging
import subprocess
import time
import weakref
from typing import TYPE_CHECKING, Final

from qubes_itests import timeline
from qubes_itests.core import qrexec
from qubes_itests.core.exc import (
    QubesException,
    QubesVMError,
    QubesVMInUseError,
    QubesVMNotPausedError,
    QubesVMNotRunningError,
    QubesVMNotStartedError,
    QubesVMShutdownTimeoutError,
)
from qubes_itests.core.vm.boot_data import (
    boot_files,
    domain_spec,
    identity,
    start_deadline,
)
from qubes_itests.core.vm.start_memory import reserve_memory
from qubes_itests.core.vm.step import Step
from qubes_itests.exc import HarnessError
from qubes_itests.guest.exc import GuestGoneError
from qubes_itests.guest.link.agent import GuestAgent
from qubes_itests.guest.link.journal import GuestJournal
from qubes_itests.guest.start.boot import boot
from qubes_itests.hypervisor.contract import DomainState
from qubes_itests.hypervisor.exc import StateError
from qubes_storage.uninterrupted import to_its_end

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from qubes_itests.core.vm.qubesvm import QubesVM
    from qubes_itests.hypervisor.contract import Domain, DomainSpec

__all__ = ["Life", "PowerState"]

log = logging.getLogger("qubes.vm")

#: The starts that this task is a part of: those of which it must not await the end.
#: Weakly: contexts outlive starts, in tasks that others share and in timers that were
#: cancelled, and a start that failed has an error that holds the VM and much else.
_STARTS: Final[contextvars.ContextVar[weakref.WeakSet[asyncio.Task[None]]]] = (
    contextvars.ContextVar("starts", default=weakref.WeakSet())  # noqa: B039 - nobody adds
)
#: The numbers of domains.
_XIDS: Final = itertools.count(1)

#: Seconds that a guest has to get ready for being suspended, and to wake up again.
_SERVICE_TIMEOUT: Final = 10.0
#: Seconds that the agent of a thawed guest has to answer.
_ANSWER_TIMEOUT: Final = 30.0
#: So many entries of a guest's database are kept, all of which are looked through at
#: each change: those of 32 devices, as an agent tells of no more.
_MOST_ENTRIES: Final = 32 * 4 + 1
#: Seconds that a guest has to set its clock.
_CLOCK_TIMEOUT: Final = 20.0


class PowerState(enum.StrEnum):
    """The states of a VM, in the words of `qvm-ls`."""

    HALTED = "Halted"
    TRANSIENT = "Transient"
    RUNNING = "Running"
    PAUSED = "Paused"
    SUSPENDED = "Suspended"
    HALTING = "Halting"


_STILL: Final = (PowerState.PAUSED, PowerState.SUSPENDED)
_STARTED: Final = (PowerState.RUNNING, *_STILL)
_NO_DOMAIN: Final = (PowerState.HALTED, PowerState.TRANSIENT)
_ENDED: Final = (DomainState.HALTED, DomainState.CRASHED)


class Life:
    """The runs of one VM, one at a time.

    :param vm: the VM.
    """

    def __init__(self, vm: QubesVM) -> None:
        self._vm = vm
        self._state = PowerState.HALTED
        #: What the guest of the present run has said of its devices.
        self.device_entries: dict[str, str] = {}
        #: The number of the present or the last domain, -1 before the first.
        self.xid = -1
        #: The domain of the present or the last run.
        self.domain: Domain | None = None
        #: The agent of the present run.
        self.agent: GuestAgent | None = None
        #: What its guest logs in the present run; None without an agent.
        self.journal: GuestJournal | None = None
        #: Seconds since the epoch of the last start, None before the first.
        self.started_at: float | None = None
        self._starting: asyncio.Task[None] | None = None
        self._ending: asyncio.Task[None] | None = None
        # A start that is killed before its task has run a step must not be cancelled:
        # nothing would undo it then. It is told by `_aborted`, and sees that itself.
        self._begun = self._aborted = False
        #: Held while what follows from the end of a run is done.
        self.stopped_lock = asyncio.Lock()

    @property
    def state(self) -> PowerState:
        """The present one."""
        return self._state

    @state.setter
    def state(self, state: PowerState) -> None:
        if state is not self._state:
            timeline.note("state", self._vm.name, state=str(state))
        self._state = state

    @property
    def is_starting(self) -> bool:
        """Whether a start is under way, other than the one that asks."""
        return self._starting is not None and self._starting not in _STARTS.get()

    @property
    def is_paused(self) -> bool:
        """Whether its virtual CPUs stand still."""
        return self.state in _STILL

    def running_domain(self) -> Domain:
        """Return the domain; QubesVMNotRunningError when it is not started."""
        if self.domain is None or self.state in _NO_DOMAIN:
            raise QubesVMNotRunningError(self._vm)
        return self.domain

    def running_agent(self) -> GuestAgent:
        """Return the agent.

        :raise QubesVMNotRunningError: when the VM is not started.
        :raise QubesVMError: when it has none, for it booted from its own disk.
        """
        self.running_domain()
        if self.agent is None:
            raise QubesVMError(
                self._vm,
                f"VM {self._vm} has no agent, as it has no kernel: it runs no commands",
            )
        return self.agent

    # start

    async def start(self, *, start_guid: bool, memory: int | None) -> None:
        """Start the VM; any number of calls at once are one start.

        :param start_guid: passed on in the events.
        :param memory: bytes to ask of qmemman; None for what the VM's settings say.
        :raise QubesVMStartError: names the step that failed; all is undone.
        """
        if self._starting is None and self.state in _STARTED:
            domain = self.running_domain()
            # It may have ended just now, and the event not be here yet.
            ended = await domain.state() in _ENDED and domain is self.domain
            if not ended and self._starting is None:
                return
        if self._starting is None:
            if self._ending is not None and asyncio.current_task() is self._ending:
                raise QubesVMError(
                    self._vm,
                    f"VM {self._vm} cannot be started by a handler of the end of its"
                    " run, which the start would wait for; start it in a task of its"
                    " own",
                )
            self._begun = self._aborted = False
            self._starting = asyncio.ensure_future(
                self._start(start_guid=start_guid, memory=memory)
            )
            self._starting.add_done_callback(self._task_done)
        elif self._starting in _STARTS.get():
            # a handler of this very start: it is as far as it is
            return
        # A caller that is cancelled leaves the start to the others who wait for it.
        await asyncio.shield(self._starting)

    def _task_done(self, task: asyncio.Task[None]) -> None:
        # A task that is cancelled before its first step runs no `finally`: here it is
        # forgotten all the same, or nobody could start the VM again.
        if self._starting is task:
            self._starting = None
        if self._ending is task:
            self._ending = None
        if not task.cancelled():
            # Every caller may have gone; asked for, the error is no warning. That of an
            # end is among the app's problems.
            task.exception()

    async def _start(self, *, start_guid: bool, memory: int | None) -> None:
        this = asyncio.current_task()
        _STARTS.set(_STARTS.get() | {this})  # type: ignore[arg-type]
        self._begun = True
        try:
            if self._aborted:
                raise asyncio.CancelledError  # noqa: TRY301 - it was killed as early
            if self._ending is not None:
                await asyncio.wait([self._ending])
            self._vm.check_startable()
            await self._begin(start_guid=start_guid, memory=memory)
        except asyncio.CancelledError:
            await self._vm.start_failed()
            raise QubesVMError(
                self._vm, f"VM {self._vm} was killed before its start"
            ) from None
        except BaseException:
            await self._vm.start_failed()
            raise

    async def _begin(self, *, start_guid: bool, memory: int | None) -> None:
        step = Step(self._vm)
        async with contextlib.AsyncExitStack() as undo:
            undo.push_async_exit(step.failed)
            try:
                await self._vm.fire_event_async(
                    "domain-pre-start",
                    pre_event=True,
                    start_guid=start_guid,
                    mem_required=memory,
                )
                async with contextlib.AsyncExitStack() as reservation:
                    self.state = PowerState.TRANSIENT
                    self.xid = next(_XIDS)
                    await reserve_memory(self._vm, step, reservation, memory)
                    await self._run_steps(
                        step, undo, reservation, start_guid=start_guid
                    )
            except BaseException:
                # Too late to be killed: that would leave the undoing half done.
                self._aborted = True
                raise
            # From here on the end of the run does what the steps would undo.
            undo.pop_all()
        log.info("VM %s started in %.2f s", self._vm.name, step.succeeded())

    def halted_by_failure(self) -> None:
        """Take note that a start failed and is undone."""
        self.agent, self.device_entries = None, {}
        self.state = PowerState.HALTED

    async def _run_steps(
        self,
        step: Step,
        undo: contextlib.AsyncExitStack,
        reservation: contextlib.AsyncExitStack,
        *,
        start_guid: bool,
    ) -> None:
        vm = self._vm
        with step("find its kernel"):
            files = boot_files(vm)
        with step("start its storage"):
            await vm.storage.start()
            undo.push_async_callback(vm.storage.stop)
        with step("boot"):
            who, begun = identity(vm), time.time()
            vm.directory.mkdir(parents=True, exist_ok=True)
            self.domain, self.agent = await boot(
                vm.app.hypervisor,
                domain_spec(vm, vm.directory, files),
                who,
                timeout=start_deadline(vm),
                warm=vm.app.warm_starts,
                on_call=lambda call: qrexec.handle_call(vm, call),
                log=vm.directory / "agent.log",
                # From then on the domain itself holds its memory.
                on_domain_start=reservation.aclose,
                on_step=step.part,
            )
            undo.push_async_callback(self.domain.undefine)
            self.journal = None
            if self.agent is not None:
                undo.push_async_callback(self.agent.close)
                self.journal = GuestJournal(self.agent, who.init, begun)
                if timeline.follows_logs():
                    self.journal.follow()
        with step("start its net VM"):
            await vm.net.netvm_started()
        with step("announce itself"):
            await vm.fire_event_async("domain-spawn", start_guid=start_guid)
            self.state = PowerState.RUNNING
            self.started_at = time.time()
            if self.agent is not None:
                self._follow_devices(self.agent)
            await self._tell_run_changed()
            await vm.fire_event_async("domain-start", start_guid=start_guid)
        self._watch(self.domain)

    async def thaw(self, spec: DomainSpec, state: Path) -> None:
        """Begin a run where another one was frozen; its virtual CPUs stand still.

        The volumes have been started.  No event tells of it, as with a VM that runs
        when the core itself is started: what they cause, the guest has behind it.

        :param spec: of the domain.
        :param state: what a domain of that spec has written as it was frozen.
        :raise HypervisorError: it does not load; the VM is halted still.
        """
        vm = self._vm
        vm.directory.mkdir(parents=True, exist_ok=True)
        domain = await vm.app.hypervisor.define(spec)
        try:
            await domain.thaw(state)
        except BaseException:
            await to_its_end(domain.undefine())
            raise
        # programs that have written to the console ran before
        domain.distrust_console()
        self.domain, self.xid, self.started_at = domain, next(_XIDS), time.time()
        self.state = PowerState.PAUSED
        self._watch(domain)

    async def go_on(self) -> None:
        """Take up the connection to the guest of a thawed run, whose CPUs run by now.

        :raise DeadlineError: it does not answer; it runs all the same.
        :raise GuestGoneError: it has stopped.
        """
        vm, domain = self._vm, self.running_domain()
        self._become(domain, PowerState.RUNNING)
        if domain.spec.kernel is not None:
            self.agent = await GuestAgent.connect(
                domain,
                timeout=_ANSWER_TIMEOUT * vm.app.hypervisor.slowness,
                on_call=lambda call: qrexec.handle_call(vm, call),
                log=vm.directory / "agent.log",
            )
            domain.end_channel_with_agent()
            self._follow_devices(self.agent)

    def _follow_devices(self, agent: GuestAgent) -> None:
        """Take over what the guest says of its devices, and has said, in its database.

        Who is told of one may have another VM have it at once: so when it is running.
        """
        entries = self.device_entries = {}

        def note(path: str, value: str | None) -> None:
            if value is None:
                entries.pop(path, None)
            elif path in entries or len(entries) < _MOST_ENTRIES:
                entries[path] = value
            self._vm.note_qdb_change(path)

        agent.on_db_change(note)

    # end

    def _watch(self, domain: Domain) -> None:
        self._ending = asyncio.ensure_future(self._end_of_run(domain))
        self._ending.add_done_callback(self._task_done)

    async def _end_of_run(self, domain: Domain) -> None:
        failures: list[Exception] = []

        async def attempt(action: Awaitable[object]) -> None:
            # whatever fails: the run has ended, and all have to hear of it
            try:
                await action
            except Exception as error:  # noqa: BLE001 - raised below
                failures.append(error)

        await attempt(domain.wait_stopped())
        async with self.stopped_lock:
            self.state = PowerState.HALTING
            if self.agent is not None:
                await attempt(self.agent.close())
            # In this order: volumes are committed when no process can write to them.
            for end in (domain.undefine, self._vm.storage.stop):
                await attempt(end())
            self.agent, self.device_entries = None, {}
            self.state = PowerState.HALTED
            await attempt(self._vm.fire_event_async("domain-stopped"))
            await attempt(self._tell_run_changed())
            await attempt(self._vm.fire_event_async("domain-shutdown"))
        for error in failures:
            self._vm.note_problem(error)
        if failures:
            raise failures[0]

    async def _tell_run_changed(self) -> None:
        """Tell those who keep what is another with each run."""
        for name in ("xid", "stubdom_xid", "start_time"):
            await self._vm.fire_event_async(f"property-reset:{name}", name=name)

    async def wait_ended(self, timeout: float) -> None:
        """Wait until the end of the present run is dealt with; at once if halted.

        :param timeout: seconds; then TimeoutError.
        """
        if self._ending is not None and self._ending is not asyncio.current_task():
            async with asyncio.timeout(timeout):
                # whose time is over must not end what is done for all who wait
                await asyncio.shield(self._ending)

    async def shutdown(self, *, force: bool, wait: bool, timeout: float) -> None:
        """Ask the guest to power off; without an agent by the machine's power button.

        :param force: do it even if running VMs have it as their net VM, or if it is
            paused, as it is unpaused for this; handlers of `domain-pre-shutdown` are
            told, and need not object then.
        :param wait: return when all of the run has ended.
        :param timeout: seconds to wait.
        :raise QubesVMNotStartedError: when it is halted.
        :raise QubesVMInUseError: when running VMs need it, and `force` is not set.
        :raise QubesVMNotRunningError: when it is paused, and `force` is not set.
        :raise QubesVMShutdownTimeoutError: when it runs still; it goes on running.
        """
        vm = self._vm
        if self.state is PowerState.HALTED:
            raise QubesVMNotStartedError(vm)
        domain, agent = self.running_domain(), self.agent
        try:
            clients = [each.name for each in vm.connected_vms if each.is_running()]
            if clients and not force:
                raise QubesVMInUseError(  # noqa: TRY301 - announced below
                    vm,
                    f"VM {vm} connects running VMs to the network:"
                    f" {', '.join(clients)}; shut these down first, or force it",
                )
            await vm.fire_event_async(
                "domain-pre-shutdown", pre_event=True, force=force
            )
            if self.is_paused and not force:
                raise QubesVMNotRunningError(  # noqa: TRY301 - as above
                    vm, f"VM {vm} is paused: unpause it first, or force it"
                )
            if self.is_paused:
                await self.unpause()
            try:
                await (
                    domain.press_power_button if agent is None else agent.power_off
                )()
            except (GuestGoneError, StateError):
                # it went by itself, or will be found not to in time
                wait = True
            if wait:
                try:
                    await self.wait_ended(timeout)
                except TimeoutError:
                    reason = f"did not shut down within {timeout:g} s; kill() stops it"
                    raise QubesVMShutdownTimeoutError(vm, f"VM {vm} {reason}") from None
        except Exception as error:
            await vm.fire_event_async("domain-shutdown-failed", reason=str(error))
            raise

    async def kill(self, timeout: float) -> None:
        """Stop the VM at once, as pulling the plug does; a start under way fails.

        :param timeout: seconds that what follows from the end may take.
        :raise QubesVMNotStartedError: when it is halted.
        """
        if self._starting is not None:
            starting = self._starting
            # Once: a second cancellation would hit the undoing. And never before the
            # task has run a step: it would end without that, and nothing undo it.
            if not self._aborted:
                self._aborted = True
                if self._begun:
                    starting.cancel()
            if starting in _STARTS.get():
                await asyncio.sleep(0)  # where the cancellation arrives
            else:
                await asyncio.wait([starting])
            if self.state is PowerState.HALTED:
                return
        if self.state is PowerState.HALTED:
            raise QubesVMNotStartedError(self._vm)
        await self.running_domain().destroy()
        await self.wait_ended(timeout)

    # the virtual CPUs stand still

    async def pause(self) -> None:
        """Stop its virtual CPUs; QubesVMNotStartedError when it is halted."""
        domain = self.running_domain()
        await self._vm.fire_event_async("domain-pre-paused", pre_event=True)
        await self._switch(domain, domain.pause, PowerState.PAUSED)
        await self._vm.fire_event_async("domain-paused")

    async def unpause(self) -> None:
        """Let its virtual CPUs run, and set its clock, which stood still as well.

        :raise QubesVMNotPausedError: when they run, or it is halted.
        """
        if not self.is_paused:
            raise QubesVMNotPausedError(self._vm)
        domain = self.running_domain()
        await self._vm.fire_event_async("domain-pre-unpaused", pre_event=True)
        await self._switch(domain, domain.resume, PowerState.RUNNING)
        if self.agent is not None:
            try:
                await self.agent.set_clock(time.time_ns(), timeout=_CLOCK_TIMEOUT)
            except HarnessError as error:
                log.warning(
                    "VM %s goes on with a clock that is late: %s",
                    self._vm.name,
                    str(error),
                )
        await self._vm.fire_event_async("domain-unpaused")

    async def suspend(self) -> None:
        """Let the guest get ready for a long pause, and pause it.

        :raise QubesVMNotStartedError: when it is halted.
        """
        if not self.is_paused:
            self.running_domain()
            await self._tell("qubes.SuspendPreAll")
            await self.pause()
        self._become(self.running_domain(), PowerState.SUSPENDED)

    async def resume(self) -> None:
        """Wake it up from `suspend`; a VM that is only paused is unpaused.

        :raise QubesVMNotPausedError: when it is neither suspended nor paused.
        """
        suspended = self.state is PowerState.SUSPENDED
        await self.unpause()
        if suspended:
            await self._tell("qubes.SuspendPostAll")

    async def _switch(
        self, domain: Domain, action: Callable[[], Awaitable[None]], state: PowerState
    ) -> None:
        try:
            await action()
        except StateError as error:
            raise QubesVMNotRunningError(self._vm) from error
        self._become(domain, state)

    def _become(self, domain: Domain, state: PowerState) -> None:
        # The run may have ended meanwhile, and the next one may have begun.
        if self.domain is not domain or self.state not in _STARTED:
            raise QubesVMNotRunningError(self._vm)
        self.state = state

    async def _tell(self, service: str) -> None:
        """Call a service that the guest may have or not have."""
        try:
            await self._vm.commands.ask_service(
                service, f"call {service}", user="root", timeout=_SERVICE_TIMEOUT
            )
        except (
            subprocess.CalledProcessError,
            HarnessError,
            QubesException,
        ) as error:
            log.info("%s in VM %s: %s", service, self._vm.name, str(error))
