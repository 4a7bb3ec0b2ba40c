"""How quick service calls between two VMs are, and what their parts cost.

Run: ``.venv/bin/python tests/benchmarks/calls.py [TEMPLATE]``

The parts are given as CPU time, which other work on the machine changes least: that of
the emulators of the caller's guest and of the other one, and that of the harness.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from bench import app_on, heading, row, seconds, testbed

CALLS = 500
#: How often each part of a call is done.
TIMES = 200
MIB = 1024**2
STREAM = 256 * MIB

#: What a guest does in a loop: each has in it what the one before costs.
PARTS = {
    "a builtin of the shell": "true",
    "fork": "(true)",
    "fork, exec of busybox": "/bin/true",
    "fork, exec of a shell": "sh -c true",
    "fork, exec of a login shell": "sh -l -c true",
    "a call that policy denies": "qrexec-client-vm gone test.None </dev/null 2>&-",
    "a call": "qrexec-client-vm vault test.True </dev/null",
}

SERVICES = {
    "test.True": "#!/bin/sh\n",
    "test.Zeros": f"#!/bin/sh\nexec dd if=/dev/zero bs=64k count={STREAM >> 16}\n",
}


def prepare(app, run):
    """Start two VMs, the second of them with the services."""
    pair = [
        app.add_new_vm("AppVM", name=name, label="red") for name in ("work", "vault")
    ]
    for vm in pair:
        run(vm.create_on_disk())
        run(vm.start())
    for name, text in SERVICES.items():
        path = f"/etc/qubes-rpc/{name}"
        command = f"cat > {path}; chmod +x {path}"
        run(pair[1].run_for_stdio(command, user="root", input=text.encode()))
    app.policy.add_rule("* * work vault allow")
    return pair


def answers(output, number):
    """Check that all calls in a row have succeeded."""
    if output.split() != [b"0"] * number:
        sys.exit(f"calls failed: {output[:200]!r}")


def emulator(vm):
    """Return the number of the process that is a VM."""
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        if f"guest={vm.domain.libvirt_name},".encode() in place.read_bytes():
            return place.parent.name
    sys.exit(f"{vm.name} has no emulator")


def cpu_of(process):
    """Return the CPU time of a process, in seconds."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def show_parts(run, work, vault):
    """Print what the parts of a call, and of a command, cost."""
    processes = [emulator(work), emulator(vault)]

    def measure(name, function):
        before = [*map(cpu_of, processes), time.process_time()]
        function()
        after = [*map(cpu_of, processes), time.process_time()]
        used = (1000 * (b - a) / TIMES for a, b in zip(before, after, strict=True))
        print(f"{name:<44}" + "".join(f" {value:8.1f}" for value in used) + " ms")

    print(f"\nCPU time of each\n{'':<44} {'caller':>8} {'other':>8} {'harness':>8}")
    for name, command in PARTS.items():
        loop = f"for n in $(seq {TIMES}); do {command}; done; true"
        measure(name, lambda loop=loop: run(work.run_for_stdio(loop)))

    def commands():
        for _ in range(TIMES):
            run(work.run_for_stdio("true"))

    measure('run_for_stdio("true")', commands)


def main():
    """Measure and print."""
    template = sys.argv[1] if len(sys.argv) > 1 else "tiny"
    with testbed() as bed, app_on(bed, template) as app:
        run = bed.portal.run
        work, vault = prepare(app, run)
        call = "qrexec-client-vm vault test.True </dev/null; echo $?"

        def in_a_row():
            command = f"for n in $(seq {CALLS}); do {call}; done"
            answers(run(work.run_for_stdio(command))[0], CALLS)

        heading(f"{CALLS} calls in a row, from one VM to another, on {template}")
        times = [1000 * seconds(in_a_row) / CALLS for _ in range(3)]
        row("each, in a loop of the caller's shell", times, "ms", "<= 15 ms")

        def one():
            answers(run(work.run_for_stdio(call))[0], 1)

        times = [1000 * seconds(one) for _ in range(CALLS // 5)]
        row("each, by a command of its own", times, "ms")
        show_parts(run, work, vault)
        heading(f"{STREAM // MIB} MiB through a call")
        command = "qrexec-client-vm vault test.Zeros </dev/null >/dev/null; echo $?"

        def stream():
            answers(run(work.run_for_stdio(command))[0], 1)

        rates = [STREAM / MIB / seconds(stream) for _ in range(3)]
        row("one way", rates, "MiB/s")
        for vm in (work, vault):
            run(vm.kill())


if __name__ == "__main__":
    main()
