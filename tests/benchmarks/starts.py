"""How long VMs take to start, beside raw QEMU, and what memory of its own each has.

Run: ``.venv/bin/python tests/benchmarks/starts.py [ROUNDS [TEMPLATE…]]``

Raw QEMU that boots has the same kernel, machine, CPU, memory and kernel options as the
domains, no disks, and an initramfs that holds only a program that ends QEMU. Raw QEMU
that loads a state has the arguments that libvirt gives it, and the state that VMs start
from; it is done when the guest runs. Eight of those at once are the floor of eight
starts; on a busy machine only their CPU time tells.

Warm starts are those of VMs that go on as clones, which were started ahead before the
time is taken, however busy the machine is, and those of VMs that do without.

A template besides ``tiny`` is only started warm. The memory is that of the eight VMs,
idle: what each owns, and its share of what they have in common (PSS).
"""

from __future__ import annotations

import asyncio
import json
import re
import resource
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench import app_on, heading, row, seconds, testbed

from qubes_itests.guest.image.cpio import Archive
from qubes_itests.guest.start import warm
from qubes_itests.host import load
from qubes_itests.hypervisor.domain_xml import KERNEL_OPTIONS, Machine

INIT = r"""
#include <sys/io.h>
int main(void) { iopl(3); outb(0, 0xf4); for (;;) { } }
"""
RAW = "raw QEMU to init"
COLD = "cold start to output"
TWO_COLD = "two cold starts at once"
RAW_LOAD = "raw QEMU loads the state"
EIGHT_RAW_LOADS = "eight raw QEMUs load it at once"
CPU_TIME = "CPU time: "
WARM = "warm start to output"
EIGHT_WARM = "eight warm starts at once"
ALONE = "warm start, no clone ahead"
EIGHT_ALONE = "eight at once, no clones ahead"
BOUNDS = {WARM: "<= 0.25 s"}
RATIOS = (
    ("cold start / raw QEMU", COLD, RAW, "<= 1.4"),
    ("two cold starts / one", TWO_COLD, COLD, "< 1.6"),
    ("warm start / raw QEMU that loads", WARM, RAW_LOAD, ""),
    ("eight warm starts / one", EIGHT_WARM, WARM, "<= 3"),
    ("eight raw QEMUs that load / one", EIGHT_RAW_LOADS, RAW_LOAD, ""),
    ("… their CPU time", CPU_TIME + EIGHT_RAW_LOADS, CPU_TIME + RAW_LOAD, ""),
    ("no clone ahead / raw QEMU that loads", ALONE, RAW_LOAD, ""),
    ("eight without clones ahead / one", EIGHT_ALONE, ALONE, ""),
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


class RawLoad:
    """QEMU without libvirt, from its start to a guest that runs on from a state.

    It has the arguments, and the environment, of a domain that libvirt has started, and
    blank disks.
    """

    def __init__(self, domain, directory):
        directory.mkdir(parents=True)
        (place,) = qemus(domain)
        words = (place / "cmdline").read_text().split("\0")[:-1]
        words.remove("-S")
        secret = words.index("-object")
        del words[secret : secret + 2]
        self.command = [
            re.sub(r"^(socket|pipe),id=(\w+),.*", self._character_device, word)
            for word in words
        ]
        for number, word in enumerate(self.command):
            disk = directory / f"{domain.spec.name}-{number}"
            if word.startswith('{"driver":"file",'):
                disk.write_bytes(bytes(1 << 20))
                name = f'"filename":"{disk}"'
                self.command[number] = re.sub(r'"filename":"[^"]*"', name, word)
        found = re.search(
            r"mem-path=/proc/qubes_itests/read-only(.*)\.memory,", str(words)
        )
        self.state = found[1]
        variables = (place / "environ").read_text().split("\0")[:-1]
        self.environment = dict(line.split("=", 1) for line in variables)

    @staticmethod
    def _character_device(match):
        kind = "stdio" if match[2] == "charmonitor" else "null"
        return f"{kind},id={match[2]}"

    def run(self):
        names = ("x-ignore-shared", "events")
        capabilities = [{"capability": name, "state": True} for name in names]
        # what is before QEMU's own data is 64 bytes long
        uri = f"exec:tail -c +65 {self.state}"
        with subprocess.Popen(
            self.command,
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as process:

            def execute(command, event, **arguments):
                line = json.dumps({"execute": command, "arguments": arguments})
                process.stdin.write(line.encode() + b"\n")
                process.stdin.flush()
                while event not in (line := process.stdout.readline()):
                    assert line, "QEMU has ended"
                    assert b"error" not in line, line

            execute("qmp_capabilities", b"return")
            execute("migrate-set-capabilities", b"return", capabilities=capabilities)
            execute("migrate-incoming", b"completed", uri=uri)
            execute("cont", b"RESUME")
            process.kill()


def qemus(*domains):
    """Return the directories in /proc of the QEMU processes of domains."""
    wanted = [f"guest={domain.libvirt_name},".encode() for domain in domains]
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            line = (place / "cmdline").read_bytes()
        except OSError:  # it has gone
            continue
        if any(word in line for word in wanted):
            found.append(place)
    return found


def cpu_time():
    """Return the seconds that our own child processes have used, once ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


class VMs:
    """Eight VMs of a template, started cold or warm, some of them together."""

    def __init__(self, app, run, template, directory):
        self.app = app
        self.run = run
        self.saved = app.warm_starts
        self.vms = [
            app.add_new_vm(
                "AppVM", name=f"{template}-{n}", label="red", template=template
            )
            for n in range(8)
        ]
        for vm in self.vms:
            run(vm.create_on_disk())
        self.ahead = self.saved.ahead
        self.start(1)  # makes the saved state
        domain = self.vms[0].domain
        self.raw_loads = [
            RawLoad(domain, directory / template / str(n)) for n in range(len(self.vms))
        ]
        self.stop(1)

    def get_ready(self, number, *, warm, ahead):
        """Have clones ahead for as many starts, or none."""
        self.app.warm_starts = self.saved if warm else None
        self.saved.ahead = self.ahead if ahead else None
        while ahead and self.run(self._waiting()) < number:
            self.start(number)
            self.stop(number)

    async def _waiting(self):
        await self.ahead.settled()
        return len(self.app.hypervisor.domains(spare=True))

    def start(self, number):
        self.run(self._together(self._start, number))

    def stop(self, number):
        self.run(self._together(lambda vm: vm.kill(), number))

    def load_raw(self, number):
        """Have as many raw QEMUs load the state at once."""
        with ThreadPoolExecutor(number) as threads:
            for done in [threads.submit(one.run) for one in self.raw_loads[:number]]:
                done.result()

    def memory(self):
        """Return the MiB that each of them has, of those that run."""
        texts = [
            (place / "smaps_rollup").read_text()
            for place in qemus(*(vm.domain for vm in self.vms))
        ]
        return [int(re.search(r"Pss: +([0-9]+)", text)[1]) / 1024 for text in texts]

    async def _together(self, action, number):
        await asyncio.gather(*(action(vm) for vm in self.vms[:number]))

    @staticmethod
    async def _start(vm):
        await vm.start()
        await vm.run_for_stdio("echo ready")


def measure(raw, groups, rounds):
    """Measure all in turn, so that a slow minute of the machine slows down all."""
    tiny = groups["tiny"]
    figures = {name: [] for name in (RAW, COLD, TWO_COLD)}
    memory = {}

    def start(name, vms, number, *, warm, ahead=False):
        vms.get_ready(number, warm=warm, ahead=ahead)
        values = figures.setdefault(name, [])
        values.append(seconds(lambda: vms.start(number)))
        if number == len(vms.vms):
            memory.setdefault(name, []).extend(vms.memory())
        vms.stop(number)

    for _ in range(rounds):
        figures[RAW].append(seconds(raw.run))
        start(COLD, tiny, 1, warm=False)
        start(TWO_COLD, tiny, 2, warm=False)
        for template, vms in groups.items():
            named = "" if vms is tiny else f"{template}: "
            for name, number in ((RAW_LOAD, 1), (EIGHT_RAW_LOADS, 8)):
                before = cpu_time()
                taken = seconds(vms.load_raw, number)
                figures.setdefault(named + name, []).append(taken)
                used = figures.setdefault(named + CPU_TIME + name, [])
                used.append(cpu_time() - before)
            start(named + ALONE, vms, 1, warm=True)
            start(named + EIGHT_ALONE, vms, 8, warm=True)
            start(named + WARM, vms, 1, warm=True, ahead=True)
            start(named + EIGHT_WARM, vms, 8, warm=True, ahead=True)
    return figures, memory


def show(figures, memory):
    """Print the tables."""
    heading("Starts, measured in turn")
    for name, values in figures.items():
        row(name, values, bound=BOUNDS.get(name, ""))
    heading("Ratios, round by round")
    for name, above, below, bound in RATIOS:
        pairs = zip(figures[above], figures[below], strict=True)
        row(name, [a / b for a, b in pairs], "", bound)
    heading("Memory of an idle VM, of eight (PSS)")
    for name, values in memory.items():
        row(name, values, "MiB", "<= 45 MiB")


def main():
    """Measure and print."""
    # at the first start, so that no state is made while others are measured
    warm._WORTH = 1
    load.running = lambda: 0
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    templates = ["tiny", *sys.argv[2:]]
    with (
        testbed() as bed,
        app_on(bed, *templates) as app,
        tempfile.TemporaryDirectory() as directory,
    ):
        place = Path(directory)
        groups = {name: VMs(app, bed.portal.run, name, place) for name in templates}
        kernel, memory = app.kernels["tiny"].kernel, groups["tiny"].vms[0].memory
        raw = RawQEMU(kernel, memory, place)
        show(*measure(raw, groups, rounds))


if __name__ == "__main__":
    main()
