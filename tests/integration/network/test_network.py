"""What flows between VMs, and what does not."""

import asyncio
import logging

import pytest
from admin_client import Client
from network_devices import bridge, links

from qubes_itests.admin.server import AdminServer
from qubes_itests.core import exc
from qubes_itests.hypervisor.contract import Interface

#: What lets a net VM forward from client to client.
RULE = "iif vif lookup main priority 50"

#: Features of a virtio network device, by their bits: who makes checksums and segments,
#: in either direction, buffers that one packet has several of, fewer wake-ups.
OFFLOADS = {
    "CSUM": 0,
    "GUEST_CSUM": 1,
    "GUEST_TSO4": 7,
    "HOST_TSO4": 11,
    "MRG_RXBUF": 15,
    "EVENT_IDX": 29,
}


def test_starting_a_client_started_its_net_vms_first(network):
    times = [vm.start_time for vm in (network.net, network.firewall, network.far)]
    assert times == sorted(times)


def test_guests_know_their_addresses(network):
    one, net = network.one, network.net
    assert str(one.ip) == f"10.137.0.{one.qid}"
    database = "for n in mac ip netmask gateway primary-dns; do"
    database += " qubesdb-read /qubes-$n; done"
    assert network.sh(one, database).split() == [
        one.mac,
        str(one.ip),
        "255.255.255.255",
        str(net.ip),
        "10.139.1.1",
    ]
    assert f"inet {one.ip}/32" in network.sh(one, "ip address show eth0")
    assert network.sh(net, "qubesdb-read /qubes-netvm-gateway") == str(net.ip)
    connected = network.sh(net, "qubesdb-read /connected-ips").split()
    clients = (network.one, network.two, network.firewall)
    assert sorted(connected) == sorted(str(vm.ip) for vm in clients)


def test_clients_reach_their_net_vms(network):
    """The far one reaches that of its net VM, too, and is reached."""
    assert network.reaches(network.one, network.net)
    assert network.reaches(network.far, network.firewall)
    assert network.reaches(network.far, network.net)
    assert network.reaches(network.net, network.far)


def test_what_guests_send_is_neither_cut_nor_summed_up_for_the_wire(network):
    """Else each segment of TCP and each checksum costs an emulated CPU dearly."""
    for vm, device in ((network.one, "eth0"), (network.net, "vif")):
        bits = network.sh(vm, f"cat /sys/class/net/{device}/device/features")
        missing = {name for name, bit in OFFLOADS.items() if bits[bit] != "1"}
        assert not missing, device


def test_clients_reach_each_other_by_a_rule_of_the_net_vm_only(network):
    pairs = [(network.one, network.two), (network.one, network.far)]
    pairs += [(b, a) for a, b in pairs]
    for one, other in pairs:
        assert network.is_cut_off(one, other)
    network.sh(network.net, f"ip rule add {RULE}")
    for one, other in pairs:
        assert network.reaches(one, other)
    network.sh(network.net, f"ip rule del {RULE}")
    assert network.is_cut_off(network.one, network.two)


def test_clients_of_one_net_vm_do_not_even_hear_each_other(network):
    """As if they were on one wire: without the net VM, and with neighbours' routes."""
    one, two = network.one, network.two
    network.sh(two, f"ip route add {one.ip} dev eth0")
    network.sh(one, f"ip route add {two.ip} dev eth0")
    assert network.is_cut_off(one, two)
    network.sh(two, f"ip route del {one.ip} dev eth0")
    network.sh(one, f"ip route del {two.ip} dev eth0")


def change_mac(network, vm, mac):
    gateway = network.net.ip
    network.sh(vm, f"ip link set eth0 down; ip link set eth0 address {mac}")
    network.sh(vm, f"ip link set eth0 up; ip route add {gateway} dev eth0")
    network.sh(vm, f"ip route add default via {gateway} dev eth0 onlink")


def test_forged_sources_get_nowhere(network):
    """Neither another client's address, nor its hardware address."""
    one, two, net = network.one, network.two, network.net
    network.sh(one, f"ip address add {two.ip}/32 dev eth0")
    heard = network.echoes_heard(net)
    assert not network.pings(one, net.ip, f"-I {two.ip}")
    assert network.echoes_heard(net) == heard
    network.sh(one, f"ip address del {two.ip}/32 dev eth0")
    change_mac(network, one, two.mac)
    assert not network.pings(one, net.ip)
    assert network.pings_in_the_end(two, net.ip)
    change_mac(network, one, one.mac)
    assert network.pings_in_the_end(one, net.ip)


def test_forged_sources_get_nowhere_from_afar(network):
    """The net VM's filter knows who is behind its client."""
    far, one = network.far, network.one
    network.sh(far, f"ip address add {one.ip}/32 dev eth0")
    network.sh(network.firewall, f"ip route add {one.ip} dev vif")
    heard = network.echoes_heard(network.net)
    assert not network.pings(far, network.net.ip, f"-I {one.ip}")
    assert network.echoes_heard(network.net) == heard
    network.sh(network.firewall, f"ip route del {one.ip} dev vif")
    network.sh(far, f"ip address del {one.ip}/32 dev eth0")
    assert network.pings_in_the_end(far, network.net.ip)


def test_no_net_vm_is_no_network(network, run):
    alone = network.make("alone", netvm=None)
    run(alone.start())
    assert network.devices(alone) == ["lo"]
    assert network.is_cut_off(alone, network.net)
    assert alone.ip is None
    assert network.sh(alone, "qubesdb-list /qubes-ip") == ""
    run(alone.kill())


def test_netvm_changes_while_it_runs(network):
    one = network.one
    one.netvm = None
    assert network.devices(one) == ["lo"]
    assert not network.pings(one, network.net.ip)
    assert network.sh(one, "qubesdb-list /qubes-ip") == ""
    one.netvm = network.firewall
    assert network.reaches(one, network.firewall)
    assert network.reaches(one, network.net)
    assert network.is_cut_off(one, network.far)
    gateway = network.sh(one, "qubesdb-read /qubes-gateway")
    assert gateway == str(network.firewall.ip)
    one.netvm = network.net
    assert network.reaches(one, network.net)


def test_netvm_changes_on_the_loop_soon(network, run):
    """A property cannot be awaited there; `network_settled` can."""
    one = network.one

    async def change(netvm):
        one.netvm = netvm
        await one.network_settled()

    run(change(None))
    assert network.devices(one) == ["lo"]
    run(change(network.net))
    assert network.reaches(one, network.net)


def test_netvm_set_by_the_admin_api_has_changed_when_it_answers(network):
    """Not soon after: a client that goes on to use the network has it."""
    server = AdminServer(network.app, network.app.directory / "qubesd.sock")
    network.run(server.__aenter__())
    try:
        client = Client(server.path, timeout=600)
        client.call("admin.vm.property.Set", "one", "netvm", b"")
        assert network.devices(network.one) == ["lo"]
        client.call("admin.vm.property.Set", "one", "netvm", b"net")
        assert network.reaches(network.one, network.net)
    finally:
        network.run(server.__aexit__(None, None, None))


def test_netvm_changes_while_it_is_paused(network, run):
    """It is cut off at once, and finds its new place when it goes on."""
    one = network.one
    run(one.pause())
    before = links()
    one.netvm = None
    assert links() == before
    run(one.unpause())
    assert network.devices(one) == ["lo"]
    one.netvm = network.net
    assert network.reaches(one, network.net)


def test_a_halted_net_vm_is_refused_for_a_vm_that_runs(network):
    other = network.make("other", netvm=None, provides_network=True)
    with pytest.raises(exc.QubesVMNotStartedError, match="other"):
        network.one.netvm = other
    assert network.one.netvm is network.net
    assert network.reaches(network.one, network.net)


def test_a_start_that_fails_leaves_no_device(network, run):
    before = links()
    twin = network.make("twin", netvm=network.net, ip=network.two.ip)
    with pytest.raises(exc.QubesVMStartError, match=f"VM two has .* {twin.ip}"):
        run(twin.start())
    assert links() == before
    assert network.reaches(network.two, network.net)


def test_a_guest_that_sets_nothing_up_starts_still(network, run, caplog):
    """Its network is missing, and the log says why."""
    broken = network.app.add_new_vm(
        "StandaloneVM", name="broken", label="red", kernel="tiny", netvm=None
    )
    run(broken.clone_disk_files(network.app.domains["tiny"]))
    run(broken.start())
    refuse = r"#!/bin/sh\necho the guest will not >&2\nexit 1\n"
    program = "/usr/lib/qubes/agent"
    network.sh(broken, f"mv {program} /agent; printf '{refuse}' > {program}")
    network.sh(broken, f"chmod +x {program}")
    run(broken.shutdown(wait=True))
    broken.netvm = network.net
    with caplog.at_level(logging.WARNING, "qubes.net"):
        run(broken.start())
    assert "broken starts without all of its network" in caplog.text
    assert "could not set up its uplink: the guest will not" in caplog.text
    # the program itself says what it lacks
    network.sh(broken, "mount -t tmpfs none /proc/sys/net/ipv4")
    said = network.sh(broken, "/agent downlink lo 00:00:00:00:00:00 10.9.9.9")
    setting = "/proc/sys/net/ipv4/conf/all/rp_filter"
    assert said == f"{setting}: No such file or directory"
    run(broken.kill())


def test_net_vm_dies_and_comes_back_under_its_clients(network, run, caplog):
    """One client fails as Qubes does, one as libvirt does; the others are connected."""
    net, one, two = network.net, network.one, network.two
    three = network.make("three", netvm=net)
    run(three.start())
    run(two.detach_network())
    spare = [f"00:16:3e:00:00:0{n}" for n in range(4)]
    run(net.kill())
    for vm in (one, two, three, network.far):
        assert network.sh(vm, "echo alive") == "alive"
    assert not network.pings(one, net.ip)

    async def fill(bridge):
        for mac in spare:
            await two.domain.attach_interface(Interface(mac, bridge))

    with bridge() as nowhere:
        run(fill(nowhere))
        three.ip = net.ip
        with caplog.at_level(logging.ERROR, "qubes.net"):
            run(net.start())
        errors = {r.args[0]: str(r.args[2]) for r in caplog.records}
        assert errors.keys() == {"two", "three"}
        assert "No more available PCI slots" in errors["two"]
        assert "VM net has the address" in errors["three"]
        assert network.reaches(one, net)
        assert network.reaches(network.far, net)

        async def empty():
            await asyncio.gather(*(two.domain.detach_interface(mac) for mac in spare))

        run(empty())
    run(two.attach_network())
    assert network.reaches(two, net)
    del three.ip
    run(three.attach_network())
    assert network.reaches(three, net)
    run(three.kill())


def test_shutdown_of_a_net_vm_that_is_needed_is_refused(network, run):
    with pytest.raises(exc.QubesVMInUseError, match="far"):
        run(network.firewall.shutdown(wait=True))
    assert network.reaches(network.far, network.net)
