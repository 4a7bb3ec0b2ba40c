"""Tests shared out to machines: all of them, none twice, and as long on each."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from qubes_itests.pytest_plugin.sharding import Times, shards

GROUPS = st.dictionaries(st.text("abc", max_size=3), st.just(["x"]), max_size=20)


@given(GROUPS, st.integers(1, 6), st.randoms())
def test_each_group_is_on_one_machine_whatever_the_order(groups, number, random):
    plan = shards(groups, number, Times({}))
    assert sorted(name for part in plan for name in part) == sorted(groups)
    assert len(plan) == number
    names = list(groups)
    random.shuffle(names)
    assert shards({n: groups[n] for n in names}, number, Times({})) == plan
    sizes = [len(part) for part in plan]
    assert max(sizes) - min(sizes) <= 1


def test_machines_take_as_long_as_far_as_is_known():
    groups = {"long": ["l"], "a": ["a1", "a2"], "b": ["b1"], "new": ["n"]}
    times = Times({"l": 10.0, "a1": 3.0, "a2": 3.0, "b1": 2.0})
    assert shards(groups, 2, times) == [["long"], ["a", "new", "b"]]
