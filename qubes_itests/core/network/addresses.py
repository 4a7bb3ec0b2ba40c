"""The addresses of VMs, as Qubes OS assigns them."""

from __future__ import annotations

import re
from ipaddress import IPv4Address, IPv6Address
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "DNS",
    "DOWNLINK_MAC",
    "NETMASK",
    "check_mac",
    "default_mac",
    "ipv4_of",
    "ipv6_of",
    "upstream",
]

#: The name servers of all VMs; the outermost net VM is to answer for them.
DNS: Final = (IPv4Address("10.139.1.1"), IPv4Address("10.139.1.2"))

#: Each VM is alone in its network; its gateway is beside that, on the same wire.
NETMASK: Final = IPv4Address("255.255.255.255")

_NUMBERED: Final = int(IPv4Address("10.137.0.0"))
_DISPOSABLE: Final = int(IPv4Address("10.138.0.0"))
_NUMBERED_6: Final = int(IPv6Address("fd09:24ef:4179::a89:0"))
_DISPOSABLE_6: Final = int(IPv6Address("fd09:24ef:4179::a8a:0"))

_MAC_PREFIX: Final = "00:16:3e:5e"
_FIRST_MAC: Final = 0x6C00
_MAC: Final = re.compile(r"[0-9a-f][02468ace](:[0-9a-f]{2}){5}")

#: A net VM's interface towards its clients; it would be that of the VM with number 0.
DOWNLINK_MAC: Final = f"{_MAC_PREFIX}:6c:00"


def _number(vm: Any) -> tuple[bool, int]:
    disposable = getattr(vm, "dispid", None)
    return disposable is not None, vm.qid if disposable is None else disposable


def ipv4_of(vm: Any) -> IPv4Address:
    """Return the address of a VM: by its `qid`, or a disposable's `dispid`."""
    disposable, number = _number(vm)
    return IPv4Address((_DISPOSABLE if disposable else _NUMBERED) + number)


def ipv6_of(vm: Any) -> IPv6Address:
    """Return the IPv6 address of a VM; as `ipv4_of`."""
    disposable, number = _number(vm)
    return IPv6Address((_DISPOSABLE_6 if disposable else _NUMBERED_6) + number)


def default_mac(vm: Any) -> str:
    """Return a hardware address that no other VM of the app has by default."""
    number = (_FIRST_MAC + vm.qid) & 0xFFFF
    return f"{_MAC_PREFIX}:{number >> 8:02x}:{number & 0xFF:02x}"


def check_mac(vm: object, prop: object, value: Any) -> str:
    """Setter of `mac`: six bytes in hexadecimal digits, with colons, of one station."""
    del vm, prop
    mac = str(value).lower()
    if not _MAC.fullmatch(mac):
        raise ValueError("it takes an address of one station, as in 00:16:3e:5e:6c:01")
    if mac == DOWNLINK_MAC:
        raise ValueError("net VMs have it")
    if mac.startswith("fe:"):
        raise ValueError("addresses that begin with fe: are the hypervisor's")
    return mac


def upstream(vm: Any) -> Iterator[Any]:
    """Yield the net VM of a VM, its net VM, and so on; each once, loop or no loop."""
    seen = []
    while (vm := getattr(vm, "netvm", None)) is not None and vm not in seen:
        seen.append(vm)
        yield vm
