"""What is believed of a guest's statistics, and what a domain counts as holding."""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qubes_itests.balloons import BalloonedGuest, used_memory
from qubes_itests.hypervisor.contract import DomainSpec, MemoryStatistics
from qubes_itests.hypervisor.exc import StateError
from qubes_itests.qmemman.state import parse_report

MIB = 1 << 20
MAXIMUM = 2000 * MIB

#: An idle guest of 400 MiB.
IDLE = MemoryStatistics(
    actual=400 * MIB,
    total=330 * MIB,
    unused=298 * MIB,
    available=290 * MIB,
    cached=2 * MIB,
    updated=1,
)
SPEC = DomainSpec(
    name="one",
    uuid=uuid.uuid4(),
    directory=Path("/"),
    memory=400,
    max_memory=2000,
    kernel=Path("/kernel"),
    initramfs=Path("/initramfs"),
)


@pytest.fixture(autouse=True)
def asked_often(monkeypatch):
    for name in ("_INTERVAL", "_INTERVAL_MOVING"):
        monkeypatch.setattr(f"qubes_itests.balloons.{name}", 0.01)


def test_used_memory():
    """What could be given away counts, and what the guest's kernel does not see."""
    assert used_memory(IDLE, 70 * MIB, MAXIMUM) == (70 + 330 - 290) * MIB
    assert used_memory(replace(IDLE, available=None), 0, MAXIMUM) == 30 * MIB


def test_a_tmpfs_is_not_cache():
    full = replace(IDLE, unused=98 * MIB, cached=202 * MIB, available=90 * MIB)
    assert used_memory(full, 0, MAXIMUM) == 240 * MIB


@pytest.mark.parametrize(
    "lie",
    [
        {"total": None},
        {"unused": None},
        {"total": -1},
        {"unused": -4096},
        {"cached": -1},
        {"unused": 331 * MIB},
        {"cached": 300 * MIB},
        {"total": 1 << 70},
        {"total": 1 << 70, "unused": 1 << 69},
    ],
)
def test_absurd_statistics_say_nothing(lie):
    assert used_memory(replace(IDLE, **lie), 0, MAXIMUM) is None


_ANY = st.one_of(st.none(), st.integers(-(1 << 71), 1 << 71), st.integers(0, MAXIMUM))


@given(_ANY, _ANY, _ANY, _ANY, st.integers(0, MAXIMUM))
def test_what_is_believed_is_possible(total, unused, available, cached, unseen):
    lies = MemoryStatistics(0, total, unused, available, cached)
    used = used_memory(lies, unseen, MAXIMUM)
    assert used is None or 0 <= used <= MAXIMUM


class Scripted:
    """A domain that says what the test wants; it may hang."""

    def __init__(self, spec=SPEC):
        self.spec = spec
        self.statistics = IDLE
        self.targets = []
        self.answers = asyncio.Event()
        self.answers.set()
        self.calls = 0

    async def memory_statistics(self):
        self.calls += 1
        await self.answers.wait()
        if self.statistics is None:
            raise StateError("one", "read the memory of", "it is not running")
        return self.statistics

    async def set_memory_target(self, target):
        await self.answers.wait()
        self.targets.append(target)


class Watched:
    """A guest whose domain is scripted."""

    def __init__(self, spec=SPEC):
        self.domain = Scripted(spec)
        self.reports = []
        self.guest = BalloonedGuest("1", self.domain, self.reports.append)

    async def __aenter__(self):
        self.guest.begin()
        return self

    async def __aexit__(self, *_exc):
        self.guest.end()

    async def see(self, **changes):
        """Have the guest write other statistics, and wait until they are seen."""
        if changes:
            updated = (self.domain.statistics.updated or 0) + 1
            self.domain.statistics = replace(
                self.domain.statistics, **{"updated": updated, **changes}
            )
        calls = self.domain.calls
        async with asyncio.timeout(300):
            while self.domain.calls < calls + 2:  # noqa: ASYNC110 - it is polled
                await asyncio.sleep(0.01)

    @property
    def held(self):
        return self.guest.reading().current // MIB


@pytest.mark.asyncio
async def test_a_cold_guest_holds_what_it_was_promised():
    """Until its balloon is up it has everything, and is neither counted nor heard."""
    async with Watched() as watched:
        for actual in (2000, 1200, 500):
            await watched.see(actual=actual * MIB, total=(actual - 70) * MIB)
            assert (watched.held, watched.reports) == (400, [])
        await watched.see(actual=400 * MIB, total=330 * MIB)
        assert watched.held == 400
        assert len(watched.reports) == 1


@pytest.mark.asyncio
async def test_reports_are_of_one_moment():
    """Statistics from before the balloon moved are not set against what it has now."""
    async with Watched() as watched:
        await watched.see()
        await watched.see(actual=300 * MIB, updated=1)
        assert [parse_report(r) // MIB for r in watched.reports] == [110]
        await watched.see(total=230 * MIB, unused=198 * MIB, available=190 * MIB)
        assert len(watched.reports) == 1


@pytest.mark.asyncio
async def test_reports_when_it_matters():
    """It is told when it moved by 30,000 kB, and when it stops making sense."""
    async with Watched() as watched:
        await watched.see(available=285 * MIB)
        await watched.see(available=270 * MIB)
        assert len(watched.reports) == 1
        await watched.see(available=200 * MIB)
        assert parse_report(watched.reports[-1]) == 200 * MIB
        await watched.see(unused=1 << 70)
        await watched.see(unused=1 << 71)
        assert [parse_report(report) for report in watched.reports[2:]] == [None]
        await watched.see(unused=IDLE.unused)
        assert parse_report(watched.reports[-1]) == 200 * MIB
        assert len(watched.reports) == 4


@pytest.mark.asyncio
async def test_a_guest_takes_no_more_than_its_limit():
    """One that unloads its balloon has all it may have, and counts what it had."""
    async with Watched() as watched:
        await watched.see()
        await watched.see(actual=2000 * MIB)
        assert watched.held == 400
        watched.guest.order(300 * MIB, 301 * MIB)
        await watched.see()
        assert watched.held == 400
        await watched.see(actual=300 * MIB)
        assert watched.held == 300
        watched.guest.order(600 * MIB, 601 * MIB)
        await watched.see(actual=2000 * MIB)
        assert watched.held == 601


@pytest.mark.asyncio
async def test_a_guest_that_is_not_balanced_says_nothing():
    async with Watched(replace(SPEC, max_memory=400, balanced=False)) as watched:
        await watched.see()
        assert (watched.held, watched.reports) == (400, [])


@pytest.mark.asyncio
async def test_a_domain_that_hangs_costs_one_call():
    """It keeps its last reading, and gets the last of its targets when it is back."""
    async with Watched() as watched:
        await watched.see()
        watched.domain.answers.clear()
        calls = watched.domain.calls
        for target in (390, 380, 370):
            watched.guest.order(target * MIB, (target + 1) * MIB)
            await asyncio.sleep(0.15)
        assert watched.domain.calls <= calls + 1
        assert (watched.held, watched.guest.reading().target) == (400, 370 * MIB)
        watched.domain.answers.set()
        await watched.see(actual=370 * MIB)
        assert watched.domain.targets[-1] == 370 * MIB
        assert watched.held == 370


@pytest.mark.asyncio
async def test_a_domain_that_does_not_run_yet_is_asked_again():
    async with Watched() as watched:
        watched.domain.statistics = None
        await watched.see()
        assert watched.reports == []
        watched.domain.statistics = IDLE
        await watched.see()
        assert len(watched.reports) == 1
