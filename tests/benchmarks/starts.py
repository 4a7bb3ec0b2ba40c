"""How long VMs take to start, beside raw QEMU with the same kernel.

Run: ``.venv/bin/python tests/benchmarks/starts.py [ROUNDS]``

Raw QEMU has the same kernel, machine, CPU, memory and kernel options as the domains,
no disks, and an initramfs that holds only a program that ends QEMU.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import tempfile
from pathlib import Path

from bench import app_on, heading, row, seconds, testbed

from qubes_itests.guest.image.cpio import Archive
from qubes_itests.hypervisor.domain_xml import KERNEL_OPTIONS, Machine

INIT = r"""
#include <sys/io.h>
int main(void) { iopl(3); outb(0, 0xf4); for (;;) { } }
"""
RAW = "raw QEMU to init"
COLD = "cold start to output"
TWO_COLD = "two cold starts at once"
WARM = "warm start to output"
TWO_WARM = "two warm starts at once"
BOUNDS = {WARM: "< 1.2 s"}
RATIOS = (
    ("cold start / raw QEMU", COLD, RAW, "<= 1.4"),
    ("two cold starts / one", TWO_COLD, COLD, "< 1.6"),
)


class RawQEMU:
    """QEMU without libvirt, from its start to the kernel's first program."""

    def __init__(self, kernel, memory, directory):
        (directory / "init.c").write_text(INIT)
        compiler = ["gcc", "-static", "-O2", "-o", directory / "init"]
        subprocess.run([*compiler, directory / "init.c"], check=True)
        archive = Archive()
        archive.directory("dev")
        archive.file("init", (directory / "init").read_bytes(), 0o755)
        (directory / "initramfs").write_bytes(archive.to_bytes())
        machine = Machine(kvm=False, emulator=Path())
        self.command = [
            "qemu-system-x86_64", "-accel", "tcg",
            "-machine", machine.machine, "-cpu", machine.cpu, "-m", str(memory),
            "-nodefaults", "-display", "none", "-no-reboot", "-serial", "null",
            "-device", "isa-debug-exit,iobase=0xf4",
            "-kernel", str(kernel), "-initrd", str(directory / "initramfs"),
            "-append", KERNEL_OPTIONS,
        ]  # fmt: skip

    def run(self):
        subprocess.run(self.command, check=False, timeout=120)


class VMs:
    """Two VMs, started cold or warm, alone or together."""

    def __init__(self, app, run):
        self.app = app
        self.run = run
        self.saved = app.warm_starts
        self.vms = [
            app.add_new_vm("AppVM", name=name, label="red") for name in ("one", "two")
        ]
        for vm in self.vms:
            run(vm.create_on_disk())

    def start(self, number, *, warm):
        self.app.warm_starts = self.saved if warm else None
        self.run(self._together(self._start, number))

    def stop(self, number):
        self.run(self._together(lambda vm: vm.kill(), number))

    async def _together(self, action, number):
        await asyncio.gather(*(action(vm) for vm in self.vms[:number]))

    @staticmethod
    async def _start(vm):
        await vm.start()
        await vm.run_for_stdio("echo ready")


def measure(raw, vms, rounds):
    """Measure all in turn, so that a slow minute of the machine slows down all."""
    starts = {
        COLD: (1, False),
        TWO_COLD: (2, False),
        WARM: (1, True),
        TWO_WARM: (2, True),
    }
    vms.start(1, warm=True)  # makes the saved state
    vms.stop(1)
    figures = {name: [] for name in (RAW, *starts)}
    for _ in range(rounds):
        figures[RAW].append(seconds(raw.run))
        for name, (number, warm) in starts.items():
            figures[name].append(seconds(lambda n=number, w=warm: vms.start(n, warm=w)))
            vms.stop(number)
    return figures


def show(figures):
    """Print the two tables."""
    heading("Starts, measured in turn")
    for name, values in figures.items():
        row(name, values, bound=BOUNDS.get(name, ""))
    heading("Ratios, round by round")
    for name, above, below, bound in RATIOS:
        pairs = zip(figures[above], figures[below], strict=True)
        row(name, [a / b for a, b in pairs], "", bound)


def main():
    """Measure and print."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    with (
        testbed() as bed,
        app_on(bed) as app,
        tempfile.TemporaryDirectory() as directory,
    ):
        vms = VMs(app, bed.portal.run)
        kernel, memory = app.kernels["tiny"].kernel, vms.vms[0].memory
        raw = RawQEMU(kernel, memory, Path(directory))
        show(measure(raw, vms, rounds))


if __name__ == "__main__":
    main()
