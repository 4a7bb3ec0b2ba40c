"""The arithmetic of qmemman by the names of Qubes OS: `qubes.qmemman`."""

from __future__ import annotations

import pytest

from qubes_itests.import_alias import qmemman as names
from qubes_itests.qmemman import algorithm
from qubes_itests.qmemman.sizes import MIB


def domain(domid, used, actual, maximum=4096):
    state = names.DomainState(domid)
    state.mem_used = None if used is None else used * MIB
    state.mem_actual = state.mem_current = actual * MIB
    state.mem_max = maximum * MIB
    return state


@pytest.fixture
def domains():
    """One with much to spare, one with some, one with nothing, one unknown."""
    each = (
        domain("0", 1024, 1736),
        domain("1", 512, 1536),
        domain("2", 4096, 4096),
        domain("3", None, 4096),
        domain("5", 512, 400, maximum=1024),
    )
    return {d.domid: d for d in each}


def test_a_new_domain_has_said_nothing():
    state = names.DomainState("7")
    assert (state.domid, state.mem_current, state.last_target) == ("7", 0, 0)
    assert (state.mem_actual, state.mem_max, state.mem_used) == (None, None, None)
    assert not any((state.use_hotplug, state.no_progress, state.slow_memset_react))


def test_reports():
    state = names.DomainState("7")
    names.refresh_meminfo_for_domain(state, b"4096")
    assert state.mem_used == 4096 * 1024
    assert names.sanitize_and_parse_meminfo(b"4096") == 4096 * 1024
    for nonsense in (b"", None, b"a4096", b"4096 1024", b"4096\n1024", b"-1"):
        assert names.sanitize_and_parse_meminfo(nonsense) is None


def test_what_a_domain_prefers_and_lacks():
    assert names.pref_mem(domain("0", 1024, 0)) == int(1681.2 * MIB)
    assert names.pref_mem(domain("10", 1024, 0)) == int(1331.2 * MIB)
    assert names.needed_mem(domain("10", 1024, 1024)) == int(307.2 * MIB)


def test_the_vectors_of_the_reference(domains):
    del domains["5"]
    expected = [("0", 1794242737), ("1", 1196296014)]
    assert names.balloon(400 * MIB, domains) == expected
    domains["1"].no_progress = True
    assert names.balloon(400 * MIB, domains) == []


@pytest.mark.parametrize("free", [-500, 0, 50, 3000, 9000])
def test_balance_is_that_of_the_algorithm(domains, free):
    memories = [d.memory() for d in domains.values()]
    expected = algorithm.balance(free * MIB, memories)
    assert names.balance(free * MIB, domains) == expected
    found = algorithm.preferences(memories)
    if (available := found.available(free * MIB)) > 0:
        given = names.balance_when_enough_mem(domains, 0, found.total, available)
    else:
        lacking = ["5"]
        others = [domid for domid in domains if domid not in lacking]
        given = names.balance_when_low_on_mem(domains, free * MIB, 0, others, lacking)
    assert sorted(given) == sorted(expected)


def test_who_is_not_named_is_left_alone(domains):
    given = names.balance_when_low_on_mem(domains, 0, 0, ["1"], ["5"])
    assert {domid for domid, _ in given} <= {"1", "5"}


def test_what_a_decision_is_based_on(domains):
    """By the numbers of Qubes OS' policy, which have its names too."""
    domains["1"].no_progress = True
    preferred = {domid: names.pref_mem(domains[domid]) for domid in ("0", "2", "5")}
    assert names.mem_info(50 * MIB, domains) == {
        "dom_dict": domains,
        "total_available_mem": 50 * MIB
        - sum(names.needed_mem(domains[domid]) for domid in preferred),
        "xen_free_mem": 50 * MIB,
        "total_mem_pref": sum(preferred.values()),
        "total_mem_pref_acceptors": preferred["5"],
        "donors": ["0", "2"],
        "acceptors": ["5"],
    }
    assert (names.CACHE_FACTOR, names.REQ_SAFETY_NET_FACTOR) == (1.3, 1.05)
    assert (names.MIN_PREFMEM, names.DOM0_MEM_BOOST) == (200 * MIB, 350 * MIB)
