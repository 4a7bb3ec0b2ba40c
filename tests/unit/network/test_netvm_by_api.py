"""A net VM changed by the Admin API: the answer comes after, and tells of errors."""

from __future__ import annotations

import pytest

from qubes_itests.admin.dispatch import Dispatcher
from qubes_itests.admin.methods import METHODS
from qubes_itests.admin.protocol import Request

pytestmark = pytest.mark.asyncio


@pytest.fixture
def call(app):
    dispatcher = Dispatcher(app, METHODS)

    async def call(method, destination, argument, payload=b""):
        request = Request(method, argument, "dom0", destination, payload)
        return await dispatcher.answer(request)

    return call


async def test_the_interface_has_changed_when_the_answer_comes(make_vm, call):
    await make_vm("one", provides_network=True, netvm=None)
    two = await make_vm("two", provides_network=True, netvm=None)
    work = await make_vm("work", netvm="one")
    await work.start()
    await two.start()
    reply = await call("admin.vm.property.Set", "work", "netvm", b"two")
    assert reply == b"0\0"
    assert work.net.uplink.downlink.owner.vm is two
    await call("admin.vm.property.Reset", "work", "netvm")
    assert work.net.uplink is None


async def test_a_change_of_the_default_is_waited_for(make_vm, call):
    one = await make_vm("one", provides_network=True, netvm=None)
    work, other = await make_vm("work"), await make_vm("other")
    for vm in (one, work, other):
        await vm.start()
    await call("admin.property.Set", "dom0", "default_netvm", b"one")
    assert (
        work.net.uplink.downlink.owner.vm is other.net.uplink.downlink.owner.vm is one
    )


async def test_what_fails_is_told_once(app, make_vm, call, monkeypatch):
    """The property is set, and saved, all the same; the next change is another."""
    saves = []

    async def save():
        saves.append("saved")

    one = await make_vm("one", provides_network=True, netvm=None)
    work = await make_vm("work", netvm=None)
    await work.start()
    await one.start()
    monkeypatch.setattr(app, "save_async", save)
    app.hypervisor.failing.add(f"attach {work.mac}")
    reply = await call("admin.vm.property.Set", "work", "netvm", b"one")
    assert reply.startswith(b"2\0")
    assert work.netvm is one
    assert saves == ["saved"]
    await work.kill()
    reply = await call("admin.vm.property.Set", "work", "netvm", b"one")
    assert reply == b"0\0"
