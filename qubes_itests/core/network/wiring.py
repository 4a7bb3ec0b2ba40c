"""The network of running VMs: interfaces, routes, and who is plugged in where."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, Any, Final

from qubes_itests.core.events import handler
from qubes_itests.core.exc import QubesException, QubesVMError, QubesVMNotRunningError
from qubes_itests.core.network.links import Downlink, Uplink, routes_to
from qubes_itests.core.vm.network import NetMixin
from qubes_itests.exc import DeadlineError, HarnessError
from qubes_itests.guest.exc import GuestError
from qubes_itests.guest.start.network import set_up_uplink
from qubes_itests.timeline import note

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Iterator
    from ipaddress import IPv4Address

    from qubes_itests.core.network.links import Routes
    from qubes_itests.core.vm.life import Life
    from qubes_itests.guest.link.agent import GuestAgent
    from qubes_itests.hypervisor.contract import Domain

__all__ = ["WiringMixin"]

log = logging.getLogger("qubes.net")

#: Seconds that a guest has for changes of its database.
_DATABASE: Final = 10.0

#: What a guest without net VM does not have in its database.
_CLIENT_ENTRIES: Final = (
    *("/qubes-mac", "/qubes-ip", "/qubes-netmask", "/qubes-gateway"),
    *("/qubes-primary-dns", "/qubes-secondary-dns", "/qubes-ip6", "/qubes-gateway6"),
)


class WiringMixin(NetMixin):
    """What a VM class needs to be connected while it runs.

    Each run of a net VM has a `Downlink`; each run of a client has, as long as it is
    attached, an `Uplink` into that of its net VM.
    """

    life: Life

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.uplink: Uplink | None = None
        self.downlink: Downlink | None = None
        #: Of interfaces that the guest has not let go of.
        self._loose: list[Uplink] = []
        self._rewiring = asyncio.Lock()
        self._opening = asyncio.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._net_change: asyncio.Task[None] | None = None
        super().__init__(*args, **kwargs)

    # what others ask for

    async def attach_network(self) -> None:
        """Attach it to its net VM, which is started if it does not run.

        Nothing happens if it is attached.

        :raise QubesVMNotRunningError: when this VM does not run.
        :raise QubesVMError: when it has no net VM, or another client of it has the same
            addresses.
        :raise HarnessError: for what else fails: the host, the hypervisor, a guest.
        """
        self.life.running_agent()
        netvm = self.netvm
        if netvm is None:
            raise QubesVMError(self, f"VM {self} has no net VM: set its property netvm")
        await netvm.start()
        async with self._rewiring:
            await self._rewire()

    async def detach_network(self) -> None:
        """Detach it from its net VM, until it is attached again.

        :raise QubesVMNotRunningError: when it does not run.
        :raise QubesVMError: when it is not attached.
        :raise HarnessError: when its guest does not let go of the interface, which is
            connected to nothing then.
        """
        self.life.running_agent()
        async with self._rewiring:
            if self.uplink is None:
                raise QubesVMError(self, f"VM {self} is not attached to a net VM")
            await self._unplug(self.uplink)

    async def network_settled(self) -> None:
        """Wait until a change of `netvm` while it runs is carried out.

        Set on the event loop's own thread, the property is changed at once, and the
        interface soon; set on another thread, both at once.

        :raise HarnessError: what went wrong with the last change.
        """
        if self._net_change is not None:
            await asyncio.shield(self._net_change)

    # events

    @handler("domain-pre-start")
    async def on_pre_start_net(self, _event: str, **kwargs: Any) -> None:
        """Have the net VM run first."""
        if self.netvm is not None:
            await self.netvm.start(start_guid=kwargs.get("start_guid", True))

    @handler("domain-spawn")
    async def on_spawn_net(self, _event: str, **_kwargs: Any) -> None:
        """Plug it in; what its guest or the net VM's cannot do fails no start."""
        self._loop = asyncio.get_running_loop()
        if self.life.agent is None:
            if self.netvm is not None or self.provides_network:
                log.warning(
                    "VM %s starts without a network, which an agent sets up", self.name
                )
            return
        try:
            if self.netvm is not None:
                await self.netvm.start()
                async with self._rewiring:
                    await self._rewire()
            if self.provides_network and self.app.hypervisor.networked:
                await self.open_downlink()
        except (GuestError, DeadlineError) as error:
            log.warning(
                "VM %s starts without all of its network: %s", self.name, str(error)
            )

    @handler("domain-start")
    async def on_start_net(self, _event: str, **_kwargs: Any) -> None:
        """Attach the clients that run already, all at once."""
        clients = self.connected_vms if self.provides_network else ()
        waiting = [vm for vm in clients if vm.get_power_state() == "Running"]
        await asyncio.gather(*(self._reattach(vm) for vm in waiting))

    async def _reattach(self, vm: WiringMixin) -> None:
        try:
            await vm.detach_network()
        except Exception as error:  # noqa: BLE001 - whatever it was attached to is gone
            log.info("VM %s is attached anew: %s", vm.name, str(error))
        try:
            await vm.attach_network()
        except Exception as error:  # noqa: BLE001 - one client stops nobody else
            log.error(  # noqa: TRY400 - the error says it all
                "VM %s cannot be attached to its net VM %s: %s",
                vm.name,
                self.name,
                str(error),
            )

    @handler("domain-unpaused")
    async def on_unpaused_net(self, _event: str, **_kwargs: Any) -> None:
        """Catch up with what happened meanwhile."""
        try:
            if self.downlink is not None:
                await self.downlink.route(self._routes)
            if self.netvm is None or self.netvm.is_running():
                async with self._rewiring:
                    await self._rewire()
        except (HarnessError, QubesException) as error:
            log.warning(
                "VM %s goes on without all of its network: %s", self.name, str(error)
            )

    @handler("domain-stopped", "domain-start-failed")
    async def on_stopped_net(self, _event: str, **_kwargs: Any) -> None:
        """Take away what the run had on the host."""
        async with self._rewiring:
            uplink, self.uplink = self.uplink, None
            for gone in (*self._loose, *((uplink,) if uplink else ())):
                await gone.remove()
            self._loose.clear()
        async with self._opening:
            downlink, self.downlink = self.downlink, None
            if downlink is not None:
                await downlink.close()
        if uplink is not None:
            self._leave_addresses(uplink.downlink)
            await self._announce_end(uplink)

    @handler("property-set:netvm", "property-reset:netvm")
    def on_netvm_set(self, _event: str, **_kwargs: Any) -> None:
        """Have the interface follow, if the VM runs."""
        peer = self.netvm and self.netvm.name
        note("network", self.name, change="netvm", peer=peer)
        self._net_change = None  # nobody is told of the failure of an earlier one
        if self._loop is None or not self.is_live():
            return
        change = self._follow()
        try:
            here = asyncio.get_running_loop() is self._loop
        except RuntimeError:
            here = False
        if here:
            self._net_change = self._loop.create_task(change)
            self._net_change.add_done_callback(self._changed)
        else:
            asyncio.run_coroutine_threadsafe(change, self._loop).result()

    def _changed(self, change: asyncio.Task[None]) -> None:
        if not change.cancelled() and (error := change.exception()) is not None:
            log.error("the network of VM %s did not change: %s", self.name, str(error))

    async def _follow(self) -> None:
        async with self._rewiring:
            if not self.is_live():
                return
            if not self.is_paused():  # type: ignore[attr-defined]
                await self._rewire()
            elif self.uplink is not None:
                # the guest can let go of it only when it runs again
                await self.uplink.cut()

    # this VM as a client

    def is_live(self) -> bool:
        """Tell whether there is a guest to talk to, or was a moment ago."""
        return self.life.agent is not None and self.life.domain is not None

    def _live(self) -> tuple[Domain, GuestAgent]:
        if self.life.domain is None or self.life.agent is None:
            raise QubesVMNotRunningError(self)
        return self.life.domain, self.life.agent

    async def _rewire(self) -> None:
        """Have the interface be what the property `netvm` says."""
        if not self.app.hypervisor.networked:
            return
        netvm = self.netvm
        wanted = None if netvm is None else await netvm.open_downlink()
        if self.uplink is not None and (
            self.uplink.downlink is not wanted or self.uplink.is_cut
        ):
            await self._unplug(self.uplink)
        if wanted is not None and self.uplink is None:
            await self._plug(wanted)

    async def _plug(self, downlink: Downlink) -> None:
        domain, agent = self._live()
        self._take_addresses(downlink)
        try:
            self.uplink = await Uplink.open(
                domain, downlink, self.mac, self.ip, self.behind()
            )
        except BaseException:
            self._leave_addresses(downlink)
            raise
        await _all(
            self._set_up(agent, downlink),
            self.announce(self.uplink),
            self._tell_addresses(agent),
        )
        note("network", self.name, change="attached", peer=downlink.owner.name)
        await downlink.owner.fire_event_async("net-domain-connect", vm=self)

    async def _set_up(self, agent: GuestAgent, downlink: Downlink) -> None:
        await set_up_uplink(
            agent,
            mac=self.mac,
            address=self.ip,
            gateway=downlink.owner.ip,
            dns=self.dns or (),
        )

    def _take_addresses(self, downlink: Downlink) -> None:
        for address in (self.mac, str(self.ip)):
            if address in downlink.taken:
                raise QubesVMError(
                    self,
                    f"VM {self} cannot be attached to VM {downlink.owner}:"
                    f" VM {downlink.taken[address]} has the address {address}",
                )
        downlink.taken |= dict.fromkeys((self.mac, str(self.ip)), self.name)

    def _leave_addresses(self, downlink: Downlink) -> None:
        for address, name in list(downlink.taken.items()):
            if name == self.name:
                del downlink.taken[address]

    async def _unplug(self, uplink: Uplink) -> None:
        domain, agent = self._live()
        self.uplink = None
        self._loose.append(uplink)
        try:
            await uplink.cut()
            await domain.detach_interface(uplink.mac)
            await uplink.remove()
            self._loose.remove(uplink)
        finally:
            self._leave_addresses(uplink.downlink)
            await self._announce_end(uplink)
        if self.netvm is None:
            await self._tell_addresses(agent)

    async def _tell_addresses(self, agent: GuestAgent) -> None:
        entries = self.network_entries()
        gone = [path for path in _CLIENT_ENTRIES if path not in entries]
        async with _deadline(f"answer of VM {self} to new addresses"):
            for path, value in entries.items():
                await agent.write_db(path, value)
            for path in gone:
                await agent.remove_db(path)

    # this VM as a net VM

    async def open_downlink(self) -> Downlink:
        """Return what clients are plugged into, made if there is none yet."""
        async with self._opening:
            domain, agent = self._live()
            if self.is_paused():  # type: ignore[attr-defined]
                raise QubesVMNotRunningError(self, f"VM {self} is paused; unpause it")
            if self.downlink is None:
                self.downlink = await Downlink.open(self, domain, agent, self.ip)
                self.downlink.taken[str(self.ip)] = self.name
            return self.downlink

    def attached_vms(self) -> Iterator[WiringMixin]:
        """Yield the VMs that are plugged in here."""
        for vm in self.app.domains if self.downlink is not None else ():
            uplink = getattr(vm, "uplink", None)
            if uplink is not None and uplink.downlink is self.downlink:
                yield vm

    def behind(self) -> list[IPv4Address]:
        """Return the addresses of the VMs that reach the network by way of this one."""
        found: dict[Any, None] = {}
        todo: list[WiringMixin] = [self]
        while todo:
            new = [vm for vm in todo.pop().attached_vms() if vm not in found]
            found |= dict.fromkeys(new)
            todo += new
        return [vm.uplink.address for vm in found if vm is not self and vm.uplink]

    def _routes(self) -> Routes:
        return routes_to({a: vm.behind() for a, vm in self._addresses().items()})

    def _addresses(self) -> dict[IPv4Address, WiringMixin]:
        return {vm.uplink.address: vm for vm in self.attached_vms() if vm.uplink}

    # both

    async def announce(self, uplink: Uplink) -> None:
        """Tell all net VMs above which VMs are there now, the nearest first."""
        vm: WiringMixin = self
        seen: list[Any] = []
        while vm not in seen:
            seen.append(vm)
            await uplink.filter(vm.behind())
            vm = uplink.downlink.owner
            await vm.serve(uplink.downlink)
            if vm.uplink is None:
                return
            uplink = vm.uplink

    async def serve(self, downlink: Downlink) -> None:
        """Have the guest know its clients of now."""
        await downlink.route(self._routes)
        if not downlink.closed:
            addresses = " ".join(map(str, self._addresses()))
            async with _deadline(f"answer of VM {self} to a change of its clients"):
                await downlink.agent.write_db("/connected-ips", addresses)

    async def _announce_end(self, uplink: Uplink) -> None:
        """Tell the net VMs above that this one is gone; they may be gone as well."""
        downlink = uplink.downlink
        netvm: WiringMixin = downlink.owner
        if downlink.closed or not netvm.is_live():
            return
        try:
            if not netvm.is_paused():  # type: ignore[attr-defined]
                await netvm.serve(downlink)
                if netvm.uplink is not None:
                    await netvm.announce(netvm.uplink)
        except (HarnessError, QubesException) as error:
            log.info(
                "VM %s was not told that VM %s left: %s",
                netvm.name,
                self.name,
                str(error),
            )
        note("network", self.name, change="detached", peer=netvm.name)
        await netvm.fire_event_async("net-domain-disconnect", vm=self)


async def _all(*actions: Awaitable[None]) -> None:
    """Wait for all of them, and raise the first error then."""
    for result in await asyncio.gather(*actions, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result


@contextlib.asynccontextmanager
async def _deadline(waited_for: str) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(_DATABASE):
            yield
    except TimeoutError:
        raise DeadlineError(waited_for, _DATABASE) from None
