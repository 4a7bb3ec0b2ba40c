"""How long a VM takes to start by our core, and by that of a core-admin checkout.

Run: ``.venv/bin/python tests/benchmarks/core_starts.py --core DIR [--qrexec DIR]``

Both start an AppVM of ``tiny`` without a net VM, in turn, until it has run a command;
cold, and from a saved state, without clones ahead. What the rest of a start costs is in
the last rows: the programs of dom0 and the modules that stand in for those of Xen.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import os
import subprocess
import sys
from pathlib import Path

from bench import app_on, heading, row, seconds, testbed

from qubes_itests.discovery.core_suites import core_imports
from qubes_itests.dom0 import modules
from qubes_itests.dom0.opening import VAR_LIB_QUBES
from qubes_itests.dom0.programs import PROGRAMS
from qubes_itests.guest.start import warm
from qubes_itests.host import load, sandbox
from qubes_itests.run.preparation import prepare_listing
from qubes_itests.run.result import Prepared
from qubes_itests.run.settings import Settings

CALLS = 1000


class Side:
    """A VM of one core.

    :param run: runs a coroutine of it.
    :param use: has it start from saved states, or boot.
    """

    def __init__(self, name, vm, run, use):
        self.name, self.vm, self.run, self.use = name, vm, run, use
        run(vm.create_on_disk())

    async def _start(self):
        await self.vm.start()
        await self.vm.run_for_stdio("true")

    def measure(self, figures, kind, saved):
        """Add one start, and one command, to figures by name."""
        self.use(saved)
        for name, work in (
            (f"{kind} start to output", self._start),
            (f"a command after a {kind} start", self._command),
            (f"kill after a {kind} start", self.vm.kill),
        ):
            value = seconds(lambda work=work: self.run(work()))
            figures.setdefault(f"{name}: {self.name}", []).append(value)

    async def _command(self):
        await self.vm.run_for_stdio("true")


def each(work):
    """Return the time of one of many calls, us."""
    return [
        seconds(lambda: [work() for _ in range(CALLS)]) / CALLS * 1e6 for _ in range(5)
    ]


def stand_ins(domain):
    """Print what calls of the stand-ins cost by themselves."""
    xs = importlib.import_module("xen.lowlevel.xs").xs()
    database = importlib.import_module("qubesdb").QubesDB("dom0")
    heading("The stand-ins alone")
    row("libvirt: isActive", each(domain.isActive), "us")
    row("qubesdb: write", each(lambda: database.write("/bench", "1")), "us")
    row("xs: write", each(lambda: xs.write("", "/bench", "1")), "us")
    database.close()

    def spawn(*words):
        return [seconds(lambda: subprocess.run(words, check=True)) for _ in range(9)]

    row(
        "a program of dom0",
        spawn(PROGRAMS / "systemctl", "disable", "qubes-vm@no.service"),
    )
    row("a program of the machine, in Python", spawn(sys.executable, "-ISc", ""))


def measure(ours, theirs, saved, rounds):
    """Start both in turn, so that a slow minute of the machine slows down both."""
    # the first makes the saved state
    for side in (ours, theirs):
        side.measure({}, "warm", saved)
    figures = {}
    for _ in range(rounds):
        for kind, states in (("cold", None), ("warm", saved)):
            for side in (ours, theirs):
                side.measure(figures, kind, states)
    heading("Starts, measured in turn")
    for name in sorted(figures):
        row(name, figures[name])
    heading("Ratios, round by round: core-admin / ours")
    for name in sorted(figures):
        what, _, side = name.rpartition(": ")
        if side == ours.name:
            pairs = zip(figures[f"{what}: {theirs.name}"], figures[name], strict=True)
            row(what, [a / b for a, b in pairs], "")


def compare(bed, app, rounds):
    """Measure both cores and print tables."""
    source = Path(Prepared.told().core)
    checkout = Path(Prepared.told().copies[os.fspath(source)])
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    saved = bed.warm_starts
    saved.ahead = None
    machine = modules.machine()
    mine = app.add_new_vm("AppVM", name="mine", label="red", template="tiny")
    mine.netvm = None
    with core_imports(source, checkout, ["tiny"]) as programs:
        programs.enter()
        importlib.import_module("libvirtaio").virEventRegisterAsyncIOImpl(loop)
        core = importlib.import_module("qubes")
        other = core.Qubes(os.fspath(VAR_LIB_QUBES / "qubes.xml"))
        other.register_event_handlers()
        vm = other.add_new_vm("AppVM", name="theirs", label="red")
        vm.netvm = None

        def ours_from(states):
            app.warm_starts = states

        def theirs_from(states):
            machine.warm = states

        measure(
            Side("ours", mine, bed.portal.run, ours_from),
            Side("core-admin", vm, loop.run_until_complete, theirs_from),
            saved,
            rounds,
        )
        stand_ins(vm.libvirt_domain)
        other.close()
        programs.leave()


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rounds", nargs="?", type=int, default=5)
    parser.add_argument("--core", type=Path, required=True)
    parser.add_argument("--qrexec", type=Path)
    options = parser.parse_args()
    if not sandbox.active():
        prepare_listing(Settings(core=options.core, qrexec=options.qrexec))
    sandbox.reexec()
    modules.install()
    # at the first start, so that no state is made while others are measured
    warm._WORTH = 1
    load.running = lambda: 0
    with testbed() as bed, app_on(bed) as app:
        compare(bed, app, options.rounds)


if __name__ == "__main__":
    main()
