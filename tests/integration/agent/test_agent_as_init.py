"""The agent as init of a real guest: its two stages, its disks, and its end."""

from __future__ import annotations

import signal
import subprocess
import time
from typing import TYPE_CHECKING

import pytest
from agent_wire import CALL, DATA, EXIT, POWER_OFF, STOP, pour
from raw_guest import deadline_loop, make_disks

from qubes_itests.guest.image.private import make_private

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from raw_guest import RawGuest

    from .conftest import Parts

    BootGuest = Callable[..., RawGuest]


def test_disks_have_their_names(guest: RawGuest) -> None:
    prefix = "sd" if guest.bus == "scsi" else "vd"
    for name in ("xvda", "xvdb", "xvdc"):
        target = guest.output(f"readlink /dev/{name}").strip()
        serial = "cat /sys/block/{}/{} | tr -cd 'a-z'"
        file = "device/vpd_pg80" if guest.bus == "scsi" else "serial"
        assert target.startswith(prefix)
        assert guest.output(serial.format(target, file)) == name


def test_root_private_and_volatile_are_in_use(guest: RawGuest) -> None:
    mounts = {
        line.split()[1]: line.split()[:4]
        for line in guest.output("cat /proc/mounts").splitlines()
    }
    assert mounts["/"][2] == "ext4"
    assert mounts["/rw"][2] == "ext4"
    assert mounts["/home"][0] == mounts["/rw"][0] == mounts["/usr/local"][0]
    assert {mounts[path][2] for path in ("/run", "/tmp", "/dev/shm")} == {"tmpfs"}  # noqa: S108
    assert mounts["/dev/pts"][2] == "devpts"
    swap = guest.output("readlink -f /dev/xvdc").strip()
    assert guest.output("cat /proc/swaps").splitlines()[1].split()[0] == swap


def test_private_fills_its_disk(guest: RawGuest) -> None:
    size = int(guest.output("df -k /rw | tail -n 1 | awk '{print $2}'"))
    assert size > 38_000


def test_initramfs_is_gone(guest: RawGuest) -> None:
    assert guest.output("ls -d /lib/virtio* /modules /sysroot 2>/dev/null; :") == ""


def test_guest_has_its_identity(guest: RawGuest) -> None:
    assert guest.output("hostname; qubesdb-read /name") == "tiny\ntiny\n"
    assert guest.output("qubesdb-read /qubes-x") == "y=z\n"
    assert guest.output("ls -A /run/qubes-service") == "one\n"
    asked = time.time()
    assert asked - 5 < int(guest.output("date +%s")) < time.time() + 5


def test_loopback_is_up(guest: RawGuest) -> None:
    assert "127.0.0.1" in guest.output("ip address show lo; ip route show table local")


def test_user_is_logged_in(guest: RawGuest) -> None:
    out = guest.output("id -u; id -un; pwd; echo $0 $XDG_RUNTIME_DIR", user="")
    assert out == "1000\nuser\n/home/user\n-sh /run/user/1000\n"
    assert guest.output("stat -c '%a %U' /run/user/1000 /home/user") == (
        "700 user\n700 user\n"
    )
    assert "qubes" in guest.output("id -Gn", user="").split()


@pytest.mark.parametrize("user", ["root", "user"])
def test_stdio_can_be_opened_by_name(guest: RawGuest, user: str) -> None:
    """The pipes belong to whoever runs the command."""
    script = "cat /dev/stdin; echo error > /dev/stderr"
    result = guest.wire.run(script, b"through names", user=user)
    assert (result.stdout, result.stderr) == (b"through names", b"error\n")


def test_writer_without_a_reader_ends(guest: RawGuest) -> None:
    stream = guest.wire.spawn("exec yes")
    guest.wire.expect(DATA, stream)
    guest.wire.send(STOP, 1, stream)
    result = guest.wire.finish(stream)
    assert (result.kind, result.value) in {(1, signal.SIGPIPE), (0, 1)}


def test_root_is_root(guest: RawGuest) -> None:
    assert guest.output("id -u; pwd; ls -d /rw/config") == "0\n/root\n/rw/config\n"


def test_shared_memory_and_temporary_files_are_for_all(guest: RawGuest) -> None:
    modes = guest.output("stat -c %a /tmp /dev/shm /dev/null", user="")
    assert modes == "1777\n1777\n666\n"


def test_orphans_are_reaped(guest: RawGuest) -> None:
    guest.output("(sleep 0.1 &) ; for i in 1 2 3; do (true &); done")
    for _ in deadline_loop("orphans to be reaped"):
        states = guest.output("cat /proc/[0-9]*/stat 2>/dev/null; :")
        if ") Z 1 " not in states:
            break


def test_big_streams_flow_both_ways_at_once(guest: RawGuest) -> None:
    assert pour(guest.wire, "cat", 16 << 20).value == 0


def test_call_goes_out_of_a_real_guest(guest: RawGuest) -> None:
    stream = guest.wire.spawn("echo hi | qrexec-client-vm dom0 t.S; exit $?")
    got = guest.wire.receive()
    while got and got.type != CALL:
        got = guest.wire.receive()
    assert got
    assert got.payload == b"dom0\0t.S\0user\0"
    assert guest.wire.expect(DATA, got.stream).payload == b"hi\n"
    guest.wire.write(got.stream, b"back", 1)
    guest.wire.send(EXIT, 0, got.stream, b"\0\x07")
    result = guest.wire.finish(stream)
    assert (result.value, result.stdout) == (7, b"back")


def test_plugged_disk_gets_its_name_and_loses_it(
    guest: RawGuest, tmp_path: Path
) -> None:
    image = tmp_path / "extra.img"
    image.write_bytes(b"extra".ljust(1 << 20, b"\0"))
    guest.plug("xvdi", image)
    for _ in deadline_loop("/dev/xvdi"):
        if guest.wire.run("test -b /dev/xvdi", user="root").value == 0:
            break
    assert guest.output("head -c 5 /dev/xvdi") == "extra"
    guest.control("device_del", id="xvdi")
    for _ in deadline_loop("/dev/xvdi to go"):
        if guest.wire.run("test -L /dev/xvdi", user="root").value == 1:
            break


def test_commands_are_refused_where_memory_is_short(guest: RawGuest) -> None:
    """The guest goes on, and they start again when there is memory."""
    limit = "/proc/sys/vm/overcommit_memory"
    end = guest.wire.spawn(f"read line; echo 0 > {limit}", user="root")
    guest.output(
        f"swapoff -a; echo 1 > /proc/sys/vm/overcommit_kbytes; echo 2 > {limit}"
    )
    # at once, so that they need more than what earlier ones have left in the heap
    waiting = {guest.wire.spawn("true", user="root") for _ in range(8)}
    results = []
    while waiting:
        got = guest.wire.receive()
        assert got
        if got.type == EXIT:
            waiting.remove(got.stream)
            results.append(got.payload)
    guest.wire.write(end, b"\n")
    assert guest.wire.finish(end).value == 0
    assert {result[:2] for result in results} == {b"\2\x7e"}
    assert b"there is no memory for it" in {result[2:] for result in results}
    assert guest.output("swapon /dev/xvdc; echo ok") == "ok\n"


def test_second_enter_is_refused(guest: RawGuest) -> None:
    assert "stage two" in (guest.enter() or "")


def test_new_connection_finds_the_same_guest(guest: RawGuest) -> None:
    """What the old one had running is killed."""
    stream = guest.wire.spawn("echo $$; sleep 600")
    pid = int(guest.wire.expect(DATA, stream).payload)
    guest.reconnect()
    guest.wire.hello()
    assert guest.output("hostname") == "tiny\n"
    assert guest.wire.run(f"test -e /proc/{pid}").value == 1


def test_refused_enter_leaves_stage_one_as_it_was(
    boot_guest: BootGuest, parts: Parts, tmp_path: Path
) -> None:
    """What is wrong is named; with right keys, and all disks there, it goes on."""
    guest = boot_guest(disks={})
    assert "seed" in (guest.enter(seed="xyz") or "")
    assert "without a name" in (guest.enter(init="systemd") or "")
    assert "no disk xvda" in (guest.enter(deadline="0.2") or "")
    assert guest.wire.run("true", user="root").value == 127
    for name, image in make_disks(tmp_path, parts.root).items():
        guest.plug(name, image)
    assert guest.enter() is None
    assert guest.output("hostname") == "tiny\n"


def test_useless_disks_are_told(boot_guest: BootGuest, tmp_path: Path) -> None:
    """Neither a disk without a filesystem nor an empty one ends the agent."""
    disks = {name: tmp_path / name for name in ("xvda", "xvdb", "xvdc")}
    for image in disks.values():
        image.write_bytes(bytes(16 << 20))
    subprocess.run(["mke2fs", "-q", "-t", "ext4", disks["xvdb"]], check=True)
    guest = boot_guest(disks)
    assert "/dev/xvda" in (guest.enter() or "")
    assert guest.enter(root="xvdb", private="xvda")
    guest.reconnect()
    guest.wire.hello()


def test_a_home_that_the_host_has_made_is_its_users(
    boot_guest: BootGuest, parts: Parts, tmp_path: Path
) -> None:
    """With the group; and the first of two whose home it is keeps it."""
    disks = make_disks(tmp_path, parts.root)
    make_private(disks["xvdb"], 32 << 20)
    passwd = tmp_path / "passwd"
    passwd.write_text(
        "root:x:0:0::/root:/bin/sh\n"
        "user:x:1001:98::/home/user:/bin/sh\n"
        "other:x:1000:1000::/home/user:/bin/sh\n"
        "new:x:1002:1002::/home/new:/bin/sh\n"
    )
    for change in ("rm /etc/passwd", f"write {passwd} /etc/passwd"):
        command = ["debugfs", "-w", "-R", change, disks["xvda"]]
        subprocess.run(command, check=True)
    guest = boot_guest(disks)
    assert guest.enter() is None
    assert guest.output("stat -c '%a %u %g' /home /home/*") == (
        "755 0 0\n700 1002 1002\n700 1001 98\n"
    )


def test_read_only_root_stays_as_it_was(boot_guest: BootGuest) -> None:
    guest = boot_guest()
    before = guest.disks["xvda"].read_bytes()
    assert guest.enter(**{"root-mode": "ro"}) is None
    assert guest.wire.run("touch /x", user="root").value == 1
    assert guest.output("touch /home/user/x /rw/y; echo ok") == "ok\n"
    power_off(guest)
    assert guest.disks["xvda"].read_bytes() == before


def power_off(guest: RawGuest) -> None:
    guest.wire.send(POWER_OFF, payload=b"\0")
    guest.process.wait(300)


def clean(image: Path) -> bool:
    """Whether a filesystem was unmounted, and is sound."""
    check = subprocess.run(["e2fsck", "-fn", image], capture_output=True, check=False)
    return check.returncode == 0 and b"recovering" not in check.stdout


@pytest.mark.parametrize("way", ["host", "poweroff", "reboot", "halt"])
def test_every_end_is_clean(boot_guest: BootGuest, way: str) -> None:
    """Files are on the disk, and filesystems need no recovery, whoever ends it."""
    guest = boot_guest()
    assert guest.enter() is None
    guest.output("echo kept > /home/user/file; sleep 600 >/dev/null 2>&1 &")
    guest.wire.spawn("trap '' TERM; sleep 600")
    if way == "host":
        power_off(guest)
    else:
        guest.wire.spawn(way, user="root")
        guest.process.wait(300)
    assert "Power down" in guest.console.read_text() or way == "reboot"
    assert clean(guest.disks["xvda"])
    assert clean(guest.disks["xvdb"])
    dump = ["debugfs", "-R", "cat /home/user/file", guest.disks["xvdb"]]
    kept = subprocess.run(dump, capture_output=True, check=True)
    assert kept.stdout == b"kept\n"
