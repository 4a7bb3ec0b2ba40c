"""Guests of a core and their net VMs: what is plugged in, and what guests are told."""

import asyncio
from ipaddress import IPv4Address, IPv6Address

import pytest

from qubes_itests.dom0.network import Network
from qubes_itests.dom0.stores import QubesDB
from qubes_itests.dom0.xen_xml import InterfaceConfig
from qubes_itests.exc import HarnessError
from qubes_itests.guest.start import links
from qubes_itests.hypervisor.exc import HypervisorError

pytestmark = pytest.mark.asyncio

MAC = "00:16:3e:5e:6c:00"
DOWN = "02:16:3e:5e:6c:00"
NET = {
    "/qubes-netvm-gateway": "10.137.0.1",
    "/qubes-netvm-primary-dns": "10.139.1.1",
}
WALL = NET | {"/qubes-gateway": "10.137.0.9", "/qubes-ip": "10.137.0.1"}
CLIENT = {"/qubes-gateway": "10.137.0.1", "/qubes-primary-dns": "10.139.1.1"}


class Process:
    def __init__(self, guest, command):
        self.vm, self.guest, self.command, self.taken = guest.name, guest, command, ()

    async def communicate(self, said, *, limit):
        del limit
        await asyncio.sleep(0)
        await self.guest.answers.wait()
        self.guest.ran.append(f"{self.command} {said.decode()}".strip())
        return self.guest.says.get(self.command, b""), b"no"

    async def wait(self):
        return int(any(word in self.command for word in self.guest.failing))

    def hang_up(self):
        pass

    kill = hang_up


class Guest:
    """A domain and an agent in one, which do what they are told."""

    def __init__(self, name, entries):
        self.name = self.vm = name
        self.ran, self.failing, self.interfaces = [], set(), {}
        self.says = {}
        self.answers = asyncio.Event()
        self.answers.set()
        self.database = QubesDB()
        for path, value in entries.items():
            self.database.write(path, value.encode())
        self.network = Network(name, self, self, self.database)

    async def spawn(self, command, *, user):
        assert user == "root"
        return Process(self, command)

    async def attach_interface(self, interface):
        if f"attach {interface.mac}" in self.failing:
            raise HarnessError("it takes no more")
        self.interfaces[interface.mac] = interface.tap

    async def detach_interface(self, mac):
        if mac in self.failing:
            raise HarnessError("it does not let go")
        self.interfaces.pop(mac, None)

    def told(self, word):
        """Return what it was told with a word in it, and forget all."""
        ran, self.ran = self.ran, []
        return [command for command in ran if word in command]


@pytest.fixture(autouse=True)
def there(monkeypatch):
    """Return the names of bridges and taps that there are."""
    names = set()

    class Device:
        def __init__(self, name):
            self.name = name
            names.add(name)

        @classmethod
        def create(cls, bridge=None, mac="", sources=None):
            where = "" if bridge is None else f"{bridge.name}/{mac} {sources}"
            return cls(where or f"bridge{len(names)}")

        def cut(self):
            names.remove(self.name)
            self.name += " cut"
            names.add(self.name)

        def remove(self):
            names.discard(self.name)

    monkeypatch.setattr(links, "Bridge", Device)
    monkeypatch.setattr(links, "Tap", Device)
    return names


def interface(number, ip6=None):
    return InterfaceConfig(MAC, IPv4Address(f"10.137.0.{number}"), ip6, "net")


def client(number):
    return Guest(f"vm{number}", CLIENT | {"/qubes-ip": f"10.137.0.{number}"})


async def test_two_clients_with_one_hardware_address(there):
    net, first, second = Guest("net", NET), client(5), client(6)
    await net.network.begin()
    assert net.interfaces.keys() == {DOWN}
    await asyncio.gather(
        first.network.attach(interface(5), net.network),
        second.network.attach(interface(6), net.network),
    )
    assert first.interfaces.keys() == second.interfaces.keys() == {MAC}
    assert first.told("uplink") == [
        f"exec /usr/lib/qubes/agent uplink eth0 {MAC} 10.137.0.5 10.137.0.1 10.139.1.1"
    ]
    routes = {w for line in net.told("agent routes") for w in line.split()[4:]}
    assert routes == {"10.137.0.5", "10.137.0.6"}
    await first.network.detach(MAC)
    assert first.interfaces == {}
    assert net.told("routes") == ["exec /usr/lib/qubes/agent routes vif -10.137.0.5"]
    await first.network.attach(interface(5), net.network)
    for guest in (first, net, second):
        await guest.network.end()
    assert there == set()


async def test_an_interface_is_attached_once():
    net, first = Guest("net", NET), client(5)
    await first.network.attach(interface(5), net.network)
    with pytest.raises(HypervisorError, match="has an interface 00:16:3e:5e:6c:00"):
        await first.network.attach(interface(5), net.network)
    with pytest.raises(HypervisorError, match="client of net has the address"):
        await client(5).network.attach(interface(5), net.network)
    with pytest.raises(HypervisorError, match="it provides no network"):
        await client(6).network.attach(interface(6), first.network)


async def test_of_two_clients_with_one_address_that_come_at_once_one_is_plugged_in():
    net, clients = Guest("net", NET), [client(5), client(6)]
    await net.network.begin()
    for number in (5, 6):
        net.database.write(f"/mapped-ip/10.137.0.{number}/visible-ip", b"192.168.1.9")

    async def attach(guest, number):
        await guest.network.attach(interface(number), net.network)

    done = await asyncio.gather(*map(attach, clients, (5, 6)), return_exceptions=True)
    (error,) = filter(None, done)
    assert "another client of net has the address 192.168.1.9" in str(error)
    plugged, refused = sorted(clients, key=lambda guest: not guest.interfaces)
    assert (len(plugged.interfaces), len(refused.interfaces)) == (1, 0)
    await plugged.network.detach(MAC)
    # nobody keeps an address that could not be plugged in
    refused.failing.add(f"attach {MAC}")
    number = 5 + clients.index(refused)
    with pytest.raises(HarnessError, match="no more"):
        await attach(refused, number)
    refused.failing.clear()
    await attach(refused, number)


async def test_what_guests_do_not_do_leaves_them_plugged_in(there, caplog):
    net, first = Guest("net", NET), client(5)
    first.failing.add("uplink")
    net.failing |= {"routes", "nft"}
    await first.network.attach(interface(5), net.network)
    assert first.interfaces.keys() == {MAC}
    for said in ("VM vm5 does not use its", "VM net does not forward", "reach its cli"):
        assert said in caplog.text
    # nothing passes any more, though the guest keeps the interface
    first.failing.add(MAC)
    with pytest.raises(HarnessError, match="does not let go"):
        await first.network.detach(MAC)
    assert all(name.endswith(" cut") for name in there if MAC in name)


async def test_a_net_vm_that_is_paused_hears_of_its_clients_later():
    net, first = Guest("net", NET), client(5)
    await net.network.begin()
    net.told("")
    net.network.paused = True
    await first.network.attach(interface(5), net.network)
    assert net.ran == []
    net.network.paused = False
    await net.network.serve()
    assert net.told("routes vif 10.137.0.5")


async def test_rules_are_followed_by_a_net_vm_with_a_net_vm_of_its_own():
    net, wall, first = Guest("net", NET), Guest("wall", WALL), client(5)
    for each in (net, wall):
        each.database.write("/qubes-firewall/10.137.0.5/policy", b"drop")
    await first.network.attach(interface(5), wall.network)
    assert wall.told("qubes-firewall")
    rule = b"action=accept dsthost=a.example"
    wall.database.write("/qubes-firewall/10.137.0.5/0000", rule)
    names = "getent ahostsv4 a.example || [ $? = 2 ]"
    wall.says[names] = b"192.0.2.1 STREAM a\n192.0.2.1 DGRAM\n"
    wall.network.follow("/qubes-firewall/10.137.0.5/0000")
    wall.network.follow("/qubes-firewall/10.137.0.5")
    async with asyncio.timeout(300):
        while not (told := wall.told("ip daddr { 192.0.2.1 } accept")):  # noqa: ASYNC110
            await asyncio.sleep(0)
    assert len(told) == 1
    # what a guest says is no address, or a core no rule: nobody passes
    for path in (b"action=accept dsthost=a.example", b"action=open"):
        wall.says[names] = b"a;b\n"
        wall.database.write("/qubes-firewall/10.137.0.5/0000", path)
        await wall.network.serve()
        [told] = wall.told("nft -f -") or [told]
        assert "accept" not in told.partition("chain vm0")[2].partition("}")[0]
    await first.network.detach(MAC)
    await first.network.attach(interface(5), net.network)
    assert not net.told("qubes-firewall")


async def test_an_address_that_a_client_is_not_to_know():
    net, first = Guest("net", NET), client(5)
    net.database.write("/mapped-ip/10.137.0.5/visible-ip", b"192.168.1.128")
    net.database.write("/mapped-ip/10.137.0.5/visible-gateway", b"192.168.1.1")
    await first.network.attach(interface(5), net.network)
    ran = "\n".join(net.ran)
    assert {"10.137.0.5", "192.168.1.128"} < set(ran.split())
    assert "ip addr replace 192.168.1.1/32 dev vif" in ran
    assert "ip saddr 192.168.1.128 ip saddr set 10.137.0.5" in ran


async def test_ipv6_where_both_have_it(there):
    own, gateway = "fd09:24ef:4179::a89:5", "fd09:24ef:4179::a89:1"
    net, first = Guest("net", NET | {"/qubes-netvm-gateway6": gateway}), client(5)
    first.database.write("/qubes-ip6", own.encode())
    first.database.write("/qubes-gateway6", gateway.encode())
    await first.network.attach(interface(5, IPv6Address(own)), net.network)
    assert first.told(f"ip -6 route replace default via {gateway} dev eth0")
    assert net.told(f"ip -6 route replace {own} dev vif")
    # its tap lets both pass
    assert any(own.split("::")[1] in name for name in there if MAC in name)


async def test_a_guest_without_nft_has_no_rules(caplog):
    net, first = Guest("net", WALL), client(5)
    script = "command -v nft >/dev/null || exec echo none; exec nft -f -"
    net.says[script] = first.says[script] = b"none\n"
    with caplog.at_level("INFO"):
        await first.network.attach(interface(5), net.network)
    assert "VM net has no nft: it forwards nothing" in caplog.text
    assert not [line for line in net.ran if "sh -e" in line or "rule del" in line]


async def test_an_interface_that_its_guest_keeps_is_there_still(there):
    net, first = Guest("net", NET), client(5)
    await first.network.attach(interface(5), net.network)
    first.failing.add(MAC)
    for _ in range(2):
        with pytest.raises(HarnessError, match="does not let go"):
            await first.network.detach(MAC)
        with pytest.raises(HypervisorError, match="has an interface 00:16:3e:5e:6c:00"):
            await first.network.attach(interface(5), net.network)
    # another one may have the address; and who has let go of it meanwhile may, too
    await client(5).network.attach(interface(5), net.network)
    first.interfaces.clear()
    first.failing.clear()
    await first.network.detach(MAC)
    assert not any("cut" in name for name in there)


async def test_a_net_vm_that_does_not_answer_holds_up_no_end_of_a_client():
    net, first = Guest("net", NET), client(5)
    await first.network.attach(interface(5), net.network)
    net.answers.clear()
    async with asyncio.timeout(300):
        await first.network.end()
    net.told("")
    net.answers.set()
    async with asyncio.timeout(300):
        while not net.told("routes vif -10.137.0.5"):  # noqa: ASYNC110
            await asyncio.sleep(0)


async def test_who_cannot_have_its_rules_passes_nothing(caplog):
    """Rules are there before the first client; the others have theirs."""
    wall, first, second = Guest("wall", WALL), client(5), client(6)
    await wall.network.begin()
    (told,) = wall.told("qubes-firewall")
    assert "forward {" in told
    assert "vm0" not in told
    for number, name in ((5, "none.example"), (6, "a.example")):
        place = f"/qubes-firewall/10.137.0.{number}"
        wall.database.write(f"{place}/policy", b"accept")
        rule = f"action=accept dsthost={name}"
        wall.database.write(f"{place}/0000", rule.encode())
    wall.says["getent ahostsv4 a.example || [ $? = 2 ]"] = b"192.0.2.1 STREAM a\n"
    # no server answers in time
    wall.failing.add("none.example")
    await first.network.attach(interface(5), wall.network)
    await second.network.attach(interface(6), wall.network)
    *_, told = wall.told("qubes-firewall")
    chains = [part.partition("}\n")[0] for part in told.split(" chain vm")[1:]]
    assert "accept" not in chains[0]
    assert "192.0.2.1 } accept" in chains[1]
    assert "VM wall lets nothing of 10.137.0.5 pass: " in caplog.text


async def test_a_net_vm_without_nft_is_not_asked_to_answer_for_names():
    net, wall = Guest("net", NET), Guest("wall", WALL)
    script = "command -v nft >/dev/null || exec echo none; exec nft -f -"
    wall.says[script] = b"none\n"
    await wall.network.begin()
    await wall.network.attach(interface(1), net.network)
    ran = "\n".join(wall.ran)
    assert "agent uplink" in ran
    assert "dnat-to-ns" not in ran
