"""Bridges between VMs, in the run's own network namespace.

The host takes no part in the traffic: its bridges have no addresses. A VM is plugged
in by a tap device, which is ready, and its filter in place, before the VM has it.
"""

from __future__ import annotations

import itertools
import os
from typing import TYPE_CHECKING, Final, Self

from qubes_itests.exc import EnvironmentNotReadyError
from qubes_itests.host.command import CommandError, run

if TYPE_CHECKING:
    from collections.abc import Collection
    from ipaddress import IPv4Address

__all__ = ["Bridge", "Tap", "source_filter"]

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
_LOAD_WORD, _LOAD_HALF, _LOAD_LENGTH = 0x20, 0x28, 0x80
_IF_EQUAL, _IF_AT_LEAST, _RETURN = 0x15, 0x35, 0x06
_HAS_VLAN_TAG: Final = 0xFFFFF000 + 48

_ARP, _IPV4 = 0x0806, 0x0800
_TYPE, _IPV4_SOURCE, _ARP_MAC, _ARP_SOURCE, _MAC = 12, 26, 22, 28, 6
#: Bytes of the shortest frames with all headers of either kind.
_LEAST_IPV4, _LEAST_ARP = 34, 42

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
        sources: Collection[IPv4Address] | None = None,
    ) -> Self:
        """Make a tap in a bridge.

        :param mac: hardware address of the VM's interface.
        :param sources: the addresses that its packets may come from; no other packets
            pass then, and none to or from another tap that has sources. None is for
            the VM in the middle, which all others may speak to.
        :raise EnvironmentNotReadyError: the kernel cannot make any.
        :raise CommandError: the system refuses; there is no tap then.
        """
        tap = cls(_new_name("t"))
        try:
            _ip(
                f"tuntap add dev {tap.name} mode tap",
                f"link set {tap.name} addrgenmode none master {bridge.name}",
                f"link set {tap.name} type bridge_slave"
                f" isolated {'off' if sources is None else 'on'}",
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

    def filter(self, mac: str, sources: Collection[IPv4Address]) -> None:
        """Set anew which packets may come out of the VM; see `create`."""
        words = source_filter(mac, sources)
        bytecode = ",".join((str(len(words)), *(" ".join(map(str, w)) for w in words)))
        _run(
            *("tc", "filter", "replace", "dev", self.name, "ingress"),
            *("protocol", "all", "prio", "1", "handle", "1"),
            *("bpf", "direct-action", "bytecode", bytecode),
        )

    def cut(self) -> None:
        """Take it out of its bridge: nothing passes any more, whatever the VM does."""
        _ip(f"link set {self.name} down nomaster")

    def remove(self) -> None:
        """Remove it; nothing happens if it is gone."""
        _remove(self.name)


def source_filter(mac: str, sources: Collection[IPv4Address]) -> list[Instruction]:
    """Return a classic BPF program that lets through what an honest VM sends.

    That is ARP and IPv4 without a VLAN tag, from its hardware address and one of its
    addresses; of ARP what it says of itself, too. Frames that end before their headers
    do are dropped first: a load from beyond the end would end the program with 0, and
    that means to pass.

    :param mac: hardware address, six numbers with colons.
    :param sources: two thousand at most; the first is the VM's own.
    :return: instructions: code, jump if true, jump if false, operand.
    """
    high, low = _split(mac)
    own, *behind = [int(source) for source in sources] or [0]
    return [
        *_require_length(_LEAST_IPV4),
        *_require(_LOAD_WORD, _HAS_VLAN_TAG, 0),
        *_require(_LOAD_WORD, _MAC, high),
        *_require(_LOAD_HALF, _MAC + 4, low),
        (_LOAD_HALF, 0, 0, _TYPE),
        (_IF_EQUAL, 0, 13, _ARP),
        *_require_length(_LEAST_ARP),
        *_require(_LOAD_WORD, _ARP_MAC, high),
        *_require(_LOAD_HALF, _ARP_MAC + 4, low),
        *_require(_LOAD_WORD, _ARP_SOURCE, own),
        (_RETURN, 0, 0, _PASS),
        *_require_equal(_IPV4),
        (_LOAD_WORD, 0, 0, _IPV4_SOURCE),
        *(
            instruction
            for source in (own, *behind)
            for instruction in ((_IF_EQUAL, 0, 1, source), (_RETURN, 0, 0, _PASS))
        ),
        (_RETURN, 0, 0, _DROP),
    ]


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
