"""``ps`` and ``attach``: a way into runs under way, which hang."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path

from conditions import wait_until
from terminal_user import TerminalUser

PLUGIN = """
    import time
    from qubes.tests.extra import ExtraTestCase

    class TC_Hangs(ExtraTestCase):
        def test_hangs(self):
            vm, _ = self.create_vms(["one", "halted"])
            vm.start()
            vm.run("until [ -e /tmp/go ]; do sleep 0.1; done", wait=True)

    class TC_Sleeps(ExtraTestCase):
        def test_sleeps(self):
            time.sleep(1000)

    class TC_SleepsToo(TC_Sleeps): pass

    def list_tests():
        return [TC_Hangs, TC_Sleeps, TC_SleepsToo]
"""


@contextlib.contextmanager
def running(site, *words, program="qubes_itests"):
    """Run tests in the background; their run is killed in the end."""
    site.install("hung", PLUGIN)
    timeout = "--itests-timeout=0" if program == "pytest" else "--timeout=0"
    run = subprocess.Popen(
        [sys.executable, "-m", program, timeout, *words],
        cwd=site.work,
        env=site.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        yield run
    finally:
        run.kill()
        run.communicate()


def status(site):
    """Return what `ps` says of the runs that were begun in the site."""
    found = json.loads(site.run("ps", "--json").stdout)
    return [
        {"name": name, **each}
        for name, each in found.items()
        if each.get("directory") == str(site.work)
    ]


def attach(site, vm):
    command = [sys.executable, "-m", "qubes_itests", "attach", vm]
    return contextlib.closing(
        TerminalUser(command, site.work, site.environment, site.timeout)
    )


def test_a_run_that_hangs_is_shown_and_entered(site):
    with running(site, "hung::TC_Hangs") as run:
        wait_until(
            lambda: any("until [" in s.get("waits", "") for s in status(site)),
            "command that the run waits for",
            timeout=site.timeout,
        )
        (found,) = status(site)
        assert found["test"] == "hung::TC_Hangs::test_hangs"
        assert found["phase"] == "call"
        assert found["seconds"] > 0
        (vm,) = found["vms"]
        assert (vm["name"], vm["state"]) == ("test-inst-one", "Running")
        assert vm["memory"] > 0
        shown = site.run("ps").stdout
        head = f"{found['name']}  pid {found['pid']}  {site.work}\n"
        assert f"{head}  {found['test']}: call, " in shown
        # that of the process outside of its sandbox
        assert b"hung::TC_Hangs" in Path(f"/proc/{found['pid']}/cmdline").read_bytes()
        assert '\n  at vm.run("until [ -e /tmp/go ]; do sleep 0.1; done") of ' in shown

        with attach(site, "test-inst-halted") as user:
            user.read_until("there is no running VM 'test-inst-halted' in the runs")
            assert user.finish() == 4
        assert not found["stopped"]
        with attach(site, f"{found['name']}/test-inst-one") as user:
            user.read_until("# ")
            user.type("hostname; stty size\r")
            user.read_until("test-inst-one\r\n30 100\r\n")
            assert [s["stopped"] for s in status(site)] == [True]
            user.type("exit 3\r")
            assert user.finish() == 3
        with attach(site, f"{found['name']}/test-inst-one") as user:
            user.read_until("# ")
            # the test goes on, and the VM with this shell may end before an exit status
            user.type("touch /tmp/go\r")
            user.finish()
        # It went on: what the shell was is no leak of the test.
        said = run.communicate(timeout=site.timeout)[0].decode()
        assert "1 passed" in said
        assert status(site) == []


def test_each_worker_is_shown_and_nothing_after_a_kill(site):
    words = ("-n2", "--hypervisor=test", "-k", "Sleeps", "hung")
    with running(site, *words):
        wait_until(
            lambda: sum("hung.py" in s.get("waits", "") for s in status(site)) == 2,
            "tests of two workers",
            timeout=site.timeout,
        )
        found = status(site)
        assert {s["name"].rpartition("/")[2] for s in found} == {"gw0", "gw1"}
        assert {s["test"].split("::")[1] for s in found} == {
            "TC_Sleeps",
            "TC_SleepsToo",
        }
        assert all(s["waits"].startswith("the test, ../site/hung.py:") for s in found)
    assert status(site) == []


def test_a_first_test_is_shown_that_has_no_testbed_yet(site):
    """Under plain pytest: what a fixture hangs at is seen as well."""
    (site.work / "test_plain.py").write_text(
        "import time, pytest\n"
        "@pytest.fixture\n"
        "def slow(): time.sleep(1000)\n"
        "def test_plain(slow): pass\n"
    )
    with running(site, "-p", "qubes_itests", program="pytest"):
        wait_until(
            lambda: [s.get("phase") for s in status(site)] == ["setup"],
            "set-up of the test",
            timeout=site.timeout,
        )
        (found,) = status(site)
        assert found["test"] == "test_plain.py::test_plain"
        assert (found["waits"], found["vms"]) == ("the test, test_plain.py:3", [])


def test_it_needs_a_terminal(site):
    done = site.run("attach", "work")
    assert done.returncode == 4
    assert "attach opens a shell, and there is no terminal" in done.stderr
