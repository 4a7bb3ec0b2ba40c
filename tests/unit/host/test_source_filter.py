"""Filters between a VM and its net VM: what an honest VM sends, and what is for it."""

from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qubes_itests.host.bridge import source_filter, target_filter

MAC = bytes.fromhex("00163e5e6c05")
NET = bytes.fromhex("00163e5e6cff")
OWN = IPv4Address("10.137.0.5")
BEHIND = IPv4Address("10.137.0.6")
GATEWAY = IPv4Address("10.137.0.1")
GATEWAY6 = IPv6Address("fd09:24ef:4179::a89:1")
OWN6 = IPv6Address("fd09:24ef:4179::a89:5")
LINK_LOCAL = IPv6Address("fe80::216:3eff:fe5e:6c05")
BROADCAST = b"\xff" * 6

addresses = st.ip_addresses(v=4)
macs = st.binary(min_size=6, max_size=6)


def passes(frame, sources=(OWN, BEHIND), *, tagged=False):
    """Tell whether the filter lets out what a VM sends."""
    return ends(source_filter(MAC.hex(":"), sources), frame, tagged=tagged)


def ends(program, frame, *, tagged=False):
    """Run a program as the kernel does: a load from beyond the frame returns 0.

    0 is TC_ACT_OK, and so lets the frame through.
    """
    sizes = {0x20: 4, 0x28: 2, 0x30: 1}
    counter = accumulator = 0
    while True:
        code, if_true, if_false, operand = program[counter]
        counter += 1
        assert max(if_true, if_false) < 256
        if code == 0x06:
            return operand == 0
        if code == 0x05:
            counter += operand
        elif code == 0x15:
            counter += if_true if accumulator == operand else if_false
        elif code == 0x35:
            counter += if_true if accumulator >= operand else if_false
        elif code == 0x45:
            counter += if_true if accumulator & operand else if_false
        elif code == 0x80:
            accumulator = len(frame)
        elif operand >= 0xFFFFF000:
            accumulator = int(tagged)
        elif operand + sizes[code] > len(frame):
            return True
        else:
            part = frame[operand : operand + sizes[code]]
            accumulator = int.from_bytes(part)


def ipv4(mac, source):
    header = bytes(12) + source.packed + GATEWAY.packed
    return NET + mac + b"\x08\x00" + header + b"data"


def arp(mac, sender_mac, sender):
    said = sender_mac + sender.packed + bytes(6) + GATEWAY.packed
    return BROADCAST + mac + b"\x08\x06" + bytes(8) + said


def test_what_an_honest_vm_sends_passes():
    assert passes(ipv4(MAC, OWN))
    assert passes(ipv4(MAC, BEHIND))
    assert passes(arp(MAC, MAC, OWN))


@given(mac=macs, source=addresses)
def test_no_packet_from_elsewhere_passes(mac, source):
    honest = mac == MAC and source in (OWN, BEHIND)
    assert passes(ipv4(mac, source)) == honest


@given(mac=macs, sender_mac=macs, sender=addresses)
def test_nobody_claims_the_address_of_another(mac, sender_mac, sender):
    """Not even one of a VM behind: its packets come by way of this VM."""
    assert passes(arp(mac, sender_mac, sender)) == (
        mac == sender_mac == MAC and sender == OWN
    )


@pytest.mark.parametrize(
    "frame",
    [
        NET + MAC + b"\x86\xdd" + bytes(40),
        NET + MAC + b"\x81\x00\x00\x05" + ipv4(MAC, OWN)[12:],
        NET + MAC,
        ipv4(MAC, OWN)[:28],
        b"",
    ],
    ids=["ipv6", "vlan", "no-type", "cut", "empty"],
)
def test_nothing_else_passes(frame):
    assert not passes(frame)


@given(frame=st.sampled_from([ipv4(MAC, OWN)[:34], arp(MAC, MAC, OWN)]), data=st.data())
def test_no_frame_passes_that_is_too_short_to_judge(frame, data):
    """Not even one that is honest as far as it goes."""
    assert passes(frame)
    assert not passes(frame[: data.draw(st.integers(0, len(frame) - 1))])


@given(frame=st.binary(max_size=33))
def test_short_frames_of_any_bytes_are_dropped(frame):
    assert not passes(frame)


def test_a_tag_that_the_card_took_off_is_seen():
    assert not passes(ipv4(MAC, OWN), tagged=True)


def test_no_sources_is_no_traffic():
    assert not passes(ipv4(MAC, OWN), ())


def test_two_thousand_sources_fit():
    """The kernel takes 4,096 instructions."""
    sources = [IPv4Address(int(OWN) + n) for n in range(2000)]
    assert len(source_filter(MAC.hex(":"), sources)) <= 4096
    assert passes(ipv4(MAC, sources[-1]), sources)


@pytest.mark.parametrize("count", [28, 400])
def test_hundreds_of_addresses_of_ipv6_fit(count):
    """The kernel's conditions lead over 255 instructions at most."""
    own = [OWN, *(IPv6Address(int(OWN6) + n) for n in range(count))]
    program = target_filter(own)
    assert max(len(program), len(source_filter(MAC.hex(":"), own))) <= 4096
    for address, reached in ((own[-1], True), (IPv6Address(int(own[-1]) + 1), False)):
        assert ends(program, ipv6(GATEWAY6, address)) == reached
        assert passes(ipv6(address), own) == reached
    for address, reached in ((OWN, True), (BEHIND, False)):
        assert ends(program, to(address)) == reached
        assert passes(ipv4(MAC, address), own) == reached


def ipv6(source, target=OWN6, *, to=NET):
    header = bytes(8) + source.packed + target.packed
    return to + MAC + b"\x86\xdd" + header + b"data"


addresses6 = st.ip_addresses(v=6) | st.sampled_from([OWN6, LINK_LOCAL])


@given(source=addresses6)
def test_ipv6_passes_from_its_own_addresses(source):
    honest = source in (OWN6, IPv6Address("::")) or source.packed[:4] == b"\xfe\x80\0\0"
    assert passes(ipv6(source), (OWN, OWN6)) == honest
    assert passes(ipv4(MAC, OWN), (OWN, OWN6))
    assert not passes(ipv6(source)[:53], (OWN, OWN6))


def to(target, *, mac=MAC):
    return mac + NET + b"\x08\x00" + bytes(12) + GATEWAY.packed + target.packed


@given(target=addresses | st.sampled_from([OWN, BEHIND]))
def test_only_what_is_for_a_vm_reaches_it(target):
    """Others may have its hardware address."""
    program = target_filter((OWN, BEHIND, OWN6))
    assert ends(program, to(target)) == (target in (OWN, BEHIND))
    asks = MAC + NET + b"\x08\x06" + bytes(24) + target.packed
    assert ends(program, asks) == (target == OWN)
    assert ends(program, to(target, mac=BROADCAST))


@given(target=addresses6)
def test_only_ipv6_that_is_for_a_vm_reaches_it(target):
    frame = ipv6(GATEWAY6, target)
    own = target == OWN6 or target.packed[:4] == b"\xfe\x80\0\0"
    assert ends(target_filter((OWN, OWN6)), frame) == own
    assert not ends(target_filter((OWN,)), frame)
    # that finds others on the wire
    assert ends(target_filter((OWN,)), b"\x33\x33" + frame[2:])
