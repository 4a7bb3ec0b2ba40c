"""A simulated machine with the real daemon on a real socket, in virtual time."""

from __future__ import annotations

import asyncio
import contextlib

from qubes_itests.qmemman.balancer import Balancer
from qubes_itests.qmemman.client import Client
from qubes_itests.qmemman.server import Server
from qubes_itests.qmemman.simulation.machine import SimulatedMachine

MIB = 1024**2


class Trial:
    """A machine, its daemon and a client."""

    def __init__(self, directory, total, dom0, **options):
        self.machine = SimulatedMachine(total * MIB, dom0 * MIB)
        self.balancer = Balancer(self.machine, **options)
        self.path = directory / "qmemman.sock"
        self.client = Client(self.path)
        self.server = Server(self.balancer, self.path)

    async def start(self, name, memory, maximum, used):
        """Start a guest as a VM starts; sizes in MiB."""
        async with self.client.memory(memory * MIB):
            guest = self.machine.start(name, memory * MIB, maximum * MIB)
        guest.use(used * MIB)
        return guest

    def target(self, guest):
        """Return the target of a guest in MiB; 0 until the daemon knows it."""
        state = self.balancer.domains.get(guest.domid)
        return state.last_target // MIB if state else 0

    async def until(self, condition, within=10):
        """Wait until a condition holds, and return how long it took."""
        start = self.machine.now()
        while not condition():
            assert self.machine.now() - start < within, self.balancer.domains
            await asyncio.sleep(0.01)
        return self.machine.now() - start


@contextlib.asynccontextmanager
async def trial(directory, total=4000, dom0=1000, dom0_used=300, **options):
    """Yield a machine whose daemon runs; sizes in MiB."""
    made = Trial(directory, total, dom0, **options)
    async with made.server:
        made.machine.dom0.use(dom0_used * MIB)
        yield made
