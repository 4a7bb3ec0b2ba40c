"""The life of a VM: every run ends once, is dealt with, and leaves nothing."""

import asyncio
import contextlib
import re
import subprocess
import time
from random import Random

import pytest

from qubes_itests.core import exc
from qubes_itests.hypervisor.contract import DomainState

#: The events of a run, in letters.
RUN = {
    "domain-pre-start": "p",
    "domain-start-failed": "f",
    "domain-spawn": "s",
    "domain-start": "S",
    "domain-stopped": "x",
    "domain-shutdown": "X",
}


@pytest.fixture
def vm(make_vm):
    return make_vm("work")


@pytest.fixture
def events(vm):
    seen = []
    vm.add_handler("domain-*", lambda _vm, event, **_: seen.append(event))
    return seen


def test_a_run_from_start_to_shutdown(app, vm, run, sh, events):
    run(vm.start())
    assert vm.get_power_state() == "Running"
    assert vm.is_qrexec_running()
    assert run(vm.domain.state()) is DomainState.RUNNING
    assert sh(vm, "hostname") == "work"
    assert sh(vm, "id -un; id -gn", user=None) == "user\nuser"
    assert sh(vm, "qubesdb-read /name") == "work"
    run(vm.shutdown(wait=True))
    assert vm.is_halted()
    assert not vm.is_qrexec_running()
    assert app.hypervisor.domains() == ()
    assert events == [
        "domain-pre-start",
        "domain-spawn",
        "domain-start",
        *["domain-cmd-pre-run"] * 3,
        "domain-pre-shutdown",
        "domain-stopped",
        "domain-shutdown",
    ]


def test_appvm_forgets_its_root_and_keeps_its_private_volume(vm, run, sh):
    run(vm.start())
    sh(vm, "echo root > /etc/kept; echo home > /home/user/kept; echo rw > /rw/kept")
    run(vm.shutdown(wait=True))
    run(vm.start())
    assert sh(vm, "cat /home/user/kept /rw/kept; test ! -e /etc/kept") == "home\nrw"


def test_template_keeps_its_root_and_appvms_see_it_at_their_next_start(
    app, vm, run, sh
):
    template = app.domains["tiny"]
    run(vm.start())
    run(template.start())
    sh(template, "echo new > /etc/from-template")
    sh(vm, "test ! -e /etc/from-template")
    run(template.shutdown(wait=True))
    assert vm.volumes["root"].is_outdated()
    sh(vm, "test ! -e /etc/from-template")
    run(vm.shutdown(wait=True))
    run(vm.start())
    assert sh(vm, "cat /etc/from-template") == "new"


def test_standalone_clones_a_template_and_keeps_its_root(app, run, sh):
    vm = app.add_new_vm("StandaloneVM", name="alone", label="red", kernel="tiny")
    run(vm.clone_disk_files(app.domains["tiny"]))
    run(vm.start())
    sh(vm, "echo mine > /etc/kept")
    run(vm.shutdown(wait=True))
    run(vm.start())
    assert sh(vm, "cat /etc/kept") == "mine"


def test_volatile_is_new_at_each_start(vm, run, sh):
    run(vm.start())
    device = sh(vm, "readlink -f /dev/xvdc")
    assert sh(vm, "tail -n +2 /proc/swaps").split()[0] in (device, "/dev/xvdc")
    sh(vm, "swapoff -a; echo secret | dd of=/dev/xvdc bs=1M seek=64 conv=fsync")
    run(vm.shutdown(wait=True))
    run(vm.start())
    sh(vm, "swapoff -a; ! dd if=/dev/xvdc bs=1M skip=64 count=1 | grep -q secret")


def test_concurrent_starts_are_one(vm, run, events):
    async def start_thrice():
        await asyncio.gather(vm.start(), vm.start(), vm.start())

    run(start_thrice())
    run(vm.start())
    assert events.count("domain-start") == 1


@pytest.mark.guest_panics
@pytest.mark.parametrize("end", ["inside", "kill", "crash"])
def test_each_run_ends_once_before_the_next_begins(vm, run, sh, events, end):
    async def end_and_restart():
        if end == "inside":
            await vm.run("poweroff", user="root")
        elif end == "kill":
            await vm.kill()
        else:
            await vm.run("echo c > /proc/sysrq-trigger", user="root")
        async with asyncio.timeout(300):
            await vm.wait_ended(60)
        await vm.start()

    run(vm.start())
    run(end_and_restart())
    assert events.count("domain-shutdown") == 1
    assert events.index("domain-shutdown") < len(events) - events[::-1].index(
        "domain-start"
    )
    assert sh(vm, "hostname") == "work"


@pytest.mark.parametrize("command", ["poweroff", "halt", "reboot"])
def test_ending_inside_loses_nothing_that_was_written(vm, run, sh, command):
    run(vm.start())
    run(vm.run(f"echo late > /rw/late; {command}", user="root"))
    run(vm.wait_ended(60))
    run(vm.start())
    assert sh(vm, "cat /rw/late") == "late"


def test_pause_stops_the_guest_and_unpause_lets_it_go_on(vm, run, sh):
    run(vm.start())
    run(vm.pause())
    assert vm.is_paused()
    with pytest.raises(exc.QubesVMNotRunningError):
        run(vm.run("true"))
    run(vm.unpause())
    assert sh(vm, "echo on") == "on"


@pytest.mark.parametrize(
    ("stop", "go_on"), [("pause", "unpause"), ("suspend", "resume")]
)
def test_a_guest_that_stood_still_has_the_right_time(vm, run, sh, stop, go_on):
    """Its clock is far behind before, as it would be after a long pause."""
    run(vm.start())
    sh(vm, "date -s @86400", user="root")
    run(getattr(vm, stop)())
    before = int(time.time())
    run(getattr(vm, go_on)())
    now = int(sh(vm, "date +%s"))
    assert before - 1 <= now <= time.time() + 1


def test_suspend_and_resume(vm, run, sh):
    run(vm.start())
    run(vm.suspend())
    assert vm.get_power_state() == "Suspended"
    assert run(vm.domain.state()) is DomainState.PAUSED
    run(vm.resume())
    assert sh(vm, "echo on") == "on"
    run(vm.suspend())
    with pytest.raises(exc.QubesVMNotRunningError):
        run(vm.shutdown(wait=True))
    run(vm.shutdown(wait=True, force=True))
    assert vm.is_halted()


@pytest.mark.parametrize("seed", range(3))
def test_random_interleavings(app, vm, run, events, seed):
    """Whatever comes together, each run is told to have ended once, before the next."""
    random = Random(seed)  # noqa: S311 - to be repeated
    paused = (vm.pause, vm.unpause, vm.suspend, vm.resume)
    calls = [vm.start] * 4 + [vm.kill, vm.shutdown, vm.restart, *paused]

    async def one(delay):
        await asyncio.sleep(delay)
        with contextlib.suppress(exc.QubesException, ConnectionError):
            await random.choice([*calls, lambda: vm.run("poweroff", user="root")])()

    async def all_at_once():
        async with asyncio.timeout(300):
            await asyncio.gather(*(one(random.uniform(0, 4)) for _ in range(16)))
            with contextlib.suppress(exc.QubesVMNotStartedError):
                await vm.kill()
            await vm.wait_ended(60)

    run(all_at_once())
    told = [event for event in events if event in RUN]
    text = "".join(RUN[event] for event in told)
    assert re.fullmatch(r"(p(s?S?f|sSxX))+", text), text
    assert vm.is_halted()
    assert app.hypervisor.domains() == ()
    assert not any(volume.is_dirty() for volume in vm.volumes.values())
    run(vm.start())


def test_exit_status_and_output_come_with_the_error(vm, run):
    run(vm.start())
    with pytest.raises(subprocess.CalledProcessError) as caught:
        run(vm.run_for_stdio("echo out; echo err >&2; exit 3"))
    assert caught.value.returncode == 3
    assert (caught.value.stdout, caught.value.stderr) == (b"out\n", b"err\n")


def test_service_features_are_there_before_any_command(vm, run, sh):
    vm.features["service.wanted"] = True
    vm.features["service.unwanted"] = False
    run(vm.start())
    assert sh(vm, "ls /run/qubes-service") == "wanted"


def test_start_may_be_prohibited(vm, run, events):
    vm.features["prohibit-start"] = "it is under repair"
    with pytest.raises(exc.QubesVMError, match="it is under repair"):
        run(vm.start())
    assert vm.is_halted()
    assert [event for event in events if "feature" not in event] == []


@pytest.mark.guest_panics
def test_guest_without_agent_fails_the_start_and_leaves_nothing(app, vm, run, events):
    """Its init is not there: the kernel panics, and the error shows that."""
    vm.kernelopts = "rdinit=/nowhere init=/nowhere"
    vm.qrexec_timeout = 300
    app.warm_starts, saved = None, app.warm_starts
    try:
        with pytest.raises(
            exc.QubesVMStartError,
            match=r"(?s)could not reach its agent: .*Kernel panic",
        ):
            run(vm.start())
    finally:
        app.warm_starts = saved
    assert vm.is_halted()
    assert app.hypervisor.domains() == ()
    assert not any(volume.is_dirty() for volume in vm.volumes.values())
    assert events[-1] == "domain-start-failed"


@pytest.mark.parametrize("moment", [0, 0.3, 1])
def test_kill_around_a_start_leaves_it_halted(app, vm, run, moment):
    async def start_and_kill():
        under_way = asyncio.Event()
        vm.add_handler("domain-pre-start", lambda *_, **__: under_way.set())
        starting = asyncio.ensure_future(vm.start())
        await under_way.wait()
        await asyncio.sleep(moment)
        await vm.kill()
        # it may have been quick enough to be done before
        with contextlib.suppress(exc.QubesVMError):
            await starting

    run(start_and_kill())
    assert vm.is_halted()
    assert app.hypervisor.domains() == ()
    run(vm.start())


def test_warm_and_cold_starts_give_the_same_vm(app, make_vm, run, sh):
    warm, cold = make_vm("warm"), make_vm("cold")
    run(warm.start())
    saved, app.warm_starts = app.warm_starts, None
    try:
        run(cold.start())
    finally:
        app.warm_starts = saved
    look = "cut -d' ' -f2,3 /proc/mounts; ls /dev/xvd*; blockdev --getsize64 /dev/xvdb"
    assert sh(warm, look) == sh(cold, look)
    ids = {sh(v, "cat /proc/sys/kernel/random/boot_id") for v in (warm, cold)}
    assert len(ids) == 2
