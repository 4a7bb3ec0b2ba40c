"""The network of VMs that do not run: who has whom, and what their guests are told."""

import contextlib
import random
from ipaddress import IPv4Address

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qubes_itests.core import exc
from qubes_itests.core.network.addresses import network_entries


@pytest.mark.asyncio
async def test_no_net_vm_no_addresses(make_vm):
    vm = await make_vm("alone", netvm=None)
    names = ("ip", "ip6", "visible_ip", "gateway", "visible_gateway", "netmask", "dns")
    assert [getattr(vm, name) for name in names] == [None] * len(names)
    assert network_entries(vm) == {}
    assert not vm.is_networked()


@pytest.mark.asyncio
async def test_what_a_client_is_told(make_vm):
    net = await make_vm("net", netvm=None, provides_network=True)
    work = await make_vm("work", netvm=net)
    assert network_entries(work) == {
        "/qubes-mac": work.mac,
        "/qubes-ip": "10.137.0.2",
        "/qubes-netmask": "255.255.255.255",
        "/qubes-gateway": "10.137.0.1",
        "/qubes-primary-dns": "10.139.1.1",
        "/qubes-secondary-dns": "10.139.1.2",
    }
    assert network_entries(net) == {
        "/qubes-netvm-network": "10.137.0.1",
        "/qubes-netvm-gateway": "10.137.0.1",
        "/qubes-netvm-netmask": "255.255.255.255",
        "/qubes-netvm-primary-dns": "10.139.1.1",
        "/qubes-netvm-secondary-dns": "10.139.1.2",
    }
    assert str(work.dns) == "10.139.1.1 10.139.1.2"
    assert net.connected_vms == [work]


@pytest.mark.asyncio
async def test_ipv6_where_the_net_vm_has_the_feature(make_vm):
    net = await make_vm("net", netvm=None, provides_network=True)
    work = await make_vm("work", netvm=net)
    assert work.ip6 is None
    net.features["ipv6"] = True
    assert str(work.ip6) == "fd09:24ef:4179::a89:2"
    assert network_entries(work)["/qubes-gateway6"] == str(net.ip6)


@pytest.mark.asyncio
async def test_fake_addresses_are_told_and_not_had(make_vm):
    net = await make_vm("net", netvm=None, provides_network=True)
    work = await make_vm("work", netvm=net)
    work.features["net.fake-ip"] = "192.168.1.2"
    work.features["net.fake-gateway"] = "192.168.1.1"
    work.features["net.fake-netmask"] = "255.255.255.0"
    assert work.visible_ip == IPv4Address("192.168.1.2")
    assert work.ip == IPv4Address("10.137.0.2")
    entries = network_entries(work)
    assert entries["/qubes-ip"] == "192.168.1.2"
    assert entries["/qubes-gateway"] == "192.168.1.1"
    assert entries["/qubes-netmask"] == "255.255.255.0"


@pytest.mark.parametrize("value", ["1.2.3", "::1", "10.0.0.1/24", "$(reboot)"])
@pytest.mark.asyncio
async def test_a_fake_address_that_is_none_is_refused(make_vm, value):
    work = await make_vm("work", netvm=None)
    with pytest.raises(exc.QubesValueError, match=r"net\.fake-ip"):
        work.features["net.fake-ip"] = value
    with pytest.raises(exc.QubesPropertyValueError):
        work.ip = value


@pytest.mark.asyncio
async def test_default_net_vms(app, make_vm):
    net = await make_vm("net", provides_network=True)
    wall = await make_vm("wall", provides_network=True)
    work = await make_vm("work")
    app.default_netvm = wall
    app.default_fw_netvm = net
    assert (work.netvm, wall.netvm, net.netvm) == (wall, net, None)
    with pytest.raises(exc.QubesPropertyValueError):
        app.default_netvm = work


def chain(vm):
    """Return a VM, its net VM, and so on; a loop fails the test."""
    seen = []
    while vm is not None:
        assert vm not in seen
        seen.append(vm)
        vm = vm.netvm
    return seen


@given(choices=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=20))
@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
def test_no_choice_of_net_vms_is_a_loop(net_vms, choices):
    """Whatever is set in whatever order; and nothing else is refused."""
    vms = net_vms
    for one, other in choices:
        loop = vms[one] in chain(vms[other])
        refusal = (
            pytest.raises(exc.QubesPropertyValueError, match="its own net VM")
            if loop
            else contextlib.nullcontext()
        )
        with refusal:
            vms[one].netvm = vms[other]
    for vm in vms:
        chain(vm)
    for vm in vms:
        vm.netvm = None


CHANGES = [
    lambda vm, other: setattr(vm, "netvm", other),
    lambda vm, _other: delattr(vm, "netvm"),
    lambda vm, other: setattr(vm, "provides_network", other is not None),
    lambda vm, _other: delattr(vm, "provides_network"),
    lambda vm, other: setattr(vm.app, "default_netvm", other),
    lambda vm, other: setattr(vm.app, "default_fw_netvm", other),
]


def test_no_choice_of_net_vms_and_defaults_is_a_loop(net_vms):
    """Nor has a VM ever a net VM that does not provide network."""
    chance, changed = random.Random(1), 0  # noqa: S311 - to be repeated
    for _ in range(5000):
        change = chance.choice(CHANGES)
        with contextlib.suppress(exc.QubesValueError, exc.QubesVMInUseError):
            change(chance.choice(net_vms), chance.choice([*net_vms, None]))
            changed += 1
        for vm in net_vms:
            assert all(above.provides_network for above in chain(vm)[1:])
    assert changed > 2000


@pytest.mark.asyncio
@pytest.mark.parametrize("default", ["default_netvm", "default_fw_netvm"])
async def test_a_net_vm_remains_one_as_long_as_it_is_needed(app, make_vm, default):
    net = await make_vm("net", provides_network=True)
    work = await make_vm("work", netvm=net)
    for said in ("is the net VM of work", f"is the app's {default}"):
        with pytest.raises(exc.QubesVMInUseError, match=said):
            net.provides_network = False
        with pytest.raises(exc.QubesVMInUseError, match=said):
            del net.provides_network
        setattr(app, default, net)
        work.netvm = None
    setattr(app, default, None)
    del net.provides_network
    assert not net.provides_network


@pytest.mark.asyncio
async def test_what_changes_with_an_address_is_told(make_vm):
    net = await make_vm("net", netvm=None)
    work = await make_vm("work", netvm=None)
    told = []
    for vm in (net, work):
        vm.add_handler(
            "property-reset:*",
            lambda vm, _event, name, **_kw: told.append((vm.name, name)),
        )

    def taken():
        found = sorted(told)
        told.clear()
        return found

    net.provides_network = True
    assert taken() == [("net", "gateway"), ("net", "gateway6"), ("net", "icon")]
    assert net.features["servicevm"] == "1"
    assert net.icon == "servicevm-red"
    work.netvm = net
    taken()
    net.ip = "10.1.2.3"
    assert taken() == [
        ("net", "gateway"),
        ("net", "visible_ip"),
        ("work", "visible_gateway"),
    ]
    net.ip = "10.1.2.3"
    assert taken() == []
    work.ip6 = "fd09::1"
    assert taken() == [("work", "visible_ip6")]
    work.netvm = None
    del net.provides_network
    assert "servicevm" not in net.features
