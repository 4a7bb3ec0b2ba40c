"""``-n``: the tests of a run on several workers, each in its own sandbox."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from conditions import wait_until
from leftovers import processes, wait_for_no_leftovers
from plugin_site import FOR_TEMPLATE

NO_GUESTS = ("--hypervisor", "test")

PLUGIN = """
    import its_time, os, sys, time, types, unittest

    def seen(test):
        with open(os.environ["SEEN"], "a") as file:
            pid = os.readlink("/proc/self/ns/pid")
            net = os.readlink("/proc/self/ns/net")
            file.write(f"{test.id()} {pid} {net}\\n")

    class TC_One(unittest.TestCase):
        def setUp(self):
            seen(self)
        def test_1(self): pass
        def test_2(self): pass
        def test_3(self): self.skipTest("not today")

    class TC_Two(TC_One):
        def test_1(self): self.assertEqual(1, 2, "numbers")
        def test_2(self): its_time.is_nearly_over(); time.sleep(9000)
        def test_3(self): sys.modules["json"] = types.ModuleType("json")

    def list_tests():
        return [TC_One, TC_Two]
"""


def lines_of(output):
    """Return the lines of tests, without times, in the order of ids."""
    lines = re.sub(r"  [0-9.]+ s", "", output).splitlines()
    tests = [line for line in lines if re.match(r"[A-Z]{5,7} +\w+::[\w:]+( |$)", line)]
    return sorted(set(tests), key=str.split)


def places(site):
    """Return the namespaces in which the tests of each class ran."""
    found = {}
    for line in Path(site.environment["SEEN"]).read_text().splitlines():
        name, *where = line.split()
        found.setdefault(name.split(".")[-2], set()).add(tuple(where))
    return found


def install_mixed(site):
    site.install("mixed", PLUGIN)
    site.environment["SEEN"] = str(site.work / "seen")
    return site


@pytest.fixture
def mixed(site):
    return install_mixed(site)


#: What the tests of all of that are run with; one of them waits.
MIXED = (*NO_GUESTS, "--timeout=60", "--seed=7", "mixed")


@pytest.fixture(scope="module")
def run_by_two(tmp_path_factory, make_site):
    """Return a site whose tests two workers have run, and what came of it."""
    site = install_mixed(make_site(tmp_path_factory.mktemp("mixed")))
    return site, site.run("-n", "2", "--junitxml=x.xml", *MIXED)


@pytest.mark.parametrize("workers", ["0", "2"])
def test_below_nohup_the_run_ignores_hang_ups_and_commands_do_not(site, workers):
    """The whole process group gets one when its terminal goes, workers as well."""
    site.install(
        "hangup",
        """
        import os, signal, subprocess, time, unittest

        class TC_Hangup(unittest.TestCase):
            def test_hangup(self):
                os.kill(os.getpid(), signal.SIGHUP)
                time.sleep(0)
                command = ["sh", "-c", "kill -HUP $$; exit 5"]
                done = subprocess.run(command)
                self.assertEqual(done.returncode, -signal.SIGHUP)

        def list_tests():
            return [TC_Hangup]
    """,
    )
    words = (*NO_GUESTS, "-n", workers, "hangup")
    done = site.run(*words, launcher=["nohup"])
    assert "1 passed" in done.stdout, done.stdout + done.stderr
    assert done.returncode == 0


def test_two_workers_tell_what_one_process_tells(mixed, run_by_two):
    site, both = run_by_two
    alone = mixed.run("--junitxml=x.xml", *MIXED)
    assert both.returncode == alone.returncode == 1, both.stdout + both.stderr
    assert lines_of(both.stdout) == lines_of(alone.stdout)
    assert _cases(mixed.work / "x.xml") == _cases(site.work / "x.xml")
    assert "3 failed, 2 passed, 1 skipped" in both.stdout
    assert "no end within 60 s (--timeout): the test, " in both.stdout
    assert "time.sleep(9000)" in both.stdout
    # the directory may be named after a worker that runs this very test
    assert re.search(r"gw\d", both.stdout.replace(str(site.work), "")) is None
    assert both.stdout.count("sandbox: mount, PID") == 1
    order = [both.stdout.index(t) for t in ("test session starts", "seed: 7", "2 work")]
    assert order == sorted(order)
    assert re.search(
        r"\nworkers: 2, each in its own sandbox, with \d+ MiB of memory for VMs\n",
        both.stdout,
    )


def _cases(path):
    suite = ET.parse(path).getroot()[0]  # noqa: S314 - our own
    return sorted(
        (case.get("classname"), case.get("name"), [part.tag for part in case])
        for case in suite
    )


def test_a_class_stays_on_a_worker_which_has_namespaces_of_its_own(run_by_two):
    site, _ = run_by_two
    where = places(site)
    assert {name: len(found) for name, found in where.items()} == {
        "TC_One": 1,
        "TC_Two": 1,
    }
    (one,), (two,) = where.values()
    outside = {Path(f"/proc/self/ns/{name}").readlink() for name in ("pid", "net")}
    assert len({*one, *two, *map(str, outside)}) == 6


def test_what_failed_can_be_shown_and_run_again_with_and_without_workers(run_by_two):
    site, _ = run_by_two
    report = site.run("report")
    assert report.returncode == 1
    place = "  artefacts   itests-artifacts/mixed.TC_Two.test_1/  (failure.txt,"
    assert place in report.stdout
    kept = site.work / "itests-artifacts" / "mixed.TC_Two.test_1" / "failure.txt"
    assert "1 != 2" in kept.read_text()
    # what they see of it is another matter
    elsewhere = {"SEEN": str(site.work / "seen again")}
    for words in ((), ("-n", "2")):
        again = site.run(
            *NO_GUESTS, *words, "--lf", "--timeout=60", "mixed", **elsewhere
        )
        assert again.returncode == 1
        assert "3 failed" in again.stdout
        assert "passed" not in again.stdout


def test_exit_statuses_are_those_of_one_process(mixed):
    for words, status in (
        (("-x", "mixed::TC_Two::test_1", "mixed::TC_One"), 1),
        (("mixed::TC_Twelve",), 4),
        (("-k", "nothing_has_this_name", "mixed"), 5),
    ):
        done = mixed.run(*NO_GUESTS, "-n", "2", *words)
        assert done.returncode == status, done.stdout + done.stderr
        said = (
            "no test's id begins with 'mixed::TC_Twelve'. Did you mean mixed::TC_Two?"
        )
        assert done.stderr.count(said) == (status == 4), done.stderr
        assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    "words",
    [
        "--dist=load --maxschedchunk=1 --max-worker-restart=0",
        "--dist=worksteal",
        "--maxprocesses=1 -n logical",
    ],
)
def test_options_of_xdist_do_what_they_do_elsewhere(mixed, words):
    selection = ("mixed::TC_One", "mixed::TC_Two::test_1")
    done = mixed.run(*NO_GUESTS, "-n", "2", *words.split(), *selection)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 failed, 2 passed, 1 skipped" in done.stdout
    number = 1 if "logical" in words else 2
    assert f"\nworkers: {number}, each in its own sandbox" in done.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("-f", "--looponfail runs files of tests in a process that is no part"),
        ("-n 2 --dist=each", "--dist=each has several workers run the same test"),
        ("--tx ssh=host", "--tx and --px begin no worker by ssh=, socket= or via="),
        ("--px id=p//popen --tx popen//via=p", "--tx 'popen//on=ssh HOST'"),
        ("-n 2 --rsyncdir=.", "--rsyncdir copies nothing"),
        ("-n 2 --max-worker-restart=x", "expected a number, got 'x'"),
    ],
)
def test_options_of_xdist_that_cannot_work_are_refused(site, words, said):
    done = site.run("-p", "qubes_itests", *words.split(), program="pytest")
    assert done.returncode == 4, done.stdout + done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr


NOT_READY = """
    from qubes_itests.hookspec import hookimpl
    from qubes_itests.host.exc import MissingToolError

    async def connect(directory, cache, kernel):
        raise MissingToolError("abacus", "Buy one.")

    @hookimpl
    def qubes_itests_hypervisors():
        return {"abacus": connect}
"""


def test_a_machine_that_is_not_ready_is_one_sentence_and_its_status(mixed):
    mixed.install("abacus", NOT_READY)
    mixed.register("beads", "abacus", "qubes_itests")
    done = mixed.run("-n", "2", "--hypervisor=abacus", "mixed")
    assert done.returncode == 12, done.stdout + done.stderr
    assert done.stdout.count("Buy one.") == 1
    assert "Traceback" not in done.stdout + done.stderr
    assert not (mixed.work / "seen").exists()


def test_too_many_workers_for_the_memory_are_refused(mixed):
    """As many as there is memory for run; a CI gets no sections of them, which mix."""
    words = (*NO_GUESTS, "--host-memory=2000", "mixed::TC_One")
    done = mixed.run("-n", "8", *words)
    assert done.returncode == 4
    assert "8 workers share 2000 MiB" in done.stderr
    assert "-n 3 is the most" in done.stderr
    done = mixed.run("-n", "2", *words, GITHUB_ACTIONS="true")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "::group::" not in done.stdout


VMS = """
    import os, signal, subprocess, threading, time
    from pathlib import Path
    from qubes.tests.extra import ExtraTestCase

    class WithVM(ExtraTestCase):
        def setUp(self):
            super().setUp()
            (self.vm,) = self.create_vms(["one"])
            self.vm.start()

    class TC_Good(WithVM):
        def test_good(self):
            self.assertEqual(self.vm.run("exit 3", wait=True), 3)
        def test_bad(self):
            self.vm.run("echo precious >/rw/file; sync", user="root", wait=True)
            self.fail("on purpose")

    class TC_Ends(WithVM):
        def test_1_kill(self):
            os.kill(os.getpid(), signal.SIGKILL)
        def test_2_after(self):
            self.assertEqual(self.vm.run("exit 4", wait=True), 4)

    class TC_Panic(WithVM):
        def test_panic(self):
            command = "sleep 0.2; echo c >/proc/sysrq-trigger"
            self.vm.run(command, user="root", wait=True)

    class TC_Leak(WithVM):
        def test_leak(self):
            # by the name under which it will be removed, not by its short one
            runs = Path(os.environ["QUBES_ITESTS_CACHE"], "runs")
            (own,) = runs.glob(f"*/{os.environ['PYTEST_XDIST_WORKER']}")
            place = own / "left"
            place.mkdir()
            subprocess.run(["mount", "-t", "tmpfs", "none", place], check=True)

    class TC_Wait(WithVM):
        def test_1_wait(self):
            threading.Event().wait()
        def test_2_is_not_reached(self):
            pass

    class TC_Wait_Too(TC_Wait):
        pass

    def list_tests():
        return [TC_Good, TC_Ends, TC_Panic, TC_Leak, TC_Wait, TC_Wait_Too]
"""


@pytest.fixture
def guests(site):
    site.install("guests", VMS, FOR_TEMPLATE)
    return site


def test_what_a_failure_leaves_is_where_the_report_says(guests):
    words = ("--keep=failed", "--memory-budget=3000")
    done = guests.run("-n", "2", *words, "guests::TC_Good_tiny")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 failed, 1 passed" in done.stdout
    last = done.stdout.splitlines()
    line = next(line for line in last if line.startswith("  artefacts "))
    place, names = re.fullmatch(r"  artefacts +(\S+)/  \((.*)\)", line).groups()
    kept = guests.work / place
    assert sorted(names.split(", ")) == sorted(
        path.name + "/" * path.is_dir() for path in kept.iterdir()
    )
    (vm,) = (path.name for path in (kept / "disks").iterdir())
    wanted = {f"{vm}.agent.log", f"{vm}.console.log", "memory.jsonl"}
    assert wanted <= set(names.split(", "))
    assert b"precious" in (kept / "disks" / vm / "private.img").read_bytes()


def test_a_panic_and_a_leak_in_a_worker_have_their_exit_statuses(guests):
    panic = guests.run("-n", "2", "--tb=no", "guests::TC_Panic_tiny")
    assert panic.returncode == 21, panic.stdout + panic.stderr
    assert "guest panic in guests::TC_Panic_tiny::test_panic: VM " in panic.stdout
    leak = guests.run("-n", "2", "-k=test_good or test_leak", "guests")
    assert leak.returncode == 20, leak.stdout + leak.stderr
    assert "left at the end of the run: " in leak.stdout
    assert wait_for_no_leftovers(Path(guests.environment["QUBES_ITESTS_CACHE"])) == []


def test_a_worker_that_is_killed_is_reported_and_leaves_nothing(guests):
    done = guests.run("-n", "2", "guests::TC_Ends_tiny", "guests::TC_Good_tiny")
    assert done.returncode == 1, done.stdout + done.stderr
    ended = "guests::TC_Ends_tiny::test_1_kill"
    assert re.search(r"node down: Not properly terminated", done.stdout)
    assert re.search(
        rf"\n  cause +worker 'gw\d' crashed while running '{ended}'", done.stdout
    )
    assert re.search(r"PASSED +guests::TC_Ends_tiny::test_2_after ", done.stdout)
    assert "2 failed, 2 passed" in done.stdout
    kept = guests.work / "itests-artifacts" / "guests.TC_Ends_tiny.test_1_kill"
    assert [path for path in kept.iterdir() if path.name.endswith(".console.log")]
    assert wait_for_no_leftovers(Path(guests.environment["QUBES_ITESTS_CACHE"])) == []


def test_a_controller_that_is_killed_tells_which_tests_ran(site):
    text = """
        import os, signal, pytest

        @pytest.hookimpl(trylast=True)
        def pytest_runtest_logstart(nodeid):
            if nodeid.endswith("second") and "PYTEST_XDIST_WORKER" not in os.environ:
                os.kill(os.getpid(), signal.SIGKILL)
    """
    (site.work / "conftest.py").write_text(textwrap.dedent(text))
    tests = "def test_first(): pass\ndef test_second(): pass\n"
    (site.work / "test_suite.py").write_text(tests)
    done = site.run("-p", "qubes_itests", "-n", "1", program="pytest")
    assert done.returncode == 3, done.stdout + done.stderr
    told = "exit status 137 while workers ran test_suite.py::test_second: something"
    assert told in done.stderr


def test_a_vm_for_which_there_is_no_memory_does_not_start(guests):
    done = guests.run("--host-memory=100", "guests::TC_Good_tiny::test_good")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "of the 100 MiB that VMs may take of this machine's memory" in done.stdout
    assert "nobody holds any" in done.stdout


@pytest.mark.parametrize("whole_group", [True, False])
def test_ctrl_c_leaves_nothing_and_each_worker_tells_where_it_was(guests, whole_group):
    """To all processes, as a terminal sends it, or to the first one alone."""
    cache = Path(guests.environment["QUBES_ITESTS_CACHE"])
    command = [sys.executable, "-m", "qubes_itests", "-n", "2", "-k", "wait", "guests"]
    with (guests.work / "output").open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=guests.work,
            env=guests.environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        _wait_for_guests(cache, process, 2)
        wait_until(
            lambda: guests.run("ps").stdout.count("the test, ../site/guests.py:") == 2,
            "two tests that hang",
            timeout=guests.timeout,
        )
        (os.killpg if whole_group else os.kill)(process.pid, signal.SIGINT)
        assert process.wait(300) == 2
    finally:
        process.kill()
        process.wait()
    said = (guests.work / "output").read_text()
    assert "KeyboardInterrupt" in said
    assert "INTERNALERROR" not in said
    told = re.findall(
        r"\n  cause +in (gw\d): interrupted after [^:]*: the test, ../site/guests",
        said,
    )
    assert sorted(told) == ["gw0", "gw1"]
    assert "The run was interrupted: 2 tests were not run." in said
    artifacts = guests.work / "itests-artifacts"
    run = json.loads((artifacts / "run.json").read_text())
    assert run["outcome"] == "interrupted"
    for test in run["tests"]:
        assert re.match(r"in gw\d: interrupted after ", test["cause"])
        kept = {path.suffix for path in (artifacts / test["artifacts"]).iterdir()}
        assert {".log", ".xml", ".jsonl"} <= kept
    report = guests.run("report").stdout
    assert report.startswith("The run was interrupted: 2 tests were not run.\n")
    assert report.count("  cause       in gw") == 2
    assert wait_for_no_leftovers(cache) == []


def _wait_for_guests(cache, process, number):
    deadline = time.monotonic() + 1000
    while sum("/qemu-system" in what for what in processes(cache)) < number:
        assert process.poll() is None, "the run has ended"
        assert time.monotonic() < deadline, "no VMs have started"
        time.sleep(0.05)


def test_a_plain_suite_is_grouped_by_class_module_and_mark(site):
    text = """
        import os, pytest

        def note(request):
            group = request.node.get_closest_marker("of").args[0]
            with open("seen", "a") as file:
                file.write(f"x.{group}.y {os.environ['PYTEST_XDIST_WORKER']}\\n")

        @pytest.fixture(autouse=True)
        def noted(request):
            note(request)

        class TestOne:
            pytestmark = pytest.mark.of("class")
            def test_1(self, sandbox): pass
            def test_2(self): pass

        class TestMarked:
            pytestmark = [pytest.mark.of("mark"), pytest.mark.xdist_group("both")]
            def test_1(self): pass
            def test_2(self): pass

        @pytest.mark.of("mark")
        @pytest.mark.xdist_group("both")
        def test_marked(): pass

        @pytest.mark.of("module")
        @pytest.mark.parametrize("value", ["a::b", "]@"])
        def test_module(value): pass
    """
    site.environment["SEEN"] = str(site.work / "seen")
    (site.work / "test_suite.py").write_text(textwrap.dedent(text))
    (site.work / "pytest.ini").write_text("[pytest]\nmarkers = of: group\n")
    done = site.run("-p", "qubes_itests", "-n", "3", program="pytest")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "7 passed" in done.stdout
    assert "workers: 3, each in its own sandbox" in done.stdout
    where = {name: len(found) for name, found in places(site).items()}
    assert where == {"class": 1, "mark": 1, "module": 1}


MACHINE = """\
# Be another machine: no network, processes or mounts of this one, an empty directory.
exec unshare --net --mount --pid --fork --kill-child --mount-proc \\
    sh -c 'mount -t tmpfs none "$0" && cd / && exec sh -c "$1"' {work} "$1"
"""


STUBBORN = """
    import pathlib, threading, time, unittest

    class TC_Stays(unittest.TestCase):
        def test_it(self):
            here = pathlib.Path.cwd()
            (here / "waits").touch()
            try:
                threading.Event().wait()
            except KeyboardInterrupt:
                # what comes sooner is taken for an echo of the first
                time.sleep(1)
            (here / "stays").touch()
            while not (here / "goes").exists():
                time.sleep(0.1)

    def list_tests():
        return [TC_Stays]
"""


def test_a_second_ctrl_c_ends_the_wait_for_workers_and_loses_nothing(site):
    site.install("stubborn", STUBBORN)
    (site.work / "itests-artifacts").mkdir()
    command = [sys.executable, "-m", "qubes_itests", *NO_GUESTS, "-n", "1", "stubborn"]
    with subprocess.Popen(
        command,
        cwd=site.work,
        env=site.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            for sign in ("waits", "stays"):
                wait_until((site.work / sign).exists, sign, timeout=site.timeout)
                os.kill(process.pid, signal.SIGINT)
            (site.work / "goes").touch()
            said, _ = process.communicate(timeout=site.timeout)
        finally:
            process.kill()
    assert process.returncode == 2, said
    assert "The run was interrupted" in said
    assert "Traceback" not in said
    run = json.loads((site.work / "itests-artifacts/run.json").read_text())
    assert run["outcome"] == "interrupted"


def test_workers_on_other_machines(guests):
    """By a transport that ends on this one, in namespaces of its own."""
    guests.environment["SEEN"] = str(guests.site / "seen")
    guests.install("mixed", PLUGIN)
    machine = guests.site / "machine.sh"
    machine.write_text(MACHINE.format(work=guests.work))
    on = f"2*popen//on=sh {machine}"
    words = ("--trace", "on", "-k", "TC_One or TC_Good", "guests", "mixed")
    done = guests.run("--tx", on, *words)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 failed, 3 passed, 1 skipped" in done.stdout
    assert "\nworkers: 2, each in its own sandbox\n" in done.stdout
    (where,) = places(guests)["TC_One"]
    own = {str(Path(f"/proc/self/ns/{name}").readlink()) for name in ("pid", "net")}
    assert own.isdisjoint(where)
    kept = guests.work / "itests-artifacts" / "guests.TC_Good_tiny.test_bad"
    names = {path.name.partition(".")[2] for path in kept.iterdir()}
    assert names >= {"txt", "agent.log", "console.log", "domain.xml"}
    assert "on purpose" in (kept / "failure.txt").read_text()
    # of those that have passed, and to their ends
    for test in ("guests.TC_Good_tiny.test_bad", "mixed.TC_One.test_1"):
        (recorded,) = kept.parent.glob(f"{test}*/timeline.jsonl")
        assert '"name":"teardown"' in recorded.read_text()
    assert wait_for_no_leftovers(Path(guests.environment["QUBES_ITESTS_CACHE"])) == []


CONNECTED = """
    import os, socket, threading
    import pytest

    def pytest_configure(config):
        if hasattr(config, "workerinput"):
            config.to_controller = socket.create_connection(
                ("127.0.0.1", config.workerinput["port"]), 30
            )
        else:
            config.listening = socket.create_server(("127.0.0.1", 0))

    class Controller:
        def pytest_configure_node(self, node):
            if not hasattr(node.config, "answering"):
                node.config.answering = threading.Thread(
                    target=answer, args=(node.config.listening,), daemon=True
                )
                node.config.answering.start()
            node.workerinput["port"] = node.config.listening.getsockname()[1]

    def pytest_plugin_registered(plugin, manager):
        if type(plugin).__name__ == "DSession":
            manager.register(Controller())

    def answer(listening):
        for _ in range(2):
            connection, _ = listening.accept()
            threading.Thread(target=echo, args=(connection,), daemon=True).start()

    def echo(connection):
        while data := connection.recv(99):
            connection.sendall(data)

    def pytest_unconfigure(config):
        for name in ("to_controller", "listening"):
            if hasattr(config, name):
                getattr(config, name).close()
"""


def test_plugins_of_others_connect_workers_and_controller(site):
    """When they are set up; the network of the tests is the worker's own."""
    (site.work / "conftest.py").write_text(textwrap.dedent(CONNECTED))
    text = """
        import os, socket, threading
        import pytest

        @pytest.mark.parametrize("word", [b"one", b"two", b"three", b"four"])
        def test_it(pytestconfig, word):
            pytestconfig.to_controller.sendall(word)
            assert pytestconfig.to_controller.recv(99) == word
            port = pytestconfig.workerinput["port"]
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", port), 30)
            own = os.readlink("/proc/1/ns/net")
            assert os.readlink("/proc/thread-self/ns/net") == own
            assert "QUBES_ITESTS_OUTER_NETWORK" not in os.environ
            fds = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
            places = [os.readlink(fd) for fd in fds if os.path.exists(fd)]
            assert not [place for place in places if place.startswith("net:")]
    """
    (site.work / "test_suite.py").write_text(textwrap.dedent(text))
    # so few tests are dealt out in turns, two for each worker
    words = ("-p", "qubes_itests", "-n", "2", "--dist", "load", "-v")
    done = site.run(*words, program="pytest")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 passed" in done.stdout


def test_a_machine_that_cannot_be_reached_ends_the_run(mixed):
    quick = "popen//on=false"
    # it has read what it gets before it ends
    slow = "popen//on=sh -c 'read line; echo no route >&2; exit 1'"
    for on in (quick, slow):
        done = mixed.run("--tx", on, "mixed", *NO_GUESTS)
        assert done.returncode == 4, done.stdout + done.stderr
        assert "ended and started no worker" in done.stdout
        assert "Traceback" not in done.stdout + done.stderr
    assert "no route" in done.stderr


def test_one_process_runs_the_tests_without_pytest_xdist_or_workers(mixed, site):
    for words in (("-p", "no:xdist"), ("-n", "0")):
        done = mixed.run(*NO_GUESTS, *words, "mixed::TC_One")
        assert done.returncode == 0, done.stdout + done.stderr
        assert "workers" not in done.stdout
        (site.work / "test_suite.py").write_text("def test_it(sandbox): pass\n")
        plain = site.run("-p", "qubes_itests", *words, program="pytest")
        assert plain.returncode == 0, plain.stdout + plain.stderr
        assert "workers" not in plain.stdout


def test_a_shell_after_a_failure_is_refused_with_workers(site):
    (site.work / "test_suite.py").write_text("def test_it(): pass\n")
    words = ("-p", "qubes_itests", "--itests-shell-on-failure")
    done = site.run(*words, "-n", "2", program="pytest")
    assert done.returncode == 4
    assert "--shell-on-failure is for one test at a time" in done.stderr
