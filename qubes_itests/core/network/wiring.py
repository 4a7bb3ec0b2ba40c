"""The network of running VMs: interfaces, routes, and who is plugged in where."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, Final

from qubes_itests.core.exc import QubesException, QubesVMError, QubesVMNotRunningError
from qubes_itests.core.network.addresses import (
    CLIENT_ENTRIES,
    DOWNLINK_MAC,
    network_entries,
)
from qubes_itests.exc import DeadlineError, HarnessError
from qubes_itests.guest.exc import GuestError
from qubes_itests.guest.start.links import Downlink, Uplink, routes_to
from qubes_itests.guest.start.network import set_up_uplink
from qubes_itests.timeline import note

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Iterator
    from ipaddress import IPv4Address

    from qubes_itests.core.vm.qubesvm import QubesVM
    from qubes_itests.guest.link.agent import GuestAgent
    from qubes_itests.guest.start.links import Routes
    from qubes_itests.host.bridge import Bridge, Tap
    from qubes_itests.hypervisor.contract import Domain

__all__ = ["Wiring"]

log = logging.getLogger("qubes.net")

#: Seconds that a guest has for changes of its database.
_DATABASE: Final = 10.0


class Wiring:
    """What connects one VM while it runs.

    Each run of a net VM has a `Downlink`; each run of a client has, as long as it is
    attached, an `Uplink` into that of its net VM.

    :param vm: the VM.
    """

    def __init__(self, vm: QubesVM) -> None:
        self.vm = vm
        self.uplink: Uplink[Wiring] | None = None
        self.downlink: Downlink[Wiring] | None = None
        #: Of interfaces that the guest has not let go of.
        self._loose: list[Uplink[Wiring]] = []
        # Two locks, taken in this order: one for the way to the net VM, and one for
        # what clients are plugged into. A client that holds its first one asks its net
        # VM for the second; with one lock for both, a change of a net VM's own netvm
        # and a start of its client would each wait for the other.
        self._rewiring = asyncio.Lock()
        self._opening = asyncio.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._change: asyncio.Task[None] | None = None
        self._netvm_start: asyncio.Task[QubesVM] | None = None

    # what others ask for

    async def attach(self) -> None:
        """Attach the VM to its net VM, which is started if it does not run.

        Nothing happens if it is attached.

        :raise QubesVMNotRunningError: when this VM does not run.
        :raise QubesVMError: when it has no net VM, or another client of it has the same
            addresses.
        :raise HarnessError: for what else fails: the host, the hypervisor, a guest.
        """
        vm = self.vm
        vm.life.running_agent()
        if vm.netvm is None:
            raise QubesVMError(vm, f"VM {vm} has no net VM: set its property netvm")
        await vm.netvm.start()
        async with self._rewiring:
            await self._rewire()

    async def detach(self) -> None:
        """Detach the VM from its net VM, until it is attached again.

        :raise QubesVMNotRunningError: when it does not run.
        :raise QubesVMError: when it is not attached.
        :raise HarnessError: when its guest does not let go of the interface, which is
            connected to nothing then.
        """
        self.vm.life.running_agent()
        async with self._rewiring:
            if self.uplink is None:
                raise QubesVMError(self.vm, f"VM {self.vm} is not attached to a net VM")
            await self._unplug(self.uplink)

    async def settled(self) -> None:
        """Wait until a change of `netvm` while the VM runs is carried out.

        Set on the event loop's own thread, the property is changed at once, and the
        interface soon; set on another thread, both at once.

        :raise HarnessError: what went wrong with the last change.
        """
        if self._change is not None:
            # one who stops waiting does not stop the change
            await asyncio.shield(self._change)

    # what happens to the VM

    def start_netvm(self, *, start_guid: bool) -> None:
        """Begin to start its net VM; `netvm_started` waits for that.

        :param start_guid: passed on in the events.
        :raise QubesException: when that must not be started.
        """
        netvm = self.vm.netvm
        if netvm is None:
            return
        if netvm.is_halted():
            netvm.check_startable()
        self._netvm_start = asyncio.ensure_future(netvm.start(start_guid=start_guid))
        # If this VM's start fails nobody else looks at the error.
        self._netvm_start.add_done_callback(
            lambda task: task.cancelled() or task.exception()
        )

    async def netvm_started(self) -> None:
        """Return when the net VM runs; raise what its start has failed with."""
        starting, self._netvm_start = self._netvm_start, None
        if starting is not None:
            await starting

    async def begin(self) -> None:
        """Plug the VM in; what its guest or the net VM's cannot do fails no start."""
        vm = self.vm
        self._loop = asyncio.get_running_loop()
        if vm.life.agent is None:
            if vm.netvm is not None or vm.provides_network:
                log.warning(
                    "VM %s starts without a network, which an agent sets up", vm.name
                )
            return
        try:
            if vm.netvm is not None:
                await vm.netvm.start()
                async with self._rewiring:
                    await self._rewire()
            if vm.provides_network and vm.app.hypervisor.networked:
                await self.open_downlink()
        except (GuestError, DeadlineError) as error:
            log.warning(
                "VM %s starts without all of its network: %s", vm.name, str(error)
            )

    def take_up_clients(self, bridge: Bridge, tap: Tap) -> None:
        """Go on as a net VM that was thawed, before its clients do.

        :param bridge: what they are plugged into.
        :param tap: its own way into that.
        """
        domain, agent = self._live()
        self.downlink = Downlink.taken_up(self, domain, agent, bridge, tap)
        self.downlink.taken[str(self.address)] = self.vm.name

    async def take_up(self, downlink: Downlink[Wiring], tap: Tap) -> None:
        """Go on as a client that was thawed, attached to its net VM by a tap."""
        vm = self.vm
        self._live()
        self._loop = asyncio.get_running_loop()
        downlink.taken |= dict.fromkeys((vm.mac, str(self.address)), vm.name)
        self.uplink = Uplink(downlink, vm.mac, self.address, (), tap)
        await self._announce(self.uplink)

    async def attach_clients(self) -> None:
        """Attach the clients that run already, all at once."""
        vm = self.vm

        async def reattach(client: QubesVM) -> None:
            try:
                await client.detach_network()
            except Exception as error:  # noqa: BLE001 - what it was attached to is gone
                log.info("VM %s is attached anew: %s", client.name, str(error))
            try:
                await client.attach_network()
            except Exception as error:  # noqa: BLE001 - one client stops nobody else
                log.error(  # noqa: TRY400 - the error says it all
                    "VM %s cannot be attached to its net VM %s: %s",
                    client.name,
                    vm.name,
                    str(error),
                )

        clients = vm.connected_vms if vm.provides_network else ()
        waiting = [each for each in clients if each.get_power_state() == "Running"]
        await asyncio.gather(*map(reattach, waiting))

    async def catch_up(self) -> None:
        """Carry out what was changed while the VM was paused."""
        vm = self.vm
        try:
            if self.downlink is not None:
                await self.downlink.route(self._routes)
            if vm.netvm is None or vm.netvm.is_running():
                async with self._rewiring:
                    await self._rewire()
        except (HarnessError, QubesException) as error:
            log.warning(
                "VM %s goes on without all of its network: %s", vm.name, str(error)
            )

    async def end(self) -> None:
        """Take away what the run had on the host."""
        self._netvm_start = None
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

    def follow(self) -> None:
        """Have the interface follow a change of `netvm`; see `settled`."""
        peer = None if self.vm.netvm is None else self.vm.netvm.name
        note("network", self.vm.name, change="netvm", peer=peer)
        self._change = None  # nobody is told of the failure of an earlier one
        if self._loop is None or not self.is_live:
            return

        async def change() -> None:
            async with self._rewiring:
                # the task that had the lock before may have ended the run
                if not self.is_live:
                    return
                if not self.vm.is_paused():
                    await self._rewire()
                elif self.uplink is not None:
                    # the guest can let go of it only when it runs again
                    await self.uplink.cut()

        try:
            here = asyncio.get_running_loop() is self._loop
        except RuntimeError:
            here = False
        if here:
            # to wait for it here would keep the loop from carrying it out
            self._change = self._loop.create_task(change())
            self._change.add_done_callback(self._changed)
        else:
            asyncio.run_coroutine_threadsafe(change(), self._loop).result()

    def _changed(self, change: asyncio.Task[None]) -> None:
        if not change.cancelled() and (error := change.exception()) is not None:
            log.error(
                "the network of VM %s did not change: %s", self.vm.name, str(error)
            )

    @property
    def address(self) -> IPv4Address:
        """The VM's IPv4 address; QubesVMError if it has no network at all."""
        if self.vm.ip is None:
            raise QubesVMError(self.vm, f"VM {self.vm} has no IPv4 address")
        return self.vm.ip

    # this VM as a client

    @property
    def is_live(self) -> bool:
        """Whether there is a guest to talk to, or was a moment ago."""
        return self.vm.life.agent is not None and self.vm.life.domain is not None

    def _live(self) -> tuple[Domain, GuestAgent]:
        life = self.vm.life
        if life.domain is None or life.agent is None:
            raise QubesVMNotRunningError(self.vm)
        return life.domain, life.agent

    async def _rewire(self) -> None:
        """Have the interface be what the property `netvm` says."""
        if not self.vm.app.hypervisor.networked:
            return
        netvm = self.vm.netvm
        wanted = None if netvm is None else await netvm.net.open_downlink()
        if self.uplink is not None and (
            self.uplink.downlink is not wanted or self.uplink.is_cut
        ):
            await self._unplug(self.uplink)
        if wanted is not None and self.uplink is None:
            await self._plug(wanted)

    async def _plug(self, downlink: Downlink[Wiring]) -> None:
        vm, own, (domain, agent) = self.vm, self.address, self._live()
        # Before the first await: two clients with the same address, that are plugged
        # in at once, would both find it free.
        for address in (vm.mac, str(own)):
            if address in downlink.taken:
                raise QubesVMError(
                    vm,
                    f"VM {vm} cannot be attached to VM {downlink.owner.vm}:"
                    f" VM {downlink.taken[address]} has the address {address}",
                )
        downlink.taken |= dict.fromkeys((vm.mac, str(own)), vm.name)
        try:
            self.uplink = await Uplink.open(
                domain, downlink, vm.mac, own, self.behind()
            )
        except BaseException:
            self._leave_addresses(downlink)
            raise
        await _all(
            set_up_uplink(
                agent,
                mac=vm.mac,
                address=own,
                gateway=downlink.owner.address,
                dns=vm.dns or (),
            ),
            self._announce(self.uplink),
            self._tell_addresses(agent),
        )
        net = downlink.owner.vm
        note("network", vm.name, change="attached", peer=net.name)
        await net.fire_event_async("net-domain-connect", vm=vm)

    def _leave_addresses(self, downlink: Downlink[Wiring]) -> None:
        for address, name in list(downlink.taken.items()):
            if name == self.vm.name:
                del downlink.taken[address]

    async def _unplug(self, uplink: Uplink[Wiring]) -> None:
        domain, agent = self._live()
        self.uplink = None
        self._loose.append(uplink)
        try:
            # whatever the guest does, nothing passes any more
            await uplink.cut()
            await domain.detach_interface(uplink.mac)
            await uplink.remove()
            self._loose.remove(uplink)
        finally:
            self._leave_addresses(uplink.downlink)
            await self._announce_end(uplink)
        if self.vm.netvm is None:
            await self._tell_addresses(agent)

    async def _tell_addresses(self, agent: GuestAgent) -> None:
        entries = network_entries(self.vm)
        async with _deadline(f"answer of VM {self.vm} to new addresses"):
            for path, value in entries.items():
                await agent.write_db(path, value)
            for path in CLIENT_ENTRIES:
                if path not in entries:
                    await agent.remove_db(path)

    # this VM as a net VM

    async def open_downlink(self) -> Downlink[Wiring]:
        """Return what clients are plugged into, made if there is none yet."""
        vm = self.vm
        async with self._opening:
            domain, agent = self._live()
            if vm.is_paused():
                raise QubesVMNotRunningError(vm, f"VM {vm} is paused; unpause it")
            if self.downlink is None:
                own = self.address
                self.downlink = await Downlink.open(
                    self, domain, agent, mac=DOWNLINK_MAC, address=own
                )
                self.downlink.taken[str(own)] = vm.name
            return self.downlink

    def _clients(self) -> Iterator[tuple[Wiring, Uplink[Wiring]]]:
        """Yield what connects the VMs that are plugged in here."""
        if self.downlink is None:
            return
        for vm in self.vm.app.domains.startable():
            uplink = vm.net.uplink
            if uplink is not None and uplink.downlink is self.downlink:
                yield vm.net, uplink

    def behind(self) -> list[IPv4Address]:
        """Return the addresses of the VMs that reach the network by way of this one."""
        # Plugged in are those of a moment ago: while netvm properties change, there
        # can be a loop of them, in which each is found once.
        found: dict[Wiring, IPv4Address] = {}
        todo: list[Wiring] = [self]
        while todo:
            new = {n: u.address for n, u in todo.pop()._clients() if n not in found}  # noqa: SLF001 - of this class
            found |= new
            todo += new
        found.pop(self, None)
        return list(found.values())

    def _routes(self) -> Routes:
        return routes_to({u.address: net.behind() for net, u in self._clients()})

    # both

    async def _announce(self, uplink: Uplink[Wiring]) -> None:
        """Tell all net VMs above which VMs are there now, the nearest first."""
        net: Wiring = self
        seen: list[Wiring] = []
        while net not in seen:
            seen.append(net)
            await uplink.filter(net.behind())
            net = uplink.downlink.owner
            await net._serve(uplink.downlink)  # noqa: SLF001 - of this class
            if net.uplink is None:
                return
            uplink = net.uplink

    async def _serve(self, downlink: Downlink[Wiring]) -> None:
        """Have the guest know its clients of now."""
        await downlink.route(self._routes)
        if not downlink.closed:
            addresses = " ".join(str(uplink.address) for _, uplink in self._clients())
            async with _deadline(f"answer of VM {self.vm} to a change of its clients"):
                await downlink.agent.write_db("/connected-ips", addresses)

    async def _announce_end(self, uplink: Uplink[Wiring]) -> None:
        """Tell the net VMs above that this one is gone; they may be gone as well."""
        downlink, above = uplink.downlink, uplink.downlink.owner
        if downlink.closed or not above.is_live:
            return
        try:
            if not above.vm.is_paused():
                await above._serve(downlink)  # noqa: SLF001 - of this class
                if above.uplink is not None:
                    await above._announce(above.uplink)  # noqa: SLF001
        except (HarnessError, QubesException) as error:
            log.info(
                "VM %s was not told that VM %s left: %s",
                above.vm.name,
                self.vm.name,
                str(error),
            )
        note("network", self.vm.name, change="detached", peer=above.vm.name)
        await above.vm.fire_event_async("net-domain-disconnect", vm=self.vm)


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
