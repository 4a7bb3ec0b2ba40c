"""Core dumps and errors in guests, as failures where that is asked for."""

import re
import textwrap

from plugin_site import ONCE

PLAIN = r"""
    import pytest

    def log(vm, text):
        assert vm.run(f"echo '{text}' >/dev/kmsg", user="root", wait=True) == 0

    @pytest.fixture
    def vm(vm_factory):
        return vm_factory("work")

    def test_core(vm):
        log(vm, "<6>app[7]: segfault at 0 ip 0000 sp 0000 error 4 in app")

    def test_fine(vm):
        log(vm, "<4>a warning")
        log(vm, "<3>a harmless thing, 7 times")

    @pytest.mark.guest_complains("disk [a-z]+")
    def test_half_meant(vm):
        log(vm, "<3>disk broken")
        log(vm, "<3>tape broken")
"""

CASE = """
    from qubes.tests.extra import ExtraTestCase

    class TC_Case(ExtraTestCase):
        def setUp(self):
            super().setUp()
            (self.vm,) = self.create_vms(["one"])
            self.vm.start()
        def test_it(self):
            self.vm.run("echo '<3>disk broken' >/dev/kmsg", user="root", wait=True)

    def list_tests():
        return [TC_Case]
"""


def test_what_guests_log_fails_tests_if_it_is_no_exception(site):
    (site.work / "test_it.py").write_text(textwrap.dedent(PLAIN))
    (site.work / "setup.cfg").write_text(
        "[qubes_itests]\nfail_on = coredump journal\n"
        "allow_line =\n    harmless .*, \\d+ times$\n    (?i)NOTHING\n"
    )
    done = site.run("-p", "qubes_itests", "-v", "-rA", program="pytest")
    outcomes = dict(
        reversed(re.fullmatch(r"(\w+) test_it.py::(\w+).*", line).groups())
        for line in done.stdout.splitlines()
        if line.startswith(("PASSED test_it", "FAILED test_it"))
    )
    assert outcomes == {
        "test_core": "FAILED",
        "test_fine": "PASSED",
        "test_half_meant": "FAILED",
    }
    told = "a guest complained (--fail-on coredump journal): VM work: kernel: "
    for text in (
        "app[7]: segfault at 0 ip 0000 sp 0000 error 4 in app",
        "tape broken",
    ):
        assert f"  cause       {told}{text}" in done.stdout


def test_a_test_case_fails_while_its_vms_are_there(site):
    site.install("case", CASE, ONCE)
    done = site.run("--fail-on=journal", "case")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "VM test-inst-one: kernel: disk broken" in done.stdout
    (folder,) = site.work.glob("itests-artifacts/case*")
    assert (folder / "test-inst-one.domain.xml").is_file()
    assert "--fail-on journal --seed" in done.stdout


def test_without_timelines_nothing_can_be_found_in_them(site):
    done = site.run("--fail-on=journal", "--trace=off", "case")
    assert done.returncode == 4
    assert "--trace=off records none" in done.stderr + done.stdout


FOLLOWS = """
from qubes_itests import timeline

def test_it():
    assert timeline.current().follow_logs
"""


def test_logs_are_followed_where_timelines_of_all_tests_are_kept(site):
    (site.work / "test_it.py").write_text(FOLLOWS)
    words = ("-p", "qubes_itests", "-q")
    assert site.run(*words, "--itests-trace=on", program="pytest").returncode == 0
    assert site.run(*words, program="pytest").returncode == 1
