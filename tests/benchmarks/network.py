"""What a network costs: starts with and without, and changes while VMs run.

Run: ``.venv/bin/python tests/benchmarks/network.py [ROUNDS]``
"""

from __future__ import annotations

import sys

from bench import app_on, heading, row, seconds, testbed

CLIENTS = 6


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

    def start(self, vm):
        took = seconds(lambda: self.run(vm.start()))
        self.run(vm.kill())
        return took

    def change(self, vm, netvm):
        vm.netvm = netvm

    def restart_net(self):
        self.run(self.net.kill())
        return seconds(lambda: self.run(self.net.start()))


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


def main():
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    with testbed() as bed, app_on(bed) as app:
        measure(VMs(app, bed.portal.run), rounds)


if __name__ == "__main__":
    main()
