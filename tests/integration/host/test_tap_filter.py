"""The filter of a tap in the kernel itself: what is too short to judge is dropped."""

import fcntl
import os
import select
import struct
import time
from contextlib import ExitStack
from ipaddress import IPv4Address

import pytest

from qubes_itests.host.bridge import Bridge, Tap

MAC = bytes.fromhex("00163e5e6c05")
OTHER = bytes.fromhex("00163e5e6cff")
OWN = IPv4Address("10.137.0.5")
_TUNSETIFF = 0x400454CA
_TAP_WITHOUT_HEADER = 0x1002

# with the right check sum, for a host may have bridges look at that
IPV4 = (
    OTHER
    + MAC
    + b"\x08\x00"
    + bytes.fromhex("4500001400000000401165c20a8900050a890001")
)
ARP = OTHER + MAC + b"\x08\x06" + bytes(8) + MAC + OWN.packed + bytes(10)


def plugged(stack, tap):
    """Return a descriptor that is what QEMU has of a tap."""
    file = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    stack.callback(os.close, file)
    name = struct.pack("16sH22x", tap.name.encode(), _TAP_WITHOUT_HEADER)
    fcntl.ioctl(file, _TUNSETIFF, name)
    return file


def heard(file, last):
    """Return the frames that came until one is `last`."""
    frames = []
    end = time.monotonic() + 300
    while last not in frames and time.monotonic() < end:
        if select.select([file], [], [], 0.1)[0]:
            frames.append(os.read(file, 4096))
    return frames


@pytest.fixture
def ends(sandbox):  # noqa: ARG001 - first
    with ExitStack() as stack:
        bridge = Bridge.create()
        stack.callback(bridge.remove)
        found = []
        for sources in ([OWN], None):
            tap = Tap.create(bridge, MAC.hex(":"), sources)
            stack.callback(tap.remove)
            found.append(plugged(stack, tap))
        yield found


@pytest.mark.parametrize("honest", [IPV4, ARP], ids=["ipv4", "arp"])
def test_frames_that_are_too_short_to_judge_are_dropped(ends, honest):
    """Each beginning of an honest frame that the kernel takes, and then all of it."""
    guest, net = ends
    end = time.monotonic() + 300
    while not heard_one(guest, net, honest):  # the ports of the bridge come up
        assert time.monotonic() < end
    for size in range(14, len(honest)):
        os.write(guest, honest[:size])
    last = b"\xff" * 6 + honest[6:]
    os.write(guest, last)
    assert set(heard(net, last)) - {honest} == {last}


def heard_one(guest, net, frame):
    os.write(guest, frame)
    return bool(select.select([net], [], [], 0.05)[0])
