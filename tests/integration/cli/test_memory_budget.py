"""Runs of tests on a machine of limited memory: ``--memory-budget``."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from qubes_itests.qmemman import timeline

PLUGIN = """
    import pathlib
    from qubes.tests.extra import ExtraTestCase

    class TC_Small(ExtraTestCase):
        def test_fits(self):
            vm, = self.create_vms(["one"])
            vm.start()
            self.assertIsNotNone(self.app.qmemman)

        def test_too_large(self):
            vm, other = self.create_vms(["one", "other"])
            vm.start()
            other.memory = 1500
            other.start()

        def test_long(self):
            vm, = self.create_vms(["one"])
            vm.start()
            vm.run("sleep 100", wait=True)

    def list_tests():
        return [TC_Small]
"""


@pytest.fixture
def small(site):
    site.install("small", PLUGIN)
    return site


def test_a_vm_too_many_fails_its_test_and_leaves_the_timeline(small):
    words = ("small::TC_Small::test_fits", "small::TC_Small::test_too_large")
    done = small.run("--memory-budget=2500", *words)
    assert done.returncode == 1, done.stdout + done.stderr
    out = done.stdout
    assert "memory: 2500 MiB for dom0 and the VMs of each test" in out
    assert "PASSED  small::TC_Small::test_fits" in out
    assert "could not have its memory: not enough memory: 1519 MiB asked" in out
    assert "test-inst-one 400 MiB" in out
    assert "memory.jsonl, memory.svg" in out
    (picture,) = small.work.glob("itests-artifacts/*too_large*/memory.svg")
    assert "test-inst-one" in picture.read_text()
    assert timeline.read(picture.with_suffix(".jsonl"))[-1].total == 2500 << 20


def test_without_a_budget_nothing_is_asked(small):
    done = small.run("small::TC_Small::test_fits")
    assert "self.assertIsNotNone(self.app.qmemman)" in done.stdout
    assert "memory:" not in done.stdout
    assert "memory.jsonl" not in done.stdout


def test_a_budget_that_cannot_be_ends_the_run_at_once(small):
    for budget, said in (
        ("900", "a machine of 900 MiB"),
        ("4GiB", "expected a whole number, got '4GiB'"),
        ("-1", "a machine of -1 MiB"),
    ):
        done = small.run(f"--memory-budget={budget}")
        assert done.returncode == 4
        assert f"--memory-budget: memory_budget: {said}" in done.stderr


def test_the_command_memory_finds_the_run_under_way(small):
    """From outside its sandbox; before and after, it says what to do."""
    missing = small.run("memory")
    assert missing.returncode != 0
    assert "begin one with --memory-budget=4096" in missing.stderr
    command = [sys.executable, "-m", "qubes_itests", "--memory-budget=2500"]
    run = subprocess.Popen(
        [*command, "small::TC_Small::test_long"],
        cwd=small.work,
        env=small.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    try:
        end = time.monotonic() + 600
        while "test-inst-one" not in (shown := small.run("memory")).stdout:
            assert time.monotonic() < end, shown.stdout + shown.stderr
        assert "of 2500 MiB" in shown.stdout
    finally:
        run.terminate()
        run.wait(300)
    assert small.run("memory").returncode != 0
