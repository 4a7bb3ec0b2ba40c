"""World of scenarios with real VMs."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from qubes_itests.balancing.guest_memory import GuestMemory
from qubes_itests.core.exc import QubesVMStartError
from qubes_itests.core.vm.appvm import AppVM
from qubes_itests.qmemman.exc import MemoryRefusedError
from qubes_itests.qmemman.policy import DEFAULT_POLICY
from qubes_itests.qmemman.simulation.scenario import World
from qubes_itests.qmemman.sizes import MIB, mib
from qubes_itests.qmemman.state import DOM0

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qubes_itests.balancing.app_memory import AppMemory
    from qubes_itests.balloons import LibvirtMemory
    from qubes_itests.core.app import Qubes
    from qubes_itests.core.vm.qubesvm import QubesVM

__all__ = ["VMWorld", "oom_killed"]

_DRIVER: Final = "/sys/bus/virtio/drivers/virtio_balloon"
_UNBIND: Final = (
    f"cd {_DRIVER} && for d in virtio*; do echo $d >/run/balloon; echo $d >unbind; done"
)
_BIND: Final = f"cat /run/balloon >{_DRIVER}/bind"

#: Seconds that a guest has for either.
_TIMEOUT: Final = 300.0

_PATIENT: Final = replace(DEFAULT_POLICY, patience=30, progress_period=30.0)

#: What a kernel says that kills for memory.
_KILLS: Final = (b"Out of memory", b"oom-kill", b"oom_reaper")


def oom_killed(vm: QubesVM) -> bool:
    """Tell whether a VM's console, of all its runs so far, shows an OOM kill."""
    text = (vm.directory / "console.log").read_bytes()
    return any(words in text for words in _KILLS)


class VMWorld(World):
    """VMs of one app, on a machine that may be busy.

    :param app: where they are made; scenarios' names must be free in it.
    :param memory: what balances them, entered.
    """

    slowness = 30.0

    def __init__(self, app: Qubes, memory: AppMemory[LibvirtMemory]) -> None:
        super().__init__(memory.balancer, memory.recorder)
        #: The VMs, by name.
        self.vms: dict[str, QubesVM] = {}
        #: What balances them.
        self.memory = memory
        #: Where they are made.
        self.app = app
        self._backend = memory.backend
        self._used: dict[str, GuestMemory] = {}
        self._idle: dict[str, int] = {}
        self._hung: set[str] = set()

    @contextlib.contextmanager
    def patient(self) -> Iterator[None]:
        """Have whoever asks for memory wait for donors as slow as a busy machine."""
        balancer = self.memory.balancer
        usual, balancer.policy = balancer.policy, _PATIENT
        try:
            yield
        finally:
            balancer.policy = usual

    async def start(self, name: str, *, memory: int, maximum: int) -> None:
        """Start a VM, and have it use half of its memory."""
        await self.start_idle(name, memory=memory, maximum=maximum)
        await self.use(name, memory // 2)

    async def start_idle(self, name: str, *, memory: int, maximum: int) -> None:
        """Start a VM, and wait until it has reported what it uses by itself.

        :raise MemoryRefusedError: when there is no memory for it.
        """
        vm = await self.app.create_vm(
            AppVM,
            name=name,
            label="red",
            memory=memory // MIB,
            maxmem=maximum // MIB,
        )
        self._note(f"{name} starts")
        try:
            with self.patient():
                await vm.start()
        except QubesVMStartError as error:
            if isinstance(error.__cause__, MemoryRefusedError):
                raise error.__cause__ from None
            raise
        self.vms[name] = vm
        self._used[name] = GuestMemory(vm)
        await self.until(f"report of {name}", lambda: bool(self._reported(name)))
        self._idle[name] = self._reported(name)

    async def use(self, name: str, size: int) -> None:
        """Use memory until all that the guest uses comes to so much, or is idle.

        It is the balloon driver that reports, so one that hangs is loaded first.
        """
        self._note(f"{name} uses {mib(size)}")
        if name == "dom0":
            self._backend.dom0.use(size)
            return
        await self._used[name].use(max(0, size - self._idle[name]), timeout=_TIMEOUT)
        if name in self._hung:
            await self.respond(name)

    async def hang(self, name: str) -> None:
        """Unload its balloon driver."""
        self._note(f"{name} hangs")
        await self.vms[name].commands.ask(
            _UNBIND, "unload its balloon driver", timeout=_TIMEOUT
        )
        self._hung.add(name)

    async def respond(self, name: str) -> None:
        """Load its balloon driver again."""
        self._note(f"{name} responds")
        await self.vms[name].commands.ask(
            _BIND, "load its balloon driver", timeout=_TIMEOUT
        )
        self._hung.discard(name)

    async def pause(self, name: str) -> None:
        """Stop its CPUs."""
        self._note(f"{name} is paused")
        await self.vms[name].pause()

    async def resume(self, name: str) -> None:
        """Let them run."""
        self._note(f"{name} is resumed")
        await self.vms[name].unpause()

    async def die(self, name: str) -> None:
        """Pull its plug."""
        self._note(f"{name} dies")
        await self.vms[name].kill()

    def domid(self, name: str) -> str:
        """Return its number; of no domain when it does not run."""
        if name == "dom0":
            return DOM0
        vm = self.vms.get(name)
        return (vm and vm.domain and self._backend.domid(vm.domain)) or ""

    async def lacked(self, name: str) -> bool:
        """Return whether its kernel had to kill for memory."""
        return await asyncio.to_thread(oom_killed, self.vms[name])

    def _reported(self, name: str) -> int:
        state = self._memory.domains.get(self.domid(name))
        return (state and state.used) or 0
