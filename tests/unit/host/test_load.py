"""CPUs that nobody uses, or many."""

import asyncio

import pytest

from qubes_itests.host import load


def test_who_asks_does_not_count(tmp_path):
    file = tmp_path / "loadavg"
    file.write_text("3.18 2.94 2.55 4/1096 203\n")
    assert load.running(file) == 3
    assert load.running() >= 0


@pytest.mark.parametrize(("average", "delay"), [(0.5, 1), (5, 2.5), (50, 4)])
def test_things_take_longer_by_how_many_want_each_cpu(monkeypatch, average, delay):
    monkeypatch.setattr(load.os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(load.os, "getloadavg", lambda: (average, 0, 0))
    assert load.delay() == delay


@pytest.mark.asyncio
async def test_it_is_waited_for(monkeypatch):
    """A moment's rest of a busy machine is not taken for idleness."""
    monkeypatch.setattr(load, "_SOON", 0)
    monkeypatch.setattr(load, "_LATER", 0)
    monkeypatch.setattr(load.os, "sched_getaffinity", lambda _: {0, 1})
    seen = []

    def running():
        seen.append([2, 1, 0, 5, 1, 1, 1, 9][len(seen)])
        return seen[-1]

    monkeypatch.setattr(load, "running", running)
    await asyncio.wait_for(load.idle_cpu(), 300)
    assert seen == [2, 1, 0, 5, 1, 1, 1]
