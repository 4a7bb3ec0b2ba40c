"""Who is plugged in where, and when, as VMs start, change and end."""

import asyncio
import logging

import pytest

from qubes_itests.core import exc
from qubes_itests.core.network.addresses import DOWNLINK_MAC
from qubes_itests.exc import DeadlineError
from qubes_itests.hypervisor.exc import HypervisorError

pytestmark = pytest.mark.asyncio


async def test_net_vms_start_first_and_are_plugged_in_first(host, make_vm):
    net = await make_vm("net", provides_network=True, netvm=None)
    wall = await make_vm("wall", provides_network=True, netvm=net)
    work = await make_vm("work", netvm=wall)
    await work.start()
    assert [done for done in host.done if " has " in done] == [
        f"net has {DOWNLINK_MAC}",
        f"wall has {wall.mac}",
        f"wall has {DOWNLINK_MAC}",
        f"work has {work.mac}",
    ]
    assert host.filters == {
        wall.mac: [str(wall.ip), str(work.ip)],
        work.mac: [str(work.ip)],
    }
    assert len(host.bridges) == 2
    assert len(host.taps) == 4


async def test_a_net_vm_starts_beside_its_client_and_runs_before_that_does(
    make_vm, monkeypatch
):
    net = await make_vm("net", provides_network=True, netvm=None)
    work = await make_vm("work", netvm=net)
    booted, seen = asyncio.Event(), []
    netvm_started = work.net.netvm_started

    async def wait_for_it():
        booted.set()
        await netvm_started()

    async def wait_for_the_client(*_args, **_kwargs):
        await asyncio.wait_for(booted.wait(), 300)

    monkeypatch.setattr(work.net, "netvm_started", wait_for_it)
    net.add_handler("domain-spawn", wait_for_the_client)
    work.add_handler(
        "domain-spawn", lambda *_args, **_kwargs: seen.append(net.is_running())
    )
    await work.start()
    assert seen == [True]


async def test_a_vm_whose_net_vm_does_not_start_does_not_either(host, make_vm):
    net = await make_vm("net", provides_network=True, netvm=None)
    work = await make_vm("work", netvm=net)

    async def fail(*_args, **_kwargs):
        await asyncio.sleep(0)
        raise exc.QubesException("no")

    net.add_handler("domain-pre-start", fail)
    with pytest.raises(exc.QubesVMStartError, match="could not start its net VM: no"):
        await work.start()
    assert work.is_halted()
    assert net.is_halted()
    assert not host.taps | host.bridges
    net.features["prohibit-start"] = "it is broken"
    with pytest.raises(exc.QubesVMError, match="it is broken"):
        await work.start()


async def test_the_ends_of_runs_leave_nothing(host, make_vm):
    net = await make_vm("net", provides_network=True, netvm=None)
    work = await make_vm("work", netvm=net)
    await work.start()
    await net.kill()
    assert host.bridges == {}
    await work.kill()
    assert host.taps == {}
    await net.start()
    await work.start()
    await work.kill()
    assert len(host.taps) == len(host.bridges) == 1
    await net.kill()
    assert not host.taps | host.bridges


async def test_a_client_is_detached_before_it_is_attached_anew(host, make_vm):
    net = await make_vm("net", provides_network=True, netvm=None)
    work = await make_vm("work", netvm=net)
    await work.start()
    await net.kill()
    host.done.clear()
    await net.start()
    about = [d for d in host.done if work.mac in d or d == "tap cut"]
    assert about == [
        "tap cut",
        f"work lost {work.mac}",
        f"tap made for {work.mac}",
        f"work has {work.mac}",
    ]


async def test_a_client_that_fails_stops_nobody(app, host, make_vm, caplog):
    net = await make_vm("net", provides_network=True, netvm=None)
    clients = [await make_vm(f"c{n}", netvm=net) for n in range(3)]
    await asyncio.gather(*(vm.start() for vm in clients))
    await net.kill()
    app.hypervisor.failing.add(f"attach {clients[1].mac}")
    with caplog.at_level(logging.ERROR, "qubes.net"):
        await net.start()
    assert net.is_running()
    assert [record.args[0] for record in caplog.records] == ["c1"]
    assert [vm.net.uplink is not None for vm in clients] == [True, False, True]
    assert len(host.taps) == 3


async def test_a_guest_that_keeps_its_interface_has_no_network_still(host, make_vm):
    net = await make_vm("net", provides_network=True, netvm=None)
    work = await make_vm("work", netvm=net)
    await work.start()
    host.stubborn.add(work.mac)
    work.netvm = None
    with pytest.raises(DeadlineError):
        await work.network_settled()
    assert sorted(host.taps.values(), key=str) == [None, *host.bridges]
    work.netvm = net
    with pytest.raises(HypervisorError, match="it is attached"):
        await work.network_settled()
    assert list(host.taps.values()).count(None) == 1
    await work.kill()
    assert len(host.taps) == 1
    assert list(net.net.downlink.taken) == [str(net.ip)]


async def test_a_paused_client_is_cut_off_and_connected_when_it_goes_on(host, make_vm):
    nets = [await make_vm(f"n{n}", provides_network=True, netvm=None) for n in (1, 2)]
    work = await make_vm("work", netvm=nets[0])
    await asyncio.gather(work.start(), nets[1].start())
    await work.pause()
    for netvm in (nets[1], nets[0]):
        work.netvm = netvm
        await work.network_settled()
        assert None in host.taps.values()
    await work.unpause()
    assert None not in host.taps.values()
    assert work.net.uplink.downlink is nets[0].net.downlink


async def test_a_paused_net_vm_takes_no_client(host, make_vm):
    net = await make_vm("net", provides_network=True, netvm=None)
    work = await make_vm("work", netvm=net)
    await net.start()
    await net.pause()
    with pytest.raises(exc.QubesVMStartError, match="net is paused"):
        await work.start()
    assert len(host.taps) == 1
    await net.unpause()
    await work.start()


async def test_events_of_a_client(make_vm):
    net = await make_vm("net", provides_network=True, netvm=None)
    work = await make_vm("work", netvm=net)
    seen = []
    net.add_handler("net-domain-*", lambda _, event, vm: seen.append((event, vm.name)))
    await work.start()
    work.netvm = None
    await work.network_settled()
    assert seen == [("net-domain-connect", "work"), ("net-domain-disconnect", "work")]


async def test_a_change_to_and_fro_ends_where_it_began(host, make_vm):
    nets = [await make_vm(f"n{n}", provides_network=True, netvm=None) for n in (1, 2)]
    work = await make_vm("work", netvm=nets[0])
    await asyncio.gather(work.start(), nets[1].start())
    for netvm in (None, nets[1], nets[0]):
        work.netvm = netvm
    await work.network_settled()
    assert work.net.uplink.downlink is nets[0].net.downlink
    assert len(host.taps) == 3


async def test_two_clients_with_one_address(host, make_vm):
    net = await make_vm("net", provides_network=True, netvm=None)
    one = await make_vm("one", netvm=net)
    two = await make_vm("two", netvm=net, mac=one.mac)
    results = await asyncio.gather(one.start(), two.start(), return_exceptions=True)
    (error,) = (r for r in results if isinstance(r, Exception))
    assert isinstance(error, exc.QubesVMStartError)
    assert f"has the address {one.mac}" in str(error)
    assert len(host.taps) == 2
    survivor = one if one.is_running() else two
    await survivor.kill()
    (other,) = {one, two} - {survivor}
    await other.start()


async def test_a_failed_plug_leaves_no_tap(app, host, make_vm):
    net = await make_vm("net", provides_network=True, netvm=None)
    work = await make_vm("work", netvm=net)
    app.hypervisor.failing.add(f"attach {work.mac}")
    with pytest.raises(exc.QubesVMStartError):
        await work.start()
    assert len(host.taps) == 1
    app.hypervisor.failing.add(f"attach {DOWNLINK_MAC}")
    await net.kill()
    with pytest.raises(exc.QubesVMStartError):
        await net.start()
    assert not host.taps | host.bridges


async def test_killed_at_any_moment_of_its_start_it_leaves_nothing(host, make_vm):
    net = await make_vm("net", provides_network=True, netvm=None)
    work = await make_vm("work", netvm=net)
    await net.start()
    before = set(host.taps)
    turns = moments = 0
    done = False
    while not done:
        starting = asyncio.ensure_future(work.start())
        for _ in range(turns):
            await asyncio.sleep(0)
        if done := starting.done():  # undisturbed, for once
            await starting
        if work.is_starting() or not work.is_halted():
            await work.kill()
        await asyncio.wait([starting])
        if not work.is_halted():
            await work.kill()
        assert set(host.taps) == before
        assert work.mac not in net.net.downlink.taken
        turns += 1 + turns // 5
        moments += 1
    assert moments > 10


async def test_refusals(make_vm):
    net = await make_vm("net", provides_network=True, netvm=None)
    work = await make_vm("work", netvm=None)
    with pytest.raises(exc.QubesVMNotRunningError):
        await work.attach_network()
    await work.start()
    with pytest.raises(exc.QubesVMError, match="set its property netvm"):
        await work.attach_network()
    with pytest.raises(exc.QubesVMError, match="not attached"):
        await work.detach_network()
    with pytest.raises(exc.QubesVMNotStartedError, match="start that first"):
        work.netvm = net
    assert work.netvm is None
    await net.start()
    work.netvm = net
    await work.network_settled()
    with pytest.raises(exc.QubesVMInUseError, match="work"):
        net.provides_network = False


async def test_default_netvm_changes_for_vms_that_run(app, make_vm):
    net = await make_vm("net", provides_network=True)
    work = await make_vm("work")
    set_one = await make_vm("other", netvm=None)
    await asyncio.gather(work.start(), set_one.start())
    with pytest.raises(exc.QubesVMNotStartedError):
        app.default_netvm = net
    assert app.default_netvm is None
    await net.start()
    app.default_netvm = net
    await work.network_settled()
    assert work.net.uplink is not None
    assert set_one.net.uplink is None
    assert net.netvm is None
    app.default_netvm = None
    await work.network_settled()
    assert work.net.uplink is None
