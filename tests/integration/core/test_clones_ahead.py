"""VMs that go on as clones which were started before anybody needed them."""

import asyncio
import os
import signal
import time

import pytest
from conditions import wait_until
from own_clones import own_clones
from qemu_processes import processes

from qubes_itests.hypervisor import connection, qemu_domain
from qubes_itests.hypervisor.adoption import exchange_disks
from qubes_itests.hypervisor.exc import HypervisorError
from qubes_itests.testcase.leaks import LeakWatch

MIB = 1 << 20


@pytest.fixture
def ahead(testbed, app, monkeypatch):
    """Yield what starts two clones at once, however busy the machine is."""
    with own_clones(testbed, app, monkeypatch, 2) as made:
        yield made


@pytest.fixture
def clones(app, run, ahead):
    """Return a function that waits for clones, and returns their names."""

    def wait():
        run(asyncio.wait_for(ahead.settled(), 600))
        return [d.spec.name for d in app.hypervisor.domains(spare=True)]

    return wait


@pytest.fixture
def other(make_vm):
    return make_vm("two")


@pytest.fixture
def expected(make_vm, other, run, clones):
    """Return a VM that has been started as often as it takes to expect two again."""
    vm = make_vm("one")

    async def start_both():
        await asyncio.gather(vm.start(), other.start())
        await asyncio.gather(vm.kill(), other.kill())

    for _ in range(2):
        run(start_both())
    assert len(clones()) == 2
    return vm


def test_a_clone_becomes_a_vm(run, sh, expected, other, clones):
    """It is that VM for all who look, and two of them have nothing in common."""
    names, hypervisor = clones(), expected.app.hypervisor
    assert hypervisor.domains() == ()
    vms = [expected, other]
    run(vms[1].volumes["private"].resize(3 << 30))
    for vm in vms:
        run(vm.start())
        assert vm.domain.libvirt_name == names.pop(0)
        native = vm.libvirt_domain
        assert (native.name(), native.UUIDString()) == (vm.name, str(vm.uuid))
        assert native.UUID() == vm.uuid.bytes
        assert "ahead-" not in native.XMLDesc()
        assert f"<uuid>{vm.uuid}</uuid>" in native.XMLDesc()
        for volume in vm.volumes.values():
            if (path := volume.path) is not None:
                assert f"file='{path}'" in native.XMLDesc() or volume.name == "kernel"
    assert [domain.spec.name for domain in hypervisor.domains()] == ["one", "two"]
    for command in (
        "cat /proc/sys/kernel/random/boot_id",
        "cat /proc/sys/kernel/random/uuid",
        "head -c 32 /dev/urandom | sha256sum",
        "hostname",
    ):
        assert sh(vms[0], command) != sh(vms[1], command), command
    for vm in vms:
        assert sh(vm, "hostname") == vm.name
        for name, disk in (("root", "xvda"), ("private", "xvdb"), ("volatile", "xvdc")):
            size = int(sh(vm, f"blockdev --getsize64 /dev/{disk}"))
            assert size == vm.volumes[name].size
        asked = time.time()
        assert asked - 5 < int(sh(vm, "date +%s")) < time.time() + 5
        # what was rehearsed is not there any more
        assert sh(vm, "ls -A /rw") == "config\nhome\nlost+found\nusrlocal"
        assert sh(vm, "pwd; ls -A", "user") == "/home/user"
        assert (
            sh(vm, "grep -c ' /rw ' /proc/mounts; grep -c partition /proc/swaps")
            == "1\n1"
        )
        sh(vm, f"echo {vm.name} > /etc/mark; echo {vm.name} > /rw/mark; sync")
    sh(vms[0], "echo 3 > /proc/sys/vm/drop_caches")
    assert sh(vms[0], "cat /etc/mark /rw/mark") == "one\none"
    run(vms[0].shutdown(wait=True))
    run(vms[0].start())
    assert sh(vms[0], "cat /rw/mark; ls /etc/mark 2>/dev/null || :") == "one"


def say_a_word(sh, vm):
    """Have the guest print something; return the console's log when it is there.

    The guest's kernel may print later than a command writes, and not at all when the
    guest is killed before.
    """
    sh(vm, "echo a word from the guest > /dev/console")
    log = vm.domain.console_log()
    wait_until(lambda: "a word from the guest" in log.read_text(), "word in the log")
    return log


def test_what_is_done_with_it_later(run, sh, expected, clones, tmp_path):
    """Disks are resized, frozen as the VM's, its log goes on, and its end is whole."""
    clones()
    run(expected.start())
    name = expected.domain.libvirt_name
    assert name != expected.name
    size = expected.volumes["private"].size + 64 * MIB
    run(expected.storage.resize("private", size))
    assert int(sh(expected, "blockdev --getsize64 /dev/xvdb")) == size
    log = say_a_word(sh, expected)
    assert log.parent == expected.directory
    run(expected.pause())
    assert run(expected.domain.freeze(tmp_path / "frozen")) == expected.domain.spec
    run(expected.unpause())
    assert len(processes(name)) == 1
    run(expected.kill())
    assert "a word from the guest" in log.read_text()
    assert processes(name) == []
    left = {path.name for path in expected.directory.iterdir()}
    assert left == {"agent.log", "console.log"}
    directory = expected.app.warm_starts.ahead._directory
    assert not (directory / name).exists()


def test_a_clone_that_has_died(app, run, sh, expected, clones):
    for name in clones():
        os.kill(*processes(name), signal.SIGKILL)
    run(expected.start())
    assert sh(expected, "hostname") == "one"
    assert expected.domain.libvirt_name == "one"
    run(asyncio.sleep(0))
    assert not set(clones()) & {d.spec.name for d in app.hypervisor.domains()}


def test_a_clone_that_cannot_be_taken(run, sh, expected, clones, monkeypatch):
    """It is ended with all that it has become; the VM never knows."""

    async def refuse(monitor, *_args):
        raise HypervisorError(monitor.domain, "exchange the disks of", "as you see")

    monkeypatch.setattr(qemu_domain, "exchange_disks", refuse)
    names = clones()
    run(expected.start())
    assert sh(expected, "hostname") == "one"
    assert expected.domain.libvirt_name == "one"
    assert processes(names[0]) == []
    run(expected.shutdown(wait=True))


def test_memory_that_is_needed(run, sh, expected, clones, monkeypatch):
    """Clones are ended before a VM is refused, and none is started where none fits."""
    assert len(clones()) == 2
    hypervisor = expected.app.hypervisor
    monkeypatch.setattr(hypervisor, "memory_limit", 2 * expected.memory)
    run(expected.start())
    assert len(clones()) == 1
    monkeypatch.setattr(hypervisor, "memory_limit", expected.memory)
    run(expected.kill())
    run(expected.start())
    assert sh(expected, "hostname") == "one"
    assert clones() == []


def test_no_test_leaves_a_clone_behind(testbed, run, expected, clones):
    """What a clone has open is no leak of the test during which it was started."""
    watch = LeakWatch(testbed.portal, testbed.hypervisor)
    before = clones()
    run(expected.start())
    run(expected.kill())
    assert set(clones()) - set(before)
    assert watch.end() == []


def test_a_root_that_is_not_to_be_written_to(run, sh, expected, clones):
    """A clone's disks are opened for writing, so such a VM goes on as none."""
    names = clones()
    expected.volumes["root"].rw = False
    run(expected.start())
    assert expected.domain.libvirt_name == "one"
    assert sh(expected, "blockdev --getro /dev/xvda") == "1"
    assert clones() == names


@pytest.mark.parametrize("lost", ["agent.sock", "console.pipe.in", "console.pipe.out"])
def test_a_clone_that_has_lost_a_file(run, sh, expected, clones, lost):
    """The VM that could not go on as it has a console of its own again."""
    name = clones()[0]
    (expected.app.warm_starts.ahead._directory / name / lost).unlink()
    run(expected.start())
    assert expected.domain.libvirt_name == "one"
    say_a_word(sh, expected)
    run(expected.kill())
    assert processes(name) == []


def test_a_clone_that_hangs(run, sh, expected, clones, monkeypatch):
    """It is given up long before libvirt would give up."""
    name = clones()[0]
    monkeypatch.setattr(qemu_domain, "_ANSWER", 1)
    monkeypatch.setattr(connection, "_DEADLINE", 600)
    os.kill(*processes(name), signal.SIGSTOP)
    run(expected.start())
    assert sh(expected, "hostname") == "one"
    assert expected.domain.libvirt_name == "one"
    assert processes(name) == []


def test_a_clone_that_dies_while_it_is_taken(run, sh, expected, clones, monkeypatch):
    name = clones()[0]

    async def exchange_and_die(*args):
        await exchange_disks(*args)
        os.kill(*processes(name), signal.SIGKILL)
        (domain,) = expected.app.hypervisor.domains()
        await domain.wait_stopped(300)

    monkeypatch.setattr(qemu_domain, "exchange_disks", exchange_and_die)
    run(expected.start())
    assert sh(expected, "hostname") == "one"
    assert expected.domain.libvirt_name == "one"
