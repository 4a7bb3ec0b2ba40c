"""What commands of an app cannot do while they make a layer: docs/templates.md."""

import subprocess
from pathlib import Path

import pytest

from qubes_itests.guest.image.layer.confine import CAPABILITIES
from qubes_itests.guest.image.layer.root_files import read_image_file

#: Each would reach the host, or would lead to what does. With chroot(2) alone those on
#: the root, /proc/sys, devices, mounts, the host's name and its kernel succeed.
ATTACKS = {
    # the root of the mount namespace was the host's
    "leave the root": "nsenter -t 1 -m sh -c '[ -e {here} ]'",
    "leave by a second chroot": "chroot / true",
    # files of root's, for which no capability is asked
    "write /proc/sys": "cat /proc/sys/kernel/core_pattern >/tmp/x"
    " && cat /tmp/x >/proc/sys/kernel/core_pattern",
    "press a key for the kernel": "echo h >/proc/sysrq-trigger",
    "make /proc/sys writable": "mount -o remount,bind,rw /proc/sys",
    "uncover /proc/sys": "umount /proc/sys",
    # what would be an own user namespace's to mount shows what is masked
    "mount /proc anew": "unshare --user --map-root-user --mount --pid --fork"
    " mount -t proc none /mnt",
    "uncover /proc/sys in a user namespace": "unshare --user --map-root-user --mount"
    " umount /proc/sys",
    "make /proc/sys writable in a user namespace": "unshare --user --map-root-user"
    " --mount mount -o remount,bind,rw /proc/sys",
    "write in /sys": ": >/sys/x",
    "see devices of the host": "mount -t sysfs none /sys && ls /sys/block",
    "read messages of the kernel": "dmesg | grep .",
    "make a device": "mknod /tmp/disk b 7 0",
    # the device is the host's own
    "close /dev/null to others": "chmod 666 /dev/null",
    "mount": "mount -t tmpfs none /mnt",
    "name the host": "hostname owned",
    "hand down a descriptor": "for fd in /proc/$$/fd/*; do readlink $fd; done |"
    " grep -v -e ^pipe: -e ^/dev/null$ -e ^/etc/made$",
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory, make_bench):
    bench = make_bench(tmp_path_factory.mktemp("attacks"))
    here = Path(__file__).parent
    tries = (
        f'if ( {attack.format(here=here)} ) >/tmp/said 2>&1; then echo "{name}: done";'
        f' else echo "{name}: refused"; fi >>/etc/made'
        for name, attack in ATTACKS.items()
    )
    state = "hostname; cat /proc/self/status /proc/self/mountinfo"
    image = bench.build("\n".join([*tries, f"({state}) >/etc/state"]))
    lines = read_image_file(image, "/etc/made").splitlines()
    state = read_image_file(image, "/etc/state").splitlines()
    return dict(line.split(": ") for line in lines), state


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_is_refused(outcomes, attack):
    assert outcomes[0][attack] == "refused"


def test_no_capability_is_left_but_those_that_packages_need(outcomes):
    kept = f"{sum(1 << number for number in CAPABILITIES.values()):016x}"
    seen = [line.split() for line in outcomes[1] if line.startswith("Cap")]
    assert dict(seen) == {
        "CapInh:": "0" * 16,
        "CapAmb:": "0" * 16,
        "CapPrm:": kept,
        "CapEff:": kept,
        "CapBnd:": kept,
    }


def test_nothing_of_the_host_is_mounted_but_its_harmless_devices(outcomes):
    mounts = [line.split() for line in outcomes[1] if " - " in line]
    shown = {fields[4]: set(fields[5].split(",")) for fields in mounts}
    assert "nodev" in shown["/"]
    of_host = [fields[4] for fields in mounts if "devtmpfs" in fields]
    nodes = {f"/dev/{name}" for name in ("null", "zero", "full", "random", "urandom")}
    masks = {name for name in of_host if name.startswith("/proc/")}
    assert nodes | masks == set(of_host)
    assert all("ro" in shown[name] for name in of_host)
    others = {name for name in shown if not name.startswith(("/dev", "/proc"))}
    assert others == {"/", "/run", "/sys"}


def test_the_name_of_the_host_is_not_told(outcomes):
    assert outcomes[1][0] == "localhost"


def test_what_scripts_of_packages_do_is_left(bench):
    image = bench.build(
        "mkdir /srv; chown 7:8 /srv; chmod 2755 /srv; stat -c '%u %g %a' /srv >/made\n"
        "su user -s /bin/sh -c 'id -un' >>/made\n"
        "sleep 1000 & kill -9 $!; grep -c MemTotal /proc/meminfo >>/made"
    )
    assert read_image_file(image, "/made") == "7 8 2755\nuser\n1\n"


def test_an_image_that_would_mount_elsewhere_is_refused(bench, tmp_path):
    """A mount on a link in the image would cover what it leads to on the host."""
    base = tmp_path / "base.img"
    subprocess.run(["cp", "--sparse=always", bench.base, base], check=True)
    for change in ("rmdir /sys", "symlink /sys /etc"):
        subprocess.run(["debugfs", "-w", "-R", change, base], check=True)
    bench.base = base
    assert "/sys is no directory" in str(bench.fails(":"))
