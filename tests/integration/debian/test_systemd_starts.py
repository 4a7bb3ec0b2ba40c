"""VMs that start from one saved state of systemd: what each has of its own."""

import asyncio
import subprocess
import time

import pytest
from own_clones import own_clones
from warm_states import found_states

from qubes_itests.guest.exc import GuestGoneError
from qubes_itests.guest.link.agent import GuestAgent

pytestmark = pytest.mark.parametrize("init", ["systemd"], indirect=True)

#: A unit of a VM's own, on its private disk, that looks at who the VM is.
UNIT = """\
[Unit]
ConditionPathExists=/run/qubes-service/test
ConditionPathExists=!/run/qubes-service/other
ConditionHost={host}
[Service]
Type=oneshot
ExecStart=/bin/sh -c 'cat /etc/machine-id; qubesdb-read /name; echo %H %m; ls -d ~user'
StandardOutput=truncate:/run/told
"""
#: One of the user's that runs once.
OF_USER = UNIT.replace("/run/told", "%t/told") + "RemainAfterExit=yes\n"

#: Waits for it, and shows what it has seen.
TOLD = "systemctl start told.service; cat /run/told"


def told_of(vm):
    return f"{vm.uuid.hex}\n{vm}\n{vm} {vm.uuid.hex}\n/home/user"


@pytest.fixture
def states(monkeypatch):
    """Return a list of the states that starts find from now on."""
    return found_states(monkeypatch)


def restart(pair, vm):
    pair.run(vm.shutdown(wait=True, timeout=600))
    pair.run(vm.start())


def test_clones_of_one_state_share_no_identity(pair, sh, states):
    restart(pair, pair.vault)
    assert [state.disks for state in states] == [("xvda", "xvdb", "xvdc")]
    for command in (
        "cat /etc/machine-id",
        "cat /proc/sys/kernel/random/boot_id",
        "cat /proc/sys/kernel/random/uuid",
        "head -c 32 /dev/urandom | sha256sum",
        "hostname",
        "systemctl show -P InvocationID systemd-journald",
        "systemctl --user show -P InvocationID default.target",
    ):
        assert sh(pair.work, command) != sh(pair.vault, command), command


def test_what_a_clone_has_rehearsed_is_not_seen(pair, sh, testbed, monkeypatch, caplog):
    """It has mounted and unmounted, and process 1 knows that; the VM began later."""
    caplog.set_level("INFO", "qubes_itests.guest")  # says why no clone was made
    vm, rehearsed, rehearse = pair.vault, [], GuestAgent.rehearse

    async def note_and_rehearse(agent, identity, **limit):
        await rehearse(agent, identity, **limit)
        rehearsed.append(identity.init)

    monkeypatch.setattr(GuestAgent, "rehearse", note_and_rehearse)
    with own_clones(testbed, pair.app, monkeypatch, 1) as ahead:
        restart(pair, vm)
        pair.run(asyncio.wait_for(ahead.settled(), 600))
        assert rehearsed == ["systemd"], caplog.text
        began = time.time()
        restart(pair, vm)
        assert vm.domain.libvirt_name.startswith("ahead-")
        assert sh(vm, "systemctl is-system-running --wait") == "running"
        first = "journalctl -q -o short-unix | sort -n | head -n 1"
        when, what = sh(vm, first, "root").split(maxsplit=1)
        assert float(when) > began - 1
        assert what.endswith("this guest has its identity")
        assert sh(vm, "ls -A /rw") == "config\nhome\nlost+found\nusrlocal"
        for file, line in (("mounts", " /rw "), ("swaps", "partition")):
            assert sh(vm, f"grep -c '{line}' /proc/{file}") == "1"
        for command in ("cat /etc/machine-id", "cat /proc/sys/kernel/random/boot_id"):
            assert sh(pair.work, command) != sh(vm, command), command
        asked = time.time()
        assert asked - 5 < int(sh(vm, "date +%s")) < time.time() + 5


def test_a_vm_is_the_same_machine_at_each_start(pair, sh):
    before = sh(pair.vault, "cat /etc/machine-id")
    restart(pair, pair.vault)
    assert sh(pair.vault, "cat /etc/machine-id") == before == pair.vault.uuid.hex


def test_all_programs_see_one_machine(pair, sh):
    """Process 1 and the bus have run in the state already."""
    vm = pair.work
    machine = sh(vm, "cat /etc/machine-id")
    peer = "org.freedesktop.DBus.Peer GetMachineId"
    assert sh(vm, f"busctl call org.freedesktop.systemd1 / {peer}", "root") == (
        f's "{machine}"'
    )
    unit = b"[Service]\nType=oneshot\nExecStart=echo %m %H\n"
    unit += b"StandardOutput=truncate:/run/told\n"
    sh(vm, "cat >/run/systemd/system/who.service", "root", unit)
    told = sh(vm, "systemctl start who.service; cat /run/told", "root")
    assert told == f"{machine} work"
    assert sh(vm, "grep -c _id /proc/mounts || :") == "0"


def test_a_journal_is_of_one_machine(pair, sh):
    for vm in (pair.work, pair.vault):
        machine = sh(vm, "cat /etc/machine-id")
        assert sh(vm, "ls /run/log/journal", "root") == machine
        assert sh(vm, "journalctl -q -F _MACHINE_ID", "root") == machine
        assert sh(vm, "journalctl -q -F _HOSTNAME", "root") == vm.name
        assert len(sh(vm, "journalctl -q -F _BOOT_ID", "root").split()) == 1


def test_clocks_are_right_and_timers_elapse(pair, sh):
    for vm in (pair.work, pair.vault):
        asked = time.time()
        assert asked - 5 < int(sh(vm, "date +%s")) < time.time() + 5
    for when in ("--on-active=100ms", "--on-boot=1s", '--on-calendar="*-*-* *:*:0/1"'):
        sh(
            pair.work,
            f"mkfifo /run/elapsed; systemd-run -q --timer-property=AccuracySec=1ms"
            f" {when} sh -c 'echo >/run/elapsed'; timeout 600 cat /run/elapsed;"
            " rm /run/elapsed; systemctl stop 'run-*.timer'",
            "root",
        )


def test_units_of_a_vm_find_who_it_is(pair, sh, states):
    vm = pair.vault
    place = "/usr/local/lib/systemd/system"
    sh(
        vm,
        f"mkdir -p {place}/multi-user.target.wants; cat >{place}/told.service;"
        f" ln -s ../told.service {place}/multi-user.target.wants",
        "root",
        UNIT.format(host="vault").encode(),
    )
    sh(
        vm,
        "cd; mkdir -p .config/environment.d .config/systemd/user/default.target.wants;"
        " cd .config; echo TOLD=home >environment.d/test.conf; cd systemd/user;"
        " cat >told.service; ln -s ../told.service default.target.wants",
        data=OF_USER.format(host="vault").encode(),
    )
    restart(pair, vm)
    assert [state.disks for state in states] == [("xvda", "xvdb", "xvdc")]
    assert sh(vm, TOLD, "root") == told_of(vm)
    assert sh(vm, "systemctl show -P ConditionResult told.service") == "yes"
    told = "systemctl --user start told; cat $XDG_RUNTIME_DIR/told"
    assert sh(vm, told) == told_of(vm)
    assert sh(vm, "systemctl --user show-environment | grep TOLD=") == "TOLD=home"
    sh(vm, "rm -r ~/.config")


def test_settings_on_the_private_disk_hold(pair, sh, states):
    """They are not there yet when systemd sets those of the root."""
    vm = pair.vault
    sh(
        vm,
        "mkdir -p /usr/local/lib; cd /usr/local/lib; mkdir sysctl.d tmpfiles.d;"
        " echo 'kernel.pid_max = refused' >sysctl.d/refused.conf;"
        " echo 'kernel.domainname = told' >sysctl.d/test.conf;"
        " echo 'f /run/noted 0600 user user - %H %m' >tmpfiles.d/test.conf",
        "root",
    )
    restart(pair, vm)
    assert [state.disks for state in states] == [("xvda", "xvdb", "xvdc")]
    assert sh(vm, "cat /proc/sys/kernel/domainname /run/noted") == (
        f"told\n{vm} {vm.uuid.hex}"
    )
    sh(vm, "rm -r /usr/local/lib/sysctl.d /usr/local/lib/tmpfiles.d", "root")


def test_files_of_the_system_are_made(pair, sh):
    """Those in /run before a state is saved, for none of the image's is of one VM."""
    active = "systemctl is-active qubes-tmpfiles systemd-tmpfiles-setup || :"
    assert sh(pair.work, active).split() == ["active", "inactive"]
    assert sh(pair.work, "stat -c '%A %U' /run/sudo /tmp/.X11-unix").split() == [
        *("drwx--x--x", "root"),
        *("drwxrwxrwt", "root"),
    ]


def test_logind_starts_once(pair, sh):
    command = "journalctl -q -u systemd-logind -o cat | grep -c 'New seat'"
    assert sh(pair.work, command, "root") == "1"


def test_commands_go_before_logind(pair, sh):
    """It may start still when the first of them is run."""
    assert sh(pair.work, "nice; systemctl show -P Nice systemd-logind") == "0\n10"
    assert sh(pair.work, "loginctl list-seats --no-legend") == "seat0"


def test_no_job_is_dropped_for_the_order_of_others(pair, sh):
    command = "journalctl -q -b -o cat _PID=1 | grep -c 'ordering cycle' || :"
    assert sh(pair.work, command, "root") == "0"
    after = "systemctl show -P After systemd-logind | grep -o qubes-session.socket"
    assert sh(pair.work, after) == "qubes-session.socket"


def test_the_session_is_that_of_a_user_who_lingers(pair, sh):
    assert sh(pair.work, "systemctl --user is-system-running --wait") == "running"
    assert sh(pair.work, "loginctl show-user user -P Linger") == "yes"


def test_what_a_user_makes_in_a_session_wakes_no_agent(pair, sh):
    """It has looked for a file there until the session had begun."""
    agent = "systemctl show -P MainPID qubes-qrexec-agent"
    watches = f"ls -l /proc/$({agent})/fd | grep -c inotify || :"
    assert sh(pair.work, watches, "root") == "0"


def test_a_session_that_is_started_anew_has_a_directory_of_its_own(pair, sh):
    # logind, once it is up, has the session start, and cancels a stop before that
    state = "loginctl show-user user -P State"
    sh(pair.vault, f"until {state} | grep -q lingering; do sleep 0.1; done")
    sh(pair.vault, "touch $XDG_RUNTIME_DIR/old; sudo systemctl stop user@1000.service")
    assert sh(pair.vault, "ls /run/user/1000 2>/dev/null || :", "root") == ""
    pair.run(pair.vault.run_service_for_stdio("qubes.WaitForSession", input=b"user\n"))
    assert sh(pair.vault, "systemctl --user is-system-running --wait") == "running"
    command = "stat -f -c %T $XDG_RUNTIME_DIR; ls $XDG_RUNTIME_DIR | grep old || :"
    assert sh(pair.vault, command) == "tmpfs"


def test_a_template_that_was_changed_has_no_state(pair, sh, states):
    template = pair.app.default_template
    pair.run(template.start())
    sh(
        template,
        "cat >/etc/systemd/system/told.service; systemctl enable told.service",
        "root",
        f"{UNIT.format(host='vault')}[Install]\nWantedBy=multi-user.target\n".encode(),
    )
    pair.run(template.shutdown(wait=True, timeout=600))
    del states[:]
    restart(pair, pair.vault)
    assert [state.disks for state in states] == [()]
    assert sh(pair.vault, TOLD, "root") == told_of(pair.vault)
    assert sh(pair.vault, "systemctl is-system-running --wait") == "running"
    # nor in the time before it had an identity, of which the journal has nothing
    assert sh(pair.vault, "dmesg | grep 'Failed to start' || :", "root") == ""


def test_an_agent_that_has_been_stopped_is_gone_while_its_vm_runs(pair, sh):
    """Who waits for it is told, and who calls it then.

    The VM starts again, also where its user has done away with the session.
    """
    sh(pair.vault, "systemctl --user mask default.target && sync")
    stop = "systemctl stop qubes-qrexec-agent.service"
    with pytest.raises(GuestGoneError, match="or its agent has stopped"):
        sh(pair.vault, stop, "root")
    with pytest.raises(GuestGoneError):
        sh(pair.vault, "true")
    with pytest.raises(subprocess.CalledProcessError):
        sh(pair.work, "qrexec-client-vm vault qubes.GetDate")
    assert pair.vault.is_running()
    pair.run(pair.vault.kill())
    pair.run(pair.vault.start())
    assert sh(pair.vault, "hostname") == "vault"
    session = "systemctl start user@1000.service 2>&1 || echo refused"
    assert sh(pair.vault, session, "root").endswith("refused")
    sh(pair.vault, "rm -r ~user/.config", "root")
