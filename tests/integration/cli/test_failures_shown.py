"""What a person sees of a failure, and finds of it."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET

import pytest
from plugin_site import FOR_TEMPLATE, ONCE

from qubes_itests.timeline.document import load

NO_GUESTS = ("--hypervisor", "test")

GUESTS = """
    import its_time, subprocess
    from qubes.tests.extra import ExtraTestCase

    class TC_VM(ExtraTestCase):
        def setUp(self):
            super().setUp()
            (self.vm,) = self.create_vms(["one"])
            self.vm.start()

        def test_1_typo(self):
            self.assertEqual(self.vm.run("rve < /etc/passwd", wait=True), 0)

        def test_2_status(self):
            self.loop.run_until_complete(
                self.vm.run_for_stdio("echo no such key >&2; exit 3")
            )

        def test_3_hangs(self):
            its_time.is_nearly_over(5); self.vm.run("sleep 9000", wait=True)

        def test_4_panics(self):
            self.vm.run("echo c > /proc/sysrq-trigger", user="root", wait=True)

    def list_tests():
        return [TC_VM]
"""

NO_VMS = """
    import os
    import signal
    import unittest

    class TC_Plain(unittest.TestCase):
        def test_1_passes(self):
            pass

        def test_2_fails(self):
            self.assertEqual(1, 2)

        def test_3_is_interrupted(self):
            os.kill(os.getpid(), signal.SIGINT)
            signal.pause()

        def test_4_is_not_run(self):
            pass

    def list_tests():
        return [TC_Plain]
"""


def ending(output, test):
    """Return what the end of a run tells of a test."""
    return output.rpartition(f"\n\n{test}\n")[2].partition("\n\n")[0]


def test_the_end_tells_which_command_ended_how_and_the_traceback_only_the_test(site):
    site.install("guests", GUESTS, FOR_TEMPLATE)
    done = site.run("-v", "--timeout=600", "--junitxml=x.xml", "guests")
    assert done.returncode == 21, done.stdout + done.stderr
    case = "guests::TC_VM_tiny"
    typo = ending(done.stdout, f"{case}::test_1_typo")
    assert re.search(
        r'runs "rve < /etc/passwd"  → status 127, .*guests\.py:12$', typo, re.MULTILINE
    )
    assert re.search(r"^ +\| .*rve: not found$", typo, re.MULTILINE)
    status = ending(done.stdout, f"{case}::test_2_status")
    assert re.search(
        r"→ status 3, .*guests\.py:15\n +\| no such key$", status, re.MULTILINE
    )
    assert re.search(r"^E +\| no such key$", done.stdout, re.MULTILINE)
    hang = ending(done.stdout, f"{case}::test_3_hangs")
    assert re.search(
        r"cause       no end within 600 s \(--timeout\):"
        r' vm\.run\("sleep 9000"\) of test-inst-one, .*guests\.py:20$',
        hang,
        re.MULTILINE,
    )
    assert "… has not ended" in hang
    kept = site.work / "itests-artifacts"
    assert "GuestProcess.wait" in (
        (kept / "guests.TC_VM_tiny.test_3_hangs" / "stacks.txt").read_text()
    )
    live = done.stdout[: done.stdout.index("= FAILURES =")]
    assert re.search(r"^ +\d+\.\d\d test-inst-one starts  → \d", live, re.MULTILINE)
    # frames of ours and of asyncio are in no traceback
    shown = done.stdout[done.stdout.index("= FAILURES =") :]
    assert not re.search(r"/(qubes_itests|asyncio|concurrent)/[\w/]+\.py:\d", shown)
    cases = ET.parse(site.work / "x.xml").iter("testcase")  # noqa: S314 - our own
    failed = {case.get("name"): case.find("failure") for case in cases}
    assert "Kernel panic - not syncing" in failed["test_4_panics"].get("message")
    panic = kept / "guests.TC_VM_tiny.test_4_panics"
    console = (panic / "test-inst-one.console.log").read_text()
    assert "Kernel panic - not syncing" in console
    _, records = load((panic / "timeline.jsonl").read_bytes())
    kinds = {record["kind"] for record in records}
    assert {"phase", "state", "start", "run", "storage", "console", "failure"} <= kinds


def test_an_interrupted_run_says_where_and_counts_what_was_not_run(site):
    site.install("plain", NO_VMS, ONCE)
    done = site.run(*NO_GUESTS, "plain")
    assert done.returncode == 2, done.stdout + done.stderr
    told = ending(done.stdout, "plain::TC_Plain::test_3_is_interrupted")
    assert re.search(
        r"cause       interrupted after .* s: the test, .*plain\.py:1[45]", told
    )
    assert "The run was interrupted: 1 test was not run." in done.stdout
    kept = site.work / "itests-artifacts"
    run = json.loads((kept / "run.json").read_text())
    assert run["outcome"] == "interrupted"
    place = kept / "plain.TC_Plain.test_3_is_interrupted" / "timeline.jsonl"
    header, _ = load(place.read_bytes())
    assert header.outcome == "interrupted"
    report = site.run("report")
    assert "The run was interrupted: 1 test was not run." in report.stdout
    assert report.returncode == 1


def test_artefacts_that_cannot_be_kept_do_not_hide_a_failure(site):
    site.install("plain", NO_VMS, ONCE)
    (site.work / "itests-artifacts").write_text("in the way")
    done = site.run(*NO_GUESTS, "plain::TC_Plain::test_2_fails")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "  cause       AssertionError: 1 != 2" in done.stdout
    assert "not all artefacts could be kept: NotADirectoryError" in done.stdout


@pytest.mark.parametrize(
    ("trace", "kept"),
    [("on", {"test_1_passes", "test_2_fails"}), ("off", set())],
)
def test_timelines_are_kept_of_the_tests_that_were_asked_for(site, trace, kept):
    site.install("plain", NO_VMS, ONCE)
    tests = ("plain::TC_Plain::test_1_passes", "plain::TC_Plain::test_2_fails")
    done = site.run(*NO_GUESTS, f"--trace={trace}", *tests)
    assert done.returncode == 1, done.stdout + done.stderr
    found = site.work.glob("itests-artifacts/*/timeline.jsonl")
    assert {path.parent.name.rpartition(".")[2] for path in found} == kept
