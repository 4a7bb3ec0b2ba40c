"""Starts that ask for memory: a simulated machine, and a boot that only takes it."""

from __future__ import annotations

import asyncio
import contextlib
from types import SimpleNamespace
from uuid import uuid4

import pytest

from qubes_itests.balancing.app_memory import AppMemory, counts, machine
from qubes_itests.core.app import Qubes
from qubes_itests.core.exc import QubesVMStartError
from qubes_itests.core.vm import life, start_memory
from qubes_itests.core.vm.start_memory import memory_for_start
from qubes_itests.exc import DeadlineError, HarnessError
from qubes_itests.hypervisor.contract import DomainSpec
from qubes_itests.qmemman import timeline
from qubes_itests.qmemman.simulation import virtual_time
from qubes_itests.qmemman.simulation.machine import SimulatedMachine
from qubes_itests.qmemman.sizes import MIB
from qubes_itests.run.settings import LEAST_MEMORY_BUDGET
from qubes_storage.reflink import ReflinkPool


class Guest:
    """Domain and agent of a VM on the simulated machine."""

    def __init__(self, machine, guest):
        self.machine, self.guest = machine, guest
        self.stopped = asyncio.Event()

    async def wait_stopped(self):
        await self.stopped.wait()

    async def destroy(self):
        self.machine.stop(self.guest)
        self.stopped.set()

    async def close(self):
        pass

    undefine = close

    def on_db_change(self, note):
        """Tell nothing: there are no devices."""


class Place:
    """An app on a simulated machine; its VMs have neither disks nor guests."""

    def __init__(self, directory, monkeypatch):
        self.app = Qubes(hypervisor=SimpleNamespace(slowness=1.0), directory=directory)
        pool = ReflinkPool(name="default", dir_path=directory, setup_check=False)
        self.app.pools["default"] = pool
        self.machine = SimulatedMachine(total=2000 * MIB, dom0=2000 * MIB)
        self.memory = AppMemory(self.app, self.machine)
        self.booted = []
        self.boot_error = None
        monkeypatch.setattr(life, "boot", self.boot)
        for module in (life, start_memory):
            monkeypatch.setattr(module, "boot_files", lambda _vm: "initramfs")
            monkeypatch.setattr(module, "domain_spec", self.domain_spec)
            who = SimpleNamespace(init="agent")
            monkeypatch.setattr(module, "identity", lambda _vm, who=who: who)

    async def boot(self, _hypervisor, spec, _identity, *, on_domain_start, **_options):
        self.booted.append(spec.name)
        if self.boot_error:
            raise self.boot_error
        maximum = spec.max_memory * MIB
        guest = self.machine.start(spec.name, spec.memory * MIB, maximum)
        guest.use(spec.memory * MIB // 2)
        await on_domain_start()
        made = Guest(self.machine, guest)
        return made, made

    def domain_spec(self, vm, directory, _files):
        most = vm.maxmem or vm.memory
        return DomainSpec(vm.name, uuid4(), directory, vm.memory, most, None, None)

    def vm(self, name, **properties):
        vm = self.app.add_new_vm("StandaloneVM", name=name, label="red", **properties)

        async def nothing():
            pass

        vm.storage = SimpleNamespace(start=nothing, stop=nothing)
        return vm

    def granted(self):
        records = timeline.read(self.memory.timeline)
        return [r.amount for r in records if r.event == "granted"]


def place(test):
    def wrapper(tmp_path, monkeypatch):
        async def program():
            made = Place(tmp_path, monkeypatch)
            async with made.memory:
                await test(made)
                await made.app.kill_all()
                made.app.close()

        virtual_time.run(program())

    return wrapper


@place
async def test_a_start_asks_for_memory_and_overhead_and_not_for_maxmem(p):
    p.machine.dom0.use(500 * MIB)
    vm = p.vm("work", memory=300, maxmem=3000, vcpus=2)
    await vm.start()
    assert p.granted() == [memory_for_start(300, vcpus=2, maxmem=3000)]
    assert p.granted() == [307 * MIB + 3000 * 8192]


@place
async def test_a_caller_may_ask_for_another_amount(p):
    p.machine.dom0.use(500 * MIB)
    await p.vm("work", memory=300).start(mem_required=350 * MIB)
    assert p.granted() == [350 * MIB]


@place
async def test_others_have_memory_while_a_saved_state_is_made(p):
    """The making takes many seconds; only then is memory reserved."""
    p.machine.dom0.use(500 * MIB)
    making = asyncio.Event()

    async def state_for(spec, _identity, _timeout):
        if spec.name == "slow":
            await making.wait()

    p.app.warm_starts = SimpleNamespace(state_for=state_for)
    slow = asyncio.create_task(p.vm("slow", memory=300).start())
    await asyncio.sleep(1)
    await p.vm("quick", memory=200).start()
    assert p.booted == ["quick"]
    making.set()
    await slow
    assert p.booted == ["quick", "slow"]


@place
async def test_nothing_starts_before_dom0_has_reported(p):
    """It sits on all memory until then, and shrinks when it has."""
    start = asyncio.create_task(p.vm("work", memory=400).start())
    await asyncio.sleep(30)
    assert not start.done()
    assert p.booted == []
    p.machine.dom0.use(500 * MIB)
    await start
    assert p.machine.dom0.holds() < 1600 * MIB


@place
async def test_a_dom0_that_never_reports_is_what_the_error_names(p):
    with pytest.raises(QubesVMStartError, match="report of dom0's memory usage"):
        await p.vm("work", memory=400).start()


@place
async def test_a_refused_start_says_why_and_leaves_nothing(p):
    p.machine.dom0.use(500 * MIB)
    await p.vm("work", memory=300).start()
    large = p.vm("large", memory=900)
    failed = []
    large.add_handler("domain-start-failed", lambda *_, **about: failed.append(about))
    with pytest.raises(QubesVMStartError) as caught:
        await large.start()
    assert caught.value.step == "have its memory"
    said = str(caught.value)
    for part in ("did not start", "914 MiB asked", "obtainable", "work", "dom0"):
        assert part in said, said
    assert (large.get_power_state(), len(failed)) == ("Halted", 1)
    assert p.booted == ["work"]
    assert not large.directory.exists()
    # nor does the lock
    await p.vm("small", memory=200).start()


@place
async def test_the_lock_goes_with_a_start_that_fails_or_is_given_up(p):
    p.machine.dom0.use(500 * MIB)
    p.boot_error = OSError("no bricks")
    with pytest.raises(QubesVMStartError, match="no bricks"):
        await p.vm("broken", memory=200).start()
    p.boot_error = None
    async with p.app.qmemman.memory(MIB):
        waiting = p.vm("waiting", memory=200)
        start = asyncio.create_task(waiting.start())
        await asyncio.sleep(1)
        await waiting.kill()
    with contextlib.suppress(asyncio.CancelledError, QubesVMStartError):
        await start
    assert waiting.is_halted()
    await p.vm("next", memory=200).start()
    assert p.booted == ["broken", "next"]


@place
async def test_of_two_starts_at_once_one_gets_the_last_memory(p):
    p.machine.dom0.use(500 * MIB)
    starts = [p.vm(name, memory=600).start() for name in ("one", "two")]
    results = await asyncio.gather(*starts, return_exceptions=True)
    (refused,) = [r for r in results if isinstance(r, QubesVMStartError)]
    assert refused.step == "have its memory"
    assert len(p.booted) == len(p.granted()) == 1


def test_closing_undoes_all_but_the_timeline(tmp_path, monkeypatch):
    async def program():
        made = Place(tmp_path, monkeypatch)
        assert made.app.qmemman is None
        async with made.memory as memory:
            assert made.app.qmemman is memory.client
            assert memory.client.path.is_socket()
            await asyncio.sleep(3)
        assert made.app.qmemman is None
        assert not memory.client.path.exists()
        assert timeline.read(memory.timeline)[0].event
        assert asyncio.all_tasks() == {asyncio.current_task()}
        # an app without it starts VMs without asking
        made.machine.dom0.use(0)
        made.machine.dom0.order(500 * MIB)
        await asyncio.sleep(2)
        await made.vm("free", memory=400).start()
        await made.app.kill_all()
        made.app.close()

    virtual_time.run(program())


@place
async def test_what_does_not_come_shows_who_has_what(p):
    p.machine.dom0.use(500 * MIB)
    with pytest.raises(DeadlineError, match=r"dom0: uses 500 MiB, holds \d+ MiB"):
        await p.memory.until("miracle", lambda: False, timeout=1)
    assert await p.memory.until("time", lambda: True, timeout=1) == 0


def test_only_the_domains_of_the_app_count(tmp_path):
    """Not those of another app, nor those that a saved state is made with."""
    app = Qubes(hypervisor=None, directory=tmp_path / "1")

    def domain(*where):
        directory = tmp_path.joinpath(*where)
        spec = DomainSpec("x", uuid4(), directory, 1, 1, None, None)
        return SimpleNamespace(spec=spec)

    ours = counts(app)
    assert ours(domain("1", "vms", "work"))
    assert not ours(domain("2", "vms", "work"))
    assert not ours(domain("1", "vms", "work", "abc123"))


def test_the_least_budget_has_room_for_a_vm(tmp_path, monkeypatch):
    """The setting's bound fits the dom0 that the run makes up."""
    budget = machine(LEAST_MEMORY_BUDGET)

    async def program():
        made = Place(tmp_path, monkeypatch)
        made.machine = SimulatedMachine(budget.total, budget.dom0)
        made.memory = AppMemory(made.app, made.machine)
        async with made.memory:
            made.machine.dom0.use(budget.dom0_used)
            await made.vm("work").start()
            with pytest.raises(QubesVMStartError, match="not enough memory"):
                await made.vm("more").start()
            await made.app.kill_all()
            made.app.close()

    virtual_time.run(program())
    with pytest.raises(HarnessError):
        machine(1000)
