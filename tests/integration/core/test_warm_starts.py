"""VMs that start from one saved state with a root and blank disks: what each has."""

import time

import pytest
from warm_states import found_states

from qubes_itests.guest.start import warm

MIB = 1 << 20


@pytest.fixture
def states(monkeypatch):
    """Return a list of the states that starts find from now on."""
    monkeypatch.setattr(warm, "_WORTH", 2)
    return found_states(monkeypatch)


def test_two_vms_have_disks_and_secrets_of_their_own(make_vm, run, sh, states):
    vms = [make_vm(name) for name in ("one", "two")]
    run(vms[1].volumes["private"].resize(3 << 30))
    run(vms[0].start())
    run(vms[0].kill())
    del states[:]
    for vm in vms:
        run(vm.start())
    assert [state.disks for state in states] == [("xvda", "xvdb", "xvdc")] * 2
    for command in (
        "cat /proc/sys/kernel/random/boot_id",
        "cat /proc/sys/kernel/random/uuid",
        "head -c 32 /dev/urandom | sha256sum",
        "hostname",
    ):
        assert sh(vms[0], command) != sh(vms[1], command), command
    for vm in vms:
        for name, disk in (("root", "xvda"), ("private", "xvdb"), ("volatile", "xvdc")):
            size = int(sh(vm, f"blockdev --getsize64 /dev/{disk}"))
            assert size == vm.volumes[name].size
        assert int(sh(vm, "awk '$1 == \"MemTotal:\" {print $2}' /proc/meminfo")) > 0
        swap = int(sh(vm, "awk 'END {print $3}' /proc/swaps"))
        assert swap << 10 > vm.volumes["volatile"].size - MIB
        asked = time.time()
        assert asked - 5 < int(sh(vm, "date +%s")) < time.time() + 5
        assert sh(vm, "ls -A /rw") == "config\nhome\nlost+found\nusrlocal"
        assert sh(vm, "pwd; touch here; ls -A", "user") == "/home/user\nhere"
    free = [int(sh(vm, "df -m /rw | awk 'END {print $2}'")) for vm in vms]
    assert free[1] > free[0] + 500
    sh(vms[0], "echo mine > /etc/mark; sync; echo 3 > /proc/sys/vm/drop_caches")
    assert sh(vms[0], "cat /etc/mark") == "mine"
    assert sh(vms[1], "ls /etc/mark 2>/dev/null || :") == ""
    run(vms[0].shutdown(wait=True))
    run(vms[0].start())
    assert sh(vms[0], "ls /etc/mark 2>/dev/null || :") == ""
    assert sh(vms[0], "ls ~user") == "here"


def test_a_template_that_was_changed_has_no_such_state(app, make_vm, run, sh, states):
    template = app.default_template
    run(template.start())
    sh(template, "echo changed > /etc/mark")
    run(template.shutdown(wait=True))
    del states[:]
    vm = make_vm("work")
    run(vm.start())
    assert [state.disks for state in states] == [()]
    assert sh(vm, "cat /etc/mark") == "changed"


def test_a_root_that_cannot_be_written(make_vm, run, sh, states):
    vm = make_vm("work")
    vm.volumes["root"].rw = False
    run(vm.start())
    run(vm.kill())
    run(vm.start())
    assert states[-1].disks
    assert sh(vm, "touch /etc/mark 2>&1 || :").endswith("Read-only file system")
