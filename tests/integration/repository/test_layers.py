"""Layers over a template: what they hold, when they are made again, how they fail."""

import os
import subprocess
import sys
import textwrap
import tomllib

import pytest
from conditions import wait_until

from qubes_itests.guest.exc import ImageError
from qubes_itests.guest.image.layer import Copy, Step, fetch_packages
from qubes_itests.guest.image.layer.root_files import read_image_file
from qubes_itests.host.loop import loop_devices_over
from qubes_itests.repository.core import CORE_TEMPLATES


def stat(image, path):
    """Return what debugfs says of a file in an image."""
    command = ["debugfs", "-R", f"stat {path}", image]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_files_and_commands_are_in_the_image_and_the_base_is_not_changed(bench):
    (bench.app / "src").mkdir()
    (bench.app / "src/tool").write_text("#!/bin/sh\n")
    (bench.app / "src/tool").chmod(0o755)
    (bench.app / "link").symlink_to("src/tool")
    os.chown(bench.app / "src", 1234, 1234)
    copies = (
        Copy(bench.app, "/usr/src/app"),
        # a link in the guest leads to a place in the guest
        Copy(bench.app / "src/tool", "/var/run/../opt/tool2"),
    )
    image = bench.build(
        "cat /usr/src/app/link >/etc/made; id -u >>/etc/made", copies=copies
    )
    assert read_image_file(image, "/etc/made") == "#!/bin/sh\n0\n"
    assert read_image_file(image, "/opt/tool2") == "#!/bin/sh\n"
    assert {"0755", "User:", "0"} <= set(stat(image, "/usr/src/app/src/tool"))
    assert stat(image, "/usr/src/app/src").count("1234") == 0
    assert read_image_file(bench.base, "/etc/made") is None
    subprocess.run(["e2fsck", "-f", "-n", image], check=True, capture_output=True)


@pytest.fixture
def umask():
    before = os.umask(0o077)
    yield
    os.umask(before)


@pytest.mark.usefixtures("umask")
def test_modes_are_those_of_git_whatever_the_umask(bench):
    """A checkout under umask 077 has 0700 and 0600; so had what is added."""
    (bench.app / "bin").mkdir()
    for name in ("file", "bin/tool"):
        (bench.app / name).write_text("x")
    (bench.app / "bin/tool").chmod(0o700)
    copies = [Copy(bench.app, "/opt/new/app"), Copy(bench.app / "file", "/srv/one")]
    image = bench.build("mkdir -p /var/made; : >/var/made/file", copies=copies)
    for path, mode in {
        "/opt/new": "0755",
        "/opt/new/app/bin": "0755",
        "/srv/one": "0644",
        "/opt/new/app/file": "0644",
        "/opt/new/app/bin/tool": "0755",
        "/var/made": "0755",
        "/var/made/file": "0644",
    }.items():
        assert mode in stat(image, path), path


def test_what_is_there_is_not_made_again(bench):
    image = bench.build("date +%N >/etc/made")
    assert bench.said == ["adding my-app"]
    assert bench.build("date +%N >/etc/made") == image
    assert bench.said == ["adding my-app"]
    assert not bench.log.exists()
    assert "run the commands of my-app" in (image.parent / "log").read_text()


def test_only_what_has_changed_and_what_is_over_it_is_made_again(bench):
    (bench.app / "file").write_text("1")
    more = (Step("other", (Copy(bench.app, "/app"),)),)
    first = bench.build(": low", more=more)
    bench.said.clear()
    (bench.app / "file").write_text("2")
    second = bench.build(": low", more=more)
    assert bench.said == ["adding other"]
    assert read_image_file(first, "/app/file") == "1"
    assert read_image_file(second, "/app/file") == "2"


def test_the_commands_see_no_network_no_process_and_few_devices(bench):
    image = bench.build(
        "ip -o link | wc -l >/etc/made; ls /proc | grep -c '^[0-9]' >>/etc/made;"
        " ls /dev >>/etc/made; echo x 2>/dev/null >/dev/null"
    )
    links, processes, *devices = read_image_file(image, "/etc/made").split()
    assert links == "1"
    assert int(processes) < 6
    streams = {"stdin", "stdout", "stderr", "fd", "ptmx", "pts", "shm"}
    assert set(devices) == {"null", "zero", "full", "random", "urandom"} | streams


def test_a_command_that_fails_is_told_with_the_end_of_what_it_said(bench):
    error = bench.fails("echo one; echo two >&2; exit 7; echo three")
    assert "run the commands of my-app: exit status 7" in str(error)
    assert error.output.endswith("one\ntwo")
    assert bench.log.read_text().endswith("one\ntwo\n")


def test_a_command_that_hangs_is_ended_at_its_deadline(bench):
    error = bench.fails("sleep 1000 & sleep 1000", timeout=1)
    assert "it did not end within 1 s" in str(error)


def test_what_a_command_leaves_running_is_ended(bench):
    assert bench.build("sleep 1000 & :").is_file()


def test_a_command_that_fills_the_disk_is_told(bench):
    error = bench.fails("dd if=/dev/zero of=/big bs=1M")
    assert "No space left on device" in error.output


def test_a_command_that_says_too_much_is_ended(bench):
    error = bench.fails("yes")
    assert "it said more than 16 MiB" in str(error)
    assert bench.log.stat().st_size < 17 << 20
    assert len(error.output.splitlines()) <= 30


def test_a_guest_without_agent_is_refused(bench):
    error = bench.fails("rm /usr/lib/qubes/qrexec-client-vm")
    assert "/usr/lib/qubes/qrexec-client-vm is not there any more" in str(error)


def test_a_guest_has_no_identity_of_its_own(bench):
    image = bench.build("echo 1234 >/etc/machine-id")
    assert read_image_file(image, "/etc/machine-id") == ""


def test_a_base_without_packages_is_told(bench):
    with pytest.raises(ImageError, match=r"tiny, the mini template.*no packages"):
        fetch_packages(bench.cache, "mine", bench.base, ("make",), bench.said.append)


def test_an_image_that_is_none_is_told(bench, tmp_path):
    bench.base = tmp_path / "odd.img"
    bench.base.write_bytes(b"x" * 4096)
    assert "wrong fs type" in str(bench.fails(":"))
    with pytest.raises(ImageError, match="of an unknown kind"):
        fetch_packages(bench.cache, "mine", bench.base, ("make",), bench.said.append)


BUILD = """
    import sys
    from pathlib import Path
    from qubes_itests.guest.image.layer import Layers, Step, build_layers
    from qubes_itests.host.cache import Cache

    cache, base, log = map(Path, sys.argv[1:])
    steps = (Step("app", (), "echo begun; sleep 1000"),)
    build_layers(Cache(cache), Layers("mine", base, steps=steps), log, print)
"""


def test_a_build_that_is_killed_leaves_no_process_and_no_mount(bench, tmp_path):
    log = tmp_path / "log"
    words = ["-c", textwrap.dedent(BUILD), bench.cache.root, bench.base, log]
    with subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE) as process:
        wait_until(lambda: log.is_file() and "begun" in log.read_text(), "the script")
        (image,) = bench.cache.root.glob("layer/.*@*/root.img")
        assert loop_devices_over(image)
        process.kill()
    wait_until(lambda: not loop_devices_over(image), "the end of the loop device")
    bench.build(":")  # the lock is free


#: Has what the script of a template for cores finds in Debian.
DEBIAN = r"""
mkdir -p /usr/sbin /lib/systemd
for each in /bin/udevadm /usr/sbin/dmsetup; do
    printf '#!/bin/sh\necho "${0##*/} $*"\n' >$each
done
cat >/bin/dpkg-divert <<'END'
#!/bin/sh
for last; do :; done
[ "$3" = --divert ] && to=$4 || to=$last.distrib
mv "$last" "$to"
END
chmod 755 /bin/udevadm /usr/sbin/dmsetup /bin/dpkg-divert
ln -s /bin/udevadm /lib/systemd/systemd-udevd
"""


def test_udevd_is_udevadm_before_which_another_program_stands(bench):
    """Without it a guest with systemd does not start."""
    text = CORE_TEMPLATES.read_text()
    template = tomllib.loads(text)["tool"]["qubes_itests"]["template"]["debian-12"]
    image = bench.build(
        f"{DEBIAN}{template['run']}"
        "for each in /lib/systemd/systemd-udevd '/bin/udevadm settle'"
        " '/bin/udevadm info' '/usr/sbin/dmsetup ls'; do $each; done >/etc/made",
        copies=[Copy(CORE_TEMPLATES.with_name("core_template"), "/")],
    )
    assert read_image_file(image, "/etc/made").splitlines() == [
        *("systemd-udevd ", "udevadm info", "dmsetup ls"),
    ]
