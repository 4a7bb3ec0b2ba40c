"""The checks of the host, on this machine and on some that lack something."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from qubes_itests.host import packages, preflight, sandbox
from qubes_itests.host.cache import Cache
from qubes_itests.host.exc import MissingToolError, NoKernelError
from qubes_itests.host.loop import loop_devices_over


def _checks_where(before: str, cache: Path) -> dict[str, preflight.Check]:
    """Return the checks in a mount namespace of its own, after shell commands."""
    code = """
        import json, sys
        from pathlib import Path
        from qubes_itests.host.cache import Cache
        from qubes_itests.host.preflight import check_all
        checks = check_all(Cache(Path(sys.argv[1])))
        print(json.dumps([check.as_dict() for check in checks]))
    """
    script = f'set -e; {before}\nexec "$0" "$@"'
    command = [sys.executable, "-c", textwrap.dedent(code), str(cache)]
    environment = {**os.environ}
    environment.pop("QUBES_ITESTS_SANDBOX", None)
    output = subprocess.run(
        ["unshare", "--mount", "bash", "-c", script, *command],
        env=environment,
        capture_output=True,
        check=True,
        timeout=300,
    ).stdout
    return {values["name"]: preflight.Check(**values) for values in json.loads(output)}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Return a cache with a kernel in it, which only looks like one."""
    monkeypatch.delenv("QUBES_ITESTS_KERNEL", raising=False)

    def build(place: Path) -> None:
        (place / "lib/modules/1.2").mkdir(parents=True)
        (place / "boot").mkdir()
        (place / "boot/vmlinuz-1.2").touch()

    cache = Cache(tmp_path / "cache")
    cache.entry("kernel", "fake", build)
    return cache


def test_this_machine_is_ready(cache):
    checks = preflight.check_all(cache)
    assert [check for check in checks if check.state == "fail"] == []
    assert {"root", "loop devices", "namespaces", "qemu-system-x86_64"} <= {
        check.name for check in checks
    }
    preflight.require_ready(cache)


def test_a_real_loop_device_is_attached_and_let_go(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert preflight.try_loop_device().startswith("/dev/loop")
    attached = [Path(p).read_text() for p in Path("/sys/block").glob("loop*/loop/b*")]
    assert not [name for name in attached if str(tmp_path) in name]
    assert loop_devices_over(tmp_path) == ()


#: A /dev of its own without nodes of loop devices, as a container has it.
OWN_DEV = """
mount -t tmpfs none {directory}
cp -a /dev/null /dev/zero /dev/full /dev/random /dev/urandom {directory}
cp -a /dev/tty /dev/fd /dev/loop-control {directory}
mkdir {directory}/shm {directory}/pts
mount --move {directory} /dev
"""


def test_nodes_that_a_container_has_not_are_made_in_the_sandbox(cache, tmp_path):
    (tmp_path / "dev").mkdir()
    (tmp_path / "mounted").mkdir()
    before = OWN_DEV.format(directory=tmp_path / "dev")
    assert _checks_where(before, cache.root)["loop devices"].state == "ok"
    code = """
        import sys
        from pathlib import Path
        from qubes_itests.host.filesystem import FilesystemType, LoopFilesystem
        place = Path(sys.argv[1])
        kind = FilesystemType.BTRFS
        for _ in range(2):
            image, point = place / "image", place / "point"
            with LoopFilesystem(image, point, kind=kind, size=128 << 20) as made:
                (made.mount_point / "file").write_text("written")
                made.remount()
                print((made.mount_point / "file").read_text())
    """
    words = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    script = f'set -e; {before}\n"$@"; ! ls /dev | grep "loop[0-9]"'
    done = subprocess.run(
        ["unshare", "--mount", "bash", "-c", script, "bash", *sandbox.command(words)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.stdout == "written\nwritten\n", done.stderr
    assert done.returncode == 0


def test_without_loop_control(cache, tmp_path):
    (tmp_path / "none").touch()
    before = f"mount --bind {tmp_path}/none /dev/loop-control"
    check = _checks_where(before, cache.root)["loop devices"]
    assert (check.state, check.exit_code) == ("fail", 11)
    assert "modprobe loop" in check.remedy


def test_a_program_that_is_missing_is_named_with_its_package(cache):
    """Its file is hidden, and everything else is found as before."""
    before = 'd=$(command -v mkfs.xfs); mount --bind /dev/null "$(readlink -f $d)"'
    checks = _checks_where(before, cache.root)
    assert [c.name for c in checks.values() if c.state == "fail"] == ["mkfs.xfs"]
    check = checks["mkfs.xfs"]
    assert check.exit_code == 12
    assert check.remedy.endswith("apt-get install --no-install-recommends xfsprogs")


def test_libvirts_driver_that_is_missing_is_named(cache):
    name = "libvirt_driver_qemu.so"
    before = f"mount -t tmpfs none $(dirname $(ls /usr/lib/*/libvirt/*/{name}))"
    check = _checks_where(before, cache.root)[name]
    assert (check.state, check.exit_code) == ("fail", 12)


def test_a_dynamic_busybox_will_not_do(cache):
    before = 'mount --bind "$(readlink -f /bin/ls)" "$(command -v busybox)"'
    check = _checks_where(before, cache.root)["busybox"]
    assert (check.state, check.exit_code) == ("fail", 12)


def test_a_run_does_not_begin_without_kernel_or_tool(tmp_path, cache, monkeypatch):
    monkeypatch.setenv("QUBES_ITESTS_KERNEL", str(tmp_path / "none"))
    with pytest.raises(NoKernelError):
        preflight.require_ready(cache)
    brought_by = {"debian": "none", "ubuntu": "none"}
    lacking = packages.Need("tool", "no-such-tool", "is for this test", brought_by)
    monkeypatch.setattr(packages, "needs_here", lambda: [lacking])
    with pytest.raises(MissingToolError, match="no-such-tool is not installed"):
        preflight.require_ready(cache)


def test_without_root_the_other_checks_are_still_made():
    """As nobody: what needs root fails with its own status, programs are found."""
    code = """
        import json, os
        from pathlib import Path
        from qubes_itests.host.cache import Cache
        from qubes_itests.host.preflight import check_all
        os.environ["HOME"] = "/nonexistent"
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        print(json.dumps([check.as_dict() for check in check_all()]))
    """
    environment = {**os.environ}
    for name in ("QUBES_ITESTS_SANDBOX", "QUBES_ITESTS_CACHE"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    states = {c["name"]: (c["state"], c["exit_code"]) for c in json.loads(done.stdout)}
    assert states["root"] == ("fail", 10)
    assert states["loop devices"][0] == "fail"
    assert states["namespaces"] == ("fail", 10)
    assert states["cache"][0] == "fail"
    assert states["mkfs.btrfs"] == ("ok", 0)
