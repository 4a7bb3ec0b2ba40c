"""Interfaces that are plugged in while somebody gives up: nothing is left of them."""

import asyncio
from ipaddress import IPv4Address

import pytest
from cancelling import cancelled_everywhere
from network_devices import links

from qubes_itests.exc import HarnessError
from qubes_itests.guest.start.links import Downlink, Uplink
from qubes_itests.host.bridge import Bridge
from qubes_storage.uninterrupted import to_its_end

MAC = "00:16:3e:5e:6c:02"
DOWN = "00:16:3e:5e:6c:00"
ADDRESS = IPv4Address("10.137.0.2")


class Domain:
    """Takes interfaces as libvirt does, whose threads go on whoever gives up."""

    def __init__(self):
        self.interfaces = set()

    async def attach_interface(self, interface):
        await asyncio.to_thread(self.interfaces.add, interface.mac)

    async def detach_interface(self, mac):
        if mac not in self.interfaces:
            raise HarnessError(f"it has no interface {mac}")
        await asyncio.to_thread(self.interfaces.discard, mac)


@pytest.fixture
def run(testbed):
    return testbed.portal.run


@pytest.fixture
def devices():
    """Return the devices beside those that were there."""
    before = links()
    yield lambda: links() - before
    assert links() == before


def test_a_client_that_is_not_plugged_in_has_left_nothing(run, devices):
    bridge = Bridge.create()
    domain = Domain()
    downlink = Downlink(None, domain, None, bridge)

    async def check():
        assert devices() == {bridge.name}
        assert domain.interfaces == set()

    async def plug():
        await Uplink.open(domain, downlink, MAC, ADDRESS, ())
        await to_its_end(end())

    async def end():
        for name in devices() - {bridge.name}:
            Bridge(name).remove()
        domain.interfaces.clear()

    try:
        assert run(cancelled_everywhere(plug, check)) >= 6
    finally:
        run(end())
        bridge.remove()


def test_a_net_vm_that_is_not_plugged_in_has_left_nothing(run, devices, monkeypatch):
    domain = Domain()

    async def forward(*_args, **_kwargs):
        await asyncio.sleep(0)
        raise HarnessError("the guest does not")

    monkeypatch.setattr("qubes_itests.guest.start.links.set_up_downlink", forward)

    async def check():
        assert devices() == set()
        assert domain.interfaces == set()

    async def plug():
        with pytest.raises(HarnessError, match="the guest does not"):
            await Downlink.open(None, domain, None, mac=DOWN, address=ADDRESS)
        await check()

    assert run(cancelled_everywhere(plug, check)) >= 6
