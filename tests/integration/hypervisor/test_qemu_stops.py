"""How QEMU guests end, and what they can do to the host until then."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import libvirt
import pytest
import pytest_asyncio
from qemu_processes import processes

from qubes_itests.host import memory
from qubes_itests.hypervisor import connection
from qubes_itests.hypervisor.contract import (
    Disk,
    DomainState,
    LifecycleEvent,
    MemoryStatistics,
)
from qubes_itests.hypervisor.exc import HypervisorError, StateError

pytestmark = pytest.mark.asyncio

PANIC = "Kernel panic - not syncing: a program says so"


@pytest_asyncio.fixture
async def hypervisor(open_qemu):
    async with open_qemu() as opened:
        yield opened


@pytest_asyncio.fixture
async def domain(hypervisor, make_spec):
    return await hypervisor.define(make_spec())


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("poweroff -f", DomainState.HALTED),
        ("reboot -f", DomainState.HALTED),
        (f"echo '{PANIC}' > /dev/console; poweroff -f", DomainState.HALTED),
        (f"echo '<0>{PANIC}' > /dev/kmsg; reboot -f", DomainState.HALTED),
        ("echo c > /proc/sysrq-trigger", DomainState.CRASHED),
    ],
)
async def test_the_guest_ends(hypervisor, domain, connect_shell, command, expected):
    """A guest that powers off or reboots is halted, one that panics has crashed.

    That it panics is QEMU's word, whatever programs in the guest print.
    """
    events = []
    hypervisor.subscribe(lambda _domain, event: events.append(event))
    await domain.start()
    domain.distrust_console()
    shell = await connect_shell(domain)
    await shell.run("true")
    shell.transport.write(f"sync; {command}\n".encode())
    assert await domain.wait_stopped(300) is expected
    assert await domain.state() is expected
    crashed = expected is DomainState.CRASHED
    assert domain.panicked is crashed
    assert crashed or "echo" not in command or PANIC in domain.console_log().read_text()
    last = LifecycleEvent.CRASHED if crashed else LifecycleEvent.STOPPED
    if crashed and LifecycleEvent.PAUSED in events:
        # QEMU stops a guest that panics; libvirt may get to tell that by itself.
        events.remove(LifecycleEvent.PAUSED)
    assert events == [LifecycleEvent.STARTED, last]
    assert processes(domain.spec.name) == []
    await domain.start()
    assert await domain.state() is DomainState.RUNNING


async def test_an_early_panic_is_seen_on_the_console(hypervisor, make_spec):
    """Before any module is loaded the kernel has nobody but the console to tell."""
    options = "rdinit=/none init=/none"
    domain = await hypervisor.define(make_spec(kernel_options=options))
    await domain.start()
    assert await domain.wait_stopped(300) is DomainState.CRASHED
    assert domain.panicked


def _account(process, name):
    return Path(f"/proc/{process}/{name}").read_text()


async def test_qemu_is_killed_for_want_of_memory(
    hypervisor, domain, make_spec, monkeypatch, caplog
):
    """It goes before other programs, and it is said who had the memory."""
    other = await hypervisor.define(make_spec())
    await asyncio.gather(domain.start(), other.start())
    (process,) = processes(domain.spec.name)
    assert _account(process, "oom_score_adj") == "500\n"
    assert 0 < domain.memory_held() < domain.spec.memory
    killed = domain.kills + 1
    monkeypatch.setattr(memory, "kills", lambda: killed)
    os.kill(process, signal.SIGKILL)
    assert await domain.wait_stopped(300) is DomainState.CRASHED
    assert domain.memory_held() == 0
    (record,) = [each for each in caplog.records if each.levelname == "ERROR"]
    told = record.getMessage()
    assert f"{domain.spec.name} has ended while this machine was out of memory" in told
    assert f"; {other.spec.name} holds " in told


async def test_qemu_is_killed(domain):
    """It counts as a crash; nothing stays, and the domain starts again."""
    await domain.start()
    (process,) = processes(domain.spec.name)
    os.kill(process, signal.SIGKILL)
    assert await domain.wait_stopped(300) is DomainState.CRASHED
    assert not domain.panicked
    assert [path.name for path in domain.spec.directory.iterdir()] == ["console.log"]
    await domain.start()
    await domain.destroy()
    assert await domain.state() is DomainState.HALTED


async def test_a_domain_that_ended_starts_again_at_once(domain):
    """The hypervisor tells of its end before it has forgotten its name."""
    for _ in range(12):
        await domain.start()
        (process,) = processes(domain.spec.name)
        os.kill(process, signal.SIGKILL)
        await domain.wait_stopped(300)
    await domain.start()
    await domain.destroy()


async def test_a_qemu_that_hangs_delays_no_other(hypervisor, make_spec, monkeypatch):
    """Neither starts nor calls of other domains; its own calls have a deadline."""
    monkeypatch.setattr(connection, "_DEADLINE", 600)
    hanging = await hypervisor.define(make_spec())
    await hanging.start()
    (process,) = processes(hanging.spec.name)
    os.kill(process, signal.SIGSTOP)
    asking = [asyncio.ensure_future(hanging.memory_statistics()) for _ in range(24)]
    await asyncio.sleep(0)
    other = await hypervisor.define(make_spec())
    await other.start()
    assert (await other.memory_statistics()).actual
    assert not any(call.done() for call in asking)
    with monkeypatch.context() as patch:
        patch.setattr(connection, "_DEADLINE", 0.2)
        with pytest.raises(HypervisorError, match="no answer within"):
            await hanging.cpu_time()
    await hanging.destroy()
    assert await hanging.state() is DomainState.HALTED
    ends = await asyncio.gather(*asking, return_exceptions=True)
    # all have ended, some with what libvirt itself knows
    known = {MemoryStatistics, StateError, HypervisorError}
    assert {type(end) for end in ends} <= known


@pytest.mark.parametrize("action", ["pause", "press_power_button"])
async def test_a_domain_that_ends_during_a_call_does_not_run(
    domain, eventually, action
):
    """Like one that has ended before: libvirt tells of its monitor instead."""
    await domain.start()
    (process,) = processes(domain.spec.name)
    os.kill(process, signal.SIGSTOP)
    call = asyncio.ensure_future(getattr(domain, action)())
    occupied = libvirt.VIR_DOMAIN_CONTROL_OCCUPIED
    await eventually(lambda: domain.native.controlInfo()[0] == occupied)
    os.kill(process, signal.SIGKILL)
    with pytest.raises(StateError):
        await call
    assert await domain.wait_stopped(300) is DomainState.CRASHED


async def test_a_start_that_fails_leaves_nothing(hypervisor, make_spec, tmp_path):
    spec = make_spec(disks=(Disk("xvda", tmp_path / "missing"),))
    domain = await hypervisor.define(spec)
    with pytest.raises(HypervisorError, match="missing"):
        await domain.start()
    assert await domain.state() is DomainState.HALTED
    assert processes(spec.name) == []
    assert {path.name for path in spec.directory.iterdir()} == {"console.log"}


async def test_the_console_log_is_complete(domain, connect_shell):
    """What a guest prints last is in the log when the domain has stopped."""
    await domain.start()
    shell = await connect_shell(domain)
    await shell.run("yes 0123456789abcdef | head -c 50000 > /dev/console")
    await shell.run("echo the very end > /dev/console; sync")
    await domain.destroy()
    log = domain.console_log().read_bytes()
    assert b"the guest is up" in log
    assert log.endswith(b"the very end\r\n")
    assert [path.name for path in domain.spec.directory.iterdir()] == ["console.log"]


async def test_cancelled_start(domain, eventually):
    """A start that is given up undoes itself."""
    start = asyncio.create_task(domain.start())
    await eventually(lambda: processes(domain.spec.name))
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    assert processes(domain.spec.name) == []
    await domain.start()
    assert await domain.state() is DomainState.RUNNING
