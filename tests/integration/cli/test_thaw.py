"""Failed tests that are frozen with ``--keep=state``, and what is thawed from them."""

import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from terminal_user import TerminalUser

PLUGIN = r"""
    from qubes.tests.extra import ExtraTestCase

    class TC_VM(ExtraTestCase):
        def test_bad(self):
            one, other, still = self.create_vms(["one", "other", "still"])
            for vm in (one, other, still):
                vm.start()
            self.create_remote_file(
                other, "/etc/qubes-rpc/test.Hello", "#!/bin/sh\necho from $(hostname)\n"
            )
            self.qrexec_policy("test.Hello", one.name, other.name)
            one.tags.add("marked")
            one.run("echo disk >/root/kept; echo memory >/run/kept", user="root",
                    wait=True)
            still.run("echo memory >/run/kept", user="root", wait=True)
            # goes on when the command that started it has ended
            one.run("(until [ -e /run/stop ]; do sleep 1; done; echo >/run/stopped)"
                    " </dev/null >/dev/null 2>&1 &", user="root", wait=True)
            self.hung = one.run("cat; exec sleep 5173", passio_popen=True)
            self.loop.run_until_complete(still.pause())
            self.fail("on purpose")

    def list_tests():
        return [TC_VM]
"""

SMALL = """
    from qubes.tests.extra import ExtraTestCase

    class TC_VM(ExtraTestCase):
        def test_bad(self):
            (self.vm,) = self.create_vms(["one"])
            self.vm.start()
            self.fail("on purpose")

        def tearDown(self):
            # it goes on as if nothing had been
            assert self.vm.run("true", wait=True) == 0
            super().tearDown()

    def list_tests():
        return [TC_VM]
"""


@pytest.fixture
def thawed(site):
    """Return a function that thaws a folder on a terminal of its own."""
    with contextlib.ExitStack() as stack:

        def start(*words):
            command = [sys.executable, "-m", "qubes_itests", "thaw", *words]
            user = TerminalUser(command, site.work, site.environment, site.timeout)
            stack.callback(user.close)
            user.read_until("# ")
            return user

        yield start


def say(user, command):
    """Run a command in the shell; return what it shows."""
    user.type(f"{command}; echo e''nd\r")
    shown = user.read_until("end\r\n").partition("\r\n")[2]
    # what is typed before the prompt would be shown twice
    user.read_until("# ")
    return shown.removesuffix("end\r\n")


def contents(folder):
    return {
        path.name: (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).digest())
        for path in folder.iterdir()
    }


def test_a_failure_is_thawed_with_all_of_its_vms(site, thawed):
    """With their memory, disks and policy; and the folder stays as it is."""
    site.install("froze", PLUGIN)
    # which has no say in what is kept for others
    umask = os.umask(0o027)
    try:
        done = site.run("run", "--keep=state", "froze")
    finally:
        os.umask(umask)
    assert done.returncode == 1, done.stdout + done.stderr
    told = re.search(
        r"frozen      3 VMs, stopped within ([0-9.]+) ms, [0-9]+ MiB\n"
        r"  thaw        .* thaw (\S+)\n",
        done.stdout,
    )
    assert told, done.stdout
    assert float(told[1]) > 0
    folder = site.work / told[2]
    happened = (folder.parent / "timeline.jsonl").read_text()
    assert "all VMs as they are now are in frozen: 3 VMs, stopped within" in happened
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["spread"] == pytest.approx(float(told[1]), abs=0.051)
    modes = {path.stat().st_mode & 0o444 for path in (folder, *folder.iterdir())}
    assert modes == {0o444}
    before = contents(folder)

    # in those that are named: one that ran, and one that was paused
    user = thawed(str(folder), "test-inst-one", "test-inst-still")
    assert say(user, "cat /root/kept /run/kept; hostname") == (
        "disk\r\nmemory\r\ntest-inst-one\r\n"
    )
    # what the test waited for is where it was: it reads what nobody writes
    assert "cat; exec sleep 5173" in say(user, "ps | grep '[s]leep 5173'")
    # others can look into its VMs, as into those of a run
    shown = site.run("ps").stdout
    assert f"thaw {folder}" in shown
    assert "test-inst-other" in shown
    call = "qrexec-client-vm test-inst-other test.Hello"
    assert say(user, call) == "from test-inst-other\r\n"
    assert (
        say(user, "touch /run/stop; until [ -e /run/stopped ]; do sleep 1; done") == ""
    )
    user.type("rm /root/kept; exit\r")
    user.read_until("A root shell in test-inst-still")
    user.read_until("# ")
    assert say(user, "cat /run/kept") == "memory\r\n"
    user.type("exit 3\r")
    assert user.finish() == 3
    shown = user.shown.decode()
    assert "TC_VM::test_bad, as it was at" in shown
    assert "left behind" not in shown
    # another one would find it as this one did
    assert contents(folder) == before

    # on a machine of another kind none of that starts
    manifest["machine"]["QEMU"] = "0.1.2"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    command = [sys.executable, "-m", "qubes_itests", "thaw", str(folder)]
    with contextlib.closing(
        TerminalUser(command, site.work, site.environment, site.timeout)
    ) as user:
        assert user.finish() == 4
        assert b"QEMU: 0.1.2 there" in user.shown


def test_a_vm_whose_kernel_has_panicked_is_there_with_its_disks(site, thawed):
    (site.work / "test_panic.py").write_text(
        "def test_it(vm_factory, portal):\n"
        "    vm = vm_factory('crashed')\n"
        "    vm.run('echo kept >/rw/kept; sync', user='root', wait=True)\n"
        "    vm.run('echo c >/proc/sysrq-trigger', user='root')\n"
        "    portal.run(vm.wait_ended(60))\n"
    )
    words = ("-p", "qubes_itests", "--itests-keep=state")
    done = site.run(*words, program="pytest")
    assert "cause       a guest's kernel panicked" in done.stdout
    assert "frozen      disks alone, " in done.stdout
    (folder,) = (site.work / "itests-artifacts").glob("test_panic*")
    # it brings its template with it, whatever the directory says of templates
    settings = '[tool.qubes_itests]\ntemplate = ["nowhere"]\n'
    (site.work / "pyproject.toml").write_text(settings)
    user = thawed(str(folder), "crashed")
    assert say(user, "cat /rw/kept") == "kept\r\n"
    user.type("exit\r")
    assert user.finish() == 0


def test_a_full_disk_fails_the_freeze_alone(site, tmp_path):
    """In a worker, too: the failure is told, with one line about the disk."""
    site.install("froze", SMALL)
    place = tmp_path / "small"
    place.mkdir()
    size = "size=30m"
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "none", place], check=True)
    try:
        words = ("--keep=state", f"--artifacts={place}", "-n", "1", "froze")
        done = site.run("run", *words)
        assert done.returncode == 1, done.stdout + done.stderr
        assert "cause       AssertionError: on purpose" in done.stdout
        assert done.stdout.count("No space left on device") == 1
        assert "not all artefacts could be kept: " in done.stdout
        assert "thaw" not in done.stdout
        left = [path.name for path in Path(place).rglob("*")]
        assert "failure.txt" in left
        assert not [name for name in left if "frozen" in name]
    finally:
        subprocess.run(["umount", place], check=True)
