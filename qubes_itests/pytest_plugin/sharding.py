"""Which tests stay together, and which of several machines has them."""

from __future__ import annotations

import hashlib
import statistics
from typing import TYPE_CHECKING, Any

import pytest

from qubes_itests.exit_codes import ExitCode
from qubes_itests.pytest_plugin.worker import PLAN, is_worker
from qubes_itests.report.heartbeat import duration

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

__all__ = ["SHARD", "Shard", "Times", "group_of", "shards"]

#: The name of the plugin.
SHARD = "qubes_itests-shard"


def group_of(item: pytest.Item) -> str:
    """Return the group of a test.

    It is that of its `xdist_group` marks; without them its class, which has its
    own VMs and fixtures; and the module for what is in no class.
    """
    names = {
        str(mark.args[0] if mark.args else mark.kwargs.get("name", "default"))
        for mark in item.iter_markers("xdist_group")
    }
    if names:
        return "_".join(sorted(names))
    owner = item.getparent(pytest.Class) or item.getparent(pytest.Module)
    return (owner or item).nodeid


class Times:
    """How long tests should take.

    :param known: the seconds that they took earlier, by id.
    """

    def __init__(self, known: Mapping[str, float]) -> None:
        self._known = known
        self._unknown = statistics.median(known.values()) if known else 1.0

    def of(self, tests: Iterable[str]) -> float:
        """Return the seconds for some tests; what has never run takes as others do."""
        return sum(self._known.get(test, self._unknown) for test in tests)


def shards(
    groups: Mapping[str, Sequence[str]], number: int, times: Times
) -> list[list[str]]:
    """Return which groups of tests each machine has, so that all take as long.

    It depends on nothing but the arguments, so that machines need not speak.

    :param groups: ids of tests, by group.
    :param number: of machines.
    """
    loads = [(0.0, n) for n in range(number)]
    plan: list[list[str]] = [[] for _ in loads]
    seconds = {name: times.of(tests) for name, tests in groups.items()}
    # the longest first, each to the machine that has least to do
    for name in sorted(groups, key=lambda name: (-seconds[name], name)):
        load, least = min(loads)
        loads[least] = (load + seconds[name], least)
        plan[least].append(name)
    return plan


class Shard:
    """A pytest plugin that leaves the tests of other machines out.

    :param number: which machine this is, from 1.
    :param of: how many there are.
    :param times: the seconds that tests took earlier, by id.
    """

    def __init__(self, number: int, of: int, times: Mapping[str, float]) -> None:
        self._number = number
        self._of = of
        #: For workers, which must not come to another plan.
        self.times = times

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        """Leave them out; what is selected otherwise is shared out."""
        groups: dict[str, list[str]] = {}
        for item in items:
            groups.setdefault(group_of(item), []).append(item.nodeid)
        times = Times(self.times)
        plan = shards(groups, self._of, times)
        told = "\n".join("\0".join(sorted(names)) for names in plan)
        if items:
            config.stash[PLAN] = hashlib.sha256(told.encode()).hexdigest()[:16]
        mine = set(plan[self._number - 1])
        total, others = len(items), [i for i in items if group_of(i) not in mine]
        items[:] = [item for item in items if group_of(item) in mine]
        config.hook.pytest_deselected(items=others)
        terminal = config.pluginmanager.get_plugin("terminalreporter")
        if terminal is not None and not is_worker(config):
            expected = duration(times.of(item.nodeid for item in items))
            about = f", about {expected}" if self.times else ""
            terminal.write_line(
                f"shard {self._number}/{self._of}: {len(items)} of {total} tests{about}"
            )

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: Any) -> None:
        """Let a machine succeed for which no test was left."""
        others = PLAN in session.config.stash
        if session.exitstatus == ExitCode.NO_TESTS_COLLECTED and others:
            session.exitstatus = ExitCode.OK
