"""How long templates take to build, and VMs on them to start.

Run: ``.venv/bin/python tests/benchmarks/templates.py [ROUNDS] [--build]``

A start is one from a state over the root of its template; each row says whether the VM
went on as a clone that had been started ahead, which is looked at.

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

from qubes_itests.guest.start import warm
from qubes_itests.host import load, sandbox
from qubes_itests.host.cache import Cache
from qubes_itests.host.kernel import find_kernel

TINY, DEBIAN, SYSTEMD = "tiny", "debian-12", "debian-12-with-systemd"
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
    """A VM of each kind, which starts from a state over its root."""

    def __init__(self, app, run):
        self.run = run
        self.saved = app.warm_starts
        self.ahead = self.saved.ahead
        self.vms = {}
        for name in (TINY, DEBIAN, SYSTEMD):
            template = DEBIAN if name == SYSTEMD else name
            vm = app.add_new_vm(
                "AppVM", name=f"on-{name}", label="red", template=template
            )
            run(vm.create_on_disk())
            self.vms[name] = vm
        self.vms[SYSTEMD].features["init"] = "systemd"

    def started(self, name, *, ahead):
        """Return the seconds until a VM has started, and until it is usable.

        :param ahead: whether it shall go on as a clone that was there.
        """
        self.saved.ahead = self.ahead if ahead else None
        while True:
            # none is made meanwhile
            self.run(self.ahead.settled())
            taken, adopted = self.run(self._started(self.vms[name]))
            if adopted is ahead:
                return taken

    @staticmethod
    async def _started(vm):
        systemd = vm.features.get("init") == "systemd"
        command = "systemctl --user show-environment" if systemd else "echo ready"
        began = time.perf_counter()
        await vm.start()
        started = time.perf_counter() - began
        await vm.run_for_stdio(command)
        usable = time.perf_counter() - began
        # libvirt renames no domain that runs
        adopted = vm.domain.libvirt_name != vm.name
        await vm.kill()
        return (started, usable), adopted


def starts(app, run, rounds):
    """Compare starts, in turn."""
    vms = VMs(app, run)
    kinds = [(name, ahead) for ahead in (False, True) for name in vms.vms]
    figures = {kind: [] for kind in kinds}
    for number in range(rounds + 1):
        for (name, ahead), values in figures.items():
            taken = vms.started(name, ahead=ahead)
            if number:  # the first makes saved states
                values.append(taken)
    for ahead in (False, True):
        clone = "as a clone that was there" if ahead else "without a clone ahead"
        heading(f"Warm start {clone}, measured in turn")
        usable = {name: [b for _, b in figures[name, ahead]] for name in vms.vms}
        for name in (TINY, DEBIAN):
            bound = "<= 0.30 s" if name == DEBIAN else ""
            row(f"{name}, to the first command's output", usable[name], bound=bound)
        pairs = zip(usable[DEBIAN], usable[TINY], strict=True)
        row(f"{DEBIAN} / {TINY}", [a / b for a, b in pairs], "", "< 1.5")
        row(f"{SYSTEMD}, started", [a for a, _ in figures[SYSTEMD, ahead]])
        row("… to the answer of systemctl --user", usable[SYSTEMD], bound="<= 1.5 s")


def main():
    """Measure and print."""
    rounds = next((int(word) for word in sys.argv[1:] if word.isdigit()), 5)
    if "--build" in sys.argv and not sandbox.active():
        build()
    # as in starts.py: from states over the roots, with clones however busy it is
    warm._WORTH = 1
    load.running = lambda: 0
    with testbed() as bed, app_on(bed, TINY, DEBIAN) as app:
        starts(app, bed.portal.run, rounds)


if __name__ == "__main__":
    main()
