"""Real guests that attack the harness through the agent's port, beside another VM."""

from __future__ import annotations

import hostile_guest
import pytest

#: MiB that the harness may grow by, whatever a guest does.
MOST_GROWTH = 16
SECONDS = 1.0
#: Those that differ in kind; the benchmark has more.
TRIED = ("credit", "calls", "logs", "closed", "bytes")


@pytest.fixture(scope="module")
def program():
    return hostile_guest.compile_program()


def test_no_attack_costs_much_memory_or_holds_up_another_vm(make_vm, run, program):
    """How long others take meanwhile is for hostile_guests.py to tell, a benchmark."""
    other = make_vm("other")
    run(other.start())
    growth = {}
    for attack in TRIED:
        hostile = make_vm(f"hostile-{attack}")
        run(hostile.start())
        cost = run(hostile_guest.cost(hostile, other, program, attack, seconds=SECONDS))
        growth[attack] = cost.growth
    assert max(growth.values()) < MOST_GROWTH, growth
    run(other.kill())
