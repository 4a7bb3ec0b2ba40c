"""The life cycle under races: each run ends once, before the next one begins."""

import asyncio
import contextlib
import gc
import itertools
import weakref

import pytest
import pytest_asyncio
from life_events import GRAMMAR, interleave, letters, record, settle
from scripted_app import make_app, make_vm

from qubes_itests.core import exc
from qubes_itests.core.device.block_device import BLOCK_DEVICES
from qubes_itests.core.vm.start_memory import memory_for_start
from qubes_itests.hypervisor.contract import DomainState

#: Each is the same in every run. Of faults planted in the life cycle, a start that is
#: cancelled before it has run a step, or twice, is found by one after the 50th only.
SEEDS = 100
#: Of those with a net VM, which take longer: faults were found by the 18th.
SEEDS_OF_THREE = 25


@pytest_asyncio.fixture
async def app(tmp_path):
    return await make_app(tmp_path)


def check_ended(vm, told, seed):
    """Raise unless a VM has told of each of its runs as it must, and left nothing."""
    assert GRAMMAR.fullmatch(told), f"seed {seed}, {vm}: {told}"
    assert vm.get_power_state() == "Halted", f"seed {seed}"
    assert not any(v.is_dirty() for v in vm.volumes.values()), f"seed {seed}"
    assert vm.app.hypervisor.domains() == (), f"seed {seed}"
    assert vm.app.problems == [], f"seed {seed}"


async def run_seeds(vms, seeds):
    """Let random things happen to VMs; return how many runs they had."""
    random, runs = vms[0].app.hypervisor.random, 0
    seen = {vm: record(vm, random) for vm in vms}
    for seed in range(seeds):
        random.seed(seed)
        async with asyncio.timeout(300):
            await interleave(vms, random)
        for vm, events in seen.items():
            check_ended(vm, letters(events), seed)
            runs += letters(events).count("X")
            events.clear()
        # they are as good as new
        await vms[-1].start()
        await settle(vms)
        for events in seen.values():
            events.clear()
    return runs


@pytest.mark.asyncio
async def test_each_run_ends_once_in_random_interleavings(app):
    """Start, shutdown, kill, crash, pause, restart, in any order and at any moment."""
    vm = await make_vm(app, "AppVM", "work")
    runs = await run_seeds([vm], SEEDS)
    assert runs > SEEDS / 2, "the interleavings do not get far"
    assert len(asyncio.all_tasks()) == 1


@pytest.mark.asyncio
async def test_net_vm_and_clients_in_random_interleavings(app):
    """A client starts its net VM, which attaches its clients: none waits for ever."""
    net = await make_vm(app, "AppVM", "net", provides_network=True)
    clients = [await make_vm(app, "AppVM", n, netvm=net) for n in ("one", "two")]
    runs = await run_seeds([net, *clients], SEEDS_OF_THREE)
    assert runs > SEEDS_OF_THREE
    assert len(asyncio.all_tasks()) == 1


@pytest.mark.asyncio
async def test_a_vm_whose_end_nobody_has_told_yet_is_started_anew(app):
    """After all handlers of that end, which have their turn first."""
    vm = await make_vm(app, "AppVM", "work")
    events = record(vm, app.hypervisor.random)
    await vm.start()
    xid = vm.xid
    vm.domain.end()
    assert vm.get_power_state() == "Running", "it is known already"
    await vm.start()
    assert vm.xid == xid + 1
    await vm.kill()
    assert GRAMMAR.fullmatch(letters(events)), events
    assert not vm._domain_stopped_lock.locked(), "suites wait for it by this name"


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
async def test_a_kill_does_not_cut_short_what_undoes_a_start(app, monkeypatch):
    """Volumes would stay started, and the next start be refused."""
    vm = await make_vm(app, "AppVM", "work")
    stop, begun, go_on = vm.storage.stop, asyncio.Event(), asyncio.Event()

    async def wait_and_stop():
        begun.set()
        await go_on.wait()
        await stop()

    monkeypatch.setattr(vm.storage, "stop", wait_and_stop)
    app.hypervisor.failing = {"enter"}
    starting = asyncio.ensure_future(vm.start())
    async with asyncio.timeout(300):
        await begun.wait()
        killing = asyncio.ensure_future(vm.kill())
        for _ in range(10):
            await asyncio.sleep(0)
        assert vm.get_power_state() == "Transient"
        go_on.set()
        with pytest.raises(exc.QubesVMStartError, match="could not enter its root"):
            await starting
        await killing
    assert vm.is_halted()
    assert not any(v.is_dirty() for v in vm.volumes.values())
    app.hypervisor.failing = set()
    await vm.start()
    await vm.kill()


@pytest.mark.asyncio
async def test_a_vm_is_halted_when_its_volumes_are(app, monkeypatch):
    """Who waits for that may use them at once."""
    vm = await make_vm(app, "AppVM", "work")
    stop, states = vm.storage.stop, []

    async def note_and_stop():
        states.append(vm.get_power_state())
        await stop()
        states.append(vm.get_power_state())

    monkeypatch.setattr(vm.storage, "stop", note_and_stop)
    await vm.start()
    await vm.kill()
    assert states == ["Halting"] * 2
    assert vm.is_halted()


@pytest.mark.asyncio
async def test_devices_that_a_guest_has_from_the_beginning(app):
    """It tells of them before anybody can have them, and of each once."""
    vm, told, early = await make_vm(app, "AppVM", "work"), asyncio.Queue(), []

    def note(vm, _event, device):
        told.put_nowait((device.port_id, vm.get_power_state()))

    vm.add_handler("device-added:block", note)
    vm.add_handler("domain-spawn", lambda *_, **__: early.extend(vm.devices["block"]))
    for name in ("loop0", "sda"):
        size = f"{BLOCK_DEVICES}/{name}/size"
        app.hypervisor.entries = {size: "1", BLOCK_DEVICES: ""}
        await vm.start()
        assert early == []
        assert [device.port_id for device in vm.devices["block"]] == [name]
        async with asyncio.timeout(300):
            assert await told.get() == (name, "Running")
        await vm.kill()
    assert told.empty()


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
async def test_handlers_of_a_start_are_told_how_it_was_asked_for(app):
    """By the names that the parameters of `start` have; others read start_time anew."""
    vm = await make_vm(app, "AppVM", "work")
    told, names = [], []

    async def before(_vm, _event, start_guid, mem_required):
        told.append((start_guid, mem_required))

    def read_anew(vm, _event, name):
        told.append((name, vm.start_time))

    vm.add_handler("domain-pre-start", before)
    vm.add_handler("property-reset:start_time", read_anew)
    vm.add_handler("property-reset:*", lambda _vm, _event, name: names.append(name))
    await vm.start(start_guid=False, mem_required=7)
    await vm.kill()
    assert told == [(False, 7), *[("start_time", vm.start_time)] * 2]
    assert vm.start_time is not None
    assert names == ["xid", "stubdom_xid", "start_time"] * 2


@pytest.mark.asyncio
async def test_memory_is_asked_for_before_storage_starts(app):
    """A start that finds none has done nothing yet."""
    vm = await make_vm(app, "AppVM", "work")
    asked = []

    class FullMachine:
        @contextlib.asynccontextmanager
        async def memory(self, amount):
            asked.append((amount, any(v.is_dirty() for v in vm.volumes.values())))
            if len(asked) == 1:
                raise exc.QubesException("there is none left")
            yield

    app.qmemman = FullMachine()
    with pytest.raises(exc.QubesVMStartError, match="not have its memory: there is"):
        await vm.start()
    await vm.start()
    amount = memory_for_start(vm.memory, vcpus=vm.vcpus, maxmem=vm.maxmem)
    assert asked == [(amount, False)] * 2
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
    async with asyncio.timeout(300):
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
    async with asyncio.timeout(300):
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
    told = []
    await vm.pause()
    await vm.suspend()
    with pytest.raises(exc.QubesVMNotRunningError, match="unpause it first"):
        await vm.shutdown(wait=True)
    assert vm.is_paused()
    vm.add_handler("domain-*", lambda _, event, **__: told.append(event))
    await vm.shutdown(wait=True, force=True)
    # a guest whose virtual CPUs stand still cannot power off
    assert told[:3] == ["domain-pre-shutdown", "domain-pre-unpaused", "domain-unpaused"]
    assert vm.is_halted()


@pytest.mark.asyncio
async def test_a_guest_is_told_of_being_suspended_and_not_of_a_pause(app, monkeypatch):
    """While it runs, that is: before the one and after the other."""
    vm = await make_vm(app, "AppVM", "work")
    told = []
    vm.add_handler("domain-*", lambda _, event, **__: told.append(event))
    await vm.start()

    async def call(service, what, *, user, timeout):  # noqa: ARG001
        told.append((service, user, vm.get_power_state()))

    monkeypatch.setattr(vm.commands, "ask_service", call)
    pause = ["domain-pre-paused", "domain-paused"]
    unpause = ["domain-pre-unpaused", "domain-unpaused"]
    told.clear()
    await vm.pause()
    await vm.unpause()
    assert told == [*pause, *unpause]
    told.clear()
    await vm.suspend()
    assert told == [("qubes.SuspendPreAll", "root", "Running"), *pause]
    told.clear()
    await vm.resume()
    assert told == [*unpause, ("qubes.SuspendPostAll", "root", "Running")]
    await vm.kill()


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


@pytest.mark.asyncio
async def test_a_start_that_failed_is_held_by_nobody(app):
    """Not by what it began for others too, nor by the timers of what it waited for."""
    vm = await make_vm(app, "AppVM", "work")
    others = []

    async def fail(*_args, **_kwargs):
        others.append(asyncio.create_task(asyncio.Event().wait()))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.sleep(0), 1000)
        raise exc.QubesException("not today")

    vm.add_handler("domain-pre-start", fail)
    with contextlib.suppress(exc.QubesException):
        await vm.start()
    await app.domains.remove(vm)
    gone = weakref.ref(vm)
    del vm
    gc.collect()
    assert gone() is None
    others[0].cancel()


@pytest.mark.asyncio
async def test_each_run_has_a_number_of_its_own(app):
    vm = await make_vm(app, "AppVM", "work")
    numbers = [vm.xid]
    for _ in range(2):
        await vm.start()
        numbers.append(vm.xid)
        await vm.kill()
        assert vm.xid == -1
    assert numbers[0] == -1 < 0 < numbers[1] < numbers[2]


@pytest.mark.asyncio
async def test_all_vms_are_killed_at_once(app):
    vms = [await make_vm(app, "AppVM", name) for name in ("one", "two")]
    all_end = asyncio.Barrier(len(vms))

    async def meet(*_args, **_kwargs):
        await all_end.wait()

    for vm in vms:
        await vm.start()
        vm.add_handler("domain-stopped", meet)
    async with asyncio.timeout(300):
        await app.kill_all()
    assert all(vm.is_halted() for vm in vms)
    assert app.problems == []


@pytest.mark.asyncio
async def test_all_vms_are_killed_though_the_end_of_one_fails(app):
    one, two = [await make_vm(app, "AppVM", name) for name in ("one", "two")]
    halted, killed = asyncio.Event(), asyncio.Event()

    async def fail(*_args, **_kwargs):
        halted.set()
        await killed.wait()
        raise RuntimeError("as you see")

    two.add_handler("domain-stopped", lambda *_args, **_kwargs: killed.set())
    one.add_handler("domain-stopped", fail)
    await one.start()
    await two.start()
    async with asyncio.timeout(300):
        one.life.domain.end()
        await halted.wait()
        await app.kill_all()
    assert two.is_halted()
    assert app.problems == ["VM one: as you see"]
