"""``pytest -p qubes_itests`` on a suite that knows nothing else of us."""

from __future__ import annotations

import re
import sys

import pytest

from qubes_itests.host.command import run

SUITE = """
    import os

    def test_sandbox(sandbox, run_directory):
        assert os.readlink("/proc/self/ns/pid") != os.environ["OUTSIDE"]
        assert run_directory.is_dir()
        for name in ("hv", "vm", "pool", "testbed"):
            # a test's own names there are not in the way of what the run makes
            (run_directory / name).touch()

    def test_filesystem(btrfs):
        assert btrfs.is_dir()

    def test_vms(vm_factory, qubes_app):
        vm = vm_factory()
        assert vm.run("exit 4", wait=True) == 4
        assert vm.name in [other.name for other in qubes_app.domains]
        other = vm_factory("named", start=False, memory=300)
        assert (other.name, other.is_running(), other.memory) == ("named", False, 300)
"""


@pytest.fixture
def suite(site):
    text = "\n".join(line[4:] for line in SUITE.splitlines())
    (site.work / "test_suite.py").write_text(text)
    return site


def test_fixtures_work_in_a_sandbox_and_the_header_says_so(suite):
    done = suite.run("-p", "qubes_itests", program="pytest")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 passed" in done.stdout
    assert "\nsandbox: mount, PID, network and IPC namespaces" in done.stdout
    assert f"\ncache: {suite.environment['QUBES_ITESTS_CACHE']}" in done.stdout
    assert "\nhypervisor: qemu, " in done.stdout


@pytest.mark.parametrize(
    ("options", "status", "told"),
    [
        ("ro", 10, "cannot be used (it is not writable). Name another"),
        ("size=1m,mode=0700", 1, "The disk is full that "),
    ],
)
def test_a_cache_that_is_read_only_or_full(suite, tmp_path, options, status, told):
    """It is said in a sentence, and not as an error of the harness."""
    place = tmp_path / "no room"
    place.mkdir()
    run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place])
    try:
        suite.environment["QUBES_ITESTS_CACHE"] = str(place)
        words = ("-p", "qubes_itests", "-k", "test_filesystem")
        done = suite.run(*words, program="pytest")
    finally:
        run(["umount", place])
    assert done.returncode == status, done.stdout + done.stderr
    assert told in done.stdout + done.stderr
    assert "INTERNALERROR" not in done.stdout + done.stderr


def test_a_conftest_may_offer_templates(suite):
    """The one that it offers is the one that fails to build, in its own words."""
    (suite.work / "conftest.py").write_text(
        "from qubes_itests.hookspec import hookimpl\n\n"
        "def build(cache, kernel):\n    raise OSError('no bricks')\n\n"
        "@hookimpl\n"
        "def qubes_itests_templates():\n    return {'castle': build}\n"
    )
    words = ("-p", "qubes_itests", "--itests-template=castle", "-k", "test_vms")
    done = suite.run(*words, program="pytest")
    assert done.returncode == 1
    assert "no bricks" in done.stdout


def test_arguments_and_exit_status_pass_through_the_sandbox(suite):
    words = ("-p", "qubes_itests", "-q", "-k")
    assert suite.run(*words, "no_such_test", program="pytest").returncode == 5
    assert suite.run(*words, "sandbox", "--nonsense", program="pytest").returncode == 4
    one = suite.run(*words, "test_sandbox", program="pytest")
    assert one.returncode == 0
    assert "1 passed, 2 deselected" in one.stdout


def test_settings_have_names_of_their_own(suite):
    words = ("-p", "qubes_itests", "-k", "test_sandbox")
    wrong = suite.run(*words, "--itests-keep=sometimes", program="pytest")
    assert wrong.returncode == 4
    assert "--itests-keep: keep: expected one of never" in wrong.stderr
    options = ("--itests-template=other", "--itests-memory-budget=3000")
    right = suite.run(*words, *options, program="pytest")
    assert right.returncode == 0
    assert "memory: 3000 MiB for dom0 and the VMs of each test" in right.stdout
    assert "templates: other (warm starts)" in right.stdout


def test_pytest_documents_the_fixtures(suite):
    out = suite.run("-p", "qubes_itests", "--fixtures", "-q", program="pytest").stdout
    names = (
        "sandbox", "run_directory", "portal", "testbed", "qubes_app", "vm_factory",
        "btrfs", "xfs", "ext4", "reflink_pool", "qmemman", "memory_budget",
    )  # fmt: skip
    for name in names:
        at = out.index(f"\n{name} ")
        assert "no docstring available" not in out[at : at + 200], name


ASYNC = """
import asyncio, its_time, threading
import pytest

def is_on_the_loop_of_the_run():
    return threading.current_thread() is not threading.main_thread()

async def test_core(qubes_app):
    assert is_on_the_loop_of_the_run()
    vm = await qubes_app.create_vm("AppVM", name="work", label="red")
    assert vm in qubes_app.domains

async def test_fails(portal):
    await asyncio.sleep(0)
    assert 1 == 2, "awaited"

@pytest.mark.asyncio
async def test_marked(portal):
    assert not is_on_the_loop_of_the_run()

async def test_hangs(portal):
    its_time.is_nearly_over()
    await asyncio.Event().wait()
"""


AUTO = (
    ASYNC[: ASYNC.index("async def test_fails")]
    + """
class TestFixtures:
    number = 0

    @pytest.fixture
    async def made(self, qubes_app):
        self.number += 1
        assert is_on_the_loop_of_the_run()
        yield await qubes_app.create_vm("AppVM", name="work", label="red")
        assert is_on_the_loop_of_the_run()

    async def test_awaits(self, made):
        assert is_on_the_loop_of_the_run()
        assert (made.name, self.number) == ("work", 1)

    def test_waits(self, made):
        assert (made.name, self.number) == ("work", 1)

@pytest.mark.asyncio
async def test_marked(portal):
    assert not is_on_the_loop_of_the_run()

@pytest.fixture
async def twice(portal):
    yield 1
    yield 2

def test_twice(twice):
    pass

@pytest.fixture
async def never(portal):
    if not portal:
        yield

def test_never(never):
    pass
"""
)


@pytest.mark.parametrize("mode", ["strict", "auto"])
def test_in_each_mode_of_pytest_asyncio_what_uses_our_fixtures_is_on_our_loop(
    site, mode
):
    apart = "async def test_apart():\n    assert not is_on_the_loop_of_the_run()\n"
    text = AUTO + (apart if mode == "auto" else "")
    (site.work / "test_suite.py").write_text(text)
    (site.work / "pytest.ini").write_text(f"[pytest]\nasyncio_mode = {mode}\n")
    words = ("-p", "qubes_itests")
    done = site.run(*words, program="pytest", QUBES_ITESTS_HYPERVISOR="test")
    passed = 6 if mode == "auto" else 5
    assert f" {passed} passed, 2 errors" in done.stdout, done.stdout + done.stderr
    causes = re.findall("^  cause +in (.*)", done.stdout, re.MULTILINE)
    assert causes == [
        f"{phase}: expected a fixture that yields once"
        for phase in ("teardown", "setup")
    ]


def test_asynchronous_tests_run_on_the_loop_of_the_run_and_failures_are_told(site):
    (site.work / "test_suite.py").write_text(ASYNC)
    words = ("-p", "qubes_itests", "--itests-timeout=60", "-rA")
    done = site.run(*words, program="pytest", QUBES_ITESTS_HYPERVISOR="test")
    assert "2 failed, 2 passed" in done.stdout, done.stdout + done.stderr
    passed = [line for line in done.stdout.splitlines() if line.startswith("PASSED")]
    assert [line.rpartition("::")[2] for line in passed] == ["test_core", "test_marked"]
    assert "no end within 60 s" in done.stdout
    again = "-m pytest -p qubes_itests --itests-timeout 60.0 test_suite.py::test_fails"
    end = done.stdout[done.stdout.index(" 2 passed") :]
    assert (
        "\ntest_suite.py::test_fails\n"
        "  cause       AssertionError: awaited\n"
        "  artefacts   itests-artifacts/test_suite.py.test_fails"
    ) in end
    assert f"  run again   {sys.executable} {again}\n" in end
