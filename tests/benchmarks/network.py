"""What a network costs: starts with and without, changes while VMs run, and traffic.

Run: ``.venv/bin/python tests/benchmarks/network.py [ROUNDS]``
"""

from __future__ import annotations

import asyncio
import sys

from bench import app_on, heading, row, seconds, testbed

CLIENTS = 6
MEGABYTES = 32
PORT = 7000


class VMs:
    """A net VM that runs, and clients that do not."""

    def __init__(self, app, run):
        self.app = app
        self.run = run
        self.net = self.make("net", provides_network=True)
        self.alone = self.make("alone")
        self.clients = [self.make(f"c{n}", netvm=self.net) for n in range(CLIENTS)]
        run(self.net.start())

    def make(self, name, **properties):
        vm = self.app.add_new_vm("AppVM", name=name, label="red", **properties)
        self.run(vm.create_on_disk())
        return vm

    def sh(self, vm, command):
        return self.run(vm.run_for_stdio(command, user="root"))[0].decode()

    def start(self, vm):
        took = seconds(lambda: self.run(vm.start()))
        self.run(vm.kill())
        return took

    def change(self, vm, netvm):
        vm.netvm = netvm

    def restart_net(self):
        self.run(self.net.kill())
        return seconds(lambda: self.run(self.net.start()))

    def transfer(self, vm):
        """Return MiB a second from a client into the net VM, by TCP."""
        # what is counted comes back, so that all has arrived
        received = f"nc -l -p {PORT} -e /usr/bin/wc -c"
        send = f"dd if=/dev/zero bs=1M count={MEGABYTES} | nc {self.net.ip} {PORT}"

        async def both():
            receiving = asyncio.ensure_future(self.net.run_for_stdio(received))
            sending = f"until {send} 2> /dev/null; do sleep 0.05; done"
            output, _ = await vm.run_for_stdio(sending)
            await receiving
            if int(output) != MEGABYTES << 20:
                sys.exit(f"of {MEGABYTES} MiB {int(output)} bytes arrived")

        return MEGABYTES / seconds(lambda: self.run(both()))

    def ping(self, vm):
        """Return the milliseconds of each of ten pings."""
        output = self.sh(vm, f"ping -c 10 -i 0.2 {self.net.ip}")
        return [float(t.split()[0]) for t in output.split("time=")[1:]]


def measure(vms, rounds):
    heading(f"Starts, warm, {rounds} each")
    starts = {"without a net VM": vms.alone, "with one that runs": vms.clients[0]}
    taken = {name: [] for name in starts}
    for _ in range(rounds):
        for name, vm in starts.items():
            taken[name].append(vms.start(vm))
    for name, values in taken.items():
        row(name, values)

    one = vms.clients[0]
    vms.run(one.start())
    heading("While it runs")
    off, on = [], []
    for _ in range(rounds):
        off.append(seconds(vms.change, one, None))
        on.append(seconds(vms.change, one, vms.net))
    row("netvm = None", off)
    row("netvm = net", on)
    for vm in vms.clients[1:]:
        vms.run(vm.start())
    row(f"start of a net VM, {CLIENTS} clients run", [vms.restart_net()])

    heading("Traffic, client to net VM")
    row("ping", vms.ping(one), "ms")
    row("TCP", [vms.transfer(one) for _ in range(3)], "MiB/s")


def main():
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    with testbed() as bed, app_on(bed) as app:
        measure(VMs(app, bed.portal.run), rounds)


if __name__ == "__main__":
    main()
