"""Scenarios of memory under two daemons: ours, and that of a core under test."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from qubes_itests.dom0.core_qmemman import CoreQmemman
from qubes_itests.dom0.xen import Xen
from qubes_itests.exc import HarnessError
from qubes_itests.qmemman.balancer import Balancer
from qubes_itests.qmemman.client import Client
from qubes_itests.qmemman.exc import MemoryRefusedError
from qubes_itests.qmemman.policy import DEFAULT_POLICY
from qubes_itests.qmemman.server import Server
from qubes_itests.qmemman.simulation import virtual_time
from qubes_itests.qmemman.simulation.machine import SimulatedMachine
from qubes_itests.qmemman.simulation.scenario import SimulatedWorld
from qubes_itests.qmemman.simulation.scenarios import DOM0, DOM0_USED, TOTAL
from qubes_itests.qmemman.sizes import MIB
from qubes_itests.qmemman.timeline import TIMELINE, Recorder, read

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
    from pathlib import Path

    from qubes_itests.qmemman.simulation.machine import SimulatedGuest
    from qubes_itests.qmemman.simulation.scenario import World
    from qubes_itests.qmemman.timeline import Record

__all__ = ["Trial", "try_core", "try_ours"]

#: Seconds between two looks at the machine.
_INTERVAL: Final = 0.5
#: Seconds after a scenario, in which all come to rest.
_REST: Final = 3.0
#: Time passes only where the daemon waits.
_QUIET: Final = 0.001


@dataclass(frozen=True)
class Trial:
    """What a daemon made of a scenario.

    :param records: its timeline.
    :param problem: what did not come about, with who had what; None if all did.
    """

    records: Sequence[Record]
    problem: str | None


def try_ours(scenario: Callable[[World], Awaitable[None]], directory: Path) -> Trial:
    """Run a scenario under our daemon, in virtual time. Blocking.

    :param directory: an empty one, with a short path.
    """

    async def program(recorder: Recorder) -> None:
        machine = SimulatedMachine(TOTAL * MIB, DOM0 * MIB)
        balancer = Balancer(machine, recorder=recorder)
        socket = directory / "qmemman.sock"
        async with Server(balancer, socket):
            world = SimulatedWorld(machine, balancer, Client(socket), recorder)
            await _play(scenario, machine, world)

    return _tried(program, directory)


def try_core(scenario: Callable[[World], Awaitable[None]], directory: Path) -> Trial:
    """Run a scenario under the daemon of the core that can be imported. Blocking.

    :param directory: an empty one, with a short path.
    """

    async def program(recorder: Recorder) -> None:
        clock = asyncio.get_running_loop()
        assert isinstance(clock, virtual_time.VirtualTimeLoop)  # noqa: S101 - below
        machine = _XenMachine(TOTAL * MIB, DOM0 * MIB)
        async with CoreQmemman(machine.xen, directory, None, recorder, clock) as core:
            world = SimulatedWorld(machine, core, _Starts(core), recorder)

            async def watched() -> None:
                looking = asyncio.ensure_future(_look(core))
                try:
                    await _play(scenario, machine, world)
                finally:
                    looking.cancel()

            doing = asyncio.ensure_future(watched())
            await asyncio.wait([doing, core.ended], return_when="FIRST_COMPLETED")
            if not doing.done():
                doing.cancel()
                core.check()
            await doing

    return _tried(program, directory)


def _tried(program: Callable[[Recorder], Awaitable[None]], directory: Path) -> Trial:
    path, problem = directory / TIMELINE, None

    async def recorded() -> None:
        recorder = Recorder(path, asyncio.get_running_loop().time)
        with contextlib.closing(recorder):
            await program(recorder)

    try:
        virtual_time.run(recorded())
    except HarnessError as error:
        problem = str(error)
    return Trial(read(path), problem)


async def _play(
    scenario: Callable[[World], Awaitable[None]],
    machine: SimulatedMachine,
    world: World,
) -> None:
    # dom0 has what it should have long before VMs start
    machine.dom0.use(DOM0_USED * MIB)
    await world.settled("dom0")
    await scenario(world)
    await asyncio.sleep(_REST)


async def _look(core: CoreQmemman) -> None:
    """Record the machine now and then: its daemon looks only where there is news."""
    while True:
        await asyncio.sleep(_INTERVAL)
        await core.look()


class _XenMachine(SimulatedMachine):
    """A simulated machine whose domains are in a XenStore."""

    def __init__(self, total: int, dom0: int) -> None:
        super().__init__(total, dom0)
        self.xen = Xen(self)
        self.xen.begin()
        # as Xen has it when dom0 has been told a target once
        most = int(total * DEFAULT_POLICY.overhead_factor)
        self.xen.introduce(self.dom0.domid, dom0, most)

    def start(self, name: str, memory: int, maximum: int) -> SimulatedGuest:
        guest = super().start(name, memory, maximum)
        self.xen.introduce(guest.domid, memory, maximum)
        return guest

    def stop(self, guest: SimulatedGuest) -> None:
        super().stop(guest)
        self.xen.release(guest.domid)


class _Starts(Client):
    """Starts of VMs, of which the clock of a daemon in virtual time has to know."""

    def __init__(self, core: CoreQmemman) -> None:
        super().__init__(core.socket, plain=True)
        self._core = core

    @contextlib.asynccontextmanager
    async def memory(self, amount: int) -> AsyncIterator[None]:
        # until nothing is under way, so that each run goes the same way
        await asyncio.sleep(_QUIET)
        try:
            async with super().memory(amount):
                await self._core.look("granted", amount)
                yield
        except MemoryRefusedError:
            await self._core.look("refused", amount)
            raise

    async def _line(self, reader: asyncio.StreamReader, what: str) -> bytes:
        with self._core.server.working():
            return await super()._line(reader, what)

    @contextlib.asynccontextmanager
    async def _connection(
        self,
    ) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        async with super()._connection() as streams:
            try:
                yield streams
            finally:
                self._core.server.client_leaves()
