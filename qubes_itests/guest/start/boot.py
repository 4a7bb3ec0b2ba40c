"""Start of a VM: its domain, its guest, its identity."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, Final

from qubes_itests.exc import DeadlineError, HarnessError
from qubes_itests.guest.exc import BootError, GuestGoneError, ProtocolViolation
from qubes_itests.guest.link.agent import GuestAgent
from qubes_itests.host import load, memory
from qubes_itests.hypervisor.console import console_tail
from qubes_itests.hypervisor.contract import DomainState
from qubes_itests.hypervisor.exc import HypervisorError, SavedStateError
from qubes_storage.exc import system_reason
from qubes_storage.uninterrupted import to_its_end

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from qubes_itests.guest.link.agent import Identity
    from qubes_itests.guest.link.calls import CallHandler
    from qubes_itests.guest.start.ahead import ClonesAhead
    from qubes_itests.guest.start.warm import WarmStarts, WarmState
    from qubes_itests.hypervisor.contract import Domain, DomainSpec, Hypervisor

__all__ = ["boot", "time_here"]

_logger = logging.getLogger("qubes_itests.guest")

#: A guest from a saved state that is silent for this part of the time that is left will
#: not speak any more; in the rest it can boot.
_WARM_PART: Final = 1 / 4

#: Seconds between the end of a connection and that of the guest which caused it.
_STOP_TIMEOUT: Final = 10.0
_ENDS: Final = {DomainState.CRASHED: "crashed", DomainState.HALTED: "stopped"}


def time_here(seconds: float, hypervisor: Hypervisor) -> float:
    """Return the seconds that a start may take here.

    :param seconds: for guests with hardware virtualisation on an idle machine; emulated
        ones get more, and all do where others keep the CPUs busy.
    """
    return seconds * hypervisor.slowness * load.delay()


async def boot(
    hypervisor: Hypervisor,
    spec: DomainSpec,
    identity: Identity,
    *,
    timeout: float,
    warm: WarmStarts | None = None,
    on_call: CallHandler | None = None,
    log: Path | None = None,
    on_domain_start: Callable[[], Awaitable[None]] | None = None,
    on_step: Callable[[str], None] | None = None,
) -> tuple[Domain, GuestAgent | None]:
    """Start a VM to the point where it runs commands.

    One without a kernel boots from its disk, and is started when its domain is: there
    is no agent of ours in it.

    :param hypervisor: where its domain is defined.
    :param spec: the domain, with all its disks and interfaces.
    :param identity: who the VM is.
    :param timeout: seconds for everything, the making of a saved state included.
    :param warm: saved states to start from; None boots.
    :param on_call: run as a task for each call that comes out of the guest.
    :param log: file for the agent log.
    :param on_domain_start: awaited when the domain runs, before its guest answers.
    :param on_step: called with what begins, in words that follow "could not".
    :raise BootError: it did not start; names the step, and everything is undone.
    """
    start = _Start(
        spec, identity, on_call, log, on_domain_start=on_domain_start, on_step=on_step
    )
    ahead = None if warm is None else warm.ahead
    try:
        with contextlib.nullcontext() if ahead is None else ahead.hold():
            async with asyncio.timeout(timeout):
                return await start.run(hypervisor, warm, timeout)
    except BaseException as error:
        expected = isinstance(error, (HarnessError, TimeoutError, OSError, ValueError))
        # Before it is undone: after that every guest has stopped.
        reason = await start.reason(error, timeout) if expected else ""
        # To its end though the caller may be cancelled: a domain that stays would hold
        # the VM's disks and its name.
        console = await to_its_end(start.undo())
        if expected:
            raise BootError(spec.name, start.step, reason, console) from error
        raise


class _Start:
    """One start under way: what was done so far, to be undone."""

    def __init__(
        self,
        spec: DomainSpec,
        identity: Identity,
        on_call: CallHandler | None,
        agent_log: Path | None,
        *,
        on_domain_start: Callable[[], Awaitable[None]] | None,
        on_step: Callable[[str], None] | None,
    ) -> None:
        self.step = "define its domain"
        self._spec = spec
        self._identity = identity
        self._on_call = on_call
        self._log = agent_log
        self._on_domain_start = on_domain_start
        self._on_step = on_step
        self._domain: Domain | None = None
        self._agent: GuestAgent | None = None

    async def run(
        self, hypervisor: Hypervisor, warm: WarmStarts | None, timeout: float
    ) -> tuple[Domain, GuestAgent | None]:
        end = asyncio.get_running_loop().time() + timeout
        self._begin(self.step)
        domain = self._domain = await hypervisor.define(self._spec)
        state = agent = None
        unchanged: tuple[str, ...] = ()
        if warm is not None:
            self._begin("find a saved state")
            # Half of the time: a guest that never speaks is then booted where all see.
            limit = _left(end) / 2
            state = await warm.state_for(self._spec, self._identity, limit)
        if warm is not None and state is not None:
            limit = _WARM_PART * _left(end)
            if warm.ahead is not None:
                agent = await self._start_ahead(domain, warm.ahead, state, limit)
            if agent is None:
                agent = await self._start_warm(domain, warm, state, limit)
                disks = self._spec.disks
                unchanged = await asyncio.to_thread(state.unchanged, disks)
        if agent is None:
            state, unchanged = None, ()
            self._begin("start its domain")
            await domain.start()
            await self._announce()
            if self._spec.kernel is None:
                return domain, None
            agent = await self._connect(domain, _left(end))
        # From now on programs run in there, and write to the console what they like.
        domain.distrust_console()
        if self._identity.init == "systemd" and not (state and state.disks):
            self._begin("start its systemd")
            await agent.prepare(self._identity, named=True, timeout=_left(end))
        self._begin("enter its root")
        await agent.enter(self._identity, timeout=_left(end), unchanged=unchanged)
        return domain, agent

    def _begin(self, step: str) -> None:
        self.step = step
        if self._on_step is not None:
            self._on_step(step)

    async def _start_ahead(
        self, domain: Domain, ahead: ClonesAhead, state: WarmState, limit: float
    ) -> GuestAgent | None:
        """Go on as a clone of the state that was started ahead, if there is one."""
        async with ahead.clone(state, self._spec, self._identity) as clone:
            if clone is None:
                return None
            self._begin("go on as a clone that was started ahead")
            try:
                await domain.adopt(clone)
                await self._announce()
                return await self._connect_and_attach(domain, state.disks, limit)
            except (HypervisorError, DeadlineError, GuestGoneError) as error:
                _logger.warning(
                    "VM %s starts without %s: %s",
                    self._spec.name,
                    clone.spec.name,
                    str(error),
                )
                await domain.destroy()
                return None

    async def _start_warm(
        self, domain: Domain, warm: WarmStarts, state: WarmState, limit: float
    ) -> GuestAgent | None:
        self._begin("start from a saved state")
        kills = memory.kills()
        try:
            await domain.start(saved_state=state.path, saved_disks=state.disks)
            await self._announce()
            return await self._connect_and_attach(domain, state.disks, limit)
        except (SavedStateError, DeadlineError, GuestGoneError) as error:
            # The same domain again: a guest of which nobody knows what it did must not
            # go on, and its disks are free for the next only when it has gone.
            await domain.destroy()
            if memory.kills() > kills:
                # The state is none the worse for it, and without one a VM has more
                # memory of its own.
                reason = f"this machine was out of memory: {error}"
                raise HypervisorError(self._spec.name, "start", reason) from error
            _logger.warning("VM %s boots instead: %s", self._spec.name, str(error))
            await warm.discard(state, self._spec.name)
            return None

    async def _announce(self) -> None:
        if self._on_domain_start is not None:
            await self._on_domain_start()

    async def _connect_and_attach(
        self, domain: Domain, attached: tuple[str, ...], limit: float
    ) -> GuestAgent:
        # Both at once: plugging in takes QEMU as long as the guest takes to answer, and
        # stage one can do without disks.
        connecting = asyncio.ensure_future(self._connect(domain, limit))
        try:
            for disk in self._spec.disks:
                if disk.name not in attached:
                    await domain.attach_disk(disk)
            for interface in self._spec.interfaces:
                await domain.attach_interface(interface)
        except BaseException:
            # waited for, so that `_agent` is set if it is to be closed
            connecting.cancel()
            await asyncio.wait([connecting])
            raise
        return await connecting

    async def _connect(self, domain: Domain, limit: float) -> GuestAgent:
        self._begin("reach its agent")
        self._agent = await GuestAgent.connect(
            domain, timeout=limit, on_call=self._on_call, log=self._log
        )
        return self._agent

    async def reason(self, error: BaseException, timeout: float) -> str:
        """Return why it failed, for a sentence that names VM and step."""
        if isinstance(error, DeadlineError):
            return f"no {error.waited_for} within {error.timeout:.0f} s"
        if isinstance(error, TimeoutError):
            return f"not done within {timeout:.0f} s"
        if isinstance(error, GuestGoneError):
            if self._domain is not None and not isinstance(error, ProtocolViolation):
                # has the guest ended, or its connection alone?
                with contextlib.suppress(HarnessError):
                    state = await self._domain.wait_stopped(_STOP_TIMEOUT)
                    return f"the guest {_ENDS.get(state, 'stopped')}"
            return error.reason
        if isinstance(error, OSError):
            return system_reason(error)
        return str(error).removeprefix(f"VM {self._spec.name}: ")

    async def undo(self) -> str:
        """Undo what was done; return the end of the console."""
        if self._agent is not None:
            await self._agent.close()
        if self._domain is None:
            return ""
        with contextlib.suppress(HarnessError):
            await self._domain.destroy()
        console = console_tail(self._domain)
        with contextlib.suppress(HarnessError):
            await self._domain.undefine()
        return console


def _left(end: float) -> float:
    return max(0.1, end - asyncio.get_running_loop().time())
