"""What the test back end does without, it says."""

from __future__ import annotations

import asyncio
import dataclasses
import uuid
from pathlib import Path

import pytest

from qubes_itests.host import memory
from qubes_itests.hypervisor.contract import Disk, DomainSpec, DomainState, Interface
from qubes_itests.hypervisor.exc import (
    HypervisorError,
    SavedStateError,
    StateError,
)
from qubes_itests.hypervisor.testdriver import TestHypervisor

pytestmark = pytest.mark.asyncio


def make_spec(directory):
    return DomainSpec(
        name="work",
        uuid=uuid.uuid4(),
        directory=directory,
        memory=200,
        max_memory=400,
        kernel=Path("/none"),
        initramfs=Path("/none"),
    )


async def test_what_needs_a_guest_is_refused(tmp_path):
    async with await TestHypervisor.open(tmp_path, tmp_path) as hypervisor:
        domain = await hypervisor.define(make_spec(tmp_path))
        await domain.start()
        calls = [
            domain.open_channel(asyncio.Protocol),
            domain.save(tmp_path / "state"),
            domain.freeze(tmp_path / "state"),
            domain.attach_disk(Disk("xvda", tmp_path / "image")),
            domain.detach_disk("xvda"),
            domain.resize_disk("xvda", 1 << 20),
            domain.attach_interface(Interface("00:16:3e:00:00:01", "br0")),
            domain.detach_interface("00:16:3e:00:00:01"),
        ]
        for call in calls:
            with pytest.raises(HypervisorError, match="no guest"):
                await call


async def test_no_saved_states(tmp_path):
    async with await TestHypervisor.open(tmp_path, tmp_path) as hypervisor:
        spec = make_spec(tmp_path)
        domain = await hypervisor.define(spec)
        assert await hypervisor.state_key(spec) is None
        with pytest.raises(SavedStateError):
            await domain.start(saved_state=tmp_path / "state")
        with pytest.raises(HypervisorError, match="cannot thaw"):
            await domain.thaw(tmp_path / "state")
        assert await hypervisor.machine() == {}
        assert await domain.state() is DomainState.HALTED
        await domain.start()


async def test_memory_follows_its_target(tmp_path):
    async with await TestHypervisor.open(tmp_path, tmp_path) as hypervisor:
        domain = await hypervisor.define(make_spec(tmp_path))
        await domain.start()
        await domain.set_memory_target(300 << 20)
        assert (await domain.memory_statistics()).actual == 300 << 20


async def test_connections_are_apart(tmp_path):
    """Two are open at once, and neither sees the other's domains or events."""
    one = await TestHypervisor.open(tmp_path, tmp_path)
    two = await TestHypervisor.open(tmp_path, tmp_path)
    async with one, two:
        spec, events = make_spec(tmp_path), []
        two.subscribe(lambda _domain, event: events.append(event))
        first, second = await one.define(spec), await two.define(spec)
        await first.start()
        assert await second.state() is DomainState.HALTED
        assert events == []


async def test_what_is_more_than_the_memory_that_there_is_is_refused(tmp_path):
    async with await TestHypervisor.open(tmp_path, tmp_path) as hypervisor:
        hypervisor.memory_limit = 500
        first = await hypervisor.define(named(tmp_path, "one"))
        await hypervisor.define(named(tmp_path, "two"))
        match = "needs 200 MiB; of the 500 MiB .* two holds 200 MiB, one holds 200 MiB"
        with pytest.raises(HypervisorError, match=match):
            await hypervisor.define(named(tmp_path, "three"))
        await first.undefine()
        await hypervisor.define(named(tmp_path, "three"))


async def test_without_a_limit_this_machine_must_have_room(tmp_path, monkeypatch):
    """For all of what starts, and for a quarter of what runs: VMs share most of it."""
    monkeypatch.setattr(TestHypervisor, "takes_memory", True)
    monkeypatch.setattr(memory, "available", lambda: 500)
    async with await TestHypervisor.open(tmp_path, tmp_path) as hypervisor:
        first = await hypervisor.define(named(tmp_path, "one"))
        second = await hypervisor.define(named(tmp_path, "two"))
        with pytest.raises(HypervisorError, match="of which 400 MiB are kept"):
            await hypervisor.define(named(tmp_path, "three"))
        await first.start()
        await second.start()
        await hypervisor.define(named(tmp_path, "three"))
        await hypervisor.define(named(tmp_path, "four"))
        match = (
            "needs 200 MiB; of this machine's memory 500 MiB .* 500 MiB .* one holds"
        )
        with pytest.raises(HypervisorError, match=match):
            await hypervisor.define(named(tmp_path, "five"))


async def test_of_many_that_hold_memory_those_with_most_are_named(tmp_path):
    async with await TestHypervisor.open(tmp_path, tmp_path) as hypervisor:
        hypervisor.memory_limit = 200 * 128
        for number in range(128):
            await hypervisor.define(named(tmp_path, f"vm{number}"))
        with pytest.raises(HypervisorError) as caught:
            await hypervisor.define(named(tmp_path, "last"))
        assert "vm99 holds 200 MiB" in str(caught.value)
        assert "122 others hold 24400 MiB" in str(caught.value)
        assert len(str(caught.value)) < 500


def named(directory, name):
    return dataclasses.replace(make_spec(directory), name=name)


async def test_the_power_button_ends_it(tmp_path):
    """Also where there is no kernel, as its disk would be booted."""
    spec = dataclasses.replace(make_spec(tmp_path), kernel=None, initramfs=None)
    async with await TestHypervisor.open(tmp_path, tmp_path) as hypervisor:
        domain = await hypervisor.define(spec)
        await domain.start()
        await domain.press_power_button()
        assert await domain.wait_stopped(300) is DomainState.HALTED
        with pytest.raises(StateError, match="press the power button"):
            await domain.press_power_button()


async def test_a_wait_for_its_end_that_is_cancelled_as_it_comes_is_cancelled(tmp_path):
    """`asyncio.wait_for` of Python 3.11 drops the cancellation, and a task goes on."""
    async with await TestHypervisor.open(tmp_path, tmp_path) as hypervisor:
        domain = await hypervisor.define(make_spec(tmp_path))
        await domain.start()
        waiting = asyncio.ensure_future(domain.wait_stopped(100))
        await asyncio.sleep(0)
        loop, taken = asyncio.get_running_loop(), []

        def cancel(_domain, _event):
            loop.call_soon(lambda: taken.append(waiting.cancel()))

        hypervisor.subscribe(cancel)
        await domain.destroy()
        await asyncio.wait([waiting])
        # or it had ended before
        assert taken == [waiting.cancelled()]
