"""Commands that start no VM, as a user without rights."""

from __future__ import annotations

import pytest
from plugin_site import NOBODY

PLUGIN = """
    import unittest

    class TC_One(unittest.TestCase):
        def test_one(self):
            pass

    def list_tests():
        return [TC_One]
"""


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        ("--help", 0, "usage: itests [run]"),
        ("list", 0, "mine::TC_One::test_one"),
        ("run --collect-only -q mine", 0, "mine::TC_One::test_one"),
        ("doctor", 10, "Tests cannot run here until this is fixed: root"),
        ("report", 5, "No run in this directory has ended yet."),
        ("history", 5, ""),
        ("ps", 0, "No run is under way."),
        ("man", 0, ".TH ITESTS 1"),
        ("completion bash", 0, "complete -o"),
        ("template list", 0, "tiny"),
    ],
)
def test_it_needs_no_root(site, words, status, said):
    site.install("mine", PLUGIN)
    done = site.run_as_nobody(*words.split())
    assert done.returncode == status, done.stdout + done.stderr
    assert said in done.stdout
    assert "Traceback" not in done.stderr


def test_init_writes_the_files_of_its_user(site):
    done = site.run_as_nobody("init")
    assert done.returncode == 0, done.stderr
    assert (site.work / "setup.cfg").stat().st_uid == NOBODY
