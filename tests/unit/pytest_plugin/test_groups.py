"""Which tests stay on one worker, and what becomes of those of one that ended."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from xdist.remote import Producer

from qubes_itests.pytest_plugin.groups import GroupScheduling, with_groups
from qubes_itests.pytest_plugin.sharding import group_of

SUITE = """
import pytest
from xdist.remote import Producer

class TestOne:
    def test_1(self): pass
    class TestInner:
        def test_2(self): pass

@pytest.mark.xdist_group("both")
class TestMarked:
    def test_3(self): pass
    @pytest.mark.xdist_group(name="more")
    def test_4(self): pass

@pytest.mark.parametrize("value", ["a::b", "]@"])
def test_5(value): pass
"""


class Recorder:
    """A pytest plugin that remembers what was collected."""

    def pytest_configure(self, config):
        config.addinivalue_line("markers", "xdist_group: of tests")

    def pytest_collection_finish(self, session):
        self.items = session.items
        self.groups = {item.name: group_of(item) for item in session.items}
        plain = [item.nodeid for item in session.items]
        with with_groups(session):
            self.told = [item.nodeid for item in session.items]
            self.names = [item.name for item in session.items]
        assert [item.nodeid for item in session.items] == plain


@pytest.fixture
def collected(tmp_path):
    (tmp_path / "test_suite.py").write_text(SUITE)
    recorder = Recorder()
    words = ["--collect-only", "-c", "/dev/null", "--rootdir", str(tmp_path)]
    words += ["-p", "no:cacheprovider", "-p", "no:terminal", "-p", "no:asyncio"]
    words += ["--import-mode", "importlib"]
    assert pytest.main([*words, str(tmp_path)], [recorder]) == 0
    return recorder


def test_the_group_is_mark_or_class_or_module(collected):
    assert collected.groups == {
        "test_1": "test_suite.py::TestOne",
        "test_2": "test_suite.py::TestOne::TestInner",
        "test_3": "both",
        "test_4": "both_more",
        "test_5[a::b]": "test_suite.py",
        "test_5[]@]": "test_suite.py",
    }


class Node:
    """A worker that notes what it is given."""

    def __init__(self, name):
        self.gateway = SimpleNamespace(id=name)
        self.shutting_down = False
        self.given = []

    def send_runtest_some(self, indices):
        self.given.append(indices)

    def shutdown(self):
        self.shutting_down = True


def scheduling(*nodes, **times):
    option = SimpleNamespace(loadscopereorder=True)
    tx = ["popen"] * len(nodes)
    config = SimpleNamespace(option=option, getvalue=lambda _name: tx)
    made = GroupScheduling(config, Producer("silent", enabled=False), times)
    for node in nodes:
        made.add_node(node)
    return made


def of_groups(*sizes):
    """Return ids of tests as workers tell them: so many in each group."""
    return [
        f"{group}::{n}\0{group}"
        for group, size in enumerate(sizes)
        for n in range(size)
    ]


def test_each_group_goes_to_one_worker_in_its_order(collected):
    one, two = Node("one"), Node("two")
    schedule = scheduling(one, two)
    for node in (one, two):
        schedule.add_node_collection(node, collected.told)
    schedule.schedule()
    given = one.given + two.given
    at = collected.names.index
    assert [at("test_5[a::b]"), at("test_5[]@]")] in given
    assert sum(len(indices) == 1 for indices in given) == 3
    assert one.given
    assert two.given


def test_a_test_that_ended_its_worker_is_told_and_not_run_again():
    one, two, replacing = Node("one"), Node("two"), Node("replacing")
    schedule = scheduling(one, two)
    for node in (one, two):
        schedule.add_node_collection(node, of_groups(3, 3))
    schedule.schedule()
    schedule.mark_test_complete(one, 0)
    # it is there, and has not collected yet
    schedule.add_node(replacing)
    assert schedule.remove_node(one) == "0::1"
    assert replacing.given == []
    schedule.add_node_collection(replacing, of_groups(3, 3))
    schedule.schedule()
    assert replacing.given == [[2]]
    assert two.given == [[3, 4, 5]]


def test_a_worker_that_has_done_all_leaves_nothing_to_others():
    one, two = Node("one"), Node("two")
    schedule = scheduling(one, two)
    for node in (one, two):
        schedule.add_node_collection(node, of_groups(1, 1))
    schedule.schedule()
    schedule.mark_test_complete(one, 0)
    assert schedule.remove_node(one) is None
    assert two.given == [[1]]


def test_what_took_longest_goes_first_and_the_unknown_counts_as_the_median():
    one = Node("one")
    schedule = scheduling(one, **{"0::0": 1.0, "2::0": 9.0, "3::0": 3.0})
    schedule.add_node_collection(one, of_groups(1, 2, 1, 1))
    schedule.schedule()
    for test in (3, 1, 2, 4):
        schedule.mark_test_complete(one, test)
    assert one.given == [[3], [1, 2], [4], [0]]
