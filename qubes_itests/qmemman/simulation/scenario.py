"""Scenarios: a small language of what happens to the memory of VMs.

A scenario is a coroutine that takes a `World` and says what happens::

    async def pressure(world: World) -> None:
        await world.start("work", memory=400 * MIB, maximum=2000 * MIB)
        await world.use("work", 900 * MIB)
        enough = 1170 * MIB
        await world.until("memory", lambda: world.target("work") >= enough)

It runs unchanged on every world; `SimulatedWorld` is the one without VMs.
"""

from __future__ import annotations

import abc
import asyncio
from typing import TYPE_CHECKING

from qubes_itests.exc import DeadlineError, HarnessError
from qubes_itests.qmemman.sizes import mib
from qubes_itests.qmemman.state import DOM0

if TYPE_CHECKING:
    from collections.abc import Callable

    from qubes_itests.qmemman.client import Client
    from qubes_itests.qmemman.simulation.machine import SimulatedGuest, SimulatedMachine
    from qubes_itests.qmemman.state import MachineMemory
    from qubes_itests.qmemman.timeline import Recorder

__all__ = ["SimulatedWorld", "World"]

_LOOK = 0.02
#: Seconds without a new target after which all have what they should have.
_STILL = 1.5
#: Seconds for a VM to get what it is to use.
_USE_TIMEOUT = 30.0


class World(abc.ABC):
    """VMs whose memory is balanced; sizes in bytes, VMs by name.

    :param memory: as the daemon that runs sees it.
    :param recorder: gets a note of everything that happens.
    """

    #: How many times as long as on a simulated machine things may take.
    slowness = 1.0

    def __init__(self, memory: MachineMemory, recorder: Recorder | None = None) -> None:
        self._memory = memory
        self._recorder = recorder

    @abc.abstractmethod
    async def start(self, name: str, *, memory: int, maximum: int) -> None:
        """Start a VM as VMs are started: with memory from the daemon.

        :raise MemoryRefusedError: when there is none.
        """

    @abc.abstractmethod
    async def use(self, name: str, size: int) -> None:
        """Have a VM use so much from now on; ``dom0`` too.

        Returns when it does: a VM that has less is given time to get more.

        :raise DeadlineError: it does not get so much in time.
        """

    @abc.abstractmethod
    async def hang(self, name: str) -> None:
        """Have a VM's balloon ignore its targets."""

    @abc.abstractmethod
    async def respond(self, name: str) -> None:
        """Have it follow them again."""

    @abc.abstractmethod
    async def pause(self, name: str) -> None:
        """Stop a VM's CPUs."""

    @abc.abstractmethod
    async def resume(self, name: str) -> None:
        """Let them run."""

    @abc.abstractmethod
    async def die(self, name: str) -> None:
        """End a VM as pulling its plug does."""

    @abc.abstractmethod
    def domid(self, name: str) -> str:
        """Return a VM's number."""

    @abc.abstractmethod
    async def lacked(self, name: str) -> bool:
        """Return whether a VM ever held less than it used."""

    def target(self, name: str) -> int:
        """Return what a VM shall hold; 0 until the daemon knows it."""
        state = self._memory.domains.get(self.domid(name))
        return state.last_target if state else 0

    def excluded(self, name: str) -> bool:
        """Return whether a VM is left out since it did not respond."""
        state = self._memory.domains.get(self.domid(name))
        return state is not None and state.no_progress

    def expect(self, what: str, *, holds: bool) -> None:
        """Say what has to be so by now.

        :raise HarnessError: it is not; shows who has what.
        """
        if not holds:
            raise HarnessError(f"expected: {what}\n{self._evidence()}")

    async def expect_enough(self, *names: str) -> None:
        """Have VMs never have held less than they used.

        :raise HarnessError: one did.
        """
        for name in names:
            self.expect(f"{name} never lacks memory", holds=not await self.lacked(name))

    async def until(
        self, what: str, condition: Callable[[], bool], *, timeout: float = 10.0
    ) -> float:
        """Wait for something, and return how many seconds it took.

        :param what: it is, for the error.
        :param timeout: seconds; `slowness` times as many where that is not 1.
        :raise DeadlineError: when it does not come.
        """
        clock = asyncio.get_running_loop().time
        start = clock()
        timeout *= self.slowness
        while not condition():
            if clock() - start > timeout:
                raise DeadlineError(what, timeout, self._evidence())
            await asyncio.sleep(_LOOK)
        return clock() - start

    async def settled(
        self, *names: str, still: float = _STILL, timeout: float = 20.0
    ) -> None:
        """Wait until VMs have targets, and these stay what they are.

        :param still: seconds for which they must stay.
        :raise DeadlineError: when they do not.
        """
        clock = asyncio.get_running_loop().time
        last, since = [0], clock()

        def rests() -> bool:
            nonlocal last, since
            targets = [self.target(name) for name in names]
            if targets != last:
                last, since = targets, clock()
            return all(targets) and clock() - since >= still

        await self.until(f"rest of {', '.join(names)}", rests, timeout=timeout)

    def _note(self, text: str) -> None:
        if self._recorder is not None:
            self._recorder.note(text)

    def _evidence(self) -> str:
        names = self._memory.names
        return "\n".join(
            f"{names.get(domid, domid)}: holds {mib(state.current)}, target"
            f" {mib(state.last_target)}, uses {mib(state.used or 0)}"
            for domid, state in self._memory.domains.items()
        )


class SimulatedWorld(World):
    """The world without VMs.

    :param machine: a simulated one.
    :param memory: as the daemon that balances it sees it.
    :param client: of that daemon.
    """

    def __init__(
        self,
        machine: SimulatedMachine,
        memory: MachineMemory,
        client: Client,
        recorder: Recorder | None = None,
    ) -> None:
        super().__init__(memory, recorder)
        self._machine = machine
        self._client = client
        self._guests: dict[str, SimulatedGuest] = {"dom0": machine.guests[DOM0]}

    async def start(self, name: str, *, memory: int, maximum: int) -> None:
        """Start a guest that uses half of its memory."""
        async with self._client.memory(memory):
            guest = self._machine.start(name, memory, maximum)
        self._guests[name] = guest
        guest.use(memory // 2)
        self._note(f"{name} starts")

    async def use(self, name: str, size: int) -> None:
        """Use and report; a guest that has not so much takes it as it comes."""
        self._note(f"{name} uses {mib(size)}")
        guest = self._guests[name]

        def has_room() -> bool:
            if guest.room() >= size or guest.stuck or name == "dom0":
                return True
            guest.use(max(guest.used, min(size, guest.room())))
            return False

        what = f"{mib(size)} in use by {name}"
        await self.until(what, has_room, timeout=_USE_TIMEOUT)
        guest.use(size)

    async def hang(self, name: str) -> None:
        """Stop its balloon."""
        self._note(f"{name} hangs")
        self._guests[name].holds()
        self._guests[name].stuck = True

    async def respond(self, name: str) -> None:
        """Let its balloon move."""
        self._note(f"{name} responds")
        self._guests[name].holds()
        self._guests[name].stuck = False

    async def pause(self, name: str) -> None:
        """Stop its CPUs."""
        self._note(f"{name} is paused")
        self._machine.pause(self._guests[name])

    async def resume(self, name: str) -> None:
        """Let them run."""
        self._note(f"{name} is resumed")
        self._machine.resume(self._guests[name])

    async def die(self, name: str) -> None:
        """End it."""
        self._note(f"{name} dies")
        self._machine.stop(self._guests[name])

    def domid(self, name: str) -> str:
        """Return its number."""
        return self._guests[name].domid

    async def lacked(self, name: str) -> bool:
        """Return whether it was ever squeezed."""
        self._guests[name].holds()
        return self._guests[name].squeezed > 0
