"""What every back end keeps of the contract, with or without a guest."""

from __future__ import annotations

import asyncio
import dataclasses
import uuid

import pytest
import pytest_asyncio

from qubes_itests.exc import DeadlineError
from qubes_itests.hypervisor.contract import Disk, DomainState, LifecycleEvent
from qubes_itests.hypervisor.exc import HypervisorError, StateError
from qubes_itests.run.hooks import offers, registry

STARTED, STOPPED = LifecycleEvent.STARTED, LifecycleEvent.STOPPED
PAUSED, RESUMED = LifecycleEvent.PAUSED, LifecycleEvent.RESUMED


@pytest_asyncio.fixture(params=sorted(offers(registry(), "hypervisors")))
async def hypervisor(request, open_back_end):
    async with open_back_end(request.param) as opened:
        assert opened.name == request.param
        yield opened


@pytest_asyncio.fixture
async def domain(hypervisor, make_spec):
    return await hypervisor.define(make_spec())


@pytest.fixture
def events(hypervisor):
    seen = []
    hypervisor.subscribe(lambda domain, event: seen.append((domain.spec.name, event)))
    return seen


@pytest.fixture
def arrived(eventually):
    """Return a coroutine function that waits until that many events are in."""

    async def wait(events, count):
        await eventually(lambda: len(events) >= count)
        return [event for _name, event in events]

    return wait


@pytest.mark.asyncio
async def test_a_life(domain, events, arrived):
    """Each step of a domain's life changes its state and is told once, in order."""
    assert await domain.state() is DomainState.HALTED
    await domain.start()
    assert await domain.state() is DomainState.RUNNING
    await domain.pause()
    await domain.pause()
    assert await domain.state() is DomainState.PAUSED
    await domain.resume()
    await domain.resume()
    assert await domain.state() is DomainState.RUNNING
    await domain.destroy()
    await domain.destroy()
    assert await domain.state() is DomainState.HALTED
    assert await arrived(events, 4) == [STARTED, PAUSED, RESUMED, STOPPED]
    assert {name for name, _event in events} == {domain.spec.name}


@pytest.mark.asyncio
async def test_what_is_done_round_the_contract_is_seen(
    hypervisor, domain, events, arrived
):
    assert hypervisor.native.getHostname()
    assert domain.native is None
    await domain.start()
    assert domain.native.isActive()
    await asyncio.to_thread(domain.native.destroy)
    assert await domain.state() is DomainState.HALTED
    assert await arrived(events, 2) == [STARTED, STOPPED]
    assert domain.native is None


@pytest.mark.asyncio
async def test_a_handle_lasts_over_starts(domain, events, arrived):
    for _ in range(2):
        await domain.start()
        await domain.destroy()
    assert await arrived(events, 4) == [STARTED, STOPPED] * 2


@pytest.mark.asyncio
async def test_no_second_start(domain):
    await domain.start()
    with pytest.raises(StateError, match="it is Running"):
        await domain.start()
    assert await domain.state() is DomainState.RUNNING


@pytest.mark.asyncio
async def test_duplicates(hypervisor, domain, make_spec):
    taken = f"there is domain '{domain.spec.name}' of UUID {domain.spec.uuid} already"
    with pytest.raises(HypervisorError, match=taken):
        await hypervisor.define(dataclasses.replace(domain.spec, uuid=uuid.uuid4()))
    with pytest.raises(HypervisorError, match=taken):
        await hypervisor.define(make_spec(uuid=domain.spec.uuid))
    assert hypervisor.domains() == (domain,)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "change",
    [
        {"name": "../up"},
        {"name": "a\nb"},
        {"name": ""},
        {"memory": 0},
        {"memory": 200},
        {"vcpus": 0},
    ],
)
async def test_bad_specs(hypervisor, make_spec, change):
    spec = dataclasses.replace(make_spec(), **change)
    with pytest.raises(HypervisorError, match="cannot define"):
        await hypervisor.define(spec)
    assert hypervisor.domains() == ()


@pytest.mark.asyncio
async def test_undefined(hypervisor, domain):
    """An undefined domain is halted and gone, and its name is free again."""
    await domain.start()
    await domain.undefine()
    await domain.undefine()
    assert await domain.state() is DomainState.HALTED
    assert hypervisor.domains() == ()
    with pytest.raises(StateError, match="not defined"):
        await domain.start()
    again = await hypervisor.define(domain.spec)
    await again.start()
    assert await again.state() is DomainState.RUNNING


@pytest.mark.asyncio
async def test_calls_that_need_a_running_domain(domain, tmp_path):
    calls = [
        domain.pause(),
        domain.resume(),
        domain.save(tmp_path / "state"),
        domain.freeze(tmp_path / "state"),
        domain.open_channel(asyncio.Protocol),
        domain.attach_disk(Disk("xvda", tmp_path / "image")),
        domain.detach_disk("xvda"),
        domain.resize_disk("xvda", 1 << 20),
        domain.detach_interface("00:16:3e:00:00:01"),
        domain.set_memory_target(100 << 20),
        domain.cpu_time(),
        domain.memory_statistics(),
    ]
    for call in calls:
        with pytest.raises(StateError, match="not running"):
            await call
    assert list(tmp_path.iterdir()) == []


@pytest.mark.asyncio
async def test_waiting_for_a_stop(domain):
    assert await domain.wait_stopped(300) is DomainState.HALTED
    await domain.start()
    with pytest.raises(DeadlineError, match="Running"):
        await domain.wait_stopped(0.05)
    waiting = asyncio.create_task(domain.wait_stopped(300))
    await domain.destroy()
    assert await waiting is DomainState.HALTED


@pytest.mark.asyncio
async def test_memory(domain):
    await domain.start()
    statistics = await domain.memory_statistics()
    assert 0 < statistics.actual <= domain.spec.max_memory << 20
    await domain.set_memory_target(domain.spec.max_memory << 20)
    for target in (0, (domain.spec.max_memory << 20) + 4096):
        with pytest.raises(HypervisorError, match=f"expected .*, got {target} bytes"):
            await domain.set_memory_target(target)


@pytest.mark.asyncio
async def test_a_subscription_ends(hypervisor, domain, arrived):
    """A handler that was taken out is not called; one that raises hurts nobody."""
    heard, ended = [], []

    def fail(_domain, _event):
        raise RuntimeError

    hypervisor.subscribe(fail)
    end = hypervisor.subscribe(lambda _domain, event: ended.append(event))
    hypervisor.subscribe(lambda _domain, event: heard.append((None, event)))
    end()
    end()
    await domain.start()
    await arrived(heard, 1)
    assert ended == []


@pytest.mark.asyncio
async def test_closing_destroys(open_back_end, make_spec):
    for name in ("qemu", "test"):
        async with open_back_end(name) as hypervisor:
            domain = await hypervisor.define(make_spec())
            await domain.start()
        assert await domain.state() is DomainState.HALTED
        assert hypervisor.domains() == ()
        kinds = {path.name for path in domain.spec.directory.iterdir()}
        assert kinds == {"console.log"}
        with pytest.raises(HypervisorError, match="closed"):
            await hypervisor.define(make_spec())


@pytest.mark.asyncio
async def test_the_back_ends_run_beside_each_other(open_back_end, make_spec):
    async with open_back_end("qemu") as one, open_back_end("test") as two:
        spec = make_spec()
        domains = [await one.define(spec), await two.define(spec)]
        await asyncio.gather(*(domain.start() for domain in domains))
        await domains[0].destroy()
        assert await domains[1].state() is DomainState.RUNNING


@pytest.mark.asyncio
async def test_definitions_are_for_reading(domain):
    assert domain.spec.name in domain.definition()
    await domain.start()
    assert str(domain.spec.uuid) in domain.definition()
