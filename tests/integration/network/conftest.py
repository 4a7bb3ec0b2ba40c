"""A network that the tests of a module share: two net VMs in a row, and clients."""

import asyncio

import pytest
from network_devices import links

PORT = 7000


class Network:
    """VMs by name: net; clients one and two of it; firewall, and its client far."""

    def __init__(self, testbed):
        self.run = testbed.portal.run
        self.testbed = testbed
        self.app = self.run(testbed.make_app("tiny"))
        self.net = self.make("net", netvm=None, provides_network=True)
        self.firewall = self.make("firewall", netvm=self.net, provides_network=True)
        self.one = self.make("one", netvm=self.net)
        self.two = self.make("two", netvm=self.net)
        self.far = self.make("far", netvm=self.firewall)

    def make(self, name, **properties):
        vm = self.app.add_new_vm("AppVM", name=name, label="red", **properties)
        self.run(vm.create_on_disk())
        return vm

    def start(self, *vms):
        async def start():
            await asyncio.gather(*(vm.start() for vm in vms))

        self.run(start())

    def sh(self, vm, command):
        """Run a command as root; return its output, and its error output with it."""
        output, _ = self.run(
            vm.run_for_stdio(f"{{ {command}\n}} 2>&1; true", user="root")
        )
        return output.decode().rstrip("\n")

    def pings(self, vm, address, options=""):
        command = f"ping -c 1 -W 1 {options} {address}"
        return ", 0% packet loss" in self.sh(vm, command)

    def pings_in_the_end(self, vm, address):
        """As `pings`, when what the VMs know of each other has aged."""
        return any(self.pings(vm, address) for _ in range(60))

    def echoes_heard(self, vm):
        """Return how many echo requests have reached a VM."""
        return int(self.sh(vm, "grep '^Icmp: [0-9]' /proc/net/snmp").split()[9])

    def connects(self, vm, other):
        """Tell whether a text gets through by TCP, both ways."""
        listens = f"grep -q ':{PORT:04X} 0*:0000 0A' /proc/net/tcp*"
        serve = f"nc -ll -p {PORT} -e /bin/cat > /dev/null &"
        self.sh(other, f"{serve} until {listens}; do sleep 0.05; done")
        try:
            sent = f"{vm} to {other}"
            return sent == self.sh(vm, f"echo {sent} | nc -w 1 {other.ip} {PORT}")
        finally:
            # the next one could not listen while this one does
            self.sh(other, "killall nc; while pidof nc; do sleep 0.05; done")

    def reaches(self, vm, other):
        """Tell whether it does in the end, with packets of both kinds.

        On a busy machine an answer takes more than the second that either waits.
        """
        return self.pings_in_the_end(vm, other.ip) and any(
            self.connects(vm, other) for _ in range(60)
        )

    def is_cut_off(self, vm, other):
        """Tell whether packets of neither kind get through, within a second."""
        return not self.pings(vm, other.ip) and not self.connects(vm, other)

    def devices(self, vm):
        return self.sh(vm, "ls /sys/class/net").split()

    def close(self):
        return self.run(self.testbed.close_app(self.app))


@pytest.fixture(scope="module")
def network(testbed):
    before = links()
    network = Network(testbed)
    network.start(network.one, network.two, network.far)
    yield network
    assert network.close() == []
    assert links() == before


@pytest.fixture
def run(network):
    return network.run
