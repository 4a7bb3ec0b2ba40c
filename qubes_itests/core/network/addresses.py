"""The addresses of VMs, as Qubes OS assigns them."""

from __future__ import annotations

import re
from ipaddress import IPv4Address, IPv6Address
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qubes_itests.core.vm.base import BaseVM
    from qubes_itests.core.vm.qubesvm import QubesVM

__all__ = [
    "CLIENT_ENTRIES",
    "DNS",
    "DOWNLINK_MAC",
    "FAKE",
    "Addresses",
    "check_mac",
    "default_ip6",
    "default_mac",
    "dns",
    "gateway",
    "gateway6",
    "ipv4_of",
    "ipv6_of",
    "netmask",
    "network_entries",
    "upstream",
    "visible_gateway",
    "visible_gateway6",
    "visible_ip",
    "visible_ip6",
    "visible_netmask",
]

#: The name servers of all VMs; the outermost net VM is to answer for them.
DNS: Final = (IPv4Address("10.139.1.1"), IPv4Address("10.139.1.2"))

#: What a guest has in its database as long as it has a net VM.
CLIENT_ENTRIES: Final = (
    *("/qubes-mac", "/qubes-ip", "/qubes-netmask", "/qubes-gateway"),
    *("/qubes-primary-dns", "/qubes-secondary-dns", "/qubes-ip6", "/qubes-gateway6"),
)

#: Features that give the guest other addresses than it has, by what reads their values.
FAKE: Final = dict.fromkeys(
    ("net.fake-ip", "net.fake-gateway", "net.fake-netmask"), IPv4Address
)

#: Each VM is alone in its network; its gateway is beside that, on the same wire.
_NETMASK: Final = IPv4Address("255.255.255.255")

_NUMBERED: Final = int(IPv4Address("10.137.0.0"))
_DISPOSABLE: Final = int(IPv4Address("10.138.0.0"))
_NUMBERED_6: Final = int(IPv6Address("fd09:24ef:4179::a89:0"))
_DISPOSABLE_6: Final = int(IPv6Address("fd09:24ef:4179::a8a:0"))

_MAC_PREFIX: Final = "00:16:3e:5e"
_FIRST_MAC: Final = 0x6C00
_MAC: Final = re.compile(r"[0-9a-f][02468ace](:[0-9a-f]{2}){5}")

#: A net VM's interface towards its clients; it would be that of the VM with number 0.
DOWNLINK_MAC: Final = f"{_MAC_PREFIX}:6c:00"


class Addresses(tuple[IPv4Address, ...]):
    """Addresses, written with spaces between them."""

    __slots__ = ()

    def __str__(self) -> str:
        return " ".join(map(str, self))


def ipv4_of(vm: QubesVM) -> IPv4Address:
    """Return the address of a VM: by its `qid`, or a disposable's `dispid`."""
    if vm.disposable_number is None:
        return IPv4Address(_NUMBERED + vm.qid)
    return IPv4Address(_DISPOSABLE + vm.disposable_number)


def ipv6_of(vm: QubesVM) -> IPv6Address:
    """Return the IPv6 address of a VM; as `ipv4_of`."""
    if vm.disposable_number is None:
        return IPv6Address(_NUMBERED_6 + vm.qid)
    return IPv6Address(_DISPOSABLE_6 + vm.disposable_number)


def default_ip6(vm: QubesVM) -> IPv6Address | None:
    """Return the IPv6 address where the feature ipv6 is set, here or in a net VM."""
    has_ipv6: str | None = vm.features.check_with_netvm("ipv6", None)
    if vm.is_networked() and has_ipv6:
        return ipv6_of(vm)
    return None


def default_mac(vm: QubesVM) -> str:
    """Return a hardware address that no other VM of the app has by default."""
    number = (_FIRST_MAC + vm.qid) & 0xFFFF
    return f"{_MAC_PREFIX}:{number >> 8:02x}:{number & 0xFF:02x}"


def check_mac(vm: object, prop: object, value: Any) -> str:
    """Setter of `mac`: six bytes in hexadecimal digits, with colons, of one station."""
    del vm, prop
    mac = str(value).lower()
    if not _MAC.fullmatch(mac):
        raise ValueError("expected an address of one station, as in 00:16:3e:5e:6c:01")
    if mac == DOWNLINK_MAC:
        raise ValueError("net VMs have it")
    if mac.startswith("fe:"):
        raise ValueError("addresses that begin with fe: are the hypervisor's")
    return mac


def upstream(vm: BaseVM) -> Iterator[QubesVM]:
    """Yield the net VM of a VM, its net VM, and so on; each once, loop or no loop."""
    seen: list[QubesVM] = []
    while (netvm := vm.netvm) is not None and netvm not in seen:
        seen.append(netvm)
        yield netvm
        vm = netvm


# What a guest is told; read-only properties of a VM, each with this name.


def visible_ip(vm: QubesVM) -> IPv4Address | None:
    """IPv4 address that the guest is told, by the feature net.fake-ip."""
    return _fake(vm, "net.fake-ip") or vm.ip


def visible_gateway(vm: QubesVM) -> IPv4Address | None:
    """Gateway that the guest is told, by the feature net.fake-gateway."""
    if vm.netvm is None:
        return None
    return _fake(vm, "net.fake-gateway") or vm.netvm.gateway


def visible_netmask(vm: QubesVM) -> IPv4Address | None:
    """Netmask that the guest is told, by the feature net.fake-netmask."""
    return _fake(vm, "net.fake-netmask") or vm.netmask


def visible_ip6(vm: QubesVM) -> IPv6Address | None:
    """IPv6 address that the guest is told."""
    return vm.ip6


def visible_gateway6(vm: QubesVM) -> IPv6Address | None:
    """IPv6 gateway that the guest is told."""
    return None if vm.netvm is None else vm.netvm.gateway6


def gateway(vm: QubesVM) -> IPv4Address | None:
    """Gateway of its clients; None when it has none."""
    return vm.visible_ip if vm.provides_network else None


def gateway6(vm: QubesVM) -> IPv6Address | None:
    """IPv6 gateway of its clients."""
    return vm.visible_ip6 if vm.provides_network else None


def netmask(vm: QubesVM) -> IPv4Address | None:
    """Netmask of its address."""
    return _NETMASK if vm.is_networked() else None


def dns(vm: QubesVM) -> Addresses | None:
    """Its name servers."""
    return Addresses(DNS) if vm.is_networked() else None


def _fake(vm: QubesVM, feature: str) -> IPv4Address | None:
    value = vm.features.get(feature)
    return IPv4Address(value) if value else None


def network_entries(vm: QubesVM) -> dict[str, str]:
    """Return what a guest finds about its network in qubesdb."""
    entries: dict[str, object] = {}
    if vm.provides_network:
        entries |= {
            "/qubes-netvm-network": vm.gateway,
            "/qubes-netvm-gateway": vm.gateway,
            "/qubes-netvm-gateway6": vm.gateway6,
            "/qubes-netvm-netmask": vm.netmask,
            "/qubes-netvm-primary-dns": DNS[0],
            "/qubes-netvm-secondary-dns": DNS[1],
        }
    if vm.netvm is not None:
        of_client = (
            vm.mac,
            vm.visible_ip,
            vm.visible_netmask,
            vm.visible_gateway,
            *DNS,
            vm.visible_ip6,
            vm.visible_gateway6,
        )
        entries |= zip(CLIENT_ENTRIES, of_client, strict=True)
    return {path: str(value) for path, value in entries.items() if value}
