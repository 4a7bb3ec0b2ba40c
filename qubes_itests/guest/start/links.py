"""The two ends of the wire between a running VM and its running net VM."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Generic, Self, TypeVar

from qubes_itests.exc import HarnessError
from qubes_itests.guest.start.network import change_routes, set_up_downlink
from qubes_itests.host.bridge import Bridge, Tap
from qubes_itests.hypervisor.contract import Interface
from qubes_storage.uninterrupted import to_its_end

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from ipaddress import IPv4Address, IPv6Address

    from qubes_itests.guest.link.agent import GuestAgent
    from qubes_itests.hypervisor.contract import Domain

__all__ = ["Downlink", "Routes", "Uplink", "routes_to"]

#: By destination the client that leads there; None for the client itself.
Routes = dict["IPv4Address", "IPv4Address | None"]

_T = TypeVar("_T", Bridge, Tap)
_Owner = TypeVar("_Owner")


class Downlink(Generic[_Owner]):
    """What a net VM has for its clients, for one run: a bridge, and its way into it.

    :param owner: what a core has of the network of the net VM.
    :param domain: its domain in this run.
    :param agent: its agent in this run.
    :param bridge: what its clients are plugged into.
    """

    def __init__(
        self, owner: _Owner, domain: Domain, agent: GuestAgent, bridge: Bridge
    ) -> None:
        self.owner = owner
        self.domain = domain
        self.agent = agent
        self.bridge = bridge
        self.closed = False
        #: Who has an address: hardware and IPv4 addresses, and names of VMs.
        self.taken: dict[str, str] = {}
        self._tap: Tap | None = None
        self._routes: Routes = {}
        # A change is the difference from the routes that the one before it has left.
        # Two at once would start from the same ones, and the second would ask the guest
        # for what the first has done or undone.
        self._changing = asyncio.Lock()

    @classmethod
    async def open(
        cls,
        owner: _Owner,
        domain: Domain,
        agent: GuestAgent,
        *,
        mac: str,
        address: IPv4Address,
    ) -> Self:
        """Make the bridge, plug the net VM in, and have its guest forward.

        :param mac: hardware address of the net VM's interface; no client has it.
        :param address: the net VM's own; the rest as for the class.
        :raise HarnessError: one of these failed; the bridge is gone again.
        """
        bridge = await _made(Bridge.create)
        downlink = cls(owner, domain, agent, bridge)
        try:
            await downlink._plug_in(mac, address)
        except BaseException:
            await to_its_end(downlink._give_up(mac))
            raise
        return downlink

    @classmethod
    def taken_up(
        cls,
        owner: _Owner,
        domain: Domain,
        agent: GuestAgent,
        bridge: Bridge,
        tap: Tap,
    ) -> Self:
        """Return what a guest has that was thawed: it is plugged in and forwards.

        Routes to its clients are set once more, which the guest does not mind.

        :param tap: the net VM's own way into the bridge; the rest as for the class.
        """
        downlink = cls(owner, domain, agent, bridge)
        downlink._tap = tap
        return downlink

    async def _plug_in(self, mac: str, address: IPv4Address) -> None:
        self._tap = await _made(Tap.create, self.bridge, mac)
        interface = Interface(mac, tap=self._tap.name)
        # The hypervisor goes on with it when we are cancelled. Detached before it is
        # attached, it would stay in the guest, plugged into a tap that is gone.
        await to_its_end(self.domain.attach_interface(interface))
        await set_up_downlink(self.agent, mac=mac, address=address)

    async def _give_up(self, mac: str) -> None:
        with contextlib.suppress(HarnessError):
            await self.domain.detach_interface(mac)
        await self.close()

    async def route(self, wanted: Callable[[], Routes]) -> None:
        """Have the guest's routes be these.

        :param wanted: called when it is this change's turn.
        :raise HarnessError: the guest did not do it.
        """
        async with self._changing:
            # not before: clients have come and gone while others had their turn
            routes = wanted()
            if self.closed or routes == self._routes:
                return
            added = dict(routes.items() - self._routes.items())
            removed = self._routes.keys() - routes.keys()
            await change_routes(self.agent, added, removed)
            self._routes = routes

    async def close(self) -> None:
        """Remove the bridge, once the net VM has ended: all clients are cut off."""
        # First: a change of routes that waits for its turn finds no guest to ask then.
        self.closed = True
        if self._tap is not None:
            await asyncio.to_thread(self._tap.remove)
        await asyncio.to_thread(self.bridge.remove)


class Uplink(Generic[_Owner]):
    """A client's way into the bridge of its net VM, from attaching to detaching.

    :param downlink: of the net VM.
    :param mac: hardware address of the client's interface.
    :param address: the client's.
    :param behind: those of the VMs behind it; its own of IPv6.
    :param tap: what it is plugged into.
    """

    def __init__(
        self,
        downlink: Downlink[_Owner],
        mac: str,
        address: IPv4Address,
        behind: Sequence[IPv4Address | IPv6Address],
        tap: Tap,
    ) -> None:
        self.downlink = downlink
        self.mac = mac
        self.address = address
        self.is_cut = False
        self._behind = tuple(behind)
        self._tap = tap

    @classmethod
    async def open(
        cls,
        domain: Domain,
        downlink: Downlink[_Owner],
        mac: str,
        address: IPv4Address,
        behind: Sequence[IPv4Address | IPv6Address],
    ) -> Self:
        """Plug a client in.

        :param domain: the client's; the rest as for the class.
        :raise HarnessError: it does not work; nothing is left of it.
        """
        tap = await _made(Tap.create, downlink.bridge, mac, (address, *behind))
        try:
            await to_its_end(
                domain.attach_interface(Interface(mac, tap=tap.name)),
                undo=lambda _attached: domain.detach_interface(mac),
            )
        except BaseException:
            # cancelled or not, and only when the domain has let go of it
            await to_its_end(asyncio.to_thread(tap.remove))
            raise
        return cls(downlink, mac, address, behind, tap)

    async def filter(self, behind: Sequence[IPv4Address]) -> None:
        """Let through what comes from the client or from behind it, and nothing else.

        :param behind: the addresses of the VMs that are behind it now.
        """
        if tuple(behind) != self._behind:
            # Before the thread runs, so that the next call compares with what will be
            # there, and not with what there was.
            self._behind = tuple(behind)
            sources = (self.address, *behind)
            await asyncio.to_thread(self._tap.filter, self.mac, sources)

    async def cut(self) -> None:
        """End all traffic, whatever the guest does."""
        self.is_cut = True
        await asyncio.to_thread(self._tap.cut)

    async def remove(self) -> None:
        """Remove the tap, once the client has let go of it or has ended."""
        await asyncio.to_thread(self._tap.remove)


def routes_to(clients: Mapping[IPv4Address, Sequence[IPv4Address]]) -> Routes:
    """Return a net VM's routes.

    :param clients: by the address of each client, those of the VMs behind it.
    """
    routes: Routes = {}
    for client, behind in clients.items():
        routes |= dict.fromkeys(behind, client)
    return routes | dict.fromkeys(clients)


async def _made(create: Callable[..., _T], *arguments: object) -> _T:
    """Make something in a thread; who is cancelled meanwhile leaves nothing."""
    return await to_its_end(
        asyncio.to_thread(create, *arguments),
        undo=lambda made: asyncio.to_thread(made.remove),
    )
