"""Which tests stay together on one worker, and how the controller learns of it."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from xdist.scheduler import LoadScopeScheduling

from qubes_itests.pytest_plugin.sharding import Times, group_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import pytest
    from xdist.workermanage import WorkerController

__all__ = ["GroupScheduling", "with_groups"]

#: Between a test's id and its group; in neither.
_MARK = "\0"


class _Told:
    """A test whose id tells its group as well."""

    def __init__(self, item: pytest.Item) -> None:
        self._item = item
        self.nodeid = f"{item.nodeid}{_MARK}{group_of(item)}"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._item, name)


@contextlib.contextmanager
def with_groups(session: pytest.Session) -> Iterator[None]:
    """Have the ids of a session's tests tell their groups, while the context lasts.

    The ids are all that a worker of pytest-xdist tells of its tests before they run.
    """
    items = session.items
    session.items = [_Told(item) for item in items]  # type: ignore[misc]
    try:
        yield
    finally:
        session.items = items


class GroupScheduling(LoadScopeScheduling):  # type: ignore[misc] # has no types
    """Gives a worker the tests of a group, in their order, and none of them twice.

    The group that should take longest goes first, so that the last ones, which end the
    run, are short. Its base counts tests for that, and hands a test that ended its
    worker to the next one, which it ends too.

    :param config: pytest's.
    :param log: of pytest-xdist.
    :param times: the seconds that tests took earlier, by id.
    """

    def __init__(
        self, config: pytest.Config, log: Any, times: Mapping[str, float]
    ) -> None:
        super().__init__(config, log)
        self._groups: dict[str, str] = {}
        self._times = Times(times)

    def add_node_collection(
        self, node: WorkerController, collection: Sequence[str]
    ) -> None:
        """Take note of what a worker has collected."""
        told = [name.rpartition(_MARK) for name in collection]
        self._groups.update({test: group for test, _, group in told})
        super().add_node_collection(node, [test for test, _, _ in told])

    def remove_node(self, node: WorkerController) -> str | None:
        """Give what a worker has left to others; return the test that it died of."""
        work = self.assigned_work.pop(node)
        left = (unit for unit in work.values() if not all(unit.values()))
        ended = None
        for unit in left:
            if ended is None:
                ended = next(test for test, done in unit.items() if not done)
                unit[ended] = True
        self.workqueue.update(
            {group: unit for group, unit in work.items() if not all(unit.values())}
        )
        for other in self.nodes:
            # Who takes the place of another has to collect first.
            if ended is not None and other in self.registered_collections:
                self._reschedule(other)
        return ended

    def _assign_work_unit(self, node: WorkerController) -> None:
        if self.config.option.loadscopereorder:
            # the first of equals, as they were collected
            longest = max(
                self.workqueue, key=lambda group: self._times.of(self.workqueue[group])
            )
            self.workqueue.move_to_end(longest, last=False)
        super()._assign_work_unit(node)

    def _split_scope(self, nodeid: str) -> str:
        return self._groups[nodeid]
