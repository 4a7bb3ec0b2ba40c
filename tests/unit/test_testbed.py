"""The testbed when something fails on the way in."""

from __future__ import annotations

import pytest

from qubes_itests.host.cache import Cache
from qubes_itests.portal import Portal
from qubes_itests.run.testbed import Parts, Testbed


class Connection:
    """What the testbed calls of a hypervisor before the first VM."""

    def __init__(self) -> None:
        self.done: list[str] = []

    def subscribe(self, _listener):
        return lambda: self.done.append("unsubscribed")

    async def close(self) -> None:
        self.done.append("closed")


def test_what_it_had_opened_is_closed_when_a_later_step_fails(tmp_path):
    connection = Connection()

    async def connect():
        return connection

    # where the sockets of clones ahead are to be
    (tmp_path / "ahead").touch()
    with Portal() as portal:
        parts = Parts(
            tmp_path,
            tmp_path / "pool",
            Cache(tmp_path / "cache"),
            connect,
            {},
            clones_ahead=1,
        )
        testbed = Testbed(portal, parts)
        with pytest.raises(FileExistsError), testbed:
            pass
        assert connection.done == ["unsubscribed", "closed"]
