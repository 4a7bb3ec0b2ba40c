"""Guests of Debian, with our init and with systemd: what plugins find in them."""

import contextlib
import fcntl
import os
import pty
import re
import struct
import subprocess
import termios

import pytest

from qubes_itests.shell import open_shell

#: For what only systemd offers.
only_systemd = pytest.mark.parametrize("init", ["systemd"], indirect=True)


def test_process_1_is_what_the_feature_says(pair, sh):
    assert sh(pair.work, "readlink /proc/1/exe", "root") == {
        "agent": "/init",
        "systemd": "/usr/lib/systemd/systemd",
    }[pair.init].replace("/init", "/init (deleted)")


def test_users_are_those_of_a_qubes_vm(pair, sh):
    assert sh(pair.work, "id -un; id -u; pwd").split() == ["user", "1000", "/home/user"]
    assert "qubes" in sh(pair.work, "id -Gn").split()
    assert sh(pair.work, "id -u", "root") == "0"
    assert sh(pair.work, "sudo -n id -u") == "0"


def test_home_is_on_the_private_volume(pair, sh):
    sources = sh(pair.work, "stat -c %d /rw /home/user /usr/local / | sort | uniq -c")
    assert sorted(line.split()[0] for line in sources.splitlines()) == ["1", "3"]
    assert sh(pair.work, "stat -c '%U %a' /home/user /rw/config") == (
        "user 700\nroot 755"
    )


def test_the_user_has_a_runtime_directory(pair, sh):
    path = sh(pair.work, "echo $XDG_RUNTIME_DIR")
    assert sh(pair.work, f"stat -c '%U %a' {path}") == "user 700"


def test_services_are_files(pair, sh):
    assert sh(pair.work, "ls /run/qubes-service") == "test"


def test_the_database_knows_the_vm(pair, sh):
    assert sh(pair.work, "qubesdb-read /name; qubesdb-read /qubes-base-template") == (
        "work\ndebian-12"
    )


def test_a_shell_has_a_terminal(pair, testbed):
    """Whatever the image has: the agent brings it."""
    typist, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 30, 100, 0, 0))
    modes = termios.tcgetattr(terminal)
    os.write(typist, b"stty size; tty; id -un; echo e''nd; exit 7\n")
    before = [os.dup(number) for number in (0, 1)]
    try:
        for number in (0, 1):
            os.dup2(terminal, number)
        status = open_shell(testbed.portal, pair.work.running_agent())
        restored = termios.tcgetattr(terminal)
    finally:
        for number, own in enumerate(before):
            os.dup2(own, number)
            os.close(own)
        os.close(terminal)
    shown = b""
    with contextlib.suppress(OSError):  # EIO is the end
        while data := os.read(typist, 65536):
            shown += data
    os.close(typist)
    assert (status, restored) == (7, modes)
    assert re.search(rb"30 100\r\n/dev/pts/\d+\r\nroot\r\nend\r\n", shown)


def test_files_are_copied_to_another_vm(pair, sh):
    sh(pair.work, "mkdir -p 'a dir/b'; head -c 2000000 /dev/urandom >'a dir/b/c'")
    sum_here = sh(pair.work, "sha256sum <'a dir/b/c'")
    sh(pair.work, "qvm-copy-to-vm vault 'a dir'")
    assert sh(pair.vault, "sha256sum <'QubesIncoming/work/a dir/b/c'") == sum_here


def test_a_command_runs_in_another_vm(pair, sh):
    assert sh(pair.work, "echo in | qvm-run-vm vault 'cat; hostname'") == "in\nvault"
    status = sh(pair.work, "qvm-run-vm vault 'exit 7' </dev/null || echo $?")
    assert status == "7"


def test_a_file_is_opened_in_another_vm_and_comes_back(pair, sh):
    sh(
        pair.vault,
        "printf '#!/bin/sh\\nhostname >>\"$1\"\\n' >/usr/lib/qubes/open-file",
        "root",
    )
    sh(pair.work, "echo old >notes; qvm-open-in-vm vault notes")
    assert sh(pair.work, "cat notes") == "old\nvault"


@pytest.mark.parametrize("become", ["", "sudo -n -E "])
def test_a_service_may_have_one_socket_for_both_ways(pair, sh, become):
    """Also one that has become root since, as who exports devices does."""
    script = "kill -USR1 $QREXEC_AGENT_PID; echo $1 >&0; read x; echo got $x >&0"
    sh(
        pair.vault,
        "cat >/etc/qubes-rpc/test.One; chmod 755 /etc/qubes-rpc/test.One",
        "root",
        f"#!/bin/sh\nexec {become}sh -c '{script}' sh \"$1\"\n".encode(),
    )
    local = "read x; echo more; cat >&$SAVED_FD_1"
    call = f"qrexec-client-vm vault test.One+a /bin/sh -c '{local}'"
    assert sh(pair.work, call) == "got more"


def test_the_host_writes_the_database_after_users_did(pair, sh):
    assert sh(pair.work, "qubesdb-write /own 1; qubesdb-read /own") == "1"
    sh(pair.work, "ln -s /etc/passwd /run/qubes/db/.new-1")
    pair.run(pair.work.agent.write_db("/own", "2"))
    assert sh(pair.work, "qubesdb-read /own; qubesdb-rm /own; qubesdb-list /own") == "2"


def test_the_session_has_begun(pair):
    pair.run(pair.work.run_service_for_stdio("qubes.WaitForSession", input=b"user\n"))


@only_systemd
def test_all_of_the_system_is_up(pair, sh):
    assert sh(pair.work, "systemctl is-system-running --wait") == "running"
    assert sh(pair.work, "systemctl --user is-system-running --wait") == "running"
    assert sh(pair.work, "systemctl show -P ActiveState user@1000") == "active"


@only_systemd
def test_a_unit_of_the_user_runs_in_the_session(pair, sh):
    sh(pair.work, "mkdir -p ~/.config/systemd/user")
    sh(
        pair.work,
        "cat >~/.config/systemd/user/test.service && systemctl --user daemon-reload",
        data=(
            b"[Unit]\nConditionPathExists=/run/qubes-service/test\n"
            b"[Service]\nType=oneshot\nExecStart=/bin/sh -c 'id -un >%t/told'\n"
        ),
    )
    sh(pair.work, "systemctl --user start test.service")
    assert sh(pair.work, "cat /run/user/1000/told") == "user"


@only_systemd
def test_a_session_has_a_bus(pair, sh):
    listed = sh(pair.work, "busctl --user --no-pager --no-legend list")
    assert "org.freedesktop.systemd1" in listed


def test_a_guest_powers_off_and_comes_back_with_its_home(pair, sh):
    vm = pair.vault
    sh(vm, "echo kept >kept; echo lost | sudo tee /etc/lost")
    pair.run(vm.shutdown(wait=True, timeout=600))
    pair.run(vm.start())
    assert sh(vm, "cat kept; ls /etc/lost 2>/dev/null || echo gone") == "kept\ngone"


def test_a_guest_that_powers_off_by_itself_is_halted(pair, sh):
    # its command may be cut off before it ends
    pair.run(pair.vault.run("sleep 0.1; poweroff", user="root"))
    pair.run(pair.vault.wait_ended(60))
    assert pair.vault.is_halted()
    pair.run(pair.vault.start())
    assert sh(pair.vault, "hostname") == "vault"


def test_the_root_grows_in_a_running_guest(pair, sh):
    """The image of 2 GiB has a small journal, in which there must be room for this."""
    size = 20 << 30
    pair.run(pair.vault.storage.resize("root", size))
    blocks, each = sh(pair.vault, "stat -f -c '%b %S' /").split()
    assert size * 0.97 < int(blocks) * int(each) < size


def test_an_init_that_nobody_knows_is_told(pair):
    vm = pair.app.add_new_vm("AppVM", name="odd", label="red")
    vm.features["init"] = "upstart"
    pair.run(vm.create_on_disk())
    with pytest.raises(Exception, match="init is agent or systemd"):
        pair.run(vm.start())
    assert vm.is_halted()


def test_a_failing_command_is_no_failure_of_the_guest(pair):
    with pytest.raises(subprocess.CalledProcessError):
        pair.sh(pair.work, "false")
    assert pair.sh(pair.work, "echo on") == "on"
