"""The arithmetic: vectors of the reference, and what must hold in every state."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from memory_states import MIB, domain, free_memory, states, total

from qubes_itests.qmemman import algorithm
from qubes_itests.qmemman.decision import decide_balance, decide_balloon
from qubes_itests.qmemman.policy import DEFAULT_POLICY
from qubes_itests.qmemman.state import DomainMemory, parse_report

DOM0 = domain("0", 1024, 1736)
AT_PREFERENCE = domain("2", 4096, 4096)
UNREPORTED = domain("3", None, 4096)
ENOUGH = (
    DOM0,
    domain("1", 1024, 1536),
    AT_PREFERENCE,
    UNREPORTED,
    domain("4", 1536, 1536),
    domain("5", 512, 768, maximum=1024),
)


@pytest.mark.parametrize(
    ("report", "used"),
    [
        (b"4096", 4096 * 1024),
        (b"0", 0),
        *((text, None) for text in (None, b"", b"a4096", b"4096a", b"4096 1024")),
        *((text, None) for text in (b"4096\n", b"4096\n1024", b"-1", b"+1", b"4.0")),
        *((text, None) for text in (str(2**70).encode(), b"9" * 13, b"\xd9\xa1", b"_")),
    ],
)
def test_only_digits_that_a_machine_could_have_are_a_report(report, used):
    assert parse_report(report) == used


def test_preferred_and_needed_memory():
    dom0 = domain("0", 1024, 1024)
    assert algorithm.preferred_memory(dom0) == int(1681.2 * MIB)
    assert algorithm.preferred_memory(domain("0", 5000, 1)) == 4096 * MIB
    vm = domain("10", 1024, 1024)
    assert algorithm.preferred_memory(vm) == int(1331.2 * MIB)
    assert algorithm.needed_memory(vm) == int(307.2 * MIB)
    assert algorithm.needed_memory(domain("10", 1024, 2024)) == int(-692.800001 * MIB)
    assert algorithm.preferred_memory(domain("10", 5000, 1)) == 4096 * MIB
    assert algorithm.preferred_memory(domain("10", 10, 400)) == 200 * MIB


def test_balloon_of_the_reference():
    others = (AT_PREFERENCE, UNREPORTED)
    full = domain("1", 1024, 1536)
    assert algorithm.balloon(400 * MIB, (DOM0, full, *others)) == []
    idle = domain("1", 512, 1536)
    expected = [("0", 1794242737), ("1", 1196296014)]
    assert algorithm.balloon(400 * MIB, (DOM0, idle, *others)) == expected
    assert decide_balloon(400 * MIB, (DOM0, idle, *others)) == expected


def test_balance_of_the_reference_with_enough_memory():
    found = algorithm.preferences(ENOUGH)
    assert algorithm.balance_when_enough_memory(found, 4096 * MIB) == [
        ("0", 3068708976),
        ("1", 2548378128),
        ("2", 4294967296),
        ("4", 3537898734),
        ("5", 1073741824),
    ]


def test_balance_of_the_reference_with_low_memory():
    low = (domain("0", 1024, 768), *ENOUGH[1:])
    assert algorithm.balance(50 * MIB, low) == [("1", 1395864371), ("5", 697932185)]


def test_what_is_free_beyond_gifts_is_shared_by_preference_when_memory_is_low():
    """Who has all it may have does not count; what is asked for is not spent yet."""
    giver, full = domain("1", 400, 700), domain("3", 2000, 1024, maximum=1024)
    takers = domain("0", 1024, 1024), domain("2", 900, 600)
    found = algorithm.preferences((*takers, giver, full))
    gift = ("1", 520 * MIB)
    targets = algorithm.balance_when_low_on_memory(found, 800 * MIB)
    assert targets == [gift, ("0", 1455624004), ("2", 895027535)]
    assert algorithm.balance_when_low_on_memory(found, 100 * MIB) == [gift]


def test_markers_clear_for_who_responded_or_lacks_memory():
    def marked(**changes):
        state = dataclasses.replace(
            domain("1", 500, 1000), no_progress=True, slow_memset_react=True
        )
        state = algorithm.clear_outdated_markers(dataclasses.replace(state, **changes))
        assert state.no_progress is state.slow_memset_react
        return state.no_progress

    assert marked(last_target=700 * MIB)
    assert not marked(last_target=975 * MIB)
    assert not marked(last_target=700 * MIB, used=800 * MIB)
    assert marked(last_target=1000 * MIB, used=None)


def test_small_transfers_are_left_until_somebody_lacks_memory():
    def worth(change, used=500, free=50):
        state = domain("1", used, 800)
        targets = [("1", (800 + change) * MIB)]
        found = algorithm.preferences((state,))
        return algorithm.is_significant(targets, found, free * MIB)

    assert not worth(150)
    assert worth(151)
    assert worth(-100, free=101)
    assert not worth(14, used=700)
    assert worth(16, used=700)
    assert worth(0, free=34)


def _expected(state):
    """Return what a domain will hold that is told nothing: it may have been before."""
    late = state.actual - state.last_target > DEFAULT_POLICY.donor_tolerance
    return state.actual if late else min(state.actual, state.last_target)


@given(states(), free_memory)
@example(
    [
        DomainMemory(domid="0", used=0, maximum=1),
        DomainMemory(domid="1", used=0, actual=50 * MIB + 2, current=50 * MIB + 2),
    ],
    0,
)
def test_targets_fit_the_machine_and_each_maximum(domains, free):
    by_id = {d.domid: d for d in domains}
    targets = decide_balance(free, domains)
    after = {d.domid: _expected(d) for d in domains} | dict(targets)
    assert sum(after.values()) <= max(total(domains), total(domains) + free - 50 * MIB)
    assert all(0 <= target <= by_id[domid].maximum for domid, target in targets)


@given(states(), free_memory)
def test_who_lacks_memory_gives_none(domains, free):
    targets = dict(decide_balance(free, domains))
    asked = dict(decide_balloon(free, domains)) if free > 0 else {}
    for d in domains:
        if d.used is None:
            continue
        preferred = min(algorithm.preferred_memory(d), d.maximum)
        if d.actual < preferred:
            assert targets.get(d.domid, d.actual) >= d.actual
            assert d.domid not in asked
        assert asked.get(d.domid, preferred) >= preferred


@given(states(), free_memory)
def test_who_cannot_respond_or_has_not_reported_is_not_touched(domains, free):
    out = {d.domid for d in domains if d.used is None or d.no_progress or d.paused}
    touched = [*decide_balance(free, domains), *decide_balloon(max(free, 1), domains)]
    assert out.isdisjoint(domid for domid, _ in touched)


@given(states(), free_memory)
def test_donors_come_first_and_nobody_twice(domains, free):
    actual = {d.domid: d.actual for d in domains}
    targets = decide_balance(free, domains)
    giving = [target < actual[domid] for domid, target in targets]
    assert giving == sorted(giving, reverse=True)
    assert len({domid for domid, _ in targets}) == len(targets)


@given(states(), st.integers(1, 1 << 38))
def test_a_balloon_frees_what_was_asked_or_asks_nobody(domains, amount):
    actual = {d.domid: d.actual for d in domains}
    targets = decide_balloon(amount, domains)
    assert not targets or sum(actual[d] - t for d, t in targets) >= amount


def test_a_vm_of_less_than_the_least_preference_lets_others_rest():
    """It prefers 200 MiB and may hold 20: that is no reason to take from others."""
    small = [domain(number, 15, 20, maximum=20) for number in ("1", "2")]
    other = domain("3", 250, 380, maximum=380)
    assert decide_balance(350 * MIB, [*small, other]) == []


@settings(max_examples=50)
@given(states(), free_memory)
def test_balancing_settles_and_a_steady_state_stays(domains, free):
    """When everybody obeys, some rounds later there is nothing left to decide."""
    for _ in range(30):
        targets = dict(decide_balance(free, domains))
        if not targets:
            break
        before = total(domains)
        domains = [
            dataclasses.replace(d, actual=t, current=t, last_target=t)
            if (t := targets.get(d.domid)) is not None
            else d
            for d in domains
        ]
        free += before - total(domains)
    assert decide_balance(free, domains, DEFAULT_POLICY) == []
