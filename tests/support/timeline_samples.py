"""Artefacts of runs that never were: run.json and timelines, from a seed.

`python tests/support/timeline_samples.py DIR [TESTS [VMS [SEED]]]` writes some.
"""

from __future__ import annotations

import itertools
import json
import random
import sys
from pathlib import Path

PREFIX = "test-inst-"
SHORT = ("client", "server", "vault", "net", "firewall", "disp1234", "usb", "mirage")
NAMES = tuple(PREFIX + name for name in SHORT)
STARTED = 1796000000.0
#: Seconds for which a worker runs nothing, in the middle of the run.
IDLE = 15.0
WHERE = "tests/test_split.py"
COMMANDS = (
    "true",
    "gpg2 --batch --list-secret-keys",
    "cat /rw/config/rc.local",
    "systemctl is-system-running --wait",
    "dd if=/dev/zero of=/home/user/file bs=1M count=64",
    "rev < /home/user/words",
)
SERVICES = ("qubes.Gpg2+", "qubes.Filecopy+any", "qubes.VMShell+", "test.Echo+a")
CONSOLE = (
    "[    0.{:06d}] virtio_blk virtio2: [vdb] 4194304 512-byte logical blocks",
    "[    0.{:06d}] EXT4-fs (vdb): mounted filesystem with ordered data mode",
    "[    1.{:06d}] random: crng init done",
    "agent: entered the root, {} ms after the first frame",
    "systemd[1]: Started qubes-{}.service",
)
CAUSES = (
    "AssertionError: b'' != b'cba\\n'",
    'CalledProcessError: vm.run("rve < words"): status 127\nbash: rve: not found',
    'DeadlineError: no end within 5 s: vm.run("sleep 1000") of client',
)
OUTCOMES = ("passed",) * 24 + ("failed", "error", "skipped", "xfailed", "flaky")


class _Sample:
    """One test's timeline.

    :param chance: where the numbers come from.
    :param vms: names.
    """

    def __init__(self, chance, vms):
        self.chance, self.vms = chance, vms
        self.records, self.now = [], 0.0

    def add(self, kind, vm=None, t=None, **fields):
        when = self.now if t is None else t
        self.records.append({"t": round(when, 4), "kind": kind, "vm": vm, **fields})

    def start(self, vm):
        chance = self.chance
        self.add("state", vm, state="Transient")
        steps = [
            [name, round(chance.uniform(0.01, most), 3)]
            for name, most in (
                ("have its memory", 0.02),
                ("start its storage", 0.05),
                ("load a saved state", 0.25),
                ("reach its agent", 0.2),
                ("enter its root", 0.3),
            )
        ]
        took = round(sum(seconds for _, seconds in steps), 3)
        storage = {"operation": "start", "pool": "pool", "volume": f"{vm}/root"}
        self.add("storage", vm, t=self.now + 0.02, duration=0.03, **storage, ok=True)
        self.add("start", vm, duration=took, warm=True, ok=True, steps=steps)
        for number in range(chance.randrange(8, 20)):
            line = chance.choice(CONSOLE).format(chance.randrange(999999))
            self.add("console", vm, t=self.now + took * number / 20, line=line)
        self.now += took
        self.add("state", vm, state="Running")
        self.add("log", level="INFO", logger="qubes", line=f"VM {vm} started")
        self.add("network", vm, change="attached", peer=vm)

    def run(self, where, **fields):
        vm = self.chance.choice(self.vms)
        took = round(self.chance.expovariate(6) + 0.01, 4)
        words = {"command": self.chance.choice(COMMANDS), "user": "user", "status": 0}
        output = {"stderr": "", "stdout_bytes": self.chance.randrange(5000)}
        output["source"] = "done = await vm.run_for_stdio(command)"
        self.add("run", vm, duration=took, where=where, **words | output | fields)
        self.now += took + 0.01

    def call(self, where, decision="allow"):
        source, target = self.chance.sample(self.vms, 2)
        service = self.chance.choice(SERVICES)
        rule = (
            f"30-user.policy:4 {service.partition('+')[0]} * @anyvm @anyvm {decision}"
        )
        took = round(self.chance.expovariate(8) + 0.01, 4)
        names = {"target": target, "service": service}
        self.add(
            "policy", source, t=self.now + 0.004, **names, decision=decision, rule=rule
        )
        if decision == "deny":  # nothing is called
            self.now += 0.02
            return
        done = {"status": 0, "stderr": "", "user": "user", "where": where}
        self.add("service", source, duration=took, **names, **done)
        for _ in range(3):
            line = (
                f"qrexec-agent[{self.chance.randrange(999)}]: {service} from {source}"
            )
            self.add("journal", target, t=self.now + took / 2, line=line)
        self.now += took + 0.01

    def memory(self):
        used = {vm: self.chance.randrange(90, 200) for vm in self.vms}
        for number in range(int(self.now * 4)):
            for vm in self.vms:
                used[vm] = max(60, min(500, used[vm] + self.chance.randrange(-30, 34)))
            holds = {vm: int(size * 1.3) + 50 for vm, size in used.items()}
            sizes = {"targets": {}, "used": dict(used), "holds": holds, "total": 4096}
            event = "refused" if number == 7 else "balance"
            self.add("memory", t=number / 4, event=event, **sizes, free=90, amount=400)


def timeline(test, outcome, vms, chance, calls=24):
    """Return the lines of a timeline as objects, the header first, and its phases."""
    sample = _Sample(chance, vms)
    for vm in vms:
        sample.start(vm)
    phases = {"setUp": sample.now}
    for number in range(calls):
        where = f"{WHERE}:{40 + number}"
        if chance.random() < 0.5 or len(vms) == 1:
            sample.run(where)
        else:
            sample.call(where, chance.choice(("allow",) * 5 + ("deny", "ask")))
    cause = ""
    if outcome in ("failed", "error"):
        cause, where = chance.choice(CAUSES), f"{WHERE}:{40 + calls}"
        broken = "rve < /home/user/words"
        said = "bash: line 1: rve: command not found\n"
        sample.run(where, command=broken, status=127, stderr=said, stdout_bytes=0)
        sample.add("failure", text=cause, where=where)
    if chance.random() < 0.02:
        sample.now += chance.uniform(10, 40)
    phases["test"] = sample.now - phases["setUp"]
    for vm in vms:
        sample.add("state", vm, state="Halting")
        sample.now += chance.uniform(0.02, 0.2)
        sample.add("state", vm, state="Halted")
    phases["tearDown"] = sample.now - phases["setUp"] - phases["test"]
    sample.memory()
    begun = itertools.accumulate(phases.values(), initial=0.0)
    sample.add("phase", t=0.0, name="call", duration=round(sample.now, 4))
    for begin, (name, seconds) in zip(begun, phases.items(), strict=False):
        sample.add("phase", t=begin, name=name, duration=round(seconds, 4))
    header = {
        "format": "qubes_itests.timeline",
        "version": 1,
        "test": test,
        "started": STARTED,
        "outcome": outcome,
        "duration": round(sample.now, 4),
        "dropped": 0,
        "vms": list(vms),
    }
    records = sorted(sample.records, key=lambda record: record["t"])
    return [header, *records], phases, cause


def earlier(number, chance):
    """Return what earlier runs of a test came to: most always passed, some are new."""
    if number % 7 == 0:
        return []
    if number % 7 != 3:
        return ["passed"] * 20
    return chance.choices(["passed", "failed", "skipped"], [6, 2, 1], k=20)


def write(directory, tests=30, vms=3, seed=1, calls=24):
    """Write the artefacts of a run into a directory, and return its run.json."""
    chance = random.Random(seed)  # noqa: S311 - it is no secret
    rows = []
    free = {"gw0": 0.5, "gw1": 0.8}  # from when a worker runs nothing
    for number in range(tests):
        name = f"TC_{number // 10:02}_Split_debian-12::test_{number % 10:02}0_encrypt"
        test, outcome = f"split::{name}", OUTCOMES[(number * 11 + seed) % len(OUTCOMES)]
        worker = min(free, key=lambda name: free[name])
        row: dict[str, object] = {"test": test, "outcome": outcome}
        row["worker"] = worker
        row["earlier"] = earlier(number, chance)
        row["started"] = STARTED + free[worker]
        if outcome == "skipped":
            more = {"duration": 0.0, "phases": {}, "artifacts": None}
            rows.append({**row, **more, "cause": "no gpg2", "where": f"{WHERE}:30"})
            continue
        lines, phases, cause = timeline(test, outcome, NAMES[:vms], chance, calls)
        folder = name.replace("::", ".")
        place = Path(directory, folder)
        place.mkdir(parents=True)
        lines[0]["started"] = row["started"]
        if number == tests // 2:
            free[worker] += IDLE
        free[worker] += lines[0]["duration"] + chance.uniform(0.01, 0.1)
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (place / "timeline.jsonl").write_text(text)
        if outcome == "flaky":
            before, _, cause = timeline(test, "failed", NAMES[:vms], chance, calls)
            (place / "attempt-1").mkdir()
            text = "".join(json.dumps(line) + "\n" for line in before)
            (place / "attempt-1" / "timeline.jsonl").write_text(text)
        if cause:
            (place / "failure.txt").write_text(cause)
            (place / f"{NAMES[0]}.console.log").write_text(
                "[    0.000000] Linux version\n"
            )
        duration = lines[0]["duration"]
        rounded = {name: round(seconds, 3) for name, seconds in phases.items()}
        where = f"{WHERE}:{40 + calls}" if cause else ""
        more = {"duration": duration, "phases": rounded, "artifacts": folder}
        if outcome == "flaky":
            more |= {"attempts": 2, "failed": 1}
        rows.append({**row, **more, "cause": cause, "where": where})
    outcomes = {row["outcome"] for row in rows}
    run = {
        "format": "qubes_itests.run",
        "version": 1,
        "started": STARTED,
        "duration": round(max(free.values()), 3),
        "command": ["./itests", "--app", ".", "-n", "2"],
        "seed": seed,
        "outcome": "failed" if outcomes & {"failed", "error"} else "passed",
        "host": {"hypervisor": "qemu, emulation", "cpus": 2, "memory": "24 GiB"},
        "tests": rows,
    }
    Path(directory, "run.json").write_text(json.dumps(run))
    return run


if __name__ == "__main__":
    write(sys.argv[1], *map(int, sys.argv[2:]))
