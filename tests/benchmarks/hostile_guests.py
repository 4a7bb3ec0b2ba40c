"""What guests that attack the harness through the agent's port cost it.

Run: ``.venv/bin/python tests/benchmarks/hostile_guests.py [SECONDS [ATTACK…]]``

For each attack there is a real VM, whose root attacks for so long (60 s), and another
VM that runs `true` again and again.
"""

from __future__ import annotations

import sys
from pathlib import Path

from bench import app_on, row, testbed

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import hostile_guest


def start(app, run, name):
    """Make a VM and start it."""
    vm = app.add_new_vm("AppVM", name=name, label="red")
    run(vm.create_on_disk())
    run(vm.start())
    return vm


def main():
    """Measure and print."""
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 60
    program = hostile_guest.compile_program()
    with testbed() as bed, app_on(bed) as app:
        run = bed.portal.run
        other = start(app, run, "other")
        for attack in sys.argv[2:] or hostile_guest.ATTACKS:
            hostile = start(app, run, f"hostile-{attack}")
            cost = run(
                hostile_guest.cost(hostile, other, program, attack, seconds=seconds)
            )
            print(f"\n{attack}: {hostile_guest.ATTACKS[attack]}")
            row("growth of the harness", [cost.growth], "MiB", "< 16 MiB")
            row("true, usually", [1000 * t for t in cost.usual], "ms")
            row("true, meanwhile", [1000 * t for t in cost.meanwhile], "ms")
            row("slower by", [cost.ratio], "", "< 3")
        run(other.kill())


if __name__ == "__main__":
    main()
