"""How long templates take to build, and VMs on them to start.

Run: ``.venv/bin/python tests/benchmarks/templates.py [ROUNDS] [--build]``

``--build`` also makes ``debian-12`` from nothing, in a cache of its own, and a template
over it with one package: that takes the package archive.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench import app_on, heading, row, seconds, testbed

from qubes_itests.host import sandbox
from qubes_itests.host.cache import Cache
from qubes_itests.host.kernel import find_kernel

SPEC = "[qubes_itests:template:one-package]\nbase = debian-12\npackages = socat\n"


def build():
    """Time the program that builds, from nothing and again."""
    heading("Templates, from the package archive")
    with tempfile.TemporaryDirectory() as directory:
        spec = Path(directory, "spec.cfg")
        spec.write_text(SPEC)
        kernel = str(find_kernel(Cache()).image)
        own = {"QUBES_ITESTS_CACHE": f"{directory}/c", "QUBES_ITESTS_KERNEL": kernel}
        program = [sys.executable, "-m", "qubes_itests", "template", "build"]

        def run(*words):
            command = [*program, *words]
            subprocess.run(command, check=True, env={**os.environ, **own})

        for name, words, bound in (
            ("debian-12", ["debian-12"], "< 150 s"),
            ("one package over it", ["one-package", "--template-spec", spec], "< 40 s"),
        ):
            row(f"{name}, from nothing", [seconds(run, *words)], bound=bound)
            row(f"{name}, cached", [seconds(run, *words) for _ in range(3)])


class VMs:
    """A VM on each template, started in turn."""

    def __init__(self, app, run):
        self.run = run
        self.vms = {}
        for name in ("tiny", "debian-12"):
            self.vms[name] = self.make(app, f"on-{name}", template=name, kernel=name)

    def make(self, app, name, **properties):
        vm = app.add_new_vm("AppVM", name=name, label="red", **properties)
        self.run(vm.create_on_disk())
        return vm

    def start(self, name):
        self.run(self._start(self.vms[name]))

    def stop(self, name):
        self.run(self.vms[name].kill())

    @staticmethod
    async def _start(vm):
        await vm.start()
        await vm.run_for_stdio("echo ready")


def starts(app, run, rounds):
    """Compare starts, pair by pair."""
    vms = VMs(app, run)
    figures = {name: [] for name in vms.vms}
    for number in range(rounds + 1):
        for name, values in figures.items():
            taken = seconds(vms.start, name)
            vms.stop(name)
            if number:  # the first makes saved states
                values.append(taken)
    heading("Warm start to the first command's output, measured in turn")
    for name, values in figures.items():
        row(name, values)
    pairs = zip(figures["debian-12"], figures["tiny"], strict=True)
    row("debian-12 / tiny", [a / b for a, b in pairs], "", "< 1.5")
    vms.vms["debian-12"].features["init"] = "systemd"
    started, usable = [], []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        vms.start("debian-12")
        started.append(time.perf_counter() - began)
        run(vms.vms["debian-12"].run_for_stdio("systemctl --user show-environment"))
        usable.append(time.perf_counter() - began)
        vms.stop("debian-12")
    row("debian-12 with systemd", started[1:])
    row("… to the answer of systemctl --user", usable[1:], bound="< 1.5 s")


def main():
    """Measure and print."""
    rounds = next((int(word) for word in sys.argv[1:] if word.isdigit()), 5)
    if "--build" in sys.argv and not sandbox.active():
        build()
    with testbed() as bed, app_on(bed, "tiny", "debian-12") as app:
        starts(app, bed.portal.run, rounds)


if __name__ == "__main__":
    main()
