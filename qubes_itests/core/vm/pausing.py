"""Pause and suspend: the virtual CPUs of a running VM stand still."""

from __future__ import annotations

import logging
import subprocess
import time
from typing import TYPE_CHECKING, Any, Final

from qubes_itests.core.exc import (
    QubesException,
    QubesVMError,
    QubesVMNotPausedError,
    QubesVMNotRunningError,
)
from qubes_itests.exc import HarnessError
from qubes_itests.hypervisor.exc import StateError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from qubes_itests.guest.link.agent import GuestAgent
    from qubes_itests.hypervisor.contract import Domain

__all__ = ["STARTED", "PauseMixin"]

log = logging.getLogger("qubes.vm")

#: The power states of a VM that has been started and does not end yet.
STARTED: Final = ("Running", "Paused", "Suspended")
_STILL: Final = ("Paused", "Suspended")

#: Seconds that a guest has to get ready for being suspended, and to wake up again.
_SERVICE_TIMEOUT: Final = 10.0
#: Seconds that a guest has to set its clock.
_CLOCK_TIMEOUT: Final = 20.0


class PauseMixin:
    """What a VM class needs to be paused and suspended."""

    name: str
    domain: Domain | None
    agent: GuestAgent | None
    _power: str

    def is_paused(self) -> bool:
        """Tell whether its virtual CPUs stand still."""
        return self._power in _STILL

    def running_agent(self) -> GuestAgent:
        """Return the agent.

        :raise QubesVMNotRunningError: when the VM is not started.
        :raise QubesVMError: when it has none, for it booted from its own disk.
        """
        self.running_domain()
        if self.agent is None:
            raise QubesVMError(
                self,
                f"VM {self} has no agent, as it has no kernel: it runs no commands",
            )
        return self.agent

    def running_domain(self) -> Domain:
        """Return the domain; QubesVMNotRunningError when it is not started."""
        if self.domain is None or self._power in ("Halted", "Transient"):
            raise QubesVMNotRunningError(self)
        return self.domain

    async def pause(self) -> None:
        """Stop its virtual CPUs; QubesVMNotStartedError when it is halted."""
        domain = self.running_domain()
        await self._fire("domain-pre-paused", pre_event=True)
        await self._switch(domain, domain.pause, "Paused")
        await self._fire("domain-paused")

    async def unpause(self) -> None:
        """Let its virtual CPUs run, and set its clock, which stood still as well.

        :raise QubesVMNotPausedError: when they run, or it is halted.
        """
        if not self.is_paused():
            raise QubesVMNotPausedError(self)
        domain = self.running_domain()
        await self._fire("domain-pre-unpaused", pre_event=True)
        await self._switch(domain, domain.resume, "Running")
        await self._set_clock()
        await self._fire("domain-unpaused")

    async def suspend(self) -> None:
        """Let the guest get ready for a long pause, and pause it.

        :raise QubesVMNotStartedError: when it is halted.
        """
        if not self.is_paused():
            self.running_domain()
            await self._tell("qubes.SuspendPreAll")
            await self.pause()
        self._become(self.running_domain(), "Suspended")

    async def resume(self) -> None:
        """Wake it up from `suspend`; a VM that is only paused is unpaused.

        :raise QubesVMNotPausedError: when it is neither suspended nor paused.
        """
        suspended = self._power == "Suspended"
        await self.unpause()
        if suspended:
            await self._tell("qubes.SuspendPostAll")

    async def _fire(self, event: str, *, pre_event: bool = False) -> None:
        await self.fire_event_async(event, pre_event=pre_event)  # type: ignore[attr-defined]

    async def _switch(
        self, domain: Domain, action: Callable[[], Awaitable[None]], state: str
    ) -> None:
        try:
            await action()
        except StateError as error:
            raise QubesVMNotRunningError(self) from error
        self._become(domain, state)

    def _become(self, domain: Domain, state: str) -> None:
        # The run may have ended meanwhile, and the next one may have begun.
        if self.domain is not domain or self._power not in STARTED:
            raise QubesVMNotRunningError(self)
        self._power = state

    async def _set_clock(self) -> None:
        """Have its clock catch up: it stood still with its virtual CPUs."""
        if self.agent is None:
            return
        agent = self.running_agent()
        try:
            await agent.set_clock(time.time_ns(), timeout=_CLOCK_TIMEOUT)
        except HarnessError as error:
            log.warning(
                "VM %s goes on with a clock that is late: %s", self.name, str(error)
            )

    async def _tell(self, service: str) -> None:
        """Call a service that the guest may have or not have."""
        call: Any = self.ask_service  # type: ignore[attr-defined]
        try:
            await call(
                service, f"call {service}", user="root", timeout=_SERVICE_TIMEOUT
            )
        except (
            subprocess.CalledProcessError,
            HarnessError,
            QubesException,
        ) as error:
            log.info("%s in VM %s: %s", service, self.name, str(error))
