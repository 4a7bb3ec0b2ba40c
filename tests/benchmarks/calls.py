"""How quick service calls between two VMs are.

Run: ``.venv/bin/python tests/benchmarks/calls.py [TEMPLATE]``
"""

from __future__ import annotations

import sys

from bench import app_on, heading, row, seconds, testbed

CALLS = 500
MIB = 1024**2
STREAM = 256 * MIB

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
        row("each, in a loop of the caller's shell", times, "ms", "< 60 ms")

        def one():
            answers(run(work.run_for_stdio(call))[0], 1)

        times = [1000 * seconds(one) for _ in range(CALLS // 5)]
        row("each, by a command of its own", times, "ms", "< 60 ms")
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
