"""Whole runs of the main job, as a person types them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import textwrap
import xml.etree.ElementTree as ET

from plugin_site import FOR_TEMPLATE, ONCE

#: Enough for tests without guests, and quick.
AGAIN = "  run again   itests"
NO_GUESTS = ("--hypervisor", "test")

PLUGIN = """
    import its_time, os, random, sys, time, types, unittest
    BEFORE = os.environ['OUTSIDE']

    class TC_Good(unittest.TestCase):
        def test_passes(self):
            self.assertNotEqual(os.readlink("/proc/self/ns/pid"), BEFORE)
        def test_random(self):
            print("drew", random.random())
        def test_skips(self):
            self.skipTest("not today")

    class TC_Bad(unittest.TestCase):
        def test_fails(self):
            self.assertEqual(1, 2, "numbers")
        def test_hangs(self):
            its_time.is_nearly_over(); time.sleep(9000)
        def test_tampers(self):
            sys.modules["json"] = types.ModuleType("json")
        def test_undone(self):
            self.assertTrue(sys.modules["json"].dumps)

    def list_tests():
        return [TC_Good, TC_Bad]
"""


def test_a_run_with_failures_of_many_kinds(site):
    site.install("mixed", PLUGIN)
    site.register("broken", "no_such_module:list_tests")
    done = site.run(
        *NO_GUESTS, "--timeout=60", "--junitxml=x.xml", "--seed=7", "broken", "mixed"
    )
    assert done.returncode == 1, done.stdout + done.stderr
    lines = re.sub(r"  [0-9.]+ s", "", done.stdout).splitlines()
    assert [line for line in lines if re.match(r"[A-Z]{5,7} +\w+::[\w:]+( |$)", line)][
        :8
    ] == [
        "FAILED  broken::plugin",
        "PASSED  mixed::TC_Good::test_passes",
        "PASSED  mixed::TC_Good::test_random",
        "SKIPPED mixed::TC_Good::test_skips  (not today)",
        "FAILED  mixed::TC_Bad::test_fails",
        "FAILED  mixed::TC_Bad::test_hangs",
        "FAILED  mixed::TC_Bad::test_tampers",
        "PASSED  mixed::TC_Bad::test_undone",
    ]
    assert "sandbox: mount, PID, network and IPC namespaces" in done.stdout
    assert "seed: 7" in done.stdout
    assert "no end within 60 s (--timeout): the test, " in done.stdout
    assert "time.sleep(9000)" in done.stdout
    assert "replaced or removed modules that others use: json" in done.stdout
    suite = ET.parse(site.work / "x.xml").getroot()[0]  # noqa: S314 - our own
    assert {case.get("classname") for case in suite} == {
        "broken", "mixed.TC_Bad", "mixed.TC_Good",
    }  # fmt: skip
    _check_last_lines(site, done.stdout)


def _check_last_lines(site, output):
    last = output[output.index(" in ", output.index("== ")) :].splitlines()
    position = last.index("mixed::TC_Bad::test_fails")
    kept = "itests-artifacts/mixed.TC_Bad.test_fails"
    assert last[position + 1 : position + 4] == [
        "  cause       AssertionError: 1 != 2 : numbers",
        f"  artefacts   {kept}/  (failure.txt, timeline.jsonl)",
        f"{AGAIN} --timeout 60.0 --hypervisor test --seed 7 mixed::TC_Bad::test_fails",
    ]
    failure = site.work / kept / "failure.txt"
    assert "1 != 2" in failure.read_text()
    run = json.loads((site.work / "itests-artifacts" / "run.json").read_text())
    outcomes = {test["test"]: test["outcome"] for test in run["tests"]}
    assert outcomes["mixed::TC_Good::test_skips"] == "skipped"
    assert outcomes["mixed::TC_Good::test_passes"] == "passed"
    (failed,) = [t for t in run["tests"] if t["test"] == "mixed::TC_Bad::test_fails"]
    assert failed["cause"] == "AssertionError: 1 != 2 : numbers"
    assert failed["artifacts"] == failure.parent.name
    assert re.fullmatch(r".*/mixed\.py:\d+", failed["where"])
    assert (run["outcome"], run["seed"]) == ("failed", 7)
    page = site.work / "itests-artifacts" / "report.html"
    assert f"report: {page}" in output
    assert "mixed::TC_Bad::test_fails" in page.read_text()


def test_what_failed_can_be_shown_and_run_again(site):
    # by a name that no other test has, whose failures would be in the history too
    site.install("shown", PLUGIN)
    site.run(*NO_GUESTS, "shown::TC_Bad::test_fails", "shown::TC_Good::test_passes")
    page = site.work / "itests-artifacts" / "report.html"
    before = page.read_text()
    page.unlink()
    made = site.run("report", "html")
    assert made.stdout == "Wrote itests-artifacts/report.html.\n"
    assert page.read_text() == before
    assert site.run("report", "xml").returncode == 4
    report = site.run("report")
    assert report.returncode == 1
    again = rf"{AGAIN} --hypervisor test --seed \d+ shown::TC_Bad::test_fails"
    assert re.search(again, report.stdout)
    second = site.run(*NO_GUESTS, "--lf", "shown")
    assert second.returncode == 1
    assert "1 failed, 6 deselected" in second.stdout
    (row,) = json.loads(page.with_name("run.json").read_text())["tests"]
    assert row["earlier"] == ["failed"]


def test_a_run_without_failures_leaves_nothing_in_the_directory(site):
    site.install("mixed", PLUGIN)
    done = site.run(*NO_GUESTS, "mixed::TC_Good")
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(site.work.iterdir()) == []
    assert site.run("report").returncode == 0


def test_the_same_seed_draws_the_same_numbers(site):
    site.install("mixed", PLUGIN)

    def drawn(seed):
        words = [*NO_GUESTS, "-rP", "--seed", seed, "mixed::TC_Good::test_random"]
        return re.search(r"drew (\S+)", site.run(*words).stdout)[1]

    assert drawn("1") == drawn("1") != drawn("2")


def test_options_of_pytest_keep_their_meaning(site):
    site.install("mixed", PLUGIN)
    done = site.run(
        *NO_GUESTS, "-q", "-k", "fails or tampers", "-x", "--tb=no", "mixed"
    )
    assert done.returncode == 1
    assert "1 failed, 5 deselected" in done.stdout
    assert "sandbox:" not in done.stdout
    none = site.run(*NO_GUESTS, "-k", "nothing_has_this_name", "mixed")
    assert none.returncode == 5


def test_github_and_gitlab_can_fold_the_tests_of_a_plugin(site):
    site.install("mixed", PLUGIN)
    words = [*NO_GUESTS, "mixed::TC_Good::test_passes"]
    github = site.run(*words, GITHUB_ACTIONS="true").stdout
    assert re.search(r"^::group::mixed\nPASSED .*\n::endgroup::$", github, re.MULTILINE)
    gitlab = site.run(*words, GITLAB_CI="true").stdout
    assert re.search(
        r"section_start:\d+:mixed\[collapsed=true\]\n\033\[0Kmixed", gitlab
    )
    assert re.search(r"section_end:\d+:mixed\n", gitlab)


PATIENT = """
    import os, unittest

    class TC_Patient(unittest.TestCase):
        def test_0(self):
            pass

        def test_1(self):
            with open(os.environ["SEEN"]) as output:
                self.assertIn("PASSED  patient::TC_Patient::test_0", output.read())

    def list_tests():
        return [TC_Patient]
"""


def test_the_outcome_of_a_test_is_told_when_it_ends(site, tmp_path):
    """Also to a file, or to the log of a CI."""
    site.install("patient", PATIENT)
    with (tmp_path / "output").open("w") as output:
        done = subprocess.run(
            [sys.executable, "-m", "qubes_itests", *NO_GUESTS, "patient"],
            cwd=site.work,
            env=site.environment | {"SEEN": output.name},
            stdout=output,
            timeout=300,
            check=False,
        )
    assert done.returncode == 0, (tmp_path / "output").read_text()


VM_PLUGIN = """
    from qubes.tests.extra import ExtraTestCase

    class TC_VM(ExtraTestCase):
        def setUp(self):
            super().setUp()
            (self.vm,) = self.create_vms(["one"])
            self.vm.start()
        def test_good(self):
            self.assertEqual(self.vm.run("exit 3", wait=True), 3)
        def test_bad(self):
            self.vm.run("echo precious >/rw/file; sync", user="root", wait=True)
            self.fail("on purpose")
        def test_panic(self):
            command = "sleep 0.2; echo c >/proc/sysrq-trigger"
            self.vm.run(command, user="root", wait=True)

    def list_tests():
        return [TC_VM]
"""


def test_a_failure_leaves_what_its_vms_said_and_had(site):
    site.install("guests", VM_PLUGIN, FOR_TEMPLATE)
    done = site.run("--keep=failed", "guests::TC_VM_tiny::test_bad")
    assert done.returncode == 1, done.stdout + done.stderr
    kept = site.work / "itests-artifacts" / "guests.TC_VM_tiny.test_bad"
    names = sorted(path.name for path in kept.iterdir())
    (vm,) = (n.removesuffix(".agent.log") for n in names if n.endswith(".agent.log"))
    assert names == sorted([
        "disks", "failure.txt", "storage-tree.txt", "timeline.jsonl",
        f"{vm}.agent.log", f"{vm}.console.log", f"{vm}.domain.xml",
    ])  # fmt: skip
    assert f"<name>{vm}</name>" in (kept / f"{vm}.domain.xml").read_text()
    disk = kept / "disks" / vm / "private.img"
    assert b"precious" in disk.read_bytes()
    assert f"appvms/{vm}/" in (kept / "storage-tree.txt").read_text()
    place = f"itests-artifacts/{kept.name}/disks/{vm}"
    assert f"  look inside itests shell {place}" in done.stdout


def test_templates_and_vms_are_in_the_junit_file(site):
    site.install("guests", VM_PLUGIN, FOR_TEMPLATE)
    done = site.run("--junitxml=x.xml", "guests::TC_VM_tiny::test_good")
    assert done.returncode == 0, done.stdout + done.stderr
    (case,) = ET.parse(site.work / "x.xml").iter("testcase")  # noqa: S314 - our own
    found = {p.get("name"): p.get("value") for p in case.iter("property")}
    assert found["template"] == "tiny"
    assert re.fullmatch(r"\d+\.\d{3} s", found["start of test-inst-one"])


def test_a_panic_of_a_guest_has_an_exit_status_of_its_own(site):
    site.install("guests", VM_PLUGIN, FOR_TEMPLATE)
    done = site.run("--tb=no", "guests::TC_VM_tiny::test_panic")
    assert done.returncode == 21, done.stdout + done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.startswith("guest panic in guests::TC_VM_tiny::test_panic: VM ")
    assert "Kernel panic - not syncing: sysrq triggered crash" in last


def test_a_template_that_does_not_exist_is_wrong_usage(site):
    site.install("guests", VM_PLUGIN, FOR_TEMPLATE)
    done = site.run("--template=nosuch", "--template=tiny", "-k", "good")
    assert done.returncode == 4
    assert "--template: expected one of tiny, debian-12, debian-13" in done.stderr
    assert "got 'nosuch'" in done.stderr
    assert done.stdout == ""


def test_no_root_is_one_sentence_and_its_status(site):
    site.install("mixed", PLUGIN, ONCE)
    done = site.run_as_nobody()
    assert done.returncode == 10, done.stderr
    assert done.stderr == (
        "itests: Tests mount filesystems and make namespaces, which only root"
        " may. Run the same command with sudo.\n"
    )


def test_no_kernel_is_one_sentence_and_its_status(site):
    site.install("mixed", PLUGIN)
    done = site.run(QUBES_ITESTS_KERNEL="/nonexistent")
    assert done.returncode == 14
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1


def test_list_is_json_for_programs(site):
    site.install("mixed", PLUGIN)
    rows = json.loads(site.run("list", "--json").stdout)["plugins"]
    assert "mixed" in [row["name"] for row in rows]


def test_classes_of_another_module_of_the_plugin(site):
    """Once and per template, where the entry point's module only lists them."""
    (site.site / "elsewhere_tests.py").write_text(
        "import unittest\n"
        "class TC_There(unittest.TestCase):\n"
        "    def test_passes(self): pass\n"
    )
    listing = """
        def list_tests():
            import elsewhere_tests
            return [elsewhere_tests.TC_There]
    """
    site.install("elsewhere", listing, ONCE, FOR_TEMPLATE)
    done = site.run(*NO_GUESTS, "elsewhere")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "::TC_There::test_passes" in done.stdout
    assert "::TC_There_tiny::test_passes" in done.stdout


LIMITS = """
    from qubes.tests.extra import ExtraTestCase

    class TC_Limits(ExtraTestCase):
        def test_start(self):
            self.assertEqual(self.app.default_qrexec_timeout, 77)

    def list_tests():
        return [TC_Limits]
"""


def test_a_run_says_how_long_starts_may_take(site):
    site.install("limits", LIMITS)
    done = site.run(*NO_GUESTS, "--start-timeout=77", "limits")
    assert done.returncode == 0, done.stdout + done.stderr


CLIENT = {
    "__init__": "from qubesadmin import app, config",
    "app": "class QubesLocal: pass",
    "config": "",
    "tools/__init__": "",
    "tools/qvm_list": """
        import socket, sys
        from qubesadmin import config
        def main():
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(config.QUBESD_SOCKET)
                client.sendall(sys.argv[1].encode() + b" dom0 name dom0\\0")
                client.shutdown(socket.SHUT_WR)
                print(client.makefile().read())
    """,
}


def test_tools_of_the_client_call_the_app_of_the_test(site):
    """Where the client is installed; each test has an app of its own."""
    for name, text in CLIENT.items():
        path = site.site / "qubesadmin" / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(textwrap.dedent(text))
    plugin = """
        import subprocess
        import qubes.tests
        class TC_Tools(qubes.tests.SystemTestCase):
            def names(self, name):
                self.app.add_new_vm("AppVM", name=name, label="red")
                command = ["qvm-list", "admin.vm.List+"]
                said = subprocess.run(command, capture_output=True, text=True)
                return {line.split()[0] for line in said.stdout.splitlines()[:-1]}
            def test_0(self):
                self.assertEqual(self.names("one"), {"0\\0dom0", "one", "tiny"})
            def test_1(self):
                self.assertEqual(self.names("two"), {"0\\0dom0", "two", "tiny"})
        def list_tests():
            return [TC_Tools]
    """
    site.install("tools", plugin)
    done = site.run(*NO_GUESTS, "tools")
    assert done.returncode == 0, done.stdout + done.stderr
