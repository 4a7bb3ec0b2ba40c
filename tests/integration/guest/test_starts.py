"""Cold and warm starts of the mini template."""

import asyncio
import itertools
import time
from dataclasses import replace

import pytest
from conditions import deadlines

from qubes_itests.guest.exc import BootError
from qubes_itests.guest.start.warm import WarmStarts
from qubes_itests.host import memory
from qubes_itests.host.cache import Cache
from qubes_itests.host.command import run
from qubes_itests.hypervisor.contract import DomainState, LifecycleEvent

MIB = 1 << 20


async def test_a_cold_start_becomes_the_vm_it_is_told(machines, sh):
    identity = machines.identity(
        "work", db={"/qubes-vm-type": "AppVM"}, services=("cups",)
    )
    before = time.time()
    async with machines.running("work", identity=identity) as agent:
        assert await sh(agent, "hostname") == "work"
        assert await sh(agent, "qubesdb-read /name") == "work"
        assert await sh(agent, "qubesdb-read /qubes-vm-type") == "AppVM"
        assert await sh(agent, "ls /run/qubes-service") == "cups"
        assert await sh(agent, "id -un", user=None) == "user"
        assert await sh(agent, "echo $HOME; pwd", user=None) == "/home/user\n/home/user"
        assert before - 1 <= int(await sh(agent, "date +%s")) <= time.time() + 1
        mounts = await sh(agent, "cat /proc/mounts")
        assert "/ ext4 rw" in mounts
        assert "/rw ext4 rw" in mounts
        assert "partition" in await sh(agent, "cat /proc/swaps")
        await agent.write_db("/qubes-netvm", "10.137.0.1")
        assert await sh(agent, "qubesdb-read /qubes-netvm") == "10.137.0.1"
        await agent.remove_db("/qubes-netvm")
        process = await agent.spawn("qubesdb-read /qubes-netvm")
        await process.communicate()
        assert process.returncode == 2 or process.returncode == 1  # noqa: PLR1714


async def test_a_guest_has_the_rate_of_its_clock_from_the_host(
    machines, hypervisor, monkeypatch, sh
):
    """What it measures itself on a busy machine may be a tenth."""
    if hypervisor._machine.kvm:
        pytest.skip("KVM tells its guests")
    assert hypervisor._machine.tsc_khz is not None
    halved = hypervisor._machine.tsc_khz // 2
    told = replace(hypervisor._machine, tsc_khz=halved)
    monkeypatch.setattr(hypervisor, "_machine", told)
    async with machines.running("work") as agent:
        line = f"tsc: Detected {halved / 1000:.3f} MHz processor"
        assert line in await sh(agent, "dmesg")


async def test_two_warm_starts_share_nothing(machines, warm, sh, cache):
    """Clones of one saved stage one: own randomness, own name, own disks and clock."""
    specs = [
        machines.spec("one", private=32 * MIB),
        machines.spec("two", private=96 * MIB),
    ]
    before = time.time()
    booted = [await machines.boot(spec, warm=warm) for spec in specs]
    assert cache.entries("stage-one")
    agents = [agent for _, agent in booted]
    for command in (
        "cat /proc/sys/kernel/random/boot_id",
        "head -c 32 /dev/urandom | sha256sum",
        "cat /proc/sys/kernel/random/uuid",
        "hostname",
    ):
        answers = [await sh(agent, command) for agent in agents]
        assert answers[0] != answers[1], command
    sizes = [int(await sh(a, "blockdev --getsize64 /dev/xvdb")) for a in agents]
    assert sizes == [32 * MIB, 96 * MIB]
    free = [int(await sh(a, "df -m /rw | awk 'END{print $2}'")) for a in agents]
    assert free[1] > free[0] + 40
    for agent in agents:
        assert before - 1 <= int(await sh(agent, "date +%s")) <= time.time() + 1
    await sh(agents[0], "echo mine > /rw/file; sync")
    assert await sh(agents[1], "ls /rw") == "config\nhome\nlost+found\nusrlocal"


async def test_what_is_in_rw_survives_and_power_off_is_clean(machines, warm, sh):
    """The private volume outlives the run: cold start, power off, warm start."""
    spec = machines.spec("work")
    domain, agent = await machines.boot(spec)
    await sh(agent, "echo kept > /rw/file")
    await sh(agent, "echo home > ~/file", user=None)
    await agent.power_off()
    assert await domain.wait_stopped(300) is DomainState.HALTED
    assert await agent.wait_closed() is None
    await domain.undefine()
    _, agent = await machines.boot(spec, warm=warm)
    assert await sh(agent, "cat /rw/file; cat ~/file", user=None) == "kept\nhome"
    assert "recovery" not in await sh(agent, "dmesg")


async def test_a_state_that_does_not_load_is_dropped(machines, hypervisor, directory):
    """A cold start follows, the VM never knows, and the bad state is gone."""
    cache = Cache(directory / "cache")
    spec = machines.spec("work")
    warm = WarmStarts(cache, hypervisor)
    key = await warm._key(spec, (), None)
    cache.entry(
        "stage-one", key, lambda place: (place / "state").write_bytes(b"junk" * 1000)
    ).exists()
    _, agent = await machines.boot(spec, warm=warm)
    assert await (await agent.spawn("true")).wait() == 0
    assert cache.lookup("stage-one", key) is None


async def test_a_state_is_kept_whose_guest_was_killed_for_want_of_memory(
    machines, hypervisor, directory, monkeypatch
):
    """Without a state the next VMs would take more memory than with it."""
    cache = Cache(directory / "cache")
    spec = machines.spec("work")
    warm = WarmStarts(cache, hypervisor)
    key = await warm._key(spec, (), None)
    # It would not load anyway; what counts is that the kernel says it has killed.
    cache.entry("stage-one", key, lambda place: (place / "state").write_bytes(b"junk"))
    monkeypatch.setattr(memory, "kills", itertools.count().__next__)
    with pytest.raises(BootError, match="this machine was out of memory"):
        await machines.boot(spec, warm=warm)
    assert cache.lookup("stage-one", key) is not None
    assert hypervisor.domains() == ()


async def test_a_cache_without_room(machines, hypervisor, directory):
    """Stage one has nowhere to keep its memory: the VM boots, and nothing is left."""
    place = directory / "cache"
    place.mkdir()
    run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", place])
    try:
        warm = WarmStarts(Cache(place), hypervisor)
        _, agent = await machines.boot(machines.spec("work"), warm=warm)
        assert await (await agent.spawn("true")).wait() == 0
        assert not Cache(place).entries("stage-one")
        assert not list(place.glob("stage-one/.*"))
    finally:
        run(["umount", place])


async def test_starts_at_once_make_one_state(machines, hypervisor, directory):
    """Three VMs start while there is no state: one guest boots for all of them."""
    started = []

    def record(domain, event):
        if event is LifecycleEvent.STARTED:
            started.append(domain.spec.name)

    end = hypervisor.subscribe(record)
    warm = WarmStarts(Cache(directory / "cache"), hypervisor)
    specs = [machines.spec(f"vm{n}") for n in range(3)]
    booted = await asyncio.gather(*(machines.boot(s, warm=warm) for s in specs))
    end()
    for _, agent in booted:
        assert await (await agent.spawn("true")).wait() == 0
    assert len([name for name in started if name.startswith("stage-one")]) == 1
    assert sorted(d.spec.name for d in hypervisor.domains()) == ["vm0", "vm1", "vm2"]
    assert not list(directory.glob("vm*/*/"))


async def test_a_start_that_fails_undoes_itself(machines, hypervisor, warm):
    """The private disk has no filesystem: the guest says so, and is gone."""
    spec = machines.spec("work")
    (spec.directory / "private.img").write_bytes(bytes(MIB))
    for how in (None, warm):
        with pytest.raises(BootError) as caught:
            await machines.boot(spec, warm=how)
        assert caught.value.step == "enter its root"
        assert "/dev/xvdb" in str(caught.value)
        assert hypervisor.domains() == ()


async def test_a_disk_that_is_missing(machines, hypervisor, warm):
    """The guest says so while there is still somebody to hear it."""
    spec = machines.spec("work")
    spec = replace(spec, disks=spec.disks[:1])
    # the time is for the disk, and not for a boot, which takes what the machine has
    assert await warm.state_for(spec, machines.identity(spec.name), 120)
    for seconds in deadlines(10):
        with pytest.raises(BootError) as caught:
            await machines.boot(spec, timeout=seconds, warm=warm)
        if caught.value.step == "enter its root":
            break
    assert "no disk xvdb" in str(caught.value)
    assert hypervisor.domains() == ()


async def test_a_guest_without_our_init(machines, hypervisor, directory):
    """The kernel panics at once: the error says where, and shows the console."""
    initramfs = directory / "empty.cpio"
    initramfs.write_bytes(bytes(512))
    spec = machines.spec("work", initramfs=initramfs)
    with pytest.raises(BootError, match="panic") as caught:
        await machines.boot(spec)
    assert caught.value.step == "reach its agent"
    assert hypervisor.domains() == ()


async def test_a_guest_that_never_answers(machines, hypervisor):
    """The deadline covers everything, and leaves nothing behind."""
    spec = machines.spec(
        "work", kernel_options="init=/none rdinit=/none root=/dev/x rootwait"
    )
    clock = asyncio.get_running_loop().time
    for seconds in deadlines(6):
        begin = clock()
        with pytest.raises(BootError, match=f"not done within {seconds:g} s") as caught:
            await machines.boot(spec, timeout=seconds)
        soon = clock() - begin < 2 * seconds
        if soon and caught.value.step == "reach its agent":
            break
    assert (soon, caught.value.step) == (True, "reach its agent")
    assert hypervisor.domains() == ()


async def test_a_start_that_is_cancelled_undoes_itself(machines, hypervisor):
    started = asyncio.Event()
    end = hypervisor.subscribe(lambda _domain, _event: started.set())
    starting = asyncio.ensure_future(machines.boot(machines.spec("work")))
    await started.wait()
    end()
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert hypervisor.domains() == ()
