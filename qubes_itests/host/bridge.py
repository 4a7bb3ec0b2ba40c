"""Bridges between VMs, in the run's own network namespace.

The host takes no part in the traffic: its bridges have no addresses. A VM is plugged
in by a tap device, which is ready, and its filter in place, before the VM has it.
"""

from __future__ import annotations

import itertools
import os
from ipaddress import IPv4Address, IPv6Address
from typing import TYPE_CHECKING, Final, Self

from qubes_itests.exc import EnvironmentNotReadyError
from qubes_itests.host.command import CommandError, run

if TYPE_CHECKING:
    from collections.abc import Collection

__all__ = ["Bridge", "Tap", "source_filter", "target_filter"]

_numbers = itertools.count(1)

#: How `ip` and `tc` say that the kernel lacks something.
_LACKING: Final = (
    *("Unknown device type", "not supported", "not found"),
    *("/dev/net/tun", "qdisc kind is unknown"),
)

#: What a filter answers, of linux/pkt_cls.h.
_PASS: Final = 0
_DROP: Final = 2

#: Classic BPF, of linux/bpf_common.h and linux/filter.h.
_LOAD_WORD, _LOAD_HALF, _LOAD_BYTE, _LOAD_LENGTH = 0x20, 0x28, 0x30, 0x80
_IF_EQUAL, _IF_AT_LEAST, _IF_SET, _RETURN = 0x15, 0x35, 0x45, 0x06
_JUMP = 0x05
_HAS_VLAN_TAG: Final = 0xFFFFF000 + 48

_ARP, _IPV4, _IPV6 = 0x0806, 0x0800, 0x86DD
_MAC, _TYPE, _ARP_MAC = 6, 12, 22
#: Where a frame says who it is from, and for whom.
_ARP_SOURCE, _IPV4_SOURCE, _IPV6_SOURCE = 28, 26, 22
_ARP_TARGET, _IPV4_TARGET, _IPV6_TARGET = 38, 30, 38
#: Bytes of the shortest frames with all headers of each kind.
_LEAST_IPV4, _LEAST_ARP, _LEAST_IPV6 = 34, 42, 54
#: The first word of addresses that are of one wire, and the bit of those of many.
_LINK_LOCAL, _GROUP = 0xFE800000, 1

Instruction = tuple[int, int, int, int]


class Bridge:
    """A bridge that only VMs are plugged into."""

    def __init__(self, name: str) -> None:
        self.name = name

    @classmethod
    def create(cls) -> Self:
        """Make a bridge. Blocking, as all here.

        :raise EnvironmentNotReadyError: the kernel cannot make any.
        :raise CommandError: the system refuses.
        """
        bridge = cls(_new_name("b"))
        _ip(
            f"link add {bridge.name} type bridge mcast_snooping 0",
            f"link set {bridge.name} addrgenmode none",
            f"link set {bridge.name} up",
        )
        return bridge

    def remove(self) -> None:
        """Remove it; the taps in it are plugged into nothing then."""
        _remove(self.name)


class Tap:
    """A VM's way into a bridge."""

    def __init__(self, name: str) -> None:
        self.name = name

    @classmethod
    def create(
        cls,
        bridge: Bridge,
        mac: str,
        sources: Collection[IPv4Address | IPv6Address] | None = None,
    ) -> Self:
        """Make a tap in a bridge.

        :param mac: hardware address of the VM's interface; others may have the same.
        :param sources: the addresses that its packets may come from, and that packets
            for it are for; no others pass then, and none to or from another tap that
            has sources. None is for the VM in the middle, which all others may speak
            to.
        :raise EnvironmentNotReadyError: the kernel cannot make any.
        :raise CommandError: the system refuses; there is no tap then.
        """
        tap = cls(_new_name("t"))
        try:
            _ip(
                f"tuntap add dev {tap.name} mode tap",
                f"link set {tap.name} addrgenmode none master {bridge.name}",
                # What is for one of many goes to all of them, and their filters tell
                # it by its address: the hardware address may be that of several.
                f"link set {tap.name} type bridge_slave"
                f" {'isolated off' if sources is None else 'isolated on learning off'}",
            )
            if sources is not None:
                _run("tc", "qdisc", "add", "dev", tap.name, "clsact")
                tap.filter(mac, sources)
            # last: a guest that is loaded from a saved state may send at once
            _ip(f"link set {tap.name} up")
        except BaseException:
            tap.remove()
            raise
        return tap

    def filter(self, mac: str, sources: Collection[IPv4Address | IPv6Address]) -> None:
        """Set anew which packets may come out of the VM, and go in; see `create`."""
        programs = {
            "ingress": source_filter(mac, sources),
            "egress": target_filter(sources),
        }
        for direction, words in programs.items():
            lines = (str(len(words)), *(" ".join(map(str, word)) for word in words))
            _run(
                *("tc", "filter", "replace", "dev", self.name, direction),
                *("protocol", "all", "prio", "1", "handle", "1"),
                *("bpf", "direct-action", "bytecode", ",".join(lines)),
            )

    def cut(self) -> None:
        """Take it out of its bridge: nothing passes any more, whatever the VM does."""
        _ip(f"link set {self.name} down nomaster")

    def remove(self) -> None:
        """Remove it; nothing happens if it is gone."""
        _remove(self.name)


def source_filter(
    mac: str, sources: Collection[IPv4Address | IPv6Address]
) -> list[Instruction]:
    """Return a classic BPF program that lets through what an honest VM sends.

    That is ARP and IP without a VLAN tag, from its hardware address and one of its
    addresses; of ARP what it says of itself, too; and of IPv6, if it has an address of
    that, what finds others on the wire. Frames that end before their headers do are
    dropped first: a load from beyond the end would end the program with 0, and that
    means to pass.

    :param mac: hardware address, six numbers with colons.
    :param sources: as many as fit into 4,096 instructions: two for each of IPv4, nine
        for each of IPv6. The first of IPv4 is the VM's own.
    :return: instructions: code, jump if true, jump if false, operand.
    """
    high, low = _split(mac)
    ipv4, ipv6 = _by_version(sources)
    # none yet, as one that asks whether somebody has it
    ipv6 += [IPv6Address(0)] if ipv6 else []
    return [
        *_require_length(_LEAST_IPV4),
        *_require(_LOAD_WORD, _HAS_VLAN_TAG, 0),
        *_require(_LOAD_WORD, _MAC, high),
        *_require(_LOAD_HALF, _MAC + 4, low),
        *_by_type(
            [
                *_require(_LOAD_WORD, _ARP_MAC, high),
                *_require(_LOAD_HALF, _ARP_MAC + 4, low),
                *_pass_ipv4(_ARP_SOURCE, ipv4[:1]),
            ],
            _pass_ipv4(_IPV4_SOURCE, ipv4),
            _pass_ipv6(_IPV6_SOURCE, ipv6),
        ),
    ]


def target_filter(
    targets: Collection[IPv4Address | IPv6Address],
) -> list[Instruction]:
    """Return a program that lets through what is for a VM, or for all; see above."""
    ipv4, ipv6 = _by_version(targets)
    return [
        *_require_length(_LEAST_IPV4),
        (_LOAD_BYTE, 0, 0, 0),
        (_IF_SET, 0, 1, _GROUP),
        (_RETURN, 0, 0, _PASS),
        *_by_type(
            _pass_ipv4(_ARP_TARGET, ipv4[:1]),
            _pass_ipv4(_IPV4_TARGET, ipv4),
            _pass_ipv6(_IPV6_TARGET, ipv6),
        ),
    ]


def _by_version(
    addresses: Collection[IPv4Address | IPv6Address],
) -> tuple[list[IPv4Address], list[IPv6Address]]:
    ipv4 = [each for each in addresses if isinstance(each, IPv4Address)]
    return ipv4, [each for each in addresses if isinstance(each, IPv6Address)]


def _by_type(
    arp: list[Instruction], ipv4: list[Instruction], ipv6: list[Instruction]
) -> list[Instruction]:
    """Judge a frame by one of these, each of which ends the program."""
    arp = [*_require_length(_LEAST_ARP), *arp]
    ipv6 = [*_require_length(_LEAST_IPV6), *ipv6]
    return [
        (_LOAD_HALF, 0, 0, _TYPE),
        (_IF_EQUAL, 0, len(arp), _ARP),
        *arp,
        # no condition leads further than 255 instructions
        (_IF_EQUAL, 1, 0, _IPV6),
        (_JUMP, 0, 0, len(ipv6)),
        *ipv6,
        *_require_equal(_IPV4),
        *ipv4,
    ]


def _pass_ipv4(where: int, addresses: list[IPv4Address]) -> list[Instruction]:
    passed = [
        instruction
        for address in addresses
        for instruction in ((_IF_EQUAL, 0, 1, int(address)), (_RETURN, 0, 0, _PASS))
    ]
    return [(_LOAD_WORD, 0, 0, where), *passed, (_RETURN, 0, 0, _DROP)]


def _pass_ipv6(where: int, addresses: list[IPv6Address]) -> list[Instruction]:
    if not addresses:
        return [(_RETURN, 0, 0, _DROP)]
    program = [
        (_LOAD_WORD, 0, 0, where),
        (_IF_EQUAL, 0, 1, _LINK_LOCAL),
        (_RETURN, 0, 0, _PASS),
    ]
    for address in addresses:
        for word in range(4):
            value = int.from_bytes(address.packed[4 * word :][:4], "big")
            to_next = 7 - 2 * word
            program += [
                (_LOAD_WORD, 0, 0, where + 4 * word),
                (_IF_EQUAL, 0, to_next, value),
            ]
        program.append((_RETURN, 0, 0, _PASS))
    return [*program, (_RETURN, 0, 0, _DROP)]


def _require_length(least: int) -> list[Instruction]:
    return [
        (_LOAD_LENGTH, 0, 0, 0),
        (_IF_AT_LEAST, 1, 0, least),
        (_RETURN, 0, 0, _DROP),
    ]


def _require(load: int, where: int, value: int) -> list[Instruction]:
    return [(load, 0, 0, where), *_require_equal(value)]


def _require_equal(value: int) -> list[Instruction]:
    return [(_IF_EQUAL, 1, 0, value), (_RETURN, 0, 0, _DROP)]


def _split(mac: str) -> tuple[int, int]:
    number = int(mac.replace(":", ""), 16)
    return number >> 16, number & 0xFFFF


def _new_name(kind: str) -> str:
    # other processes may share the namespace
    return f"q{kind}{os.getpid():x}-{next(_numbers):x}"


def _ip(*lines: str) -> None:
    _run("ip", "-batch", "-", input="\n".join(lines).encode())


def _run(*argv: str, input: bytes | None = None) -> None:  # noqa: A002 - as `run`
    try:
        run(argv, input=input)
    except CommandError as error:
        if any(text in error.stderr for text in _LACKING):
            raise EnvironmentNotReadyError(
                f"The kernel has no bridges, taps or filters: {error}.",
                "Have it load them: modprobe -a bridge tun sch_ingress cls_bpf.",
            ) from error
        raise


def _remove(device: str) -> None:
    try:
        run(["ip", "link", "delete", device])
    except CommandError as error:
        if "Cannot find device" not in error.stderr:
            raise
