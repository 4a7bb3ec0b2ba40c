"""How a run of a VM ends: shutdown, kill, and what follows from each end."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import weakref
from typing import TYPE_CHECKING, Any, Final, Self

from qubes_itests.core.exc import (
    QubesVMInUseError,
    QubesVMNotRunningError,
    QubesVMNotStartedError,
    QubesVMShutdownTimeoutError,
)
from qubes_itests.core.vm.pausing import PauseMixin
from qubes_itests.guest.exc import GuestGoneError
from qubes_itests.hypervisor.exc import StateError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from qubes_itests.core.app import Qubes
    from qubes_itests.core.storage import Storage
    from qubes_itests.guest.link.agent import GuestAgent
    from qubes_itests.hypervisor.contract import Domain

__all__ = ["STARTS", "EndMixin"]

log = logging.getLogger("qubes.vm")

#: The starts that this task is a part of: those of which it must not await the end.
#: Weakly: contexts outlive starts, in tasks that others share and in timers that were
#: cancelled, and a start that failed has an error that holds the VM and much else.
STARTS: Final[contextvars.ContextVar[weakref.WeakSet[asyncio.Task[None]]]] = (
    contextvars.ContextVar("starts", default=weakref.WeakSet())  # noqa: B039 - nobody adds
)


class EndMixin(PauseMixin):
    """What a VM class needs for its runs to end, each of them once."""

    app: Qubes
    storage: Storage
    _starting: asyncio.Task[None] | None
    _ending: asyncio.Task[None] | None
    _begun: bool
    _aborted: bool
    _domain_stopped_lock: asyncio.Lock

    async def fire_event_async(
        self, event: str, *, pre_event: bool = False, **kwargs: Any
    ) -> list[Any]:
        """Fire an event; see `qubes_itests.core.events.Emitter`."""
        return await super().fire_event_async(  # type: ignore[misc, no-any-return]
            event, pre_event=pre_event, **kwargs
        )

    async def start(self) -> Self:
        """Start the VM."""
        raise NotImplementedError

    def _run_began(self, domain: Domain, agent: GuestAgent | None) -> None:
        self._ending = asyncio.ensure_future(self._end_of_run(domain, agent))
        self._ending.add_done_callback(self._ending_done)

    async def _end_of_run(self, domain: Domain, agent: GuestAgent | None) -> None:
        failures: list[Exception] = []

        async def attempt(action: Awaitable[object]) -> None:
            # whatever fails: the run has ended, and all have to hear of it
            try:
                await action
            except Exception as error:  # noqa: BLE001 - raised below
                failures.append(error)

        await attempt(domain.wait_stopped())
        async with self._domain_stopped_lock:
            self._power = "Halting"
            if agent is not None:
                await attempt(agent.close())
            for end in (domain.undefine, self.storage.stop):
                await attempt(end())
            self.agent = None
            self._power = "Halted"
            await attempt(self.fire_event_async("domain-stopped"))
            await attempt(self.tell_run_changed())
            await attempt(self.fire_event_async("domain-shutdown"))
        for error in failures:
            self.note_problem(error)
        if failures:
            raise failures[0]

    async def tell_run_changed(self) -> None:
        """Tell those who keep what is another with each run."""
        for name in ("xid", "stubdom_xid", "start_time"):
            await self.fire_event_async(f"property-reset:{name}", name=name)

    def note_problem(self, error: Exception) -> None:
        """Remember what went wrong where nobody was there to be told."""
        log.error("VM %s: %s", self.name, str(error))
        self.app.problems.append(f"VM {self}: {error}")

    def _ending_done(self, task: asyncio.Task[None]) -> None:
        if self._ending is task:
            self._ending = None
        if not task.cancelled():
            task.exception()  # it was noted as a problem

    async def wait_ended(self, timeout: float) -> None:
        """Wait until the end of the present run is dealt with; at once if halted.

        :param timeout: seconds; then TimeoutError.
        """
        if self._ending is not None and self._ending is not asyncio.current_task():
            async with asyncio.timeout(timeout):
                await asyncio.shield(self._ending)

    async def shutdown(
        self,
        force: bool = False,  # noqa: FBT001, FBT002 - as in Qubes OS
        wait: bool = False,  # noqa: FBT001, FBT002
        timeout: float | None = None,
    ) -> Self:
        """Ask the guest to power off; without an agent by the machine's power button.

        :param force: do it even if running VMs have it as their net VM, or if it is
            paused, as it is unpaused for this; handlers of `domain-pre-shutdown` are
            told, and need not object then.
        :param wait: return when all of the run has ended.
        :param timeout: seconds to wait; by default the VM's `shutdown_timeout`.
        :raise QubesVMNotStartedError: when it is halted.
        :raise QubesVMInUseError: when running VMs need it, and `force` is not set.
        :raise QubesVMNotRunningError: when it is paused, and `force` is not set.
        :raise QubesVMShutdownTimeoutError: when it runs still; it goes on running.
        """
        if self._power == "Halted":
            raise QubesVMNotStartedError(self)
        domain, agent = self.running_domain(), self.agent
        power_off = domain.press_power_button if agent is None else agent.power_off
        limit = float(timeout or self.shutdown_timeout)  # type: ignore[attr-defined]
        try:
            await self._shut_down(power_off, limit, force=force, wait=wait)
        except Exception as error:
            await self.fire_event_async("domain-shutdown-failed", reason=str(error))
            raise
        return self

    async def _shut_down(
        self,
        power_off: Callable[[], Awaitable[None]],
        limit: float,
        *,
        force: bool,
        wait: bool,
    ) -> None:
        if not force:
            self._require_no_clients()
        await self.fire_event_async("domain-pre-shutdown", pre_event=True, force=force)
        if self.is_paused():
            if not force:
                raise QubesVMNotRunningError(
                    self, f"VM {self} is paused: unpause it first, or force it"
                )
            await self.unpause()
        try:
            await power_off()
        except (GuestGoneError, StateError):
            # it went by itself, or will be found not to in time
            wait = True
        if not wait:
            return
        try:
            await self.wait_ended(limit)
        except TimeoutError:
            raise QubesVMShutdownTimeoutError(
                self,
                f"VM {self} did not shut down within {limit:g} s; kill() stops it",
            ) from None

    def _require_no_clients(self) -> None:
        clients = [
            vm.name
            for vm in self.app.domains
            if getattr(vm, "netvm", None) is self and vm.is_running()
        ]
        if clients:
            raise QubesVMInUseError(
                self,
                f"VM {self} connects running VMs to the network: {', '.join(clients)};"
                " shut these down first, or force it",
            )

    async def restart(
        self,
        force: bool = False,  # noqa: FBT001, FBT002 - as for `shutdown`
        timeout: float | None = None,
    ) -> Self:
        """Shut the VM down, wait for that, and start it again.

        :param force: as for `shutdown`.
        :param timeout: likewise.
        """
        await self.shutdown(force=force, wait=True, timeout=timeout)
        return await self.start()

    async def kill(self) -> None:
        """Stop the VM at once, as pulling the plug does; a start under way fails.

        :raise QubesVMNotStartedError: when it is halted.
        """
        if self._starting is not None:
            await self._abort_start(self._starting)
            if self._power == "Halted":
                return
        if self._power == "Halted":
            raise QubesVMNotStartedError(self)
        await self.running_domain().destroy()
        await self.wait_ended(float(self.shutdown_timeout))  # type: ignore[attr-defined]

    async def _abort_start(self, starting: asyncio.Task[None]) -> None:
        if not self._aborted:
            # once: a second time would hit the undoing
            self._aborted = True
            if self._begun:
                starting.cancel()
        if starting in STARTS.get():
            await asyncio.sleep(0)
        else:
            await asyncio.wait([starting])
