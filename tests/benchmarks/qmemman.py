"""How quick decisions about memory are, and how good.

Run: ``.venv/bin/python tests/benchmarks/qmemman.py [--all]``

``--all`` replays 1,000 VMs for an hour too.  The exit status is 1 when the quality of
the decisions is worse than it was.
"""

from __future__ import annotations

import random
import sys

from bench import heading, row, seconds
from memory_replay import replay
from memory_traces import generate

from qubes_itests.qmemman.decision import decide_balance
from qubes_itests.qmemman.state import DomainMemory

MIB = 1024**2
MEMORY_PER_VM = 800
#: What a quarter of an hour of 100 VMs must not be worse than, by MiB for each VM:
#: fairness, bytes moved per byte needed, time below preference.  A replay gives the
#: same numbers on every machine, so the bounds lie one percent beside them.
GATES = {600: (0.949, 0.798, 0.162), MEMORY_PER_VM: (0.988, 4.04, 0.0095)}


def domains(count):
    """Return VMs, half of which lack memory."""
    chance = random.Random(count)  # noqa: S311 - repeatable, not secret
    sizes = [chance.randrange(200, 3000) * MIB for _ in range(count)]
    return [
        DomainMemory(
            domid=str(number),
            used=chance.randrange(100, 2000) * MIB,
            actual=size,
            current=size,
            maximum=4000 * MIB,
            last_target=size,
        )
        for number, size in enumerate(sizes)
    ]


def decisions():
    """Print how long one decision takes, with little and with enough memory."""
    heading("One decision")
    for count, bound in ((10, 0.04), (1000, 2.5), (10000, 30)):
        states = domains(count)
        for name, free in (("low", 0), ("enough", count * 3000 * MIB)):
            times = [
                1000 * seconds(decide_balance, free, states)
                for _ in range(max(15, 3000 // count))
            ]
            if count == 10:
                times, unit, limit = [1000 * time for time in times], "us", "< 40 us"
            else:
                unit, limit = "ms", f"< {bound:g} ms"
            row(f"{count} domains, {name} memory", times, unit=unit, bound=limit)


def quality(count, length, each=MEMORY_PER_VM):
    """Replay a trace, print what came of it, and return it."""
    trace = generate(count, length, 1)
    verdicts = []
    taken = seconds(
        lambda: verdicts.append(replay(trace, count * each * MIB, judge_every=60))
    )
    verdict = verdicts[0]
    heading(f"{count} VMs over {length} s, {each} MiB each")
    row("time", [taken], bound="< 30 s")
    row("fairness", [verdict.fairness], unit="")
    row("moved per needed", [verdict.thrash], unit="")
    row("time below preference", [100 * verdict.below], unit="%")
    row("decisions", [verdict.decisions], unit="")
    return verdict


def main():
    """Measure, print and judge."""
    decisions()
    worse = False
    for each, (fairness, thrash, below) in GATES.items():
        verdict = quality(100, 900, each)
        worse |= verdict.fairness < fairness
        worse |= verdict.thrash > thrash or verdict.below > below
    if "--all" in sys.argv:
        quality(1000, 3600)
    sys.exit("the decisions are worse than they were" if worse else 0)


if __name__ == "__main__":
    main()
