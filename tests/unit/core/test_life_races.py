"""The life cycle under races: each run ends once, before the next one begins."""

import asyncio
import contextlib
import itertools
import re

import pytest
import pytest_asyncio
from scripted_app import make_app, make_vm

from qubes_itests.core import exc
from qubes_itests.exc import HarnessError
from qubes_itests.hypervisor.contract import DomainState, LifecycleEvent

SEEDS = 200

#: What one VM may fire, in letters: see `LETTERS`.
GRAMMAR = re.compile(r"(p(f|sf|sSf|sS[^pfsSxX]*xX))*")
LETTERS = {
    "domain-pre-start": "p",
    "domain-start-failed": "f",
    "domain-spawn": "s",
    "domain-start": "S",
    "domain-stopped": "x",
    "domain-shutdown": "X",
    "domain-pre-shutdown": "d",
    "domain-shutdown-failed": "D",
}


def letters(events):
    return "".join(LETTERS.get(event, "~") for event in events)


@pytest_asyncio.fixture
async def app(tmp_path):
    return await make_app(tmp_path)


def record(vm, random):
    """Note the events of a VM when all of their handlers are done, and dawdle."""
    seen, pending = [], []

    async def note(_vm, event, **_):
        assert not pending, f"{event} while {pending} is being dispatched"
        if event in LETTERS and not event.startswith("domain-pre-shut"):
            pending.append(event)
        try:
            for _ in range(random.randrange(4)):
                await asyncio.sleep(0)
        finally:  # a start that is killed
            seen.append(event)
            pending.clear()

    for event in LETTERS:
        if "shutdown-failed" not in event and "pre-shutdown" not in event:
            vm.add_handler(event, note)
    return seen


async def lose_caller(call):
    task = asyncio.ensure_future(call)
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])


def end(vm, state):
    if vm.domain is not None:
        vm.domain.end(state)


async def storm(vm, random):
    for _ in range(random.randrange(20)):
        if vm.domain is not None:
            event = random.choice(list(LifecycleEvent))
            vm.app.hypervisor.publish(vm.domain, event)
        await asyncio.sleep(0)


def actions(vm, random):
    """Return what may happen to a VM."""

    async def inside():
        end(vm, DomainState.HALTED)

    async def crash():
        end(vm, DomainState.CRASHED)

    return [
        vm.start,
        vm.start,
        vm.start,
        lambda: lose_caller(vm.start()),
        lambda: lose_caller(vm.kill()),
        vm.kill,
        vm.shutdown,
        lambda: vm.shutdown(wait=True, timeout=1),
        vm.restart,
        vm.pause,
        vm.unpause,
        vm.suspend,
        vm.resume,
        inside,
        crash,
        lambda: storm(vm, random),
    ]


async def settle(vm):
    while vm.is_starting() or not vm.is_halted():
        try:
            await vm.kill()
        except exc.QubesVMNotStartedError:
            await asyncio.sleep(0)
    await vm.wait_ended(5)


async def begun(vm, event):
    """Wait until a VM gets as far as an event, or a while."""
    reached = asyncio.Event()

    def note(*_, **__):
        reached.set()

    vm.add_handler(event, note)
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(reached.wait(), 0.05)
    vm.remove_handler(event, note)


async def interleave(vm, random):
    hypervisor = vm.app.hypervisor

    async def one():
        if random.random() < 0.7:
            await begun(vm, random.choice(list(LETTERS)))
        for _ in range(random.randrange(40)):
            await asyncio.sleep(0)
        # an error says that the VM was in another state; the rest fails the test
        with contextlib.suppress(exc.QubesException, HarnessError):
            await random.choice(actions(vm, random))()

    hypervisor.failing = {"enter"} if random.random() < 0.1 else set()
    await asyncio.gather(*(one() for _ in range(random.randrange(4, 16))))
    hypervisor.failing = set()
    await settle(vm)


@pytest.mark.asyncio
async def test_each_run_ends_once_in_200_random_interleavings(app):
    """Start, shutdown, kill, crash, pause, restart, in any order and at any moment."""
    random = app.hypervisor.random
    vm = await make_vm(app, "AppVM", "work")
    seen = record(vm, random)
    runs = 0
    for seed in range(SEEDS):
        seen.clear()
        random.seed(seed)
        async with asyncio.timeout(20):
            await interleave(vm, random)
        told = letters(seen)
        assert GRAMMAR.fullmatch(told), f"seed {seed}: {told}"
        assert vm.get_power_state() == "Halted", f"seed {seed}"
        assert app.hypervisor.domains() == (), f"seed {seed}"
        assert not any(v.is_dirty() for v in vm.volumes.values()), f"seed {seed}"
        assert app.problems == [], f"seed {seed}"
        runs += told.count("X")
        # it is as good as new
        await vm.start()
        await vm.kill()
    assert runs > SEEDS / 2, "the interleavings do not get far"
    assert len(asyncio.all_tasks()) == 1


@pytest.mark.asyncio
async def test_a_caller_that_gives_up_does_not_end_the_start_of_others(app):
    vm = await make_vm(app, "AppVM", "work")
    impatient, patient = (asyncio.ensure_future(vm.start()) for _ in range(2))
    await asyncio.sleep(0)
    impatient.cancel()
    assert await patient is vm
    assert vm.get_power_state() == "Running"
    await vm.kill()


@pytest.mark.asyncio
async def test_all_callers_hear_that_a_start_was_killed(app):
    vm = await make_vm(app, "AppVM", "work")
    failures = []
    vm.add_handler("domain-start-failed", lambda *_, reason: failures.append(reason))
    for turns in itertools.count():
        starting = [asyncio.ensure_future(vm.start()) for _ in range(2)]
        for _ in range(turns * 7):
            await asyncio.sleep(0)
        if starting[0].done():
            break
        await asyncio.gather(vm.kill(), vm.kill())
        results = await asyncio.gather(*starting, return_exceptions=True)
        assert all(isinstance(r, exc.QubesVMError) for r in results), results
        assert "killed" in str(results[0])
        assert app.hypervisor.domains() == ()
    assert 0 < len(failures) <= turns
    await vm.kill()


@pytest.mark.asyncio
async def test_a_failed_start_is_told_once_and_leaves_no_trace(app):
    vm = await make_vm(app, "AppVM", "work")
    seen = record(vm, app.hypervisor.random)
    app.hypervisor.failing = {"start"}
    with pytest.raises(exc.QubesVMStartError, match="could not start its domain"):
        await vm.start()
    assert letters(seen) == "pf"
    assert vm.is_halted()
    assert app.hypervisor.domains() == ()
    assert not any(v.is_dirty() for v in vm.volumes.values())
    app.hypervisor.failing = set()
    await vm.start()
    await vm.kill()


@pytest.mark.asyncio
async def test_an_end_that_fails_is_told_all_the_same(app):
    """A handler raises: the run has ended, and the others hear of it."""
    vm = await make_vm(app, "AppVM", "work")
    seen = record(vm, app.hypervisor.random)

    def object_(*_, **__):
        raise RuntimeError("not now")

    vm.add_handler("domain-stopped", object_)
    await vm.start()
    with pytest.raises(RuntimeError):
        await vm.kill()
    assert letters(seen) == "psSxX"
    assert app.problems == ["VM work: not now"]
    vm.remove_handler("domain-stopped", object_)
    await vm.start()
    await vm.kill()


@pytest.mark.asyncio
async def test_veto_of_a_start(app):
    vm = await make_vm(app, "AppVM", "work")
    failures = []
    vm.add_handler("domain-start-failed", lambda *_, reason: failures.append(reason))

    def veto(*_, **__):
        raise exc.QubesValueError("not today")

    vm.add_handler("domain-pre-start", veto)
    with pytest.raises(exc.QubesValueError, match="not today"):
        await vm.start()
    assert failures == ["not today"]
    assert vm.is_halted()


@pytest.mark.asyncio
async def test_handlers_may_use_the_vm_that_starts(app):
    """They would wait for themselves otherwise."""
    vm = await make_vm(app, "AppVM", "work")
    seen = []

    async def use(vm, *_, **__):
        await vm.start()
        await asyncio.gather(vm.run_for_stdio("true", autostart=True))
        seen.append(vm.get_power_state())

    vm.add_handler("domain-start", use)
    async with asyncio.timeout(5):
        await vm.start()
    assert seen == ["Running"]
    await vm.kill()


@pytest.mark.asyncio
async def test_a_handler_of_the_end_cannot_wait_for_the_next_start(app):
    vm = await make_vm(app, "AppVM", "work")
    later = []

    async def again(vm, *_, **__):
        vm.remove_handler("domain-shutdown", again)
        later.append(asyncio.ensure_future(vm.start()))
        await vm.start()

    vm.add_handler("domain-shutdown", again)
    await vm.start()
    async with asyncio.timeout(5):
        with pytest.raises(exc.QubesVMError, match="in a task of its own"):
            await vm.kill()
        await later[0]
    assert vm.get_power_state() == "Running"
    await vm.kill()


@pytest.mark.asyncio
async def test_pause_of_a_vm_that_ends_meanwhile(app):
    """Its state is not that of the run before."""
    vm = await make_vm(app, "AppVM", "work")
    await vm.start()

    async def die(vm, *_, **__):
        vm.domain.end()
        await vm.wait_ended(5)

    vm.add_handler("domain-pre-paused", die)
    with pytest.raises(exc.QubesVMNotRunningError):
        await vm.pause()
    assert vm.get_power_state() == "Halted"


@pytest.mark.asyncio
async def test_suspend_and_resume(app):
    vm = await make_vm(app, "AppVM", "work")
    await vm.start()
    with pytest.raises(exc.QubesVMNotPausedError):
        await vm.unpause()
    await vm.suspend()
    assert vm.get_power_state() == "Suspended"
    assert await vm.domain.state() is DomainState.PAUSED
    await vm.resume()
    assert vm.get_power_state() == "Running"
    await vm.pause()
    await vm.suspend()
    await vm.shutdown(wait=True)
    assert vm.is_halted()


@pytest.mark.asyncio
async def test_shutdown_that_takes_too_long(app):
    vm = await make_vm(app, "AppVM", "work")
    reasons = []
    vm.add_handler("domain-shutdown-failed", lambda *_, reason: reasons.append(reason))
    await vm.start()
    app.hypervisor.deaf = True
    with pytest.raises(exc.QubesVMShutdownTimeoutError):
        await vm.shutdown(wait=True, timeout=0.05)
    assert vm.get_power_state() == "Running"
    assert len(reasons) == 1
    await vm.kill()


@pytest.mark.asyncio
async def test_a_net_vm_goes_last_unless_forced(app):
    net = await make_vm(app, "AppVM", "net", provides_network=True)
    client = await make_vm(app, "AppVM", "client", netvm=net)
    await net.start()
    await client.start()
    with pytest.raises(exc.QubesVMInUseError, match="to the network: client;"):
        await net.shutdown(wait=True)
    await net.shutdown(wait=True, force=True)
    await client.kill()


@pytest.mark.asyncio
async def test_a_removed_vm_does_not_start(app):
    vm = await make_vm(app, "AppVM", "work")
    del app.domains[vm]
    with pytest.raises(exc.QubesVMNotFoundError):
        await vm.start()
    await vm.remove_from_disk()
