"""The network of guests: what connects them to their net VMs, as a core describes it.

Each net VM has one interface to all of its clients, as with our own core. In Qubes OS
scripts and a daemon in the net VM follow what they read in qubesdb; here the host reads
that, and tells the guest what to do.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import TYPE_CHECKING, Final

from qubes_itests import timeline
from qubes_itests.dom0.firewall import (
    base_rules,
    firewall_rules,
    hiding_rules,
    named_hosts,
)
from qubes_itests.exc import HarnessError
from qubes_itests.guest.exc import GuestGoneError
from qubes_itests.guest.start.links import Downlink, Uplink, routes_to
from qubes_itests.guest.start.network import (
    DOWNLINK,
    UPLINK,
    run_as_root,
    set_up_uplink,
)
from qubes_itests.hypervisor.exc import HypervisorError
from qubes_itests.untrusted_text import safe_text

if TYPE_CHECKING:
    from collections.abc import Awaitable, Mapping

    from qubes_itests.dom0.stores import QubesDB
    from qubes_itests.dom0.xen_xml import InterfaceConfig
    from qubes_itests.guest.link.agent import GuestAgent
    from qubes_itests.hypervisor.contract import Domain

__all__ = ["Network"]

log = logging.getLogger("qubes_itests.dom0")

#: A net VM's interface to its clients; of this kind a core gives none to a VM.
_DOWNLINK_MAC: Final = "02:16:3e:5e:6c:00"
_FIREWALL: Final = "/qubes-firewall/"
_VERSIONS: Final = {4: IPv4Address, 6: IPv6Address}
#: Has clients be answered by the name servers of their net VM.
_NAME_SERVERS: Final = "/usr/lib/qubes/qubes-setup-dnat-to-ns"
#: Addresses of a host that a rule may name, and those are kept that its guest says.
_MOST_ADDRESSES: Final = 64


class Network:
    """What connects one guest, from its start to its end.

    :param name: of the VM.
    :param domain: its domain.
    :param agent: of the guest.
    :param database: its qubesdb, from which facts are taken.
    """

    def __init__(
        self, name: str, domain: Domain, agent: GuestAgent, database: QubesDB
    ) -> None:
        self.name = name
        #: While it is, its guest answers nobody.
        self.paused = False
        #: By hardware address, the ways to net VMs.
        self._uplinks: dict[str, Uplink[Network]] = {}
        #: What is plugged in here, as the core describes it.
        self._clients: dict[Uplink[Network], InterfaceConfig] = {}
        self._downlink: Downlink[Network] | None = None
        # While one waits for what clients are plugged into, others do, and not make
        # another one.
        self._opening = asyncio.Lock()
        # The same for rules: each change is made of all that there is when it begins.
        self._loading = asyncio.Lock()
        self._loaded = ""
        self._versions: set[int] = set()
        self._domain = domain
        self._agent = agent
        self._database = database
        self._following: set[asyncio.Task[None]] = set()

    def _fact(self, path: str) -> str:
        return (self._database.read(path) or b"").decode()

    def _address(self, path: str) -> IPv4Address | IPv6Address | None:
        fact = self._fact(path)
        return ip_address(fact) if fact else None

    # as a client

    async def attach(self, interface: InterfaceConfig, net: Network) -> None:
        """Plug it into a net VM.

        What a guest does not do is logged, as there: the interface is plugged in.

        :raise HypervisorError: it has such an interface; or another client has its
            address.
        :raise HarnessError: the host or the hypervisor does not do it.
        """
        if interface.mac in self._uplinks:
            reason = f"it has an interface {interface.mac} already"
            raise HypervisorError(self.name, "attach an interface to", reason)
        downlink = await net.open()
        visible = net.visible(interface.ip)
        if f"{visible}" in downlink.taken:
            reason = f"another client of {net.name} has the address {visible}"
            raise HypervisorError(self.name, "attach an interface to", reason)
        # before the first await: two that come at once would both find it free
        downlink.taken[f"{visible}"] = self.name
        others = [interface.ip6] if interface.ip6 else []
        try:
            uplink = await Uplink.open(
                self._domain, downlink, interface.mac, visible, others
            )
        except BaseException:
            del downlink.taken[f"{visible}"]
            raise
        self._uplinks[interface.mac] = uplink
        net._clients[uplink] = interface
        timeline.note("network", self.name, change="attached", peer=net.name)
        # each of them takes a guest the time of a program or two
        await asyncio.gather(
            self._warned("use its interface", self._set_up_uplink(interface)),
            self._warned("have its chains", self._load_base()),
            net.serve(),
        )

    async def detach(self, mac: str) -> None:
        """Pull an interface out; nothing happens if there is none.

        :raise HarnessError: the guest does not let go of it: it has it still, and
            nothing passes any more.
        """
        uplink = self._uplinks.get(mac)
        if uplink is None:
            return
        # whatever the guest does, nothing passes any more
        await uplink.cut()
        try:
            await self._domain.detach_interface(mac)
            self._uplinks.pop(mac, None)
            await uplink.remove()
        finally:
            await self._leave(uplink).serve()

    def _leave(self, uplink: Uplink[Network]) -> Network:
        net = uplink.downlink.owner
        if net._clients.pop(uplink, None) is not None:  # noqa: SLF001 - of this class
            del uplink.downlink.taken[f"{uplink.address}"]
            timeline.note("network", self.name, change="detached", peer=net.name)
        return net

    async def _set_up_uplink(self, interface: InterfaceConfig) -> None:
        address, gateway = self._address("/qubes-ip"), self._address("/qubes-gateway")
        if not isinstance(address, IPv4Address) or not isinstance(gateway, IPv4Address):
            log.warning("VM %s has no address, or no net VM, in its qubesdb", self.name)
            return
        dns = map(self._address, ("/qubes-primary-dns", "/qubes-secondary-dns"))
        await set_up_uplink(
            self._agent,
            mac=interface.mac,
            address=address,
            gateway=gateway,
            dns=[server for server in dns if isinstance(server, IPv4Address)],
        )
        own, beyond = self._address("/qubes-ip6"), self._address("/qubes-gateway6")
        if own is not None:
            lines = [
                f"echo 0 >/proc/sys/net/ipv6/conf/{UPLINK}/disable_ipv6",
                f"ip -6 addr replace {own}/128 dev {UPLINK} nodad",
            ]
            if beyond is not None:
                lines += [
                    f"ip -6 route replace {beyond} dev {UPLINK}",
                    f"ip -6 route replace default via {beyond} dev {UPLINK}",
                ]
            await self._run("use IPv6", " && ".join(lines))
        if self._downlink is not None and self._versions:
            await self._run("pass on questions for names", _NAME_SERVERS)

    # as a net VM

    async def open(self) -> Downlink[Network]:
        """Return what clients are plugged into, made if there is none yet.

        :raise HarnessError: it cannot be made.
        """
        async with self._opening:
            if self._downlink is None:
                address = self._address("/qubes-netvm-gateway")
                if not isinstance(address, IPv4Address):
                    reason = "it provides no network"
                    raise HypervisorError(self.name, "plug a client into", reason)
                self._downlink = await Downlink.open(
                    self,
                    self._domain,
                    self._agent,
                    mac=_DOWNLINK_MAC,
                    address=address,
                )
                await self._warned("forward", self._forward())
            return self._downlink

    async def begin(self) -> None:
        """Be ready for clients, if the guest is to have some."""
        if self._fact("/qubes-netvm-gateway"):
            base = self._warned("have its chains", self._load_base())
            await asyncio.gather(base, self.open())

    async def _forward(self) -> None:
        await self._load_base()
        if not self._versions:
            log.info("VM %s has no nft: it forwards nothing", self.name)
            return
        gateway = self._address("/qubes-netvm-gateway6")
        async with self._loading:
            # first: a client whose rules are not there yet passes nothing
            wanted = await self._wanted()
            # from here on rules keep clients apart, which may let some of them pass
            lines = [wanted, f"ip rule del iif {DOWNLINK}", _NAME_SERVERS]
            if gateway is not None:
                lines += [
                    f"echo 0 >/proc/sys/net/ipv6/conf/{DOWNLINK}/disable_ipv6",
                    "echo 1 >/proc/sys/net/ipv6/conf/all/forwarding",
                    f"ip -6 addr replace {gateway}/128 dev {DOWNLINK} nodad",
                ]
            await self._run("forward", "sh -e", "\n".join(lines).encode())
            self._loaded = wanted

    def visible(self, address: IPv4Address) -> IPv4Address:
        """Return the address that a client believes to have."""
        return self._mapped(address, "visible-ip") or address

    def _mapped(self, address: IPv4Address, what: str) -> IPv4Address | None:
        fact = self._fact(f"/mapped-ip/{address}/{what}")
        return IPv4Address(fact) if fact else None

    async def serve(self) -> None:
        """Have the guest know its clients of now, and their rules."""
        downlink = self._downlink
        if downlink is None or downlink.closed or self.paused:
            return
        await self._warned("reach its clients", self._serve(downlink))

    async def _serve(self, downlink: Downlink[Network]) -> None:
        await downlink.route(
            lambda: routes_to(
                {
                    address: ()
                    for uplink, interface in self._clients.items()
                    for address in (interface.ip, uplink.address)
                }
            )
        )
        async with self._loading:
            wanted = await self._wanted()
            if wanted != self._loaded and not downlink.closed:
                await self._run("serve its clients", "sh -e", wanted.encode())
                self._loaded = wanted

    async def _wanted(self) -> str:
        """Return the script by which the guest serves the clients of now."""
        clients = tuple(self._clients.items())
        lines = []
        for _, interface in clients:
            gateway = self._mapped(interface.ip, "visible-gateway")
            if gateway not in (None, self._address("/qubes-netvm-gateway")):
                lines.append(f"ip addr replace {gateway}/32 dev {DOWNLINK}")
            if interface.ip6:
                lines.append(f"ip -6 route replace {interface.ip6} dev {DOWNLINK}")
        hidden = {
            interface.ip: uplink.address
            for uplink, interface in clients
            if uplink.address != interface.ip
        }
        rules = ""
        if self._versions and (hidden or "qubes-visible" in self._loaded):
            rules = hiding_rules(hidden)
        # as there, one without a net VM of its own passes all
        if self._fact("/qubes-gateway") or self._fact("/qubes-service/qubes-firewall"):
            for version in sorted(self._versions):
                rules += await self._firewall(version, hidden)
        if rules:
            lines.append(f"nft -f - <<'END'\n{rules}END")
        return "\n".join(dict.fromkeys(lines))

    async def _firewall(
        self, version: int, hidden: Mapping[IPv4Address, IPv4Address]
    ) -> str:
        rules: dict[IPv4Address | IPv6Address, Mapping[str, str]] = {}
        hosts: dict[str, list[str]] = {}
        for interface in tuple(self._clients.values()):
            address = interface.ip if version == 4 else interface.ip6  # noqa: PLR2004
            if address is None:
                continue
            prefix = f"{_FIREWALL}{address}/"
            entries = {
                path.removeprefix(prefix): self._fact(path)
                for path in self._database.list(prefix)
            }
            try:
                names = named_hosts(entries) - hosts.keys()
                asked = [self._addresses(name, version) for name in names]
                hosts |= zip(names, await asyncio.gather(*asked), strict=True)
                rules[address] = entries
            except (HarnessError, ValueError) as error:
                said = safe_text(str(error), lines=True)
                log.warning(
                    "VM %s lets nothing of %s pass: %s", self.name, address, said
                )
                rules[address] = {}
        servers = (f"/qubes-netvm-{which}-dns" for which in ("primary", "secondary"))
        dns = [str(server) for server in map(self._address, servers) if server]
        return firewall_rules(version, rules, dns, hosts, hidden)

    async def _addresses(self, host: str, version: int) -> list[str]:
        """Return the addresses of a host, as the guest finds them."""
        found = await self._run(
            f"find the addresses of {host}",
            f"getent ahostsv{version} {host} || [ $? = 2 ]",
        )
        said = [line.partition(b" ")[0] for line in found.splitlines()]
        kind = _VERSIONS[version]
        addresses = {kind(each.decode()) for each in said[:_MOST_ADDRESSES]}
        return sorted(map(str, addresses))

    def follow(self, path: str) -> None:
        """Have the guest follow what the core has written into its qubesdb."""
        # that one comes last, when all rules of a client are written
        if path.startswith(_FIREWALL) and "/" not in path.removeprefix(_FIREWALL):
            self.serve_soon()

    def serve_soon(self) -> None:
        """Have `serve` done by somebody who need not wait for the guest."""
        task = asyncio.ensure_future(self.serve())
        self._following.add(task)
        task.add_done_callback(self._following.discard)

    # both

    async def _load_base(self) -> None:
        """Have the chains that are there in each VM that has nft."""
        async with self._loading:
            versions = {4}
            if self._fact("/qubes-ip6") or self._fact("/qubes-netvm-gateway6"):
                versions.add(6)
            rules = "".join(map(base_rules, sorted(versions - self._versions)))
            if rules:
                script = "command -v nft >/dev/null || exec echo none; exec nft -f -"
                if not await self._run("have its chains", script, rules.encode()):
                    self._versions |= versions

    async def _run(self, what: str, script: str, input: bytes = b"") -> bytes:  # noqa: A002
        return await run_as_root(self._agent, what, script, input=input)

    async def _warned(self, what: str, action: Awaitable[None]) -> None:
        try:
            await action
        except (HarnessError, ValueError) as error:
            said = safe_text(str(error), lines=True)
            # one that has ended meanwhile is no news
            level = (
                logging.INFO if isinstance(error, GuestGoneError) else logging.WARNING
            )
            log.log(level, "VM %s does not %s: %s", self.name, what, said)

    async def end(self) -> None:
        """Take away what it had on the host, once the guest has ended."""
        for task in tuple(self._following):
            task.cancel()
        uplinks, self._uplinks = self._uplinks, {}
        for uplink in uplinks.values():
            with contextlib.suppress(HarnessError):
                await uplink.remove()
            # a net VM that does not answer holds up no end of its clients
            self._leave(uplink).serve_soon()
        async with self._opening:
            if self._downlink is not None:
                await self._downlink.close()
